"""Holding the base: outside of a window of noise levels, an adapted model learns to predict what its base predicts.

The base is the model itself with its adapters disabled, run without gradients and without dropout, on those samples
alone that lie outside. Every process runs it in each forward of training, on one sample at least: the forwards of DDP
and FSDP communicate, so that all processes have to run equally many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from nara_diffusion.utils.eval_mode import disabled, evaluating


@dataclass(frozen=True)
class SplitLosses:
    """The losses of k samples, some of which are trained to match the base.

    Attributes:
        values: (k,), the loss of those inside of the window, and of those outside their distance to the base.
        noise_level: (k,), λ.
        held: (k,) bool, which lie outside.
    """

    values: Tensor
    noise_level: Tensor
    held: Tensor

    def weighted(self, weight: float) -> Tensor:
        """The value of each sample in the loss, (k,): a distance to the base counts `weight` times."""
        return torch.where(self.held, weight * self.values, self.values)


def check_has_base(model: nn.Module) -> None:
    """Refuse a model without adapters, whose distance to itself is 0.

    Raises:
        ValueError: it has none.
    """
    if not any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper, PeftModel)) for m in model.modules()):
        raise ValueError(
            f"The base is the model with its adapters disabled, and {type(model).__name__} has no adapter: add one, or "
            "leave hold_weight out of the window."
        )


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Inside the context, `model` is its base: adapters are disabled, and there are no gradients and no dropout.

    Unlike PEFT's own calls it leaves alone which parameters require a gradient, and afterwards all is as it was, also
    where modules differ.
    """
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    with ExitStack() as stack:
        for module in list(model.modules()):
            if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
                stack.enter_context(module.disable_adapter())
        with torch.no_grad(), evaluating(model), disabled(layers):
            yield


def rows_for_base(held: Tensor) -> Tensor:
    """The indices of the `held` (b,) rows of a batch, on which the base runs; the first row if there are none."""
    rows = held.nonzero()[:, 0]
    return rows if len(rows) else rows.new_zeros(1)
