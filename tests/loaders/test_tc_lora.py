"""Tc-LoRA files (DiffSynth-Studio): played on a FLUX transformer as their formula says, or refused whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

import nara_command
from nara_diffusion.loaders.other_trainers import PipelineComponents
from nara_diffusion.loaders.tc_lora import convert_tc_lora
from nara_diffusion.loaders.tensor_files import is_nara
from nara_diffusion.loaders.tlora import OtherFile
from tests.helpers.adapted import TwoLayers, relative_error
from tests.helpers.denoisers import denoiser, inputs_of, run

PREFIX = "base_model.model."
KIND = "FluxTransformer2DModel"
ENDINGS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.2"),
)
LEVELS = [[0.25, 0.8, 0.61], [1.0, 0.003, 0.7], [0.5, 0.5, 0.5]]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def transformer() -> Any:
    return denoiser(KIND, scale=0.1)


def tensors_for(model: nn.Module, endings: tuple[str, ...] = ENDINGS) -> Tensors:
    """A random Tc-LoRA, of rank 3 and in the feed-forwards 5."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, layer in model.named_modules():
        if not name.endswith(endings) or not isinstance(layer, nn.Linear):
            continue
        rank = 5 if ".ff" in name else 3
        shapes = {"lora_A.weight": (rank, layer.in_features), "lora_B.weight": (layer.out_features, rank)}
        for kind in ("gamma", "beta"):
            shapes |= {f"lora_time_{kind}.weight": (rank, 256), f"lora_time_{kind}.bias": (rank,)}
        for end, shape in shapes.items():
            tensors[f"{PREFIX}{name}.{end}"] = 0.2 * torch.randn(shape, generator=generator)
    return tensors


class ByHand(nn.Module):
    """W x + b + 2 B (γ ⊙ A x + β), for the embedding that `embedding` holds."""

    def __init__(self, layer: nn.Module, named: Tensors, embedding: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.named, self.embedding = layer, named, embedding

    def forward(self, x: Tensor) -> Tensor:
        (e,) = self.embedding
        gamma, beta = (
            (e @ self.named[f"lora_time_{kind}.weight"].T + self.named[f"lora_time_{kind}.bias"])[:, None]
            for kind in ("gamma", "beta")
        )
        h = gamma * (x @ self.named["lora_A.weight"].T) + beta
        return self.layer(x) + 2 * h @ self.named["lora_B.weight"].T


def by_hand(tensors: Tensors, timestep: Tensor) -> nn.Module:
    """The transformer in float64 with the formula in its layers."""
    model, modules = denoiser(KIND, scale=0.1).double(), {}
    for key, tensor in tensors.items():
        name, _, end = key.removeprefix(PREFIX).partition(".lora_")
        modules.setdefault(name, {})[f"lora_{end}"] = tensor.double()
    angle = 1000 * timestep.double()[:, None] * torch.logspace(0, -4, 129, dtype=torch.float64)[:-1]
    embedding = [torch.cat([angle.cos(), angle.sin()], dim=1)]
    for name, named in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ByHand(model.get_submodule(name), named, embedding))
    return model


def inputs_in(dtype: torch.dtype) -> Any:
    inputs = inputs_of(KIND)
    is_real = {key: isinstance(x, Tensor) and x.is_floating_point() for key, x in inputs.items()}
    return {key: x.to(dtype) if is_real[key] else x for key, x in inputs.items()}


def test_tc_lora_on_flux_equals_formula_per_sample(transformer: Any, tmp_path: Path) -> None:
    tensors = tensors_for(transformer)
    assert len(tensors) > 6 * len(ENDINGS)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    pipe: Any = PipelineComponents(transformer=denoiser(KIND, scale=0.1))
    pipe.load_nara_weights(tmp_path / "adapter_model.safetensors", "tc")
    base = run(transformer, inputs_of(KIND), torch.tensor(LEVELS[0]))
    for timestep in map(torch.tensor, LEVELS):
        actual = run(pipe.transformer, inputs_of(KIND), timestep)
        expected = run(by_hand(tensors, timestep), inputs_in(torch.float64), timestep.double())
        assert relative_error(actual, expected) < 1e-5
        assert relative_error(base, expected) > 1e-2
    pipe.save_nara_weights(tmp_path / "saved", "tc")
    again: Any = PipelineComponents(transformer=denoiser(KIND, scale=0.1))
    again.load_nara_weights(tmp_path / "saved")
    torch.testing.assert_close(run(again.transformer, inputs_of(KIND), timestep), actual, rtol=0, atol=0)


