"""Moments of a run at which its first rank stops, to be killed there: the audit events of Python."""

import re
import signal
import sys
from itertools import cycle, islice, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple


class Moment(NamedTuple):
    """The `nth` event of this name whose arguments match a pattern; it comes before what it announces."""

    where: str
    event: str
    arguments: str
    nth: int = 1


START = (
    Moment("before the folder is locked", "open", r"/lock "),
    Moment("before the first record", "open", r"/status\.json\..+\.tmp"),
    Moment("between the records of the start", "os.rename", r"/config\.toml\..+\.tmp"),
)
FIRST_SAVE = (
    Moment("between .metadata and marker of the first save", "open", r"/complete\.json\..+\.tmp"),
    Moment("before the first save is archived", "os.rename", r"/replaced/step-"),
    Moment("in the first save", "open", r"/step-\d+/__0_0\.distcp"),
    Moment("before the .metadata of the first save", "os.rename", r"/\.metadata\.tmp"),
    Moment("before the marker of the first save has its name", "os.rename", r"/complete\.json\..+\.tmp"),
)
TRAINING = (
    Moment("between .metadata and marker", "open", r"/complete\.json\..+\.tmp", 2),
    Moment("between steps", "open", r"/metrics\.jsonl a ", 8),
    Moment("while metrics are rewound", "os.rename", r"/metrics\.jsonl\..+\.tmp"),
    Moment("in a deletion", "os.rmdir", r"/\.deleting-step-", 2),
    Moment("in a save", "open", r"/step-\d+/__0_0\.distcp", 2),
    Moment("before a checkpoint is renamed to be deleted", "os.rename", r"/\.deleting-step-", 2),
    Moment("before .metadata", "os.rename", r"/\.metadata\.tmp", 2),
    Moment("between steps", "open", r"/metrics\.jsonl a ", 5),
    Moment("before a deletion", "shutil.rmtree", r"/\.deleting-step-", 2),
)
EXPORT = (
    Moment("before the export has its lock", "open", r"\.tmp/\.lock w "),
    Moment("before the export has its name", "os.rename", r"/hf/step-"),
    Moment(
        "after the export has its name", "shutil.rmtree", r"/hf/\.step-", 2
    ),  # the first is what the kill before has left
)


def choose(times: int) -> list[Moment]:
    """So many moments of all parts of a run's life, in the order in which a run reaches them."""
    rounds = zip_longest(FIRST_SAVE, islice(cycle(TRAINING), times), EXPORT, START)
    in_turn = ((place, moment) for each in rounds for place, moment in zip((1, 2, 3, 0), each, strict=True) if moment)
    return [moment for _, moment in sorted(islice(in_turn, times), key=itemgetter(0))]


def stop_at(moment: Moment, reached: Path) -> None:
    """Stop this process at a moment, once a file says so."""
    left = moment.nth

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == moment.event and re.search(moment.arguments, " ".join(map(str, arguments))):
            left -= 1
            if left == 0:
                reached.touch()
                signal.raise_signal(signal.SIGSTOP)  # to this thread: at once

    sys.addaudithook(watch)
