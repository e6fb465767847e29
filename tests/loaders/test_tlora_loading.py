"""Loading a T-LoRA: settings of its mask, bases and files that are refused, start factors, other adapters beside it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from nara_diffusion import NaraConfig, from_lora, noise_level
from nara_diffusion.loaders import base_factors, tensor_files
from nara_diffusion.loaders.file import AdapterFile
from tests.acceptance import _bases, _files
from tests.acceptance._files import refused, state
from tests.helpers.adapted import disturb
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.helpers.tlora_files import (
    BLOCK,
    FILE,
    FLUX,
    MASK,
    NAMES,
    SDXL,
    SETTINGS,
    lycoris_file,
    repository_file,
    saved,
)

# ---------------------------------------------------------------- settings of the mask


def test_mask_without_settings_is_default_and_warns_once(tmp_path, caplog) -> None:
    pipe = _bases.sdxl()
    with caplog.at_level(logging.WARNING):
        pipe.load_nara_weights(saved(tmp_path, lycoris_file(pipe.unet, NAMES)), "mine")
    (record,) = caplog.records
    assert "lycoris_config.json" in record.getMessage()
    config = pipe.unet.peft_config["mine"]
    assert (config.rank_mask_min, config.rank_mask_exponent, config.r) == (2, 1.0, 8)


def test_argument_has_precedence_over_settings_beside_the_file(tmp_path) -> None:
    pipe = _bases.sdxl()
    folder = saved(tmp_path, lycoris_file(pipe.unet, NAMES), SETTINGS | {"linear_dim": 9})
    refused(lambda: pipe.load_nara_weights(folder), pipe, "lycoris_config.json", "linear_dim 9")
    pipe.load_nara_weights(folder, "mine", rank_mask={"min": 3})
    assert pipe.unet.peft_config["mine"].rank_mask_min == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"min": 5}, "rank 4"), ({"min": 1.5}, "rank 4"), ({"exponent": 0}, "greater"), ({"least": 2}, "least")],
)
def test_mask_beyond_the_rank_is_refused(changes, message) -> None:
    pipe = _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES)
    refused(lambda: pipe.load_nara_weights(tensors, rank_mask=MASK | changes), pipe, message)


@pytest.mark.parametrize("text", ["[1]", '{"algo": "tlora"', "9" * 4301, '{"algo": "lokr"}', '{"tlora_alpha": "1"}'])
def test_damaged_settings_or_of_another_method_are_refused(text: str, tmp_path) -> None:
    pipe = _bases.sdxl()
    folder = saved(tmp_path, lycoris_file(pipe.unet, NAMES))
    (folder / "lycoris_config.json").write_text(text)
    refused(lambda: pipe.load_nara_weights(folder), pipe, str(folder / "lycoris_config.json"))


def test_rank_mask_for_a_nara_is_refused(tmp_path) -> None:
    pipe = _bases.sdxl()
    folder = _files.unet_folder(tmp_path / "nara")
    refused(lambda: pipe.load_nara_weights(folder, rank_mask=MASK), pipe, "rank_mask is for")
    refused(lambda: pipe.load_nara_weights({"unet.x": torch.ones(1)}, rank_mask=MASK), pipe, "rank_mask is for")


def test_repository_is_loaded_with_its_settings(tmp_path, monkeypatch) -> None:
    pipe = _bases.sdxl()
    folder = saved(tmp_path, lycoris_file(pipe.unet, NAMES), SETTINGS)
    names = []

    def download(_: str, *, weights_name: str, **__: Any) -> str:
        names.append(weights_name)
        if not (folder / weights_name).is_file():
            raise OSError("no such file")
        return str(folder / weights_name)

    monkeypatch.setattr(tensor_files, "_get_model_file", download)
    pipe.load_nara_weights("me/tlora", "mine")
    assert names[-1] == "lycoris_config.json"
    assert pipe.unet.peft_config["mine"].rank_mask_exponent == 2.0


# ---------------------------------------------------------------- bases that are refused


def test_base_that_is_not_the_original_is_refused() -> None:
    def fuse(pipe: Any) -> None:
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
        pipe.fuse_lora(adapter_names=["style"])

    def fuse_in_the_model(pipe: Any) -> None:
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
        pipe.unet.fuse_lora(adapter_names=["style"])

    def fuse_and_unload(pipe: Any) -> None:
        fuse(pipe)
        pipe.unload_lora_weights()

    def start_from_the_base(pipe: Any) -> None:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"), pipe.unet, "svd")

    def quantise(pipe: Any) -> None:
        layer = pipe.unet.get_submodule(NAMES[0])
        layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)

    def offload(pipe: Any) -> None:
        pipe.unet.get_submodule(NAMES[0]).to("meta")

    changes = {
        fuse: "unfuse_lora",
        fuse_in_the_model: "unfuse_lora",
        fuse_and_unload: "fused into the base",
        start_from_the_base: "fresh pipeline",
        quantise: "quantised",
        offload: "offloaded",
    }
    for change, message in changes.items():
        pipe: Any = _bases.sdxl()
        tensors = lycoris_file(pipe.unet, NAMES)
        change(pipe)
        with pytest.raises(ValueError, match=message):
            pipe.load_nara_weights(tensors, "mine", rank_mask=MASK)
        assert "mine" not in getattr(pipe.unet, "peft_config", {})


def test_base_with_another_adapter_gives_the_same_factors() -> None:
    pipe, other = _bases.sdxl(), _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES)
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    disturb(other.unet, "style")
    for pipeline in (pipe, other):
        pipeline.load_nara_weights(tensors, "mine", rank_mask=MASK)
        pipeline.set_adapters("mine")
    assert torch.equal(_bases.sdxl_outputs(pipe)["unet"], _bases.sdxl_outputs(other)["unet"])


# ---------------------------------------------------------------- start factors beside the file


def test_start_factors_are_computed_once_for_each_base(tmp_path, monkeypatch) -> None:
    calls = []
    compute = base_factors.singular_triples
    monkeypatch.setattr(base_factors, "singular_triples", lambda *args: calls.append(1) or compute(*args))
    pipe = _bases.sdxl()
    folder = saved(tmp_path, lycoris_file(pipe.unet, NAMES), SETTINGS)

    def output(pipe: Any) -> Tensor:
        pipe.load_nara_weights(folder)
        return _bases.sdxl_outputs(pipe)["unet"]

    expected = output(pipe)
    (cache,) = folder.glob("*.base_factors")
    assert torch.equal(output(_bases.sdxl()), expected)
    assert len(calls) == len(NAMES)
    content = bytearray(cache.read_bytes())
    for change in (lambda content: content[:-9], lambda content: content[:-9] + b"\x17" + content[-8:], lambda _: b""):
        cache.write_bytes(change(content))
        calls.clear()
        assert torch.equal(output(_bases.sdxl()), expected)
        assert len(calls) == len(NAMES)
    assert torch.equal(output(_bases.sdxl()), expected)
    assert len(calls) == len(NAMES)  # they were written again
    other = _bases.sdxl()
    other.unet.get_submodule(NAMES[2]).weight.data[0, 0] += 1
    output(other)
    assert len(list(folder.glob("*.base_factors"))) == 2


def test_read_only_folder_keeps_no_start_factors(tmp_path, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    pipe = _bases.sdxl()
    folder = saved(tmp_path, lycoris_file(pipe.unet, NAMES), SETTINGS)
    monkeypatch.setattr(base_factors, "save_tensors", fail)
    pipe.load_nara_weights(folder, "mine")
    assert sorted(path.name for path in folder.iterdir()) == ["lycoris_config.json", FILE]


# ---------------------------------------------------------------- together with others


def loaded(tmp_path: Path) -> Any:
    """A pipeline with a T-LoRA, a NaRA and a LoRA."""
    pipe = small_sdxl()
    pipe.load_nara_weights(saved(tmp_path / "file", lycoris_file(pipe.unet, NAMES), SETTINGS), "mask")
    pipe.unet.add_adapter(
        NaraConfig(r=3, target_modules=["to_q"], core_hidden_dims=(6,), noise_embedding_dim=4), "nara"
    )
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "lora")
    disturb(pipe.unet, "nara")
    disturb(pipe.unet, "lora")
    return pipe


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_three_adapters_add_up_and_are_deleted(tmp_path) -> None:
    pipe = loaded(tmp_path)
    base = pixels(small_sdxl())
    layer: Any = pipe.unet.get_submodule(NAMES[0])
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1))

    def update(names: list[str], weights: list[float]) -> Tensor:
        pipe.set_adapters(names, weights)
        with torch.no_grad(), noise_level(pipe.unet, 0.4):
            return layer(x) - layer.base_layer(x)

    alone = update(["mask"], [1.0]), update(["nara"], [1.0])
    both = update(["mask", "nara", "lora"], [0.5, 2.0, 1.0])
    torch.testing.assert_close(both, 0.5 * alone[0] + 2 * alone[1], rtol=1e-4, atol=1e-5)
    three = pixels(pipe)
    pipe.disable_lora()
    assert torch.equal(pixels(pipe), base)
    pipe.enable_lora()
    assert torch.equal(pixels(pipe), three)
    with pytest.raises(ValueError, match="λ"):
        pipe.fuse_lora(adapter_names=["mask"])
    pipe.delete_adapters(["nara", "lora"])
    pipe.set_adapters("mask")
    assert not torch.equal(pixels(pipe), base)
    pipe.delete_adapters("mask")
    assert torch.equal(pixels(pipe), base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_saved_tlora_reloads_with_the_same_pixels(tmp_path) -> None:
    pipe = loaded(tmp_path)
    pipe.set_adapters("mask")
    pipe.delete_adapters(["nara", "lora"])
    pipe.save_nara_weights(tmp_path / "saved", "mask")
    other = small_sdxl()
    other.load_nara_weights(tmp_path / "saved")
    assert torch.equal(pixels(other), pixels(pipe))
    (part,) = AdapterFile.read(tmp_path / "saved").parts.values()
    assert (part.config.rank_mask_min, part.config.rank_mask_step, part.config.noise_convention) == (2, 2, "timestep")


def test_hotswap_replaces_a_tlora_in_place(tmp_path) -> None:
    pipe, expected = small_sdxl(), small_sdxl()
    first, second = (lycoris_file(pipe.unet, NAMES, seed=seed) for seed in (1, 2))
    pipe.load_nara_weights(first, "mask", rank_mask=MASK)
    layer = pipe.unet.get_submodule(NAMES[0])
    pipe.load_nara_weights(second, "mask", hotswap=True, rank_mask=MASK)
    assert pipe.unet.get_submodule(NAMES[0]) is layer
    expected.load_nara_weights(second, rank_mask=MASK)
    assert torch.equal(pixels(pipe), pixels(expected))
    with pytest.raises(ValueError, match="rank_mask_exponent"):
        pipe.load_nara_weights(second, "mask", hotswap=True, rank_mask={"min": 1})


@pytest.mark.parametrize("kind", ["lycoris", "vanilla", "ortho", "flux"])
def test_other_readers_refuse_a_tlora_with_remedy(kind: str, tmp_path) -> None:
    pipe: Any = _bases.flux() if kind == "flux" else _bases.sdxl()
    denoiser = pipe.transformer if kind == "flux" else pipe.unet
    file = tmp_path / FILE
    if kind == "flux":
        file = tmp_path / "lora.pt"
        torch.save(repository_file(denoiser, FLUX), file)
    elif kind == "lycoris":
        save_file(lycoris_file(denoiser, NAMES), file)
    else:
        save_file(repository_file(denoiser, SDXL, ortho=kind == "ortho"), file)
    for read in (
        lambda: PeftModel.from_pretrained(denoiser, tmp_path),
        lambda: PeftModel.from_pretrained(denoiser, file),
        lambda: pipe.load_lora_weights(tmp_path, weight_name=file.name),
        lambda: denoiser.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix=None),
        lambda: from_lora(tmp_path, pipe),
        lambda: from_lora(file, denoiser),
    ):
        with pytest.raises(ValueError, match=r"depends on the noise level.*pipe\.load_nara_weights"):
            read()
    assert not hasattr(denoiser, "peft_config")


# ---------------------------------------------------------------- mixed and damaged files


@pytest.mark.parametrize("key", ["lycoris_x.lokr_w1", "lycoris_x.lora_down.weight", "x.lora_A.weight"])
def test_mixed_file_is_refused_by_its_first_key(key: str) -> None:
    pipe = _bases.sdxl()
    for tensors, key_there in (
        (lycoris_file(pipe.unet, NAMES), key),
        (repository_file(pipe.unet, SDXL), key),
        (repository_file(pipe.unet, SDXL), f"{BLOCK}.attn1.processor.to_q_lora.q_layer.weight"),
    ):
        mixed = tensors | {key_there: torch.ones(2, 2), "z.unknown": torch.ones(1)}
        refused(lambda mixed=mixed: pipe.load_nara_weights(mixed, rank_mask=MASK), pipe, f"'{key_there}'")


def test_layer_of_another_rank_is_refused() -> None:
    pipe = _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES[:2]) | lycoris_file(pipe.unet, NAMES[2:], rank=3)
    refused(lambda: pipe.load_nara_weights(tensors, rank_mask=MASK), pipe, "ff_net_2' has rank 3")


@pytest.mark.parametrize("tensor", [torch.ones(4, 3), "text"])
def test_start_factor_of_another_kind_is_refused(tensor: Any) -> None:
    pipe = _bases.sdxl()
    key = f"{BLOCK}.attn1.processor.to_q_lora.base_q.weight"
    tensors = repository_file(pipe.unet, SDXL, ortho=True) | {key: tensor}
    refused(lambda: pipe.load_nara_weights(tensors, rank_mask=MASK), pipe, f"'{key}'")


def changed_tensors(tensors: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """One tensor that is missing, of another size or type, not finite, or under another name."""
    key = sorted(tensors)[int(torch.randint(len(tensors), (1,), generator=generator))]
    kind = int(torch.randint(6, (1,), generator=generator))
    tensor = tensors[key]
    rest_of_file = {name: other for name, other in tensors.items() if name != key}
    if kind == 0:
        return rest_of_file
    if kind == 1:
        return rest_of_file | {f"{key}.more": tensor}
    if kind == 2:
        return rest_of_file | {key: torch.cat([tensor.reshape(-1)] * 2)}
    if kind == 3:
        return rest_of_file | {key: torch.full_like(tensor, torch.inf)}
    if kind == 4:
        return rest_of_file | {key: tensor.to(torch.complex64)}
    return rest_of_file | {key.replace("block", "clock"): tensor}


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["lycoris", "vanilla", "ortho", "flux"])
def test_damaged_files_are_refused_by_name(kind: str, count: int, tmp_path) -> None:
    pipe: Any = _bases.flux() if kind == "flux" else _bases.sdxl()
    if kind == "lycoris":
        tensors = lycoris_file(pipe.unet, NAMES)
    elif kind == "flux":
        tensors = repository_file(pipe.transformer, FLUX)
    else:
        tensors = repository_file(pipe.unet, SDXL, ortho=kind == "ortho")
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("mid_block")}
    generator = torch.Generator().manual_seed(3)
    file = tmp_path / ("lora.pt" if kind == "flux" else FILE)
    save = torch.save if kind == "flux" else save_file
    untouched = state(pipe)
    for index in range(count):
        save(tensors, file)
        if index % 2:
            save(changed_tensors(tensors, generator), file)
        else:
            content = file.read_bytes()
            file.write_bytes(content[: int(torch.randint(len(content), (1,), generator=generator))])
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the name is compared below)
            pipe.load_nara_weights(file, rank_mask=MASK)
        assert str(file) in str(caught.value), str(caught.value)
    assert state(pipe) == untouched
    save(tensors, file)
    pipe.load_nara_weights(file, rank_mask=MASK)
    assert state(pipe) != untouched
