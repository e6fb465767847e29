"""Around adapted models: rows that are no samples, messages to users, and the functions replaced in others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.loaders.lora_base as lora_base
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeModel, T5Config, T5EncoderModel
from transformers.integrations.peft import PeftAdapterMixin as TransformersMixin

from nara_diffusion import noise_level, wraps
from nara_diffusion.tuner.checkpointing import CheckpointWithCore
from tests.acceptance._lives import add_nara, frozen_sd, predict, save_lora
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, disturb, lora_config, nara_config, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")

# ---------------------------------------------------------------------- rows that are no samples

LENGTH = 4
"""Of the batch and of its texts, so that there are as many rows as λ by chance."""
LEVELS = torch.tensor([0.05, 0.4, 0.6, 0.93])
IDS = torch.randint(3, 40, (LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
X = torch.randn(LENGTH, LENGTH, 16, generator=torch.Generator().manual_seed(0))
QWEN = {
    "vocab_size": 49,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
QWEN |= {"num_key_value_heads": 1, "num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
T5 = {"vocab_size": 49, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 3}


def encoder(**options: bool) -> OneLayer:
    return OneLayer(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, **options))


MODELS: dict[str, tuple[Any, Tensor, list[str], str]] = {
    "PyTorch, which sees (l, b, d)": (encoder, X, ["linear1"], "positions"),
    "an embedding of positions": (
        lambda: OneLayer(nn.Embedding(9, 16)),
        IDS[0] % 9,
        ["layer"],
        "inside layer .*layer' is 1",
    ),
    "experts": (lambda: Qwen2MoeModel(Qwen2MoeConfig(**QWEN)), IDS, ["shared_expert.up_proj"], "tokens"),
    "T5's positions": (lambda: T5EncoderModel(T5Config(**T5)), IDS, ["relative_attention_bias"], "positions"),
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        actual = model(x)
    return actual if isinstance(actual, Tensor) else actual[0]


@pytest.mark.parametrize("name", MODELS)
def test_rows_known_as_no_samples_refuse_several_levels(name: str) -> None:
    make, x, targets, message = MODELS[name]
    model = adapted(make(), target_modules=targets)
    with noise_level(model, LEVELS), pytest.raises(ValueError, match=message):
        output(model, x)
    with noise_level(model, 0.3):
        shared = output(model, x)
    with model.disable_adapter():
        assert relative_error(output(model, x), shared) > 1e-4


def test_rows_that_are_samples_have_a_level_each() -> None:
    model = adapted(encoder(batch_first=True), target_modules=["linear1", "linear2"])
    with noise_level(model, LEVELS):
        together = output(model, X)
    for index, level in enumerate(LEVELS.tolist()):
        with noise_level(model, level):
            assert relative_error(together[index], output(model, X)[index]) < 1e-5


def test_unequal_levels_are_refused_for_split_samples() -> None:
    for kind, dim, message in [
        ("ErnieImageTransformer2DModel", None, "see tokens where others see samples"),
        ("UNetMotionModel", 0, "blocks of UNetMotionModel run on slices of the batch"),
    ]:
        base: Any = type(kind, (TwoLayers,), {})()
        base._chunk_size, base._chunk_dim = 2, dim
        model = adapted(base, target_modules=["first"])
        with pytest.raises(ValueError, match=message):
            model(torch.randn(2, 7), torch.tensor([100, 900]))
    base._chunk_dim = 1
    model(torch.randn(2, 7), torch.tensor([100, 900]))


@pytest.mark.parametrize("kind", ["UNetMotionModel", "ErnieImageTransformer2DModel"])
def test_unequal_levels_of_separate_part_are_refused(kind: str) -> None:
    base: Any = type(kind, (TwoLayers,), {})()
    model = adapted(base, target_modules=["first"])
    with noise_level(model, [0.2, 0.7]), pytest.raises(RuntimeError, match="has 2 values, but a part of a model"):
        base.first(torch.randn(2, 7))
    with noise_level(model, 0.2):
        base.first(torch.randn(2, 7))


def test_two_levels_for_four_samples_are_refused() -> None:
    model = adapted(type("UNetMotionModel", (TwoLayers,), {})(), target_modules=["first"])
    with noise_level(model, [0.2, 0.7]):
        model(torch.randn(2, 7))
        with pytest.raises(ValueError, match="has 2 values, but the batch is 4"):
            model(torch.randn(4, 7))


def test_all_that_trains_has_lora_in_its_name() -> None:
    """By which PEFT's users, and scripts of other libraries, choose what goes to the optimizer."""
    for core_type in ("hypernetwork", "constant", "knots"):
        model = adapted(TwoLayers(), target_modules=["first"], core_type=core_type)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("lora_core.cores.default." in name for name in trained)
        assert all("lora_" in name for name in trained)


def test_set_adapters_on_compiled_part_names_the_remedy() -> None:
    pipe: Any = add_nara(frozen_sd(), "a")
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ValueError, match=r"unet was returned by torch.compile.* pipe\.unet\.compile\(\)"):
        pipe.set_adapters("a", 0.5)
    pipe.unet = pipe.unet._orig_mod
    pipe.set_adapters("a", 0.5)


