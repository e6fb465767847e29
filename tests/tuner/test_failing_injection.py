"""An adapter that cannot be added leaves the model as it was, base weights included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nara_diffusion import set_noise_source
from tests.helpers.adapted import TwoLayers, adapted, nara_config
from tests.tuner.three_adapters import TARGETS

FAILING = [
    ({"target_modules": ["nothing"]}, "nothing|No modules were targeted"),
    (
        {"target_modules": ["first", "embed"], "use_dora": True},
        r"cannot adapt 'embed' \(Embedding\)|ModulesToSaveWrapper",
    ),
    ({"target_modules": ["first", "tanh"]}, "Target module Tanh"),
    ({"target_modules": ["first"], "changed to": {"r": 0}}, "`r` should be a positive integer"),
    ({"target_modules": ["first", "second"], "init_lora_weights": "orthogonal", "r": 3}, "rank to be even"),
    ({"target_modules": ["first"], "noise_convention": "sigma"}, "trained with λ defined as 'sigma'"),
]

FAILING_CASES = [
    pytest.param(*case, first, id=f"{case[1]}-{'first' if first else 'second'}")
    for case in FAILING
    for first in (True, False)
    if not (first and "noise_convention" in case[0])  # there is no source of λ before there is an adapter
]


@pytest.mark.parametrize(("options", "message", "first_adapter"), FAILING_CASES)
def test_a_failing_injection_leaves_the_model_as_it_was(options, message, first_adapter):
    base = TwoLayers()
    base.embed, base.tanh = nn.Embedding(3, 7), nn.Tanh()
    model: Any = base if first_adapter else adapted(base, target_modules=["second"], modules_to_save=["embed"])
    if not first_adapter:

        def source(*_: Any) -> Any:
            raise AssertionError("not asked")

        source.convention = "masked_share"  # type: ignore[attr-defined]
        set_noise_source(model, source)  # type: ignore[arg-type]
    modules = {name: id(module) for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = {name: value for name, value in options.items() if name != "changed to"}
    config = nara_config(**{"modules_to_save": ["embed"], **changes} if "embed" not in str(options) else changes)
    for name, value in options.get("changed to", {}).items():
        setattr(config, name, value)  # which NaraConfig itself refuses
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config) if first_adapter else model.add_adapter("other", config)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    if first_adapter:
        assert not base._forward_pre_hooks
        assert not base._forward_hooks
        assert not hasattr(base, "nara_core")
    else:
        assert set(model.peft_config) == {"default"}
        assert model.base_model.model.second.active_adapters == ["default"]
        model.add_adapter("other", nara_config(target_modules=TARGETS))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_failing_injection_puts_back_what_its_initialisation_took_out_of_the_base_weights(init):
    base = TwoLayers()
    base.embed = nn.Embedding(3, 7)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = nara_config(target_modules=["first", "second", "embed"], init_lora_weights=init, use_dora=True)
    with pytest.raises(ValueError, match=r"cannot adapt 'embed'|Unknown initialization"):
        get_peft_model(base, config)
    assert base.state_dict().keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(base.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
