"""Adapted layers beside the formula: idle experts, refused kinds, starts, DoRA's norm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from peft import get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.layers import functional as norms
from nara_diffusion.layers.functional import row_norm
from tests.acceptance._by_hand import CORES, LEVELS, SMALL, Kinds, tensors_of
from tests.helpers.adapted import OneLayer, adapted, disturb, nara_config, relative_error

DORA = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])


def one_layer(use_dora: bool) -> Any:
    return adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], use_dora=use_dora)


@DORA
def test_expert_without_tokens_gets_zero_gradients(use_dora: bool) -> None:
    model = one_layer(use_dora)
    layer = model.base_model.model.layer
    with noise_level(model, LEVELS):
        layer(torch.randn(0, 7)).sum().backward()
    for factor in (layer.lora_A, layer.lora_B):
        assert factor["default"].weight.grad.count_nonzero() == 0


def test_adapter_added_after_layerwise_casting_reads_float32() -> None:
    model, x = adapted(OneLayer(nn.Linear(7, 5).bfloat16()), target_modules=["layer"]), torch.randn(3, 4, 7).bfloat16()
    apply_layerwise_casting(model.base_model.model, torch.float8_e4m3fn, torch.bfloat16)
    model.add_adapter("second", nara_config(target_modules=["layer"]))
    disturb(model, "second")
    model.set_adapter("second")
    with noise_level(model, 0.4), torch.no_grad():
        output = model(x)
        with model.disable_adapter():
            expected = model(x)
    layer, C = model.base_model.model.layer, core_matrix(model, 0.4, "second")[0]
    A, B = layer.lora_A["second"].weight, layer.lora_B["second"].weight
    assert A.dtype == torch.float32
    expected = expected.double() + 6 / 4 * x.double() @ (B @ C @ A).double().T
    assert relative_error(output, expected) < torch.finfo(torch.bfloat16).eps


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(("core", "use_dora"), [*((core, False) for core in CORES), (next(iter(CORES)), True)])
def test_meta_model_gives_the_shapes_of_real_one(core: str, use_dora: bool) -> None:
    kinds = SMALL[use_dora]
    real = adapted(Kinds(kinds), target_modules=kinds, use_dora=use_dora, **CORES[core])
    inputs, model = Kinds(kinds).inputs(), copy.deepcopy(real).to("meta")
    on_meta = {kind: x.detach().to("meta") for kind, x in inputs.items()}
    with noise_level(real, LEVELS), noise_level(model, LEVELS):
        expected, outputs = real(inputs), model(on_meta)
    for name, output in outputs.items():
        assert (output.device.type, output.shape) == ("meta", expected[name].shape)
    for outputs_of_model in (expected, outputs):
        sum(output.sum() for output in outputs_of_model.values()).backward()
    assert tensors_of(model, gradients=True).keys() == tensors_of(real, gradients=True).keys()


def test_large_layer_with_strength_runs_on_meta() -> None:
    for options in ({"use_dora": True}, {"use_dora": False}, {"strength": [[0.0, 1.0], [0.5, 0.0]]}):
        base = OneLayer(nn.Linear(512, 512, device="meta"))
        model = get_peft_model(base, nara_config(target_modules=["layer"], **options))
        with noise_level(model, LEVELS):
            model(torch.empty(3, 128, 512, device="meta")).sum().backward()
        assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------- kinds that are refused, and starts


class OwnForward(lora.Linear):
    """A layer of one's own that PEFT uses, and that calls no variant."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


DILATED = nn.Conv2d(6, 7, 3, padding=(2, 1), dilation=(2, 1))
CIRCULAR = nn.Conv3d(6, 7, 3, padding=1, padding_mode="circular")


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.MultiheadAttention(8, 2), {}, r"NaRA cannot adapt 'layer' \(MultiheadAttention\).*exclude_modules"),
        (nn.Linear(7, 5), {"custom": {nn.Linear: OwnForward}}, r"'layer' \(Linear, adapted by PEFT's OwnForward\)"),
        (nn.Embedding(13, 5), {"use_dora": True}, r"NaRA-DoRA cannot adapt 'layer' \(Embedding\), .*norm"),
        (nn.Conv2d(8, 8, 3, groups=2), {"use_dora": True}, r"NaRA-DoRA cannot adapt 'layer' \(Conv2d\), .*groups"),
        (nn.Linear(7, 5).to(torch.float8_e4m3fn), {"use_dora": True}, "stored as torch.float8_e4m3fn"),
        (
            DILATED,
            {},
            r"adapt 'layer' \(Conv2d with padding_mode='zeros' and dilation=\(2, 1\)\).*exclude_modules",
        ),
        (CIRCULAR, {"core_type": "identity"}, r"'layer' \(Conv3d with padding_mode='circular' "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layer_without_a_variant_is_refused_and_unchanged(layer: Any, options: Any, message: str) -> None:
    base, options = OneLayer(layer), dict(options)
    custom = options.pop("custom", None)
    config = nara_config(target_modules=["layer"], **options)
    if custom is not None:
        config._register_custom_module(custom)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert base.layer is layer
    assert [name for name, _ in base.named_modules()] == [name for name, _ in OneLayer(layer).named_modules()]


def test_orthogonal_start_is_orthonormal_and_equals_base() -> None:
    kinds = ["linear", "conv2d", "embedding"]
    base = Kinds(kinds)
    inputs = base.inputs()
    expected = base(inputs)
    model = get_peft_model(base, nara_config(target_modules=kinds, core_type="rank_mask", lora_a_init="orthogonal"))
    directions = {name: t for name, t in tensors_of(model).items() if name.endswith(("lora_A.weight", "embedding_B"))}
    assert len(directions) == 6
    for name, tensor in directions.items():
        rows = tensor.T if "embedding" in name else tensor.flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-6)
    with noise_level(model, torch.tensor([0.0, 0.5, 1.0])):
        outputs = model(inputs)
    assert all(torch.equal(output, expected[name]) for name, output in outputs.items())


