"""What flame must know of a model family: one frozen row, and no `if model_type ==` anywhere else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

Pick = Callable[[Any, Any, int, int], Any]  # (config, parameter, rank, ranks) -> the rank's part of the parameter


@dataclass(frozen=True)
class Cut:
    """How blocks are cut by heads and columns over ranks. Modules and parameters are named as in the block.

    `mixers` are the modules that mix tokens, head by head; `columns` those that work column by column on each token
    alone. `split` is the dimension along which a parameter (a pattern) is cut: 0 for heads or columns, 1 for the inputs
    of a sum, whose bias is added once. `picks` are for parameters whose heads lie otherwise: every rank keeps all of it
    and computes with its part. `counts` are attributes of mixers and their children that count heads, `divides` the
    config's fields that the number of ranks must divide, `needs` those that must have a value.
    """

    mixers: tuple[str, ...]
    split: Mapping[str, int]
    divides: tuple[str, ...]
    columns: tuple[str, ...] = ()
    picks: Mapping[str, Pick] = field(default_factory=dict)
    counts: tuple[str, ...] = ()
    needs: Mapping[str, Any] = field(default_factory=dict)

    def dimension(self, name: str) -> int | None:
        """The dimension along which a parameter is cut; None: every rank has all of it."""
        return None if self.pick(name) else _find(self.split, name)

    def pick(self, name: str) -> Pick | None:
        """How a rank picks its part of a parameter it has all of, if it computes with a part."""
        return _find(self.picks, name)

    def is_summed(self, name: str) -> bool:
        """Whether the parameter is the bias of a sum over the ranks."""
        return name.endswith(".bias") and self.dimension(name) is None and self.dimension(f"{name[:-4]}weight") == 1


def _find(patterns: Mapping[str, Any], name: str) -> Any:
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), None)


@dataclass(frozen=True)
class Family:
    """A row of the model table.

    `blocks`, `embedding`, `norm` are attribute names on the Hugging Face backbone (`model.<base_model_prefix>`);
    `constants` are parameters the backbone itself holds, with the value each begins with.
    `mixer_flops(config, seq_len)` is the forward FLOPs a token spends in all token mixers beyond their weight
    matrices.
    `packing` says how documents of a packed row are told apart: by "cu_seqlens" (fla's kernels), by restarting
    "positions" (transformers builds the block-diagonal mask from them), by that "mask" itself, or not at all (None).
    `router_loss(config, logits)` is the load-balancing loss of the routers' logits, one (tokens, experts) a layer.
    `fused_loss` is False where only transformers' own forward knows how hidden states become logits.
    `cut` is how blocks are divided over ranks by heads and columns (tensor and context parallelism), and `stages`
    whether the model is divided by blocks (pipeline parallelism), or else why not; `fullgraph` says whether a block
    compiles as one graph. `float8` says why linear layers cannot be torchao's, if they cannot.
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
    cut: Cut | str = "its row does not say how heads are divided"
    stages: bool | str = True
    float8: bool | str = True


def layouts(family: Family) -> tuple[str, ...]:
    """The ways in which ranks may share the work of a family's models."""
    cut = ("TP", "CP") if isinstance(family.cut, Cut) else ()
    return ("FSDP2", "HSDP", "DDP", *cut, *(("PP",) if family.stages is True and family.fused_loss else ()))


def each_layer(config: Any) -> list[Any]:
    """The config of each layer: Gemma 4's refuses to be asked for what its layers do not share."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def attention_flops(width: int, seq_len: int, window: int | None = None, value_width: int | None = None) -> float:
    """Forward FLOPs a token of one layer of causal softmax attention: QK^T and AV, 2 FLOPs a MAC.

    `width` is heads x head_dim of the queries (`value_width` of the values, where it differs); a token sees half the
    row on average, or the `window` tokens before it.
    """
    seen = seq_len / 2
    if window is not None and window < seq_len:
        seen = window - window**2 / (2 * seq_len)
    return 2 * (width + (width if value_width is None else value_width)) * seen


def state_flops(heads: float, d_k: float, d_v: float, passes: int = 2) -> float:
    """Forward FLOPs a token of one layer whose state is `heads` matrices (d_k, d_v): 2 a MAC, one an entry and pass.

    The recurrence is what counts, however a kernel computes it: a write k v^T and a read q S are two passes. Gates
    and decays are elementwise and count nothing.
    """
    return passes * 2 * heads * d_k * d_v
