"""Random numbers by (seed, stream, index)."""

import torch

from nara_diffusion.dreambooth.seeding import numpy_generator, seeded_normal, torch_generator


def test_a_row_depends_on_its_own_index_alone() -> None:
    together = seeded_normal((2, 3), seed=7, stream="noise", indices=[5, 0, 9])
    assert together.shape == (3, 2, 3)
    alone = [seeded_normal((2, 3), seed=7, stream="noise", indices=[index])[0] for index in (5, 0, 9)]
    assert together.equal(torch.stack(alone))
    torch.manual_seed(99)
    assert together.equal(seeded_normal((2, 3), seed=7, stream="noise", indices=[5, 0, 9]))


def test_seed_stream_and_index_each_change_the_numbers() -> None:
    keys = [(7, "noise", 5), (8, "noise", 5), (7, "crop", 5), (7, "noise", 6), (5, "noise", 7)]
    assert len({float(torch.randn((), generator=torch_generator(*key))) for key in keys}) == len(keys)
    assert len({float(numpy_generator(*key).random()) for key in keys}) == len(keys)


def test_rows_are_independent_standard_normal() -> None:
    normal = seeded_normal((50,), seed=0, stream="a", indices=range(400))  # (400, 50)
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert (torch.corrcoef(normal[:40]).triu(1).abs() < 0.75).all()
