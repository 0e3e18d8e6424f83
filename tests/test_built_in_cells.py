"""The built-in cells of papers and other libraries, against these said again in PyTorch in their own form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import assert_close, name
from torch import Tensor
from torch.nn.functional import layer_norm, linear, logsigmoid

import fusedlstm.torch as fused
from fusedlstm import Recurrent, cells
from fusedlstm.cells import Cell

Step = Callable[[dict[str, Tensor], Tensor, list[Tensor]], list[Tensor]]
STEPS, BATCH, INPUTS, HIDDEN = 6, 5, 3, 19
ENDS = np.array([6, 2, 5, 1, 6])


def stacked(w: dict[str, Tensor], names: str, form: str) -> Tensor:
    return torch.cat([w[form.format(gate)] for gate in names])


def norm(value: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
    return layer_norm(value, gain.shape, gain, shift, 1e-5)


def haste_lstm(w: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Products normalized over all gates; haste's LayerNormLSTM."""
    h, c = states
    sums = norm(linear(x, w["weight_ih"]), stacked(w, "ifgo", "gain_{}_x"))
    sums = sums + norm(linear(h, w["weight_hh"]), stacked(w, "ifgo", "gain_{}_h"))
    i, f, g, o = (sums + stacked(w, "ifgo", "shift_{}")).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return [o.sigmoid() * norm(c, w["gain_c"], w["shift_c"]).tanh(), c]


def contrib_lstm(w: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Each gate's sum normalized by itself; TensorFlow's LayerNormBasicLSTMCell, with our order of gates."""
    h, c = states
    sums = linear(torch.cat([x, h], 1), torch.cat([w["weight_ih"], w["weight_hh"]], 1)).chunk(4, 1)
    i, f, g, o = (norm(part, w[f"gain_{gate}"], w[f"shift_{gate}"]) for gate, part in zip("ifgo", sums))
    new = norm(c * f.sigmoid() + i.sigmoid() * g.tanh(), w["gain_c"], w["shift_c"])
    return [new.tanh() * o.sigmoid(), new]


def haste_gru(w: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Products normalized over all gates, with shifts of both; haste's LayerNormGRU."""
    (h,) = states
    from_x = norm(linear(x, w["weight_ih"]), stacked(w, "rzn", "gain_{}_x"))
    from_h = norm(linear(h, w["weight_hh"]), stacked(w, "rzn", "gain_{}_h"))
    from_x = from_x + torch.cat([w["shift_r"], w["shift_z"], w["shift_n_x"]])
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, 1), from_h.chunk(3, 1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * (n_h + w["shift_n_h"])).tanh()
    return [z * h + (1 - z) * n]


