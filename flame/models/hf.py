"""Hugging Face models: read a config, validate it, build the model, fit it to a tokenizer, save its assets."""

import contextlib
import copy
import importlib.util
import inspect
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers.masking_utils
import transformers.modeling_utils
from huggingface_hub.errors import StrictDataclassError
from torchtitan.tools.utils import device_type
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from flame.config.files import parse_json, read_json, read_text
from flame.config.hub import check_available
from flame.config.schema import JobConfig
from flame.config.setting import nearest
from flame.config.user_module import import_module
from flame.errors import UserError, as_line, first_line
from flame.models import limits, reference, table, varlen
from flame.models.family import Family, each_layer, head_dim
from flame.models.generic import read_family
from flame.models.vocabulary import fit_vocab_size
from flame.runtime.log import hold_back

logger = logging.getLogger("flame")
_OF_ANY = (  # fields that transformers looks for in a config whose class lacks them
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("auto_map", "tie_word_embeddings", "head_dim"),
)
_SHAPES_DIFFER = ("must match", "cannot be multiplied", "is invalid for", "broadcast")  # how torch says so
_OF_IDS = ("_token_id", "_ids", "suppress_tokens")  # ends of the names of a generation config's fields


def load_hf_config(
    source: str, *, tokenizer: Any = None, grow_vocab: bool = False, trust_remote_code: bool = False
) -> tuple[Family, PreTrainedConfig]:
    """The family and Hugging Face config of a JSON file, a local HF folder or a hub id.

    A tokenizer's special ids go into the config, and its ids must fit (see flame.models.vocabulary). Raises UserError
    if the config cannot be read or is invalid, if fla's model has no CPU reference and needs one, or if ids do not fit.
    """
    fields = read_fields(source)
    family, config = read_config(fields, source, trust_remote_code)
    warn_of_unknown(fields, config, source)
    if family.from_fla and device_type == "cpu":
        reference.check_supported(config.model_type)
    if tokenizer is not None:
        _fit_to_tokenizer(config, tokenizer, source, grow_vocab)
    return family, config


def import_models(module: str) -> None:
    """Import a user's module, which registers its model with transformers, and add its FAMILY, if it has one.

    Raises UserError if the import fails or FAMILY is not a Family.
    """
    try:
        imported = import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise UserError("--model.import", module, hint=f"cannot be imported: {first_line(error)}") from None
    family = getattr(imported, "FAMILY", None)
    if isinstance(family, Family):
        table.add(family)
    elif family is not None:
        raise UserError(f"--model.import {module}", f"FAMILY of type {type(family).__name__}", "a flame Family")


def read_fields(source: str) -> dict[str, Any]:
    """The fields of a config in a JSON file, a local HF folder or a hub id. Raises UserError if it cannot be read."""
    try:
        path = Path(source, "config.json") if Path(source).is_dir() else Path(source)
        if path.is_file():
            fields = parse_json(read_text(path), object_hook=_parse_float)
        else:
            check_available("--model.config", source, "model")
            fields, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UserError("--model.config", source, hint=f"cannot be read: {first_line(error)}") from None
    if not isinstance(fields, dict):
        raise UserError("--model.config", f"a {type(fields).__name__} in {source}", "a JSON object")
    return fields


def _parse_float(table: dict[str, Any]) -> Any:
    # transformers' form of numbers that JSON does not have: Mamba 2's time_step_limit ends at infinity
    return float(table["__float__"]) if table.keys() == {"__float__"} else table


@hold_back("transformers")
def read_config(
    fields: dict[str, Any], source: str, trust_remote_code: bool = False
) -> tuple[Family, PreTrainedConfig]:
    """The family and config of a config's fields, which came from `source`.

    Raises UserError if the model type is unknown or remote code that is not trusted, if a field is invalid, or if a
    model without a row in flame.models.table cannot run.
    """
    for name in ("attn_implementation", "_attn_implementation"):
        if "/" in str(fields.get(name)):
            hint = "a kernel of the hub is code that would be run"
            raise UserError(f"{source}: {name}", fields[name], "none: flame chooses", hint)
    if not isinstance(vocab_size := fields.get("vocab_size"), int | float | None):  # transformers compares ids with it
        raise UserError(f"{source}: vocab_size", repr(vocab_size), "an integer")
    model_type, setting = fields.get("model_type", ""), f"{source}: model_type"
    if not isinstance(model_type, str):
        raise UserError(setting, repr(model_type), "a name such as llama")
    family = table.BY_MODEL_TYPE.get(model_type)
    if family is None or family.from_fla:
        reference.enable()  # imports fla, whose model types must be known before transformers looks them up
    known = model_type in CONFIG_MAPPING
    remote = not known and "auto_map" in fields
    if remote and not trust_remote_code:
        hint = "it is Python code that the model brings along: read it, then add --model.trust_remote_code"
        raise UserError(setting, repr(model_type), hint=hint)
    if not known and not remote:
        rows = ", ".join(sorted(table.BY_MODEL_TYPE))
        raise UserError(setting, repr(model_type), f"one of {rows}, or of transformers' own causal models")
    try:
        if remote:
            logger.warning(f"--model.trust_remote_code: running the Python code that {source} brings along")
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        else:
            config = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # whatever a config class raises about its fields
        cause = error.__cause__  # transformers' dataclasses wrap what a check raises
        reason = first_line(cause if isinstance(cause, Exception) else error)
        raise UserError("--model.config", source, hint=reason) from None
    limits.validate(config, source)
    if vars(config).pop("quantization_config", None):
        logger.warning(f"{source}: quantization_config is ignored: flame trains and exports weights as they are")
    if family is not None and family.packing == "mask" and getattr(config, "alibi", False):
        family = replace(family, packing=None)  # ALiBi's biases have no form with such a mask
    if family is None:
        hf = build_on_meta(config, source, trust_remote_code)
        _check_shapes(hf, source)
        family = read_family(hf, model_type, from_fla=type(hf).__module__.startswith("fla."))
    return family, config


