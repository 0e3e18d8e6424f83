"""What kernels are compiled for: the precision and the processor's registers; and how they are kept."""

from __future__ import annotations

import platform
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, models, register_model, unbox

from fusedlstm.once import once

from .compile import target
from .simd import Vector

MOST_ROWS = 8  # of a tile


class Machine(NamedTuple):
    """The register file that tiles are cut for."""

    name: str
    bits: int  # of a register
    registers: int


@once
def machine() -> Machine:
    """The widest registers that Numba uses, here or on the processor of NUMBA_CPU_NAME and the like."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return Machine("NEON", 128, 32)
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return Machine("128 bits", 128, 16)
    code = _multiply_add(*target())
    if "zmm" in code:
        return Machine("AVX-512", 512, 32)
    if "ymm" in code and "vfmadd" in code:
        return Machine("AVX2", 256, 16)
    return Machine("SSE", 128, 16)


def _multiply_add(triple: str, processor: str, features: str) -> str:
    """The code of a multiply-add of 512 bits, which shows what LLVM makes of the names of a processor."""
    vector = ir.VectorType(ir.FloatType(), 16)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(vector, [vector]), "multiply_add")
    builder = ir.IRBuilder(function.append_basic_block())
    (x,) = function.args
    fused = ir.Function(module, ir.FunctionType(vector, [vector] * 3), "llvm.fmuladd.v16f32")
    builder.ret(builder.call(fused, [x, x, x]))
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features)
    return str(machine.emit_assembly(llvm.parse_assembly(str(module))))


class Named(types.Type):
    """A type that Numba's index on disk keeps as a name alone, since it holds what does not pickle."""

    _known: ClassVar[WeakValueDictionary[str, Named]] = WeakValueDictionary()

    def __init__(self, name: str) -> None:
        super().__init__(f"{type(self).__name__}({name})")
        self._known.setdefault(self.name, self)

    def __reduce__(self) -> Any:
        return _named, (type(self), self.name)


def _named(kind: type[Named], name: str) -> Named:
    """The type of that name of this process, else a stand-in to compare with, since it is of another."""
    if name in Named._known:
        return Named._known[name]
    stand_in = object.__new__(kind)
    stand_in.name = name
    return stand_in


class Registers(Named):
    """What code is compiled for: the precision and the registers.

    Passed to compiled code as an argument without a value.

    Attributes:
        scalar: float32 or float64.
        size: bytes of a number.
        lanes: numbers in a register.
    """

    constants: tuple[str, ...] = ("size", "lanes")

    def __init__(self, scalar: types.Float, name: str = "") -> None:
        self.scalar = scalar
        self.size, self.lanes = scalar.bitwidth // 8, machine().bits // scalar.bitwidth
        self.vector = Vector(scalar, self.lanes)
        super().__init__(f"{name}, {scalar}, {machine()}")

    def rows(self, width: int) -> int:
        """Rows of a tile `width` vectors wide: its sums, a column of weights and a broadcast value
        share the registers."""
        return max(1, min(MOST_ROWS, (machine().registers - 1) // width - 1))


register_model(Registers)(models.OpaqueModel)


@unbox(Registers)
def _unbox_registers(typ: Any, obj: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


@infer_getattr
class _Constants(AttributeTemplate):  # type: ignore[misc]
    key = Registers

    def generic_resolve(self, registers: Registers, name: str) -> Any:
        return _constant_type(registers, name) if name in registers.constants else None


def _constant_type(registers: Registers, name: str) -> Any:
    return types.boolean if isinstance(getattr(registers, name), bool) else types.int64


@lower_getattr_generic(Registers)
def _get_constant(context: Any, builder: Any, registers: Registers, value: Any, name: str) -> Any:
    return context.get_constant(_constant_type(registers, name), getattr(registers, name))
