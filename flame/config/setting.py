"""One setting as a user wrote it, on the command line or in a TOML, and its conversion to the type of its field."""

import contextlib
import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, Union, get_args, get_origin

import tomli

from flame.config.files import read_text
from flame.errors import UserError


class Layer(IntEnum):
    """Where a setting was given; a higher layer overrides a lower one, and all of them override the defaults."""

    OLDER_DEFAULT = 0  # comes along with an older spelling
    TOML = 1
    FLAGS = 2


@dataclass(frozen=True)
class Setting:
    """One setting as a user wrote it.

    path: dotted. where: how errors name it. value: of a flag, text (one word a string, none or several a tuple); of a
    TOML key, what the TOML holds. older: the older spelling that gave it, if one did. negated: "no_" stood before it.
    """

    path: str
    where: str
    value: Any
    layer: Layer = Layer.TOML
    older: str = ""
    negated: bool = False


def read_flags(argv: list[str]) -> list[Setting]:
    """The settings of a command line, in its order. Raises UserError for words before the first flag."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        elif not found:
            named = {".toml": "--job.config_file", ".json": "--model.config"}.get(os.path.splitext(word)[1])
            example = f"as in {named} {word}" if named else "as in --training.steps 100"
            raise UserError(repr(word), hint=f"not a flag; flags start with --, {example}")
        else:
            found[-1][1].append(word)
    return [
        Setting(flag[2:].replace("-", "_"), flag, words[0] if len(words) == 1 else tuple(words), Layer.FLAGS)
        for flag, words in found
    ]


def read_toml(file: str) -> list[Setting]:
    """The settings of a TOML file. Raises UserError if it cannot be read or is not valid TOML, with the line."""
    try:
        tables = tomli.loads(read_text(os.path.expanduser(file)))
        repr(tables)  # fails for integers of thousands of digits
    except FileNotFoundError:
        raise UserError("--job.config_file", f"no file {file}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError("--job.config_file", hint=f"cannot read {file} as text in UTF-8: {e}") from None
    except (ValueError, RecursionError) as e:  # RecursionError: tables in tables by the thousand
        raise UserError(file, hint=f"not valid TOML: {e}") from None
    return list(_flatten(tables, "", file))


def _flatten(table: dict[str, Any], prefix: str, file: str) -> Iterable[Setting]:
    known: dict[str, str] = {}
    for key, value in table.items():
        path = prefix + key.replace("-", "_")
        if known.setdefault(path, key) != key:
            raise UserError(f"{file}: {prefix}{key}", hint=f"{known[path]} is the same setting: give only one of them")
        if isinstance(value, dict) and value:
            yield from _flatten(value, path + ".", file)
        else:
            yield Setting(path, f"{file}: {prefix}{key}", value)


def resolve_negation(setting: Setting, known: Container[str]) -> Setting:
    """The setting under its known path if "no_" stands before that or before its last name; else the setting itself."""
    section, _, name = setting.path.removeprefix("no_").rpartition(".")
    path = f"{section}.{name.removeprefix('no_')}"
    return replace(setting, path=path, negated=True) if setting.path not in known and path in known else setting


def typed(setting: Setting, kind: Any) -> Any:
    """The value of a setting converted to the type of its field. Raises UserError if it is not one of that type."""
    value = setting.value
    arms = _arms(kind)
    if setting.negated and bool not in arms:
        raise UserError(setting.where, hint=f"not a setting, as {setting.path} is not true or false")
    if isinstance(value, tuple):
        if value == () and bool in arms:
            return not setting.negated
        if value == ():
            raise UserError(setting.where, "no value", describe(kind))
        if list[str] not in arms:
            raise UserError(setting.where, " ".join(value), "one value", _misread(value[1:]))
        value = ",".join(value)
    if (table := _table(kind)) is not None and isinstance(value, list) and all(isinstance(v, dict) for v in value):
        return [_fill(table, row, f"{setting.where}[{i}]") for i, row in enumerate(value)]
    for arm in arms:
        try:
            converted = _convert(arm, value, setting.layer is Layer.FLAGS)
            return not converted if setting.negated else converted
        except OverflowError:
            raise UserError(setting.where, "a number beyond 64 bits", describe(kind)) from None
        except UnicodeError:
            raise UserError(setting.where, repr(value), "text in UTF-8 without null characters") from None
        except ValueError:
            continue
    raise UserError(setting.where, repr(value), describe(kind))


def _misread(words: Iterable[str]) -> str:
    """What further words of a flag most likely are: a flag without its two hyphens, or a value with spaces."""
    for word in words:
        name = word.lstrip("-\u2013\u2014")  # a web page makes one dash of two hyphens
        if name != word or re.fullmatch(r"[a-z]\w*(\.[a-z]\w*)+(=.*)?", word):
            return f"{word} is no flag, did you mean --{name}?"
    return "quote a value that has spaces"


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _convert(kind: Any, value: Any, from_flag: bool) -> Any:
    """`value` as one plain type; ValueError if it is not one. Text counts as a number or a truth only in a flag."""
    if kind is type(None) and value in (None, "none", "None"):  # TOML has no null, so the word means it there too
        return None
    if kind is bool and isinstance(value, str) and from_flag and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and not isinstance(value, bool) and (from_flag or isinstance(value, int | float)):
        return _number(kind, value)
    if kind is str and isinstance(value, str):
        return _text(value)
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if kind == list[str] and isinstance(value, str):
        return [item.strip() for item in _text(value).split(",") if item.strip()]
    if kind == list[str] and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return [_text(v) for v in value]
    if kind == list[list[str]] and isinstance(value, list):
        return [_convert(list[str], v, from_flag) for v in value]
    raise ValueError(value)


def _table(kind: Any) -> Any:
    """The dataclass in a type that is a list of dataclasses; None for any other type."""
    item = get_args(kind)[0] if get_origin(kind) is list else None
    return item if dataclasses.is_dataclass(item) else None


def _fill(table: Any, row: dict[str, Any], where: str) -> Any:
    """An object of a class with the values of a TOML table."""
    fields = {f.name: f for f in dataclasses.fields(table)}
    for key in row:
        if key not in fields:
            near = nearest(key, fields)
            hint = f"did you mean {near}?" if near else f"the settings are {', '.join(fields)}"
            raise UserError(f"{where}.{key}", hint=f"not a setting, {hint}")
    needed = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in row]
    if needed:
        raise UserError(f"{where}.{needed[0]}", "no value", describe(fields[needed[0]].type))
    return table(**{key: typed(Setting(key, f"{where}.{key}", value), fields[key].type) for key, value in row.items()})


def _text(value: str) -> str:
    """The same text. Raises UnicodeError if config.toml cannot record it, or no file could have it as its name."""
    value.encode()  # a word of the command line that is not UTF-8 has lone surrogates
    if "\0" in value:
        raise UnicodeError(value)
    return value


def _number(kind: Any, value: Any) -> int | float:
    number = float(value)
    if math.isnan(number) or (kind is int and not number.is_integer()):
        raise ValueError(value)
    if kind is float:
        return number
    if abs(number) >= 2**63:
        raise OverflowError(value)
    with contextlib.suppress(ValueError):
        return int(value)  # 1e4 is a number that int() does not read
    return int(number)


def describe(kind: Any) -> str:
    """The values a type allows, in words."""
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        type(None): "none",
        list[str]: "a list such as a,b",
        list[list[str]]: "a list of lists of names, set in a TOML",
    }
    if (table := _table(kind)) is not None:
        return f"tables of a TOML with the keys {', '.join(f.name for f in dataclasses.fields(table))}"
    # none is tried first and named last; where a number is allowed, an integer is not named too
    arms = [arm for arm in reversed(_arms(kind)) if arm is not int or float not in _arms(kind)]
    return " or ".join(words.get(arm) or "one of " + ", ".join(map(str, get_args(arm))) for arm in arms)


def _arms(kind: Any) -> list[Any]:
    arms = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return sorted(arms, key=lambda arm: arm is not type(None))  # none first: any word would do as text


_ELSEWHERE = {  # what transformers' Trainer and others call a setting
    "learning_rate": "optimizer.lr",
    "max_steps": "training.steps",
    "num_train_epochs": "data.epochs",
    "per_device_train_batch_size": "training.local_batch_size",
    "micro_batch_size": "training.local_batch_size",
    "max_seq_length": "training.seq_len",
    "block_size": "training.seq_len",
    "max_grad_norm": "training.max_norm",
    "warmup_ratio": "lr_scheduler.warmup_steps",
    "model_name_or_path": "model.config",
    "output_dir": "job.dump_folder",
    "save_steps": "checkpoint.interval",
    "logging_steps": "metrics.log_freq",
    "eval_steps": "validation.freq",
}


def nearest(path: str, known: Iterable[str]) -> str | None:
    """The known path a user most likely meant: the same last name in another section, else the closest spelling."""
    path = path.lower()
    known, name = list(known), path.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == name or k == _ELSEWHERE.get(name)]
    close = difflib.get_close_matches(path, same or known, 1, cutoff=0.0 if same else 0.6)
    return close[0] if close else None
