"""How kernels are compiled, kept on disk, and loaded again.

By Numba's cache of compiled functions, with these differences.  Machine code must not outlive what it was
made of: names tell all of that.  A file is used if it is whole and nobody else could have written it; else
the function is compiled anew.  And what cannot be kept costs a warning, not the call.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
from numba import _dynfunc, njit
from numba.core import config, registry, sigutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, InTreeCacheLocator
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.runtime import rtsys
from numba.core.typed_passes import NativeLowering

from fusedlstm.files import alone, write_whole
from fusedlstm.folders import Store, is_private, user_cache, user_number, warn
from fusedlstm.once import making, once

LONGEST = 300.0  # seconds of compiling one kernel; a process that takes longer has been stopped
DIGEST = 32  # bytes


def entry_point(function: Callable[..., Any], *signature: Any) -> Any:
    """A function compiled for Python to call, without Numba's look at its arguments."""
    compiled = kept(function, signature)
    with making, _alone(compiled._cache):
        compiled.compile(signature)
    return compiled.overloads[signature].entry_point


def c_function(function: Callable[..., None], signature: Any, more: str = "", **options: Any) -> Any:
    """A compiled C function, whose address holds as long as it is kept; `more` is generated code it calls."""
    function = stamped(function, f"{signature} {more}")
    made: Any = CFunc(function, sigutils.normalize_signature(signature), {}, options)
    made._cache = _Cache(function)
    with making, _alone(made._cache):
        made.compile()
    return made


def kept(function: Callable[..., Any], signature: Any = "") -> Any:
    """A function for compiled code to call, compiled when it first does; with arguments of one signature."""
    function = stamped(function, signature)
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of a part: optimised, and made to machine code, only where it has been linked to."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):  # type: ignore[misc]
    _name = "part_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        done = super().run_pass(state)
        lowered, library = state.cr, state.library
        described = lowered.fndesc
        # what Numba knows the part by: as it makes it, but with no code
        known = _dynfunc.make_function(
            described.lookup_module(), described.qualname.split(".")[-1], "", 0, lowered.env, (library,)
        )
        state.targetctx.insert_user_function(known, described, [library])
        state.cr = lowered._replace(cfunc=known)
        return bool(done)


class Part(CompilerBase):  # type: ignore[misc]
    """How functions are compiled that only compiled code calls.

    Numba would optimise each of them, and make machine code of it that nobody runs, before it does the same
    with what calls them: that took half of the time of all compiling.
    """

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes = [
            (_PartLowering if kind is NativeLowering else kind, text) for kind, text in passes.passes
        ]
        passes.finalize()
        return [passes]


# --- Names ------------------------------------------------------------------------------------------------


@once
def source_digest() -> str:
    """Changes with the source of the kernels."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in [*sorted(folder.glob("*.py")), folder.parent / "random.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def target() -> tuple[str, str, str]:
    """What Numba compiles for: LLVM's names of the system, the processor, and its features."""
    triple, processor, features = registry.cpu_target.target_context.codegen().magic_tuple()
    return triple, processor, features


def stamped(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """A copy with a name of its own on disk, for all that its machine code depends on.

    Numba looks at the file of a function alone.  And were there one index for several signatures or
    processors, processes that add to it at the same time could leave each other's code under their names.
    """
    state = f"{source_digest()} {numba.__version__} {target()} {signature}"
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"{function.__name__}_{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    return copy


# --- Files ------------------------------------------------------------------------------------------------


def store() -> Store:
    """The folders of compiled kernels."""
    wanted = (Path(__file__).parent / "__pycache__", *user_cache())
    if config.CACHE_DIR:  # where other users may have theirs
        wanted = tuple(Path(config.CACHE_DIR, name) for name in ("fusedlstm", f"fusedlstm-{user_number()}"))
    return Store("NUMBA_CACHE_DIR", wanted)


class _Locator(InTreeCacheLocator):  # type: ignore[misc]
    """Tells Numba what a name on disk begins with, but no folder: :func:`store` knows those."""

    @classmethod
    def from_function(cls, function: Any, file: str) -> _Locator:
        return cls(function, file)

    def ensure_cache_path(self) -> None:
        pass


class _Naming(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """The index and the code of a function in a folder, each with a digest of its own in front.

    Damaged machine code would do anything; so would that of somebody else.
    """

    def _read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            if not is_private(os.fstat(file.fileno())):
                raise PermissionError(f"others may write to {path}")
            digest, content = file.read(DIGEST), file.read()
        if digest != hashlib.sha256(content).digest():
            raise ValueError(f"{path} is damaged")
        return content

    @contextmanager
    def _open_for_write(self, path: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        yield content
        whole = content.getvalue()
        write_whole(Path(path), hashlib.sha256(whole).digest() + whole, 0o644)

    def _load_index(self) -> dict[Any, str]:
        try:
            content = io.BytesIO(self._read(self._index_path))
            if pickle.load(content) != self._version:
                return {}
            stamp, names = pickle.load(content)
        except Exception:  # pickle may raise any, of what is no index
            return {}
        return names if stamp == self._source_stamp else {}

    def _load_data(self, name: str) -> Any:
        return pickle.loads(self._read(self._data_path(name)))


class _Cache(FunctionCache):  # type: ignore[misc]
    """What a dispatcher of Numba asks for a function before it is compiled, and tells of it afterwards."""

    _impl_class = _Naming

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.name = function.__qualname__

    def _in(self, folder: Path) -> _Files:
        return _Files(str(folder), self._impl.filename_base, self._impl.locator.get_source_stamp())

    def is_there(self) -> bool:
        """Whether a folder has code of this function, whole or not."""
        files = map(self._in, store().folders())
        return any(os.path.exists(found._data_path(found._data_name(1))) for found in files)

    def load_overload(self, signature: Any, context: Any) -> Any:
        rtsys.initialize(context)
        for folder in store().folders():
            self._cache_file = self._in(folder)
            with suppress(Exception):  # whatever is wrong with it, it can be compiled anew
                # Numba's own would prepare for compiling before, which takes longer than all loading
                found = self._load_overload(signature, context)
                if found is not None:
                    return found
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        folder = store().place()
        if folder is None:
            return
        self._cache_file = self._in(folder)
        try:
            super().save_overload(signature, compiled)
        except OSError as error:
            _say(f"compiled kernels cannot be kept: {error}")


@once
def _say(message: str) -> None:
    warn(message)


@contextmanager
def _alone(cache: _Cache) -> Iterator[None]:
    """While another process compiles the same, wait, so that what it saves can be loaded.

    As where many start at once, such as the ranks of a training.
    """
    if cache.is_there():
        yield
        return
    folder = store().place()
    with _patience, nullcontext() if folder is None else alone(folder / f"{cache.name}.lock", LONGEST):
        yield


class _Patience:
    """Says once on the log why this process takes so long, and where kernels are kept; entered by who holds
    `making`, and again by what is compiled for it."""

    LIMIT = 2.0  # seconds

    def __init__(self) -> None:
        self.seconds, self.depth, self.start, self.said = 0.0, 0, 0.0, False

    def __enter__(self) -> None:
        if not self.depth:
            self.start = time.perf_counter()
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if self.depth:
            return
        self.seconds += time.perf_counter() - self.start
        if self.seconds > self.LIMIT and not self.said:
            self.said = True
            folder = store().place()
            logging.getLogger("fusedlstm").warning(
                "compiling kernels, which takes some seconds for each cell and precision; they are kept %s, "
                "and `fusedlstm compile` makes them ahead",
                f"in {folder}" if folder else "in memory, since no folder can be written",
            )


_patience = _Patience()
