"""An independent reference for whole pipelines: the plain denoiser with W0 + s·B·C(λ)·A written in at each call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from tests.helpers.adapted import core_by_hand, disturb, nara_config, relative_error
from tests.helpers.denoisers.models import tensor_of

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
UNET_TARGETS = [*ATTENTION, "proj_in", "conv1", "time_emb_proj"]
"""Linear layers and convolutions, inside attention and outside."""


ROUNDING = 1e-3
"""The largest relative error of a forward in float32; a λ that is off by .01 makes more than ten times of it."""


def level_of(timestep: Any) -> float:
    """λ of a discrete schedule's timestep that a batch shares, by hand."""
    values = torch.as_tensor(timestep).double().flatten().unique().tolist()
    assert len(values) == 1, values
    return values[0] / 1000


def adapt(model: nn.Module, targets: list[str] | None = None, **changes: Any) -> tuple[Any, Any]:
    """`model` with a disturbed NaRA adapter, and a plain copy of it for `follow`."""
    plain = copy.deepcopy(model)
    config = nara_config(target_modules=targets or UNET_TARGETS, **changes)
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)  # type: ignore[operator]
    else:
        inject_adapter_in_model(config, model)
    disturb(model)
    return model.eval(), plain.eval()


def updates_at(adapted: nn.Module, level: float) -> dict[str, Tensor]:
    """s · B · C(λ) · A of each adapted layer, float64, in the shape of its weight, from the state dict alone."""
    state, config = adapted.state_dict(), adapted.peft_config["default"]  # type: ignore[index]
    core = core_by_hand(state, "nara_core.cores.default.shared.", config, torch.tensor([level], dtype=torch.float64))[0]
    found = {}
    for key, A in state.items():
        name, is_a, _ = key.partition(".lora_A.")
        if is_a:
            B = state[key.replace(".lora_A.", ".lora_B.")].double().flatten(1)
            delta = config.lora_alpha / config.r * torch.einsum("or,rs,si->oi", B, core, A.double().flatten(1))
            found[name] = delta.view(-1, *A.shape[1:])
    assert found
    return found


def write(plain: nn.Module, base: dict[str, Tensor], updates: dict[str, Tensor]) -> None:
    """W0 + ΔW into the weights of `plain`."""
    for name, delta in updates.items():
        weight = plain.get_submodule(name).weight
        weight.data = (base[f"{name}.weight"].double() + delta).to(weight.dtype)  # type: ignore[operator, union-attr]


def follow(
    plain: Any,
    adapted: nn.Module,
    level: Callable[[Any], float] = level_of,
    argument: str = "timestep",
    position: int = 1,
) -> list[float]:
    """At each call of `plain`, its weights become those of `adapted` at the λ of that call; → the λ so far.

    Args:
        level: the argument of the call → λ. argument, position: where that argument is.
    """
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    levels: list[float] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        levels.append(level(kwargs[argument] if argument in kwargs else args[position]))
        write(plain, base, updates_at(adapted, levels[-1]))

    plain.register_forward_pre_hook(before, with_kwargs=True)
    return levels


def watch(adapted: nn.Module, adapter: str = "default") -> list[list[float]]:
    """The λ of each forward as the core is told it, one list a forward."""
    levels: list[list[float]] = []
    core = adapted.get_submodule(f"nara_core.cores.{adapter}.shared")
    core.register_forward_pre_hook(lambda _, args: levels.append(args[0].tolist()))
    return levels


def compare_calls(adapted: Any, plain: Any, **where: Any) -> list[float]:
    """From now on, the relative error of each call of `adapted` against `plain`, which is given the same inputs.

    So nothing that comes after a call, such as a sampler, multiplies its rounding. `where`: see `follow`.
    """
    follow(plain, adapted, **where)
    errors: list[float] = []

    def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        with torch.no_grad():
            errors.append(relative_error(tensor_of(output), tensor_of(plain(*args, **kwargs))))

    adapted.register_forward_hook(compare, with_kwargs=True)
    return errors


def latents(pipe: Any, prompt: Any = "a photo of a toy", **options: Any) -> Tensor:
    """What a short run leaves before decoding, the same at each call."""
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "latent"}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **{**call, **options}).images
