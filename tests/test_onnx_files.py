"""Layers from files of ONNX and into them; what is damaged or hostile."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from checks import ALL, PROJECTED, error, name, normalized_lstm
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import fusedlstm.onnx
from fusedlstm import GRU, LSTM, RNN, Recurrent, cells
from fusedlstm.cells import Cell
from fusedlstm.math import tanh, where
from fusedlstm.onnx import RecurrentNodes, export, layers, to_model

# --- Files that others write ------------------------------------------------------------------------------


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node of names between spaces, - for one that is left out."""
    names = [[part.replace("-", "") for part in text.split()] for text in (inputs, outputs)]
    return helper.make_node(operator, *names, **attributes)


def graph_of(nodes: list[onnx.NodeProto], arrays: dict[str, Any], outputs: str = "y", rank: int = 3) -> Any:
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    results = [helper.make_tensor_value_info(name, 1, None) for name in outputs.split()]
    x = helper.make_tensor_value_info("x", 1, [None] * rank)
    return helper.make_graph(nodes, "g", [x], results, constants)


def model_of(graph: Any, opset: int = 14) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def weights(count: int = 2, gates: int = 4, i: int = 4, h: int = 4, d: int = 1) -> dict[str, np.ndarray]:
    """W, R and B of some nodes, numbered."""
    generator = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for n in range(count):
        shapes = {
            "W": (d, gates * h, i if n == 0 else d * h),
            "R": (d, gates * h, h),
            "B": (d, 2 * gates * h),
        }
        found |= {f"{k}{n}": generator.uniform(-1, 1, s).astype("f4") for k, s in shapes.items()}
    return found


def run(model: onnx.ModelProto, x: np.ndarray) -> Any:
    return ReferenceEvaluator(model, new_ops=fusedlstm.onnx.operators("reference")).run(None, {"x": x})


ONE, TWO = np.array([1]), np.array([2])


def test_a_file_as_tf2onnx_writes_it() -> None:
    """With the batch first outside of the nodes, and the directions of a node cut apart and joined."""
    nodes = [
        node("Transpose", "x", "x0", perm=[1, 0, 2]),
        node("LSTM", "x0 W0 R0 B0", "y0 h0 c0", direction="bidirectional", hidden_size=4),
        node("Split", "y0", "ahead back", axis=1),
        node("Squeeze", "ahead one", "a"),
        node("Squeeze", "back one", "b"),
        node("Concat", "a b", "ab", axis=2),
        node("Transpose", "ab", "out0", perm=[1, 0, 2]),
        node("Identity", "out0", "in1"),
        node("Transpose", "in1", "x1", perm=[1, 0, 2]),
        node("LSTM", "x1 W1 R1 B1", "y1 h1 c1", direction="bidirectional", hidden_size=4),
        node("Transpose", "y1", "z", perm=[2, 0, 1, 3]),
        node("Reshape", "z shape", "y"),
    ]
    arrays = {**weights(d=2), "one": ONE, "shape": np.array([0, 0, -1])}
    model = model_of(graph_of(nodes, arrays))
    (found,) = layers(model, backend="reference")
    assert repr(found.layer) == "LSTM(4, 4, num_layers=2, bidirectional=True, backend='reference')"
    x = np.random.default_rng(1).normal(size=(3, 6, 4)).astype("f4")
    (expected,) = run(model, x)
    assert error(found(x.swapaxes(0, 1))[0].swapaxes(0, 1), expected) < 1e-6


