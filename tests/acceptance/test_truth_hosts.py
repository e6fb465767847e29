"""`nara fold` writes what its hosts read right, and says or refuses what they don't."""

import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file, save_file

from nara_command import main
from nara_diffusion import from_lora, noise_level
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import pixels, small_flux, small_sdxl

LEVEL = 0.37
TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
OF_CLIP = ["q_proj", "k_proj", "v_proj", "out_proj"]


def saved(pipe, folder, component, **changes):
    """The pipeline with a NaRA, of small steps, in a file."""
    model = getattr(pipe, component)
    model.add_adapter(nara_config(**{"target_modules": TARGETS, **changes}), "toy")
    disturb(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.2
    pipe.save_nara_weights(folder, adapter_name="toy")
    return pipe


def with_encoder(pipe, component, targets, seed):
    encoder = getattr(pipe, component)
    inject_adapter_in_model(nara_config(core_type="identity", target_modules=targets), encoder, "toy")
    disturb(encoder, seed=seed)


def folded(folder, *words):
    output = folder / "lora.safetensors"
    main(["fold", str(folder), str(output), "--noise_level", str(LEVEL), "--layers_per_block", "1", *words])
    return output


def at_level(pipe):
    with noise_level(pipe.unet, LEVEL):
        return pixels(pipe)


@pytest.mark.parametrize(("form", "component"), [("kohya", "unet"), ("comfyui", "text_encoder")])
def test_dora_is_refused_where_hosts_divide_by_another_norm(tmp_path, form, component):
    """ComfyUI: (W0 + ΔW) m / ‖W0‖ by row; A1111: by column; DoRA: (W0 + ΔW) m / ‖W0 + ΔW‖ by row."""
    pipe = small_sdxl()
    if component == "text_encoder":
        dora = nara_config(core_type="identity", target_modules=OF_CLIP, use_dora=True)
        inject_adapter_in_model(dora, pipe.text_encoder, "toy")
    saved(pipe, tmp_path, "unet", use_dora=component == "unet")
    with pytest.raises(SystemExit, match=r"is a DoRA, .* --form diffusers or --form peft"):
        folded(tmp_path, "--form", form, "--base", "sdxl")
    assert not (tmp_path / "lora.safetensors").exists()


def test_dora_for_diffusers_draws_the_same_pixels_and_is_not_for_comfyui(tmp_path, capsys):
    pipe = saved(small_sdxl(), tmp_path, "unet", use_dora=True)
    path, other = folded(tmp_path), small_sdxl()
    assert "not for ComfyUI, which reads no DoRA" in capsys.readouterr().out
    before, wanted = pixels(other), at_level(pipe)
    other.load_lora_weights(path)
    torch.testing.assert_close(pixels(other), wanted, rtol=1e-4, atol=5e-5)
    assert (before - wanted).abs().max() > 0.02


def test_text_encoders_have_names_that_comfyui_and_every_transformers_read_and_from_lora_reads_others(tmp_path, capsys):
    pipe = small_sdxl()
    for seed, component in enumerate(("text_encoder", "text_encoder_2")):
        with_encoder(pipe, component, OF_CLIP, seed)
    saved(pipe, tmp_path, "unet")
    path, other = folded(tmp_path), small_sdxl()
    assert "not for ComfyUI, which reads no attention of a UNet in this form" in capsys.readouterr().out
    found = {key for key in load_file(path) if key.startswith("text_encoder")}
    layers = [f"text_model.encoder.layers.{i}.self_attn.{name}" for i in range(2) for name in OF_CLIP]
    names = {f"{component}.{name}" for component in ("text_encoder", "text_encoder_2") for name in layers}
    assert found == {f"{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    other.load_lora_weights(path)
    wanted = at_level(pipe)
    torch.testing.assert_close(pixels(other), wanted, rtol=1e-4, atol=5e-5)
    save_file({key.replace("text_model.", ""): tensor for key, tensor in load_file(path).items()}, path)
    torch.testing.assert_close(pixels(from_lora(path, small_sdxl())), wanted, rtol=1e-4, atol=5e-5)


def test_other_text_encoders_keep_their_names_and_flux_is_for_comfyui_too(tmp_path, capsys):
    pipe = small_flux()
    with_encoder(pipe, "text_encoder_2", ["SelfAttention.q"], 2)
    saved(pipe, tmp_path, "transformer", target_modules=["to_q"])
    keys = load_file(folded(tmp_path))
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight" in keys
    assert "ComfyUI" not in capsys.readouterr().out
