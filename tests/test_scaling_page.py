"""docs/scaling.md: its formulas by hand, and its tables by the script that writes them."""

import importlib.util
from pathlib import Path

import pytest

from flame.runtime import device

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling_page", ROOT / "scripts/scaling_page.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "choose", lambda: "cpu")  # this process has chosen
        spec.loader.exec_module(module)
    return module


def test_tensor_parallelism_moves_seven_eighths_of_the_hidden_states_eight_times_per_block(scaling):
    moved = 32 * 8 * (8192 * 4096 * 2) * 7 / 8
    assert scaling.tensor_seconds(8, 32, 8192, 4096, False) == pytest.approx(moved / 450e9)
    assert scaling.tensor_seconds(8, 32, 8192, 4096, True) == pytest.approx(1.5 * moved / 450e9)
    assert scaling.tensor_seconds(1, 32, 8192, 4096, False) == 0


def test_fsdp_moves_eight_bytes_per_parameter_and_a_hop_per_rank(scaling):
    within = scaling.fsdp_seconds(8e9, 10, shards=8, replicas=1, per_node=8, gathers=2)
    assert within == pytest.approx(7 / 8 * 64e9 / 450e9 + 3 * 10 * 7 * 3e-6)
    between = scaling.fsdp_seconds(8e9, 10, shards=64, replicas=1, per_node=8, gathers=2)
    assert between == pytest.approx(63 / 64 * 64e9 / 400e9 + 3 * 10 * 63 * 3e-6)
    replicated = scaling.fsdp_seconds(8e9, 10, shards=8, replicas=16, per_node=8, gathers=2)
    assert replicated - within == pytest.approx(2 * 15 / 16 * 4e9 / 50e9 + 10 * 2 * 4 * 3e-6)
    assert scaling.fsdp_seconds(8e9, 10, shards=1, replicas=1, per_node=1, gathers=1) == 0


def test_the_page_has_what_the_script_computes(scaling):
    step = scaling.step("1B", scaling.LAYOUTS[0], 8, 1, "none")
    assert scaling._row("1B", 8, step) in (ROOT / "docs/scaling.md").read_text()
    assert step.compute == pytest.approx(1e3 * 1.2358e9 * 6.65 * 4096 / (0.5 * 989e12), rel=0.05)
