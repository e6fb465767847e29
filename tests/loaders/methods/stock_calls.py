"""What users of Diffusers and PEFT do with plain LoRAs, by their own functions: nothing here imports nara_diffusion.

`python -m tests.loaders.methods.stock_calls FOLDER` writes results of stock Diffusers and PEFT to FOLDER/results.pt.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.small_pipelines import pixels, small_sdxl

Results = dict[str, Tensor | str]


def disturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("expected an error")


def save_two_loras(folder: Path) -> None:
    """Diffusers' files "a.safetensors" and "b.safetensors", each of another rank and of other layers of SDXL's UNet."""
    for seed, (name, targets) in enumerate({"a": ["to_q", "to_v"], "b": ["to_q", "proj_in"]}.items()):
        pipe = small_sdxl()
        pipe.unet.add_adapter(LoraConfig(r=3 + seed, lora_alpha=2, target_modules=targets))
        disturb(pipe.unet, seed)
        StableDiffusionXLPipeline.save_lora_weights(
            folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet), weight_name=f"{name}.safetensors"
        )


def diffusers_calls(folder: Path) -> Results:
    """The methods of a pipeline and of its UNet on the files of `save_two_loras`. → step: image or message."""
    pipe, found = small_sdxl(), {}
    for name in ("a", "b"):
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
        found[f"load {name}"] = pixels(pipe)
    pipe.set_adapters(["a", "b"], [0.5, {"unet": {"mid": 0.2, "up": 1.5}}])
    found["weights of blocks"] = pixels(pipe)
    pipe.unet.set_adapters("b", 0.7)
    found["one adapter"] = pixels(pipe)
    pipe.disable_lora()
    found["disabled"] = pixels(pipe)
    pipe.enable_lora()
    pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.8)
    found["fused"] = pixels(pipe)
    pipe.unfuse_lora(components=["unet"])
    pipe.set_lora_device(["a"], "cpu")
    pipe.unet.save_lora_adapter(folder / "saved", adapter_name="a")
    pipe.delete_adapters("a")
    found["without a"] = pixels(pipe)
    pipe.unet.load_lora_adapter(
        folder / "saved", None, weight_name="pytorch_lora_weights.safetensors", adapter_name="again"
    )
    pipe.set_adapters("again")
    pipe.unet.delete_adapters("b")
    found["unknown name"] = error_of(lambda: pipe.set_adapters("b"))
    found["saved and loaded"] = pixels(pipe)
    pipe.unet.delete_adapters("again")
    found["layers left"] = str(sum(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules()))
    pipe.unload_lora_weights()
    found["base"] = pixels(pipe)
    return found


def two_layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))


def peft_calls(folder: Path) -> Results:
    """The methods of a `PeftModel` with plain LoRAs. → step: output (3, 6) or message."""
    x, found = torch.linspace(-1, 1, 15).reshape(3, 5), {}
    model = get_peft_model(two_layers(), LoraConfig(r=3, lora_alpha=2, target_modules=["0", "2"])).eval()
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=2, target_modules=["2"]))
    disturb(model, 5)
    model.save_pretrained(folder / "peft")
    model = PeftModel.from_pretrained(two_layers(), folder / "peft").eval()
    found["one adapter"] = model(x)
    model.load_adapter(folder / "peft" / "b", "b")
    model.set_adapter("b")
    found["another"] = model(x)
    found["mixed batch"] = model(x, adapter_names=["default", "b", "__base__"])
    model.add_weighted_adapter(["default", "b"], [0.3, 0.6], "both", combination_type="cat")
    model.base_model.set_adapter("both")
    found["weighted sum"] = model(x)
    model.base_model.merge_adapter()
    found["merged"] = model.base_model.model(x)
    model.base_model.unmerge_adapter()
    _, state = convert_to_lora(model, 2, adapter_name="both")
    found["converted"] = torch.cat([tensor.flatten() for tensor in state.values()]).abs()  # up to the signs of an SVD
    model.delete_adapter("both")
    found["missing name"] = error_of(lambda: model.delete_adapter("both"))
    model.set_adapter("default")
    base = PeftModel.from_pretrained(two_layers(), folder / "peft").unload()
    found["unloaded"] = base(x)
    found["merged and unloaded"] = model.merge_and_unload()(x)
    return {step: value.detach() if isinstance(value, Tensor) else value for step, value in found.items()}


def transformers_calls(folder: Path) -> Results:
    """`load_adapter` and `from_pretrained` of a model of transformers. → step: logits (2, 5, 20)."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(folder / "llama")
    model = LlamaForCausalLM.from_pretrained(folder / "llama")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    disturb(adapted, 6)
    adapted.save_pretrained(folder / "llama-lora")
    ids, found = torch.arange(10).reshape(2, 5), {}
    model = LlamaForCausalLM.from_pretrained(folder / "llama")
    found["base"] = model(ids).logits
    model.load_adapter(folder / "llama-lora", "a")
    found["loaded"] = model(ids).logits
    found["from an adapter's folder"] = LlamaForCausalLM.from_pretrained(folder / "llama-lora")(ids).logits
    return {step: value.detach() for step, value in found.items()}


def all_calls(folder: Path) -> Results:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about adapters that are activated, deleted and merged
        found = {
            "Diffusers": diffusers_calls(folder),
            "PEFT": peft_calls(folder),
            "transformers": transformers_calls(folder),
        }
    return {f"{library}: {step}": value for library, steps in found.items() for step, value in steps.items()}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    results = all_calls(out)
    assert "nara_diffusion" not in sys.modules
    torch.save(results, out / "results.pt")