def test_context_may_be_entered_again_inside_itself() -> None:
    model, x = adapted(TwoLayers(), target_modules=["first"]), torch.randn(2, 7)
    with noise_level(model, 0.3):
        expected = model(x)
    context = noise_level(model, 0.3)
    for _ in range(2):
        with context, noise_level(model, 0.9), context:
            assert torch.equal(model(x), expected)
        with pytest.raises(ValueError, match="λ is not known"):
            model(x)


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


# ---------------------------------------------------------------------- replaced functions of other libraries

WRAPPED: list[tuple[Any, str]] = [
    (PeftModel, "from_pretrained"),
    (PeftModel, "load_adapter"),
    (TransformersMixin, "load_adapter"),
    (lora_base.LoraBaseMixin, "set_adapters"),
    (lora_base, "_get_model_file"),
]


def of(owner: Any, name: str) -> Any:
    function = vars(owner)[name]
    return getattr(function, "__func__", function)


def test_wraps_are_these_five_once() -> None:
    functions = [of(*place) for place in WRAPPED]
    assert all(function.__code__.co_filename == wraps.__file__ for function in functions)
    assert all(function.__wrapped__.__code__.co_filename != wraps.__file__ for function in functions)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_on_models_without_nara_each_calls_its_own(tmp_path: Path, tiny_llama: Any, monkeypatch) -> None:
    def called(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("is for a NaRA alone")

    for name in ("inject_adapter_in_model", "give_strength", "check_strength"):
        monkeypatch.setattr(wraps, name, called)
    model: Any = get_peft_model(TwoLayers(), lora_config(target_modules=["first"]))
    disturb(model)
    model.save_pretrained(tmp_path / "lora")
    loaded: Any = PeftModel.from_pretrained(TwoLayers(), tmp_path / "lora")
    loaded.load_adapter(tmp_path / "lora", "again")
    with pytest.raises(ValueError, match="adapter_config"):
        loaded.load_adapter(tmp_path / "none", "again and again")
    tiny_llama.save_pretrained(tmp_path / "base")
    text: Any = get_peft_model(tiny_llama, lora_config(target_modules=["q_proj"]))
    text.save_pretrained(tmp_path / "text")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.load_adapter(tmp_path / "text")
    assert any("lora_A" in name for name, _ in base.named_parameters())
    pipe: Any = frozen_sd()
    tensors = save_lora(tmp_path)
    for name in ("a", "b"):
        pipe.load_lora_weights(tensors, adapter_name=name)
    pipe.unet.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors", adapter_name="c")
    for weights in (None, 0.5, [0.5, {"unet": {"down": 0.2}}]):
        pipe.set_adapters(["a", "b"], weights)
    actual = predict(pipe)
    lora_base.LoraBaseMixin.set_adapters.__wrapped__(pipe, ["a", "b"], weights)  # type: ignore[attr-defined]
    assert torch.equal(predict(pipe), actual)
    pipe.unet.save_lora_adapter(tmp_path / "out", adapter_name="a")
    assert list((tmp_path / "out").iterdir())


def test_listing_parameters_hides_deleted_cores_without_change() -> None:
    model = adapted(TwoLayers(), target_modules=["first"])
    model.add_adapter("other", nara_config(target_modules=["second"]))
    root: Any = model.base_model.model
    of_other = list(root.lora_core.cores["other"].parameters())
    for parameter in of_other:
        parameter.requires_grad = True  # though A of `other`, which is not active, is frozen
    listed = {id(parameter) for parameter in model.parameters()}
    assert listed.issuperset(map(id, of_other))
    assert all(parameter.requires_grad for parameter in of_other)
    del root.peft_config["other"]
    assert not [name for name, _ in model.named_parameters() if ".cores.other." in name]
    assert not [name for name, _ in root.lora_core.named_modules() if name.startswith("cores.other")]
    assert list(root.lora_core.cores) == ["default", "other"]


@pytest.mark.parametrize("how", ["set_adapter", "disable", "set_requires_grad", "layer by layer"])
def test_peft_calls_switch_core_training_with_factors(how: str) -> None:
    model = adapted(TwoLayers(), target_modules=["first"])
    model.add_adapter("other", nara_config(target_modules=["second", "first"]))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    switch: dict[str, Callable[[], Any]] = {
        "set_adapter": lambda: model.set_adapter("other"),
        "disable": model.base_model.disable_adapter_layers,
        "set_requires_grad": lambda: model.set_requires_grad("other"),
        "layer by layer": lambda: [layer.set_adapter(["other", "default"]) for layer in layers],
    }
    switch[how]()
    cores: Any = model.base_model.model.lora_core.cores
    for name in ("default", "other"):
        factor = model.base_model.model.first.lora_A[name].weight
        assert {parameter.requires_grad for parameter in cores[name].parameters()} == {factor.requires_grad}
