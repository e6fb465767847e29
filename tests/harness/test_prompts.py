"""Prompts are the tokens that training makes of them, with any tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nara_diffusion.dllm import encode_prompts, encode_records, prompt_text
from nara_diffusion.dllm.data.records import normalized
from nara_diffusion.harness.prompts import encode, encode_pair, shortened, templated

from .conftest import LLADA_TINY

WORDS = "Below is an instruction that describes a task Write response appropriately completes the request Instruction"


@pytest.fixture
def encoder() -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] before a text and [SEP] after it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", *WORDS.split(), "##", ".", ":"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **special)


def test_an_encoders_prompt_opens_and_does_not_close(encoder: PreTrainedTokenizerFast) -> None:
    assert encode(encoder, "one two", has_template=False) == [2, 5, 6] == encode_prompts(encoder, ["one two"])[0]


def test_a_pair_is_the_whole_text_split(encoder: PreTrainedTokenizerFast) -> None:
    assert encode_pair(encoder, "one", " two three", has_template=False) == ([2, 5], [6, 7])
    assert encode_pair(encoder, "one ", "two", has_template=False) == ([2, 5], [6])
    assert encode_pair(encoder, "", "two", has_template=False) == ([2], [6])
    assert encode_pair(encoder, " ", "two", has_template=False) == ([2], [6])
    with pytest.raises(ValueError, match="the continuation ' ' adds no token"):
        encode_pair(encoder, "one", " ", has_template=False)


def test_the_text_stays_whole_where_a_token_reaches_over_the_border() -> None:
    """ ": " is one token: the answer then begins after it, and no token stands there that the text doesn't have."""
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    prompt, answer = encode_pair(tokenizer, "copy: ", "ab", has_template=False)
    assert prompt + answer == tokenizer("copy: ab").input_ids
    assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == ("copy: ", "ab")
    prompt, answer = encode_pair(tokenizer, "copy: ab ", "cd", has_template=False)
    assert prompt + answer == tokenizer("copy: ab cd").input_ids
    assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == ("copy: ab", " cd")


@pytest.fixture(params=["chat", "alpaca"])
def shipped(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The shipped model's tokenizer; the text of its chat template ends in a token of white space, as LLaDA's."""
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    if request.param == "alpaca":
        tokenizer.chat_template = None
    return tokenizer


def trained(tokenizer: PreTrainedTokenizerBase, answer: str) -> tuple[list[int], list[int]]:
    """(prompt, answer) as `encode_records` cuts them, without what closes the answer."""
    records = normalized([{"instruction": "copy: ab", "output": answer, "answer": answer}], source="test")
    row = encode_records(records, tokenizer, max_length=512, progress=False).rows[0]
    prompt, ids = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
    return prompt, ids[: next(i for i, token in enumerate(ids) if token in tokenizer.added_tokens_decoder)]


@pytest.mark.parametrize("answer", ["ab", "ab cd", "ab\n\ncd"])
def test_a_templates_prompt_and_answer_are_cut_as_in_training(shipped: PreTrainedTokenizerBase, answer: str) -> None:
    context = templated(shipped, [{"role": "user", "content": "copy: ab"}])
    assert context != context.rstrip()
    assert encode_pair(shipped, context, answer, has_template=True) == trained(shipped, answer)
    with pytest.raises(ValueError, match="the continuation '' adds no token to the context that ends"):
        encode_pair(shipped, context, "", has_template=True)


def test_white_space_before_the_answer_stays_in_it_where_training_has_it() -> None:
    """The vocabulary has "\n\n" as one token: it doesn't swallow the template's own line break."""
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    tokenizer.chat_template = None
    context = prompt_text(tokenizer, "copy: ab")
    for answer in (" ab", "\nab"):
        pair = encode_pair(tokenizer, context, answer, has_template=True)
        assert pair == trained(tokenizer, answer)
        assert tokenizer.decode(pair[1]) == answer


@pytest.mark.parametrize(("begun", "rest"), [("ab", " cd"), ("ab ", "cd"), ("copy: ", "ab"), (" ", "ab")])
def test_the_start_of_an_answer_is_encoded_with_the_rest_of_it(
    shipped: PreTrainedTokenizerBase, begun: str, rest: str
) -> None:
    question = [{"role": "user", "content": "copy: ab"}]
    context = templated(shipped, [*question, {"role": "assistant", "content": begun}], add_generation_prompt=False)
    prompt, answer = encode_pair(shipped, context, rest, has_template=True)
    opening = encode_prompts(shipped, [templated(shipped, question)])[0]
    assert prompt[: len(opening)] == opening
    assert prompt[len(opening) :] + answer == shipped(begun + rest, add_special_tokens=False).input_ids
    assert str(shipped.decode(answer)).strip() == rest.strip()


def test_a_template_without_an_opening_of_the_answer_is_all_prompt(encoder: PreTrainedTokenizerFast) -> None:
    encoder.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = templated(encoder, [{"role": "user", "content": "one two "}])
    assert encode_pair(encoder, text, "three", has_template=True) == ([5, 6], [7])
    assert encode_pair(encoder, "", "three", has_template=True) == ([], [7])


def test_a_template_brings_its_special_tokens_itself(encoder: PreTrainedTokenizerFast) -> None:
    encoder.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}three"
    text = templated(encoder, [{"role": "user", "content": "one"}])
    assert text == "one three"
    assert encode(encoder, text, has_template=True) == [5, 7] == encode_prompts(encoder, [text])[0]
    assert encode(encoder, text, has_template=False) == [2, 5, 7]


def test_without_a_template_the_form_is_alpacas(encoder: PreTrainedTokenizerFast) -> None:
    text = templated(encoder, [{"role": "user", "content": "one"}])
    assert text == prompt_text(encoder, "one")
    assert encode(encoder, text, has_template=True) == encode_prompts(encoder, [text])[0]
    history = [
        {"role": "system", "content": "two"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "two"},
    ]
    assert templated(encoder, history) == f"two\n\n{prompt_text(encoder, 'one')}three\n\n{prompt_text(encoder, 'two')}"


def test_the_start_of_an_answer_stands_where_the_answer_goes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    question = [{"role": "user", "content": "copy: ab"}]
    begun = [*question, {"role": "assistant", "content": "a\n"}]
    assert templated(tokenizer, begun, add_generation_prompt=False) == templated(tokenizer, question) + "a\n"


@pytest.mark.parametrize(
    ("roles", "given", "remedy"),
    [
        (["system", "user"], "'system', 'user'", "leave out the system message"),
        (["user", "user"], "'user', 'user'", "turns of user and assistant alternate, the user's first"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_told_by_its_turns(
    encoder: PreTrainedTokenizerFast, roles: list[str], given: str, remedy: str
) -> None:
    encoder.chat_template = "{{ raise_exception('not so') }}"
    message = rf"chat template refuses the turns {given} \(not so\): .*{remedy}"
    with pytest.raises(ValueError, match=message):
        templated(encoder, [{"role": role, "content": "one"} for role in roles])


def test_a_text_that_opens_itself_is_not_opened_twice() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    text = prompt_text(tokenizer, "copy: ab")
    ids = encode(tokenizer, text, has_template=False)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_shortening_keeps_the_end() -> None:
    assert shortened([1, 2, 3], 2) == [2, 3]
    assert shortened([1, 2, 3], 9) == [1, 2, 3]
    assert shortened([1, 2, 3], 0) == []
