"""A step of training or sampling never waits for the device: the host reads no value, but for the end of generation.

Counted on the CPU, and run on fake tensors, which have no values: a read raises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from nara_diffusion.dllm import generate, masked_diffusion_loss
from nara_diffusion.dllm.models.shifted_logits import ShiftedQwen2ForCausalLM
from nara_diffusion.training.live_storages import to_fake
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.host_reads import HostReads, fake_mode
from tests.helpers.small_pipelines import small_flux, small_sd, small_sd3, small_sdxl

MASK, LENGTH = 30, 11
FAMILIES = {"sd": small_sd, "sdxl": small_sdxl, "sd3": small_sd3, "flux": small_flux}
SIZE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "is_causal": False,
    "mask_token_id": MASK,
    "pad_token_id": 31,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BATCH: dict[str, Any] = {
    "input_ids": torch.arange(3 * LENGTH).remainder(29).view(3, LENGTH),
    "prompt_lengths": [2, 4, 3],
    "sample_indices": [5, 6, 7],
    "seed": 0,
}


def text_model(kind: str = "llada", **changes: Any) -> Any:
    is_llada = kind == "llada"
    base = LlamaForCausalLM(LlamaConfig(**SIZE)) if is_llada else ShiftedQwen2ForCausalLM(Qwen2Config(**SIZE))
    model = get_peft_model(base, nara_config(target_modules=["q_proj", "o_proj", "up_proj"], **changes))
    disturb(model)
    return model.train()


def step(model: nn.Module, loss: Tensor) -> None:
    """The rest of a training step."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], foreach=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("options", [{}, {"complementary": True}, {"chunk_size": None}])
def test_step_of_text_training_reads_nothing(kind: str, options: dict[str, Any]) -> None:
    model = text_model(kind)
    with HostReads() as reads:
        loss = masked_diffusion_loss(model, **BATCH, **options).loss
        loss.backward()
    assert reads.names == []


def test_step_of_text_training_runs_on_fake_tensors() -> None:
    model, mode = text_model(), fake_mode()
    to_fake(model, mode)
    with mode:
        batch = BATCH | {"input_ids": mode.from_tensor(BATCH["input_ids"])}
        result = masked_diffusion_loss(model, **batch)
        step(model, result.loss)
        assert result.per_sample.shape == (3,)
        with pytest.raises(Exception, match="_local_scalar_dense"):  # this is how a read shows
            result.loss.item()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"cfg_scale": 1.5, "remasking": "random"}])
def test_step_of_generation_reads_one_thing(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model().eval()
    prompts = torch.arange(2 * 3).view(2, 3)

    def reads(length: int) -> int:
        with HostReads() as found:
            options = {"stop_at_eos": False, "block_length": 2, "return_stats": True, **settings}
            result = generate(model, prompts, gen_length=length, steps=length, **options)
        assert result.forwards == length  # type: ignore[union-attr]
        return len(found.names)

    monkeypatch.setattr("nara_diffusion.noise.level.host_values", lambda tensor: None)  # as on a device
    lists: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor.numel()) or tolist(tensor))
    assert reads(8) - reads(4) == 0  # all that is read by an op is read at the start
    before = len(lists)
    reads(4)
    four, before = len(lists) - before, len(lists)
    reads(8)
    assert (len(lists) - before - four) / 4 == 1  # the rows with a mask left


# ---------------------------------------------------------------------- images


def denoiser_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def recorded(name: str) -> tuple[Any, tuple, dict[str, Any]]:
    """An adapted denoiser, and the arguments of one of its pipeline's calls."""
    pipe, seen = FAMILIES[name](), []
    denoiser = denoiser_of(pipe)
    handle = denoiser.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    pipe("a toy", num_inference_steps=1, output_type="latent", height=16, width=16)
    handle.remove()
    denoiser.add_adapter(nara_config(target_modules=["to_q", "to_k", "to_out.0"]))
    disturb(denoiser)
    return denoiser, *seen[0]


def on(mode: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    return {key: on(mode, each) for key, each in value.items()} if isinstance(value, dict) else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_step_of_an_image_model_reads_nothing_and_runs_on_fake_tensors(name: str) -> None:
    denoiser, args, kwargs = recorded(name)
    with HostReads() as reads:
        output = denoiser(*args, **kwargs)
        (output[0] if isinstance(output, tuple) else output.sample).square().mean().backward()
    assert reads.names == []
    mode = fake_mode()
    to_fake(denoiser, mode)
    with mode:
        args, kwargs = tuple(on(mode, each) for each in args), {key: on(mode, each) for key, each in kwargs.items()}
        with torch.no_grad():
            denoiser(*args, **kwargs)
        output = denoiser(*args, **kwargs)
        step(denoiser, (output[0] if isinstance(output, tuple) else output.sample).square().mean())
