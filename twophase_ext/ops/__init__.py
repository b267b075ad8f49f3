"""Typed wrappers of the compiled operators: autograd, fake kernels, argument checks."""

from .gram_logdet import gram_logdet
from .last_layer_step import last_layer_step_
from .perturb import perturb_
from .sgd import sgd_
from .softplus import softplus, softplus_

__all__ = ["gram_logdet", "last_layer_step_", "perturb_", "sgd_", "softplus", "softplus_"]
