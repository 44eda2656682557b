"""The least time that a GPU needs for what a step launches, from FLOPs and bytes at its peaks. Needs no torch.

A row of a ledger is what one kind of kernel did in a step: {"kind", "name", "dtype", "calls", "flops", "bytes",
"seconds"}. Kinds: product (matrix products), attention, elementwise (all other operators of PyTorch), triton, and
communication, which runs beside the others and is not added to their time.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

# H100 SXM, dense (https://www.nvidia.com/en-us/data-center/h100/): FLOP/s by type, bytes/s of its memory.
PEAK = {
    **{"float8_e4m3fn": 1979e12, "float8_e5m2": 1979e12, "bfloat16": 989e12, "float16": 989e12},
    **{"tf32": 494e12, "float32": 67e12, "float64": 67e12},
}
BANDWIDTH = 3.35e12
TIMED = ("product", "attention", "elementwise", "triton")
_SHOWN = 14  # rows of a table; the others are added up
Row = Mapping[str, Any]


def least_seconds(flops: float, dtype: str, moved: float) -> float:
    """The time of a kernel that computes `flops` in `dtype` and moves `moved` bytes, at the slower of the two peaks."""
    return max(flops / PEAK[dtype] if flops else 0.0, moved / BANDWIDTH)


def product_flops(first: Sequence[int], result: Sequence[int]) -> int:
    """FLOPs of a matrix product, from the shapes of its first factor (..., m, k) and of its result (..., m, n).

    A result with one dimension more than the factor is one of groups that divide k among them (_grouped_mm).
    """
    entries = 1
    for size in result[len(result) > len(first) :]:
        entries *= size
    return 2 * first[-1] * entries


def attention_flops(
    heads: int, width: int, documents: Iterable[tuple[int, int]], causal: bool, window: int = -1, backward: bool = False
) -> float:
    """FLOPs of softmax attention of `heads` heads of `width` over documents of (queries, keys).

    A causal query sees half of the keys on average, or the `window` before it; the backward has five products for two.
    """
    pairs = 0.0
    for queries, keys in documents:
        seen = keys / 2 if causal else float(keys)
        if 0 <= window < keys:
            seen = min(seen, window - window**2 / (2 * keys))
        pairs += queries * seen
    return (10 if backward else 4) * heads * width * pairs


def summarize(rows: Iterable[Row], useful_flops: float) -> dict[str, Any]:
    """{"ms": of the step, "mfu": that it allows, "parts": {kind: ms}, "rows": the longest first}.

    useful_flops: of the step, as MFU counts them.
    """
    longest = sorted(rows, key=lambda row: -row["seconds"])
    parts = {kind: 1e3 * sum(row["seconds"] for row in longest if row["kind"] == kind) for kind in TIMED}
    total = sum(parts.values())
    return {"ms": total, "mfu": useful_flops / PEAK["bfloat16"] / total * 1e3, "parts": parts, "rows": longest}


def sum_by(rows: Iterable[Row], kind: Sequence[str], value: str) -> dict[str, float]:
    """The sum of `value` ("flops", "bytes") by operator and type, of rows of some kinds."""
    sums: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        if row["kind"] in kind and row[value]:
            sums[f"{row['name']} {row['dtype']}".strip()] += row[value]
    return dict(sums)


def step_table(title: str, roofline: Mapping[str, Any]) -> Table:
    """What takes the step's least time, row by row."""
    table = Table("kind", "operator or kernel", "type", title=title, title_justify="left")
    for column in ("calls", "TFLOP", "GB", "ms", "share"):
        table.add_column(column, justify="right")
    timed = [row for row in roofline["rows"] if row["kind"] in TIMED]
    for row in timed[:_SHOWN]:
        _add(table, row["kind"], row["name"], row["dtype"], [row], roofline["ms"])
    if rest := timed[_SHOWN:]:
        _add(table, "", f"{len(rest)} others", "", rest, roofline["ms"])
    table.add_section()
    for kind in TIMED:
        of_kind = [row for row in timed if row["kind"] == kind]
        _add(table, kind, "all", "", of_kind, roofline["ms"])
    table.add_section()
    _add(table, "step", f"MFU {100 * roofline['mfu']:.1f} % at most", "", timed, roofline["ms"])
    return table


def _add(table: Table, kind: str, name: str, dtype: str, rows: Sequence[Row], total: float) -> None:
    calls, flops, moved, seconds = (sum(row[value] for row in rows) for value in ("calls", "flops", "bytes", "seconds"))
    numbers = (f"{calls:,}", f"{flops / 1e12:.2f}", f"{moved / 1e9:.2f}", f"{1e3 * seconds:.2f}")
    table.add_row(kind, name, dtype, *numbers, f"{1e5 * seconds / total:.1f} %")


def comparison_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """The runs of one rehearsal side by side."""
    table = Table("a step", title_justify="left")
    for name in runs:
        table.add_column(name, justify="right")

    def add(label: str, *values: str) -> None:
        table.add_row(label, *values)

    results = runs.values()
    for dtype in ("bfloat16", "tf32", "float32"):
        times = [
            1e3 * sum(r["seconds"] for r in run["roofline"]["rows"] if (r["kind"], r["dtype"]) == ("product", dtype))
            for run in results
        ]
        if any(times):
            add(f"matrix products, {dtype}, ms", *(f"{time:.1f}" for time in times))
    for kind in TIMED[1:]:
        add(f"{kind}, ms", *(f"{run['roofline']['parts'][kind]:.1f}" for run in results))
    add("least time, ms", *(f"{run['roofline']['ms']:.1f}" for run in results))
    add("MFU at most, %", *(f"{100 * run['roofline']['mfu']:.1f}" for run in results))
    table.add_section()
    for kind in ("all", "products", "triton"):
        add(f"launches, {kind}", *(f"{run['launches'][kind]:,}" for run in results))
    for kind in ("step", "before_update", "microbatch", "logged"):
        add(f"waits, {kind.replace('_', ' ')}", *(str(run["waits"][kind]) for run in results))
    add("gloo rounds", *(str(run["gloo_rounds"]["step"]) for run in results))
    add("host, ms", *(f"{run['host_ms']['all']:.1f}" for run in results))
    add("memory, GiB", *(f"{run['memory_gib']:.1f}" for run in results))
    return table
