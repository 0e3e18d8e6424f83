"""The parallel part of a kernel, compiled apart from the code that starts it.

Numba optimises a function anew in every function that calls it, directly or not.  The large functions
are therefore C functions that are called through their addresses; their arguments travel as one tuple
on the stack of the thread that starts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.core.errors import NumbaTypeError
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from .simd import INT64, OPTIONS
from .spec import Named, stamped
from .team import fork


class Work(Named):
    """The address of a C function that takes arguments of the types of a tuple."""

    def __init__(self, arguments: types.Tuple) -> None:
        self.arguments = arguments
        super().__init__(str(arguments))


class Captured(Named):
    """The address of such a tuple."""

    def __init__(self, arguments: types.Tuple) -> None:
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
def _address(typingctx: Any, work: Any) -> Any:
    return types.int64(work), lambda context, builder, sig, args: args[0]


@intrinsic
def _capture(typingctx: Any, work: Any, arguments: Any) -> Any:
    """The address of the tuple `arguments`, as long as the calling function runs."""
    if arguments != work.arguments:
        raise NumbaTypeError(f"the work takes {work.arguments}, not {arguments}")

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(cgutils.alloca_once_value(builder, args[1]), INT64)

    return types.int64(work, arguments), codegen


@intrinsic
def _call(typingctx: Any, work: Any, thread: Any, threads: Any, sync: Any, arguments: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [INT64] * 4).as_pointer()
        builder.call(builder.inttoptr(args[0], function), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@njit(error_model="numpy")
def _member(thread, threads, sync, work, arguments):
    _call(work, thread, threads, sync, arguments)


@njit(error_model="numpy")
def run(team, threads, patience, work, arguments):
    """Call `work` on several threads of a team, as :func:`team.fork` does."""
    fork(team, threads, _member, (_address(work), _capture(work, arguments)), patience)


def compiled(function: Callable[..., None], arguments: types.Tuple) -> Any:
    """The C function of `function(thread, threads, sync, address)`; keep it as long as it may run.

    `function` calls `captured(address)` for its other arguments.
    """
    signature = types.void(types.int64, types.int64, types.int64, Captured(arguments))
    return cfunc(signature, cache=True, **OPTIONS)(stamped(function))
