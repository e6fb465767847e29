"""nara fold: PEFT's folder against s · B · C(λ) · A by hand, its last line, and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import nara_command
from nara_diffusion import core_matrix, to_lora
from nara_diffusion.export.host_files import host_state_dict
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config
from tests.helpers.pipelines.families import small_wan_experts

LEVEL = 0.375
TARGETS = ["first", "second"]


def fold(source: Path, output: Path, *words: object, level: object = LEVEL) -> None:
    nara_command.main(["fold", str(source), str(output), "--noise_level", str(level), *map(str, words)])


def saved(path: Path, **changes: Any) -> PeftModel:
    """A disturbed NaRA of ranks 4 and 3, saved in PEFT's folder `path`."""
    torch.manual_seed(0)
    changes |= {"core_sharing": "layer", "rank_pattern": {"second": 3}}
    model = adapted(TwoLayers(), target_modules=TARGETS, **changes)
    model.save_pretrained(str(path))
    return model


def by_hand(model: PeftModel, module: str, level: float, strength: float = 1.0) -> Tensor:
    """strength · s · B · C(λ) · A, (d_out, d_in) float64."""
    layer: Any = model.base_model.model.get_submodule(module)
    A = layer.lora_A["default"].weight.detach().double()
    B = layer.lora_B["default"].weight.detach().double()
    C = core_matrix(model, level, module=module)[0].detach().double()
    return strength * layer.scaling["default"] * B @ C @ A


def update_of(model: PeftModel, module: str) -> Tensor:
    layer: Any = model.base_model.model.get_submodule(module)
    return layer.get_delta_weight("default").detach().double()


@pytest.mark.parametrize("strength", [None, [[0.0, 1.0], [1.0, 0.2]]], ids=["plain", "with a strength over λ"])
def test_peft_folder_is_the_nara_at_its_lambda(strength, tmp_path: Path, capsys) -> None:
    model = saved(tmp_path / "nara", strength=strength)
    fold(tmp_path / "nara", tmp_path / "lora", "--form", "peft")
    folded = PeftModel.from_pretrained(TwoLayers(), str(tmp_path / "lora"))
    there = 1.0 if strength is None else 1 - 0.8 * LEVEL
    for module in TARGETS:
        expected = by_hand(model, module, LEVEL, there)
        torch.testing.assert_close(update_of(folded, module), expected, rtol=1e-5, atol=1e-6)
    strength_text = "" if strength is None else ", at its strength of 0.7 there"
    assert capsys.readouterr().out == f"{tmp_path / 'lora'}: 2 modules, λ = 0.375{strength_text}\n"


@pytest.mark.parametrize("level", [0.0, 0.3, 0.9, "best"])
def test_rank_mask_folds_in_pairs_by_its_exponent(level, tmp_path: Path, capsys) -> None:
    mask = {"core_type": "rank_mask", "r": 8, "rank_mask_min": 2, "rank_mask_step": 2, "rank_mask_exponent": 2.0}
    model = adapted(TwoLayers(), target_modules=TARGETS, **mask)
    model.save_pretrained(str(tmp_path / "nara"))
    fold(tmp_path / "nara", tmp_path / "lora", "--form", "peft", level=level)
    # pair j of 4 is on while (1 − λ)² · 3 ≥ j, that is until λ = 1 − √(j / 3)
    ends = 1 - (torch.arange(4) / 3).sqrt().double()
    share = ends if level == "best" else (level <= ends).double()
    C = share.repeat_interleave(2)
    folded = PeftModel.from_pretrained(TwoLayers(), str(tmp_path / "lora"))
    for module in TARGETS:
        layer: Any = model.base_model.model.get_submodule(module)
        A, B = (factors["default"].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))
        tolerance = 1 / 256 if level == "best" else 1e-6
        expected = layer.scaling["default"] * (B * C) @ A
        torch.testing.assert_close(update_of(folded, module), expected, rtol=0, atol=2 * tolerance)
    assert ("the largest relative error of ΔW is" in capsys.readouterr().out) == (level == "best")


