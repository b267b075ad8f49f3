"""Typed wrappers of the compiled operators: autograd, fake kernels, argument checks."""

from .gram_logdet import gram_logdet
from .last_layer_epoch import last_layer_epoch_
from .last_layer_gradient import last_layer_gradient, logit_error_constant
from .last_layer_logits import last_layer_logits
from .last_layer_step import last_layer_step_
from .last_layer_update import last_layer_update_
from .perturb import perturb_
from .sgd import sgd_
from .smooth_max_pool import smooth_max_pool
from .softplus import softplus, softplus_

__all__ = [
    "gram_logdet",
    "last_layer_epoch_",
    "last_layer_gradient",
    "last_layer_logits",
    "last_layer_step_",
    "last_layer_update_",
    "logit_error_constant",
    "perturb_",
    "sgd_",
    "smooth_max_pool",
    "softplus",
    "softplus_",
]
