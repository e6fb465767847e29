"""A component that PEFT has wrapped, `pipe.unet = get_peft_model(pipe.unet, …)`: it is saved, all else is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from nara_diffusion import noise_level
from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import FILE, State, predict, shake, trained

TARGETS = ["to_q", "to_v", "conv1"]


def wrapped(seed: int = 4) -> Any:
    """A pipeline whose UNet was trained with PEFT, and stayed in its wrapper."""
    pipe = small_sdxl()
    pipe.unet = get_peft_model(pipe.unet, nara_config(target_modules=TARGETS, lora_alpha=3)).eval()
    shake(pipe.unet, seed)
    return pipe


def loaded(folder: Any, **options: Any) -> Any:
    pipe = small_sdxl()
    torch.manual_seed(77)
    pipe.load_nara_weights(folder, **options)
    return pipe


def test_what_was_trained_in_the_wrapper_is_saved(tmp_path):
    pipe = wrapped()
    expected, base = predict(pipe), predict(small_sdxl())
    before = State(pipe)
    pipe.save_nara_weights(tmp_path)
    assert before == State(pipe)
    assert torch.equal(predict(pipe), expected)
    assert torch.equal(predict(loaded(tmp_path)), expected)
    assert torch.equal(pixels(loaded(tmp_path)), pixels(pipe))
    assert not torch.allclose(expected, base, atol=1e-2)
    trained(seed=4, text=False, target_modules=TARGETS).save_nara_weights(tmp_path / "plain")
    assert load_file(tmp_path / FILE).keys() == load_file(tmp_path / "plain" / FILE).keys()


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # the compiler, on its import
def test_one_of_several_in_the_wrapper_is_saved_from_peft_s_folder_and_compiled_too(tmp_path):
    pipe = wrapped()
    pipe.unet.save_pretrained(str(tmp_path / "peft"))
    pipe.unet = PeftModel.from_pretrained(small_sdxl().unet, str(tmp_path / "peft"), adapter_name="one")
    pipe.unet.add_adapter("two", nara_config(target_modules=["to_k"], core_type="constant", r=3))
    shake(pipe.unet, 6)
    pipe.unet.eval()
    for name in ("one", "two"):
        pipe.unet.set_adapter(name)
        pipe.save_nara_weights(tmp_path / name, name)
        assert torch.equal(predict(loaded(tmp_path / name)), predict(pipe))
    expected = predict(pipe)
    pipe.unet = torch.compile(pipe.unet)
    pipe.save_nara_weights(tmp_path / "compiled", "two")
    assert torch.equal(predict(loaded(tmp_path / "compiled")), expected)
    with pytest.raises(ValueError, match="no NaRA adapter 'default' to save: the pipeline has 'one', 'two'"):
        pipe.save_nara_weights(tmp_path / "three")


CALLS = {
    "load_nara_weights": lambda pipe, folder: pipe.load_nara_weights(folder, "second"),
    "load_nara_weights of that name": lambda pipe, folder: pipe.load_nara_weights(folder, "default"),
    "load_nara_weights by hotswap": lambda pipe, folder: pipe.load_nara_weights(folder, "default", hotswap=True),
    "unload_nara_weights": lambda pipe, folder: pipe.unload_nara_weights(),
    "unload_lora_weights": lambda pipe, folder: pipe.unload_lora_weights(),
    "delete_adapters": lambda pipe, folder: pipe.delete_adapters("default"),
    "set_adapters": lambda pipe, folder: pipe.set_adapters("default", 0.5),
    "disable_lora": lambda pipe, folder: pipe.disable_lora(),
    "enable_lora": lambda pipe, folder: pipe.enable_lora(),
    "set_lora_device": lambda pipe, folder: pipe.set_lora_device(["default"], "cpu"),
    "fuse_lora": lambda pipe, folder: pipe.fuse_lora(components=["unet"]),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # the compiler, on its import
def test_what_would_change_the_adapters_in_the_wrapper_is_refused_by_name(tmp_path):
    pipe = wrapped()
    pipe.save_nara_weights(tmp_path)
    expected, before = predict(pipe), State(pipe)
    for compiled in (False, True):
        for call, run in CALLS.items():
            method = call.split()[0]
            message = rf"unet is a PeftModel, whose adapters pipe\.{method} cannot .* pipe\.unet = pipe\.unet\.get_base"
            with noise_level(pipe.unet, 0.4), pytest.raises(ValueError, match=message):
                run(pipe, tmp_path)
        if not compiled:
            assert before == State(pipe)
            assert torch.equal(predict(pipe), expected)
            pipe.unet = torch.compile(pipe.unet)


def test_without_the_wrapper_the_adapters_stay_and_all_works(tmp_path):
    pipe = wrapped()
    expected, base = predict(pipe), predict(small_sdxl())
    trained(seed=2, text=True, target_modules=TARGETS, lora_alpha=5).save_nara_weights(tmp_path)
    pipe.unet = pipe.unet.get_base_model()  # as the message says
    assert torch.equal(predict(pipe), expected)
    pipe.load_nara_weights(tmp_path, "second")
    assert torch.equal(predict(pipe), predict(loaded(tmp_path)))
    pipe.set_adapters("default")
    assert torch.equal(predict(pipe), expected)
    pipe.disable_lora()
    assert torch.equal(predict(pipe), base)
    pipe.enable_lora()
    pipe.unload_nara_weights()
    assert torch.equal(predict(pipe), base)


def test_only_components_that_a_call_is_about_have_to_be_unwrapped(tmp_path):
    for text in (False, True):
        trained(seed=2, text=text, target_modules=TARGETS).save_nara_weights(tmp_path / str(text))
    pipe = small_sdxl()
    pipe.text_encoder = get_peft_model(pipe.text_encoder, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    base = pixels(pipe)
    before = State(pipe)
    with pytest.raises(ValueError, match=r"text_encoder is a PeftModel, whose adapters pipe\.load_nara_weights cannot"):
        pipe.load_nara_weights(tmp_path / "True")
    assert before == State(pipe)
    pipe.load_nara_weights(tmp_path / "False", "x")
    assert torch.equal(predict(pipe), predict(loaded(tmp_path / "False")))
    pipe.disable_lora()
    assert torch.equal(pixels(pipe), base)
    pipe.unload_nara_weights()
    assert torch.equal(pixels(pipe), base)
