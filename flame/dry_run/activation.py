"""The memory of each block in training, in bytes, from tracing one block of each kind with fake tensors (no values).

The trace is the real step: the rank's own shapes, tensor and context parallelism, activation checkpointing,
forward and backward, on the CPU: fake tensors would have fla and the loss launch kernels on a GPU.
"""

import copy
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import get_train_context
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.utils import device_type, set_default_dtype

from flame.config.schema import JobConfig
from flame.errors import first_line
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.flops import TOP_K_FIELDS, top_k
from flame.models.fused_loss import GPU_CHUNK
from flame.models.parameters import local_tensor
from flame.titan.parallelize import has_experts


@dataclass
class ModulePart:
    """The embedding, a block, or norm and head, on one rank; bytes are above what was alive when it began.

    shapes: of its parameters after tensor parallelism; gradients: bytes of their gradients; forward, backward: peak
    bytes; saved: bytes that forward keeps for backward, which frees them.
    """

    shapes: tuple[torch.Size, ...]
    gradients: int
    forward: int = 0
    saved: int = 0
    backward: int = 0

    def numel(self, shards: int = 1, expert_degree: int = 1) -> int:
        """Parameters on the first FSDP rank, which holds the most, as FSDP2 shards the first dimension.

        Expert parallelism divides the experts first; where there are more ranks than experts, torchtitan has FSDP2
        shard their second dimension.
        """
        total = 0
        for shape in self.shapes:
            sizes, dim, degree = list(shape), 0, shards
            if expert_degree > 1 and len(shape) == 3:
                sizes[0] //= expert_degree
                dim, degree = int(shards > shape[0]), max(1, shards // expert_degree)
            sizes[dim] = -(-sizes[dim] // degree)
            total += math.prod(sizes)
        return total


@dataclass(frozen=True)
class ModelParts:
    """A model's parts in order, and the number of parameters of the whole model.

    untraceable: why the bytes of its blocks come from a formula, "" if from a trace.
    """

    embedding: ModulePart
    blocks: list[ModulePart]
    head: ModulePart
    parameters: int
    untraceable: str = ""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages, fake or real, that were created under it and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._live = self._peak = self._start = 0
        self._seen: set[int] = set()

    def lap(self) -> tuple[int, int]:
        """The most alive since the last lap, and the bytes alive now, both above those alive then."""
        found = self._peak - self._start, self._live - self._start
        self._start = self._peak = self._live
        return found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # comes back as operations on the local tensors
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if id(storage) not in given | self._seen:
                self._seen.add(id(storage))
                self._live += storage.nbytes()
                self._peak = max(self._peak, self._live)
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size


def measure(spec: TrainSpec, job_config: JobConfig, mode: str, gpu_loss: bool = True) -> ModelParts:
    """The parts of a model on one rank, under an activation checkpointing mode; "selective" is by op.

    gpu_loss: with the fused loss of a GPU where the model has one, else with that of a CPU.
    """
    args = copy.copy(spec.model_args[job_config.model.flavor])
    args.update_from_config(job_config)
    if hasattr(args, "attn_type"):  # torchtitan's masks depend on values, and save no more for the backward than SDPA
        args.attn_type = "sdpa"
    training, layout = job_config.training, job_config.parallelism
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    pipeline, dtype = layout.pipeline_parallel_degree, TORCH_DTYPE_MAP[training.mixed_precision_param]
    config: Any = copy.deepcopy(job_config)
    config.activation_checkpoint.mode, config.compile.enable = mode, False
    group = fake_process_group(tensor * context) if tensor * context > 1 else nullcontext()
    with group, torch.device("meta"), set_default_dtype(dtype):
        model: Any = spec.model_cls(args)
        parameters = sum(p.numel() for p in model.parameters())
        kinds = [repr(block) for block in model.layers.values()]
        for number in (i for i, kind in enumerate(kinds) if kind in kinds[:i]):
            del model.layers[str(number)]
        spec.parallelize_fn(model, _ModelParallelDims(1, 1, context, tensor, 1, 1, 1, tensor * context), config)
        head: Any = model.head
        if gpu_loss and isinstance(model, CausalLM) and model.family.fused_loss and not head.gather:
            head.forward = partial(_lose_on_gpu, head)
        parts = _split(model, layout.expert_parallel_degree)
        batch = training.local_batch_size if pipeline == 1 else layout.pipeline_parallel_microbatch_size
        parallel_loss = get_train_context(tensor > 1 and not layout.disable_loss_parallel)
        fake, shape = FakeTensorMode(allow_non_fake_inputs=True), (batch, training.seq_len)
        with fake:
            model.to_empty(device=device_type)
        trace = partial(_trace, model, parts, shape, fake, parallel_loss)
        top_k, untraceable = _top_k(args), "other ranks send it tokens" if layout.expert_parallel_degree > 1 else ""
        if not untraceable:
            try:
                trace()
            except RuntimeError as error:  # from torch: a shape depends on values, or an operator has no fake form
                if top_k is None:
                    raise
                untraceable = first_line(error)
        if untraceable:
            for block in model.layers.values():
                block.forward = lambda hidden_states, *_, **__: hidden_states.clone()
            model.eval()  # experts that did not run have no load to balance
            trace()
        if tensor > 1:  # again: at first DTensor runs each operation on tensors of its own as well, to learn its shape
            trace()
        if untraceable:
            _apply_formula(model, parts, batch * training.seq_len // context, tensor, top_k or 0, mode)
    embedding, *blocks, last = parts
    of_kind = dict(zip(dict.fromkeys(kinds), blocks, strict=True))
    return ModelParts(embedding, [of_kind[kind] for kind in kinds], last, parameters, untraceable)


class _GpuLoss(torch.autograd.Function):
    """Allocates what flame.models.fused_loss does on a GPU: gradients in float32, and the logits of one chunk."""

    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        hidden, weight, *_ = parts
        sums = [torch.empty_like(part, dtype=torch.float32) for part in parts]
        hidden.new_empty(min(GPU_CHUNK, len(hidden)), len(weight))
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*sums)
        return sums[0].sum()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x, dtype=ctx.dtype) for x in ctx.saved_tensors)


