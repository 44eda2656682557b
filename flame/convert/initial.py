"""What a run starts from, checked against its model: Hugging Face weights or a DCP checkpoint."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from flame.checkpoint.dtypes import as_bytes
from flame.checkpoint.start import plan_start
from flame.checkpoint.structure import Structure
from flame.convert.dcp_file import StoredTensor, read_blocks, read_tensors
from flame.convert.dcp_reader import WeightReader
from flame.convert.hf_weights import FLAG, Weights, check_found, find_folder, read_weights, untied
from flame.errors import UserError


class IdentityAdapter(StateDictAdapter):
    """Weights are read under the names that training has, as they are cut, so that conversion changes nothing."""

    def __init__(
        self, structure: Structure, weights: Weights | None, model_args: Any, hf_assets_path: str | None
    ) -> None:
        self.structure, self.weights = structure, weights  # of the model; what it starts from
        self.hf_assets_path, self.fqn_to_index_mapping = hf_assets_path, None

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        parts = self.weights.structure.published_as if self.weights else {}
        placed = {part.tensor for part in parts.values()} or state_dict
        return {name: tensor for name, tensor in state_dict.items() if name in placed}  # not what is published nowhere

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return hf_state_dict

    def check(self, flag: str, checkpoint: Path, *, ties: bool) -> None:
        """`check_checkpoint` against this model."""
        check_checkpoint(flag, checkpoint, self.structure, ties=ties)

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> Any:
        assert self.weights is not None
        return WeightReader(self.weights)


def build_adapter(job_config: Any, structure: Structure) -> Any:
    """What makes the IdentityAdapter of a model, with the weights that --checkpoint.initial_load_path names.

    They, or the DCP checkpoint there, must be the model's. Nothing is looked at for a run that resumes, and nothing
    downloaded by a dry run. Raises UserError.
    """
    checkpoint, source = job_config.checkpoint, job_config.checkpoint.initial_load_path
    grow = job_config.model.grow_vocab or bool(job_config.model.add_tokens)
    weights = None
    if source and plan_start(job_config).mode == "init":
        if not checkpoint.initial_load_in_hf:
            hint = "; only Hugging Face weights grow (--checkpoint.initial_load_in_hf)" if grow else ""
            check_checkpoint(FLAG, Path(source), structure, hint, ties=True)
        elif os.path.isdir(source) or not job_config.job.dry_run:
            weights = read_weights(find_folder(source), structure, grow=grow)
    return partial(IdentityAdapter, structure, weights)


def check_checkpoint(flag: str, checkpoint: Path, structure: Structure, hint: str = "", *, ties: bool) -> None:
    """Refuse a DCP checkpoint whose tensors are not the model's: DCP leaves out what the model does not have.

    ties: read those that the config ties, to see that they are the same. Raises UserError, in one line.
    """
    tensors, where = read_tensors(checkpoint), f"{flag} {checkpoint}"
    check_found(where, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, structure, hint)
    if ties:
        for complaint in untied(tensors.keys(), structure, lambda name: _checksum(name, tensors[name])):
            raise UserError(f"{where}: {complaint}")


def _checksum(name: str, tensor: StoredTensor) -> str:
    digest = xxhash.xxh3_128()
    for block in read_blocks(name, tensor):
        digest.update(as_bytes(block))
    return digest.hexdigest()
