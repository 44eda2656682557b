"""What a run was fed, read from its folder: one step as text, and two runs compared. Needs no GPU and no process group.

A step is decoded by the code that fed it: the run's own loader, from the newest checkpoint before the step.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from flame.checkpoint.commit import complete_steps
from flame.config.parser import JobConfig, parse
from flame.data.ledger import roll
from flame.data.loader import Row, build_dataloader
from flame.data.source import build_sources
from flame.data.tokenize import Tokenizer, build_tokenizer
from flame.errors import UserError

CLIP = 60  # characters shown of each end of a piece


@dataclass(frozen=True)
class Start:
    """Where reading begins: behind `step`, with the tokens, the ledger and the loader's state of then."""

    step: int = 0
    tokens: int = 0
    data_digest: str = ""
    loader: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fed:
    """What one step was fed. first: sequence number of row 0; logged: the step at which the ledger was compared.

    expected: the digest the run logged there (None: no such record), found: the one that reading again gives.
    """

    step: int
    start: int
    first: int
    rows: Sequence[Row]
    sources: Sequence[str]
    logged: int
    expected: str | None
    found: str


def read_config(folder: Path) -> JobConfig:
    """The settings a run was started with last. Raises UserError if the folder is none of a run."""
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: no config.toml there, so it is not the folder of a run")
    return parse(["--job.config_file", str(folder / "config.toml")])


