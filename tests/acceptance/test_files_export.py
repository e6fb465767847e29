"""Exports of the stored NaRAs: the same LoRAs as version 0.1 wrote, and what hosts that know only LoRA make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from nara_diffusion import StrengthSchedule, core_matrix, from_lora, noise_level, set_strength, to_lora
from tests.acceptance import _bases, _files

EXPORTS, PEFT, PIPELINES = (_files.FILES / kind for kind in ("exports", "peft", "pipelines"))
LEVEL = _files.FOLD_LEVEL
HOST_FILES = [f"{name}_{form}" for name in ("sdxl", "flux") for form in ("kohya", "comfyui", "diffusers")]
EXACT = 1e-6
"""Of folding, relative to the update, which is computed in float64 and kept in float32."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-language:UserWarning"),
]


def language(name: str) -> PeftModel:
    base = _bases.mixed_model() if name == "mixed" else _bases.language_model()
    return PeftModel.from_pretrained(base, PEFT / name).eval()


def stock(folder: Path, base: nn.Module | None = None) -> PeftModel:
    """The LoRA in `folder`, as PEFT alone reads it."""
    model = PeftModel.from_pretrained(_bases.language_model() if base is None else base, folder).eval()
    assert type(model.peft_config["default"]) is LoraConfig
    return model


@torch.no_grad()
def at_level(model: nn.Module, level: float | Tensor = LEVEL) -> Tensor:
    with noise_level(model, level, mask_density=0.5):
        return _bases.plain_text_output(model)


def assert_same_export(actual: Path, wanted: Path) -> None:
    """The same keys, dtypes and shapes, and values to the rounding of the products that they are."""
    found, stored = load_file(actual), load_file(wanted)
    assert found.keys() == stored.keys()
    for key, tensor in stored.items():
        limit = EXACT * tensor.abs().max().item()
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=limit, msg=lambda text, key=key: f"{key}: {text}")
    assert _files.header(actual) == _files.header(wanted)


# ---------------------------------------------------------------------- one λ


@pytest.mark.parametrize("name", HOST_FILES)
def test_fold_writes_a_hosts_file_tensor_for_tensor_as_0_1_did(name: str, tmp_path: Path, capsys) -> None:
    base, form = name.split("_")
    source, output = PIPELINES / f"{base}_float32", tmp_path / "lora.safetensors"
    words = ["--noise_level", str(LEVEL), "--form", form, "--base", base]
    _files.command()(["fold", str(source), str(output), *words])
    assert_same_export(output, EXPORTS / f"{name}.safetensors")


def test_fold_writes_pefts_folder_as_0_1_did(tmp_path: Path, capsys) -> None:
    _files.command()(["fold", str(PEFT / "nara"), str(tmp_path), "--noise_level", str(LEVEL), "--form", "peft"])
    assert_same_export(tmp_path / _files.PEFT_WEIGHTS, EXPORTS / "nara_peft" / _files.PEFT_WEIGHTS)
    fields = [json.loads((path / _files.PEFT_CONFIG).read_text()) for path in (tmp_path, EXPORTS / "nara_peft")]
    _files.assert_same_fields(*fields)


@pytest.mark.parametrize("name", ["sdxl_kohya", "sdxl_diffusers", "flux_diffusers"])
def test_diffusers_own_loader_gives_the_naras_output_at_that_level(name: str) -> None:
    """Of the stored files, to which the test above compares what is written today."""
    base, say = _bases.PIPELINES[name.split("_")[0]]
    nara, host = base(), base()
    nara.load_nara_weights(PIPELINES / f"{name.split('_')[0]}_float32")
    host.load_lora_weights(EXPORTS / f"{name}.safetensors")
    denoiser = getattr(nara, "unet", None) or nara.transformer
    with noise_level(denoiser, LEVEL):
        wanted = say(nara)
    for part, value in say(host).items():
        assert all(type(config) is LoraConfig for config in getattr(host, part).peft_config.values())
        _files.assert_near(value, wanted[part], getattr(host, part))


