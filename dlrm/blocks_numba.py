"""Small products in blocks that stay in vector registers, as explicit vector code for numba.

LLVM vectorises such loops only behind overlap checks and one sum at a time, which costs more than the
products of vectors of some hundred numbers. Emitted code is the same for every lane count; without the instructions
for one, LLVM splits it. Arrays are C-contiguous and two-dimensional, float32 or float64.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import core
from numba.extending import intrinsic

# Typed here as anything: numba's own annotations cover these only in part.
cgutils: Any = core.cgutils
types: Any = core.types


def _vector_bytes() -> int:
    # Not 64 on AVX-512: its 32 registers help, but half as wide they ran the backward block 1.6 times as fast (Zen).
    return 32 if binding.get_host_cpu_features().get("avx") else 16


_VECTOR_BYTES = _vector_bytes()
LANES_32 = _VECTOR_BYTES // 4
"""float32 numbers in a vector register; half as many of float64."""

_BLOCK = 4
# A product and its sum may become one instruction, rounded once.
_FUSE = ("contract",)


class _Emitter:
    """Vector code over the rows of arrays of one dtype."""

    def __init__(self, context: Any, builder: Any, dtype: Any) -> None:
        self.context, self.builder = context, builder
        self.scalar = context.get_data_type(dtype)
        self.itemsize = dtype.bitwidth // 8
        self.lanes = _VECTOR_BYTES // self.itemsize
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)

    def constant(self, value: int) -> Any:
        return self.context.get_constant(types.intp, value)

    def row(self, array_type: Any, array: Any, index: Any) -> Any:
        """Pointer to the first number of a row."""
        struct = self.context.make_array(array_type)(self.context, self.builder, array)
        width = self.builder.extract_value(struct.shape, 1)
        return self.builder.gep(struct.data, [self.builder.mul(index, width)])

    def load(self, row: Any, column: Any) -> Any:
        pointer = self.builder.bitcast(self.builder.gep(row, [column]), self.vector.as_pointer())
        return self.builder.load(pointer, align=self.itemsize, typ=self.vector)

    def store(self, value: Any, row: Any, column: Any) -> None:
        pointer = self.builder.bitcast(self.builder.gep(row, [column]), self.vector.as_pointer())
        self.builder.store(value, pointer, align=self.itemsize)

    def broadcast(self, row: Any, column: Any) -> Any:
        value = self.builder.load(self.builder.gep(row, [column]), typ=self.scalar)
        one = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return self.shuffle(one, one, [0] * self.lanes)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), lanes)
        return self.builder.shuffle_vector(a, b, mask)

    def sums(self, count: int) -> list[Any]:
        """Zeroed vectors that the optimiser keeps in registers."""
        slots = [cgutils.alloca_once(self.builder, self.vector) for _ in range(count)]
        for slot in slots:
            self.builder.store(self.zero, slot)
        return slots

    def accumulate(self, slot: Any, a: Any, b: Any) -> None:
        total = self.builder.load(slot, typ=self.vector)
        self.builder.store(self.builder.fadd(total, self.builder.fmul(a, b, flags=_FUSE), flags=_FUSE), slot)

    def sum_lanes(self, vectors: list[Any]) -> Any:
        """One vector of the sums over the lanes of ``lanes`` vectors: a tree that halves their number."""
        even, odd = range(0, 2 * self.lanes, 2), range(1, 2 * self.lanes, 2)
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [
                self.builder.fadd(self.shuffle(a, b, list(even)), self.shuffle(a, b, list(odd))) for a, b in pairs
            ]
        return vectors[0]


def _dots_4x4(typing_context: Any, v: Any, width: Any, rows: Any, columns: Any, block: Any) -> Any:  # noqa: ARG001
    """``block[a, b] = v[rows[a], :width] . v[columns[b], :width]``.

    Args:
        typing_context: numba's.
        v: [F, D].
        width: a multiple of the lanes, at most D.
        rows: four rows of ``v``.
        columns: four rows of ``v``.
        block: [4, 4], written.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v_type, block_type = signature.args[0], signature.args[4]
        v_value, width_value, rows_value, columns_value, block_value = arguments
        emit = _Emitter(context, builder, v_type.dtype)
        left = [emit.row(v_type, v_value, builder.extract_value(rows_value, k)) for k in range(_BLOCK)]
        right = [emit.row(v_type, v_value, builder.extract_value(columns_value, k)) for k in range(_BLOCK)]
        slots = emit.sums(_BLOCK * _BLOCK)
        step = emit.constant(emit.lanes)
        with cgutils.for_range_slice(builder, emit.constant(0), width_value, step, inc=True) as (d, _):
            a = [emit.load(row, d) for row in left]
            b = [emit.load(row, d) for row in right]
            for k, slot in enumerate(slots):
                emit.accumulate(slot, a[k // _BLOCK], b[k % _BLOCK])
        out = emit.row(block_type, block_value, emit.constant(0))
        totals = [builder.load(slot, typ=emit.vector) for slot in slots]
        for begin in range(0, len(totals), emit.lanes):
            emit.store(emit.sum_lanes(totals[begin : begin + emit.lanes]), out, emit.constant(begin))
        return context.get_dummy_value()

    return types.void(v, types.intp, types.UniTuple(types.intp, 4), types.UniTuple(types.intp, 4), block), codegen


dots_4x4: Any = intrinsic(_dots_4x4)


def _combine(num_vectors: int) -> Any:
    def combine(typing_context: Any, g: Any, v: Any, i: Any, d: Any, out: Any, spare: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            g_type, v_type, _, _, out_type, spare_type = signature.args
            g_value, v_value, i_value, d_value, out_value, spare_value = arguments
            emit = _Emitter(context, builder, v_type.dtype)
            columns = [builder.add(d_value, emit.constant(k * emit.lanes)) for k in range(num_vectors)]
            places = [builder.add(i_value, emit.constant(k)) for k in range(_BLOCK)]
            factors = [emit.row(g_type, g_value, place) for place in places]
            slots = emit.sums(_BLOCK * num_vectors)
            count = builder.extract_value(context.make_array(v_type)(context, builder, v_value).shape, 0)
            with cgutils.for_range(builder, count) as loop:
                row = emit.row(v_type, v_value, loop.index)
                x = [emit.load(row, column) for column in columns]
                for k, factor in enumerate(factors):
                    scale = emit.broadcast(factor, loop.index)
                    for n in range(num_vectors):
                        emit.accumulate(slots[k * num_vectors + n], scale, x[n])
            for k, place in enumerate(places):
                inside = builder.icmp_signed("<", place, count)
                target = builder.select(
                    inside,
                    emit.row(out_type, out_value, place),
                    emit.row(spare_type, spare_value, emit.constant(0)),
                )
                for n in range(num_vectors):
                    emit.store(builder.load(slots[k * num_vectors + n], typ=emit.vector), target, columns[n])
            return context.get_dummy_value()

        return types.void(g, v, types.intp, types.intp, out, spare), codegen

    combine.__doc__ = f"""Four rows of ``g v``, {num_vectors} vector registers wide.

    ``out[i + k, d : d + width] = sum over j of g[i + k, j] v[j, d : d + width]`` for k < 4; rows beyond the last
    of ``v`` go to ``spare``.

    Args:
        typing_context: numba's.
        g: [>= i + 4, >= F] factors.
        v: [F, D].
        i: first row.
        d: first column.
        out: [F, D], written.
        spare: [1, D], written.
    """
    return intrinsic(combine)


combine_4x1: Any = _combine(1)
combine_4x2: Any = _combine(2)
