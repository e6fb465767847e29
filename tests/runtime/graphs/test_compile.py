"""`torch.compile` of adapted models: the values of eager mode, one graph, and no recompilation when λ changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from nara_diffusion import set_noise_source
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import adapted, disturb, nara_config, relative_error
from tests.helpers.rounding import rounding_of
from tests.runtime.graphs.compiled import LEVELS, check_gradients, compiled, gradients, output, two_forwards

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    # Dynamo looks at the gradient of each input; it hides its warning only where warnings are no errors
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def llama_logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(15).view(3, 5) + 7, use_cache=False).logits


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()"])
def test_one_graph_serves_all_levels(tiny_llama: LlamaForCausalLM, how: str, use_dora: bool) -> None:
    model = adapted(tiny_llama, target_modules=TARGETS, use_dora=use_dora)
    expected = [output(model, model, llama_logits, level) for level in LEVELS]
    assert relative_error(expected[0], expected[1]) > 0.01
    backend = CompileCounterWithBackend("eager")
    fast = compiled(model, how, backend)
    assert relative_error(output(fast, model, llama_logits, LEVELS[0]), expected[0]) < rounding_of(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for level, reference in zip(LEVELS, expected, strict=True):
            assert relative_error(output(fast, model, llama_logits, level), reference) < rounding_of(model)
    assert backend.frame_count == 1
    assert not counters["graph_break"]


def test_one_graph_serves_all_shared_levels_and_sources(tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama, target_modules=TARGETS)
    levels = [0.3, 0, 1, torch.tensor(0.7)]
    expected = [output(model, model, llama_logits, level) for level in levels]
    backend = CompileCounterWithBackend("eager")
    fast = compiled(model, "torch.compile(model)", backend)
    output(fast, model, llama_logits, 0.5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for level, reference in zip(levels, expected, strict=True):
            assert relative_error(output(fast, model, llama_logits, level), reference) < rounding_of(model)
            set_noise_source(model, lambda *_, level=level: NoiseSignals(torch.tensor([float(level)])))  # type: ignore[arg-type]
            with torch.no_grad():
                assert relative_error(llama_logits(fast), reference) < rounding_of(model)
        set_noise_source(model, None)
        with pytest.raises(ValueError, match="λ is not known"):
            llama_logits(fast)
    assert backend.frame_count == 1


@pytest.mark.parametrize("use_dora", [False, True])
def test_training(tiny_llama: LlamaForCausalLM, use_dora: bool) -> None:
    model = adapted(tiny_llama, target_modules=TARGETS, use_dora=use_dora).train()
    expected = [gradients(model, model, llama_logits, level) for level in LEVELS]
    backend = CompileCounterWithBackend("aot_eager")
    fast = compiled(model, "torch.compile(model)", backend)
    check_gradients(model, gradients(fast, model, llama_logits, LEVELS[0]), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for level, reference in zip(LEVELS, expected, strict=True):
            check_gradients(model, gradients(fast, model, llama_logits, level), reference)
    assert backend.frame_count == 1
    assert not counters["graph_break"]


def test_two_forwards_before_one_backward_pass(tiny_llama: LlamaForCausalLM) -> None:
    """Checkpointed or not, one graph: the recomputation is a part of it."""
    model = adapted(tiny_llama, target_modules=TARGETS).train()

    both = two_forwards(model, llama_logits)
    expected = gradients(model, model, both(model), 0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.base_model.model.disable_input_require_grads()
    backend = CompileCounterWithBackend("aot_eager")
    fast = compiled(model, "torch.compile(model)", backend)
    check_gradients(model, gradients(model, model, both(fast), 0.5), expected)
    assert backend.frame_count == 1
    assert not counters["graph_break"]


def test_blocks_compiled_one_by_one(tiny_llama: LlamaForCausalLM) -> None:
    """Blocks, and models, share compiled code, but neither λ nor C."""
    models = [adapted(tiny_llama, target_modules=TARGETS)]
    models.append(adapted(type(tiny_llama)(tiny_llama.config).eval(), target_modules=TARGETS))
    disturb(models[1], seed=5)
    expected = [[output(model, model, llama_logits, level) for level in LEVELS] for model in models]
    backend = CompileCounterWithBackend("eager")
    for model in models:
        for block in model.base_model.model.model.layers:
            block.compile(backend=backend)
    for model, references in zip(models, expected, strict=True):
        output(model, model, llama_logits, LEVELS[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for level, reference in zip(LEVELS, references, strict=True):
                assert relative_error(output(model, model, llama_logits, level), reference) < rounding_of(model)
    block = models[0].base_model.model.model.layers[0]
    states = torch.randn(3, 5, 24)
    rotary = models[0].base_model.model.model.rotary_emb(states, torch.arange(5)[None])
    with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
        block(states, position_embeddings=rotary)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    model.requires_grad_(False)
    return model


def denoised(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(3, 3, 4, 4, generator=generator)
    text = torch.randn(3, 4, 12, generator=generator)
    return model(sample, torch.tensor([900, 500, 20]), text).sample


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # in Diffusers
def test_a_unet(unet: UNet2DConditionModel) -> None:
    unet.add_adapter(nara_config(target_modules=["to_q", "to_v", "conv1", "proj_in"], use_dora=True))
    disturb(unet)
    unet.train()
    expected = [gradients(unet, unet, denoised, level) for level in LEVELS[:2]]
    unet.enable_gradient_checkpointing()
    backend = CompileCounterWithBackend("eager")
    fast = compiled(unet, "model.compile()", backend)
    check_gradients(unet, gradients(fast, unet, denoised, LEVELS[0]), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_gradients(unet, gradients(fast, unet, denoised, LEVELS[1]), expected[1])
    assert backend.frame_count == 1
    assert not counters["graph_break"]
