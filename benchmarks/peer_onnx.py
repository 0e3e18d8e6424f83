"""ONNX: a graph of its recurrent operators, for the runtimes that take one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from fusedlstm.weights import GATE_ORDERS

from .cases import Case, Data, name_results
from .contender import Contender, Prepared, Results, layer_weights, stepping


def onnx_model(case: Case, data: Data) -> bytes:
    """A graph of ONNX's recurrent operators with the weights of a case.

    Source: the operators LSTM, GRU and RNN of opset 14.  Inputs are "x" and, in step mode, the states by
    name; outputs "y" (T, 1, B, H) and "final_" and the state, (1, B, H) for each layer.
    """
    from onnx import TensorProto, helper, numpy_helper

    cell = case.mathematics
    kind, columns = _onnx_operator(case)
    with_state = case.mode == "step"
    constants, nodes, x = [], [], "x"
    for n, weights in enumerate(layer_weights(case, data.weights)):
        arrays = {"W": columns(weights.ih), "R": columns(weights.hh)}
        arrays["B"] = np.concatenate([columns(weights.bias_ih), columns(weights.bias_hh)])
        if cell.weights:
            peepholes = dict(zip(cell.weights, weights.vectors))
            arrays["P"] = np.concatenate([peepholes[name] for name in ("p_i", "p_o", "p_f")])
        constants += [numpy_helper.from_array(array[None], f"{name}{n}") for name, array in arrays.items()]
        states = [f"{name}{n}" if with_state else "" for name in cell.states]
        inputs = [x, f"W{n}", f"R{n}", f"B{n}", "", *states]
        if "P" in arrays:
            inputs.append(f"P{n}")
        y = "y" if n + 1 == case.layers else f"y{n}"
        nodes.append(
            helper.make_node(
                kind["op_type"],
                inputs,
                [y, *(f"final_{name}{n}" for name in cell.states)],
                hidden_size=case.hidden,
                **kind["attributes"],
            )
        )
        x = f"x{n + 1}"
        if n + 1 < case.layers:
            nodes.append(helper.make_node("Squeeze", [y, "axes"], [x]))
    if case.layers > 1:
        constants.append(numpy_helper.from_array(np.array([1]), "axes"))

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    per_layer = [f"{name}{n}" for name in cell.states for n in range(case.layers)]
    state_shape = (1, case.batch, case.hidden)
    graph = helper.make_graph(
        nodes,
        case.cell,
        [value("x", case.steps, case.batch, case.inputs)]
        + [value(name, *state_shape) for name in per_layer if with_state],
        [value("y", case.steps, 1, case.batch, case.hidden)]
        + [value(f"final_{name}", *state_shape) for name in per_layer],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def _onnx_operator(case: Case) -> tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]:
    """The operator of a cell with its attributes, and what puts stacked gates into its order."""
    operators: dict[str, tuple[str, dict[str, Any]]] = {
        "lstm": ("LSTM", {}),
        "peephole_lstm": ("LSTM", {}),
        "gru": ("GRU", {"linear_before_reset": 1}),
        "rnn_tanh": ("RNN", {"activations": ["Tanh"]}),
        "rnn_relu": ("RNN", {"activations": ["Relu"]}),
    }
    op_type, attributes = operators[case.cell]
    gates = case.mathematics.gates
    order = GATE_ORDERS["onnx"].get(op_type.lower(), gates)

    def reorder(array: np.ndarray) -> np.ndarray:
        parts = np.split(array, len(gates))
        return np.concatenate([parts[gates.index(gate)] for gate in order])

    return {"op_type": op_type, "attributes": attributes}, reorder


class OnnxContender(Contender):
    """A runtime that takes an ONNX graph."""

    modes = ("forward", "step")
    cells: ClassVar[tuple[str, ...] | None] = ("lstm", "peephole_lstm", "gru", "rnn_tanh", "rnn_relu")
    dtypes = ("float32",)

    def load(self, model: bytes) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
        """A function from inputs by name to the outputs in order."""
        raise NotImplementedError

    def prepare(self, case: Case, data: Data) -> Prepared:
        run = self.load(onnx_model(case, data))
        names = case.mathematics.states
        keys = [f"{name}{n}" for name in names for n in range(case.layers)]

        def step(state: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
            y, *final = run({"x": data.x, **dict(zip(keys, state))})
            return y, final

        def read(result: Any) -> Results:
            y, final = result
            layers = case.layers
            states = [np.concatenate(final[n * layers : (n + 1) * layers]) for n in range(len(names))]
            return name_results(case, np.asarray(y)[:, 0], states)

        if case.mode == "step":
            return Prepared(
                stepping(step, [part[n][None] for part in data.state for n in range(case.layers)]), read
            )
        return Prepared(lambda: step([]), read)


class OnnxRuntime(OnnxContender):
    """ONNX Runtime."""

    name, title = "onnxruntime", "ONNX Runtime"
    modules, packages = ("onnxruntime", "onnx"), ("onnxruntime", "onnx")

    def load(self, model: bytes) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
        runtime: Any = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)


class OpenVINO(OnnxContender):
    """OpenVINO's CPU plugin, in float32."""

    name, title = "openvino", "OpenVINO"
    modules, packages = ("openvino", "onnx"), ("openvino", "onnx")
    # from ONNX it takes no peepholes
    cells = ("lstm", "gru", "rnn_tanh", "rnn_relu")

    def load(self, model: bytes) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
        openvino: Any = importlib.import_module("openvino")
        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
        }
        compiled = core.compile_model(core.read_model(model), "CPU", options)
        request = compiled.create_infer_request()
        # outputs are copied: they enter the next step
        return lambda inputs: list(request.infer(inputs, share_inputs=True).to_tuple())
