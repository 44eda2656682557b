"""Verification of checkpoints by all ranks: they share the files out to hash, and all get one result."""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import logger

from flame.checkpoint.commit import verify_hashes
from flame.errors import UserError
from flame.runtime.consensus import RankConsensus

VERIFY_TIMEOUT = timedelta(days=1)  # one rank may hash a file of terabytes while the others wait


def find_intact(consensus: RankConsensus, checkpoints: Sequence[Path], flag: str) -> Path:
    """The first of these checkpoints whose files have their saved hashes; the corrupted ones before it are logged.

    flag: the setting that named them. Raises UserError, on all ranks, if none is intact or a file cannot be read.
    """
    for checkpoint in checkpoints:
        found = consensus.each(partial(verify_hashes, checkpoint, dist.get_rank(), dist.get_world_size()))
        problems = list(chain.from_iterable(found))
        if not problems:
            return checkpoint
        if dist.get_rank() == 0 and len(checkpoints) > 1:
            logger.error(f"{checkpoint} is corrupted and is not used: {'; '.join(problems)}")
    more = "; those after it are corrupted too" if len(checkpoints) > 1 else ""
    raise UserError(flag, checkpoints[-1], "an intact checkpoint", f"{problems[0]}{more}")
