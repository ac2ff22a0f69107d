"""Layers: hyper-parameters, declared parameters and a pure apply."""
