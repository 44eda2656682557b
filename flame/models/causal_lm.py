"""A Hugging Face causal language model as a torchtitan model: HF's parameter names, torchtitan's module names."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torchtitan.protocols import BaseModelArgs, ModelProtocol
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flame.errors import UserError
from flame.models import reference
from flame.models.family import Family
from flame.models.flops import flops_per_token
from flame.models.init import Unit, init_weights
from flame.models.loss import Head, TiedHead
from flame.models.table import family_of

VOCAB_MULTIPLE = 64  # a grown vocabulary is rounded up to this: tensor cores and TP like it


def load_hf_config(
    source: str, *, tokenizer: Any = None, grow_vocab: bool = False, trust_remote_code: bool = False
) -> tuple[Family, PreTrainedConfig]:
    """The family and Hugging Face config of a JSON file, a local HF folder or a hub id.

    With a tokenizer, its special ids go into the config, and it must fit the embedding table or `grow_vocab` be set.
    Raises UserError.
    """
    try:
        if Path(source).is_file():
            fields = json.loads(Path(source).read_text())
        else:
            fields, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UserError(f"--model.config: cannot read {source}: {_first_line(error)}") from None
    family = family_of(fields.get("model_type", ""))
    if family.from_fla:
        reference.enable()  # imports fla, whose model types must be known before transformers looks them up
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config class says of its fields is the user's to mend
        raise UserError(f"--model.config {source}: {_first_line(error)}") from None
    if tokenizer is not None:
        _fit_to_tokenizer(config, tokenizer, grow_vocab)
    return family, config


def check_buildable(config: PreTrainedConfig, source: str) -> None:
    """Build the model without memory, and refuse with one line what its constructor refuses. Raises UserError."""
    if config.num_hidden_layers < 1:
        raise UserError(f"--model.config {source}: num_hidden_layers is {config.num_hidden_layers}, must be 1 or more")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise UserError(f"--model.config {source} cannot be built: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _fit_to_tokenizer(config: PreTrainedConfig, tokenizer: Any, grow_vocab: bool) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        if not grow_vocab:
            raise UserError(
                f"--model.tokenizer_path: the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is "
                f"{config.vocab_size}; use a smaller tokenizer, raise vocab_size, or set --model.grow_vocab"
            )
        config.vocab_size = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    config.bos_token_id, config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id


@dataclass
class ModelArgs(BaseModelArgs):
    """What torchtitan's Trainer needs before the model is built; filled by `update_from_config`."""

    config: dict[str, Any] | None = None  # the HF config, for torchtitan's start-up log
    seed: int = 0

    def bind(self, family: Family, hf_config: PreTrainedConfig) -> "ModelArgs":
        """Give the arguments their model; kept out of the dataclass fields, which torchtitan prints as JSON."""
        self.hf_family, self.hf_config = family, hf_config
        self.config = json.loads(hf_config.to_json_string(use_diff=True))
        return self

    def update_from_config(self, job_config: Any, **_: Any) -> None:
        self.seed = job_config.debug.seed or 0

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and training FLOPs a token at rows of `seq_len`."""
        assert isinstance(model, CausalLM)
        parameters = sum(p.numel() for p in model.parameters())
        table = 0 if model.tied else model.embedding.weight.numel()
        return parameters, flops_per_token(self.hf_family, self.hf_config, parameters - table, seq_len)


class Blocks(nn.ModuleDict):
    """Blocks that HF iterates and slices like a list and torchtitan walks like a dict (`layers.items()`)."""

    def __iter__(self) -> Iterator[nn.Module]:  # type: ignore[override]
        return iter(self._modules.values())

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._modules[key]
        return list(self._modules.values())[key]


class CausalLM(ModelProtocol):
    """`AutoModelForCausalLM.from_config` with the attributes torchtitan's parallelisms look for.

    The children are HF's own under HF's own names, so a state dict's keys are HF's keys and conversion is the
    identity. `tok_embeddings`, `layers`, `norm` and `output` are views on them.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.model_args = args
        self.family = family = args.hf_family
        hf = AutoModelForCausalLM.from_config(args.hf_config)
        self.__dict__["hf"] = hf  # not a child: its backbone is registered below, its `_init_weights` is used
        self.prefix = hf.base_model_prefix
        self.add_module(self.prefix, hf.base_model)
        blocks = getattr(self.backbone, family.blocks)
        setattr(self.backbone, family.blocks, Blocks({str(i): block for i, block in enumerate(blocks)}))

        linear = hf.get_output_embeddings()
        self.head_name = next(name for name, child in hf.named_children() if child is linear)
        self.tied = bool(getattr(args.hf_config, "tie_word_embeddings", False))
        if self.tied:
            head: nn.Module = TiedHead(lambda: self.embedding.weight)
        else:
            head = Head(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.add_module(self.head_name, head)

        # How to build each part anew; recorded now, because AC, compile and FSDP change classes and wrap modules.
        config = args.hf_config
        self.__dict__["build"] = {
            **{f"{family.blocks}.{i}": partial(block.__class__, config, i) for i, block in enumerate(blocks)},
            **{name: _builder(child, config) for name, child in self._parts() if name != family.blocks},
        }

    @property
    def backbone(self) -> Any:
        return self._modules[self.prefix]

    @property
    def embedding(self) -> nn.Embedding:
        return getattr(self.backbone, self.family.embedding)

    # The names torchtitan's apply_fsdp and apply_ac expect. Tied weights must live in one FSDP group, the root's: the
    # embedding and the head are then hidden from it.
    @property
    def tok_embeddings(self) -> nn.Module | None:
        return None if self.tied else self.embedding

    @property
    def layers(self) -> Blocks:
        return getattr(self.backbone, self.family.blocks)

    @property
    def norm(self) -> nn.Module:
        return getattr(self.backbone, self.family.norm)

    @property
    def output(self) -> nn.Module | None:
        return None if self.tied else self._modules[self.head_name]

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (batch, seq, vocab), or with labels (batch, seq) their summed cross entropy.

        tokens: (batch, seq) int64. Of packed documents, `positions` (batch, seq) restart at each document, and
        `cu_seqlens` (documents + 1,) are their boundaries in the flattened batch.
        """
        shape, packing = tokens.shape, {}
        if cu_seqlens is not None and self.family.packing == "cu_seqlens":
            tokens, packing = tokens.view(1, -1), {"cu_seqlens": cu_seqlens}  # fla's kernels take one long row
        elif positions is not None:
            packing = {"position_ids": positions}
        hidden = self.backbone(input_ids=tokens, use_cache=False, **packing)[0].view(*shape, -1)
        return self._modules[self.head_name](hidden, labels)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """The same weights in every layout; see flame.models.init."""
        blocks = self.family.blocks
        units = [Unit(f"{blocks}.{i}", block, self.build[f"{blocks}.{i}"]) for i, block in self.layers.items()]
        units += [Unit(name, child, self.build[name]) for name, child in self._parts() if name != blocks]
        init_weights(self, units, self.hf._init_weights, self.model_args.seed)

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.backbone.named_children()
        yield self.head_name, self._modules[self.head_name]


def _builder(part: nn.Module, config: PreTrainedConfig) -> Any:
    if not any(True for _ in part.parameters()) and any(True for _ in part.buffers()):
        return partial(type(part), config=config)  # rotary tables: only their constructor can compute them
    return partial(_emptied, copy.deepcopy(part))


def _emptied(part: nn.Module) -> nn.Module:
    empty = copy.deepcopy(part).to_empty(device=torch.get_default_device())
    for tensor in (*empty.parameters(), *empty.buffers()):
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))  # what `_init_weights` forgets must show
    return empty
