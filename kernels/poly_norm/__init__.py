"""PolyNorm: a learned sum of normalised powers."""

from bestiary.kernels.poly_norm.api import poly_norm

__all__ = ["poly_norm"]
