"""The order of a run's data: what it depends on and which steps of it are left out. A checkpoint must be kept to it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from flame.errors import UserError

FLAGS = {"lanes": "--data.lanes", "window": "--data.window", "seed": "--debug.seed"}


@dataclass(frozen=True)
class Order:
    """skip: first and last of each range of steps that are read and not handed out; step: its number of sequences."""

    lanes: int
    window: int
    seed: int
    step: int
    skip: Sequence[tuple[int, int]] = ()

    def leaves_out(self, sequence: int) -> bool:
        """Whether a sequence of the run is one of a step that is left out."""
        return any(first <= sequence // self.step + 1 <= last for first, last in self.skip)

    def left_out_up_to(self, sequence: int) -> list[str]:
        """The ranges of steps that end just before a sequence."""
        return [f"{first}-{last}" for first, last in self.skip if last * self.step == sequence]

    def dump(self, sequence: int) -> str:
        """As JSON, for a checkpoint at a sequence."""
        return json.dumps({**{key: getattr(self, key) for key in FLAGS}, "skipped": self._skipped(sequence)})

    def check(self, text: str, sequence: int) -> None:
        """Raises UserError unless this is the order in such JSON, as far as it was gone along."""
        was = json.loads(text)
        for key, flag in FLAGS.items():
            if was[key] != getattr(self, key):
                now = getattr(self, key)
                raise UserError(f"{flag} {now}: the checkpoint's data order was made with {was[key]}; keep it")
        passed, asked = was.get("skipped", []), self._skipped(sequence)
        if passed != asked:
            raise UserError(
                f"--data.skip: of the steps before the checkpoint it names {self._name(asked)}, but "
                f"{self._name(passed)} were skipped; keep those, or go back further by --checkpoint.load_step"
            )

    def _skipped(self, sequence: int) -> list[list[int]]:
        """Ranges of sequences, the end not included, that are left out on the way to one."""
        ranges = [((first - 1) * self.step, last * self.step) for first, last in self.skip]
        return [[begin, min(end, sequence)] for begin, end in ranges if begin < sequence]

    def _name(self, ranges: Sequence[Sequence[int]]) -> str:
        return ",".join(f"{begin // self.step + 1}-{end // self.step}" for begin, end in ranges) or "none"
