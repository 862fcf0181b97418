"""Codes of one width: indices of table entries, or of the terms of a sum of entries.

An alternative for a vector codebook is a table of each query's products with all centroids, of which a token's score
sums D/d entries. It is not used. At ``d4b8``, D = 128, it has 32 · 256 numbers a query row: 16 KB in half precision,
and 64 KB for the 4 rows that share a KV head, but there are only 48 KB (32 on Metal). The codebook takes 2 KB, so 16
copies fit, and lanes use different banks. A token's score takes the same number of reads in both cases. The table takes
32,768 multiplications a row, as many as a split of 256 tokens takes without it. ``d8b12`` would have 128 KB a row,
``d2b8`` 32 KB. For `SumsReader` the table would also need a rotation of 64 entries of every stage to every token's
position, where one rotation of the sum is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, made, with_stride

_MOST_NUMBERS = 4096  # in a table of vectors that is copied to threadgroup memory
_ENTRIES = 64  # of a stage of sums


@dataclass(frozen=True, eq=False)
class TableReader(Reader):
    """Codes of ``bits`` bits, LSB first and without gaps: indices of the rows of ``table``.

    The table is ``[2**bits, n]`` float32, with n 1 or even: the levels of n neighbouring coordinates, as for pairs of
    narrow scalar codes and for vector quantizers. With two stages the table is ``[4**bits, n]``, n 1 or 2, and the code
    in ``rows`` is in the high bits of the index.
    """

    name: ClassVar[str] = "table"
    stored: ClassVar[tuple[str, ...]] = ("rows", "fine")
    tables: ClassVar[tuple[str, ...]] = ("table", "shifts")
    joined_tables = tables
    one_copy: ClassVar[bool] = True

    bits: int  # of a code, of either stage if there are two
    table: mx.array
    fine: mx.array | None = None  # a second stage's codes [B, H, S, words], uint32
    shifts: mx.array | None = None  # added to a KV head's scaled vectors [H, dim], float32

    @property
    def headers(self) -> tuple[str, ...]:
        stages = () if self.fine is None else ("read_stages.h",)
        return ("read_table.h", *stages, *(() if self.shifts is None else ("read_shifted.h",)))

    @property
    def constants(self) -> tuple[int, ...]:
        staged, shifted = int(self.fine is not None), int(self.shifts is not None)
        return self.bits, self.table.shape[1], self.rows.shape[3], staged, shifted

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: no code may be cut."""
        return super().shares(count) and self.dim % (count * self.table.shape[1]) == 0

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        table_type, table, text = _table_text(self.table, prefix, home, room)
        scales_type, scales = self.scaled(prefix)
        kind = "TableReader" if self.fine is None else "StagesReader"
        type_name = f"{kind}<{', '.join(map(str, self.constants[:3]))}, {scales_type}, {table_type}>"
        members = *self.begins(prefix), scales, table
        if self.shifts is not None:
            members = f"{{{', '.join(members)}}}", f"{prefix}_shifts + head * {self.dim}"
            type_name = f"ShiftedReader<{type_name}>"
        return Fragment(text.declarations, text.setup + made(prefix, type_name, *members))


def _table_text(table: mx.array, prefix: str, home: str, room: Room) -> tuple[str, str, Fragment]:
    """Type and value of ``table`` ``[entries, n]``, the input ``{prefix}_table``, for ``source/read_table.h``.

    As many copies as fit are in threadgroup memory, unless it is a large table of vectors. The declaration and the
    statements that fill it are at its home.
    """
    entries, width = table.shape
    if width > 1 and table.size > _MOST_NUMBERS:
        return f"GlobalTable<{width}>", f"{{{home}_table}}", Fragment("", "")
    words = max(1, width // 2)  # of an entry: a number, or pairs
    copies = room.copies(entries, width // 2)
    kind, element = (f"SingleTable<{copies}>", "float") if width == 1 else (f"SharedTable<{width}, {copies}>", "pair_t")
    size = f"opaque({copies * words} * uint(sizeof({element})))"
    value = f"{{place_of({home}_entries + lane % {copies} * {words}), {size}}}"
    if home != prefix:
        return kind, value, Fragment("", "")
    entry = (
        f"{prefix}_table[e]"
        if width == 1
        else f"make_pair({prefix}_table[e * {width} + 2 * w], {prefix}_table[e * {width} + 2 * w + 1])"
    )
    # lanes write the copies in different orders, so that they use different banks
    fill = (
        f"for (uint i = thread_id; i < {entries * words}; i += THREADS) {{\n"
        f"  const uint e = i / {words}, w = i % {words};\n"
        f"  const {element} entry = {entry};\n"
        f"  for (uint c = 0; c < {copies}; c++) "
        f"{prefix}_entries[(e * {copies} + (c + e) % {copies}) * {words} + w] = entry;\n"
        "}\n"
    )
    return kind, value, Fragment(f"threadgroup {element} {prefix}_entries[{entries * copies * words}];", fill)


@dataclass(frozen=True, eq=False)
class SumsReader(Reader):
    """Two indices of 6 bits a stage, in rows of bytes: Σ entry a + i · entry b, where pairs of neighbours are complex.

    The table's first ``rotated`` coordinates are paired as neighbours if ``traditional``, all others by halves.
    ``angles`` has the position of the first token, and the angle of each pair for one position ``[1 + dim/2]``,
    float32; None without RoPE.
    """

    name: ClassVar[str] = "sums"
    headers = ("read_sums.h",)
    tables: ClassVar[tuple[str, ...]] = ("table", "angles")

    table: mx.array  # entries of every stage [H, stages, 64, dim], float16
    rotated: int
    traditional: bool
    angles: mx.array | None

    @property
    def constants(self) -> tuple[int, ...]:
        return self.table.shape[1], self.dim, self.rotated, int(self.traditional), int(self.angles is not None)

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`: tables of some hundred kilobytes are not copied."""
        scales_type, scales = self.scaled(prefix)
        table = f"{prefix}_table + head * {self.table.shape[1] * _ENTRIES * self.dim}"
        angles = "0" if self.angles is None else f"{prefix}_angles"
        type_name = f"SumsReader<{', '.join(map(str, self.constants))}, {scales_type}>"
        begins = with_stride(f"{prefix}_rows"), scales, table, angles, "0u - first_packed"
        return Fragment("", made(prefix, type_name, *begins))
