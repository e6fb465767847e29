"""An adapter whose factors float16 can't hold is refused by a half-precision pipeline, which stays as it was."""

import pytest
import torch
from peft import inject_adapter_in_model

from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import small_sdxl

TARGETS = ["to_q", "conv1"]


def saved(folder, where, value):
    """A NaRA in float32, one element of which is `value`."""
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=TARGETS), "toy")
    encoder = nara_config(core_type="identity", target_modules=["q_proj"])
    inject_adapter_in_model(encoder, pipe.text_encoder, "toy")
    component, factor = where
    for model in (pipe.unet, pipe.text_encoder):
        disturb(model)
    name, layer = [(n, m) for n, m in getattr(pipe, component).named_modules() if hasattr(m, "lora_A")][-1]
    with torch.no_grad():
        getattr(layer, f"lora_{factor}")["toy"].weight.view(-1)[3] = value
    pipe.save_nara_weights(folder, adapter_name="toy")
    return rf"{component}: .*{name}\.lora_{factor}\.(toy\.)?weight"


def weights(pipe):
    return {name: tensor.clone() for model in (pipe.unet, pipe.text_encoder)
            for name, tensor in model.state_dict().items()}  # fmt: skip


@pytest.mark.parametrize(
    ("where", "value"), [(("unet", "A"), 65520.0), (("unet", "B"), -7e4), (("text_encoder", "A"), 65520.0)]
)
def test_a_factor_that_overflows_float16_is_refused_and_loads_in_bfloat16(tmp_path, where, value):
    name = saved(tmp_path, where, value)
    pipe = small_sdxl().to(torch.float16)
    before = weights(pipe)
    with pytest.raises(ValueError, match=rf"{name}.* too large for its layer: .* bfloat16 or float32"):
        pipe.load_nara_weights(tmp_path, adapter_name="toy")
    after = weights(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    for dtype in (torch.bfloat16, torch.float32):
        other = small_sdxl().to(dtype)
        other.load_nara_weights(tmp_path)
        assert all(tensor.isfinite().all() for tensor in weights(other).values())


def test_the_largest_number_of_float16_loads(tmp_path):
    saved(tmp_path, ("unet", "A"), 65504.0)
    pipe = small_sdxl().to(torch.float16)
    pipe.load_nara_weights(tmp_path)
    assert all(tensor.isfinite().all() for tensor in weights(pipe).values())
    assert max(tensor.max() for key, tensor in weights(pipe).items() if "lora_A" in key) == 65504


def test_hotswap_of_such_an_adapter_is_refused_and_keeps_the_old_one(tmp_path):
    saved(tmp_path / "old", ("unet", "A"), 0.5)
    saved(tmp_path / "new", ("unet", "A"), 1e5)
    pipe = small_sdxl().to(torch.float16)
    pipe.load_nara_weights(tmp_path / "old", adapter_name="toy")
    before = weights(pipe)
    with pytest.raises(ValueError, match=r"lora_A\.weight.* too large for its layer"):
        pipe.load_nara_weights(tmp_path / "new", adapter_name="toy", hotswap=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(pipe).items())
