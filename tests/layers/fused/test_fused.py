"""The fused function of a linear layer against its parts, and where it must not be taken."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nara_diffusion.layers.dora as dora_layers
import nara_diffusion.layers.variants as variants
from nara_diffusion import noise_level
from nara_diffusion.layers.functional import add_product, add_scaled_product, apply_core
from nara_diffusion.layers.fused import TINY_DORA_SCALE, can_fuse, fused_linear
from tests.helpers.adapted import OneLayer, adapted, relative_error

SHAPES = ((3, 7, 6), (3, 2, 5, 6), (3, 6))
LEVELS = torch.tensor([0.1, 0.5, 0.9])


dora = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])


def draw(shape: tuple[int, ...] = (3, 7, 6), *, cores: int = 3, scales: int | None = None) -> dict[str, Any]:
    """x (b, …, 6), W0 (5, 6), A (4, 6), C (cores, 4, 4), B (5, 4), dora_scale (scales, 5); float64, W0 frozen."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": shape, "A": (4, 6), "core": (cores, 4, 4), "B": (5, 4)} | (
        {"dora_scale": (scales, 5)} if scales else {}
    )
    drawn = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for name, size in sizes.items()
    }
    return drawn | {"weight": torch.randn(5, 6, generator=generator, dtype=torch.float64)}


def fused(x: Tensor, weight: Tensor, A: Tensor, core: Tensor, B: Tensor, dora_scale: Tensor | None = None) -> Tensor:
    return fused_linear(x, x @ weight.T, weight, A, core, B, 0.7, dora_scale)


def from_formula(
    x: Tensor, weight: Tensor, A: Tensor, core: Tensor, B: Tensor, dora_scale: Tensor | None = None
) -> Tensor:
    """The formula as it stands, sample by sample."""
    outputs = []
    for i, sample in enumerate(x):
        y = sample @ (weight + 0.7 * B @ core[i % len(core)] @ A).T
        outputs.append(y if dora_scale is None else dora_scale[i % len(dora_scale)] * y)
    return torch.stack(outputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("cores", "scales"), [(3, None), (1, None), (3, 3), (1, 1)])
def test_output_and_all_gradients_are_those_of_the_formula(shape, cores, scales):
    inputs = draw(shape, cores=cores, scales=scales)
    trainable = [tensor for tensor in inputs.values() if tensor.requires_grad]
    weights = torch.randn(*shape[:-1], 5, dtype=torch.float64)
    ours, theirs = fused(**inputs), from_formula(**inputs)
    assert relative_error(ours, theirs) < 1e-14
    gradients = [torch.autograd.grad((y * weights).sum(), trainable) for y in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-13


@pytest.mark.parametrize(("cores", "scales"), [(3, None), (1, None), (3, 3), (1, 1)])
def test_second_derivatives_are_exact(cores, scales):
    inputs = draw((3, 2, 6), cores=cores, scales=scales)
    names = [name for name, tensor in inputs.items() if tensor.requires_grad]

    def function(*values: Tensor) -> Tensor:
        return fused(weight=inputs["weight"], **dict(zip(names, values, strict=True)))

    values = tuple(inputs[name] for name in names)
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("frozen", ["x", "A", "core", "B", "dora_scale"])
def test_what_is_frozen_gets_no_gradient_and_the_others_keep_theirs(frozen):
    inputs, reference = draw(scales=3), draw(scales=3)
    for tensors in (inputs, reference):
        tensors[frozen].requires_grad_(False)
    fused(**inputs).square().sum().backward()
    from_formula(**reference).square().sum().backward()
    for name in set(inputs) - {frozen, "weight"}:
        assert relative_error(inputs[name].grad, reference[name].grad) < 1e-13
    assert inputs[frozen].grad is None


def test_a_gain_of_zero_keeps_its_gradient():
    inputs, reference = draw(scales=3), draw(scales=3)
    for tensors in (inputs, reference):
        with torch.no_grad():
            tensors["dora_scale"][1, 2] = 0.0
    ours, theirs = fused(**inputs), from_formula(**reference)
    assert ours[1, :, 2].abs().max() < 100 * TINY_DORA_SCALE
    for y in (ours, theirs):
        (y * torch.arange(1.0, 6.0)).sum().backward()
    for name in ("x", "A", "core", "B", "dora_scale"):
        assert relative_error(inputs[name].grad, reference[name].grad) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [None, 3])
def test_the_output_has_the_bits_of_the_parts(dtype, scales):
    """A run that falls back to the parts, under a compiler for instance, sees the same model."""
    inputs = {name: tensor.detach().to(dtype) for name, tensor in draw(scales=scales).items()}
    inputs["core"] = inputs["core"].float()
    x, weight, A, core, B = (inputs[name] for name in ("x", "weight", "A", "core", "B"))
    h = apply_core(core, nn.functional.linear(x, A))
    base = x @ weight.T
    parts = (
        add_product(base, h, B, 0.7) if scales is None else add_scaled_product(base, h, B, inputs["dora_scale"], 0.7)
    )
    assert torch.equal(fused(**inputs), parts)


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients():
    inputs = draw((3, 0, 6), scales=3)
    fused(**inputs).sum().backward()
    assert inputs["dora_scale"].grad.count_nonzero() == inputs["B"].grad.count_nonzero() == 0


# ---------------------------------------------------------------------- inside an adapted model


def one_layer(bias: bool = True, **options: Any) -> Any:
    return adapted(OneLayer(nn.Linear(6, 10, bias=bias)), target_modules=["layer"], **options)


def base_layer_of(model: Any) -> Any:
    return model.base_model.model.layer.base_layer