# ---------------------------------------------------------------------- DoRA's norm


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that is made inside the context, in all dtypes or in one."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.numel = dtype, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, Tensor) and self.dtype in (None, output.dtype):
                self.numel = max(self.numel, output.numel())
        return result


def test_dora_makes_no_update_matrix_of_each_sample() -> None:
    model = adapted(OneLayer(nn.Linear(96, 80)), target_modules=["layer"], use_dora=True)
    x = torch.randn(4, 3, 96, requires_grad=True)
    with noise_level(model, torch.linspace(0.1, 0.9, 4)), LargestTensor() as largest:
        model.train()(x).sum().backward()
    assert largest.numel <= 80 * 96


def test_dora_norm_at_llada_width_matches_float32() -> None:
    W0, A, K = torch.randn(512, 768) * 0.02, torch.randn(32, 768) * 0.02, torch.randn(4, 512, 32)
    exact = (W0.double() + 0.5 * K.double() @ A.double()).norm(dim=2)
    assert relative_error(row_norm(W0, A, K, 0.5), exact) < 1e-6


def nearly_cancelling(dtype: torch.dtype, residual: float) -> tuple[Tensor, Tensor, Tensor]:
    """W0 of that dtype, A and K with ‖W0 + K A‖ = residual · ‖K A‖ by row, but for the rounding of W0."""
    A, K, random = 0.1 * torch.randn(32, 192), 0.1 * torch.randn(1, 256, 32), torch.randn(256, 192)
    update = K[0] @ A
    random *= residual * update.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    return (random - update).to(dtype), A, K


@pytest.mark.parametrize("residual", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dora_norm_in_half_precision_survives_cancellation(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, residual: float
) -> None:
    monkeypatch.setattr(norms, "SLICE", 10_000)
    W0, A, K = nearly_cancelling(dtype, residual)
    exact = (W0.double() + K.double() @ A.double()).norm(dim=2)
    dense = torch.linalg.norm(W0 + (K[0] @ A).to(dtype), dim=1)[None]  # as PEFT's DoRA
    error, bound = (((norm - exact) / exact).abs().max() for norm in (row_norm(W0, A, K, 1.0), dense))
    assert error <= 2 * bound


def test_dora_norm_in_float32_survives_cancellation() -> None:
    W0, A, K = nearly_cancelling(torch.float32, 0.1)
    exact = (W0.double() + K.double() @ A.double()).norm(dim=2)
    error = ((row_norm(W0, A, K, 1.0) - exact) / exact).abs().max()
    assert error <= 10 * torch.finfo(torch.float32).eps / 0.1**2


def test_dora_norm_converts_large_bases_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "SLICE", 1000)
    W0, A, K = torch.randn(80, 96).bfloat16(), torch.randn(4, 96), torch.randn(2, 80, 4)
    with LargestTensor(torch.float32) as largest:
        row_norm(W0, A, K, 0.5)
    assert largest.numel <= 1000


# ---------------------------------------------------------------------- merging


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_8_bit_layer_seen_as_plain_fails(
    safe_merge: bool,
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = OneLayer(bnb.nn.Linear8bitLt(8, 5, has_fp16_weights=False)).to("cpu")  # which quantises
    model, x = adapted(base, target_modules=["layer"]), torch.randn(3, 8)
    with noise_level(model, 0.4), torch.no_grad():
        expected = model(x)
        with pytest.raises(ValueError, match=r"'layer' cannot be merged.* torch\.int8"):
            model.merge_adapter(noise_level=0.4, safe_merge=safe_merge)
        assert torch.equal(model(x), expected)
