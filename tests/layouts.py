"""The layouts in which every family is compared with one rank, and the page that says how near they came.

`python -m tests.layouts [RANKS]` trains all of it again, on that many ranks at most (8), and writes the table into
docs/parallelism.md.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


_COMPILED = ["--compile.enable", "--compile.backend=aot_eager"]  # its graphs are those that inductor is given
LAYOUTS: dict[str, tuple[int, list[str]]] = {  # name: (ranks, flags)
    "one": (1, _batch(8)),
    "accumulated": (1, _batch(2, 4)),
    "fsdp2": (2, _batch(4)),
    "fsdp2_accumulated": (2, _batch(1, 4)),
    "ddp2": (2, [*_batch(4), f"{_DP}2"]),
    "ddp2_accumulated": (2, [*_batch(2, 2), f"{_DP}2"]),
    "tp2": (2, [*_batch(8), f"{_TP}2"]),
    "tp2_compiled": (2, [*_batch(4, 2), f"{_TP}2", *_COMPILED]),
    "cp2": (2, [*_batch(8), f"{_CP}2"]),
    "cp2_compiled": (2, [*_batch(8), f"{_CP}2", *_COMPILED]),
    "pp2": (2, [*_batch(8), f"{_PP}2"]),
    "pp2_accumulated": (2, [*_batch(4, 2), f"{_PP}2", "--parallelism.pipeline_parallel_schedule=GPipe"]),
    "fsdp4": (4, _batch(2)),
    "hsdp2x2": (4, [*_batch(2), f"{_DP}2"]),
    "fsdp2_tp2": (4, [*_batch(4), f"{_TP}2"]),
    "fsdp2_cp2": (4, [*_batch(4), f"{_CP}2"]),
    "fsdp2_pp2": (4, [*_batch(4), f"{_PP}2"]),
    "pp2_tp2": (4, [*_batch(8), f"{_PP}2", f"{_TP}2"]),
    "tp2_cp2": (4, [*_batch(8), f"{_TP}2", f"{_CP}2"]),
    "hsdp2x2_tp2": (8, [*_batch(2), f"{_DP}2", f"{_TP}2"]),
    "fsdp2_pp2_tp2": (8, [*_batch(4), f"{_PP}2", f"{_TP}2"]),
    "fsdp2_pp2_cp2": (8, [*_batch(4), f"{_PP}2", f"{_CP}2"]),
}


def refusal(name: str, layout: str) -> str | None:
    """Why flame does not train the model of MODELS in a layout; None if it does."""
    return refusal_of(name, LAYOUTS[layout][1])


def refusal_of(name: str, flags: list[str]) -> str | None:
    """The same of flags."""
    from flame.errors import UserError
    from flame.parallel.layout import check

    try:
        check(*_built(name), _parsed(*flags))
    except UserError as error:
        return str(error)
    return None


@functools.cache
def _parsed(*flags: str) -> Any:
    from flame.config import parse

    return parse([*SMALL, *flags])


@functools.cache
def _built(name: str) -> tuple[Any, Any, Any]:
    from flame.models.hf import check_buildable, read_config

    family, config = read_config(MODELS[name], name)
    return family, config, check_buildable(config, name)


def run(root: Path, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(model, layout): records} of each pair and of each model on one rank, from a launch for each number of ranks."""
    pairs = list(dict.fromkeys([*((name, "one") for name, _ in pairs), *pairs]))
    for name in {name for name, _ in pairs}:
        (root / f"{name}.json").write_text(json.dumps(MODELS[name]))
    for ranks in sorted({LAYOUTS[layout][0] for _, layout in pairs}):
        train_each(
            [
                [
                    *(*SMALL, *LAYOUTS[layout][1], f"--training.steps={STEPS}", "--checkpoint.no_enable"),
                    *(f"--model.config={root / name}.json", f"--job.dump_folder={root / name / layout}"),
                ]
                for name, layout in pairs
                if LAYOUTS[layout][0] == ranks
            ],
            ranks=ranks,
        )
    return {(name, layout): metrics(root / name / layout) for name, layout in pairs}


def differences(one: list[dict[str, Any]], many: list[dict[str, Any]]) -> tuple[float, float]:
    """The largest difference of the loss, and the largest relative one of the gradient norm."""
    pairs = list(zip(one, many, strict=True))
    loss = max(abs(b["loss"] - a["loss"]) for a, b in pairs)
    return loss, max(abs(b["grad_norm"] - a["grad_norm"]) / a["grad_norm"] for a, b in pairs)


def table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Markdown: models down, layouts across, and in each cell the differences from one rank: loss, gradient norm."""
    names, layouts = (list(dict.fromkeys(pair[i] for pair in found)) for i in (0, 1))
    layouts.remove("one")
    lines = [f"| | {' | '.join(layouts)} |", "|---" * (len(layouts) + 1) + "|"]
    for name in names:
        cells = []
        for layout in layouts:
            pair = found.get((name, layout))
            cells.append("{:.0e}, {:.0e}".format(*differences(found[name, "one"], pair)) if pair else "refused")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(most: int = 8) -> None:
    page = REPO / "docs/parallelism.md"
    layouts = [layout for layout, (ranks, _) in LAYOUTS.items() if ranks <= most]
    with tempfile.TemporaryDirectory() as root:
        pairs = [(name, layout) for name in MODELS for layout in layouts if refusal(name, layout) is None]
        made = table(run(Path(root), pairs))
    before, mark, _ = page.read_text().partition("<!-- measured -->\n")
    assert mark, f"{page} has no place for the table"
    page.write_text(f"{before}{mark}\n{made}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
