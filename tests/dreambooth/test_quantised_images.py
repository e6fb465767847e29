"""Image models beside weights of 4 and 8 bits: what is rounded, gradients, runs that go on, and what is refused.

Diffusers asks for a GPU before it rounds; here that question is left out, and bitsandbytes rounds on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from peft import LoraConfig
from safetensors.torch import load_file

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth import train
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.families import Placed
from nara_diffusion.dreambooth.pipelines import load_pipeline, model_index, quantised_parts, sharing_pipeline
from tests.acceptance._commands import fresh_accelerate
from tests.acceptance._runs import image_arguments, image_flags
from tests.helpers.small_pipelines import pixels, small_sdxl, wide_flux

functional = pytest.importorskip("bitsandbytes.functional")
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
]
CPU = torch.device("cpu")
WEIGHTS = "pytorch_nara_weights.safetensors"


@pytest.fixture(autouse=True)
def _rounds_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda *args, **options: None)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    common = {"max_sequence_length": 12, "max_train_steps": 4, "validation_steps": None, "curve_points": 1}
    return image_flags(tmp_path_factory.mktemp("flux"), wide_flux()) | common


def loaded(flags: dict[str, Any], bits: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    name = str(flags["pretrained_model_name_or_path"])
    return load_pipeline(name, dtype=dtype, bits=bits, device=CPU)


def rounded_layers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}


@pytest.mark.parametrize("bits", [4, 8])
def test_denoiser_and_language_model_are_rounded_and_shared(bits: int, flags: dict[str, Any]) -> None:
    pipe = loaded(flags, bits)
    linear = [m for m in pipe.transformer.modules() if isinstance(m, torch.nn.Linear)]
    assert len(rounded_layers(pipe.transformer)) == len(linear) > 40
    assert rounded_layers(pipe.text_encoder_2)
    assert not rounded_layers(pipe.text_encoder)
    sampling = sharing_pipeline(pipe, torch.float32)
    first = pixels(pipe)
    assert torch.equal(pixels(sampling), first)
    assert torch.equal(pixels(pipe), first)
    pairs = zip(pipe.transformer.parameters(), sampling.transformer.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    error = (first - pixels(loaded(flags))).abs().mean()
    assert 0 < error < 0.1


ADAPTERS: dict[str, Any] = {
    "nara_dora": NaraConfig(r=3, lora_alpha=5, core_init="kaiming", init_lora_weights=False, use_dora=True),
    "lora": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_are_those_of_the_rounded_weights(name: str, flags: dict[str, Any]) -> None:
    """Those of a full-precision model that has the rounded weights; one recomputes its activations."""
    small, whole = loaded(flags, 4), loaded(flags)
    for place, layer in rounded_layers(small.transformer).items():
        weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        whole.transformer.get_submodule(place).weight.data = weight
    config = ADAPTERS[name]
    config.target_modules = ["attn.to_q", "ff.net.2", "proj_mlp"]
    results = []
    for pipe, recompute in ((small, True), (whole, False)):
        torch.manual_seed(1)
        model = AdaptedDenoiser(pipe, config, gradient_checkpointing=recompute).train()
        draw = torch.Generator().manual_seed(0)
        embeddings: Placed = (torch.randn(2, 5, 64, generator=draw), torch.randn(2, 16, generator=draw))
        sample, timestep = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([200.0, 900.0])
        loss = model(sample, timestep, torch.zeros(2, 6), embeddings=embeddings).square().mean()
        loss.backward()
        results.append({key: parameter.grad for key, parameter in model.trained.items()})
    gradients, references = results
    assert gradients.keys() == references.keys()
    for key, reference in references.items():
        tolerance = 1e-4 * float(reference.abs().max())
        torch.testing.assert_close(gradients[key], reference, rtol=0, atol=tolerance)


def trained(flags: dict[str, Any], folder: Path, **changes: Any) -> Path:
    fresh_accelerate()
    train.main(image_arguments(flags, folder, **changes))
    return folder


@pytest.mark.slow
def test_quantised_run_resumes_and_loads_on_both_bases(flags: dict[str, Any], tmp_path: Path) -> None:
    same = {"load_in_4bit": True, "adapter": "nara_dora", "gradient_checkpointing": True, "checkpointing_steps": 2}
    end = load_file(trained(flags, tmp_path / "whole", **same) / WEIGHTS)
    out, resume = tmp_path / "out", str(tmp_path / "whole" / "checkpoint-2")
    found = load_file(trained(flags, out, **same, resume_from_checkpoint=resume) / WEIGHTS)
    assert found.keys() == end.keys()
    assert all(torch.equal(tensor, end[key]) for key, tensor in found.items())
    other = same | {"load_in_4bit": False, "load_in_8bit": True, "resume_from_checkpoint": resume}
    with pytest.raises(ValueError, match="load_in_4bit: True there, False now"):
        trained(flags, tmp_path / "other", **other)
    images = []
    for bits in (4, None):
        pipe = loaded(flags, bits)
        before = pixels(pipe)
        pipe.load_nara_weights(out)
        images.append(pixels(pipe))
        assert (images[-1] - before).abs().max() > 1e-4
    assert (images[0] - images[1]).abs().mean() < 0.1


def test_missing_gpu_is_one_line(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"can't be loaded as FLUX\.1: No GPU found"):
        loaded(flags, 4)


def test_small_text_encoders_stay_whole(tmp_path: Path) -> None:
    small_sdxl().save_pretrained(tmp_path)
    parts = quantised_parts(model_index(str(tmp_path)))
    assert parts == ["unet"]
