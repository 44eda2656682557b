"""Registers the configured model with torchtitan: a TrainSpec filled from its family's row."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from torchtitan.components.optimizer import build_optimizers
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from flame.checkpoint.commit import complete_steps
from flame.config.parser import validation_as_training, world_size
from flame.convert.hf_structure import model_structure
from flame.convert.initial import build_adapter
from flame.data.loader import build_dataloader
from flame.data.source import build_sources
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.hf import build_on_meta, choose_attention, import_models, load_hf_config, validate_seq_len
from flame.models.loss import build_loss
from flame.parallel import layout
from flame.parallel.apply import parallelize
from flame.parallel.pipeline import pipeline
from flame.titan import model as titan_model
from flame.titan.hf_equivalent import TITAN_CONFIG, titan_structure
from flame.training import quantize
from flame.training.lr_schedule import build_schedule
from flame.training.metrics import build_metrics
from flame.training.validation import build_validator

_NEEDS_GPU = {
    "training.enable_cpu_offload": lambda config: config.training.enable_cpu_offload,
    "parallelism.enable_async_tensor_parallel": lambda config: config.parallelism.enable_async_tensor_parallel,
    "profiling.enable_memory_snapshot": lambda config: config.profiling.enable_memory_snapshot,
    "checkpoint.async_mode async_with_pinned_mem": lambda config: (
        config.checkpoint.enable and config.checkpoint.async_mode == "async_with_pinned_mem"
    ),
}
_SHAPES = (
    *("model_type", "flavor", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_heads", "tie_word_embeddings", "dim", "n_layers"),
)
_NOT_SAID = ("architectures", "transformers_version", "dtype")  # not what a run computes


def register(job_config: Any) -> None:
    """Fill a TrainSpec for `job_config` and register it under `model.name`.

    All that only a rank can find wrong with the model or the data is found here, before a process group or a folder
    exists. Raises UserError.
    """
    model = job_config.model
    for flag in (flag for flag, asked in _NEEDS_GPU.items() if asked(job_config) and device_type == "cpu"):
        raise UserError(f"--{flag}: needs a GPU, and none is visible")
    quantize.check(job_config)
    if job_config.compile.enable:
        _check_backend(job_config.compile.backend)
    if job_config.experimental.custom_import:
        import_models(job_config.experimental.custom_import)
    tokenizer = build_tokenizer(model.tokenizer_path, model.trust_remote_code, model.add_tokens)
    _check_same_tokens(tokenizer, job_config)
    of_model = (_load_hf if model.name == "auto" else _load_titan)(job_config, tokenizer)
    sources, held_out_sources = build_sources(job_config.training, job_config.data), []
    if job_config.validation.enable:
        with validation_as_training(job_config) as held_out:
            held_out_sources = build_sources(held_out.training, held_out.data)
    spec = TrainSpec(
        **of_model,
        build_lr_schedulers_fn=build_schedule,
        build_dataloader_fn=partial(build_dataloader, sources=sources),
        build_tokenizer_fn=lambda _job_config: tokenizer,
        build_loss_fn=build_loss,
        build_metrics_processor_fn=build_metrics,
        build_validator_fn=partial(build_validator, sources=held_out_sources),
    )
    register_train_spec(model.name, spec)


def _load_titan(job_config: Any, tokenizer: Any) -> dict[str, Any]:
    model, checkpoint = job_config.model, job_config.checkpoint
    fields = titan_model.load(job_config, tokenizer)
    published, adapter = fields["model_cls"].hf_equivalent, None
    if isinstance(published, str):
        if checkpoint.initial_load_in_hf:
            raise UserError(f"--checkpoint.initial_load_in_hf: found true, must be false for {model.name}: {published}")
        if checkpoint.enable and checkpoint.export:
            logger.info(f"--checkpoint.export: off, as {published}")
            checkpoint.export = False
    elif checkpoint.initial_load_path:
        theirs = model_structure(build_on_meta(published, f"{model.name} {model.flavor}")).published
        adapter = build_adapter(job_config, titan_structure(theirs, model.name, fields["model_args"][model.flavor]))
    _check_same_model("model.flavor", fields["model_cls"].description, job_config)
    return {**fields, "state_dict_adapter": adapter}


def _load_hf(job_config: Any, tokenizer: Any) -> dict[str, Any]:
    model = job_config.model
    family, hf_config = load_hf_config(
        model.config,
        tokenizer=tokenizer,
        grow_vocab=model.grow_vocab,
        trust_remote_code=model.trust_remote_code,
    )
    alibi = family.packing == "mask" and getattr(hf_config, "alibi", False)  # which has no form with such a mask
    if job_config.training.varlen and (family.packing is None or alibi):
        raise UserError(
            f"--training.varlen: models of type {hf_config.model_type} cannot keep packed documents apart; leave it off"
        )
    choose_attention(hf_config, family, _compute_dtype(job_config))
    hf_model = build_on_meta(hf_config, model.config, model.trust_remote_code)
    validate_seq_len(hf_model, job_config)
    layout.validate(family, hf_config, hf_model, job_config)
    quantize.adapt(job_config, family, hf_model)
    _check_same_model("model.config", json.loads(hf_config.to_json_string(use_diff=False)), job_config)
    return {
        "model_cls": CausalLM,
        "model_args": {model.flavor: ModelArgs().bind(family, hf_config)},
        "parallelize_fn": parallelize,
        "pipelining_fn": pipeline,
        "build_optimizers_fn": build_optimizers,
        "state_dict_adapter": build_adapter(job_config, model_structure(hf_model)),
    }


def _compute_dtype(job_config: Any) -> str:
    """The type that blocks compute in; torchtitan has no mixed precision for TP and PP without FSDP2."""
    training, ranks = job_config.training, job_config.parallelism
    divided = ranks.tensor_parallel_degree * ranks.pipeline_parallel_degree
    sharded = world_size() > divided * ranks.data_parallel_replicate_degree
    return training.mixed_precision_param if sharded or divided == 1 else training.dtype


def _check_backend(name: str) -> None:
    from torch._dynamo import list_backends  # seconds to import: only a job that compiles waits for it

    if name not in list_backends(exclude_tags=()):
        usual = ", ".join(["eager", "aot_eager", *list_backends()])
        raise UserError(f"--compile.backend: found {name!r}, must be one of {usual}")


def _check_same_model(flag: str, today: dict[str, Any], job_config: Any) -> None:
    """Refuse a model other than the one the run folder's checkpoints hold. Raises UserError."""
    folder = Path(job_config.job.dump_folder)
    recorded = [path for name in (TITAN_CONFIG, "config.json") if (path := folder / "model" / name).exists()]
    if not recorded or not complete_steps(folder / job_config.checkpoint.folder):
        return
    known = _read_recorded(recorded[0])
    changed = [f"{key} {today.get(key)} (was {known.get(key)})" for key in _SHAPES if today.get(key) != known.get(key)]
    if changed:
        raise UserError(
            f"--{flag}: {job_config.job.dump_folder} holds checkpoints of another model: {', '.join(changed)}; "
            "give it its own --job.dump_folder"
        )
    for key in sorted(known.keys() - set(_NOT_SAID)):
        if today.get(key) != known[key]:
            logger.info(f"changed since the last start: {flag} {key} {known[key]} -> {today.get(key)}, applied")


def _read_recorded(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--job.dump_folder: {path} cannot be read ({error}); move it away to do without") from None


def _check_same_tokens(tokenizer: Any, job_config: Any) -> None:
    """Refuse added tokens other than those with which the run folder's checkpoints were trained. Raises UserError."""
    folder = Path(job_config.job.dump_folder)
    recorded = folder / "model" / "tokenizer.json"
    if not recorded.exists() or not complete_steps(folder / job_config.checkpoint.folder):
        return
    known = {token["content"]: token["id"] for token in _read_recorded(recorded).get("added_tokens", [])}
    today = tokenizer.hf.get_added_vocab()
    changed = [
        f"{token} has id {today.get(token, 'none')} (was {known.get(token, 'none')})"
        for token in dict.fromkeys([*known, *today])
        if today.get(token) != known.get(token)
    ]
    if changed:
        raise UserError(
            f"--model.add_tokens: {folder} holds checkpoints of another vocabulary: {', '.join(changed[:3])}; give the "
            "same list, or another --job.dump_folder"
        )
