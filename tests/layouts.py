"""The layouts in which every family is compared with one rank, and the page that says how near they came.

`python -m tests.layouts [--ranks N] [--keep FOLDER]` trains all of it again, on that many ranks at most (8), and writes
the table into docs/parallelism.md. With a folder a run goes on where the last one was stopped.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flame.errors import UserError
from tests.launch import REPO, SMALL, metrics, train_each

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
_LLAMA = {
    **_SIZES,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_FLA = {**_SIZES, "num_heads": 4, "fuse_cross_entropy": True, "fuse_norm": True, "fuse_swiglu": True}
_DELTA = {**_FLA, "head_dim": 16, "expand_v": 1.0}
_FALCON = {**_SIZES, "num_attention_heads": 4, "ffn_hidden_size": 128, "parallel_attn": True, "bias": False}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "tied": {"model_type": "llama", **_LLAMA, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 32},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 16},
    "mixtral": {"model_type": "mixtral", **_LLAMA, **_EXPERTS},
    "gpt_neox": {
        "model_type": "gpt_neox",
        **_SIZES,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "falcon": {"model_type": "falcon", **_FALCON, "multi_query": True},
    "falcon_groups": {"model_type": "falcon", **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "granite": {"model_type": "granite", **_LLAMA, "logits_scaling": 8.0, "residual_multiplier": 0.5},
    "gemma2": {"model_type": "gemma2", **_LLAMA, "head_dim": 16, "tie_word_embeddings": True},
    "transformer": {"model_type": "transformer", **_FLA},
    "gla": {"model_type": "gla", **_FLA},
    "gla_hybrid": {"model_type": "gla", **_FLA, "attn": {"layers": [1], "num_heads": 4, "window_size": 32}},
    "retnet": {"model_type": "retnet", **_FLA},
    "linear_attn": {"model_type": "linear_attn", **_FLA},
    "delta_net": {"model_type": "delta_net", **_FLA},
    "gated_deltanet": {"model_type": "gated_deltanet", **_DELTA},
    "gated_deltaproduct": {"model_type": "gated_deltaproduct", **_DELTA, "num_householder": 2, "use_forget_gate": True},
    "kda": {"model_type": "kda", **_DELTA},
    "gsa": {"model_type": "gsa", **_FLA, "num_slots": 16, "elementwise_affine": False},
    "hgrn2": {"model_type": "hgrn2", **_FLA, "expand_ratio": 16},
    "rwkv7": {"model_type": "rwkv7", **_FLA, "head_dim": 16},
    "mamba2": {"model_type": "mamba2", **_SIZES, "num_heads": 4, "head_dim": 32, "state_size": 16},
}

STEPS = 5
SEQUENCES = 8  # a step, in every layout
_DP, _TP, _CP, _PP = (
    f"--parallelism.{kind}_degree="
    for kind in ("data_parallel_replicate", "tensor_parallel", "context_parallel", "pipeline_parallel")
)


def _batch(local: int, steps: int = 1) -> list[str]:
    return [f"--training.local_batch_size={local}", f"--training.gradient_accumulation_steps={steps}"]


_RESHARDED = "--parallelism.fsdp_reshard_after_forward=always"  # as by default in models that are not tiny
_COMPILED = ["--compile.enable", "--compile.backend=aot_eager"]  # its graphs are those that inductor is given
LAYOUTS: dict[str, tuple[int, list[str]]] = {  # name: (ranks, flags)
    "one": (1, _batch(8)),
    "accumulated": (1, _batch(2, 4)),
    "fsdp2": (2, _batch(4)),
    "fsdp2_accumulated": (2, [*_batch(1, 4), _RESHARDED]),
    "ddp2": (2, [*_batch(4), f"{_DP}2"]),
    "ddp2_accumulated": (2, [*_batch(2, 2), f"{_DP}2"]),
    "tp2": (2, [*_batch(8), f"{_TP}2"]),
    "tp2_compiled": (2, [*_batch(4, 2), f"{_TP}2", *_COMPILED]),
    "tp2_gathered": (2, [*_batch(8), f"{_TP}2", "--parallelism.disable_loss_parallel"]),
    "cp2": (2, [*_batch(8), f"{_CP}2"]),
    "cp2_compiled": (2, [*_batch(8), f"{_CP}2", *_COMPILED, "--activation_checkpoint.mode=full"]),
    "pp2": (2, [*_batch(8), f"{_PP}2"]),
    "pp2_accumulated": (2, [*_batch(4, 2), f"{_PP}2", "--parallelism.pipeline_parallel_schedule=GPipe"]),
    "fsdp4": (4, [*_batch(2), _RESHARDED]),
    "hsdp2x2": (4, [*_batch(2), f"{_DP}2"]),
    "fsdp2_tp2": (4, [*_batch(4), f"{_TP}2", _RESHARDED]),
    "fsdp2_cp2": (4, [*_batch(4), f"{_CP}2", _RESHARDED]),
    "fsdp2_pp2": (4, [*_batch(4), f"{_PP}2"]),
    "pp2_tp2": (4, [*_batch(8), f"{_PP}2", f"{_TP}2"]),
    "ddp2_tp2": (4, [*_batch(4), f"{_DP}2", f"{_TP}2"]),
    "tp2_cp2": (4, [*_batch(8), f"{_TP}2", f"{_CP}2"]),
    "hsdp2x2_tp2": (8, [*_batch(2), f"{_DP}2", f"{_TP}2"]),
    "fsdp2_pp2_tp2": (8, [*_batch(4), f"{_PP}2", f"{_TP}2"]),
    "fsdp2_pp2_cp2": (8, [*_batch(4), f"{_PP}2", f"{_CP}2"]),
}


def layout_error(name: str, layout: str) -> UserError | None:
    """Why flame does not train the model of MODELS in a layout; None if it does."""
    return error_of(name, LAYOUTS[layout][1])


def error_of(name: str, flags: list[str]) -> UserError | None:
    """Why flame does not train the model of MODELS with these flags; None if it does."""
    from flame.parallel.layout import validate

    try:
        validate(*_built(name), _parsed(*flags))
    except UserError as error:
        return error
    return None


@functools.cache
def _parsed(*flags: str) -> Any:
    from flame.config.parser import parse

    return parse([*SMALL, *flags])


@functools.cache
def _built(name: str) -> tuple[Any, Any, Any]:
    from flame.models.hf import build_on_meta, read_config

    family, config = read_config(MODELS[name], name)
    return family, config, build_on_meta(config, name)


# Jobs of one launch, by its ranks: each leaves threads of its process groups running, which slow down the next.
JOBS = {1: 8, 2: 6, 4: 4, 8: 2}


def run(
    root: Path, pairs: Iterable[tuple[str, str]], jobs: dict[int, int] = JOBS, *flags: str, **options: str
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(model, layout): records} of each pair and of each model on one rank; what `root` holds is not trained again.

    flags: of all of them; options: of `train_each`.
    """
    pairs = list(dict.fromkeys([*((name, "one") for name, _ in pairs), *pairs]))
    for name in {name for name, _ in pairs}:
        (root / f"{name}.json").write_text(json.dumps(MODELS[name]))
    launches = list(_launches([pair for pair in pairs if records(root, *pair) is None], jobs))
    for number, (ranks, some) in enumerate(launches, 1):
        begin = time.monotonic()
        failure = _train(root, some, flags, ranks=ranks, **options)
        for name, layout in some:
            assert records(root, name, layout), f"{name} in {layout}: {failure or 'left no records'}"
        seconds, names = time.monotonic() - begin, ", ".join(" ".join(pair) for pair in some)
        assert not failure, f"{names}: {failure}"
        print(f"launch {number}/{len(launches)}, {ranks} ranks, {seconds:.0f} s: {names}", file=sys.stderr)
    return {pair: records(root, *pair) or [] for pair in pairs}


