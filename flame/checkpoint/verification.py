"""The ranks' word on checkpoints: what one of them finds, all of them act on."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import logger

from flame.checkpoint.commit import verify_hashes
from flame.errors import UserError
from flame.runtime.consensus import RankConsensus

VERIFY_TIMEOUT = timedelta(days=1)  # a rank may have a file of terabytes to hash, while the others wait for it


def _prove(consensus: RankConsensus, checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, whose files the ranks share out to hash; the same on all ranks.

    Raises UserError, on all ranks, if one of them cannot read a file.
    """
    found: list[str] | UserError
    try:
        found = verify_hashes(checkpoint, dist.get_rank(), dist.get_world_size())
    except UserError as error:
        found = error
    everywhere = consensus.gather(found)
    for of_rank in everywhere:
        if isinstance(of_rank, UserError):
            raise of_rank
    return [complaint for of_rank in everywhere for complaint in of_rank]


def find_intact(consensus: RankConsensus, checkpoints: Sequence[Path], flag: str) -> Path:
    """The first of these checkpoints that is whole; says what is wrong with those before it.

    Raises UserError, in which `flag` stands for the setting that named them.
    """
    damage: list[str] = []
    for checkpoint in checkpoints:
        damage = _prove(consensus, checkpoint)
        if not damage:
            return checkpoint
        if dist.get_rank() == 0 and len(checkpoints) > 1:
            logger.error(f"{checkpoint} is damaged and is not used: {'; '.join(damage)}")
    more = ", and so are those after it" if len(checkpoints) > 1 else ""
    raise UserError(f"{flag}: {checkpoints[-1]} is damaged{more}: {damage[0]}")
