"""`nara fold`: from a file alone, without its base model, the same LoRA as from the adapted model."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from nara_diffusion import StrengthSchedule, noise_level, to_lora
from nara_diffusion.cli.adapter_file import read
from nara_diffusion.cli.fold import folded
from nara_diffusion.cli.main import main
from nara_diffusion.export.hosts import host_state_dict
from nara_diffusion.export.hosts.unet import UNetLayout
from nara_diffusion.loaders.schedulers import scheduler_fields
from tests.helpers.adapted import TwoLayers, disturb, nara_config
from tests.helpers.small_pipelines import pixels, small_sdxl

LEVEL = 0.37
BASE = str(Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny")
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


class Mixed(nn.Module):
    """Every kind of layer that has an adapter; no two sizes alike."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 11)
        self.conv1 = nn.Conv1d(3, 4, 2)
        self.conv2 = nn.Conv2d(3, 5, (2, 3))
        self.conv3 = nn.Conv3d(2, 3, (1, 2, 3))
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.deeper = nn.ModuleDict({"embedding": nn.Embedding(13, 9)})


ALL = ["linear", "conv1", "conv2", "conv3", "grouped", "embedding"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"core_type": "knots", "core_sharing": "layer"},
        {"core_type": "bins", "core_bins": 2, "rank_pattern": {"linear": 6}},
        {"strength": StrengthSchedule([(0, 1.0), (0.6, 0.2)]), "alpha_pattern": {"conv2": 9}, "use_rslora": True},
        {"use_dora": True, "target_modules": ["linear", "conv2"]},
    ],
)
def test_fold_of_a_file_is_that_of_the_adapted_model(tmp_path, changes):
    model = get_peft_model(Mixed(), nara_config(**{"target_modules": ALL, **changes}))
    disturb(model)
    model.save_pretrained(tmp_path)
    wanted = to_lora(model, LEVEL)
    (found,) = folded(read(str(tmp_path)), LEVEL).values()
    tensors, expected = found.state_dict(), wanted.state_dict()
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0)
    assert {name: layer.scaling for name, layer in found.layers.items()} == {
        name: layer.scaling for name, layer in wanted.layers.items()
    }


def test_peft_loads_the_folder_and_answers_as_the_nara_at_that_level(tmp_path, capsys):
    torch.manual_seed(0)
    base = TwoLayers()
    model = get_peft_model(base, nara_config(target_modules=["first", "second"]))
    disturb(model)
    model.save_pretrained(tmp_path / "nara")
    x = torch.randn(3, 7)
    with torch.no_grad(), noise_level(model, LEVEL):
        wanted = model(x)
    main(["fold", str(tmp_path / "nara"), str(tmp_path / "lora"), "--noise_level", str(LEVEL), "--form", "peft"])
    assert capsys.readouterr().out == f"{tmp_path / 'lora'}: 2 modules, λ = 0.37\n"
    plain = PeftModel.from_pretrained(model.unload(), tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-6)


def test_pefts_folder_names_the_base_model_as_that_of_the_adapted_model_does(tmp_path):
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"]))
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(tmp_path / "nara")
    to_lora(model, LEVEL).save_pretrained(tmp_path / "wanted")
    for source in ("nara", "nara/adapter_model.safetensors"):
        main(["fold", str(tmp_path / source), str(tmp_path / "lora"), "--noise_level", str(LEVEL), "--form", "peft"])
        wanted, found = (
            json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("wanted", "lora")
        )
        assert found == wanted
        assert found["base_model_name_or_path"] == BASE
        assert found["auto_mapping"]["base_model_class"] == "TwoLayers"


def test_pefts_folder_of_a_pipelines_file_names_no_class(tmp_path):
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q"]), "toy")
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    main(["fold", str(tmp_path / "toy"), str(tmp_path / "lora"), "--noise_level", str(LEVEL), "--form", "peft"])
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["auto_mapping"] is None


