"""Batches of a rank's lanes, read ahead in the background; the state is that of the last batch handed out."""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger

from flame.config.files import parse_json
from flame.config.schema import Data, JobConfig, Training
from flame.data import pack
from flame.data.cursor import Cursor, Encoder, encode
from flame.data.document import NAMED, Bad
from flame.data.lane import Lane, LaneState, Row, dump_state, initial_deficits, normalize, parse_state
from flame.data.ledger import digest_batch
from flame.data.order import OTHER_DATA, Order
from flame.data.prefetch import read_in_turn
from flame.data.settings import check_lanes, parse_skip
from flame.data.source import Source
from flame.data.tokenize import Tokenizer
from flame.data.window import IndexedWindows, Place, StreamedWindows, WindowShuffle
from flame.errors import UserError, first_line

MANY = 100  # epochs: an epoch is guessed from a few rows, and may be many times as long
AHEAD = 1 << 19  # tokens in rows read ahead, up to 4 rows per lane: a document of a megabyte delays no other lane


class Sample(NamedTuple):
    """A lane's row, its labels, int32 (seq_len,), and its digest, None if it is skipped."""

    lane: int
    row: Row
    labels: np.ndarray
    digest: int | None


class Position(NamedTuple):
    """After a batch: sequences handed out by all ranks, and the states of the rank's lanes."""

    sequence: int
    states: dict[int, LaneState]


