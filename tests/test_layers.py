"""flame's imports go one way: a module imports flame's modules only from rows above its own."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (
    "errors data.fast data.document data.packed data.retry",
    "data.window data.jsonl data.megatron data.textfile checkpoint.element checkpoint.record checkpoint.report "
    "parallel.schedule",
    "legacy setting section log device schedule storage stop lock agreement checkpoint.chunk checkpoint.structure "
    "checkpoint.commit data.prefetch data.table "
    "models.family models.reference.precision models.reference.packing models.reference.delta_chunk",
    "data.source data.skip data.cursor data.order data.mixture data.tokenize data.pack data.ledger "
    "models.loss models.flops finite "
    "checkpoint.dcp_file checkpoint.safetensors_file checkpoint.proof checkpoint.writer "
    "models.reference.attention models.reference.convolution models.reference.linear_attention models.reference.norm "
    "models.reference.gate models.reference.hgrn models.reference.simple_gla models.reference.token_shift",
    "models.reference.gsa models.reference.lightnet models.reference.delta_rule models.reference.mamba "
    "models.reference.rwkv checkpoint.dcp_writer checkpoint.weights parallel.region",
    "config data.lane models.llama models.fla models.init models.reference "
    "parallel.tensor parallel.context parallel.pipeline parallel.layout checkpoint.convert "
    "checkpoint.dcp_reader",
    "input run data.loader checkpoint.export checkpoint.start parallel.apply "
    "models.neox models.falcon models.moe models.delta models.generic models.shrink quantize",
    "plan metrics checkpoint.initial parallel.titan models.table data.inspect data.corpus data.bench",
    "preflight validation checkpoint.manager models.hf models.counterpart data.__main__",
    "models.causal_lm models.titan blueprint",
    "spec models.audit models.listing activation",
    "trainer verify models.__main__ memory",
    "job dry_run",
    "launch train drills.job",
    "drills.drill drills.fault drills.rank",
    "drills.__main__",
)
STRANGERS = {"data": {"models"}, "models": {"data"}, "checkpoint": {"data", "models"}}  # whatever their rows


def modules() -> dict[str, Path]:
    """Every module under flame/ by its dotted name without "flame." before it; a package goes by its folder's name."""
    found = {}
    for path in sorted((ROOT / "flame").rglob("*.py")):
        parts = path.relative_to(ROOT / "flame").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def row(name: str) -> int | None:
    return next((i for i, names in enumerate(ROWS) if any(fnmatch(name, each) for each in names.split())), None)


def imported(tree: ast.AST, package: str, known: set[str]) -> Iterator[str]:
    """The modules of flame that a tree imports anywhere, inside functions too; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["flame", *filter(None, package.split("."))]
                base = ".".join(filter(None, [*above[: len(above) - node.level + 1], base]))
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in wanted:
            if name.split(".")[0] == "flame":
                inner = name.removeprefix("flame").removeprefix(".")
                yield inner if inner in known else inner.rpartition(".")[0]  # else a name inside a module


def complaints(name: str, source: str, package: str, known: set[str]) -> list[str]:
    """What breaks the order in one module's source, a line each."""
    own, found = row(name), []
    for other in imported(ast.parse(source), package, known):
        if other == "":  # flame itself: its version
            continue
        theirs = row(other)
        if own is None or theirs is None or theirs >= own:
            found.append(f"{name} (row {own}) imports {other} (row {theirs})")
        if other.split(".")[0] in STRANGERS.get(name.split(".")[0], ()):
            found.append(f"{name} and {other} must not know each other")
    return found


def asks_for_a_model_type(tree: ast.AST) -> bool:
    """Whether anything is compared with a `model_type`."""
    sides = [
        side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)
    ]
    return any(getattr(side, "attr", getattr(side, "id", "")) == "model_type" for side in sides)


def trusts_remote_code(tree: ast.AST) -> bool:
    """Whether `trust_remote_code` is ever literally True: as an argument, a default, an assignment or a key."""
    pairs: list[tuple[str | None, ast.AST | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            pairs.append((node.arg, node.value))
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            pairs += [(a.arg, d) for a, d in zip(reversed(positional), reversed(node.defaults), strict=False)]
            pairs += [(a.arg, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs += [(getattr(t, "attr", getattr(t, "id", None)), node.value) for t in targets]
        elif isinstance(node, ast.Dict):
            pairs += [(getattr(k, "value", None), v) for k, v in zip(node.keys, node.values, strict=True)]
    return any(n == "trust_remote_code" and isinstance(v, ast.Constant) and v.value is True for n, v in pairs)


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_rows_above_its_own(name):
    path, known = modules()[name], set(modules())
    is_package = path.name == "__init__.py"
    package = name if is_package else name.rpartition(".")[0]
    if is_package and row(name) is None:  # a package with a row is a module with rooms
        assert not list(imported(ast.parse(path.read_text()), package, known)), "importing a package imports nothing"
    else:
        assert row(name) is not None, f"{name} is in no row: give it one, in the table here"
        assert complaints(name, path.read_text(), package, known) == []


@pytest.mark.parametrize("name", modules())
def test_families_are_told_apart_in_models_alone_and_remote_code_is_never_trusted_unasked(name):
    tree = ast.parse(modules()[name].read_text())
    assert name.startswith("models") or not asks_for_a_model_type(tree)
    assert not trusts_remote_code(tree)


@pytest.mark.parametrize(
    "name, source",
    [
        ("config", "from flame.trainer import FlameTrainer"),
        ("config", "def f():\n    import flame.train"),
        ("data.loader", "from . import loader"),
        ("data.lane", "from .loader import build_dataloader"),
        ("data.loader", "from ..models.loss import build_loss"),
        ("checkpoint.export", "from flame.data import tokenize"),
        ("legacy", "from flame.device import choose"),
    ],
)
def test_an_import_against_the_order_is_found(name, source):
    known = {
        "config",
        "trainer",
        "train",
        "legacy",
        "device",
        "data.loader",
        "data.lane",
        "data.tokenize",
        "models.loss",
    }
    assert complaints(name, source, name.rpartition(".")[0], known)


def test_imports_along_the_order_are_let_through():
    source = "import torch\nfrom flame import __version__\nfrom flame.errors import UserError\nfrom .lane import Lane"
    assert complaints("data.loader", source, "data", {"errors", "data.lane", "data.loader"}) == []


@pytest.mark.parametrize("source", ["if config.model_type == 'gla': pass", "x = model_type in ('llama',)"])
def test_a_question_for_the_model_type_is_found(source):
    assert asks_for_a_model_type(ast.parse(source))
    assert not asks_for_a_model_type(ast.parse("family = by_model_type[config.model_type]"))


@pytest.mark.parametrize(
    "source",
    [
        "load(path, trust_remote_code=True)",
        "def load(path, trust_remote_code=True): pass",
        "def load(path, *, trust_remote_code=True): pass",
        "trust_remote_code: bool = True",
        "options = {'trust_remote_code': True}",
    ],
)
def test_remote_code_trusted_unasked_is_found(source):
    assert trusts_remote_code(ast.parse(source))
    assert not trusts_remote_code(ast.parse(source.replace("True", "False")))
