"""bestiary: a JAX/Flax model zoo of sparse-activation architectures."""

__all__ = ["__version__"]
__version__ = "0.1.0"
