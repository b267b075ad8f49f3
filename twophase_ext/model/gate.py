"""The gate between a model and whatever reads its layers: is a layer what its class says it is?

The second phase, the caches and the certificates compute a layer from its parameters instead of
calling it. That is the model's own function only where nothing stands between the two: no hook, no
replaced forward, no parametrization, no tensor that redefines arithmetic, no other reader.
"""

import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .probing import compiled_wrapper

_LINEAR_FORWARD, _CALL = nn.Linear.forward, nn.Module.__call__
_CALL_IMPL = nn.Module._call_impl
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Their results do not depend on the values of the tensor that they are given.
_VALUE_FREE = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "sym_size"),
}
_ROWS = 3  # of random inputs, to tell whether a forward is the affine map


def hooked(module: nn.Module) -> str:
    """Whether hooks of its own may change what a call of the module gives: why, or ""."""
    return "it has hooks" if any(getattr(module, name, None) for name in _HOOKS) else ""


def intercepted(module: nn.Module) -> str:
    """Why a call of the module may not be its class's forward, "" where it is nothing but that."""
    kind = type(module)
    if any(name in vars(module) for name in ("forward", "_call_impl", "__call__")):
        return "its forward has been replaced"
    if kind.__call__ is not _CALL or kind._call_impl is not _CALL_IMPL:
        return f"{kind.__name__} defines how it is called"
    if why := hooked(module):
        return why
    if any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        return "global module hooks are registered (torch.nn.modules.module)"
    if is_parametrized(module):
        return "it is parametrized"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) not in (nn.Parameter, Tensor):
            return f"its {name} is a {type(parameter).__name__}, not a plain tensor"
    return ""


def wrapper_intercepted(wrapper: nn.Module) -> str:
    """Why a call of torch's wrapper may not be a call of what it wraps; "" where it is."""
    if not compiled_wrapper(wrapper):
        return intercepted(wrapper)
    if any(name in vars(wrapper) for name in ("_call_impl", "__call__")):
        return "its forward has been replaced"
    for name in ("forward", "_forward"):  # set on the instance by torch.compile itself
        function = getattr(vars(wrapper).get(name), "__func__", vars(wrapper).get(name))
        home = getattr(getattr(function, "__code__", None), "co_filename", "")
        if function is not None and home != sys.modules[type(wrapper).__module__].__file__:
            return "its forward has been replaced"
    return hooked(wrapper)


def is_affine(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module's class computes x weight^T + bias, as nn.Linear does.

    nn.Linear itself does; a subclass is asked, with random weights and inputs: one that only casts,
    logs or repeats nn.Linear's own forward passes, LoRA, a clamp or a scale does not.
    """
    if not isinstance(module, nn.Linear):
        return False
    if type(module) is nn.Linear:
        return nn.Linear.forward is _LINEAR_FORWARD
    own = dict(module.named_parameters(recurse=False))
    if not {"weight"} <= set(own) <= {"weight", "bias"} or any(map(is_lazy, own.values())):
        return True  # what is wrong with it is said elsewhere
    if own["weight"].is_meta or not own["weight"].is_floating_point():
        return False
    return _computes_affine_map(module, own)


@torch.no_grad()
def _computes_affine_map(module: nn.Linear, own: dict[str, nn.Parameter]) -> bool:
    weight = own["weight"]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(weight.device, weight.dtype)

    values = {name: draw(*p.shape) for name, p in own.items()}
    for scale in (1.0, 1e-3, 30.0):  # a clamp or a guard shows at one of these
        x = scale * draw(_ROWS, weight.shape[1])
        try:
            given = functional_call(module, values, (x.clone(),))
        except Exception:  # whatever a user's forward raises
            return False
        if not isinstance(given, Tensor) or given.dtype != x.dtype:
            return False
        if not torch.equal(given, F.linear(x, values["weight"], values.get("bias"))):
            return False
    return True


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory."""
    if a is b or is_lazy(a) or is_lazy(b):
        return a is b
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    return a.device == b.device and max(a_begin, b_begin) < min(a_end, b_end)


def _extent(t: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first to after its last byte; empty where it has none."""
    try:
        begin = t.data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper around other tensors
        return 0, 0
    if begin == 0 or t.numel() == 0:
        return begin, begin
    if t.is_nested:  # has no strides
        storage = t.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    reach = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (reach + 1) * t.element_size()


class Readers(TorchDispatchMode):
    """Notes the operators that read some tensors while it is active: `found`, in order.

    Seen by memory, not by name: views, detached tensors and casts count. Nothing inside a custom
    operator or another thread is seen, nor a read by NumPy.
    """

    def __init__(self, watched: Iterable[Tensor]) -> None:
        """watched: parameters."""
        super().__init__()
        self._watched = list(watched)
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and note it where it reads."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        if name not in _VALUE_FREE and any(
            overlap(t, own) for t in tensors for own in self._watched
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _storage(t: Tensor) -> int:
    """Where the tensor's memory begins; 0 where it has none of its own (meta, empty, wrappers)."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


class Narrowed(TorchDispatchMode):
    """Notes where numbers of `wide` that depend on `x` become narrower: `found`, `dtype`."""

    def __init__(self, x: Tensor, wide: torch.dtype = torch.float64) -> None:
        """x: the input, which the model is then run on; wide: the model's own type."""
        super().__init__()
        self._marked = {_storage(x)}
        self._alive: list[Tensor] = []  # so that no address is given to another tensor
        self.found: list[str] = []
        self.wide = self.dtype = wide

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, mark what depends on x, note what was float64 and is narrower now."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        marked = [t for t in given if _storage(t) in self._marked]
        result = func(*args, **(kwargs or {}))
        if not marked:
            return result
        wide = any(t.dtype == self.wide for t in marked)
        for t in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            self._marked.add(_storage(t))
            self._alive.append(t)
            if wide and t.is_floating_point() and _eps(t.dtype) > _eps(self.wide):
                self.found.append(func.overloadpacket.__name__)
                if _eps(t.dtype) > _eps(self.dtype):
                    self.dtype = t.dtype
        return result


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
