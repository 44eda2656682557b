"""Which model a config means: its family's row and its Hugging Face config, checked before anything is built."""

import contextlib
import importlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from huggingface_hub.errors import StrictDataclassError
from torchtitan.tools.utils import device_type
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flame.errors import UserError, first_line
from flame.models import reference, table
from flame.models.family import Family, each_layer
from flame.models.flops import top_k
from flame.models.generic import read_family

logger = logging.getLogger("flame")
VOCAB_MULTIPLE = 64  # a grown vocabulary is rounded up to this: tensor cores and TP like it


def import_models(module: str) -> None:
    """Import a user's module, which registers its model with transformers, and add its FAMILY, if it has one.

    Raises UserError.
    """
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises is the user's to mend
        raise UserError(f"--model.import: cannot import {module}: {first_line(error)}") from None
    family = getattr(imported, "FAMILY", None)
    if family is None:
        return
    if not isinstance(family, Family):
        raise UserError(f"--model.import: FAMILY of {module} is a {type(family).__name__}, must be a flame Family")
    table.add(family)


def load_hf_config(
    source: str, *, tokenizer: Any = None, grow_vocab: bool = False, trust_remote_code: bool = False
) -> tuple[Family, PreTrainedConfig]:
    """The family and Hugging Face config of a JSON file, a local HF folder or a hub id.

    With a tokenizer, its special ids go into the config, and it must fit the embedding table or `grow_vocab` be set;
    for tokens that were added to it the table grows in any case.
    Raises UserError.
    """
    family, config = read_config(read_fields(source), source, trust_remote_code)
    if family.from_fla and device_type == "cpu":
        reference.check(config.model_type)
    if tokenizer is not None:
        _fit_to_tokenizer(config, tokenizer, grow_vocab)
    return family, config


def read_fields(source: str) -> dict[str, Any]:
    """What a JSON file, a local HF folder's config or a hub id's says. Raises UserError."""
    try:
        if Path(source).is_file():
            fields = json.loads(Path(source).read_text(), object_hook=_float)
        else:
            fields, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UserError(f"--model.config: cannot read {source}: {first_line(error)}") from None
    if not isinstance(fields, dict):
        raise UserError(f"--model.config: {source} holds a {type(fields).__name__}, must be a JSON object")
    return fields


def _float(table: dict[str, Any]) -> Any:
    # how transformers writes the numbers that JSON does not have: Mamba2's time_step_limit ends at infinity
    return float(table["__float__"]) if table.keys() == {"__float__"} else table


def read_config(
    fields: dict[str, Any], source: str, trust_remote_code: bool = False
) -> tuple[Family, PreTrainedConfig]:
    """The family and config of a config's fields, which came from `source`. Raises UserError."""
    model_type = fields.get("model_type", "")
    if not isinstance(model_type, str):
        raise UserError(f"--model.config {source}: model_type is {model_type!r}, must be a name such as llama")
    family = table.BY_MODEL_TYPE.get(model_type)
    if family is None or family.from_fla:
        reference.enable()  # imports fla, whose model types must be known before transformers looks them up
    known = model_type in CONFIG_MAPPING
    remote = not known and "auto_map" in fields
    if remote and not trust_remote_code:
        raise UserError(
            f"--model.config {source}: its model_type {model_type!r} is Python code that it brings along; "
            "read that code, then add --model.trust_remote_code"
        )
    if not known and not remote:
        raise UserError(
            f'--model.config: no family for model_type "{model_type}", nor does transformers know it; known: '
            f"{', '.join(sorted(table.BY_MODEL_TYPE))}, and transformers' own causal models"
        )
    try:
        if remote:
            logger.warning(f"--model.trust_remote_code: running the Python code that {source} brings along")
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        else:
            config = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # whatever a config class says of its fields is the user's to mend
        raise UserError(f"--model.config {source}: {first_line(error)}") from None
    if family is None:
        hf = build_on_meta(config, source, trust_remote_code)
        family = read_family(hf, model_type, from_fla=type(hf).__module__.startswith("fla."))
    return family, config


