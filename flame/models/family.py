"""What flame knows about a model family, as one frozen row; no other module compares `model_type`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

Slicer = Callable[[Any, Any, int, int], Any]  # (config, parameter, rank, world_size) -> the rank's slice


@dataclass(frozen=True)
class TPPlan:
    """How tensor and context parallelism divide a block: its token mixers by heads, its MLPs by columns.

    Names of modules and parameters are those in the block; those of parameters may be fnmatch patterns.

    token_mixers: attention and what takes its place, divided by heads. mlps: modules that see one token at a time,
    divided by columns (tensor parallelism only). shard_dims: the dimension a parameter is sharded along, 0 for
    column-wise, 1 for row-wise linear layers, whose bias is added once. slicers: for parameters whose heads are not
    contiguous; every rank holds the whole parameter and computes with its slice. head_count_attrs: attributes of token
    mixers and their children that count heads. must_divide: config fields that the TP times the CP degree must divide.
    requires: config fields that must have a value.
    """

    token_mixers: tuple[str, ...]
    shard_dims: Mapping[str, int]
    must_divide: tuple[str, ...]
    mlps: tuple[str, ...] = ()
    slicers: Mapping[str, Slicer] = field(default_factory=dict)
    head_count_attrs: tuple[str, ...] = ()
    requires: Mapping[str, Any] = field(default_factory=dict)

    def shard_dim(self, name: str) -> int | None:
        """The dimension a parameter is sharded along; None: it is replicated."""
        return None if self.slicer(name) else _match(self.shard_dims, name)

    def slicer(self, name: str) -> Slicer | None:
        """The function that takes a rank's slice of a replicated parameter, if the rank computes with a slice."""
        return _match(self.slicers, name)

    def is_rowwise_bias(self, name: str) -> bool:
        """Whether a parameter is the bias of a row-wise linear layer."""
        return name.endswith(".bias") and self.shard_dim(name) is None and self.shard_dim(f"{name[:-4]}weight") == 1


def _match(patterns: Mapping[str, Any], name: str) -> Any:
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), None)


@dataclass(frozen=True)
class Family:
    """A row of the model table.

    blocks, embedding, norm: attributes of the Hugging Face backbone (`model.<base_model_prefix>`). constants:
    parameters of the backbone itself, with their initial values. mixer_flops(config, seq_len): forward FLOPs per token
    of all token mixers, without their weight matrices.
    packing: how the documents of a packed row are kept apart: by "cu_seqlens" (fla's kernels), by restarting
    "positions" (transformers makes the block-diagonal mask), by that "mask" itself, or not at all (None).
    router_loss(config, logits): the load-balancing loss of the routers' logits, one (tokens, experts) per layer.
    fused_loss: False if only transformers' own forward knows how hidden states become logits.
    tp_plan: how tensor and context parallelism divide blocks, or why they cannot. stages: True if pipeline parallelism
    can divide the model, else why not. fullgraph: whether a block compiles as one graph. compiles: whether blocks are
    compiled on a GPU unless the job says otherwise. float8: True if torchao's linear layers work, else why not.
    """

    model_types: tuple[str, ...]
    blocks: str
    embedding: str
    norm: str
    mixer_flops: Callable[[Any, int], float]
    packing: Literal["cu_seqlens", "positions", "mask"] | None
    from_fla: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)
    router_loss: Callable[[Any, Any], Any] | None = None
    fused_loss: bool = True
    fullgraph: bool = True
    compiles: bool = True
    tp_plan: TPPlan | str = "its row has no TP plan"
    stages: bool | str = True
    float8: bool | str = True


def layouts(family: Family) -> tuple[str, ...]:
    """The parallelisms that a family's models support."""
    divided = ("TP", "CP") if isinstance(family.tp_plan, TPPlan) else ()
    return ("FSDP2", "HSDP", "DDP", *divided, *(("PP",) if family.stages is True and family.fused_loss else ()))


def each_layer(config: Any) -> list[Any]:
    """The config of each layer; Gemma 4's layers differ, and its config raises for attributes they do not share."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def head_dim(layer: Any) -> int:
    """The width of an attention head, of the config of a layer with transformers' names."""
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
