"""T-LoRA of LyCORIS and of its own repository: the formulas in float64, names, settings, bases that are refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.loaders import base_factors
from nara_diffusion.loaders.file import AdapterFile
from nara_diffusion.loaders.lycoris import dotted, module_names
from tests.acceptance import _bases
from tests.acceptance._files import refused, state
from tests.helpers.adapted import disturb, relative_error
from tests.helpers.small_pipelines import BETAS, pixels, small_sdxl
from tests.helpers.tlora_files import (
    FLUX,
    SDXL,
    active,
    in_float64,
    lycoris_file,
    lycoris_updates,
    repository_file,
    repository_updates,
    start_as_in_lycoris,
)

TIMESTEPS = (0, 1, 99, 250, 333, 500, 666, 750, 870, 999)
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
NAMES = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2", "down_blocks.1.resnets.0.conv_shortcut"]
"""Layers of the UNet: square, wide, tall, and a 1 × 1 convolution."""
MASK = {"min": 1, "exponent": 2.0}
SETTINGS = {"algo": "tlora", "linear_dim": 4, "tlora_min_rank": 1, "tlora_alpha": 2.0}
FILE = "pytorch_lora_weights.safetensors"


def saved(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    """A folder as SimpleTuner leaves it."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)
    if settings is not None:
        (folder / "lycoris_config.json").write_text(json.dumps(settings))
    return folder


@torch.no_grad()
def rows_at(unet: Any, timesteps: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    return _bases.unet_output(unet, inputs[0], timesteps, *inputs[1:])


def assert_unet_equals(
    pipe: Any, updates: Callable[[Any, int], dict[str, Tensor]], bound: float, rank: int = 4
) -> None:
    """All rows at one timestep, ten times, then three rows at three, against a base with the update in its weights."""
    base, dtype = _bases.unet(), pipe.unet.dtype
    inputs = tuple(tensor.to(dtype) for tensor in _bases.unet_inputs())
    exact = tuple(tensor.double() for tensor in inputs)
    changed = {kept: in_float64(base, updates(base, kept)) for kept in range(1, 5)}
    rows = {}
    for t in TIMESTEPS:
        rows[t] = rows_at(changed[active(t, 4, 1, 2.0)], torch.tensor(t), exact)
        assert relative_error(rows_at(pipe.unet, torch.tensor(t), inputs), rows[t]) <= bound
    mixed = rows_at(pipe.unet, torch.tensor([999, 250, 1]), inputs)
    wanted = torch.stack([rows[t][index] for index, t in enumerate((999, 250, 1))])
    assert relative_error(mixed, wanted) <= bound
    assert relative_error(rows_at(pipe.unet, torch.tensor(999), inputs), rows[0]) > 1e-2


# ---------------------------------------------------------------- LyCORIS


def test_lycoris_file_equals_its_formula_in_float32(tmp_path) -> None:
    pipe = _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES)
    pipe.load_nara_weights(saved(tmp_path, tensors, SETTINGS))
    assert_unet_equals(pipe, lambda base, kept: lycoris_updates(base, tensors, kept), 1e-4)


def test_lycoris_file_equals_its_formula_in_float64() -> None:
    pipe = _bases.sdxl()
    tensors = {key: tensor.double() for key, tensor in lycoris_file(pipe.unet, NAMES).items()}
    pipe.unet.double()
    pipe.load_nara_weights(tensors, rank_mask=MASK)
    assert_unet_equals(pipe, lambda base, kept: lycoris_updates(base, tensors, kept, start_as_in_lycoris), 1e-6)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_lycoris_file_plays_with_guidance_in_each_sampler(scheduler) -> None:
    options = {"num_inference_steps": 3, "output_type": "latent"}
    outputs = []
    for is_reference in (False, True):
        pipe: Any = small_sdxl()
        pipe.scheduler = scheduler(**BETAS)
        tensors = lycoris_file(pipe.unet, NAMES)
        if is_reference:
            weights = {name: pipe.unet.get_submodule(name).weight for name in NAMES}
            base = {name: weight.detach().clone() for name, weight in weights.items()}
            by_rank = {kept: lycoris_updates(pipe.unet, tensors, kept) for kept in range(1, 5)}

            def follow(
                unet: Any, args: tuple[Any, ...], weights: Any = weights, base: Any = base, by_rank: Any = by_rank
            ):
                for name, update in by_rank[active(float(args[1]), 4, 1, 2.0)].items():
                    weights[name].data = base[name] + update.float().reshape(base[name].shape)

            pipe.unet.register_forward_pre_hook(follow)
        else:
            pipe.load_nara_weights(tensors, rank_mask=MASK)
        call = {"height": 16, "width": 16, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
        outputs.append(pipe("a photo of a toy", **options, **call).images)
    assert relative_error(*outputs) <= 1e-4


def test_lycoris_names_of_flux_reach_the_layers_that_they_name() -> None:
    pipe = _bases.flux()
    names = ["proj_out", "single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff_context.net.2"]
    tensors = lycoris_file(pipe.transformer, names)
    pipe.load_nara_weights(tensors, "mine", rank_mask=MASK)
    assert pipe.transformer.peft_config["mine"].noise_convention == "flow"
    output = _bases.flux_outputs(pipe)["transformer"]
    for index, level in enumerate(_bases.LEVELS):
        updates = lycoris_updates(_bases.flux().transformer, tensors, active(1000 * level.item(), 4, 1, 2.0))
        pipe = _bases.flux()
        for name, update in updates.items():
            pipe.transformer.get_submodule(name).weight.data += update.float()
        assert relative_error(output[index], _bases.flux_outputs(pipe)["transformer"][index]) <= 1e-5


def test_lycoris_alpha_of_zero_means_the_rank_and_layers_may_differ() -> None:
    pipe = _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES)
    keys = [key for key in tensors if key.endswith("alpha")]
    tensors[keys[0]], tensors[keys[1]] = torch.tensor(0), torch.tensor(7)
    pipe.load_nara_weights(tensors, rank_mask=MASK)
    tensors[keys[0]] = torch.tensor(4.0)
    assert_unet_equals(pipe, lambda base, kept: lycoris_updates(base, tensors, kept), 1e-4)


def test_base_factors_beyond_the_smaller_size_are_padded() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    P, values, Q = base_factors.singular_triples(weight, 6)
    assert (P.shape, values.shape, Q.shape) == ((3, 6), (6,), (6, 5))
    torch.testing.assert_close(P * values @ Q, weight)
    torch.testing.assert_close(values[3:], torch.full((3,), 1e-6))
    assert not torch.cat([P[:, 3:].flatten(), Q[3:].flatten()]).any()


def test_kernel_without_padding_is_played_and_with_padding_refused() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(3, 8, 3, padding=1)

    model = Patches()
    tensors = lycoris_file(model, ["near"], 2)
    (part,) = AdapterFile.read(tensors, base=lambda: model, for_model=True, rank_mask=MASK).parts.values()
    A, B = part.tensors["near.lora_A.weight"], part.tensors["near.lora_B.weight"]
    x = torch.randn(1, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    found = nn.functional.conv2d(nn.functional.conv2d(x, A, stride=2), B) * 3 / 2
    update = lycoris_updates(model, tensors, 2)["near"].float()
    torch.testing.assert_close(found, nn.functional.conv2d(x, update[..., None, None], stride=2))
    with pytest.raises(ValueError, match=r"'lycoris_far' is for a convolution with kernel \(3, 3\)"):
        AdapterFile.read(lycoris_file(model, ["far"], 2), base=lambda: model, rank_mask=MASK)


@pytest.mark.parametrize("prefix", ["lycoris_", "lycoris__", "lycoris_unet_", "lora_unet_"])
def test_prefixes_of_old_and_other_versions_are_understood(prefix: str) -> None:
    unet = _bases.unet()
    keys = [prefix + name.replace(".", "_") for name in NAMES]
    assert list(module_names(keys, unet).values()) == NAMES
    assert list(map(dotted, keys)) == NAMES


def test_names_are_guessed_without_a_model() -> None:
    for model in (_bases.unet(), _bases.flux().transformer):
        names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        assert [dotted("lycoris_" + name.replace(".", "_")) for name in names] == names


def test_key_that_names_no_module_or_two_is_refused() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(2, 3), "a": nn.ModuleDict({"b": nn.Linear(2, 3)})})
    with pytest.raises(ValueError, match=r"'lycoris_a_b' names 'a_b' and 'a\.b' of ModuleDict"):
        module_names(["lycoris_a_b"], model)
    with pytest.raises(ValueError, match="'lora_te1_text_model' names no module of UNet2D"):
        module_names(["lora_te1_text_model"], _bases.unet())


