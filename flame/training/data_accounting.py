"""What all ranks agree on about a step's data, and what is counted of each source."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.tools.logging import logger

from flame.data.document import Bad, allow_bad
from flame.data.loader import Loader
from flame.errors import UserError
from flame.runtime.device import upload
from flame.training.context import RunContext


class DataAccounting:
    """Sums over the data-parallel ranks, `mesh`, if there are any. All ranks make every call, in the same order."""

    def __init__(self, loader: Loader, mesh: DeviceMesh | None, device: torch.device, context: RunContext) -> None:
        self._loader, self._mesh, self._device, self._context = loader, mesh, device, context
        self._settings, self._logs = context.job_config.data, context.run.writes
        self._bad_rows: dict[str, int] = {}
        self._reported: set[tuple[str, Bad]] = set()
        self._epochs: dict[str, int] = {}  # completed epochs of each source, as far as they were logged

    def begin(self) -> None:
        """Take the epochs that a resumed run has completed as logged."""
        self._epochs = {name: int(epochs) for name, (_, epochs) in self._sum_counts().items()}

    def sum_step(self, valid_tokens: int, digest: int) -> torch.Tensor:
        """What `read_step` takes, int64 (2 + 3 per source,) on the device; first the global batch's valid tokens."""
        counts = [count for each in self._loader.skipped().values() for count in each]
        return self._sum(torch.tensor([valid_tokens, _as_int64(digest), *counts]))

    def read_step(self, sums: Sequence[int]) -> tuple[int, int]:
        """The valid tokens and the digest of the global batch.

        Raises UserError, on all ranks, if a source has more bad rows than --data.max_bad_rows allows.
        """
        valid_tokens, digest, *counts = sums
        rows = zip(counts[::3], counts[1::3], counts[2::3], strict=True)
        self._check_rows(dict(zip(self._epochs, rows, strict=True)))
        return valid_tokens, digest

    def count_sources(self) -> dict[str, float]:
        """The record of a logged step: tokens, epochs and skipped rows of each source. Logs each new epoch."""
        record: dict[str, float] = {}
        for name, (tokens, epochs) in self._sum_counts().items():
            record |= {f"data/{name}/tokens": round(tokens), f"data/{name}/epoch": epochs}
            record[f"data/{name}/skipped"] = self._bad_rows.get(name, 0)
            if self._logs and self._settings.epochs == 0 and (completed := int(epochs)) > self._epochs[name]:
                logger.warning(f"source {name} starts epoch {completed + 1} (--data.epochs sets an end)")
                self._epochs[name] = completed
        return record

    def _check_rows(self, rows: dict[str, tuple[int, int, int]]) -> None:
        """Log new bad rows; rows: {source: (bad, read, epochs begun)}, sums over all ranks and their lanes.

        A source is judged by its rows, however often they were read: by the mean of the epochs.
        """
        bad_rows = {name: bad for name, (bad, *_) in rows.items()}
        if bad_rows == self._bad_rows or not any(bad_rows.values()):
            return
        self._bad_rows = bad_rows
        ranks = self._context.consensus.gather(self._loader.noted())
        noted = list(dict.fromkeys((name, row) for rank in ranks for name in rank for row in rank[name]))
        for name, row in noted:
            if self._logs and (name, row) not in self._reported:
                logger.warning(f"source {name}: {row.place} is skipped: {row.reason}")
        self._reported.update(noted)
        limit = self._settings.max_bad_rows
        for name, (bad, read, begun) in rows.items():
            epochs = max(1, -(-begun // self._settings.lanes))
            bad, read = -(-bad // epochs), read // epochs
            if bad > (allowed := allow_bad(limit, read)):
                example = next((f", such as {row.place} ({row.reason})" for n, row in noted if n == name), "")
                found = f"{bad} bad rows among {read} of source {name}{example}"
                raise UserError("--data.max_bad_rows", found, f"at most {allowed:g} (set to {limit:g})")

    def _sum_counts(self) -> dict[str, tuple[float, float]]:
        """{source: (tokens, epochs)} of all ranks."""
        counts = self._loader.counts()
        flat = self._sum(torch.tensor([value for pair in counts.values() for value in pair], dtype=torch.float64))
        return dict(zip(counts, flat.view(-1, 2).tolist(), strict=True))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        values = upload(values, self._device)
        if self._mesh is not None:
            dist.all_reduce(values, group=self._mesh.get_group())
        return values


def _as_int64(digest: int) -> int:
    return (digest + 2**63) % 2**64 - 2**63  # torch adds signed 64-bit integers, which wrap
