"""Rooms of the package import only rooms below them, so no circle can be."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "veloxlab"
BASE = ("errors", "checks", "store", "progress", "texts", "runtime", "offline")
ROOMS = (
    "base",
    "kernels",
    "codecs",
    "mlxlm",
    "cache",
    "models",
    "checkup",
    "measure",
    "views",
    "allocate",
    "widgets",
    "serve",
    "cli",
)


def room(module):
    name = module.split(".")[1]
    return "base" if name in BASE else name


def imports(path):
    """Modules of the package that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "veloxlab":
            yield from (f"veloxlab.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("veloxlab."):
            yield node.module


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if name != "veloxlab":  # the public names come from everywhere
            yield name, path


def test_every_module_is_in_a_room():
    assert {room(name) for name, _ in modules()} == set(ROOMS)


def test_a_room_imports_only_rooms_below_it():
    wrong = {
        (name, imported)
        for name, path in modules()
        for imported in imports(path)
        if ROOMS.index(room(imported)) > ROOMS.index(room(name))
    }
    assert not wrong
