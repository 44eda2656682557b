"""torchtitan's own models as flame's trainer wants them: they take labels, and begin alike in every layout."""

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
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torchtitan.models import attention
from torchtitan.models.moe import kernels
from torchtitan.models.moe import utils as moe_utils
from torchtitan.tools.utils import device_type, has_cuda_capability
from transformers import PreTrainedConfig

from flame.errors import UserError
from flame.models.hf import VOCAB_MULTIPLE, build_on_meta, save_assets
from flame.models.init import Unit, init_weights
from flame.models.loss import cross_entropy
from flame.titan import hf_equivalent
from flame.titan import parallelize as parallel

_HISTC = torch.histc  # as it is without `_enable_cpu`
_END = SimpleNamespace(eos_id=1)  # torchtitan's masks find documents by the token that ends them


def load(job_config: Any, tokenizer: Any) -> dict[str, Any]:
    """What a TrainSpec says of the model alone, for torchtitan's model.name and model.flavor. Raises UserError."""
    model, training = job_config.model, job_config.training
    spec = import_module(f"torchtitan.models.{model.name}").get_train_spec()
    if model.flavor not in spec.model_args:
        raise UserError(f"--model.flavor: found {model.flavor!r}, {model.name} has {', '.join(spec.model_args)}")
    args = copy.deepcopy(spec.model_args[model.flavor])  # which torchtitan changes, in a table that all share
    if tokenizer.vocab_size > args.vocab_size:
        if not model.grow_vocab:
            raise UserError(
                f"--model.tokenizer_path: the tokenizer has {tokenizer.vocab_size} ids but {model.name} {model.flavor} "
                f"has room for {args.vocab_size}; use a smaller tokenizer or set --model.grow_vocab"
            )
        args.vocab_size = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    parallel.check(spec, args, job_config)
    description = {"model_type": f"torchtitan.{model.name}", "flavor": model.flavor, **asdict(args)}
    published = hf_equivalent.equivalent_config(model.name, args)
    if not isinstance(published, str):
        published.max_position_embeddings = max(training.seq_len, args.max_seq_len)
        published.bos_token_id, published.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    if experts := getattr(args, "moe_args", None):  # torch's grouped matrix product computes in bfloat16 alone
        experts.use_grouped_mm &= has_cuda_capability(9, 0) and training.mixed_precision_param == "bfloat16"
    if getattr(args, "enable_weight_tying", False):
        args.get_nparams_and_flops = partial(_count_tied, args)
    if device_type == "cpu":
        _enable_cpu()
    return {
        "model_cls": wrap_model_class(spec.model_cls, description, published, job_config.debug.seed or 0),
        "model_args": {model.flavor: args},
        "parallelize_fn": partial(parallel.parallelize, spec.parallelize_fn),
        "pipelining_fn": spec.pipelining_fn and partial(parallel.pipeline, spec.pipelining_fn),
        "build_optimizers_fn": spec.build_optimizers_fn,
    }


def _count_tied(args: Any, model: Any, seq_len: int) -> tuple[int, int]:
    """Mend of torchtitan 0.2.2: of an embedding that is the head as well it counts neither."""
    parameters, flops = type(args).get_nparams_and_flops(args, model, seq_len)
    tied = model.tok_embeddings.weight.numel()
    return parameters + tied, flops + 6 * tied


def build(name: str, args: Any) -> nn.Module:
    """torchtitan's own model of these arguments, on the default device, as a CPU runs it on one document a row."""
    args = copy.deepcopy(args)
    args.attn_type = "sdpa"
    if hasattr(args, "moe_args"):
        args.moe_args.use_grouped_mm = False
    _enable_cpu()
    return import_module(f"torchtitan.models.{name}").get_train_spec().model_cls(args)


