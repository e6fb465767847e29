"""Pictures and texts as unit vectors, by CLIP and DINO of transformers.

| model        | embedding of an image                               | text |
|--------------|-----------------------------------------------------|------|
| CLIP         | the projected features that are compared with texts | yes  |
| DINO, DINOv2 | the CLS token of the last layer                     | no   |

Images are prepared by the model's own image processor, in its PIL form: figures don't depend on whether torchvision is
installed, whose resizing differs in the last bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from nara_diffusion.dreambooth.data.images import load_image, to_rgb
from nara_diffusion.utils.devices import usable_device

logger = logging.getLogger(__name__)

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
        ValueError: nothing there that transformers can load, a model of another type, no files of an image processor,
            weights that don't fill the model, or a device that isn't there.
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
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 at least")
        self.name, self.batch_size, self.progress, self._hub = str(model_path), batch_size, progress, hub
        self.device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = _load_model(self.name, dtype, hub).to(self.device)
        self.processor = _load_processor(self.name, hub)
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def check_text(self) -> None:
        """Raises ValueError if the model has no text tower."""
        if self.model.config.model_type != "clip":
            raise ValueError(f"{self.name} is a {type(self.model).__name__}, which has no text tower: give CLIP")

    def images(self, images: Sequence[Image | str | Path]) -> torch.Tensor:
        """(n, d) float32 on the CPU, each row of length 1; files are opened batch by batch."""
        for index, image in enumerate(images):
            if not isinstance(image, (Image, str, Path)):
                raise ValueError(f"image {index} is a {type(image).__name__}, expected a PIL image or a file")
        return self._embed(images, self._image_batch, "images")

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, d) float32 on the CPU, each row of length 1, to be compared with those of images.

        Raises:
            ValueError: the model has no text tower, or no files of a tokenizer.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is the text {texts!r}, expected a list of texts")
        self.check_text()
        return self._embed(texts, self._text_batch, "texts")

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], forward: Callable[[list[Any]], torch.Tensor], unit: str) -> torch.Tensor:
        if not items:
            raise ValueError(f"there are no {unit} to embed: give one at least")
        found = torch.cat([forward(batch).float().cpu() for batch in self._batches(items, unit)])  # (n, d)
        bad = (~found.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(
                f"{self.name} in {self.model.dtype} gives values that aren't finite for {unit} {bad[:4]}: use a wider "
                "dtype, such as torch.float32"
            )
        return F.normalize(found, dim=1)

    def _batches(self, items: Sequence[Any], unit: str) -> Iterator[list[Any]]:
        hidden = not self.progress or len(items) <= self.batch_size
        with tqdm(total=len(items), desc="embed", unit=f" {unit}", disable=hidden) as bar:
            for start in range(0, len(items), self.batch_size):
                batch = list(items[start : start + self.batch_size])
                yield batch
                bar.update(len(batch))

    def _image_batch(self, images: list[Image | str | Path]) -> torch.Tensor:
        loaded = [to_rgb(image) if isinstance(image, Image) else load_image(image) for image in images]
        inputs = self.processor(images=loaded, return_tensors="pt")
        inputs = inputs.to(device=self.device, dtype=self.model.dtype)
        if self.model.config.model_type == "clip":
            return self.model.get_image_features(**inputs).pooler_output  # (b, d)
        return self.model(**inputs).last_hidden_state[:, 0]  # (b, l, d) → (b, d)

    def _text_batch(self, texts: list[str]) -> torch.Tensor:
        tokenizer = self._text_tokenizer()
        limit = self._text_length(tokenizer)
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        for text, length in zip(texts, lengths, strict=True):
            if limit is not None and length > limit:
                logger.warning("%r has %d tokens, %s reads the first %d", text, length, self.name, limit)
        inputs = tokenizer(texts, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt")
        return self.model.get_text_features(**inputs.to(self.device)).pooler_output  # (b, d)

    def _text_length(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Tokens of the longest text that the text tower can read."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(filter(None, (positions, tokenizer.model_max_length)), default=None)

    def _text_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            vocab_size = getattr(self.model.config.get_text_config(), "vocab_size", None)
            self._tokenizer = _load_tokenizer(self.name, vocab_size, self._hub)
        return self._tokenizer


def _load_model(name: str, dtype: torch.dtype, hub: dict[str, Any]) -> Any:
    try:
        model, loading = AutoModel.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **hub
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"transformers can't load a model from {name}: {_first_line(error)}") from error
    if model.config.model_type not in MODEL_TYPES:
        raise ValueError(f"{name} is a {type(model).__name__}, expected CLIP, DINO or DINOv2")
    misshapen = [key for key, *_ in loading["mismatched_keys"]]
    # DINO's checkpoints lack the pooling layer of the class that reads them, which isn't used here
    wrong = sorted([*(key for key in loading["missing_keys"] if "pooler" not in key), *misshapen])
    if wrong:
        raise ValueError(
            f"the weights of {name} lack {len(wrong)} tensors of {type(model).__name__}, or have them in another shape "
            f"({', '.join(wrong[:4])}): the folder isn't whole, or holds another kind of model"
        )
    return model.eval().requires_grad_(False)


def _load_processor(name: str, hub: dict[str, Any]) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no image processor that transformers can load ({_first_line(error)}): save the model's "
            "processor beside it, processor.save_pretrained(folder)"
        ) from error


def _load_tokenizer(name: str, vocab_size: int | None, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    remedy = "save the model's processor beside it, processor.save_pretrained(folder)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{name} has no tokenizer that transformers can load ({_first_line(error)}): {remedy}"
        ) from error
    ids = set(tokenizer.get_vocab().values())
    if ids <= set(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
        raise ValueError(f"{name} has no files of a tokenizer: {remedy}")
    if vocab_size is not None and max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer of {name} has a token {max(ids)}, its text tower {vocab_size} tokens: they belong to "
            f"different models; {remedy}"
        )
    return tokenizer


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