def updates(path: Path) -> dict[str, Tensor]:
    """{kohya's name of a module: ΔW} in float64, of kohya's or ComfyUI's form."""
    found, tensors = {}, load_file(path)
    for key, down in tensors.items():
        if key.endswith((".lora_down.weight", ".lora_A.weight")):
            kohya = key.endswith(".lora_down.weight")
            name = key.removesuffix(".lora_down.weight" if kohya else ".lora_A.weight")
            up = tensors[f"{name}.lora_up.weight" if kohya else f"{name}.lora_B.weight"]
            scale = tensors[f"{name}.alpha"].item() / len(down) if kohya else 1.0
            found[name] = scale * up.double().flatten(1) @ down.double().flatten(1)
    return found


def test_comfyuis_file_of_sdxl_has_the_updates_that_kohyas_has() -> None:
    """Text encoders have kohya's names there too."""
    kohya, comfyui = (updates(EXPORTS / f"sdxl_{form}.safetensors") for form in ("kohya", "comfyui"))
    renamed = {_kohyas(name): update for name, update in comfyui.items()}
    assert renamed.keys() == kohya.keys()
    for name, update in kohya.items():
        torch.testing.assert_close(renamed[name], update, rtol=0, atol=EXACT * update.abs().max().item())


def _kohyas(name: str) -> str:
    return f"lora_unet_{name.removeprefix('diffusion_model.').replace('.', '_')}" if "diffusion_model" in name else name


DOUBLE, SINGLE = "transformer.transformer_blocks.0.", "transformer.single_transformer_blocks.0."
OF_FLUX = {
    "double_blocks.0.img_attn.qkv": [f"{DOUBLE}attn.to_{name}" for name in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"{DOUBLE}attn.add_{name}_proj" for name in "qkv"],
    "double_blocks.0.img_attn.proj": [f"{DOUBLE}attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": [f"{DOUBLE}attn.to_add_out"],
    "double_blocks.0.img_mlp.0": [f"{DOUBLE}ff.net.0.proj"],
    "double_blocks.0.txt_mlp.2": [f"{DOUBLE}ff_context.net.2"],
    "double_blocks.0.img_mod.lin": [f"{DOUBLE}norm1.linear"],
    "single_blocks.0.linear1": [*(f"{SINGLE}attn.to_{name}" for name in "qkv"), f"{SINGLE}proj_mlp"],
    "single_blocks.0.linear2": [f"{SINGLE}proj_out"],
}
"""{module of FLUX's own code: Diffusers' modules, whose outputs it has one behind another}."""


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_file_of_flux_has_diffusers_updates_in_the_matrices_of_the_original_code(form: str) -> None:
    """(Diffusers reads kohya's single blocks at the sizes of the true FLUX alone.)"""
    parts, found = updates(EXPORTS / "flux_diffusers.safetensors"), updates(EXPORTS / f"flux_{form}.safetensors")
    assert {name for names in OF_FLUX.values() for name in names} == parts.keys()
    wanted = {f"diffusion_model.{name}": torch.cat([parts[part] for part in own]) for name, own in OF_FLUX.items()}
    if form == "kohya":
        wanted = {_kohyas(name): update for name, update in wanted.items()}
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=0, atol=EXACT * update.abs().max().item())


@pytest.mark.parametrize(
    "name", ["nara", "nara_dora", "knots", "constant", "bins", "module_type", "layer", "strength", "mixed"]
)
def test_to_lora_read_by_peft_alone_gives_the_naras_output_at_that_level(name: str, tmp_path: Path) -> None:
    nara = language(name)
    wanted, before = at_level(nara), {key: tensor.clone() for key, tensor in nara.state_dict().items()}
    to_lora(nara, LEVEL, mask_density=0.5).save_pretrained(tmp_path)
    torch.testing.assert_close(dict(nara.state_dict()), before, rtol=0, atol=0)
    host = stock(tmp_path, _bases.mixed_model() if name == "mixed" else None)
    with torch.no_grad():
        _files.assert_near(_bases.plain_text_output(host), wanted, host)
    tensors = load_file(PEFT / name / _files.PEFT_WEIGHTS)
    assert len(_files.adapted_layers(host)) == len(_files.layers_of(tensors))


