"""The register tile: a small matrix product whose sums stay in registers.

`sums[rows, vectors] += a[rows, k] @ b[k, vectors]`: for each k, a column of weights is loaded, and
each row's value is broadcast against it.  Batch rows times vectors are chosen to fill the register
file; the product then runs at the rate of the multiply-add units.  Three layouts:

* ``"panel"``: a by a table of row addresses, so that rows may lie anywhere (permuted sequences,
  initial states); b as one panel [k, vectors].  The forward products.
* ``"planes"``: a as above; each vector's column of b by itself, [vectors][k], so that any share of
  the vectors can be computed.  The gradients of inputs and of previous outputs.
* ``"outer"``: a read down its columns, b as a panel.  The gradients of weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from fusedlstm.once import once

from .compile import entry_point
from .simd import INT64, call_ir, splat_ir
from .spec import MOST_ROWS, Registers

UNROLL = 4
PLANES = 4  # vectors of a tile over planes; what is left is done one by one
ARGUMENTS = 9  # of a tile's function, all 64-bit integers: those of `product` from the third on
LATENCY = 8  # multiply-adds that must be in flight to keep the units busy


def _constant(value: int) -> ir.Constant:
    return ir.Constant(INT64, value)


class Tile(Registers):
    """A tile's layout and width in vectors: what the code of a tile is compiled for."""

    def __init__(self, scalar: types.Float, layout: str, width: int) -> None:
        self.layout, self.width = layout, width
        super().__init__(scalar, f"{layout}, {width} wide")


register_model(Tile)(models.OpaqueModel)


class _Builder:
    """Builds the LLVM function of a tile for a number of rows."""

    def __init__(self, module: ir.Module, tile: Tile, rows: int) -> None:
        self.spec, self.layout, self.rows, self.vectors = tile, tile.layout, rows, tile.width
        self.size, self.vector = tile.size, tile.vector.ir
        kind = ir.FunctionType(ir.VoidType(), [INT64] * ARGUMENTS)
        self.function = ir.Function(module, kind, f"{tile.layout}_{rows}x{tile.width}")
        self.function.linkage = "internal"
        self.build()

    def build(self) -> None:
        self.builder = builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        (
            self.source, self.source_stride, self.target, self.target_stride,
            self.a, self.a_stride, self.b, self.b_stride, self.depth,
        ) = self.function.args  # fmt: skip
        self.starts = [self.row_start(r) for r in range(self.rows)]
        # a tile with few sums keeps several of each, or it waits for the latency of its additions; tiles
        # over planes keep equally many, since their width depends on the threads and the bits must not
        width = PLANES if self.layout == "planes" else self.vectors
        copies = min(UNROLL, -(-LATENCY // (self.rows * width)))
        sums = [self.load(self.at(self.source, self.source_stride, n)) for n in self.places()]
        zero = ir.Constant(self.vector, None)
        sums += [zero] * (len(sums) * (copies - 1))
        unrolled = builder.and_(self.depth, _constant(-UNROLL))
        k, sums = self.loop(_constant(0), unrolled, UNROLL, copies, sums)
        k, sums = self.loop(k, self.depth, 1, copies, sums)
        count = self.rows * self.vectors
        for place, n in enumerate(self.places()):
            total = sums[place]
            for copy in range(1, copies):
                total = builder.fadd(total, sums[copy * count + place])
            builder.store(total, self.at(self.target, self.target_stride, n), align=self.size)
        builder.ret_void()

    def places(self) -> list[tuple[int, int]]:
        return [(r, v) for r in range(self.rows) for v in range(self.vectors)]

    def at(self, base: ir.Value, stride: ir.Value, place: tuple[int, int]) -> ir.Value:
        row, v = place
        address = self.builder.add(base, self.builder.mul(stride, _constant(row)))
        address = self.builder.add(address, _constant(v * self.spec.lanes * self.size))
        return self.builder.inttoptr(address, self.vector.as_pointer())

    def load(self, pointer: ir.Value) -> ir.Value:
        return self.builder.load(pointer, align=self.size)

    def row_start(self, row: int) -> ir.Value | None:
        if self.layout == "outer":
            return None
        place = self.builder.add(self.a, _constant(row * 8))
        start = self.builder.load(self.builder.inttoptr(place, INT64.as_pointer()))
        return self.builder.inttoptr(self.builder.add(start, self.a_stride), self.vector.element.as_pointer())

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
        phis = [builder.phi(self.vector) for _ in sums]
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
            x = splat_ir(builder, builder.load(self.value(k, r)), self.spec.lanes)
            for v, w in enumerate(weights):
                n = copy * count + r * self.vectors + v
                # fused where the processor can; llvm.fma would call a C function for each lane elsewhere
                sums[n] = call_ir(
                    builder, f"llvm.fmuladd.{self.spec.vector.suffix}", self.vector, x, w, sums[n]
                )

    def weight(self, k: ir.Value, v: int) -> ir.Value:
        builder, bytes_ = self.builder, self.spec.lanes * self.size
        if self.layout == "planes":
            offset = builder.add(builder.mul(self.b_stride, _constant(v)), builder.mul(k, _constant(bytes_)))
        else:
            offset = builder.add(builder.mul(k, _constant(self.vectors * bytes_)), _constant(v * bytes_))
        return builder.inttoptr(builder.add(self.b, offset), self.vector.as_pointer())

    def value(self, k: ir.Value, r: int) -> ir.Value:
        builder = self.builder
        if self.layout != "outer":
            return builder.gep(self.starts[r], [k])
        address = builder.add(self.a, builder.mul(self.a_stride, k))
        address = builder.add(address, _constant(r * self.size))
        return builder.inttoptr(address, self.vector.element.as_pointer())


@intrinsic
def _write_addresses(typingctx: Any, tile: Any, table: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for rows in range(1, tile.rows(tile.width) + 1):
            place = builder.inttoptr(builder.add(args[1], _constant((rows - 1) * 8)), INT64.as_pointer())
            builder.store(builder.ptrtoint(_Builder(builder.module, tile, rows).function, INT64), place)
        return context.get_dummy_value()

    return types.void(tile, types.int64), codegen


def write_addresses(tile, table):
    """Write the addresses of a tile's functions, for 1, 2, ... rows, to a table."""
    _write_addresses(tile, table)


@once  # as long as the function is kept, those that it gives the addresses of are
def _writer(tile: Tile) -> Any:
    return entry_point(write_addresses, tile, types.int64)


@once
def tile_table(scalar: types.Float, layout: str, width: int) -> np.ndarray:
    """The addresses of the functions of a tile, for 1, 2, ... rows; see :func:`tile_product`.

    Tiles are compiled once and called through their addresses, whatever kernel calls them.
    """
    table = np.zeros(MOST_ROWS, np.int64)
    _writer(Tile(scalar, layout, width))(None, table.ctypes.data)
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
    a: Any,  # address of the table of row addresses; "outer": of the values
    a_stride: Any,  # bytes added to each row address; "outer": from column to column
    b: Any,  # address of the weights
    b_stride: Any,  # bytes from plane to plane; unused without planes
    depth: Any,  # number of products in each sum
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
