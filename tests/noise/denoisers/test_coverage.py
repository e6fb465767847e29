"""Every class of the installed Diffusers that adapters may go on is declared, or is said why not."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from nara_diffusion import noise_level
from nara_diffusion.noise.denoiser_classes import DENOISERS
from nara_diffusion.noise.denoisers.lookup import why_undeclared
from nara_diffusion.noise.denoisers.undeclared_classes import STATIC, UNDECLARED
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.diffusers_sources import classes, is_a, told_the_time
from tests.helpers.small_pipelines import small_vae

ADAPTED = {name for name in classes() if is_a(name, "PeftAdapterMixin") and name != "PeftAdapterMixin"}
TOLD = {name for name in classes() if is_a(name, "ModelMixin") and told_the_time(name)}


def test_the_sources_of_diffusers_are_found():
    assert len(ADAPTED) > 60
    assert {"UNet2DConditionModel", "WanVACETransformer3DModel", "AutoencoderKL", "DreamLiteUNetModel"} <= ADAPTED
    assert {"UNet2DModel", "AllegroTransformer3DModel", "WuerstchenPrior", "RFD4ProteinaTransformer"} <= TOLD
    assert "AutoencoderKL" not in TOLD


def test_each_class_that_adapters_may_go_on_is_declared_by_its_own_name():
    """If this fails after an update of Diffusers: read what the new class's pipelines pass, and declare it."""
    listed = {**DENOISERS, **STATIC, **UNDECLARED}
    assert sorted((ADAPTED | TOLD) - listed.keys()) == []
    assert sorted(listed.keys() - classes().keys()) == []


def test_no_class_is_in_two_lists():
    for one, other in ((DENOISERS, STATIC), (DENOISERS, UNDECLARED), (STATIC, UNDECLARED)):
        assert not one.keys() & other.keys()


def test_static_classes_are_told_no_timestep_and_the_declared_ones_are():
    assert not set(STATIC) & TOLD
    for name, denoiser in DENOISERS.items():
        assert told_the_time(name)
        own = next(kind.forward for kind in map(classes().get, _lineage(name)) if kind is not None and kind.forward)
        pinned = [] if denoiser.pinned is None else [denoiser.pinned[0]]
        assert {denoiser.argument, *denoiser.also, *pinned} <= set(own)


def _lineage(name: str) -> list[str]:
    known = classes().get(name)
    return [] if known is None else [name, *(part for base in known.bases for part in _lineage(base))]


@pytest.mark.parametrize("options", [{}, {"core_type": "identity", "strength": [[0, 1.0], [1, 0.5]]}], ids=str)
@pytest.mark.parametrize("way", ["add_adapter", "inject", "PeftModel", "load_adapter"])
def test_a_noise_dependent_adapter_on_a_static_class_is_refused_when_it_is_added(tmp_path, way, options):
    vae = small_vae()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    config = nara_config(target_modules=["to_q", "to_v"], **options)
    message = (
        r"Adapter '.*' has core_type=.* depends on λ. AutoencoderKL is a VAE, .*there is no λ.*core_type=\"identity\""
    )
    ways = {
        "add_adapter": lambda: vae.add_adapter(config),
        "inject": lambda: inject_adapter_in_model(config, vae),
        "PeftModel": lambda: get_peft_model(vae, config),
        "load_adapter": lambda: PeftModel.from_pretrained(vae, tmp_path),
    }
    stated = nara_config(target_modules=["to_q", "to_v"], noise_convention="mine", **options)
    get_peft_model(small_vae(), stated).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise_convention": None}))
    with pytest.raises(ValueError, match=message):
        ways[way]()
    assert vae.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_one_that_names_its_definition_of_noise_is_refused_where_nobody_tells_it():
    vae, images = small_vae(), torch.randn(1, 3, 16, 16)
    vae.add_adapter(nara_config(target_modules=["to_q", "to_v"], noise_convention="mine"))
    message = r'λ is not known.*AutoencoderKL is a VAE, which pipelines run outside.*core_type="identity"'
    with pytest.raises(ValueError, match=message):
        vae(images)
    with pytest.raises(RuntimeError, match=r"No C\(λ\) has reached layer"):
        vae.encode(images)
    with noise_level(vae, 0.3):  # whoever runs it on noisy inputs says so
        vae(images)


def test_a_static_adapter_on_a_static_class_works():
    vae, latents = small_vae(), torch.randn(1, 4, 8, 8)
    plain = vae.decode(latents).sample
    inject_adapter_in_model(nara_config(target_modules=["to_q", "to_v"], core_type="identity"), vae)
    disturb(vae)
    assert not torch.allclose(vae.decode(latents).sample, plain)


def test_an_undeclared_class_says_why():
    for name, reason in UNDECLARED.items():
        model = type(name, (torch.nn.Module,), {})()
        assert f"{name} is not declared by itself: {reason}." in why_undeclared(model)
    assert why_undeclared(torch.nn.Linear(1, 1)) == ""
