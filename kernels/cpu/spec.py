"""What a kernel is compiled for: the cell, the precision, and the processor's registers."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from numba import types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, models, register_model, unbox

from .simd import Vector

if TYPE_CHECKING:
    from fusedlstm.cells import Cell


class Machine(NamedTuple):
    """The register file that tiles are cut for."""

    name: str
    bits: int  # of a register
    registers: int


@cache
def machine() -> Machine:
    """The widest registers of the processor at hand."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return Machine("AVX-512", 512, 32)
    if features.get("avx2") and features.get("fma"):
        return Machine("AVX2", 256, 16)
    if platform.machine().lower() in ("aarch64", "arm64"):
        return Machine("NEON", 128, 32)
    return Machine("SSE" if "86" in platform.machine() else "128-bit", 128, 16)


@cache
def fingerprint() -> str:
    """Changes with the source of the kernels, so that no machine code outlives what it was made of."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Spec(types.Type):
    """The compile-time parameters of a kernel, passed to it as an argument without a value.

    Attributes:
        cell: the cell.
        scalar: float32 or float64.
        projected: whether the output is projected.
        size: bytes of a number.
        lanes: numbers in a register.
        gates: number of gates.
        inputs: number of pre-activations, of which split gates have two.
        units: vectors of hidden units that a panel holds of each gate; cells with few gates have
            several, so that a tile is wide enough to hide the latency of its sums.
        width: vectors of a panel, gates times units.
        panel: hidden units of a panel.
        states: number of states beside the output.
    """

    constants = "size lanes gates inputs splits units width panel states vectors projected reads_output".split()

    def __init__(self, cell: Cell, scalar: types.Float, projected: bool) -> None:
        self.cell, self.scalar, self.projected = cell, scalar, projected
        here = machine()
        self.lanes = here.bits // scalar.bitwidth
        self.vector = Vector(scalar, self.lanes)
        self.size = scalar.bitwidth // 8
        self.gates, self.inputs = len(cell.gates), len(cell.preactivations)
        self.splits, self.states, self.vectors = len(cell.split), len(cell.states) - 1, len(cell.weights)
        self.units = max(1, 4 // self.gates)
        self.width, self.panel = self.gates * self.units, self.units * self.lanes
        self.reads_output = cell.reads_output
        super().__init__(
            f"Spec({cell.key}, {scalar}, {here}, projected={projected}, kernels {fingerprint()})"
        )

    def rows(self, width: int) -> int:
        """Rows of a tile `width` vectors wide: its sums, a column of weights and a broadcast value
        share the registers."""
        return max(1, min(8, (machine().registers - 1) // width - 1))

    def __reduce__(self) -> Any:
        # Numba's index on disk needs the name alone, and a cell may not pickle
        return _named, (self.name,)


def _named(name: str) -> Spec:
    spec = object.__new__(Spec)
    spec.name = name
    return spec


@register_model(Spec)
class _SpecModel(models.OpaqueModel):
    pass


@unbox(Spec)
def _unbox_spec(typ: Any, obj: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


@infer_getattr
class _SpecAttributes(AttributeTemplate):  # type: ignore[misc]
    key = Spec

    def generic_resolve(self, spec: Spec, name: str) -> Any:
        if name in Spec.constants:
            return types.boolean if isinstance(getattr(spec, name), bool) else types.int64
        return None


@lower_getattr_generic(Spec)
def _get_constant(context: Any, builder: Any, spec: Spec, value: Any, name: str) -> Any:
    type_ = types.boolean if isinstance(getattr(spec, name), bool) else types.int64
    return context.get_constant(type_, getattr(spec, name))
