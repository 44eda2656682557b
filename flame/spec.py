"""Registers the configured model with torchtitan: a TrainSpec filled from its family's row."""

import json
from pathlib import Path
from typing import Any

from torchtitan.components.optimizer import build_optimizers
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.utils import device_type

from flame import quantize
from flame.checkpoint.manager import complete_steps
from flame.data.loader import build_dataloader
from flame.data.source import build_sources
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError
from flame.input import validation_as_training
from flame.metrics import build_metrics
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.hf import check_buildable, choose_attention, import_models, load_hf_config
from flame.models.loss import build_loss
from flame.parallel import layout
from flame.parallel.apply import parallelize
from flame.parallel.pipeline import pipeline
from flame.schedule import build_schedule
from flame.validation import build_validator

_NEEDS_GPU = {
    "training.enable_cpu_offload": lambda config: config.training.enable_cpu_offload,
    "profiling.enable_memory_snapshot": lambda config: config.profiling.enable_memory_snapshot,
    "checkpoint.async_mode async_with_pinned_mem": lambda config: (
        config.checkpoint.enable and config.checkpoint.async_mode == "async_with_pinned_mem"
    ),
}
_SHAPES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")


class IdentityAdapter(StateDictAdapter):
    """flame keeps Hugging Face's parameter names, so conversion changes nothing."""

    def __init__(self, model_args: Any, hf_assets_path: str | None) -> None:
        self.hf_assets_path, self.fqn_to_index_mapping = hf_assets_path, None

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return hf_state_dict


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
    tokenizer = build_tokenizer(model.tokenizer_path, trust_remote_code=model.trust_remote_code)
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
    choose_attention(hf_config, family, job_config.training.mixed_precision_param)
    hf_model = check_buildable(hf_config, model.config, model.trust_remote_code)
    layout.check(family, hf_config, hf_model, job_config)
    quantize.adapt(job_config, family, hf_model)
    _check_same_model(hf_config, job_config)
    build_sources(job_config.training, job_config.data)
    if job_config.validation.enable:
        with validation_as_training(job_config) as held_out:
            build_sources(held_out.training, held_out.data)
    spec = TrainSpec(
        model_cls=CausalLM,
        model_args={model.flavor: ModelArgs().bind(family, hf_config)},
        parallelize_fn=parallelize,
        pipelining_fn=pipeline,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_schedule,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=lambda _job_config: tokenizer,
        build_loss_fn=build_loss,
        build_metrics_processor_fn=build_metrics,
        build_validator_fn=build_validator,
        state_dict_adapter=IdentityAdapter,
    )
    register_train_spec(model.name, spec)


def _check_backend(name: str) -> None:
    from torch._dynamo import list_backends  # seconds to import: only a job that compiles waits for it

    if name not in list_backends(exclude_tags=()):
        usual = ", ".join(["eager", "aot_eager", *list_backends()])
        raise UserError(f"--compile.backend: found {name!r}, must be one of {usual}")


def _check_same_model(hf_config: Any, job_config: Any) -> None:
    """Refuse a model other than the one the run folder's checkpoints hold. Raises UserError."""
    folder = Path(job_config.job.dump_folder)
    recorded = folder / "model" / "config.json"
    if not recorded.exists() or not complete_steps(folder / job_config.checkpoint.folder):
        return
    known, today = json.loads(recorded.read_text()), json.loads(hf_config.to_json_string(use_diff=False))
    changed = [f"{key} {today.get(key)} (was {known[key]})" for key in _SHAPES if today.get(key) != known.get(key)]
    if changed:
        raise UserError(
            f"--model.config: {job_config.job.dump_folder} holds checkpoints of another model: {', '.join(changed)}; "
            "give it its own --job.dump_folder"
        )
