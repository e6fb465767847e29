"""The λ that this package tells a language model is the masked share: adapters that learnt another are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from nara_diffusion import NaraConfig, noise_level, set_noise_source
from nara_diffusion.dllm import InputIdsNoise, generate, log_likelihood, masked_diffusion_loss, noise_level_curve
from nara_diffusion.dllm.noise_conditioning import conditioned
from nara_diffusion.noise.signals import NoiseSignals

from .conftest import disturb

MASK = 49
PROMPTS = torch.randint(0, MASK, (2, 4), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, MASK, (2, 9), generator=torch.Generator().manual_seed(2))
ROWS = [{"input_ids": row.tolist(), "prompt_length": 4} for row in IDS]

CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "generate": lambda model: generate(model, PROMPTS, gen_length=3),
    "masked_diffusion_loss": lambda model: masked_diffusion_loss(model, IDS, [4, 4], seed=0).loss,
    "log_likelihood": lambda model: log_likelihood(model, IDS, [4, 4], samples=2),
    "noise_level_curve": lambda model: noise_level_curve(model, ROWS, [0.5], progress=False),
}


def config(convention: str | None = None, **options: Any) -> NaraConfig:
    return NaraConfig(
        **{"r": 3, "target_modules": ["q_proj"], "core_hidden_dims": (8,), "noise_convention": convention, **options}
    )


def adapted(model: nn.Module, convention: str | None = None, **options: Any) -> PeftModel:
    peft_model = get_peft_model(model, config(convention, **options))  # type: ignore[arg-type]
    disturb(peft_model)
    return peft_model


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.usefixtures("process_group")
def test_an_adapter_of_another_convention_is_refused(call, tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama, "share_of_sentences")
    message = (
        "'default' was trained with λ defined as 'share_of_sentences', and is about to be told 'masked_share'"
        r".*the masked share of the answer.*noise_level\(model, value\)"
    )
    for outermost in (model, torch.compile(model, backend="eager"), DistributedDataParallel(model)):
        with pytest.raises(ValueError, match=message):
            call(outermost)  # type: ignore[arg-type]
    assert model.peft_config["default"].noise_convention == "share_of_sentences"  # type: ignore[attr-defined]


@pytest.mark.parametrize("convention", [None, "masked_share"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_adapter_of_no_convention_adopts_it_and_is_saved_with_it(
    call, convention, tiny_llama: LlamaForCausalLM, tmp_path
) -> None:
    model = adapted(tiny_llama, convention)
    call(model)
    model.save_pretrained(tmp_path)
    assert NaraConfig.from_pretrained(tmp_path).noise_convention == "masked_share"
    with pytest.raises(ValueError, match="trained with λ defined as 'masked_share'"):
        set_noise_source(model, share_of_sentences)
    set_noise_source(model, InputIdsNoise(4, mask_token_id=MASK))


def share_of_sentences(module: nn.Module, args: Any, kwargs: Any) -> NoiseSignals:
    return NoiseSignals(torch.tensor([0.5]))


share_of_sentences.convention = "share_of_sentences"  # type: ignore[attr-defined]


def test_only_adapters_that_serve_and_depend_on_the_level_count(tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama)
    model.add_adapter("other", config("share_of_sentences"))
    model.add_adapter("free", config("share_of_sentences", core_type="constant"))
    model.add_adapter("idle", config())
    call = CALLS["generate"]
    call(model)
    model.base_model.set_adapter(["default", "free"])  # type: ignore[operator]
    call(model)
    assert model.peft_config["idle"].noise_convention is None  # type: ignore[attr-defined]
    model.base_model.set_adapter(["idle", "other"])  # type: ignore[operator]
    with pytest.raises(ValueError, match="'other' was trained with λ defined as 'share_of_sentences'"):
        call(model)
    assert model.peft_config["idle"].noise_convention is None  # type: ignore[attr-defined]
    with model.disable_adapter():
        call(model)


def test_a_source_that_was_set_has_named_the_convention(tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama)
    set_noise_source(model, share_of_sentences)
    with pytest.raises(ValueError, match="told 'masked_share'"):
        CALLS["generate"](model)
    with noise_level(model, 0.4):  # anybody's own
        model(PROMPTS)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_adapter_that_is_merged_at_one_level_is_refused_at_others(call, tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama)
    model.merge_adapter(noise_level=0.3)
    for outermost in (model, torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match=r"merged at noise_level 0\.3, but this forward asks for.*unmerge_adapter"):
            call(outermost)  # type: ignore[arg-type]
    model.unmerge_adapter()
    call(model)
    model.merge_adapter(noise_level=0.3)
    with model.disable_adapter():  # PEFT takes it out
        call(model)


def test_merged_at_the_level_that_is_asked_for_it_runs(tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama)
    expected = generate(model, PROMPTS, gen_length=3, steps=1)
    model.merge_adapter(noise_level=1.0)  # that of the first step
    assert torch.equal(generate(model, PROMPTS, gen_length=3, steps=1), expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_merged_adapter_that_needs_no_level_runs_at_all(call, tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama, core_type="constant")
    model.merge_adapter()
    call(model)


def test_refusing_and_adopting_take_no_walk_over_the_model_of_their_own(monkeypatch, adapted_llama: PeftModel) -> None:
    import nara_diffusion.runtime.modules as modules

    walks = []

    def counted(model: nn.Module) -> list[Any]:
        walks.append(model)
        return found(model)

    found = modules._holders_by_root
    monkeypatch.setattr(modules, "_holders_by_root", counted)
    masked = torch.ones(2, 9, dtype=torch.bool)
    with conditioned(adapted_llama, torch.tensor([0.2, 0.7]), masked=masked, answer=masked):
        pass
    assert len(walks) == 3  # whether it is noise-aware, the mask density's radius, whose λ is set
