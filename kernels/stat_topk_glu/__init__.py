"""Statistical top-k, activation and product: the middle of the Spark feed-forward."""

from bestiary.kernels.stat_topk_glu.api import stat_topk_glu
from bestiary.kernels.stat_topk_glu.reference import (
    Activation,
    normal_quantile,
    statistical_topk,
)

__all__ = ["Activation", "normal_quantile", "stat_topk_glu", "statistical_topk"]
