"""Inputs on which a compressed model deviates from its original (DFlare)."""

from difftest.pair import JaxModel, ModelError, ModelPair, jax_model

__all__ = ["JaxModel", "ModelError", "ModelPair", "jax_model"]
