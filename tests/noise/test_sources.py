"""Sources that tell λ from the inputs of each forward, and the conventions that they and adapters state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import noise_level, set_noise_source
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, disturb, nara_config, relative_error
from tests.helpers.two_layers import TARGETS, expect, run


class Share:
    """Tells λ from the inputs, as a source does: here the share of positive entries."""

    def __init__(self, convention: str | None = "positive_share") -> None:
        self.convention = convention
        self.asked: list[nn.Module] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
        self.asked.append(module)
        x = args[0] if args else kwargs["x"]
        return NoiseSignals((x > 0).float().mean(1))


def test_a_source_tells_the_level_of_each_forward(model: PeftModel, x: Tensor) -> None:
    source = Share()
    set_noise_source(model, source)
    share = [(inputs > 0).float().mean(1) for inputs in (x, -x)]
    assert relative_error(run(model, x), expect(model, x, share[0])) < 2e-6
    assert relative_error(run(model, -x), expect(model, -x, share[1])) < 2e-6
    with torch.no_grad():
        assert relative_error(model.base_model.model(x=x), expect(model, x, share[0])) < 2e-6
    assert source.asked == [model.base_model.model] * 3
    with noise_level(model, 0.3):
        assert relative_error(run(model, x), expect(model, x, 0.3)) < 2e-6
    assert len(source.asked) == 3
    with model.disable_adapter():
        model(x)
    assert len(source.asked) == 3
    set_noise_source(model, None)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (torch.tensor([0.1, float("nan"), 0.2]), r"nan.*\[0, 1\]"),
        (torch.tensor([0.1, 500.0, 0.2]), r"500.0.*\[0, 1\]"),
        (torch.rand(3, 1), r"shape \(3, 1\)"),
        (torch.rand(2), "2 values.* is 3"),
        (None, "noise_level is None"),
    ],
)
def test_what_a_source_tells_is_checked(model: PeftModel, x: Tensor, told: Any, said: str) -> None:
    class Wrong(Share):
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
            return NoiseSignals(told)

    set_noise_source(model, Wrong())
    with pytest.raises(ValueError, match=said):
        model(x)


def test_what_a_source_raises_is_not_replaced(model: PeftModel, x: Tensor) -> None:
    class Cannot(Share):
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
            raise ValueError("this forward has no input_ids")

    set_noise_source(model, Cannot())
    with pytest.raises(ValueError, match="this forward has no input_ids"):
        model(x)


def test_a_source_of_another_convention_is_refused() -> None:
    def make(convention: str | None) -> PeftModel:
        return get_peft_model(TwoLayers(), nara_config(target_modules=TARGETS, noise_convention=convention))

    message = r"'{}' was trained with λ defined as 'masked_share', but the source of λ tells {}"
    model = make("masked_share")
    with pytest.raises(ValueError, match=message.format("default", "'positive_share'")):
        set_noise_source(model, Share())
    with pytest.raises(ValueError, match=message.format("default", "None")):
        set_noise_source(model, Share(None))
    with pytest.raises(ValueError, match=message.format("default", "None")):
        set_noise_source(model, lambda module, args, kwargs: NoiseSignals(args[0][:, 0]))  # type: ignore[arg-type]
    assert model.base_model.model.nara_core.conventions.source is None
    set_noise_source(model, Share("masked_share"))

    model = make(None)
    set_noise_source(model, Share())
    refused = nara_config(target_modules=TARGETS, noise_convention="masked_share")
    with pytest.raises(ValueError, match=message.format("other", "'positive_share'")):
        model.add_adapter("other", refused)
    assert "other" not in model.base_model.model.first.lora_A
    x = torch.randn(3, 7)
    disturb(model)
    assert relative_error(run(model, x), expect(model, x, (x > 0).float().mean(1))) < 2e-6


def test_a_source_may_be_a_plain_function_where_no_convention_is_known(model: PeftModel, x: Tensor) -> None:
    set_noise_source(model, lambda module, args, kwargs: NoiseSignals(args[0].abs().amax(1).clamp(max=1)))  # type: ignore[arg-type]
    model.add_adapter("other", nara_config(target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    assert model.peft_config["other"].noise_convention is None
    assert relative_error(run(model, x), expect(model, x, x.abs().amax(1).clamp(max=1))) < 2e-6  # the other's B is zero


def test_a_source_is_set_on_all_models_or_on_none() -> None:
    pair = nn.ModuleList(
        get_peft_model(TwoLayers(), nara_config(target_modules=TARGETS, noise_convention=convention))
        for convention in (None, "masked_share")
    )
    with pytest.raises(ValueError, match="masked_share"):
        set_noise_source(pair, Share())
    assert pair[0].base_model.model.nara_core.conventions.source is None
