"""The parts of the GPU check, the most important first. Needs no torch: a part starts processes and judges what they
wrote."""

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scripts.gpu_check.bench import Bench, PartError, Skip, percent, records
from scripts.gpu_check.models import CONFIGS

STEPS, SAVED = 20, 10  # of a training part, and the step that it resumes from
# Relative bounds on bfloat16 against float32 over 20 steps. A CPU in bfloat16 differs by 0.02 % of the loss and 0.2 %
# of the norm for the Llama and the transformer, and by 0.2 % and 72 % for the GLA: its norm is that of the few tokens
# whose attention is almost 0, which its norm layers make large.
LOSS, NORM = 5e-3, 1e-2
KERNEL_FLOOR = {"output": 0.01, "gradient": 0.03}  # of kernels that round to bfloat16 inside; flame's references do not
WORSE = 3.0  # times the error of the same computation in bfloat16 on a CPU that the GPU may have
PACKED = 0.02
DRY_RUN = (0.8, 1.2)
FLA = ("gla_340M", "transformer_340M", "gated_deltanet_340M", "delta_net_340M", "kda_340M", "rwkv7_340M")
OTHERS = (
    *("gated_deltaproduct_340M", "hgrn2_340M", "gsa_340M", "retnet_340M", "mamba2_340M", "gla_hybrid_340M"),
    "gated_deltanet_hybrid_340M",
)
FLOAT8 = ["--model.converters=quantize.linear.float8", "--compile.enable"]
LLAMA = str(CONFIGS["llama_1B"])


class Part(NamedTuple):
    """limit: seconds, from when it begins."""

    name: str
    limit: float
    proves: str
    run: Callable[[Bench], None]


# -- (a) jobs ----------------------------------------------------------------------------------------------------------
def train(bench: Bench, name: str) -> None:
    """20 steps in bfloat16 with train.sh, the last ten again from the checkpoint, the export, and the CPU's losses."""
    whole = name == "debug" or bench.tiny  # the CPU can train it, too
    small = bench.small_model(name) if whole or name != "gla_340M" else None  # the debug job is a GLA, too
    model = small if whole else CONFIGS[name]
    shape = ["--training.seq_len=256"] if whole else ["--training.seq_len=512"]
    job = [
        *shape, f"--model.config={model}", "--training.local_batch_size=4", f"--training.steps={STEPS}",
        "--optimizer.lr=1e-4", "--lr_scheduler.warmup_steps=2", "--metrics.log_freq=1", "--debug.seed=0",
        "--debug.deterministic",
    ]  # fmt: skip
    run, cpu, shrunk = (bench.work / folder for folder in ("run", "cpu", "shrunk"))
    kept = [f"--checkpoint.interval={SAVED}", "--checkpoint.last_save_model_only"]
    begun = [f"--checkpoint.initial_load_path={small}", "--checkpoint.initial_load_in_hf"]
    alone = [*job, *begun, "--checkpoint.no_export", "--training.seq_len=256", f"--model.config={small}"]
    reference = bench.train(cpu, *alone, "--training.mixed_precision_param=float32", cpu=True) if small else None
    bench.wait(bench.train(run, *job, *kept, *(begun if whole else [])))
    first = records(run / "metrics.jsonl")
    losses = [record["loss"] for record in first]
    falls = len(losses) == STEPS and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    seconds = f"first step {first[0]['step_seconds']:.1f} s" if first else "no step"
    bench.check(f"{STEPS} steps", f"loss {losses[0]:.4f} to {losses[-1]:.4f}, {seconds}", falls)
    exported(bench, run)
    bench.wait(bench.train(run, *job, *kept, *(begun if whole else []), f"--checkpoint.load_step={SAVED}"))
    again, before = records(run / "metrics.jsonl")[SAVED:], records(run / "metrics.replaced.jsonl")
    bench.check(
        "resumed", f"at step {again[0]['step']}, {len(again)} steps", [r["step"] for r in again] == [*range(11, 21)],
        about="run",
    )  # fmt: skip
    names = ("step", "loss", "grad_norm", "lr", "tokens", "data_digest")
    differ = [r["step"] for r, other in zip(again, before, strict=True) if any(r[n] != other[n] for n in names)]
    figure = f"from step {differ[0]} on they differ" if differ else "loss, gradient norm and data, bit for bit"
    bench.check("resumed steps equal those before", figure, not differ)
    if reference:
        if not whole:
            bench.wait(bench.train(shrunk, *alone))
        bench.wait(reference)
        compare_losses(bench, run if whole else shrunk, cpu, bound_norm=name not in ("debug", "gla_340M"))


