"""Pictures and texts as unit vectors, by CLIP and DINO of transformers.

| model        | embedding of an image                               | text |
|--------------|-----------------------------------------------------|------|
| CLIP         | the projected features that are compared with texts | yes  |
| DINO, DINOv2 | the CLS token of the last layer                     | no   |

Images are prepared by the model's own image processor, in its PIL form: figures don't depend on whether torchvision is
installed, whose resizing differs in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from nara_diffusion.dreambooth.data.image_records import load_image, to_rgb

MODEL_TYPES = ("clip", "vit", "dinov2")
"""The `model_type` of CLIP, DINO and DINOv2 in transformers."""


class Encoder:
    """Embeds images, and texts where the model has a text tower.

    Args:
        model_path: a folder, or a repository on the Hub, with the model and its processor.
        device: where it runs; None is CUDA if there is one, else the CPU.
        dtype: of its weights and activations; embeddings are float32 in any case.
        batch_size: images or texts of one forward.
        progress: show a bar over more than one batch.
        **hub: where files come from, as for `from_pretrained`: revision, token, cache_dir, local_files_only, …

    Raises:
        ValueError: a model of another type, or weights that don't fill the model.
        Exception: as `from_pretrained`.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        progress: bool = True,
        **hub: Any,
    ) -> None:
        self.name, self.batch_size, self.progress, self._hub = str(model_path), batch_size, progress, hub
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, loading = AutoModel.from_pretrained(self.name, dtype=dtype, output_loading_info=True, **hub)
        if model.config.model_type not in MODEL_TYPES:
            raise ValueError(f"{self.name} is a {type(model).__name__}, expected CLIP, DINO or DINOv2")
        # DINO's checkpoints lack the pooling layer of the class that reads them, which isn't used here
        missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
        if missing:
            raise ValueError(f"the weights of {self.name} lack {len(missing)} tensors, such as {missing[0]}")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.processor = AutoImageProcessor.from_pretrained(self.name, backend="pil", **hub)

    def check_text(self) -> None:
        """Raises ValueError if the model has no text tower."""
        if self.model.config.model_type != "clip":
            raise ValueError(f"{self.name} is a {type(self.model).__name__}, which has no text tower: give CLIP")

    def images(self, images: Sequence[Image | str | Path]) -> torch.Tensor:
        """(n, d) float32 on the CPU, each row of length 1; files are opened batch by batch."""
        return self._embed(images, self._image_batch)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, d) float32 on the CPU, each row of length 1, to be compared with those of images; cut to the model's.

        Raises:
            ValueError: the model has no text tower.
        """
        self.check_text()
        tokenizer = AutoTokenizer.from_pretrained(self.name, **self._hub)
        length = self.model.config.text_config.max_position_embeddings

        def embed(batch: list[str]) -> torch.Tensor:
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            return self.model.get_text_features(**inputs.to(self.device)).pooler_output  # (b, d)

        return self._embed(texts, embed)

    def _image_batch(self, images: list[Image | str | Path]) -> torch.Tensor:
        loaded = [to_rgb(image) if isinstance(image, Image) else load_image(image) for image in images]
        inputs = self.processor(images=loaded, return_tensors="pt").to(device=self.device, dtype=self.model.dtype)
        if self.model.config.model_type == "clip":
            return self.model.get_image_features(**inputs).pooler_output  # (b, d)
        return self.model(**inputs).last_hidden_state[:, 0]  # (b, l, d) → (b, d)

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], forward: Callable[[list[Any]], torch.Tensor]) -> torch.Tensor:
        starts = range(0, len(items), self.batch_size)
        bar = tqdm(starts, desc="embed", unit="batch", disable=not self.progress or len(starts) < 2)
        found = torch.cat([forward(list(items[i : i + self.batch_size])).float().cpu() for i in bar])  # (n, d)
        if not found.isfinite().all():
            raise ValueError(f"{self.name} in {self.model.dtype} gives values that aren't finite: use a wider dtype")
        return F.normalize(found, dim=1)
