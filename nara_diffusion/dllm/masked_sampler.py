"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, algorithms 4 and 5), and its canvas.

The canvas is a prompt followed by `gen_length` masks. It is filled block by block, and the model
also sees the masks of later blocks. In each step the model predicts every mask of the block, and
the rules of `decoding` choose which of them to fill. Classifier-free guidance combines logits as
(1 + w) · l(x) − w · l(x with its prompt masked).

In each step, a noise-aware model runs each sample at λ, the masked share of the whole answer, which
goes from 1 to 0. Rows with masked prompts have the λ of their sample. Keys and values change with
each token and with λ, so only approximate caches are possible (`cached_sampler`). The differences
from LLaDA's code are:

- Prompts may differ in length. Each is followed by its own answer, and padding is on the right, as
  in training.
- The mask token is never predicted, so a step can't undo an earlier step.
- A row is finished if no mask is left before its first end-of-sequence token. This token then fills
  the rest of the answer. Sampling stops when all rows are finished.
- Steps without a token to place are skipped, and so are rows without such a token. This doesn't
  change the result, since λ depends on masks and not on steps.

A model learns the end of an answer from the end tokens that training puts after it, which should
therefore reach as far as the canvas does. A model trained on fewer end tokens may continue after
the answer, or make the answer as long as the canvas.

In each step the host reads only which rows still have a mask in the block, and waits for the device
only there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nara_diffusion.noise.rows import guidance_rows

from .models.forward_rows import ForwardRows, conditioned, guided
from .sampling_state import State


class WholeText:
    """Read all of a text at each step, with guidance. λ is the masked share of the answer."""

    def blocks(self, state: State) -> Iterable[torch.Tensor]:
        return state.positions.split(state.sampling.block, dim=1)

    def level(self, state: State, positions: torch.Tensor) -> torch.Tensor:
        return state.masked.float().mean(1)

    def sizes(self, state: State) -> set[int]:
        return {state.sampling.gen_length}

    def logits(
        self, state: State, rows: torch.Tensor, positions: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        w, positions = state.sampling.cfg_scale, positions[rows]
        padding = None if state.attention_mask is None else state.attention_mask[rows]
        inputs = ForwardRows(state.sequences[rows], padding, level[rows])  # a rows
        if w > 0:
            columns = torch.arange(state.sequences.shape[1], device=rows.device)
            is_prompt = columns < state.starts[rows, None]  # (a, l)
            inputs = inputs.with_masked_prompts(is_prompt, state.mask_token_id)  # 2a rows
            positions = guidance_rows(positions)
        with conditioned(state.backbone.model, inputs.noise_level):
            logits = state.backbone.logits(inputs.input_ids, inputs.attention_mask, at=positions)
        return guided(logits.unflatten(0, (-1, len(rows))), w)