def warn_of_unknown(fields: dict[str, Any], config: PreTrainedConfig, source: str) -> None:
    """One line with the fields of `source` that `config`, made of them, only carries along: most likely misspelled."""
    kind = type(config)
    known = {*vars(kind()), *inspect.signature(kind).parameters, *dir(kind), *kind.attribute_map, *_OF_ANY}
    named = [f"{name}{_meant(name, known)}" for name in fields if name in vars(config) and name not in known]
    if named:
        logger.warning(as_line(f"{source}: neither {kind.__name__} nor transformers knows {', '.join(named)}"))


def _meant(name: str, known: set[str]) -> str:
    near = nearest(name, sorted(known))
    return f" (did you mean {near}?)" if near else ""


def fit_positions(hf: PreTrainedModel, job_config: JobConfig) -> None:
    """Check the length of rows, or with varlen of pieces, for a model (may be on meta) with a table of positions.

    The config of a model that computes its positions gets the length of training's rows, if it says less. Raises
    UserError if a row is longer than the table.
    """
    limit, training = getattr(hf.config, "max_position_embeddings", None), job_config.training
    if limit is None:
        return
    tokens = hf.get_input_embeddings()
    if not any(_holds_positions(m, limit) for m in hf.base_model.modules() if m is not tokens):
        longest = training.context_len if training.varlen else training.seq_len
        rope = getattr(hf.config, "rope_parameters", None) or {}
        kinds = [
            part for part in (rope, *rope.values()) if isinstance(part, dict)
        ]  # one, or one for each kind of layer
        scaled = {part.get("rope_type", "default") for part in kinds} - {"default", "linear", "llama3"}
        if longest and longest > limit and not scaled:  # the others scale by the limit
            change = f"max_position_embeddings {limit} -> {longest}, the length of rows"
            logger.warning(f"{change}; weights that were trained on shorter rows may need other rope_parameters")
            hf.config.max_position_embeddings = longest
        return
    sections = ("training", "validation") if job_config.validation.enable else ("training",)
    lengths = {f"--{section}.seq_len": getattr(job_config, section).seq_len for section in sections}
    if training.varlen:
        lengths = {"--training.context_len": training.context_len}
    for setting, length in lengths.items():
        if length > limit:
            hint = f"its table of positions has as many; {_spelled(hf.config)} in the model's config makes it longer"
            raise UserError(setting, length, f"at most {limit}", hint)


def _spelled(config: PreTrainedConfig) -> str:
    """How a config spells max_position_embeddings: GPT-2's says n_positions."""
    return config.attribute_map.get("max_position_embeddings", "max_position_embeddings")


def _holds_positions(module: torch.nn.Module, limit: int) -> bool:
    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings == limit + getattr(module, "offset", 0)  # BioGPT's begin at the third row
    return any(buffer.ndim > 1 and len(buffer) == limit for buffer in module.buffers(recurse=False))  # GPT-J's sines


def build_hf(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """transformers' own model of a config, on the default device, in the default dtype whatever the config says."""
    with _without_init() if torch.get_default_device().type == "meta" else contextlib.nullcontext():
        return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype(), **options)