def build_on_meta(config: PreTrainedConfig, source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without memory; refuses with one line what its constructor refuses. Raises UserError."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"--model.config {source}: num_hidden_layers is {layers!r}, must be a whole number from 1")
    _check_types(config, source)
    try:
        with torch.device("meta"):
            return build_hf(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"--model.config {source} cannot be built: {first_line(error)}") from None


def _check_types(config: PreTrainedConfig, source: str) -> None:
    """Refuse a number that is none, and heads and experts that do not fit; fla's configs take anything. UserError."""
    for name, usual in vars(type(config)()).items():
        value = vars(config).get(name)
        if type(usual) in (int, float) and value is not None and not isinstance(value, int | float):
            raise UserError(f"--model.config {source}: {name} is {value!r}, must be a number")
    for layer in each_layer(config):
        heads, shared = getattr(layer, "num_attention_heads", None), getattr(layer, "num_key_value_heads", None)
        if heads and shared and heads % shared:
            raise UserError(
                f"--model.config {source}: num_key_value_heads {shared} must divide num_attention_heads {heads}"
            )
        experts = getattr(layer, "num_local_experts", None) or getattr(layer, "num_experts", None)
        if experts and experts < (chosen := top_k(layer)):
            raise UserError(
                f"--model.config {source}: experts of a token: {chosen} is more than the {experts} experts there are"
            )


def validate_seq_len(hf: PreTrainedModel, job_config: Any) -> None:
    """Refuse rows, or with varlen pieces, longer than the table in which a model looks up positions. Raises UserError.

    hf may be on the meta device.
    """
    limit = getattr(hf.config, "max_position_embeddings", None)  # which rotary positions, being computed, may exceed
    tokens = hf.get_input_embeddings()
    if limit is None or not any(_holds_positions(m, limit) for m in hf.base_model.modules() if m is not tokens):
        return
    sections = ("training", "validation") if job_config.validation.enable else ("training",)
    asked = {f"{section}.seq_len": getattr(job_config, section).seq_len for section in sections}
    if job_config.training.varlen:
        asked = {"training.context_len": job_config.training.context_len}
    for flag, length in asked.items():
        if length > limit:
            raise UserError(
                f"--{flag}: found {length}, must be at most {limit}, the positions that this {hf.config.model_type} "
                "has a table of (max_position_embeddings or n_positions of its config)"
            )


def _holds_positions(module: torch.nn.Module, limit: int) -> bool:
    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings == limit + getattr(module, "offset", 0)  # BioGPT's begin at the third row
    return any(buffer.ndim > 1 and len(buffer) == limit for buffer in module.buffers(recurse=False))  # GPT-J's sines


def build_hf(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """transformers' own model of a config, on the default device, in the default dtype whatever the config says."""
    with _no_values() if torch.get_default_device().type == "meta" else contextlib.nullcontext():
        return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype(), **options)


@contextlib.contextmanager
def _no_values() -> Iterator[None]:
    # RWKV-7's constructor fills its weights element by element, half a second a block, also on the meta device, unless
    # this switch of older transformers says that they will be loaded.
    names = vars(transformers.modeling_utils)
    before = {name: names[name] for name in ("_init_weights",) if name in names}
    names["_init_weights"] = False
    try:
        yield
    finally:
        del names["_init_weights"]
        names.update(before)


def save_assets(folder: Path, hf_model: Any, hf_tokenizer: Any) -> None:
    """Write config.json, generation_config.json and the tokenizer: all that an export needs besides the weights."""
    config = hf_model.config
    config.architectures = [type(hf_model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    hf_tokenizer.save_pretrained(folder)


def choose_attention(config: PreTrainedConfig, family: Family, dtype: str) -> None:
    """flash-attn for transformers' attention where it is installed and `dtype` is one of its own; else SDPA."""
    installed = importlib.util.find_spec("flash_attn") is not None
    if family.packing == "positions" and installed and torch.cuda.is_available() and dtype in ("bfloat16", "float16"):
        config._attn_implementation = "flash_attention_2"


def _fit_to_tokenizer(config: PreTrainedConfig, tokenizer: Any, grow_vocab: bool) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        if (own := tokenizer.vocab_size - tokenizer.added) > config.vocab_size and not grow_vocab:
            raise UserError(
                f"--model.tokenizer_path: the tokenizer has {own} ids but the model's vocab_size is "
                f"{config.vocab_size}; use a smaller tokenizer, raise vocab_size, or set --model.grow_vocab"
            )
        config.vocab_size = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    config.eos_token_id = tokenizer.eos_id
    with contextlib.suppress(StrictDataclassError):  # CWM's config must have one, where the tokenizer may have none
        config.bos_token_id = tokenizer.bos_id
