"""What a step does: its waits, launches and parts by the clock, and the FLOPs and bytes of all that it launches."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.rehearsal import roofline
from scripts.rehearsal.device import Stub

ROOT = Path(__file__).parents[2]
# What each step of a rehearsal is for. The first one compiles and makes the optimizer's state.
WARM_UP, COST, COUNT, MORE, LOGGED, LAST = 1, 2, 3, 4, 5, 9  # MORE: one microbatch more; those after LOGGED are timed
LOG_EVERY = LOGGED
STAGED = 64 * 1024  # bytes of pageable memory that the driver copies before it returns; it waits for more
_OWN = (f"{ROOT}/flame/", f"{ROOT}/scripts/", "/torchtitan/", "/transformers/", "/fla/", "/torchao/")
_METER = (
    __file__,
    f"{ROOT}/scripts/rehearsal/device.py",
    f"{ROOT}/scripts/gpu_check/speed.py",
)  # their frames are nobody's


class Mark(NamedTuple):
    """A moment of a step: "step", "forward", "backward", "backward end", "update", "update end", "step end"."""

    name: str
    time: float


class Wait(NamedTuple):
    """A wait of the host: after which mark, for what, and where in the code."""

    mark: int
    what: str
    place: str


def part(mark: str, following: str) -> str:
    """The part of a step that lies between two marks: inputs, forward, backward, before_update, update or rest."""
    if mark in ("forward", "backward", "update"):
        return mark
    if following == "forward":
        return "inputs"
    return "before_update" if following == "update" else "rest"


class Meter:
    """Runs the steps of a rehearsal and keeps what each is for."""

    def __init__(self, stub: Stub, set_microbatches: Callable[[int], None], microbatches: int) -> None:
        self._stub, self._set_microbatches, self._microbatches = stub, set_microbatches, microbatches
        self._marks: list[Mark] = []
        self._waits: list[Wait] = []
        self._copy: Wait | None = None  # the last event, if it was a copy
        self._counts: dict[int, dict[str, Any]] = {}
        self._timed: list[dict[str, float]] = []
        self.ledger = Ledger()
        stub.on_triton = self.ledger.add_triton
        backward = torch.autograd.backward

        def marked(*args: Any, **options: Any) -> None:
            self.mark("backward")
            backward(*args, **options)
            self.mark("backward end")

        torch.autograd.backward = marked
        register_optimizer_step_pre_hook(lambda *_: self.mark("update"))
        register_optimizer_step_post_hook(lambda *_: self.mark("update end"))

    def watch(self, parts: Iterable[torch.nn.Module]) -> None:
        """Take the forward of these model parts for the step's."""
        for module in parts:
            module.register_forward_pre_hook(lambda *_: self.mark("forward"))

    def mark(self, name: str) -> None:
        self._marks.append(Mark(name, time.perf_counter()))

    def step(self, number: int, run: Callable[[], Any]) -> None:
        """Run step `number` of a job, whose first is 1."""
        stub, listens = self._stub, number in (COUNT, MORE, LOGGED)
        self._set_microbatches(self._microbatches + (number == MORE))
        self._marks, self._waits, self._copy = [], [], None
        before = stub.launches, stub.products, stub.triton.total(), stub.gloo_rounds
        self.mark("step")
        with stub.listen(self._hear if listens else None):
            if number == COST:
                with self.ledger:
                    run()
            else:
                run()
        self.mark("step end")
        after = stub.launches, stub.products, stub.triton.total(), stub.gloo_rounds
        names = ("all", "products", "triton", "gloo_rounds")
        counts: dict[str, Any] = {name: b - a for name, a, b in zip(names, before, after, strict=True)}
        self._counts[number] = counts | {"waits": [(self._part(wait.mark), *wait[1:]) for wait in self._waits]}
        if number > LOGGED:
            self._timed.append(self._times())

    def result(self) -> dict[str, Any]:
        """All counts of the rehearsal, after its last step."""
        assert LAST in self._counts, f"the job ended at step {max(self._counts, default=0)}"
        once, more, logged = (self._counts[number] for number in (COUNT, MORE, LOGGED))
        one_step, one_more = Counter(once["waits"]), Counter(more["waits"])
        microbatch = len(more["waits"]) - len(once["waits"])
        gloo = more["gloo_rounds"] - once["gloo_rounds"]
        fastest = min(self._timed, key=lambda times: times["all"])
        return {
            "launches": {name: once[name] for name in ("all", "products", "triton")},
            "waits": {
                "step": len(once["waits"]) - self._microbatches * microbatch,
                "before_update": sum(wait[0] == "before_update" for wait in once["waits"]),
                "microbatch": microbatch,
                "logged": len(logged["waits"]),
                "places": [
                    {"part": where, "what": what, "place": place, "times": one_step[where, what, place],
                     "microbatch": one_more[where, what, place] - one_step[where, what, place]}
                    for where, what, place in dict.fromkeys([*once["waits"], *more["waits"]])
                ],
            },
            "gloo_rounds": {"step": once["gloo_rounds"] - self._microbatches * gloo, "microbatch": gloo},
            "sdpa": self.ledger.attention(),
            "host_ms": {name: round(1e3 * seconds, 3) for name, seconds in fastest.items()},
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "rows": self.ledger.rows(),
        }  # fmt: skip

    def _part(self, mark: int) -> str:
        following = self._marks[mark + 1 :]
        return part(self._marks[mark].name, following[0].name if following else "step end")

    def _times(self) -> dict[str, float]:
        times: dict[str, float] = {"all": self._marks[-1].time - self._marks[0].time}
        for i, (mark, following) in enumerate(zip(self._marks, self._marks[1:], strict=False)):
            times[self._part(i)] = times.get(self._part(i), 0.0) + following.time - mark.time
        return times

    def _hear(self, what: str, size: int) -> None:
        how, *kind = what.split()
        event, copied = Wait(len(self._marks) - 1, what, find_place()), self._copy
        self._copy = None
        if kind[0] != "sync":  # "async H2D pageable"
            direction, memory = kind
            self._copy = event = event._replace(what=f"{direction} {memory}")
            if how == "async" and (memory == "pinned" or (direction == "H2D" and size <= STAGED)):
                return
        elif copied is not None and event == copied._replace(what="stream sync"):  # PyTorch waits for its own copy
            event = copied
            if self._waits and self._waits[-1] is copied:
                return
        self._waits.append(event)


