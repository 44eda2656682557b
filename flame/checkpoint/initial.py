"""What a run starts from if it resumes nothing: Hugging Face weights or a DCP checkpoint, checked before it starts."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from flame.checkpoint.dcp_file import read_tensors
from flame.checkpoint.dcp_reader import WeightReader
from flame.checkpoint.start import choose
from flame.checkpoint.structure import Structure
from flame.checkpoint.weights import Weights, check_initial, find_folder, read_weights


class IdentityAdapter(StateDictAdapter):
    """Weights are read under the names that training has, as they are cut, so that conversion changes nothing."""

    def __init__(self, weights: Weights | None, model_args: Any, hf_assets_path: str | None) -> None:
        self.weights, self.hf_assets_path, self.fqn_to_index_mapping = weights, hf_assets_path, None

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        parts = self.weights.structure.parts if self.weights else {}
        placed = {part.tensor for part in parts.values()} or state_dict
        return {name: tensor for name, tensor in state_dict.items() if name in placed}  # not what is published nowhere

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return hf_state_dict

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> Any:
        assert self.weights is not None
        return WeightReader(self.weights)


def build_adapter(job_config: Any, structure: Structure) -> Any:
    """What makes the IdentityAdapter of a model, with the weights that --checkpoint.initial_load_path names.

    They, or the DCP checkpoint there, must be the model's. Nothing is looked at for a run that resumes, and nothing
    downloaded by a dry run. Raises UserError.
    """
    checkpoint, source = job_config.checkpoint, job_config.checkpoint.initial_load_path
    folder = Path(job_config.job.dump_folder, checkpoint.folder)
    if not source or choose(checkpoint, folder, job_config.training.steps).mode != "init":
        return partial(IdentityAdapter, None)
    if not checkpoint.initial_load_in_hf:
        if os.path.isdir(source):  # or DCP's own business, such as s3://
            tensors = read_tensors(Path(source))
            check_initial(Path(source), {name: (t.dtype, t.shape) for name, t in tensors.items()}, structure)
        return partial(IdentityAdapter, None)
    if job_config.job.dry_run and not os.path.isdir(source):
        return partial(IdentityAdapter, None)
    grow = job_config.model.grow_vocab or bool(job_config.model.add_tokens)
    return partial(IdentityAdapter, read_weights(find_folder(source), structure, grow=grow))
