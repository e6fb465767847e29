"""Preferences are DPO on likelihood bounds: by hand in float64, with each masked row in a forward alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from nara_diffusion import noise_level
from nara_diffusion.dllm import AnswerCollator, encode_records, log_likelihood, read_records
from nara_diffusion.dllm.batches import with_longest
from nara_diffusion.dllm.preference_loss import preference_loss
from nara_diffusion.dllm.record_forms import PAIR_FIELDS
from tests.acceptance._text import END, PAD, adapted_pair, backbone, nara
from tests.helpers.answers import MASK, VOCABULARY, inputs_of
from tests.helpers.word_rows import BOT, TOKENIZER, TURN, USER

PAIRS = [([5, 9, 11], [4, 6, 20, 8, END], [7, 21, END]), ([12, 4], [9, 25, END], [16, 10, 17, 3, 3, 8, END])]


def pairs(index: int | None = None) -> dict[str, Any]:
    """A batch of the chosen rows and the rejected ones, of all pairs or of one."""
    chosen_pairs = list(enumerate(PAIRS)) if index is None else [(index, PAIRS[index])]
    rows = [(i, prompt, pair[which]) for which in (0, 1) for i, (prompt, *pair) in chosen_pairs]
    width = max(len(prompt + answer) for _, prompt, answer in rows)
    return {
        "input_ids": torch.tensor([p + a + [PAD] * (width - len(p + a)) for _, p, a in rows]),
        "prompt_lengths": [len(prompt) for _, prompt, _ in rows],
        "answer_lengths": [len(answer) for *_, answer in rows],
        "sample_indices": [i for i, *_ in rows],
    }


def test_preference_loss_equals_single_forwards_in_float64() -> None:
    """The rows that the model was given tell masks and λ. The reference is a model that never had an adapter."""
    model, by_hand = adapted_pair(VOCABULARY)
    base, draws, beta = backbone(VOCABULARY).double(), 3, 0.4
    with inputs_of(model) as seen:
        loss = preference_loss(model, **pairs(), seed=2, beta=beta, draws=draws)
    reference, policy = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert reference == policy
    assert len(policy) == 2 * 2 * draws
    bounds, plain = [], []
    for row, ids in enumerate(policy):
        which, pair = divmod(row // draws, 2)
        prompt, answer = PAIRS[pair][0], PAIRS[pair][1 + which]
        text = prompt + answer
        masked = [j for j, token in enumerate(ids) if token == MASK]
        assert set(masked) <= set(range(len(prompt), len(text)))
        level = len(masked) / len(answer)
        adapted, bare = by_hand([ids[: len(text)]], level)[0], base(torch.tensor([ids[: len(text)]])).logits[0]
        with noise_level(model, level):
            trained = model(torch.tensor([ids[: len(text)]])).logits[0]

        def ratio(logits: Tensor, bare: Tensor = bare, text: Any = text, masked: Any = masked) -> Tensor:
            gain = logits.double().log_softmax(-1) - bare.detach().log_softmax(-1)
            return sum(gain[j, text[j]] for j in masked)  # pyright: ignore[reportReturnType]

        bounds.append(ratio(adapted) / level)
        plain.append(ratio(trained) / level)
    chosen, rejected = torch.stack(bounds).unflatten(0, (2, 2, draws)).mean(2)
    expected = beta * (chosen - rejected)
    assert expected.abs().min() > 0.05
    torch.testing.assert_close(loss.margin.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.per_sample.double(), -F.logsigmoid(expected), rtol=1e-4, atol=1e-5)
    assert loss.accuracy.tolist() == (expected > 0).double().tolist()
    chosen, rejected = torch.stack(plain).unflatten(0, (2, 2, draws)).mean(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    slow = torch.autograd.grad(-F.logsigmoid(beta * (chosen - rejected)).mean(), trained)
    for mine, theirs in zip(torch.autograd.grad(loss.loss, trained), slow, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_preference_draws_are_paired_and_spread() -> None:
    """Draws have λ₁ + k / K, a pair alone gets the same, and answers of one length get the same masks."""
    model, draws = nara(backbone(VOCABULARY)), 4
    levels = torch.tensor([0.31, 0.91, 0.31, 0.91])
    with inputs_of(model) as seen:
        both = preference_loss(model, **pairs(), seed=2, draws=draws, noise_level=levels)
        alone = preference_loss(model, **pairs(1), seed=2, draws=draws, noise_level=levels[1::2])
    torch.testing.assert_close(alone.margin, both.margin[1:])
    assert both.noise_level.tolist() == levels[:2].tolist()
    counts = [ids.count(MASK) for ids in seen[: 4 * draws]]
    shares = [[0.31, 0.56, 0.81, 0.06], [0.91, 0.16, 0.41, 0.66]]
    sizes = [len(answer) for which in (1, 2) for answer in (PAIRS[0][which], PAIRS[1][which])]
    assert counts == [
        math.ceil(share * n) for n, pair in zip(sizes, (0, 1, 0, 1), strict=True) for share in shares[pair]
    ]


def test_untrained_adapter_has_loss_log_two() -> None:
    model = nara(backbone(VOCABULARY))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    loss = preference_loss(model, **pairs(), seed=0)
    assert loss.per_sample.tolist() == pytest.approx([math.log(2)] * 2)
    assert loss.margin.abs().max() == 0
    assert loss.accuracy.tolist() == [0.5, 0.5]


def test_many_draws_approach_the_likelihood() -> None:
    """The margin is β times the difference of the bounds that `log_likelihood` sums over all masks."""
    model, batch, bounds = nara(backbone(VOCABULARY)), pairs(), []
    rows = {name: batch[name] for name in ("input_ids", "prompt_lengths", "answer_lengths")}
    with torch.no_grad():
        margin = preference_loss(model, **batch, seed=3, beta=0.5, draws=400).margin.double()
        bounds.append(log_likelihood(model, **rows, samples=200))
        with model.disable_adapter():
            bounds.append(log_likelihood(model, **rows, samples=200))
    chosen, rejected = (bounds[0] - bounds[1]).unflatten(0, (2, -1))
    torch.testing.assert_close(margin, 0.5 * (chosen - rejected), rtol=0, atol=0.4)


# ------------------------------------------------------------------------------- records


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, ASKED = turn("system", "w5"), turn("user", "w6")
GOOD, BAD = turn("assistant", "w7 w8"), turn("assistant", "w9")
READ = {"turns": [], "instruction": "w6", "input": "", "output": "w7 w8", "answer": "w7 w8", "rejected": "w9"}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({"prompt": "w6", "chosen": "w7 w8", "rejected": "w9"}, {}),
    "messages": ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, {}),
    "no prompt": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score_chosen": 7.5}, {}),
    "prompt twice": (
        {"prompt": "w6", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
        {},
    ),
    "text and message": ({"prompt": "w6", "chosen": [GOOD], "rejected": [BAD]}, {}),
    "messages and texts": ({"prompt": [ASKED], "chosen": "w7 w8", "rejected": "w9"}, {}),
    "system": ({"prompt": [SYSTEM, ASKED], "chosen": [GOOD], "rejected": [BAD]}, {"turns": [SYSTEM, ASKED]}),
}


def read(folder: Path, *records: dict[str, Any], objective: str = "dpo") -> Dataset:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_records(path, PAIR_FIELDS if objective == "dpo" else {})


@pytest.mark.parametrize("form", FORMS)
def test_preference_record_is_read_in_each_form(tmp_path: Path, form: str) -> None:
    record, changes = FORMS[form]
    assert list(read(tmp_path, record)) == [READ | changes]


def test_preference_rows_reach_the_loss_in_pairs(tmp_path: Path) -> None:
    records = read(
        tmp_path, FORMS["system"][0], FORMS["texts"][0], {"prompt": "w6", "chosen": "w7", "rejected": "w8 " * 9}
    )
    encoded = encode_records(records, TOKENIZER, max_length=12)
    rows = [dict(row) for row in encoded.rows]
    opened = [USER, 6, TURN, BOT]
    assert rows[1]["input_ids"] == [*opened, 7, 8, TURN, END]
    assert rows[1]["rejected"] == [*opened, 9, TURN, END]
    assert rows[2]["rejected"] == [*opened, *[8] * 8]  # cut
    assert [row["length"] for row in rows] == [encoded.rows[0]["length"], 8, 15]
    assert encoded.longest == 12
    collator = AnswerCollator(END, "gen_length", gen_length=6)
    batch = collator([row | {"position": 4 + i} for i, row in enumerate(rows[1:])])
    assert batch["sample_indices"] == [4, 5, 4, 5]
    assert batch["prompt_lengths"] == [4] * 4
    assert batch["answer_lengths"] == [6, 6, 6, 8]
    texts = [rows[1]["input_ids"], rows[2]["input_ids"], rows[1]["rejected"], rows[2]["rejected"]]
    assert batch["input_ids"].tolist() == [text + [END] * (12 - len(text)) for text in texts]
    assert collator.row_lengths(encoded.rows).tolist()[1:] == [10, 12]
    assert with_longest(encoded.rows, 3, False)["longest"][:] == [12] * 3
    other = encode_records(read(tmp_path, FORMS["texts"][0] | {"rejected": "w8"}), TOKENIZER, max_length=12)
    same = encode_records(read(tmp_path, FORMS["texts"][0]), TOKENIZER, max_length=12)
    assert other.digest() != same.digest()


@pytest.mark.parametrize(
    ("record", "objective", "message"),
    [
        (
            {"prompt": "w6", "completion": "w7"},
            "dpo",
            "fields prompt, completion; objective dpo needs chosen and rejected",
        ),
        ({"chosen": "w6 w7", "rejected": "w6 w8"}, "dpo", "its instruction, .* is missing"),
        (
            {"prompt": "w6", "chosen": "w7", "rejected": ""},
            "dpo",
            "its rejected, field 'rejected', is missing or empty",
        ),
        ({"chosen": [SYSTEM, ASKED, GOOD], "rejected": [ASKED, BAD]}, "dpo", "differ before the last one"),
        (FORMS["texts"][0], "llada", "a preference pair: give --objective dpo"),
    ],
)
def test_wrong_preference_record_is_refused(tmp_path: Path, record: Any, objective: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, record, objective=objective)
    assert "\n" not in str(error.value)
