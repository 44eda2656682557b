"""Packed documents on a GPU: PyTorch's attention, in whose place plain PyTorch is called here, and what fla asks."""

import importlib.util
import inspect
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen as kernel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from flame.models import reference, varlen
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.hf import choose_attention
from flame.models.reference import attention
from flame.runtime.device import source, upload
from tests.models.kernels import gradients, worst
from tests.models.small import OTHERS, distinct, small

BY_POSITIONS = [name for name in (*distinct(), *OTHERS) if small(name)[0].packing == "positions"]
CUTS = [0, 20, 64, 70, 128]  # documents begin within both rows of 64, and the rows' own ends part two


def softmax_in_documents(q, k, v, cu_seqlens, scale, window):
    """(tokens, heads, D), one document after another, one query after another."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    token = torch.arange(len(q))
    document = torch.bucketize(token, cu_seqlens[1:], right=True)
    distance = token[:, None] - token
    left, right = (len(q) if side < 0 else side for side in window)
    seen = (document[:, None] == document) & (distance <= left) & (distance >= -right)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of the kernel, whose place plain PyTorch takes."""
    signature, found = inspect.signature(kernel.varlen_attn), []

    def varlen_attn(*args, **options):
        given = signature.bind(*args, **options).arguments
        q, k, v, cu_q, cu_k = (given[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k"))
        assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        assert q.ndim == k.ndim == v.ndim == 3 and {x.stride(-1) for x in (q, k, v)} == {1}
        assert min(given["max_q"], given["max_k"]) >= cu_q.diff().max()
        assert given["enable_gqa"] or q.shape[1] == k.shape[1]
        found.append(given)
        return softmax_in_documents(q, k, v, cu_q, given["scale"], given["window_size"])

    monkeypatch.setattr(kernel, "varlen_attn", varlen_attn)
    return found


def build(name, **changes):
    model = CausalLM(ModelArgs().bind(*small(name, initializer_range=0.2, **changes)))
    model.init_weights()
    return model


def backward(model, *batches):
    """The sum of the batches' losses, and its gradients."""
    model.zero_grad()
    losses = [model(tokens, labels=labels, **packing) for tokens, labels, packing in batches]
    torch.stack(losses).sum().backward()
    return sum(loss.detach() for loss in losses), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def batch():
    tokens, labels = torch.randint(0, 320, (2, 2, 64), generator=torch.Generator().manual_seed(0)).unbind()
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(CUTS)]).view(2, 64)
    return tokens, labels, {"positions": positions, "cu_seqlens": torch.tensor(CUTS, dtype=torch.int32)}


def norm(found):
    return torch.stack([gradient.norm() for gradient in found]).norm()


FULL, WINDOW = (-1, 0), (8, 0)
SLIDES = {"sliding_window": 9, "use_sliding_window": True}
ALTERNATES = {**SLIDES, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = {kind: (SLIDES, {WINDOW}) for kind in ("mistral", "mixtral", "qwen3_moe")}
WINDOWED |= {kind: (ALTERNATES, {FULL, WINDOW}) for kind in ("qwen2", "qwen2_moe", "qwen3")}
KINDS = {name: small(name)[1].model_type for name in BY_POSITIONS}
CASES = [(name, {"sliding_window": None}, {FULL}) for name in BY_POSITIONS]
CASES += [(name, *WINDOWED[kind]) for name, kind in KINDS.items() if kind in WINDOWED]


@pytest.mark.parametrize("name, changes, windows", CASES)
def test_each_document_has_the_loss_and_the_gradients_that_it_has_alone(name, changes, windows, calls):
    model = build(name, output_router_logits=False, **changes)  # the routers' balance is that of all tokens of a batch
    tokens, labels, packing = batch()
    alone = [(tokens.view(1, -1)[:, a:b], labels.view(1, -1)[:, a:b], {}) for a, b in itertools.pairwise(CUTS)]
    expected = backward(model, *alone)
    assert not calls

    model.hf.config._attn_implementation = varlen.register()
    for given in (packing, {"positions": packing["positions"]}):  # a pipeline's stage is not given the boundaries
        found = backward(model, (tokens, labels, given))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # other orders of the same fp32 sums
        torch.testing.assert_close(norm(found[1]), norm(expected[1]), rtol=1e-5, atol=0)
    for i, block in list(model.layers.items()):
        model.layers.register_module(i, checkpoint_wrapper(block))
    torch.testing.assert_close(backward(model, (tokens, labels, packing)), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2 * 2 + 4 and {given["window_size"] for given in calls} == windows


def test_rows_without_boundaries_are_documents(calls):
    model = build("llama2_7B")
    tokens, labels, _ = batch()
    expected = backward(model, (tokens, labels, {}))
    model.hf.config._attn_implementation = varlen.register()
    torch.testing.assert_close(backward(model, (tokens, labels, {})), expected, rtol=1e-4, atol=1e-4)
    assert calls and {(given["cu_seq_q"].tolist() == [0, 64, 128], given["max_q"]) for given in calls} == {(True, 64)}


def test_a_ranks_heads_give_the_ranks_part(calls):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 64, 8) for heads in (4, 2, 2))
    options = {"scaling": 0.3, "cu_seq_lens_q": torch.tensor(CUTS, dtype=torch.int32), "max_length_q": 64}
    whole, _ = varlen.attend(None, q, k, v, None, **options)
    for rank in range(2):
        part, _ = varlen.attend(None, *(x.chunk(2, 1)[rank] for x in (q, k, v)), None, **options)
        torch.testing.assert_close(part, whole.chunk(2, 2)[rank])


