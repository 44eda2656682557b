"""What a block takes to train, in bytes, found by running one of each kind with fake tensors, which have no values.

The run is the real one: the rank's own shapes, the same tensor and context parallelism, activation checkpointing and
autocast, forward and backward, on the device of this machine. All storages that are alive are counted.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import get_train_context
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.utils import device_type, set_default_dtype

from flame.models.causal_lm import ModelArgs
from flame.models.flops import EXPERTS_MET, experts_met
from flame.models.hf import first_line
from flame.parallel.titan import has_experts
from flame.storage import Live


@dataclass
class Part:
    """The embedding, a block, or norm and head, on a rank; bytes beyond what was alive when it began.

    shapes: of the parameters behind tensor parallelism, sizes in elements; gradients: theirs, as backward makes them;
    forward, backward: the most that is alive in it; saved: what forward leaves for the backward, which frees it.
    """

    shapes: tuple[torch.Size, ...]
    gradients: int
    forward: int = 0
    saved: int = 0
    backward: int = 0

    def numel(self, shards: int = 1, expert: int = 1) -> int:
        """Parameters of the first of so many FSDP ranks, which has the most: the first dimension is divided.

        expert: the degree of expert parallelism, which divides the experts before FSDP2 does; torchtitan has FSDP2 take
        their second dimension where there are more ranks than experts.
        """
        total = 0
        for shape in self.shapes:
            sizes, divided, over = list(shape), 0, shards
            if expert > 1 and len(shape) == 3:
                sizes[0] //= expert
                divided, over = int(shards > shape[0]), max(1, shards // expert)
            sizes[divided] = -(-sizes[divided] // over)
            total += math.prod(sizes)
        return total


@dataclass(frozen=True)
class Parts:
    """A model's parts in their order; guessed: why their bytes are a formula's and not a run's, if they are."""

    embedding: Part
    blocks: list[Part]
    head: Part
    guessed: str = ""


def shards(layout: Any, ranks: int) -> int:
    """The ranks of `ranks` over which FSDP2 divides each parameter; 1: there is no FSDP2."""
    outer = (layout.data_parallel_replicate_degree, layout.pipeline_parallel_degree, layout.tensor_parallel_degree)
    return ranks // math.prod(outer)


