"""A file that is not this adapter's is refused by key, and leaves the model as it was; NaRA and LoRA are told apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.adapted import adapted, nara_config
from tests.helpers.files.saved_adapters import TARGETS, WEIGHTS, base_model, output, reseeded_base

CORE = "base_model.model.nara_core.shared."
A_KEY = "base_model.model.first.lora_A.weight"

BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no core": (lambda t: [t.pop(k) for k in list(t) if k.startswith(CORE)], r"lacks '.*nara_core.*and 4 more tensors"),
    "no frequencies": (
        lambda t: t.pop(CORE + "embeddings.noise_level.frequencies"),
        r"lacks '.*nara_core\.cores\.default\.shared\.embeddings\.noise_level\.frequencies'",
    ),
    "a missing bias": (lambda t: t.pop(CORE + "layers.1.bias"), r"lacks '.*shared\.layers\.1\.bias'\."),
    "a missing A": (lambda t: t.pop(A_KEY), r"lacks '.*first\.lora_A\.default\.weight'"),
    "an extra key": (
        lambda t: t.update({CORE + "layers.7.weight": torch.ones(2)}),
        r"holds '.*layers\.7\.weight', which",
    ),
    "an extra layer": (
        lambda t: t.update({"base_model.model.third.lora_A.weight": torch.ones(4, 7)}),
        r"holds 'base_model\.model\.third\.lora_A\.weight', which this adapter does not have",
    ),
    "a misshapen core": (
        lambda t: t.update({CORE + "layers.0.weight": torch.ones(9, 6)}),
        r"'.*layers\.0\.weight' has shape \(9, 6\) in the checkpoint, but this adapter needs \(9, 8\)",
    ),
    "misshapen frequencies": (
        lambda t: t.update({CORE + "embeddings.noise_level.frequencies": torch.ones(5)}),
        r"frequencies' has shape \(5,\)",
    ),
    "a misshapen A": (lambda t: t.update({A_KEY: torch.ones(3, 7)}), r"lora_A\.default\.weight' has shape \(3, 7\)"),
    "NaN in the core": (
        lambda t: t[CORE + "layers.1.weight"].fill_(float("nan")),
        r"'.*layers\.1\.weight' holds NaN or infinity",
    ),
    "infinity in A": (lambda t: t[A_KEY].fill_(float("inf")), r"lora_A\.default\.weight' holds NaN or infinity"),
    "a core in float16": (
        lambda t: t.update({CORE + "layers.1.weight": t[CORE + "layers.1.weight"].half()}),
        r"'.*layers\.1\.weight' is torch\.float16 in the checkpoint, but a core is kept in float32",
    ),
    "frequencies in bfloat16": (
        lambda t: t.update({CORE + "embeddings.noise_level.frequencies": torch.ones(4).bfloat16()}),
        r"frequencies' is torch\.bfloat16",
    ),
}


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)


BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "DoRA": {"use_dora": True},
    "a trained module": {"modules_to_save": ["second"], "target_modules": ["first"]},
    "trained biases": {"bias": "all"},
    "a start that changes the base": {"init_lora_weights": "pissa"},
}


def _frozen(model: nn.Module) -> dict[str, Any]:
    """All that a refused file could leave behind: modules, tensors, who is trainable, hooks, attributes."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "attributes": set(vars(model)),
    }


def _assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> None:
    tensors, others = one.pop("tensors"), other.pop("tensors")
    assert one == other
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


WRONG = ["no core", "cut off", "no file", "a missing A"]


@pytest.mark.parametrize(
    ("beside", "broken"), [*[("alone", each) for each in WRONG], *zip(BESIDE, cycle(WRONG), strict=False)]
)
def test_a_base_model_is_as_it_was_after_a_refused_file_and_takes_a_good_one(tmp_path, broken, beside):
    options = BESIDE[beside]
    model = adapted(base_model(), **{"target_modules": TARGETS, **options})
    model.save_pretrained(tmp_path)
    good = (tmp_path / WEIGHTS).read_bytes()
    if broken == "cut off":
        (tmp_path / WEIGHTS).write_bytes(good[:-9])
    elif broken == "no file":
        (tmp_path / WEIGHTS).rename(tmp_path / "elsewhere")
    else:
        rewrite(tmp_path, BROKEN[broken][0])
    base, x = reseeded_base(), torch.randn(3, 7)
    base.requires_grad_(False)
    base.second.bias.requires_grad_(True)
    before = _frozen(base)
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        PeftModel.from_pretrained(base, tmp_path)
    # PiSSA's rest of a weight is rounded, and so is the sum by which it comes back
    _assert_same(before, _frozen(base), tolerance=1e-6 if "init_lora_weights" in options else 0.0)
    with torch.no_grad():
        torch.testing.assert_close(base(x), base_model()(x))  # of no fresh core
    (tmp_path / WEIGHTS).write_bytes(good)
    torch.testing.assert_close(output(PeftModel.from_pretrained(base, tmp_path), x), output(model, x))


@pytest.mark.parametrize("options", [BESIDE["alone"], BESIDE["DoRA"], BESIDE["a trained module"]], ids=str)
@pytest.mark.parametrize("held", ["nara", "identity"])
def test_a_model_with_adapters_is_as_it_was_after_a_refused_file(tmp_path, held, options):
    adapted(base_model(), **{"target_modules": TARGETS, **options}).save_pretrained(tmp_path)
    rewrite(tmp_path, BROKEN["no frequencies"][0])
    core_type = {"core_type": "identity"} if held == "identity" else {}
    model = adapted(base_model(), target_modules=["first"], **core_type)
    before = _frozen(model)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.* lacks '.*frequencies"):
        model.load_adapter(str(tmp_path), "other")
    _assert_same(before, _frozen(model))
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]


def test_the_tensors_of_an_adapter_are_not_taken_for_a_lora(tmp_path):
    from tests.helpers.pipelines.unet import tiny_unet

    unet = tiny_unet()
    unet.add_adapter(nara_config(target_modules=["to_q"]))
    save_file(get_peft_model_state_dict(unet), tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"holds a NaRA adapter, .* load it by pipe.load_nara_weights"):
        tiny_unet().load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")


# ---------------------------------------------------------------- numbers of another kind


KINDS = [torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("option", [{}, {"core_type": "constant"}, {"core_type": "knots"}], ids=str)
def test_a_state_dict_with_a_converted_core_is_refused_before_a_file_is_written(option, dtype, tmp_path):
    model = adapted(base_model(), target_modules=TARGETS, **option)
    converted = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"is {dtype} in the state_dict to be saved, .* leave state_dict out"):
        model.save_pretrained(tmp_path / "adapter", state_dict=converted)
    assert not list(tmp_path.rglob("*.safetensors"))
    kept = {name: model.state_dict()[name] if "nara_core" in name else t.bfloat16() for name, t in converted.items()}
    model.save_pretrained(tmp_path / "adapter", state_dict=kept)
    loaded = PeftModel.from_pretrained(reseeded_base(), tmp_path / "adapter").state_dict()
    for name in (name for name in loaded if "nara_core" in name):
        assert torch.equal(loaded[name], model.state_dict()[name])
