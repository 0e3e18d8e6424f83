"""What a kernel is compiled for: the cell, the precision, and the processor's registers."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import llvmlite.binding as llvm
from filelock import FileLock, Timeout
from llvmlite import ir
from numba import njit, types
from numba.core import config
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, models, register_model, unbox

from .simd import Vector

if TYPE_CHECKING:
    from fusedlstm.cells import Cell

MOST_ROWS = 8  # of a tile
LONGEST = 300.0  # seconds of compiling one kernel; a process that takes longer has been stopped


class Machine(NamedTuple):
    """The register file that tiles are cut for."""

    name: str
    bits: int  # of a register
    registers: int


@cache
def machine() -> Machine:
    """The widest registers of the processor at hand, or of that of NUMBA_CPU_FEATURES."""
    features = config.CPU_FEATURES
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    has = set(features.split(",")).issuperset
    if has({"+avx512f"}):
        return Machine("AVX-512", 512, 32)
    if has({"+avx2", "+fma"}):
        return Machine("AVX2", 256, 16)
    if platform.machine().lower() in ("aarch64", "arm64"):
        return Machine("NEON", 128, 32)
    return Machine("SSE" if "86" in platform.machine() else "128 bits", 128, 16)


@cache
def source_digest() -> str:
    """Changes with the source of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def stamped(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """A copy with a name of its own in Numba's cache on disk, for a signature and a state of the kernels.

    Numba looks at the file of a function alone, and machine code must not outlive what it was made of.
    And were there one index for all signatures, processes that add to it at the same time could leave
    each other's code under their names.
    """
    stamp = hashlib.sha256(f"{source_digest()} {signature}".encode()).hexdigest()[:16]
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"{function.__name__}_{stamp}"
    return copy


@contextmanager
def alone(function: Callable[..., Any]) -> Iterator[None]:
    """While another process compiles the same, wait, so that what it saves can be loaded.

    Saves work where many processes start at once, such as the ranks of a training; not needed to be right.
    """
    lock = FileLock(Path(njit(cache=True)(function).stats.cache_path) / f"{function.__qualname__}.lock")
    with suppress(Timeout, OSError, NotImplementedError):  # of a folder that nobody may write to, or lock in
        lock.acquire(timeout=LONGEST)
    try:
        yield
    finally:
        lock.release()


def entry_point(function: Callable[..., Any], *signature: Any) -> Any:
    """A function compiled for Python to call, without Numba's look at its arguments; cached on disk."""
    function = stamped(function, signature)
    compiled = njit(nogil=True, cache=True, error_model="numpy")(function)
    with alone(function):
        compiled.compile(signature)
    return compiled.overloads[signature].entry_point


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
    """What code is compiled for that knows the precision and the registers, but no cell.

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


class Spec(Registers):
    """The compile-time parameters of the kernels of a cell; its value is the address of its tiles.

    Attributes:
        cell: the cell.
        projected: whether the output is projected.
        gates: number of gates.
        inputs: number of pre-activations, of which split gates have two.
        splits: number of split gates.
        units: vectors of hidden units that a panel holds of each gate; cells with few gates have
            several, so that a tile is wide enough to hide the latency of its sums.
        width: vectors of a panel, gates times units.
        panel: hidden units of a panel.
        further: number of states beside the output.
        operand: the place among all states of that which the recurrent weights multiply; 0 is the output.
        learned: number of learned vectors.
        reads_operand: whether the cell takes the previous value of that state itself.
    """

    constants = (
        *("size", "lanes", "gates", "inputs", "splits", "units", "width", "panel", "further", "learned"),
        *("operand", "projected", "reads_operand"),
    )

    def __init__(self, cell: Cell, scalar: types.Float, projected: bool) -> None:
        self.cell, self.projected = cell, projected
        self.gates, self.inputs = len(cell.gates), len(cell.preactivations)
        self.splits, self.further, self.learned = len(cell.split), len(cell.states) - 1, len(cell.weights)
        self.units = max(1, 4 // self.gates)
        self.width = self.gates * self.units
        self.operand, self.reads_operand = cell.operand, cell.reads_operand
        super().__init__(scalar, f"{cell.key}, projected={projected}")
        self.panel = self.units * self.lanes


register_model(Registers)(models.OpaqueModel)


@unbox(Registers)
def _unbox_registers(typ: Any, obj: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


@register_model(Spec)
class _SpecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.IntType(64))


@unbox(Spec)
def _unbox_spec(typ: Any, obj: Any, c: Any) -> NativeValue:
    """In Python, a spec is given to its kernels as the address of its tiles."""
    return c.unbox(types.int64, obj)


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
