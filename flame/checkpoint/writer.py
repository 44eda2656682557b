"""DCP's file writer, which hashes files as it writes them and writes the commit marker last."""

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

from flame.checkpoint.commit import EXPECTS_MARKER, MARKER, SavedFile, write_marker
from flame.checkpoint.metadata import METADATA


class Writer(_FileSystemWriter):
    """Writes a checkpoint to `path` with `facts` in its marker; each rank's hashes travel with DCP's own results.

    Derives from _FileSystemWriter, as torch's FileSystemWriter is a stager too and would replace async_save's.
    """

    def __init__(self, path: str | Path, facts: Mapping[str, Any], *, overwrite: bool = True) -> None:
        super().__init__(path, overwrite=overwrite)
        self.fs: _HashingFileSystem = _HashingFileSystem()
        self.facts = facts

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Runs on the coordinator before any rank writes; an error here is raised on all of them."""
        if self.overwrite:  # the marker goes first; the old data may be of more ranks
            folder = Path(self.path)
            left = (*folder.glob("__*.distcp"), *folder.glob(f"{MARKER}.*.tmp"))
            for file in (folder / MARKER, folder / METADATA, *left):
                file.unlink(missing_ok=True)
        return super().prepare_global_plan(plans)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(self.checkpoint_id, self.save_id + EXPECTS_MARKER)

    def write_data(self, plan: SavePlan, planner: Any) -> Future:
        """Returns torch's results and a SavedFile for each file."""
        try:
            results = super().write_data(plan, planner).wait()
        except RuntimeError as error:  # raised by torch.save while it handles the file system's error
            raise _find_cause(error) from None
        future: Future = Future()
        future.set_result([*results, *self.fs.take()])
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        files = [result for rank in results for result in rank if isinstance(result, SavedFile)]
        super().finish(metadata, [[r for r in rank if not isinstance(r, SavedFile)] for rank in results])
        files += [replace(file, name=METADATA) for file in self.fs.take()]  # DCP writes it under a temporary name
        write_marker(Path(self.path), files, self.facts)


class _HashingFileSystem(FileSystem):
    """torch's file system, which keeps the size and hash of each file that was written."""

    def __init__(self) -> None:
        self.files: list[SavedFile] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any, None, None]:
        Path(path).unlink(missing_ok=True)  # a link would be followed, and another file be overwritten
        with super().create_stream(path, "xb") as stream:
            hashed = _HashingStream(stream)
            yield hashed
        self.files.append(SavedFile(Path(path).name, hashed.size, hashed.digest.hexdigest()))

    def take(self) -> list[SavedFile]:
        """The files written since the last call."""
        files, self.files = self.files, []
        return files


class _HashingStream:
    """A file that is written from its first byte to its last, without seeks."""

    def __init__(self, file: Any) -> None:
        self.file, self.size, self.digest = file, 0, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self.file.flush()  # torch calls fileno to fsync, which does not reach Python's buffer
        return self.file.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _find_cause(error: BaseException) -> BaseException:
    """The OSError that caused an error of torch, or else the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