def read_ledger(folder: Path) -> dict[int, dict[str, Any]]:
    """{step: record} of the steps whose data digest was logged."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no metrics.jsonl there, so no step of a run was logged")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut the last one
    return {record["step"]: record for record in records if "data_digest" in record}


def read_start(folder: Path, step: int) -> Start:
    """The newest complete checkpoint before a step that holds the data position; the start of the run if none does."""
    for before in reversed([s for s in complete_steps(folder) if s < step]):
        reader = dcp.FileSystemReader(folder / f"step-{before}")
        keys = reader.read_metadata().state_dict_metadata
        wanted: dict[str, Any] = {key: None for key in keys if key.startswith(("dataloader.", "train_state."))}
        if "dataloader.sequence" not in wanted:
            continue  # of the model only
        dcp.load(wanted, storage_reader=reader, no_dist=True)
        state = {key.removeprefix("dataloader."): wanted[key] for key in wanted if key.startswith("dataloader.")}
        return Start(before, wanted["train_state.tokens"], wanted["train_state.data_digest"], state)
    return Start()


def replay(folder: Path, step: int) -> Fed:
    """Decode what a step was fed, and go on to the next logged step, whose digest is then compared.

    Raises UserError for a folder of no run, a step below 1 and a step behind the end of the data.
    """
    if step < 1:
        raise UserError(f"--step: found {step}, must be 1 or more")
    config, records = read_config(folder), read_ledger(folder)
    start = read_start(folder / config.checkpoint.folder, step)
    logged = min((s for s in records if s >= step), default=None)
    last = step if logged is None else logged
    config.training.local_batch_size = _sequences(folder, config, start, records.get(last))
    config.training.global_batch_size = -1  # one batch is the whole step
    sources, tokenizer = build_sources(config.training, config.data), _tokenizer(config)
    loader = build_dataloader(sources=sources, dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)
    loader.load_state_dict(start.loader)
    batches, digest = iter(loader), start.data_digest
    rows: Sequence[Row] = ()
    for at in range(start.step + 1, last + 1):
        fed = next(batches, None)
        if fed is None:
            raise UserError(f"--step: found {step}, but the data of {folder} ends before step {at}")
        digest = roll(digest, loader.digest)
        if at == step:
            rows, first = loader.rows, loader.position().sequence - len(fed[1])
    expected = None if logged is None else records[logged]["data_digest"]
    return Fed(step, start.step, first, rows, list(loader.counts()), last, expected, digest)


def show(folder: Path, step: int, rank: int | None, ranks: int | None, full: bool) -> bool:
    """Print what a step was fed, on one rank or all; False if it is not what the run's ledger says.

    Raises UserError as `replay` does, and for ranks that cannot be.
    """
    config = read_config(folder)
    world = ranks or _ranks(folder)
    if world < 1 or config.data.lanes % world:
        raise UserError(f"--ranks: found {world}, must divide the {config.data.lanes} lanes of the run")
    if rank is not None and not 0 <= rank < world:
        raise UserError(f"--rank: found {rank}, must be 0 to {world - 1} with {world} ranks")
    fed = replay(folder, step)
    if rank is not None and len(fed.rows) % world:
        raise UserError(f"--ranks: found {world}, must divide the {len(fed.rows)} rows of the step")
    chosen = [i for i in range(len(fed.rows)) if rank is None or i % world == rank]
    origin = f"checkpoint step-{fed.start}" if fed.start else "the start of the run"
    print(
        f"step {step} of {folder}: sequences {fed.first} to {fed.first + len(fed.rows) - 1} of the data, "
        f"rows of {config.training.seq_len} tokens and the last label, read again from {origin}"
    )
    if rank is not None:
        print(f"rank {rank} of {world}: {len(chosen)} of {len(fed.rows)} rows")
    tokenizer = _tokenizer(config)
    for index in chosen:
        sequence = fed.first + index
        print(f"row {index}  sequence {sequence}  lane {sequence % config.data.lanes}")
        for line in _describe(fed.rows[index], fed.sources, tokenizer, full):
            print(f"  {line}")
    if fed.expected is None:
        print(f"digest {fed.found}: not compared, as no step from {step} on is in metrics.jsonl")
    elif fed.expected == fed.found:
        print(f"digest {fed.found}: what metrics.jsonl says of step {fed.logged}")
    else:
        print(
            f"DIFFERENT DATA: the digest at step {fed.logged} is {fed.found}, but metrics.jsonl says {fed.expected}: "
            "the text, the tokenizer or the settings are not those of the run, so the rows above may not be either"
        )
    return fed.expected in (None, fed.found)


def verify(one: Path, other: Path) -> bool:
    """Print up to which step two runs saw the same data, by their ledgers; False if they differ anywhere.

    A digest rolls over all steps before it, so that equal at one step means equal up to it.
    Raises UserError if no step was logged by both.
    """
    first, second = read_ledger(one), read_ledger(other)
    common = sorted(first.keys() & second.keys())
    if not common:
        raise UserError(f"{one} and {other}: no step was logged by both")
    same = [step for step in common if first[step]["data_digest"] == second[step]["data_digest"]]
    apart = next((step for step in common if step not in same), None)
    if apart is None:
        print(f"the same data up to step {common[-1]}, digest {first[common[-1]]['data_digest']}")
        return True
    agreed = max((step for step in same if step < apart), default=0)
    until = f"the same up to step {agreed}" if agreed else "and no logged step before it is the same"
    print(
        f"DIFFERENT DATA at step {apart}, {until}: "
        f"{first[apart]['data_digest']} in {one}, {second[apart]['data_digest']} in {other}"
    )
    return False


def _describe(row: Row, sources: Sequence[str], tokenizer: Tokenizer, full: bool) -> Iterator[str]:
    """A line for each piece of a row: where it lies, its source, and its text or the text's two ends."""
    begins = row.starts if len(row.starts) == len(row.sources) else [0, *row.starts]
    for begin, end, source in zip(begins, [*begins[1:], len(row.tokens)], row.sources, strict=True):
        text = tokenizer.decode(row.tokens[begin:end].tolist())
        short = full or len(text) <= 2 * CLIP
        words = repr(text) if short else f"{text[:CLIP]!r} ... {text[-CLIP:]!r}"
        opens = "begins" if begin in row.starts else "goes on"
        yield f"{begin}-{end - 1}  {sources[source]} {opens}  {words}"


def _tokenizer(config: JobConfig) -> Tokenizer:
    return build_tokenizer(config.model.tokenizer_path, config.model.trust_remote_code, config.model.add_tokens)


def _ranks(folder: Path) -> int:
    file = folder / "environment.json"
    return json.loads(file.read_text())["device"].get("ranks", 1) if file.is_file() else 1


def _sequences(folder: Path, config: JobConfig, start: Start, record: dict[str, Any] | None) -> int:
    """Sequences of a step: by the tokens the run counted, as a resume may have changed them; else as configured."""
    training = config.training
    if record is not None:
        tokens, steps = record["tokens"] - start.tokens, record["step"] - start.step
        return max(1, tokens // (steps * training.seq_len))
    if training.global_batch_size != -1:
        return training.global_batch_size
    return training.local_batch_size * _ranks(folder)
