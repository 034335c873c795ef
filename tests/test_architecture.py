"""House rules that a reader could break unseen: which room imports which, and no heavy import at the top."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit

ROOT = Path(lorakit.__file__).parent

# An arrow points from the room that imports to those it may import; every room may import itself.
ARROWS: dict[str, set[str]] = {
    "core": {"ops"},
    "ops": set(),
    "parts": {"core", "ops"},
    "methods": {"core", "ops", "parts"},
    "adapters": {"core", "ops"},
    "data": {"core"},
    "train": {"core", "ops", "parts", "adapters", "data"},
    "serve": {"core", "ops", "parts", "adapters", "data", "train"},
    "federated": {"core", "ops", "parts", "adapters", "data", "train"},
    "bayes": {"core", "ops", "parts", "adapters", "data", "train"},
    "apps": {"core", "ops", "parts", "adapters", "data", "train", "serve", "federated", "bayes"},
    "integrations": {"core", "ops", "parts", "adapters", "data", "train", "serve"},
    "cli": {"core", "ops", "parts", "adapters", "data", "train", "serve", "federated", "bayes", "apps", "integrations"},
}
# Two doors that core opens when it is asked to, never at its top: `Adapted.save` and `load`.
DEFERRED = {("core.attach", "adapters.io")}
# adapters/ is pure: an adapter at rest knows no model that holds one.
CLOSED = {"adapters": {"core.attach", "core.unfreeze", "core.context", "core.params", "core.events"}}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name below lorakit -> syntax tree."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.AST) -> set[tuple[str, bool]]:
    """(dotted name below lorakit, whether at the top of the file)."""
    top = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Module) for node in node.body}
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
            if node.module in ("lorakit", *(f"lorakit.{room}" for room in ARROWS)):  # `from lorakit.ops import reference`
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {(n.removeprefix("lorakit."), id(node) in top) for n in names if n.startswith("lorakit.")}
    return found


EDGES = [(name, target, top) for name, tree in modules().items() if name for target, top in sorted(imports(tree))]


def room(name: str) -> str:
    return name.split(".")[0]


def test_there_are_edges_and_every_room_is_known() -> None:
    assert len(EDGES) > 100
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert rooms <= ARROWS.keys()


def test_arrows_point_one_way() -> None:
    wrong = [
        f"{name} -> {target}"
        for name, target, top in EDGES
        if room(target) not in ARROWS[room(name)] | {room(name)} and ((name, target) not in DEFERRED or top)
    ]
    assert not wrong
    order = ["ops", "core", "parts", "methods", "data", "adapters", "train", "serve", "federated", "bayes", "integrations", "apps", "cli"]
    assert all(order.index(to) < order.index(of) for of, allowed in ARROWS.items() for to in allowed), "the table itself has no cycle"


def test_only_discovery_imports_methods() -> None:
    assert not [f"{name} -> {target}" for name, target, _ in EDGES if room(target) == "methods" and room(name) != "methods"]
    constants = [(name, node.value) for name, tree in modules().items() for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    named = [name for name, value in constants if value == "lorakit.methods"]
    assert set(named) <= {"core.method", "cli.docs", "cli.scaffold"}
    assert "core.method" in named


def test_closed_doors() -> None:
    assert not [f"{name} -> {target}" for name, target, _ in EDGES if target in CLOSED.get(room(name), ())]


def test_no_cycles_between_modules() -> None:
    graph: dict[str, set[str]] = {}
    for name, target, top in EDGES:
        if top and target in modules():
            graph.setdefault(name, set()).add(target)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


EXTRA = {"peft", "accelerate", "datasets", "matplotlib", "sklearn", "pandas", "pyarrow"}
OF_TRAINING = {"AdapterTrainerMixin", "adapter_trainer"}


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import lorakit", EXTRA | {"typer", "transformers", "torch", "numpy"}),
        ("import lorakit; [getattr(lorakit, n) for n in lorakit.__all__ if n not in OF_TRAINING]", EXTRA | {"typer", "transformers"}),
        ("import lorakit; lorakit.list_methods()", EXTRA | {"typer", "transformers"}),
        ("import lorakit.cli.main", EXTRA | {"transformers", "torch", "numpy"}),
    ],
)
def test_what_importing_lorakit_imports(code: str, heavy: set[str]) -> None:
    found = (
        f"import sys; sys.path[:0] = {sys.path!r}; OF_TRAINING = {OF_TRAINING!r}; {code}; print(*{{m.split('.')[0] for m in sys.modules}})"
    )
    imported = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(imported)


def test_every_name_of_lorakit_is_there() -> None:
    names: dict[str, object] = {}
    exec("from lorakit import *", names)
    assert set(lorakit.__all__) <= names.keys() and set(lorakit.__all__) <= set(dir(lorakit))
    with pytest.raises(AttributeError, match="no attribute 'attach_'"):
        lorakit.__getattr__("attach_")
