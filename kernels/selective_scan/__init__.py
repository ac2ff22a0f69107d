"""The selective scan: the recurrence of Mamba-1, a state per channel."""

from bestiary.kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
