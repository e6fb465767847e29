"""The step of `dreambooth.py --plan`, with the run's own pipeline and loss, but without images.

The batch has the largest size of the run. As in a run, an image is encoded first, so the work of
the autoencoder counts. Text encoders that aren't trained are on the device one at a time, before
the denoiser; only their weights count.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor, nn

from nara_diffusion.training.adapters import adapter_config
from nara_diffusion.training.arguments import schedule_of
from nara_diffusion.training.planned_step import PlannedStep, dtype_of
from nara_diffusion.utils.quantised import INT8, NF4

from .dataset import TrainingSample, collate_samples
from .denoiser import AdaptedDenoiser
from .families import Family, Placed
from .image_arguments import DreamBoothArguments, folder_arguments, run_family
from .image_records import ImageRecord
from .pipelines import family_named, model_index, modules_of, quantised_parts, training_sizes
from .placement import chosen_blocks, swappable
from .source_images import sources_in_metadata
from .training_step import training_step

_WIDTHS = ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim", "text_dim")
"""The names of the width of a prompt's states in the configurations of denoisers."""
TOKENS_OF_EDIT = 1500
"""States of a prompt with an image of 1024² pixels, in Qwen2.5-VL's patches of 28²."""


def planned_image_step(args: DreamBoothArguments) -> PlannedStep:
    """Return the training step of an image run, from its pipeline's configurations only.

    Raises:
        ValueError: the run would fail because of its model, adapter or sizes.
    """
    pipe = pipeline_on_meta(args)
    family = run_family(args, pipe)
    cpu = torch.device("cpu")
    batch_size = args.train_batch_size
    step = training_step(args, pipe, family, cpu, batch_size, batch_size)
    folders = folder_arguments(args)
    sizes = [size for folder in folders for size in training_sizes(folder, family, pipe)]
    size = max(sizes, key=lambda size: size[0] * size[1])
    has_class = any(folder.class_prompt is not None for folder in folders)
    convention = step.objective.source.convention
    config: Any = adapter_config(args, noise_convention=convention, strength=schedule_of(args))
    models = modules_of(pipe)
    denoisers = {name: models.pop(name) for name in family.trained}
    denoiser = next(iter(denoisers.values()))
    packed: dict[Tensor, float] = {}
    if args.bits:
        index = model_index(args.pretrained_model_name_or_path, revision=args.revision)
        for name in quantised_parts(index):
            weights = rounded_weights(getattr(pipe, name))
            packed |= dict.fromkeys(weights, NF4 if args.load_in_4bit else INT8)
    swapped = [list(block.parameters()) for block in chosen_blocks(denoiser, args.block_swap)]
    blocks = len(swappable(denoiser)) if family.boundary is None else 0
    resting = [weight for model in [*denoisers.values()][1:] for weight in model.parameters()]
    if args.train_text_encoder:
        for name in family.text_encoders:
            models.pop(name)
    with torch.device("meta"):
        model = AdaptedDenoiser(
            pipe,
            config,
            train_text_encoder=args.train_text_encoder,
            gradient_checkpointing=args.gradient_checkpointing,
            family=family,
        )
    prompts: Any = None if args.train_text_encoder else PlannedPrompts(pipe, family)
    step = replace(step, model=model, prompts=prompts)
    sources = planned_sources(folders, family)
    items: list[dict[str, Any]] = []
    for position in range(batch_size):
        samples = []
        for role in ("instance", "class") if has_class else ("instance",):
            image = ImageRecord("planned", bytes, size, "", f"{role} {position}")
            named = [replace(image, key=f"source {i} of {position}") for i in range(sources)]
            image = replace(image, sources=tuple(named))
            samples.append(PlannedSample(image, size, 0, 0, False, position, role, ""))
        items.append({"samples": samples})
    batch = collate_samples(items)
    # the pipeline's image processor can't work on fake tensors
    if sources and family.source_pixels is not None:
        pixels = family.source_pixels(pipe, new_image("RGB", (size[1], size[0])))
        step.latents.source_pixels = lambda image: pixels
    return PlannedStep(
        model=model,
        loss=lambda: step(batch).loss,
        forward=f"{len(batch['samples'])} x {size[0]} x {size[1]} pixels",
        parts={**denoisers, **models},
        beside="vae",
        packed=packed,
        swapped=swapped,
        swappable=blocks,
        resting=resting,
        encode=lambda: (
            step.latents.sample(batch["samples"], seed=args.seed),
            step.latents.sources(batch["samples"]),
        ),
    )


