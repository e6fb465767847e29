"""λ (b, k), one for each of k parts of a sample's positions: each part is as if it ran by itself, or it is refused.

b, k, l, d_in, d_out and r are 3, 4, 20, 7, 5 and 2. The layers here don't mix positions, so a part can run by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from nara_diffusion import noise_level, set_noise_source
from tests.helpers.adapted import OneLayer, adapted, disturb, nara_config, relative_error

SAMPLES, PARTS, LENGTH, IDS = 3, 4, 20, 13
LEVELS = torch.tensor([[0.9, 0.1, 0.4, 0.7], [0.2, 0.6, 0.0, 1.0], [0.3, 0.8, 0.5, 0.15]])


class Shift(nn.Module):
    """In place of a dropout: it also goes the way of layers with one, and is the same at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) + 0.3


def quantised(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 8:
        return bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    return bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)


LAYERS: dict[str, tuple[Callable[[], nn.Module], int | None, bool]] = {
    "linear": (lambda: nn.Linear(7, 5), 7, False),
    "without bias": (lambda: nn.Linear(7, 5, bias=False), 7, False),
    "linear, DoRA": (lambda: nn.Linear(7, 5), 7, True),
    "without bias, DoRA": (lambda: nn.Linear(7, 5, bias=False), 7, True),
    "transposed, DoRA": (lambda: Conv1D(5, 7), 7, True),
    "one function": (lambda: nn.Linear(24, 2400), 24, False),
    "one function, DoRA": (lambda: nn.Linear(24, 2400), 24, True),
    "embedding": (lambda: nn.Embedding(IDS, 5), None, False),
    "8 bits": (lambda: quantised(8), 64, False),
    "8 bits, DoRA": (lambda: quantised(8), 64, True),
    "4 bits": (lambda: quantised(4), 64, False),
}
"""Kind of layer → how to make it, the width of its input (None: ids), whether with DoRA."""


def part(x: Tensor, sample: int, index: int) -> Tensor:
    """One part of a sample's positions, (1, l / k, …)."""
    width = x.shape[1] // PARTS
    return x[sample : sample + 1, index * width : (index + 1) * width]


def one_by_one(model: nn.Module, x: Tensor, levels: Tensor = LEVELS) -> Tensor:
    """The outputs of parts that run by themselves, put together."""
    rows = []
    for i, row in enumerate(levels):
        outputs = []
        for j, level in enumerate(row):
            with noise_level(model, level):
                outputs.append(model(part(x, i, j)))
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows)


def gradients(model: nn.Module, output: Tensor, *others: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad((output * weights).sum(), [*trained, *others]))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("has_dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_part_runs_at_its_own_level(kind: str, has_dropout: bool) -> None:
    make, width, use_dora = LAYERS[kind]
    model = adapted(OneLayer(make()).to("cpu"), target_modules=["layer"], use_dora=use_dora, r=2)
    if has_dropout and width is not None:
        model.base_model.model.layer.lora_dropout["default"] = Shift()
        model.train()
    x = torch.randint(IDS, (SAMPLES, LENGTH)) if width is None else torch.randn(SAMPLES, LENGTH, width)
    leaves = [LEVELS.clone().requires_grad_()] + ([] if width is None else [x.requires_grad_()])
    with noise_level(model, leaves[0]):
        together = model(x)
    expected = one_by_one(model, x, leaves[0])
    assert relative_error(together, expected) < 1e-5
    actual = gradients(model, together, *leaves)
    for one, other in zip(actual, gradients(model, expected, *leaves), strict=True):
        assert relative_error(one, other) < 2e-5


def test_positions_may_have_more_axes_without_copying() -> None:
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], r=2)
    x = torch.randn(SAMPLES, LENGTH, 6, 7)  # six heads a position
    with noise_level(model, LEVELS):
        together = model(x)
    assert relative_error(together, one_by_one(model, x)) < 1e-5


