"""Jobs of tiny models for tests of the dry run."""

import torch
from torchtitan.protocols.train_spec import _extra_train_specs, get_train_spec

from flame.config.parser import parse
from flame.training.train_spec import register
from tests.launch import SMALL
from tests.tiny import write_config

TENSOR, CONTEXT, PIPELINE, EXPERT = (
    f"--parallelism.{kind}_parallel_degree" for kind in ("tensor", "context", "pipeline", "expert")
)


def build_job(folder, model, *flags, **changes):
    """The config and TrainSpec of a tiny model, or of one of torchtitan's flavors, such as "qwen3 debugmodel"."""
    name, _, flavor = model.partition(" ")
    own = [f"--model.name={name}", f"--model.flavor={flavor}"]
    config = parse([*(own if flavor else [f"--model.config={write_config(folder, model, **changes)}"]), *SMALL, *flags])
    _extra_train_specs.clear()
    register(config)
    return config, get_train_spec(config.model.name)


def build_model(config, spec):
    with torch.device("meta"):
        return spec.model_cls(spec.model_args[config.model.flavor])
