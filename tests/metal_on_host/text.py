"""Parts of the text in which a kernel goes to a compiler of this machine, whose errors then name file and line."""

from __future__ import annotations

from pathlib import Path

import veloxlab.kernels
from veloxlab.kernels.text import Source

PRELUDES = Path(__file__).parent
HEADERS = Path(veloxlab.kernels.__file__).parent / "source"
INCLUDES = (f"-I{PRELUDES}", f"-I{HEADERS}")


class KernelError(AssertionError):
    """A kernel that does not compile, or does what no kernel may; the message says which, what and where."""


def defines(source: Source) -> str:
    """The kernel's definitions."""
    return "".join(f"#define {name} {value}\n" for name, value in source.defines)


def numbered(name: str, text: str) -> str:
    """Text whose lines the compiler counts as those of a file ``name``."""
    return f'#line 1 "{name}"\n{text}\n'


def body(source: Source) -> str:
    """The body, under the kernel's name."""
    return numbered(f"{source.name}.metal", source.body)


def facts(source: Source) -> list[tuple[str, str]]:
    """Inputs' shapes and strides that MLX passes, ``(array, "shape" or "strides")``: those that the body names."""
    return [(name, fact) for name in source.inputs for fact in ("shape", "strides") if f"{name}_{fact}" in source.body]
