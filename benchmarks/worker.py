"""A process of its own for each contender: it stays alive and is asked in turn.

Two thread pools in one process slow each other up to several times, and idle threads of one process that
still spin take the cores from another.  So each contender has its process, and it answers only when its
threads are at rest.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from .cases import Case, check, make_data
from .contender import Contender, Unsupported
from .contenders import CONTENDERS
from .machine import cache_sizes

WARM_SECONDS = 0.1  # of calls before the first that counts
COLD_CALLS = 5  # a cold sample takes so many calls, with the caches flushed before each
REST_SECONDS, REST_AT_MOST = 0.005, 2.0  # how long threads must be idle, and how long that is waited for


class Failed(Exception):
    """A contender has failed; the message is for the report."""


# --- In the process of the contender ---------------------------------------------------------------------


class Bench:
    """A contender and the case that it is ready for."""

    def __init__(self, name: str, threads: int) -> None:
        self.threads = threads
        self.contender = CONTENDERS[name](threads)
        self.call: Callable[[], Any] = lambda: None

    def prepare(self, case: Case, right: str, seconds: float, cold: bool) -> dict[str, float]:
        """Get ready for a case, check its result against the file `right`, and see how long a call takes."""
        self.contender.refuse(case)
        self.case, self.right, self.cold = case, right, cold
        prepared = self.contender.prepare(case, make_data(case))
        self.call, self.read = prepared
        error = self._check(self.call())
        calls, spent = 0, 0.0
        while spent < WARM_SECONDS or calls < 2:
            spent, calls = spent + self._seconds(1), calls + 1
        self.calls = COLD_CALLS if cold else math.ceil(seconds * calls / spent)
        rest()
        return {"error": error, "calls": self.calls}

    def sample(self) -> float:
        """Seconds of a call: the mean of all calls of the sample, or the median of cold ones."""
        if not self.cold:
            seconds = self._seconds(self.calls) / self.calls
        else:
            singles = []
            for _ in range(self.calls):
                flush_caches(self.threads)
                rest()
                singles.append(self._seconds(1))
            seconds = statistics.median(singles)
        rest()
        return seconds

    def release(self) -> None:
        """Check that the result is still right, and forget the case."""
        if self.case.mode != "step":  # whose state has moved on
            self._check(self.call())
        self.call, self.read = lambda: None, None  # type: ignore[assignment]
        gc.collect()
        rest()

    def _check(self, result: Any) -> float:
        with np.load(self.right) as right:
            return check(self.case, self.read(result), dict(right), self.contender.tolerance)

    def _seconds(self, calls: int) -> float:
        call = self.call
        gc.disable()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - start
        gc.enable()
        return seconds


def rest() -> None:
    """Wait until no thread of this process spins any more."""
    end = time.perf_counter() + REST_AT_MOST
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(REST_SECONDS)
        if time.process_time() - before < REST_SECONDS / 5:
            return


def flush_caches(threads: int) -> None:
    """Fill the caches of all cores with something else."""
    count = 2 * cache_sizes()["L3"] // 8 // threads
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: np.ones(count).sum(), range(threads)))


def serve_contender(connection: Connection, name: str, threads: int) -> None:
    """Call methods of Bench for a contender until no more are asked for."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    bench = None

    def answer(method: str, *arguments: Any) -> Any:
        nonlocal bench
        bench = bench or Bench(name, threads)
        return getattr(bench, method)(*arguments)

    serve(connection, answer)


def serve(connection: Connection, answer: Callable[..., Any]) -> None:
    """Answer requests (method, arguments) by `answer(method, *arguments)` until there are no more."""
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("done", answer(method, *arguments)))
        except Unsupported as error:
            connection.send(("unsupported", str(error)))
        except Exception as error:  # whatever a framework raises is a result
            message = " ".join(f"{type(error).__name__}: {error}".split())  # in one line of a table
            connection.send(("failed", message[:500]))


# --- In the process that compares ------------------------------------------------------------------------


class Worker:
    """A process that answers, started when it is first asked, and again after it has died.

    Args:
        target: what runs in it, with a connection and `arguments`; it ends in :func:`serve`.
        timeout: seconds after which an answer is not waited for.
        environment: variables to set before it starts.
    """

    def __init__(
        self,
        target: Callable[..., None],
        arguments: tuple[Any, ...],
        timeout: float,
        environment: Mapping[str, str],
    ) -> None:
        self.target, self.arguments = target, arguments
        self.timeout, self.environment = timeout, environment
        self._process: Any = None

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer of the process.

        Raises:
            Unsupported: if there is no such thing for a contender.
            Failed: if it failed, took longer than the timeout, or died.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(self.timeout):
                raise Failed(f"no answer within {self.timeout:g} s")
            kind, value = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise Failed(f"its process ended with exit code {code}") from None
        except Failed:
            self.close()
            raise
        if kind == "unsupported":
            raise Unsupported(value)
        if kind == "failed":
            raise Failed(value)
        return value

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with _environment(self.environment):
            self._process = context.Process(target=self.target, args=(theirs, *self.arguments), daemon=True)
            self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join(1)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None


def contender_worker(contender: type[Contender], threads: int, timeout: float) -> Worker:
    """The process of a contender; what it is asked for are methods of Bench."""
    environment = {"OMP_NUM_THREADS": str(threads), **contender.environment}
    return Worker(serve_contender, (contender.name, threads), timeout, environment)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that a process started inside will see."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
