"""Typed wrappers of the compiled operators: autograd, fake kernels, argument checks."""

from .perturb import perturb_
from .sgd import sgd_
from .softplus import softplus, softplus_

__all__ = ["perturb_", "sgd_", "softplus", "softplus_"]
