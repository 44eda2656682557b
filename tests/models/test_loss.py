"""The fused loss: on one rank, on shards of the vocabulary, and as it runs on a GPU.

Runs itself again as a script of two ranks, with "kernels" in Triton's interpreter, which must be on before fla is
imported.
"""

import json
import sys
import tempfile
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flame.dry_run.activation import LiveBytes
from flame.models.fused_loss import L2WARP, fused_loss
from flame.models.loss import linear_cross_entropy
from tests.models.kernels import run, worst

VOCAB = 320
FACTOR = 1 / 2543  # of the loss, as a number of tokens gives it; not a power of two


def make_batch(tokens=2600, hidden=48, vocab=VOCAB, dtype=torch.float32, bias=False):
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (tokens,), generator=rng)
    labels[torch.rand(tokens, generator=rng) < 0.1] = -100
    shapes = (tokens, hidden), (vocab, hidden), *([(vocab,)] if bias else [])
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes], labels


def loss_and_gradients(loss_of, parts, *args, **options):
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    hidden, weight, bias = leaves if len(leaves) == 3 else (*leaves, None)
    loss = loss_of(hidden, weight, bias, *args, **options)
    (loss * FACTOR).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def plain(hidden, weight, bias, labels, l2warp):
    logits = F.linear(hidden, weight, bias)
    loss, penalty = F.cross_entropy(logits, labels, reduction="sum"), logits.max(-1).values.square().sum()
    return loss + l2warp * L2WARP / 2 * (penalty - penalty.detach())


OPTIONS = pytest.mark.parametrize(("bias", "l2warp"), [(False, False), (True, False), (False, True)])


@OPTIONS
def test_loss_and_gradients_are_those_of_plain_cross_entropy(bias, l2warp):
    parts, labels = make_batch(bias=bias)  # three chunks
    found = loss_and_gradients(fused_loss, parts, labels, l2warp)
    exact = loss_and_gradients(plain, [part.double() for part in parts], labels, l2warp)
    in_fp32 = loss_and_gradients(plain, parts, labels, l2warp)
    assert worst(found, exact) < 2 * worst(in_fp32, exact) < 1e-5  # nothing is lost but the order of the sums


@OPTIONS
def test_gradients_of_bf16_are_sums_in_fp32_that_are_rounded_once(bias, l2warp):
    parts, labels = make_batch(dtype=torch.bfloat16, bias=bias)
    _, *found = loss_and_gradients(fused_loss, parts, labels, l2warp)

    # The same bf16 gradients of the logits, then products and sums of their values in float64.
    x, weight, *_ = (part.double() for part in parts)
    logits = F.linear(parts[0], parts[1], parts[2] if bias else None)
    gradient = logits.double().softmax(-1) - F.one_hot(labels.clamp(0), VOCAB)
    gradient = gradient.where(labels[:, None] >= 0, 0).bfloat16().double()
    if l2warp:
        largest = logits.max(-1, keepdim=True)
        gradient.scatter_add_(-1, largest.indices, (L2WARP * largest.values).double())
    sums = [gradient @ weight, gradient.T @ x, *([gradient.sum(0)] if bias else [])]
    for ours, exact in zip(found, sums, strict=True):
        exact = (exact * FACTOR).bfloat16()
        assert (ours != exact).double().mean() < 1e-3  # where the order of a sum in fp32 decides how it is rounded
        assert worst([ours], [exact]) < 2**-8  # and then by one place


def test_no_gradient_is_computed_without_being_asked_for():
    parts, labels = make_batch()
    with Products() as products, torch.no_grad():
        loss = fused_loss(*parts, None, labels)
    assert products.found == 3 * [("mm", torch.float32, torch.float32)] and not loss.requires_grad


def test_logits_are_held_of_one_chunk_at_a_time():
    def peak(tokens):
        parts, labels = make_batch(tokens=tokens)
        with LiveBytes() as live:
            loss_and_gradients(fused_loss, parts, labels)
        return live.lap()[0]

    one, three = peak(1024), peak(3072)
    assert three - one < 1024 * VOCAB * 4


class Products(TorchDispatchMode):
    """Matrix products: (operator, type of the operands, type of the result); `count`, of all operators."""

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += 1
        if (name := function._schema.name.removeprefix("aten::")) in ("mm", "addmm", "addmm_"):
            *_, a, b = (x for x in args if torch.is_tensor(x))
            assert a.dtype == b.dtype
            self.found.append((name, a.dtype, result.dtype))
        return result


