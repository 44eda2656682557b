"""`parse(argv)`: the config of a run, defaults < TOML file < flags, and its two printed forms, --help and TOML.

The values are placed and checked here rather than by tyro, so that a mistake in a flag and the same mistake in a TOML
get the same one-line answer; tyro writes the --help page.
"""

import contextlib
import copy
import dataclasses
import io
import logging
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

import tyro
from torchtitan.config.manager import ConfigManager, custom_registry

from flame.config import legacy
from flame.config.paths import exists
from flame.config.record import run_of
from flame.config.schema import DataSource, JobConfig
from flame.config.setting import Layer, Setting, nearest, read_flags, read_toml, resolve_negation, typed
from flame.config.user_module import import_module
from flame.errors import UserError, first_line

logger = logging.getLogger("flame")
_PATHS = ("job.dump_folder", "model.config", "model.tokenizer_path", "checkpoint.initial_load_path")
_CODE = (  # settings that name code
    *("job.custom_config_module", "experimental.custom_args_module", "experimental.custom_import"),
    "model.trust_remote_code",
)


def setting_types(section: Any = JobConfig, prefix: str = "") -> dict[str, Any]:
    """{dotted path: type} of every setting of a config class; a field with init=False is not a setting."""
    found: dict[str, Any] = {}
    for f in filter(attrgetter("init"), dataclasses.fields(section)):
        path = prefix + f.name
        found |= setting_types(f.type, path + ".") if dataclasses.is_dataclass(f.type) else {path: f.type}
    return found


def parse(argv: list[str], *, trusted: bool = True) -> JobConfig:
    """The config of a command line: defaults < TOML named by --job.config_file < flags, older spellings too.

    Settings that follow from others are filled in. Raises UserError for what is not a setting, for values of another
    type, and for two spellings of one setting that disagree; unless `trusted`, also for one that names code to run.
    """
    settings = legacy.translate(read_flags(argv))
    files = [s for s in settings if s.path == "job.config_file"]
    file = typed(files[-1], str) if files else None
    if files and not file:
        raise UserError(files[-1].where, "''", "a TOML file")
    if file:
        brought = legacy.translate(read_toml(file))
        if files[-1].older:
            legacy.log_job_file(files[-1], brought, settings)
        settings = [*brought, *settings]
    if not trusted:
        _check_no_code(settings)
    config = _config_class(settings)()
    given = [s for s in settings if not callable(s.value)]
    _place(config, given)
    if computed := [s for s in settings if callable(s.value)]:
        ranks = world_size()
        layers = {s.path: s.layer for s in sorted(settings, key=attrgetter("layer"))}  # the highest one of each
        _place(config, [*given, *(_compute(s, config, ranks) for s in computed if s.layer == layers[s.path])])

    config.job.config_file = file or None
    if file and not any(s.path == "job.dump_folder" and s.layer is Layer.FLAGS for s in settings):
        config.job.dump_folder = _run_folder(file, config.job.dump_folder)
    if config.model.tokenizer_path:
        config.model.hf_assets_path = config.model.tokenizer_path
    if config.training.varlen and config.training.context_len is None:
        config.training.context_len = min(2048, config.training.seq_len)
    if config.validation.enable:
        for name in ("local_batch_size", "seq_len"):
            if getattr(config.validation, name) is None:
                setattr(config.validation, name, getattr(config.training, name))
    _check_sections(config)
    return config


def _run_folder(file: str, recorded: str) -> str:
    """Where a run is: beside its config.toml, whatever that says, as the folder may have been moved or copied."""
    folder = run_of(file)
    if folder is None or os.path.realpath(recorded) == os.path.realpath(folder):
        return recorded
    logger.warning(f"{file} is the run in {folder}, although it says job.dump_folder {recorded}: moved or copied")
    return str(folder)


def parse_recorded(run: Path, *, trusted: bool) -> JobConfig:
    """The settings that a run folder records. trusted: the user trusts the code that they name.

    Raises UserError for a folder without config.toml, and as `parse` does.
    """
    path = run / "config.toml"
    if not path.is_file():
        raise UserError(str(run), "no file config.toml", "the folder of a run")
    return parse([f"--job.config_file={path}", f"--job.dump_folder={run}"], trusted=trusted)


def _check_no_code(settings: list[Setting]) -> None:
    types = setting_types()
    for setting in (resolve_negation(setting, types) for setting in settings):
        if setting.path in _CODE and (value := typed(setting, types[setting.path])):
            hint = "it is code that the run names: read it, then add --trust_run"
            raise UserError(setting.where, value, hint=hint)


