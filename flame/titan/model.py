"""torchtitan's own models for flame's trainer: they take labels, and their initial weights are those of any layout."""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torchtitan.models import attention
from torchtitan.models.moe import MoEArgs, kernels
from torchtitan.models.moe import utils as moe_utils
from torchtitan.tools.utils import device_type, has_cuda_capability
from transformers import PreTrainedConfig

from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.models.hf import build_on_meta, save_assets, save_tokenizer
from flame.models.init import Unit, init_weights
from flame.models.loss import cross_entropy
from flame.models.vocabulary import fit_vocab_size
from flame.titan import hf_equivalent
from flame.titan import parallelize as parallel

_HISTC = torch.histc  # without `_replace_gpu_kernels`
_END = SimpleNamespace(eos_id=1)  # torchtitan's masks find documents by the token that ends them


def load(job_config: JobConfig, tokenizer: Any) -> dict[str, Any]:
    """The fields of a TrainSpec that depend on torchtitan's model.name and model.flavor alone.

    Raises UserError for a flavor that is not there, a tokenizer of too many ids, or a setting that does not fit.
    """
    model, training = job_config.model, job_config.training
    spec = import_module(f"torchtitan.models.{model.name}").get_train_spec()
    if model.flavor not in spec.model_args:
        raise UserError("--model.flavor", repr(model.flavor), f"one of {model.name}'s {', '.join(spec.model_args)}")
    args = copy.deepcopy(spec.model_args[model.flavor])  # torchtitan changes them, in a table that all share
    name = f"{model.name} {model.flavor}"
    args.vocab_size = fit_vocab_size(args.vocab_size, tokenizer.vocab_size, name, model.grow_vocab)
    parallel.validate(spec, args, job_config)
    description = {"model_type": f"torchtitan.{model.name}", "flavor": model.flavor, **asdict(args)}
    hf_config = hf_equivalent.equivalent_config(model.name, args)
    if not isinstance(hf_config, str):
        hf_config.max_position_embeddings = max(training.seq_len, args.max_seq_len)
        hf_config.bos_token_id, hf_config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    if experts := getattr(args, "moe_args", None):
        _limit_grouped_mm(experts, training.mixed_precision_param)
    if getattr(args, "enable_weight_tying", False):
        args.get_nparams_and_flops = partial(_count_tied, args)
    if device_type == "cpu":
        _replace_gpu_kernels()
    return {
        "model_cls": wrap_model_class(spec.model_cls, description, hf_config, job_config.debug.seed or 0),
        "model_args": {model.flavor: args},
        "parallelize_fn": partial(parallel.parallelize, spec.parallelize_fn),
        "pipelining_fn": spec.pipelining_fn and partial(parallel.pipeline, spec.pipelining_fn),
        "build_optimizers_fn": spec.build_optimizers_fn,
    }


def build(name: str, args: Any) -> nn.Module:
    """torchtitan's own model of these arguments, on the default device, as a CPU runs it on one document per row."""
    args = copy.deepcopy(args)
    args.attn_type = "sdpa"
    if hasattr(args, "moe_args"):
        args.moe_args.use_grouped_mm = False
    _replace_gpu_kernels()
    return import_module(f"torchtitan.models.{name}").get_train_spec().model_cls(args)


def wrap_model_class(model_cls: type, description: dict[str, Any], hf_config: PreTrainedConfig | str, seed: int) -> Any:
    """A torchtitan model class whose forward takes labels, and whose weights are drawn unit by unit from `seed`.

    `description` is what a run folder records of it, `hf_config` what flame.titan.hf_equivalent found.
    """

    class Titan(model_cls):
        # flame.models.causal_lm's names for them.
        embedding = property(lambda self: self.tok_embeddings)
        head = property(lambda self: self.output)

        def forward(
            self, tokens: Tensor, positions: Tensor | None = None, cu_seqlens: Any = None, labels: Tensor | None = None
        ) -> Tensor:
            """Logits (batch, seq, vocab), or with labels (batch, seq) their summed cross entropy.

            tokens: (batch, seq) int64, or the hidden states of the previous pipeline stage. positions (batch, seq)
            restart at each document, which the flavors with a mask keep apart. cu_seqlens is redundant.
            """
            masks = {}
            if positions is not None:
                ends = (positions.roll(-1, 1) == 0).long()
                masks["attention_masks"] = self.get_attention_masks(ends, _END)
            with contextlib.nullcontext() if self.training else parallel.keep_counts(self):
                output = super().forward(tokens, **masks)
            if labels is None or self.output is None:
                return output
            loss = cross_entropy(output, labels)
            return loss.full_tensor() if isinstance(loss, DTensor) else loss

        def init_weights(self, buffer_device: torch.device | None = None) -> None:
            """The same weights in every layout, of the distribution of torchtitan's own; see flame.models.init."""
            if getattr(self, "enable_weight_tying", False):
                self.output.weight = self.tok_embeddings.weight  # materialising the meta tensors has untied them
            draw = _unit_initializer(model_cls, self.model_args)
            units = [Unit(name, module, partial(draw, name)) for name, module in _units(self)]
            units.append(Unit("", _own_buffers(self), partial(draw, "")))
            init_weights(self, units, lambda _: None, seed, buffer_device=buffer_device)

        def save_assets(self, folder: Path, tokenizer: Any) -> None:
            """Write the model's description and the tokenizer; config.json is transformers' if it has such a model."""
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(hf_config, str):
                save_tokenizer(folder, tokenizer)
            else:
                save_assets(folder, build_on_meta(hf_config, "that of torchtitan's model"), tokenizer)
            name = "config.json" if isinstance(hf_config, str) else hf_equivalent.TITAN_CONFIG
            (folder / name).write_text(json.dumps(description, indent=2) + "\n")

    Titan.description, Titan.hf_equivalent = description, hf_config
    return Titan


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a torchtitan model, and its other children."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            yield from ((f"{name}.{key}", block) for key, block in child.items())
        else:
            yield name, child


