"""What `nara-check` measures: R² of λ, and the gradients' differences before and after a short fit of a static LoRA.

    conflict ratio = Σ_k w_k ‖g_k − ḡ‖² after the fit / Σ_k w_k ‖g_k‖² before it

Before the fit, gradients differ between bins in any fine-tuning: some bins have more to learn. A static update may
still serve all of them. After the fit, what it could do is done, and what is left of the gradients tells where bins
pull against each other, in spite of all that the layers see of λ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.check.comparison import BinComparison, compare_bins
from nara_diffusion.check.gradients import BinnedGradients
from nara_diffusion.check.probe import Forward, probe
from nara_diffusion.training.loop import StepLoss

ADAPTER = "default"
BINS = 5
PENALTIES = (1e-2, 1e-1, 1.0, 10.0)  # of R²'s regression, since a layer may have more features than there are samples


@dataclass(frozen=True)
class Batch:
    """Attributes: `loss` runs the forward; `place` (b',) in [0, 1) is the token of each sample that R² looks at."""

    loss: Callable[[], StepLoss]
    place: Tensor


@dataclass(frozen=True)
class CheckTask:
    """A training, as the check sees it.

    Attributes:
        model: with a static LoRA, whose B is zero; all else is frozen.
        batch: positions in the training stream → their losses, as the training itself computes them.
        batch_size: samples of a forward.
    """

    model: nn.Module
    batch: Callable[[Sequence[int]], Batch]
    batch_size: int


@dataclass(frozen=True)
class CheckSettings:
    """Attributes:
    samples: in each of the two measurements.
    steps: of the fit.
    step_samples: of each of them.
    learning_rate: at first; it falls to 0.
    """

    samples: int = 480
    steps: int = 60
    step_samples: int = 20
    learning_rate: float = 1e-2


@dataclass(frozen=True)
class Findings:
    """Attributes:
    r_squared: {adapted layer: how well its input tells λ}.
    before, after: gradients at B, before and after the fit.
    layers_before, layers_after: the same of each layer alone.
    loss_before, loss_after: the mean loss of the samples measured.
    """

    r_squared: dict[str, float]
    before: BinComparison
    after: BinComparison
    layers_before: dict[str, BinComparison]
    layers_after: dict[str, BinComparison]
    loss_before: float
    loss_after: float

    @property
    def conflict_ratio(self) -> float:
        """See the module's docstring; nan where no gradient shows before the fit."""
        return self.after.conflict / self.before.energy if self.before.energy > 0 else float("nan")


def measure(task: CheckTask, settings: CheckSettings, progress: bool = True) -> Findings:
    """Measures, fits B, measures again, on samples that follow each other in the training stream.

    A keeps its random start, and requires no gradient from now on: the gradients at B before and after the fit are
    those at ΔW, seen through the same A.

    Raises:
        ValueError: the adapter has no layer with an A and a B; a loss that isn't finite; see `compare_bins`.
    """
    layers = adapted_layers(task.model)
    for layer in layers.values():
        layer.lora_A[ADAPTER].requires_grad_(False)
    fit_samples = settings.steps * settings.step_samples
    total = 2 * settings.samples + fit_samples
    with tqdm(total=total, desc="check", unit="sample", disable=not progress) as bar:
        first = _measure(task, layers, range(settings.samples), bar, tell_inputs=True)
        fit_positions = range(settings.samples, settings.samples + fit_samples)
        bar.set_postfix_str("fitting a static LoRA")
        _fit(task, settings, fit_positions, bar)
        bar.set_postfix_str("")
        last = _measure(task, layers, range(total - settings.samples, total), bar)
    return Findings(first.r_squared, first.all, last.all, first.layers, last.layers, first.loss, last.loss)


@dataclass(frozen=True)
class _Side:
    r_squared: dict[str, float]
    all: BinComparison
    layers: dict[str, BinComparison]
    loss: float


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of those that have a matrix A and a matrix B.

    Raises:
        ValueError: there are none.
    """
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    found = {name: module for name, module in named if ADAPTER in module.lora_B}
    if not found:
        raise ValueError("target_modules name no linear layer and no convolution, and only those can be measured.")
    return found


def _measure(task: CheckTask, layers: dict[str, Any], positions: range, bar: tqdm, tell_inputs: bool = False) -> _Side:
    """`tell_inputs`: also R² of each layer."""
    gradients = BinnedGradients({name: layer.lora_B[ADAPTER] for name, layer in layers.items()}, BINS)
    losses: list[Tensor] = []
    with gradients.watching():
        inputs = {name: layer.get_base_layer() for name, layer in layers.items()} if tell_inputs else {}
        r_squared = probe(inputs, _forwards(task, gradients, losses, positions, bar), PENALTIES)
    grams = gradients.grams()
    comparisons = {name: compare_bins([gram], gradients.counts) for name, gram in grams.items()}
    return _Side(
        r_squared, compare_bins(grams.values(), gradients.counts), comparisons, torch.cat(losses).mean().item()
    )


def _forwards(
    task: CheckTask, gradients: BinnedGradients, losses: list[Tensor], positions: range, bar: tqdm
) -> Iterator[Forward]:
    for chosen in _chunks(positions, task.batch_size):
        batch = task.batch(chosen)
        yield Forward(partial(_backward, batch, gradients, losses), batch.place)
        bar.update(len(chosen))


def _backward(batch: Batch, gradients: BinnedGradients, losses: list[Tensor]) -> Tensor:
    """λ (b,) of the batch, whose gradients were added."""
    step = batch.loss()
    losses.append(_finite(step.per_sample.detach().float().cpu()))
    gradients.add(step.per_sample, step.noise_level)
    return step.noise_level.detach().float()


def _fit(task: CheckTask, settings: CheckSettings, positions: range, bar: tqdm) -> None:
    """Adam on B, at rates that fall to 0."""
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / settings.steps, total_iters=settings.steps)
    for start in range(positions.start, positions.stop, settings.step_samples):
        for chosen in _chunks(range(start, start + settings.step_samples), task.batch_size):
            per_sample = task.batch(chosen).loss().per_sample
            _finite(per_sample.detach())
            (per_sample.sum() / settings.step_samples).backward()
            bar.update(len(chosen))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _finite(losses: Tensor) -> Tensor:
    if not losses.isfinite().all():
        raise ValueError(
            "the loss is no longer a finite number: lower the learning rate, or use mixed_precision bf16 or no."
        )
    return losses


def _chunks(positions: range, size: int) -> list[range]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]
