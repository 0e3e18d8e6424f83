"""Calls of the host from what XLA compiles: ``jax.pure_callback`` without its copies of the arguments.

XLA calls foreign functions through structures in C (its header ``xla/ffi/api/c_api.h``, in
``jax.ffi.include_dir()``), which are stated here for ctypes.  One such function, registered under one name,
serves all calls: each has a number, its attribute, by which a function of Python is found.  That function is
given arrays over XLA's own memory.  It writes its results to where XLA wants them, or returns others, which
are copied there.
"""

from __future__ import annotations

import ctypes
import math
import traceback
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any, ClassVar

import jax
import numpy as np

from .host import NAME
from .once import once

Function = Callable[..., Sequence[np.ndarray]]

_MAJOR = 0  # the version of the interface that is stated here
_METADATA = 1  # the extension by which XLA asks for the version of the interface
_EXECUTE = 3  # the stage in which a function is run
_INTERNAL = 13  # code of an error
_DTYPES = {1: np.dtype(bool), 4: np.dtype("int32"), 11: np.dtype("float32"), 12: np.dtype("float64")}


class _Sized(Structure):
    """How most of the structures begin."""

    _fields_: ClassVar[Any] = (("struct_size", c_size_t), ("extension", c_void_p))


class _Version(_Sized):
    _fields_ = (("major", c_int), ("minor", c_int))


class _Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version))


class _Extension(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("type", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    )


class _ErrorArguments(_Sized):
    _fields_ = (("message", c_char_p), ("code", c_int))


class _Api(_Sized):
    _fields_ = (
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))),
    )


class _Buffer(_Sized):
    _fields_ = (("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64)))


class _Buffers(_Sized):
    _fields_ = (("size", c_int64), ("types", c_void_p), ("entries", POINTER(POINTER(_Buffer))))


class _Scalar(Structure):
    _fields_ = (("dtype", c_int), ("value", POINTER(c_int64)))


class _Attributes(_Sized):
    _fields_ = (
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("entries", POINTER(POINTER(_Scalar))),
    )


class _Frame(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


# a type of ctypes for each number of bytes would take longer to make
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes, _memory.restype = (c_void_p, ctypes.c_ssize_t, c_int), ctypes.py_object
_WRITABLE = 0x200


def _arrays(buffers: _Buffers) -> list[np.ndarray]:
    """Arrays over the memory of XLA."""
    arrays: list[np.ndarray] = []
    for n in range(buffers.size):
        buffer = buffers.entries[n].contents
        shape, dtype = buffer.dims[: buffer.rank], _DTYPES[buffer.dtype]
        size = math.prod(shape) * dtype.itemsize
        # where there is nothing, the address may be none
        memory = _memory(buffer.data, size, _WRITABLE) if size else bytearray()
        arrays.append(np.ndarray(shape, dtype, memory))
    return arrays


_functions: list[Function] = []


@ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))  # type: ignore[untyped-decorator]
def _handler(pointer: Any) -> int | None:
    """What XLA calls; returns an error, or nothing."""
    frame = pointer.contents
    if frame.extension and frame.extension.contents.type == _METADATA:
        # minor versions only add to the structures; XLA refuses us by name when the major one is another
        version = frame.extension.contents.metadata.contents.version
        version.major, version.minor = _MAJOR, frame.api.contents.version.minor
        return None
    if frame.stage != _EXECUTE:
        return None
    try:
        function = _functions[frame.attributes.entries[0].contents.value[0]]
        targets = _arrays(frame.results)
        for target, result in zip(targets, function(*_arrays(frame.arguments), out=targets)):
            if result is not target:
                target[...] = result
    except BaseException:  # there is nobody else here to raise it to
        message = traceback.format_exc().encode()
        size = ctypes.sizeof(_ErrorArguments)
        error: int = frame.api.contents.create_error(_ErrorArguments(size, None, message, _INTERNAL))
        return error
    return None


@once
def _register() -> None:
    capsule: Any = jax.ffi.pycapsule  # without types
    jax.ffi.register_ffi_target(NAME, capsule(_handler), platform="cpu")


@once
def _number(function: Function) -> Any:
    """The place of a function in the table; it stays there, for what XLA has compiled."""
    _functions.append(function)
    return np.int64(len(_functions) - 1)


def call(function: Function, results: Sequence[jax.ShapeDtypeStruct], *arguments: Any) -> list[Any]:
    """What `function` makes of the arguments, as arrays of JAX, also in a function that is compiled.

    On CPUs it is given the memory of the arguments, which it must not write, and which is its own during the
    call only; elsewhere this is ``jax.pure_callback``.  Under ``jax.vmap`` it is called for each entry.

    Args:
        function: from arrays to arrays, without side effects that matter; each one is kept for ever.  On
            CPUs its argument `out` has arrays for its results: those that it returns itself are filled.
        results: shape and type of each result: booleans, int32, float32 or float64.
        arguments: arrays of these types.

    Raises:
        jax.errors.JaxRuntimeError: when the call is run, if the function raises anything; has its text.
    """
    _register()
    number = _number(function)

    def on_cpu(*arguments: Any) -> Any:
        return jax.ffi.ffi_call(NAME, list(results), vmap_method="sequential")(*arguments, number=number)

    def elsewhere(*arguments: Any) -> Any:
        return jax.pure_callback(function, list(results), *arguments, vmap_method="sequential")

    return list(jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=elsewhere))
