"""What is made once in a process, whichever thread asks first, and whatever forks meanwhile.

Compiled code and tables are known by their addresses: the one that a caller was given must be the one that is
kept.  :func:`functools.cache` lets two threads that ask at once make two of a thing, and lets go of one.
"""

from __future__ import annotations

import logging  # noqa: F401, so that a fork takes its lock after ours: code that imports Numba needs it
import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

T = TypeVar("T")

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper as Cached


PATIENCE = 60.0  # seconds for which a fork waits; whatever takes longer may be waiting for who forks


def fork_lock() -> Any:
    """A re-entrant lock that nobody holds in a forked child.

    A fork waits for who holds it, so in the child what it guards is whole.  Forks take the locks first that
    were made last: who holds one may ask for those of modules that the lock's own module imports, no others.
    """
    lock: Any = threading.RLock()

    def release() -> None:
        if lock._is_owned():  # it may have been made, or held for too long, while another thread forked
            lock.release()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lambda: lock.acquire(timeout=PATIENCE),
            after_in_parent=release,
            after_in_child=lock._at_fork_reinit,
        )
    return lock


making = fork_lock()  # held by who compiles, loads, registers or imports what is made once


def once(function: Callable[..., T]) -> Cached[T]:
    """:func:`functools.cache`, but what it gives for equal arguments is always the same object.

    Others wait while it is made.  What is there already is found without the lock, as quickly as by `cache`.
    It may not be asked for where a module is imported: who makes something may be waiting for that import.
    """
    made = cache(function)

    @cache
    @wraps(function)
    def found(*args: Any, **kwargs: Any) -> T:
        with making:
            return made(*args, **kwargs)

    def forget() -> None:
        """As of `cache`."""
        with making:
            made.cache_clear()
            clear()

    clear, found.cache_clear = found.cache_clear, forget  # type: ignore[method-assign]
    found.__wrapped__ = function
    return found


class lazy(Generic[T]):
    """:func:`functools.cached_property` without a lock, which before Python 3.12 all objects share.

    Two threads may make the value; both are given the first.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self._function, self._name, self.__doc__ = function, function.__name__, function.__doc__

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: Any) -> lazy[T]: ...
        @overload
        def __get__(self, instance: object, owner: Any) -> T: ...

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else vars(instance).setdefault(self._name, self._function(instance))
