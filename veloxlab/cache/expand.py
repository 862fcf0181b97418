"""Keys or values of a layer, decoded for attention of many queries: by loops into one buffer, or by MLX operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import local

import mlx.core as mx

from veloxlab.codecs import Code, Codec
from veloxlab.codecs.none import Exact
from veloxlab.codecs.parts.rope import Start
from veloxlab.kernels.backend import Backend
from veloxlab.kernels.checked import agrees, difference, evaluated, made_up, with_derivatives
from veloxlab.kernels.devices import current_backend, device_backend
from veloxlab.kernels.expand import LARGEST_HALF, MOST_AFTER, SHARES, can_expand, expand, levels_in_codes
from veloxlab.kernels.readers import Reader

Parts = Sequence[tuple[Codec, Code]]  # consecutive tokens

_SMALL = 16 << 20  # bytes of a layer's decoded past below which it does not wait
_turn = local()  # the last query that waited
_TRIAL = 333  # tokens of each part in a trial of loops: a multiple of nothing


def expanded(parts: Parts, dtype: mx.Dtype, heads: slice, after: mx.array | None) -> mx.array:
    """Decoded tokens of all ``parts`` and some KV heads ``[B, H, S, D]``, computed only after ``after``."""
    backend = current_backend()
    if backend is not None and backend.lazy and _is_one_launch(backend, parts, dtype):
        return _launched(backend, parts, dtype, heads, after)
    if backend is None or not _can_be_written(backend, parts, dtype, after):
        return _by_graph(parts, dtype, heads, after)

    def by_graph(*given: mx.array) -> dict[str, mx.array]:
        arrays = iter(given)
        same = [(codec, Code({name: next(arrays) for name in code.arrays}, code.start)) for codec, code in parts]
        return {"out": _by_graph(same, dtype, heads, None)}

    return with_derivatives({"out": _written(backend, parts, dtype, heads)}, by_graph, *_arrays(parts))["out"]


def take_turn(q: mx.array, size: int) -> None:
    """Let a GPU expand the pasts of two layers at most at a time, since MLX allocates memory ahead.

    ``q`` are the queries of a layer, whose past has ``size`` decoded bytes. A small past does not wait.
    """
    if size < _SMALL or not device_backend().lazy:
        return
    before, _turn.query = getattr(_turn, "query", None), q[0, 0, 0, 0]
    with suppress(ValueError):  # see `evaluated`
        mx.async_eval(_turn.query)
        if before is not None:
            mx.eval(before)


def _arrays(parts: Parts) -> list[mx.array]:
    return [array for _, code in parts for array in code.arrays.values()]


def _by_graph(parts: Parts, dtype: mx.Dtype, heads: slice, after: mx.array | None, *, levels: bool = True) -> mx.array:
    """Decode some tokens after others, because decoding needs float32 buffers besides.

    With ``levels`` a kernel may decode codes to their levels.
    """
    decode = _decoded if levels else _by_codec
    tiles, at_once = [], device_backend().expanded_tokens
    for codec, code in parts:
        for start in range(0, code.tokens, at_once):
            tile = code[start : start + at_once]
            arrays = {name: array[:, heads] for name, array in tile.arrays.items()}
            if after is not None:
                before = mx.stop_gradient(after)  # an order has no derivatives
                arrays = {name: mx.depends(array, before) for name, array in arrays.items()}
            after = decode(codec, Code(arrays, tile.start), dtype)
            if dtype == mx.float16 and not isinstance(codec, Exact):  # a decoded number may exceed float16's range
                after = mx.clip(after, -LARGEST_HALF, LARGEST_HALF)
            tiles.append(after)
    return mx.concatenate(tiles, axis=2)


def _by_codec(codec: Codec, code: Code, dtype: mx.Dtype) -> mx.array:
    return codec.decode(code, dtype)


def _decoded(codec: Codec, code: Code, dtype: mx.Dtype) -> mx.array:
    """Decode by a kernel that gives levels and a matrix product of the codec, or by the codec alone."""
    backend, reader = current_backend(), None if isinstance(codec, Exact) else codec.reader(code)
    if backend is None or not backend.lazy or reader is None or not reader.levels_alone or not reader.shares(SHARES):
        return codec.decode(code, dtype)
    agrees = _agrees(backend, [(codec, code)], dtype, ["levels", reader.key], _leveled)
    return _leveled(backend, [(codec, code)], dtype, slice(None)) if agrees else codec.decode(code, dtype)


def _leveled(backend: Backend, parts: Parts, dtype: mx.Dtype, heads: slice) -> mx.array:
    """Decode one part by levels, in half precision unless ``dtype`` has more."""
    ((codec, code),) = parts
    reader = codec.reader(code)
    assert reader is not None
    of_levels = mx.float32 if dtype == mx.float32 else mx.float16
    return codec.from_codes(levels_in_codes(reader, of_levels, backend)).astype(dtype)


def _can_be_written(backend: Backend, parts: Parts, dtype: mx.Dtype, after: mx.array | None) -> bool:
    """Whether loops read these parts and agree with their codecs, and all inputs are evaluated."""
    readers = [reader_of(codec, code) for codec, code in parts if not isinstance(codec, Exact)]
    kinds = [reader.key for reader in readers if reader is not None]
    if backend.write is None or not readers or len(kinds) < len(readers):
        return False
    if not evaluated(*_arrays(parts), *([] if after is None else [after])):
        return False
    return _agrees(backend, parts, dtype, kinds, _written)


def _agrees(
    backend: Backend, parts: Parts, dtype: mx.Dtype, kinds: Sequence[object], way: Callable[..., mx.array]
) -> bool:
    """Whether a decoder agrees with the codecs of these parts."""

    def trial() -> str:
        codec, code = parts[-1]
        like = codec.heads_of(code), dtype
        made = [(codec, made_up_code(codec, code.start, _TRIAL, *like, seed=4)) for codec, code in parts]
        everything = dtype, slice(None)
        found, wanted = way(backend, made, *everything), _by_graph(made, *everything, None, levels=False)
        return difference({"out": found}, {"out": wanted})

    return agrees(("expand", dtype, *kinds), "expand", backend, trial)


def _is_one_launch(backend: Backend, parts: Parts, dtype: mx.Dtype) -> bool:
    """Whether one kernel decodes the packed part and copies the exact ones."""
    packed = [place for place, (codec, _) in enumerate(parts) if not isinstance(codec, Exact)]
    if len(packed) != 1 or packed[0] > 1 or len(parts) > packed[0] + 1 + MOST_AFTER:
        return False
    reader = reader_of(*parts[packed[0]])
    exact = [code.arrays["values"] for codec, code in parts if isinstance(codec, Exact)]
    if reader is None or not can_expand(reader, exact, dtype, backend):
        return False
    return _agrees(backend, parts, dtype, [reader.key], _launched)


def _launched(backend: Backend, parts: Parts, dtype: mx.Dtype, heads: slice, after: mx.array | None = None) -> mx.array:
    """Decode all parts by one kernel; see `_is_one_launch`."""
    runs = [code.arrays["values"] if isinstance(codec, Exact) else reader_of(codec, code) for codec, code in parts]
    at = next(place for place, run in enumerate(runs) if isinstance(run, Reader))
    before = runs[0] if at else None
    codec, code = parts[at]
    own = range(codec.heads_of(code))[heads]
    return expand(runs[at], before, runs[at + 1 :], dtype, own, after, backend)  # type: ignore[arg-type]


def _written(backend: Backend, parts: Parts, dtype: mx.Dtype, heads: slice) -> mx.array:
    """Decode all parts by loops into one buffer. If the codec itself leaves its space, that is done in tiles."""
    write, (codec, code) = backend.write, next(part for part in parts if not isinstance(part[0], Exact))
    assert write is not None
    at_once = backend.expanded_tokens
    batch, own = next(iter(code.arrays.values())).shape[0], range(codec.heads_of(code))[heads]
    out, place = _room(batch, len(own), sum(code.tokens for _, code in parts), codec.head_dim, dtype), 0
    for codec, code in parts:
        if isinstance(codec, Exact):
            write(code.arrays["values"], out, place, own.start, False)
        elif (reader := reader_of(codec, code)) is not None and reader.signs is not None:
            write(reader, out, place, own.start, True)
        else:
            for start in range(0, code.tokens, at_once):
                tile = codec.reader(code[start : start + at_once])
                assert tile is not None
                coded = _room(batch, len(own), tile.tokens, tile.dim, mx.float32)
                write(tile, coded, 0, own.start, False)
                write(codec.from_codes(coded), out, place + start, 0, True)
        place += code.tokens
    return out


def _room(batch: int, heads: int, tokens: int, dim: int, dtype: mx.Dtype) -> mx.array:
    """An evaluated array, to be written to."""
    out = mx.zeros((batch, heads, tokens, dim), dtype)
    mx.eval(out)
    return out


def reader_of(codec: Codec, code: Code) -> Reader | None:
    """The reader of a code, made once; None if no kernel reads it."""
    return code.once("reader", lambda: codec.reader(code))


def made_up_code(codec: Codec, start: Start, tokens: int, kv_heads: int, dtype: mx.Dtype, seed: int) -> Code:
    """A code of random bits, with scales like those of normal vectors; an exact codec gets normal vectors."""
    x = made_up(mx.zeros((1, kv_heads, 0, codec.head_dim), dtype), tokens, seed)
    arrays = codec.encode(x, start).arrays
    packed = {n: a for n, a in arrays.items() if mx.issubdtype(a.dtype, mx.unsignedinteger)}
    return Code(arrays | {name: made_up(array, tokens, seed) for name, array in packed.items()}, start)
