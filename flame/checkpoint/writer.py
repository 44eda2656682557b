"""DCP's writer of files, which hashes what it writes on the way and makes the checkpoint complete at the end."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem, _FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.futures import Future

from flame.checkpoint.commit import EXPECTS_MARKER, METADATA, SavedFile, invalidate, write_marker


class Writer(_FileSystemWriter):
    """Writes a checkpoint to `path` whose marker holds `facts`. A rank's hashes travel with DCP's own results.

    Not torch's FileSystemWriter, which is a stager as well and would take the place of async_save's.
    """

    def __init__(self, path: str | Path, facts: Mapping[str, Any], *, overwrite: bool = True) -> None:
        super().__init__(path, overwrite=overwrite)
        self.fs: _Hashing = _Hashing()
        self.facts = facts
        self.coordinates = False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self.coordinates = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Called on every rank before any writes; whatever fails here fails on all of them."""
        if self.coordinates and self.overwrite:
            invalidate(Path(self.path))
            for data in Path(self.path).glob("__*.distcp"):  # of more ranks than there are now, perhaps
                data.unlink()
        return super().prepare_local_plan(plan)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(self.checkpoint_id, self.save_id + EXPECTS_MARKER)

    def write_data(self, plan: SavePlan, planner: Any) -> Future:
        """What torch returns, and a SavedFile for each file that was written."""
        try:
            results = super().write_data(plan, planner).wait()
        except RuntimeError as error:  # torch.save's, while it handles the file system's
            raise _find_cause(error) from None
        future: Future = Future()
        future.set_result([*results, *self.fs.take()])
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        files = [result for rank in results for result in rank if isinstance(result, SavedFile)]
        super().finish(metadata, [[r for r in rank if not isinstance(r, SavedFile)] for rank in results])
        files += [replace(file, name=METADATA) for file in self.fs.take()]  # written under a name of its own
        write_marker(Path(self.path), files, self.facts)


class _Hashing(FileSystem):
    """torch's file system; keeps the size and hash of each file that was written."""

    def __init__(self) -> None:
        self.files: list[SavedFile] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            hashed = _Stream(stream)
            yield hashed
        self.files.append(SavedFile(Path(path).name, hashed.size, hashed.digest.hexdigest()))

    def take(self) -> list[SavedFile]:
        """The files that were written since the last call."""
        files, self.files = self.files, []
        return files


class _Stream:
    """A file that is written from its first byte to its last."""

    def __init__(self, file: Any) -> None:
        self.file, self.size, self.digest = file, 0, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        self.file.flush()  # torch asks for it to fsync, and what Python still holds would not be in that
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


def _find_cause(error: BaseException) -> BaseException:
    """The error of the file system that one of torch goes back to, or else itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
