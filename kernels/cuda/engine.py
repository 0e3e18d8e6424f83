"""The CUDA engine: weights laid out for the kernels, and the products around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fusedlstm.cells import Cell
from fusedlstm.dispatch import States, check_options, check_projection
from fusedlstm.kernels import POISON
from fusedlstm.once import making
from fusedlstm.weights import Weights

from .gemm import cublas, matmul
from .launch import array_module, current_device, kernel
from .phases import phases, recurrent_slots, unsupported
from .plan import BARRIER_EVERY, PRECISIONS, Device, Form, Plan, Precision, Product, choose


class Tape(NamedTuple):
    """What a backward pass needs of a forward pass."""

    x: Any  # (T, B, I)
    pre: Any  # (T, B, A, H)
    entering: Any  # (T, B, P)
    entering_states: Any  # (S, T, B, H)
    inner: Any  # (T, B, H), what the product within a step has multiplied
    lengths: Any  # (B,)
    reset: Any  # (T, B) or None
    reverse: bool
    padded: bool  # whether sequences may end before the last step


class CUDA:
    """The engine for backend="cuda".

    Args:
        precision: of products in a float32 layer: "float32" exactly, or "tf32", "bfloat16" or
            "float16" on tensor cores, with sums and states in float32; the backward pass of "float16" is
            in bfloat16, which has the range of gradients.  A float64 layer is exact.
        form: "persistent" or "stepwise" forces a kernel; by default the sizes and the device decide.
        barrier_every: steps from one barrier of a persistent kernel to the next; between them its blocks
            poll what they exchange.  1 is a barrier every step.

    Raises:
        ImportError, RuntimeError: if CuPy, cuBLAS, the driver or a GPU is missing.
        ValueError: for an argument that is none of the above, and by `prepare` for a cell without kernels.
    """

    def __init__(
        self,
        precision: Precision = "float32",
        form: Form | None = None,
        barrier_every: int = BARRIER_EVERY,
    ) -> None:
        check_options(precision=precision, form=form or "auto")
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)} with the backend 'cuda', got {precision!r}"
            )
        if barrier_every < 1:
            raise ValueError(f"barrier_every must be 1 or more, got {barrier_every}")
        self.precision, self.form, self.barrier_every = precision, form, barrier_every
        if array_module() is not np:
            cublas()

    def prepare(self, cell: Cell, weights: Weights) -> Direction:
        if why := unsupported(cell):
            raise ValueError(f"backend 'cuda' has no kernels for cell {cell.name}: {why}")
        if weights.hr is None and weights.hh is not None and weights.hh.shape[1] != cell.hidden_size(weights):
            raise ValueError("heads must be 1 with the backend 'cuda', which has no kernels for more")
        if cell.takes_gates:
            raise ValueError(
                "input_size must be a number with the backend 'cuda', which has no kernels without"
            )
        return Direction(cell, weights, self.precision, self.form, self.barrier_every)


class Direction:
    """One direction of one layer on CUDA devices; see dispatch.Direction."""

    def __init__(
        self, cell: Cell, weights: Weights, precision: Precision, form: Form | None, barrier_every: int
    ) -> None:
        check_projection(cell, weights)
        self.cell, self._weights, self._form, self._barrier_every = cell, weights, form, barrier_every
        self._precision: Precision = "float64" if weights.ih.dtype == np.float64 else precision
        self._resident: dict[int, Resident] = {}

    @contextmanager
    def _on(self, x: Any) -> Iterator[Resident]:
        """The weights on the device of x, which becomes the current one."""
        xp = array_module()
        if xp is np:
            yield self._prepared(0)
        else:
            with x.device:
                yield self._prepared(x.device.id)

    def _prepared(self, device: int) -> Resident:
        if device not in self._resident:
            with making:  # once, for memory that may be scarce
                if device not in self._resident:
                    self._resident[device] = Resident(
                        self.cell, self._weights, self._precision, self._form, self._barrier_every
                    )
        return self._resident[device]

    def forward(
        self,
        x: Any,  # (T, B, I)
        initial: States | None,
        y: Any,  # (T, B, P)
        final: States,
        lengths: Any | None,  # (B,)
        reset: Any | None,  # (T, B)
        reverse: bool,
        training: bool,
        states: States | None = None,
    ) -> Tape | None:
        if states is not None:
            raise ValueError("all_states must be False with the backend 'cuda', which has no kernels for it")
        with self._on(x) as resident:
            return resident.forward(x, initial, y, final, lengths, reset, reverse, training)

    def backward(
        self,
        tape: Tape,
        dy: Any,  # (T, B, P)
        dfinal: States | None,
        dx: Any | None,  # (T, B, I)
        accumulate: bool,
        dstates: States | None = None,  # of states that `forward` refuses to give
    ) -> tuple[States, Weights]:
        with self._on(tape.x) as resident:
            return resident.backward(tape, dy, dfinal, dx, accumulate)

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        """Which kernels would run on the current device, and why."""
        xp = array_module()
        resident = self._prepared(0 if xp is np else xp.cuda.Device().id)
        said = {"device": resident.device.name, **_described("forward", resident.plan(batch, False), batch)}
        if training:
            said |= _described("backward", resident.plan(batch, True), batch)
        return said


def _described(what: str, plan: Plan, batch: int) -> dict[str, str]:
    product, grid = plan.recurrent, plan.grid(batch)
    return {
        what: f"{plan.form}, {product.precision}: {plan.why}",
        f"{what} launch": f"{grid[0]} x {grid[1]} blocks of {plan.threads} threads, {plan.shared} bytes "
        f"of shared memory each{_exchange(plan)}",
        f"{what} tile": f"{plan.units} hidden units x {product.batch} rows of the batch a block, weights "
        f"in {product.parts} parts of {product.steps} steps, {product.held} of them in registers",
    }


def _exchange(plan: Plan) -> str:
    if plan.polling:
        return f"; they poll what they exchange, with a barrier every {plan.barrier_every} steps"
    return "; a barrier every step" if plan.form == "persistent" else ""


class Resident:
    """One direction of one layer on one device."""

    def __init__(
        self, cell: Cell, weights: Weights, precision: Precision, form: Form | None, barrier_every: int
    ) -> None:
        self.cell, self.precision, self.form, self.barrier_every = cell, precision, form, barrier_every
        self.xp = xp = array_module()
        self.device: Device = current_device()
        self.dtype = weights.ih.dtype
        self.hidden, self.inputs = cell.hidden_size(weights), weights.ih.shape[1]
        self.outputs = weights.hh.shape[1]
        # a late gate's weights come behind those of the recurrent product
        self.recurrent = (*cell.recurrent_gates, *cell.late)
        self.ih = _ordered(xp.asarray(weights.ih), cell.input_gates, cell.gates_with_input)
        hh = _ordered(xp.asarray(weights.hh), self.recurrent, cell.gates_with_recurrent)
        gates = len(cell.recurrent_gates)
        self.hh, self.late = hh[: gates * self.hidden], hh[gates * self.hidden :]
        self.hr = None if weights.hr is None else xp.asarray(weights.hr)
        self.bias = self._biases(weights)
        self.learned = xp.zeros((len(cell.weights), self.hidden), self.dtype)
        for target, vector in zip(self.learned, weights.vectors):
            target[...] = xp.asarray(vector)
        self.biased = weights.bias_ih is not None
        self.plan = lru_cache(maxsize=32)(self._plan)
        self._packed = lru_cache(maxsize=4)(self._pack)
        self._endless = lru_cache(maxsize=64)(self._without_end)
        self._settle()

    def _settle(self) -> None:
        """Wait until arrays that outlive a call are there, since the next call may use another stream."""
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()

    def _without_end(self, batch: int) -> Any:
        """Lengths of sequences that run to the last step, however many there are."""
        lengths = self.xp.full(batch, np.iinfo(np.int64).max, np.int64)
        self._settle()
        return lengths

    def _biases(self, weights: Weights) -> Any:  # (A, H)
        cell, xp = self.cell, self.xp
        bias = xp.zeros((len(cell.preactivations), self.hidden), self.dtype)
        if weights.bias_ih is not None:
            ih = _ordered(xp.asarray(weights.bias_ih), cell.input_gates, cell.gates_with_input)
            hh = _ordered(xp.asarray(weights.bias_hh), self.recurrent, cell.gates_with_recurrent)
            bias[: len(cell.input_gates)] += ih.reshape(-1, self.hidden)
            bias[self._slots()] += hh.reshape(-1, self.hidden)
        return bias

    def _slots(self) -> list[int]:
        """The places among the pre-activations of `self.recurrent`."""
        late = [self.cell.preactivations.index(gate) for gate in self.cell.late]
        return [*range(*recurrent_slots(self.cell)), *late]

    def _plan(self, batch: int, backward: bool) -> Plan:
        projected = 0 if self.hr is None else self.outputs
        return choose(
            self.device, self.cell, self.precision, self.hidden, projected, batch, backward, self.form,
            self.barrier_every,
        )  # fmt: skip

    def _pack(self, plan: Plan) -> tuple[Any, Any]:
        """The weights of both products of a plan."""
        recurrent = self.hh.reshape(-1, self.hidden, self.outputs)
        inner = self.hr if plan.late is None else self.late
        if plan.backward:
            recurrent = self.hh.T[None]
            inner = None if inner is None else inner.T
        packed = plan.recurrent.pack(self.xp, recurrent, plan.blocks)
        second = packed[:0]
        if plan.inner is not None and inner is not None:
            second = plan.inner.pack(self.xp, inner[None], plan.blocks)
        self._settle()
        return packed, second

    def _empty(self, *shape: int) -> Any:
        if POISON:
            return self.xp.full(shape, np.nan, self.dtype)
        return self.xp.empty(shape, self.dtype)

    def _exchange(self, plan: Plan, product: Product, batch: int) -> Any:
        """The buffers through which blocks exchange vectors."""
        size = plan.buffers * product.buffer * plan.grid(batch)[1]
        if product.depth > product.size or batch % product.batch:
            return self.xp.zeros(size, product.operand)  # padding is multiplied by 0: it must be a number
        buffers = self.xp.empty(size, product.operand)
        if POISON:
            buffers.view(np.uint8).fill(0x3F)  # a number, which must not be taken for one that was published
        return buffers

    def _run(self, plan: Plan, batch: int, steps: int, reverse: bool, options: Any, arrays: Any) -> None:
        """Launch a plan's kernel; `arrays` are those before the exchange buffers."""
        xp = self.xp
        exchange = self._exchange(plan, plan.recurrent, batch)
        second = exchange[:0] if plan.inner is None else self._exchange(plan, plan.inner, batch)
        crossing = plan.form == "stepwise" and plan.late is not None
        between = self._empty(phases(self.cell, plan.backward).slots if crossing else 0, batch, self.hidden)
        arrivals = xp.zeros(plan.grid(batch)[1], np.uint64)
        launch = kernel(self.cell, plan, *options, self.device.capability)
        arrays = (*arrays, between, exchange, second, *self._packed(plan), arrivals)
        launch(plan.grid(batch), arrays, list(_runs(plan, steps, reverse)))

    def forward(
        self,
        x: Any,
        initial: States | None,
        y: Any,
        final: States,
        lengths: Any | None,
        reset: Any | None,
        reverse: bool,
        training: bool,
    ) -> Tape | None:
        xp, cell, hidden = self.xp, self.cell, self.hidden
        steps, batch, _ = x.shape
        gates, inputs, further = len(cell.input_gates), len(cell.preactivations), len(cell.states) - 1
        rows = xp.ascontiguousarray(x).reshape(steps * batch, self.inputs)
        fed = matmul(rows, self.ih.T, self.precision, xp).reshape(steps, batch, gates * hidden)
        output, states = self._states(initial, batch)
        initial_output, initial_states = output, states
        if reset is not None:
            initial_output, initial_states = output.copy(), states.copy()
            reset = xp.ascontiguousarray(reset)
        padded = lengths is not None
        lengths = xp.ascontiguousarray(lengths) if padded else self._endless(batch)
        taped = (steps, batch) if training else (0, 0)
        in_place = training and inputs == gates  # each thread writes what it alone has read
        pre = fed.reshape(*fed.shape[:2], gates, hidden) if in_place else self._empty(*taped, inputs, hidden)
        entering = self._empty(*taped, self.outputs)
        entering_states = self._empty(further, *taped, hidden)
        plan = self.plan(batch, False)
        inner = self._empty(*(taped if plan.inner is not None else (0, 0)), hidden)
        arrays = (
            fed, self.bias, self.learned, lengths, xp.zeros((0, 0), bool) if reset is None else reset,
            initial_output, initial_states, output, states, y, pre, entering, entering_states, inner,
        )  # fmt: skip
        options = (reset is not None, training)
        self._run(plan, batch, steps, reverse, options, arrays)
        for target, state in zip(final, (output, *states)):
            target[...] = state
        if not training:
            return None
        return Tape(x, pre, entering, entering_states, inner, lengths, reset, reverse, padded)

    def _states(self, given: States | None, batch: int) -> tuple[Any, Any]:
        """The first state (B, P), and the others (S, B, H), in arrays of their own."""
        xp, further = self.xp, len(self.cell.states) - 1
        output = xp.zeros((batch, self.outputs), self.dtype)
        states = xp.zeros((further, batch, self.hidden), self.dtype)
        if given is not None:
            output[...] = given[0]
            for target, state in zip(states, given[1:]):
                target[...] = state
        return output, states

    def backward(
        self, tape: Tape, dy: Any, dfinal: States | None, dx: Any | None, accumulate: bool
    ) -> tuple[States, Weights]:
        xp, cell, hidden = self.xp, self.cell, self.hidden
        steps, batch, _ = tape.x.shape
        gates, inputs = len(cell.input_gates), len(cell.preactivations)
        plan = self.plan(batch, True)
        precision = plan.recurrent.precision
        doutput, dstates = self._states(dfinal, batch)
        total_output, total_states = self._states(None, batch)
        dlearned = xp.zeros((len(cell.weights), batch, hidden), self.dtype)
        d = self._empty(steps, batch, inputs, hidden)
        dprojected = self._empty(*((steps, batch) if self.hr is not None else (0, 0)), self.outputs)
        arrays = (
            tape.pre, tape.entering, tape.entering_states, self.learned, tape.lengths,
            xp.zeros((0, 0), bool) if tape.reset is None else tape.reset,
            dy, doutput, dstates, total_output, total_states, dlearned, d, dprojected,
        )  # fmt: skip
        options = (tape.reset is not None, True)
        self._run(plan, batch, steps, tape.reverse, options, arrays)

        rows = d.reshape(steps * batch, inputs * hidden)
        d_input = rows[:, : gates * hidden]
        if dx is not None:
            here = matmul(d_input, self.ih, precision, xp).reshape(tape.x.shape)
            if accumulate:
                dx += here
            else:
                dx[...] = here
        grads = self._weight_gradients(rows, tape, dprojected, dlearned, precision)
        return (doutput + total_output, *(dstates + total_states)), grads

    def _rows(self, array: Any, tape: Tape) -> Any:
        """(T, B, N) as (T*B, N); 0 beyond the ends of sequences: NaN there would meet a gradient of 0."""
        xp = self.xp
        array = xp.ascontiguousarray(array)
        if tape.padded and array.size:
            active = xp.arange(len(array))[:, None] < tape.lengths
            array = xp.where(active[..., None], array, 0)
        return array.reshape(-1, array.shape[2])

    def _weight_gradients(
        self,
        d: Any,  # (T*B, A*H)
        tape: Tape,
        dprojected: Any,
        dlearned: Any,
        precision: Precision,
    ) -> Weights:
        xp, cell, hidden = self.xp, self.cell, self.hidden
        d_input = d[:, : len(cell.input_gates) * hidden]
        first, end = recurrent_slots(cell)
        operands = tape.entering_states[cell.operand - 1] if cell.operand else tape.entering
        products = [(d[:, first * hidden : end * hidden], operands.reshape(len(d), self.outputs))]
        x, inner = self._rows(tape.x, tape), self._rows(tape.inner, tape)
        for gate in cell.late:
            at = cell.preactivations.index(gate) * hidden
            products.append((d[:, at : at + hidden], inner))
        ih = matmul(d_input.T, x, precision, xp)
        hh = _stacked([matmul(part.T, operand, precision, xp) for part, operand in products], xp)
        bias_ih = bias_hh = hr = None
        if self.biased:
            bias_ih = _ordered(d_input.sum(0), cell.gates_with_input, cell.input_gates)
            sums = _stacked([part.sum(0) for part, _ in products], xp)
            bias_hh = _ordered(sums, cell.gates_with_recurrent, self.recurrent)
        if self.hr is not None:
            hr = matmul(dprojected.reshape(len(d), self.outputs).T, inner, precision, xp)
        return Weights(
            _ordered(ih, cell.gates_with_input, cell.input_gates),
            _ordered(hh, cell.gates_with_recurrent, self.recurrent),
            bias_ih,
            bias_hh,
            hr,
            tuple(dlearned.sum(1)),
        )


def _runs(plan: Plan, steps: int, reverse: bool) -> Iterator[tuple[int, int, int, int]]:
    """The arguments (first, last, reverse, phase) of each launch."""
    steps += plan.backward  # one more, for the gradient of the initial output
    if plan.form == "persistent":
        yield 0, steps, int(reverse), 0
        return
    if not plan.backward:
        yield 0, 0, int(reverse), 0
    for step in range(steps):
        for phase in range(len(plan.products)):
            yield step, step + 1, int(reverse), phase


def _stacked(parts: list[Any], xp: Any) -> Any:
    return parts[0] if len(parts) == 1 else xp.concatenate(parts)


def _ordered(stacked: Any, wanted: tuple[str, ...], given: tuple[str, ...]) -> Any:
    """An array whose first axis stacks the gates, in another order of them."""
    if wanted == given:
        return stacked
    parts = stacked.reshape(len(given), -1, *stacked.shape[1:])
    return parts[[given.index(gate) for gate in wanted]].reshape(stacked.shape)