def test_best_says_the_largest_relative_error(tmp_path: Path, capsys) -> None:
    model = saved(tmp_path / "nara")
    fold(tmp_path / "nara", tmp_path / "lora", "--form", "peft", level="best")
    printed = capsys.readouterr().out
    folded = PeftModel.from_pretrained(TwoLayers(), str(tmp_path / "lora"))
    errors, sizes = [], []
    for level in torch.linspace(0, 1, 65).tolist():
        expected = torch.cat([by_hand(model, module, level).flatten() for module in TARGETS])
        actual = torch.cat([update_of(folded, module).flatten() for module in TARGETS])
        errors.append((actual - expected).norm())
        sizes.append(expected.square().sum())
    worst = float(max(errors) / torch.stack(sizes).mean().sqrt())
    stated = float(printed.split("error of ΔW is ")[1].rstrip("%\n")) / 100
    assert stated == pytest.approx(worst, rel=0.02)


def test_outputs_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "nara")
    (tmp_path / "there.safetensors").write_text("mine")
    fold(tmp_path / "nara", tmp_path / "lora", "--form", "peft")
    for output, words, message in [
        ("nara", ["--form", "peft"], "is the adapter itself"),
        ("lora", ["--form", "peft"], "exists"),
        ("new", [], "names no component"),
        ("new", ["--form", "kohya"], "names no component"),
    ]:
        with pytest.raises(SystemExit, match=message):
            fold(tmp_path / "nara", tmp_path / output, *words)
    assert not (tmp_path / "new").exists()
    pipeline = tmp_path / "pipeline"
    nara_command.main(["convert", str(tmp_path / "nara"), str(pipeline), "--to", "pipeline", "--component", "unet"])
    for output, words, message in [
        ("new.pt", [], "must end in .safetensors"),
        ("there.safetensors", [], "exists"),
        ("new.safetensors", ["--form", "kohya"], "needs --base, one of sd15, sdxl"),
    ]:
        with pytest.raises(SystemExit, match=message):
            fold(pipeline, tmp_path / output, *words)
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    fold(pipeline, tmp_path / "there.safetensors", "--overwrite")
    assert (tmp_path / "there.safetensors").read_bytes() != b"mine"


# ---------------------------------------------------------------------- two experts


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The file of a NaRA on both transformers of a Wan 2.2, which differ, and the pipeline."""
    pipe = small_wan_experts()
    for seed, name in enumerate(("transformer", "transformer_2")):
        model = getattr(pipe, name)
        model.add_adapter(nara_config(target_modules=["to_q", "ffn.net.2"], noise_convention="flow"), "toy")
        disturb(model, seed=seed)
    folder = tmp_path_factory.mktemp("experts")
    pipe.save_nara_weights(folder, adapter_name="toy")
    return folder, pipe


@pytest.mark.parametrize("form", ["comfyui", "diffusers"])
def test_each_expert_folds_into_its_own_file(form: str, experts: tuple[Path, Any], tmp_path: Path) -> None:
    """With the keys of a transformer, which Diffusers and ComfyUI load into either."""
    folder, pipe = experts
    for name, level in (("transformer", 0.95), ("transformer_2", 0.4)):
        file = tmp_path / f"{name}.safetensors"
        fold(folder, file, "--form", form, "--base", "wan", "--component", name, level=level)
        expected = host_state_dict({"transformer": to_lora(getattr(pipe, name), level, "toy")}, form, "wan")
        tensors = load_file(file)
        assert tensors.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(tensors[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["comfyui", "diffusers", "peft"])
def test_experts_without_a_component_are_refused(form: str, experts: tuple[Path, Any], tmp_path: Path) -> None:
    """Diffusers would load such a file into the first transformer, and leave the other out without a word."""
    message = "one (transformer|component), but the file has transformer, transformer_2: choose one with --component"
    with pytest.raises(SystemExit, match=message) as error:
        fold(experts[0], tmp_path / "out.safetensors", "--form", form, "--base", "wan")
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="has transformer, transformer_2: choose one of them, not 'unet'"):
        fold(experts[0], tmp_path / "out.safetensors", "--component", "unet")
    assert not list(tmp_path.iterdir())
