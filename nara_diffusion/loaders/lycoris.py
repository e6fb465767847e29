"""Convert a T-LoRA that LyCORIS (≥ 4, `algo: tlora`) or SimpleTuner wrote.

    lycoris_<module, with _ for .>.q_layer.weight (r, d_in), .p_layer.weight (d_out, r),
    .lambda_layer (1, r), .alpha ()

    ΔW(λ) = alpha / r · (P diag(μ) m(λ) Q − P₀ diag(μ₀) m(λ) Q₀)

The start factors P₀, μ₀ and Q₀ aren't in the file (see base_factors). LyCORIS gives a convolution a
Q of kernel 1 with the stride and the padding of the base's layer. A larger kernel with padding then
gives an output of another size than the base's, and fails in LyCORIS; without padding, Q is the
kernel's first element.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from torch import nn

from nara_diffusion.layers.residual import Triples, interleaved
from nara_diffusion.noise.denoisers import source_of_class

from .adapter_part import AdapterPart
from .base_factors import base_factors, base_layer
from .tlora import Factors, OtherFile, check_layers, layers_of, tlora_part

_PREFIX = re.compile(r"(?:lycoris|lora)_+")
"""LyCORIS' own prefix, with two _ in old versions, or that of its form for kohya."""
_ROOTS = ("", "unet_", "transformer_")
"""What may follow the prefix: presets of LyCORIS and its form for kohya name the model."""
_KEY = re.compile(r"(?P<layer>[^.]*)\.(?P<field>.+)")
_FIELDS = ("q_layer.weight", "p_layer.weight", "lambda_layer", "alpha")
_WORDS = re.compile(
    r"(?:single_)?transformer_blocks|(?:down|up)_blocks|mid_block|to_(?:q|k|v|out|add_out)|add_[qkv]_proj"
    r"|proj_(?:in|out|mlp)|conv_(?:in|out|shortcut)|time_emb_proj|(?:time|add|text)_embedding|linear_\d"
    r"|(?:time_text|patch|pos)_embed|(?:time|text|image|x|context|guidance|condition|timestep)_embedder"
    r"|norm\d_context|norm_out|ff_context|time_proj|[^_]+"
)
"""The words of module names in Diffusers; some contain a _."""


def convert_lycoris(file: OtherFile) -> AdapterPart:
    """Return the part for the base model.

    Raises:
        ValueError: a key, a tensor or a module isn't one of T-LoRA's, the base isn't the original
            model, or LyCORIS couldn't run the adapter of a convolution. The message names it.
    """
    layers = layers_of(file.tensors, _KEY, _FIELDS, "LyCORIS' T-LoRA")
    if file.base is None and not file.without_base:
        raise ValueError(
            "it is a T-LoRA of LyCORIS, and its start factors come from the base's weights. Load it with "
            "pipe.load_nara_weights, or convert it first: nara convert … --base_model …."
        )
    model = None if file.base is None else file.base()
    names = {key: dotted(key) for key in layers} if model is None else module_names(layers, model)
    bases = {} if model is None else {key: base_layer(model, names[key]) for key in layers}
    for key, base in bases.items():
        kernel = base.weight.shape[2:]
        if kernel and (base.groups > 1 or (math.prod(kernel) > 1 and any(base.padding))):
            raise ValueError(
                f"'{key}' is for a convolution with kernel {tuple(kernel)}, padding {base.padding} and "
                f"{base.groups} groups. LyCORIS' own T-LoRA fails in it, so it can't be played."
            )
    rank = check_layers(
        file.tensors, layers, {key: base.weight.shape for key, base in bases.items()}
    )
    weights = {names[key]: base.weight.data for key, base in bases.items()}
    start = base_factors(weights, rank, file.path) if bases else {}
    alphas = {key: float(tensors["alpha"]) or float(rank) for key, tensors in layers.items()}
    alpha = next(iter(alphas.values()))
    factors: dict[str, Factors] = {}
    for key, tensors in layers.items():
        Q, P, values, _ = (tensor if bases else tensor.to("meta") for tensor in tensors.values())
        trained = Triples(P, values, Q)
        A, B = interleaved(trained, start.get(names[key], trained))
        kernel = bases[key].weight.shape[2:] if bases else ()
        padding = [size for k in reversed(kernel) for size in (0, k - 1)]
        factors[names[key]] = nn.functional.pad(A, padding), B * (alphas[key] / alpha)
    source = None if model is None else source_of_class(model)
    return tlora_part(
        file,
        factors,
        step=2,
        alpha=alpha,
        noise_convention=None if source is None else source.convention,
        base_model=getattr(model, "name_or_path", None) or None,
    )


def module_names(keys: Collection[str], model: nn.Module) -> dict[str, str]:
    """Return {key of a module: its name in `model`}.

    Raises:
        ValueError: the model has no such module, or several. The message names the key.
    """
    candidates: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        candidates.setdefault(name.replace(".", "_"), []).append(name)
    names = {}
    for key in keys:
        path = _PREFIX.sub("", key, count=1)
        modules = [
            name for end in {*map(path.removeprefix, _ROOTS)} for name in candidates.get(end, [])
        ]
        if len(modules) != 1 or path == key:
            raise ValueError(
                f"'{key}' names {' and '.join(map(repr, modules)) or 'no module'} of {type(model).__name__}, expected "
                "one. Load the adapter into the base model that it was trained on."
            )
        names[key] = modules[0]
    return names


def dotted(key: str) -> str:
    """Return a module's name in Diffusers, guessed from a key alone."""
    path = re.sub(r"^(unet_|transformer_(?!blocks_))", "", _PREFIX.sub("", key, count=1))
    return ".".join(_WORDS.findall(path))
