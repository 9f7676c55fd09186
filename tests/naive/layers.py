"""Flax layers in the oracle's terms: the same operations, in the same order."""

from collections.abc import Callable

import numpy as np

from tests.naive.slicing import Layer, Network


def dense(n: Network, x: Layer, name: str, path: str = "params/", axes: int = 1) -> Layer:
    """`nn.Dense` (or `nn.DenseGeneral` over the last `axes` axes) with a bias."""
    with n.scope(name):
        x = n.contract(x, f"{path}{name}/kernel", axes)
        return n.bias(x, f"{path}{name}/bias")


def conv(n: Network, x: Layer, name: str, *args, **options) -> Layer:
    """`nn.Conv` with a bias."""
    with n.scope(name):
        x = n.convolution(x, f"params/{name}/kernel", *args, **options)
        return n.bias(x, f"params/{name}/bias")


def batch_norm(n: Network, x: Layer, name: str) -> Layer:
    """`nn.BatchNorm` at test time, with an epsilon of 0."""
    factor = n.parameters[f"params/{name}/scale"]
    factor = factor / np.sqrt(n.parameters[f"batch_stats/{name}/var"])
    with n.scope(name):
        x = n.bias(x, f"batch_stats/{name}/mean", "sub", negative=True)
        x = n.scale(x, factor, f"params/{name}/scale")
        return n.bias(x, f"params/{name}/bias")


def layer_norm(n: Network, x: Layer, name: str, epsilon: float) -> Layer:
    """`nn.LayerNorm` over the last axis."""
    size = x.shape[-1]
    with n.scope(name):
        squares = n.function(x, lambda v: v * v, "square")
        mean = n.scale(n.reduce_sum(x, [-1]), 1 / size, label="div")
        mean_square = n.scale(n.reduce_sum(squares, [-1]), 1 / size, label="div")
        square_mean = n.function(mean, lambda v: v * v, "square")
        variance = n.relu(n.total([(mean_square, 1.0), (square_mean, -1.0)], "sub"), "max")
        centred = n.total([(x, 1.0), (mean[..., None], -1.0)], "sub")
        shifted = n.bias(variance[..., None], epsilon)
        root = n.function(shifted, lambda v: v**-0.5, "rsqrt")
        scale = n.parameters[f"params/{name}/scale"]
        factor = n.scale(root, scale, f"params/{name}/scale")
        return n.bias(n.product(centred, factor), f"params/{name}/bias")


def softmax(n: Network, x: Layer) -> Layer:
    """`jax.nn.softmax` over the last axis."""
    peak = n.reduce_max(x, [-1])
    peak = n.function(peak, lambda v: v, "max", lambda v: v > -np.inf)
    powers = n.function(n.total([(x, 1.0), (peak[..., None], -1.0)], "sub"), np.exp, "exp")
    total = n.reduce_sum(powers, [-1])
    return n.divide(powers, total[..., None], "integer_pow", "mul")


def attention(n: Network, x: Layer, name: str, mask: np.ndarray | None = None) -> Layer:
    """`nn.MultiHeadDotProductAttention` of `x` [tokens, features] with itself."""
    path = f"params/{name}/"
    with n.scope(name):
        query = dense(n, x, "query", path)
        key = dense(n, x, "key", path)
        value = dense(n, x, "value", path)
        query = n.scale(query, 1 / np.sqrt(query.shape[-1]), label="div")
        with n.scope("...qhd,...khd->...hqk"):
            weights = n.matrix_product(query.transpose(1, 0, 2), key.transpose(1, 2, 0))
        if mask is not None:
            weights = n.masked(weights, mask, float(np.finfo(np.float32).min))
        weights = softmax(n, weights)
        with n.scope("...hqk,...khd->...qhd"):
            # Flax multiplies the values by the weights: [head, depth, query].
            mixed = n.matrix_product(value.transpose(1, 2, 0), weights.transpose(0, 2, 1))
        return dense(n, mixed.transpose(2, 0, 1), "out", path, axes=2)


def sigmoid(v: float) -> float:
    return 1 / (1 + np.exp(-v))


def lstm(n: Network, x: Layer, cell: str, scope: Callable[[int], str]) -> Layer:
    """`nn.RNN(nn.LSTMCell(...))` over `x` [time, features], from a state of zeros."""
    hidden = memory = None
    outputs = []
    for t, row in enumerate(x):
        with n.scope(scope(t)):
            gates = {}
            for gate in "ifgo":
                with n.scope(f"i{gate}"):
                    entering = n.contract(row, f"{cell}/i{gate}/kernel")
                if hidden is None:
                    # No state yet depends on the sample: only the bias is left of its side.
                    summed = n.bias(entering, f"{cell}/h{gate}/bias")
                else:
                    with n.scope(f"h{gate}"):
                        kept = n.contract(hidden, f"{cell}/h{gate}/kernel")
                        kept = n.bias(kept, f"{cell}/h{gate}/bias")
                    summed = n.total([(entering, 1.0), (kept, 1.0)])
                if gate == "g":
                    gates[gate] = n.function(summed, np.tanh, "tanh")
                else:
                    gates[gate] = n.function(summed, sigmoid, "logistic")
            old = n.scale(gates["f"], 0.0) if memory is None else n.product(gates["f"], memory)
            memory = n.total([(old, 1.0), (n.product(gates["i"], gates["g"]), 1.0)])
            hidden = n.product(gates["o"], n.function(memory, np.tanh, "tanh"))
        outputs.append(hidden)
    return np.stack(outputs)


def gru(n: Network, x: Layer, cell: str, scope: Callable[[int], str]) -> Layer:
    """`nn.RNN(nn.GRUCell(...))` over `x` [time, features], from a state of zeros."""
    hidden = None
    outputs = []

    for t, row in enumerate(x):
        with n.scope(scope(t)):
            gates = {}
            for gate in "rz":
                entering = dense(n, row, f"i{gate}", f"{cell}/")
                if hidden is None:
                    summed = n.bias(entering, 0.0)
                else:
                    with n.scope(f"h{gate}"):
                        kept = n.contract(hidden, f"{cell}/h{gate}/kernel")
                    summed = n.total([(entering, 1.0), (kept, 1.0)])
                gates[gate] = n.function(summed, sigmoid, "logistic")
            entering = dense(n, row, "in", f"{cell}/")
            if hidden is None:
                # All that the state of zeros leaves is its bias, a factor like any other weight.
                bias = f"{cell}/hn/bias"
                reset = n.scale(gates["r"], n.parameters[bias], bias)
            else:
                reset = n.product(gates["r"], dense(n, hidden, "hn", f"{cell}/"))
            new = n.function(n.total([(entering, 1.0), (reset, 1.0)]), np.tanh, "tanh")
            one_minus = n.scale(gates["z"], -1.0, label="sub", constant=1.0)
            new = n.product(one_minus, new)
            old = n.scale(gates["z"], 0.0) if hidden is None else n.product(gates["z"], hidden)
            hidden = n.total([(new, 1.0), (old, 1.0)])
        outputs.append(hidden)
    return np.stack(outputs)
