"""The parallel part of a kernel, compiled apart from the code that starts it.

Numba optimises a function anew in every function that calls it, directly or not.  The large functions
are therefore C functions that are called through their addresses; their arguments travel as one tuple
on the stack of the thread that starts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import NumbaTypeError
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from fusedlstm.once import once

from .compile import c_function
from .simd import INT64, OPTIONS, inlined
from .spec import Named
from .team import fork


class Work(Named):
    """The address of two addresses: of `launch`, and of a C function that takes a tuple of these types."""

    def __init__(self, arguments: types.BaseTuple) -> None:
        self.arguments = arguments
        super().__init__(str(arguments))


class Captured(Named):
    """The address of such a tuple."""

    def __init__(self, arguments: types.BaseTuple) -> None:
        self.arguments = arguments
        super().__init__(str(arguments))


@register_model(Work)
@register_model(Captured)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, INT64)


@unbox(Work)
def _unbox_work(typ: Any, obj: Any, c: Any) -> NativeValue:
    return c.unbox(types.int64, obj)


@intrinsic
def captured(typingctx: Any, address: Any) -> Any:
    """The tuple at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = context.get_value_type(address.arguments).as_pointer()
        return builder.load(builder.inttoptr(args[0], pointer))

    return address.arguments(address), codegen


@intrinsic
def _capture(typingctx: Any, work: Any, arguments: Any) -> Any:
    """The address of the tuple `arguments`, as long as the calling function runs."""
    if arguments != work.arguments:
        raise NumbaTypeError(f"the work takes {work.arguments}, not {arguments}")

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(cgutils.alloca_once_value(builder, args[1]), INT64)

    return types.int64(work, arguments), codegen


def calling(count: int) -> Any:
    """A function of compiled code that calls the C function at an address with `count` integers."""

    @intrinsic
    def call(typingctx: Any, function: Any, arguments: Any) -> Any:
        """Call the C function at an address, which takes `count` 64-bit integers."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [INT64] * count).as_pointer()
            builder.call(builder.inttoptr(args[0], kind), cgutils.unpack_tuple(builder, args[1]))
            return context.get_dummy_value()

        return types.void(types.int64, types.UniTuple(types.int64, count)), codegen

    return call


_call_work, call_launch = calling(4), calling(5)
call_phase = calling(6)


@njit(**OPTIONS)
def _member(thread, threads, sync, work, arguments):
    _call_work(work, (thread, threads, sync, arguments))


def launch(team, threads, patience, work, arguments):
    """Call the C function `work` on several threads of a team, as :func:`team.fork` does."""
    fork(team, threads, _member, (work, arguments), patience)


@once
def launcher() -> Any:
    """The compiled :func:`launch`."""
    return c_function(launch, types.void(*[types.int64] * 5), error_model="numpy")


@intrinsic
def _addresses(typingctx: Any, work: Any) -> Any:
    """Of `launch` and of the function."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pair = builder.inttoptr(args[0], ir.ArrayType(INT64, 2).as_pointer())
        return builder.load(pair)

    return types.UniTuple(types.int64, 2)(work), codegen


@inlined
def run(team, threads, patience, work, arguments):
    """Call `work` on several threads of a team, as :func:`team.fork` does."""
    start, function = _addresses(work)
    call_launch(start, (team, threads, patience, function, _capture(work, arguments)))


@inlined
def run_with(team, threads, patience, work, arguments, space):
    """:func:`run` with an array whose address is among the arguments.

    Numba frees an array after its last use, also where its address is still in use: this is that use.
    """
    run(team, threads, patience, work, arguments)
    space[0] = 0


class Compiled(NamedTuple):
    """A compiled function to be run on several threads; keep it as long as it may run."""

    function: Any
    addresses: np.ndarray  # (2,) int64
    type: Work

    @property
    def address(self) -> int:
        """The value of the argument `work` of an entry."""
        return int(self.addresses.ctypes.data)


def compiled(function: Callable[..., None], arguments: types.BaseTuple) -> Compiled:
    """Compile `function(thread, threads, sync, address)`.

    It calls `captured(address)` for its other arguments, a tuple of the given types.
    """
    signature = types.void(types.int64, types.int64, types.int64, Captured(arguments))
    made = c_function(function, signature, **OPTIONS)
    return Compiled(made, np.array([launcher().address, made.address]), Work(arguments))
