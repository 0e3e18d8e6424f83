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
import ml_dtypes  # noqa: F401, NumPy knows bfloat16 by it
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
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


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
        "Elu": lambda: np.where(x >= 0, x, a * (np.exp(np.minimum(x, 0)) - 1)),
        "Softsign": lambda: x / (1 + np.abs(x)),
        "Softplus": lambda: np.logaddexp(0, x),
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
    results = [
        helper.make_tensor_value_info(name, dtype, [None] * rank)
        for name, rank in zip(outputs, (4, 3, 3))
        if name
    ]
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
        for name in ("X", "initial_h", "initial_c"):
            first, second, last = shapes[name]
            shapes[name] = (second, first, last)
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


def assume_moderate(expected: list[np.ndarray]) -> list[np.ndarray]:
    """States that grow without bound, as with Relu everywhere, tell nothing but rounding errors."""
    hypothesis.assume(all(np.all(np.abs(value) < 20) for value in expected))
    return expected


@hypothesis.settings(max_examples=250)
@given(case=nodes())
def test_every_attribute_input_and_type(case: Any) -> None:
    operator, attributes, inputs, opset = case
    expected = assume_moderate(by_the_standard(operator, attributes, inputs))
    assert_close(ours(model_of(operator, attributes, inputs, opset), inputs), expected, inputs["X"].dtype)


@hypothesis.settings(max_examples=150)
@given(case=nodes(of_runtime=True))
def test_onnx_runtime_agrees(case: Any) -> None:
    operator, attributes, inputs, opset = case
    assume_moderate(by_the_standard(operator, attributes, inputs))
    model = model_of(operator, attributes, inputs, opset)
    for found, expected in zip(ours(model, inputs), runtime(model, inputs), strict=True):
        assert error(found, expected) <= 1e-5  # its tanh and exp are approximations


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        (
            "LSTM",
            {
                "activations": ["HardSigmoid", "Elu", "Softsign"] * 2,
                "activation_alpha": [0.3, 0.7],
                "clip": 0.5,
                "layout": 1,
                "direction": "bidirectional",
            },
        ),
        ("GRU", {"activations": ["Sigmoid", "LeakyRelu"], "clip": 0.75, "direction": "reverse"}),
        ("RNN", {"activations": ["ScaledTanh"], "activation_alpha": [1.5], "activation_beta": [0.5]}),
    ],
)
def test_kernels_compute_what_the_standard_says(operator: str, attributes: Any, dtype: str) -> None:
    inputs = arrays(operator, attributes, INPUTS, dtype, steps=5, batch=7, i=3, h=9)
    found = ours(model_of(operator, attributes, inputs), inputs, backend="cpu")
    assert_close(found, by_the_standard(operator, attributes, inputs), dtype)


# --- What is left out, and what changes -------------------------------------------------------------------


