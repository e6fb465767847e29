"""Training beside weights of 4 and 8 bits: gradients, a run that is killed and resumed, and what is refused."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import load_backbone, masked_diffusion_loss, text_data
from nara_diffusion.training.adapters import add_adapter
from nara_diffusion.utils.quantised import prepare_quantised
from tests.acceptance._commands import (
    Moment,
    assert_same_bits,
    by_the_card,
    ended_early,
    fresh_accelerate,
    metrics,
    results,
    run,
)
from tests.acceptance._runs import ASSETS, text_arguments, text_flags
from tests.helpers.mixtures import LLADA2, write_checkpoint

functional = pytest.importorskip("bitsandbytes.functional")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
LLADA_TINY = str(ASSETS / "llada-tiny")
IDS = torch.randint(4, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def whole_weight(layer: Any) -> torch.Tensor:
    weight = layer.weight
    if type(weight).__name__ == "Int8Params":
        return weight.CB.float() * weight.SCB.float()[:, None] / 127
    return functional.dequantize_4bit(weight.data, weight.quant_state).float()


def adapted(model: Any) -> PeftModel:
    torch.manual_seed(1)
    model = add_adapter(model, NaraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model.train()


@pytest.mark.parametrize(("bits", "precision"), [(4, 1e-4), (8, 3e-2)])
def test_gradients_use_rounded_weights_also_after_evaluation(bits: int, precision: float) -> None:
    """On a CPU bitsandbytes packs 4-bit weights at the first evaluation, and gives packed ones no gradient."""
    small, _ = load_backbone(LLADA_TINY, dtype=torch.float32, **{f"load_in_{bits}bit": True})
    full, _ = load_backbone(LLADA_TINY)
    for name, layer in small.named_modules():
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            full.get_submodule(name).weight.data = whole_weight(layer)
    prepare_quantised(small)
    steps = []
    for model in (adapted(small), adapted(full)):
        with torch.no_grad():
            masked_diffusion_loss(model.eval(), IDS, [4] * 3, seed=1)
        loss = masked_diffusion_loss(model.train(), IDS, [4] * 3, seed=1, noise_level=0.5).loss
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        steps.append((loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))))
    (mine, gradients), (expected, references) = steps
    torch.testing.assert_close(mine, expected, rtol=precision, atol=0)
    for name, reference in references.items():
        torch.testing.assert_close(gradients[name], reference, rtol=0, atol=precision * float(reference.abs().max()))


def test_weights_are_rounded_to_nf4_with_double_quantisation() -> None:
    small, full = (load_backbone(LLADA_TINY, dtype=torch.float32, load_in_4bit=bits)[0] for bits in (True, False))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rounded, weight = small.get_submodule(name).weight, full.get_submodule(name).weight.detach()
        packed = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        expected = functional.dequantize_4bit(*packed)
        assert torch.equal(functional.dequantize_4bit(rounded.data, rounded.quant_state), expected)
        assert (rounded.quant_state.quant_type, rounded.quant_state.nested) == ("nf4", True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("bits", "precision"), [(4, {"mixed_precision": "bf16"}), (8, {"gradient_checkpointing": True})]
)
def test_killed_run_resumes_to_the_same_bits(tmp_path: Path, bits: int, precision: dict[str, Any]) -> None:
    flags = text_flags(tmp_path) | {f"load_in_{bits}bit": True, "optimizer": "PagedAdamW", **precision}
    flags |= {"validation_steps": 2}
    fresh_accelerate()  # other tests leave one
    run("dllm.py", **flags, output_dir=tmp_path / "whole")
    out, log = tmp_path / "out", tmp_path / "log"
    assert ended_early("dllm.py", Moment("step", 3), log, **flags, output_dir=out) == -signal.SIGKILL, log.read_text()
    run("dllm.py", **flags, output_dir=out, resume_from_checkpoint="latest")
    assert_same_bits(out, tmp_path / "whole")
    actual, expected = results(out) | {"seconds": 0}, results(tmp_path / "whole") | {"seconds": 0}
    assert actual == expected
    losses = [line["validation_loss"] for line in metrics(out) if "validation_loss" in line]
    assert losses[-1] < losses[0]
    model = by_the_card(out, until="prompt =")["model"]
    assert getattr(model.get_base_model(), f"is_loaded_in_{bits}bit")


def test_both_widths_and_full_training_are_refused(tmp_path: Path) -> None:
    for changes in ({"load_in_8bit": True}, {"adapter": "full"}):
        with pytest.raises(ValueError, match="give one of them, and an adapter"):
            text_arguments(tmp_path, load_in_4bit=True, **changes)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_is_on_the_runs_device(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run with `--cpu` on a machine with a GPU, which transformers would take by itself."""
    options: dict[str, Any] = {}

    def load(name: str, **kwargs: Any) -> Any:
        options.update(kwargs)
        return load_backbone(name)

    monkeypatch.setattr(text_data, "load_backbone", load)
    args = text_arguments(tmp_path, **{f"load_in_{bits}bit": True})
    text_data.load_model(args, torch.float32, torch.device("cuda", 1))
    assert options["device_map"] == {"": "cuda:1"}


def test_missing_bitsandbytes_is_refused_naming_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nara_diffusion.utils.quantised.find_spec", lambda name: None)
    for option in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(ValueError, match=r"need bitsandbytes, which isn't installed: pip install .*\[optimizers\]"):
            load_backbone(LLADA_TINY, **{option: True})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_mixtures_are_refused_since_experts_would_become_larger(option: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLADA2)
    for name, experts in ((tmp_path, 8), (ASSETS / "gemma-tiny", 4)):
        with pytest.raises(ValueError, match=f"{experts} stacked experts"):
            load_backbone(str(name), **{option: True})  # type: ignore[arg-type]
