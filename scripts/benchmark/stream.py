"""The data stream of a job next to its tokenizer alone on the same text, and its cost in memory and state:
bash scripts/flame.sh data bench JOB.toml [flags of the job]
"""

import itertools
import os
import pickle
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from flame.config.parser import parse
from flame.config.schema import JobConfig
from flame.data.loader import Loader, build_dataloader
from flame.data.source import Source, build_sources
from flame.data.tokenize import Tokenizer, load_tokenizer
from flame.errors import UserError

WORKERS = (0, 1, 2, 4)
BLOCK = 64  # texts in one call of the tokenizer
TEXT = 8 << 20  # characters the tokenizer is measured on
SECONDS, SLICES = 1.5, 3  # of each side, how often


class Speed(NamedTuple):
    """Tokens per second of wall time, and of the CPU time of all threads of the process."""

    wall: float
    cpu: float


class Side(NamedTuple):
    """One side of a comparison. step: does some work, returns its tokens; ahead: steps that may be done beforehand."""

    step: Callable[[], int]
    ahead: int = 0


class Pair(NamedTuple):
    """Medians over slices: the speed of either side, and the ratio of the one to the other."""

    one: Speed
    other: Speed
    ratio: Speed


def bench(config: JobConfig, seconds: float = SECONDS) -> None:
    """Print the speed for several numbers of workers, state and memory. Raises UserError as a run of the job would."""
    tokenizer = load_tokenizer(config)
    config.data.epochs, config.data.skip = 0, None  # a stream that neither ends nor skips anything
    sources = build_sources(config.training, config.data)
    if not (texts := draw_texts(sources)):
        raise UserError("bench", "sources of token ids without text", hint="there is no tokenizer to compare with")
    ceiling, tokenizer_speeds = encode_repeatedly(tokenizer, texts), []
    alone = os.environ.setdefault("TOKENIZERS_PARALLELISM", "false") == "false"  # on both sides, as workers have it
    threads = "one thread" if alone else f"{os.environ.get('RAYON_NUM_THREADS') or f'all {os.cpu_count()}'} threads"
    print(f"{'workers':>7}  {'tokens/s':>10}  {'of the tokenizer':>16}  {'per CPU second':>14}")
    for workers in WORKERS:
        config.training.dataloader.num_workers = workers
        loader = build_dataloader(sources=sources, dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)
        pair = compare(iterate(loader, loader.ahead), ceiling, seconds)
        tokenizer_speeds.append(pair.other.wall)
        print(f"{workers:>7}  {pair.one.wall:>10,.0f}  {pair.ratio.wall:>16.2f}  {pair.ratio.cpu:>14.2f}")
    size, seconds = weigh_state(loader)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    lanes = config.data.lanes
    print(f"tokenizer alone: {statistics.median(tokenizer_speeds):,.0f} tokens/s (encode_batch_fast, {threads})")
    print(f"state: {size:,} bytes for {lanes} lanes, {size / lanes:.0f} per lane; state_dict() {seconds * 1e3:.2f} ms")
    print(f"peak memory: {peak:.0f} MiB, {TEXT >> 20} MiB of text for the tokenizer alone with it")


def draw_texts(sources: Sequence[Source], characters: int = TEXT) -> list[str]:
    """Texts from all over the sources, of about so many characters in all, in the shares of the mixture, shuffled."""
    total, texts = sum(source.weight for source in sources), []
    for source in sources:
        room = characters * source.weight / total
        probe = [len(text) for text in source.sample(BLOCK) if isinstance(text, str)]
        mean = max(1.0, sum(probe) / max(1, len(probe)))
        for text in source.sample(max(BLOCK, round(room / mean))):
            if room > 0 and isinstance(text, str):
                texts.append(text)
                room -= len(text)
    random.Random(0).shuffle(texts)  # so that every slice of time has texts of the whole mixture, as the stream's do
    return texts


def encode_repeatedly(tokenizer: Tokenizer, texts: Sequence[str]) -> Side:
    """The tokenizer alone: each step encodes the next block of texts, over and over."""
    backend = tokenizer.hf.backend_tokenizer
    blocks = itertools.cycle([list(texts[i : i + BLOCK]) for i in range(0, len(texts), BLOCK)])
    return Side(lambda: sum(map(len, backend.encode_batch_fast(next(blocks), add_special_tokens=False))))


def iterate(loader: Iterable[Any], ahead: int = 0) -> Side:
    """A stream as the trainer iterates it; ahead: batches that its background threads may hold ready."""
    batches = iter(loader)
    return Side(lambda: next(batches)[0]["input"].numel(), ahead)


def compare(one: Side, other: Side, seconds: float = SECONDS, slices: int = SLICES) -> Pair:
    """Alternate two sides in this process, so that both have the same machine; seconds: of a slice.

    What is ready when a slice begins is taken before the clock starts, and background threads fill up before the other
    side's turn, so that neither has the other's work.
    """
    measured = [(_time(one, seconds), _time(other, seconds)) for _ in range(slices + 1)]
    ones, others = zip(*measured[1:], strict=True)  # at first, files are opened and caches warmed
    ratios = [Speed(a.wall / b.wall, a.cpu / b.cpu) for a, b in zip(ones, others, strict=True)]
    return Pair(*(Speed(*map(statistics.median, zip(*speeds, strict=True))) for speeds in (ones, others, ratios)))


def weigh_state(loader: Loader) -> tuple[int, float]:
    """Bytes of the pickled state, and the seconds that state_dict() takes (median of 21)."""
    times = []
    for _ in range(21):
        begin = time.perf_counter()
        state = loader.state_dict()
        times.append(time.perf_counter() - begin)
    return len(pickle.dumps(state)), statistics.median(times)


def _time(side: Side, seconds: float) -> Speed:
    for _ in range(side.ahead):
        side.step()
    wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        tokens += side.step()
    speed = Speed(tokens / (time.perf_counter() - wall), tokens / max(1e-9, time.process_time() - cpu))
    time.sleep(0.3 if side.ahead else 0)
    return speed


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for a mistake of the user, reported in one line."""
    try:
        bench(parse(["--job.config_file", *argv]))
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
