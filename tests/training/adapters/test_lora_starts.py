"""Which of PEFT's starts of a LoRA change the base weights: asked of PEFT itself, for every start that it has."""

from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import peft.tuners.lora.layer as peft_layer
import pytest
import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from torch import Tensor, nn

from nara_diffusion.config import changes_base
from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.adapters.pissa import takes_start_from_base
from nara_diffusion.training.arguments.common import AdapterArguments

RANK, D_IN, D_OUT = 4, 11, 9
_KINDS = get_args(get_type_hints(LoraConfig)["init_lora_weights"])
_NAMED = {text.replace("[number of iters]", "4") for kind in _KINDS for text in get_args(kind)}
STARTS = [True, False, *sorted(_NAMED | {"lora_ga"})]


def _quantised(weight: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return weight.detach().round(decimals=1), torch.ones(RANK, D_IN), torch.ones(D_OUT, RANK)


def prepared(start: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, LoraConfig]:
    """A layer as an earlier pass over data leaves it for this start, and the configuration."""
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    options: dict[str, Any] = {"r": RANK, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": start}
    layer: Any = model[0]
    if start == "corda":
        v, s, u = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.eigens = SimpleNamespace(U_WC=v[:, :RANK], S_WC=s[:RANK].clone(), V_WC=u[:RANK].T)
    if start == "lora_ga":
        layer._peft_loraga_grad = torch.randn(D_OUT, D_IN)
        options["lora_ga_config"] = LoraGAConfig()
    if start == "loftq":
        monkeypatch.setattr(peft_layer, "loftq_init", _quantised)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # PEFT asks for scipy
        options["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
    return model, LoraConfig(**options)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is:UserWarning", "ignore:lora with eva:UserWarning")
@pytest.mark.parametrize("start", STARTS)
def test_changes_base_of_each_start_of_peft_says_what_peft_does(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = prepared(start, monkeypatch)
    before = model[0].weight.detach().clone()  # type: ignore[union-attr]
    adapted: Any = get_peft_model(model, config)
    changed = not torch.equal(adapted.base_model.model[0].base_layer.weight, before)
    assert changes_base(start) is changed
    assert takes_start_from_base(config) is changed


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is:UserWarning", "ignore:lora with eva:UserWarning")
@pytest.mark.parametrize("start", ["corda", "eva", "lora_ga"])
def test_adapter_config_with_a_start_that_needs_an_earlier_pass_is_refused(start: str) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights={start} needs .* of the base .* which this script"):
        adapter_config(AdapterArguments(adapter="lora", adapter_options=[f"init_lora_weights={start}"]))


def test_adapter_config_with_loftq_is_refused_since_nobody_else_has_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    options = ["init_lora_weights=loftq", "loftq_config={loftq_bits: 4, loftq_iter: 1}"]
    with pytest.raises(ValueError, match="init_lora_weights=loftq replaces the base weights by quantised ones"):
        adapter_config(AdapterArguments(adapter="lora", adapter_options=options))
