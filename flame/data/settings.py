"""The data settings of a job as values, each rule in one place. Imports neither torch nor numpy: preflight calls it."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from flame.config.paths import COMPRESSED, KINDS, PATTERN
from flame.config.schema import Data, DataSource, Training, Validation
from flame.errors import UserError, near_multiples

_LISTS = {  # field of a source: the comma list of it in [training]
    **{"path": "dataset", "subset": "dataset_name", "split": "dataset_split"},
    **{"data_dir": "data_dir", "data_files": "data_files", "weight": "data_probs"},
}


LANES = 2**17  # each has a state in memory and in every checkpoint


def parse_sources(section: Training | Validation, data: Data) -> list[DataSource]:
    """The sources of a section, each with its name and column; a weight is a share of the sum of all weights.

    They are its aligned comma lists or, of training, data.sources if there are any. Raises UserError for lists of
    unequal length, weights that are not positive numbers or, in data_probs, do not sum to 1, names that are not unique,
    and sources that are given in both ways.
    """
    with spelled_by_the_user(section, data):
        sources = data.sources if _in_tables(section, data) else _read_lists(section)
        given = [field for field, name in _LISTS.items() if getattr(section, name, None) != getattr(Training, name)]
        if sources is data.sources and given:
            hint = "the sources are in [[data.sources]], give only one of the two"
            raise UserError(f"--training.{_LISTS[given[0]]}", hint=hint)
    names = [source.name for source in sources if source.name]
    taken, parsed = set(names), []
    for index, source in enumerate(sources):
        with spelled_by_the_user(section, data, index):
            if not source.path:
                raise UserError("path", "''", "stdlib, a local path or a hub id")
            if source.data_files and not all(map(str.strip, source.data_files.split(","))):
                raise UserError("data_files", repr(source.data_files), "files and patterns, none of them empty")
            if not 0 < source.weight < 1e100:  # the sum is finite, and so is every share
                raise UserError("weight", source.weight, "a number above 0 and below 1e100")
            if not (source.name or "").isprintable():
                raise UserError("name", repr(source.name), "printable: it is in the log and the metrics")
            if names.count(source.name or "") > 1:
                raise UserError("name", f"{source.name!r} twice", "unique: every source has a name of its own")
        name = source.name or _choose_name(source, taken)
        taken.add(name)
        parsed.append(replace(source, name=name, column=source.column or data.column))
    return parsed


@contextmanager
def spelled_by_the_user(section: Training | Validation, data: Data, index: int = 0) -> Iterator[None]:
    """In the block, a UserError whose setting is a field of the source at an index names its flag or TOML key."""
    try:
        yield
    except UserError as error:
        field = error.setting
        if field not in DataSource.__dataclass_fields__:
            raise
        flag = f"--{'training' if isinstance(section, Training) else 'validation'}.{_LISTS.get(field)}"
        flag = "--data.column" if field == "column" else flag
        raise error.at(f"data.sources[{index}].{field}" if _in_tables(section, data) else flag) from error


def _in_tables(section: Training | Validation, data: Data) -> bool:
    return isinstance(section, Training) and bool(data.sources)


def _read_lists(section: Training | Validation) -> list[DataSource]:
    sources = [DataSource(path.strip()) for path in section.dataset.split(",")]
    if not all(source.path for source in sources):
        allowed = "a comma list whose every item is stdlib, a local path or a hub id"
        raise UserError("path", repr(section.dataset), allowed)
    for field, name in _LISTS.items():
        value = getattr(section, name, None)  # validation has no data_dir and no data_probs
        if field == "path" or value is None:
            continue
        whole = field == "data_files" and len(sources) == 1  # the one source's files, however many
        items = [value] if whole else value.split(",")
        if len(items) != len(sources):
            allowed = f"one item for each of {len(sources)} datasets"
            raise UserError(field, f"{len(items)} items", allowed, "an empty item is none")
        try:
            values = [float(item) if field == "weight" else item.strip() or None for item in items]
        except ValueError:
            raise UserError(field, value, "a number above 0 for each dataset") from None
        for source, item in zip(sources, values, strict=True):
            setattr(source, field, item)
        if field == "weight" and abs((total := sum(source.weight for source in sources)) - 1) > 1e-3:
            raise UserError(field, f"a sum of {total:g}", "shares that sum to 1")
    return sources


def _choose_name(source: DataSource, taken: Collection[str]) -> str:
    """The last part of the path that is not a pattern, with the subset, and a number if that is taken."""
    parts = [part for part in Path(source.path).parts if not PATTERN & set(part)] or ["data"]
    base = parts[-1]
    while Path(base).suffix in (*KINDS, *COMPRESSED, ".bin", ".idx"):
        base = Path(base).stem
    base = f"{base}-{source.subset}" if source.subset else base
    return base if base not in taken else next(name for i in count(2) if (name := f"{base}-{i}") not in taken)


def check_lanes(data: Data, dp_degree: int) -> None:
    """Raise UserError for lanes or a window below 1, and for lanes that the data-parallel ranks do not divide."""
    for field, value, most in (("lanes", data.lanes, LANES), ("window", data.window, 2**62 - 1)):
        if not 1 <= value <= most:
            raise UserError(f"--data.{field}", value, f"1 or more, and at most {most}")
    if data.lanes % dp_degree:
        working = near_multiples(data.lanes, dp_degree)
        allowed = f"a multiple of the {dp_degree} data-parallel ranks: {working} would work"
        raise UserError("--data.lanes", data.lanes, allowed)


def parse_skip(text: str | None) -> list[tuple[int, int]]:
    """First and last step of each range of --data.skip, such as "120-135,400", in ascending order and merged.

    Raises UserError for anything but a comma list of steps and ranges of steps, counted from 1.
    """
    ranges: list[tuple[int, int]] = []
    for item in text.split(",") if text else ():
        match = re.fullmatch(r"\s*([1-9]\d{0,17})\s*(?:-\s*([1-9]\d{0,17})\s*)?", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError("--data.skip", f"{item.strip()!r} in {text!r}", "steps such as 120-135,400, below 10^18")
        ranges.append((first, last))
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
