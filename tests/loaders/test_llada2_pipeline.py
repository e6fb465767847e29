"""load_nara_weights on LLaDA2Pipeline: its λ, its block mask, and what is left after unloading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from peft import get_peft_model
from peft.functional import set_adapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import load_backbone
from nara_diffusion.noise.blocks import BlockNoise
from nara_diffusion.noise.sources import BLOCK_SHARE
from tests.acceptance._text import nara
from tests.helpers.mixtures import LLADA2, MASK, block_seen, write_checkpoint

B = 4  # of the pipeline; the model's own is 8, so that the hook's mask shows
PROMPT = torch.randint(6, MASK, (2, 6), generator=torch.Generator().manual_seed(1))
RUN = {"gen_length": 7, "block_length": B, "num_inference_steps": 2, "threshold": 0.4, "editing_threshold": None}
RUN |= {"output_type": "seq", "mask_token_id": MASK, "eos_early_stop": False}
TARGETS = ["q_proj", "k_proj", "v_proj"]


def fresh(folder: Path) -> Any:
    return load_backbone(str(folder), dtype=torch.float64, experts_implementation="eager")[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", LLADA2 | {"block_length": 8})
    return tmp_path / "base"


def adapter(base: Path, folder: Path, **changes: Any) -> Any:
    options = {"noise_convention": BLOCK_SHARE, "target_modules": TARGETS}
    model = nara(fresh(base), **{**options, **changes})
    model.save_pretrained(folder)
    return model


def pipeline(base: Path) -> Any:
    pipe = LLaDA2Pipeline(model=fresh(base), scheduler=BlockRefinementScheduler(), tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_hand(model: Any) -> tuple[Tensor, list[list[float]]]:
    """The sequences of the same run, block by block, with λ of each block given; and λ of the active block."""
    scheduler = BlockRefinementScheduler()
    scheduler.set_timesteps(2, block_length=B)
    prompt, end, levels = PROMPT.shape[1], PROMPT.shape[1] + RUN["gen_length"], []
    text = torch.full((2, 16), MASK)
    text[:, :prompt] = PROMPT
    for start in range(prompt // B * B, end, B):
        places = [i for i in range(start, start + B) if prompt <= i < end]
        for step in range(2):
            if not (text[:, start : start + B] == MASK).any():
                break
            share = (text[:, places] == MASK).double().mean(1)
            level = torch.zeros(2, start // B + 1)
            level[:, -1] = share
            levels.append(share.tolist())
            width = start + B
            seen = block_seen(width, B) & (torch.arange(width) < end) | torch.eye(width, dtype=torch.bool)
            with torch.no_grad(), noise_level(model, level):
                logits = model(text[:, :width], attention_mask=seen[None, None]).logits
            options = {"mask_token_id": MASK, "threshold": 0.4, "temperature": 0.0}
            output = scheduler.step(logits[:, start:], step, text[:, start:width], **options)
            text[:, start:width] = output.prev_sample
    return text[:, prompt:end], levels


def test_adapted_pipeline_samples_blocks_at_their_levels(base: Path, tmp_path: Path) -> None:
    model, pipe = adapter(base, tmp_path / "adapter"), pipeline(base)
    pipe.load_nara_weights(tmp_path / "adapter")
    expected, levels = by_hand(model)
    levels_of_calls: list[list[float]] = []
    source = pipe.model.lora_core.finder.forwards.source
    call = type(source).__call__

    class Watched(type(source)):
        def __call__(self, *args: Any) -> Tensor:
            level = call(self, *args)
            assert not level[:, :-1].any()
            levels_of_calls.append(level[:, -1].tolist())
            return level

    source.__class__ = Watched
    for _ in range(2):  # a second run begins anew
        levels_of_calls.clear()
        assert pipe(input_ids=PROMPT, **RUN).sequences.equal(expected)
        # the pipeline calls the model once more for a block without masks
        seen = [level for level in levels_of_calls if any(level)]
        assert seen == [pytest.approx(level) for level in levels if any(level)]
    assert len({tuple(level) for level in levels_of_calls}) > 2


def test_unloaded_pipeline_samples_as_before_loading(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    pipe = pipeline(base)
    original = pipe(input_ids=PROMPT, **RUN).sequences
    pipe.load_nara_weights(tmp_path / "adapter")
    assert not pipe(input_ids=PROMPT, **RUN).sequences.equal(original)
    pipe.unload_nara_weights()
    assert pipe(input_ids=PROMPT, **RUN).sequences.equal(original)


def test_static_adapter_runs_under_the_block_mask_too(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter", core_type="constant", noise_convention=None)
    pipe, masks = pipeline(base), []
    pipe.load_nara_weights(tmp_path / "adapter")
    layer = pipe.model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, __, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    pipe(input_ids=PROMPT[:, :4], **{**RUN, "gen_length": 8})
    assert [mask.shape[-1] for mask in masks[::2]] == [8, 12]
    for mask in masks:
        assert mask[0, 0].equal(block_seen(mask.shape[-1], B))


def test_model_without_blocks_keeps_its_attention(tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama.config.is_causal = False
    pipe = LLaDA2Pipeline(model=tiny_llama, scheduler=BlockRefinementScheduler(), tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    run = {"input_ids": PROMPT.clamp(max=MASK - 1), **RUN, "mask_token_id": 49}
    original = pipe(**run).sequences
    untrained = get_peft_model(copy.deepcopy(tiny_llama), NaraConfig(target_modules=TARGETS, core_type="identity"))
    untrained.save_pretrained(tmp_path)
    pipe.load_nara_weights(tmp_path)
    assert pipe(**run).sequences.equal(original)


def test_forward_outside_a_run_asks_for_the_level(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    pipe = pipeline(base)
    pipe.load_nara_weights(tmp_path / "adapter")
    with pytest.raises(ValueError, match="outside a run of LLaDA2Pipeline"):
        pipe.model(PROMPT)


def test_adapter_enabled_inside_a_block_has_its_level(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    pipe, levels = pipeline(base), []
    pipe.load_nara_weights(tmp_path / "adapter")
    layers = [adapted_layer for adapted_layer in pipe.model.modules() if hasattr(adapted_layer, "lora_variant")]
    for layer in layers:
        layer.enable_adapters(False)
    make = pipe.model.lora_core.deviations_of
    pipe.model.lora_core.deviations_of = lambda names, level: levels.append(level) or make(names, level)

    def enable(*_: Any) -> dict[str, Tensor]:
        for layer in layers:
            layer.enable_adapters(True)
        return {}

    run = RUN | {"gen_length": B, "num_inference_steps": B, "threshold": 2.0}  # a token at each step
    pipe(input_ids=PROMPT[:, :B], callback_on_step_end=enable, **run)
    expected = [[0, share, 0, share] for share in (0.75, 0.5, 0.25)]
    assert [level.tolist() for level in levels if level is not None and level.any()] == expected


def test_forward_after_a_run_is_independent_of_it(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    pipe = pipeline(base)
    pipe.load_nara_weights(tmp_path / "adapter")
    pipe(input_ids=PROMPT, **RUN)
    text = torch.full((2, 8), MASK)
    places, real = torch.arange(8).expand(2, -1), torch.ones(2, 8, dtype=torch.long)
    for arguments in ({}, {"attention_mask": real}, {"attention_mask": real, "position_ids": places}):
        with pytest.raises(ValueError, match="outside a run of LLaDA2Pipeline"):
            pipe.model(text, **arguments)
    pipe.scheduler = BlockRefinementScheduler()
    places, real = torch.arange(16).expand(2, -1), torch.ones(2, 16, dtype=torch.long)
    with pytest.raises(ValueError, match="outside a run of LLaDA2Pipeline"):  # as wide as the run's last forward
        pipe.model(text.repeat(1, 2), attention_mask=real, position_ids=places)


def test_pipelines_sharing_a_model_have_their_own_levels(base: Path, tmp_path: Path) -> None:
    model, pipe = adapter(base, tmp_path / "adapter"), pipeline(base)
    other = LLaDA2Pipeline(model=pipe.model, scheduler=BlockRefinementScheduler(), tokenizer=None)
    other.set_progress_bar_config(disable=True)
    settings = RUN | {"block_length": 2 * B}
    other(input_ids=PROMPT, **settings)  # a run before the adapter
    pipe.load_nara_weights(tmp_path / "adapter", adapter_name="first")
    other.load_nara_weights(tmp_path / "adapter", adapter_name="second")
    set_adapter(pipe.model, "first")
    expected, _ = by_hand(model)
    of_whole = None
    for _ in range(2):
        assert pipe(input_ids=PROMPT, **RUN).sequences.equal(expected)
        actual = other(input_ids=PROMPT, **settings).sequences
        assert of_whole is None or actual.equal(of_whole)
        of_whole = actual
    alone = pipeline(base)
    alone.load_nara_weights(tmp_path / "adapter")
    assert alone(input_ids=PROMPT, **settings).sequences.equal(of_whole)


@pytest.mark.parametrize("first_step", [0, 3])  # at step 3 both runs see as many positions
def test_interleaved_runs_have_their_own_levels(base: Path, tmp_path: Path, first_step: int) -> None:
    adapter(base, tmp_path / "adapter")
    pipe, settings, inner = pipeline(base), RUN | {"block_length": 2 * B, "gen_length": 10}, []
    other = LLaDA2Pipeline(model=pipe.model, scheduler=BlockRefinementScheduler(), tokenizer=None)
    other.set_progress_bar_config(disable=True)
    pipe.load_nara_weights(tmp_path / "adapter", adapter_name="first")
    other.load_nara_weights(tmp_path / "adapter", adapter_name="second")
    set_adapter(pipe.model, "first")
    alone, of_other = pipe(input_ids=PROMPT, **RUN).sequences, other(input_ids=PROMPT, **settings).sequences

    def run_other(_: Any, step: int, *__: Any) -> dict[str, Tensor]:
        if step >= first_step:
            inner.append(other(input_ids=PROMPT, **settings).sequences)
        return {}

    assert pipe(input_ids=PROMPT, callback_on_step_end=run_other, **RUN).sequences.equal(alone)
    assert inner
    assert all(levels_of_call.equal(of_other) for levels_of_call in inner)
    same = LLaDA2Pipeline(**pipe.components)  # with the same scheduler
    same.load_nara_weights(tmp_path / "adapter", adapter_name="third")
    set_adapter(pipe.model, "third")
    assert same(input_ids=PROMPT, **RUN).sequences.equal(alone)


def test_later_forwards_read_no_value_from_device(base: Path) -> None:
    class WithoutReads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    model, scheduler = fresh(base), BlockRefinementScheduler()
    scheduler.set_timesteps(2, block_length=B)
    source = BlockNoise(lambda: [scheduler])
    ids = torch.full((2, B), MASK)
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": ids}
    source(model, (ids,), inputs)
    with WithoutReads():
        level = source(model, (ids.where(torch.arange(B) > 0, 8),), inputs)
        assert source.with_block_mask(model, (ids,), inputs) is not None
    assert level.tolist() == [[0.75], [0.75]]


def test_mask_of_earlier_run_belongs_to_new_run(base: Path) -> None:
    model, scheduler = fresh(base), BlockRefinementScheduler()
    source, ids = BlockNoise(lambda: [scheduler]), torch.full((2, 2 * B), MASK)
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": ids}
    for blocks in (2, 1):
        scheduler.set_timesteps(2, block_length=2 * B // blocks)
        assert source(model, (ids,), inputs).shape == (2, blocks)


def test_answer_begins_at_first_mask_of_any_row(base: Path) -> None:
    model, scheduler = fresh(base), BlockRefinementScheduler()
    scheduler.set_timesteps(2, block_length=B)
    ids = torch.tensor([[7, 8, 9, MASK], [7, MASK, 9, MASK], [7, 8, 9, MASK]])  # a prompt with a gap
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(B).expand(3, -1)}
    level = BlockNoise(lambda: [scheduler])(model, (ids,), inputs)
    assert level.tolist() == [[pytest.approx(1 / 3)], [pytest.approx(2 / 3)], [pytest.approx(1 / 3)]]


def test_adapter_of_another_definition_is_refused_at_loading(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(file.read_text().replace(BLOCK_SHARE, "masked_share"))
    pipe = pipeline(base)
    keys = set(pipe.model.state_dict())
    with pytest.raises(ValueError, match="'masked_share', but the source of λ gives 'masked_share_of_block'"):
        pipe.load_nara_weights(tmp_path / "adapter")
    assert set(pipe.model.state_dict()) == keys
    with pytest.raises(ValueError, match="'masked_share_of_block'"):  # nor is it made
        adapter(base, tmp_path / "other", noise_convention="masked_share")


def test_adapter_without_definition_takes_that_of_blocks(base: Path) -> None:
    model = nara(fresh(base), noise_convention=None, target_modules=TARGETS)
    assert model.peft_config["default"].noise_convention == BLOCK_SHARE
