"""ONNX's recurrent operators run by our kernels, against the equations of the standard and ONNX Runtime."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import onnx
import onnx.backend.test.case.node as node_cases
import onnx.backend.test.runner as node_runner
import onnxruntime
import pytest
from checks import error
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

import fusedlstm
import fusedlstm.onnx
from fusedlstm import Recurrent, cells

# --- The equations of the standard ------------------------------------------------------------------------

DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
TAKES = {  # alpha and beta, with their defaults
    "Affine": (None, None),
    "LeakyRelu": (0.01,),
    "ThresholdedRelu": (1.0,),
    "ScaledTanh": (None, None),
    "HardSigmoid": (0.2, 0.5),
    "Elu": (1.0,),
}
ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", *TAKES, "Softsign", "Softplus")
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
TOLERANCE = {"float64": 1e-12, "float32": 3e-6, "float16": 1e-3, "bfloat16": 1e-2}


def activated(name: str, x: Any, a: float = 0, b: float = 0) -> Any:
    return {
        "Relu": lambda: np.maximum(0, x),
        "Tanh": lambda: np.tanh(x),
        "Sigmoid": lambda: 1 / (1 + np.exp(-x)),
        "Affine": lambda: a * x + b,
        "LeakyRelu": lambda: np.where(x >= 0, x, a * x),
        "ThresholdedRelu": lambda: np.where(x >= a, x, 0),
        "ScaledTanh": lambda: a * np.tanh(b * x),
        "HardSigmoid": lambda: np.minimum(np.maximum(a * x + b, 0), 1),
        "Elu": lambda: np.where(x >= 0, x, a * (np.exp(x) - 1)),
        "Softsign": lambda: x / (1 + np.abs(x)),
        "Softplus": lambda: np.log1p(np.exp(x)),
    }[name]()


def by_the_standard(operator: str, attributes: dict[str, Any], inputs: dict[str, Any]) -> list[np.ndarray]:
    """Y and the final states in float64, one sequence and one step at a time."""
    given = {k: v if k == "sequence_lens" else np.asarray(v, np.float64) for k, v in inputs.items()}
    layout = attributes.get("layout", 0)
    for name in {"X", "initial_h", "initial_c"} & given.keys() if layout else ():
        given[name] = given[name].swapaxes(0, 1)
    x, (directions, _, hidden) = given["X"], given["R"].shape
    steps, batch, _ = x.shape
    alpha, beta = (iter(attributes.get(f"activation_{kind}", ())) for kind in ("alpha", "beta"))
    functions = []
    for name in attributes.get("activations", DEFAULTS[operator] * directions):
        defaults = TAKES.get(name, ())
        values = [np.float32(next(own, default)) for own, default in zip((alpha, beta), defaults)]
        functions.append((name, *map(float, values)))
    each = len(functions) // directions
    y = np.zeros((steps, directions, batch, hidden))
    zeros = np.zeros((directions, batch, hidden))
    h, c = (np.array(given.get(name, zeros)) for name in ("initial_h", "initial_c"))
    for d in range(directions):
        own = {name: given[name][d] for name in ("W", "R", "B", "P") if name in given}
        reverse = d == 1 or attributes.get("direction") == "reverse"
        for b in range(batch):
            length = given["sequence_lens"][b] if "sequence_lens" in given else steps
            for t in range(length)[:: -1 if reverse else 1]:
                h[d, b], c[d, b] = one_step(
                    operator, attributes, own, functions[d * each :], x[t, b], h[d, b], c[d, b]
                )
                y[t, d, b] = h[d, b]
    found = [y, h, c] if operator == "LSTM" else [y, h]
    if layout:
        found = [y.transpose(2, 0, 1, 3), *(state.swapaxes(0, 1) for state in found[1:])]
    return found


def one_step(
    operator: str, attributes: dict[str, Any], w: dict[str, Any], functions: Any, x: Any, h: Any, c: Any
) -> tuple[Any, Any]:
    clip = attributes.get("clip", np.inf)
    count = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]

    def function(n: int, value: Any) -> Any:
        return activated(functions[n][0], np.clip(value, -clip, clip), *functions[n][1:])

    wx, rh = np.split(w["W"] @ x, count), np.split(w["R"], count)
    wb, rb = np.split(w.get("B", np.zeros(2 * count * len(h))), 2)
    wb, rb = np.split(wb, count), np.split(rb, count)
    gates = [wx[n] + rh[n] @ h + wb[n] + rb[n] for n in range(count)]
    if operator == "RNN":
        return function(0, gates[0]), c
    if operator == "GRU":
        z, r = function(0, gates[0]), function(0, gates[1])
        if attributes.get("linear_before_reset"):
            n = function(1, wx[2] + r * (rh[2] @ h + rb[2]) + wb[2])
        else:
            n = function(1, wx[2] + rh[2] @ (r * h) + rb[2] + wb[2])
        return (1 - z) * n + z * h, c
    p_i, p_o, p_f = np.split(w.get("P", np.zeros(3 * len(h))), 3)
    i = function(0, gates[0] + p_i * c)
    f = 1 - i if attributes.get("input_forget") else function(0, gates[2] + p_f * c)
    c = f * c + i * function(1, gates[3])
    o = function(0, gates[1] + p_o * c)
    return o * activated(functions[2][0], c, *functions[2][1:]), c


# --- Nodes ------------------------------------------------------------------------------------------------


def model_of(
    operator: str, attributes: dict[str, Any], inputs: dict[str, Any], opset: int = 14, outputs: Any = None
) -> onnx.ModelProto:
    """A model of one node; inputs that are not given are left out, and outputs whose name is empty."""
    names = [name if name in inputs else "" for name in INPUTS[: 8 if operator == "LSTM" else 6]]
    while not names[-1]:
        names.pop()
    outputs = outputs or ["Y", "Y_h", "Y_c"][: 3 if operator == "LSTM" else 2]
    hidden = inputs["R"].shape[-1]
    node = helper.make_node(operator, names, outputs, hidden_size=hidden, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in inputs.items()
    ]
    dtype = helper.np_dtype_to_tensor_dtype(inputs["X"].dtype)
    results = [helper.make_tensor_value_info(name, dtype, None) for name in outputs if name]
    graph = helper.make_graph([node], "test", infos, results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def ours(model: onnx.ModelProto, inputs: dict[str, Any], backend: str = "reference") -> list[np.ndarray]:
    return list(ReferenceEvaluator(model, new_ops=fusedlstm.onnx.operators(backend)).run(None, inputs))


def runtime(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, inputs))


@st.composite
def nodes(draw: Any, of_runtime: bool = False) -> tuple[str, dict[str, Any], dict[str, Any], int]:
    """An operator, attributes, inputs and an opset; with `of_runtime` what ONNX Runtime has."""
    operator = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    opset = draw(st.sampled_from([7, 13, 14] if of_runtime else [7, 11, 14, 21, 22]))
    attributes: dict[str, Any] = {}
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional", None]))
    if direction:
        attributes["direction"] = direction
    directions = 2 if direction == "bidirectional" else 1
    if draw(st.booleans()):
        names = [draw(st.sampled_from(ACTIVATIONS)) for _ in DEFAULTS[operator] * directions]
        attributes["activations"] = names
        for n, kind in enumerate(("alpha", "beta")):
            defaults = [TAKES[name][n] for name in names if name in TAKES and len(TAKES[name]) > n]
            # a default is taken for a value that is left out at the end only
            least = max((k + 1 for k, default in enumerate(defaults) if default is None), default=0)
            if of_runtime and "ThresholdedRelu" in names:
                least = len(defaults)  # of which ONNX Runtime has another default
            count = draw(st.integers(least, len(defaults)))
            if count:
                values = st.sampled_from([0.3, -0.5, 0.8, 1.25])
                attributes[f"activation_{kind}"] = [draw(values) for _ in range(count)]
    if draw(st.booleans()):
        attributes["clip"] = draw(st.sampled_from([0.25, 1.0]))
    if operator == "LSTM" and draw(st.booleans()):
        attributes["input_forget"] = 1
    if operator == "GRU" and draw(st.booleans()):
        attributes["linear_before_reset"] = 1
    if opset >= 14 and not of_runtime and draw(st.booleans()):
        attributes["layout"] = 1
    dtypes = ["float64", "float32", "float16"] + ["bfloat16"] * (opset >= 22)
    dtype = np.dtype("float32" if of_runtime else draw(st.sampled_from(dtypes)))
    sizes = [draw(st.sampled_from(choice)) for choice in ((1, 2, 5), (1, 3), (1, 4), (1, 3, 5))]
    given = draw(st.sets(st.sampled_from(INPUTS[3:])))
    inputs = arrays(operator, attributes, given, dtype, *sizes, seed=draw(st.integers(0, 99)))
    if of_runtime and "sequence_lens" in inputs:
        inputs["sequence_lens"] = np.maximum(inputs["sequence_lens"], 1)
    return operator, attributes, inputs, opset


def arrays(
    operator: str,
    attributes: Any,
    given: Any,
    dtype: Any,
    steps: int,
    batch: int,
    i: int,
    h: int,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Inputs of a node: X, W, R, and those of the others that it can have of `given`."""
    d = 2 if attributes.get("direction") == "bidirectional" else 1
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    shapes = {
        "X": (steps, batch, i),
        "W": (d, gates * h, i),
        "R": (d, gates * h, h),
        "B": (d, 2 * gates * h),
        "initial_h": (d, batch, h),
        "initial_c": (d, batch, h),
        "P": (d, 3 * h),
    }
    if attributes.get("layout"):
        shapes |= {
            name: (batch, shapes[name][0 if name != "X" else 0], shapes[name][2])
            for name in ("X", "initial_h", "initial_c")
        }
    generator = np.random.default_rng(seed)
    found = {
        name: generator.uniform(-0.8, 0.8, shape).astype(dtype)
        for name, shape in shapes.items()
        if name in ("X", "W", "R")
        or (name in given and (operator == "LSTM" or name not in ("initial_c", "P")))
    }
    if "sequence_lens" in given:
        found["sequence_lens"] = generator.integers(0, steps + 1, batch).astype(np.int32)
    return found


def assert_close(found: Any, expected: Any, dtype: Any) -> None:
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected):
        assert actual.dtype == dtype
        assert error(actual, wanted) <= TOLERANCE[np.dtype(dtype).name]


@hypothesis.settings(max_examples=250)
@given(case=nodes())
def test_every_attribute_input_and_type(case: Any) -> None:
    operator, attributes, inputs, opset = case
    found = ours(model_of(operator, attributes, inputs, opset), inputs)
    assert_close(found, by_the_standard(operator, attributes, inputs), inputs["X"].dtype)


@hypothesis.settings(max_examples=150)
@given(case=nodes(of_runtime=True))
def test_onnx_runtime_agrees(case: Any) -> None:
    operator, attributes, inputs, opset = case
    model = model_of(operator, attributes, inputs, opset)
    for found, expected in zip(ours(model, inputs), runtime(model, inputs), strict=True):
        assert error(found, expected) <= 1e-5  # its tanh and exp are approximations
