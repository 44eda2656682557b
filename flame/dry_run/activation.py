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

from flame.dry_run.storage import Live
from flame.errors import first_line
from flame.models.causal_lm import ModelArgs
from flame.models.flops import TOP_K_FIELDS, top_k
from flame.models.parameters import local_tensor
from flame.parallel.layout import fsdp_degree
from flame.titan.parallelize import has_experts


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


def measure(spec: TrainSpec, job_config: Any, ranks: int, mode: str) -> Parts:
    """The parts of a model on a rank of `ranks`, with an activation checkpointing mode; selective only by op."""
    args = copy.copy(spec.model_args[job_config.model.flavor])
    args.update_from_config(job_config)
    if hasattr(args, "attn_type"):  # torchtitan's; its masks depend on values, and keep no more for the backward
        args.attn_type = "sdpa"
    training, layout = job_config.training, job_config.parallelism
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    pipeline, sharded = layout.pipeline_parallel_degree, fsdp_degree(layout, ranks) > 1
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
        found = _parts(model, layout.expert_parallel_degree)
        batch = training.local_batch_size if pipeline == 1 else layout.pipeline_parallel_microbatch_size
        # As torchtitan's maybe_enable_amp.
        by_autocast = not sharded and tensor * pipeline == 1 and low != torch.float32
        precision = torch.autocast(device_type, low) if by_autocast else nullcontext()
        parallel_loss = get_train_context(tensor > 1 and not layout.disable_loss_parallel)
        fake, shape = FakeTensorMode(allow_non_fake_inputs=True), (batch, training.seq_len)
        with fake:
            model.to_empty(device=device_type)
        run = partial(_run, model, found, shape, fake, precision, parallel_loss)
        met, guessed = _top_k(args), "other ranks send it tokens" if layout.expert_parallel_degree > 1 else ""
        if not guessed:
            try:
                run()
            except RuntimeError as error:  # of torch: shapes that depend on values, or an operator without a fake
                if met is None:
                    raise
                guessed = first_line(error)
        if guessed:
            for block in model.layers.values():
                block.forward = _pass_on
            model.eval()  # no balance of experts that were not run
            run()
        if tensor > 1:  # again: DTensor finds out what an operator makes with tensors of its own, and remembers
            run()
        if guessed:
            _guess(model, found, batch * training.seq_len // context, tensor, met or 0, mode)
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


def _top_k(args: Any) -> int | None:
    """The experts a token is sent to, 0 if that is not said; None for models that have no experts."""
    if not isinstance(args, ModelArgs):
        return args.moe_args.top_k if has_experts(args) else None
    return top_k(args.hf_config) if any(hasattr(args.hf_config, name) for name in TOP_K_FIELDS) else None


def _parts(model: Any, expert: int) -> list[Part]:
    """A Part each for the embedding, the blocks, and everything else, the head's."""
    owners = [model.embedding, *model.layers.values()]
    owned: list[list[torch.Tensor]] = [list(owner.parameters()) for owner in owners]
    counted = {id(parameter) for own in owned for parameter in own}
    owned.append([parameter for parameter in model.parameters() if id(parameter) not in counted])
    local = [[local_tensor(p) for p in own] for own in owned]
    return [
        Part(tuple(p.shape for p in own), sum(p.nbytes // (expert if p.ndim == 3 else 1) for p in own)) for own in local
    ]


def _pass_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The forward of a block that cannot be run."""
    return hidden_states.clone()


def _run(
    model: Any, parts: list[Part], shape: tuple[int, int], fake: FakeTensorMode, precision: Any, parallel_loss: Any
) -> None:
    """One forward and backward without values, which fills in `parts`, in their order."""
    live, start = Live(), 0
    model.zero_grad()

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
    hooks = [
        block.register_forward_pre_hook(partial(enter_block, number), with_kwargs=True)
        for number, block in enumerate(blocks)
    ]
    hooks.append(blocks[-1].register_forward_hook(leave_blocks))
    try:
        with fake, torch.device(device_type):
            tokens = torch.zeros(shape, dtype=torch.int64)
            with live, parallel_loss():
                with precision:
                    loss = model(tokens, labels=tokens)
                leave_forward(parts[-1])
                loss.backward()
                leave_backward(parts[0])
    finally:
        for hook in hooks:
            hook.remove()


def _guess(model: Any, parts: list[Part], tokens: int, tensor: int, met: int, mode: str) -> None:
    """For blocks whose shapes depend on values, as those of routed experts: what each weight takes in and gives out.

    Of `tokens` of the sequences, of which a rank of `tensor` has a part where it has whole weights.
    """
    size = parts[0].gradients // parts[0].numel()
    for part, block in zip(parts[1:-1], model.layers.values(), strict=True):
        whole = 0.0
        for parameter in block.parameters():
            shape = local_tensor(parameter).shape
            cut = isinstance(parameter, DTensor) and parameter.placements[0].is_shard()
            routed = (met or shape[0]) / shape[0] if len(shape) == 3 else 1.0
            features = routed * math.prod(shape[:-2]) * sum(shape[-2:])
            whole += size * features * (tokens if cut else tokens / tensor)
        part.forward = round(whole)
        part.saved = size * tokens * model.embedding.weight.shape[1] // tensor if mode == "full" else part.forward
        part.backward = part.forward + part.gradients