def test_outputs_that_are_left_out_are_not_the_inputs_that_others_leave_out() -> None:
    """In ONNX's evaluator both have the same name, the empty one."""
    inputs = arrays("GRU", {}, (), "float32", 3, 2, 4, 4)
    first = helper.make_node("GRU", ["X", "W", "R"], ["", "h"], hidden_size=4)
    second = helper.make_node("GRU", ["X", "W", "R", "", "", "h"], ["", "end"], hidden_size=4)
    infos = [helper.make_tensor_value_info(name, 1, a.shape) for name, a in inputs.items()]
    graph = helper.make_graph([first, second], "g", infos, [helper.make_tensor_value_info("end", 1, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    twice = by_the_standard("GRU", {}, inputs)[1]
    (found,) = ours(model, inputs)
    assert error(found, by_the_standard("GRU", {}, inputs | {"initial_h": twice})[1]) < 1e-6


@pytest.mark.parametrize("outputs", [["Y"], ["", "Y_h"], ["", "", "Y_c"], ["Y", "", "Y_c"]])
def test_any_outputs(outputs: list[str]) -> None:
    inputs = arrays("LSTM", {}, INPUTS, "float64", 3, 2, 4, 5)
    found = ours(model_of("LSTM", {}, inputs, outputs=outputs), inputs)
    expected = by_the_standard("LSTM", {}, inputs)
    assert_close(found, [value for value, name in zip(expected, outputs) if name], np.float64)


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_run(steps: int, batch: int) -> None:
    inputs = arrays("LSTM", {}, ("initial_h", "initial_c"), "float32", steps, batch, 2, 3)
    y, h, c = ours(model_of("LSTM", {}, inputs), inputs)
    assert y.shape == (steps, 1, batch, 3)
    assert np.array_equal(h, inputs["initial_h"])
    assert np.array_equal(c, inputs["initial_c"])


def test_other_weights_in_a_later_call() -> None:
    """Also in the memory of the weights before."""
    inputs = arrays("RNN", {}, (), "float64", 3, 2, 2, 3)
    evaluator = ReferenceEvaluator(model_of("RNN", {}, inputs), new_ops=fusedlstm.onnx.operators("reference"))
    for scale in (1.0, 1.0, -0.5):
        inputs["W"] *= scale
        assert_close(evaluator.run(None, inputs), by_the_standard("RNN", {}, inputs), np.float64)
    (node,) = evaluator.rt_nodes_
    before = node._made
    evaluator.run(None, inputs)
    assert node._made is before


def test_attributes_of_a_function_that_has_the_node() -> None:
    node = helper.make_node("RNN", ["X", "W", "R"], ["Y"])
    attribute = onnx.AttributeProto(name="clip", ref_attr_name="bound", type=onnx.AttributeProto.FLOAT)
    node.attribute.append(attribute)
    opsets = [helper.make_opsetid("", 14), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "bounded", ["X", "W", "R"], ["Y"], [node], opsets, ["bound"])
    inputs = arrays("RNN", {}, (), "float64", 3, 2, 2, 3)
    evaluator = ReferenceEvaluator(function, new_ops=fusedlstm.onnx.operators("reference"))
    (found,) = evaluator.run(None, inputs, attributes={"bound": 0.25})
    assert_close([found], by_the_standard("RNN", {"clip": 0.25}, inputs)[:1], np.float64)


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "attributes", "message"),
    [
        ("LSTM", {"activations": ["Sigmoid", "Tanh"]}, "activations must be 3 of LSTM, got Sigmoid, Tanh"),
        ("GRU", {"activations": ["Sigmoid", "Gelu"]}, "activations must be among Relu, .*, got 'Gelu'"),
        ("RNN", {"activations": ["Affine"]}, "activation_alpha lacks the value of Affine, which has no defa"),
        ("RNN", {"activations": ["Relu", "Tanh"]}, "activations must be 1 of RNN"),
        (
            "RNN",
            {"activation_alpha": [1.0]},
            "activation_alpha has 1 values for 0 of Tanh, Tanh that take one",
        ),
        ("LSTM", {"clip": -1.0}, "clip must be positive, got -1.0"),
        ("LSTM", {"clip": 0.0}, "clip must be positive, got 0.0"),
        ("LSTM", {"clip": float("nan")}, "clip must hold finite numbers, got nan"),
        ("LSTM", {"direction": "backward"}, "direction must be one of forward, reverse, bidirectional, got"),
        ("LSTM", {"direction": "bidirectional"}, r"W must have the shape \(2, 12, 2\), got \(1, 12, 2\)"),
        ("GRU", {"linear_before_reset": 2}, "linear_before_reset must be an integer from 0 to 1, got 2"),
        ("GRU", {"input_forget": 1}, "GRU has no attribute 'input_forget'"),
        ("LSTM", {"layout": 2}, "layout must be an integer from 0 to 1, got 2"),
        ("LSTM", {"hidden_size": 4}, r"W must have the shape \(1, 16, 2\), got \(1, 12, 2\)"),
        ("LSTM", {"hidden_size": 0}, "hidden_size must be an integer from 1"),
    ],
)
def test_attributes_that_the_standard_does_not_allow(
    operator: str, attributes: dict[str, Any], message: str
) -> None:
    inputs = arrays(operator, {}, (), "float32", 2, 2, 2, 3)
    model = model_of(operator, {}, inputs)
    node = model.graph.node[0]
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    with pytest.raises(ValueError, match=f"^{message}"):
        ours(model, inputs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"X": np.zeros((2, 3, 4), "f4")},
            r"X must have three axes, of which the last is 2, got \(2, 3, 4\)",
        ),
        ({"X": np.zeros((2, 2), "f4")}, r"X must have three axes"),
        ({"X": np.zeros((2, 3, 2))}, "the inputs must be of one type, .*X float64, W float32"),
        ({"X": np.zeros((2, 3, 2), int)}, "the inputs must be of one type, .*X int64, W float32"),
        ({"W": np.zeros((1, 12), "f4")}, r"W must have three axes, none of them empty, got \(1, 12\)"),
        ({"R": np.zeros((1, 12, 0), "f4")}, r"R must have three axes, none of them empty, got \(1, 12, 0\)"),
        ({"R": np.zeros((1, 11, 3), "f4")}, r"R must have the shape \(1, 12, 3\), got \(1, 11, 3\)"),
        ({"B": np.zeros((1, 12), "f4")}, r"B must have the shape \(1, 24\), got \(1, 12\)"),
        ({"P": np.zeros((1, 8), "f4")}, r"P must have the shape \(1, 9\), got \(1, 8\)"),
        ({"initial_c": np.zeros((1, 4, 3), "f4")}, r"initial_c must have the shape \(1, 3, 3\), got \(1, 4"),
        ({"sequence_lens": np.array([1, 2, 3], "i4")}, r"sequence_lens must be integers from 0 to 2, got \["),
        ({"sequence_lens": np.array([1, -1, 2], "i4")}, "sequence_lens must be integers from 0 to 2"),
        ({"sequence_lens": np.array([1.0, 1, 2], "f4")}, "sequence_lens must be integers from 0 to 2"),
        ({"sequence_lens": np.array([1, 2], "i4")}, r"sequence_lens must have the shape \(3,\), got \(2,\)"),
    ],
)
def test_inputs_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    inputs = arrays("LSTM", {}, (), "float32", 2, 3, 2, 3) | changed
    model = model_of("LSTM", {}, inputs)
    del model.graph.node[0].attribute[:]
    with pytest.raises(ValueError, match=f"^{message}"):
        ours(model, inputs)