def test_tc_lora_is_for_flows_without_mask() -> None:
    model = TwoLayers()
    pipe: Any = PipelineComponents(transformer=model)
    tensors = tensors_for(model, ("first", "second"))
    with pytest.raises(ValueError, match="rank_mask is for a T-LoRA"):
        pipe.load_nara_weights(tensors, rank_mask={"min": 1})
    assert not hasattr(model, "peft_config")
    config = convert_tc_lora(OtherFile(tensors)).config
    assert (config.noise_convention, config.noise_level_per) == ("flow", "sample")


def test_tc_lora_in_a_window_runs_only_there(transformer: Any, tmp_path: Path) -> None:
    save_file(tensors_for(transformer, ("to_q",)), tmp_path / "adapter_model.safetensors")
    outputs, level = [], torch.tensor(LEVELS[0])
    for source in (tmp_path, [(tmp_path, (0.5, 1))]):
        pipe: Any = PipelineComponents(transformer=denoiser(KIND, scale=0.1))
        pipe.load_nara_weights(source)
        outputs.append(run(pipe.transformer, inputs_of(KIND), level))
    base = run(transformer, inputs_of(KIND), level)
    assert relative_error(outputs[1], torch.cat([base[:1], outputs[0][1:]])) < 1e-5
    assert relative_error(outputs[0], base) > 1e-2


def test_tc_lora_is_inspected_and_not_folded(transformer: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "style.safetensors"
    save_file(tensors_for(transformer, ("to_q",)), path)
    nara_command.main(["inspect", str(path), "--json"])
    (described,) = json.loads(capsys.readouterr().out)["components"].values()
    assert described["core_type"] == "film"
    assert described["ranks"] == [3]
    with pytest.raises(SystemExit, match="no plain LoRA has"):
        nara_command.main(["fold", str(path), str(tmp_path / "lora"), "--noise_level", "0.5", "--form", "peft"])
    assert is_nara(path)  # so load_lora_weights refuses it
    LoraConfig(target_modules=["to_q"]).save_pretrained(tmp_path)
    path.rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="PEFT would load only A and B"):
        PeftModel.from_pretrained(transformer, str(tmp_path))
    assert not hasattr(transformer, "peft_config")


def lost(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def renamed(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    place = draw.randrange(len(PREFIX), len(key))
    return {name if name != key else f"{key[:place]}x{key[place:]}": tensors[name] for name in tensors}


def longer(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    return {**tensors, key: torch.cat([tensors[key], tensors[key][:1]])}


def narrower(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    return {**tensors, key: tensors[key][..., :-1].contiguous()}


def not_finite(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    tensor = tensors[key].clone()
    tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([float("nan"), float("inf")])
    return {**tensors, key: tensor}


def integers(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    return {**tensors, key: tensors[key].long()}


def flat(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    return {**tensors, key: tensors[key].reshape(1, -1, 1)}


def without_axes(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    return {**tensors, key: torch.tensor(1.0)}


def mixed_with_others(tensors: Tensors, key: str, draw: random.Random) -> Tensors:
    name = key.partition(".lora_")[0]
    ending = draw.choice(["lokr_w1", "lora_C.weight", "p_layer.weight", "lora_magnitude_vector.weight", "alpha"])
    return {**tensors, f"{name}.{ending}": torch.ones(3)}


DAMAGES: list[Callable[[Tensors, str, random.Random], Tensors]] = [
    lost, renamed, longer, narrower, not_finite, integers, flat, without_axes, mixed_with_others,
]  # fmt: skip


def test_damaged_tc_loras_are_refused_whole_and_named(tmp_path: Path) -> None:
    model = TwoLayers()
    tensors = tensors_for(model, ("first", "second"))
    path, draw = tmp_path / "tc.safetensors", random.Random(0)
    pipe: Any = PipelineComponents(transformer=model)
    keys = sorted(tensors)
    for number in range(100):
        key = draw.choice(keys)
        if number % 20 == 19:
            save_file(tensors, path)
            path.write_bytes(path.read_bytes()[: -draw.randrange(1, 2000)])
            expected = str(path)
        else:
            damage = DAMAGES[number % len(DAMAGES)]
            save_file(damage(tensors, key, draw), path)
            expected = key.removeprefix(PREFIX).partition(".lora_")[0].split(".")[-1]
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            pipe.load_nara_weights(path)
        assert expected in str(caught.value), (number, str(caught.value))
        assert "Error:" not in str(caught.value), (number, str(caught.value))
        assert not hasattr(model, "peft_config"), number
    save_file(tensors, path)  # the control
    pipe.load_nara_weights(path)
    assert list(model.peft_config) == ["default_0"]  # type: ignore[arg-type]
