"""What flame takes from torchtitan, against the installed version and against docs/torchtitan.md, which lists it."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import sys
import textwrap
import types
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.models.moe import MoEArgs

from flame.config.parser import parse
from flame.models.hf import build_hf, read_config
from flame.parallel.apply import parallelize
from flame.titan import model as titan_model
from tests.layouts import MODELS

ROOT = Path(__file__).parents[1]
FLAME, PAGE = ROOT / "flame", ROOT / "docs" / "torchtitan.md"

# Methods flame replaces, extends or calls and that torchtitan may rename at will, with the parameters flame counts on.
METHODS = {
    "torchtitan.train.Trainer": {
        "__init__": ["job_config"],
        "train": [],
        "train_step": ["data_iterator"],
        "forward_backward_step": ["input_dict", "labels", "global_valid_tokens"],
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
    "torchtitan.distributed.ParallelDims": {"_mesh_exist": ["name", "degree"]},
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


def split(name: str) -> tuple[str, str]:
    """The module of a dotted name, and the first name in it, "" if it is the module itself."""
    find(name)
    parts = name.split(".")
    length = max(i for i in range(len(parts) + 1) if ".".join(parts[:i]) in sys.modules)
    return ".".join(parts[:length]), ".".join(parts[length : length + 1])


def definitions(path: Path) -> dict[str, ast.AST]:
    """The functions, classes and methods of a file, as "name" or "Class.method"."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            found |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


def patches_others(tree: ast.AST, function: ast.AST) -> bool:
    """Whether a function sets an attribute of a module or class that the file imports from elsewhere than flame."""
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    foreign = {
        (alias.asname or alias.name).split(".")[0]
        for node in imports
        for alias in node.names
        if not (getattr(node, "module", None) or alias.name).startswith("flame")
    }
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets = [ast.Attribute(node.args[0])]
        for target in targets:
            owner = target
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(target, ast.Attribute) and isinstance(owner, ast.Name) and owner.id in foreign:
                return True
    return False


class Broken(torch.nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x + 1


@pytest.mark.parametrize("fullgraph", [False, True])
def test_blocks_with_graph_breaks_compile_unless_the_family_is_one_graph(fullgraph):
    torch._dynamo.reset()
    off = dict.fromkeys(("cp_enabled", "tp_enabled", "fsdp_enabled", "dp_replicate_enabled"), False)
    family, layers = SimpleNamespace(fullgraph=fullgraph), torch.nn.ModuleDict({"0": Broken()})
    model = SimpleNamespace(layers=layers, family=family, norm=None)
    parallelize(model, SimpleNamespace(**off), parse(["--compile.enable", "--compile.backend=eager"]))
    with pytest.raises(Unsupported) if fullgraph else nullcontext():
        assert model.layers["0"](torch.zeros(1)) == 1


def test_training_keeps_its_graph_after_rows_of_another_length_have_made_one_of_any_length():
    torch._dynamo.reset()
    torch._C._dynamo.eval_frame._set_lru_cache(True)  # torch's default
    ran = []

    def backend(graph, examples):
        return lambda *inputs: (ran.append(graph), graph.forward(*inputs))[1]

    off = dict.fromkeys(("cp_enabled", "tp_enabled", "fsdp_enabled", "dp_replicate_enabled"), False)
    layers = torch.nn.ModuleDict({"0": torch.nn.Linear(2, 2)})
    config = parse(["--compile.enable"])
    config.compile.backend = backend
    model = SimpleNamespace(layers=layers, family=SimpleNamespace(fullgraph=True), norm=None)
    parallelize(model, SimpleNamespace(**off), config)
    for length in (4, 5, 6, 4):
        layers["0"](torch.zeros(length, 2))
    assert len(set(map(id, ran))) == 2, "lengths 5 and 6 share a graph"
    assert ran[-1] is ran[0]


class Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_rwkv7_is_built_without_filling_its_weights():
    _, config = read_config(MODELS["rwkv7"], "rwkv7")
    with Calls() as calls, torch.device("meta"):
        build_hf(config)
    assert calls.count < 500  # else 3,500, and more for a real size


@pytest.mark.parametrize("dtype, expected", [("bfloat16", True), ("float32", False)])
def test_experts_use_the_bfloat16_kernel_in_bfloat16_alone(dtype, expected, monkeypatch):
    monkeypatch.setattr(titan_model, "has_cuda_capability", lambda *_: True)
    experts = MoEArgs(use_grouped_mm=True)
    titan_model._limit_grouped_mm(experts, dtype)
    assert experts.use_grouped_mm == expected


TEXT = PAGE.read_text(encoding="utf-8")
PLACES = sorted(set(re.findall(r"`((?:flame|tests)/[\w/]+\.py)::([\w.]+)`", TEXT)))
LISTED = {
    module: set(re.findall(r"`(\w+)`", symbols))
    for module, symbols in re.findall(r"^\| `(torchtitan[\w.]*)` \| (.*?) \|", TEXT, flags=re.MULTILINE)
}


def test_the_page_lists_what_flame_imports_from_torchtitan():
    imported: dict[str, set[str]] = {}
    for module, symbol in map(split, BORROWED):
        imported.setdefault(module, set()).update({symbol} - {""})
    assert imported == LISTED


@pytest.mark.parametrize("file, name", PLACES)
def test_the_functions_and_tests_that_the_page_names_exist(file, name):
    assert name in definitions(ROOT / file)


def test_every_workaround_is_on_the_page_with_a_test():
    for path, text in SOURCES.items():
        file = path.relative_to(ROOT).as_posix()
        listed = {part for place, name in PLACES if place == file for part in (name, name.split(".")[0])}
        for name, node in definitions(path).items():
            declared = re.search("workarounds? for|workaround:", ast.get_docstring(node) or "", flags=re.IGNORECASE)
            if declared or (isinstance(node, ast.FunctionDef) and patches_others(ast.parse(text), node)):
                assert name in listed, f"{file}::{name}"
    rows = [row for row in TEXT.splitlines() if "`flame/" in row and row.startswith("|")]
    assert rows and all("`tests/" in row for row in rows)
