"""Inputs on which a compressed model deviates from its original (DFlare)."""

from difftest.confirm import confirm
from difftest.pair import JaxModel, ModelError, ModelPair, jax_model
from difftest.replay import replay
from difftest.result import SearchResult
from difftest.search import search

__all__ = [
    "JaxModel",
    "ModelError",
    "ModelPair",
    "SearchResult",
    "confirm",
    "jax_model",
    "replay",
    "search",
]
