"""PyTorch on the GPU that is not there: counts of the stub runtime, and answers to what only a GPU could give.

`enter` comes before flame or torchtitan is imported. The numbers that a device would compute are unwritten memory here
(zeros); code that branches on one gets the value of a normal step from `_answer_values`.
"""

import contextlib
import ctypes
import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t)


class Stub:
    """The counters and switches of the preloaded runtime, and what Python counts beside it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._listener: Any = None
        self.triton: Counter[str] = Counter()  # launches by kernel
        self.gloo_rounds = 0
        self.on_triton: Callable[[str, dict[str, Any]], None] | None = None  # name and arguments of each launch

    def _variable(self, name: str, kind: Any) -> Any:
        return kind.in_dll(self._library, f"rehearsal_{name}")

    @property
    def launches(self) -> int:
        """All kernels, fills and copies on the device so far, Triton's too."""
        return self._variable("launches", ctypes.c_long).value + self.triton.total()

    @property
    def products(self) -> int:
        """Calls of cuBLAS so far."""
        return self._variable("products", ctypes.c_long).value

    @contextlib.contextmanager
    def listen(self, told: Callable[[str, int], None] | None) -> Iterator[None]:
        """Have `told` hear of each wait and copy of the host, and its bytes; None: nobody."""
        before, variable = self._listener, self._variable("listener", ctypes.c_void_p)
        self._listener = told and _LISTENER(lambda what, size: told(what.decode(), size))
        variable.value = self._listener and ctypes.cast(self._listener, ctypes.c_void_p).value
        try:
            yield
        finally:
            self._listener = before
            variable.value = before and ctypes.cast(before, ctypes.c_void_p).value

    @contextlib.contextmanager
    def reading(self, value: bool) -> Iterator[None]:
        """Have a bool of the device read as `value`."""
        variable = self._variable("bool", ctypes.c_int)
        before, variable.value = variable.value, int(value)
        try:
            yield
        finally:
            variable.value = before

    def launched(self, name: str, arguments: dict[str, Any]) -> None:
        self.triton[name] += 1
        if self.on_triton:
            self.on_triton(name, arguments)


def enter(world: int, compile_kernels: bool, packed: bool) -> Stub:
    """Make this process rank 0 of `world` ranks, each with an H100.

    compile_kernels: compile Triton's kernels for it (the first configuration of each autotuner), else they are counted
    alone. packed: the rows of the job hold several documents.
    """
    assert torch.cuda.is_available(), "the stub runtime is not preloaded"
    stub = Stub()
    _fake_groups(world, stub)
    _count_triton(stub, compile_kernels)
    _count_inductor(stub)
    _replace_libraries()
    _answer_values(stub, packed)
    return stub


def describe_stages(batch: int, seq_len: int, hidden_size: int, dtype: torch.dtype) -> None:
    """Give each pipeline stage what it would hear of its neighbours: the shapes that it receives and sends.

    batch: rows of a pipeline's microbatch. dtype: of the hidden states between stages.
    """
    import torchtitan.distributed.pipeline_parallel as pipeline_parallel

    stage = pipeline_parallel.PipelineStage
    tokens = torch.empty(batch, seq_len, dtype=torch.int64, device="meta")
    hidden = torch.empty(batch, seq_len, hidden_size, dtype=dtype, device="meta", requires_grad=True)
    loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)

    def describe(model: Any, index: int, stages: int, *args: Any, **options: Any) -> Any:
        received, sent = tokens if index == 0 else hidden, loss if index == stages - 1 else hidden
        described = stage(model, index, stages, *args, input_args=received, output_args=sent, **options)
        described._runtime_validate = True  # what it receives and sends is compared with this
        return described

    pipeline_parallel.PipelineStage = describe


def _fake_groups(world: int, stub: Stub) -> None:
    """Process groups whose collectives return at once; those that were asked of gloo are counted."""
    init, new_group, gloo = c10d.init_process_group, c10d.new_group, set()

    def init_fake(*_: Any, **__: Any) -> None:
        init("fake", rank=0, world_size=world, store=dist.HashStore())

    def new_fake(*args: Any, **options: Any) -> Any:
        asked = inspect.signature(new_group).bind(*args, **options)
        backend, asked.arguments["backend"] = asked.arguments.get("backend"), "fake"
        group = new_group(*asked.args, **asked.kwargs)
        if backend == "gloo":
            gloo.add(group)
        return group

    def counted(collective: Callable) -> Callable:
        @functools.wraps(collective)
        def call(*args: Any, **options: Any) -> Any:
            given = inspect.signature(collective).bind(*args, **options).arguments
            stub.gloo_rounds += given.get("group") in gloo
            if "object_list" in given and "obj" in given:  # all_gather_object: every rank says what this one does
                given["object_list"][:] = [given["obj"]] * len(given["object_list"])
                return None
            return collective(*args, **options)

        return call

    dist.init_process_group = c10d.init_process_group = init_fake
    dist.new_group = c10d.new_group = new_fake
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"):
        setattr(dist, name, counted(getattr(dist, name)))


