"""A LoRA out of a model whose base is quantised: it is a matter of A, B and C alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nara_diffusion import to_lora
from tests.helpers.adapted import adapted, default_core, relative_error
from tests.helpers.exported import EXACT, update_of

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_folds_without_being_read(bits):
    torch.manual_seed(3)
    layer = (
        bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
        if bits == 4
        else bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    )
    base = nn.ModuleDict({"layer": layer}).to("cpu")  # moving quantises
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = bits == 4, bits == 8
    model = adapted(base, target_modules=["layer"])
    lora = to_lora(model, 0.37).layers["layer"]
    core = default_core(model, torch.tensor([0.37]))[0]
    update = lora.scaling * lora.B.double() @ lora.A.double()
    assert relative_error(update, update_of(model.base_model.model["layer"], core=core)) < EXACT
