import math
from types import SimpleNamespace

import pytest
import torch

from flame.training.lr_schedule import build_lr_schedule


def rates(steps, lr=1.0, **settings):
    """The learning rate of each step under the configured schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = build_lr_schedule([optimizer], config(**settings), steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def config(warmup_steps=0, decay_ratio=None, decay_type="linear", min_lr_factor=0.0, total_steps=None):
    return SimpleNamespace(
        warmup_steps=warmup_steps,
        decay_ratio=decay_ratio,
        decay_type=decay_type,
        min_lr_factor=min_lr_factor,
        total_steps=total_steps,
    )


def test_wsd_warms_up_stays_and_decays_by_one_minus_square_root():
    seen = rates(10, warmup_steps=2, decay_ratio=0.4, decay_type="sqrt", min_lr_factor=0.1)
    decay = [0.1 + 0.9 * (1 - math.sqrt(i / 4)) for i in range(1, 4)]
    assert seen == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, *decay])


def test_cosine_decays_from_the_end_of_warmup_to_the_last_step():
    seen = rates(6, warmup_steps=2, decay_type="cosine")
    assert seen == pytest.approx([0.5, 1, 1, *[0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3)]])


def test_linear_reaches_its_floor_one_step_after_the_last():
    assert rates(4, min_lr_factor=0.5) == pytest.approx([1, 0.875, 0.75, 0.625])


def test_a_resumed_run_takes_todays_learning_rate_at_the_saved_step():
    def optimizer_and_schedule(lr):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        return optimizer, build_lr_schedule([optimizer], config(warmup_steps=4), 8)

    first_optimizer, first = optimizer_and_schedule(lr=1.0)
    for _ in range(2):
        first_optimizer.step()
        first.step()
    optimizer, schedule = optimizer_and_schedule(lr=3.0)
    optimizer.load_state_dict(first_optimizer.state_dict())
    schedule.load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.75  # the checkpoint's
    assert schedule.apply() == (0.75, 3.0 * 0.75)
    assert optimizer.param_groups[0]["lr"] == 3.0 * 0.75
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 3.0