@pytest.mark.parametrize("causal, window", [(True, (-1, -1)), (True, (3, 0)), (False, (-1, -1)), (False, (2, 1))])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flas_attention_calls_it_where_the_device_has_it(causal, window, kv_heads, calls, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, kv_heads, kv_heads))
    cu_seqlens = torch.tensor([0, 5, 6, 12], dtype=torch.int32)

    def attend():
        bounds = (cu_seqlens, cu_seqlens, 4096, 4096)
        return attention.flash_attn_varlen_func(q, k, v, *bounds, causal=causal, window_size=window)

    expected = attend()
    assert not calls
    monkeypatch.setattr(varlen, "serves", lambda _: True)
    found = attend()
    assert calls and calls[0]["max_q"] == 8  # the longest document has 6 tokens
    assert worst([found], [expected]) < 1e-14
    assert worst(gradients([found], [q, k, v]), gradients([expected], [q, k, v])) < 1e-14


def test_the_longest_document_is_bounded_by_a_power_of_two_and_by_the_row():
    boundaries = torch.tensor([0, 20, 64, 128], dtype=torch.int32)
    assert varlen.longest(boundaries, 4096) == 64 and varlen.longest(boundaries, 48) == 48
    assert varlen.longest(torch.tensor([0, 65, 66], dtype=torch.int32), 4096) == 128
    assert varlen.longest(torch.tensor([0, 1], dtype=torch.int32), 4096) == 1
    assert varlen.longest(boundaries.to("meta"), 4096) == 4096  # not known on the host


@pytest.fixture
def gpu(monkeypatch):
    """An H100, as far as the choice asks, without flash-attn."""
    monkeypatch.setattr("flame.models.hf.device_type", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    varlen.is_available.cache_clear()
    yield monkeypatch
    varlen.is_available.cache_clear()


@pytest.mark.parametrize("name, dtype, packed, changes, chosen", [
    ("llama2_7B", "bfloat16", True, {}, "varlen"),
    ("llama2_7B", "bfloat16", False, {}, None),
    ("llama2_7B", "float32", True, {}, None),
    ("llama2_7B", "bfloat16", True, {"head_dim": 20}, None),
    ("llama2_7B", "bfloat16", True, {"head_dim": 256}, "varlen"),
    ("llama2_7B", "bfloat16", True, {"head_dim": 208}, None),
    ("llama2_7B", "bfloat16", True, {"head_dim": 264}, None),
    ("llama2_7B", "bfloat16", True, {"attention_dropout": 0.1}, None),
    ("falcon_40B", "bfloat16", True, {}, None),
    ("transformer_340M", "bfloat16", True, {}, None),
])  # fmt: skip
def test_it_is_chosen_for_packed_documents_whose_attention_it_has(name, dtype, packed, changes, chosen, gpu):
    family, config = small(name, **changes)
    choose_attention(config, family, dtype, packed)
    assert config._attn_implementation == chosen


def test_flash_attn_goes_first_and_older_gpus_keep_sdpa(gpu):
    family, config = small("llama2_7B")
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    choose_attention(config, family, "bfloat16", True)
    assert config._attn_implementation is None
    gpu.setattr(importlib.util, "find_spec", lambda name: name)
    choose_attention(config, family, "bfloat16", True)
    assert config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("device, dtype, head_dim, served", [
    (True, torch.bfloat16, 64, True), (True, torch.float16, 64, True), (True, torch.float32, 64, False),
    (True, torch.bfloat16, 60, False), (False, torch.bfloat16, 64, False),
])  # fmt: skip
def test_it_serves_half_precision_on_a_gpu(device, dtype, head_dim, served, gpu):
    assert varlen.serves(SimpleNamespace(is_cuda=device, dtype=dtype, shape=(12, 4, head_dim))) is served


@pytest.fixture
def far(monkeypatch):
    """A device of which no number can be read, but to which tensors are uploaded."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return torch.device("meta")


def test_what_was_uploaded_is_known_on_the_host_as_long_as_it_lives(far):
    tensor = torch.arange(4)
    copy = upload(tensor, far)
    assert copy.device == far and source(copy) is tensor and source(tensor) is tensor
    assert source(torch.empty(4, device=far)) is None
    seen = weakref.ref(tensor)
    del tensor, copy
    assert seen() is None


def test_what_flas_kernels_ask_of_boundaries_on_a_gpu_is_read_on_the_host(far):
    from fla.modules import token_shift
    from fla.ops.common import chunk_h
    from fla.ops.gla import chunk

    reference.enable()
    host = torch.tensor([0, 5, 6, 200], dtype=torch.int32)
    boundaries = upload(host, far)
    offsets, indices = chunk_h.prepare_chunk_offsets(boundaries, 64), chunk.prepare_chunk_indices(boundaries, 64)
    assert offsets.device == indices.device == far
    assert chunk_h.prepare_chunk_offsets(boundaries, 64) is offsets  # fla's cache
    assert offsets[-1].item() == 6 and offsets[:-1].shape == (3,) and len(indices) == 6
    assert source(indices).tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [2, 3]]
    assert token_shift.prepare_maxlens(boundaries) == 194
    assert torch.equal(chunk.prepare_chunk_indices(host, 64), source(indices))  # elsewhere fla's own


def test_documents_that_the_kernel_does_not_take_are_told_apart_on_the_host(far):
    q, boundaries = torch.empty(12, 4, 8, device=far), upload(torch.tensor([0, 5, 12], dtype=torch.int32), far)
    assert attention.flash_attn_varlen_func(q, q, q, boundaries, boundaries, 12, 12, causal=True).shape == q.shape
