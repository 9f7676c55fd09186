"""Which parts of a network matter, for these inputs: tracing, folds and slicing."""

from nnslicer_jax import deviation, zoo
from nnslicer_jax.cost import Estimate, estimate
from nnslicer_jax.evaluation import evaluate
from nnslicer_jax.graph import Graph, Neuron, UnsupportedError, trace
from nnslicer_jax.interval import Interval, interval_bounds, neuron_bounds
from nnslicer_jax.linear_bounds import linear_bounds, margin_rows
from nnslicer_jax.masked import Masked, agreement, mask_network
from nnslicer_jax.profile import Profile, load_profile, profile
from nnslicer_jax.slices import Slice, load_slice
from nnslicer_jax.slicing import effective_path, slice_network
from nnslicer_jax.static import static_slice
from nnslicer_jax.symbolic import symbolic_bounds

__all__ = [
    "Estimate",
    "Graph",
    "Interval",
    "Masked",
    "Neuron",
    "Profile",
    "Slice",
    "UnsupportedError",
    "agreement",
    "deviation",
    "effective_path",
    "estimate",
    "evaluate",
    "interval_bounds",
    "linear_bounds",
    "load_profile",
    "load_slice",
    "margin_rows",
    "mask_network",
    "neuron_bounds",
    "profile",
    "slice_network",
    "static_slice",
    "symbolic_bounds",
    "trace",
    "zoo",
]
