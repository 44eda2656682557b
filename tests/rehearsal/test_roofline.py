"""The arithmetic of scripts/rehearsal: FLOPs, bytes, least times and the parts of a step. Needs no GPU and no stub."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.rehearsal import count, roofline


class Seen(TorchDispatchMode):
    """The bytes of each operator that runs inside."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        self.bytes[name] = self.bytes.get(name, 0) + count.traffic(func, given, result)
        return result


def bytes_of(run) -> dict[str, int]:
    with Seen() as seen:
        run()
    return {name: moved for name, moved in seen.bytes.items() if moved}


A, B = torch.ones(8, 16), torch.ones(8, 16)
SIZE = 8 * 16 * 4


@pytest.mark.parametrize(
    "run, expected",
    [
        (lambda: A + B, {"add": 3 * SIZE}),
        (lambda: A.clone().mul_(B), {"clone": 2 * SIZE, "mul_": 3 * SIZE}),
        (lambda: A.t().view(4, 4, 8).unsqueeze(0), {}),  # views
        (lambda: torch.empty_like(A), {}),
        (lambda: torch.zeros_like(A), {"zeros_like": SIZE}),
        (lambda: torch.empty(8, 16).fill_(1), {"fill_": SIZE}),
        (lambda: torch.empty(8, 16).copy_(B), {"copy_": 2 * SIZE}),
        (lambda: A.bfloat16(), {"_to_copy": SIZE + SIZE // 2}),
        (lambda: A + B[:1].expand(8, 16), {"add": 2 * SIZE + SIZE // 8}),  # what is expanded is read once
        (lambda: torch.add(A, B, out=torch.empty(8, 16)), {"add": 3 * SIZE}),
        (lambda: torch._foreach_add([A, B], [B, A]), {"_foreach_add": 6 * SIZE}),
        (lambda: torch.embedding(A, torch.tensor([1, 1, 3])), {"embedding": 2 * 3 * 16 * 4 + 3 * 8}),
    ],
)
def test_an_operator_moves_what_it_reads_and_what_it_writes(run, expected):
    assert bytes_of(run) == expected


def test_adamw_reads_four_tensors_and_writes_three():
    weight = torch.nn.Parameter(A.clone())
    weight.grad = B.clone()
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    assert bytes_of(optimizer.step)["_fused_adamw_"] == pytest.approx(7 * SIZE, abs=16)  # and the count of steps


@pytest.mark.parametrize(
    "first, result, expected",
    [
        ((8, 16), (8, 32), 2 * 8 * 16 * 32),
        ((3, 8, 16), (3, 8, 32), 3 * 2 * 8 * 16 * 32),
        ((8, 16), (4, 8, 32), 2 * 8 * 16 * 32),  # groups that divide the 16 among them
    ],
)
def test_a_product_costs_two_flops_per_factor(first, result, expected):
    assert roofline.product_flops(first, result) == expected


def test_attention_costs_what_a_query_sees():
    whole = roofline.attention_flops(heads=4, width=64, documents=[(128, 128)], causal=False)
    assert whole == 4 * 4 * 64 * 128 * 128
    assert roofline.attention_flops(4, 64, [(128, 128)], causal=True) == whole / 2
    assert roofline.attention_flops(4, 64, [(64, 64)] * 2, causal=True) == whole / 4
    assert roofline.attention_flops(4, 64, [(128, 128)], causal=True, window=128) == whole / 2
    assert roofline.attention_flops(4, 64, [(128, 128)], causal=True, window=32) == 4 * 4 * 64 * 128 * (32 - 4)
    assert roofline.attention_flops(4, 64, [(128, 128)], causal=False, backward=True) == 2.5 * whole


def test_a_kernel_takes_the_slower_of_computing_and_moving():
    assert roofline.least_seconds(989e12, "bfloat16", 0) == pytest.approx(1)
    assert roofline.least_seconds(989e12, "float32", 0) == pytest.approx(989 / 67)
    assert roofline.least_seconds(989e12, "bfloat16", 6.7e12) == pytest.approx(2)
    assert roofline.least_seconds(0, "", 3.35e12) == pytest.approx(1)


def row(kind, name, dtype, flops, moved):
    seconds = roofline.least_seconds(flops, dtype, moved)
    return {"kind": kind, "name": name, "dtype": dtype, "calls": 1, "flops": flops, "bytes": moved, "seconds": seconds}


ROWS = [
    row("elementwise", "add", "bfloat16", 0, 3.35e9),
    row("product", "mm", "bfloat16", 989e9, 0),
    row("product", "mm", "float32", 67e9, 0),
    row("communication", "c10d::all_gather", "", 0, 3.35e12),
]


def test_a_step_takes_the_sum_of_its_parts_without_communication():
    found = roofline.summarize(ROWS, useful_flops=1.5 * 989e9)
    assert found["ms"] == pytest.approx(3) and found["mfu"] == pytest.approx(0.5)
    assert found["parts"] == pytest.approx({"product": 2, "attention": 0, "elementwise": 1, "triton": 0})
    assert roofline.sum_by(ROWS, ["product"], "flops") == {"mm bfloat16": 989e9, "mm float32": 67e9}


def test_the_table_shows_every_millisecond():
    table = roofline.step_table("a step", roofline.summarize(ROWS, 1.5 * 989e9))
    total = list(table.columns[6].cells)[-1]
    assert total == "3.00" and sum(map(float, list(table.columns[6].cells)[:3])) == pytest.approx(3)


def test_the_parts_of_a_step_lie_between_its_marks():
    marks = ["step", "forward", "backward", "backward end", "forward", "backward", "backward end", "update"]
    marks += ["update end", "step end"]
    parts = [count.part(*pair) for pair in itertools.pairwise(marks)]
    one = ["inputs", "forward", "backward"]
    assert parts == [*one, *one, "before_update", "update", "rest"]


class Counted:
    """A stub runtime that only lets a test speak to the meter."""

    launches = products = gloo_rounds = 0

    def __init__(self):
        self.triton, self.on_triton, self.told = count.Counter(), None, None

    def listen(self, told):
        self.told = told
        return count.torch.no_grad()


@pytest.fixture
def run_meter(monkeypatch):
    """Runs all steps of a meter; each step says what `events(number)` lists. Returns the result."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)  # the meter replaces it

    def run(events):
        stub, microbatches = Counted(), []
        meter = count.Meter(stub, microbatches.append, 1)

        def step(number):
            for event in events(number, microbatches[-1]):
                if isinstance(event, str):
                    meter.mark(event)
                elif stub.told:
                    stub.told(*event)

        for number in range(1, count.LAST + 1):
            meter.step(number, lambda number=number: step(number))
        return meter.result()

    return run


def test_a_copy_and_its_wait_are_one_and_a_pinned_copy_is_none(run_meter):
    def events(_number, microbatches):
        yield from [("async H2D pageable", 8), ("stream sync", 0)]  # a tensor made from a number
        for _ in range(microbatches):
            yield from [("async H2D pinned", 10**6), "forward", "backward", "backward end"]
        yield from [("async D2H pageable", 4), ("stream sync", 0), "update", "update end"]

    waits = run_meter(events)["waits"]
    assert (waits["step"], waits["microbatch"], waits["before_update"]) == (2, 0, 1)
    assert {(wait["part"], wait["what"]) for wait in waits["places"]} == {
        ("inputs", "H2D pageable"),
        ("before_update", "D2H pageable"),
    }


def test_waits_of_a_microbatch_are_told_from_those_of_a_step(run_meter):
    def events(number, microbatches):
        for _ in range(microbatches):
            yield from [("async H2D pageable", 10**6), "forward", ("device sync", 0), "backward", "backward end"]
        yield from ["update", "update end", ("event sync", 0)]
        if number == count.LOGGED:
            yield ("stream sync", 0)

    waits = run_meter(events)["waits"]
    assert (waits["step"], waits["microbatch"], waits["logged"]) == (1, 2, 4)