def _unit_initializer(model_cls: type, args: Any) -> Callable[[str], nn.Module]:
    """A function that builds one unit with new weights, by the model's own init_weights; "": its buffers."""
    with torch.device("meta"):
        frame = model_cls(args)
    units = dict(_units(frame))
    for name, child in list(frame.named_children()):
        setattr(frame, name, nn.ModuleDict() if isinstance(child, nn.ModuleDict) else None)
    frame.enable_weight_tying = False  # or Qwen3 needs both ends at once; the tied head is drawn last, as in its own

    def draw(name: str) -> nn.Module:
        device = torch.get_default_device()
        if not name:
            frame.init_weights(device)
            return _own_buffers(frame)
        owner, _, key = name.rpartition(".")
        parent = frame.get_submodule(owner)
        parent._modules[key] = unit = units[name].to_empty(device=device)
        frame.init_weights(device)
        parent._modules.pop(key) if owner else parent._modules.update({key: None})
        return unit

    return draw


def _own_buffers(model: nn.Module) -> nn.Module:
    """A module with the buffers that a model holds itself."""
    holder = nn.Module()
    for name, buffer in model.named_buffers(recurse=False):
        holder.register_buffer(name, buffer)
    return holder


def _limit_grouped_mm(experts: MoEArgs, dtype: str) -> None:
    """Workaround for torchtitan 0.2.2, models/moe/moe.py, _run_experts_grouped_mm: it casts to bfloat16 in any job.

    Effect: experts run one by one unless the job computes in bfloat16, on a GPU that has the kernel.
    """
    experts.use_grouped_mm &= has_cuda_capability(9, 0) and dtype == "bfloat16"


def _count_tied(args: Any, model: Any, seq_len: int) -> tuple[int, int]:
    """Workaround for torchtitan 0.2.2, models/utils.py, get_moe_model_nparams_and_flops, which leaves out tied weights.

    Effect: the table of embedding and head counts as parameters once, and as the FLOPs of the head.
    """
    parameters, flops = type(args).get_nparams_and_flops(args, model, seq_len)
    tied = model.tok_embeddings.weight.numel()
    return parameters + tied, flops + 6 * tied


def _replace_gpu_kernels() -> None:
    """Workaround for torchtitan 0.2.2, whose models need a GPU; the functions below compute the same on a CPU.

    models/moe/moe.py, TokenChoiceTopKRouter.forward: torch.histc of whole numbers. models/moe/kernels.py,
    generate_permute_indices: a Triton kernel. models/attention.py: torch.compile of flex_attention.
    """
    torch.histc = _histc  # type: ignore[assignment]
    moe_utils.generate_permute_indices = partial(kernels.generate_permute_indices, use_cpu=True)
    attention._compiled_create_block_mask = create_block_mask
    attention.FlexAttentionWrapper._compiled_flex_attn = _flex_attention


def _histc(values: Tensor, bins: int, min: float, max: float) -> Tensor:
    return _HISTC(values.float(), bins, min, max).to(values.dtype)


def _flex_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float | None, enable_gqa: bool, return_lse: bool
) -> Tensor:
    assert not return_lse, "no supported model needs it"
    batch, heads, queries, keys = block_mask.shape
    mask = create_mask(block_mask.mask_mod, batch, heads, queries, keys, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
