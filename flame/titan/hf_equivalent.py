"""transformers' models that compute what torchtitan's do: their configs, and which tensor is which."""

import copy
import json
import re
from dataclasses import is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from flame.checkpoint.structure import PublishedTensor, Structure, name_tensors, whole
from flame.errors import UserError

TITAN_CONFIG = "torchtitan.json"  # beside a config.json: the model of torchtitan that is trained
# Their rotary embedding turns neighbouring numbers of a head, where that of transformers turns its halves.
_INTERLEAVED_ROPE = {"llama3": {"q_proj": "n_heads", "k_proj": "n_kv_heads"}}
_NO_EQUIVALENT = {
    "deepseek_v3": "transformers' DeepSeek-V3 norms its latents with an epsilon of 1e-6, whatever its config says",
    "llama4": "transformers' Llama 4 has no bias that balances the experts",
}


def equivalent_config(name: str, args: Any) -> PreTrainedConfig | str:
    """The config under which transformers computes what torchtitan's model of these arguments does, or why none is."""
    if name in _NO_EQUIVALENT:
        return _NO_EQUIVALENT[name]
    return {"llama3": _llama, "qwen3": _qwen}[name](args)


def _llama(args: Any) -> PreTrainedConfig:
    with torch.device("meta"):
        block = import_module("torchtitan.models.llama3.model.model").TransformerBlock(0, args)
    scaling = args.rope_scaling_args
    rope = {
        "rope_type": "llama3",
        "rope_theta": args.rope_theta,
        "factor": scaling.scaling_factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    return LlamaConfig(**_sizes(args), intermediate_size=block.feed_forward.w1.out_features, rope_parameters=rope)


def _qwen(args: Any) -> PreTrainedConfig | str:
    if not args.qk_norm:
        return "transformers' Qwen3 has norms of queries and keys"
    fields = {
        **_sizes(args),
        "head_dim": args.head_dim,
        "intermediate_size": args.hidden_dim,
        "tie_word_embeddings": args.enable_weight_tying,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
    }
    if not args.moe_enabled:
        return Qwen3Config(**fields)
    experts = args.moe_args
    theirs = replace(
        experts,
        **{"num_shared_experts": 0, "score_func": "softmax", "route_scale": 1.0, "gate_bias": False},
        **{"score_before_experts": False, "num_expert_groups": None},
    )
    if experts != theirs:
        return "transformers' Qwen3 has no such experts"
    return Qwen3MoeConfig(
        **fields,
        moe_intermediate_size=args.moe_inter_dim,
        num_experts=experts.num_experts,
        num_experts_per_tok=experts.top_k,
        norm_topk_prob=experts.route_norm,
    )


def _sizes(args: Any) -> dict[str, Any]:
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_seq_len,
    }


def read_recorded_model(folder: Path) -> tuple[str, Any] | None:
    """The name and arguments of the model of torchtitan that a run recorded in a folder; None if it was another.

    Raises UserError if transformers has no such model.
    """
    path = next((path for name in (TITAN_CONFIG, "config.json") if (path := folder / name).is_file()), None)
    fields = json.loads(path.read_text()) if path else {}
    _, _, name = str(fields.get("model_type")).partition("torchtitan.")
    if not name:
        return None
    args = copy.deepcopy(next(iter(_spec(name).model_args.values())))
    for field in fields.keys() & vars(args).keys():
        value: Any = getattr(args, field)
        setattr(
            args,
            field,
            replace(value, **fields[field]) if is_dataclass(value) and not isinstance(value, type) else fields[field],
        )
    if isinstance(reason := equivalent_config(name, args), str):
        raise UserError(f"{path} is torchtitan's {name}, of which there is no export: {reason}")
    return name, args


def titan_structure(published: Structure, name: str, args: Any) -> Structure:
    """The tensors of torchtitan's model, and where in them those lie that transformers' model is published as.

    A bias that balances experts is in no part: where transformers has none, torchtitan leaves it at zero.
    """
    spec = _spec(name)
    with torch.device("meta"):
        model = spec.model_cls(args)
    tensors, shared, _ = name_tensors(model)
    theirs = spec.state_dict_adapter(args, None).from_hf_map
    # Of no tensor: the other name is the one that is written.
    parts = {key: whole(key, ()) for key in published.shared}
    shared |= {key: theirs[tensor] for key, tensor in published.shared.items()}
    for key, (_, shape) in published.tensors.items():
        block = re.findall(r"\d+", key)  # and, of an expert, its number
        start = (*map(int, block[1:]), *(0 for _ in shape))
        heads = _INTERLEAVED_ROPE.get(name, {}).get(key.split(".")[-2])
        count = (getattr(args, heads) or args.n_heads) if heads else 0
        parts[key] = PublishedTensor(theirs[re.sub(r"\d+", "{}", key)].format(*block), start, shape, count)
    rows = tuple(key for key in ("tok_embeddings.weight", "output.weight") if key in tensors)
    return Structure(tensors, shared, published.ignored, parts, rows)


def _spec(name: str) -> Any:
    return import_module(f"torchtitan.models.{name}").get_train_spec()
