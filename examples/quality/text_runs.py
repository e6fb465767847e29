"""One run of the text benchmark: backbone × domain × method × seed → one record."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.dllm import generate, load_backbone
from nara_diffusion.dllm.evaluation import decode_answer, stop_token_ids
from quality.domains import build_domain
from quality.families import is_right
from quality.methods import build
from quality.recipe import Recipe
from quality.text_data import EncodedDomain, Rows, encode_domain
from quality.training import CONSTANT, masked_share, train
from quality.validation import CENTRES, ValidationSet, binned_loss, validation_set

ASSETS = Path(__file__).parent.parent / "assets"
GENERATION_BATCH = 256  # questions


@cache
def _backbone(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_backbone(str(ASSETS / name))


@cache
def _domain(backbone: str, domain: str) -> EncodedDomain:
    return encode_domain(build_domain(domain), _backbone(backbone)[1])


@cache
def _validation(backbone: str, domain: str) -> ValidationSet:
    return validation_set(_domain(backbone, domain).validation, _backbone(backbone)[0].config.mask_token_id)


def run_one(
    backbone: str, domain: str, method: str, seed: int, *, exact_match: bool = True, keep: bool = False, **settings: Any
) -> dict[str, Any]:
    """Train `method` once and measure it.

    Args:
        backbone: a folder of examples/assets, "llada-tiny".
        domain: of `DOMAINS`, or one family alone.
        method: of `METHODS`; "base" measures the model as it is.
        exact_match: generate answers to the test questions too.
        keep: put the trained model into the record, as "model".
        **settings: fields of `Recipe`; any other name is a field of the adapter's configuration.
    """
    recipe = Recipe.of(**settings)
    base, tokenizer = _backbone(backbone)
    data = _domain(backbone, domain)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = copy.deepcopy(base) if method == "base" else build(copy.deepcopy(base), method, recipe)
    trained = None if method == "base" else train(model, data.train, recipe, seed)
    loss = binned_loss(model, _validation(backbone, domain), _fed(recipe))
    record = {
        "backbone": backbone,
        "domain": domain,
        "method": method,
        "seed": seed,
        "noise_levels": CENTRES,
        "losses": loss.losses,
        "loss_errors": loss.errors,
        "validation_loss": loss.mean,
        "validation_error": loss.mean_error,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_ms": trained and trained.step_ms,
        "seconds": trained and trained.seconds,
        "train_loss": trained and sum(trained.losses[-20:]) / 20,
    }
    if exact_match:
        record["exact_match"] = answered_right(model, tokenizer, data.test)
    return record | ({"model": model} if keep else {})


def _fed(recipe: Recipe) -> Any:
    """What a model trained by `recipe` is told in validation, or None for the λ of the masks."""
    if recipe.control == "constant":
        return lambda batch: torch.full_like(batch.noise_level, CONSTANT)
    return masked_share if recipe.told == "masked_share" else None


def answered_right(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> float:
    """The share of `rows` whose generated answer the generator's verifier accepts, in [0, 1]."""
    ends = stop_token_ids(model, tokenizer)
    order = rows.prompt_lengths.argsort(stable=True)
    right = 0
    for chosen in order.split(GENERATION_BATCH):
        lengths = rows.prompt_lengths[chosen]
        prompts = rows.input_ids[chosen, : int(lengths.max())]
        result = generate(
            model,
            prompts,
            prompt_lengths=lengths,
            gen_length=rows.answer_length,
            eos_token_id=ends,
            return_stats=True,
        )
        for index, answer in zip(chosen.tolist(), result.answers.tolist(), strict=True):
            right += is_right(rows.questions[index], decode_answer(tokenizer, answer, ends))
    return right / len(rows)
