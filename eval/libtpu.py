"""The environment in which libtpu loads on a machine without a TPU. Imports no JAX, which reads the
environment when it looks for devices."""

import os

SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # one value serves all topologies
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Silently, and by several processes at once."""


def quiet() -> None:
    """Sets what the environment does not say already."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
