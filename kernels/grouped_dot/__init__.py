"""Rows grouped by matrix, each group times its own: the product of a mixture of experts."""

from bestiary.kernels.grouped_dot.api import grouped_dot

__all__ = ["grouped_dot"]
