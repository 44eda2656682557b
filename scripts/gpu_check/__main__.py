"""The parts of a GPU check, each in its own time; what is done is not done again. See docs/gpu_check.md.

Every part's result is a line of OUT/results.jsonl; OUT/report.md has the last result of each part as tables.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame.errors import INTERRUPTED, PREEMPTED, REFUSED
from scripts.gpu_check.bench import Bench, OutOfTime, PartError, Skip, kill_all
from scripts.gpu_check.parts import PARTS, Part
from scripts.gpu_check.report import write_report
from scripts.rehearsal.rehearse import stub_environment

ROOT = Path(__file__).parents[2]
DONE = ("passed", "rehearsed", "skipped")
LEAST = 15.0  # seconds that must be left for a part to begin
SLOWER = 10  # times a GPU's limits for what a CPU does in its place


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description="Checks flame on this machine's GPU.", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("exp/gpu_check"), help="results and logs (exp/gpu_check)")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="of all parts; those left are for the next start (9)"
    )
    parser.add_argument("--only", default="", metavar="PART,PART", help="these parts alone")
    parser.add_argument("--again", action="store_true", help="also the parts that are done")
    parser.add_argument("--tiny", action="store_true", help="models of two narrow blocks; on a CPU, if there is no GPU")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the GPU that is not there (docs/rehearsal.md): no value can pass"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    options = parser.parse_args(argv)
    options.only = [name for name in options.only.split(",") if name]
    if unknown := set(options.only) - {part.name for part in PARTS}:
        parser.error(f"--only: found {', '.join(sorted(unknown))}, must be of {', '.join(p.name for p in PARTS)}")
    return options


def main(argv: list[str]) -> int:
    """Exit code: 0 all parts are done, 1 some failed, 2 a mistake, 75 some are left for the next start."""
    options, begun = parse(argv), time.monotonic()
    if options.list:
        for part in PARTS:
            print(f"{part.name:22} {part.limit:4.0f} s  {part.proves}")
        return 0
    environment, stub = os.environ | {"FLAME_PYTHON": sys.executable}, {}
    if options.rehearse:
        where = Path(environment.get("FLAME_REHEARSAL", "")).resolve()
        if not (where / "libcuda.so.1").exists():
            return _refuse("FLAME_REHEARSAL: must name the folder that scripts/rehearsal/setup.sh has made")
        environment["FLAME_PYTHON"], stub = str(where / "venv/bin/python"), stub_environment(where)
    machine = ask_machine(environment | stub) | {"tiny": options.tiny, "rehearsal": options.rehearse}
    if not (machine["device"] or options.tiny):
        return _refuse("gpu_check.sh: found no GPU; --tiny tries it on a CPU, --rehearse on a GPU that is not there")
    shown = f"{machine['device'] or 'CPU'}, torch {machine['versions']['torch']}, commit {machine['commit']}"
    print(f"{shown}{', tiny models' * options.tiny}{', a rehearsal: no value can pass' * options.rehearse}", flush=True)
    with lock(options.out.resolve()) as held:
        bench = Bench(options.out.resolve(), environment, stub, machine, held)
        bench.results = read_results(bench.out, machine)
        try:
            left = run_parts(options, bench, begun + 60 * options.minutes)
        finally:
            kill_all(bench.running)
            shutil.rmtree(bench.work, ignore_errors=True)
    print(f"\n{bench.out}/report.md")
    bad = {name: result["status"] for name, result in bench.results.items() if result["status"] not in DONE}
    if left:
        print(f"not reached: {', '.join(left)}; the same command goes on")
    if bad:
        print(f"not passed: {', '.join(bad)}; the same command tries them again")
    return 1 if "failed" in bad.values() else PREEMPTED if left or bad else 0


@contextmanager
def lock(out: Path) -> Iterator[int]:
    """Hold the folder of the results; what a part starts holds it too, and outlives a start that is killed."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another gpu_check in {out}, or for what it left running", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def run_parts(options: argparse.Namespace, bench: Bench, end: float) -> list[str]:
    """Do the parts that are asked for and not done, until `end`; returns those that were not reached."""
    todo = [part for part in PARTS if not options.only or part.name in options.only]
    if not options.again:
        todo = [part for part in todo if bench.results.get(part.name, {}).get("status") not in DONE]
    todo.sort(key=lambda part: part.name in bench.results)  # what failed comes after what has not been tried
    left = []
    for part in todo:
        if end - time.monotonic() < LEAST:
            left.append(part.name)
        else:
            limit = part.limit * (SLOWER if options.tiny or options.rehearse else 1)
            run_part(part, bench, min(limit, end - time.monotonic()))
    return left


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return REFUSED


def ask_machine(environment: dict[str, str]) -> dict[str, Any]:
    """What a result holds for: the device, the versions of what runs on it, and flame's commit."""
    command = [environment["FLAME_PYTHON"], "-m", "scripts.gpu_check.machine"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def read_results(out: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """{part: its last result on this machine}."""
    path, results = out / "results.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except ValueError:  # an empty one, or one of a start that was killed
            continue
        if result["machine"] == machine:
            results[result["part"]] = result
    return results


def run_part(part: Part, bench: Bench, limit: float) -> None:
    """Do a part and keep its result."""
    print(f"\n{part.name}: {part.proves} ({limit:.0f} s at most)", flush=True)
    bench.begin(part.name, limit)
    status, reason, begin = "passed", "", time.monotonic()
    try:
        part.run(bench)
    except Skip as why:
        status, reason = "skipped", str(why)
    except OutOfTime:
        status, reason = "out of time", f"{limit:.0f} s"
    except PartError as error:
        status, reason = "failed", str(error)
    except Exception as error:  # a mistake of the part itself; the others are done all the same
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error}"
    finally:
        kill_all(bench.running)
    verdicts = {check["ok"] for check in bench.checks}
    if False in verdicts:
        status = "failed"
    elif None in verdicts and status == "passed" and bench.machine["rehearsal"]:
        status = "rehearsed"
    result = {
        "part": part.name, "status": status, "reason": reason, "seconds": round(time.monotonic() - begin, 1),
        "checks": bench.checks, "numbers": bench.numbers, "machine": bench.machine,
    }  # fmt: skip
    with open(bench.out / "results.jsonl", "a") as file:
        file.write("\n" + json.dumps(result) + "\n")  # the line before may have been cut off
    bench.results[part.name] = result
    write_report(bench.out, bench.machine, [bench.results[p.name] for p in PARTS if p.name in bench.results])
    shutil.rmtree(bench.work, ignore_errors=True)
    print(f"  {status}{': ' * bool(reason)}{reason}, {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
