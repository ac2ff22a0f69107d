"""Softmax attention over static masks, with grouped heads, segments, soft-cap, sinks and bias."""

from bestiary.kernels.attention.api import attention as attention
from bestiary.kernels.attention.api import live_keys as live_keys
from bestiary.kernels.attention.masks import Mask as Mask
from bestiary.kernels.attention.reference import visible as visible
from bestiary.kernels.attention.reference import weights as weights
