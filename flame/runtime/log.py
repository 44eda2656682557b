"""The log of a run: one plain line per event, without lines of torchtitan and its libraries that are wrong or idle."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler

_SUPPRESSED_LOG_PREFIXES = (
    "Error running lspci",  # torchtitan looks for its GPU table's names three times
    "Peak flops undefined",  # flame.training.metrics reports no MFU then, torchtitan an A100's
    "Peak FLOPS used",
    "[GC]",  # a line at each save
    "Building auto",  # forty lines of JSON; the run folder has config.json
    "CPU memory usage for model",  # on a CPU that is the whole process
    "Mixed precision training",  # says that autocast does it or nothing, where nothing is to be cast
    "Sleeping 2 seconds",
    "Destroying the purge thread",
    "ENV[",  # variables that torchrun set a moment ago
    *("The fast path is not", "The CUDA backend is not", "Mamba2 does not"),  # fla's code, which flame does not run
)
_SUPPRESSED_WARNINGS = (
    "In CPU autocast",  # torchtitan makes one that no run enters
    "Triton is not supported",  # flame.models.reference takes over
    "torch.distributed is disabled",  # exports read checkpoints without a process group on purpose
    "`torch.jit.script",  # inside torch
    "`torch.distributed.distributed_c10d._set_pg_timeout`",  # torchtitan's; torch 2.14 has another name for it
)


def configure() -> None:
    """Send the log to stdout; called once by a process that trains."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: not record.getMessage().startswith(_SUPPRESSED_LOG_PREFIXES))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for message in _SUPPRESSED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["KINETO_LOG_LEVEL"] = "5"  # silences torch.profiler, as torchtitan does


@contextmanager
def hold_back(library: str) -> Iterator[None]:
    """What a library logs in a block is logged at its end, and dropped if the block fails: its error says enough."""
    logger, held = logging.getLogger(library), BufferingHandler(capacity=1000)
    handlers, logger.handlers = logger.handlers, [held]
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    for record in held.buffer:
        logger.callHandlers(record)
