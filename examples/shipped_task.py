"""The model and the task that come with the project, as the examples and benchmarks use them.

`llada-tiny` is a small language model in LLaDA's format that knows tasks like "reverse: planet". The task `two-step`
asks for two of them in a row ("reverse then shift: planet"), which it can't do before it is fine-tuned.
"""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.dllm import AnswerCollator, encode_records, load_backbone, masked_diffusion_loss, read_records

ASSETS = Path(__file__).parent / "assets"
GEN_LENGTH = 12  # tokens of an answer, enough for every question of the task


def load_shipped_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_backbone(str(ASSETS / "llada-tiny"))


def load_rows(tokenizer: PreTrainedTokenizerBase, split: str, only: str = "") -> Dataset:
    """Rows of `split` ("train", "validation" or "test") as token ids; `only` keeps the questions that contain it."""
    records = read_records(ASSETS / "two-step" / f"{split}.jsonl")
    chosen = records.filter(lambda record: only in record["instruction"])
    return encode_records(chosen, tokenizer, max_length=64).rows


def make_collator(tokenizer: PreTrainedTokenizerBase) -> AnswerCollator:
    """Batches in which each answer is trained on as far as generation goes, so that the model learns to stop."""
    return AnswerCollator(tokenizer.eos_token_id, trained_padding="gen_length", gen_length=GEN_LENGTH)


def fine_tune(model: nn.Module, rows: Dataset, collator: AnswerCollator, steps: int, batch_size: int = 24) -> None:
    """A plain training loop: AdamW, cosine schedule, smaller steps for the core than for A and B."""
    core = [p for name, p in model.named_parameters() if p.requires_grad and "lora_core." in name]
    factors = [p for name, p in model.named_parameters() if p.requires_grad and "lora_core." not in name]
    groups = [{"params": factors, "lr": 1e-2}, {"params": core, "lr": 1e-3}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in (bar := tqdm(range(steps), desc="fine-tune")):
        picked = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        # draws a noise level for each sample, masks that share of its answer, and tells the adapter both
        loss = masked_diffusion_loss(model, **collator([rows[i] for i in picked]), generator=generator).loss
        loss.backward()
        nn.utils.clip_grad_norm_([*factors, *core], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def trainable_parameters(model: PeftModel) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    return f"{trainable:,} of {total:,} parameters are trained"
