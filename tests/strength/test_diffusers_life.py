"""A pipeline's adapters with a StrengthSchedule: disabled, deleted, fused, saved, loaded and hotswapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from nara_diffusion import StrengthSchedule, noise_level, set_strength
from nara_diffusion.noise.level import find_holders
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import FILE, State, predict, save_lora, trained
from tests.strength.models import SCHEDULE
from tests.strength.pipelines import DROP, KINDS, loaded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
]


@KINDS
def test_disabled_deleted_and_unloaded_it_is_the_base(kind, folders):
    base = small_sdxl()
    expected, state = predict(base), State(base)
    pipe = loaded(folders[kind], kind)
    pipe.set_adapters("toy", SCHEDULE)
    found = predict(pipe)
    pipe.disable_lora()
    torch.testing.assert_close(predict(pipe), expected, rtol=0, atol=1e-6)
    pipe.enable_lora()
    assert torch.equal(predict(pipe), found)
    pipe.delete_adapters("toy")
    assert torch.equal(predict(pipe), expected)
    loaded(folders[kind], kind, pipe)
    plain = predict(pipe)
    torch.testing.assert_close(plain, predict(loaded(folders[kind], kind)), rtol=0, atol=0)
    pipe.set_adapters("toy", SCHEDULE)
    predict(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe), expected)
    assert not find_holders(pipe.unet)
    assert State(pipe).parts["unet"].keys() == state.parts["unet"].keys()


@KINDS
def test_fusing_takes_the_strength_at_its_level(kind, folders):
    pipe = loaded(folders[kind], kind)
    pipe.set_adapters("toy", SCHEDULE)
    with pytest.raises(ValueError, match="fuse_lora works at one λ"):
        pipe.fuse_lora()
    before = predict(pipe)
    with noise_level(pipe.unet, 0.33):
        expected = predict(pipe)
        pipe.fuse_lora(components=["unet"])
    torch.testing.assert_close(predict(pipe), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="is merged into"):
        pipe.set_adapters("toy", 1.0)
    pipe.unfuse_lora(components=["unet"])
    torch.testing.assert_close(predict(pipe), before, rtol=1e-3, atol=1e-4)


def test_a_scale_of_one_call_multiplies_the_strength(folders):
    pipe, reference = loaded(folders["LoRA"], "LoRA"), loaded(folders["LoRA"], "LoRA")
    pipe.set_adapters("toy", StrengthSchedule([(0, 0.8)]))
    reference.set_adapters("toy", 0.4)
    found = pixels(pipe, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(found, pixels(reference), rtol=0, atol=1e-4)


def content(folder: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Metadata and tensors of a file, whose order safetensors leaves to chance."""
    with safe_open(folder / FILE, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).flatten().tolist() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", ["NaRA", "NaRA-DoRA"])
def test_a_nara_s_schedule_is_saved_with_it_and_loaded(kind, folders, tmp_path: Path):
    pipe = loaded(folders[kind], kind)
    plain = predict(pipe)
    pipe.set_adapters("toy", SCHEDULE)
    expected = predict(pipe)
    pipe.save_nara_weights(tmp_path)
    again = loaded(tmp_path, kind, name="again")
    assert torch.equal(predict(again), expected)
    assert again.unet.peft_config["again"].strength == SCHEDULE.as_lists()
    again.set_adapters("again", 0.5)
    assert not torch.equal(predict(again), expected)
    again.save_nara_weights(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path)
    set_strength(again.unet, "again", None)
    again.save_nara_weights(tmp_path / "none")
    assert torch.equal(predict(loaded(tmp_path / "none", kind)), plain)


def test_hotswap_takes_the_strength_of_the_adapter_that_comes(folders, tmp_path: Path):
    pipe = trained(seed=8, text=False, target_modules=["to_q", "to_out.0", "proj_in", "conv1"])
    pipe.set_adapters("default", DROP)
    pipe.save_nara_weights(tmp_path)
    scheduled = predict(pipe)
    pipe = loaded(folders["NaRA"], "NaRA")
    plain = predict(pipe)
    pipe.load_nara_weights(tmp_path, "toy", hotswap=True)
    torch.testing.assert_close(predict(pipe), scheduled, rtol=0, atol=1e-6)
    pipe.load_nara_weights(folders["NaRA"], "toy", hotswap=True)
    torch.testing.assert_close(predict(pipe), plain, rtol=0, atol=1e-6)


def test_hotswap_of_a_lora_drops_its_strength(folders, tmp_path: Path):
    save_lora(tmp_path, seed=9, target_modules=["to_q", "to_out.0", "proj_in", "conv1"])
    expected = predict(loaded(tmp_path, "LoRA"))
    pipe = loaded(folders["LoRA"], "LoRA")
    pipe.set_adapters("toy", SCHEDULE)
    pipe.load_lora_weights(tmp_path, adapter_name="toy", hotswap=True)
    torch.testing.assert_close(predict(pipe), expected, rtol=0, atol=1e-6)
    assert not find_holders(pipe.unet)


def test_room_for_hotswap_and_a_scheduled_lora_refuse_each_other(folders, tmp_path: Path):
    pipe = loaded(folders["LoRA"], "LoRA")
    pipe.set_adapters("toy", SCHEDULE)
    expected = predict(pipe)
    pipe.enable_lora_hotswap(target_rank=7, check_compiled="ignore")
    with pytest.raises(ValueError, match="target_rank=7, but 'toy', whose update depends on λ, has rank 4"):
        loaded(folders["LoRA"], "LoRA", pipe, "more")
    assert torch.equal(predict(pipe), expected)
    pipe = small_sdxl()
    pipe.enable_lora_hotswap(target_rank=7)
    loaded(folders["LoRA"], "LoRA", pipe)
    with pytest.raises(
        ValueError, match=r"enable_lora_hotswap has made room in layer '.*' for rank 7 beside its own 4"
    ):
        pipe.set_adapters("toy", SCHEDULE)


def test_set_strength_works_on_what_diffusers_loaded(folders):
    pipe, reference = loaded(folders["LoRA"], "LoRA"), loaded(folders["LoRA"], "LoRA")
    set_strength(pipe.unet, "toy", SCHEDULE)
    reference.set_adapters("toy", SCHEDULE)
    assert torch.equal(predict(pipe), predict(reference))


def test_a_unet_that_torch_compile_wraps_is_refused_with_a_remedy_that_works(folders):
    pipe = loaded(folders["LoRA"], "LoRA")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ValueError, match=r"set_strength\(pipe.unet, 'toy', strength\), or compile it in place"):
        pipe.set_adapters("toy", SCHEDULE)
    set_strength(pipe.unet, "toy", SCHEDULE)
    assert isinstance(pipe.unet._orig_mod, UNet2DConditionModel)
    assert find_holders(pipe.unet)