def _count_triton(stub: Stub, compile_kernels: bool) -> None:
    """Triton's own launcher; a kernel that is not compiled is not launched either."""
    run = JITFunction.run

    def arguments(function: JITFunction, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(function.arg_names, args, strict=False)), **options}

    def count(self: Any, *args: Any, **options: Any) -> None:
        function = self
        while not isinstance(function, JITFunction):
            function = function.fn
        stub.launched(function.__name__, arguments(function, args, options))

    def compile_first(self: JITFunction, *args: Any, **options: Any) -> Any:
        stub.launched(self.__name__, arguments(self, args, options))
        return run(self, *args, **options)

    def tune_nothing(self: Autotuner, *args: Any, **options: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        config = self.best_config = self.prune_configs(options)[0]
        if config.pre_hook:
            config.pre_hook({**self.nargs, **options, **config.all_kwargs()})
        return self.fn.run(*args, **options, **config.all_kwargs())

    if compile_kernels:
        JITFunction.run, Autotuner.run = compile_first, tune_nothing
    else:
        JITFunction.run = Autotuner.run = Heuristics.run = count


def _count_inductor(stub: Stub) -> None:
    """The launcher of kernels that torch.compile has generated, which are always compiled."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    run = CachingAutotuner.run

    def count(self: Any, *args: Any, **options: Any) -> Any:
        names = list(self.triton_meta["signature"])
        stub.launched(self.fn.__name__, dict(zip(names, args, strict=False)))
        return run(self, *args, **options)

    CachingAutotuner.run = count


def _replace_libraries() -> None:
    """cuDNN's attention and cuSOLVER's QR: their libraries would need the device itself."""

    def attend(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, debug=False, *, scale=None):
        out = torch.empty_like(q)
        log_sum = q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
        seed = torch.empty((), dtype=torch.int64)
        return out, log_sum, None, None, q.shape[2], k.shape[2], seed, seed.clone(), None

    def attend_backward(grad, q, k, v, *_: Any, **__: Any):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    library = torch.library.Library("aten", "IMPL")
    with contextlib.redirect_stderr(None):
        library.impl("_scaled_dot_product_cudnn_attention", attend, "CUDA")
        library.impl("_scaled_dot_product_cudnn_attention_backward", attend_backward, "CUDA")
    _replace_libraries.library = library  # type: ignore[attr-defined]  # what it holds ends with it
    draw = torch.nn.init.orthogonal_
    torch.nn.init.orthogonal_ = lambda tensor, *args, **options: (
        tensor if tensor.is_cuda else draw(tensor, *args, **options)  # offloaded weights are drawn on the CPU
    )


def _answer_values(stub: Stub, packed: bool) -> None:
    """What code reads of the device and branches on."""
    import transformers.masking_utils as masking

    find, diff = masking.find_packed_sequence_indices, torch.Tensor.diff

    def find_packed(*args: Any, **options: Any) -> Any:
        with stub.reading(not packed):  # "all positions are consecutive"
            return find(*args, **options)

    def diff_on_host(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if not self.is_cuda or self.dtype not in (torch.int32, torch.int64):
            return diff(self, *args, **options)
        with stub.listen(None):  # lengths of documents, of boundaries that were copied from the host
            return diff(self.cpu(), *args, **options).to(self.device)

    masking.find_packed_sequence_indices = find_packed
    torch.Tensor.diff = diff_on_host  # type: ignore[method-assign]


def expect_good_steps() -> None:
    """Have flame take every step of a run for a good one, whatever it reads of memory that no kernel wrote."""
    from flame.training.outcome import Agreement

    wait = Agreement.wait

    def wait_for_a_good_step(self: Agreement) -> Any:
        read = wait(self)
        return read._replace(bad=False, exhausted=False, asked=0, due=False, sums=[0] * len(read.sums))

    Agreement.wait = wait_for_a_good_step  # type: ignore[method-assign]
