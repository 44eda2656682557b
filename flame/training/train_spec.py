"""Registers the configured model with torchtitan: a TrainSpec filled from its family's row."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.optimizer import build_optimizers
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import logger

from flame.config.files import read_json
from flame.config.parser import world_size
from flame.config.schema import JobConfig
from flame.convert.hf_structure import model_structure
from flame.convert.initial import build_adapter
from flame.data.loader import build_dataloader, check_skip, typical_length
from flame.data.source import build_sources
from flame.data.tokenize import Tokenizer, load_tokenizer
from flame.errors import UserError, first_line
from flame.models import reference
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.hf import (
    build_on_meta,
    choose_attention,
    fit_positions,
    import_models,
    load_hf_config,
    read_generation,
)
from flame.parallel import layout
from flame.parallel.apply import parallelize
from flame.parallel.pipeline import pipeline
from flame.titan import model as titan_model
from flame.titan.hf_equivalent import TITAN_CONFIG, titan_structure
from flame.training import quantize
from flame.training.context import RunContext
from flame.training.lr_schedule import build_lr_schedule
from flame.training.metrics import Metrics
from flame.training.pipeline import ScaledLoss
from flame.training.validation import Validator

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
Loaded = tuple[dict[str, Any], str, dict[str, Any]]  # fields of a TrainSpec, the flag that chose the model, its config
_DESCRIPTIVE = ("architectures", "transformers_version", "dtype")  # they do not change what a run computes


def register(job_config: JobConfig, context: RunContext | None = None) -> None:
    """Fill a TrainSpec for `job_config` and register it under `model.name`.

    Validates what needs torch, the model or the data, before a process group or a folder exists; what the run folder
    holds, on the first rank alone. Raises UserError.
    """
    context, model = context or RunContext(job_config), job_config.model
    flag = next((flag for flag, asked in _NEEDS_GPU.items() if asked(job_config)), None)
    if flag and not torch.accelerator.is_available():
        raise UserError(f"--{flag}", hint="needs a GPU, and none is visible")
    quantize.check(job_config)
    if job_config.experimental.custom_import:
        import_models(job_config.experimental.custom_import)
    tokenizer = load_tokenizer(job_config)
    fields, flag, description = (_load_hf if model.name == "auto" else _load_titan)(job_config, tokenizer, context)
    if (plan := context.plan) and not all(status.corruption for status in plan.checkpoints.values()):
        _check_same_model(flag, description, tokenizer, context.run.folder)
    sources, held_out_sources = build_sources(job_config.training, job_config.data), []
    if job_config.validation.enable:
        streaming = job_config.training.streaming
        held_out_sources = build_sources(job_config.validation, job_config.data, streaming)
    if not tokenizer.encodes_all:
        for source in (*sources, *held_out_sources):
            typical_length(source, tokenizer)  # fails now rather than when the loader is made
    if plan and plan.mode != "resume":  # what a run has begun to skip, it may go on with
        dp = layout.dp_degree(job_config.parallelism, world_size())
        check_skip(sources, tokenizer, job_config.training, job_config.data, dp)
    for line in (tokenizer.describe(), *(line for s in (*sources, *held_out_sources) for line in s.describe())):
        logger.info(line)
    spec = TrainSpec(
        **fields,
        build_lr_schedulers_fn=build_lr_schedule,
        build_dataloader_fn=partial(build_dataloader, sources=sources),
        build_tokenizer_fn=lambda _job_config: tokenizer,
        build_loss_fn=lambda *_, **__: ScaledLoss(),
        build_metrics_processor_fn=partial(Metrics, context),
        build_validator_fn=partial(Validator, context, held_out_sources),
    )
    register_train_spec(model.name, spec)


def _load_titan(job_config: JobConfig, tokenizer: Tokenizer, context: RunContext) -> Loaded:
    """torchtitan's own model."""
    model, checkpoint = job_config.model, job_config.checkpoint
    if job_config.compile.enable:
        _check_backend(job_config.compile.backend)
    fields = titan_model.load(job_config, tokenizer)
    published, adapter = fields["model_cls"].hf_equivalent, None
    if isinstance(published, str):
        if checkpoint.initial_load_in_hf:
            raise UserError("--checkpoint.initial_load_in_hf", "true", f"false for {model.name}", published)
        if checkpoint.enable and checkpoint.export:
            logger.info(f"--checkpoint.export: off, as {published}")
            checkpoint.export = False
    elif checkpoint.initial_load_path:
        theirs = model_structure(build_on_meta(published, f"{model.name} {model.flavor}")).published
        structure = titan_structure(theirs, model.name, fields["model_args"][model.flavor])
        adapter = build_adapter(job_config, structure, context.plan)
    return {**fields, "state_dict_adapter": adapter}, "--model.flavor", fields["model_cls"].description