def exported(bench: Bench, run: Path) -> None:
    report = run / f"hf/step-{STEPS}/conversion_report.json"
    checks = json.loads(report.read_text())["checks"] if report.exists() else {}
    bench.check("export", f"proved: {', '.join(checks)}" if checks else "none", bool(checks), about="run")


def compare_losses(bench: Bench, run: Path, reference: Path, bound_norm: bool = True) -> None:
    """Losses and gradient norms of a run beside those of the CPU, on the same data from the same weights."""
    ours, theirs = (records(folder / "metrics.jsonl")[:STEPS] for folder in (run, reference))
    for name, bound in (("loss", LOSS), ("grad_norm", NORM if bound_norm else None)):
        pairs = [(one[name], other[name]) for one, other in zip(ours, theirs, strict=True)]
        worst = max(abs(a - b) / b if math.isfinite(a) else math.inf for a, b in pairs)
        limit, ok = ("", None) if bound is None else (f" (at most {percent(bound)})", worst <= bound)
        bench.check(f"{name} beside a CPU's in float32", f"differs by {percent(worst)}{limit}", ok)


# -- (b) kernels -------------------------------------------------------------------------------------------------------
def kernels(bench: Bench, configs: Sequence[str]) -> None:
    """Each kernel that fla's models call, and the models, beside flame's references. On a CPU these stand in for it."""
    for found in bench.ask("kernels", {"check": "kernels", "configs": configs[:2] if bench.tiny else configs}):
        name = found["config"]
        if "error" in found:
            bench.check(name, found["error"], False)
            continue
        bench.numbers[name] = found
        if failed := [f"{call['kernel']}: {call['error']}" for call in found["kernels"] if "error" in call]:
            bench.check(f"{name}: kernels run", "; ".join(failed), False)
        for what, floor in KERNEL_FLOOR.items():
            errors = sorted(
                ((call[what], max(floor, WORSE * call[f"cpu_{what}"]), call["kernel"])
                 for call in found["kernels"] if what in call), reverse=True,
            )  # fmt: skip
            over = [error for error in errors if not error[0] <= error[1]]
            shown = (
                f"{kernel} {percent(error)} (at most {percent(bound)})" for error, bound, kernel in over or errors[:1]
            )
            bench.check(f"{name}: {what}s of {len(errors)} kernels", ", ".join(shown), not over)
        for what in ("loss", "gradients"):
            bound = max(LOSS, WORSE * found[f"cpu_{what}"])
            figure = f"{percent(found[what])} (at most {percent(bound)})"
            bench.check(f"{name}: {what} of the model", figure, found[what] <= bound)
    bench.check_time()


def packed(bench: Bench, configs: Sequence[str]) -> None:
    """Documents packed into a row beside each alone."""
    for found in bench.ask("kernels", {"check": "packed", "configs": configs[:3] if bench.tiny else configs}):
        name = f"{Path(found['config']).stem}: packed"
        if "error" in found:
            bench.check(name, found["error"], False)
        elif found["logits"] is None:
            bench.check(name, "cannot keep documents apart, and says so", True, about="run")
        else:
            figure = f"logits {percent(found['logits'])}, gradients {percent(found['gradients'])}"
            ok = found["logits"] <= PACKED and found["gradients"] <= 2 * PACKED and found["leaking"] > 2 * PACKED
            bench.check(name, f"{figure} (not kept apart: {percent(found['leaking'])})", ok)
    bench.check_time()


def others(bench: Bench) -> None:
    """Kernels and packed documents of the less common families."""
    kernels(bench, OTHERS)
    packed(bench, OTHERS)


# -- (c) and (d) speed -------------------------------------------------------------------------------------------------
def measure(bench: Bench, loop: str, config: str = LLAMA, *flags: str) -> dict[str, Any]:
    """The numbers of a loop of 15 steps; see speed.py."""
    rows = 2 if bench.tiny else 8 if (bench.machine["memory_gib"] or 0) >= 64 else 2
    length = 128 if bench.tiny else 2048
    spec = {
        "run": loop, "config": config, "tiny": bench.tiny,
        "flags": [f"--training.local_batch_size={rows}", f"--training.seq_len={length}", *flags],
    }  # fmt: skip
    found = bench.ask("speed", spec)
    bench.check_time()
    if not found:
        raise PartError("the loop wrote no result")
    bench.numbers = numbers = found[0]
    speed = f"{numbers['tokens_per_second']:,.0f} tokens/s, {numbers['step_ms']:.1f} ms a step"
    if numbers.get("mfu"):
        speed += f", MFU {100 * numbers['mfu']:.1f} %"
    bench.check("speed", speed, None)
    if bench.on_gpu:
        waits, kernels = numbers["waits"], numbers["kernels"]
        figure = (
            f"waits {waits['count']} for {waits['ms']:.1f} ms, {kernels['count']:,} kernels of {kernels['ms']:.1f} ms"
        )
        bench.check("a step", f"{figure}, {numbers['memory_gib']:.2f} GiB", None)
    return numbers


def flame(bench: Bench) -> None:
    numbers = measure(bench, "flame")
    if bench.on_gpu:
        bench.check("MFU of at least 50 %", percent(numbers["mfu"] or 0), (numbers["mfu"] or 0) >= 0.5, about="speed")
        bench.check(
            "one wait of the host a step", f"{numbers['waits']['count']}", numbers["waits"]["count"] <= 1, about="speed"
        )


def peer(bench: Bench, loop: str) -> None:
    if loop == "Trainer" and not bench.machine["versions"]["accelerate"]:
        raise Skip("accelerate is not installed")
    numbers = measure(bench, loop)
    if ours := numbers_of(bench, "flame"):
        ratio = ours["tokens_per_second"] / numbers["tokens_per_second"]
        bench.check(
            "flame beside it", f"x{ratio:.3f}", ratio >= 1 if loop.startswith("torchtitan") else None, about="speed"
        )


def variant(bench: Bench, flags: Sequence[str]) -> None:
    """flame with flags, beside flame without."""
    if flags == FLOAT8:
        if not bench.machine["versions"]["torchao"]:
            raise Skip("torchao is not installed")
        if not bench.on_gpu or float(bench.machine["capability"]) < 8.9:
            raise Skip("needs a GPU of capability 8.9 or more")
    numbers = measure(bench, "flame", LLAMA, *flags)
    if not (ours := numbers_of(bench, "flame")):
        return
    bench.check("beside flame as it is", f"x{numbers['tokens_per_second'] / ours['tokens_per_second']:.3f}", None)
    if "--training.varlen" not in flags:  # which computes something else
        worst = max(abs(a - b) / b if b else math.inf for a, b in zip(numbers["losses"], ours["losses"], strict=True))
        bound = LOSS * (3 if flags == FLOAT8 else 1)
        bench.check("losses", f"differ by {percent(worst)} (at most {percent(bound)})", worst <= bound)
    elif bench.on_gpu:
        extra = numbers["waits"]["count"] - ours["waits"]["count"]
        bench.check("waits for documents", f"{extra}", extra <= 0, about="speed")


