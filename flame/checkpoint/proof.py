"""The ranks' word on checkpoints: what one of them finds, all of them act on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torchtitan.tools.logging import logger

from flame.checkpoint.commit import verify
from flame.errors import UserError

Answer = TypeVar("Answer")


def agree(ask: Callable[[], Answer]) -> Answer:
    """The answer of the first rank, or the UserError that it met, on all ranks; an OSError becomes one."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [ask()]
        except UserError as error:
            answer = [error]
        except OSError as error:
            answer = [UserError(f"--checkpoint.folder: {error}")]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def _prove(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, whose files the ranks share out to hash; the same on all ranks."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, verify(checkpoint, dist.get_rank(), len(ranks)))
    return [complaint for found in ranks for complaint in found]


def find_whole(checkpoints: Sequence[Path], flag: str) -> Path:
    """The first of these checkpoints that is whole; says what is wrong with those before it.

    Raises UserError, in which `flag` stands for the setting that named them.
    """
    damage: list[str] = []
    for checkpoint in checkpoints:
        damage = _prove(checkpoint)
        if not damage:
            return checkpoint
        if dist.get_rank() == 0 and len(checkpoints) > 1:
            logger.error(f"{checkpoint} is damaged and is not used: {'; '.join(damage)}")
    more = ", and so are those after it" if len(checkpoints) > 1 else ""
    raise UserError(f"{flag}: {checkpoints[-1]} is damaged{more}: {damage[0]}")
