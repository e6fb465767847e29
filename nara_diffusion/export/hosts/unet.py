"""Names of the UNet's modules in Stability's own code, which kohya (for SDXL) and ComfyUI use.

    down_blocks.i.resnets.j       input_blocks.(1 + i(n+1) + j).0          n = layers_per_block
    down_blocks.i.attentions.j    input_blocks.(1 + i(n+1) + j).1
    down_blocks.i.downsamplers.0  input_blocks.((i+1)(n+1)).0.op
    mid_block                     middle_block.0, .1, .2
    up_blocks.i.resnets.j         output_blocks.(i(n+1) + j).0             and .1 for attentions
    up_blocks.i.upsamplers.0      output_blocks.(i(n+1) + n).1.conv        2 in place of 1 behind an attention

Inside of an attention the names are the same; `_IN_RESNET` has those inside of a ResNet block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class UNetLayout:
    """Attributes:
    layers_per_block: of the UNet's configuration.
    attention_up_blocks: the indices of the up blocks that have attention.
    """

    layers_per_block: int
    attention_up_blocks: tuple[int, ...]


SDXL = UNetLayout(2, (0, 1))
SD15 = UNetLayout(2, (1, 2, 3))

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)")


def stability_name(name: str, layout: UNetLayout) -> str:
    """The name in Stability's code of a module of UNet2DConditionModel.

    Raises:
        ValueError: the UNet of that layout has no such module.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if found := _MIDDLE.fullmatch(name):
        place = 1 if found["kind"] == "attentions" else 2 * int(found["layer"])
        return f"middle_block.{place}.{_inside(found['kind'], found['rest'])}"
    if found := _BLOCK.fullmatch(name):
        return _in_block(layout, found["side"], int(found["block"]), found["kind"], int(found["layer"]), found["rest"])
    raise ValueError(f"'{name}' is no module of Stable Diffusion's UNet: choose the base that the adapter is for.")


def check_attention(name: str, layout: UNetLayout, base: str) -> None:
    """Raises ValueError if the module `name` is in an attention that the UNet of `base` doesn't have."""
    found = _BLOCK.fullmatch(name)
    if found and found["side"] == "up" and found["kind"] == "attentions":
        blocks = layout.attention_up_blocks
        if int(found["block"]) not in blocks:
            raise ValueError(
                f"'{name}' is adapted, but {base}'s UNet has attention in up blocks {', '.join(map(str, blocks))} "
                "alone: choose the base that the adapter is for."
            )


def _in_block(layout: UNetLayout, side: str, block: int, kind: str, layer: int, rest: str) -> str:
    size = layout.layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * size}.0.op"
    if kind == "upsamplers":
        behind = 2 if block in layout.attention_up_blocks else 1
        return f"output_blocks.{block * size + layout.layers_per_block}.{behind}.conv"
    start = "input_blocks" if side == "down" else "output_blocks"
    number = block * size + layer + (1 if side == "down" else 0)
    return f"{start}.{number}.{1 if kind == 'attentions' else 0}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    if rest not in _IN_RESNET:
        raise ValueError(
            f"'{rest}' is no module of a ResNet block of Stable Diffusion's UNet: choose the base that the adapter is "
            "for."
        )
    return _IN_RESNET[rest]
