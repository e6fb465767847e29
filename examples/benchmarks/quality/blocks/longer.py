"""Bases with longer canvases: gemma-tiny's weights, trained on with its questions and objective for a few steps."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from nara_diffusion.dllm.canvas_loss import canvas_loss
from nara_diffusion.dllm.exact_match import exact_match
from quality.blocks.runs import base_of, corrupted
from quality.blocks.tasks import encoded
from quality.running import MAKERS

sys.path.append(str(MAKERS))

from tiny_text.block_diffusion import save_gemma
from tiny_text.tasks import LETTER_FAMILIES, letter_questions

BASE = "gemma-tiny"
STEPS, BATCH, RATE = 40, 8, 5e-4


def make_base(canvas: int, folder: Path, steps: int = STEPS) -> float:
    """Write a DiffusionGemma with a canvas of `canvas` positions; return its exact match on 64 held-out questions."""
    model, tokenizer = copy.deepcopy(base_of(BASE)[0]), base_of(BASE)[1]
    model.config.canvas_length = canvas
    torch.manual_seed(0)
    streams = [letter_questions(name, seed=2) for name in LETTER_FAMILIES]
    questions = [next(stream) for _ in range(1 + (64 + steps * BATCH) // len(streams)) for stream in streams]
    rows = encoded([{"instruction": q, "output": a, "answer": a} for q, a in questions], tokenizer, canvas)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for number in range(steps):
        chosen = torch.arange(64 + number * BATCH, 64 + (number + 1) * BATCH)
        batch = corrupted(BASE, rows, chosen, seed=0, sample_indices=chosen.tolist())
        if random.Random(number).random() < 0.5:
            batch = replace(batch, self_conditioned=torch.ones(BATCH, dtype=torch.bool))
        canvas_loss(model, batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save_gemma(model.eval(), tokenizer, folder)
    key = {"gen_length": canvas, "steps": 16, "batch_size": 64, "progress": False}
    return exact_match(model, tokenizer, rows.rows[:64], **key).score
