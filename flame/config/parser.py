"""`parse(argv)`: the config of a run, defaults < TOML file < flags, and its two printed forms, --help and TOML.

The values are placed and checked here rather than by tyro, so that a mistake in a flag and the same mistake in a TOML
get the same one-line answer; tyro writes the --help page.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import logging
import os
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import tyro
from torchtitan.config.manager import ConfigManager, custom_registry

from flame.config import legacy
from flame.config.paths import exists
from flame.config.schema import DataSource, JobConfig
from flame.config.setting import Setting, nearest, read_flags, read_toml, typed
from flame.errors import UserError

logger = logging.getLogger("flame")

# How one setting was given in a TOML or in flags: {spelling: (what to call it, its last value or Later)}.
Spellings = dict[str, tuple[str, Any]]

_PATHS = ("job.dump_folder", "model.config", "model.tokenizer_path", "checkpoint.initial_load_path")


def setting_types(section: Any = JobConfig, prefix: str = "") -> dict[str, Any]:
    """{dotted path: type} of every setting of a config class."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(section):
        path = prefix + f.name
        found |= setting_types(f.type, path + ".") if dataclasses.is_dataclass(f.type) else {path: f.type}
    return found


def parse(argv: list[str]) -> JobConfig:
    """The config of a command line: defaults < TOML named by --job.config_file < flags.

    Older spellings are understood in both; settings that follow from others are filled in. Raises UserError.
    """
    flags = read_flags(argv)
    files = [s for s in flags if s.path == "job.config_file"]
    file = _shipped("--job.config_file", typed(files[-1], str)) if files else None
    toml = read_toml(file) if file else []
    config = _config_class(toml + flags)()
    types = setting_types(type(config))

    placed: dict[str, Spellings] = {}
    unless_given: dict[str, Any] = {}
    for settings in (toml, flags):
        layer: dict[str, Spellings] = {}
        for setting in settings:
            spelling, values, defaults = _targets(setting, types)
            unless_given |= defaults
            for path, value in values.items():
                layer.setdefault(path, {})[spelling] = (setting.where, value)
                if not isinstance(value, legacy.Later):
                    _assign(config, path, value)
        placed |= layer
    for path, value in unless_given.items():
        if path not in placed:
            _assign(config, path, value)

    _compute(config, placed)
    config.job.config_file = file or None
    if config.model.tokenizer_path:
        config.model.hf_assets_path = config.model.tokenizer_path
    if config.training.varlen and config.training.context_len is None:
        config.training.context_len = min(2048, config.training.seq_len)
    config.job.dry_run |= config.memory_estimation.enable  # whose answer is a part of the dry run's
    _check_sections(config)
    return config


def _config_class(settings: list[Setting]) -> type[JobConfig]:
    """JobConfig, with the fields of the user's own module merged in if one is named."""
    named = [s for s in settings if s.path in ("job.custom_config_module", "experimental.custom_args_module")]
    if not named or not (module := typed(named[-1], str)):
        return JobConfig
    try:
        return ConfigManager._merge_configs(JobConfig, importlib.import_module(module).JobConfig)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        raise UserError(f"{named[-1].where}: cannot take a JobConfig from {module}: {e}") from None


