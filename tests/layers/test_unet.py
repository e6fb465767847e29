"""Diffusers' own methods on a UNet with NaRA adapters, beside real LoRAs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.noise.needs import is_noise_aware
from tests.helpers.adapted import disturb, lora_config, nara_config

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute",  # PEFT, whenever Diffusers adds a second adapter
)

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
LEVELS = torch.tensor([0.1, 0.5, 0.9])


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(6)
    options = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**options, **changes}).eval()


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    sample, text = torch.randn(batch, 3, 8, 8, generator=generator), torch.randn(batch, 5, 12, generator=generator)
    return sample, torch.tensor([7, 300, 950])[:batch], text


def run(model: nn.Module, levels: Any = LEVELS) -> Tensor:
    with torch.no_grad():
        if levels is None:
            return model(*inputs()).sample
        with noise_level(model, levels):
            return model(*inputs()).sample


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_a_batch_of_different_levels_equals_its_samples_one_by_one(use_dora):
    model = unet()
    model.add_adapter(nara_config(target_modules=TARGETS, use_dora=use_dora))
    disturb(model)
    batch = run(model)
    sample, timestep, text = inputs()
    for i in range(3):
        with noise_level(model, float(LEVELS[i])), torch.no_grad():
            alone = model(sample[i : i + 1], timestep[i : i + 1], text[i : i + 1]).sample
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch, run(model, LEVELS.flip(0)), atol=1e-2)


def test_the_frozen_unet_trains_the_adapter_and_the_core_alone():
    model = unet()
    model.requires_grad_(False)
    model.add_adapter(nara_config(target_modules=TARGETS))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n or "nara_core" in n
    }
    disturb(model)
    with noise_level(model, LEVELS):
        model(*inputs()).sample.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n or "nara_core" in n)


def test_disabled_and_deleted_adapters_leave_the_base_model():
    model = unet()
    expected = run(model, None)
    model.add_adapter(nara_config(target_modules=TARGETS))
    disturb(model)
    adapted = run(model)
    model.disable_adapters()
    assert not is_noise_aware(model)
    assert torch.equal(run(model, None), expected)
    model.enable_adapters()
    assert torch.equal(run(model), adapted)
    model.disable_lora()
    assert torch.equal(run(model, None), expected)
    model.enable_lora()
    assert torch.equal(run(model, None), run(model, inputs()[1] / 1000))  # λ is the timestep's again
    model.delete_adapters("default")
    assert torch.equal(run(model, None), expected)
    assert not [n for n in model.state_dict() if "lora_" in n or "nara_core" in n]


def test_unload_lora_takes_core_and_hooks_away():
    model = unet()
    expected, names = run(model, None), set(model.state_dict())
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    model.add_adapter(nara_config(target_modules=TARGETS))
    disturb(model)
    run(model)
    model.unload_lora()
    assert set(model.state_dict()) == names
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks
    assert torch.equal(run(model, None), expected)
    with pytest.raises(ValueError, match="holds no NaRA adapter"):
        run(model)
    model.add_adapter(nara_config(target_modules=TARGETS))  # and on again
    disturb(model)
    assert not torch.equal(run(model), expected)


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.parametrize("lora_first", [False, True])
def test_nara_and_real_loras_mix(lora_first):
    model = unet()
    base = run(model, None)
    configs = {
        "aware": nara_config(target_modules=["to_q", "to_v"]),
        "static": lora_config(target_modules=["to_v", "to_k"], r=3),
    }
    for name in ("static", "aware") if lora_first else ("aware", "static"):
        model.add_adapter(configs[name], adapter_name=name)
    disturb(model)
    model.set_adapters(["aware"])
    aware = run(model)
    model.set_adapters(["static"])
    assert not is_noise_aware(model)
    static = run(model, None)  # needs no λ
    assert torch.equal(run(model), static)
    model.set_adapters(["aware", "static"], [1.0, 1.0])
    both = run(model)
    assert model.active_adapters() == ["aware", "static"]
    assert not torch.allclose(both, aware, atol=1e-3)
    model.set_adapters(["aware", "static"], [1.0, 0.0])
    torch.testing.assert_close(run(model), aware, rtol=1e-4, atol=1e-5)
    model.set_adapters(["aware", "static"], [0.0, 1.0])
    torch.testing.assert_close(run(model), static, rtol=1e-4, atol=1e-5)
    model.set_adapters(["aware", "static"], [0.0, 0.0])
    torch.testing.assert_close(run(model), base, rtol=1e-4, atol=1e-5)
    model.set_adapters(["aware", "static"], [1.0, 1.0])
    torch.testing.assert_close(run(model), both, rtol=1e-4, atol=1e-5)
    model.delete_adapters("aware")
    torch.testing.assert_close(run(model, None), static, rtol=1e-4, atol=1e-5)
    assert not [n for n in model.state_dict() if "nara_core" in n]


def test_two_nara_adapters_have_their_own_cores_and_only_active_ones_train():
    model = unet()
    model.add_adapter(nara_config(target_modules=["to_q"]), adapter_name="one")
    model.add_adapter(nara_config(target_modules=["to_q", "to_v"], r=2), adapter_name="two")
    disturb(model)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = run(model)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad and ("lora_" in n or "nara_core" in n)}
        assert trainable
        assert all(f".{name}." in n for n in trainable)
        assert any("nara_core" in n for n in trainable)
    assert core_matrix(model, 0.3, "one").shape == (1, 4, 4)
    assert core_matrix(model, 0.3, "two").shape == (1, 2, 2)
    model.delete_adapters("one")
    assert torch.equal(run(model), outputs["two"])


def test_fusing_needs_a_level_and_is_undone():
    model = unet()
    model.add_adapter(nara_config(target_modules=TARGETS))
    disturb(model)
    expected = run(model, 0.35)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="one λ"):
        model.fuse_lora()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    with noise_level(model, 0.35):
        model.fuse_lora()
    torch.testing.assert_close(run(model, None), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="merged at noise_level"):
        run(model, 0.5)
    model.unfuse_lora()
    torch.testing.assert_close(run(model, 0.35), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(model, None), run(model, inputs()[1] / 1000))  # λ is the timestep's again


def test_the_scale_of_cross_attention_kwargs_multiplies_the_update():
    model = unet()
    base = run(model, None)
    model.add_adapter(nara_config(target_modules=["to_out.0"]))
    disturb(model)
    full = run(model)
    with noise_level(model, LEVELS), torch.no_grad():
        none = model(*inputs(), cross_attention_kwargs={"scale": 0.0}).sample
        one = model(*inputs(), cross_attention_kwargs={"scale": 1.0}).sample
    torch.testing.assert_close(none, base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, full, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(model), full)  # the scale is back


def test_an_adapter_saves_and_loads_by_its_state_dict(tmp_path):
    model = unet()
    model.add_adapter(nara_config(target_modules=TARGETS))
    disturb(model)
    state = get_peft_model_state_dict(model)
    cores = {name: tensor for name, tensor in state.items() if "nara_core" in name}
    assert len(cores) == 7
    assert all(tensor.dtype == torch.float32 and "lora" not in name for name, tensor in cores.items())
    save_file(state, tmp_path / "adapter.safetensors")
    saved = load_file(tmp_path / "adapter.safetensors")
    other = unet()
    torch.manual_seed(777)
    other.add_adapter(nara_config(target_modules=TARGETS))
    set_peft_model_state_dict(other, saved)
    assert torch.equal(run(other), run(model))


def test_a_failing_adapter_leaves_the_unet_as_it_was():
    model = unet(class_embed_type=None, num_class_embeds=4)
    names = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"cannot adapt 'class_embedding' \(Embedding\)"):
        model.add_adapter(nara_config(target_modules=["to_q", "class_embedding"], use_dora=True))
    assert {name: id(module) for name, module in model.named_modules()} == names
    assert not hasattr(model, "peft_config")
