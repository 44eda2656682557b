"""What every step was fed, as a rolling digest: two runs saw the same data if and only if their digests agree."""

from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flame.config.files import parse_json, read_bytes
from flame.errors import UserError

_FIELDS = {"step": int, "tokens": int, "data_digest": str}  # of a record


def digest_batch(inputs: ArrayLike, labels: ArrayLike, indices: ArrayLike) -> int:
    """Digest of some rows of one step, as a signed 64-bit integer.

    inputs, labels: (rows, seq) integers; indices: (rows,) each row's place in the global batch of its step. Rows are
    hashed one by one and the hashes added modulo 2^64, so that the sum over ranks (an int64 all-reduce, which wraps)
    does not depend on how the rows were laid out.
    """
    places, inputs, labels = np.asarray(indices, "<i8"), np.asarray(inputs), np.asarray(labels)
    assert inputs.shape == labels.shape and places.shape == inputs.shape[:1], (inputs.shape, labels.shape, places.shape)
    total = 0
    for place, row, targets in zip(places, inputs.astype("<i4"), labels.astype("<i4"), strict=True):
        row_hash = blake2b(place.tobytes() + row.tobytes() + targets.tobytes(), digest_size=8)
        total += int.from_bytes(row_hash.digest(), "little")
    return (total + 2**63) % 2**64 - 2**63


def roll(previous: str, step_sum: int) -> str:
    """The digest after one more step, 16 hex characters; previous: the one before it, "" at the start of a run."""
    assert len(previous) in (0, 16), previous
    step = (step_sum % 2**64).to_bytes(8, "little")
    return blake2b(bytes.fromhex(previous) + step, digest_size=8).hexdigest()


def read_ledger(folder: Path) -> dict[int, dict[str, Any]]:
    """{step: record} of the steps whose digest a run logged. Raises UserError if the folder has no metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(str(folder), "no file metrics.jsonl", "the folder of a run that has logged a step")
    try:
        lines = read_bytes(path).splitlines()
    except OSError as error:
        raise UserError(str(path), hint=f"cannot be read ({error.strerror})") from None
    return {record["step"]: record for record in filter(None, map(_parse_record, lines))}


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a step with its digest; None for any other line: a kill cuts the last one, or zeros are left."""
    try:
        record = parse_json(line.decode())
        known = all(isinstance(record[name], kind) for name, kind in _FIELDS.items())
    except (ValueError, KeyError, TypeError):
        return None
    return record if known else None


def verify(one: Path, other: Path) -> bool:
    """Print up to which step two runs saw the same data, by their ledgers; False if they differ anywhere.

    A digest rolls over all steps before it, so that equal at one step means equal up to it.
    Raises UserError if no step was logged by both.
    """
    first, second = read_ledger(one), read_ledger(other)
    common = sorted(first.keys() & second.keys())
    if not common:
        raise UserError(f"{one} and {other}", hint="no step was logged by both")
    differs = next((step for step in common if first[step]["data_digest"] != second[step]["data_digest"]), None)
    if differs is None:
        print(f"the same data up to step {common[-1]}, digest {first[common[-1]]['data_digest']}")
        return True
    agreed = max((step for step in common if step < differs), default=0)
    until = f"the same up to step {agreed}" if agreed else "and no logged step before it is the same"
    print(
        f"DIFFERENT DATA at step {differs}, {until}: "
        f"{first[differs]['data_digest']} in {one}, {second[differs]['data_digest']} in {other}"
    )
    return False
