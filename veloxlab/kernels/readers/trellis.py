"""Levels by a window of the bits of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, made

_WIDEST = 8  # bits of a coordinate
_COMMON = 6  # bits that few coordinates exceed
_WINDOW = 4  # numbers in its description
_CODES = 8  # of scales in a word
_PADDED = 32  # coordinates after which words are left out, as source/read_trellis.h does
_QUARTERS = 4  # of a key, each by a thread
_PADDED_ROWS, _BETWEEN = 8, 16  # rows of queries, and what lies between them, as source/attend.h has them


@dataclass(frozen=True, eq=False)
class TrellisReader(Reader):
    """Scale · table entry + shift for each coordinate, then cosines and sines of the token's position.

    ``rows`` ``[B, 1, S, words]`` have all heads of a token: first 4 bits for the scale of each, 2^(code / 4). For each
    coordinate ``windows`` ``[H, D, 4]``, uint32, has the first bit of its window in the row, its mask, its shift, and
    the index in ``table`` ``[9 · states]`` of its width's levels. A state is the last ``reach`` bits, or the
    coordinate's own if that is 0; a head's string begins with its last coordinate. ``shifts`` are added to scaled
    vectors ``[H, D]``, float32. With ``angles``, as in `SumsReader`, ``dim`` is D plus twice the number of pairs:
    cosines of all pairs, then sines. No eighth of a vector has more than ``most`` bits a coordinate.
    """

    name: ClassVar[str] = "trellis"
    headers = ("read_trellis.h",)
    sum_headers: ClassVar[tuple[str, ...]] = ("trellis_sums.h",)
    tables: ClassVar[tuple[str, ...]] = ("windows", "table", "shifts", "angles")
    one_copy: ClassVar[bool] = True
    levels_alone: ClassVar[bool] = True

    windows: mx.array
    table: mx.array
    shifts: mx.array | None
    angles: mx.array | None
    reach: int
    most: int
    widest: int = _WIDEST

    @property
    def kv_heads(self) -> int:
        return self.windows.shape[0]

    @property
    def coordinates(self) -> int:
        return self.windows.shape[1]

    @property
    def constants(self) -> tuple[int, ...]:
        return self.coordinates, self.table.size, self.reach, self.most, self._widths, int(self.shifts is not None)

    @property
    def _states(self) -> int:
        return self.table.size // (_WIDEST + 1)

    @property
    def _widths(self) -> int:
        """The number of widths, from 1 bit on, in the kernel."""
        return _COMMON if self.widest <= _COMMON else _WIDEST

    @property
    def large_words(self) -> int:
        return self._widths * self._states

    @property
    def tile_words(self) -> int:
        """Words for cosines and sines of the tile's first token."""
        return 0 if self.angles is None else self.coordinates + 4 * _QUARTERS

    def own_words(self, product_tokens: int) -> int:
        """Words for coordinates, and for means: a number of each row, or what ``TurnsAdded`` has."""
        dim = self.coordinates
        plan = self._plan_words + dim + dim // _PADDED
        if self.angles is None:
            return plan + _PADDED_ROWS
        return plan + _PADDED_ROWS * (dim + _BETWEEN) + dim + product_tokens * dim // 2

    @property
    def _plan_words(self) -> int:
        return self.coordinates + self.coordinates // _PADDED * 4

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        dim, states, entries = self.coordinates, self._states, self.large_words
        reach, alone = self.reach or states.bit_length() - 1, int(not self.reach)
        plan, ends, levels = f"{prefix}_plan", f"{prefix}_ends", f"{home}_levels"
        if room.large_words:
            apart, declared, copies = 2, room.large, room._replace(words=room.large_words).copies(entries, pairs=0)
        else:
            apart, declared = 1, "threadgroup {kind} {name}[{count}];"
            copies = room.copies(entries // 2, pairs=0) if 2 * room.words >= entries else 0
        window = f"{prefix}_windows + head * {_WINDOW * dim}"
        shares = "MIX_SHARES" if prefix == "v" else "4"
        declarations = [f"threadgroup uint4 {plan}[{-(-self._plan_words // 4)}];"]
        declarations += [f"threadgroup uint {ends}[{dim + dim // _PADDED}];"]
        if copies and home == prefix:
            declarations += [declared.format(kind="half", name=levels, count=entries * copies * apart)]
        kind = f"SharedLevels<{copies * apart}>" if copies else f"GlobalLevels<{states}, {alone}>"
        table = f"place_of({levels} + lane % {copies} * {apart})" if copies else f"{home}_table"
        setup = (
            f"fill_windows<{dim}, {states}, {reach}, {alone}, {dim} / {shares} % 4 == 0 ? 4 : 2>"
            f"((local_memory uint*){plan}, {ends}, {window}, thread_id, THREADS);\n"
        )
        if copies and home == prefix:
            filled = f"fill_levels<{states}, {alone}, {self._widths}, {copies}, {apart}>"
            setup += f"{filled}({levels}, {prefix}_table, thread_id, THREADS);\n"
        rows, stride = f"{prefix}_rows + batch * {prefix}_rows_strides[0]", f"uint({prefix}_rows_strides[2])"
        members = (
            *(rows, stride, f"{{{rows} + head / {_CODES}, {stride}, head % {_CODES} * 4}}"),
            *(f"(const local_memory uint*){plan}", ends, f"begin_of<{dim}, {states}, {reach}, {alone}>({window})"),
            f"{{{table}}}",
        )
        setup += made(prefix, f"TrellisReader<{dim}, {states}, {reach}, {self.most}, {kind}>", *members)
        kept = f"{prefix}_windows[(head * {dim} + i) * {_WINDOW} + {_WINDOW - 1}] != 0u"
        if prefix == "v":
            shift = "0" if self.shifts is None else f"v_shifts + head * {dim}"
            return Fragment(
                "\n".join(declarations), setup, summed=f"const ShiftedSum<{dim}> summed = {{{shift}, {window}}};"
            )
        fragment = Fragment("\n".join(declarations), setup, kept=f"({kept})", place=f"({dim - 1} - i)")
        return self._as_numbers(fragment, prefix) if prefix == "c" else self._with_scores(fragment, prefix)

    def _as_numbers(self, fragment: Fragment, prefix: str) -> Fragment:
        """The fragment with the parts of vectors besides levels."""
        dim, number, rest = self.coordinates, f"({fragment.kept} ? (x) : 0.0f)", ""
        if self.shifts is not None:
            number = f"({number} + {prefix}_shifts[head * {dim} + i])"
        if self.angles is not None:
            rest = (
                f"for (uint p = share; p < {dim // 2}; p += 4) {{\n"
                f"  const float angle = small_angle(({prefix}_angles[0] + float(token)) * {prefix}_angles[1 + p]);\n"
                f"  row[{dim} + p] = OUT_TYPE(small_cosine(angle));\n"
                f"  row[{dim + dim // 2} + p] = OUT_TYPE(small_sine(angle));\n"
                "}"
            )
        return fragment._replace(number=number, rest=rest)

    def _with_scores(self, fragment: Fragment, prefix: str) -> Fragment:
        """The fragment with the parts of scores besides levels."""
        dim, of_rows = self.coordinates, f"{prefix}_besides"
        if self.angles is not None:
            numbers = f"((local_memory query_t*){of_rows})"
            count = f"turns_place<{dim}>() + {dim // 4} + SCORE_TOKENS * {dim // 8}"
            declarations = f"threadgroup float4 {of_rows}[{count}];"
            queries = (
                f"for (uint i = lane; i < {dim}; i += 32) {{\n"
                f"  const float x = real ? as_float(q_coded[at + {dim} + i]) * (SCALE * LOG2_E) : 0.0f;\n"
                f"  {numbers}[query_at<{dim}>(r, turned_place<{dim}>(i))] = in_half(x);\n"
                "}"
            )
            setup = f"fill_turns<{dim}>({of_rows}, {prefix}_angles + 1, thread_id, THREADS);\n"
            turned = f"(local_memory query_t*)(shared + TILES_AT + simdgroup * {self.tile_words // 4})"
            members = f"{of_rows}, {turned}, int({prefix}_angles[0]) - int(first_packed)"
            added = f"const TurnsAdded<{dim}> added = {{{members}}};"
        elif self.shifts is not None:
            declarations, setup = f"threadgroup float {of_rows}[PADDED_ROWS];", ""
            queries = (
                "float shift = 0.0f;\n"
                f"for (uint i = lane; i < {dim}; i += 32) {{\n"
                f"  const float by = {prefix}_shifts[head * {dim} + i];\n"
                "  shift += real ? as_float(q_coded[at + i]) * (SCALE * LOG2_E) * by : 0.0f;\n"
                "}\n"
                f"shift = total_of<32>(shift);\nif (lane == 0) {of_rows}[r] = shift;"
            )
            added = f"const RowAdded added = {{{of_rows}}};"
        else:
            return fragment
        declarations, setup = f"{fragment.declarations}\n{declarations}", setup + fragment.setup
        return fragment._replace(declarations=declarations, setup=setup, queries=queries, added=added)
