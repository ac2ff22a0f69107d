"""Causal softmax attention with grouped heads, windows, segments, soft-cap and sinks."""

from bestiary.kernels.attention.api import attention as attention
from bestiary.kernels.attention.reference import visible as visible
from bestiary.kernels.attention.reference import weights as weights