def find_place() -> str:
    """Where the host is: "file:line function" of the innermost frame that is not torch's or Python's own."""
    frame, innermost = sys._getframe(1), ""
    while frame is not None:
        file, code = frame.f_code.co_filename, frame.f_code
        if file not in _METER:
            own = next((file[file.rindex(name) :].lstrip("/") for name in _OWN if name in file), "")
            place = f"{own.removeprefix(str(ROOT)[1:] + '/') or file}:{frame.f_lineno} {code.co_name}"
            if own:
                return place
            innermost = innermost or place
        frame = frame.f_back  # type: ignore[assignment]
    return innermost or "a thread of autograd"


# -- FLOPs and bytes ---------------------------------------------------------------------------------------------------
_PRODUCTS = {
    **{"mm": "self", "bmm": "self", "addmm": "mat1", "baddbmm": "batch1", "_scaled_mm": "self"},
    **{"_grouped_mm": "self", "_scaled_grouped_mm": "self"},
}  # the name of the first factor
_NOTHING = ("empty", "new_empty", "_local_scalar_dense", "record_stream", "resize_", "set_", "_has_compatible")
_WRITE_ONLY = ("fill_", "zero_", "copy_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full", "new_ones")
_GATHERS = ("embedding", "index", "index_select", "gather")  # read as much as they write, whatever the source's size


