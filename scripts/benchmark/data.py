"""The data stream next to its tokenizer alone and to torchtitan's dataset, on text of this machine:
python scripts/benchmark/data.py [--seconds 120]

Writes three sources of Python source and documentation found on this machine to a temporary folder, trains a BPE of
32,000 ids on them, and measures each part in a separate process with one thread per tokenizer call. About 15 minutes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's flame
ENDINGS = {"library": (".py",), "packages": (".py",), "documents": (".pyi", ".txt", ".md", ".rst")}
SOURCE_BYTES = 32 << 20  # of each source, maximum
FILE_BYTES = 1 << 20  # larger files are tables
SHARES = (0.5, 0.3, 0.2)
VOCABULARY, SEQ_LEN, BATCH, SHUFFLED = 32_000, 2048, 8, 1024
MIXED = 60 << 20  # characters for the tokenizer alone: all of the first source, the others by their shares
WARM = 400  # batches before timing starts: at first, every lane tokenizes a block of each source
PACKAGES = ("torch", "torchtitan", "datasets", "tokenizers", "fastokens", "transformers", "numpy")


# -- the text ----------------------------------------------------------------------------------------------------------


def find(name: str) -> list[Path]:
    """The files of a source: Python's own library, or a sample spread over site-packages."""
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    root = library if name == "library" else packages
    files = [path for path in sorted(root.rglob("*")) if path.suffix in ENDINGS[name] and path.is_file()]
    if name == "library":
        files = [path for path in files if not {"site-packages", "dist-packages"} & set(path.parts)]
    files = [path for path in files if 0 < path.stat().st_size < FILE_BYTES]
    step = max(1.0, sum(path.stat().st_size for path in files) / SOURCE_BYTES)
    return [files[int(i * step)] for i in range(int(len(files) / step))]


def write_corpus(folder: Path) -> None:
    """Write three JSONL files, one row per file read, and a tokenizer trained on all of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    for name in ENDINGS:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in find(name)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts if text]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name:>10}: {len(lines):,} documents, {sum(map(len, texts)) / 1e6:.1f} M characters", flush=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(read_texts(folder), trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    hf.save_pretrained(str(folder / "tokenizer"))


def read_texts(folder: Path) -> Iterator[str]:
    for name in ENDINGS:
        with open(folder / f"{name}.jsonl") as file:
            for line in file:
                yield json.loads(line)["text"]


# -- the parts, each in a separate process -----------------------------------------------------------------------------


def describe_job(folder: Path, workers: int = 0) -> Any:
    """The config of the job whose data stream is measured: three sources, mixed and shuffled."""
    from flame.config.parser import parse

    return parse(
        [
            f"--training.dataset={','.join(str(folder / f'{name}.jsonl') for name in ENDINGS)}",
            f"--training.data_probs={','.join(map(str, SHARES))}",
            f"--model.tokenizer_path={folder / 'tokenizer'}",
            f"--training.seq_len={SEQ_LEN}",
            f"--training.local_batch_size={BATCH}",
            f"--training.dataloader.num_workers={workers}",
            f"--data.window={SHUFFLED}",
        ]
    )


def load(folder: Path, workers: int = 0) -> Any:
    """flame's loader, as the trainer builds it."""
    from flame.data.loader import build_dataloader
    from flame.data.source import build_sources
    from flame.data.tokenize import build_tokenizer

    config = describe_job(folder, workers)
    tokenizer = build_tokenizer(config.model.tokenizer_path)
    sources = build_sources(config.training, config.data)
    return build_dataloader(sources=sources, dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)


def load_ceiling(folder: Path) -> Any:
    """The tokenizer alone on the same text, as a side of a comparison."""
    import stream as bench

    from flame.data.source import build_sources
    from flame.data.tokenize import build_tokenizer

    config = describe_job(folder)
    texts = bench.draw_texts(build_sources(config.training, config.data), MIXED)
    return bench.encode_repeatedly(build_tokenizer(config.model.tokenizer_path), texts)


def warm(side: Any) -> Any:
    for _ in range(WARM):
        side.step()
    return side


def measure_flame(folder: Path, seconds: float) -> dict[str, float]:
    """The stream against the tokenizer alone, alternating; its state, and how often it is made while iterating."""
    import stream as bench

    loader, made = load(folder), []
    make = loader.state_dict
    loader.state_dict = lambda: made.append(1) or make()
    pair = bench.compare(warm(bench.iterate(loader)), load_ceiling(folder), 2, max(3, int(seconds / 6)))
    while_iterating = len(made)
    size, took = bench.weigh_state(loader)
    state = {"state_bytes": size, "state_bytes_per_lane": size / 64, "state_ms": took * 1e3}
    return {**as_numbers(pair), **state, "states_while_iterating": while_iterating}


def measure_flame_with_tokenizers(folder: Path, seconds: float) -> dict[str, float]:
    """The same for a tokenizer that fastokens does not support: `tokenizers` encodes on both sides."""
    hide_fastokens()
    return measure_flame(folder, seconds)


def hide_fastokens() -> None:
    sys.modules["fastokens"] = None  # type: ignore[assignment]  # as if it were not installed


def measure_workers(folder: Path, seconds: float) -> dict[str, float]:
    """Two workers against the stream on one thread, and against one worker beside the reader; in wall time.

    Without fastokens: with it, one thread is so fast that a second adds nothing.
    """
    hide_fastokens()
    import stream as bench

    loaders = [load(folder, workers) for workers in (2, 0, 1)]
    two, none, one = (warm(bench.iterate(loader, loader.ahead)) for loader in loaders)
    slices = max(3, int(seconds / 12))
    against_one = as_numbers(bench.compare(two, one, 2, slices))
    return {
        **as_numbers(bench.compare(two, none, 2, slices)),
        **{f"{name}_one_worker": value for name, value in against_one.items()},
    }


