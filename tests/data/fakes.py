"""Small hand-made sources, an encoder of bytes, and compressors."""

import bz2
import gzip
import lzma

import numpy as np
import pyarrow

from flame.config.schema import Data, DataLoader, JobConfig, Training
from flame.data.document import accept
from flame.data.loader import Loader
from flame.data.source import Source, build_sources

EOS = 256
COMPRESS = {  # {ending: compressor of bytes}
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}


class Bytes:
    """Ids are the bytes of the text; a zero-width space has none."""

    eos_id = EOS
    prefix = ()
    vocab_size = EOS + 1
    engine = "bytes"

    def use(self, engine):
        assert engine == self.engine

    def encode_batch(self, texts):
        return [np.frombuffer(text.replace("\u200b", "").encode(), np.uint8).astype(np.int32) for text in texts]


class Texts(list):
    """Rows with random access."""

    def texts(self, indices):
        return [accept(self[i], f"row {i}") for i in indices]


class Tape:
    """Rows in one order only; a mark is the number of rows read, boxed as datasets boxes its own."""

    def __init__(self, rows):
        self.rows = list(rows)

    def batches(self, size, mark=None):
        at = mark["row"] if mark else 0
        while at < len(self.rows):
            batch = [accept(row, f"row {i}") for i, row in enumerate(self.rows[at : at + size], at)]
            at += len(batch)
            yield batch, {"row": at}


def documents(name, count, length):
    """Documents that can be told apart: "<name row>" and filling, of about a length."""
    rng = np.random.default_rng(count)
    return [f"<{name}{i}>" + "." * int(rng.integers(length // 2, length * 3 // 2 + 1)) for i in range(count)]


def three(kind=Texts):
    return [
        Source("a", 0.5, kind(documents("a", 90, 20))),
        Source("b", 0.3, kind(documents("b", 41, 60))),
        Source("c", 0.2, kind(documents("c", 3, 150))),  # fewer rows than lanes
    ]


def one(kind=Texts):
    return [Source("a", 1.0, kind(documents("a", 90, 20)))]


def loader(sources, rank=0, world=1, batch=4, encoder=None, seed=0, workers=0, prefetch=2, skip=(), **options):
    data = {"lanes": 8, "window": 16, "skip": ",".join(f"{first}-{last}" for first, last in skip)}
    data |= {name: options.pop(name) for name in ("lanes", "window", "epochs") if name in options}
    threads = DataLoader(num_workers=workers, prefetch_factor=prefetch)
    training = Training(**{"local_batch_size": batch, "seq_len": 24, "dataloader": threads, **options})
    return Loader(sources, encoder or Bytes(), training, Data(**data), seed=seed, dp_rank=rank, dp_degree=world)


def take(iterator, count):
    """So many batches as lists: inputs, labels and whatever else is in them."""
    return [
        {**{k: v.tolist() for k, v in fed.items()}, "labels": labels.tolist()}
        for fed, labels in (next(iterator) for _ in range(count))
    ]


def build(dataset, column=None, **training):
    """The opened sources of a job."""
    job = JobConfig()
    job.training.dataset = str(dataset)
    job.data.column = column
    for key, value in training.items():
        setattr(job.training, key, value)
    return build_sources(job.training, job.data)