@pytest.mark.parametrize("strength", [0.25, StrengthSchedule([(0.25, 1.0), (0.5, 0.5)])], ids=["number", "schedule"])
def test_to_lora_includes_the_strength_that_was_set(strength: Any, tmp_path: Path) -> None:
    nara = language("nara")
    set_strength(nara, "default", strength)
    wanted = at_level(nara)
    assert (wanted - at_level(language("nara"))).abs().max() > 0.1
    to_lora(nara, LEVEL).save_pretrained(tmp_path)
    host = stock(tmp_path)
    with torch.no_grad():
        _files.assert_near(_bases.plain_text_output(host), wanted, host)


def test_folded_adapter_of_another_prediction_tells_its_scheduler(tmp_path: Path, caplog, capsys) -> None:
    pipe, output = _bases.sdxl(), tmp_path / "lora.safetensors"
    pipe.load_nara_weights(PEFT / "converted")
    pipe.save_nara_weights(tmp_path)
    _files.command()(["fold", str(tmp_path), str(output), "--noise_level", "0.5", "--form", "kohya", "--base", "sdxl"])
    assert "v_prediction" in caplog.text
    assert _files.header(output)["nara_scheduler"]["prediction_type"] == "v_prediction"


# ---------------------------------------------------------------------- from a LoRA


def test_from_lora_starts_as_the_lora_at_each_level_and_folds_back_to_it(tmp_path: Path) -> None:
    host = stock(EXPORTS / "nara_peft")
    with torch.no_grad():
        wanted = _bases.plain_text_output(host)
    nara = from_lora(EXPORTS / "nara_peft", _bases.language_model(), core_type="hypernetwork", core_hidden_dims=(6, 6))
    nara.eval()
    _files.assert_near(at_level(nara, _bases.LEVELS), wanted, nara)
    to_lora(nara, 0.8).save_pretrained(tmp_path)
    _files.assert_same_tensors(tmp_path / _files.PEFT_WEIGHTS, EXPORTS / "nara_peft" / _files.PEFT_WEIGHTS)


def test_from_lora_has_a_core_that_training_moves() -> None:
    nara = from_lora(EXPORTS / "nara_peft", _bases.language_model(), core_hidden_dims=(6, 6)).train()
    before = core_matrix(nara, _bases.LEVELS).detach()
    torch.testing.assert_close(before, torch.eye(3).expand_as(before))
    optimizer = torch.optim.SGD([p for p in nara.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        with noise_level(nara, _bases.LEVELS):
            nara(input_ids=_bases.tokens(29)).logits.square().mean().backward()
        optimizer.step()
    assert (core_matrix(nara, _bases.LEVELS) - before).abs().max() > 1e-4


@pytest.fixture(scope="module")
def hosts_outputs() -> dict[str, Tensor]:
    """What Diffusers alone makes of its file."""
    host = _bases.sdxl()
    host.load_lora_weights(EXPORTS / "sdxl_diffusers.safetensors")
    return _bases.sdxl_outputs(host)


def assert_hosts_outputs(pipe: Any, wanted: dict[str, Tensor]) -> None:
    for part, value in _bases.sdxl_outputs(pipe).items():
        _files.assert_near(value, wanted[part], getattr(pipe, part))


@pytest.mark.parametrize("form", ["kohya", "diffusers", "comfyui"])
def test_from_lora_reads_a_hosts_file_into_a_pipeline(form: str, hosts_outputs) -> None:
    pipe = _bases.sdxl()
    from_lora(EXPORTS / f"sdxl_{form}.safetensors", pipe)
    assert_hosts_outputs(pipe, hosts_outputs)


def test_nara_of_a_lora_is_saved_and_loaded_as_a_nara(tmp_path: Path, hosts_outputs) -> None:
    from_lora(EXPORTS / "sdxl_kohya.safetensors", _bases.sdxl()).save_nara_weights(tmp_path)
    pipe = _bases.sdxl()
    pipe.load_nara_weights(tmp_path)
    assert_hosts_outputs(pipe, hosts_outputs)
