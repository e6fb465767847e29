"""The tokenizer of llada-tiny: bytes, a few whole words, and LLaDA's special tokens.

Ids:  0 … 255 bytes · ": " and "\\n\\n" (two merges) · WORDS · SPECIAL_TOKENS, of which the mask token is the last.

Every byte is a token, so any text round-trips. The words that name a task are one token each, because a model of 0.7 M
parameters should spend its attention on the letters that it transforms rather than on spelling the instruction. They
match as whole words only: "copy" is one token, "copyist" is seven.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

BOS, EOS, EOT, MASK = "<|startoftext|>", "<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>"
SPECIAL_TOKENS = (BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", EOT, MASK)
MERGES = ((":", "Ġ"), ("Ċ", "Ċ"))  # ByteLevel writes a space as Ġ and a newline as Ċ
WORDS = (
    *("user", "assistant", "then", "copy", "upper", "shift", "unshift", "reverse", "swap", "rotate", "sort", "double"),
    *("palindrome", "spell", "backward", "count", "add", "multiply", "ascending", "descending"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with LLaDA's chat template; padding is EOS, as in LLaDA, and the mask token is the last id."""
    symbols = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=list(MERGES)))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in WORDS])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, mask_token=MASK, model_max_length=64
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
