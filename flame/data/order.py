"""The order of a run's data: what it depends on and the steps that are skipped; a checkpoint is bound to it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flame.config.files import parse_json
from flame.errors import UserError

OTHER_DATA = "other data needs another name (name in [[data.sources]]) or another --job.dump_folder"
FLAGS = {"lanes": "--data.lanes", "window": "--data.window", "seed": "--debug.seed"}


@dataclass(frozen=True)
class Order:
    """step: number of sequences per step; skip: first and last of each range of steps that are read and discarded;
    data: the fingerprint of each source.
    """

    lanes: int
    window: int
    seed: int
    step: int
    skip: Sequence[tuple[int, int]] = ()
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def skips(self, sequence: int) -> bool:
        """Whether a sequence of the run is part of a skipped step."""
        return any(first <= sequence // self.step + 1 <= last for first, last in self.skip)

    def skipped_from(self, sequence: int) -> list[str]:
        """The ranges of steps that begin at a sequence."""
        return [f"{first}-{last}" for first, last in self.skip if (first - 1) * self.step == sequence]

    def dump(self, sequence: int, **facts: Any) -> str:
        """As JSON, for a checkpoint at a sequence, with `facts`."""
        facts |= {key: getattr(self, key) for key in FLAGS}
        return json.dumps({**facts, "skipped": self._skipped(sequence), "data": self.data})

    def check(self, text: str, sequence: int) -> None:
        """Raise UserError unless the data up to a sequence were read in this order, given the JSON of a checkpoint.

        A source that is new, or that an older flame did not record, is not compared.
        """
        saved = parse_json(text)
        for key, flag in FLAGS.items():
            if saved[key] != getattr(self, key):
                raise UserError(flag, getattr(self, key), f"{saved[key]}, as in the checkpoint")
        for name, known in saved.get("data", {}).items():
            today = self.data.get(name, {})
            if changed := [key for key in known if today.get(key, known[key]) != known[key]]:
                found, allowed = f"{changed[0]} {today[changed[0]]}", f"{known[changed[0]]}, as in the checkpoint"
                raise UserError(f"source {name}", found, allowed, OTHER_DATA)
        done, asked = saved.get("skipped", []), self._skipped(sequence)
        if done != asked:
            found = f"{self._name(asked)} of the steps before the checkpoint"
            allowed = f"{self._name(done)}, which were skipped"
            raise UserError("--data.skip", found, allowed, "--checkpoint.load_step goes back to an earlier checkpoint")

    def _skipped(self, sequence: int) -> list[list[int]]:
        """Ranges of sequences, the end not included, that are skipped before one."""
        ranges = [((first - 1) * self.step, last * self.step) for first, last in self.skip]
        return [[begin, min(end, sequence)] for begin, end in ranges if begin < sequence]

    def _name(self, ranges: Sequence[Sequence[int]]) -> str:
        return ",".join(f"{begin // self.step + 1}-{end // self.step}" for begin, end in ranges) or "none"