@pytest.mark.parametrize("outer", [False, True])
def test_nodes_in_a_branch(outer: bool) -> None:
    """With weights of the graph around it, or of its own; Silero's models are made like this."""
    arrays = weights(1)
    own = {} if outer else arrays
    inner = graph_of([node("LSTM", "x W0 R0 B0", "y", hidden_size=4)], own, rank=3)
    del inner.input[:]
    other = graph_of([node("Unsqueeze", "x one", "z")], {"one": ONE}, "z")
    del other.input[:]
    choice = node("If", "yes", "y", then_branch=inner, else_branch=other)
    model = model_of(graph_of([choice], {"yes": np.array(True), **(arrays if outer else {})}))
    (found,) = layers(model, backend="reference")
    x = np.random.default_rng(1).normal(size=(6, 3, 4)).astype("f4")
    assert error(found(x)[0], run(model, x)[0][:, 0]) < 1e-6


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_directions_layouts_and_types(direction: str, layout: int, dtype: str) -> None:
    d = 2 if direction == "bidirectional" else 1
    attributes = {"direction": direction, "layout": layout, "linear_before_reset": 1}
    lengths = np.array([3, 0, 6, 5], "i4")
    nodes = [
        node("GRU", "x W0 R0 B0 lengths", "y0", **attributes),
        node("Transpose", "y0", "z0", perm=[0, 1, 2, 3] if layout else [0, 2, 1, 3]),
        node("Reshape", "z0 shape", "x1"),
        node("GRU", "x1 W1 R1 B1 lengths", "y1", **attributes),
        node("Transpose", "y1", "z1", perm=[0, 1, 2, 3] if layout else [0, 2, 1, 3]),
        node("Reshape", "z1 shape", "y"),
    ]
    arrays = {name: array.astype(dtype) for name, array in weights(gates=3, d=d).items()}
    model = model_of(graph_of(nodes, arrays | {"shape": np.array([0, 0, -1]), "lengths": lengths}))
    (found,) = layers(model, backend="reference")
    assert (found.layer.num_layers, found.layer.batch_first) == (2, bool(layout))
    assert found.layer.dtype == ("float64" if dtype == "float64" else "float32")
    assert found.reverse == (direction == "reverse")
    x = np.random.default_rng(1).normal(size=(4, 6, 4) if layout else (6, 4, 4)).astype(dtype)
    y, _ = found(x.astype(found.layer.dtype), lengths=lengths)
    limit = {"float64": 1e-13, "float32": 1e-6, "float16": 2e-3}[dtype]
    assert error(y, run(model, x)[0]) < limit


def test_directions_of_different_mathematics_are_two_layers() -> None:
    activations = ["Sigmoid", "Tanh", "Tanh", "Sigmoid", "Softsign", "Tanh"]
    options = {"direction": "bidirectional", "activations": activations}
    model = model_of(graph_of([node("LSTM", "x W0 R0 B0", "y", **options)], weights(1, d=2)))
    ahead, back = layers(model, backend="reference")
    assert (type(ahead.layer), ahead.reverse) == (LSTM, False)
    assert (type(back.layer), back.reverse) == (Recurrent, True)
    assert ahead.nodes == back.nodes
    x = np.random.default_rng(1).normal(size=(6, 3, 4)).astype("f4")
    (expected,) = run(model, x)
    assert error(ahead(x)[0], expected[:, 0]) < 1e-6
    assert error(back(x)[0], expected[:, 1]) < 1e-6


SQUEEZE = [node("Squeeze", "y0 one", "x1")]


@pytest.mark.parametrize(
    ("between", "options", "outputs"),
    [
        (SQUEEZE, {}, "y y0"),
        (SQUEEZE, {}, "y x1"),
        (SQUEEZE, {"clip": 1.0}, "y"),
        (SQUEEZE, {"direction": "reverse"}, "y"),
        ([node("Squeeze", "y0 one", "z"), node("Relu", "z", "x1")], {}, "y"),
        ([node("Squeeze", "y0 one", "z"), node("Transpose", "z", "x1", perm=[0, 2, 1])], {}, "y"),
        ([node("Squeeze", "y0 one", "z"), node("Transpose", "z", "x1", perm=[1, 0, 2])], {}, "y"),
        ([node("Reshape", "y0 shape", "x1")], {}, "y"),
        ([node("Squeeze", "y0 one", "z"), node("Reshape", "z constant", "x1")], {}, "y"),
        ([node("Squeeze", "y0 one", "z"), node("Concat", "z z", "x1", axis=2)], {}, "y"),
        ([node("Squeeze", "h0 one", "z"), node("Unsqueeze", "z one", "x1")], {}, "y"),
    ],
)
def test_nodes_that_are_no_stack(between: Any, options: Any, outputs: str) -> None:
    """Others see what lies between them, they differ, or the second one takes something else."""
    first, second = node("LSTM", "x W0 R0 B0", "y0 h0"), node("LSTM", "x1 W1 R1 B1", "y", **options)
    arrays = weights() | {"one": ONE, "shape": np.array([-1, 2, 4]), "constant": np.array([3, 4, 4])}
    if between[-1].op_type == "Concat":
        arrays["W1"] = np.concatenate([arrays["W1"]] * 2, 2)
    model = model_of(graph_of([first, *between, second], arrays, outputs))
    found = layers(model, backend="reference")
    assert [one.layer.num_layers for one in found] == [1, 1]
    assert [one.nodes for one in found] == [(first,), (second,)]


