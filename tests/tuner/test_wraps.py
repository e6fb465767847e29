"""The six functions of other libraries that are replaced, which do nothing on a model without NaRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers.loaders.lora_base as lora_base
import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from transformers.integrations.peft import PeftAdapterMixin as TransformersMixin

from nara_diffusion import wraps
from tests.acceptance._lives import frozen_sd, predict, save_lora
from tests.helpers.adapted import TwoLayers, disturb, lora_config

WRAPPED: list[tuple[Any, str]] = [
    (PeftModel, "from_pretrained"),
    (PeftModel, "load_adapter"),
    (TransformersMixin, "load_adapter"),
    (lora_base.LoraBaseMixin, "set_adapters"),
    (PeftAdapterMixin, "save_lora_adapter"),
    (lora_base, "_get_model_file"),
]
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


def of(owner: Any, name: str) -> Any:
    found = vars(owner)[name]
    return getattr(found, "__func__", found)


def test_wraps_are_these_six_once() -> None:
    before = [of(*each) for each in WRAPPED]
    assert all(function.knows_cores and not hasattr(function.__wrapped__, "knows_cores") for function in before)
    wraps.wrap_other_libraries()
    assert [of(*each) for each in WRAPPED] == before


@pytest.fixture
def _nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a NaRA needs fails."""

    def called(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("is for a NaRA alone")

    for name in ("inject_adapter_in_model", "give_strength", "check_strength"):
        monkeypatch.setattr(wraps, name, called)


@pytest.mark.usefixtures("_nothing_of_ours")
def test_peft_and_transformers_load_a_lora_as_ever(tmp_path: Path, tiny_llama: Any) -> None:
    model: Any = get_peft_model(TwoLayers(), lora_config(target_modules=["first"]))
    disturb(model)
    model.save_pretrained(tmp_path / "lora")
    loaded: Any = PeftModel.from_pretrained(TwoLayers(), tmp_path / "lora")
    loaded.load_adapter(tmp_path / "lora", "again")
    with pytest.raises(ValueError, match="adapter_config"):
        loaded.load_adapter(tmp_path / "none", "again and again")
    tiny_llama.save_pretrained(tmp_path / "base")
    text: Any = get_peft_model(tiny_llama, lora_config(target_modules=["q_proj"]))
    text.save_pretrained(tmp_path / "text")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.load_adapter(tmp_path / "text")
    assert any("lora_A" in name for name, _ in base.named_parameters())


@pytest.mark.usefixtures("_nothing_of_ours")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_diffusers_loads_weights_and_saves_loras_as_ever(tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    tensors = save_lora(tmp_path)
    for name in ("a", "b"):
        pipe.load_lora_weights(tensors, adapter_name=name)
    pipe.unet.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors", adapter_name="c")
    for weights in (None, 0.5, [0.5, {"unet": {"down": 0.2}}]):
        pipe.set_adapters(["a", "b"], weights)
    found = predict(pipe)
    lora_base.LoraBaseMixin.set_adapters.__wrapped__(pipe, ["a", "b"], weights)  # type: ignore[attr-defined]
    assert torch.equal(predict(pipe), found)
    pipe.unet.save_lora_adapter(tmp_path / "out", adapter_name="a")
    assert list((tmp_path / "out").iterdir())