def measure_titan(folder: Path, seconds: float) -> dict[str, float]:
    """torchtitan's HuggingFaceTextDataset in its loader, mixed and shuffled by `datasets`, against the tokenizer."""
    import stream as bench
    from datasets import interleave_datasets, load_dataset
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    def mix(path: str) -> Any:
        parts = [
            load_dataset("json", data_files=f"{path}/{name}.jsonl", split="train", streaming=True) for name in ENDINGS
        ]
        mixed = interleave_datasets(parts, probabilities=SHARES, seed=0, stopping_strategy="all_exhausted")
        return mixed.shuffle(seed=0, buffer_size=SHUFFLED)

    text_datasets.DATASETS["bench"] = DatasetConfig(str(folder), mix, lambda row: row["text"])
    tokenizer = HuggingFaceTokenizer(str(folder / "tokenizer"))
    dataset = text_datasets.HuggingFaceTextDataset("bench", None, tokenizer, seq_len=SEQ_LEN, infinite=True)
    loader = ParallelAwareDataloader(dataset, dp_rank=0, dp_world_size=1, batch_size=BATCH)
    pair = bench.compare(warm(bench.iterate(loader)), load_ceiling(folder), 2, max(3, int(seconds / 6)))
    size, took = bench.weigh_state(loader)
    return {**as_numbers(pair), "state_bytes": size, "state_ms": took * 1e3}


def measure_memory(folder: Path, seconds: float, workers: int = 0) -> dict[str, float]:
    """Resident memory of a process that streams for `seconds`, then with the trainer imported.

    The median of each quarter of forty readings: with threads, single readings vary by 50 MiB up and down.
    """
    batches, begin, seen = iter(load(folder, workers)), time.monotonic(), []
    while len(seen) < 40:
        next(batches)
        if time.monotonic() - begin > seconds * (len(seen) + 1) / 40:
            seen.append(resident())
    import_trainer()
    quarters = {
        f"{name}_quarter_{i + 1}": statistics.median(reading[name] for reading in seen[10 * i : 10 * i + 10])
        for i in range(4)
        for name in seen[0]
    }
    return {**quarters, **{f"{name}_with_trainer": value for name, value in resident().items()}}


def measure_memory_with_workers(folder: Path, seconds: float) -> dict[str, float]:
    return measure_memory(folder, seconds, workers=2)


def measure_ceiling(folder: Path, _seconds: float) -> dict[str, float]:
    """Resident memory of a process that holds the text and encodes it; with torch imported; with the trainer imported.

    The trainer is torchtitan's, with transformers: every process that trains imports them.
    """
    from tokenizers import Tokenizer

    backend, texts = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json")), list(read_texts(folder))
    for i in range(0, len(texts), 64):
        backend.encode_batch_fast(texts[i : i + 64])
    alone = resident()
    import torch  # noqa: F401

    with_torch = {f"{name}_with_torch": value for name, value in resident().items()}
    import_trainer()
    return {**alone, **with_torch, **{f"{name}_with_trainer": value for name, value in resident().items()}}


def import_trainer() -> None:
    import torchtitan.train  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401


def as_numbers(pair: Any) -> dict[str, float]:
    return {
        "tokens_per_second": pair.one.wall,
        "other_tokens_per_second": pair.other.wall,
        "ratio": pair.ratio.wall,
        "ratio_cpu": pair.ratio.cpu,
    }


def resident() -> dict[str, float]:
    """Resident memory of this process now, in MiB (Linux): all of it, and without file-backed pages."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {"mib": int(lines["VmRSS"].split()[0]) / 1024, "mib_own": int(lines["RssAnon"].split()[0]) / 1024}


# -- all of it ---------------------------------------------------------------------------------------------------------

PARTS = {
    "flame against the tokenizer": measure_flame,
    "flame without fastokens against the tokenizer": measure_flame_with_tokenizers,
    "flame without fastokens, two workers against one thread": measure_workers,
    "torchtitan against the tokenizer": measure_titan,
    "memory of the tokenizer's process": measure_ceiling,
    "memory of flame's process": measure_memory,
    "memory of flame's process, two workers": measure_memory_with_workers,
}


def describe_machine() -> str:
    cpu = next((line.split(":")[1].strip() for line in read_cpu() if line.startswith("model name")), "unknown CPU")
    load_now = os.getloadavg()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{cpu}, {os.cpu_count()} cores, load {load_now:.1f}; Python {platform.python_version()}, {versions}"


def read_cpu() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="per timed part")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # this process is one part: its name, the folder
    given = parser.parse_args()
    if given.part:
        name, folder = given.part
        print(json.dumps(PARTS[name](Path(folder), given.seconds)))
        return
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="flame-benchmark-") as made:
        write_corpus(Path(made))
        # One thread per call on both sides; with workers, flame sets TOKENIZERS_PARALLELISM itself.
        one_thread = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        env = {**os.environ, **one_thread, "HF_HOME": f"{made}/hf", "HF_HUB_OFFLINE": "1"}
        for name in PARTS:
            command = [sys.executable, __file__, "--seconds", str(given.seconds), "--part", name, made]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            numbers = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}, load {os.getloadavg()[0]:.1f}:", flush=True)
            print("".join(f"  {key:<24}{value:>12,.3f}\n" for key, value in numbers.items()), end="", flush=True)


if __name__ == "__main__":
    main()