def tuned(bench: Bench) -> None:
    """gla_340M with its kernels tuned, as train.sh does it: the first step takes minutes on a new machine."""
    numbers = measure(bench, "flame", str(CONFIGS["gla_340M"]))
    bench.check("first step", f"{numbers['first_step_s']:.0f} s", None)


def numbers_of(bench: Bench, part: str) -> dict[str, Any]:
    """The numbers that an earlier part found, on this machine; {} if it did not."""
    return bench.results.get(part, {}).get("numbers", {})


# -- (e) memory --------------------------------------------------------------------------------------------------------
def memory(bench: Bench) -> None:
    """The dry run of the jobs that were measured."""
    if not bench.on_gpu:
        raise Skip("the peak is a GPU's")
    jobs = {name: numbers_of(bench, name) for name in ("flame", "not_compiled", "gla_340M_tuned")}
    if not any(jobs.values()):
        raise Skip("no speed was measured")
    for name, numbers in jobs.items():
        if not numbers:
            continue
        page = bench.start("bash", "train.sh", "--dry_run", *numbers["job"])
        bench.wait(page)
        estimate = peak(page.log.read_text())  # type: ignore[attr-defined]
        ratio = estimate / numbers["memory_gib"]
        low, high = DRY_RUN
        figure = f"{estimate:.2f} GiB estimated, {numbers['memory_gib']:.2f} measured, x{ratio:.2f}"
        bench.numbers[name] = {"estimated_gib": estimate, "measured_gib": numbers["memory_gib"]}
        ok = low <= ratio <= high if name == "not_compiled" else None  # what it does not count: compile, fla's kernels
        bench.check(name, figure, ok, about="speed")


def peak(page: str) -> float:
    """GiB of the peak of this job, on a dry run's page."""
    rows = {line.split("  ")[1].strip(): line for line in page.splitlines() if line.startswith("  ") and line.strip()}
    header = next(line for line in page.splitlines() if "(this job)" in line)
    columns = re.findall(r"AC \w+(?: \(this job\))?", header)
    sizes = re.findall(r"([\d.,]+) GiB", rows["peak"])
    return float(sizes[[("this job" in column) for column in columns].index(True)].replace(",", ""))


PARTS = (
    Part("debug", 120, "the debug job: 20 steps, resume, export, the CPU's losses", partial(train, name="debug")),
    Part("llama_1B", 150, "the same of a Llama of 1B", partial(train, name="llama_1B")),
    Part("gla_340M", 120, "the same of a GLA of 340M", partial(train, name="gla_340M")),
    Part("transformer_340M", 120, "the same of a transformer of 340M", partial(train, name="transformer_340M")),
    Part("kernels", 120, "fla's kernels compute what flame's references compute", partial(kernels, configs=FLA)),
    Part("packed", 90, "documents in one row are as separate rows", partial(packed, configs=(LLAMA, *FLA))),
    Part("flame", 90, "speed of the Llama of 1B", flame),
    Part("torchtitan", 75, "speed of torchtitan's llama3 of the same shape", partial(peer, loop="torchtitan")),
    Part("bare", 75, "speed of a bare loop", partial(peer, loop="bare")),
    Part("Trainer", 75, "speed of transformers' Trainer", partial(peer, loop="Trainer")),
    Part("varlen", 90, "flame with documents kept apart", partial(variant, flags=["--training.varlen"])),
    Part("not_compiled", 75, "flame without torch.compile", partial(variant, flags=["--compile.no_enable"])),
    Part("torchtitan_compiled", 120, "torchtitan with torch.compile", partial(peer, loop="torchtitan, compiled")),
    Part("float8", 120, "flame in float8", partial(variant, flags=FLOAT8)),
    Part("gla_340M_tuned", 300, "speed of the GLA of 340M, and the time that tuning takes", tuned),
    Part("other_kernels", 240, "kernels and packed documents of the less common families", others),
    Part("memory", 60, "the dry run's memory is what was measured", memory),
)