def test_inputs_that_are_missing_or_too_many() -> None:
    inputs = arrays("GRU", {}, (), "float32", 2, 2, 2, 3)
    model = model_of("GRU", {}, inputs)
    node = model.graph.node[0]
    node.input[1] = ""
    with pytest.raises(ValueError, match=r"^GRU needs the inputs W"):
        ours(model, inputs)
    node.input[:] = ["X", "W", "R", "", "", "", "X"]
    with pytest.raises(ValueError, match=r"^GRU has 6 inputs, got 7"):
        ours(model, inputs)


def test_opsets_before_the_seventh() -> None:
    inputs = arrays("GRU", {}, (), "float32", 2, 2, 2, 3)
    with pytest.raises(ValueError, match="are known of opset 7 and later, got opset 6"):
        ours(model_of("GRU", {}, inputs, opset=6), inputs)


def test_a_backend_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of auto, cpu, cuda, reference, got 'gpu'"):
        fusedlstm.onnx.operators("gpu")


# --- Cells ------------------------------------------------------------------------------------------------


def test_standard_attributes_give_the_cells_that_are_there() -> None:
    found = {
        fusedlstm.onnx.cell("LSTM"): cells.lstm,
        fusedlstm.onnx.cell("LSTM", peepholes=True): cells.peephole_lstm,
        fusedlstm.onnx.cell("LSTM", activations=["sigmoid", "TANH", "Tanh"]): cells.lstm,
        fusedlstm.onnx.cell("GRU"): cells.gru_reset_before,
        fusedlstm.onnx.cell("GRU", linear_before_reset=True): cells.gru,
        fusedlstm.onnx.cell("RNN"): cells.rnn_tanh,
        fusedlstm.onnx.cell("RNN", activations=["Relu"]): cells.rnn_relu,
    }
    assert all(one is other for one, other in found.items())


def test_equal_attributes_give_one_cell_which_can_be_pickled_and_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"activations": ["HardSigmoid", "Softsign"], "clip": 3.0}
    made = fusedlstm.onnx.cell("GRU", **options)
    assert made is fusedlstm.onnx.cell("GRU", **options, activation_alpha=[0.2], activation_beta=[0.5])
    assert made is not fusedlstm.onnx.cell("GRU", **options, activation_alpha=[0.25])
    assert pickle.loads(pickle.dumps(made)) is copy.deepcopy(made) is made
    layer = Recurrent(made, 2, 3)
    layer.save(tmp_path / "m.safetensors")
    assert fusedlstm.load(tmp_path / "m.safetensors", cell=made).cell is made
    assert pickle.loads(pickle.dumps(layer)).cell is made