class Ledger(TorchDispatchMode):
    """FLOPs and bytes of every operator that runs on the GPU; each reads its inputs and writes its outputs once.

    What torch.compile has generated is seen as it is launched, kernel by kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[str, str, str], list[float]] = {}
        self._attention: Counter[tuple[str, ...]] = Counter()
        self._active = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __enter__(self) -> "Ledger":
        self._active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._active = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what it does on this rank
        result = func(*args, **(kwargs or {}))
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        if any(tensor.is_cuda for tensor in tensors((given, result))):
            self._add(func, given, result)
        return result

    def add_triton(self, name: str, arguments: dict[str, Any]) -> None:
        """A launch of a Triton kernel, whose tensors are each read or written once; both if inductor says so."""
        if self._active:
            distinct = {id(value): value for value in arguments.values() if isinstance(value, torch.Tensor)}
            moved = sum(map(footprint, distinct.values()))
            moved += sum(footprint(value) for key, value in arguments.items() if key.startswith("in_out_ptr"))
            self._count("triton", name, "", 0, moved)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of flame's roofline; see roofline.py."""
        names = ("calls", "flops", "bytes", "seconds")
        return [
            {"kind": kind, "name": name, "dtype": dtype, **dict(zip(names, row, strict=True))}
            for (kind, name, dtype), row in self._rows.items()
        ]

    def attention(self) -> list[dict[str, Any]]:
        """The kernels that scaled_dot_product_attention has chosen, with types, shapes and masks."""
        names = ("kernel", "q", "k", "v", "mask", "causal")
        return [dict(zip(names, key, strict=True)) | {"calls": calls} for key, calls in self._attention.items()]

    def _count(self, kind: str, name: str, dtype: str, flops: float, moved: float) -> None:
        row = self._rows.setdefault((kind, name, dtype), [0, 0.0, 0.0, 0.0])
        seconds = roofline.least_seconds(flops, dtype, moved)
        row[:] = [row[0] + 1, row[1] + flops, row[2] + moved, row[3] + seconds]

    def _add(self, func: Any, given: dict[str, Any], result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        moved = traffic(func, given, result)
        if name.startswith(("c10d::", "_c10d_functional::")):
            self._count("communication", name, "", 0, moved)
        elif name in _PRODUCTS:
            first, product = given[_PRODUCTS[name]], tensors(result)[0]
            dtype = "tf32" if first.dtype == torch.float32 and uses_tf32() else type_of(first)
            self._count("product", name, dtype, roofline.product_flops(first.shape, product.shape), moved)
        elif "attention" in name or "varlen_attn" in name:
            self._add_attention(name, given, moved)
        elif moved:
            self._count("elementwise", name, type_of(max(tensors((given, result)), key=footprint)), 0, moved)

    def _add_attention(self, name: str, given: dict[str, Any], moved: float) -> None:
        q, k, v = (given[key] for key in ("query", "key", "value"))
        backward = "backward" in name
        causal = bool(given.get("is_causal")) or given.get("custom_mask_type") == 1
        bias = given.get("attn_bias", given.get("attn_mask", given.get("bias")))
        boundaries = next((given[key] for key in given if key.startswith("cu") and key.endswith("_q")), None)
        window = given.get("window_size_left", (given.get("window_size") or [-1])[0])
        window = -1 if window is None else window
        if boundaries is None:
            documents = [(q.shape[-2], k.shape[-2])] * len(q)
            heads = q.shape[1]
        else:  # (tokens, heads, width)
            tokens, heads = q.shape[0], q.shape[1]
            lengths = boundaries.cpu().diff().tolist()
            if sum(lengths) != tokens:  # computed on the device: unknown here
                longest = given.get("max_q", tokens)
                lengths = [longest] * (tokens // longest)
            documents = [(length, length) for length in lengths]
        causal = causal or (boundaries is not None and window >= 0)
        flops = roofline.attention_flops(heads, q.shape[-1], documents, causal, window, backward)
        self._count("attention", name, type_of(q), flops, moved)
        if not backward:
            shapes = (f"{type_of(x)} {list(x.shape)}" for x in (q, k, v))
            mask = "" if bias is None else f"{type_of(bias)} {list(bias.shape)}"
            self._attention[(name, *shapes, mask, causal)] += 1


def tensors(values: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def type_of(tensor: torch.Tensor) -> str:
    """Such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def uses_tf32() -> bool:
    """Whether matrix products of float32 may round their factors to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def footprint(tensor: torch.Tensor) -> int:
    """The bytes of memory behind a tensor; what is expanded counts once."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride else min(size, 1)
    return entries * tensor.element_size()


def traffic(func: Any, given: dict[str, Any], result: Any) -> int:
    """The bytes that an operator reads and writes if each tensor passes once; 0 for a view and for mere allocation."""
    name = func._schema.name.split("::")[-1]
    if name.startswith(_NOTHING):
        return 0
    outputs = tensors(result)
    written = [
        tensor
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
        for tensor in tensors(given[argument.name])
        if not (name.startswith("_fused_ada") and argument.name == "grads")  # written with a gradient scaler alone
    ]
    inputs = tensors(given)
    held = {tensor.untyped_storage()._cdata for tensor in inputs}
    fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in held]
    if not written and not fresh:
        return 0
    replaced = {id(tensor) for tensor in written} if name in _WRITE_ONLY or "out" in given else set()
    read = [] if name.endswith("_like") or name.startswith("new_") else [x for x in inputs if id(x) not in replaced]
    if name == "all_gather_copy_in":  # FSDP2's: it copies this rank's shards into the buffer of all
        return 2 * sum(map(footprint, tensors(given["all_gather_inputs"])))
    if name in _GATHERS:
        return 2 * sum(map(footprint, fresh)) + sum(footprint(x) for x in read if not x.is_floating_point())
    return sum(map(footprint, [*read, *written, *fresh]))
