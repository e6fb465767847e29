"""LLaDA2Pipeline: λ of each forward against a count by hand, and methods for adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    BlockRefinementScheduler,
    LLaDA2Pipeline,
)
from peft import inject_adapter_in_model
from torch import Tensor

from nara_diffusion import StrengthSchedule, noise_level, set_noise_source
from nara_diffusion.noise.signals import NoiseSignals
from tests.diffusers.reference import ROUNDING, updates_at, watch, write
from tests.helpers.adapted import disturb, nara_config, relative_error

from .calls import inputs_of, loaded

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
MASK = 49


def llada2(tiny_llama: Any, name: str | None = "toy", **changes: Any) -> Any:
    """The pipeline with a disturbed adapter; LLaDA 2 itself is remote code, a bidirectional Llama has its forward."""
    pipe = LLaDA2Pipeline(copy.deepcopy(tiny_llama), BlockRefinementScheduler(), None)
    pipe.mask_token_id, pipe.eos_token_id = MASK, None
    pipe.set_progress_bar_config(disable=True)
    if name is not None:
        inject_adapter_in_model(nara_config(target_modules=["q_proj", "down_proj"], **changes), pipe.model, name)
        disturb(pipe.model)
        pipe.model.eval()
    return pipe


def generate(pipe: Any, **changes: Any) -> Tensor:
    prompts = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
    options = {
        "gen_length": 11, "block_length": 4, "num_inference_steps": 3, "threshold": 0.05, "editing_threshold": 0.02,
        "max_post_steps": 3, "temperature": 1.0, "output_type": "seq",
    }  # fmt: skip
    return pipe(input_ids=prompts, generator=torch.Generator().manual_seed(4), **{**options, **changes}).sequences


@pytest.mark.parametrize("changes", [{}, {"threshold": 2.0, "editing_threshold": None}, {"block_length": 8}], ids=str)
def test_llada2_counts_the_masks_of_the_active_block(tiny_llama, tmp_path, changes):
    pipe = loaded(llada2(tiny_llama), llada2(tiny_llama, None), tmp_path)
    seen, levels = inputs_of(pipe.model, "input_ids"), watch(pipe.model, "toy")
    for _ in range(2):  # a second call begins anew
        generate(pipe, **changes)
    length = changes.get("block_length", 4)
    expected = []
    for tokens in seen:
        end = tokens.shape[1]
        first = max(5, end - length)  # of the answer in the block
        expected.append([float((row[first:] == MASK).sum()) / (end - first) for row in tokens])
    assert len(levels) == len(expected) > 12
    for found, wanted in zip(levels, expected, strict=True):
        assert [*found, *found][: len(wanted)] == pytest.approx(wanted, abs=1e-6)
    assert expected[0] == [1.0, 1.0]
    assert 0.0 in {level for row in expected for level in row} or changes.get("threshold") == 2.0  # edited, no masks
    assert len({round(level, 3) for row in expected for level in row}) > 2


def test_llada2_runs_with_the_core_of_each_samples_level(tiny_llama, tmp_path):
    pipe = loaded(llada2(tiny_llama), llada2(tiny_llama, None), tmp_path)
    plain = copy.deepcopy(tiny_llama).eval()
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    errors: list[float] = []
    pipe.model.peft_config["default"] = pipe.model.peft_config["toy"]
    state = {key.replace(".toy", ".default"): t for key, t in pipe.model.state_dict().items()}

    class Renamed:
        peft_config = pipe.model.peft_config

        def state_dict(self) -> Any:
            return state

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        for row, tokens in enumerate(args[0]):
            first = max(5, len(tokens) - 4)
            level = float((tokens[first:] == MASK).sum()) / (len(tokens) - first)
            write(plain, base, updates_at(Renamed(), level))  # type: ignore[arg-type]
            with torch.no_grad():
                found = plain(tokens[None], attention_mask=kwargs["attention_mask"][row : row + 1],
                              position_ids=kwargs["position_ids"][row : row + 1]).logits  # fmt: skip
            errors.append(relative_error(output.logits[row : row + 1], found))

    pipe.model.register_forward_hook(after, with_kwargs=True)
    generate(pipe)
    assert len(errors) > 12
    assert max(errors) < ROUNDING


def test_llada2_saves_loads_sets_and_unloads(tiny_llama, tmp_path):
    bare = llada2(tiny_llama, None)
    before, keys = generate(bare), set(bare.model.state_dict())
    pipe = loaded(llada2(tiny_llama), bare, tmp_path)
    changed = generate(pipe)
    assert not torch.equal(changed, before)
    assert pipe.model.peft_config["toy"].noise_convention == "block_masked_share"
    pipe.set_adapters("toy", 0.0)
    assert torch.equal(generate(pipe), before)
    pipe.set_adapters("toy", StrengthSchedule([(0.0, 1.0)]))
    assert torch.equal(generate(pipe), changed)
    pipe.set_adapters(["toy"])
    assert pipe.get_active_adapters() == ["toy"]
    pipe.disable_lora()
    assert torch.equal(generate(pipe), before)
    pipe.enable_lora()
    assert torch.equal(generate(pipe), changed)
    pipe.save_nara_weights(tmp_path / "again", adapter_name="toy")
    other = llada2(tiny_llama, None)
    other.load_nara_weights(tmp_path / "again")
    assert torch.equal(generate(other), changed)
    pipe.unload_nara_weights()
    assert torch.equal(generate(pipe), before)
    assert set(pipe.model.state_dict()) == keys
    with pytest.raises(ValueError, match="There is no adapter 'toy': the model has none"):
        pipe.set_adapters("toy")


def test_llada2_without_a_mask_token_or_with_another_definition_says_so(tiny_llama, tmp_path):
    pipe = loaded(llada2(tiny_llama), llada2(tiny_llama, None), tmp_path)
    pipe.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id is not known, by which λ is counted"):
        generate(pipe)
    assert generate(pipe, mask_token_id=MASK).shape[0] == 2
    source = llada2(tiny_llama, noise_convention="masked_share")
    other = loaded(source, llada2(tiny_llama, None), tmp_path / "other")
    with pytest.raises(ValueError, match="trained with λ defined as 'masked_share', but the source of λ tells 'block_"):
        generate(other)
    told = watch(other.model, "toy")
    with noise_level(other.model, 0.25):  # beats all
        generate(other)
    assert told
    assert all(level == [0.25] for level in told)

    class Half:
        convention = "masked_share"

        def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
            return NoiseSignals(torch.full((1,), 0.5))

    set_noise_source(other.model, Half())
    levels = watch(other.model, "toy")
    generate(other)
    assert all(level == [0.5] for level in levels)


def test_a_forward_outside_of_the_pipeline_still_needs_a_level(tiny_llama, tmp_path):
    pipe = loaded(llada2(tiny_llama), llada2(tiny_llama, None), tmp_path)
    generate(pipe)
    with pytest.raises(ValueError, match=r"noise_level\("):
        pipe.model(torch.tensor([[1, 2, 3]]))


def test_a_call_within_a_call_is_refused_since_it_would_read_the_others_level(tiny_llama, tmp_path):
    pipe = loaded(llada2(tiny_llama), llada2(tiny_llama, None), tmp_path)
    expected = generate(pipe)

    def again(*_: Any) -> dict[str, Tensor]:
        generate(pipe, block_length=8)
        return {}

    with pytest.raises(ValueError, match="another call of a pipeline with this model is running"):
        generate(pipe, callback_on_step_end=again)
    assert torch.equal(generate(pipe), expected)
