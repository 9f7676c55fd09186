"""Inputs on which a compressed model deviates from its original (DFlare)."""
