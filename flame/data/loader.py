"""Batches of a rank's lanes, read ahead in the background; the state is that of the last batch handed out."""

import json
from collections.abc import Generator, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader

from flame.data import mixture, pack
from flame.data.lane import Cursor, Encoder, Lane, LaneState, Place, dump_state, parse_state
from flame.data.prefetch import read_ahead
from flame.data.source import Source, build_sources
from flame.data.window import Deal, IndexedWindows, StreamedWindows
from flame.errors import UserError

if TYPE_CHECKING:
    from flame.config import JobConfig
    from flame.data.tokenize import Tokenizer

SAMPLE = 16  # documents of a source whose lengths set the phases of the lanes

Row = tuple[np.ndarray, list[int], LaneState]


class Loader(BaseDataLoader):
    """Endless batches: ({"input"}, labels), each int64 (batch, seq); with varlen also "positions" and "cu_seqlens".

    Rank r of W owns the lanes l with l % W == r; its rows are the sequences r, r + W, r + 2W ... of the run. Iterating
    starts behind the last batch handed out, or where load_state_dict put it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        *,
        rank: int,
        world: int,
        batch: int,
        seq_len: int,
        lanes: int = 64,
        window: int = 1024,
        seed: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        varlen: bool = False,
        context_len: int | None = None,
    ) -> None:
        if lanes % world:
            raise UserError(f"--data.lanes {lanes}: not a multiple of the {world} data-parallel ranks")
        self._sources, self._encoder, self._world = sources, encoder, world
        self._batch, self._seq_len, self._varlen, self._context_len = batch, seq_len, varlen, context_len
        self._names = [source.name for source in sources]
        self._shares = mixture.normalize([source.weight for source in sources])
        self._deals = [Deal(name, window, lanes, seed) for name in self._names]
        self._order = json.dumps({"lanes": lanes, "window": window, "seed": seed})
        self._workers, self._prefetch = min(workers, lanes // world), prefetch
        lengths = [_typical_length(source, encoder) for source in sources]
        places = tuple(Place() for _ in sources)
        self._fresh = {
            lane: LaneState(-1, 0, mixture.open_credits(lane, self._shares, lengths), places)
            for lane in range(rank, lanes, world)
        }
        self._states = dict(self._fresh)
        self._sequence = 0  # sequences of the run, on all ranks, that were handed out
        self._turn: object = None

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        turn = self._turn = object()
        own = list(self._states)  # the rank's lanes; its j-th row comes from own[j % len(own)]
        first = self._sequence // self._world
        lanes = self._open_lanes()
        shares = max(1, self._workers)
        parts: list[Generator[list[Row], None, None]] = []
        for k in range(shares):
            mine = _read([lanes[lane] for lane in own], first, self._batch, k, shares)
            parts.append(read_ahead(mine, self._prefetch) if self._workers else mine)
        try:
            for begin in count(first, self._batch):
                ready = [iter(next(part)) for part in parts]
                if self._turn is not turn:
                    raise RuntimeError("stale iterator: the loader was iterated anew or given another state since")
                places = [j % len(own) for j in range(begin, begin + self._batch)]
                rows = [next(ready[place % shares]) for place in places]
                self._states.update((own[place], row[2]) for place, row in zip(places, rows, strict=True))
                self._sequence += self._batch * self._world
                yield self._collate(rows)
        finally:
            for part in parts:
                part.close()

    def _open_lanes(self) -> dict[int, Lane]:
        windows = [
            StreamedWindows(
                source.rows, deal, {lane: (*s.places[i][:2], s.places[i].mark) for lane, s in self._states.items()}
            )
            if source.streamed
            else IndexedWindows(source.rows, deal)
            for i, (source, deal) in enumerate(zip(self._sources, self._deals, strict=True))
        ]
        return {
            lane: Lane(
                [
                    Cursor(name, view, lane, self._encoder, place)
                    for name, view, place in zip(self._names, windows, state.places, strict=True)
                ],
                self._shares,
                self._seq_len,
                state,
            )
            for lane, state in self._states.items()
        }

    def _collate(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs, labels = pack.shift([tokens for tokens, _, _ in rows])
        batch = {"input": torch.from_numpy(inputs)}
        if self._varlen:
            labels, positions, cu_seqlens = pack.mark_documents(labels, [s for _, s, _ in rows], self._context_len)
            batch |= {"positions": torch.from_numpy(positions), "cu_seqlens": torch.from_numpy(cu_seqlens)}
        return batch, torch.from_numpy(labels)

    def counts(self) -> dict[str, tuple[int, float]]:
        """{source: (tokens, epochs)} that this rank's lanes were handed; sums over ranks are those of the run."""
        totals = {}
        for i, (source, deal) in enumerate(zip(self._sources, self._deals, strict=True)):
            places = [state.places[i] for state in self._states.values()]
            if source.streamed:  # its length is not known: whole epochs, each lane's for its part
                epochs = sum(place.epoch for place in places) / deal.lanes
            else:
                epochs = sum(place.documents + place.skipped for place in places) / len(source.rows)
            totals[source.name] = (sum(place.tokens for place in places), epochs)
        return totals

    def skipped(self) -> dict[str, int]:
        """{source: rows without text} that this rank's lanes met and skipped."""
        return {
            name: sum(state.places[i].skipped for state in self._states.values()) for i, name in enumerate(self._names)
        }

    def state_dict(self) -> dict[str, Any]:
        """The state behind the last batch handed out: "sequence", "order", and JSON for each of the rank's lanes."""
        lanes = {f"lane_{lane:03d}": dump_state(state, self._names) for lane, state in self._states.items()}
        return {"sequence": self._sequence, "order": self._order, **lanes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up such a state, made on any number of ranks. Raises UserError if the order of the data was another."""
        if not state_dict:
            return
        was, now = json.loads(state_dict["order"]), json.loads(self._order)
        flags = {"lanes": "--data.lanes", "window": "--data.window", "seed": "--debug.seed"}
        for key, flag in flags.items():
            if was[key] != now[key]:
                raise UserError(f"{flag} {now[key]}: the checkpoint's data order was made with {was[key]}; keep it")
        sequence = state_dict["sequence"]
        if sequence % self._world:
            raise UserError(f"the {sequence} sequences of the checkpoint do not divide over {self._world} ranks")
        self._sequence, self._turn = sequence, None
        self._states = {
            lane: parse_state(state_dict[f"lane_{lane:03d}"], self._names, fresh) for lane, fresh in self._fresh.items()
        }


def build_dataloader(*, dp_world_size: int, dp_rank: int, tokenizer: "Tokenizer", job_config: "JobConfig") -> Loader:
    """The loader of a data-parallel rank, as a job asks for it.

    Raises UserError for what the job's data flags name and cannot be read or used.
    """
    training, data = job_config.training, job_config.data
    for flag, value in (("--data.lanes", data.lanes), ("--data.window", data.window)):
        if value < 1:
            raise UserError(f"{flag} {value}: at least 1 is needed")
    if training.context_len is not None and (training.context_len < 1 or not training.varlen):
        raise UserError(f"--training.context_len {training.context_len}: at least 1, and only with --training.varlen")
    return Loader(
        build_sources(training, data),
        tokenizer,
        rank=dp_rank,
        world=dp_world_size,
        batch=training.local_batch_size,
        seq_len=training.seq_len,
        lanes=data.lanes,
        window=data.window,
        seed=job_config.debug.seed or 0,
        workers=training.dataloader.num_workers,
        prefetch=training.dataloader.prefetch_factor or 2,
        varlen=training.varlen,
        context_len=training.context_len,
    )


def _typical_length(source: Source, encoder: Encoder) -> float:
    """Mean length of a few documents of a source, weighted by tokens; the same on every rank."""
    texts = [text for text in source.sample(SAMPLE) if isinstance(text, str) and text]
    lengths = np.array([len(ids) + 1.0 for ids in encoder.encode_batch(texts)])
    return float((lengths**2).sum() / lengths.sum()) if texts else 1.0


def _read(lanes: Sequence[Lane], first: int, batch: int, worker: int, workers: int) -> Generator[list[Row], None, None]:
    """The rows of each batch that come from a worker's lanes; worker k owns every workers-th lane from k on."""
    for begin in count(first, batch):
        places = [j % len(lanes) for j in range(begin, begin + batch)]
        mine = [lanes[place] for place in places if place % workers == worker]
        yield [(*lane.row(), lane.state()) for lane in mine]
