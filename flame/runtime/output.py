"""What the ranks of this node print: shown, and kept in the run folder's logs/, one file for each start and rank.

The launcher reads it from pipes. A disk that takes no more costs a log its last lines, and the ranks nothing.
"""

import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from threading import Thread
from typing import IO

STARTS = 10  # whose logs are kept
PATIENCE = 10.0  # seconds for what is left in the pipes, which a process that outlives its rank may keep filling
SIZE = 1 << 25  # bytes, at which a log goes on in another file; of both the last one before is kept, as .1
WAITING = 1 << 20  # bytes that wait for the run folder, or for room on its disk
LONGEST = WAITING // 2  # bytes without an end of line, which are then taken for a line


class Log:
    """The log of a rank; its lines wait in memory until the run folder exists."""

    def __init__(self, run: Path, rank: int, is_shown: bool = True, prefix: bytes = b"") -> None:
        self.run, self.rank = run, rank
        self.is_shown, self.prefix = is_shown, prefix
        self.said = b""  # the rank's last line that begins with "flame: ", which is why it ends
        self.path = run / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-rank{rank}.log"
        self._is_new = not run.exists()
        self._file: IO[bytes] | None = None
        self._waiting = b""

    def write(self, text: bytes) -> None:
        """Append text, as much of it as the disk takes."""
        self._waiting = (self._waiting + text)[-WAITING:]
        if self._waiting and self.run.is_dir():
            with suppress(OSError):
                file = self._file = self._file or self._open()
                self._waiting = self._waiting[file.write(self._waiting) :]
                if file.tell() > SIZE:
                    file.close()
                    self._file = None
                    self.path.replace(f"{self.path}.1")

    def discard(self) -> None:
        """Delete the log of a job that was rejected, and the folders that are empty without it."""
        if self._file:
            self._file.close()
            with suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()
                if self._is_new:
                    self.run.rmdir()

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(exist_ok=True)
        file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - open for as long as the rank runs
        for old in sorted(self.path.parent.glob(f"*-rank{self.rank}.log"))[:-STARTS]:
            for path in (old, Path(f"{old}.1")):
                path.unlink(missing_ok=True)
        return file


@dataclass
class Stream:
    """stdout or stderr of a rank: where its lines go. An unfinished line waits for its end."""

    log: Log
    shown: int | None  # file descriptor
    prefix: bytes
    rest: bytearray = field(default_factory=bytearray)

    def receive(self, text: bytes) -> None:
        """Take what the rank printed; b"" is the end."""
        self.rest += text
        if text and len(self.rest) < LONGEST and not re.search(rb"[\r\n]", self.rest[-len(text) - 1 :]):
            return
        *lines, rest = re.split(rb"\r\n|\n|\r(?!$)", bytes(self.rest))
        if rest and (not text or len(rest) >= LONGEST):
            lines.append(rest)
            rest = b""
        self.rest = bytearray(rest)
        self.log.said = next((line for line in reversed(lines) if line.startswith(b"flame: ")), self.log.said)
        self.log.write(b"".join(line + b"\n" for line in lines))
        if self.shown is not None:
            show(self.shown, b"".join(self.prefix + line + b"\n" for line in lines))


def show(descriptor: int, text: bytes) -> None:
    """Write text to a terminal, a file or a pipe, which somebody may have closed."""
    with suppress(OSError):
        while text:
            text = text[os.write(descriptor, text) :]


def report(line: str) -> None:
    """Print a line of the launcher's own."""
    print(f"flame: {line}", file=sys.stderr, flush=True)


class RankOutput:
    """The pipes of the ranks of a node.

    shown: the local ranks that are printed too; None: all. errors: a folder for the exceptions of ranks.
    """

    def __init__(self, run: Path, shown: set[int] | None, errors: str) -> None:
        self.run, self.shown, self.errors = run, shown, errors
        self.logs: dict[int, Log] = {}  # of global ranks
        self._selector = DefaultSelector()
        self._end, self._ended = os.pipe()[::-1]
        self._selector.register(self._ended, EVENT_READ)
        self._thread = Thread(target=self._read, daemon=True)

    def open(self, rank: int, local: int, world_size: int) -> tuple[int, int]:
        """File descriptors for stdout and stderr of a rank that is about to start, the `local`-th of this node."""
        is_shown = self.shown is None or local in self.shown
        prefix = f"[rank{rank}]:".encode() if world_size > 1 else b""
        if rank not in self.logs:  # torchrun starts the ranks again when a node comes or goes
            self.logs[rank] = Log(self.run, rank, is_shown, prefix)
        writable = []
        for shown in (1, 2):
            readable, end = os.pipe()
            writable.append(end)
            self._selector.register(readable, EVENT_READ, Stream(self.logs[rank], shown if is_shown else None, prefix))
        if self._thread.ident is None:
            self._thread.start()
        return writable[0], writable[1]

    def error_file(self, rank: int) -> str:
        """Where a rank leaves the exception that ends it."""
        return f"{self.errors}/{rank}.json"

    def finish(self) -> None:
        """Take what is left in the pipes, once the ranks have ended."""
        if self._thread.ident is not None:
            os.close(self._end)
            self._thread.join(PATIENCE)

    def _read(self) -> None:
        ended = False
        while ready := self._selector.select(0 if ended else None):
            for key, _ in ready:
                if key.data is None:
                    ended = True
                    self._selector.unregister(key.fd)
                else:
                    key.data.receive(os.read(key.fd, 1 << 16))
        for key in self._selector.get_map().values():
            key.data.receive(b"")
