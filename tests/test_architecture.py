"""The floors and doors of the house: imports go down only, and heavy libraries enter by few doors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "embedpipe"

FLOORS = [
    {"errors", "compiling", "disk", "places", "provenance", "metrics", "neighbours", "training"},
    {"manifest", "images", "runs"},
    {"backbones", "cache", "heads"},
    {"executors", "forwarding", "drift", "pipeline", "recall", "features", "network", "scoring", "recipe"},
    {"classifier", "ranking", "folds", "leaks"},
    {
        "extraction",
        "fitting",
        "finetuning",
        "prediction",
        "evaluation",
        "comparing",
        "auditing",
        "exporting",
        "caretaking",
        "proving",
    },
    {"config", "demo", "advising"},
    {"cli"},
    {"__main__", "__init__"},
]
# On these floors rooms may use their neighbours, in this order: the first knows none of the others.
STAIRS = [["errors", "disk"], ["errors", "places"], ["errors", "training"], ["errors", "metrics"]]
STAIRS += [["executors", "forwarding"], ["forwarding", "drift"], ["forwarding", "pipeline"], ["drift", "pipeline"]]
DOORS = {
    "h5py": {"cache"},
    "timm": {"backbones/_timm.py", "training/_layers.py"},
    "torchvision": {"backbones/_torchvision.py", "training/_mixing.py"},
    "sklearn": {"heads/_sklearn.py", "metrics", "demo.py"},
    "yaml": {"config.py"},
    "pydantic": {"config.py"},
    "click": {"cli"},
    "rich_click": {"cli"},
    "rich": {"cli", "demo.py"},
    "PIL": {"images", "demo.py", "backbones"},
    "sqlite3": {"cache"},
    "pyarrow": {"cache", "places/_parquet.py", "manifest/_parquet.py"},
    "fsspec": {"places/_remote.py"},
    "datasets": {"places/_hub.py", "manifest/_hub.py"},
    "tarfile": {"manifest/_tar.py"},
    "openvino": {"executors/_openvino.py"},
    "numba": {"compiling.py"},
    "onnx": set(),  # torch's exporter uses it and onnxscript
    "onnxruntime": {"exporting/_onnx.py"},
    "pickle": {
        "backbones/_state.py",
        "backbones/weights.py",
        "finetuning/_unfinished.py",
    },  # the error; an unpickler of arrays
    "joblib": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every imported module of a file, with whether it is for type checking only."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                names = [f"embedpipe.{a.name}" for a in child.names] if module == "embedpipe" else [module]
                found.extend((name, inside) for name in names)
            walk(child, inside)

    walk(ast.parse(path.read_text()), False)
    return found


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    here = room_of(path)
    for name, typing_only in imports_of(path):
        parts = name.split(".")
        if parts[0] != "embedpipe" or len(parts) == 1 or parts[1] == here or here == "__init__":
            continue
        there = parts[1]
        same_floor = floor_of(there) == floor_of(here) and (typing_only or [there, here] in STAIRS)
        assert floor_of(there) < floor_of(here) or same_floor, f"{here} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_enter_by_their_doors(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name, _ in imports_of(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or any(place == d or place.startswith(f"{d}/") for d in doors), f"{place} imports {name}"


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room_of(path) for path in FILES}
    assert rooms == set().union(*FLOORS)


def test_no_deed_imports_a_deed() -> None:
    """Only the doors combine deeds; `__init__` is the Python door."""
    deeds = FLOORS[5]
    for path in FILES:
        if room_of(path) in deeds:
            named = {name.split(".")[1] for name, _ in imports_of(path) if name.startswith("embedpipe.")}
            assert not (named & deeds) - {room_of(path)}


def test_functions_stay_short() -> None:
    """No function grows past 60 lines without its docstring."""
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node, clean=False) or ""
                size = (node.end_lineno or 0) - node.lineno + 1 - len(doc.splitlines())
                if size > 60:
                    long.append(f"{path.name}:{node.name} {size}")
    assert not long


def test_every_constant_is_used() -> None:
    """A constant that only its own line names is dead, even where another file has one of that name."""
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    taken = {(one.module, alias.name) for one in nodes if isinstance(one, ast.ImportFrom) for alias in one.names}
    asked = {one.attr for one in nodes if isinstance(one, ast.Attribute)}
    dead = []
    for path, tree in trees.items():
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        read = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}
        for name in constants_of(tree) - read - asked:
            if (module, name) not in taken and not name.startswith("__"):
                dead.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert not dead


def constants_of(tree: ast.Module) -> set[str]:
    """Return the names, with a capital, that assignments at the top of a module give."""
    assignments = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    inside = [one for node in assignments for one in ast.walk(node) if isinstance(one, ast.Name)]
    return {one.id for one in inside if isinstance(one.ctx, ast.Store) and not one.id.islower()}
