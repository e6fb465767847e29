"""What a user is told who named a module wrongly, compiled a part, disabled adapters, or reused a context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

from nara_diffusion import StrengthSchedule, noise_level, set_strength
from nara_diffusion.tuner.checkpointing import CheckpointWithCore
from nara_diffusion.tuner.strength import strength_of
from tests.acceptance._lives import assert_near, frozen_sd, predict, save_nara
from tests.helpers.adapted import TwoLayers, adapted, lora_config, nara_config
from tests.helpers.small_pipelines import small_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
]
SCHEDULE = StrengthSchedule([(0.0, 1.0), (1.0, 0.2)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nara(tmp_path_factory.mktemp("nara"))


@pytest.fixture
def pipe(folder: Path) -> Any:
    """With an adapter "a"."""
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name="a")
    return pipe


@pytest.mark.parametrize("targets", [["to_Q"], ["attn1.to_Q"], "to_Q"], ids=str)
def test_targets_that_match_nothing_get_the_nearest_names(targets: Any) -> None:
    unet = small_unet(12)
    with pytest.raises(ValueError, match=r"to_Q.* not found in the base model.* Did you mean 'to_q'\?$"):
        unet.add_adapter(nara_config(target_modules=targets))
    assert not hasattr(unet, "nara_core")
    with pytest.raises(
        ValueError, match=r"not found in the base model\. Please check the target modules and try again"
    ):
        get_peft_model(TwoLayers(), nara_config(target_modules=["xxxxxx"]))


def test_set_adapters_of_a_compiled_part_names_compiling_in_place(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ValueError, match=r"unet is what torch.compile returned.* pipe\.unet\.compile\(\)"):
        pipe.set_adapters("a", 0.5)
    pipe.unet = pipe.unet._orig_mod
    pipe.set_adapters("a", 0.5)


def test_schedule_that_no_level_or_whole_adapter_belongs_to_is_refused_before_anything_changes(pipe: Any) -> None:
    inject_adapter_in_model(lora_config(target_modules=["q_proj"]), pipe.text_encoder, "a")
    pipe.set_adapters("a", 0.7)
    before = predict(pipe)
    for weights, message in [
        (SCHEDULE, r"for text_encoder, of which there is no λ: .*'text_encoder': 1\.0"),
        ({"unet": {"down": {"block_0": SCHEDULE}, "mid": 0.3}}, "for unet, of which each block has a number: a sched"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.set_adapters("a", weights)
        assert torch.equal(predict(pipe), before)
    pipe.set_adapters("a", {"unet": SCHEDULE, "text_encoder": 1.0})
    assert not torch.allclose(predict(pipe), before)


def test_loading_after_disabling_says_what_is_on(pipe: Any, folder: Path, caplog: Any) -> None:
    on = predict(pipe)
    pipe.disable_lora()
    off = predict(pipe)
    pipe.load_nara_weights(folder, adapter_name="b")
    assert "were off, by disable_lora(): loading 'b' switches it on" in caplog.text
    assert "are off" not in caplog.text
    assert pipe.get_active_adapters() == ["b"]
    assert_near(predict(pipe), on, pipe.unet)
    pipe.disable_lora()
    pipe.unet.add_adapter(nara_config(target_modules=["to_k", "conv1"]), "c")
    assert "are off, as disable_lora() or disable_adapters() has left them, and so is 'c'" in caplog.text
    assert torch.equal(predict(pipe), off)


def test_a_context_may_be_entered_again_also_inside_of_itself() -> None:
    model, x = adapted(TwoLayers(), target_modules=["first"]), torch.randn(2, 7)
    with noise_level(model, 0.3):
        expected = model(x)
    context = noise_level(model, 0.3)
    for _ in range(2):
        with context, noise_level(model, 0.9), context:
            assert torch.equal(model(x), expected)
        with pytest.raises(ValueError, match="λ is not known"):
            model(x)
    assert torch.equal(context(model)(x), expected)  # as a decorator


@pytest.mark.parametrize(
    "options",
    [{"bias": "lora_only"}, {"lora_bias": True}, {"modules_to_save": ["second"]}, {"init_lora_weights": "pissa"}],
    ids=str,
)
def test_strength_over_lambda_of_a_lora_that_changes_more_than_its_update_is_refused(options: Any) -> None:
    model = get_peft_model(TwoLayers(), lora_config(target_modules=["first"], **options))
    with pytest.raises(ValueError, match=f"would not reach what {next(iter(options))} changes in the model: give"):
        set_strength(model, "default", SCHEDULE)
    set_strength(model, "default", 0.5)


def test_checkpoint_functions_are_wrapped_once_a_model(tiny_llama: Any) -> None:
    inner = adapted(tiny_llama, target_modules=["q_proj"]).base_model.model
    outer = get_peft_model(torch.nn.Sequential(inner), nara_config(target_modules=["v_proj"]))
    inner.model.layers[0]._gradient_checkpointing_func = checkpoint
    for _ in range(3):
        with noise_level(outer, 0.3):
            outer(torch.tensor([[3, 4, 5]]))
    wrapped = inner.model.layers[0]._gradient_checkpointing_func
    assert isinstance(wrapped, CheckpointWithCore)
    assert isinstance(wrapped.checkpoint, CheckpointWithCore)
    assert wrapped.checkpoint.checkpoint is checkpoint


def test_schedule_goes_with_its_adapter_also_where_a_lora_takes_its_name(pipe: Any, folder: Path) -> None:
    set_strength(pipe.unet, "a", SCHEDULE)
    pipe.load_nara_weights(folder, adapter_name="b")
    pipe.delete_adapters("a")
    inject_adapter_in_model(lora_config(target_modules=["to_k"]), pipe.unet, "a")
    assert strength_of(pipe.unet, "a") is None
    set_strength(pipe.unet, "a", None)
