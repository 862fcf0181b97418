"""The input of attention for a batch: the history of each sequence, or the shared buffers of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import mlx.core as mx

from veloxlab.cache.arithmetic import as_added
from veloxlab.cache.attention import FEW_QUERIES, History
from veloxlab.cache.buffers import Call
from veloxlab.cache.past import Segment, exact_arrays, with_exact_arrays
from veloxlab.cache.stack import Stack
from veloxlab.codecs import TENSORS, Code
from veloxlab.kernels.attend import AttendKernel
from veloxlab.kernels.call import Queries
from veloxlab.kernels.checked import agrees, evaluated, with_derivatives
from veloxlab.kernels.devices import current_backend
from veloxlab.kernels.splits import Sizes
from veloxlab.mlxlm.hooks import Handle, Mask, shape_in_common


class BatchRow(NamedTuple):
    """The history of one sequence of a batch (None if all its new tokens are padding), and its position."""

    history: History | None
    own: slice  # its tokens among the new ones; the others are padding
    column: int  # of its oldest token


@dataclass(frozen=True)
class BatchHistory(Handle):
    """The histories of a batch's sequences."""

    rows: tuple[BatchRow, ...]

    @property
    def dtype(self) -> mx.Dtype:
        """See `Handle.dtype`."""
        return self._one.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Handle.shape`; S is where the longest sequence ends."""
        _, heads, _, dim = self._one.shape
        end = max(column + history.tokens for history, _, column in self.rows if history is not None)
        return len(self.rows), heads, end, dim

    @property
    def _one(self) -> History:
        return next(row.history for row in self.rows if row.history is not None)

    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        """See `Handle.attend`; ``q`` ``[B, Hq, L, Dk]`` is padded, and the result for padding is 0."""
        parts: dict[int, mx.array] = {}
        if isinstance(mask, mx.array):
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        whole = slice(0, q.shape[2])
        histories = [row.history for row in self.rows if row.history is not None and row.own == whole]
        if q.shape[2] <= FEW_QUERIES and len(histories) == len(self.rows) and not isinstance(mask, str):
            together = attend_together(histories, [row.column for row in self.rows], q, scale, mask, sinks, cap)
            if together is not None:
                return together
        for i, (history, own, column) in enumerate(self.rows):
            if history is None:
                continue
            seen = mask
            if isinstance(mask, mx.array):
                at = i if mask.shape[0] > 1 else 0
                seen = mask[at : at + 1, :, own, column : column + history.tokens]
            done = history.attend(q[i : i + 1, :, own], scale, seen, sinks, cap)
            parts[i] = mx.pad(done, [(0, 0), (0, 0), (own.start, q.shape[2] - own.stop), (0, 0)])
        padding = mx.zeros_like(next(iter(parts.values())))
        return mx.concatenate([parts.get(i, padding) for i in range(len(self.rows))])


def attend_together(
    histories: Sequence[History],
    columns: Sequence[int],
    q: mx.array,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
    cap: float | None = None,
) -> mx.array | None:
    """Attention of few queries ``[B, Hq, L, Dk]`` of a batch with a history for each entry, by one call of a kernel.

    ``columns`` are the first columns of the histories in a mask ``[B or 1, 1 or Hq, L, S]``. None without a kernel.
    """
    backend, spaces = current_backend(), {history._spaces for history in histories}
    if backend is None or backend.together is None or None in spaces or len(spaces) > 1 or isinstance(mask, str):
        return None
    width = None if mask is None else as_added(mask, q, mask.shape[-1])
    queries = histories[0]._queries(q.astype(mx.float32), scale, width, sinks, cap)
    exact = [exact_arrays(history.segments) for history in histories]
    given = queries.q, queries.coded, queries.mask, queries.logits, *chain(*exact)
    if not evaluated(*(x for x in given if x is not None)):
        return None
    calls, recent = [], []
    for i, history in enumerate(histories):
        coded, masked = (None if x is None else x[i : i + 1] for x in (queries.coded, queries.mask))
        call = history._call(backend, replace(queries, q=queries.q[i : i + 1], coded=coded, mask=masked))
        if call is None:
            return None
        calls.append(call)
        recent.append(history.newest)
    out = histories[0]._brought_out(backend.together(calls, queries, recent, columns), q.dtype)

    def by_graph(q: mx.array, *arrays: mx.array) -> dict[str, mx.array]:
        parts, own = [], iter(arrays)
        for i, history in enumerate(histories):
            seen = History(with_exact_arrays(history.segments, own))
            columns_seen = None if width is None else width[i : i + 1, ..., columns[i] : columns[i] + history.tokens]
            parts.append(seen._attend_codes(q[i : i + 1], scale, columns_seen, sinks, cap))
        return {"out": mx.concatenate(parts)}

    return with_derivatives({"out": out}, by_graph, q, *chain(*exact))["out"]


class StackHistory(Handle):
    """The histories of a batch's sequences in a `veloxlab.cache.stack.Stack`, for the token that came last of each."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    @property
    def dtype(self) -> mx.Dtype:
        """See `Handle.dtype`."""
        exact: mx.array = next(iter(self._stack.held[-1].values()))
        return exact.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Handle.shape`; S is where the longest sequence ends."""
        stack, whole = self._stack, self._whole().segments[-1]
        end = max(a + b for a, b in zip(stack.columns, stack.lengths, strict=True))
        dims = whole.key_codec.head_dim, whole.value_codec.head_dim
        return shape_in_common((len(stack.rows), whole.key_codec.heads_of(whole.keys), end), *dims)

    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        stack = self._stack
        if mask is not None and (isinstance(mask, str) or mask is stack.mask_of_all(mask.shape[-1] - 1)):
            mask = None
        like = q.shape, q.dtype, scale, cap, mask is None, sinks is None
        if like not in stack.calls:
            stack.calls[like] = self._prepared(Queries(q, scale, mask=mask, logits=sinks, cap=cap))
        call = stack.calls[like]
        if call is None:
            return self._by_rows(Queries(q, scale, mask=mask, logits=sinks, cap=cap))
        return call.attend(q, mask, sinks, stack.sizes(call.kernel), stack.column)

    def _prepared(self, given: Queries) -> Call | None:
        """A function that attends by a kernel which agrees with the reference, or None."""
        stack, backend, whole, q = self._stack, current_backend(), self._whole(), given.q
        tokens = whole._tokens()
        if backend is None or tokens is None or (q.shape[0], q.shape[2]) != (len(stack.rows), 1):
            return None
        queries, scale, cap = _queries(whole, given), given.scale, given.cap
        kernel, written = backend.attention(queries, tokens, backend), {id(x) for x in stack.held[1].values()}
        in_place = all(id(x) in written for reader in (tokens.keys, tokens.values) for x in reader.stored_arrays)
        if not isinstance(kernel, AttendKernel) or not in_place:
            return None
        if not agrees(kernel, kernel.name, backend, lambda: whole._disagreement(kernel, queries, tokens)):
            return None
        read, recent = kernel.prepared_anywhere(queries, tokens), tokens.recent

        def attend(q: mx.array, mask: mx.array | None, sinks: mx.array | None, sizes: Sizes, end: int) -> mx.array:
            own = _queries(whole, Queries(q, scale, mask=mask, logits=sinks, cap=cap))
            return whole._brought_out(read(own, recent, sizes, end), q.dtype)

        return Call(attend, kernel)

    def _whole(self) -> History:
        """The content of the buffers, as if it were one sequence."""
        stack, segments = self._stack, []
        for held, codecs in zip(stack.held, (stack.exact, stack.codecs, stack.exact), strict=True):
            arrays = [
                {name.partition("/")[2]: array for name, array in held.items() if name.startswith(f"{tensor}/")}
                for tensor in TENSORS
            ]
            keys, values = (Code(own, stack.form.sinks) for own in arrays)
            segments.append(Segment(codecs[0], keys, codecs[1], values))
        return History(tuple(segments if stack.form.sinks else segments[1:]))

    def _by_rows(self, given: Queries) -> mx.array:
        stack, whole = self._stack, slice(0, given.q.shape[2])
        stack.refused = True
        stack.show()
        both = zip(stack.rows, stack.columns, strict=True)
        rows = tuple(BatchRow(row._history(), whole, column) for row, column in both)
        return BatchHistory(rows).attend(given.q, given.scale, given.mask, given.logits, given.cap)


def _queries(whole: History, given: Queries) -> Queries:
    added = None if given.mask is None else as_added(given.mask, given.q, given.mask.shape[-1])
    return whole._queries(given.q, given.scale, added, given.logits, given.cap)
