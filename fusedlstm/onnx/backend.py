"""A backend in ONNX's sense: whole models, with the recurrent operators run by our kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper
from onnx.backend import base
from onnx.reference import ReferenceEvaluator

from .operators import operators


class Prepared(base.BackendRep):  # type: ignore[misc]
    """A model that may be run many times."""

    def __init__(self, evaluator: ReferenceEvaluator) -> None:
        self.evaluator = evaluator

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs of the model.

        Args:
            inputs: arrays by name, or in the order of the inputs that the model has no values for; one array
                for a model with one.

        Raises:
            ValueError: if there are more or fewer.
        """
        if isinstance(inputs, Mapping):
            return tuple(self.evaluator.run(None, dict(inputs)))
        known = {tensor.name for tensor in self.evaluator.inits_}
        names = [name for name in self.evaluator.input_names if name not in known]
        given = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
        if len(given) != len(names):
            raise ValueError(f"inputs must be {', '.join(names)}, got {len(given)}")
        return tuple(self.evaluator.run(None, dict(zip(names, given))))


class Backend(base.Backend):  # type: ignore[misc]
    """For ``onnx.backend.test.BackendTest(Backend, __name__)``, and for programs that take a backend of ONNX.

    LSTM, GRU and RNN are run by our kernels, everything else by ONNX's reference implementation in NumPy.
    """

    @classmethod
    def prepare(
        cls, model: ModelProto, device: str = "CPU", backend: str = "auto", **kwargs: Any
    ) -> Prepared:
        """A model, checked, ready to run; `backend` is as of :func:`fusedlstm.onnx.operators`."""
        _check_device(device)
        super().prepare(model, device, **kwargs)
        return Prepared(ReferenceEvaluator(model, new_ops=operators(backend)))

    @classmethod
    def run_node(
        cls,
        node: NodeProto,
        inputs: Sequence[Any],
        device: str = "CPU",
        outputs_info: Any = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """The outputs of one node; `inputs` are those that it does not leave out."""
        _check_device(device)
        super().run_node(node, inputs, device, outputs_info, **kwargs)
        version = kwargs.get("opset_version")
        opsets = {} if version is None else {"opset_imports": [helper.make_opsetid(node.domain, version)]}
        graph = helper.make_graph(
            [node],
            node.op_type,
            [helper.make_empty_tensor_value_info(name) for name in node.input if name],
            [helper.make_empty_tensor_value_info(name) for name in node.output if name],
        )
        evaluator = ReferenceEvaluator(helper.make_model(graph, **opsets), new_ops=operators(backend))
        return Prepared(evaluator).run(inputs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether it is the CPU."""
        return bool(base.Device(device).type == base.DeviceType.CPU)


def _check_device(device: str) -> None:
    if not Backend.supports_device(device):
        raise ValueError(f"device must be 'CPU', got {device!r}")
