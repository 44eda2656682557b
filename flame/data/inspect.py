"""What one step of a run was fed, as text, read from the run's folder. Needs no GPU and no process group.

A step is decoded by the code that fed it: the run's own loader, from the newest checkpoint before the step.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from flame.checkpoint.commit import complete_steps, read_metadata
from flame.checkpoint.reader import load
from flame.config.files import parse_json, read_json
from flame.config.parser import parse_recorded
from flame.config.schema import JobConfig
from flame.data.lane import Row
from flame.data.ledger import read_ledger, roll
from flame.data.loader import build_dataloader
from flame.data.source import build_sources
from flame.data.tokenize import Tokenizer, load_tokenizer
from flame.errors import UserError

CLIP = 60  # characters shown of each end of a piece


class Start(NamedTuple):
    """Where reading begins: after `step`, with the tokens, the digest and the loader's state at that step."""

    step: int = 0
    tokens: int = 0
    data_digest: str = ""
    loader: dict[str, Any] | None = None


class Fed(NamedTuple):
    """What one step was fed. first: sequence number of row 0; logged: the step whose digest was compared.

    expected: the digest that the run logged there (None: there is no such record); found: that of reading again.
    about: lines about tokenizer and sources. tokenizer: that of the rows.
    """

    start: int
    first: int
    rows: Sequence[Row]
    sources: Sequence[str]
    logged: int
    expected: str | None
    found: str
    about: Sequence[str]
    tokenizer: Tokenizer


def read_start(folder: Path, step: int) -> Start:
    """The newest complete checkpoint before a step that holds the data position; the start of the run if none does."""
    for before in reversed([s for s in complete_steps(folder) if s < step]):
        checkpoint = folder / f"step-{before}"
        keys = read_metadata(checkpoint).tensors
        state: dict[str, Any] = {key: None for key in keys if key.startswith(("dataloader.", "train_state."))}
        if not state.keys() >= {"dataloader.sequence", "train_state.tokens", "train_state.data_digest"}:
            continue  # of the model only
        load(state, checkpoint, no_dist=True)
        loader = {key.removeprefix("dataloader."): state[key] for key in state if key.startswith("dataloader.")}
        return Start(before, state["train_state.tokens"], state["train_state.data_digest"], loader)
    return Start()


def replay(folder: Path, step: int, *, trusted: bool = False) -> Fed:
    """Decode what a step was fed, and go on to the next logged step, whose digest is then compared.

    Raises UserError if the folder is not that of a run, for a step below 1 or far beyond the run, and for a step after
    the end of the data.
    """
    if step < 1:
        raise UserError("--step", step, "1 or more")
    config, records = parse_recorded(folder, trusted=trusted), read_ledger(folder)
    if step > (most := max(config.training.steps, *records, 0) + 1):
        raise UserError("--step", step, f"at most {most}, the one after the run's last")
    start = read_start(folder / config.checkpoint.folder, step)
    logged = min((s for s in records if s >= step), default=None)
    last = step if logged is None else logged
    config.training.local_batch_size = _count_sequences(folder, config, start, records.get(last))
    config.training.global_batch_size = -1  # one batch is the whole step
    sources, tokenizer = build_sources(config.training, config.data), load_tokenizer(config)
    loader = build_dataloader(sources=sources, dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)
    if start.loader:  # other data is shown, and told by its digest
        with suppress(ValueError, TypeError):  # what is damaged, the loader reports
            start.loader["order"] = json.dumps({**parse_json(start.loader["order"]), "data": {}})
        loader.load_state_dict(start.loader)
    batches, digest = iter(loader), start.data_digest
    rows: Sequence[Row] = ()
    for at in range(start.step + 1, last + 1):
        if next(batches, None) is None:
            raise UserError("--step", step, f"below {at}, where the data of {folder} ends")
        digest = roll(digest, loader.digest)
        if at == step:
            rows, first = loader.rows, loader.position().sequence - len(loader.rows)
    expected = None if logged is None else records[logged]["data_digest"]
    about = [tokenizer.describe(), *(line for source in sources for line in source.describe())]
    return Fed(start.step, first, rows, list(loader.counts()), last, expected, digest, about, tokenizer)


def show(folder: Path, step: int, rank: int | None, ranks: int | None, full: bool, trusted: bool) -> bool:
    """Print what a step was fed, on one rank or all; False if the run logged another digest.

    Raises UserError as `replay` does, and for ranks that do not divide the lanes or the rows.
    """
    config = parse_recorded(folder, trusted=trusted)
    lanes, dp_degree = config.data.lanes, _read_ranks(folder) if ranks is None else ranks
    if dp_degree < 1 or lanes % dp_degree:
        raise UserError("--ranks", dp_degree, f"a divisor of the run's {lanes} lanes")
    if rank is not None and not 0 <= rank < dp_degree:
        raise UserError("--rank", rank, f"0 to {dp_degree - 1} with {dp_degree} ranks")
    fed = replay(folder, step, trusted=trusted)
    if rank is not None and len(fed.rows) % dp_degree:
        raise UserError("--ranks", dp_degree, f"a divisor of the {len(fed.rows)} rows of the step")
    chosen = [i for i in range(len(fed.rows)) if rank is None or i % dp_degree == rank]
    origin = f"checkpoint step-{fed.start}" if fed.start else "the start of the run"
    print(
        f"step {step} of {folder}: sequences {fed.first} to {fed.first + len(fed.rows) - 1} of the data, "
        f"rows of {config.training.seq_len} tokens and the last label, read again from {origin}"
    )
    print("\n".join(fed.about))
    if rank is not None:
        print(f"rank {rank} of {dp_degree}: {len(chosen)} of {len(fed.rows)} rows")
    for index in chosen:
        sequence = fed.first + index
        print(f"row {index}  sequence {sequence}  lane {sequence % lanes}")
        for line in _describe(fed.rows[index], fed.sources, fed.tokenizer, full):
            print(f"  {line}")
    if fed.expected is None:
        print(f"digest {fed.found}: not compared, as no step from {step} on is in metrics.jsonl")
    elif fed.expected == fed.found:
        print(f"digest {fed.found}: as logged at step {fed.logged}")
    else:
        print(
            f"DIFFERENT DATA: the digest at step {fed.logged} is {fed.found}, but {fed.expected} was logged: "
            "the text, the tokenizer or the settings are not those of the run, so the rows above may not be either"
        )
    return fed.expected in (None, fed.found)


def _describe(row: Row, sources: Sequence[str], tokenizer: Tokenizer, full: bool) -> Iterator[str]:
    """A line for each piece of a row: where it lies, its source, and its text or the text's two ends."""
    begins = row.starts if len(row.starts) == len(row.sources) else [0, *row.starts]
    for begin, end, source in zip(begins, [*begins[1:], len(row.tokens)], row.sources, strict=True):
        text = tokenizer.decode(row.tokens[begin:end].tolist())
        short = full or len(text) <= 2 * CLIP
        words = repr(text) if short else f"{text[:CLIP]!r} ... {text[-CLIP:]!r}"
        verb = "begins" if begin in row.starts else "goes on"
        yield f"{begin}-{end - 1}  {sources[source]} {verb}  {words}"


def _read_ranks(folder: Path) -> int:
    try:
        ranks = read_json(folder / "environment.json")["device"].get("ranks", 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a power cut can leave it empty
        return 1
    return ranks if isinstance(ranks, int) and ranks > 0 else 1


def _count_sequences(folder: Path, config: JobConfig, start: Start, record: dict[str, Any] | None) -> int:
    """Sequences per step: by the tokens the run counted, as a resume may have changed them; else as configured."""
    training = config.training
    if record is not None:
        tokens, steps = record["tokens"] - start.tokens, record["step"] - start.step
        return max(1, tokens // (steps * training.seq_len))
    if training.global_batch_size != -1:
        return training.global_batch_size
    return training.local_batch_size * _read_ranks(folder)
