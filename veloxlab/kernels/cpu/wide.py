"""Functions on 64 neighbouring float32 that stay in registers, which LLVM does not achieve for a plain loop."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

COUNT = 64
_FUSED = ("contract",)
_KIND, _MASK, _PLACE = ir.VectorType(ir.FloatType(), COUNT), ir.IntType(COUNT), ir.IntType(32)


def _loaded(builder, address):
    return builder.load(builder.inttoptr(address, _KIND.as_pointer()), align=4)


def _spread(builder, number):
    first = builder.insert_element(ir.Constant(_KIND, ir.Undefined), number, ir.Constant(_PLACE, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_PLACE, COUNT), [0] * COUNT))


def _least(combine):
    """Index of the least sum or difference of the numbers at two addresses, the first of equal ones.

    The index is arbitrary if one of them is NaN.
    """

    @intrinsic
    def least(typingctx, x, y):
        def generate(context, builder, signature, arguments):
            combined = getattr(builder, combine)(*(_loaded(builder, address) for address in arguments))
            kind = ir.FunctionType(ir.FloatType(), [_KIND])
            smallest = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmin.v{COUNT}f32")
            found = builder.call(smallest, [combined], fastmath=("nnan", "nsz"))
            equal = builder.bitcast(builder.fcmp_ordered("==", combined, _spread(builder, found)), _MASK)
            return builder.and_(builder.cttz(equal, ir.Constant(ir.IntType(1), 0)), ir.Constant(_MASK, COUNT - 1))

        return types.int64(types.int64, types.int64), generate

    return least


least_of_sums, least_of_differences = _least("fadd"), _least("fsub")


@intrinsic
def up_to(typingctx, x, most):
    """A mask with a 1 for each number at an address that is at most ``most``."""

    def generate(context, builder, signature, arguments):
        numbers = _loaded(builder, arguments[0])
        return builder.bitcast(builder.fcmp_ordered("<=", numbers, _spread(builder, arguments[1])), _MASK)

    return types.uint64(types.int64, types.float32), generate


@intrinsic
def first_bit(typingctx, bits):
    """Index of the lowest bit that is 1."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def turned_products(typingctx, x, table, half, real, imaginary):
    """Products of a vector of ``half`` real and ``half`` imaginary parts with 64 table columns, ``conj(T)·x``.

    All five are addresses but ``half``; real and imaginary parts of the products are written to the last two.
    """

    def generate(context, builder, signature, arguments):
        x, table, half, *written = arguments
        number, zero = ir.FloatType(), ir.Constant(_KIND, [0.0] * COUNT)
        numbers, rows = (builder.inttoptr(a, kind.as_pointer()) for a, kind in ((x, number), (table, _KIND)))
        totals = [cgutils.alloca_once_value(builder, zero) for _ in written]
        with cgutils.for_range(builder, half) as loop:
            other = builder.add(loop.index, half)
            a, b = (_spread(builder, builder.load(builder.gep(numbers, [i]))) for i in (loop.index, other))
            t, u = (builder.load(builder.gep(rows, [i]), align=4) for i in (loop.index, other))
            parts = ((a, t, b, u), (b, t, builder.fneg(a), u))
            for total, (p, q, r, s) in zip(totals, parts, strict=True):
                added = builder.load(total)
                for left, right in ((p, q), (r, s)):
                    added = builder.fadd(added, builder.fmul(left, right, flags=_FUSED), flags=_FUSED)
                builder.store(added, total)
        for total, address in zip(totals, written, strict=True):
            builder.store(builder.load(total), builder.inttoptr(address, _KIND.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate
