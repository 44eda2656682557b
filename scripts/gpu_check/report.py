"""OUT/report.md: the last result of each part as tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.gpu_check.bench import mark

SPEEDS = (
    *("loop", "tokens/s", "MFU, %", "step, ms", "kernels, ms", "waits", "waiting, ms", "kernels"),
    *("peak, GiB", "dry run, GiB"),
)


def write_report(out: Path, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the report anew."""
    partial = out / "report.md.new"
    partial.write_text("\n".join(_lines(machine, results)) + "\n")
    partial.rename(out / "report.md")


def _lines(machine: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [f"{machine['device'] or 'CPU'}; {versions}; commit {machine['commit']}.", ""]
    if machine["rehearsal"]:
        lines += ["A rehearsal: its GPU computes nothing, and no number below is one of a GPU.", ""]
    if machine["tiny"]:
        lines += ["Models of two narrow blocks: no speed below is that of its model.", ""]
    estimates = next((result["numbers"] for result in results if result["part"] == "memory"), {})
    if timed := [result for result in results if "tokens_per_second" in result["numbers"]]:
        lines += [_row(SPEEDS), "|" + "---|" * len(SPEEDS)]
        lines += [_row(_speed(r["part"], r["numbers"], estimates.get(r["part"], {}))) for r in timed] + [""]
    lines += ["| part | check | found | |", "|---|---|---|---|"]
    for result in results:
        lines.append(_row([result["part"], f"{result['seconds']:.0f} s", result["reason"], result["status"]]))
        lines += [_row(["", c["name"], c["figure"], mark(c["ok"]).strip()]) for c in result["checks"]]
    return lines


def _speed(name: str, numbers: dict[str, Any], estimate: dict[str, float]) -> list[str]:
    mfu = f"{100 * numbers['mfu']:.1f}" if numbers["mfu"] else ""
    cells = [name, f"{numbers['tokens_per_second']:,.0f}", mfu, f"{numbers['step_ms']:.1f}"]
    if "waits" in numbers:  # on a GPU
        waits, kernels = numbers["waits"], numbers["kernels"]
        cells += [f"{kernels['ms']:.1f}", f"{waits['count']}", f"{waits['ms']:.1f}", f"{kernels['count']:,}"]
        cells += [f"{numbers['memory_gib']:.2f}", f"{estimate['estimated_gib']:.2f}" if estimate else ""]
    return cells + [""] * (len(SPEEDS) - len(cells))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
