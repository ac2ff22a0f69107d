"""Named shapes of the statistical top-k GLU: [rows, features], dtype, k, ddof, activation."""

from typing import NamedTuple

from bestiary.kernels.stat_topk_glu.reference import Activation


class Case(NamedTuple):
    rows: int
    features: int
    dtype: str
    k: int
    ddof: int = 0
    activation: Activation = "gelu_tanh"


TINY = {
    "odd": Case(7, 200, "float32", k=16),
    "sample_std": Case(5, 136, "float32", k=30, ddof=1, activation="gelu"),
    "relu": Case(3, 128, "float32", k=40, activation="relu"),
    "silu": Case(11, 160, "float32", k=40, ddof=1, activation="silu"),
    "bfloat16": Case(37, 264, "bfloat16", k=30),
    "unthresholded": Case(9, 152, "float32", k=152, activation="silu"),
}
MODEL = {
    "spark_gemma2_2b": Case(8192, 13824, "bfloat16", k=1106),
    "spark_gemma2_2b_float32": Case(2048, 13824, "float32", k=1106),
    "polycom_width": Case(8192, 8256, "bfloat16", k=660, ddof=1, activation="gelu"),
    "wide": Case(4096, 28672, "bfloat16", k=2294, activation="silu"),
}
