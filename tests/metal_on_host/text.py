"""Parts of the text with which a kernel goes to this machine's compiler, whose errors then name file and line."""

from __future__ import annotations

from pathlib import Path

import veloxlab.kernels
from veloxlab.kernels.text import Source

PRELUDES = Path(__file__).parent
HEADERS = Path(veloxlab.kernels.__file__).parent / "source"
INCLUDES = (f"-I{PRELUDES}", f"-I{HEADERS}")


class KernelError(AssertionError):
    """A kernel that does not compile, or does something forbidden; the message names kernel, fault and place."""


def defines(source: Source) -> str:
    """Return the kernel's definitions."""
    return "".join(f"#define {name} {value}\n" for name, value in source.defines)


def numbered(name: str, text: str) -> str:
    """Return text whose lines the compiler counts as those of a file ``name``."""
    return f'#line 1 "{name}"\n{text}\n'


def body(source: Source) -> str:
    """Return the body, under the kernel's name."""
    return numbered(f"{source.name}.metal", source.body)


def facts(source: Source) -> list[tuple[str, str]]:
    """Return the shapes and strides of inputs that MLX passes, ``(array, "shape" or "strides")``: those in the body."""
    return [(name, fact) for name in source.inputs for fact in ("shape", "strides") if f"{name}_{fact}" in source.body]
