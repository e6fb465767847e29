"""dream-tiny as shipped: of Dream's kind, whole, and as good as its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_llada_tiny import Arguments, main
from tiny_text import tasks
from tiny_text.evaluation import exact_match_by_family

from nara_diffusion.dllm import generate, load_backbone
from nara_diffusion.dllm.models.shifted_logits import ShiftedQwen2ForCausalLM

MODEL = Path(__file__).parents[2] / "examples" / "assets" / "dream-tiny"


def test_it_is_a_shifted_qwen2_with_attention_in_both_directions() -> None:
    model, tokenizer = load_backbone(str(MODEL))
    assert isinstance(model, ShiftedQwen2ForCausalLM)
    assert (model.config.is_causal, model.config.shifted_logits) == (False, True)
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model.num_parameters() == json.loads((MODEL / "results.json").read_text())["parameters"]
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    changed = tokens.clone()
    changed[0, -1] = 11
    # the first position's logits depend on the last token, which a causal model couldn't do
    assert (model(tokens).logits[0, 0] - model(changed).logits[0, 0]).abs().max() > 1e-3


def test_the_card_s_example_holds() -> None:
    model, tokenizer = load_backbone(str(MODEL))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "reverse: planet"}],
        add_generation_prompt=True,
        return_dict=False,
        return_tensors="pt",
    )
    tokens = generate(model, prompt, gen_length=12)
    assert tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True) == "tenalp"


@pytest.mark.parametrize("family", ["reverse", "letter_counting"])
def test_new_questions_are_answered_as_the_card_says(family: str) -> None:
    model, tokenizer = load_backbone(str(MODEL))
    said = json.loads((MODEL / "results.json").read_text())["exact_match"][family]
    score = exact_match_by_family(model, tokenizer, {family: tasks.questions(family, 64, seed=5)})
    assert score[family] == pytest.approx(said, abs=4 * (said * (1 - said) / 64) ** 0.5)  # four standard errors


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--family is 'bert', expected one of llada, dream"):
        main(Arguments(output_dir=tmp_path, family="bert"))