def _load_hf(job_config: JobConfig, tokenizer: Tokenizer, context: RunContext) -> Loaded:
    """A model of transformers or fla."""
    model = job_config.model
    assert model.config is not None
    family, hf_config = load_hf_config(
        model.config, tokenizer=tokenizer, grow_vocab=model.grow_vocab, trust_remote_code=model.trust_remote_code
    )
    training = job_config.training
    if family.from_fla and torch.accelerator.is_available():
        reference.check_kernels(hf_config.model_type)
    if training.varlen and family.packing is None:
        hint = f"models of type {hf_config.model_type} cannot keep packed documents apart"
        raise UserError("--training.varlen", "true", "false", hint)
    choose_attention(hf_config, family, training.mixed_precision_param, packed=training.varlen)
    hf_model = build_on_meta(hf_config, model.config, model.trust_remote_code)
    fit_positions(hf_model, job_config)
    layout.validate(family, hf_config, hf_model, job_config)
    if layout.compiles(family, job_config):
        _check_backend(job_config.compile.backend)
    quantize.adapt(job_config, family, hf_model)
    fields = {
        "model_cls": CausalLM,
        "model_args": {model.flavor: ModelArgs().bind(family, hf_config, read_generation(model.config))},
        "parallelize_fn": parallelize,
        "pipelining_fn": pipeline,
        "build_optimizers_fn": build_optimizers,
        "state_dict_adapter": build_adapter(job_config, model_structure(hf_model), context.plan),
    }
    return fields, "--model.config", json.loads(hf_config.to_json_string(use_diff=False))


def _check_backend(name: str) -> None:
    from torch._dynamo import list_backends  # seconds to import: only a job that compiles waits for it

    if name not in list_backends(exclude_tags=()):
        usual = ", ".join(["eager", "aot_eager", *list_backends()])
        raise UserError("--compile.backend", repr(name), f"one of {usual}")


def _check_same_model(flag: str, today: dict[str, Any], tokenizer: Tokenizer, run: Path) -> None:
    """Raises UserError if the checkpoints of a run folder are those of another model or of other added tokens."""
    known = _read_recorded(run, TITAN_CONFIG) or _read_recorded(run, "config.json") or today
    if changed := _changes(_SHAPES, known, today):
        hint = "another model needs another --job.dump_folder"
        raise UserError(flag, ", ".join(changed), f"the model whose checkpoints are in {run}", hint)
    for key in sorted(known.keys() - set(_DESCRIPTIVE)):
        if today.get(key) != known[key]:
            logger.info(f"changed since the last start: {flag} {key} {known[key]} -> {today.get(key)}, applied")
    if recorded := _read_recorded(run, "tokenizer.json"):
        if changed := tokenizer.changed_rules(json.dumps(recorded)):
            former = f"the former is in {run}/model"
            logger.warning(f"changed since the last start: tokenizer, its {', '.join(changed)}, applied; {former}")
        tokens = tokenizer.hf.get_added_vocab()
        try:
            ids = {token["content"]: token["id"] for token in recorded.get("added_tokens", [])}
        except (KeyError, TypeError) as error:
            raise _unreadable(run / "model/tokenizer.json", error) from None
        if changed := _changes([*ids, *tokens], ids, tokens):
            hint = "give the same list, or another --job.dump_folder"
            found = f"other ids, {', '.join(changed[:3])}"
            raise UserError("--model.add_tokens", found, f"the tokens of the checkpoints in {run}", hint)


def _changes(keys: Iterable[str], known: dict[str, Any], today: dict[str, Any]) -> list[str]:
    return [
        f"{key} {today.get(key, 'none')} (was {known.get(key, 'none')})"
        for key in dict.fromkeys(keys)
        if today.get(key) != known.get(key)
    ]


def _read_recorded(run: Path, name: str) -> dict[str, Any]:
    """A file of what the run recorded of its model, {} if it is not there."""
    path = run / "model" / name
    try:
        return read_json(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(str(path), f"a file that cannot be read ({first_line(error)})", hint="move it away to do without")