def _lose_on_gpu(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    parameters = [local_tensor(p) for p in (head.weight, getattr(head, "bias", None)) if p is not None]
    return _GpuLoss.apply(hidden.flatten(0, -2), *parameters)


class _ModelParallelDims(ParallelDims):
    """The ranks that share a sequence, without data parallelism."""

    fsdp_enabled = dp_replicate_enabled = property(lambda self: False)


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """A process group whose other ranks do not exist."""
    dist.init_process_group("fake", rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _top_k(args: Any) -> int | None:
    """The experts each token is routed to, 0 if the config does not say; None for a model without experts."""
    if not isinstance(args, ModelArgs):
        return args.moe_args.top_k if has_experts(args) else None
    return top_k(args.hf_config) if any(hasattr(args.hf_config, name) for name in TOP_K_FIELDS) else None


def _split(model: Any, expert_degree: int) -> list[ModulePart]:
    """The embedding, each block, and the rest with the head."""
    parts: list[ModulePart] = []
    counted: set[torch.Tensor] = set()
    for owner in (model.embedding, *model.layers.values(), model):
        own = [local_tensor(parameter) for parameter in owner.parameters() if parameter not in counted]
        counted.update(owner.parameters())
        gradients = sum(p.nbytes // (expert_degree if p.ndim == 3 else 1) for p in own)
        parts.append(ModulePart(tuple(p.shape for p in own), gradients))
    return parts


def _trace(
    model: Any, parts: list[ModulePart], shape: tuple[int, int], fake: FakeTensorMode, parallel_loss: Any
) -> None:
    """Run one forward and backward of a (batch, seq) of fake tokens, and fill in the bytes of `parts`."""
    live, blocks = LiveBytes(), list(model.layers.values())
    model.zero_grad()

    def leave_backward(part: ModulePart) -> None:
        part.backward, _ = live.lap()

    def cross(number: int, hidden: torch.Tensor) -> None:  # from a part to the next, and back in the backward
        parts[number].forward, parts[number].saved = live.lap()
        hidden.register_hook(lambda _: leave_backward(parts[number + 1]))

    def enter_block(number: int, _block: Any, args: Any, kwargs: Any) -> None:
        cross(number, args[0] if args else kwargs["hidden_states"])

    def leave_blocks(_block: Any, _args: Any, output: Any) -> None:
        cross(len(blocks), output[0] if isinstance(output, tuple) else output)

    hooks = [b.register_forward_pre_hook(partial(enter_block, i), with_kwargs=True) for i, b in enumerate(blocks)]
    hooks.append(blocks[-1].register_forward_hook(leave_blocks))
    try:
        with fake, torch.device(device_type):
            tokens = torch.zeros(shape, dtype=torch.int64)
            with live, parallel_loss():
                loss = model(tokens, labels=tokens)
                parts[-1].forward, parts[-1].saved = live.lap()
                loss.backward()
                leave_backward(parts[0])
    finally:
        for hook in hooks:
            hook.remove()


def _apply_formula(model: Any, parts: list[ModulePart], tokens: int, tensor: int, top_k: int, mode: str) -> None:
    """Estimate blocks that cannot be traced, such as routed experts, by what each weight takes in and gives out.

    tokens: of the sequences this rank works on; with a weight that is not sharded it sees its part of them.
    """
    size = parts[0].gradients // parts[0].numel()
    for part, block in zip(parts[1:-1], model.layers.values(), strict=True):
        total = 0.0
        for parameter in block.parameters():
            shape = local_tensor(parameter).shape
            sharded = isinstance(parameter, DTensor) and parameter.placements[0].is_shard()
            routed = (top_k or shape[0]) / shape[0] if len(shape) == 3 else 1.0
            features = routed * math.prod(shape[:-2]) * sum(shape[-2:])
            total += size * features * (tokens if sharded else tokens / tensor)
        part.forward = round(total)
        part.saved = size * tokens * model.embedding.weight.shape[1] // tensor if mode == "full" else part.forward
        part.backward = part.forward + part.gradients
