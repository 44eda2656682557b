"""torchrun starts several ranks, here or on several nodes. Importing it takes as long as importing torch."""

import logging
import os
import sys
from subprocess import Popen

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from flame.errors import UserError
from flame.runtime.failure import Failure
from flame.runtime.output import RankOutput, report
from flame.runtime.ranks import FATAL, LocalRanks


class Torchrun:
    """A job of several ranks.

    argv: torchrun's own. words: the arguments of the program that a rank runs. shown: the local ranks whose output is
    printed, None for all.
    """

    def __init__(self, argv: list[str]) -> None:
        fatal = ",".join(number.name for number in FATAL)
        self._args = parse_args(["--signals_to_handle", fatal, "--log-dir", os.devnull, *argv])
        self.words: list[str] = self._args.training_script_args
        shown = self._args.local_ranks_filter
        self.shown = {int(rank) for rank in shown.split(",")} if shown else None

    def run(self, ranks: LocalRanks, output: RankOutput) -> dict[int, Failure]:
        """Run the ranks; {} or how those of this node failed, in the order of their ends.

        Raises SystemExit after a fatal signal, and if the nodes do not find each other.
        """
        for name in ("multiprocessing", "multiprocessing.errors"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        SubprocessContext.start = lambda context: ranks.start(lambda: _start(context))  # type: ignore
        config, program, words = config_from_args(self._args)
        endpoint, nodes = self._args.rdzv_endpoint, config.max_nodes
        if nodes > 1:
            report(f"waiting for {nodes} nodes at {endpoint}")
        config.logs_specs = _Pipes(output)
        try:
            elastic_launch(config=config, entrypoint=program)(*words)
            return {}
        except ChildFailedError as error:
            return {rank: Failure(f.exitcode, f.error_file, f.timestamp) for rank, f in error.failures.items()}
        except SignalException as signalled:
            sys.exit(128 + signalled.sigval)
        except RendezvousError as error:
            report(str(explain(error, endpoint, nodes)))
            sys.exit(1)


def explain(error: RendezvousError, endpoint: str, nodes: int) -> UserError:
    """Why the nodes did not find each other."""
    if isinstance(error, RendezvousTimeoutError | RendezvousClosedError):
        return UserError("NNODE", nodes, hint=f"not all of {nodes} nodes came to {endpoint}")
    found = f"{endpoint}, where no first node answers"
    return UserError("MASTER_ADDR, MASTER_PORT", found, hint=str(error.__cause__ or error))


def _start(context: SubprocessContext) -> list[Popen]:
    PContext.start(context)
    return [handler.proc for handler in context.subprocess_handlers.values()]


class _Pipes(LogsSpecs):
    """flame's pipes in the place of torchrun's files."""

    def __init__(self, output: RankOutput) -> None:
        super().__init__()
        self._output = output

    @property
    def root_log_dir(self) -> str:
        """For torchrun's own log."""
        return str(self._output.run / "logs")

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """What torchrun opens in place of the ranks' streams, before it starts them."""
        destination = LogsDest()
        for local, env in envs.items():
            rank = int(env["RANK"])
            stdout, stderr = self._output.open(rank, local, int(env["WORLD_SIZE"]))
            destination.stdouts[local], destination.stderrs[local] = f"/dev/fd/{stdout}", f"/dev/fd/{stderr}"
            destination.error_files[local] = env["TORCHELASTIC_ERROR_FILE"] = self._output.error_file(rank)
        return destination