class Loader(BaseDataLoader):
    """Batches: ({"input"}, labels), each int64 (batch, seq); with varlen also "positions" and "cu_seqlens".

    Rank r of W owns the lanes l with l % W == r; its rows are the sequences r, r + W, r + 2W ... of the run. Iterating
    starts after the last batch handed out, or where load_state_dict put it, and takes this for the start of a step. It
    ends, unless epochs is 0, before the first batch for which one of its lanes has no whole row left. Raises UserError
    for lanes that the ranks cannot share, steps to skip that are not steps, and ids that the encoder does not have.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        training: Training,
        data: Data,
        *,
        seed: int,
        dp_rank: int,
        dp_degree: int,
    ) -> None:
        check_lanes(data, dp_degree)
        self._sources, self._encoder, self._dp_rank, self._dp_degree = sources, encoder, dp_rank, dp_degree
        self._batch_size, self._seq_len = training.local_batch_size, training.seq_len
        self._varlen, self._context_len, self._epochs = training.varlen, training.context_len, data.epochs
        self._names = [source.name for source in sources]
        self._noted: dict[str, list[Bad]] = {name: [] for name in self._names}
        self._shares = normalize([source.weight for source in sources])
        self._shuffles = [WindowShuffle(name, data.window, data.lanes, seed) for name in self._names]
        step = training.global_batch_size if training.global_batch_size != -1 else self._batch_size * dp_degree
        fingerprints = {source.name: source.fingerprint for source in sources}
        self._order = Order(data.lanes, data.window, seed, step, parse_skip(data.skip), fingerprints)
        own_lanes, workers = range(dp_rank, data.lanes, dp_degree), training.dataloader.num_workers
        self._workers = min(workers, len(own_lanes))
        ready = self._workers * (training.dataloader.prefetch_factor or 2) * self._batch_size
        self._ahead = max(ready, min(4 * len(own_lanes), AHEAD // (self._seq_len + 1)))  # rows
        if workers:  # each of them is a thread of its own; Rust's pool of threads would have them wait for each other
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        lengths = [typical_length(source, encoder) for source in sources]
        places = tuple(Place() for _ in sources)
        self._initial_states = {
            lane: LaneState(-1, 0, initial_deficits(lane, self._shares, lengths), places) for lane in own_lanes
        }
        self._states = dict(self._initial_states)
        self._sequence = 0  # sequences of the run that were handed out or skipped, on all ranks
        self._iteration: object = None
        self.rows: Sequence[Row] = ()  # of the last batch handed out
        self.digest = 0  # of the last batch handed out, its rows at their indices in the step; see flame.data.ledger

    def __iter__(self) -> Generator[tuple[dict[str, torch.Tensor], torch.Tensor], None, None]:
        iteration = self._iteration = object()
        own = list(self._states)  # the rank's lanes; its j-th row comes from own[j % len(own)]
        first = self._sequence // self._dp_degree % len(own)
        turns = own[first:] + own[:first]
        lanes = self._open_lanes()
        parts = [
            self._read(lane, lanes[lane], self._indices(self._sequence, row, len(own)))
            for row, lane in enumerate(turns)
        ]
        with closing(read_in_turn(parts, self._workers, self._ahead)) as stream:
            while len(samples := list(islice(stream, self._batch_size))) == self._batch_size:
                if self._iteration is not iteration:
                    raise RuntimeError("stale iterator: the loader was iterated anew or given another state since")
                self._states.update((sample.lane, sample.row.state) for sample in samples)
                self._sequence += self._batch_size * self._dp_degree
                digests = [sample.digest for sample in samples if sample.digest is not None]
                if not digests:
                    for steps in self._order.skipped_from(self._sequence - self._batch_size * self._dp_degree):
                        logger.info(f"--data.skip: the data of steps {steps} is not trained on")
                    continue
                self.rows = [sample.row for sample in samples]
                self.digest = sum(digests) % 2**64
                yield self._collate(
                    [sample.row.tokens[:-1] for sample in samples],
                    [sample.labels for sample in samples],
                    [sample.row.starts for sample in samples],
                )

    def _indices(self, sequence: int, row: int, stride: int) -> Iterator[int | None]:
        """The indices in their steps of a lane's rows: of the rank's rows from a sequence on one, and every stride-th.

        None for those of skipped steps.
        """
        batch, handed_out = self._batch_size * self._dp_degree, 0  # sequences on all ranks
        if not self._order.skip:  # no need to go through the batches between two rows of a lane
            for number in count(row, stride):
                batches, row = divmod(number, self._batch_size)
                yield batches * batch % self._order.step + row * self._dp_degree + self._dp_rank
        for first in count(sequence, batch):
            skipped = self._order.skips(first)
            while row < self._batch_size:
                yield None if skipped else handed_out % self._order.step + row * self._dp_degree + self._dp_rank
                row += stride
            row -= self._batch_size
            handed_out += 0 if skipped else batch

    def _read(self, lane: int, rows: Lane, indices: Iterator[int | None]) -> Iterator[Sample]:
        for index, row in zip(indices, rows, strict=False):
            labels = pack.label(row.tokens, row.starts if self._varlen else ())
            digest = None if index is None else digest_batch(row.tokens[None, :-1], labels[None], [index])
            yield Sample(lane, row, labels, digest)

    def _open_lanes(self) -> dict[int, Lane]:
        windows = [
            StreamedWindows(source.rows, shuffle, dict(zip(self._states, places, strict=True)))
            if source.streamed
            else IndexedWindows(source.rows, shuffle)
            for source, shuffle, places in zip(self._sources, self._shuffles, self._places(), strict=True)
        ]
        return {
            lane: Lane(
                [
                    Cursor(name, view, lane, self._encoder, place, self._epochs, self._note_bad)
                    for name, view, place in zip(self._names, windows, state.places, strict=True)
                ],
                self._shares,
                self._seq_len,
                state,
            )
            for lane, state in self._states.items()
        }

    def _collate(
        self, inputs: Sequence[np.ndarray], labels: Sequence[np.ndarray], starts: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = {"input": torch.from_numpy(np.array(inputs, np.int64))}
        if self._varlen:
            positions, cu_seqlens = pack.find_pieces(starts, self._seq_len, self._context_len)
            batch |= {"positions": torch.from_numpy(positions), "cu_seqlens": torch.from_numpy(cu_seqlens)}
        return batch, torch.from_numpy(np.array(labels, np.int64))

    def blank(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A batch without a label, for a rank whose data ended to take part in a step that the others began."""
        size, seq = self._batch_size, self._seq_len
        return self._collate([np.zeros(seq)] * size, [np.full(seq, IGNORE_INDEX)] * size, [[]] * size)

    @property
    def ahead(self) -> int:
        """Batches that the workers may have ready."""
        return -(-self._ahead // self._batch_size) if self._workers else 0

    def counts(self) -> dict[str, tuple[int, float]]:
        """{source: (tokens, epochs)} that this rank's lanes were handed; sums over ranks are those of the run."""
        totals = {}
        for source, places in zip(self._sources, self._places(), strict=True):
            if source.streamed:  # its length is not known: whole epochs, each lane's for its share of the rows
                epochs = sum(place.epoch for place in places) / self._order.lanes
            else:
                epochs = sum(place.documents + place.skipped for place in places) / len(source.rows)
            totals[source.name] = (sum(place.tokens for place in places), epochs)
        return totals

    def skipped(self) -> dict[str, tuple[int, int, int]]:
        """{source: (bad rows skipped, rows read, epochs begun)}, sums over this rank's lanes, a window at a time."""
        totals = {}
        for name, places in zip(self._names, self._places(), strict=True):
            bad = sum(place.skipped for place in places)
            begun = sum(place.epoch + (place.window > 0 or place.at > 0) for place in places)
            totals[name] = (bad, bad + sum(place.documents for place in places), begun)
        return totals

    def _places(self) -> Iterator[tuple[Place, ...]]:
        """For each source, where the rank's lanes are in it."""
        return zip(*(state.places for state in self._states.values()), strict=True)

    def _note_bad(self, name: str, row: Bad) -> None:
        noted = self._noted[name]
        if len(noted) < NAMED and row not in noted:
            noted.append(row)

    def noted(self) -> dict[str, list[Bad]]:
        """{source: the first bad rows} that this rank's lanes have read since the loader was made."""
        return {name: list(rows) for name, rows in self._noted.items() if rows}

    def position(self) -> Position:
        """Where the loader is after the last batch handed out, for `rewind`; costs next to nothing."""
        return Position(self._sequence, dict(self._states))

    def rewind(self, position: Position) -> None:
        """Take back the batches handed out since; the loader must then be iterated anew."""
        self._sequence, self._states, self._iteration = position.sequence, dict(position.states), None

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch handed out: "sequence", "order", and JSON for each of the rank's lanes."""
        lanes = {f"lane_{lane:03d}": dump_state(state, self._names) for lane, state in self._states.items()}
        encoder = {"engine": self._encoder.engine, "prefix": len(self._encoder.prefix)}
        return {"sequence": self._sequence, "order": self._order.dump(self._sequence, **encoder), **lanes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from such a state, saved on any number of ranks, with the engine that made its ids.

        Raises UserError if the data was in another order, or the ranks do not divide the sequences read.
        """
        if not state_dict:
            return
        try:
            sequence, saved = int(state_dict["sequence"]), parse_json(state_dict["order"])
            self._order.check(state_dict["order"], sequence)
            longer = len(self._encoder.prefix) - int(saved.get("prefix", 0))  # of the open documents
            states = {
                lane: parse_state(state_dict[f"lane_{lane:03d}"], self._names, fresh, longer)
                for lane, fresh in self._initial_states.items()
            }
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError("dataloader", f"a state without its parts ({first_line(error)})", "flame's") from None
        if sequence % self._dp_degree:
            allowed = f"a divisor of the {sequence} sequences that the checkpoint has read"
            raise UserError("data-parallel ranks", self._dp_degree, allowed)
        self._encoder.use(saved.get("engine", self._encoder.engine))
        self.rewind(Position(sequence, states))
        if "data" not in saved:
            self._check_counts()

    def _check_counts(self) -> None:
        """Raise UserError for a source that has not the rows its lanes have read: older checkpoints record no more."""
        logger.warning("an older flame did not record the data of this checkpoint; flame.sh data show compares it")
        for source, shuffle, places in zip(self._sources, self._shuffles, self._places(), strict=True):
            if not source.streamed and not all(shuffle.may_have_read(place, len(source.rows)) for place in places):
                found, allowed = f"{len(source.rows):,} rows", "as many as when the checkpoint was made"
                raise UserError(f"source {source.name}", found, allowed, OTHER_DATA)


def build_dataloader(
    *, sources: Sequence[Source], dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, job_config: JobConfig
) -> Loader:
    """torchtitan's `build_dataloader_fn`: the loader of a rank over the job's opened sources."""
    training, data, seed = job_config.training, job_config.data, job_config.debug.seed or 0
    return Loader(sources, tokenizer, training, data, seed=seed, dp_rank=dp_rank, dp_degree=dp_world_size)


def check_skip(sources: Sequence[Source], encoder: Encoder, training: Training, data: Data, dp_degree: int) -> None:
    """Raise UserError for steps to skip that are more than many epochs, which would be read to the end of time."""
    ranges = parse_skip(data.skip)
    if not ranges or data.epochs or any(source.streamed for source in sources):
        return
    tokens = sum(typical_length(source, encoder) * len(source.rows) for source in sources)
    step = max(training.global_batch_size, training.local_batch_size * dp_degree)
    epoch = int(tokens / (step * training.seq_len)) + 1
    for first, last in ranges:
        if last - first >= MANY * epoch:
            hint = f"an epoch of the data has about {epoch:,}"
            raise UserError("--data.skip", f"{first}-{last}", f"a range of at most {MANY * epoch:,} steps", hint)


def typical_length(source: Source, encoder: Encoder) -> float:
    """Mean length of a few documents of a source, weighted by tokens; the same on every rank.

    Raises UserError if the encoder fails on one of them.
    """
    documents = [row for row in source.head if not isinstance(row, Bad)]
    lengths = np.array([float(len(ids)) for ids in encode(encoder, documents, source.name)])
    return float((lengths**2).sum() / lengths.sum()) if lengths.any() else 1.0
