"""The speed of one loop, in a process of its own: python -m scripts.gpu_check.speed '{"run": "flame", ...}'

The loops are those of the rehearsal (scripts/rehearsal/run.py) and transformers' Trainer.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# What the steps are for: the first compiles, the others before STARTED are counted or let things settle.
WAITS, PROFILED, STARTED, LAST = 3, 4, 5, 15
LOG_EVERY = 5


class Clock:
    """Counts a step's waits and kernels, and times ten steps; in the place of the rehearsal's Meter."""

    def __init__(self, set_microbatches: Callable[[int], None], microbatches: int) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        self._times: dict[int, float] = {}
        self._places: Counter[str] = Counter()
        self._profile: Any = None
        self._step = contextlib.ExitStack()

    def watch(self, parts: Iterable[Any]) -> None:
        pass

    def step(self, number: int, run: Callable[[], Any]) -> None:
        """Run step `number` of a job, whose first is 1."""
        self.begin(number)
        run()
        self.end(number)

    def begin(self, number: int) -> None:
        if number == 1:
            self._note_time(0)
        if self._cuda and number == WAITS:
            self._step.enter_context(self._hear())
        if self._cuda and number == PROFILED:
            from torch.profiler import ProfilerActivity, profile, record_function

            self._note_time(-1)
            self._profile = self._step.enter_context(profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]))
            self._step.enter_context(record_function("the step"))

    def end(self, number: int) -> None:
        self._step.close()
        if number in (1, STARTED, LAST):
            self._note_time(number)

    def result(self) -> dict[str, Any]:
        times = self._times
        found: dict[str, Any] = {
            "step_ms": 1e3 * (times[LAST] - times[STARTED]) / (LAST - STARTED),
            "first_step_s": times[1] - times[0],
        }
        if self._cuda:
            found |= count_events(self._profile.events()) | {
                "places": dict(self._places),
                "memory_gib": self._cuda.max_memory_allocated() / 2**30,
                "reserved_gib": self._cuda.max_memory_reserved() / 2**30,
            }
        return found

    def _note_time(self, number: int) -> None:
        if self._cuda:
            self._cuda.synchronize()
        self._times[number] = time.perf_counter()

    @contextlib.contextmanager
    def _hear(self) -> Iterator[None]:
        """Note where the host waits in PyTorch's own calls; it knows nothing of waits for an event."""
        from scripts.rehearsal.count import find_place

        def note(message: Any, *_: Any, **__: Any) -> None:
            if "synchronizing" in str(message):
                self._places[find_place()] += 1

        assert self._cuda
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note  # type: ignore[assignment]
            self._cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                self._cuda.set_sync_debug_mode("default")


def count_events(events: Iterable[Any]) -> dict[str, Any]:
    """Waits of the host and kernels of the step that a profile saw, from its events."""
    on_device, on_host = [], []
    for event in events:
        (on_device if str(event.device_type).endswith("CUDA") else on_host).append(event)
    step = next(event.time_range for event in on_host if event.name == "the step")
    inside = [event for event in on_host if step.start <= event.time_range.start < step.end]
    on_device = [event for event in on_device if not event.is_user_annotation]
    # A copy that the host waits for is a wait for its stream, or, to pageable memory, a cudaMemcpy.
    waits = [event for event in inside if event.name.endswith("Synchronize") or event.name == "cudaMemcpy"]
    return {
        "waits": {"count": len(waits), "ms": sum(event.cpu_time_total for event in waits) / 1e3},
        "kernels": {"count": len(on_device), "ms": sum(event.device_time_total for event in on_device) / 1e3},
    }


def run_trainer(spec: Any, job: Any, make_meter: Callable[..., Clock], building: Callable[[], Any]) -> dict[str, Any]:
    """transformers' Trainer in bfloat16 (autocast), with fused AdamW."""
    import torch
    from torchtitan.tools.utils import device_type
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from flame.models.hf import build_hf, read_config, read_fields

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # it would start a process group
        os.environ.pop(name, None)
    with torch.device(device_type), building():
        model = build_hf(read_config(read_fields(job.model.config), job.model.config)[1])
    meter, training = make_meter(lambda count: None, 1), job.training

    class Measured(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.begin(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.end(state.global_step)

    tokens = torch.randint(256, (training.local_batch_size * training.steps, training.seq_len))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=job.job.dump_folder, per_device_train_batch_size=training.local_batch_size, max_steps=training.steps,
        bf16=True, optim="adamw_torch_fused", max_grad_norm=1.0, report_to=[], save_strategy="no",
        logging_steps=LOG_EVERY, use_cpu=device_type == "cpu",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[Measured()]).train()
    return meter.result()


def main(given: dict[str, Any]) -> None:
    from scripts.gpu_check.rank import stubbed
    from scripts.rehearsal import device
    from scripts.rehearsal.run import Spec, make_job, run_bare, run_flame, run_torchtitan

    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= ranks
    building: Callable[[], Any] = contextlib.nullcontext
    if stubbed():
        stub = device.enter(1, compile_kernels=False, packed="--training.varlen" in given["flags"])
        building = partial(stub.reading, False)
    from flame.runtime import device as flame_device
    from flame.runtime import log

    log.configure()
    flame_device.choose()
    if stubbed():
        device.expect_good_steps()
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        config = given["config"]
        if given["tiny"]:
            from scripts.gpu_check.models import small

            config = f"{folder}/tiny.json"
            Path(config).write_text(small(given["config"])[1].to_json_string())
        flags = [*given["flags"], f"--training.steps={LAST}", f"--metrics.log_freq={LOG_EVERY}"]
        spec = Spec(given["run"], config, flags, 1, None, False, given["result"])
        job = make_job(spec, Path(folder))
        run = {"flame": run_flame, "bare": run_bare, "Trainer": run_trainer}.get(spec.run, run_torchtitan)
        result = run(spec, job, Clock, building)
        result |= summarize(job, result, Path(folder, "run/metrics.jsonl"))
        result["job"] = [f"--model.config={given['config']}", *given["flags"]]
    Path(spec.result).write_text(json.dumps(result) + "\n")


def summarize(job: Any, found: dict[str, Any], metrics: Path) -> dict[str, Any]:
    """Tokens a second, the MFU by flame's FLOPs, and flame's losses."""
    import torch
    from torchtitan.tools.utils import device_type

    from flame.models.causal_lm import CausalLM, ModelArgs
    from flame.models.hf import load_hf_config
    from flame.training.metrics import known_peak_flops

    with torch.device("meta"):
        args = ModelArgs().bind(*load_hf_config(job.model.config))
        _, flops = args.get_nparams_and_flops(CausalLM(args), job.training.seq_len)
    rate = job.training.local_batch_size * job.training.seq_len / found["step_ms"] * 1e3
    peak = known_peak_flops(torch.cuda.get_device_name()) if device_type == "cuda" else None
    logged = metrics.read_text().splitlines() if metrics.exists() else []
    return {
        "tokens_per_second": rate,
        "mfu": rate * flops / peak if peak else None,
        "losses": [json.loads(line)["loss"] for line in logged],
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # not past the threads of the process group