class Kernels(TorchDispatchMode):
    """Count the operations that compute or copy; views don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("size", [(7, 5), (24, 2400)], ids=["parts", "one function"])
def test_several_parts_add_no_kernel_to_a_layer(use_dora: bool, size: tuple[int, int]) -> None:
    kernels = []
    model = adapted(OneLayer(nn.Linear(*size)), target_modules=["layer"], use_dora=use_dora, r=2)
    layer, x = model.base_model.model.layer, torch.randn(SAMPLES, LENGTH, size[0])
    for level in (LEVELS[:, 0], LEVELS[:, :1], LEVELS):
        with noise_level(model, level), Kernels() as model_kernels, torch.no_grad():
            model(x)
        inner = Kernels()
        handles = [
            layer.register_forward_pre_hook(lambda *_, mode=inner: mode.__enter__() and None),
            layer.register_forward_hook(lambda *_, mode=inner: mode.__exit__(None, None, None)),
        ]
        with noise_level(model, level), torch.no_grad():
            model(x)
        for handle in handles:
            handle.remove()
        kernels.append((model_kernels.names, inner.names))
    assert kernels[0] == kernels[1]
    assert kernels[2][1] == kernels[0][1]


def test_one_part_equals_one_level_per_sample() -> None:
    model, x = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"]), torch.randn(SAMPLES, LENGTH, 7)
    outputs = []
    for level in (LEVELS[:, 0], LEVELS[:, :1], LEVELS[:1], LEVELS[:1].expand(SAMPLES, -1), LEVELS[:1, :1], 0.9):
        with noise_level(model, level):
            outputs.append(model(x))
    for one, other in zip(outputs[::2], outputs[1::2], strict=True):
        torch.testing.assert_close(one, other)
    set_noise_source(model, lambda *_: LEVELS)
    assert relative_error(model(x), one_by_one(model, x)) < 1e-5  # a source may give parts as well


def test_static_adapters_and_strengths_have_parts_too() -> None:
    base = OneLayer(nn.Linear(7, 5))
    model = adapted(base, target_modules=["layer"], strength=[[0.0, 0.2], [1.0, 1.0]])
    x = torch.randn(SAMPLES, LENGTH, 7)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), one_by_one(model, x)) < 1e-5
    model.add_adapter("plain", nara_config(target_modules=["layer"], core_type="identity"))
    model.add_adapter("constant", nara_config(target_modules=["layer"], core_type="constant"))
    disturb(model, "plain")
    disturb(model, "constant")
    model.base_model.set_adapter(["default", "plain", "constant"])
    with noise_level(model, LEVELS):
        assert relative_error(model(x), one_by_one(model, x)) < 1e-5


# ---------------------------------------------------------------------- models


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=IDS,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LlamaForCausalLM(config)


def adapted_llama() -> Any:
    targets = ["embed_tokens", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    model = inject_adapter_in_model(nara_config(target_modules=targets, r=2), llama())
    disturb(model)
    return model


def test_language_model_layers_see_their_parts_level() -> None:
    model, ids = adapted_llama(), torch.randint(IDS, (SAMPLES, LENGTH))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {
        name: adapted_layer for name, adapted_layer in model.named_modules() if hasattr(adapted_layer, "lora_variant")
    }
    handles = [
        adapted_layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
        for name, adapted_layer in layers.items()
    ]
    with torch.no_grad(), noise_level(model, LEVELS):
        model(ids)
    for handle in handles:
        handle.remove()
    assert len(layers) == 11
    for name, layer in layers.items():
        x, output = seen[name]
        for i, row in enumerate(LEVELS):
            for j, level in enumerate(row):
                with torch.no_grad(), noise_level(model, level):
                    assert relative_error(part(output, i, j), layer(part(x, i, j))) < 1e-5, name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_blocks_have_their_forwards_parts(use_reentrant: bool) -> None:
    model, ids = adapted_llama(), torch.randint(IDS, (SAMPLES, LENGTH))

    def slopes() -> list[Tensor]:
        model.zero_grad()
        with noise_level(model, LEVELS):
            output = model(ids).logits
        with noise_level(model, LEVELS.flip(1)[:, :2]):
            output = output + model(ids).logits.square()
        output.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = slopes()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for one, other in zip(slopes(), expected, strict=True):
        assert relative_error(one, other) < 1e-5


class Mixture(nn.Module):
    """A gate and a shared expert that see all tokens in order, and experts that see some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(7, 2)
        self.shared = nn.Linear(7, 7)
        self.experts = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 7)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = self.gate(tokens).argmax(1)
        output = self.shared(tokens)
        for i, expert in enumerate(self.experts):
            output = output.index_add(0, (chosen == i).nonzero()[:, 0], expert(tokens[chosen == i]))
        return output.unflatten(0, x.shape[:2])


def test_layers_of_flattened_tokens_have_parts_except_experts() -> None:
    x = torch.randn(SAMPLES, LENGTH, 7)
    model = adapted(OneLayer(Mixture()), target_modules=["gate", "shared"])
    with noise_level(model, LEVELS):
        assert relative_error(model(x), one_by_one(model, x)) < 1e-5
    model = adapted(OneLayer(Mixture()), target_modules=["experts.0"])
    with noise_level(model, LEVELS), pytest.raises(ValueError, match=r"4 values.*'layer\.experts\.0' sees"):
        model(x)
    with noise_level(model, LEVELS[:, :1]), pytest.raises(ValueError, match="are routed tokens, not samples"):
        model(x)
