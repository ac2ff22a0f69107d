"""Rotary position embedding (Su et al. 2021) with partial rotation and context extension.

Angles are float32: position * frequency, frequency_i = theta^(-2i / rotated width).
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Array


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    factor: float

    def frequencies(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        del theta
        return frequencies / self.factor

    @property
    def attention_factor(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023): interpolate slow channels, keep fast ones, ramp between.

    Channels that turn more than `beta_fast` times within `original_length` positions stay, those
    that turn less than `beta_slow` times are divided by `factor`. Cosines and sines are multiplied
    by `mscale`, by default 0.1 ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None

    def frequencies(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        half = len(frequencies)

        def channel(turns: float) -> float:
            return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)

        low = max(math.floor(channel(self.beta_fast)), 0)
        high = min(math.ceil(channel(self.beta_slow)), 2 * half - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp

    @property
    def attention_factor(self) -> float:
        if self.mscale is not None:
            return self.mscale
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's rule: slow channels are divided by `factor`, fast ones stay, with a linear blend.

    Slow turns less than `low_factor` times within `original_length` positions, fast more than
    `high_factor` times.
    """

    factor: float
    original_length: int
    low_factor: float = 1.0
    high_factor: float = 4.0

    def frequencies(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        del theta
        turns = self.original_length * frequencies / (2 * np.pi)
        blend = (turns - self.low_factor) / (self.high_factor - self.low_factor)
        blend = np.clip(blend, 0, 1)
        return frequencies * blend + frequencies / self.factor * (1 - blend)

    @property
    def attention_factor(self) -> float:
        return 1.0


Scaling = Linear | Yarn | Llama3


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotates the first `fraction` of the channels of queries and keys by their position.

    Channel pairs are (i, i + half) by default, (2i, 2i + 1) when `interleaved`.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: {self.fraction} of the channels rotated; need 0 < f <= 1")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Float64 [rotated / 2].

        Raises ValueError for an odd rotated width.
        """
        rotated = int(head_dim * self.fraction)
        if rotated % 2 or not rotated:
            raise ValueError(
                f"fraction: rotates {rotated} of {head_dim} channels; need an even number > 0"
            )
        frequencies = self.theta ** -(np.arange(0, rotated, 2) / rotated)
        return (
            frequencies if not self.scaling else self.scaling.frequencies(frequencies, self.theta)
        )

    def apply(self, x: Array, positions: Array) -> Array:
        """X [batch, seq, heads, head_dim], positions int [batch or 1, seq] -> as x."""
        frequencies = jnp.asarray(self.frequencies(x.shape[-1]), jnp.float32)
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        factor = self.scaling.attention_factor if self.scaling else 1.0
        cos, sin = factor * jnp.cos(angles), factor * jnp.sin(angles)
        rotated = 2 * frequencies.size
        turn, rest = x[..., :rotated].astype(jnp.float32), x[..., rotated:]
        if self.interleaved:
            a, b = turn[..., 0::2], turn[..., 1::2]
            pairs = jnp.stack((a * cos - b * sin, b * cos + a * sin), -1)
            turned = pairs.reshape(turn.shape)
        else:
            a, b = jnp.split(turn, 2, -1)
            turned = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
        turned = turned.astype(x.dtype)
        return turned if rotated == x.shape[-1] else jnp.concatenate((turned, rest), -1)
