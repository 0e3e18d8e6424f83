"""JAX: a scan over any cell."""

from __future__ import annotations

import importlib
from typing import Any

from fusedlstm.derive import compile_source

from .cases import Case, Data, name_results
from .contender import Contender, Prepared, any_step, cell_functions, layer_weights, stepping


class JaxScan(Contender):
    """``jax.lax.scan`` over a step, compiled; any cell."""

    name, title = "jax", "JAX scan"
    modules, packages = ("jax",), ("jax", "jaxlib")

    def prepare(self, case: Case, data: Data) -> Prepared:
        jax: Any = importlib.import_module("jax")
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        jnp = jax.numpy
        cell = case.mathematics
        namespace = cell_functions(jnp, jax.nn)
        step = compile_source(cell.source, namespace, f"<{cell.name} in JAX>").step

        def run(x: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
            finals = []
            for n, weights in enumerate(layer_weights(case, parameters)):

                def body(states: Any, product: Any, weights: Any = weights) -> tuple[Any, Any]:
                    states = any_step(cell, step, weights, product, states)
                    return states, states[0]

                products = x @ weights.ih.T + weights.bias_ih
                states, x = jax.lax.scan(body, [part[n] for part in state], products)
                finals.append(states)
            return x, tuple(jnp.stack(parts) for parts in zip(*finals))

        def run_back(x: Any, state: Any, parameters: Any, seeds: Any) -> Any:
            (y, final), pull = jax.vjp(run, x, state, parameters)
            return y, final, pull(seeds)

        x, *rest = jax.tree.map(jnp.asarray, (data.x, data.state, data.weights, (data.dy, data.dstate)))
        state, parameters, seeds = rest
        forward, train = jax.jit(run), jax.jit(run_back)
        zeros = jax.tree.map(jnp.zeros_like, state)
        ready = jax.block_until_ready
        calls = {
            "forward": lambda: ready(forward(x, zeros, parameters)),
            "train": lambda: ready(train(x, state, parameters, seeds)),
            "step": stepping(lambda state: ready(forward(x, state, parameters)), state),
        }
        return Prepared(calls[case.mode], lambda result: name_results(case, *result))
