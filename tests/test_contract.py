"""What flame takes from torchtitan, held against the installed version: the first test to read when that one moves."""

import ast
import importlib
import importlib.metadata
import inspect
import textwrap
import types
from pathlib import Path

import pytest

FLAME = Path(__file__).parents[1] / "flame"

# Methods flame replaces, extends or calls and that torchtitan may rename at will, with the parameters flame counts on.
METHODS = {
    "torchtitan.train.Trainer": {
        "__init__": ["job_config"],
        "train": [],
        "train_step": ["data_iterator"],
        "forward_backward_step": ["input_dict", "labels", "global_valid_tokens"],
        "post_dataloading_process": ["input_dict", "labels"],
        "state_dict": [],
        "load_state_dict": ["state_dict"],
        "close": [],
    },
    "torchtitan.components.checkpoint.CheckpointManager": {
        "__init__": ["checkpoint_config"],
        "load": ["step"],
        "save": ["curr_step", "last_step"],
        "dcp_save": ["state_dict", "checkpoint_id", "async_mode", "enable_garbage_collection", "to_hf"],
        "dcp_load": ["state_dict", "checkpoint_id", "from_hf", "from_quantized"],
        "_states_to_load": ["model_only"],
        "_flattened_model_states_sd": [],
        "close": [],
        "maybe_wait_for_staging": [],
        "_should_save": ["curr_step", "last_step"],
        "_save_last_step": ["curr_step"],
        "_purge_stale_checkpoints": [],
        "_create_checkpoint_id": ["step"],
        "_async_wait": [],
    },
    "torchtitan.components.metrics.MetricsProcessor": {
        "__init__": ["job_config", "parallel_dims", "tag"],
        "log": ["step", "global_avg_loss", "global_max_loss", "grad_norm", "extra_metrics"],
        "should_log": ["step"],
    },
    "torchtitan.components.lr_scheduler.LRSchedulersContainer": {"state_dict": [], "load_state_dict": ["state_dict"]},
    "torchtitan.components.dataloader.BaseDataLoader": {"__iter__": [], "state_dict": [], "load_state_dict": []},
    "torchtitan.protocols.state_dict_adapter.StateDictAdapter": {
        "to_hf": ["state_dict"],
        "from_hf": ["hf_state_dict"],
        "get_hf_storage_reader": ["path", "from_quantized"],
    },
    "torchtitan.config.manager.ConfigManager": {"_merge_configs": ["base", "custom"]},
}


def find(dotted: str) -> object:
    """The object a dotted name stands for. Raises AttributeError where torchtitan has no such thing (any more)."""
    parts = dotted.split(".")
    found: object = importlib.import_module(parts[0])
    for i, name in enumerate(parts[1:], 2):
        if isinstance(found, types.ModuleType) and not hasattr(found, name):
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ModuleNotFoundError:
                raise AttributeError(f"torchtitan has no {dotted}") from None
        elif name in getattr(found, "__annotations__", {}):  # a field without a default
            return None
        else:
            found = getattr(found, name)
    return found


def borrowed(source: str) -> set[str]:
    """Every dotted torchtitan name a source imports or reaches through an import."""
    tree, local, names = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torchtitan":
                    names.add(alias.name)
                    local[alias.asname or "torchtitan"] = alias.name if alias.asname else "torchtitan"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchtitan":
            for alias in node.names:
                names.add(f"{node.module}.{alias.name}")
                local[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        chain, below = [], node
        while isinstance(below, ast.Attribute):
            chain.insert(0, below.attr)
            below = below.value
        if chain and isinstance(below, ast.Name) and below.id in local:
            names.add(".".join([local[below.id], *chain]))
    return names


def own_attributes(tree: ast.AST, context: type) -> set[str]:
    """The names X of `self.X` (or `self.__dict__["X"]`) that are written (ast.Store) or read (ast.Load) in a class."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, context):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                names.add(node.attr)
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "self.__dict__":
                names.add(ast.literal_eval(node.slice))
    return names


def missing_attributes(cls: type) -> set[str]:
    """What a class reads of itself that neither it nor a base has, annotates or sets."""
    trees = {c: ast.parse(textwrap.dedent(inspect.getsource(c))) for c in cls.__mro__ if _has_source(c)}
    known = set(dir(cls)).union(*(inspect.get_annotations(c) for c in cls.__mro__))
    return own_attributes(trees[cls], ast.Load) - known.union(*(own_attributes(t, ast.Store) for t in trees.values()))


def _has_source(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("flame", "torchtitan", "torch", __name__.split(".")[0])


SOURCES = {path: path.read_text() for path in sorted(FLAME.rglob("*.py"))}
BORROWED = sorted(set().union(*map(borrowed, SOURCES.values())))
BORROWERS = [
    ".".join(path.relative_to(FLAME.parent).with_suffix("").parts) for path, text in SOURCES.items() if borrowed(text)
]


def test_the_installed_torchtitan_is_the_one_flame_was_written_against():
    assert importlib.metadata.version("torchtitan") == "0.2.2"


@pytest.mark.parametrize("name", BORROWED)
def test_torchtitan_has_what_flame_imports(name):
    find(name)


@pytest.mark.parametrize("owner, method", [(owner, method) for owner in METHODS for method in METHODS[owner]])
def test_torchtitan_has_the_methods_flame_replaces_or_calls(owner, method):
    parameters = inspect.signature(getattr(find(owner), method)).parameters
    assert [p for p in METHODS[owner][method] if p not in parameters] == []


@pytest.mark.parametrize("module", BORROWERS)
def test_a_subclass_reads_only_attributes_that_its_torchtitan_base_still_sets(module):
    for cls in vars(importlib.import_module(module)).values():
        own = inspect.isclass(cls) and cls.__module__ == module
        if own and any(base.__module__.startswith("torchtitan") for base in cls.__mro__):
            assert missing_attributes(cls) == set(), cls


def test_trainer_looks_its_checkpoint_manager_up_where_flame_puts_its_own():
    import torchtitan.train

    source = inspect.getsource(torchtitan.train.Trainer.__init__)
    assert "self.checkpointer = CheckpointManager(" in source


def test_an_unknown_device_still_counts_as_an_a100():
    from torchtitan.tools.utils import get_peak_flops

    assert get_peak_flops("no such device") == 312e12


def test_names_reached_through_an_import_are_collected_and_a_missing_one_is_found():
    source = """
import torchtitan.train
from torchtitan.config import job_config as titan
from torchtitan.tools.utils import gone
class A(titan.Model): pass
torchtitan.train.CheckpointManager = A
"""
    assert borrowed(source) == {
        "torchtitan.train",
        "torchtitan.train.CheckpointManager",
        "torchtitan.config.job_config",
        "torchtitan.config.job_config.Model",
        "torchtitan.tools.utils.gone",
    }
    for missing in ("torchtitan.tools.utils.gone", "torchtitan.gone.module", "torchtitan.train.Trainer.gone"):
        with pytest.raises(AttributeError):
            find(missing)


class Base:
    def __init__(self):
        self.kept = 1
        self.__dict__["hidden"] = 2


class Derived(Base):
    annotated: int

    def use(self):
        return self.kept + self.hidden + self.annotated + self.gone + self.use()


def test_an_attribute_that_nobody_sets_is_found():
    assert missing_attributes(Derived) == {"gone"}