def count_fused_calls(monkeypatch) -> list[Any]:
    calls: list[Any] = []

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return fused_linear(*args)

    monkeypatch.setattr(variants, "fused_linear", counted)
    monkeypatch.setattr(dora_layers, "fused_linear", counted)
    return calls


def gradients_of(model: Any, x: Tensor, run: Any = None) -> list[Tensor]:
    """The output of `model`, or of `run`, and the gradients of x and of all that is trainable."""
    x = x.clone().requires_grad_()
    with noise_level(model, LEVELS):
        y = model(x) if run is None else run(x)
        y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_adapted_layer_is_fused_and_equals_its_parts(monkeypatch, use_dora, bias):
    model = one_layer(bias, use_dora=use_dora)
    x = torch.randn(3, 7, 6)
    calls = count_fused_calls(monkeypatch)
    ours = gradients_of(model, x)
    assert len(calls) == 1
    monkeypatch.setattr("nara_diffusion.layers.fused.MIN_ELEMENTS", math.inf)
    for one, other in zip(ours, gradients_of(model, x), strict=True):
        assert relative_error(one, other) < 2e-6
    assert len(calls) == 1


@pytest.mark.parametrize("use_dora", [False, True])
def test_it_takes_part_in_checkpointing_and_in_place_arithmetic(use_dora):
    model = one_layer(use_dora=use_dora)
    x = torch.randn(3, 7, 6)

    def recomputed(x: Tensor) -> Tensor:
        with noise_level(model, LEVELS):
            return model(x) * 2 + 1

    plain = gradients_of(model, x, lambda x: model(x) * 2 + 1)
    in_place = gradients_of(model, x, lambda x: model(x).mul_(2).add_(1))
    again = gradients_of(model, x, lambda x: checkpoint(recomputed, x, use_reentrant=False))
    for one, *others in zip(plain, in_place, again, strict=True):
        assert all(relative_error(other, one) < 1e-6 for other in others)


def test_an_output_that_backward_reads_is_not_changed_unnoticed():
    model = one_layer(bias=False, use_dora=True)
    with noise_level(model, 0.3), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(3, 7, 6)).mul_(2).sum().backward()


def hook(layer: Any) -> None:
    layer.register_forward_hook(lambda module, args, output: output)


def pre_hook(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args: args)


def backward_hook(layer: Any) -> None:
    layer.register_full_backward_hook(lambda module, gradient_in, gradient_out: None)


def own_forward(layer: Any) -> None:
    layer.forward = type(layer).forward.__get__(layer)


def trained(layer: Any) -> None:
    layer.weight.requires_grad_()


@pytest.mark.parametrize("watch", [hook, pre_hook, backward_hook, own_forward, trained])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_base_layer_that_is_watched_or_trained_is_left_to_its_parts(monkeypatch, watch, use_dora):
    model = one_layer(use_dora=use_dora)
    x = torch.randn(3, 7, 6)
    expected = gradients_of(model, x)
    watch(base_layer_of(model))
    calls = count_fused_calls(monkeypatch)
    found = gradients_of(model, x)
    assert not calls
    if watch is trained:
        gradient = found.pop(2)  # the base weight's, which comes first among the parameters
        assert gradient.shape == (10, 6)
        assert gradient.count_nonzero() == gradient.numel()
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 2e-6


def test_a_hook_of_all_modules_keeps_the_parts(monkeypatch):
    model = one_layer()
    calls = count_fused_calls(monkeypatch)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        gradients_of(model, torch.randn(3, 7, 6))
    finally:
        handle.remove()
    assert not calls


def test_what_a_hook_has_kept_of_the_base_layer_stays_as_it_was():
    model, kept = one_layer(), []
    layer = base_layer_of(model)
    layer.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    with noise_level(model, 0.3):
        model(torch.randn(3, 7, 6))
    ((x, output),) = kept
    assert torch.equal(output, nn.functional.linear(x, layer.weight, layer.bias))


def test_two_active_adapters_are_left_to_their_parts(monkeypatch):
    model = one_layer(use_dora=True)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    calls = count_fused_calls(monkeypatch)
    gradients_of(model, torch.randn(3, 7, 6))
    assert not calls


def test_per_sample_gradients_of_torch_func_are_those_of_each_sample():
    model = one_layer()
    x = torch.randn(2, 3, 7, 6)

    def loss(x: Tensor) -> Tensor:
        with noise_level(model, 0.4):
            return model(x).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(x)
    for i, j in itertools.product(range(2), range(3)):
        alone = x[i, j : j + 1].clone().requires_grad_()
        loss(alone).backward()
        assert relative_error(gradients[i, j : j + 1], alone.grad) < 1e-5


@dora
def test_a_layer_is_fused_from_the_least_number_of_elements_on(monkeypatch, use_dora):
    model = one_layer(use_dora=use_dora)
    calls = count_fused_calls(monkeypatch)
    monkeypatch.setattr("nara_diffusion.layers.fused.MIN_ELEMENTS", 3 * 7 * 10)
    for length, is_fused in ((6, False), (7, True)):
        gradients_of(model, torch.randn(3, length, 6))
        assert bool(calls) == is_fused


def test_another_dtype_and_another_layout_are_left_to_the_parts():
    module = one_layer().base_model.model.layer
    x = torch.randn(3, 7, 6)
    result = module.base_layer(x).detach()
    parts = (module, module.base_layer, module.lora_A["default"], module.lora_B["default"])
    assert can_fuse(*parts, x, result.clone())
    assert not can_fuse(*parts, x, result.double())
    assert not can_fuse(*parts, x, result.transpose(0, 1).contiguous().transpose(0, 1))