def _config_class(settings: list[Setting]) -> type[JobConfig]:
    """JobConfig, with the fields of the user's own module merged in if one is named."""
    last = {s.path: s for s in settings if s.path in ("job.custom_config_module", "experimental.custom_args_module")}
    named = next((setting for setting in last.values() if typed(setting, str)), None)
    if named is None:
        return JobConfig
    try:
        return ConfigManager._merge_configs(JobConfig, import_module(named.value).JobConfig)
    except Exception as e:  # whatever the user's module raises
        raise UserError(named.where, named.value, "a module with a JobConfig", first_line(e)) from None


def _place(config: JobConfig, settings: list[Setting]) -> None:
    """Assign every setting from the highest layer that has it. Spellings of one setting in one layer must agree."""
    types = setting_types(type(config))
    placed: dict[str, tuple[Setting, Any]] = {}
    for setting in sorted(settings, key=attrgetter("layer"), reverse=True):
        setting = resolve_negation(setting, types)
        if setting.path not in types:
            _check_is_section(setting, [*types, *legacy.RENAMED, *legacy.CHANGED])
            continue
        value = typed(setting, types[setting.path])
        if setting.path in _PATHS and value:
            value = os.path.expanduser(value)  # the shell leaves the ~ of --flag=~/folder alone
        before, known = placed.get(setting.path, (setting, value))
        if setting.layer < before.layer:
            continue
        # A list agrees with a shorter one that it extends: float8 is added to the converters that were named.
        agrees = value == known or (isinstance(value, list) and all(item in value for item in known))
        if setting.older != before.older and not agrees:
            both, values = f"{before.where} and {setting.where}", f"{known} and {value}"
            raise UserError(both, values, "equal", f"both are {setting.path}: give only one of them")
        placed[setting.path] = setting, value
    for path, (_, value) in placed.items():
        _assign(config, path, value)


def _check_is_section(setting: Setting, known: list[str]) -> None:
    """Raises UserError, with the setting that was meant, unless it is an empty section of a TOML."""
    if setting.value == {} and any(path.startswith(setting.path + ".") for path in known):
        return
    if any(path.startswith(setting.path + ".") for path in known):
        raise UserError(
            setting.where, hint=f"not a setting, but a section of them; -h lists {setting.path}. and its names"
        )
    near = nearest(setting.path, known)
    meant = f", did you mean {'--' if setting.layer is Layer.FLAGS else ''}{near}?" if near else "; -h lists all"
    raise UserError(setting.where, hint=f"not a setting{meant}")


def _compute(setting: Setting, config: JobConfig, ranks: int) -> Setting:
    try:
        return dataclasses.replace(setting, value=setting.value(config, ranks))
    except UserError as error:
        raise error.at(setting.where) from None


def _assign(config: JobConfig, path: str, value: Any) -> None:
    section, _, name = path.rpartition(".")
    setattr(attrgetter(section)(config), name, value)


def _check_sections(config: JobConfig) -> None:
    # torchtitan validates a section when it is made, before its values are assigned here.
    for f in dataclasses.fields(config):
        if post_init := getattr(getattr(config, f.name), "__post_init__", None):
            try:
                post_init()
            except (ValueError, AssertionError) as e:
                raise UserError(f.name, hint=str(e)) from None


def world_size() -> int:
    """Processes of this run: WORLD_SIZE under torchrun, else NNODE x NGPU, else 1."""
    counts = ["WORLD_SIZE"] if os.environ.get("WORLD_SIZE") else ["NNODE", "NGPU"]
    product = 1
    for name in counts:
        text = os.environ.get(name) or "1"
        if not text.isdecimal() or int(text) < 1:
            raise UserError(name, repr(text), "an integer of 1 or more", "it is an environment variable")
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
        options: Any = {"prog": "train.sh", "description": description, "use_underscores": True}
        tyro.cli(JobConfig, args=["--help"], registry=registry, **options)
    return "".join(line.rstrip() + "\n" for line in page.getvalue().splitlines())


def recorded(config: JobConfig) -> JobConfig:
    """The copy that a run folder keeps: its local paths hold from any folder, and it resumes when it is run."""

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
    for f in filter(attrgetter("init"), dataclasses.fields(section)):
        value, usual = getattr(section, f.name), getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            table[f.name] = _plain(value, usual)
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            table[f.name] = [{k: v for k, v in dataclasses.asdict(row).items() if v is not None} for row in value]
        elif value is not None or usual is not None:
            table[f.name] = "none" if value is None else value
    return table
