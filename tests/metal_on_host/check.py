"""Checks a kernel's syntax and address spaces, read as Metal, with clang's C++ for OpenCL (see ``opencl.h``)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from tests.metal_on_host.kept import kept
from tests.metal_on_host.text import INCLUDES, KernelError, body, defines, facts, numbered
from veloxlab.kernels.text import Source, source_file

COMPILER = "clang-16"
MOST_ARGUMENTS = 31  # Metal's limit for a kernel; an array's shape or strides are one each
# OpenCL has these, Metal does not: double precision, and variables outside of functions that are not `constant`
LACKING = ("cl_khr_fp64", "__opencl_c_fp64", "__opencl_c_device_enqueue", "__opencl_c_program_scope_global_variables")
FLAGS = (
    *("-x", "cl", "-cl-std=clc++2021", "-target", "spir64", "-cl-no-stdinc", "-fsyntax-only", *INCLUDES),
    *("-Xclang", "-cl-ext=" + ",".join(["+cl_khr_fp16", *(f"-{name}" for name in LACKING)])),
    "-Werror=pre-c++17-compat",  # up to macOS 15 Metal is C++14
    *("-Xclang", "-ast-dump"),
)
# In Metal a method belongs to an object in the thread's address space; in OpenCL it must state that.
_METHOD = re.compile(r"^  (FUNCTION [^{]*\)(?: const)?)(?= \{)", re.MULTILINE)
# OpenCL converts a pointer or reference without an address space to any of them; Metal does not.
_NO_SPACE = re.compile(
    r"(?:ParmVarDecl|VarDecl|FieldDecl) (?!.* implicit ).* (?!used |referenced )(\w+) '([^']*__generic[^']*)'"
    r"|(?:FunctionDecl|CXXMethodDecl) (?!.* implicit ).* (\w+) '([^'(]*__generic[^'(]*)\("
)
_FACTS = {"shape": "int", "strides": "long"}


def check_syntax(source: Source, dtypes: Mapping[str, str], constant: Collection[str] = ()) -> None:
    """Raise `KernelError` if Metal's compiler would refuse a kernel.

    ``dtypes``: element types of inputs and outputs in Metal's names. Inputs named in ``constant`` are in that
    address space, as MLX passes arrays of fewer than 8 elements.
    """
    taken = len(source.inputs) + len(source.outputs) + len(facts(source))
    if taken > MOST_ARGUMENTS:
        raise KernelError(f"{source.name}: {taken} arguments, where Metal has {MOST_ARGUMENTS}")
    text = _text(source, dtypes, constant)
    kept(".checked", COMPILER, [*FLAGS, _NO_SPACE.pattern], text, lambda path: _check(source.name, text, path))


def _check(kernel: str, text: str, path: Path) -> None:
    """Check ``text``, and write an empty file at ``path`` if it is valid."""
    outcome = subprocess.run([COMPILER, *FLAGS, "-"], input=text, capture_output=True, text=True)
    if outcome.returncode != 0:
        raise KernelError(f"{kernel}: {outcome.stderr[:4000]}")
    if found := _NO_SPACE.search(outcome.stdout):
        name, kind = (part for part in found.groups() if part)
        raise KernelError(f"{kernel}: {name} names no address space: {kind.replace('__generic ', '')}")
    path.touch()


def _text(source: Source, dtypes: Mapping[str, str], constant: Collection[str]) -> str:
    parameters = [
        f"const {'constant' if name in constant else 'device'} {dtypes[name]}* {name}" for name in source.inputs
    ]
    parameters += [f"device {dtypes[name]}* {name}" for name in source.outputs]
    parameters += [f"const constant {_FACTS[fact]}* {name}_{fact}" for name, fact in facts(source)]
    parameters += ["uint3 thread_position_in_threadgroup", "uint3 threadgroup_position_in_grid"]
    headers = [numbered(name, _METHOD.sub(r"  \1 thread", source_file(name))) for name in ("metal.h", *source.headers)]
    return "".join(
        [
            defines(source),
            '#include "opencl.h"\n',
            *headers,
            f"__kernel void {source.name}({', '.join(parameters)}) {{\n",
            body(source),
            "}\n",
        ]
    )
