"""A step of training or sampling never waits for the device: the host reads no value, but for the end of generation.

Models are on the meta device, which has no values: what reads one raises, and so does what mixes its tensors with the
host's. (FakeTensorMode would take the host's own tensors for the device's.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from device_reads import DEVICE, DeviceReads
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import generate, load_backbone, masked_diffusion_loss
from nara_diffusion.dllm.canvas_loss import block_diffusion_loss
from nara_diffusion.dllm.masked_sampler import State
from nara_diffusion.dllm.models.model_classes import ShiftedQwen2ForCausalLM
from nara_diffusion.dllm.sampler import answer_prompts
from nara_diffusion.dreambooth.caches import LatentCache, PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.pipelines import family_of
from nara_diffusion.dreambooth.source_images import records_from_folder
from nara_diffusion.dreambooth.training_step import TrainingStep
from tests.dreambooth.pictures import folder_of
from tests.helpers.adapted import nara_config
from tests.helpers.mixtures import LLADA2, write_checkpoint
from tests.helpers.pipelines.families import FAMILY_PIPELINES
from tests.helpers.tiny_gemma import tiny_gemma

SIZE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "is_causal": False,
    "mask_token_id": 30,
    "pad_token_id": 31,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT_MODELS: dict[str, Callable[[], Any]] = {
    "llada": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "dream": lambda: ShiftedQwen2ForCausalLM(Qwen2Config(**SIZE)),
}
TOKENS = {"flux": 12, "flux2": 64, "z_image": 96, "qwen_image": 300, "wan": 20}
STRENGTH = [[0.0, 1.0], [0.7, 0.3]]


def finish(model: nn.Module, loss: Tensor) -> None:
    """The rest of a training step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained, foreach=True).step()
    assert all(parameter.grad is not None for parameter in trained)


def test_device_read_raises_and_so_do_host_tensors() -> None:
    on_device, of_host = torch.ones(2, device=DEVICE), torch.ones(2)
    for read in (Tensor.tolist, Tensor.cpu, Tensor.nonzero, Tensor.unique):
        with pytest.raises(NotImplementedError):
            read(on_device)
    for use in (lambda: bool(on_device.any()), lambda: on_device[0].item(), lambda: on_device + of_host):
        with pytest.raises(RuntimeError):
            use()


# ---------------------------------------------------------------------- text


@cache
def text_model(kind: str) -> Any:
    names = ["q_proj", "o_proj", "up_proj"]
    return get_peft_model(TEXT_MODELS[kind](), nara_config(target_modules=names, strength=STRENGTH)).to(DEVICE)


