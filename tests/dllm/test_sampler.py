"""`generate` against the plain-loop reference."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    Qwen2Config,
    RobertaConfig,
    RobertaForMaskedLM,
)

from nara_diffusion import noise_level
from nara_diffusion.dllm import GenerationStep, generate
from nara_diffusion.dllm.models.shifted_logits import ShiftedQwen2ForCausalLM

from .generation_reference import reference_generate

MASK = 49
PROMPT_LENGTHS = [3, 7, 5]
ENDS = tuple(range(10, 22))  # many, so that a random model meets one


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(1))


def draws(row: int, forwards: int, block: int, *, temperature: float, remasking: str) -> list[dict[str, torch.Tensor]]:
    """The uniform numbers of one row's steps, in the order in which the sampler takes them from the row's stream."""
    seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seeds[row].item())
    steps = []
    for _ in range(forwards):
        step = {}
        if temperature > 0:
            step["gumbel"] = torch.rand((block, MASK + 1), dtype=torch.float64, generator=generator)
        if remasking == "random":
            step["random"] = torch.rand((block,), generator=generator)
        steps.append(step)
    return steps


CASES = [
    {"gen_length": 8, "steps": 8, "block_length": 4},
    {"gen_length": 8, "steps": 4, "block_length": 8},
    {"gen_length": 12, "steps": 6, "block_length": 4, "cfg_scale": 1.5},
    {"gen_length": 8, "steps": 6, "block_length": 4, "remasking": "random"},
    {"gen_length": 8, "steps": 8, "block_length": 4, "temperature": 0.7},
    {"gen_length": 9, "steps": 6, "block_length": 3, "temperature": 1.0, "remasking": "random", "cfg_scale": 0.5},
    {"gen_length": 8, "steps": 16, "block_length": 4},
    {"gen_length": 8, "steps": None, "block_length": 4, "confidence_threshold": 0.05},
    {"gen_length": 6, "steps": None, "block_length": 6, "confidence_threshold": 0.03, "temperature": 0.5},
]


@pytest.mark.parametrize("ends", [(), ENDS], ids=["no-eos", "eos"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{value}" for value in case.values()))
def test_equals_the_plain_loops_in_float64(double_llama: LlamaForCausalLM, prompts: torch.Tensor, case, ends) -> None:
    result = generate(
        double_llama,
        prompts,
        **case,
        prompt_lengths=PROMPT_LENGTHS,
        generator=torch.Generator().manual_seed(5),
        eos_token_id=ends or None,
        stop_at_eos=bool(ends),
        return_stats=True,
    )
    _check(result, prompts, case, ends, lambda tokens, level: double_llama(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("kind", [torch.int32, torch.uint16, torch.uint8], ids=str)
def test_ids_of_any_integer_type_give_the_same_tokens(
    double_llama: LlamaForCausalLM, prompts: torch.Tensor, kind: torch.dtype
) -> None:
    settings: dict = {"gen_length": 4, "prompt_lengths": PROMPT_LENGTHS, "eos_token_id": ENDS}
    found = generate(double_llama, prompts.to(kind), **settings)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.int64
    torch.testing.assert_close(found, generate(double_llama, prompts, **settings), rtol=0, atol=0)


@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=["cfg", "threshold"])
def test_each_sample_is_denoised_at_its_own_noise_level(adapted_llama: PeftModel, prompts: torch.Tensor, case) -> None:
    model = adapted_llama

    def logits_of(tokens: list[int], level: float) -> torch.Tensor:
        with noise_level(model, level):
            return model(torch.tensor([tokens])).logits[0].double()

    result = generate(model, prompts, **case, prompt_lengths=PROMPT_LENGTHS, eos_token_id=ENDS, return_stats=True)
    _check(result, prompts, case, ENDS, logits_of)


@pytest.mark.parametrize("kind", ["dream", "bert", "roberta"])
def test_shifted_models_and_encoders_are_sampled_alike(prompts: torch.Tensor, kind: str) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    if kind == "dream":
        config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
        config.is_causal = False
        model = ShiftedQwen2ForCausalLM(config)
    elif kind == "bert":
        model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=19))
    else:
        config = RobertaConfig(**sizes, num_attention_heads=4, max_position_embeddings=20, pad_token_id=0)
        model = RobertaForMaskedLM(config)
    model = model.double().eval()
    prompts = prompts.clamp(min=2)  # 0 is padding, by which RoBERTa counts positions
    options = {"prompt_lengths": PROMPT_LENGTHS, "mask_token_id": MASK, "eos_token_id": ENDS}
    result = generate(model, prompts, **CASES[2], **options, return_stats=True)
    _check(result, prompts, CASES[2], ENDS, lambda tokens, level: model(torch.tensor([tokens])).logits[0])
    if kind != "dream":
        with pytest.raises(ValueError, match="together 20, and the model has 19 positions"):
            generate(model, prompts, gen_length=13, mask_token_id=MASK)


@torch.no_grad()
def _check(result, prompts: torch.Tensor, case, ends, logits_of) -> None:
    longest = 0
    for row, length in enumerate(PROMPT_LENGTHS):
        prompt = prompts[row, :length].tolist()
        options = {"temperature": case.get("temperature", 0.0), "remasking": case.get("remasking", "low_confidence")}
        steps = draws(row, 40, case["block_length"], **options)
        settings = {key: value for key, value in case.items() if key not in ("confidence_threshold", "steps")}
        answer, levels = reference_generate(
            logits_of,
            prompt,
            **settings,
            steps=case["steps"] or case["gen_length"],
            threshold=case.get("confidence_threshold"),
            mask=MASK,
            ends=ends,
            uniform=lambda kind, number, steps=steps: steps[number][kind],
        )
        assert result.answers[row].tolist() == answer
        assert result.sequences[row, : length + len(answer)].tolist() == prompt + answer
        longest = max(longest, len(levels))
    assert result.forwards == longest


def test_padding_on_either_side_gives_the_same_answers(double_llama: LlamaForCausalLM, prompts: torch.Tensor) -> None:
    options = {"gen_length": 6, "block_length": 3, "return_stats": True}
    expected = generate(double_llama, prompts, prompt_lengths=PROMPT_LENGTHS, **options)
    right = torch.tensor([[1] * length + [0] * (7 - length) for length in PROMPT_LENGTHS])
    left_ids = torch.stack([row.roll(7 - length) for row, length in zip(prompts, PROMPT_LENGTHS, strict=True)])
    for input_ids, attention_mask in ((prompts, right), (left_ids, right.flip(1))):
        result = generate(double_llama, input_ids, attention_mask=attention_mask, **options)
        assert torch.equal(result.sequences, expected.sequences)
    assert expected.prompt_lengths.tolist() == PROMPT_LENGTHS
    padding = torch.arange(13) >= torch.tensor(PROMPT_LENGTHS)[:, None] + 6
    assert (expected.sequences[padding] == double_llama.config.pad_token_id).all()
    assert torch.equal(generate(double_llama, prompts[:, :3], gen_length=6)[:, :3], prompts[:, :3])


def test_the_mask_token_is_never_an_answer(double_llama: LlamaForCausalLM, prompts: torch.Tensor) -> None:
    with torch.no_grad():
        double_llama.model.norm.weight.fill_(1)
        double_llama.lm_head.weight[MASK] = 10 * double_llama.lm_head.weight[3]
        double_llama.lm_head.weight[3] *= -1
    answers = generate(double_llama, prompts, gen_length=6, return_stats=True).answers
    assert (answers != MASK).all()


def test_sampling_stops_when_every_row_has_ended(double_llama: LlamaForCausalLM, prompts: torch.Tensor) -> None:
    options = {"gen_length": 12, "block_length": 4, "return_stats": True}
    everything = [*range(MASK)]  # whatever comes first ends the answer, once it has no mask before it
    result = generate(double_llama, prompts, eos_token_id=everything, **options)
    assert (result.answers == result.answers[:, :1]).all()
    assert result.forwards < 12
    double_llama.config.eos_token_id = everything
    by_configuration = generate(double_llama, prompts, **options)
    assert torch.equal(by_configuration.answers, result.answers)
    assert generate(double_llama, prompts, stop_at_eos=False, **options).forwards == 12


def test_rows_that_are_done_sit_out(double_llama: LlamaForCausalLM, prompts: torch.Tensor) -> None:
    sizes: list[int] = []
    double_llama.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    options = {"prompt_lengths": PROMPT_LENGTHS, "gen_length": 8, "block_length": 4, "temperature": 0.7}
    generator = torch.Generator().manual_seed(5)
    generate(double_llama, prompts, **options, eos_token_id=ENDS, generator=generator)
    assert sizes[0] == 3
    assert min(sizes) < 3
    assert sizes == sorted(sizes, reverse=True)


def test_thresholds_set_the_number_of_forwards(double_llama: LlamaForCausalLM, prompts: torch.Tensor) -> None:
    options = {"gen_length": 8, "block_length": 4, "return_stats": True, "stop_at_eos": False}
    assert generate(double_llama, prompts, confidence_threshold=0.0, **options).forwards == 2
    assert generate(double_llama, prompts, confidence_threshold=1.0, **options).forwards == 8
    one_by_one = generate(double_llama, prompts, confidence_threshold=1.0, **options)
    assert torch.equal(one_by_one.answers, generate(double_llama, prompts, steps=8, **options).answers)


def test_the_head_runs_at_the_block_only_and_elsewhere_all_logits_serve(
    double_llama: LlamaForCausalLM, prompts: torch.Tensor
) -> None:
    shapes = []
    handle = double_llama.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    expected = generate(double_llama, prompts, gen_length=6, block_length=3)
    assert set(shapes) == {(3, 3, MASK + 1)}
    handle.remove()
    double_llama.config.final_logit_softcapping = 50.0  # says that the head isn't the last thing, so it isn't hooked
    assert torch.equal(generate(double_llama, prompts, gen_length=6, block_length=3), expected)


def test_modes_come_back_and_dropout_is_off(adapted_llama: PeftModel, prompts: torch.Tensor) -> None:
    expected = generate(adapted_llama, prompts, gen_length=4)
    for module in adapted_llama.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.9)
    adapted_llama.train()
    adapted_llama.base_model.model.lm_head.eval()
    assert torch.equal(generate(adapted_llama, prompts, gen_length=4), expected)
    assert adapted_llama.training
    assert not adapted_llama.base_model.model.lm_head.training


def test_each_step_is_shown_as_the_model_saw_it_and_left_it(adapted_llama: PeftModel, prompts: torch.Tensor) -> None:
    told, shown = [], []
    read = adapted_llama.register_forward_pre_hook(lambda module, args: told.append((args[0] == MASK).sum(1) / 8))
    arguments = {"gen_length": 8, "block_length": 4, "steps": 4, "stop_at_eos": False}
    result = generate(adapted_llama, prompts, **arguments, on_step_end=shown.append, return_stats=True)
    read.remove()
    assert [step.index for step in shown] == [0, 1, 2, 3]
    torch.testing.assert_close(torch.stack([step.noise_level for step in shown]), torch.stack(told))
    for step, left in zip(shown, [6, 4, 2, 0], strict=True):
        assert step.masked.sum(1).tolist() == [left] * 3
        assert torch.equal(step.masked, step.sequences[:, 7:] == MASK)
        placed = step.sequences != MASK
        assert torch.equal(step.sequences[placed], result.sequences[placed])
    assert torch.equal(result.sequences, generate(adapted_llama, prompts, **arguments))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_step_can_be_changed(double_llama: LlamaForCausalLM, prompts: torch.Tensor, in_place: bool) -> None:
    """A token placed by hand is seen by the model, and one mask less is left to it."""

    def put(step: GenerationStep) -> None:
        if step.index == 0:
            if not in_place:
                step.sequences = step.sequences.clone()
            step.sequences[:, -1] = 3

    arguments = {"gen_length": 3, "steps": 3, "stop_at_eos": False}
    found = generate(double_llama, prompts, **arguments, on_step_end=put, return_stats=True)
    by_hand = torch.cat([prompts, torch.full((3, 3), MASK)], 1)
    for step in range(2):
        logits = double_llama(by_hand).logits
        logits[..., MASK] = float("-inf")
        confidence, tokens = logits.softmax(-1).max(-1)
        at = confidence.where(by_hand == MASK, -1.0).argmax(1)
        by_hand[range(3), at] = tokens[range(3), at]
        if step == 0:
            by_hand[:, -1] = 3
    rest = (by_hand == MASK).any(1)
    assert rest.any() == (found.forwards == 3)
    assert torch.equal(found.sequences[~rest], by_hand[~rest])
    assert (~rest).any()
    assert torch.equal(found.answers[:, -1], torch.full((3,), 3))


def test_sampling_can_be_stopped(tiny_llama: LlamaForCausalLM, prompts: torch.Tensor) -> None:
    def stop(step: GenerationStep) -> None:
        step.stop = step.index == 1

    result = generate(tiny_llama, prompts, gen_length=8, stop_at_eos=False, on_step_end=stop, return_stats=True)
    assert result.forwards == 2
    assert (result.answers == MASK).sum(1).tolist() == [6, 6, 6]
