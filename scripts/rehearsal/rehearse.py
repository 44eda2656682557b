#!/usr/bin/env python
"""Rehearses a job's training on an H100 that is not there, and counts what it would do. See docs/rehearsal.md.

    bash scripts/rehearsal/setup.sh WHERE        # once
    export FLAME_REHEARSAL=WHERE
    python scripts/rehearsal/rehearse.py configs/gla_340M.json [flags of train.sh] [--world N] [--depth N] [--cost] ...

The last line of its output is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from scripts.rehearsal import roofline  # noqa: E402

PEERS = ("torchtitan", "torchtitan, compiled", "bare")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "config", help="the model's JSON, as --model.config takes it; other flags are those of train.sh"
    )
    parser.add_argument("--world", type=int, default=1, metavar="N", help="ranks, of which this is the first (1)")
    parser.add_argument("--depth", type=int, metavar="N", help="blocks, 2 or more (all those of the model)")
    parser.add_argument("--cost", action="store_true", help="print the least time of a step, row by row")
    parser.add_argument("--compile_kernels", action="store_true", help="compile Triton's kernels for the GPU")
    parser.add_argument(
        "--peer", action="store_true", help="also torchtitan's llama3 and a bare loop, of the same shape"
    )
    options, flags = parser.parse_known_args(argv)
    where = os.environ.get("FLAME_REHEARSAL")
    if not where or not Path(where, "libcuda.so.1").exists():
        print("FLAME_REHEARSAL: must name the folder that scripts/rehearsal/setup.sh has made", file=sys.stderr)
        return 2
    shared = {name: getattr(options, name) for name in ("config", "world", "depth", "compile_kernels")}
    results = {}
    for run in ("flame", *(PEERS if options.peer else ())):
        results[run] = run_one(Path(where).resolve(), {"run": run, "flags": flags, **shared})
        if results[run] is None:
            return 1
    flame = results["flame"]
    for result in results.values():
        rows = result.pop("rows")
        result["roofline"] = roofline.summarize(rows, flame["flops_per_token"] * flame["tokens"])
        result["flops"] = roofline.sum_by(rows, ("product", "attention"), "flops")
        result["bytes"] = roofline.sum_by(rows, ("elementwise", "triton"), "bytes")
    console = Console(width=120)
    if options.cost:
        for run, result in results.items():
            console.print(
                roofline.step_table(f"{run}: {options.config}, rank 0 of {options.world}", result["roofline"])
            )
    console.print(roofline.comparison_table(results))
    print(json.dumps({**shared, "flags": flags, "runs": results}))
    return 0


def stub_environment(where: Path) -> dict[str, str]:
    """What a process needs in its environment to have the GPU that is not there, beside `where`'s Python."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        "LD_PRELOAD": str(where / "libcudart_stub.so"),
        "LD_LIBRARY_PATH": f"{where}:{libraries}" if libraries else str(where),
        "OMP_NUM_THREADS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",  # which the stub's driver does not have
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in this process, which has the stub
        "TRITON_CACHE_DIR": str(where / "cache/triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(where / "cache/inductor"),
    }


def run_one(where: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    """The result of run.py in a process with the stub runtime; None if it failed, with the end of its output shown."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        command = [
            where / "venv/bin/python",
            ROOT / "scripts/rehearsal/run.py",
            json.dumps({**spec, "result": str(result)}),
        ]
        with log.open("w") as output:
            code = subprocess.run(
                command, env=os.environ | stub_environment(where), stdout=output, stderr=subprocess.STDOUT
            ).returncode
        if code or not result.exists():
            print("\n".join(log.read_text().splitlines()[-40:]), file=sys.stderr)
            print(f"{spec['run']}: the rehearsal ended with code {code}", file=sys.stderr)
            return None
        return json.loads(result.read_text())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
