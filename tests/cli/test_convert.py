"""`nara convert`: what PEFT and pipelines load from the converted file answers as before."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from nara_diffusion.cli.adapter_file import read
from nara_diffusion.cli.main import main
from nara_diffusion.config import config_to_fields
from nara_diffusion.loaders.schedulers import scheduler_fields
from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config
from tests.helpers.small_pipelines import pixels, small_sdxl

CHANGES = {
    "rank_pattern": {"to_k": 3},
    "core_sharing": "layer",
    "use_dora": True,
    "strength": [[0.2, 1.0], [0.7, 0.3]],
    "scheduler": scheduler_fields(EulerDiscreteScheduler(prediction_type="v_prediction")),
}


@pytest.fixture
def piped(tmp_path):
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q", "to_k"], **CHANGES), "toy")
    disturb(pipe.unet)
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe, tmp_path


def test_peft_loads_the_folder_of_a_pipelines_file(piped, capsys):
    pipe, folder = piped
    wanted = pixels(pipe)
    main(["convert", str(folder / "toy"), str(folder / "peft"), "--to", "peft"])
    assert capsys.readouterr().out == f"{folder / 'peft'}: as peft\n"
    other = small_sdxl()
    other.unet = PeftModel.from_pretrained(other.unet, folder / "peft")
    with pytest.raises(ValueError, match="the denoiser predicts v_prediction, but the scheduler of this pipeline"):
        pixels(other)
    other.scheduler = pipe.scheduler
    torch.testing.assert_close(pixels(other), wanted, rtol=0, atol=0)


def test_pipeline_loads_the_file_of_a_peft_folder(tmp_path):
    pipe = small_sdxl()
    pipe.unet = get_peft_model(pipe.unet, nara_config(target_modules=["to_v", "conv1"]))
    disturb(pipe.unet)
    pipe.unet.save_pretrained(tmp_path / "peft")
    wanted = pixels(pipe)
    main(["convert", str(tmp_path / "peft"), str(tmp_path / "toy"), "--to", "pipeline", "--component", "unet"])
    other = small_sdxl()
    other.load_nara_weights(tmp_path / "toy")
    torch.testing.assert_close(pixels(other), wanted, rtol=0, atol=0)


def test_there_and_back_gives_every_tensor_and_field_again(piped):
    _, folder = piped
    main(["convert", str(folder / "toy"), str(folder / "peft"), "--to", "peft"])
    main(["convert", str(folder / "peft"), str(folder / "again"), "--to", "pipeline", "--component", "unet"])
    first, second = (read(str(folder / name)).parts["unet"] for name in ("toy", "again"))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())
    assert config_to_fields(first.config) == config_to_fields(second.config)
    assert second.config.scheduler == CHANGES["scheduler"]
    assert second.config.strength == CHANGES["strength"]


def test_component_is_chosen_where_there_are_several(piped):
    pipe, folder = piped
    inject_adapter_in_model(nara_config(core_type="identity", target_modules=["q_proj"]), pipe.text_encoder, "toy")
    disturb(pipe.text_encoder)
    pipe.save_nara_weights(folder / "toy", adapter_name="toy")
    words = ["convert", str(folder / "toy"), str(folder / "peft"), "--to", "peft"]
    with pytest.raises(SystemExit, match=r"the file has (text_encoder, unet|unet, text_encoder)"):
        main(words)
    main([*words, "--component", "text_encoder"])
    (part,) = read(str(folder / "peft")).parts.values()
    assert all(".q_proj." in key for key in part.tensors)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "pipeline", "--component", "unet"], "is in the form 'pipeline' already"),
        (["--to", "peft", "--component", "vae"], "--component is 'vae', and the file has unet"),
    ],
)
def test_what_is_wrong_ends_in_one_line_and_writes_nothing(piped, words, message):
    _, folder = piped
    with pytest.raises(SystemExit, match=message):
        main(["convert", str(folder / "toy"), str(folder / "out"), *words])
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["a.b", "", "text encoder", "1unet"])
def test_a_component_that_no_pipeline_can_have_is_refused(tmp_path, name):
    get_peft_model(TwoLayers(), nara_config(target_modules=["first"])).save_pretrained(tmp_path / "peft")
    with pytest.raises(SystemExit, match=f"error: --component is '{name}', which is no part of a pipeline: name one"):
        main(["convert", str(tmp_path / "peft"), str(tmp_path / "toy"), "--to", "pipeline", "--component", name])
    assert not (tmp_path / "toy").exists()


def test_what_pipelines_cannot_load_is_refused(tmp_path):
    get_peft_model(TwoLayers(), nara_config(target_modules=["first"], bias="all")).save_pretrained(tmp_path / "peft")
    with pytest.raises(SystemExit, match="bias='all'"):
        main(["convert", str(tmp_path / "peft"), str(tmp_path / "toy"), "--to", "pipeline", "--component", "unet"])
    with pytest.raises(SystemExit, match="--to pipeline needs --component"):
        main(["convert", str(tmp_path / "peft"), str(tmp_path / "toy"), "--to", "pipeline"])


def test_lora_is_told_by_name(tmp_path):
    get_peft_model(TwoLayers(), lora_config(target_modules=["first"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(SystemExit, match="describes an adapter of type LORA, not NARA"):
        main(["convert", str(tmp_path / "lora"), str(tmp_path / "toy"), "--to", "pipeline", "--component", "unet"])