def planned_sources(folders: Sequence[DreamBoothArguments], family: Family) -> int:
    """Return the largest number of sources of an image, as far as flags and metadata.jsonl say it."""
    numbers = [int(family.needs_source)]
    for folder in folders if family.most_sources else ():
        if folder.source_data_dir is not None:
            numbers.append(1)
        elif folder.instance_data_dir is not None:
            numbers += map(len, sources_in_metadata(Path(folder.instance_data_dir)).values())
    return max(numbers)


def rounded_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights that Diffusers or Transformers quantises: those of linear layers.

    Heads stay as they are, and so do layers that the class keeps in float32.
    """
    in_float32: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not {*name.split("."), name} & {"lm_head", *in_float32}:
            yield layer.weight


def pipeline_on_meta(args: DreamBoothArguments) -> Any:
    """Return the pipeline that `load_pipeline` loads, frozen, with its models on the meta device.

    Its tokenizers are `PlannedTokenizer`s.
    """
    name, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    index = model_index(name, revision=args.revision)
    family_named(str(index.get("_class_name")))
    kind: Any = getattr(diffusers, index["_class_name"])
    fields: dict[str, Any] = {}
    for part in inspect.signature(kind).parameters.keys() & index.keys():
        described = index[part]
        if not isinstance(described, (list, tuple)):
            fields[part] = described
        elif described[1] is None or part == "safety_checker":
            fields[part] = None
        elif "Tokenizer" in described[1] or "Processor" in described[1]:
            fields[part] = PlannedTokenizer()
        elif part == "vae" and vae is not None:
            fields[part] = _component(described, vae, torch.float32)
        else:
            dtype = torch.float32 if part == "vae" else dtype_of(args)
            source = {"subfolder": part, "revision": args.revision}
            fields[part] = _component(described, name, dtype, **source)
    if "safety_checker" in fields:
        fields["requires_safety_checker"] = False
    pipe = kind(**fields)
    for part, tokenizer in pipe.components.items():
        if isinstance(tokenizer, PlannedTokenizer) and part != "processor":
            config = getattr(pipe, part.replace("tokenizer", "text_encoder")).config
            tokenizer.model_max_length = getattr(config, "max_position_embeddings", 77)
    return pipe


def _component(described: Sequence[str], folder: str, dtype: torch.dtype, **source: Any) -> Any:
    """Return a scheduler, or a model on meta, of (library, class)."""
    library, class_name = described
    kind: Any = getattr(transformers if library == "transformers" else diffusers, class_name)
    if class_name.endswith("Scheduler"):
        return kind.from_config(kind.load_config(folder, **source))
    if library == "transformers":
        config = kind.config_class.from_pretrained(folder, **source)
        make = partial(kind._from_config, config, dtype=dtype)
    else:
        make = partial(kind.from_config, kind.load_config(folder, **source))
    with torch.device("meta"):
        return make().to(dtype).requires_grad_(False).eval()


class PlannedSample(TrainingSample):
    """A sample with pixels of zero."""

    def source_images(self) -> list[Image]:
        return [Image()] * len(self.image.sources)

    def pixel_values(self) -> Tensor:
        return torch.zeros(3, *self.target)


class PlannedPrompts:
    """A stand-in for a `PromptCache` that returns embeddings of the right shapes."""

    def __init__(self, pipe: Any, family: Family) -> None:
        config = getattr(pipe, family.denoiser).config
        length = family.max_sequence_length or 0
        if family.max_sequence_length is None or family.name == "stable-diffusion-3":
            length += pipe.tokenizer.model_max_length
        if family.source_encoder is not None:
            length = TOKENS_OF_EDIT
        width = next(config[name] for name in _WIDTHS if name in config)
        pooled = config.get("pooled_projection_dim")
        if family.name == "stable-diffusion-xl":
            pooled = pipe.text_encoder_2.config.projection_dim
        self.shapes = [(length, width), (pooled,)] if pooled else [(length, width)]
        self.has_mask = family.name in ("z-image", "qwen-image")

    def get(self, prompts: Sequence[str], samples: Sequence[TrainingSample]) -> Placed:
        """Return the embeddings of b prompts of the maximal length, each (b, …)."""
        embeddings = [torch.zeros(len(prompts), *shape) for shape in self.shapes]
        lengths = [self.shapes[0][0]] * len(prompts)
        return (*embeddings, lengths) if self.has_mask else tuple(embeddings)


class PlannedTokenizer:
    """A stand-in for CLIP's tokenizers that returns the maximum number of token ids."""

    model_max_length = 77

    def tokenize(self, prompt: str) -> list[str]:
        """Return no tokens: none of `prompt` is a textual inversion."""
        return []

    def __call__(self, prompts: Sequence[str], padding: object = None, **_: object) -> Any:
        length = self.model_max_length if padding == "max_length" else 2
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": ids + 1})
