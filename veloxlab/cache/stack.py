"""The sequences of a batch while they are decoded: a GPU reads one layer of all sequences by one launch.

Tokens that leave the windows are encoded into the shared buffers (`veloxlab.cache.buffers`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import mlx.core as mx

from veloxlab.cache import places
from veloxlab.cache.buffers import Buffers
from veloxlab.cache.coming import Checks, Largest
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.run import Arrays, Run, named
from veloxlab.codecs.base import empty_code
from veloxlab.errors import InputError
from veloxlab.kernels.checked import ahead
from veloxlab.kernels.devices import current_backend

Asked = tuple[list[list[CompressedKVCache]], list[list[CompressedKVCache]]]  # rows with open `Checks`


def can_share(rows: Sequence[CompressedKVCache]) -> bool:
    """Whether the device can read these rows by one launch."""
    backend, first = current_backend(), rows[0]
    if backend is None or not backend.lazy or first.path != "codes" or first.max_size is not None or first.lends:
        return False
    kind = _kind(first)
    if any(_kind(row) != kind or row.offset < max(1, row.max_sinks) for row in rows):
        return False
    none = [(codec, empty_code(codec, 1, _heads(first))) for codec in (first.key_codec, first.value_codec)]
    try:
        return not any(codec.online or codec.reader(code) is None for codec, code in none)
    except InputError:  # it is not fitted
        return False


def _kind(row: CompressedKVCache) -> tuple[object, ...]:
    """Properties that all rows must share."""
    return row.windows, row.layer, row.path, row.max_size, row.lends, row._dtype, row.key_codec, row.value_codec


def _heads(row: CompressedKVCache) -> int:
    return max(buffer.shape[1] for buffer in row.buffers)


class Stack(Buffers):
    """The tokens of ``rows`` that `can_share` buffers. Until `release` the rows hold none, but for views of `show`."""

    def __init__(self, rows: Sequence[CompressedKVCache]) -> None:
        first = rows[0]
        super().__init__(first.windows, (first.key_codec, first.value_codec), _heads(first), first._dtype)
        self.rows: list[CompressedKVCache] = []
        self.refused = False  # whether there was no kernel for the queries
        self._kind, self._layer, self._checks = _kind(first), first.layer, Checks()
        self._asked: Asked = [], []
        self._steps = 0
        self._shown = False
        self.add(rows)

    # tokens that come ------------------------------------------------------------------------------------------------

    def takes(self, keys: mx.array, values: mx.array) -> bool:
        """Whether these are one token of each row, in the dtype of the buffers."""
        forms = zip((keys, values), self._recent.values(), strict=True)
        return all(
            new.shape == (len(self.rows), held.shape[1], 1, held.shape[3]) and new.dtype == held.dtype
            for new, held in forms
        )

    def join(self, keys: mx.array, values: mx.array) -> None:
        """Store a token of each row; raises `InputError` as `CompressedKVCache.update_and_fetch`."""
        self._checks.look(self._layer)
        self._hide()
        if self.column == self.room:
            self._advance()
            self._slide(self.column - self.form.oldest)
        if self._windows.window:
            self._evict()
        order, at = self.form.order, self.column
        for held, new in zip(self._recent.values(), (keys, values), strict=True):
            some = new if order is None else new[order]
            held[: some.shape[0], :, at : at + 1] = some
        if not self._windows.window:  # the token itself is encoded
            self._evict()
        self.column, self._steps = self.column + 1, self._steps + 1

    def _evict(self) -> None:
        """Encode the blocks that leave the windows without codes when the next token comes.

        Once in `Windows.block` steps, encode those of all these steps together: else many rows would encode in each.
        """
        windows = self._windows
        leaving = self.column + 1 - windows.most_recent  # blocks that begin before this column
        if not self._steps or (self._steps + windows.less) % windows.block == 0:
            leaving += windows.block - 1
        if self.form.uncoded < leaving:
            self._encode(leaving)
        else:
            self._checks.kept(())
            self._asked = self._asked[1], []

    def _encode(self, leaving: int) -> None:
        """Encode the blocks that begin before a column, all of one size together."""
        groups = dict[int, list[int]]()
        for i, part in enumerate(self.form.parts):
            if part.uncoded < leaving:
                groups.setdefault(self._windows.block - (0 if part.coded else self._windows.less), []).append(i)
        largest, codes = list[Largest](), list[Arrays]()
        for block, group in groups.items():
            both = [self._oldest(held, group, block) for held in self._recent.values()]
            both, of_group = self._checks.of(self._layer, both)
            largest += of_group
            firsts = tuple(self.form.sinks + self.form.parts[i].coded for i in group)
            self.rows[0].encodes(max(firsts) + block)
            at = places.one_or_each(firsts)
            codes.append(named([codec.encode(x, at) for codec, x in zip(self.codecs, both, strict=True)]))
        encoded = [self.form.parts[i] for group in groups.values() for i in group]
        if any(part.coded + self._windows.block > part.room for part in encoded):
            self._regrow()
        self._checks.kept(largest)
        self._asked = self._asked[1], [[self.rows[i] for i in group] for group in groups.values()]
        parts = [*self.form.parts]
        for (block, group), made in zip(groups.items(), codes, strict=True):
            firsts = tuple(parts[i].base + parts[i].coded for i in group)
            for name, held in self._packed.items():
                places.put(held, firsts, made[name])
            for i in group:
                parts[i] = parts[i]._replace(ahead=parts[i].ahead + block)
        self.form = places.form_of(self.form.sinks, tuple(parts))
        ahead(*self._packed.values(), *(x for each in largest for x in each))

    def _oldest(self, held: mx.array, group: Sequence[int], block: int) -> mx.array:
        """The oldest block without codes of the windows of a group ``[rows, H, block, D]``."""
        parts = [self.form.parts[i] for i in group]
        entries, firsts = tuple(part.place for part in parts), tuple(part.uncoded for part in parts)
        if firsts == firsts[:1] * len(group) and entries == (*range(entries[0], entries[0] + len(group)),):
            return held[entries[0] : entries[0] + len(group), :, firsts[0] : firsts[0] + block]
        return places.blocks(held, entries, firsts, block)

    # rows that come and go --------------------------------------------------------------------------------------------

    def add(self, rows: Sequence[CompressedKVCache]) -> bool:
        """Append more rows, if all can be read together; returns whether they can."""
        if not (_kind(rows[0]) == self._kind and can_share(rows)):
            return False
        for row in rows:
            row.settle()
        packed, recent = [row.packed.tokens for row in rows], [row.recent.tokens for row in rows]
        room = next(iter(self._recent.values())).shape[0], next(iter(self._packed.values())).shape[2]
        form = self.form.fitting(packed, recent, self.column, room)
        if form is None:
            self._regrow(packed, recent)
        else:
            self.form, self._numbers = form, None
        for row, part in zip(rows, self.form.parts[len(self.rows) :], strict=True):
            for held, run, (entry, span) in zip(self.held, row.runs, self._spans(part), strict=True):
                for name, array in named(run.codes()).items() if run.tokens else ():
                    held[name][entry, :, span] = array
        self.rows += rows
        self._shown = True
        self._hide()
        return True

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self._hide()
        self.rows = [self.rows[i] for i in indices]
        self._checks, self._asked = self._of(self.rows)
        self.form, self._numbers = places.form_of(self.form.sinks, tuple(self.form.parts[i] for i in indices)), None
        used, held = sum(part.room for part in self.form.parts), next(iter(self._packed.values())).shape[2]
        if held > 2 * used or next(iter(self._recent.values())).shape[0] > 2 * len(self.rows):
            self._regrow()

    def trim(self, count: int) -> bool:
        """Drop the newest tokens of each row, if all keep their sinks; returns whether they do."""
        if min(self.lengths) - count < max(1, self.form.sinks):
            return False
        self._hide()
        self._advance()
        column, parts = max(0, self.column - count), []
        for part in self.form.parts:
            lost = max(0, count - (self.column - part.start))  # packed tokens
            parts.append(part._replace(start=min(part.start, column), packed=part.packed - lost, ahead=0))
        self.column, self.form, self._numbers = column, places.form_of(self.form.sinks, tuple(parts)), None
        return True

    def show(self) -> None:
        """Let the rows hold views of their tokens until the next token comes."""
        if not self._shown:
            self._give(lambda array: array)
            self._shown = True

    def release(self) -> None:
        """Give the rows their own tokens again."""
        self._give(mx.contiguous)
        for row in self.rows:
            row._checks = self._of([row])[0]

    def taken(self, index: int) -> CompressedKVCache:
        """A copy of a row, with its own tokens."""
        row = copy.copy(self.rows[index])
        self._give(mx.contiguous, {index: row})
        row._checks = self._of([self.rows[index]])[0]
        return row

    def settle(self) -> None:
        """`CompressedKVCache.settle` of all rows."""
        self._checks.settle(self._layer)

    def _of(self, rows: Sequence[CompressedKVCache]) -> tuple[Checks, Asked]:
        """The open checks of these rows alone, so that a bad row does not affect the others."""
        ids = {id(row) for row in rows}
        at = [[[j for j, row in enumerate(group) if id(row) in ids] for group in call] for call in self._asked]
        left = [[[row for row in group if id(row) in ids] for group in call] for call in self._asked]
        return self._checks.only((at[0], at[1])), ([x for x in left[0] if x], [x for x in left[1] if x])

    def _give(self, own: Callable[[mx.array], mx.array], rows: dict[int, CompressedKVCache] | None = None) -> None:
        self._advance()
        for i, row in (dict(enumerate(self.rows)) if rows is None else rows).items():
            runs = []
            for held, (entry, span), run in zip(self.held, self._spans(self.form.parts[i]), row.runs, strict=True):
                tokens = span.stop - span.start
                buffers = {name: own(array[entry, :, span]) for name, array in held.items()} if tokens else {}
                runs.append(Run(run.most, tokens, buffers))
            _hold(row, runs)

    def _hide(self) -> None:
        """Take the views from the rows: with views, each write would copy the buffer."""
        for row in self.rows if self._shown else ():
            _hold(row, [Run(run.most) for run in row.runs])
        self._shown = False


def _hold(row: CompressedKVCache, runs: Sequence[Run]) -> None:
    row.sinks, row.packed, row.recent = runs
    row._lent = row._past = None
