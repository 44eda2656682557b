"""Validation of the files and hub ids that a job names: those that must be on this machine exist and fit together."""

import os
import sys
from pathlib import Path
from typing import Any, Literal

from flame.config.files import read_json
from flame.config.paths import BUILDERS, CHECKOUT, check_path, command, exists, is_local
from flame.config.schema import Data, DataSource, JobConfig, Training, Validation
from flame.data.listing import check_fields, expand, is_pair
from flame.data.settings import parse_sources, spelled_by_the_user
from flame.errors import UserError, first_line
from flame.models.vocabulary import fit_vocab_size

# torchtitan's models that train here; of the others flux makes images, llama3_ft needs torchft, gpt_oss always a GPU.
TITAN = ("deepseek_v3", "llama3", "llama4", "qwen3")


def check_model(config: JobConfig) -> None:
    """Validate the model and tokenizer settings, and their files on this machine, without loading either.

    Raises UserError; also for a tokenizer with more ids than the model has room for, unless the vocabulary may grow.
    """
    model = config.model
    if model.name not in ("auto", *TITAN):
        allowed = f"auto (the model_type of model.config decides) or one of torchtitan's {', '.join(TITAN)}"
        raise UserError("--model.name", repr(model.name), allowed)
    if model.name != "auto" and model.config:
        hint = "model.flavor gives its sizes"
        raise UserError("--model.config", model.config, f"none with model.name {model.name}", hint)
    if model.name == "auto" and not model.config:
        allowed = "a model JSON (such as configs/gla_340M.json), a Hugging Face folder or a hub id"
        debug = command("train.sh", "--job.config_file", CHECKOUT / "configs/jobs/debug.toml")
        raise UserError("--model.config", "nothing", allowed, f"the debug job is {debug}")
    if not model.tokenizer_path:
        raise UserError("--model.tokenizer_path", "nothing", "byte, a folder, a tokenizer.json or a hub id")
    if twice := [token for i, token in enumerate(model.add_tokens) if token in model.add_tokens[:i]]:
        raise UserError("--model.add_tokens", f"{twice[0]} twice", "a list of different tokens")
    if not all(model.add_tokens):
        raise UserError("--model.add_tokens", "an empty item", "a list of tokens")
    if model.tokenizer_path != "byte":
        check_path("--model.tokenizer_path", model.tokenizer_path)
    if not model.config:
        return
    check_path("--model.config", model.config)
    path = Path(model.config).expanduser()
    path = path / "config.json" if os.path.isdir(path) else path
    if not is_local(str(path)):
        return  # a hub id
    described = _read_json("--model.config", path)
    if not isinstance(described.get("model_type"), str):
        raise UserError("--model.config", f"no model_type in {path}", "a Hugging Face model config")
    vocab_size, ids = described.get("vocab_size"), vocab_of_tokenizer(model.tokenizer_path)
    if isinstance(vocab_size, int) and ids is not None:
        fit_vocab_size(vocab_size, ids, model.config, model.grow_vocab)


def vocab_of_tokenizer(path: str) -> int | None:
    """Ids a tokenizer needs (largest id + 1, added tokens too); None if only loading it would tell, as for a hub id.

    Raises UserError if its JSON cannot be read or does not describe a tokenizer.
    """
    if path == "byte":
        return 257
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if os.path.isdir(file) else file
    if file.suffix != ".json" or not os.path.isfile(file):
        return None
    tokenizer = _read_json("--model.tokenizer_path", file)
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])], default=-1) + 1
    except (KeyError, TypeError) as e:
        raise UserError("--model.tokenizer_path", file, "the JSON of a tokenizer", repr(e)) from None


def _read_json(flag: str, path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except OSError as e:
        raise UserError(flag, hint=f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(flag, path, "a JSON object", str(e)) from None


def check_data(section: Training | Validation, data: Data) -> None:
    """Validate the settings of a section's sources. Raises UserError, also for files that are missing here."""
    for index, source in enumerate(parse_sources(section, data)):
        with spelled_by_the_user(section, data, index):
            _check_source(source)


def check_hub(config: JobConfig) -> None:
    """Raises UserError for a hub id of a job whose files are neither on this machine nor, now, on the hub."""
    model, checkpoint = config.model, config.checkpoint
    if model.config:
        _check_hub("--model.config", model.config, "model")
    if model.tokenizer_path and model.tokenizer_path != "byte":
        _check_hub("--model.tokenizer_path", model.tokenizer_path, "model")
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path:
        _check_hub("--checkpoint.initial_load_path", checkpoint.initial_load_path, "model")
    sections: list[Training | Validation] = [
        config.training,
        *([config.validation] if config.validation.enable else []),
    ]
    for section in sections:
        for index, source in enumerate(parse_sources(section, config.data)):
            with spelled_by_the_user(section, config.data, index):
                if source.path != "stdlib":
                    _check_hub("path", source.path, "dataset")


def check_wandb(config: JobConfig) -> None:
    """Raises UserError if a job is to be logged to W&B, and W&B would not take it."""
    if not config.metrics.enable_wandb or os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return
    import wandb

    found = "no API key"
    try:
        if wandb.login(prompt=False):
            return
    except wandb.errors.Error as error:
        found = first_line(error)
    login = Path(sys.executable).with_name("wandb")
    hint = f"set WANDB_API_KEY, run {login} login, or set WANDB_MODE=offline, to upload it later with {login} sync"
    raise UserError("--metrics.enable_wandb", found, hint=hint)


def _check_hub(setting: str, name: str, repo: Literal["model", "dataset"]) -> None:
    if not exists(name):
        from flame.config.hub import check_available  # here: most jobs have no hub id, and it takes its time to import

        check_available(setting, name, repo)


def _check_source(source: DataSource) -> None:
    if not is_pair(source.path):  # named by the part of their names that a Megatron pair has in common
        check_path("path", source.path)
    check_fields(source)
    root, folder = Path(source.path).expanduser(), source.data_dir or ""
    if source.path in BUILDERS and not source.data_files and not os.path.isdir(root):
        raise UserError("data_files", "nothing", f"the files that path {source.path} reads")
    if os.path.isdir(root) and folder and not exists(str(root / folder)):
        raise UserError("data_dir", f"no folder {folder} in {source.path}")
    # What a hub id calls its files only the hub knows.
    if source.data_files and (os.path.isdir(root) or source.path in BUILDERS):
        base = root / folder if os.path.isdir(root) else Path(folder)
        for file in map(str.strip, source.data_files.split(",")):
            if "://" not in file and not expand(file, base):
                raise UserError("data_files", f"no file {file}, here or in {base}")
