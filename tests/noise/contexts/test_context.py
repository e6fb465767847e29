"""How long λ holds: contexts that nest, end in any order, or belong to generators; and the models that they name."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level, set_noise_source
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config, relative_error
from tests.helpers.two_layers import LEVELS, TARGETS, expect, run


def test_a_forward_without_a_level_names_both_remedies(model: PeftModel, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"λ is not known.*noise_level\(model, value\).*set_noise_source\(model"):
        model(x)


@pytest.mark.parametrize(
    "call", [lambda: noise_level(TwoLayers(), 0.3).__enter__(), lambda: set_noise_source(TwoLayers(), None)]
)
def test_a_model_without_nara_is_refused(call) -> None:
    with pytest.raises(ValueError, match="TwoLayers holds no NaRA adapter"):
        call()


def test_a_pipeline_is_not_a_model() -> None:
    class Pipeline:
        """As those of Diffusers, which are no modules."""

    with pytest.raises(ValueError, match=r"Pipeline is no torch.nn.Module: pass the model itself, e.g. pipe.unet"):
        noise_level(Pipeline(), 0.3).__enter__()  # type: ignore[arg-type]


def test_nested_contexts_restore_the_previous_level(model: PeftModel, x: Tensor) -> None:
    expected = {level: expect(model, x, level) for level in (0.1, 0.5, 0.9)}

    def check(level: float) -> None:
        assert relative_error(run(model, x), expected[level]) < 2e-6

    def leave_by_an_exception(level: float) -> None:
        with noise_level(model, level):
            check(level)
            raise KeyError

    with noise_level(model, 0.1):
        with noise_level(model, 0.5):
            with pytest.raises(KeyError):
                leave_by_an_exception(0.9)
            check(0.5)
            with pytest.raises(ValueError, match="is 3"), noise_level(model, torch.rand(2)):
                model(x)
            check(0.5)
            with pytest.raises(ValueError, match="nan"), noise_level(model, float("nan")):
                pass
            check(0.5)
        check(0.1)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_contexts_may_end_in_any_order(model: PeftModel, x: Tensor) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(noise_level(model, 0.1))
    second.enter_context(noise_level(model, 0.9))
    first.close()
    assert relative_error(run(model, x), expect(model, x, 0.9)) < 2e-6
    second.close()
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_several_models_each_have_their_level(x: Tensor) -> None:
    one, two = adapted(TwoLayers(), target_modules=TARGETS), adapted(TwoLayers(), target_modules=TARGETS)
    disturb(two, seed=3)
    with noise_level(one, 0.2), noise_level(two, 0.9):
        with noise_level(one, 0.6):
            assert relative_error(run(one, x), expect(one, x, 0.6)) < 2e-6
            assert relative_error(run(two, x), expect(two, x, 0.9)) < 2e-6
        assert relative_error(run(one, x), expect(one, x, 0.2)) < 2e-6
    pair = nn.ModuleList([one, two])
    with noise_level(pair, 0.4), noise_level(two, 0.7):
        assert relative_error(run(one, x), expect(one, x, 0.4)) < 2e-6
        assert relative_error(run(two, x), expect(two, x, 0.7)) < 2e-6


class Wrapper(nn.Module):
    """As DistributedDataParallel and its like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_the_model_may_be_named_by_any_of_its_wrappers(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    wrapped = Wrapper(model)
    compiled = torch.compile(wrapped, backend="eager")
    for named in (root, model.base_model, model, wrapped, compiled):
        for called in (root, model, wrapped):
            with noise_level(named, LEVELS):
                assert relative_error(run(called, x), expect(model, x, LEVELS)) < 2e-6


def test_an_adapter_added_later_reads_the_same_level(model: PeftModel, x: Tensor) -> None:
    with noise_level(model, 0.3):
        before = run(model, x)
        model.add_adapter("later", nara_config(target_modules=TARGETS))
        model.base_model.set_adapter(["default", "later"])
        assert torch.equal(run(model, x), before)  # its B is zero
