"""Subject fidelity and prompt fidelity of images, as in section 4.1 of DreamBooth's paper (arXiv 2208.12242).

    image similarity    mean cosine between generated images and those of the subject; CLIP sees kinds of things, DINO
                        this very one
    text alignment      mean cosine between a generated image and its prompt, by CLIP

Figures of different encoders can't be compared. `examples/subject_metrics.py` measures folders of several seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from .image_records import load_image, to_rgb

Images = Sequence[Image | str | Path]
"""PIL images, or files of images."""


class Encoder:
    """Pictures and texts as unit vectors, by CLIP (projected features) or DINO and DINOv2 (the last layer's CLS token).

    Images are prepared by the model's own image processor, in its PIL form: figures don't depend on whether torchvision
    is installed, whose resizing differs in the last bits.

    Args:
        model_path: a folder, or a repository on the Hub, with the model and its processor.
        device: where it runs; None is CUDA if there is one, else the CPU.
        batch_size: images or texts of one forward.

    Raises:
        ValueError: a model of another type, or weights that don't fill the model.
        OSError: as `from_pretrained`.
    """

    def __init__(
        self, model_path: str | Path, *, device: str | torch.device | None = None, batch_size: int = 32
    ) -> None:
        self.name, self.batch_size = str(model_path), batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, loading = AutoModel.from_pretrained(self.name, dtype=torch.float32, output_loading_info=True)
        self.kind = model.config.model_type
        if self.kind not in ("clip", "vit", "dinov2"):
            raise ValueError(f"{self.name} is a {type(model).__name__}, expected CLIP, DINO or DINOv2")
        # DINO's checkpoints lack the pooling layer of the class that reads them, which isn't used here
        missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
        if missing:
            raise ValueError(f"the weights of {self.name} lack {len(missing)} tensors, such as {missing[0]}")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.processor = AutoImageProcessor.from_pretrained(self.name, backend="pil")

    def images(self, images: Images) -> torch.Tensor:
        """(n, d) float32 on the CPU, each row of length 1; files are opened batch by batch."""

        def embed(batch: list[Image | str | Path]) -> torch.Tensor:
            loaded = [to_rgb(image) if isinstance(image, Image) else load_image(image) for image in batch]
            inputs = self.processor(images=loaded, return_tensors="pt").to(self.device)
            if self.kind == "clip":
                return self.model.get_image_features(**inputs).pooler_output  # (b, d)
            return self.model(**inputs).last_hidden_state[:, 0]  # (b, l, d) → (b, d)

        return self._embed(images, embed)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, d) float32 on the CPU, each row of length 1, to be compared with those of images; CLIP's alone."""
        self.check_text()
        tokenizer = AutoTokenizer.from_pretrained(self.name)
        length = self.model.config.text_config.max_position_embeddings

        def embed(batch: list[str]) -> torch.Tensor:
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            return self.model.get_text_features(**inputs.to(self.device)).pooler_output  # (b, d)

        return self._embed(texts, embed)

    def check_text(self) -> None:
        """Raises ValueError if the model has no text tower."""
        if self.kind != "clip":
            raise ValueError(f"{self.name} is a {type(self.model).__name__}, which has no text tower: give CLIP")

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], forward: Callable[[list[Any]], torch.Tensor]) -> torch.Tensor:
        batches = [list(items[i : i + self.batch_size]) for i in range(0, len(items), self.batch_size)]
        found = torch.cat([forward(batch).cpu() for batch in batches])  # (n, d)
        return F.normalize(found, dim=1)


def image_similarity(encoder: Encoder, generated: Images, reference: Images) -> float:
    """Subject fidelity: the mean cosine over all pairs of a generated image and an image of the subject, in [−1, 1]."""
    return (encoder.images(generated) @ encoder.images(reference).T).mean().item()


def text_alignment(encoder: Encoder, images: Images, prompts: Sequence[str], identifier: Iterable[str] = ()) -> float:
    """Prompt fidelity: the mean cosine of each image and its own prompt, in [−1, 1].

    Args:
        encoder: a CLIP.
        identifier: words left out of the prompts, such as the subject's rare token, which CLIP doesn't know.
    """
    texts = encoder.texts([without_words(prompt, identifier) for prompt in prompts])
    return (encoder.images(images) * texts).sum(1).mean().item()


def without_words(prompt: str, words: Iterable[str]) -> str:
    """`prompt` without `words`, whatever their case and the commas and full stops after them."""
    dropped = {word.lower() for word in words}
    return " ".join(word for word in prompt.split() if word.strip(",.").lower() not in dropped)