def wrap_model_class(model_cls: type, description: dict[str, Any], published: PreTrainedConfig | str, seed: int) -> Any:
    """A torchtitan model class whose forward takes labels, and whose weights are drawn part by part from `seed`.

    `description` is what a run folder keeps of the model, and `published` what flame.titan.hf_equivalent found for it.
    """

    class Titan(model_cls):
        # flame.models.causal_lm's names for them.
        embedding = property(lambda self: self.tok_embeddings)
        head = property(lambda self: self.output)

        def forward(
            self,
            tokens: torch.Tensor,
            positions: torch.Tensor | None = None,
            cu_seqlens: torch.Tensor | None = None,
            labels: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """Logits (batch, seq, vocab), or with labels (batch, seq) their summed cross entropy.

            tokens: (batch, seq) int64, or the hidden states of the pipeline's stage before. positions (batch, seq)
            restart at each document, which the flavors with a mask keep apart. cu_seqlens say the same again.
            """
            masks = {}
            if positions is not None:
                ends = (positions.roll(-1, 1) == 0).long()
                masks["attention_masks"] = self.get_attention_masks(ends, _END)
            with contextlib.nullcontext() if self.training else parallel.kept_counts(self):
                output = super().forward(tokens, **masks)
            if labels is None or self.output is None:
                return output
            loss = cross_entropy(output, labels)
            return loss.full_tensor() if isinstance(loss, DTensor) else loss

        def init_weights(self, buffer_device: torch.device | None = None) -> None:
            """The same weights in every layout, of the distribution of torchtitan's own; see flame.models.init."""
            if getattr(self, "enable_weight_tying", False):
                self.output.weight = self.tok_embeddings.weight  # which the way from the meta device has parted
            draw = _part_by_part(model_cls, self.model_args)
            units = [Unit(name, part, partial(draw, name)) for name, part in _parts(self)]
            init_weights(self, [*units, Unit("", _own_buffers(self), partial(draw, ""))], lambda _: None, seed)
            for module in self.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(buffer_device or buffer.device))

        def save_assets(self, folder: Path, tokenizer: Any) -> None:
            """Write what the run trains, and the tokenizer: config.json is transformers' if it has such a model."""
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(published, str):
                tokenizer.save_pretrained(folder)
            else:
                save_assets(folder, build_on_meta(published, "that of torchtitan's model"), tokenizer)
            name = "config.json" if isinstance(published, str) else hf_equivalent.TITAN_CONFIG
            (folder / name).write_text(json.dumps(description, indent=2) + "\n")

    Titan.description, Titan.hf_equivalent = description, published
    return Titan


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a torchtitan model, and its other children."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            yield from ((f"{name}.{key}", block) for key, block in child.items())
        else:
            yield name, child


def _part_by_part(model_cls: type, args: Any) -> Callable[[str], nn.Module]:
    """A function that draws one part of the model anew, by the model's own init_weights; "": its buffers."""
    with torch.device("meta"):
        frame = model_cls(args)
    parts = dict(_parts(frame))
    for name, child in list(frame.named_children()):
        setattr(frame, name, nn.ModuleDict() if isinstance(child, nn.ModuleDict) else None)
    frame.enable_weight_tying = False  # Qwen3's asks for both ends at once; what a tied head draws comes last, as there

    def draw(name: str) -> nn.Module:
        device = torch.get_default_device()
        if not name:
            frame.init_weights(device)
            return _own_buffers(frame)
        owner, _, key = name.rpartition(".")
        place = frame.get_submodule(owner)
        place._modules[key] = part = parts[name].to_empty(device=device)
        frame.init_weights(device)
        place._modules.pop(key) if owner else place._modules.update({key: None})
        return part

    return draw


def _own_buffers(model: nn.Module) -> nn.Module:
    """A module with the buffers that a model holds itself."""
    holder = nn.Module()
    for name, buffer in model.named_buffers(recurse=False):
        holder.register_buffer(name, buffer)
    return holder


def _enable_cpu() -> None:
    """Put PyTorch in the place of kernels that only a GPU has; what they compute is the same."""
    torch.histc = _count  # type: ignore[assignment]
    moe_utils.generate_permute_indices = partial(kernels.generate_permute_indices, use_cpu=True)
    attention._compiled_create_block_mask = create_block_mask
    attention.FlexAttentionWrapper._compiled_flex_attn = _attend


def _count(values: torch.Tensor, bins: int, min: float, max: float) -> torch.Tensor:
    return _HISTC(values.float(), bins, min, max).to(values.dtype)  # whole numbers are counted on a GPU alone


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> torch.Tensor:
    assert not return_lse, "the models that ask for it are refused"
    batch, heads, queries, keys = block_mask.shape
    mask = create_mask(block_mask.mask_mod, batch, heads, queries, keys, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
