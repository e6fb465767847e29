"""`nara diff`: distances of ΔW by dense matrices in float64, and what it says of fields and modules."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nara_diffusion import StrengthSchedule, core_matrix
from nara_diffusion.cli.adapter_file import read
from nara_diffusion.cli.diff import module_differences, relative
from nara_diffusion.cli.main import main
from nara_diffusion.cli.updates import updates_of
from tests.helpers.adapted import TwoLayers, disturb, nara_config

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
LEVELS = torch.tensor([0.0, 0.3, 0.55, 1.0])


class Mixed(nn.Module):
    """A linear layer, convolutions with and without groups, an embedding: no two sizes alike."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 11)
        self.conv = nn.Conv2d(3, 5, (2, 3))
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.embedding = nn.Embedding(13, 9)


def saved(model, path, seed=1, **changes):
    """The adapted model in float32, disturbed, and its folder."""
    options = {"target_modules": ["linear", "conv", "grouped", "embedding"], **changes}
    model = get_peft_model(model, nara_config(**options))
    disturb(model, seed)
    model.save_pretrained(path)
    return model


def dense(model, module, level):
    """ΔW as a matrix (d_out, d_in·k), in float64: by its definition."""
    layer = model.get_submodule(f"base_model.model.{module}")
    C = core_matrix(model, level)[0].double()
    s = layer.scaling["default"]
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return s * layer.lora_embedding_B["default"].double() @ C @ layer.lora_embedding_A["default"].double()
    A, B = (getattr(layer, f"lora_{x}")["default"].weight.double().flatten(1) for x in "AB")
    if (groups := getattr(layer.get_base_layer(), "groups", 1)) > 1:
        whole = B.new_zeros(len(B), len(A))
        for row in range(len(B)):
            group = row // (len(B) // groups)
            whole[row, group * B.shape[1] : (group + 1) * B.shape[1]] = B[row]
        B = whole
    return s * B @ C @ A


@torch.no_grad()
def test_norms_and_distances_are_those_of_the_dense_matrices(tmp_path):
    one, other = saved(Mixed(), tmp_path / "one"), saved(Mixed(), tmp_path / "other", seed=2, r=6)
    parts = [read(str(tmp_path / name)).parts["model"] for name in ("one", "other")]
    found = module_differences(*parts, LEVELS)
    assert set(found) == {"linear", "conv", "grouped", "embedding"}
    for module, squares in found.items():
        for column, level in enumerate(LEVELS.tolist()):
            W, V = (dense(model, module, level) for model in (one, other))
            wanted = torch.stack([(W - V).norm(), W.norm(), V.norm()]) ** 2
            torch.testing.assert_close(squares[:, column], wanted, rtol=1e-5, atol=1e-12)


@torch.no_grad()
def test_update_has_strength_scale_and_rank_of_its_module(tmp_path):
    changes = {"rank_pattern": {"first": 3}, "alpha_pattern": {"first": 5}, "use_rslora": True}
    changes |= {"strength": StrengthSchedule([(0, 1.0), (0.6, 0.2)]), "target_modules": ["first", "second"]}
    model = saved(TwoLayers(), tmp_path, **changes)
    updates = updates_of(read(str(tmp_path)).parts["model"], LEVELS)
    strength = StrengthSchedule([(0, 1.0), (0.6, 0.2)])(LEVELS).double()
    for module, alpha, rank in (("first", 5, 3), ("second", 6, 4)):
        layer = model.get_submodule(f"base_model.model.{module}")
        A, B = (getattr(layer, f"lora_{x}")["default"].weight.double() for x in "AB")
        C = core_matrix(model, LEVELS).double()[:, :rank, :rank]
        wanted = strength[:, None, None] * alpha / rank**0.5 * (B @ C @ A)
        update = updates[module]
        torch.testing.assert_close(update.B @ update.M @ update.A, wanted, rtol=1e-6, atol=1e-9)


def test_relative_distance_is_two_for_opposites_and_zero_for_nothing():
    squares = torch.tensor([[4.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(relative(squares), torch.tensor([2.0, 0.0, 1.0]))


def diffed(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main(["diff", *map(str, words)])
    return caught.value.code, capsys.readouterr()


def test_same_adapter_twice_differs_in_nothing(tmp_path, capsys):
    saved(Mixed(), tmp_path / "one")
    status, printed = diffed(capsys, tmp_path / "one", tmp_path / "one")
    assert status == 0
    assert printed.out == "the adapters are the same\n"


def test_magnitude_that_differs_alone_is_named(tmp_path, capsys):
    model = saved(TwoLayers(), tmp_path / "one", target_modules=["first", "second"], use_dora=True)
    model.base_model.model.second.lora_magnitude_vector["default"].weight.data[3] += 0.1
    model.save_pretrained(tmp_path / "other")
    status, printed = diffed(capsys, tmp_path / "one", tmp_path / "other")
    assert status == 1
    assert printed.out == "model:\n  magnitudes or biases differ in: second\n"


def test_diff_names_fields_modules_and_the_distance(tmp_path, capsys):
    saved(Mixed(), tmp_path / "one")
    saved(Mixed(), tmp_path / "other", seed=2, lora_alpha=8, target_modules=["linear", "conv"])
    status, printed = diffed(capsys, tmp_path / "one", tmp_path / "other", "--points", "3")
    assert status == 1
    assert "  lora_alpha: 6 → 8\n" in printed.out
    assert "  modules only in the first: embedding, grouped\n" in printed.out
    assert "ΔW of the 2 modules of both" in printed.out
    assert "0.00  0.50  1.00" in printed.out


def test_adapters_of_two_base_models_end_in_one_line(tmp_path, capsys):
    saved(Mixed(), tmp_path / "one", target_modules=["linear"])
    other = copy.deepcopy(Mixed())
    other.linear = nn.Linear(7, 12)
    saved(other, tmp_path / "other", target_modules=["linear"])
    status, printed = diffed(capsys, tmp_path / "one", tmp_path / "other")
    assert status == 2
    assert printed.err.startswith("error: ΔW of 'linear' is (11, 7) in one adapter and (12, 7) in the other")
    assert printed.err.count("\n") == 1