def sum_gru(w: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> list[Tensor]:
    (h,) = states
    (r_x, z_x, n_x) = linear(x, w["weight_ih"]).chunk(3, 1)
    (r_h, z_h, n_h) = linear(h, w["weight_hh"]).chunk(3, 1)
    r = norm(r_x + r_h, w["gain_r"], w["shift_r"]).sigmoid()
    z = norm(z_x + z_h, w["gain_z"], w["shift_z"]).sigmoid()
    n = norm(n_x + r * n_h, w["gain_n"], w["shift_n"]).tanh()
    return [z * h + (1 - z) * n]


def paper_slstm(w: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> list[Tensor]:
    """As the paper's code has it, NX-AI/xlstm."""
    h, c, n, m = states
    raw = linear(x, w["weight_ih"], w["bias_ih"]) + linear(h, w["weight_hh"], w["bias_hh"])
    i, f, z, o = raw.chunk(4, 1)
    kept = m + logsigmoid(f)
    new = torch.where(n == 0, i, torch.maximum(i, kept))
    let_in, keep = torch.exp(i - new), torch.exp(torch.minimum(kept - new, torch.zeros_like(new)))
    c, n = keep * c + let_in * z.tanh(), keep * n + let_in
    return [o.sigmoid() * c / n, c, n, new]


def speechbrain_li_gru(w: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> list[Tensor]:
    (h,) = states
    gates = linear(x, w["weight_ih"], w["bias_ih"]) + linear(h, w["weight_hh"], w["bias_hh"])
    a, z = gates.chunk(2, 1)
    return [z.sigmoid() * h + (1 - z.sigmoid()) * a.relu()]


def paper_ind_rnn(w: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [torch.relu(linear(x, w["weight_ih"], w["bias_ih"]) + w["u"] * states[0])]


def paper_minimal_gated(w: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> list[Tensor]:
    (h,) = states
    (w_f, w_n), (b_f, b_n) = w["weight_ih"].chunk(2), w["bias_ih"].chunk(2)
    (u_f, u_n), (c_f, c_n) = w["weight_hh"].chunk(2), w["bias_hh"].chunk(2)
    f = (linear(x, w_f, b_f) + linear(h, u_f, c_f)).sigmoid()
    n = (linear(x, w_n, b_n) + linear(f * h, u_n, c_n)).tanh()
    return [(1 - f) * h + f * n]


CELLS: dict[Cell, Step] = {
    cells.layer_norm_lstm: haste_lstm,
    cells.layer_norm_sum_lstm: contrib_lstm,
    cells.layer_norm_gru: haste_gru,
    cells.layer_norm_sum_gru: sum_gru,
    cells.slstm: paper_slstm,
    cells.li_gru: speechbrain_li_gru,
    cells.ind_rnn: paper_ind_rnn,
    cells.minimal_gated: paper_minimal_gated,
}
EVERY = pytest.mark.parametrize("cell", CELLS, ids=name)


class Problem:
    """A layer of both directions in float64, and everything that it is given, as tensors."""

    def __init__(self, cell: Cell, hidden: int = HIDDEN) -> None:
        self.cell, self.hidden = cell, hidden
        self.generator = torch.Generator().manual_seed(1)
        shapes = Recurrent(cell, INPUTS, hidden, bidirectional=True).state_dict()
        self.weights = {key: self.normal(*array.shape).requires_grad_() for key, array in shapes.items()}
        self.x = self.normal(STEPS, BATCH, INPUTS).requires_grad_()
        self.initial = [self.normal(2, BATCH, hidden) for _ in cell.states]
        if cell is cells.slstm:  # the normalizer is a sum of exponentials, or zero in the beginning
            self.initial[2] = self.initial[2].exp()
            for state in self.initial[1:]:
                state[:, ::2] = 0
        for state in self.initial:
            state.requires_grad_()
        self.dy = self.normal(STEPS, BATCH, 2 * hidden)
        self.dfinal = [self.normal(2, BATCH, hidden) for _ in cell.states]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, *self.initial, *self.weights.values()]

    def expected(self, ends: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        """Outputs and final states of the other form, as a loop over time."""
        step, outputs, finals = CELLS[self.cell], [], []
        for reverse in (False, True):
            suffix = "_l0_reverse" if reverse else "_l0"
            own = {k.removesuffix(suffix): w for k, w in self.weights.items() if k.endswith(suffix)}
            states, y = [state[int(reverse)] for state in self.initial], [self.x[0]] * STEPS
            for t in range(STEPS)[:: -1 if reverse else 1]:
                runs = torch.from_numpy(t < ends)[:, None]
                new = step(own, self.x[t], states)
                y[t] = torch.where(runs, new[0], torch.zeros_like(new[0]))
                states = [torch.where(runs, *pair) for pair in zip(new, states)]
            outputs.append(torch.stack(y))
            finals.append(states)
        return torch.cat(outputs, -1), [torch.stack(parts) for parts in zip(*finals)]

    def loss(self, y: Tensor, final: list[Tensor]) -> Tensor:
        total: Tensor = (y * self.dy).sum() + sum((f * d).sum() for f, d in zip(final, self.dfinal))
        return total


@pytest.mark.sampled(0.5)
@EVERY
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_outputs_states_and_gradients(cell: Cell, dtype: str, backend: str) -> None:
    problem = Problem(cell)
    layer = Recurrent(cell, INPUTS, HIDDEN, bidirectional=True, dtype=dtype, backend=backend)
    layer.load_state_dict(problem.weights)

    def given(tensor: Tensor) -> np.ndarray:
        array: np.ndarray = tensor.detach().numpy().astype(dtype)
        return array

    def state(tensors: list[Tensor]) -> Any:
        return given(tensors[0]) if len(tensors) == 1 else tuple(map(given, tensors))

    def parts(found: Any) -> Any:
        return found if isinstance(found, tuple) else (found,)

    y, final, tape = layer.forward(given(problem.x), state(problem.initial), ENDS, training=True)
    assert tape is not None
    dx, dinitial, grads = tape.backward(given(problem.dy), state(problem.dfinal))
    right_y, right_final = problem.expected(ENDS)
    right = torch.autograd.grad(problem.loss(right_y, right_final), problem.inputs)
    depth = 2 * STEPS
    assert_close(y, right_y.detach(), depth, "y")
    for found, expected in zip(parts(final), right_final, strict=True):
        assert_close(found, expected.detach(), depth, "final")
    for found, expected in zip([dx, *parts(dinitial), *grads.values()], right, strict=True):
        assert_close(found, expected, depth, "gradients", gradient=True)


@EVERY
def test_second_gradients(cell: Cell) -> None:
    problem, ends = Problem(cell, 9), np.full(BATCH, STEPS)
    module = fused.Recurrent(cell, INPUTS, 9, bidirectional=True, dtype=torch.float64)
    module.load_state_dict(problem.weights)
    initial = problem.initial[0] if len(cell.states) == 1 else tuple(problem.initial)
    y, final = module(problem.x, initial)
    finals = list(final) if isinstance(final, tuple) else [final]
    ours = [problem.x, *problem.initial, *module.parameters()]
    seeds = [torch.randn_like(tensor) for tensor in ours]
    results = []
    for inputs, loss in (
        (ours, problem.loss(y, finals)),
        (problem.inputs, problem.loss(*problem.expected(ends))),
    ):
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        along = sum((gradient * seed).sum() for gradient, seed in zip(first, seeds))
        second = torch.autograd.grad(along, inputs, allow_unused=True)
        results.append([torch.zeros_like(t) if g is None else g for g, t in zip(second, inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()) + 1e-12
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_slstm_from_its_beginning(backend: str) -> None:
    """All states are zero there: neither gates that open very far nor those that hardly do overflow."""
    layer = Recurrent(cells.slstm, 1, 4, backend=backend, seed=1)
    x = np.array([-3e3, -50.0, 0.0, 50.0, 3e3], np.float32).reshape(1, 5, 1).repeat(7, 0)
    y, (h, c, n, _), tape = layer.forward(x, training=True)
    assert tape is not None
    dx, dinitial, grads = tape.backward(np.ones_like(y))
    for array in (y, h, c, n, dx, *dinitial, *grads.values()):
        assert np.isfinite(array).all()
    assert np.abs(y).max() <= 1
    assert (n > 0).all()


def test_parameters_begin_as_cells_say() -> None:
    layer = Recurrent(cells.layer_norm_lstm, 3, 5, num_layers=2, bidirectional=True, seed=1)
    state = layer.state_dict()
    for key, array in state.items():
        kind = key.partition("_")[0]
        assert kind in ("weight", "gain", "shift")
        assert (array == {"gain": 1, "shift": 0}[kind]).all() if kind != "weight" else array.std() > 0.1
    assert len(state) == 4 * (2 + 14)
    assert not any("bias" in key for key in Recurrent(cells.layer_norm_gru, 3, 5).state_dict())