def test_values_of_alpha_may_be_given_for_all_activations_where_that_says_the_same() -> None:
    options: dict[str, Any] = {"activations": ["LeakyRelu", "Tanh", "Tanh"]}
    made = fusedlstm.onnx.cell("LSTM", **options, activation_alpha=[0.3])
    assert made is fusedlstm.onnx.cell("LSTM", **options, activation_alpha=[0.3, 0.0, 0.0])
    options = {"activations": ["Tanh", "LeakyRelu", "Tanh"]}
    with pytest.raises(ValueError, match="activation_alpha has 3 values for 1 of Tanh, LeakyRelu, Tanh"):
        fusedlstm.onnx.cell("LSTM", **options, activation_alpha=[0.0, 0.3, 0.0])


@pytest.mark.parametrize("activation", ["Affine", "ScaledTanh", "HardSigmoid"])
@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("linear_before_reset", [0, 1])
def test_activations_that_are_constant(
    activation: str, places: tuple[int, ...], linear_before_reset: int
) -> None:
    """A product whose result has no effect is none that a step waits for."""
    names = [activation if n in places else name for n, name in enumerate(DEFAULTS["GRU"])]
    values = {"activation_alpha": [0.0] * len(places), "activation_beta": [0.75] * len(places)}
    attributes = {"activations": names, **values, "linear_before_reset": linear_before_reset}
    inputs = arrays("GRU", {}, ("B", "initial_h"), "float64", 3, 2, 2, 3)
    found = ours(model_of("GRU", attributes, inputs), inputs)
    assert_close(found, by_the_standard("GRU", attributes, inputs), np.float64)


def test_cells_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^operator must be one of LSTM, GRU, RNN, got 'Lstm'"):
        fusedlstm.onnx.cell("Lstm")
    with pytest.raises(ValueError, match=r"^GRU has no peepholes"):
        fusedlstm.onnx.cell("GRU", peepholes=True)
    with pytest.raises(ValueError, match=r"^RNN has no attribute 'input_forget'"):
        fusedlstm.onnx.cell("RNN", input_forget=True)
    with pytest.raises(ValueError, match=r"^activation_alpha must hold numbers, got 'x'"):
        fusedlstm.onnx.cell("RNN", activations=["Elu"], activation_alpha=["x"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^activation_alpha must hold finite numbers, got 1e"):
        fusedlstm.onnx.cell("RNN", activations=["Elu"], activation_alpha=[1e39])


# --- ONNX's own tests -------------------------------------------------------------------------------------


def test_the_node_tests_of_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of LSTM, GRU and RNN, by its runner; the others would take as long as all of these tests."""
    for name in ("lstm", "gru", "rnn"):
        importlib.import_module(f"{node_cases.__name__}.{name}")
    recurrent = [
        case
        for case in node_cases._NodeTestCases
        if any(node.op_type in DEFAULTS for node in case.model.graph.node)
    ]
    monkeypatch.setattr(node_runner, "load_model_tests", lambda kind: recurrent if kind == "node" else [])
    tests = node_runner.Runner(fusedlstm.onnx.Backend).test_suite
    result = unittest.TestResult()
    tests.run(result)
    assert result.failures == result.errors == []
    assert result.testsRun - len(result.skipped) == len(recurrent) >= 18


def test_the_backend_takes_models_nodes_and_the_cpu() -> None:
    backend = fusedlstm.onnx.Backend
    inputs = arrays("RNN", {}, ("initial_h",), "float32", 3, 2, 2, 3)
    model = model_of("RNN", {}, inputs)
    expected = by_the_standard("RNN", {}, inputs)
    for found in (
        backend.run_model(model, list(inputs.values()), backend="reference"),
        backend.prepare(model, backend="reference").run(inputs),
        backend.run_node(model.graph.node[0], list(inputs.values()), backend="reference"),
        backend.run_node(model.graph.node[0], list(inputs.values()), backend="reference", opset_version=14),
    ):
        assert isinstance(found, tuple)
        assert_close(found, expected, np.float32)
    assert backend.supports_device("CPU")
    assert not backend.supports_device("CUDA")
    with pytest.raises(ValueError, match=r"^device must be 'CPU', got 'CUDA'"):
        backend.prepare(model, "CUDA")
    with pytest.raises(ValueError, match=r"^inputs must be X, W, R, initial_h, got 1"):
        backend.prepare(model, backend="reference").run(inputs["X"])


def test_without_onnx_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['onnx'] = None; import fusedlstm.onnx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: fusedlstm.onnx cannot be imported" in done.stderr
    assert "pip install onnx" in done.stderr
