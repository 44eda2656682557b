"""Registers the configured model with torchtitan: a TrainSpec filled from its family's row."""

from typing import Any

from torchtitan.components.optimizer import build_optimizers
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from flame.data.loader import build_dataloader
from flame.data.tokenize import build_tokenizer
from flame.metrics import build_metrics
from flame.models.causal_lm import CausalLM, ModelArgs, load_hf_config
from flame.models.loss import build_loss
from flame.parallel.apply import parallelize
from flame.schedule import build_schedule


class IdentityAdapter(StateDictAdapter):
    """flame keeps Hugging Face's parameter names, so conversion changes nothing."""

    def __init__(self, model_args: Any, hf_assets_path: str | None) -> None:
        self.hf_assets_path, self.fqn_to_index_mapping = hf_assets_path, None

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return hf_state_dict


def register(job_config: Any) -> None:
    """Fill a TrainSpec for `job_config` and register it under `model.name`. Raises UserError."""
    model = job_config.model
    tokenizer = build_tokenizer(model.tokenizer_path, trust_remote_code=model.trust_remote_code)
    family, hf_config = load_hf_config(
        model.config,
        tokenizer=tokenizer,
        grow_vocab=model.grow_vocab,
        trust_remote_code=model.trust_remote_code,
    )
    spec = TrainSpec(
        model_cls=CausalLM,
        model_args={model.flavor: ModelArgs().bind(family, hf_config)},
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_schedule,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=lambda _job_config: tokenizer,
        build_loss_fn=build_loss,
        build_metrics_processor_fn=build_metrics,
        state_dict_adapter=IdentityAdapter,
    )
    register_train_spec(model.name, spec)
