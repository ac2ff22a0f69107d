"""Named shapes of PolyNorm: [rows, features], dtype, order."""

from typing import NamedTuple


class Case(NamedTuple):
    rows: int
    features: int
    dtype: str
    order: int = 3


TINY = {
    "odd": Case(7, 200, "float32"),
    "linear": Case(3, 128, "float32", order=1),
    "quintic": Case(5, 136, "float32", order=5),
    "bfloat16": Case(37, 264, "bfloat16"),
    "quadratic": Case(13, 144, "float32", order=2),
}
MODEL = {
    "polycom_1b_dense": Case(8192, 8256, "bfloat16"),
    "polycom_olmoe_1b7b": Case(8192, 1536, "bfloat16"),
    "polycom_1b_dense_float32": Case(2048, 8256, "float32"),
    "wide": Case(4096, 28672, "bfloat16"),
}
