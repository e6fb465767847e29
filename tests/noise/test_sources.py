"""Sources of λ: of one's own, of an adapter's definition; and the values that they give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import StrengthSchedule, noise_level, register_noise_source, set_noise_source
from nara_diffusion.noise import denoisers
from tests.acceptance._noise_models import adapt, assert_near, run
from tests.helpers.adapted import TwoLayers, adapted, nara_config, relative_error

TARGETS = ["first", "second"]
LEVELS = torch.tensor([0.05, 0.5, 0.93])


class Share:
    """λ is the share of positive inputs, or what it is told to give."""

    def __init__(self, convention: str | None = "positive_share", gives: Any = None) -> None:
        self.convention = convention
        self.gives = gives

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return (args[0] > 0).float().mean(1) if self.gives is None else self.gives


@pytest.fixture(autouse=True)
def _nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoisers, "_sources", {})


@pytest.fixture
def model() -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS)


def test_value_of_a_source_is_checked(model: PeftModel) -> None:
    for gives, message in [
        (torch.tensor([0.1, float("nan"), 0.2]), r"nan.*\[0, 1\]"),
        (torch.tensor([0.1, 500.0, 0.2]), r"500.0.*\[0, 1\]"),
        (torch.rand(3, 1), r"shape \(3, 1\)"),
        (torch.rand(2), "2 values.* is 3"),
        ("half", "noise_level is 'half'"),
    ]:
        set_noise_source(model, Share(gives=gives))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            model(torch.randn(3, 7))


def test_source_of_another_convention_is_refused_on_all_models_at_once() -> None:
    pair = nn.ModuleList(
        get_peft_model(TwoLayers(), nara_config(target_modules=TARGETS, noise_convention=convention))
        for convention in (None, "masked_share")
    )
    for source in (Share(), Share(None), lambda module, args, kwargs: args[0][:, 0]):
        with pytest.raises(ValueError, match=r"'default' was trained with λ defined as 'masked_share', but the source"):
            set_noise_source(pair, source)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"set_noise_source\(model"):  # neither has one
        pair[0](torch.randn(3, 7))
    set_noise_source(pair[0], Share())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'other' was trained with λ defined as 'masked_share'"):
        pair[0].add_adapter("other", nara_config(target_modules=TARGETS, noise_convention="masked_share"))
    assert "other" not in pair[0].base_model.model.first.lora_A


def test_adapter_of_a_registered_definition_is_read_by_its_source_where_it_loads(tmp_path: Path) -> None:
    source = Share()
    register_noise_source(source)  # type: ignore[arg-type]
    register_noise_source(source)  # type: ignore[arg-type]
    model, stock = adapt(TwoLayers(), TARGETS, noise_convention="positive_share")
    model.save_pretrained(str(tmp_path))
    loaded, x = PeftModel.from_pretrained(copy.deepcopy(stock.model), tmp_path), torch.randn(3, 7)
    assert_near(run(loaded, x), stock.double().each((x > 0).float().mean(1), x.double()), model)
    with pytest.raises(ValueError, match="'positive_share' has a source already"):
        register_noise_source(Share())  # type: ignore[arg-type]


def test_source_without_a_definition_of_its_own_is_not_registered() -> None:
    for source in [*map(Share, ("timestep", "flow", "edm", "masked_share")), lambda *_: None, "λ", None]:
        with pytest.raises(ValueError, match=r"is defined by this package|is no source of λ: expected a callable"):
            register_noise_source(source)


# ---------------------------------------------------------------------- values


def test_level_that_requires_a_gradient_gets_that_of_finite_differences(model: PeftModel) -> None:
    x = torch.randn(3, 7)

    def loss(levels: Tensor) -> Tensor:
        with noise_level(model, levels):
            return model(x).square().sum()

    leaf, step = LEVELS.clone().requires_grad_(), 1e-3
    loss(leaf).backward()
    assert leaf.grad is not None
    with torch.no_grad():
        moved = [(loss(LEVELS + step * row) - loss(LEVELS - step * row)) / (2 * step) for row in torch.eye(3)]
    assert relative_error(leaf.grad, torch.stack(moved)) < 1e-2


def test_schedule_of_wrong_points_is_refused() -> None:
    for points, message in [
        ([], r"points is \[\]: pass at least one pair"),
        ("0:1", "points is '0:1': pass"),
        ({0: 1.0}, r"points is \{0: 1.0\}: pass"),
        ([0.3], "points holds 0.3: pass pairs"),
        ([(0.3, "1")], r"points holds \(0.3, '1'\): pass pairs .* of finite numbers"),
        ([(0.3, float("nan"))], "of finite numbers"),
        ([(0.3, 1e39)], "of finite numbers"),
        ([(0, 1.0), (700, 0.3)], r"points holds \(700, 0.3\), whose λ is 700: .* λ = t / 1000"),
        ([(0.5, 1.0), (0.2, 2.0)], "λ 0.2 after λ 0.5: pass the points by ascending λ"),
        ([(0.5, 1.0), (0.5, 2.0), (0.5, 3.0)], "three points at one λ"),
    ]:
        with pytest.raises(ValueError, match=message):
            StrengthSchedule(points)
