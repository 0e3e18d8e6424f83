"""The register tile: a small matrix product whose sums stay in registers.

`sums[rows, vectors] += a[rows, k] @ b[k, vectors]`: for each k, a column of weights is loaded, and
each row's value is broadcast against it.  Batch rows times vectors are chosen to fill the register
file; the product then runs at the rate of the multiply-add units.  Three layouts:

* ``"panel"``: a by a table of row addresses, so that rows may lie anywhere (permuted sequences,
  initial states); b as one panel [k, vectors].  The forward products.
* ``"planes"``: a as above; each vector's column of b by itself, [vectors][k], so that any share of
  the vectors can be computed.  The gradients of inputs and of previous outputs.
* ``"outer"``: a read down its columns, b as a panel.  The gradients of weights.

Where numbers are narrower than those of the layer (see spec.Operand), k counts groups of neighbours, which
one instruction multiplies and adds up: ``dpbf16ps`` two products of bfloat16, ``vpdpbusd`` four of integers.
Sums of integers are exact.  They start from numbers behind the weights of a vector, and are multiplied by the
scale of the row, which is in front of its values, and by those of the lanes of weights, also behind these.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from fusedlstm.once import once

from .compile import entry_point
from .simd import BFLOAT, INT64, call_ir, splat_ir
from .spec import BFLOAT16, EXACT, INT16, MATRIX_ROWS, UINT8, WIDENED, Registers

UNROLL = 4
PLANES = 4  # vectors of a tile over planes; what is left is done one by one
ARGUMENTS = 9  # of a tile's function, all 64-bit integers: those of `product` from the third on
LATENCY = 8  # multiply-adds that must be in flight to keep the units busy
INT32 = ir.IntType(32)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(INT64, value)


# --- products -------------------------------------------------------------------------------
# total + x * w, where x, a value or group of a row in all lanes, and w, weights, are as they are loaded


def _fused(builder: ir.IRBuilder, x: ir.Value, w: ir.Value, total: ir.Value) -> ir.Value:
    # fused where the processor can; llvm.fma would call a C function for each lane elsewhere
    bits = 32 if isinstance(total.type.element, ir.FloatType) else 64
    return call_ir(builder, f"llvm.fmuladd.v{total.type.count}f{bits}", total.type, x, w, total)


def _dot_bfloat16(builder: ir.IRBuilder, x: ir.Value, w: ir.Value, total: ir.Value) -> ir.Value:
    pairs = ir.VectorType(BFLOAT, 2 * total.type.count)
    x, w = builder.bitcast(x, pairs), builder.bitcast(w, pairs)
    return call_ir(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, x, w)


def _multiply_widened(builder: ir.IRBuilder, x: ir.Value, w: ir.Value, total: ir.Value) -> ir.Value:
    """A bfloat16 is the upper half of a float32; the two of x are float32, one beside the other."""
    lanes = total.type.count
    halves = (
        builder.shl(w, splat_ir(builder, INT32(16), lanes)),
        builder.and_(w, splat_ir(builder, INT32(0xFFFF0000), lanes)),
    )
    for n, half in enumerate(halves):
        value = splat_ir(builder, builder.extract_element(x, INT32(n)), lanes)
        total = _fused(builder, value, builder.bitcast(half, total.type), total)
    return total


def _dot_bytes(builder: ir.IRBuilder, x: ir.Value, w: ir.Value, total: ir.Value) -> ir.Value:
    lanes = total.type.count
    kind = ir.VectorType(ir.IntType(8), 4 * lanes) if _BYTES else total.type
    x, w = builder.bitcast(x, kind), builder.bitcast(w, kind)
    return call_ir(builder, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", total.type, total, x, w)


_BYTES = llvm.llvm_version_info[0] >= 21  # from then on the operands of vpdpbusd are bytes


def _dot_words(builder: ir.IRBuilder, x: ir.Value, w: ir.Value, total: ir.Value) -> ir.Value:
    """Written out, so that any processor can; LLVM makes pmaddwd of it where there is one."""
    lanes = total.type.count
    wide = ir.VectorType(INT32, 2 * lanes)
    x = builder.sext(builder.bitcast(x, ir.VectorType(ir.IntType(16), 2 * lanes)), wide)
    w = builder.sext(builder.bitcast(w, ir.VectorType(ir.IntType(8), 2 * lanes)), wide)
    products, undefined = builder.mul(x, w), ir.Constant(wide, ir.Undefined)
    for first in (0, 1):
        order = ir.Constant(total.type, list(range(first, 2 * lanes, 2)))
        total = builder.add(total, builder.shuffle_vector(products, undefined, order))
    return total


_MULTIPLY = {
    operand.instruction: multiply
    for operand, multiply in (
        (EXACT, _fused), (BFLOAT16, _dot_bfloat16), (WIDENED, _multiply_widened), (UINT8, _dot_bytes),
        (INT16, _dot_words),
    )
}  # fmt: skip


# --- tiles ----------------------------------------------------------------------------------


class Tile(Registers):
    """A tile's layout and width in vectors: what the code of a tile is compiled for."""

    def __init__(self, scalar: types.Float, layout: str, width: int, precision: str = "float32") -> None:
        self.layout, self.width = layout, width
        super().__init__(scalar, precision, f"{layout}, {width} wide")