# ---------------------------------------------------------------- T-LoRA's own repository


@pytest.mark.parametrize("ortho", [False, True], ids=["vanilla", "ortho"])
def test_repository_file_of_sdxl_equals_its_formula(ortho: bool, tmp_path) -> None:
    pipe = _bases.sdxl()
    tensors = repository_file(pipe.unet, SDXL, ortho=ortho)
    pipe.load_nara_weights(saved(tmp_path, tensors) / FILE, rank_mask=MASK)
    names = dict(pipe.unet.named_modules())
    assert_unet_equals(pipe, lambda base, kept: repository_updates(tensors, SDXL, kept, names), 1e-5)


def test_repository_file_of_flux_equals_its_formula(tmp_path) -> None:
    pipe = _bases.flux()
    tensors = repository_file(pipe.transformer, FLUX, rank=5)
    torch.save(tensors, tmp_path / "lora.pt")
    pipe.load_nara_weights(tmp_path, rank_mask={"min": 2})
    output = _bases.flux_outputs(pipe)["transformer"]
    for index, level in enumerate(_bases.LEVELS):
        pipe = _bases.flux()
        names = dict(pipe.transformer.named_modules())
        for name, update in repository_updates(tensors, FLUX, active(1000 * level.item(), 5, 2), names).items():
            pipe.transformer.get_submodule(name).weight.data += update.float()
        assert relative_error(output[index], _bases.flux_outputs(pipe)["transformer"][index]) <= 1e-5


def test_pickle_with_code_is_refused_unread(tmp_path) -> None:
    torch.save({"x": Path("y")}, tmp_path / "lora.pt")
    refused(lambda: pipe.load_nara_weights(tmp_path), pipe := _bases.flux(), "lora.pt", "tensors only")


# ---------------------------------------------------------------- settings of the mask


def test_mask_without_settings_is_the_default_and_warns_once(tmp_path, caplog) -> None:
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
    [({"min": 5}, "rank 4"), ({"min": True}, "rank 4"), ({"exponent": 0}, "greater"), ({"least": 2}, "least")],
)
def test_mask_that_the_rank_does_not_allow_is_refused(changes, message) -> None:
    pipe = _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES)
    refused(lambda: pipe.load_nara_weights(tensors, rank_mask=MASK | changes), pipe, message)


def test_rank_mask_for_a_nara_is_refused(tmp_path) -> None:
    pipe = _bases.sdxl()
    refused(lambda: pipe.load_nara_weights({"unet.x": torch.ones(1)}, rank_mask=MASK), pipe, "rank_mask is for")


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
    for each in (pipe, other):
        each.load_nara_weights(tensors, "mine", rank_mask=MASK)
        each.set_adapters("mine")
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

    wanted = output(pipe)
    (cache,) = folder.glob("*.base_factors")
    assert torch.equal(output(_bases.sdxl()), wanted)
    assert len(calls) == len(NAMES)
    content = bytearray(cache.read_bytes())
    for change in (lambda content: content[:-9], lambda content: content[:-9] + b"\x17" + content[-8:], lambda _: b""):
        cache.write_bytes(change(content))
        calls.clear()
        assert torch.equal(output(_bases.sdxl()), wanted)
        assert len(calls) == len(NAMES)
    assert torch.equal(output(_bases.sdxl()), wanted)
    assert len(calls) == len(NAMES)  # they were written again
    other = _bases.sdxl()
    other.unet.get_submodule(NAMES[2]).weight.data[0, 0] += 1
    output(other)
    assert len(list(folder.glob("*.base_factors"))) == 2


