"""Which steps of the data order are not trained on: `--data.skip "120-135,400"`."""

import re

from flame.errors import UserError


def parse_skip(text: str | None) -> list[tuple[int, int]]:
    """First and last step of each range, ascending and apart.

    Raises UserError for what is no comma list of steps and ranges of steps, counted from 1.
    """
    ranges: list[tuple[int, int]] = []
    for item in text.split(",") if text else ():
        match = re.fullmatch(r"\s*([1-9]\d*)\s*(?:-\s*([1-9]\d*)\s*)?", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--data.skip: found {item.strip()!r} in {text!r}, must be steps such as 120-135,400")
        ranges.append((first, last))
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
