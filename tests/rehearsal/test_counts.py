"""Today's counts of a step on a GPU, as upper bounds: two blocks in bfloat16, 16,384 tokens a GPU.

Needs the environment of scripts/rehearsal/setup.sh, which FLAME_REHEARSAL names. A change that lowers a count lowers
its bound here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.layouts import MODELS

ROOT = Path(__file__).parents[2]
LLAMA, GLA = "scripts/rehearsal/tinyllama_1.1B.json", "configs/gla_340M.json"
DELTA, TRANSFORMER = "configs/gated_deltanet_340M.json", "configs/transformer_340M.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FLAME_REHEARSAL" not in os.environ, reason="FLAME_REHEARSAL names no rehearsal environment"),
]


def rehearse(config: str | Path, world: int, *flags: str) -> dict[str, Any]:
    command = [sys.executable, ROOT / "scripts/rehearsal/rehearse.py", ROOT / config, f"--world={world}", "--depth=2"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["runs"]["flame"]


def float32_products(run: dict[str, Any]) -> float:
    """TFLOP of matrix products in float32 or TF32."""
    rows = run["roofline"]["rows"]
    return sum(row["flops"] for row in rows if row["kind"] == "product" and row["dtype"] in ("float32", "tf32")) / 1e12


# Waits of a step, of them before the update, and of a microbatch; gloo rounds of a step and of a microbatch; TFLOP of
# float32 products; launches; the least time of the step in ms.
BOUNDS = {
    (LLAMA, 1): (1, 0, 0, 0, 0, 0.0, 224, 24.4),
    (LLAMA, 8): (1, 0, 0, 0, 0, 0.0, 218, 20.7),
    (GLA, 8): (1, 0, 0, 0, 0, 0.0, 266, 9.95),
    ("configs/mamba2_340M.json", 1): (1, 0, 0, 0, 0, 0.0, 307, 12.9),
}


@pytest.mark.parametrize("config, world", BOUNDS)
def test_a_step_has_no_more_waits_launches_and_float32_than_today(config, world):
    run = rehearse(config, world)
    waits, gloo = run["waits"], run["gloo_rounds"]
    found = (waits["step"], waits["before_update"], waits["microbatch"], gloo["step"], gloo["microbatch"])
    found += (float32_products(run), run["launches"]["all"], run["roofline"]["ms"])
    assert all(count <= bound for count, bound in zip(found, BOUNDS[config, world], strict=True)), (found, waits)
    assert {kernel["q"].split()[0] for kernel in run["sdpa"]} <= {"bfloat16"}


@pytest.mark.parametrize("config, kernels", [(LLAMA, 2), (TRANSFORMER, 2), (GLA, 0), (DELTA, 0)])
def test_packed_documents_need_neither_waits_nor_masks(config, kernels):
    run = rehearse(config, 8, "--training.varlen")
    waits = run["waits"]
    assert (waits["step"], waits["before_update"], waits["microbatch"]) == (1, 0, 0), waits
    found = [(kernel["kernel"], kernel["q"].split()[0], kernel["mask"], kernel["calls"]) for kernel in run["sdpa"]]
    assert found == ([("torch_attn::_varlen_attn", "bfloat16", "", kernels)] if kernels else [])


def test_all_products_but_those_of_the_head_are_in_float8():
    run = rehearse(LLAMA, 8, "--model.converters=quantize.linear.float8")
    waits = run["waits"]
    assert (waits["step"], waits["before_update"], waits["microbatch"]) == (1, 0, 0), waits
    products = [row for row in run["roofline"]["rows"] if row["kind"] == "product"]
    float8 = {row["dtype"]: row["calls"] for row in products if row["name"] == "_scaled_mm"}
    assert float8 == {"float8_e4m3fn": 14, "float8_e5m2": 28}  # two blocks of 7 layers, and two gradients of each
    # 6 FLOPs for each of 16,384 tokens and each of the head's 32,000 x 2,048 weights
    assert sum(row["flops"] for row in products if row["name"] != "_scaled_mm") == 6 * 16384 * 32000 * 2048


def test_a_pipeline_stage_computes_in_bfloat16():
    run = rehearse(LLAMA, 2, "--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2")
    assert {kernel[name].split()[0] for kernel in run["sdpa"] for name in "qkv"} == {"bfloat16"}
    assert float32_products(run) == 0


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("name", ["transformer", "retnet", "rwkv7", "kda", "mamba2"])
def test_models_train_with_offloaded_parameters(name, world, tmp_path):
    config = tmp_path / "model.json"
    config.write_text(json.dumps(MODELS[name]))
    rehearse(config, world, "--training.enable_cpu_offload", "--training.seq_len=128", "--training.local_batch_size=2")


DRY_RUN = """
import ctypes, sys
from flame.dry_run.__main__ import main
assert not main(sys.argv[1:])
print(ctypes.c_long.in_dll(ctypes.CDLL(None), "rehearsal_launches").value)
"""


@pytest.mark.parametrize("config, tensor", [(LLAMA, 2), (GLA, 1), ("configs/mamba2_340M.json", 1)])
def test_a_dry_run_launches_nothing(config, tensor):
    where = os.environ["FLAME_REHEARSAL"]
    stub = {"LD_PRELOAD": f"{where}/libcudart_stub.so", "LD_LIBRARY_PATH": where, "PYTHONPATH": str(ROOT), "NGPU": "2"}
    flags = [f"--model.config={ROOT / config}", f"--parallelism.tensor_parallel_degree={tensor}"]
    command = [f"{where}/venv/bin/python", "-c", DRY_RUN, *flags]
    done = subprocess.run(command, env=os.environ | stub, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "time on 2 NVIDIA H100" in done.stdout and done.stdout.splitlines()[-1] == "0"