def _targets(setting: Setting, types: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The spelling of a setting, {today's path: value or Later} and {path: older default} that come with it."""
    path, negated = setting.path, False
    if setting.value == {} and any(known.startswith(path + ".") for known in (*types, *legacy.TABLE)):
        return path, {}, {}  # an empty TOML section
    if path not in legacy.TABLE and path not in types:
        section, _, name = path.removeprefix("no_").rpartition(".")
        path, negated = f"{section}.{name.removeprefix('no_')}", True
    old = legacy.TABLE.get(path)
    kind = types.get(path) if old is None else old.kind or types[old.to]
    if kind is None or (negated and kind is not bool):
        near = nearest(setting.path, [*types, *legacy.TABLE])
        hint = f", did you mean {'--' if setting.from_flag else ''}{near}?" if near else "; -h lists all"
        raise UserError(f"{setting.where} is not a setting{hint}")
    setting = dataclasses.replace(setting, value=legacy.rename_value(path, setting.value))
    value = typed(setting, kind) != negated if kind is bool else typed(setting, kind)
    if path in _PATHS and value:
        value = os.path.expanduser(value)  # the shell leaves the ~ of --flag=~/folder alone
    if path == "model.config" and value:
        value = _shipped(setting.where, value)
    if old is None:
        return path, {path: value}, {}
    with _naming(setting.where):
        targets = old.targets(value)
    if old.ignored:
        _note(f"{setting.where} is ignored: {old.ignored}")
    return path, targets, old.unless_given


def _compute(config: JobConfig, placed: dict[str, Spellings]) -> None:
    """Fill in what follows from other settings; refuse two spellings of one setting that disagree."""
    for path, spellings in placed.items():
        for where, value in spellings.values():
            if isinstance(value, legacy.Later):
                with _naming(where):
                    _assign(config, path, value.compute(config, world_size()))
        final = attrgetter(path)(config)
        for where, value in spellings.values():
            # A list agrees when nothing of it is lost: float8 is added to the converters that were named.
            agrees = value == final or (isinstance(value, list) and all(item in final for item in value))
            if not agrees and not isinstance(value, legacy.Later):
                other = next(w for w, v in spellings.values() if v == final or isinstance(v, legacy.Later))
                raise UserError(f"{where} ({value}) and {other} ({final}) disagree about {path}: give only one of them")


def _assign(config: JobConfig, path: str, value: Any) -> None:
    section, _, name = path.rpartition(".")
    setattr(attrgetter(section)(config), name, value)


def _check_sections(config: JobConfig) -> None:
    # torchtitan's own checks of a section run when it is made, before we fill it.
    for f in dataclasses.fields(config):
        if post_init := getattr(getattr(config, f.name), "__post_init__", None):
            try:
                post_init()
            except (ValueError, AssertionError) as e:
                raise UserError(f"{f.name}: {e}") from None


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _shipped(where: str, path: str) -> str:
    found = legacy.shipped_file(path)
    if found != path:
        _note(f"{where}: there is no {path} here, using {found}")
    return found


def _note(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # once per run, not once per process
        logger.warning(line)


def world_size() -> int:
    """Processes of this run: WORLD_SIZE under torchrun, else NNODE x NGPU, else 1."""
    counts = ["WORLD_SIZE"] if os.environ.get("WORLD_SIZE") else ["NNODE", "NGPU"]
    product = 1
    for name in counts:
        text = os.environ.get(name) or "1"
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"environment variable {name}: found {text!r}, must be an integer of 1 or more")
        product *= int(text)
    return product


def help_text() -> str:
    """The --help page: every setting with its type, default and docstring, plain text."""
    registry = copy.deepcopy(custom_registry)

    @registry.primitive_rule
    def show_tables(info: Any) -> Any:  # tyro leaves a list of tables out of the page
        if info.type != list[DataSource]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(1, "TABLES", list, lambda _: False, lambda _: ["none"])

    page = io.StringIO()
    description = (
        "Train a language model. Every flag is also a TOML key: --training.steps is steps under [training]. "
        "Spellings of flame 0.x and LLMonade are understood too; docs/flags.md lists them."
    )
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(
            JobConfig,
            prog="train.sh",
            description=description,
            args=["--help"],
            use_underscores=True,
            registry=registry,
        )
    return "".join(line.rstrip() + "\n" for line in page.getvalue().splitlines())


def recorded(config: JobConfig) -> JobConfig:
    """What a run folder keeps: a copy whose local paths hold from any folder, and which resumes when it is run."""

    def absolute(path: str) -> str:
        path = os.path.expanduser(path.strip())
        return os.path.abspath(path) if exists(path) else path

    config = copy.deepcopy(config)
    config.checkpoint.load_step, config.checkpoint.create_seed_checkpoint = -1, False
    config.checkpoint.start = "auto"
    for path in _PATHS:
        if value := attrgetter(path)(config):
            _assign(config, path, absolute(value))
    config.job.dump_folder = os.path.abspath(config.job.dump_folder)
    config.model.hf_assets_path = config.model.tokenizer_path or ""
    for source in config.data.sources:
        source.path = absolute(source.path)
    for section in (config.training, config.validation):
        section.dataset = ",".join(absolute(item) for item in section.dataset.split(","))
    return config


def to_toml(config: JobConfig) -> str:
    """A TOML that gives this config again. Settings that are None by default are left out, as TOML has no null."""
    import tomli_w

    return tomli_w.dumps(_plain(config, type(config)()))


def _plain(section: Any, default: Any) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for f in dataclasses.fields(section):
        value, usual = getattr(section, f.name), getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            table[f.name] = _plain(value, usual)
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            table[f.name] = [{k: v for k, v in dataclasses.asdict(row).items() if v is not None} for row in value]
        elif value is not None or usual is not None:
            table[f.name] = "none" if value is None else value
    return table


@contextlib.contextmanager
def validation_as_training(config: JobConfig) -> Iterator[JobConfig]:
    """A copy whose training section names validation's data; UserErrors in the block name validation's flags."""
    held_out = config.validation
    training = dataclasses.replace(
        config.training,
        dataset=held_out.dataset,
        dataset_path=held_out.dataset_path,
        dataset_name=held_out.dataset_name,
        dataset_split=held_out.dataset_split,
        data_dir=None,
        data_files=held_out.data_files,
        data_probs=None,
    )
    try:
        yield dataclasses.replace(config, training=training, data=dataclasses.replace(config.data, sources=[]))
    except UserError as error:
        raise UserError(str(error).replace("--training.", "--validation.")) from None
