"""Whatever is wrong with what is loaded: an error that says what to do, and a pipeline as it was, to the bit."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nara_diffusion import NaraConfig, set_noise_source
from nara_diffusion.loaders import insertion as loader_adapters
from nara_diffusion.noise.timesteps import TimestepNoise
from tests.helpers.small_pipelines import pixels, small_sd, small_sdxl
from tests.loaders.adapters import FILE, State, trained

CORE = "unet.nara_core.shared.layers.2.weight"
TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def altered(folder, tmp_path, change_tensors=None, change_content=None, drop_metadata=False):
    """A copy of the file in `folder`, changed."""
    with safe_open(folder / FILE, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    if change_tensors:
        change_tensors(tensors)
    if change_content:
        content = json.loads(metadata["nara_adapter_metadata"])
        change_content(content)
        metadata["nara_adapter_metadata"] = json.dumps(content)
    path = tmp_path / "altered.safetensors"
    save_file(tensors, path, metadata={"format": "pt"} if drop_metadata else metadata)
    return path


def refused(pipe, message, *arguments, **options):
    before = State(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_nara_weights(*arguments, **options)
    assert before == State(pipe)


def replace_with(key, tensor):
    return lambda tensors: tensors.__setitem__(key, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(CORE), rf"lacks '{CORE[5:]}'"),
        (lambda t: [t.pop(key) for key in list(t) if "nara_core" in key], r"lacks 'nara_core.* and 4 more tensors"),
        (lambda t: t.pop(f"{TO_Q}.lora_B.weight"), rf"lacks '{TO_Q[5:]}.lora_B.weight'"),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith(TO_Q)],
            r"target_modules select 'down_blocks.*to_q' in unet, for which it has no tensors",
        ),
        (replace_with("unet.conv_in.lora_A.weight", torch.ones(2)), r"'conv_in' in unet, which its own target_modules"),
        (replace_with(f"{TO_Q}.lora_C.weight", torch.ones(2)), r"holds '.*lora_C.weight', which this adapter does not"),
        (replace_with("vae.x.lora_A.weight", torch.ones(2)), r"its configuration knows .* only: damaged"),
        (replace_with(f"{TO_Q}.lora_A.weight", torch.ones(3, 16)), r"\(3, 16\).* says rank 4, which is \(4, 16\)"),
        (
            replace_with(f"{TO_Q}.lora_A.weight", torch.ones(4, 17)),
            r"\(4, 17\).* this layer needs \(4, 16\).*another ba",
        ),
        (replace_with(CORE, torch.ones(16, 11)), r"has shape \(16, 11\) in the checkpoint, but .* needs \(16, 10\)"),
        (replace_with(CORE, torch.ones(16, 10).half()), r"is torch.float16 in the checkpoint, but a core is kept"),
        (replace_with(f"{TO_Q}.lora_A.weight", torch.full((4, 16), torch.nan)), r"holds NaN or infinity"),
        (replace_with(f"{TO_Q}.lora_A.weight", torch.ones(4, 16).int()), r"is torch.int32 in the checkpoint, where"),
        (replace_with(CORE, torch.ones(16, 10).to(torch.int8)), r"is torch.int8 in the checkpoint, where"),
        (replace_with(CORE, torch.ones(16, 10) > 0), r"is torch.bool in the checkpoint, where"),
        (replace_with(f"{TO_Q}.lora_B.weight", 1j * torch.ones(16, 4)), r"is torch.complex64 in the checkpoint, where"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("text_encoder.")], r"none of its tensors: damaged"),
        (
            replace_with("text_encoder_2.text_model.gone.lora_A.weight", torch.ones(1, 2)),
            r"text_encoder_2 \(CLIPTextModelWithProjection\) has no module 'text_model.gone'.*another base model",
        ),
    ],
)
def test_damaged_tensors(change, message, nara_folder, tmp_path):
    refused(small_sdxl(), message, altered(nara_folder, tmp_path, change))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("key", [CORE, f"{TO_Q}.lora_A.weight"])
def test_hotswap_by_a_tensor_of_no_real_numbers_is_refused_by_name(key, dtype, nara_folder, tmp_path):
    pipe = small_sdxl()
    pipe.load_nara_weights(nara_folder, "mine")
    path = altered(nara_folder, tmp_path, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    refused(pipe, rf"is {dtype} in the checkpoint, where the model has", path, "mine", hotswap=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), r"format version 2, this nara-diffusion reads 1: update the package"),
        (lambda c: c.pop("components"), r"metadata of '.*altered.safetensors' has no 'components': damaged"),
        (
            lambda c: c["components"]["unet"].update(later_option=3),
            r"'unet' is refused: NaraConfig has no field 'later_option'",
        ),
        (
            lambda c: c["components"]["unet"].update(core_type="spline"),
            r"refused: core_type is 'spline': choose one of",
        ),
        (lambda c: c["components"]["unet"].update(r=5), r"\(4, 8, 3, 3\), but the adapter's configuration says rank 5"),
        (lambda c: c["components"]["unet"].update(core_sharing="layer"), r"lacks .*nara_core"),
        (
            lambda c: c["components"]["unet"].update(noise_convention="masked_share"),
            r"λ defined as 'masked_share', but .* 'timestep'",
        ),
        (
            lambda c: c["components"]["text_encoder"].update(core_type="hypernetwork"),
            r"text_encoder has core_type='hypernetwork', but text encoders run before there is a λ",
        ),
        (lambda c: c["components"]["unet"].update(bias="all"), r"bias='all', which changes the base model itself"),
        (lambda c: c["components"]["unet"].update(init_lora_weights="pissa"), r"'pissa', which changes the base"),
        (lambda c: c["components"].pop("text_encoder"), r"its configuration knows 'text_encoder_2', 'unet' only"),
    ],
)
def test_configurations_that_do_not_fit(change, message, nara_folder, tmp_path):
    refused(small_sdxl(), message, altered(nara_folder, tmp_path, change_content=change))


def test_unset_fields_of_a_later_version_do_no_harm(nara_folder, tmp_path):
    pipe = small_sdxl()
    path = altered(nara_folder, tmp_path, change_content=lambda c: c["components"]["unet"].update(later_option=None))
    pipe.load_nara_weights(path)
    assert pipe.get_active_adapters() == ["default_0"]


def test_files_of_another_kind(nara_folder, lora_folder, tmp_path):
    pipe = small_sdxl()
    refused(pipe, r"is a LoRA, without core: load it by pipe.load_lora_weights", lora_folder)
    refused(pipe, r"The dict is a LoRA", load_file(lora_folder / "pytorch_lora_weights.safetensors"))
    refused(pipe, r"cores of a NaRA without its configuration", altered(nara_folder, tmp_path, drop_metadata=True))
    refused(
        pipe, r"The dict holds the cores of a NaRA .* metadata=safetensors.safe_open", load_file(nara_folder / FILE)
    )
    refused(pipe, r"is no NaRA adapter: it holds 'a'", {"a": torch.ones(2)})
    refused(pipe, r"is no NaRA adapter: it holds no tensor", {})
    refused(pipe, r"metadata is for a dict", nara_folder, metadata={})
    refused(pipe, r"safetensors files only", nara_folder, use_safetensors=False)


def test_broken_and_missing_files(nara_folder, lora_folder, tmp_path):
    pipe = small_sdxl()
    whole = (nara_folder / FILE).read_bytes()
    for number, content in enumerate(
        (whole[:-7], whole[: len(whole) // 2], whole[:40], b"", b"PK\x03\x04 no tensors here")
    ):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        refused(pipe, r"is no whole safetensors file .* cut off", path)
    torch.save({"x": torch.ones(2)}, tmp_path / "weights.bin")
    refused(pipe, r"is no whole safetensors file", tmp_path / "weights.bin")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(pipe, r"no 'pytorch_nara_weights.safetensors' in '.*empty': the folder is empty", empty)
    (empty / "notes.txt").write_text("")
    refused(pipe, r"it holds no safetensors file, but 'notes.txt'", empty)
    refused(
        pipe,
        r"no file 'a.safetensors' in .*: pass weight_name=, one of '0.safetensors'",
        tmp_path,
        weight_name="a.safetensors",
    )
    refused(pipe, r"pass weight_name=, one of '0.safetensors', '1.safetensors'", tmp_path)
    refused(pipe, r"There is no folder '.*nowhere'", nara_folder, subfolder="nowhere")
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c", "nowhere.safetensors"):
        refused(pipe, r"There is no file or folder '.*', and it is no name of a repository", path)
    shutil.copytree(nara_folder, tmp_path / "outer" / "inner")
    pipe.load_nara_weights(tmp_path / "outer", subfolder="inner")
    assert pipe.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("key", ["lycoris_mid_block.lambda_layer", "base_model.model.mid.lora_time_gamma.weight"])
def test_a_t_lora_or_multialign_of_another_program_is_refused_by_name(key, tmp_path):
    tensors = {key: torch.ones(1, 2), key.rpartition(".")[0] + ".lora_A.weight": torch.ones(2, 2)}
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    message = r"a tensor of a T-LoRA or MultiAlign of another program, whose files aren.t read here: .* train it again"
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        save_file(tensors, tmp_path / name)
        refused(small_sdxl(), message, tmp_path, weight_name=name)
    refused(small_sdxl(), message, tensors)


def test_another_base_model(nara_folder, other_folder):
    refused(
        small_sd(),
        r"has a part for 'text_encoder_2', but this StableDiffusionPipeline has 'unet', 'text_enc",
        nara_folder,
    )
    refused(small_sd(), r"unet \(UNet2DConditionModel\) has no module .* and 13 more.*another base model", other_folder)
    pipe = small_sdxl(transformer_layers_per_block=(1, 1))
    refused(pipe, r"unet \(UNet2DConditionModel\) has no module .*another base model", nara_folder)
    pipe = small_sdxl(transformer_layers_per_block=(1, 3))
    refused(pipe, r"target_modules select .* in unet, for which it has no tensors", nara_folder)
    pipe = small_sdxl(block_out_channels=(8, 32))
    refused(pipe, r"It was trained on another base model", nara_folder)
    without_text = small_sdxl()
    without_text.text_encoder = None
    refused(without_text, r"has a part for 'text_encoder', but", nara_folder)


def test_duplicate_and_invalid_adapter_names_are_refused(nara_folder):
    pipe = small_sdxl()
    pipe.load_nara_weights(nara_folder, "mine")
    refused(pipe, r"adapter_name 'mine' is a duplicate.*delete_adapters\('mine'\).*hotswap=True", nara_folder, "mine")
    for name in ("", "a.b", 3):
        refused(pipe, r"pass a name without dots, or None", nara_folder, name)
    refused(pipe, r"adapter_name 'half' is a method of torch's modules", nara_folder, "half")
    refused(pipe, r"named like a part of", nara_folder, "weight")
    refused(pipe, r"hotswap=True replaces an adapter that is there.*'mine'", nara_folder, "yours", hotswap=True)
    pipe.text_encoder_2.peft_config["elsewhere"] = pipe.text_encoder_2.peft_config["mine"]
    refused(pipe, r"'elsewhere' is a duplicate", nara_folder, "elsewhere")
    assert pixels(pipe).isfinite().all()


def test_another_convention_of_lambda(nara_folder, other_folder):
    pipe = small_sdxl()
    pipe.unet.add_adapter(NaraConfig(r=2, target_modules=["to_k"], noise_convention="edm"), "edm")
    refused(pipe, r"λ defined as 'timestep', but the source of λ tells 'edm'", other_folder, "mine")
    pipe = small_sdxl()
    pipe.unet.add_adapter(NaraConfig(r=2, target_modules=["to_k"]))
    set_noise_source(pipe.unet, TimestepNoise("sigma"))
    refused(pipe, r"λ defined as 'timestep', but the source of λ tells 'flow'", other_folder, "mine")


@pytest.mark.parametrize("there", ["nothing", "lora", "nara"])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_load_that_fails_halfway_is_rolled_back(there, low_cpu_mem_usage, nara_folder, other_folder, monkeypatch):
    pipe = small_sdxl()
    if there == "lora":
        pipe.unet.add_adapter(LoraConfig(r=3, target_modules=["to_q", "conv_in"]), "static")
        pipe.unet.requires_grad_(False)
    if there == "nara":
        pipe.load_nara_weights(other_folder, "aware")
        pipe.unet.disable_adapters()
    drawn = pixels(pipe)
    before = State(pipe)
    real, calls = loader_adapters.inject_adapter_in_model, []

    def fails_at_the_second_text_encoder(config, model, *arguments, **options):
        calls.append(type(model).__name__)
        injected = real(config, model, *arguments, **options)
        if len(calls) == 3:
            raise MemoryError("none left")
        return injected

    monkeypatch.setattr(loader_adapters, "inject_adapter_in_model", fails_at_the_second_text_encoder)
    with pytest.raises(MemoryError):
        pipe.load_nara_weights(nara_folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert calls == ["UNet2DConditionModel", "CLIPTextModel", "CLIPTextModelWithProjection"]
    assert before == State(pipe)
    assert torch.equal(pixels(pipe), drawn)


def test_a_module_that_no_rule_can_adapt_is_found_out_by_the_tuner(tmp_path):
    """What the loader leaves to the tuner, here a convolution in groups under DoRA, changes nothing either."""
    pipe = trained(text=False, target_modules=["conv_in", "to_q"], use_dora=True)
    pipe.save_nara_weights(tmp_path)
    other = small_sdxl()
    other.unet.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1, groups=2)
    before = State(other)
    with pytest.raises(ValueError, match=re.escape("conv_in")):
        other.load_nara_weights(tmp_path)
    assert before == State(other)