def test_directions_that_are_not_laid_out_side_by_side_are_no_stack() -> None:
    """The shape is right, and the numbers are those of other sequences."""
    nodes = [
        node("LSTM", "x W0 R0 B0", "y0", direction="bidirectional"),
        node("Reshape", "y0 shape", "x1"),
        node("LSTM", "x1 W1 R1 B1", "y", direction="bidirectional"),
    ]
    model = model_of(graph_of(nodes, weights(d=2) | {"shape": np.array([0, -1, 8])}))
    assert len(layers(model)) == 2


def test_a_stack_of_the_sizes_that_a_file_states() -> None:
    """Its Reshape says them as numbers."""
    nodes = [
        node("LSTM", "x W0 R0 B0", "y0"),
        node("Reshape", "y0 shape", "x1"),
        node("LSTM", "x1 W1 R1 B1", "y"),
    ]
    for stated, stacked in (((7, 1, 3, 4), True), ((3, 1, 7, 4), False)):
        graph = graph_of(nodes, weights() | {"shape": np.array([7, 3, 4])})
        graph.value_info.append(helper.make_tensor_value_info("y0", 1, stated))
        assert len(layers(model_of(graph))) == (1 if stacked else 2)


def test_nodes_that_share_their_weights_share_a_layer() -> None:
    nodes = [node("LSTM", "x W0 R0 B0", "y"), node("LSTM", "x W0 R0 B0", "z")]
    one, other = layers(model_of(graph_of(nodes, weights(1), "y z")))
    assert one.layer is other.layer


def test_weights_beside_the_file(tmp_path: Path) -> None:
    model = to_model(LSTM(3, 40, seed=0))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=100)
    (found,) = layers(path)
    assert np.array_equal(found.layer.weight_hh_l0, LSTM(3, 40, seed=0).weight_hh_l0)
    with pytest.raises(ValueError, match="numbers are in another file: give the path of the model"):
        layers(path.read_bytes())
    content = (tmp_path / "weights").read_bytes()
    (tmp_path / "weights").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        layers(path)
    (tmp_path / "weights").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        layers(path)


# --- Files of ours ----------------------------------------------------------------------------------------


def runtime(model: bytes, inputs: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def inputs_of(layer: Recurrent, states: bool, lengths: bool) -> tuple[dict[str, Any], list[Any]]:
    """Inputs for the model of a layer, and what the layer gives for them."""
    generator = np.random.default_rng(1)

    def array(*shape: int) -> Any:
        return generator.normal(size=shape).astype(layer.dtype)

    given = {"x": array(4, 7, 3) if layer.batch_first else array(7, 4, 3)}
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    initial = tuple(array(rows, 4, size) for size in layer._sizes)
    ends = np.array([7, 3, 1, 5], np.int32)
    if states:
        given |= {f"{name}_0": part for name, part in zip(layer.cell.states, initial)}
    if lengths:
        given["lengths"] = ends
    state = (initial if len(initial) > 1 else initial[0]) if states else None
    y, final = layer(given["x"], state, ends if lengths else None)
    return given, [y, *(final if isinstance(final, tuple) else (final,))]


@pytest.mark.parametrize("cell", ALL, ids=name)
@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {}),
        (
            {"num_layers": 2, "bidirectional": True, "batch_first": True},
            {"states": True, "lengths": True},
        ),
    ],
)
def test_exported_layers_compute_the_same(cell: Cell, options: Any, given: Any) -> None:
    """With the standard's operators where it has them, else as loops; in ONNX Runtime and by ONNX itself."""
    layer = Recurrent(cell, 3, 5, backend="reference", seed=1, **options)
    model = to_model(layer, **given)
    onnx.checker.check_model(model, full_check=True)
    used = {node.op_type for node in model.graph.node} & {"LSTM", "GRU", "RNN", "Scan"}
    assert used == ({"Scan"} if fusedlstm.onnx.cells.form_of(cell) is None else used - {"Scan"})
    inputs, expected = inputs_of(layer, **{"states": False, "lengths": False, **given})
    evaluator = ReferenceEvaluator(model, new_ops=fusedlstm.onnx.operators("reference"))
    for found in (runtime(model.SerializeToString(), inputs), evaluator.run(None, inputs)):
        for actual, wanted in zip(found, expected, strict=True):
            assert error(actual, wanted) < 3e-6


