"""Trainers with faults: in gradients, data, clocks and disks."""

import json
import math
import signal
import sys
from collections import Counter
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from flame.drills.fault import Stall, is_last_rank, limit_file_size
from flame.errors import NonFiniteError
from flame.training.context import RunContext
from flame.training.nonfinite import name_state
from flame.training.trainer import FlameTrainer, StepData


class Poisoned(FlameTrainer):
    """NaN on the last rank, in what job.description names and in these steps: "gradient|loss|weight|moment FIRST-LAST".

    Checks that a step leaves weights and optimizer unchanged if its gradient or loss is NaN, and only then. The error
    that stops the run becomes its status.
    """

    def __init__(self, job_config, context):
        self.what, _, steps = job_config.job.description.partition(" ")
        first, _, last = steps.partition("-")
        self.bad_steps = range(int(first), int(last or first) + 1)
        super().__init__(job_config, context)

    def _poison(self, what):
        return what == self.what and self.step in self.bad_steps and is_last_rank()

    def forward_backward_step(self, **arguments):
        loss = super().forward_backward_step(**arguments)
        if self._poison("gradient"):
            list(self.model_parts[-1].parameters())[2].grad.fill_(math.nan)
        return loss * math.nan if self._poison("loss") else loss

    def _state(self):
        state = name_state(self.model_parts, self.optimizers)
        return {name: tensor.clone() for name, tensor in state}

    def train_step(self, data_iterator):
        before, kept = self._state(), self.what in ("gradient", "loss") and self.step in self.bad_steps
        try:
            super().train_step(data_iterator)
        finally:
            after = self._state()
            same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
            assert same == kept, f"step {self.step}"
        if self._poison("weight"):
            list(self.model_parts[-1].parameters())[2].data.fill_(math.inf)
        if self._poison("moment"):
            optimizer = self.optimizers.optimizers[-1]
            optimizer.state[optimizer.param_groups[0]["params"][2]]["exp_avg"].fill_(math.nan)

    def train(self):
        try:
            super().train()
        except NonFiniteError as error:
            self.run.set_status("failed", reason=str(error))


class MaskedLabels(FlameTrainer):
    """Labels that are a multiple of three, about a third, are masked."""

    def _collect(self, data_iterator):
        data = super()._collect(data_iterator)
        masked = [(inputs, labels.masked_fill(labels % 3 == 0, -100)) for inputs, labels in data.microbatches]
        return data._replace(microbatches=masked, valid_tokens=sum(int((labels != -100).sum()) for _, labels in masked))


class EndingData(FlameTrainer):
    """The data of the last rank ends at step 3, while the others have more."""

    def _collect(self, data_iterator):
        if self.step == 3 and is_last_rank():
            return StepData([], 0, 0, exhausted=True)
        return super()._collect(data_iterator)


class SlowData(Stall):
    """The last rank waits a second for the data of step 2."""

    stall_step, stall_seconds = 2, 1.0


class Odd(FlameTrainer):
    """By job.description: "clock": a save is due at step 2 by the clock of the last rank alone; "disk": the first rank
    cannot write at step 2, and TensorBoard never again. Records the timeout of collectives after each step.
    """

    def train_step(self, data_iterator):
        what, rank = self.job_config.job.description, dist.get_rank()
        if what == "clock" and self.step == 2 and is_last_rank():
            self.checkpointer.last_save = -math.inf
        if what == "disk" and self.step == 2 and rank == 0:
            limit_file_size(10)
            (tensorboard,) = self.metrics_processor.logger._loggers
            tensorboard.log({"full": 1.0}, 2)
            with suppress(OSError):  # all that follow raise it, from whatever they are called
                tensorboard.writer.flush()
        try:
            super().train_step(data_iterator)
        finally:
            limit_file_size(-1)
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        self.timeouts[self.step] = backend.options._timeout.total_seconds()

    def train(self):
        self.timeouts = {}
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=300))  # that of a group that no job has used before
        super().train()
        if self.run.writes:
            (self.run.folder / "timeouts.json").write_text(json.dumps(self.timeouts))


class Asked(FlameTrainer):
    """The last rank gets a signal, or the first one's time limit passes, as job.description says: "STEP:CALL reason".

    CALL counts how often a rank was asked since a step began: in the step, then before each batch of validation.
    """

    def __init__(self, job_config, context):
        place, _, reason = job_config.job.description.partition(" ")
        asked, calls = tuple(map(int, place.split(":"))) if ":" in place else None, Counter()

        def find_request():
            calls[self.step] += 1
            if (self.step, calls[self.step]) == asked:
                if reason == "max_wall_time":
                    context.deadline = 0 if dist.get_rank() == 0 else math.inf
                elif is_last_rank():
                    context.signals.asked = signal.Signals[reason]
            return RunContext.find_request(context)

        context.find_request = find_request
        super().__init__(job_config, context)


class Recorded(FlameTrainer):
    """Writes to reads-RANK.json, for each step, in order: what read a tensor, reduced over ranks, or updated.

    A step's data are read and counted on the host before it; what that reads is left out.
    """

    def _collect(self, data_iterator):
        with _disable_current_modes():
            return super()._collect(data_iterator)

    def train_step(self, data_iterator):
        with Reads() as reads:
            super().train_step(data_iterator)
        self.reads.append(reads.names)

    def train(self):
        self.reads = []
        super().train()
        (self.run.folder / f"reads-{dist.get_rank()}.json").write_text(json.dumps(self.reads))


class Reads(TorchDispatchMode):
    """The names of the operations after which the host knows a number, all-reduces, and the optimizer's update."""

    NAMES = ("_local_scalar_dense", "equal", "nonzero", "allreduce_", "all_reduce", "_fused_adamw_")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does comes here next
        if (name := function.overloadpacket.__name__) in self.NAMES:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.tolist = torch.Tensor.tolist
        torch.Tensor.tolist = lambda tensor: self.names.append("tolist") or self.tolist(tensor)
        return super().__enter__()

    def __exit__(self, *raised):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*raised)


class Watched(FlameTrainer):
    """Writes to scans-RANK how often this process listed a folder of checkpoints from the import of this module on."""

    scans = 0

    def train(self):
        (self.run.folder / f"scans-{dist.get_rank()}").write_text(str(Watched.scans))
        super().train()


def _count_scans(event, arguments):
    if event == "os.scandir" and str(arguments[0]).endswith("/checkpoint"):
        Watched.scans += 1


sys.addaudithook(_count_scans)