def measure(spec: TrainSpec, job_config: Any, ranks: int, mode: str) -> Parts:
    """The parts of a model on a rank of `ranks`, with an activation checkpointing mode; selective only by op."""
    args = copy.copy(spec.model_args[job_config.model.flavor])
    if hasattr(args, "attn_type"):  # torchtitan's; its masks depend on values, and keep no more for the backward
        args.attn_type = "sdpa"
    training, layout = job_config.training, job_config.parallelism
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    pipeline, sharded = layout.pipeline_parallel_degree, shards(layout, ranks) > 1
    low = TORCH_DTYPE_MAP[training.mixed_precision_param]
    config = replace(
        job_config,
        activation_checkpoint=replace(job_config.activation_checkpoint, mode=mode),
        compile=replace(job_config.compile, enable=False),
    )
    dtype = low if sharded else TORCH_DTYPE_MAP[training.dtype]
    with _fake_ranks(tensor * context), torch.device("meta"), set_default_dtype(dtype):
        model: Any = spec.model_cls(args)
        kinds = [repr(block) for block in model.layers.values()]
        firsts = {kind: str(kinds.index(kind)) for kind in dict.fromkeys(kinds)}
        for number in model.layers.keys() - set(firsts.values()):
            del model.layers[number]
        spec.parallelize_fn(model, _Inner(1, 1, context, tensor, 1, 1, 1, tensor * context), config)
        found = _parts(model)
        batch = training.local_batch_size if pipeline == 1 else layout.pipeline_parallel_microbatch_size
        # As torchtitan's maybe_enable_amp.
        by_autocast = not sharded and tensor * pipeline == 1 and low != torch.float32
        precision = torch.autocast(device_type, low) if by_autocast else nullcontext()
        parallel_loss = get_train_context(tensor > 1 and not layout.disable_loss_parallel)
        try:
            _run(model, found, (batch, training.seq_len), precision, parallel_loss)
            guessed = ""
        except RuntimeError as error:  # of torch: shapes that depend on values, or an operator without a fake
            if (met := _experts_met(args)) is None:
                raise
            guessed = first_line(error)
            width = model.embedding.weight.shape[1]
            _guess(found, batch * training.seq_len // (tensor * context), width, met, mode)
    embedding, *blocks, head = found
    return Parts(embedding, [dict(zip(firsts, blocks, strict=True))[kind] for kind in kinds], head, guessed)


class _Inner(ParallelDims):
    """The ranks that share a sequence, and nothing of data parallelism."""

    fsdp_enabled = dp_replicate_enabled = property(lambda self: False)


@contextmanager
def _fake_ranks(count: int) -> Iterator[None]:
    """A process group whose other ranks do not exist, if there is to be more than one."""
    if count == 1:
        yield
        return
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

    dist.init_process_group("fake", rank=0, world_size=count, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _experts_met(args: Any) -> int | None:
    """The experts a token is sent to, 0 if that is not said; None for models that have no experts."""
    if not isinstance(args, ModelArgs):
        return args.moe_args.top_k if has_experts(args) else None
    return experts_met(args.hf_config) if any(hasattr(args.hf_config, name) for name in EXPERTS_MET) else None


def _parts(model: Any) -> list[Part]:
    """A Part each for the embedding, the blocks, and everything else, the head's."""
    owners = [model.embedding, *model.layers.values()]
    owned: list[list[torch.Tensor]] = [list(owner.parameters()) for owner in owners]
    counted = {id(parameter) for own in owned for parameter in own}
    owned.append([parameter for parameter in model.parameters() if id(parameter) not in counted])
    local = [[p.to_local() if isinstance(p, DTensor) else p for p in own] for own in owned]
    return [Part(tuple(p.shape for p in own), sum(p.nbytes for p in own)) for own in local]


def _run(model: Any, parts: list[Part], shape: tuple[int, int], precision: Any, parallel_loss: Any) -> None:
    """One forward and backward without values, which fills in `parts`, in their order."""
    live, start = Live(), 0

    def leave_forward(part: Part) -> None:
        nonlocal start
        part.forward, part.saved = live.peak - start, live.now - start
        start = live.mark()

    def leave_backward(part: Part) -> None:
        nonlocal start
        part.backward = live.peak - start
        start = live.mark()

    def cross(number: int, hidden: torch.Tensor) -> None:
        leave_forward(parts[number])
        hidden.register_hook(lambda _: leave_backward(parts[number + 1]))

    def enter_block(number: int, _block: Any, args: Any, kwargs: Any) -> None:
        cross(number, args[0] if args else kwargs["hidden_states"])

    def leave_blocks(_block: Any, _args: Any, output: Any) -> None:
        cross(len(parts) - 2, output[0] if isinstance(output, tuple) else output)

    blocks = list(model.layers.values())
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(enter_block, number), with_kwargs=True)
    blocks[-1].register_forward_hook(leave_blocks)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device_type):
        model.to_empty(device=device_type).train()
        tokens = torch.zeros(shape, dtype=torch.int64)
        with live, parallel_loss():
            with precision:
                loss = model(tokens, labels=tokens)
            leave_forward(parts[-1])
            loss.backward()
            leave_backward(parts[0])


def _guess(parts: list[Part], tokens: int, width: int, met: int, mode: str) -> None:
    """For models whose shapes depend on values, as those of routed experts: what each weight takes in and gives out."""
    hidden, size = tokens * width, parts[0].gradients // parts[0].numel()
    for part in parts[1:-1]:
        features = 0.0
        for shape in part.shapes:
            routed = (met or shape[0]) / shape[0] if len(shape) == 3 else 1.0
            features += routed * math.prod(shape[:-2]) * sum(shape[-2:])
        whole = round(size * tokens * features)
        part.saved = size * hidden if mode == "full" else whole
        part.forward, part.backward = whole, whole + part.gradients
    for part in (parts[0], parts[-1]):
        part.saved, part.backward = size * hidden, part.gradients + size * hidden