@pytest.mark.parametrize("cell", PROJECTED, ids=name)
@pytest.mark.parametrize("bias", [False, True])
def test_exported_projections(cell: Cell, bias: bool) -> None:
    layer = Recurrent(cell, 3, 5, bias=bias, bidirectional=True, proj_size=2, backend="reference")
    inputs, expected = inputs_of(layer, states=True, lengths=False)
    found = runtime(to_model(layer, states=True).SerializeToString(), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert error(actual, wanted) < 3e-6


def test_exported_loops_keep_float64() -> None:
    layer = Recurrent(normalized_lstm, 3, 5, dtype="float64", backend="reference")
    inputs, expected = inputs_of(layer, states=False, lengths=True)
    found = runtime(to_model(layer, lengths=True).SerializeToString(), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == np.float64
        assert error(actual, wanted) < 1e-13


RARE = fusedlstm.onnx.cell(
    "LSTM",
    activations=["HardSigmoid", "Elu", "ScaledTanh"],
    activation_alpha=[0.25, 0.5, 1.5],
    activation_beta=[0.5, 0.75],
    clip=2.0,
    peepholes=True,
    input_forget=True,
)
ROUND = [
    LSTM(3, 5, 2, bidirectional=True, seed=0),
    LSTM(3, 5, 3, bias=False, batch_first=True, dtype="float64", seed=0),
    GRU(3, 5, 2, seed=0),
    GRU(3, 5, reset_after=False, bidirectional=True, seed=0),
    RNN(3, 5, 2, nonlinearity="relu", seed=0),
    Recurrent(cells.peephole_lstm, 3, 5, 2, seed=0),
    Recurrent(RARE, 3, 5, 2, bidirectional=True, seed=0),
    Recurrent(fusedlstm.onnx.cell("GRU", activations=["Softsign", "Elu"], clip=0.5), 3, 5, seed=0),
]


@pytest.mark.parametrize("layer", ROUND, ids=repr)
def test_what_is_written_is_read(layer: Recurrent, tmp_path: Path) -> None:
    export(layer, tmp_path / "m.onnx", states=True, lengths=True)
    (found,) = layers(str(tmp_path / "m.onnx"))
    assert (type(found.layer), found.layer.cell, found.reverse) == (type(layer), layer.cell, False)
    assert found.layer._settings() == layer._settings() | {"batch_first": False}
    for key, array in layer.state_dict().items():
        assert np.array_equal(found.layer.state_dict()[key], array)


def test_a_coupled_lstm_is_the_standards_with_the_other_sign() -> None:
    layer = Recurrent(cells.coupled_lstm, 3, 5, backend="reference")
    (found,) = layers(to_model(layer), backend="reference")
    x = np.random.default_rng(1).normal(size=(6, 3, 3)).astype("f4")
    assert found.layer.cell is fusedlstm.onnx.cell("LSTM", input_forget=True)
    assert error(found(x)[0], layer(x)[0]) < 1e-6


def test_what_is_no_layer_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"layer must be a layer on arrays, .*, got torch\.nn\."):
        export(torch.nn.LSTM(2, 3), tmp_path / "m.onnx")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


@fusedlstm.cell(gates=("a",), noise=("u",))
def noisy(a: Any, h: Any, u: Any) -> Any:
    new = tanh(a)
    return new if u is None else where(u < 0.5, h, new)


def test_a_cell_with_noise_is_exported_without_it() -> None:
    layer = Recurrent(noisy, 3, 5, seed=1, backend="reference")
    x = np.random.default_rng(1).normal(size=(4, 2, 3)).astype("f4")
    session = onnxruntime.InferenceSession(to_model(layer).SerializeToString())
    assert error(session.run(None, {"x": x})[0], layer(x)[0]) < 1e-6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"input_size": None}, "must have an input_size"),
        ({"heads": 2}, "must have one head"),
        ({"zoneout": 0.1}, "must have no zoneout"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_onnx_does_not_have_are_refused(options: dict[str, Any], expected: str) -> None:
    layer = Recurrent(cells.coupled_lstm, **({"input_size": 3, "hidden_size": 4} | options))
    with pytest.raises(ValueError, match=rf"^layer {expected}"):
        to_model(layer)


def test_the_examples_of_the_page_run_one_after_the_other(tmp_path: Path, monkeypatch: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "onnx.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    exec(compile(program, "onnx.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "lstm.onnx", "own.onnx"}


# --- What is damaged or hostile ---------------------------------------------------------------------------


def small(**options: Any) -> onnx.ModelProto:
    return to_model(GRU(1, 2, 2, seed=0), **options)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        layers(tmp_path / "none.onnx")
    with pytest.raises(TypeError, match=r"^model must be a ModelProto, bytes or a path, got GraphProto"):
        layers(small().graph)  # type: ignore[arg-type]
    for content in (b"", b"\0", b"not a model", small().graph.SerializeToString()[:50]):
        with pytest.raises(ValueError, match="the model is damaged, or not one of ONNX"):
            layers(content)
    with pytest.raises(ValueError, match="backend must be one of"):
        layers(small(), backend="gpu")
    assert layers(model_of(graph_of([node("Relu", "x", "y")], {}))) == []


def changed(nodes: list[onnx.NodeProto], **arrays: Any) -> onnx.ModelProto:
    return model_of(graph_of(nodes, weights(1) | arrays))


FALSE = numpy_helper.from_array(np.zeros(3, "f4"), "W0")
FALSE.dims[:] = [1, 16, 10**9]
NEGATIVE = numpy_helper.from_array(np.zeros(3, "f4"), "W0")
NEGATIVE.dims[:] = [-1, 16, 4]
LSTM_NODE = node("LSTM", "x W0 R0 B0", "y")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            changed([node("LSTM", "x W0 R0 B0", "y", hidden_size=5)]),
            r"'y': W must have the shape \(1, 20, 4\)",
        ),
        (changed([node("LSTM", "x W0 R0 B0", "y", hidden_size=2**30)]), r"W must have the shape"),
        (
            changed([node("LSTM", "x W0 R0 B0", "y", hidden_size=2**40)]),
            r"hidden_size must be an integer from",
        ),
        (changed([node("LSTM", "x W0 R0 B0", "y", clip=float("nan"))]), "clip must hold finite numbers"),
        (changed([node("LSTM", "x W0 R0 B0", "y", clip=1)]), "attribute 'clip' is of another type"),
        (
            changed([node("LSTM", "x W0 R0 B0", "y", output_sequence=1)]),
            "'output_sequence' is unknown in opset",
        ),
        (changed([node("LSTM", "x W0 R0 B0", "y", activations=["A", "B", "C"])]), "must be among Relu"),
        (changed([node("LSTM", "x W0 R0 B0", "y", direction=b"\xff")]), "LSTM 'y': "),
        (changed([node("LSTM", "x W0", "y")]), "its inputs must be X, W, R, and at most B, "),
        (changed([node("LSTM", "x W0 R0 B0 - - - - x", "y")]), "its inputs must be X, W, R, and at most B, "),
        (changed([node("LSTM", "x x R0 B0", "y")]), "its input W, 'x', is computed when the model runs"),
        (
            changed([node("LSTM", "x W0 nowhere B0", "y")]),
            "its input R, 'nowhere', is computed when the model",
        ),
        (
            changed([node("Relu", "W0", "w"), node("LSTM", "x w R0", "y")]),
            "its input W, 'w', is computed when",
        ),
        (changed([node("Identity", "w", "w"), node("LSTM", "x w R0", "y")]), "'w' is used before it is made"),
        (
            changed([node("Reshape", "W0 B0", "w"), node("LSTM", "x w R0", "y")]),
            "Reshape 'w' cannot be computed",
        ),
        (
            changed([LSTM_NODE], W0=weights(1)["W0"].astype(int)),
            "the inputs must be of one type, .* got W int64",
        ),
        (changed([LSTM_NODE], W0=np.zeros((1, 16, 0), "f4")), "W must have three axes, none of them empty"),
        (model_of(graph_of([LSTM_NODE], weights(1)), opset=6), "known of opset 7 and later, got opset 6"),
        (helper.make_model(graph_of([LSTM_NODE], weights(1)), opset_imports=[]), "LSTM"),
    ],
)
def test_nodes_that_the_standard_does_not_allow(model: onnx.ModelProto, message: str) -> None:
    if message == "LSTM":
        del model.opset_import[:]
        message = "the model is damaged, or not one of ONNX: it has no graph, or not one opset"
    for form in (model, model.SerializeToString()):
        with pytest.raises(ValueError, match=message):
            layers(form)


