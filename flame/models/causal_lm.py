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
import torch.nn.functional as F
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.protocols import BaseModelArgs, ModelProtocol
from transformers import PreTrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from flame.config.schema import JobConfig
from flame.models import varlen
from flame.models.family import Family
from flame.models.flops import active_params, flops_per_token
from flame.models.hf import build_hf, known_packing, save_assets
from flame.models.init import Unit, init_weights
from flame.models.loss import Head, TiedHead, cross_entropy
from flame.runtime.device import upload


@dataclass
class ModelArgs(BaseModelArgs):
    """What torchtitan's Trainer needs before the model is built; completed by `update_from_config`."""

    config: dict[str, Any] | None = None  # the HF config, for torchtitan's start-up log
    seed: int = 0

    @property
    def n_layers(self) -> int:
        """torchtitan's name for the number of blocks, which it divides over pipeline stages."""
        return self.hf_config.num_hidden_layers

    def bind(
        self, family: Family, hf_config: PreTrainedConfig, generation: dict[str, Any] | None = None
    ) -> "ModelArgs":
        """Set the model and its generation_config.json; not as fields, which torchtitan prints as JSON."""
        self.hf_family, self.hf_config, self.generation = family, hf_config, generation
        self.config = json.loads(hf_config.to_json_string(use_diff=True))
        return self

    def update_from_config(self, job_config: JobConfig, **_: Any) -> None:
        self.seed = job_config.debug.seed or 0

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """The number of parameters, and training FLOPs per token at rows of `seq_len`."""
        assert isinstance(model, CausalLM)
        active = active_params(model, self.hf_config, model.embedding if model.tied else None)
        flops = flops_per_token(self.hf_family, self.hf_config, active, seq_len)
        return sum(p.numel() for p in model.parameters()), flops


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
        self.sequence_shard = (0, 1)  # the rank's shard of each sequence after the blocks, and the number of shards
        hf = build_hf(args.hf_config)
        # Not a child: its children are registered below, under their names. It keeps `_init_weights` and its forward.
        self.__dict__["hf"] = hf
        linear = hf.get_output_embeddings()
        # LightNet's class does not name its backbone.
        self.prefix = hf.base_model_prefix or next(name for name, child in hf.named_children() if child is not linear)
        self.head_name = next(name for name, child in hf.named_children() if child is linear)
        self.tied = bool(getattr(args.hf_config, "tie_word_embeddings", False))
        if self.tied:
            head: Head | TiedHead = TiedHead(lambda: self.embedding.weight)
        else:
            head = Head(linear.in_features, linear.out_features, bias=linear.bias is not None)
        head.l2warp = bool(getattr(args.hf_config, "use_l2warp", False))
        setattr(hf, self.head_name, head)
        self._modules.update(hf.named_children())  # not add_module: Mamba calls its own child "backbone"
        blocks = getattr(self.backbone, family.blocks)
        setattr(self.backbone, family.blocks, Blocks({str(i): block for i, block in enumerate(blocks)}))

        # How to rebuild each part; recorded now, because AC, compile and FSDP change classes and wrap modules.
        config = args.hf_config
        self.__dict__["build"] = {
            **{f"{family.blocks}.{i}": partial(block.__class__, config, i) for i, block in enumerate(blocks)},
            **{name: _builder(child, config) for name, child in self.parts() if name != family.blocks},
        }

    @property
    def backbone(self) -> Any:
        return self._modules[self.prefix]

    @property
    def embedding(self) -> nn.Embedding:
        return getattr(self.backbone, self.family.embedding)

    @property
    def head(self) -> nn.Module | None:
        return self._modules[self.head_name]

    # The names torchtitan's apply_fsdp and apply_ac expect. Tied weights must live in one FSDP group, the root's: the
    # embedding and the head are then hidden from it, as they are where transformers' own forward uses them in any way.
    @property
    def tok_embeddings(self) -> nn.Module | None:
        return self.embedding if self._has_own_groups else None

    @property
    def layers(self) -> Blocks:
        return getattr(self.backbone, self.family.blocks)

    @property
    def norm(self) -> nn.Module | None:
        norm = getattr(self.backbone, self.family.norm)
        return None if isinstance(norm, nn.Identity) else norm

    @property
    def output(self) -> nn.Module | None:
        return self.head if self._has_own_groups else None

    @property
    def _has_own_groups(self) -> bool:
        return self.family.fused_loss and not self.tied

    def keep_stage(self, parts: set[str], blocks: dict[str, nn.Module]) -> None:
        """Become a pipeline stage of these blocks and, of "tok_embeddings", "norm" and "output", these parts."""
        setattr(self.backbone, self.family.blocks, Blocks(blocks))
        if "tok_embeddings" not in parts:
            setattr(self.backbone, self.family.embedding, None)
            for name, child in list(self.backbone.named_children()):
                if isinstance(child, nn.Dropout):  # GPT-NeoX's, of the embeddings
                    setattr(self.backbone, name, nn.Identity())
        if "norm" not in parts:
            setattr(self.backbone, self.family.norm, nn.Identity())  # transformers calls it in any case
        if "output" not in parts:
            setattr(self, self.head_name, None)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (batch, seq, vocab), or with labels (batch, seq) their summed cross entropy.

        tokens: (batch, seq) int64, or hidden states (batch, seq, hidden) of the pipeline stage before. For packed
        documents, `positions` (batch, seq) restart at each document, and `cu_seqlens` (documents + 1,) are their
        boundaries in the flattened batch. In training, if the config has `output_router_logits`, the sum includes the
        routers' balance loss x `router_aux_loss_coef` x the number of labels, so that the mean is transformers' loss.
        """
        if not self.family.fused_loss:
            with known_packing(False):
                output = self.hf(input_ids=tokens, use_cache=False)
            if labels is None:
                return output.logits
            loss = cross_entropy(output.logits, self._own_shard(labels))
            return self._add_balance(loss, labels, getattr(output, "aux_loss", None))
        shape = tokens.shape[:2]
        packing: dict[str, Any] = {}
        if positions is not None and self.family.packing == "cu_seqlens":
            tokens = tokens.reshape(1, -1, *tokens.shape[2:])  # fla's kernels take one long row
            packing = {"cu_seqlens": _boundaries(positions) if cu_seqlens is None else cu_seqlens}
        elif positions is not None:
            packing = {"position_ids": positions}
            if self.family.packing == "mask":
                packing["attention_mask"] = _document_mask(positions)
            elif self._takes_boundaries:
                packing |= _flash_varlen(_boundaries(positions) if cu_seqlens is None else cu_seqlens, shape[1])
        elif self.hf.config._attn_implementation == varlen.IMPLEMENTATION:  # each row is a document
            rows = torch.arange(0, shape.numel() + 1, shape[1], dtype=torch.int32, device=tokens.device)
            packing = _flash_varlen(rows, shape[1])
        router_loss = self.family.router_loss if labels is not None and self._trains_balance else None
        if router_loss is not None:
            packing["output_router_logits"] = True
        name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        with known_packing("position_ids" in packing):
            output = self.backbone(**{name: tokens}, use_cache=False, **packing)
        hidden = output[0]
        if self.head is None:
            hidden = hidden.view(*shape, -1)
            return hidden.clone() if hidden._is_view() else hidden  # zero-bubble schedules detach it in place
        if labels is None:
            return self.head(hidden).view(*shape, -1)
        loss = self.head(hidden, self._own_shard(labels.reshape(len(hidden), -1)))
        if router_loss is None:
            return loss
        return self._add_balance(loss, labels, router_loss(self.hf.config, output.router_logits))

    @property
    def _takes_boundaries(self) -> bool:
        # These functions take no mask, and read no positions of several rows.
        config = self.hf.config
        return is_flash_attention_requested(config) or config._attn_implementation == varlen.IMPLEMENTATION

    def _own_shard(self, labels: torch.Tensor) -> torch.Tensor:
        shard, count = self.sequence_shard
        return labels.chunk(count, 1)[shard]

    @property
    def _trains_balance(self) -> bool:
        # Not in validation, whose loss is that of the tokens, however they are batched.
        return self.training and bool(getattr(self.hf.config, "output_router_logits", False))

    def _add_balance(self, loss: torch.Tensor, labels: torch.Tensor, balance: torch.Tensor | None) -> torch.Tensor:
        if balance is None or not self._trains_balance:
            return loss
        return loss + self.hf.config.router_aux_loss_coef * balance * (labels != IGNORE_INDEX).sum()

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """The same weights in every layout; see flame.models.init."""
        blocks, head = self.family.blocks, self._modules[self.head_name]
        units = [Unit(f"{blocks}.{i}", block, self.build[f"{blocks}.{i}"]) for i, block in self.layers.items()]
        others = ((name, part) for name, part in self.parts() if name not in (blocks, self.head_name))
        units += [Unit(name, part, self.build[name]) for name, part in others]
        units += [Unit(self.head_name, head, self._build_head)] if head is not None else []
        constants = {f"{self.prefix}.{name}": value for name, value in self.family.constants.items()}
        init_weights(self, units, self.hf._init_weights, self.model_args.seed, constants, buffer_device)
        setattr(self.hf, self.head_name, head)

    def _build_head(self) -> nn.Module:
        head = self.build[self.head_name]()
        setattr(self.hf, self.head_name, head)  # RWKV-7's _init_weights has a rule for the module `self.lm_head`
        return head

    def save_assets(self, folder: Path, tokenizer: Any) -> None:
        """Write what the run trains: transformers' config.json, and the tokenizer."""
        save_assets(folder, self.hf, tokenizer, self.model_args.generation)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The children of the backbone and the head, by name, without those a pipeline stage lacks."""
        yield from ((name, part) for name, part in self.backbone.named_children() if not isinstance(part, nn.Identity))
        yield from ((name, child) for name, child in self.named_children() if name != self.prefix)


def _document_mask(positions: torch.Tensor) -> torch.Tensor:
    """The earlier tokens that each token sees, (batch, 1, seq, seq), from positions that restart at documents."""
    document = (positions == 0).cumsum(-1)
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]


def _flash_varlen(cu_seqlens: torch.Tensor, seq_len: int) -> dict[str, Any]:
    """transformers' FlashAttentionKwargs for documents within rows of `seq_len`."""
    longest = varlen.longest(cu_seqlens, seq_len)
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest}


def _boundaries(positions: torch.Tensor) -> torch.Tensor:
    """cu_seqlens of a pipeline's microbatch, int32 (documents + 1,), from positions that restart at documents."""
    starts = (positions.flatten().cpu() == 0).nonzero().flatten()  # on the host, which waits here and not in each layer
    return upload(F.pad(starts, (0, 1), value=positions.numel()).int(), positions.device)


def _builder(part: nn.Module, config: PreTrainedConfig) -> Any:
    if not any(True for _ in part.parameters()) and any(True for _ in part.buffers()):
        return partial(type(part), config=config)  # rotary tables: only their constructor can compute them
    return partial(_empty_copy, copy.deepcopy(part))


def _empty_copy(part: nn.Module) -> nn.Module:
    empty = copy.deepcopy(part).to_empty(device=torch.get_default_device())
    for module in empty.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # what transformers had set is gone
    return empty
