"""The files and hub ids a job names: whether those that should be here are, and fit together."""

import json
import math
import os
from pathlib import Path
from typing import Any

from flame.config.paths import exists, is_local
from flame.config.schema import JobConfig
from flame.errors import UserError

_BUILDERS = ("json", "parquet", "text", "csv", "arrow")  # of load_dataset: the data is in data_files
# torchtitan's models that train here; of the others flux makes images, llama3_ft needs torchft, gpt_oss always a GPU.
TITAN = ("deepseek_v3", "llama3", "llama4", "qwen3")
_LISTS = ("dataset_name", "dataset_split", "data_dir", "data_files", "data_probs")


def _require(flag: str, name: str) -> None:
    if is_local(name) and not exists(name):
        raise UserError(f"--{flag}: there is no {name}")


def check_model(config: JobConfig) -> None:
    """Refuse a model or tokenizer that is missing or broken, and a tokenizer larger than the model."""
    model = config.model
    if model.name not in ("auto", *TITAN):
        raise UserError(
            f"--model.name: found {model.name!r}, must be auto (the model_type of --model.config decides) or one of "
            f"torchtitan's {', '.join(TITAN)}"
        )
    if model.name != "auto" and model.config:
        raise UserError(
            f"--model.config: found {model.config}, must be none with --model.name {model.name}, whose sizes are its "
            "--model.flavor's"
        )
    if model.name == "auto" and not model.config:
        raise UserError("--model.config: not set, must be a model JSON (configs/), a Hugging Face folder or a hub id")
    if not model.tokenizer_path:
        raise UserError("--model.tokenizer_path: not set, must be byte, a folder, a tokenizer.json or a hub id")
    if twice := [token for i, token in enumerate(model.add_tokens) if token in model.add_tokens[:i]]:
        raise UserError(f"--model.add_tokens: found {twice[0]} twice")
    if not all(model.add_tokens):
        raise UserError("--model.add_tokens: found an empty item, every item must be a token")
    if model.tokenizer_path != "byte":
        _require("model.tokenizer_path", model.tokenizer_path)
    if not model.config:
        return
    _require("model.config", model.config)
    path = Path(model.config).expanduser()
    path = path / "config.json" if os.path.isdir(path) else path
    if not is_local(str(path)):
        return  # a hub id
    described = _read_json("model.config", path)
    if not isinstance(described.get("model_type"), str):
        raise UserError(f"--model.config: {path} names no model_type, so it is no Hugging Face model config")
    room, ids = described.get("vocab_size"), vocab_of_tokenizer(model.tokenizer_path)
    if isinstance(room, int) and ids is not None and ids > room and not model.grow_vocab:
        raise UserError(
            f"--model.tokenizer_path: {model.tokenizer_path} has {ids} ids, but {model.config} has room for {room} "
            "(vocab_size); take the model's own tokenizer or add --model.grow_vocab"
        )


def vocab_of_tokenizer(path: str) -> int | None:
    """Ids a tokenizer needs (largest id + 1, added tokens too); None if only loading it would tell, as for a hub id."""
    if path == "byte":
        return 257
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if os.path.isdir(file) else file
    if file.suffix != ".json" or not os.path.isfile(file):
        return None
    tokenizer = _read_json("model.tokenizer_path", file)
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])], default=-1) + 1
    except (KeyError, TypeError) as e:
        raise UserError(f"--model.tokenizer_path: {file} is no tokenizer: {e!r}") from None


def _read_json(flag: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"--{flag}: cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"--{flag}: {path} is no valid JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"--{flag}: {path} holds a {type(found).__name__}, must be a JSON object")
    return found


def check_data(config: JobConfig) -> None:
    """Refuse data that is missing here, lists of unequal length and shares that are none."""
    training = config.training
    if config.data.sources:
        _check_tables(config)
        return
    datasets = training.dataset.split(",")
    if not all(name.strip() for name in datasets):
        raise UserError(f"--training.dataset: found {training.dataset!r}, every item must be a path or a hub id")
    items: dict[str, list[str]] = {}
    for name in _LISTS:
        text = getattr(training, name)
        if text is None:
            continue
        items[name] = [i.strip() for i in (text.split(",") if len(datasets) > 1 or name == "data_probs" else [text])]
        if len(items[name]) != len(datasets):
            raise UserError(
                f"--training.{name}: found {len(items[name])} items for {len(datasets)} datasets, must be as many "
                "(an empty item is none)"
            )
    _check_shares(items.get("data_probs", []))
    empty = [""] * len(datasets)
    rows = zip(datasets, items.get("data_dir", empty), items.get("data_files", empty), strict=True)
    for dataset, folder, files in rows:
        _check_source(dataset.strip(), folder, files)


def _check_tables(config: JobConfig) -> None:
    given = [name for name in _LISTS if getattr(config.training, name) is not None]
    if config.training.dataset != type(config.training).dataset:
        given.insert(0, "dataset")
    if given:
        raise UserError(f"--training.{given[0]}: the sources are in [[data.sources]], give only one of the two")
    names = [source.name for source in config.data.sources if source.name]
    for i, source in enumerate(config.data.sources):
        where = f"data.sources[{i}]"
        if not 0 < source.weight < math.inf:
            raise UserError(f"{where}.weight: found {source.weight}, must be a number above 0")
        if names.count(source.name or "") > 1:
            raise UserError(f"{where}.name: found {source.name!r} twice, every source must have a name of its own")
        try:
            _check_source(source.path, source.data_dir or "", source.data_files or "")
        except UserError as error:
            said = str(error).replace("--training.dataset:", f"{where}.path:").replace("--training.", f"{where}.")
            raise UserError(said) from None


def _check_shares(texts: list[str]) -> None:
    try:
        shares = [float(text) for text in texts]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share < math.inf for share in shares):
        raise UserError(f"--training.data_probs: found {','.join(texts)}, every item must be a number above 0")
    if shares and abs(sum(shares) - 1) > 1e-3:
        raise UserError(f"--training.data_probs: found a sum of {sum(shares):g}, the items must sum to 1")


def _check_source(dataset: str, folder: str, files: str) -> None:
    if dataset == "stdlib":
        return
    _require("training.dataset", dataset)
    root = Path(dataset).expanduser()
    if os.path.isdir(root) and folder and not exists(str(root / folder)):
        raise UserError(f"--training.data_dir: there is no {folder} in {dataset}")
    # What a hub id calls its files only the hub knows.
    if files and (os.path.isdir(root) or dataset in _BUILDERS):
        base = root / folder if os.path.isdir(root) else Path(folder)
        for file in files.split(","):
            if not exists(file.strip()) and not exists(str(base / file.strip())):
                raise UserError(f"--training.data_files: there is no {file.strip()}, here or in {base}")