@pytest.mark.parametrize("tensor", [FALSE, NEGATIVE])
def test_tensors_that_say_more_than_they_hold(tensor: TensorProto) -> None:
    graph = graph_of([LSTM_NODE], weights(1))
    graph.initializer[0].CopyFrom(tensor)
    tracemalloc.start()
    with pytest.raises(ValueError, match="LSTM 'y': the tensor 'W0' is damaged"):
        layers(model_of(graph))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_weights_that_grow_without_end_are_not_worked_out() -> None:
    doubled = [
        node("Concat", f"{'W0' if n == 0 else n} {'W0' if n == 0 else n}", f"{n + 1}", axis=1)
        for n in range(60)
    ]
    model = changed([*doubled, node("LSTM", "x 60 R0", "y")])
    tracemalloc.start()
    with pytest.raises(ValueError, match="more is made of the weights of the model than 32 times their size"):
        layers(model)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_outputs_that_grow_without_end_are_not_worked_out() -> None:
    """Between two nodes; they are no stack."""
    doubled = [
        node("Concat", f"{'y0' if n == 0 else n} {'y0' if n == 0 else n}", f"{n + 1}", axis=1)
        for n in range(60)
    ]
    nodes = [
        node("LSTM", "x W0 R0", "y0"),
        *doubled,
        node("Squeeze", "60 one", "x1"),
        node("LSTM", "x1 W1 R1", "y"),
    ]
    tracemalloc.start()
    assert len(layers(model_of(graph_of(nodes, weights() | {"one": ONE})))) == 2
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_long_chain_is_no_deep_one() -> None:
    chain = [node("Identity", "W0" if n == 0 else f"{n}", f"{n + 1}") for n in range(31)]
    (found,) = layers(changed([*chain, node("LSTM", "x 31 R0 B0", "y")]))
    assert np.array_equal(found.layer.weight_ih_l0[:4], weights(1)["W0"][0, :4])
    longer = [node("Transpose", "y0" if n == 0 else f"{n}", f"{n + 1}") for n in range(3000)]
    nodes = [node("LSTM", "x W0 R0", "y0"), *longer, node("LSTM", "3000 W1 R1", "y")]
    assert len(layers(model_of(graph_of(nodes, weights())))) == 2


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "link", ""])
def test_other_files_are_not_read(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(weights(1)["W0"].tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    graph = graph_of([LSTM_NODE], weights(1))
    tensor = graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "m.onnx").write_bytes(model_of(graph).SerializeToString())
    with pytest.raises(ValueError, match="LSTM 'y': the tensor 'W0' is damaged"):
        layers(folder / "m.onnx")


def test_a_file_beside_it_that_is_read_many_times(tmp_path: Path) -> None:
    """By many nodes, each with weights of its own name."""
    (tmp_path / "data").write_bytes(weights(1)["W0"].tobytes())
    graph = graph_of([node("LSTM", f"x w{n} R0", f"y{n}") for n in range(50)], weights(1), "y1")
    for n in range(50):
        tensor = graph.initializer.add(name=f"w{n}", data_type=1, dims=[1, 16, 4])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="data")
    (tmp_path / "m.onnx").write_bytes(model_of(graph).SerializeToString())
    with pytest.raises(ValueError, match="more numbers are read than there are"):
        layers(tmp_path / "m.onnx")