def test_folder_that_cannot_be_written_keeps_no_start_factors(tmp_path, monkeypatch) -> None:
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
def test_three_adapters_add_up_with_weights_and_are_deleted(tmp_path) -> None:
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
def test_saved_tlora_is_an_ordinary_file_that_gives_the_same_pixels(tmp_path) -> None:
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
    pipe, wanted = small_sdxl(), small_sdxl()
    first, second = (lycoris_file(pipe.unet, NAMES, seed=seed) for seed in (1, 2))
    pipe.load_nara_weights(first, "mask", rank_mask=MASK)
    layer = pipe.unet.get_submodule(NAMES[0])
    pipe.load_nara_weights(second, "mask", hotswap=True, rank_mask=MASK)
    assert pipe.unet.get_submodule(NAMES[0]) is layer
    wanted.load_nara_weights(second, rank_mask=MASK)
    assert torch.equal(pixels(pipe), pixels(wanted))
    with pytest.raises(ValueError, match="rank_mask_exponent"):
        pipe.load_nara_weights(second, "mask", hotswap=True, rank_mask={"min": 1})


def test_peft_is_told_where_such_a_file_belongs(tmp_path) -> None:
    unet = _bases.unet()
    folder = saved(tmp_path, lycoris_file(unet, NAMES))
    for source in (folder, folder / FILE):
        with pytest.raises(ValueError, match=r"T-LoRA of LyCORIS.*pipe\.load_nara_weights"):
            PeftModel.from_pretrained(unet, source)


# ---------------------------------------------------------------- mixed and damaged files


@pytest.mark.parametrize("key", ["lycoris_x.lokr_w1", "lycoris_x.lora_down.weight", "x.lora_A.weight"])
def test_mixed_file_is_refused_by_the_first_key_that_is_not_understood(key: str) -> None:
    pipe = _bases.sdxl()
    for tensors, key_there in (
        (lycoris_file(pipe.unet, NAMES), key),
        (repository_file(pipe.unet, SDXL), key),
        (repository_file(pipe.unet, SDXL), f"{BLOCK}.attn1.processor.to_q_lora.q_layer.weight"),
    ):
        mixed = tensors | {key_there: torch.ones(2, 2), "z.unknown": torch.ones(1)}
        refused(lambda mixed=mixed: pipe.load_nara_weights(mixed, rank_mask=MASK), pipe, f"'{key_there}'")


def test_layer_of_another_rank_is_refused_by_its_name() -> None:
    pipe = _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES[:2]) | lycoris_file(pipe.unet, NAMES[2:], rank=3)
    refused(lambda: pipe.load_nara_weights(tensors, rank_mask=MASK), pipe, "ff_net_2' has rank 3")


def changed_tensors(tensors: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """One tensor that is missing, of another size or type, not finite, or under another name."""
    key = sorted(tensors)[int(torch.randint(len(tensors), (1,), generator=generator))]
    kind = int(torch.randint(6, (1,), generator=generator))
    tensor = tensors[key]
    others = {name: other for name, other in tensors.items() if name != key}
    if kind == 0:
        return others
    if kind == 1:
        return others | {f"{key}.more": tensor}
    if kind == 2:
        return others | {key: torch.cat([tensor.reshape(-1)] * 2)}
    if kind == 3:
        return others | {key: torch.full_like(tensor, torch.inf)}
    if kind == 4:
        return others | {key: tensor.to(torch.complex64)}
    return others | {key.replace("block", "clock"): tensor}


@pytest.mark.parametrize("kind", ["lycoris", "vanilla", "ortho", "flux"])
def test_a_hundred_damaged_files_are_refused_by_name(kind: str, tmp_path) -> None:
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
    for index in range(100):
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