def _launches(pairs: list[tuple[str, str]], jobs: dict[int, int]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """The ranks and the pairs of each launch."""
    for ranks, size in jobs.items():
        some = [pair for pair in pairs if LAYOUTS[pair[1]][0] == ranks]
        yield from ((ranks, some[i : i + size]) for i in range(0, len(some), size))


def _train(root: Path, pairs: list[tuple[str, str]], flags: Iterable[str], **options: Any) -> str | None:
    """Train pairs in one launch; what went wrong, which the first pair without records met."""
    flags = [*SMALL, f"--training.steps={STEPS}", "--checkpoint.no_enable", *flags]
    try:
        train_each(
            [
                [*flags, *LAYOUTS[layout][1], f"--model.config={root / name}.json", f"--job.dump_folder={folder}"]
                for name, layout in pairs
                for folder in [root / name / layout]
            ],
            **options,
        )
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


def records(root: Path, name: str, layout: str) -> list[dict[str, Any]] | None:
    """The records of a pair that was trained to its end; None if it was not."""
    folder = root / name / layout
    with suppress(FileNotFoundError):
        if json.loads((folder / "status.json").read_text())["status"] == "completed":
            return metrics(folder)
    return None


def differences(one: list[dict[str, Any]], many: list[dict[str, Any]]) -> tuple[float, float]:
    """The largest difference of the loss, and the largest relative one of the gradient norm."""
    pairs = list(zip(one, many, strict=True))
    loss = max(abs(b["loss"] - a["loss"]) for a, b in pairs)
    return loss, max(abs(b["grad_norm"] - a["grad_norm"]) / a["grad_norm"] for a, b in pairs)


def table(root: Path, layouts: list[str]) -> str:
    """Markdown: models down, layouts across, and in each cell the differences from one rank: loss, gradient norm.

    "-": not trained in `root`.
    """
    lines = [f"| | {' | '.join(layouts)} |", "|---" * (len(layouts) + 1) + "|"]
    for name in MODELS:
        one, cells = records(root, name, "one"), []
        for layout in layouts:
            found = records(root, name, layout)
            measured = "{:.0e}, {:.0e}".format(*differences(one, found)) if one and found else "-"
            cells.append("refused" if layout_error(name, layout) else measured)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m tests.layouts")
    parser.add_argument("--ranks", type=int, default=8, help="at most")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; those it holds are not trained again")
    given = parser.parse_args(argv)
    page = REPO / "docs/parallelism.md"
    before, mark, _ = page.read_text().partition("<!-- measured -->\n")
    assert mark, f"{page} has no place for the table"
    layouts = [layout for layout, (ranks, _) in LAYOUTS.items() if layout != "one" and ranks <= given.ranks]
    with tempfile.TemporaryDirectory() as temporary:
        root = given.keep or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        try:
            run(root, [(name, layout) for name in MODELS for layout in layouts if layout_error(name, layout) is None])
        finally:  # what was measured before a failure or a stop counts
            page.write_text(f"{before}{mark}\n{table(root, layouts)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
