"""The layers: imports go down only, and each heavy library is imported by few modules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "embedpipe"

# From the bottom up. A package imports what stands below its layer; within a layer, what stands before it in ORDER.
LAYERS = [
    {"errors", "provenance", "storage"},
    {"data", "images", "evaluation", "training"},
    {"backbones", "cache", "heads"},
    {"inference", "features", "runs", "classifier", "selection"},
    {"commands"},
    {"config", "cli"},
    {"__main__", "__init__"},
]
ORDER = [
    ("errors", "storage"),
    ("data", "images"),
    ("inference", "classifier"),
    ("features", "classifier"),
    ("runs", "classifier"),
    ("features", "selection"),
    ("classifier", "selection"),
    ("config", "cli"),
]
COMPOSED = {"advise", "demo"}  # commands that run other commands
LIBRARIES = {
    "h5py": {"cache"},
    "timm": {"backbones/_timm.py", "backbones/_dinov2.py", "training/_steps.py"},
    "torchvision": {"backbones/_torchvision.py", "training/_steps.py"},
    "sklearn": {"heads/_sklearn.py", "evaluation", "commands/demo.py"},
    "yaml": {"config.py"},
    "pydantic": {"config.py"},
    "click": {"cli"},
    "rich_click": {"cli"},
    "rich": {"cli"},
    "PIL": {"images", "commands/demo.py"},
    "sqlite3": {"cache"},
    "pyarrow": {"cache", "data"},
    "fsspec": {"data/_files.py"},
    "datasets": {"data"},
    "tarfile": {"data/_tar.py"},
    "openvino": {"inference/_openvino.py"},
    "numba": {"images/_resampling.py"},
    "onnx": {"backbones/_dinov2.py"},  # torch's exporter uses it, too, and onnxscript
    "onnxruntime": {"commands/export/_formats.py"},
    "pickle": {"backbones/_weights.py", "commands/finetune/_checkpoint.py"},  # the error; an unpickler of arrays
    "joblib": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules_of(path: Path) -> set[str]:
    """Every module of embedpipe that a file imports, by its dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            both = [(node.module, f"{node.module}.{alias.name}") for alias in node.names]
            found |= {longer if longer in MODULES else module for module, longer in both}
    return {name for name in found if name.split(".")[0] == "embedpipe"}


def layer_of(package: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if package in packages)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    here = package_of(path)
    for name in modules_of(path):
        there = name.split(".")[1] if "." in name else here
        if there != here and here != "__init__":
            below = layer_of(there) < layer_of(here) or (there, here) in ORDER
            assert below, f"{here} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_modules_are_imported_by_their_package_alone(path: Path) -> None:
    here = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for name in modules_of(path):
        owner, _, private = name.partition("._")
        assert not private or here.startswith(f"{owner}."), f"{here} imports {name}"


def libraries_of(path: Path) -> set[str]:
    """Return the top-level names of what a file imports, of embedpipe and of others."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_heavy_libraries_are_imported_by_few_modules() -> None:
    """Each library by the files and packages that `LIBRARIES` names, and by all of these."""
    imports = {path.relative_to(PACKAGE).as_posix(): libraries_of(path) for path in FILES}
    for library, allowed in LIBRARIES.items():
        places = {place for place, libraries in imports.items() if library in libraries}
        found = {next((one for one in allowed if f"{place}/".startswith(f"{one}/")), place) for place in places}
        assert found == allowed, library


def test_files_do_not_import_each_other_in_a_circle() -> None:
    """Imports within functions and under TYPE_CHECKING count, too."""
    graph = {name: modules_of(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    while ends := [n for n in graph if not graph[n] or all(n not in needs for needs in graph.values())]:
        graph = {name: needs.difference(ends) for name, needs in graph.items() if name not in ends}
    assert not graph, f"circle among {sorted(graph)}"


def test_every_package_has_a_layer() -> None:
    assert {package_of(path) for path in FILES} == set().union(*LAYERS)


def test_commands_do_not_import_commands() -> None:
    """Two commands are made of others."""
    for name, path in MODULES.items():
        command = name.split(".")[2] if name.startswith("embedpipe.commands.") else None
        if command and command not in COMPOSED:
            others = {one for one in modules_of(path) if one.startswith("embedpipe.commands.")}
            assert {one.split(".")[2] for one in others} <= {command}, f"{name} imports {others}"


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
