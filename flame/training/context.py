"""What the parts of a run share on one rank: its folder, requests to stop, and what all ranks agree on."""

import math
import os
import time
from datetime import timedelta
from functools import cached_property
from typing import cast

from flame.checkpoint.start import StartPlan, plan_start
from flame.checkpoint.verification import VERIFY_TIMEOUT
from flame.config.schema import JobConfig
from flame.runtime import stop
from flame.runtime.consensus import RankConsensus
from flame.runtime.run_folder import Run

CONNECT_SECONDS = 300  # all ranks are there and only connect: a wrong interface is named before kernels could compile


class RunContext:
    """Made before the process group; `consensus` and `start` are collectives when they are first used."""

    def __init__(self, job_config: JobConfig, signals: stop.Signals | None = None) -> None:
        self.job_config = job_config
        self.is_first = os.environ.get("RANK", "0") == "0"
        self.run = Run(job_config.job.dump_folder, writes=self.is_first)
        self.signals = signals or stop.Signals(stop.note, stop.end_at_once)
        limit = job_config.training.max_wall_time
        self.deadline = stop.launched_at() + stop.seconds(limit) if limit else math.inf

    @cached_property
    def consensus(self) -> RankConsensus:
        """The one gloo group of the run."""
        connect = min(CONNECT_SECONDS, self.job_config.comm.init_timeout_seconds)
        return RankConsensus(VERIFY_TIMEOUT, timedelta(seconds=connect))

    @cached_property
    def plan(self) -> StartPlan | None:
        """How the job starts, on rank 0, which reads every checkpoint for it; None on the others. Raises UserError.

        Asked once the model is loaded: a job that went back to a step is recognized by its whole config.
        """
        return plan_start(self.job_config) if self.is_first else None

    @cached_property
    def start(self) -> StartPlan:
        """The plan of rank 0, on all ranks. Raises UserError on all of them."""
        return cast(StartPlan, self.consensus.first(lambda: self.plan))

    def find_request(self) -> int:
        """What asks this rank to stop: a signal's number, OUT_OF_TIME on rank 0 after the time limit, or 0."""
        late = self.is_first and time.monotonic() >= self.deadline
        return stop.OUT_OF_TIME if late else self.signals.asked

    def raise_if_stopped(self) -> None:
        """Raise Stopped on all ranks if one of them is asked to stop."""
        (asked,) = self.consensus.max(self.find_request())
        if asked:
            raise stop.Stopped(asked)
