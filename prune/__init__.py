"""Masks learned under the objective itself, and smaller networks made from them (HYDRA)."""
