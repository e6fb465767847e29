"""Encoders of images and prompts, and the two metrics of the DreamBooth paper.

    image similarity    mean cosine between generated images and those of the subject; CLIP
                        recognises kinds of things, DINO tells individual things apart
    text alignment      mean cosine between a generated image and its prompt, by CLIP

See section 4.1 of arXiv 2208.12242. Figures from different encoders can't be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from nara_diffusion.utils.repositories import is_out_of_reach

from .image_arguments import DreamBoothArguments
from .image_records import load_image, to_rgb

Images = Sequence[Image | str | Path]
"""PIL images, or paths of image files."""


class Encoder:
    """Encode pictures and texts as unit vectors.

    CLIP returns projected features; DINO and DINOv2 return the CLS token of the last layer. Images
    are prepared by the PIL version of the model's image processor, since the resizing of
    torchvision gives slightly different bits.

    Args:
        model_path: a folder, or a repository on the Hub, with the model and its processor.
        device: the device of the model. None means CUDA if available, else the CPU.
        batch_size: the number of images or texts in one forward.

    Raises:
        ValueError: the model has an unknown type, or its weights are incomplete.
        OSError: `from_pretrained` can't load the model.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> None:
        self.name, self.batch_size = str(model_path), batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, loading = AutoModel.from_pretrained(
            self.name, dtype=torch.float32, output_loading_info=True
        )
        self.kind = model.config.model_type
        if self.kind not in ("clip", "vit", "dinov2"):
            raise ValueError(
                f"{self.name} is a {type(model).__name__}. Expected CLIP, DINO or DINOv2."
            )
        # DINO's checkpoints lack the class's pooling layer, which isn't used here
        missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
        if missing:
            raise ValueError(
                f"{self.name} lacks {len(missing)} tensors of its weights, such as {missing[0]}: download it again."
            )
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.processor: Any = AutoImageProcessor.from_pretrained(self.name, backend="pil")

    def images(self, images: Images) -> torch.Tensor:
        """Return unit vectors (n, d), float32 on the CPU. Files are opened batch by batch."""

        def embed(batch: list[Image | str | Path]) -> torch.Tensor:
            loaded = [
                to_rgb(image) if isinstance(image, Image) else load_image(image) for image in batch
            ]
            inputs = self.processor(images=loaded, return_tensors="pt").to(self.device)
            if self.kind == "clip":
                return self.model.get_image_features(**inputs).pooler_output  # (b, d)
            return self.model(**inputs).last_hidden_state[:, 0]  # (b, l, d) → (b, d)

        return self._embed(images, embed)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit vectors (n, d), float32 on the CPU, to compare with images. Needs CLIP."""
        self.check_text()
        tokenizer = AutoTokenizer.from_pretrained(self.name)
        length = self.model.config.text_config.max_position_embeddings

        def embed(batch: list[str]) -> torch.Tensor:
            inputs = tokenizer(
                batch, padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            return self.model.get_text_features(**inputs.to(self.device)).pooler_output  # (b, d)

        return self._embed(texts, embed)

    def check_text(self) -> None:
        """Raise ValueError if the model has no text tower."""
        if self.kind != "clip":
            raise ValueError(
                f"{self.name} is a {type(self.model).__name__}, which can't encode text: use CLIP."
            )

    @torch.no_grad()
    def _embed(
        self, items: Sequence[Any], forward: Callable[[list[Any]], torch.Tensor]
    ) -> torch.Tensor:
        starts = range(0, len(items), self.batch_size)
        batches = [[*items[start : start + self.batch_size]] for start in starts]
        vectors = [forward(batch).cpu() for batch in batches]
        return F.normalize(torch.cat(vectors), dim=1)  # (n, d)


def image_similarity(encoder: Encoder, generated: Images, reference: Images) -> float:
    """Return the subject fidelity: the mean cosine of all pairs (generated, reference)."""
    return (encoder.images(generated) @ encoder.images(reference).T).mean().item()


def paired_similarity(encoder: Encoder, generated: Images, reference: Images) -> float:
    """Return the mean cosine of each generated image and the reference at its place."""
    return (encoder.images(generated) * encoder.images(reference)).sum(1).mean().item()


def text_alignment(
    encoder: Encoder, images: Images, prompts: Sequence[str], identifier: Iterable[str] = ()
) -> float:
    """Return the prompt fidelity: the mean cosine of each image and its prompt, in [−1, 1].

    Args:
        encoder: a CLIP encoder.
        identifier: words to remove from the prompts, such as the rare token of the subject, which
            CLIP doesn't know.
    """
    texts = encoder.texts([without_words(prompt, identifier) for prompt in prompts])
    return (encoder.images(images) * texts).sum(1).mean().item()


def without_words(prompt: str, words: Iterable[str]) -> str:
    """Return `prompt` without `words`, in any case, and without punctuation right after them."""
    dropped = {word.lower() for word in words}
    return " ".join(word for word in prompt.split() if word.strip(",.").lower() not in dropped)


def load_encoders(args: DreamBoothArguments, device: torch.device) -> dict[str, Any]:
    """Return the encoders of an `Evaluation`, or None. If both are one model, it is loaded once."""
    encoders: dict[str | None, Encoder | None] = {None: None}
    for name in (args.similarity_model, args.alignment_model):
        if name is None or name in encoders:
            continue
        try:
            encoders[name] = Encoder(name, device=device)
        except OSError as error:
            why = str(error).strip().partition("\n")[0]
            if is_out_of_reach(error):
                why = "the Hub can't be reached"
            raise ValueError(
                f"The encoder {name} can't be loaded ({why}). Name a folder, or leave its figures out with "
                "--similarity_model none --alignment_model none."
            ) from error
    alignment = encoders[args.alignment_model]
    if alignment is not None:
        alignment.check_text()
    return {"similarity": encoders[args.similarity_model], "alignment": alignment}
