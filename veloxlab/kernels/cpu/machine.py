"""The basis of the loops: numbers at addresses, calls through addresses, and the compilation of functions.

A loop gets its arrays as addresses and strides in one array of int64, because an array argument takes Numba 0.3 µs, and
a decode step calls a loop in every layer. The owner of such a description keeps its arrays alive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import caching, config, event
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import intrinsic

from veloxlab.progress import notice
from veloxlab.store import kept_in

Function = TypeVar("Function", bound=Callable[..., Any])

# sums may be reordered and fused; NaN and infinity keep their meaning
_OPTIONS: Final[dict[str, Any]] = {
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"},
}
_EXPAND: Final = 6  # number of arguments of an `expander`


@cache
def folder() -> str:
    """The cache folder of compiled loops, by a hash of the files in this folder.

    Numba compiles again if the file of a loop has changed, but not if the file of a part of it has.
    """
    checksum = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        checksum.update(path.read_bytes())
    return str((Path(config.CACHE_DIR) if config.CACHE_DIR else kept_in("loops")) / checksum.hexdigest()[:16])


@contextmanager
def _kept() -> Iterator[None]:
    """Loops that are decorated inside are cached in our folder; others are not affected.

    Numba would use a subfolder for each installation path of these files, and compile again there.
    """
    place, before = folder(), (config.CACHE_DIR, caching._CacheLocator.get_suitable_cache_subpath)
    config.CACHE_DIR, caching._CacheLocator.get_suitable_cache_subpath = place, staticmethod(lambda path: "")
    try:
        yield
    finally:
        config.CACHE_DIR, caching._CacheLocator.get_suitable_cache_subpath = before


def _where_it_can_be_kept(make: Callable[[bool], Any]) -> Any:
    """The result of ``make(cache)``, with the cache on disk if a folder can be written."""
    with _kept():
        try:
            return make(True)
        except RuntimeError:  # Numba finds no folder
            return make(False)


def compiled(function: Function) -> Function:
    """A loop: compiled at its first call, cached on disk, run without the GIL."""
    options = _OPTIONS | {"nogil": True, "no_cfunc_wrapper": True}
    loop: Function = _where_it_can_be_kept(lambda cache: njit(cache=cache, **options)(function))
    return loop


class _Unfinished(JITCodeLibrary):
    """A part as LLVM IR, without its own machine code: the loop that it is linked to optimizes and compiles it."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None: ...

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """There is no machine code."""
        return 0

    @property
    def codegen(self) -> Any:
        """The function has no Python objects."""
        return self

    def set_env(self, name: str, environment: object) -> None:
        """See `codegen`."""


class _Piece(Compiler):
    """Numba's compiler, up to an `_Unfinished` part."""

    def __init__(self, types: Any, target: Any, library: Any, *others: Any) -> None:
        super().__init__(types, target, _Unfinished(target.codegen(), "piece"), *others)


def part(function: Function) -> Function:
    """A part of a loop, compiled with each loop that calls it."""
    options = _OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _Piece}
    piece: Function = njit(**options)(function)
    return piece


def expander(function: Callable[..., None]) -> Callable[[], int]:
    """A function that loops call through its address: it writes some tokens of a tensor as float32.

    Its arguments are the address of a description, a batch entry, a KV head, the first token, the number of tokens, and
    the address of the output. The result is a function that compiles it at the first call and returns its address.
    """

    @cache
    def made() -> Any:
        kind = types.void(*[types.int64] * _EXPAND)
        return _where_it_can_be_kept(lambda cache: cfunc(kind, cache=cache, **_OPTIONS)(function))

    return lambda: int(made().address)


class _Compiling(event.Listener):
    """Reports the compilation of our loops: on a new machine the first call of each takes a second."""

    def on_start(self, event: Any) -> None:
        """See the base class; a loop that is read from disk gives no event."""
        if event.data["dispatcher"].py_func.__module__.startswith(__package__):
            notice("compiling loops for this processor: some seconds, once")

    def on_end(self, event: Any) -> None:
        """See the base class."""


event.register("numba:compile", _Compiling())


def _pointer(kind: Any) -> Any:
    """A function of loops: the numbers of a type at an address."""

    @intrinsic
    def at(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return at


i64_at, f32_at, u64_at = _pointer(types.int64), _pointer(types.float32), _pointer(types.uint64)
i32_at, u32_at, u16_at, u8_at = (_pointer(kind) for kind in (types.int32, types.uint32, types.uint16, types.uint8))


@intrinsic
def call_expander(_, function, description, batch, head, first, count, out):
    """Call the `expander` at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * _EXPAND)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (_EXPAND + 1)), generate


@intrinsic
def float_of_bits(_, bits):
    """The float32 that has these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def half(_, bits):
    """The float16 that has these bits, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate
