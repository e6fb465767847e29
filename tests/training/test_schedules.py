"""Which schedules are taken: those that can be followed to the end."""

import pytest
import torch

from nara_diffusion.training.optimization import SCHEDULES, build_scheduler, check_scheduler


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_that_is_taken_can_be_followed(small_args, name: str) -> None:
    args = small_args(lr_scheduler=name, lr_warmup_steps=0.0 if name == "constant" else 2.0)
    check_scheduler(args.lr_scheduler, args.lr_warmup_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=args.learning_rate)
    schedule = build_scheduler(optimizer, args, total_steps=6)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([0.01] * 3 if name == "constant" else [0.0, 0.005, 0.01])
    assert max(rates) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy", "cosine_with_min_lr", "warmup_stable_decay"])
def test_schedules_that_want_more_than_the_step_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"lr_scheduler is '{name}', expected one of linear, cosine"):
        check_scheduler(name)


def test_a_warm_up_of_the_constant_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'constant' has no warm-up, and lr_warmup_steps is 5: use constant_with_"):
        check_scheduler("constant", 5.0)
