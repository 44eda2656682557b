"""What every step was fed, as a rolling digest: two runs saw the same data if and only if their digests agree."""

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike


def digest_batch(inputs: ArrayLike, labels: ArrayLike, indices: ArrayLike) -> int:
    """Digest of some rows of one step, as a signed 64-bit integer.

    inputs, labels: (rows, seq) integers; indices: (rows,) each row's place in the global batch of its step. Rows are
    hashed one by one and the hashes added modulo 2^64, so that the sum over ranks (an int64 all-reduce, which wraps)
    does not depend on how the rows were laid out.
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    places = np.asarray(indices, dtype="<i8").reshape(-1)
    assert inputs.shape == labels.shape and len(places) == len(inputs), (inputs.shape, labels.shape, places.shape)
    total = 0
    for place, row, targets in zip(places, inputs.astype("<i4"), labels.astype("<i4"), strict=True):
        row_hash = blake2b(place.tobytes() + row.tobytes() + targets.tobytes(), digest_size=8)
        total += int.from_bytes(row_hash.digest(), "little")
    return (total + 2**63) % 2**64 - 2**63


def roll(previous: str, step_sum: int) -> str:
    """The ledger after one more step, 16 hex characters; previous: the ledger before it, "" at the start of a run."""
    assert len(previous) in (0, 16), previous
    step = (step_sum % 2**64).to_bytes(8, "little")
    return blake2b(bytes.fromhex(previous) + step, digest_size=8).hexdigest()
