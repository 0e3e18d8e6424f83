"""On a GPU: the CUDA kernels of this package, cuDNN through PyTorch, haste and FlashRNN.

Each precision is a contender of its own.  All answer when the GPU is done, so times are those that a caller
waits; ``python -m benchmarks.gpu`` measures without the host.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, ClassVar

from fusedlstm.dispatch import PRECISIONS, on_host

from .cases import TOLERANCES, Case, Data, as_state, name_results, recurrent
from .contender import Contender, Prepared, Unsupported, layer_call
from .machine import gpu
from .peer_torch import Torch


class OnGPU(Contender):
    """What runs on an NVIDIA GPU only."""

    precision: ClassVar[str] = "float32"
    cells: ClassVar[tuple[str, ...] | None] = ("lstm", "gru")

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or (None if gpu() else "an NVIDIA GPU, and nvidia-smi, which finds it")

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {**super().versions(), "GPU": gpu() or ""}


class FusedCUDA(OnGPU):
    """The layers of this package on CuPy arrays."""

    name, title = "fusedlstm-cuda", "fusedlstm (CUDA)"
    modules = ("fusedlstm", "numba_cuda", "cupy")
    packages = ("fusedlstm", "numba-cuda")
    cells = None

    @classmethod
    def versions(cls) -> dict[str, str]:
        (cupy, *_) = metadata.packages_distributions()["cupy"]
        return {**super().versions(), cupy: metadata.version(cupy)}

    def prepare(self, case: Case, data: Data) -> Prepared:
        cupy = importlib.import_module("cupy")
        layer = recurrent(case, dtype=case.dtype, backend="cuda", precision=self.precision)
        layer.load_state_dict(data.weights)
        x, dy = cupy.asarray(data.x), cupy.asarray(data.dy)
        state, dstate = (as_state(tuple(map(cupy.asarray, part))) for part in (data.state, data.dstate))
        call = layer_call(layer, case.mode, x, state, dy, dstate)
        wait = cupy.cuda.get_current_stream().synchronize
        return Prepared(_finished(call, wait), lambda found: name_results(case, *_on_host(found)))


class CuDNN(OnGPU, Torch):
    """``torch.nn.LSTM`` and its like on a GPU, where cuDNN runs them."""

    name, title = "cudnn", "cuDNN (PyTorch)"
    device = "cuda"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        backends = self.torch.backends
        backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        narrow = self.precision in ("bfloat16", "float16")
        self.narrow = getattr(self.torch, self.precision) if narrow else None

    def tensor(self, array: Any, requires_grad: bool = False) -> Any:
        return self.torch.tensor(array).to(self.device, self.narrow).requires_grad_(requires_grad)

    def module(self, case: Case) -> Any:
        return super().module(case).to(self.device, self.narrow)

    def prepare_module(
        self, case: Case, data: Data, layer: Callable[..., Any], parameters: dict[str, Any]
    ) -> Prepared:
        prepared = super().prepare_module(case, data, layer, parameters)
        return Prepared(_finished(prepared.call, self.torch.cuda.synchronize), prepared.read)


class Haste(CuDNN):
    """The kernels of haste, forward."""

    name, title = "haste", "haste"
    modules, packages = ("torch", "haste_pytorch"), ("torch", "haste_pytorch")
    modes, dtypes = ("forward",), ("float32",)

    def prepare(self, case: Case, data: Data) -> Prepared:
        if case.layers > 1:
            raise Unsupported("no stack of layers")
        haste = importlib.import_module("haste_pytorch")
        layer = {"lstm": haste.LSTM, "gru": haste.GRU}[case.cell](case.inputs, case.hidden).to(self.device)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        layer.from_native_weights(*(self.tensor(data.weights[name]) for name in names))
        return self.prepare_module(case, data, layer.eval(), {})


class FlashRNN(CuDNN):
    """The fused kernels of FlashRNN with a single head; the product of the input is PyTorch's."""

    name, title = "flashrnn", "FlashRNN"
    modules, packages = ("torch", "flashrnn"), ("torch", "flashrnn")
    modes, dtypes = ("forward", "train"), ("float32",)
    kernels: ClassVar[str] = "cuda_fused"

    def prepare(self, case: Case, data: Data) -> Prepared:
        if case.layers > 1:
            raise Unsupported("no stack of layers")
        parameters = {name: self.tensor(a, case.mode == "train") for name, a in data.weights.items()}
        return self.prepare_module(case, data, self.layer(case, **parameters), parameters)

    def layer(
        self, case: Case, weight_ih_l0: Any, weight_hh_l0: Any, bias_ih_l0: Any, bias_hh_l0: Any
    ) -> Callable[..., Any]:
        """A layer with these weights, as PyTorch's."""
        torch, run = self.torch, importlib.import_module("flashrnn").flashrnn
        gates = len(case.mathematics.gates)

        def layer(x: Any, state: Any = None) -> Any:
            products = torch.nn.functional.linear(x, weight_ih_l0, bias_ih_l0)
            kernels = weight_hh_l0.view(gates, 1, case.hidden, case.hidden)
            biases = bias_hh_l0.view(gates, 1, case.hidden)
            if case.cell == "gru":  # recurrent parts in the order n, r, z, and a bias of the input's n
                kernels = kernels.roll(1, 0)
                biases = torch.cat([biases.roll(1, 0), torch.zeros_like(biases[:1])])
            if state is not None:
                state = torch.stack(state if isinstance(state, tuple) else (state,)).transpose(1, 2)
                state = state.unsqueeze(-2)  # (states, B, 1, 1, H)
            outputs, final = run(
                products.view(*x.shape[:2], gates, 1, case.hidden).transpose(0, 1), kernels, biases, state,
                function=case.cell, backend=self.kernels, dtype=self.precision,
            )  # fmt: skip
            return outputs[0].squeeze(-2).transpose(0, 1), as_state(tuple(final.squeeze(-2).transpose(1, 2)))

        return layer


def in_precisions(contender: type[OnGPU], precisions: Iterable[str] = PRECISIONS) -> list[type[Contender]]:
    """A contender in each precision of its products."""
    return [
        contender
        if precision == "float32"
        else type(
            f"{contender.__name__}_{precision}",
            (contender,),
            {
                "name": f"{contender.name}-{precision}",
                "title": f"{contender.title}, {precision}",
                "precision": precision,
                "dtypes": ("float32",),
                "tolerance": TOLERANCES[precision],
            },
        )
        for precision in precisions
    ]


def _finished(call: Callable[[], Any], wait: Callable[[], None]) -> Callable[[], Any]:
    """The call, when what it asked for is done."""

    def finished() -> Any:
        result = call()
        wait()
        return result

    return finished


def _on_host(values: Any) -> Any:
    """Nested arrays of CuPy as NumPy's."""
    if isinstance(values, tuple):
        return tuple(_on_host(value) for value in values)
    if isinstance(values, dict):
        return {name: _on_host(value) for name, value in values.items()}
    return on_host("a result", values)
