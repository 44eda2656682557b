"""The weights that a run starts from, Hugging Face's or a DCP checkpoint's, checked against its model."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from flame.checkpoint.start import StartPlan
from flame.checkpoint.structure import Structure
from flame.config.schema import JobConfig
from flame.convert.dcp_file import CorruptedError, read_tensors
from flame.convert.hf_to_dcp import WeightReader
from flame.convert.hf_weights import FLAG, Weights, check_tensors, check_weights, find_folder, read_weights
from flame.convert.safetensors_file import find_files
from flame.errors import UserError


class IdentityAdapter(StateDictAdapter):
    """torchtitan's adapter for weights that are read under the names and shards of training, without conversion."""

    def __init__(
        self, structure: Structure, read: Callable[[], Weights], model_args: Any, hf_assets_path: str | None
    ) -> None:
        self.structure, self.read = structure, read  # of the model; the weights that it starts from
        self.hf_assets_path, self.fqn_to_index_mapping = hf_assets_path, None

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors that the weights have: of all but those that are published nowhere."""
        published_as = self.read().structure.published_as
        names = {published.tensor for published in published_as.values()} or state_dict
        return {name: tensor for name, tensor in state_dict.items() if name in names}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return hf_state_dict

    def check(self, flag: str, checkpoint: Path, *, ties: bool) -> None:
        """Raises UserError if the tensors of a DCP checkpoint are not the model's: DCP skips what it does not have.

        ties: read those that the config ties, to see that they are the same.
        """
        _check_checkpoint(flag, checkpoint, self.structure, ties=ties)

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> WeightReader:
        return WeightReader(self.read())


def build_adapter(job_config: JobConfig, structure: Structure, plan: StartPlan | None) -> partial[IdentityAdapter]:
    """What makes the IdentityAdapter of a model, with the weights that --checkpoint.initial_load_path names.

    plan: how the job starts, on rank 0, which validates what it starts from before a process group exists; None on the
    other ranks, which read the headers when they load. Nothing is read for a run that resumes, and nothing downloaded
    by a dry run. Raises UserError if the weights, or the DCP checkpoint there, are not the model's.
    """
    checkpoint, source = job_config.checkpoint, job_config.checkpoint.initial_load_path
    grow = job_config.model.grow_vocab or bool(job_config.model.add_tokens)

    @cache
    def read() -> Weights:
        assert source is not None
        folder = find_folder(source)
        weights = read_weights(find_files(folder), structure)
        check_weights(weights, folder, grow=grow)
        return weights

    if source and plan and plan.mode == "init":
        if not checkpoint.initial_load_in_hf:
            hint = "only Hugging Face weights grow (--checkpoint.initial_load_in_hf)" if grow else ""
            _check_checkpoint(FLAG, Path(source), structure, hint)
        elif os.path.isdir(source) or not job_config.job.dry_run:
            read()
    return partial(IdentityAdapter, structure, read)


def _check_checkpoint(flag: str, checkpoint: Path, structure: Structure, hint: str = "", *, ties: bool = True) -> None:
    try:
        check_tensors(flag, checkpoint, read_tensors(checkpoint), structure, hint, ties=ties)
    except CorruptedError as error:
        raise UserError(flag, checkpoint, "an intact checkpoint", str(error)) from None
