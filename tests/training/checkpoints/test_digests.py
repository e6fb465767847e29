"""What a checkpoint knows its data and its base model by."""

import pytest
import torch
from torch import nn

from nara_diffusion.training.checkpoints.digests import digest_texts, digest_weights


class Weights(nn.Module):
    """Tensors of several sizes: less than the sums take, and more, with a rest."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.small = nn.Parameter(torch.randn(7, 3, generator=generator).to(dtype))
        self.large = nn.Parameter(torch.randn(61, 997, generator=generator).to(dtype))
        self.register_buffer("scalar", torch.tensor(2.0))


@pytest.fixture
def weights() -> Weights:
    return Weights()


def digest(module: nn.Module) -> str:
    return digest_weights({"unet": module})


def test_digest_of_equal_weights_is_equal(weights) -> None:
    assert digest(weights) == digest(Weights())


@pytest.mark.parametrize(("name", "place"), [("small", 20), ("large", 0), ("large", 30_000), ("large", 60_816)])
def test_digest_shows_the_change_of_one_bit(weights, name: str, place: int) -> None:
    before = digest(weights)
    getattr(weights, name).data.view(-1).view(torch.int32)[place] ^= 1
    assert digest(weights) != before


def test_digest_shows_values_that_change_places(weights) -> None:
    before = digest(weights)
    values = weights.large.data.view(-1)
    values[10], values[11] = values[11].clone(), values[10].clone()
    assert digest(weights) != before
    weights.large.data = Weights().large.data.flip(0)
    assert digest(weights) != before


def test_digest_shows_name_dtype_and_shape(weights) -> None:
    transposed = Weights()
    transposed.large.data = transposed.large.data.view(997, 61)
    others = [digest_weights({"vae": weights}), digest(Weights(torch.bfloat16)), digest(transposed)]
    assert len({digest(weights), *others}) == 4


def test_digest_goes_by_the_values_and_not_by_how_they_lie_in_memory(weights) -> None:
    before = digest(weights)
    weights.large.data = weights.large.data.t().contiguous().t()
    assert digest(weights) == before
    shifted = torch.empty(61 * 997 + 1)[1:]  # four bytes past a word's start
    shifted.copy_(weights.large.data.reshape(-1))
    weights.large.data = shifted.view(61, 997)
    assert digest(weights) == before


def test_digest_leaves_out_what_is_no_tensor() -> None:
    module = Weights()
    before = digest(module)
    module.get_extra_state = lambda: {"format": "nf4"}  # type: ignore[method-assign]
    assert digest(module) == before


def test_digest_of_texts_knows_where_one_ends() -> None:
    assert digest_texts(["ab", "c"]) != digest_texts(["a", "bc"])
    assert digest_texts(["\ud800"]) == digest_texts(["\ud800"])
