"""Rooms of the package import only rooms below them, so no circle can be."""

import ast
from graphlib import TopologicalSorter
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


def imports(nodes):
    """Return the modules of the package that these nodes import; for a name from a package, the named module."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "veloxlab":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if name != "veloxlab":  # the public names come from all rooms
            yield name, path


def test_every_module_is_in_a_room():
    assert {room(name) for name, _ in modules()} == set(ROOMS)


def test_a_room_imports_only_rooms_below_it():
    wrong = {
        (name, imported)
        for name, path in modules()
        for imported in imports(ast.walk(ast.parse(path.read_text())))
        if ROOMS.index(room(imported)) > ROOMS.index(room(name))
    }
    assert not wrong


def test_no_file_is_imported_in_a_circle():
    """Imports at the tops of files, except for types: imports in functions and by `lazy_loader` come later."""
    files, tops = dict(modules()), {}
    for name, path in files.items():
        named = imports(ast.parse(path.read_text()).body)
        tops[name] = {each if each in files else each.rsplit(".", 1)[0] for each in named} & files.keys()
    assert {*TopologicalSorter(tops).static_order()} == files.keys()  # raises CycleError for a circle
