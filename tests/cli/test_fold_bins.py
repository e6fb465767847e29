"""`nara fold --bins`: files and strengths that together are the NaRA at every λ, without its base model."""

import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
from peft import get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file

from nara_diffusion import StrengthSchedule, core_matrix, to_lora_bins
from nara_diffusion.cli.main import main
from nara_diffusion.export.hosts.comfyui_workflow import comfyui_workflow
from nara_diffusion.loaders.schedulers import scheduler_fields
from tests.helpers.adapted import TwoLayers, disturb, nara_config
from tests.helpers.pipelines.wan import small_wan
from tests.helpers.small_pipelines import small_flux, small_sdxl

WORDS = ["--form", "kohya", "--base", "sdxl", "--layers_per_block", "1"]


@pytest.fixture(params=["knots", "hypernetwork"])
def saved(request, tmp_path):
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(core_type=request.param, target_modules=["to_q", "conv1"]), "toy")
    disturb(pipe.unet)
    encoder = nara_config(core_type="identity", target_modules=["q_proj"])
    inject_adapter_in_model(encoder, pipe.text_encoder, "toy")
    disturb(pipe.text_encoder, 5)
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    return pipe, tmp_path, request.param


def dense(unet, name, level):
    layer = unet.get_submodule(name)
    C = core_matrix(unet, level, "toy")[0].double()
    A, B = (getattr(layer, f"lora_{x}")["toy"].weight.double().flatten(1) for x in "AB")
    return layer.scaling["toy"] * B @ C @ A


@torch.no_grad()
def test_files_with_their_schedules_are_the_nara_at_every_level(saved, capsys):
    pipe, folder, kind = saved
    amount = ["--bins", "24" if kind == "hypernetwork" else "5"]
    main(["fold", str(folder / "toy"), str(folder / "toys"), *amount, *WORDS])
    entries = json.loads((folder / "toys" / "lora_bins.json").read_text())["loras"]
    assert f"{len(entries)} LoRAs, the largest relative error of ΔW is" in capsys.readouterr().out
    name, key = "mid_block.resnets.0.conv1", "lora_unet_middle_block_0_in_layers_2"
    files = [load_file(folder / "toys" / entry["file"]) for entry in entries]
    size = max(dense(pipe.unet, name, level).norm() for level in (0.0, 0.5, 1.0))
    for level in (0.0, 0.13, 0.5, 0.77, 1.0):
        total = 0
        for entry, tensors in zip(entries, files, strict=True):
            up, down = (tensors[f"{key}.lora_{x}.weight"].double().flatten(1) for x in ("up", "down"))
            total = total + StrengthSchedule(entry["strength"])(level).double() * (up @ down)
        error = (total - dense(pipe.unet, name, level)).norm() / size
        assert error < (1e-5 if kind == "knots" else 0.1)


def test_folder_has_the_workflow_text_encoders_and_the_error(saved):
    _, folder, _ = saved
    main(["fold", str(folder / "toy"), str(folder / "toys"), "--bins", "3", *WORDS])
    written = {path.name for path in (folder / "toys").iterdir()}
    loras = {name for name in written if name.endswith(".safetensors")}
    assert loras == {"toys-0.safetensors", "toys-1.safetensors", "toys-2.safetensors", "toys-text.safetensors"}
    assert written - loras == {"comfyui_workflow.json", "lora_bins.json", "export_error.json", "export_error.png"}
    text = load_file(folder / "toys" / "toys-text.safetensors")
    assert all(key.startswith("lora_te1_") for key in text)
    assert all(key.startswith("lora_unet_") for key in load_file(folder / "toys" / "toys-1.safetensors"))
    state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        load_file(folder / "toys" / "toys-0.safetensors"), unet_config=saved[0].unet.config
    )
    assert len([key for key in state if "lora" in key]) > 0