@pytest.fixture
def pipeline_file(tmp_path):
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q", "to_v", "conv1"]), "toy")
    disturb(pipe.unet)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.2
    encoder = nara_config(core_type="identity", target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    inject_adapter_in_model(encoder, pipe.text_encoder, "toy")
    disturb(pipe.text_encoder, 5)
    pipe.save_nara_weights(tmp_path, adapter_name="toy")
    return pipe, tmp_path


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_diffusers_draws_the_pixels_of_the_nara_at_that_level(pipeline_file, tmp_path, form):
    pipe, folder = pipeline_file
    with noise_level(pipe.unet, LEVEL):
        wanted = pixels(pipe)
    words = ["--noise_level", str(LEVEL), "--form", form, "--base", "sdxl", "--layers_per_block", "1"]
    main(["fold", str(folder), str(tmp_path / "lora.safetensors"), *words])
    other = small_sdxl()
    other.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(pixels(other), wanted, rtol=1e-4, atol=2e-5)


def test_comfyui_file_has_the_adapters_tensors(pipeline_file, tmp_path):
    pipe, folder = pipeline_file
    words = ["--noise_level", "0.8", "--form", "kohya", "--base", "sdxl", "--layers_per_block", "1"]
    main(["fold", str(folder), str(tmp_path / "lora.safetensors"), *words])
    loras = {"unet": to_lora(pipe.unet, 0.8, "toy"), "text_encoder": to_lora(pipe.text_encoder, adapter_name="toy")}
    wanted = host_state_dict(loras, "kohya", "sdxl", UNetLayout(1, (0, 1)))
    found = load_file(tmp_path / "lora.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--noise_level", "1.5"], "error: .*1.5"),
        (["--noise_level", "0.5", "--form", "kohya"], "error: --form kohya needs --base, one of sd15, sdxl"),
        (
            ["--noise_level", "0.5", "--form", "comfyui", "--base", "flux"],
            "error: .* has no name in FLUX's original code",
        ),
        (["--noise_level", "0.5", "--form", "peft"], "error: --form peft writes one component, but the file has"),
        (["--noise_level", "0.5", "--shift", "3"], "error: --shift: for --bins alone, leave it out"),
        (
            ["--noise_level", "0.5", "--shift", "3", "--checkpoint", "x.safetensors"],
            "error: --shift, --checkpoint: ",
        ),
        (["--noise_level", "0.5", "--checkpoint", "x.safetensors"], "error: --checkpoint: for --bins"),
        (["--noise_level", "0.5", "--layers_per_block", "0"], "error: --layers_per_block is 0, expected 1 or more"),
    ],
)
def test_what_is_wrong_ends_in_one_line_and_writes_nothing(pipeline_file, tmp_path, words, message):
    with pytest.raises(SystemExit, match=message) as caught:
        main(["fold", str(pipeline_file[1]), str(tmp_path / "lora.safetensors"), *words])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_fold_does_not_overwrite_the_adapter(tmp_path, form):
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q"]), "toy")
    pipe.save_nara_weights(tmp_path, adapter_name="toy")
    if form == "peft":
        main(["convert", str(tmp_path), str(tmp_path), "--to", "peft"])
        (tmp_path / "pytorch_nara_weights.safetensors").unlink()
    (file,) = tmp_path.glob("*.safetensors")
    before = file.read_bytes()
    output = tmp_path if form == "peft" else file
    words = ["fold", str(file), str(output), "--noise_level", "0.5", "--form", form]
    with pytest.raises(SystemExit, match=r"error: OUTPUT .* is the adapter itself, which would be lost: name another"):
        main(words)
    assert file.read_bytes() == before


def test_fold_writes_a_file_that_hosts_find(pipeline_file, tmp_path):
    with pytest.raises(SystemExit, match=r"error: OUTPUT .*lora is no \.safetensors file"):
        main(["fold", str(pipeline_file[1]), str(tmp_path / "lora"), "--noise_level", "0.5"])
    assert not (tmp_path / "lora").exists()


def test_adapter_in_pefts_form_has_no_component_for_other_forms(tmp_path):
    get_peft_model(TwoLayers(), nara_config(target_modules=["first"])).save_pretrained(tmp_path / "nara")
    words = ["fold", str(tmp_path / "nara"), str(tmp_path / "lora.safetensors"), "--noise_level", "0.5"]
    with pytest.raises(SystemExit, match=r"is in PEFT's form, .* nara convert"):
        main(words)
    assert not (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui", "peft"])
def test_fold_of_a_converted_model_says_which_scheduler_it_needs_and_writes_it(tmp_path, form, caplog):
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    fields, pipe = scheduler_fields(scheduler), small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q"], scheduler=fields), "toy")
    disturb(pipe.unet)
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    words = ["--noise_level", str(LEVEL), "--form", form, "--base", "sdxl", "--layers_per_block", "1"]
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    main(["fold", str(tmp_path / "toy"), str(path), *words])
    (told,) = caplog.messages
    assert "predicts v_prediction" in told
    assert "pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type=" in told
    if form == "peft":
        assert scheduler_fields(EulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")) == fields
    else:
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["nara_scheduler"]) == fields


def test_fold_counts_the_strength_of_the_file_and_says_so(tmp_path, capsys):
    """A strength that is zero at λ leaves a LoRA that does nothing."""
    strength = StrengthSchedule([(0, 1.0), (0.5, 0.4), (0.5, 0.0)])
    found = {}
    for name, changes in {"plain": {}, "scheduled": {"strength": strength}}.items():
        model = get_peft_model(TwoLayers(), nara_config(core_type="knots", target_modules=["first"], **changes))
        disturb(model)
        model.save_pretrained(tmp_path / name)
        for level in ("0.25", "0.7"):
            folder = tmp_path / f"{name}-{level}"
            main(["fold", str(tmp_path / name), str(folder), "--noise_level", level, "--form", "peft"])
            B, A = (
                load_file(folder / "adapter_model.safetensors")[f"base_model.model.first.lora_{x}.weight"] for x in "BA"
            )
            found[name, level] = B.double() @ A.double(), capsys.readouterr().out
    torch.testing.assert_close(found["scheduled", "0.25"][0], 0.7 * found["plain", "0.25"][0], rtol=1e-5, atol=1e-7)
    assert found["scheduled", "0.25"][1].endswith(": 1 modules, λ = 0.25, at the adapter's strength of 0.7 there\n")
    assert not found["scheduled", "0.7"][0].any()
    assert found["scheduled", "0.7"][1].endswith(": 1 modules, λ = 0.7, at the adapter's strength of 0 there\n")
    assert found["plain", "0.7"][1].endswith(": 1 modules, λ = 0.7\n")


def test_skeleton_takes_no_memory_of_the_base(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4096, 4096)), nara_config(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    from nara_diffusion.cli.skeleton import skeleton

    (part,) = read(str(tmp_path)).parts.values()
    weight = skeleton(part, "model").get_submodule("0").get_base_layer().weight
    assert weight.shape == (4096, 4096)
    assert weight.untyped_storage().nbytes() == 4
