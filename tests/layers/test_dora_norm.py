"""DoRA's norm comes from factors: exactly, without an update matrix, and not for layers where it can't be had."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, adapted, nara_config, relative_error


class LargestTensor(TorchDispatchMode):
    """Records the shape of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() > math.prod(self.shape):
                self.shape = tuple(tensor.shape)
        return result


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_update_matrix_is_ever_made(training):
    d_in, d_out, batch = 96, 80, 4
    model = adapted(OneLayer(nn.Linear(d_in, d_out)), target_modules=["layer"], use_dora=True)
    x = torch.randn(batch, 3, d_in, requires_grad=True)
    with noise_level(model, torch.linspace(0.1, 0.9, batch)), LargestTensor() as largest:
        output = model.train(training)(x)
        if training:
            output.sum().backward()
    # views of W0 and its gradient have d_out × d_in numbers; nothing may have that for each sample
    assert math.prod(largest.shape) <= d_out * d_in, largest.shape


def test_the_norm_at_llada_width_is_exact_to_float32():
    from nara_diffusion.layers.functional import factored_row_norm

    W0, A, K = torch.randn(512, 768) * 0.02, torch.randn(32, 768) * 0.02, torch.randn(4, 512, 32)
    exact = (W0.double() + 0.5 * K.double() @ A.double()).norm(dim=2)
    assert relative_error(factored_row_norm(W0, A, K, 0.5), exact) < 1e-6


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(13, 5), r"NaRA-DoRA cannot adapt 'layer' \(Embedding\): the norm of a whole vocabulary"),
        (nn.Conv2d(8, 8, 3, groups=2), r"NaRA-DoRA cannot adapt 'layer' \(Conv2d with groups > 1\)"),
    ],
)
def test_layers_whose_norm_cannot_be_had_are_refused_by_name(layer, message):
    base = OneLayer(layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, nara_config(target_modules=["layer"], use_dora=True))
    assert base.layer is layer
