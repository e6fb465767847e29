"""What an adapter without λ can be given in its place: a few numbers beside it, and self-conditioning.

    bias       b(λ), ten numbers on the logit of the token that the decoder sees in each place
    constant   b, one number on that logit
    embedding  e(λ), ten vectors, of which one is added to the embeddings of the canvas
    token      ten vectors, of which one is the embedding of a position more, after the canvas

λ as a token of the prompt isn't among them: the prompt stands in the encoder's cache while λ falls. λ comes from the
batch in training, and from the sampler in `generate`: 1 at the first call, then the share that it didn't accept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaForBlockDiffusion

from quality.images.held_out import BINS

SCALE = 10.0
"""A bias is `SCALE` · a parameter: a rate that suits LoRA moves it as far as Bayes' rule needs."""


class Control(nn.Module):
    """Numbers beside an adapter; it changes `model`, an instance that nothing else uses.

    Attributes:
        level: λ (b,) of the next forward; None while `generate` runs, whose sampler tells it.
    """

    def __init__(self, kind: str, model: DiffusionGemmaForBlockDiffusion) -> None:
        super().__init__()
        self.bins = 1 if kind == "constant" else BINS
        self.kind = kind
        width = model.config.get_text_config().hidden_size if kind in ("embedding", "token") else 1
        self.numbers = nn.Parameter(torch.zeros(self.bins, width))
        self.level: Tensor | None = None
        self.sampler: Any = None
        self._forward, self._prepare_sampler = model.forward, model._prepare_sampler
        if width > 1:
            model.model.decoder.embed_tokens.register_forward_hook(self._embedded)
        model.forward = self.leveled if width > 1 else self.biased  # type: ignore[method-assign]
        model._prepare_sampler = self._seen  # type: ignore[method-assign]

    def own(self, level: Tensor) -> Tensor:
        """The numbers (b, width) of λ (b,)."""
        return self.numbers[(self.bins * level).long().clamp(max=self.bins - 1)]

    def biased(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with b(λ)."""
        output = self.leveled(*args, **kwargs)
        bias = SCALE * self.own(self._current).squeeze(1)  # (b,)
        places = kwargs["decoder_input_ids"][..., None]  # (b, c, 1)
        added = bias[:, None, None].expand(places.shape)
        output.logits = output.logits.scatter_add(2, places, added)
        return output

    def leveled(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with λ known."""
        self._current = self.level
        if self._current is None:
            rows = len(kwargs["decoder_input_ids"])
            is_first = kwargs.get("self_conditioning_logits") is None
            self._current = torch.ones(rows) if is_first else 1 - self.sampler.accepted_token_mask.float().mean(1)
        if self.kind != "token":
            return self._forward(*args, **kwargs)
        output = self._forward(*args, **with_another_position(kwargs))
        output.logits = output.logits[:, :-1]
        return output

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor:
        of_level = self.own(self._current)[:, None]  # (b, 1, d)
        if self.kind == "token":
            return torch.cat([embeddings[:, :-1], of_level], 1)  # (b, c + 1, d)
        return embeddings + of_level  # (b, c, d)

    def _seen(self, generation_config: Any) -> Any:
        self.sampler = self._prepare_sampler(generation_config)
        return self.sampler


def with_another_position(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward for a canvas with a position more at its end, which sees and is seen as the last."""
    longer, places = dict(inputs), inputs["decoder_input_ids"]
    longer["decoder_input_ids"] = torch.cat([places, places[:, -1:]], 1)
    if (positions := inputs.get("decoder_position_ids")) is not None:
        longer["decoder_position_ids"] = torch.cat([positions, positions[:, -1:] + 1], 1)
    if (logits := inputs.get("self_conditioning_logits")) is not None:
        longer["self_conditioning_logits"] = torch.cat([logits, torch.zeros_like(logits[:, -1:])], 1)
    masks = inputs.get("decoder_attention_mask")
    if isinstance(masks, dict):
        longer["decoder_attention_mask"] = {kind: with_another_key(mask) for kind, mask in masks.items()}
    elif masks is not None:
        longer["decoder_attention_mask"] = with_another_key(masks)
    return longer


def with_another_key(mask: Tensor | None) -> Tensor | None:
    """A mask (…, keys), or (b, 1, queries, keys), with the last key twice, and the last query."""
    if mask is None:
        return None
    longer = torch.cat([mask, mask[..., -1:]], -1)
    return torch.cat([longer, longer[..., -1:, :]], -2) if longer.ndim == 4 else longer


class Controlled(nn.Module):
    """An adapted model and its control, whose parameters are trained together."""

    def __init__(self, model: nn.Module, control: Control | None) -> None:
        super().__init__()
        self.model = model
        self.control = control

    def at(self, level: Tensor | None) -> None:
        """Tell the control λ (b,) of the next forwards; None: those of `generate`."""
        if self.control is not None:
            self.control.level = level
