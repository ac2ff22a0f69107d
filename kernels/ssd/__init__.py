"""State-space duality: the recurrence of Mamba-2 in chunks of matrix products."""

from bestiary.kernels.ssd.api import ssd

__all__ = ["ssd"]
