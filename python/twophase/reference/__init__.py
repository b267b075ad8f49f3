"""Algorithm 1 and every kernel in plain PyTorch: specification, oracle of the tests, baseline.

Nothing here imports twophase_ext.
"""

from .gram import gram_logdet
from .last_layer import last_layer_epoch_, last_layer_gradient, last_layer_step_
from .perturb import normal, perturb_, philox4x32_10, stream_key
from .screen import screen_products
from .sgd import sgd_
from .smooth_max_pool import smooth_max_pool, smooth_max_pool_backward
from .softplus import softplus, softplus_backward, softplus_double_backward
from .triangular_inverse import triangular_inverse_squares
from .two_phase import two_phase

__all__ = [
    "gram_logdet",
    "last_layer_epoch_",
    "last_layer_gradient",
    "last_layer_step_",
    "normal",
    "perturb_",
    "philox4x32_10",
    "screen_products",
    "sgd_",
    "smooth_max_pool",
    "smooth_max_pool_backward",
    "softplus",
    "softplus_backward",
    "softplus_double_backward",
    "stream_key",
    "triangular_inverse_squares",
    "two_phase",
]