def build_on_meta(config: PreTrainedConfig, source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """transformers' own model of a config on the meta device.

    Raises UserError if its constructor fails, or makes a parameter of no elements.
    """
    try:
        with torch.device("meta"):
            hf = build_hf(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a constructor raises about the config
        raise UserError("--model.config", source, hint=f"cannot be built: {first_line(error)}") from None
    if empty := [name for name, parameter in hf.named_parameters() if not parameter.numel()]:
        raise UserError("--model.config", source, hint=f"cannot be built: {empty[0]} has no elements")
    return hf


def _check_shapes(hf: PreTrainedModel, source: str) -> None:
    """Raises UserError if sizes in a model's config contradict each other in its forward. hf: on the meta device."""
    try:
        with known_packing(False):
            hf(input_ids=torch.zeros(1, 8, dtype=torch.int64, device="meta"), use_cache=False)
    except Exception as error:  # others are about the meta device, such as of experts that are chosen by values
        if any(said in str(error) for said in _SHAPES_DIFFER):
            raise UserError("--model.config", source, hint=f"cannot run: {first_line(error)}") from None


@contextlib.contextmanager
def _without_init() -> Iterator[None]:
    """Have constructors skip the init of weights, a workaround for fla 0.6 on the meta device.

    RWKV-7's constructor (layers/rwkv7.py) fills weights element by element, half a second per block, unless
    `transformers.modeling_utils._init_weights`, a switch of older transformers, is False.
    """
    names = vars(transformers.modeling_utils)
    before = {name: names[name] for name in ("_init_weights",) if name in names}
    names["_init_weights"] = False
    try:
        yield
    finally:
        del names["_init_weights"]
        names.update(before)


@contextlib.contextmanager
def known_packing(packed: bool) -> Iterator[None]:
    """Tell transformers whether the positions of a forward restart at documents.

    A workaround for transformers 5.23 (masking_utils.py), which asks the device, and waits, in every forward. On a CPU,
    where that costs nothing, it may still find that the rows of a batch hold one document each.
    """
    names = vars(transformers.masking_utils)
    ask = names["find_packed_sequence_indices"]

    def find(positions: torch.Tensor) -> torch.Tensor | None:
        if packed:
            return ask(positions) if positions.device.type == "cpu" else (positions == 0).cumsum(-1)
        return None

    names["find_packed_sequence_indices"] = find
    try:
        yield
    finally:
        names["find_packed_sequence_indices"] = ask


def choose_attention(config: PreTrainedConfig, family: Family, dtype: str, packed: bool = False) -> None:
    """flash-attn for transformers' attention if it is installed and supports `dtype`; else PyTorch's.

    That is SDPA or, for packed documents, the kernel that keeps them apart without a mask, if it takes the model.
    """
    if family.packing != "positions" or device_type != "cuda" or dtype not in ("bfloat16", "float16"):
        return
    if importlib.util.find_spec("flash_attn") is not None:
        config._attn_implementation = "flash_attention_2"
    elif packed and varlen.is_available() and _fits_varlen(config):
        config._attn_implementation = varlen.register()


def _fits_varlen(config: PreTrainedConfig) -> bool:
    return not getattr(config, "attention_dropout", 0) and all(varlen.takes(head_dim(c)) for c in each_layer(config))


def _fit_to_tokenizer(config: PreTrainedConfig, tokenizer: Any, source: str, grow: bool) -> None:
    config.vocab_size = fit_vocab_size(config.vocab_size, tokenizer.vocab_size, source, grow, tokenizer.added)
    if tokenizer.eos_id not in _ids(getattr(config, "eos_token_id", None)):  # else it stays, with further ends of text
        config.eos_token_id = tokenizer.eos_id
    with contextlib.suppress(StrictDataclassError):  # CWM's config requires one, and the tokenizer may have none
        config.bos_token_id = tokenizer.bos_id


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_generation(source: str) -> dict[str, Any]:
    """The generation_config.json beside a model's config, {} without one. Raises UserError if it cannot be read."""
    folder = str(Path(source).parent) if Path(source).is_file() else source
    path = cached_file(
        folder,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    try:
        fields = read_json(path) if path else {}
        GenerationConfig.from_dict(copy.deepcopy(fields))
        return fields
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two of values of other types
        raise UserError("--model.config", path, hint=f"cannot be read: {first_line(error)}") from None


def save_assets(folder: Path, hf_model: Any, hf_tokenizer: Any, generation: dict[str, Any] | None = None) -> None:
    """Write config.json, generation_config.json and the tokenizer: all that an export needs besides the weights.

    generation: the model's own generation_config.json; its ids are kept if they are the tokenizer's.
    """
    config = hf_model.config
    config.architectures = [type(hf_model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    if generation:
        path = folder / GENERATION_CONFIG_NAME
        ours = read_json(path)
        ours.pop("_from_model_config", None)  # transformers would ask the config anew
        if hf_tokenizer.eos_token_id not in _ids(generation.get("eos_token_id")):
            generation = {name: value for name, value in generation.items() if not name.endswith(_OF_IDS)}
        path.write_text(json.dumps(ours | generation, indent=2, sort_keys=True) + "\n")
    save_tokenizer(folder, hf_tokenizer)


def save_tokenizer(folder: Path, hf_tokenizer: Any) -> None:
    """`save_pretrained`, whose Rust code raises a bare Exception on a full disk. Raises OSError."""
    try:
        hf_tokenizer.save_pretrained(folder)
    except Exception as error:
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None
