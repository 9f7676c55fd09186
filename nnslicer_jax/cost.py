"""What slicing will cost, before it starts: terms, memory and time of one sample."""

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax import host_selection, operations
from nnslicer_jax.cores import cores
from nnslicer_jax.graph import Graph, Node
from nnslicer_jax.products import product

# Memory a batch may take unless the caller says otherwise, bytes.
BUDGET = 2 << 30
_MOST_SAMPLES = 256


class Estimate(NamedTuple):
    """Cost of slicing.

    Attributes:
      terms: Products of an activation and a weight, per sample.
      bytes: Memory a walk holds, per sample.
      seconds: Time, per sample.
      batch_size: Samples whose memory fits the budget, at least one.
    """

    terms: int
    bytes: int
    seconds: float
    batch_size: int

    def __str__(self) -> str:
        return (
            f"{self.terms / 1e6:,.1f} M terms, {self.bytes / 2**20:,.0f} MiB and about "
            f"{self.seconds:.2g} s an image; batches of {self.batch_size} take "
            f"{self.bytes * self.batch_size / 2**30:.2g} GiB"
        )


def estimate(
    graph: Graph, theta: float = 0.2, rule: str = "signed", memory: int = BUDGET
) -> Estimate:
    """Estimates what slicing costs on this machine.

    Arithmetic and selection are timed on a small problem once, and half of the outputs are
    taken to be reached, so the time is right within a small factor; the memory is counted from
    the shapes.

    Args:
      graph: The traced model.
      theta: As for `slice_network`; 0 selects nothing and is much faster.
      rule: As for `slice_network`.
      memory: Bytes a batch may take.
    """
    shapes = product_shapes(graph)
    terms = sum(math.prod(shape) for shape in shapes)
    patches = max((4 * g * p * (2 * k + o) for g, p, k, o in shapes), default=0)
    # Three arrays for each activation (value, delta, CONTRIB), one for each weight.
    carried = sum(12 * math.prod(graph.values[i].shape) for i in graph.carried)
    weights = sum(4 * math.prod(graph.values[i].shape) for i in graph.params.values())
    # Running sums and the like lay out the terms of each of their outputs.
    running = max(
        (
            4 * math.prod(shape) * shape[node.params["axis"]]
            for node in graph.nodes
            if any(node.data) and node.key.startswith("cum")
            for shape in [graph.values[node.inputs[0]].shape]
        ),
        default=0,
    )
    held = carried + weights + 2 * max(patches, running)
    seconds = 6 * terms / _multiplications_per_second()
    if theta > 0:
        seconds += terms / 2 / _selections_per_second(rule)
    size = max(1, min(_MOST_SAMPLES, memory // max(held, 1)))
    return Estimate(terms, held, seconds, size)


def product_shapes(graph: Graph) -> list[tuple[int, int, int, int]]:
    """Groups, positions, terms and outputs of every weighted sum that reads the sample."""
    return [
        _product_shape(graph, node)
        for node in graph.nodes
        if node.key in operations.PRODUCTS and any(node.data)
    ]


def _product_shape(graph: Graph, node: Node) -> tuple[int, int, int, int]:
    left, right = (
        jax.ShapeDtypeStruct(graph.values[i].shape, jnp.float32) for i in node.inputs[:2]
    )
    form = product(node, left.shape, right.shape)
    g, p, k = jax.eval_shape(form.rows, left).shape
    return g, p, k, jax.eval_shape(form.columns, right).shape[-1]


@functools.cache
def _multiplications_per_second() -> float:
    square = jnp.ones((512, 512), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    return 512**3 / _best(lambda: multiply(square).block_until_ready())


@functools.cache
def _selections_per_second(rule: str) -> float:
    terms = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    workers = cores()
    return workers * terms.size / (3 * _best(lambda: host_selection.kept(terms, rule, 0.2)))


def _best(run) -> float:
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