@pytest.mark.parametrize("kind", TEXT_MODELS)
@pytest.mark.parametrize("options", [{}, {"complementary": True}, {"chunk_size": None}], ids=str)
def test_training_step_of_a_text_model_reads_nothing(kind: str, options: dict[str, Any]) -> None:
    model = text_model(kind).train()
    texts = torch.arange(33).remainder(29).view(3, 11).to(DEVICE)
    result = masked_diffusion_loss(model, texts, [2, 4, 3], sample_indices=[5, 6, 7], seed=0, **options)
    finish(model, result.loss)
    assert result.per_sample.shape == (6 if options.get("complementary") else 3,)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llada", {}),
        ("llada", {"cfg_scale": 1.5, "remasking": "random"}),
        ("dream", {"temperature": 0.7}),
    ],
    ids=str,
)
def test_text_sampling_step_reads_one_value(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = text_model(kind).eval(), torch.zeros(2, 3, dtype=torch.long, device=DEVICE)

    def uniform(self: State, rows: list[int], *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.rand(len(rows), *shape, dtype=dtype, device=DEVICE)

    of_host = torch.Generator()  # the device has none
    monkeypatch.setattr(torch, "Generator", lambda device: of_host)
    monkeypatch.setattr(State, "_uniform", uniform)

    def reads(length: int) -> int:
        options = {"stop_at_eos": False, "block_length": 2, "return_stats": True, **settings}
        with DeviceReads() as device_reads:
            result = generate(model, prompts, gen_length=length, steps=length, **options)
        assert result.forwards == length  # type: ignore[union-attr]
        return device_reads.count

    assert reads(4) - reads(2) == 2  # the rows with a mask left


def llada2(folder: Path, training: bool) -> Any:
    """Experts' kernels read 16 bytes, in bfloat16. Transformers sets kernels for the mode, but not on "meta"."""
    write_checkpoint(folder, LLADA2 | {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16})
    model, _ = load_backbone(str(folder), dtype=torch.bfloat16)
    model.config.block_length = 4
    return get_peft_model(model, nara_config(target_modules=["q_proj", "o_proj"])).train(training).to(DEVICE)


def gemma() -> Any:
    targets = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|v_proj)"
    model = tiny_gemma(hidden_size=32, moe_intermediate_size=16).bfloat16()
    return get_peft_model(model, nara_config(target_modules=targets)).to(DEVICE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llada2", "gemma"])
def test_training_step_on_a_block_reads_nothing(kind: str, tmp_path: Path) -> None:
    texts = torch.arange(33).remainder(29).view(3, 11).to(DEVICE)
    model: Any = llada2(tmp_path, training=True) if kind == "llada2" else gemma().train()
    loss = masked_diffusion_loss if kind == "llada2" else block_diffusion_loss
    finish(model, loss(model, texts, [2, 4, 3], sample_indices=[5, 6, 7], seed=0).loss)


@pytest.mark.filterwarnings("ignore")
def test_block_sampling_step_reads_one_value(tmp_path: Path) -> None:
    model, prompts = llada2(tmp_path, training=False), torch.zeros(2, 3, dtype=torch.long, device=DEVICE)
    counts = []
    for length in (4, 8):
        with DeviceReads() as reads:
            options = {"steps": length // 2, "stop_at_eos": False, "return_stats": True}
            result: Any = generate(model, prompts, gen_length=length, **options)
        counts.append(reads.count - result.forwards)
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_adapter_adds_no_reads_to_diffusion_gemma(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own reads are two a step: which canvases are finished."""
    monkeypatch.setattr("device_reads.torch.ones", torch.zeros)  # none is
    counts = []
    for model in (gemma(), gemma().unload()):
        with DeviceReads() as reads:
            answer_prompts(model, [[5, 6, 7], [8, 9]], eos_token_id=[2], gen_length=6, steps=3)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 2 * 3


# ---------------------------------------------------------------------- images


def training_of(name: str, folder: Path) -> tuple[TrainingStep, dict[str, Any]]:
    """A family's training step on the device, and a batch of two images with prompts of unequal lengths."""
    pipe = FAMILY_PIPELINES[name]()
    family, objective = family_of(pipe), build_objective(pipe.scheduler)
    family = replace(family, max_sequence_length=TOKENS.get(name, family.max_sequence_length))
    core = {"core_hidden_dims": (4, 4), "noise_convention": objective.source.convention, "strength": STRENGTH}
    model = AdaptedDenoiser(pipe, NaraConfig(r=2, target_modules=["to_q", "to_v"], **core), family=family)
    records = records_from_folder(folder_of(folder, [(64, 64)] * 2), prompt="a toy", progress=False)
    records[1] = replace(records[1], prompt="a red toy")
    data = DreamBoothDataset(records, [(64, 32)], batch_size=2, seed=1)
    caches = LatentCache(pipe.vae), PromptCache(pipe, family)
    step = TrainingStep(model.to(DEVICE), objective, *caches, DEVICE, seed=3)
    return step, collate_samples([data[0], data[1]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILY_PIPELINES)
def test_image_training_and_sampling_steps_read_nothing(name: str, tmp_path: Path) -> None:
    step, batch = training_of(name, tmp_path)
    assert len(set(batch["prompts"])) == 2
    finish(step.model.train(), step(batch).loss)
    step.model.eval()
    with torch.no_grad():
        assert step(batch).loss.device == DEVICE


def test_context_with_values_on_the_device_reads_nothing() -> None:
    model = text_model("llada").eval()
    texts = torch.zeros(2, 5, dtype=torch.long, device=DEVICE)
    for level in (torch.rand(2, device=DEVICE), torch.rand((), device=DEVICE), 0.3):
        with noise_level(model, level), torch.no_grad():
            model(texts)
