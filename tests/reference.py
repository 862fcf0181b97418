"""Writes notebooks/18_reference.ipynb: every public name with its signature, what it is for, shapes and units.

Run ``python -m tests.reference`` after a change of a public name or of its docstring.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import nbformat

import veloxlab as vl

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "18_reference.ipynb"
ROOMS = (
    ("vl", vl, "The top"),
    ("vl.measure", vl.measure, "Measurements"),
    ("vl.allocate", vl.allocate, "Allocation of bits"),
    ("vl.widgets", vl.widgets, "Widgets"),
    ("vl.codecs", vl.codecs, "Algorithms"),
    ("vl.models", vl.models, "Models"),
    ("vl.mlxlm", vl.mlxlm, "mlx-lm"),
    ("vl.texts", vl.texts, "Texts"),
    ("vl.views", vl.views, "Charts"),
)
SECTIONS = ("Parameters", "Attributes", "Returns", "Raises")
INTRODUCTION = """# Reference

Every public name, with its signature, its purpose, and the shapes and units of its arguments and results.
`python -m tests.reference` generates this notebook from the docstrings.
"""
COUNT = "import veloxlab as vl\n\nprint(len(vl.__all__), 'names and modules at the top')"


def names(room: object) -> list[str]:
    """Return the declared public names of a module, without the modules in it."""
    declared = getattr(room, "__all__")  # noqa: B009 - a module's type has none
    return sorted(name for name in declared if not inspect.ismodule(getattr(room, name)))


def entry(prefix: str, name: str, thing: object) -> str:
    """Return a name as Markdown: signature, purpose, shapes and units."""
    signature, is_value = f"{prefix}.{name}", not inspect.isroutine(thing) and not inspect.isclass(thing)
    if not is_value:
        try:
            signature += re.sub(r"<[^<>]* at 0x\w+>", "…", str(inspect.signature(thing)))
        except ValueError:
            signature += "(…)"
    shown = f"A dictionary by {', '.join(map(repr, thing))}." if isinstance(thing, dict) else f"`{thing}`"
    words = (not is_value and inspect.getdoc(thing)) or shown
    first, *rest = re.split(rf"\n\n(?=(?:{'|'.join(SECTIONS)})\n-+\n)", words)
    # without such sections, shapes and units are in the paragraphs after the first
    said = [re.sub(r"\n(?!- )\s*", " ", paragraph) for paragraph in first.split("\n\n")]
    lines = [f"### `{prefix}.{name}`", f"```python\n{signature}\n```", *(said[:1] if rest else said)]
    for section in rest:
        title, _, body = section.split("\n", 2)
        lines.append(f"**{title}**\n\n```text\n{body.strip()}\n```")
    return "\n\n".join(lines)


def notebook() -> str:
    """Return the notebook as text."""
    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    count = nbformat.v4.new_code_cell(COUNT, execution_count=1)
    said = f"{len(vl.__all__)} names and modules at the top\n"
    count.outputs = [nbformat.v4.new_output("stream", name="stdout", text=said)]
    cells = [nbformat.v4.new_markdown_cell(INTRODUCTION), count]
    for prefix, room, title in ROOMS:
        cells.append(nbformat.v4.new_markdown_cell(f"## {title}: `{prefix}`"))
        cells += [nbformat.v4.new_markdown_cell(entry(prefix, name, getattr(room, name))) for name in names(room)]
    for i, cell in enumerate(cells):
        cell["id"] = f"reference-{i}"
    book.cells = cells
    return nbformat.writes(book) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook())
