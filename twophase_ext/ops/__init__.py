"""Typed wrappers of the compiled operators: autograd, fake kernels, argument checks."""

from .softplus import softplus, softplus_

__all__ = ["softplus", "softplus_"]
