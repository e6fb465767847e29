"""The trained pipeline, and a sampling pipeline with the same frozen weights.

The sampling pipeline has its own modules around the parameters of the trained pipeline, so adapters
and gradient checkpointing affect only one of the two. `load_nara_weights` works as it does on a
freshly loaded pipeline, but there is no second copy of the base model.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string
from safetensors import SafetensorError
from torch import nn

from nara_diffusion.noise.timesteps import FLOW, prediction_type
from nara_diffusion.training.run import Run
from nara_diffusion.utils.files import is_out_of_reach, local_folder, naming_source, refuse_file

from .families import BY_PIPELINE, FAMILIES, Family


def family_named(pipeline: str) -> Family:
    """Return the family of a pipeline class, given by name. Raise ValueError if there is none."""
    if pipeline in BY_PIPELINE:
        return BY_PIPELINE[pipeline]
    known = [f"{family.title} ({' or '.join(family.pipelines)})" for family in FAMILIES]
    raise ValueError(
        f"{pipeline} is not a pipeline that can be trained here: expected {', '.join(known)}."
    )


def family_of(pipe: DiffusionPipeline) -> Family:
    """Return the family of a pipeline, with its settings.

    Raises:
        ValueError: the pipeline belongs to no family, or the family can't train it.
    """
    family = family_named(type(pipe).__name__)
    return family.fit(pipe, family)


def family_of_model(name: str, *, revision: str | None = None) -> Family:
    """Return the family of a folder or repository.

    Raises:
        ValueError: see `model_index` and `family_named`.
    """
    return family_named(str(model_index(name, revision=revision).get("_class_name")))


def model_index(name: str, *, revision: str | None = None) -> dict[str, Any]:
    """Return the `model_index.json` of a folder, or of a repository on the Hub.

    The file names the classes of the pipeline and its components.

    Raises:
        ValueError: there is no such file, or the Hub can't be reached.
    """
    converted = (
        f"StableDiffusionXLPipeline.from_single_file('{name}').save_pretrained('{Path(name).stem}')"
    )
    remedy = (
        f"convert it by {converted}, or its own class, where the Hub can be reached, "
        "and name that folder."
    )
    with naming_source(name, "model_index.json", "a model of Diffusers", remedy):
        read: Callable[..., Any] = DiffusionPipeline.load_config
        return dict(read(name, revision=revision))


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype,
    vae_name: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a frozen pipeline onto the CPU, with the class that its `model_index.json` names.

    Args:
        name: a folder, or an id on the Hub.
        dtype: the dtype of all components except the autoencoder, which is in float32.
        vae_name: the folder or id of another autoencoder; None means the pipeline's own.
        revision, variant: the revision and the variant of the pipeline and of its own autoencoder.

    Raises:
        ValueError: the pipeline, the autoencoder or the variant doesn't exist, or the family can't
            be trained.
    """
    index = model_index(name, revision=revision)
    if vae_name is not None:
        refuse_file(vae_name, "an autoencoder")
    family = family_named(str(index.get("_class_name")))
    hub = {"revision": revision, "variant": variant}
    own_vae = {"subfolder": "vae", **hub}
    try:
        vae = getattr(diffusers, index["vae"][1]).from_pretrained(
            vae_name or name, dtype=torch.float32, **(own_vae if vae_name is None else {})
        )
        kind: type[DiffusionPipeline] = getattr(diffusers, index["_class_name"])
        pipe = kind.from_pretrained(name, vae=vae, dtype=dtype, **hub, **_left_out(index))
        _check_scheduler(family.fit(pipe, family), pipe.scheduler)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise _not_loaded(name, vae_name, variant, family, error) from error
    for module in modules_of(pipe).values():
        module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _left_out(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for components that are None.

    Diffusers fails for missing components unless they are passed as None.
    """
    absent: dict[str, Any] = {}
    for part, classes in index.items():
        if classes == [None, None]:
            absent[part] = None
    if "safety_checker" in index:  # it blackens images that it considers unsafe
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    return absent


def _not_loaded(
    name: str, vae_name: str | None, variant: str | None, family: Family, error: Exception
) -> ValueError:
    """Return the error for a model, or an autoencoder, that can't be loaded."""
    what, why, cure = f"pretrained_model_name_or_path {name}", str(error), ""
    if vae_name:
        what += f" with the autoencoder {vae_name}"
        cure = "; --pretrained_vae_model_name_or_path none takes the model's own autoencoder"
    if variant is None:
        stems = [file.stem for file in Path(name).glob("*/*.safetensors")]
        # model.fp16, or model.fp16-00001-of-00002
        variants = {stem.partition(".")[2].partition("-")[0] for stem in stems} - {""}
        for present in sorted(variants):
            cure += f"; --variant {present} takes the files of that variant"
    if is_out_of_reach(error):
        why = "the Hub can't be reached: look at the connection, or name folders"
    return ValueError(f"{what} can't be loaded as {family.title}: {why}{cure}")


def _check_scheduler(family: Family, scheduler: SchedulerMixin) -> None:
    is_flow = prediction_type(scheduler) == FLOW
    if not (is_flow if family.is_flow else hasattr(scheduler, "scale_model_input")):
        raise ValueError(
            f"{type(scheduler).__name__} can't train {family.title}: put the scheduler that the "
            "model came with into its folder."
        )


def modules_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the models of a pipeline, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def load_base(args: Any, run: Run) -> DiffusionPipeline:
    """Load the pipeline that a run with `args` trains, and record the digests of its files."""
    name, vae_name = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    files = {"revision": args.revision, "variant": args.variant}
    pipe = load_pipeline(name, dtype=run.dtype, vae_name=vae_name, **files)
    root = local_folder(name, revision=args.revision)
    folders = {part: root / part for part in (*modules_of(pipe), "scheduler")}
    if vae_name is not None:
        folders["vae"] = local_folder(vae_name)
    run.record_base_digests(folders, args.variant)
    return pipe


def sharing_pipeline(pipe: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """Return a pipeline with new modules around the parameters of `pipe`, before it is adapted.

    The autoencoder is in `dtype`. The pipeline computes the same bits as one loaded in `dtype`.
    """
    own = modules_of(pipe)
    memo: dict[int, Any] = {}
    for module in own.values():
        for tensor in (*module.parameters(), *module.buffers()):
            memo[id(tensor)] = tensor  # deepcopy takes it as copied already
    modules = {name: copy.deepcopy(module, memo) for name, module in own.items()}
    if pipe.vae.dtype != dtype:
        modules["vae"] = copy.deepcopy(pipe.vae).to(dtype)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    components = {**pipe.components, **modules, "scheduler": scheduler}
    other = type(pipe)(**components, **_options_of(pipe))
    other.set_progress_bar_config(disable=True)
    return other


def _options_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the arguments of a pipeline's constructor that aren't components."""
    accepted = inspect.signature(type(pipe).__init__).parameters.keys() - pipe.components.keys()
    options = {name: pipe.config[name] for name in accepted if name in pipe.config}
    if "add_watermarker" in accepted:
        options["add_watermarker"] = getattr(pipe, "watermark", None) is not None
    return options


def training_sizes(args: Any, family: Family, pipe: Any) -> list[tuple[int, int]]:
    """Return the sizes (h, w) in pixels that a run with `args` trains at.

    Raises:
        ValueError: a size doesn't fit the model.
    """
    divisor = family.divisor(pipe)
    if args.aspect_ratio_buckets is None:
        sizes = [(args.resolution, args.resolution)]
    elif args.aspect_ratio_buckets == "auto":
        multiple = max(divisor, min(64, args.resolution // 4))
        sizes = generate_aspect_ratio_buckets(args.resolution, multiple)
    else:
        sizes = parse_buckets_string(args.aspect_ratio_buckets)
    # Stable Diffusion 3: the maximum of patches on a side
    places = getattr(pipe, family.denoiser).config.get("pos_embed_max_size")
    limit = math.inf if places is None else places * divisor
    for height, width in sizes:
        if height % divisor or width % divisor or max(height, width) > limit:
            at_most = "" if places is None else f", at most {limit}"
            raise ValueError(
                f"a training size of {height} x {width} pixels doesn't fit this model: both "
                f"sides have to be multiples of {divisor}{at_most}; see --resolution."
            )
    return sizes