@contextmanager
def pretending_to_be_a_gpu():
    """CPU tensors report a GPU as their device, and its GEMM from bf16 to fp32 is available."""

    def addmm(total, a, b, out_dtype, out):
        return torch.addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)

    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("aten", "IMPL") as aten:
        patch.setattr(torch.Tensor, "is_cuda", True)
        aten.impl("addmm.dtype_out", addmm, "CPU")
        yield


@pytest.mark.parametrize("l2warp", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_multiplies_in_the_type_of_the_weights_and_sums_in_fp32(dtype, l2warp, monkeypatch):
    from fla.modules.fused_cross_entropy import ops

    monkeypatch.setattr(ops, "cross_entropy_fwd", lambda logits, *_, **__: 3 * (logits.float().sum(-1),))
    monkeypatch.setattr(ops, "cross_entropy_bwd", lambda *_, **__: None)
    parts, labels = make_batch(tokens=16384, dtype=dtype)
    hidden, weight = (part.requires_grad_() for part in parts)
    with pretending_to_be_a_gpu(), Products() as products:
        linear_cross_entropy(hidden[None], weight, labels[None], l2warp=l2warp).backward()
    chunk = [("mm", dtype, dtype), *(1 + l2warp) * 2 * [("addmm", dtype, torch.float32)]]
    assert products.found == 2 * chunk  # of 8,192 tokens
    assert products.count < 80


def test_a_shard_of_the_vocabulary_has_the_loss_and_gradients_of_the_whole():
    errors = run(__file__)
    assert errors.pop("bf16") < 2**-8  # half of what separates two numbers near the largest
    assert len(errors) == 3
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.slow
def test_with_the_kernels_of_fla_loss_and_gradients_are_the_same(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the imports above import Triton
    errors = run(__file__, "kernels")
    errors.pop("bf16")
    assert len(errors) == 15
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def _compare(rank, folder, kernels):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    errors = {}
    for name in ("plain", "bias", "l2warp", "bf16"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        parts, labels = make_batch(tokens=40, hidden=16, vocab=64, dtype=dtype, bias=name == "bias")
        parts[1][3] = parts[1][40] = 4 * parts[1][3]  # largest logits that both shards have
        shards, warp = [parts[0], *(part.chunk(2)[rank] for part in parts[1:])], name == "l2warp"
        whole = loss_and_gradients(fused_loss, parts, labels, warp)
        expected = [*whole[:2], *(gradient.chunk(2)[rank] for gradient in whole[2:])]
        errors[name] = worst(loss_and_gradients(fused_loss, shards, labels, warp, dist.group.WORLD), expected)
        for ranks, inputs, group, wanted in ((1, parts, None, whole), (2, shards, dist.group.WORLD, expected)):
            for kind, loss_of in _losses_of_kernels(labels, warp, group).items() if kernels and name != "bf16" else ():
                errors[f"{name}, {kind}, {ranks} ranks"] = worst(loss_and_gradients(loss_of, inputs), wanted)
    tables = [{}, {}]
    dist.all_gather_object(tables, errors)
    if rank == 0:
        print(json.dumps({name: max(table[name] for table in tables) for name in errors}))
    dist.barrier()
    dist.destroy_process_group()


def _gather_stacked(output_tensor, input_tensor, group):  # which gloo does not
    dist.all_gather(list(output_tensor), input_tensor, group=group)


def _losses_of_kernels(labels, warp, group):
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    def ours(*parts):
        with pretending_to_be_a_gpu():
            return fused_loss(*parts, labels, warp, group)

    factor = L2WARP * len(labels)  # fla divides by the tokens, whatever the reduction
    options = {"reduction": "sum", "use_l2warp": warp, "l2_penalty_factor": factor, "process_group": group}
    return {
        "ours": ours,
        "fla's": lambda x, weight, bias: fused_linear_cross_entropy_loss(x, labels, weight, bias, **options),
    }


if __name__ == "__main__":
    if sys.argv[1:]:
        from tests.models import interpreter

        interpreter.install()
        dist.all_gather_into_tensor = _gather_stacked
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, bool(sys.argv[1:]))
        torch.multiprocessing.start_processes(_compare, arguments, nprocs=2, start_method="fork")
