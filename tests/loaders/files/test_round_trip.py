"""Save and load: the same pixels bit for bit, the same tensors, and a file that says all that loading needs."""

from __future__ import annotations

import json
import tempfile
import warnings
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nara_diffusion import NaraConfig, core_matrix
from tests.helpers.adapted import lora_config, nara_config
from tests.helpers.small_pipelines import pixels, small_flux, small_sd, small_sd3, small_sdxl
from tests.loaders.adapters import FILE, State, predict, shake, trained


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loaded_adapter_draws_the_same_pixels(nara_folder, tmp_path, dtype, low_cpu_mem_usage, base_pixels):
    first = small_sdxl().to(dtype=dtype)
    first.load_nara_weights(nara_folder, adapter_name="mine")
    drawn = pixels(first)
    first.save_nara_weights(tmp_path, "mine")
    second = small_sdxl().to(dtype=dtype)
    torch.manual_seed(77)
    second.load_nara_weights(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(pixels(second), drawn)
    assert (drawn - base_pixels).abs().mean() > 0.01
    for part in ("unet", "text_encoder", "text_encoder_2"):
        dtypes = {n: p.dtype for n, p in getattr(second, part).named_parameters()}
        assert {d for n, d in dtypes.items() if "nara_core" not in n} == {dtype}
        assert {d for n, d in dtypes.items() if "nara_core" in n} <= {torch.float32}


def test_what_training_has_in_memory_is_what_is_loaded():
    pipe = trained()
    drawn = pixels(pipe)
    pipe.save_nara_weights("unused", is_main_process=False)
    loaded = small_sdxl()
    tensors, metadata = _file_of(pipe)
    given = dict(tensors)
    loaded.load_nara_weights(given, metadata=metadata)
    assert given.keys() == tensors.keys()  # the caller's
    assert torch.equal(pixels(loaded), drawn)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        expected = get_peft_model_state_dict(getattr(pipe, part))
        actual = get_peft_model_state_dict(getattr(loaded, part), adapter_name="default_0")
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_file_that_calls_the_shared_core_global_draws_the_same_pixels():
    """As files did before; as a dictionary with metadata, from which hotswap and folders read too."""
    pipe = trained()
    tensors, metadata = _file_of(pipe)
    old = {key.replace("nara_core.shared.", "nara_core.global."): tensor for key, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    loaded = small_sdxl()
    loaded.load_nara_weights(old, metadata=metadata)
    assert torch.equal(pixels(loaded), pixels(pipe))


def _file_of(pipe):
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_nara_weights(folder)
        with safe_open(f"{folder}/{FILE}", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (small_sd, ["to_q", "to_v", "conv_shortcut"]),
        (small_sd3, ["to_q", "add_k_proj", "ff.net.0.proj"]),
        (small_flux, ["to_q", "to_v", "proj_out"]),
    ],
)
def test_other_pipelines_too(make, targets, tmp_path):
    base = pixels(make())
    pipe = trained(make(), target_modules=targets, text=make is not small_flux)
    drawn = pixels(pipe)
    assert not torch.allclose(drawn, base, atol=1e-2)
    pipe.save_nara_weights(tmp_path)
    loaded = make()
    loaded.load_nara_weights(tmp_path)
    assert torch.equal(pixels(loaded), drawn)
    loaded.unload_nara_weights()
    assert torch.equal(pixels(loaded), base)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_layers(kind, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def quantised() -> Any:
        pipe = small_sdxl()
        for name, layer in list(pipe.unet.named_modules()):
            if name.endswith(("to_q", "to_v")):
                parent, _, own = name.rpartition(".")
                options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"compute_dtype": torch.float32}
                packed = getattr(bnb.nn, kind)(layer.in_features, layer.out_features, bias=False, **options)
                packed.load_state_dict(layer.state_dict())
                setattr(pipe.unet.get_submodule(parent), own, packed.to("cpu"))
        return pipe

    pipe, loaded = quantised(), quantised()
    base = predict(pipe)
    trained(pipe, text=False, target_modules=["to_q", "to_v"]).save_nara_weights(tmp_path)
    loaded.load_nara_weights(tmp_path)
    assert torch.equal(predict(loaded), predict(pipe))
    assert not torch.allclose(predict(loaded), base, atol=1e-2)
    loaded.unload_nara_weights()
    assert torch.equal(predict(loaded), base)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"core_type": "constant"},
        {"core_type": "identity"},
        {"core_sharing": "module_type", "noise_embedding": "mlp"},
        {"core_sharing": "layer", "noise_embedding": "raw"},
        {"rank_pattern": {"to_k": 2, "mid_block.*to_q": 5}, "alpha_pattern": {"to_k": 9}, "use_rslora": True},
        {"lora_bias": True, "target_modules": ["to_q", "to_out.0"]},
        {"target_modules": r".*attn2\.to_[kv]", "core_scale": 1.5},
        {"target_modules": "all-linear", "exclude_modules": ["to_k"]},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_every_form_of_core_comes_back(changes, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lora_bias=True.*")  # to_q has none
        pipe = trained(text=False, **changes)
        drawn = predict(pipe)
        pipe.save_nara_weights(tmp_path)
        loaded = small_sdxl()
        loaded.load_nara_weights(tmp_path)
    assert torch.equal(predict(loaded), drawn)
    before, after = pipe.unet.peft_config["default"].to_dict(), loaded.unet.peft_config["default_0"].to_dict()
    assert {k: v for k, v in before.items() if k != "peft_version"} == {
        k: v for k, v in after.items() if k != "peft_version"
    }
    if changes.get("core_type") == "constant":
        assert torch.equal(core_matrix(loaded.unet, 0.3, "default_0"), core_matrix(pipe.unet, 0.3))


def test_the_file_has_one_key_a_tensor_and_its_configuration(nara_folder):
    assert [path.name for path in nara_folder.iterdir()] == [FILE]
    with safe_open(nara_folder / FILE, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert metadata["format"] == "pt"
    content = json.loads(metadata["nara_adapter_metadata"])
    assert content["format_version"] == 1
    assert content["components"].keys() == {"unet", "text_encoder", "text_encoder_2"}
    unet = content["components"]["unet"]
    assert unet["lora_alpha"] == 3
    assert unet["core_scale"] == 0.7
    assert unet["noise_convention"] == "timestep"
    assert not unet.keys() & {"base_model_name_or_path", "peft_version", "auto_mapping"}
    expected = {
        f"{part}.{key}" for part in content["components"] for key in get_peft_model_state_dict(getattr(trained(), part))
    }
    assert keys == expected
    assert "unet.nara_core.shared.embeddings.noise_level.frequencies" in keys
    assert not any("default" in key for key in keys)


def test_one_of_several_adapters_is_saved_under_its_name(nara_folder, other_folder, tmp_path):
    pipe = small_sdxl()
    pipe.load_nara_weights(nara_folder, "a")
    pipe.load_nara_weights(other_folder, "b")
    pipe.save_nara_weights(tmp_path / "one", "a", weight_name="mine.safetensors")
    pipe.save_nara_weights(tmp_path / "two", "b")
    for saved, original in (
        (tmp_path / "one" / "mine.safetensors", nara_folder),
        (tmp_path / "two" / FILE, other_folder),
    ):
        expected, actual = load_file(original / FILE), load_file(saved)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    loaded = small_sdxl()
    loaded.load_nara_weights(tmp_path / "one")  # the only safetensors file there
    assert loaded.get_list_adapters() == {part: ["default_0"] for part in ("unet", "text_encoder", "text_encoder_2")}
    with pytest.raises(ValueError, match=r"no NaRA adapter 'default' to save: the pipeline has 'a', 'b'"):
        pipe.save_nara_weights(tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_a_file_that_is_there_is_replaced_whole_or_not_at_all(tmp_path):
    pipe = trained(text=False)
    pipe.save_nara_weights(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def breaks(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        raise KeyboardInterrupt

    shake(pipe.unet, 8)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_nara_weights(tmp_path, save_function=breaks)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before
    calls = []

    def remembers(tensors, path, metadata):
        calls.append((sorted(tensors), sorted(metadata)))
        save_file(tensors, path, metadata=metadata)

    pipe.save_nara_weights(tmp_path, save_function=remembers)
    assert (tmp_path / FILE).read_bytes() != before
    assert calls[0][1] == ["format", "nara_adapter_metadata"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"safe_serialization": False}, "safetensors only"),
        ({"weight_name": "x.bin"}, "name of a .safetensors file"),
        ({"weight_name": "sub/x.safetensors"}, "without a folder"),
        ({"save_function": lambda tensors, path: None}, "takes no metadata="),
        ({"adapter_name": "nobody"}, "no NaRA adapter 'nobody' to save: the pipeline has 'default'"),
    ],
)
def test_what_cannot_be_saved(arguments, message, tmp_path):
    pipe = trained(text=False)
    before = State(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.save_nara_weights(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
    assert before == State(pipe)


def test_saving_into_a_file_or_what_the_base_would_have_to_be_saved_with(tmp_path):
    (tmp_path / "file").write_text("")
    pipe = trained(text=False)
    with pytest.raises(ValueError, match="is a file: name a folder"):
        pipe.save_nara_weights(tmp_path / "file")
    pipe = small_sdxl()
    with pytest.raises(ValueError, match="the pipeline has none"):
        pipe.save_nara_weights(tmp_path)
    pipe.unet.add_adapter(NaraConfig(r=2, target_modules=["to_q"], init_lora_weights="olora"))
    with pytest.raises(ValueError, match="changes the base model itself"):
        pipe.save_nara_weights(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_adapter_with_an_orthogonal_start_loads_and_unloading_it_gives_the_base(tmp_path, low_cpu_mem_usage):
    targets = ["to_q", "to_k", "to_out.0"]
    pipe = trained(text=False, init_lora_weights="orthogonal", r=4, target_modules=targets)
    expected = predict(pipe)
    pipe.save_nara_weights(tmp_path)
    loaded = small_sdxl()
    loaded.unet.requires_grad_(False)
    before, base = State(loaded), predict(loaded)
    loaded.load_nara_weights(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(predict(loaded), expected)
    assert (expected - base).abs().max() > 0.01
    loaded.unload_nara_weights()
    assert before == State(loaded)


def test_text_encoders_take_static_adapters_of_this_package(tmp_path):
    for config, message in (
        (lora_config(target_modules=["q_proj"]), r"'default' of text_encoder is a plain LoRA.*core_type=\"identity\""),
        (nara_config(target_modules=["q_proj"]), r"text encoders run before there is a λ: use NaraConfig\(core_type="),
    ):
        pipe = trained(text=False)
        inject_adapter_in_model(config, pipe.text_encoder)
        with pytest.raises(ValueError, match=message):
            pipe.save_nara_weights(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_without_a_denoiser_says_so(nara_folder):
    class Planner(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    pipe = Planner(DDIMScheduler())
    for call in (
        lambda: pipe.load_nara_weights(nara_folder),
        lambda: pipe.save_nara_weights("x"),
        lambda: pipe.unload_nara_weights(),
    ):
        with pytest.raises(ValueError, match=r"Planner has none of unet, transformer, .*'scheduler'"):
            call()
