"""Custom cores and which modules read which; masks at every timestep; and theorem 4.1: shared factors of updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, float32, float64, nn

from nara_diffusion import core_matrix, noise_level, register_core, shared_factors
from nara_diffusion.cores.other_cores import BinsCore, RankMaskCore
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, nara_config, relative_error

pytestmark = pytest.mark.usefixtures("_custom_cores")


class Still(nn.Module):
    """It reads nothing."""

    needs_noise = False

    def __init__(self, config: Any, rank: int) -> None:
        super().__init__()
        self.P = nn.Parameter(0.1 * torch.randn(rank, rank))

    def forward(self) -> Tensor:
        return self.P[None]


class Answering(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, noise_level: Tensor) -> Any:
        return self.answer


def one_layer(core: Any) -> PeftModel:
    register_core("mine", core)
    return adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type="mine")


def test_custom_core_registered_last_needs_lambda_by_default() -> None:
    x, model = torch.randn(3, 7), one_layer(lambda config, rank: Answering(torch.eye(rank)[None]))
    with pytest.raises((ValueError, RuntimeError), match=r"noise_level\(model"):
        model(x)
    model = one_layer(Still)
    layer, (P,) = model.base_model.model.layer, (t for name, t in model.named_parameters() if name.endswith("core.P"))
    A, B = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
    expected = layer.get_base_layer()(x).double() + 6 / 4 * x.double() @ (B @ P.double() @ A).T
    assert relative_error(model(x), expected) < 2e-6


def test_custom_core_of_another_dtype_becomes_float32() -> None:
    model = one_layer(lambda config, rank: Still(config, rank).double())
    core = core_matrix(model, 0.5)
    (P,) = (t for name, t in model.named_parameters() if name.endswith("core.P"))
    assert P.dtype == core.dtype == float32
    torch.testing.assert_close(core[0], P)


@pytest.mark.parametrize("core_type", ["hypernetwork", "knots", "mine"])
def test_core_that_loads_bfloat16_stays_float32(core_type: str) -> None:
    register_core("mine", Still)
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type=core_type)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(half, assign=True)
    loaded = {name: tensor for name, tensor in model.state_dict().items() if ".cores." in name}
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in loaded.items())
    assert {tensor.dtype for tensor in loaded.values()} == {float32}
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_custom_core_with_wrong_parts_is_refused() -> None:
    for name in ("hypernetwork", "bins", "", 3):
        with pytest.raises(ValueError, match=f"^name is {name!r}: choose a text other than 'hypernetwork'"):
            register_core(name, Still)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"factory of core_type 'mine' returned Tensor: return a torch\.nn\.Module"):
        one_layer(lambda config, rank: torch.eye(rank))
    for answer, message in [
        (torch.eye(3), r"returned \(3, 3\) for 3 value\(s\) of λ and rank 4: return C \(3, 4, 4\), or"),
        (torch.ones(2, 4, 4), r"returned \(2, 4, 4\) for 3 value\(s\) of λ"),
        (3, "returned int for 3"),
    ]:
        model = one_layer(lambda config, rank, answer=answer: Answering(answer))
        with noise_level(model, torch.rand(3)), pytest.raises(ValueError, match=f"core_type 'mine' {message}"):
            model(torch.randn(3, 7))


def test_modules_named_like_dictionary_methods_have_own_cores() -> None:
    base = nn.Module()
    base.keys, base.pop = nn.Linear(7, 5), nn.Linear(7, 5)
    base.forward = lambda x: base.keys(x) + base.pop(x)
    model = adapted(base, target_modules=["keys", "pop"], core_sharing="module_type")
    with noise_level(model, 0.4):
        assert model(torch.randn(2, 7)).shape == (2, 5)
    assert not torch.equal(core_matrix(model, 0.4, module="keys"), core_matrix(model, 0.4, module="pop"))
    for arguments, message in [
        ({}, "2 cores: pass module="),
        ({"module": "third"}, "'third' is not a module adapted by 'default'"),
        ({"adapter_name": "other"}, "no adapter with the name 'other'; its adapters are 'default'"),
    ]:
        with pytest.raises(ValueError, match=message):
            core_matrix(model, 0.4, **arguments)


def test_all_linear_never_adapts_a_core() -> None:
    model = adapted(TwoLayers(), target_modules="all-linear")
    model.add_adapter("other", nara_config(target_modules="all-linear"))
    adapted_modules = {name.split(".lora_A")[0] for name in model.state_dict() if ".lora_A.other" in name}
    assert adapted_modules == {"base_model.model.first", "base_model.model.second"}


ROUNDINGS = (torch.arange(1000) / 1000, 1 - (1000 - torch.arange(1000)) / 1000, torch.arange(1000) * (1 / 1000))
"""t / 1000 in float32, as three orders of operations round it."""


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_rank_mask_equals_that_of_tlora(exponent: float) -> None:
    """T-LoRA's line, in Python's float64, at each timestep of 1 000."""
    for rank in (*range(1, 13), 16, 26, 51, 64, 101, 126, 128):  # steps of whole ranks at round timesteps
        for least in {1, 2, rank // 3, rank // 2, rank - 1, rank} & set(range(1, rank + 1)):
            expected = [int(((1000 - t) / 1000) ** exponent * (rank - least)) + least for t in range(1000)]
            for level in ROUNDINGS:
                active = RankMaskCore(rank, least, exponent).active_rank(level)
                assert active.tolist() == expected, (rank, least)
                of_pairs = RankMaskCore(2 * rank, 2 * least, exponent, step=2).active_rank(level)
                assert torch.equal(of_pairs, 2 * active)


def test_rank_mask_without_minimum_is_as_in_02() -> None:
    steps = torch.arange(1000)
    for rank in (1, 2, 3, 4, 5, 7, 8, 16, 24, 32, 48, 64, 96, 128):
        least = max(1, rank // 2)
        expected = (rank - least) * (1000 - steps) // 1000 + least
        assert torch.equal(RankMaskCore(rank).active_rank(steps / 1000).long(), expected), rank


def test_chosen_bin_equals_that_of_integers() -> None:
    for bins in range(1, 129):
        expected = torch.arange(1000) * bins // 1000
        for level in ROUNDINGS:
            assert torch.equal(BinsCore(bins, bins).chosen_bin(level).long(), expected), bins
        assert BinsCore(bins, bins).chosen_bin(torch.ones(1)) == bins - 1


# ---------------------------------------------------------------------- theorem 4.1


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def updates_of_rank(n: int, d_out: int, d_in: int, rank: int) -> Tensor:
    """n matrices that share column and row spaces of dimension `rank`."""
    return random(d_out, rank) @ random(n, rank, rank) @ random(rank, d_in)


def test_shared_factors_reproduce_updates_at_smallest_rank() -> None:
    shapes = [(1, 9, 6, 2), (3, 9, 6, 4), (5, 6, 11, 6), (2, 40, 30, 7), (4, 7, 7, 1)]
    for updates, rank, is_padded in [
        *((updates_of_rank(*shape).to(dtype), shape[-1], False) for shape in shapes for dtype in (float32, float64)),
        (torch.cat([random(1, 12, 2) @ random(1, 2, 10), random(1, 12, 3) @ random(1, 3, 10)]), 5, False),
        (random(12, 1) @ random(4, 1, 10), 4, True),  # one column space, four rows
        (random(3, 5, 8), 8, True),  # one side exhausted
        (torch.zeros(2, 5, 4), 1, True),
        (torch.diag(torch.tensor([1.0, 1e-5, 0.0], dtype=float64))[None], 2, False),  # a weak direction counts
    ]:
        B, cores, A = shared_factors(updates)
        assert (B.shape[1], *cores.shape, A.shape[0]) == (rank, len(updates), rank, rank, rank)
        assert {t.dtype for t in (B, cores, A)} == {updates.dtype}
        assert relative_error(B @ cores @ A, updates) < (1e-13 if updates.dtype == float64 else 2e-6)
        for product in () if is_padded else (B.T @ B, A @ A.T):
            torch.testing.assert_close(product, torch.eye(rank, dtype=updates.dtype), atol=1e-5, rtol=0)


def test_a_smaller_rank_keeps_the_leading_directions() -> None:
    updates = updates_of_rank(3, 9, 8, 4)
    B, cores, A = shared_factors(updates, rank=2)
    assert cores.shape == (3, 2, 2)
    U = torch.linalg.svd(torch.cat(list(updates), dim=1))[0][:, :2]
    V = torch.linalg.svd(torch.cat(list(updates), dim=0))[2][:2]
    assert relative_error(B @ cores @ A, U @ U.T @ updates @ V.T @ V) < 1e-12


def test_shared_factors_refuses_a_rank_out_of_range() -> None:
    for rank in (0, 6):
        with pytest.raises(ValueError, match=f"rank is {rank}: it has to lie between 1 and .* 5"):
            shared_factors(torch.randn(2, 5, 4), rank)
