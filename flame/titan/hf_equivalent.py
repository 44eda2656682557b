"""transformers' models that compute what torchtitan's do: their configs, and which tensor is which."""

import copy
import re
from dataclasses import asdict, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torchtitan.protocols.train_spec import TrainSpec
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from flame.checkpoint.structure import PublishedTensor, Structure, name_tensors, whole
from flame.config.files import read_json
from flame.errors import UserError, first_line

TITAN_CONFIG = "torchtitan.json"  # beside a config.json: the model of torchtitan that is trained
# Their rotary embedding rotates adjacent elements of a head, that of transformers its halves.
_INTERLEAVED_ROPE = {"llama3": {"q_proj": "n_heads", "k_proj": "n_kv_heads"}}
_NO_EQUIVALENT = {
    "deepseek_v3": "transformers' DeepSeek-V3 norms its latents with an epsilon of 1e-6, whatever its config says",
    "llama4": "transformers' Llama 4 has no bias that balances the experts",
}


def equivalent_config(name: str, args: Any) -> PreTrainedConfig | str:
    """The config with which transformers computes what torchtitan's model of these arguments does, or why none does."""
    if name in _NO_EQUIVALENT:
        return _NO_EQUIVALENT[name]
    sizes = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_seq_len,
    }
    return {"llama3": _llama, "qwen3": _qwen}[name](args, sizes)


def _llama(args: Any, sizes: dict[str, Any]) -> PreTrainedConfig:
    from torchtitan.models.llama3.model.model import TransformerBlock

    with torch.device("meta"):
        sizes["intermediate_size"] = TransformerBlock(0, args).feed_forward.w1.out_features
    rope = {"rope_type": "llama3", "rope_theta": args.rope_theta, **asdict(args.rope_scaling_args)}
    rope["factor"] = rope.pop("scaling_factor")
    return LlamaConfig(**sizes, rope_parameters=rope)


def _qwen(args: Any, sizes: dict[str, Any]) -> PreTrainedConfig | str:
    if not args.qk_norm:
        return "transformers' Qwen3 has norms of queries and keys"
    sizes |= {"head_dim": args.head_dim, "intermediate_size": args.hidden_dim}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if not args.moe_enabled:
        return Qwen3Config(**sizes, tie_word_embeddings=args.enable_weight_tying)
    supported = {"num_shared_experts": 0, "score_func": "softmax", "route_scale": 1.0, "gate_bias": False}
    supported |= {"score_before_experts": False, "num_expert_groups": None}
    experts = args.moe_args
    if experts != replace(experts, **supported):
        return "transformers' Qwen3 has no such experts"
    return Qwen3MoeConfig(
        **sizes,
        tie_word_embeddings=args.enable_weight_tying,
        moe_intermediate_size=args.moe_inter_dim,
        num_experts=experts.num_experts,
        num_experts_per_tok=experts.top_k,
        norm_topk_prob=experts.route_norm,
    )


def read_recorded_model(folder: Path) -> tuple[str, Any] | None:
    """The name and arguments of the model of torchtitan that a run recorded in a folder; None if it was another.

    Raises UserError if transformers has no equivalent.
    """
    path = next((path for name in (TITAN_CONFIG, "config.json") if (path := folder / name).is_file()), None)
    if path is None:
        return None
    try:
        fields = read_json(path)
        _, _, name = str(fields.get("model_type")).partition("torchtitan.")
        if not name:
            return None
        args = copy.deepcopy(next(iter(_spec(name).model_args.values())))
        for field in fields.keys() & vars(args).keys():
            value: Any = getattr(args, field)
            nested = is_dataclass(value) and not isinstance(value, type)
            setattr(args, field, replace(value, **fields[field]) if nested else fields[field])
    except (OSError, ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(str(path), first_line(error), "the record of a model of torchtitan") from None
    if isinstance(reason := equivalent_config(name, args), str):
        raise UserError(str(path), f"torchtitan's {name}", "a model that transformers has, to be exported", reason)
    return name, args


def titan_structure(published: Structure, name: str, args: Any) -> Structure:
    """The tensors of torchtitan's model, and where in them those lie that transformers' model is published as.

    A bias that balances experts is not published: where transformers has none, torchtitan leaves it at zero.
    """
    spec = _spec(name)
    with torch.device("meta"):
        model = spec.model_cls(args)
    tensors, shared, _ = name_tensors(model)
    titan_names = spec.state_dict_adapter(args, None).from_hf_map
    published_as = {key: whole(key, ()) for key in published.shared}  # tied, so written under its first name alone
    shared |= {key: titan_names[tensor] for key, tensor in published.shared.items()}
    for key, (_, shape) in published.tensors.items():
        numbers = re.findall(r"\d+", key)  # of the block, and of an expert
        start = (*map(int, numbers[1:]), *(0 for _ in shape))
        heads = _INTERLEAVED_ROPE.get(name, {}).get(key.split(".")[-2])
        count = (getattr(args, heads) or args.n_heads) if heads else 0
        tensor = titan_names[re.sub(r"\d+", "{}", key)].format(*numbers)
        published_as[key] = PublishedTensor(tensor, start, shape, count)
    rows = tuple(key for key in ("tok_embeddings.weight", "output.weight") if key in tensors)
    return Structure(tensors, shared, published.ignored, published_as, rows, published.prefix)


def _spec(name: str) -> TrainSpec:
    return import_module(f"torchtitan.models.{name}").get_train_spec()