def test_nodes_in_a_function_are_named() -> None:
    opsets = [helper.make_opsetid("", 14), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "f", ["x", "W0", "R0", "B0"], ["y"], [LSTM_NODE], opsets)
    call = helper.make_node("f", ["x", "W0", "R0", "B0"], ["y"], domain="own")
    model = helper.make_model(graph_of([call], weights(1)), opset_imports=opsets, functions=[function])
    with pytest.raises(ValueError, match=r"function 'f' of the model has recurrent nodes: .*onnx\.inliner"):
        layers(model)
    (found,) = layers(onnx.inliner.inline_local_functions(model))
    assert isinstance(found, RecurrentNodes)


def is_read_or_refused(content: bytes) -> bool:
    try:
        return all(isinstance(one.layer, Recurrent) for one in layers(content, backend="reference"))
    except ValueError as refusal:
        return bool(str(refusal))


@hypothesis.settings(max_examples=200)
@given(data=st.data())
def test_a_byte_may_be_anything(data: Any) -> None:
    content = bytearray(small(states=True, lengths=True).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert is_read_or_refused(bytes(content))


@hypothesis.settings(max_examples=50)
@given(kept=st.integers(0, 1000))
def test_a_file_may_be_cut_off_anywhere(kept: int) -> None:
    content = small().SerializeToString()
    assert is_read_or_refused(content[: min(kept, len(content) - 1)])
