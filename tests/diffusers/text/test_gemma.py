"""DiffusionGemmaPipeline: λ of each forward against a count by hand, and methods for adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from peft import inject_adapter_in_model
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from tests.diffusers.reference import watch
from tests.helpers.adapted import disturb, nara_config

from .calls import loaded

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
CANVAS = 6


class Processor:
    """A chat of fixed tokens, on the left of which the shorter one is padded."""

    eos_token_id = None

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}


def gemma_model() -> Any:
    torch.manual_seed(1)
    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8, "sliding_window": 8, "num_experts": 2,
        "top_k_experts": 1, "moe_intermediate_size": 8, "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 0.3 * torch.randn_like(parameter)
    create: Any = model.model.decoder.create_diffusion_decoder_attention_mask

    def create_by_either_name(*, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Diffusers 0.42 gives the cache by the name that it had before Transformers 5.24."""
        return create(**({} if past_key_values is None else {"cache": past_key_values}), **kwargs)

    model.model.decoder.create_diffusion_decoder_attention_mask = create_by_either_name
    return model


DECODER = r"model\.decoder\.layers\..*\.(q_proj|o_proj|down_proj)"


def gemma(scheduler: Any, name: str | None = "toy", targets: str = DECODER) -> Any:
    pipe = DiffusionGemmaPipeline(gemma_model(), scheduler, Processor())
    pipe.set_progress_bar_config(disable=True)
    if name is not None:
        inject_adapter_in_model(nara_config(target_modules=targets), pipe.model, name)
        disturb(pipe.model)
        pipe.model.eval()
    return pipe


def denoise(pipe: Any, **changes: Any) -> Tensor:
    options = {"gen_length": 2 * CANVAS, "num_inference_steps": 5, "confidence_threshold": None, "output_type": "seq"}
    generator = torch.Generator().manual_seed(4)
    return pipe(prompt=["a", "b"], generator=generator, **{**options, **changes}).sequences


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_block_refinement_tells_what_it_has_not_committed(tmp_path, steps):
    scheduler = BlockRefinementScheduler(threshold=2.0)  # nothing above it: an even number of tokens a step
    pipe = loaded(gemma(scheduler), gemma(scheduler, None), tmp_path)
    levels = watch(pipe.model, "toy")
    for _ in range(2):
        denoise(pipe, num_inference_steps=steps)
    canvas = [1 - -(-k * CANVAS // steps) / CANVAS for k in range(steps)]
    assert [[row[0], row[-1]] for row in levels] == [[pytest.approx(level)] * 2 for level in 4 * canvas]
    assert "step" not in vars(pipe.scheduler)


def test_block_refinement_tells_each_sample_its_own_share(tmp_path):
    scheduler = BlockRefinementScheduler(threshold=0.2)
    pipe = loaded(gemma(scheduler), gemma(scheduler, None), tmp_path)
    levels = watch(pipe.model, "toy")
    committed: list[Any] = []

    def note(pipe: Any, step: int, timestep: int, kwargs: Any) -> dict[str, Any]:
        logits = kwargs["logits"].double()
        probability = torch.softmax(logits, -1).amax(-1)  # greedy
        done = torch.zeros(2, CANVAS, dtype=torch.bool) if timestep == 0 else committed[-1]
        quota = -(-(timestep + 1) * CANVAS // 5)
        now = done.clone()
        for row in range(2):
            order = [i for i in probability[row].argsort(descending=True).tolist() if not done[row, i]]
            needed = max(0, quota - int(done[row].sum()))
            now[row, [i for n, i in enumerate(order) if n < needed or probability[row, i] > 0.2]] = True
        committed.append(now)
        return {}

    denoise(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["logits"])
    expected = []
    for call in range(len(levels)):
        begins = call % 5 == 0
        expected.append([1.0] * 2 if begins else [1 - float(row.double().mean()) for row in committed[call - 1]])
    assert [[row[0], row[-1]] for row in levels] == [[pytest.approx(level) for level in row] for row in expected]
    assert any(row[0] != row[1] for row in expected)


def test_entropy_bound_tells_what_it_has_not_accepted(tmp_path):
    scheduler = EntropyBoundScheduler(entropy_bound=6.0)
    pipe = loaded(gemma(scheduler), gemma(scheduler, None), tmp_path)
    levels = watch(pipe.model, "toy")
    accepted: list[list[float]] = []

    def note(pipe: Any, step: int, timestep: int, kwargs: Any) -> dict[str, Any]:
        temperature = 0.4 + 0.4 * (5 - timestep) / 5
        p = torch.softmax(kwargs["logits"].double() / temperature, -1)
        entropy = (-p * p.clamp(min=1e-300).log()).sum(-1).sort(-1).values
        before = torch.cat([torch.zeros(2, 1), entropy.cumsum(-1)[:, :-1]], dim=1)
        accepted.append((before <= 6.0).double().mean(-1).tolist())
        return {}

    denoise(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["logits"])
    expected = [[1.0] * 2 if call % 5 == 0 else [1 - a for a in accepted[call - 1]] for call in range(10)]
    assert [[row[0], row[-1]] for row in levels] == [[pytest.approx(level) for level in row] for row in expected]
    assert len({level for row in expected for level in row}) > 2


@pytest.mark.parametrize("correctors", [0, 1])
def test_discrete_ddim_tells_its_schedule_and_that_of_correctors(tmp_path, correctors):
    scheduler = DiscreteDDIMScheduler(corrector_steps=correctors)
    pipe = loaded(gemma(scheduler), gemma(scheduler, None), tmp_path)
    levels = watch(pipe.model, "toy")
    denoise(pipe)
    corrected = [1.0, 2 / 3, 2 / 3, 1 / 3, 1 / 3]  # 5 forwards a canvas: 3 steps, the first 2 corrected once
    canvas = corrected if correctors else [1.0, 0.8, 0.6, 0.4, 0.2]
    assert levels == [[pytest.approx(level)] for level in 2 * canvas]


def test_gemma_saves_loads_and_unloads(tmp_path):
    scheduler = EntropyBoundScheduler(entropy_bound=6.0)
    bare = gemma(scheduler, None)
    before = denoise(bare)
    pipe = loaded(gemma(scheduler), bare, tmp_path)
    changed = denoise(pipe)
    assert not torch.equal(changed, before)
    assert pipe.model.peft_config["toy"].noise_convention == "corrupted_share"
    pipe.set_adapters("toy", 0.0)
    assert torch.equal(denoise(pipe), before)
    pipe.delete_adapters("toy")
    assert torch.equal(denoise(pipe), before)


def test_gemma_refuses_what_has_no_level(tmp_path):
    pipe = loaded(gemma(EntropyBoundScheduler()), gemma(EntropyBoundScheduler(), None), tmp_path)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="λ can't be told with FlowMatchEulerDiscreteScheduler: choose one of Block"):
        denoise(pipe)
    source = gemma(EntropyBoundScheduler(), targets=r"model\.(encoder\.language_model|decoder)\..*\.o_proj")
    other = loaded(source, gemma(EntropyBoundScheduler(), None), tmp_path / "other")
    with pytest.raises(ValueError, match=r"adapts 'model\.encoder\..*', which reads the text before the canvas once"):
        denoise(other)