register_model(Tile)(models.OpaqueModel)


class _Builder:
    """Builds the LLVM function of a tile for a number of rows."""

    def __init__(self, module: ir.Module, tile: Tile, rows: int) -> None:
        self.spec, self.layout, self.rows, self.vectors = tile, tile.layout, rows, tile.width
        self.size, self.vector, operand = tile.size, tile.vector.ir, tile.operand
        self.total = ir.VectorType(INT32, tile.lanes) if tile.integer else self.vector
        self.weights, self.values = self.vector, self.vector.element  # of a vector and k, of a row and k
        if operand is not EXACT:
            self.weights = ir.VectorType(ir.IntType(8 * operand.group * operand.weight), tile.lanes)
            self.values = ir.VectorType(self.vector.element, 2) if operand is WIDENED else INT32
        self.group = tile.group * (tile.value or tile.size)  # bytes of the values of a row and k
        self.multiply = _MULTIPLY[operand.instruction]
        self.module = module
        kind = ir.FunctionType(ir.VoidType(), [INT64] * ARGUMENTS)
        self.function = ir.Function(module, kind, f"{type(self).__name__}_{tile.layout}_{rows}x{tile.width}")
        self.function.linkage = "internal"
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        (
            self.source, self.source_stride, self.target, self.target_stride,
            self.a, self.a_stride, self.b, self.b_stride, self.depth,
        ) = self.function.args  # fmt: skip
        self.starts = [self.row_start(r) for r in range(self.rows)]
        self.build()

    def build(self) -> None:
        builder = self.builder
        # a tile with few sums keeps several of each, or it waits for the latency of its additions; tiles
        # over planes keep equally many, since their width depends on the threads and the bits must not
        width = PLANES if self.layout == "planes" else self.vectors
        copies = min(UNROLL, -(-LATENCY // (self.rows * width)))
        sums = [self.first(n) for n in self.places()]
        zero = ir.Constant(self.total, None)
        sums += [zero] * (len(sums) * (copies - 1))
        unrolled = builder.and_(self.depth, _constant(-UNROLL))
        k, sums = self.loop(_constant(0), unrolled, UNROLL, copies, sums)
        k, sums = self.loop(k, self.depth, 1, copies, sums)
        count = self.rows * self.vectors
        add = builder.add if self.spec.integer else builder.fadd
        for place, n in enumerate(self.places()):
            total = sums[place]
            for copy in range(1, copies):
                total = add(total, sums[copy * count + place])
            total = self.last(total, n)
            builder.store(total, self.at(self.target, self.target_stride, n), align=self.size)
        builder.ret_void()

    def places(self) -> list[tuple[int, int]]:
        return [(r, v) for r in range(self.rows) for v in range(self.vectors)]

    def first(self, place: tuple[int, int]) -> ir.Value:
        """What a sum starts from."""
        if self.spec.integer:
            return self.load(self.tail(0, place[1], self.total))
        return self.load(self.at(self.source, self.source_stride, place))

    def last(self, total: ir.Value, place: tuple[int, int]) -> ir.Value:
        """What becomes of a sum: one of integers gets its scales, and is added to what there was."""
        if not self.spec.integer:
            return total
        builder, (row, v) = self.builder, place
        start = builder.load(self.pointer(builder.add(self.a, _constant(row * 8)), INT64))
        pointer = self.pointer(builder.sub(start, _constant(self.size)), self.vector.element)
        scale = splat_ir(builder, builder.load(pointer), self.spec.lanes)
        scaled = builder.fmul(builder.sitofp(total, self.vector), scale)
        scaled = builder.fmul(scaled, self.load(self.tail(1, v, self.vector)))
        return builder.fadd(self.load(self.at(self.source, self.source_stride, place)), scaled)

    def pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.builder.inttoptr(address, kind.as_pointer())

    def at(self, base: ir.Value, stride: ir.Value, place: tuple[int, int]) -> ir.Value:
        row, v = place
        address = self.builder.add(base, self.builder.mul(stride, _constant(row)))
        address = self.builder.add(address, _constant(v * self.spec.lanes * self.size))
        return self.pointer(address, self.vector)

    def load(self, pointer: ir.Value) -> ir.Value:
        return self.builder.load(pointer, align=self.size)

    def row_start(self, row: int) -> ir.Value | None:
        if self.layout == "outer":
            return None
        place = self.builder.add(self.a, _constant(row * 8))
        start = self.builder.load(self.pointer(place, INT64))
        return self.pointer(self.builder.add(start, self.a_stride), self.values)

    def loop(
        self, start: ir.Value, end: ir.Value, unroll: int, copies: int, sums: list[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Steps of `unroll` from start to end; none if start is end."""
        builder, before = self.builder, self.builder.block
        body, done = builder.append_basic_block("k"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", start, end), body, done)
        builder.position_at_end(body)
        k = builder.phi(INT64)
        k.add_incoming(start, before)
        phis = [builder.phi(self.total) for _ in sums]
        for phi, first in zip(phis, sums):
            phi.add_incoming(first, before)
        current = list(phis)
        for u in range(unroll):
            self.multiply_add(builder.add(k, _constant(u)), current, u % copies)
        after = builder.add(k, _constant(unroll))
        k.add_incoming(after, builder.block)
        for phi, last in zip(phis, current):
            phi.add_incoming(last, builder.block)
        builder.cbranch(builder.icmp_signed("<", after, end), body, done)
        builder.position_at_end(done)
        results = []
        for first, last in zip([start, *sums], [after, *current]):
            phi = builder.phi(first.type)
            phi.add_incoming(first, before)
            phi.add_incoming(last, body)
            results.append(phi)
        return results[0], results[1:]

    def multiply_add(self, k: ir.Value, sums: list[ir.Value], copy: int) -> None:
        builder, count = self.builder, self.rows * self.vectors
        weights = [self.load(self.weight(k, v)) for v in range(self.vectors)]
        for r in range(self.rows):
            x = self.load(self.value(k, r))
            if self.values != ir.VectorType(self.vector.element, 2):
                x = splat_ir(builder, x, self.spec.lanes)
            for v, w in enumerate(weights):
                n = copy * count + r * self.vectors + v
                sums[n] = self.multiply(builder, x, w, sums[n])

    def weight(self, k: ir.Value, v: int) -> ir.Value:
        builder, bytes_ = self.builder, self.spec.column
        if self.layout == "planes":
            offset = builder.add(builder.mul(self.b_stride, _constant(v)), builder.mul(k, _constant(bytes_)))
        else:
            offset = builder.add(builder.mul(k, _constant(self.vectors * bytes_)), _constant(v * bytes_))
        return self.pointer(builder.add(self.b, offset), self.weights)

    def tail(self, n: int, v: int, kind: ir.Type) -> ir.Value:
        """What is behind the weights: of each vector what its sums start from, then its scales."""
        address = self.builder.ptrtoint(self.weight(self.depth, 0), INT64)
        place = n * self.vectors + v
        if self.layout == "planes":
            address, place = self.builder.add(address, self.builder.mul(self.b_stride, _constant(v))), n
        return self.pointer(self.builder.add(address, _constant(place * self.spec.lanes * self.size)), kind)

    def value(self, k: ir.Value, r: int) -> ir.Value:
        builder = self.builder
        if self.layout != "outer":
            return builder.gep(self.starts[r], [k])
        address = builder.add(self.a, builder.mul(self.a_stride, k))
        return self.pointer(builder.add(address, _constant(r * self.group)), self.values)


FEW = 3  # rows, up to which two-dimensional registers do not pay
BLOCK = 16  # groups in k that one of them holds


class _MatrixBuilder(_Builder):
    """A tile of two-dimensional registers, for values that :func:`memory.store_rows` has stored side by side.

    Registers 0 to 3 hold sums, 4 values of rows, 5 to 7 weights.  What is left of k is done by tiles of
    vectors.
    """

    def __init__(self, module: ir.Module, tile: Tile, rows: int, vectors: list[ir.Function]) -> None:
        self.few = vectors  # for 1, 2, ... rows
        super().__init__(module, tile, rows)

    def build(self) -> None:
        builder, integer = self.builder, self.spec.integer
        whole = builder.and_(self.depth, _constant(-BLOCK))
        rest = builder.sub(self.depth, whole)
        first, second = (
            builder.load(self.pointer(builder.add(self.a, _constant(8 * n)), INT64)) for n in (0, 1)
        )
        a, a_row = builder.add(first, self.a_stride), builder.sub(second, first)
        scratch = builder.alloca(ir.ArrayType(self.total, 4 * self.rows))
        scratch.align = 64
        self.configure()
        for low in range(0, self.vectors, 4):
            some = range(low, min(low + 4, self.vectors))
            for v in some:
                self.begin(v, rest)
            self.multiply_blocks(a, a_row, whole, some)
            for v in some:
                place, stride = self.at(self.target, self.target_stride, (0, v)), self.target_stride
                if integer:
                    place = builder.gep(scratch, [INT32(0), INT32(v - low)])
                    stride = _constant(len(some) * 64)
                self.call("tilestored64", self.register(v), self.address(place), stride)
            if integer:
                for r in range(self.rows):
                    for v in some:
                        total = builder.load(builder.gep(scratch, [INT32(0), INT32(r * len(some) + v - low)]))
                        place = self.at(self.target, self.target_stride, (r, v))
                        builder.store(self.last(total, (r, v)), place, align=self.size)
        self.call("tilerelease")
        with builder.if_then(builder.icmp_signed(">", rest, _constant(0))):
            self.multiply_rest(whole, rest)
        builder.ret_void()

    def call(self, name: str, *arguments: ir.Value) -> None:
        call_ir(self.builder, f"llvm.x86.{name}", ir.VoidType(), *arguments)

    def register(self, v: int) -> ir.Constant:
        """That of the sums of a vector."""
        return ir.Constant(ir.IntType(8), v % 4)

    def address(self, place: ir.Value) -> ir.Value:
        """An address as the instructions take it."""
        kind = ir.IntType(8).as_pointer()
        return (self.builder.inttoptr if place.type == INT64 else self.builder.bitcast)(place, kind)

    def constant(self, name: str, content: bytes) -> ir.Value:
        """The place of bytes that do not change."""
        kind = ir.ArrayType(ir.IntType(8), len(content))
        made = ir.GlobalVariable(self.module, kind, f"{self.function.name}_{name}")
        made.linkage, made.global_constant, made.align = "internal", True, 64
        made.initializer = ir.Constant(kind, bytearray(content))
        return self.address(made)

    def configure(self) -> None:
        """Give the registers their rows and bytes of a row."""
        heights = [self.rows] * 5 + [BLOCK] * 3 + [0] * 8
        widths = b"".join(width.to_bytes(2, "little") for width in [64] * 8 + [0] * 8)
        self.call("ldtilecfg", self.constant("sizes", b"\x01" + bytes(15) + widths + bytes(heights)))

    def begin(self, v: int, rest: ir.Value) -> None:
        """What sums start from; those of integers from zero, if tiles of vectors add the rest."""
        builder, stride = self.builder, self.source_stride
        if self.spec.integer:
            nothing, tail = self.constant(f"zero_{v}", bytes(64)), self.address(self.tail(0, v, self.total))
            place = builder.select(builder.icmp_signed("==", rest, _constant(0)), tail, nothing)
            stride = _constant(0)  # all rows from the same numbers
        else:
            place = self.address(self.at(self.source, self.source_stride, (0, v)))
        self.call("tileloadd64", self.register(v), place, stride)

    def multiply_blocks(self, a: ir.Value, a_row: ir.Value, whole: ir.Value, some: range) -> None:
        """Add the products of all whole blocks of k to the sums of some vectors."""
        builder, before = self.builder, self.builder.block
        body, done = builder.append_basic_block("k"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed(">", whole, _constant(0)), body, done)
        builder.position_at_end(body)
        k = builder.phi(INT64)
        k.add_incoming(_constant(0), before)
        values = ir.Constant(ir.IntType(8), 4)
        b_row = _constant(self.spec.column * (1 if self.layout == "planes" else self.vectors))
        self.call(
            "tileloadd64", values, self.address(builder.add(a, builder.mul(k, _constant(self.group)))), a_row
        )
        for v in some:
            weights = ir.Constant(ir.IntType(8), 5 + v % 3)
            self.call("tileloadd64", weights, self.address(self.weight(k, v)), b_row)
            self.call(self.spec.operand.matrix, self.register(v), values, weights)
        after = builder.add(k, _constant(BLOCK))
        k.add_incoming(after, builder.block)
        builder.cbranch(builder.icmp_signed("<", after, whole), body, done)
        builder.position_at_end(done)

    def multiply_rest(self, whole: ir.Value, rest: ir.Value) -> None:
        """Add the products of what is left of k, by tiles of vectors."""
        builder = self.builder
        a_stride = builder.add(self.a_stride, builder.mul(whole, _constant(self.group)))
        b = builder.ptrtoint(self.weight(whole, 0), INT64)
        for row in range(0, self.rows, len(self.few)):
            function = self.few[min(len(self.few), self.rows - row) - 1]
            place = builder.ptrtoint(self.at(self.target, self.target_stride, (row, 0)), INT64)
            sums, table = (place, self.target_stride), builder.add(self.a, _constant(8 * row))
            builder.call(function, [*sums, *sums, table, a_stride, b, self.b_stride, rest])


@intrinsic
def _write_addresses(typingctx: Any, tile: Any, table: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        of_vectors = [
            _Builder(builder.module, tile, rows).function
            for rows in range(1, tile.vector_rows(tile.width) + 1)
        ]
        matrix = tile.operand.matrix and tile.layout != "outer"
        for rows in range(1, (tile.rows(tile.width) if matrix else len(of_vectors)) + 1):
            place = builder.inttoptr(builder.add(args[1], _constant((rows - 1) * 8)), INT64.as_pointer())
            if matrix and rows > min(FEW, len(of_vectors)):
                function = _MatrixBuilder(builder.module, tile, rows, of_vectors).function
            else:
                function = of_vectors[rows - 1]
            builder.store(builder.ptrtoint(function, INT64), place)
        return context.get_dummy_value()

    return types.void(tile, types.int64), codegen


def write_addresses(tile, table):
    """Write the addresses of a tile's functions, for 1, 2, ... rows, to a table."""
    _write_addresses(tile, table)


@once  # as long as the function is kept, those that it gives the addresses of are
def _writer(tile: Tile) -> Any:
    return entry_point(write_addresses, tile, types.int64)


@once
def tile_table(scalar: types.Float, layout: str, width: int, precision: str = "float32") -> np.ndarray:
    """The addresses of the functions of a tile, for 1, 2, ... rows; see :func:`tile_product`.

    Tiles are compiled once and called through their addresses, whatever kernel calls them.
    """
    table = np.zeros(MATRIX_ROWS, np.int64)
    _writer(Tile(scalar, layout, width, precision))(None, table.ctypes.data)
    return table


@intrinsic
def tile_product(
    typingctx: Any,
    table: Any,  # address of the table of the tile's functions
    rows: Any,  # from 1 to what fits the registers
    source: Any,  # address of the initial sums
    source_stride: Any,  # bytes from row to row, 0 to give all rows the same
    target: Any,  # address of the results
    target_stride: Any,
    a: Any,  # address of the table of row addresses; "outer": of the values, or of groups of them
    a_stride: Any,  # bytes added to each row address; "outer": from column to column
    b: Any,  # address of the weights
    b_stride: Any,  # bytes from plane to plane; unused without planes
    depth: Any,  # number of products in each sum, or of groups of them
) -> Any:
    """A product of a few rows with the vectors of a tile."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [INT64] * ARGUMENTS)
        table = builder.inttoptr(args[0], kind.as_pointer().as_pointer())
        place = builder.sub(args[1], _constant(1))
        builder.call(builder.load(builder.gep(table, [place])), args[2:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


def plane_rows(registers: Any) -> int:
    """Rows of a tile over planes."""
    return int(registers.rows(PLANES))


@overload(plane_rows, jit_options={"forceinline": True})
def _(registers):
    count = registers.rows(PLANES)
    return lambda registers: count


def outer_rows(registers: Any) -> int:
    """Rows of a tile of the gradients of weights."""
    return int(registers.vector_rows(PLANES))


@overload(outer_rows, jit_options={"forceinline": True})
def _(registers):
    count = registers.vector_rows(PLANES)
    return lambda registers: count