def test_peft_form_is_the_folder_of_lora_bins(tmp_path):
    model = get_peft_model(TwoLayers(), nara_config(core_type="knots", target_modules=["first"]))
    disturb(model)
    model.save_pretrained(tmp_path / "nara")
    main(["fold", str(tmp_path / "nara"), str(tmp_path / "parts"), "--bins", "5", "--form", "peft"])
    entries = json.loads((tmp_path / "parts" / "lora_bins.json").read_text())["loras"]
    for entry, lora in zip(entries, to_lora_bins(model).loras, strict=True):
        found = load_file(tmp_path / "parts" / entry["folder"] / "adapter_model.safetensors")
        wanted = lora.state_dict("base_model.model.")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fewer_loras_than_the_folder_has_are_refused_and_as_many_replace_them(saved):
    _, folder, _ = saved
    words = ["fold", str(folder / "toy"), str(folder / "toys"), *WORDS, "--bins"]
    main([*words, "3"])
    before = contents(folder / "toys")
    with pytest.raises(SystemExit, match=r"error: '.*toys' has 'toys-2.safetensors' of an earlier export, .* delete"):
        main([*words, "2"])
    assert contents(folder / "toys") == before
    main([*words, "3"])
    assert contents(folder / "toys").keys() == before.keys()


def test_text_encoders_loras_of_an_earlier_adapter_are_refused(saved):
    pipe, folder, _ = saved
    words = ["--bins", "3", *WORDS]
    main(["fold", str(folder / "toy"), str(folder / "toys"), *words])
    pipe.text_encoder = small_sdxl().text_encoder
    pipe.save_nara_weights(folder / "other", adapter_name="toy")
    with pytest.raises(SystemExit, match=r"has 'toys-text.safetensors' of an earlier export"):
        main(["fold", str(folder / "other"), str(folder / "toys"), *words])


def test_peft_form_refuses_a_file_of_several_components(saved):
    with pytest.raises(SystemExit, match="--form peft writes one component, but the file has"):
        main(["fold", str(saved[1] / "toy"), str(saved[1] / "toys"), "--bins", "5", "--form", "peft"])
    assert not (saved[1] / "toys").exists()


def test_the_workflow_of_a_flow_needs_its_shift_whatever_the_form(tmp_path):
    pipe = small_flux()
    pipe.transformer.add_adapter(nara_config(core_type="knots", target_modules=["to_q"]), "toy")
    disturb(pipe.transformer)
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    words = ["fold", str(tmp_path / "toy"), str(tmp_path / "toys"), "--bins", "5"]
    with pytest.raises(SystemExit, match="is for a flow model: give --shift"):
        main(words)
    assert not (tmp_path / "toys").exists()
    main([*words, "--shift", "3"])
    entries = json.loads((tmp_path / "toys" / "lora_bins.json").read_text())["loras"]
    given = {entry["file"]: StrengthSchedule(entry["strength"]) for entry in entries}
    found = json.loads((tmp_path / "toys" / "comfyui_workflow.json").read_text())
    assert found == comfyui_workflow(given, "sd_xl_base_1.0.safetensors", 3.0)
    assert found != comfyui_workflow(given, "sd_xl_base_1.0.safetensors")


KINDS = {
    "v_prediction": (
        {"prediction_type": "v_prediction"},
        "ModelSamplingDiscrete",
        {"sampling": "v_prediction", "zsnr": False},
    ),
    "zero_snr": (
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        "ModelSamplingDiscrete",
        {"sampling": "v_prediction", "zsnr": True},
    ),
    "flow": ({"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "ModelSamplingSD3", {"shift": 1.0}),
    "shifted": (
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "ModelSamplingSD3",
        {"shift": 3.0},
    ),
}


@pytest.mark.parametrize("given", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_adapter_samples_by_its_own_prediction(kind, given, tmp_path, caplog):
    options, node, inputs = KINDS[kind]
    is_flow = "use_flow_sigmas" in options
    fields = scheduler_fields(DPMSolverMultistepScheduler(**options))
    config = nara_config(core_type="knots", target_modules=["to_q"], scheduler=fields)
    config.noise_convention = "flow" if is_flow else "timestep"
    pipe = small_sdxl()
    pipe.unet.add_adapter(config, "toy")
    disturb(pipe.unet)
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    words = ["fold", str(tmp_path / "toy"), str(tmp_path / "toys"), "--bins", "5", *WORDS]
    if given is not None:
        if not is_flow:
            with pytest.raises(SystemExit, match="--shift is 2: it is for adapters of flow models"):
                main([*words, "--shift", "2"])
            return
        words, inputs = [*words, "--shift", "2"], {"shift": given}
    main(words)
    assert len(caplog.messages) == 1
    nodes = json.loads((tmp_path / "toys" / "comfyui_workflow.json").read_text())
    (sampler,) = (each for each in nodes.values() if each["class_type"] == "KSampler")
    patch = nodes[sampler["inputs"]["model"][0]]
    assert patch == {"class_type": node, "inputs": {"model": ["1", 0], **inputs}}
    assert nodes["1"]["class_type"] == "CheckpointLoaderSimple"
    shift = inputs.get("shift")
    entries = json.loads((tmp_path / "toys" / "lora_bins.json").read_text())["loras"]
    schedules = {entry["file"]: StrengthSchedule(entry["strength"]) for entry in entries}
    assert nodes == comfyui_workflow(schedules, "sd_xl_base_1.0.safetensors", shift, patch=(node, inputs))
    with safe_open(tmp_path / "toys" / "toys-0.safetensors", "pt") as file:
        assert json.loads(file.metadata()["nara_scheduler"]) == fields


@pytest.mark.parametrize("shift", ["0.5", "inf", "nan"])
def test_a_shift_that_is_none_is_refused(shift, tmp_path):
    pipe = small_flux()
    pipe.transformer.add_adapter(nara_config(core_type="knots", target_modules=["to_q"]), "toy")
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    with pytest.raises(SystemExit, match=f"--shift is {shift}: it is for adapters of flow models, 1 or more"):
        main(["fold", str(tmp_path / "toy"), str(tmp_path / "toys"), "--bins", "5", "--shift", shift])


def test_an_adapter_of_a_flow_that_is_none_of_the_bases_is_refused_as_before(tmp_path):
    pipe = small_flux()
    pipe.transformer.add_adapter(nara_config(core_type="knots", target_modules=["to_q"]), "toy")
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    with pytest.raises(SystemExit, match=r"--base sdxl has discrete timesteps, but .* defines λ as 'flow'"):
        main(["fold", str(tmp_path / "toy"), str(tmp_path / "toys"), "--bins", "5", *WORDS])


def test_bins_of_edm_levels_are_refused(tmp_path):
    pipe = small_sdxl()
    config = nara_config(core_type="knots", target_modules=["to_q"], noise_convention="edm")
    get_peft_model(pipe.unet, config).save_pretrained(tmp_path / "peft")
    main(["convert", str(tmp_path / "peft"), str(tmp_path / "toy"), "--to", "pipeline", "--component", "unet"])
    with pytest.raises(SystemExit, match="defines λ as 'edm', for which no workflow can be written"):
        main(["fold", str(tmp_path / "toy"), str(tmp_path / "toys"), "--bins", "5", *WORDS])


def test_a_video_model_gets_no_workflow_and_needs_no_shift(tmp_path):
    pipe = small_wan()
    pipe.transformer.add_adapter(nara_config(core_type="knots", target_modules=["to_q"]), "toy")
    disturb(pipe.transformer)
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    main(["fold", str(tmp_path / "toy"), str(tmp_path / "toys"), "--bins", "5", "--form", "comfyui", "--base", "wan"])
    written = {path.name for path in (tmp_path / "toys").iterdir()}
    assert {"lora_bins.json", "toys-0.safetensors"} <= written
    assert "comfyui_workflow.json" not in written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--bins", "2", "--form", "comfyui", "--base", "flux"],
            "--base flux is a flow model, but .* defines λ as 'timestep'",
        ),
        (["--bins", "2", *WORDS, "--shift", "3"], "--shift is 3: it is for adapters of flow models, 1 or more"),
    ],
)
def test_what_is_wrong_ends_in_one_line_and_writes_nothing(saved, words, message):
    with pytest.raises(SystemExit, match=message):
        main(["fold", str(saved[1] / "toy"), str(saved[1] / "toys"), *words])
    assert not (saved[1] / "toys").exists()
