"""Pipeline parallelism: torchtitan's `pipeline_llm`, for models with Hugging Face's names."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import pipeline_llm

from flame.config.schema import JobConfig
from flame.parallel.pipeline_schedule import disable_dualpipev_overlap


class TitanNames(nn.Module):
    """A model under torchtitan's names; pipeline_llm copies it for each stage and sets to None what the stage lacks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tok_embeddings, self.layers, self.norm, self.output = model.embedding, model.layers, model.norm, model.head
        self.__dict__["model"] = model  # not a child, but copied with the children, which are the same modules in it

    def stage(self) -> Any:
        """The model with this stage's modules only."""
        parts = {name for name, part in self.named_children() if part is not None and name != "layers"}
        model = self.__dict__["model"]
        model.keep_stage(parts, dict(self.layers.items()))
        return model


def pipeline(
    model: Any,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    device: torch.device,
    model_args: Any,
    parallelize: Callable,
    loss: Callable,
) -> tuple[Any, list[nn.Module], bool, bool]:
    """torchtitan's `pipelining_fn` for a flame.models.causal_lm.CausalLM on the meta device.

    Returns the schedule, this rank's model parts, and whether they have the first and the last stage.
    """
    parallelize_stage = lambda named, *args: parallelize(named.stage(), *args)
    job_config = disable_dualpipev_overlap(job_config)
    return pipeline_llm(TitanNames(model), parallel_dims, job_config, device, model_args, parallelize_stage, loss)
