"""The trained pipeline, and a sampling pipeline with the same frozen weights.

The sampling pipeline has its own modules around the parameters of the trained pipeline, so adapters
and gradient checkpointing affect only one of the two. `load_nara_weights` works as it does on a
freshly loaded pipeline, but there is no second copy of the base model.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string
from safetensors import SafetensorError
from torch import nn

from nara_diffusion.noise.timesteps import FLOW, prediction_type
from nara_diffusion.training.run import Run
from nara_diffusion.utils.quantised import keep_order, quantization
from nara_diffusion.utils.repositories import (
    is_out_of_reach,
    local_folder,
    naming_source,
    refuse_file,
)

from .families import LOW, SD, SD3, SDXL, Family
from .flow_families import (
    FLUX,
    FLUX2,
    FLUX_KONTEXT,
    QWEN_IMAGE,
    QWEN_IMAGE_EDIT,
    QWEN_IMAGE_EDIT_PLUS,
    WAN,
    Z_IMAGE,
)

FAMILIES = (
    SD, SDXL, SD3, FLUX, FLUX_KONTEXT, FLUX2, Z_IMAGE, QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS, WAN,
)  # fmt: skip
BY_PIPELINE = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}


def family_named(pipeline: str) -> Family:
    """Return the family of a pipeline class, given by name. Raise ValueError if there is none."""
    if pipeline in BY_PIPELINE:
        return BY_PIPELINE[pipeline]
    supported = [f"{family.title} ({' or '.join(family.pipelines)})" for family in FAMILIES]
    raise ValueError(f"{pipeline} can't be trained here. Supported are {', '.join(supported)}.")


def family_of(pipe: DiffusionPipeline) -> Family:
    """Return the family of a pipeline, with its settings.

    Raises:
        ValueError: the pipeline belongs to no family.
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
    remedy = (
        f"Convert it by StableDiffusionXLPipeline.from_single_file('{name}').save_pretrained('{Path(name).stem}'), "
        "or its own class, where the Hub can be reached, and name that folder."
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
    bits: int | None = None,
    device: torch.device | None = None,
) -> DiffusionPipeline:
    """Load a frozen pipeline onto the CPU, with the class that its `model_index.json` names.

    Args:
        name: a folder, or an id on the Hub.
        dtype: the dtype of all components except the autoencoder, which is in float32.
        vae_name: the folder or id of another autoencoder; None means the pipeline's own.
        revision, variant: the revision and the variant of the pipeline and of its own autoencoder.
        bits: 4 or 8 to quantise the `quantised_parts`.
        device: the device to quantise on.

    Raises:
        ValueError: the pipeline, the autoencoder or the variant doesn't exist, or its scheduler
            can't train it.
    """
    index = model_index(name, revision=revision)
    if vae_name is not None:
        refuse_file(vae_name, "an autoencoder")
    family = family_named(str(index.get("_class_name")))
    hub = {"revision": revision, "variant": variant}
    vae_source = {"subfolder": "vae", **hub} if vae_name is None else {}
    # Diffusers fails for missing components unless they are passed as None
    absent: dict[str, Any] = {part: None for part, kind in index.items() if kind == [None, None]}
    if "safety_checker" in index:  # it blackens images that it considers unsafe
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        vae = getattr(diffusers, index["vae"][1]).from_pretrained(
            vae_name or name, dtype=torch.float32, **vae_source
        )
        parts: dict[str, Any] = {"vae": vae}
        for part in quantised_parts(index) if bits else ():  # one at a time on the device
            parts[part] = quantised_model(
                index[part], name, bits, dtype, device, subfolder=part, **hub
            )
        pipe = getattr(diffusers, index["_class_name"]).from_pretrained(
            name, **parts, dtype=dtype, **hub, **absent
        )
        is_flow = prediction_type(pipe.scheduler) == FLOW
        if not (is_flow if family.is_flow else hasattr(pipe.scheduler, "scale_model_input")):
            raise ValueError(
                f"it has a {type(pipe.scheduler).__name__}, which can't train this model. Restore the scheduler that "
                "the model came with."
            )
    except _LOADING_ERRORS as error:
        raise _not_loaded(name, vae_name, variant, family, error) from error
    for module in modules_of(pipe).values():
        module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


_LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    SafetensorError,
    RuntimeError,  # of a quantiser without a GPU
)


def quantised_parts(index: Mapping[str, Any]) -> list[str]:
    """Return the models of a `model_index.json` that are quantised: denoisers and language models.

    CLIP's text encoders are small and stay as they are.
    """
    parts = [family_named(str(index["_class_name"])).denoiser]
    for part, described in index.items():
        if part.startswith(("text_encoder", LOW)) and described[1] and "CLIP" not in described[1]:
            parts.append(part)
    return parts


def quantised_model(
    described: Sequence[str],
    name: str,
    bits: int | None,
    dtype: torch.dtype,
    device: torch.device | None,
    **source: Any,
) -> Any:
    """Return a model of (library, class) on the CPU, quantised on `device`."""
    library: Any = transformers if described[0] == "transformers" else diffusers
    config = quantization(bits == 4, bits == 8, dtype, library.BitsAndBytesConfig)
    model = getattr(library, described[1]).from_pretrained(
        name,
        dtype=dtype,
        quantization_config=config,
        device_map={"": str(device or "cpu")},
        **source,
    )
    keep_order(model)
    return model.to("cpu")


def _not_loaded(
    name: str, vae_name: str | None, variant: str | None, family: Family, error: Exception
) -> ValueError:
    """Return the error for a model, or an autoencoder, that can't be loaded."""
    source, remedies = f"The model {name}", ""
    if vae_name:
        source += f" with the autoencoder {vae_name}"
        remedies = " --pretrained_vae_model_name_or_path none takes the model's own autoencoder."
    # model.fp16.safetensors, or model.fp16-00001-of-00002.safetensors
    files = [] if variant else Path(name).glob("*/*.*.safetensors")
    for present in sorted({file.name.split(".")[1].partition("-")[0] for file in files}):
        remedies += f" --variant {present} takes the files of that variant."
    reason = "the Hub can't be reached." if is_out_of_reach(error) else str(error)
    return ValueError(f"{source} can't be loaded as {family.title}: {reason}{remedies}")


def modules_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the models of a pipeline, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def load_base(args: Any, run: Run) -> DiffusionPipeline:
    """Load the pipeline that a run with `args` trains, and record the digests of its files."""
    name, vae_name = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    pipe = load_pipeline(
        name,
        dtype=run.dtype,
        vae_name=vae_name,
        revision=args.revision,
        variant=args.variant,
        bits=args.bits,
        device=run.accelerator.device,
    )
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
    models = modules_of(pipe)
    memo: dict[int, Any] = {}
    for module in models.values():
        for tensor in (*module.parameters(), *module.buffers()):
            memo[id(tensor)] = tensor  # deepcopy takes it as copied already
        for layer in module.modules():  # so do the scales of quantised weights
            for name in ("quant_state", "state"):
                scales = vars(layer).get(name)
                memo[id(scales)] = scales
    modules = {name: copy.deepcopy(module, memo) for name, module in models.items()}
    if pipe.vae.dtype != dtype:
        modules["vae"] = copy.deepcopy(pipe.vae).to(dtype)
    components = {
        **pipe.components,
        **modules,
        "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config),
    }
    accepted = inspect.signature(type(pipe).__init__).parameters.keys() - pipe.components.keys()
    options = {name: pipe.config[name] for name in accepted if name in pipe.config}
    other = type(pipe)(**components, **options)
    other.set_progress_bar_config(disable=True)
    return other


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
            at_most = "" if places is None else f", and at most {limit}"
            raise ValueError(
                f"a training size of {height} x {width} pixels doesn't fit this model: both sides must be multiples "
                f"of {divisor}{at_most}. Change --resolution or --aspect_ratio_buckets."
            )
    return sizes
