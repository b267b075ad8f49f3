"""Run a user's model once and watch it, without leaving a trace in it."""

import copy
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parameter import is_lazy

from ..core.messages import first_line

_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"


class Call(NamedTuple):
    """One call of a module: tensors with their version counters at that moment."""

    module: nn.Module
    input: Any
    input_version: int
    output: Any
    output_version: int


class _Stop(BaseException):
    """Ends a forward pass. Not an Exception, so that no `except Exception` in it swallows this."""


class DoesNotRun(ValueError):
    """The user's own forward pass raised; `line` is what it said."""

    def __init__(self, example: Tensor, error: Exception) -> None:
        """error: raised on the inputs `example`."""
        self.line = first_line(error)
        super().__init__(
            f"model: it does not run on inputs {list(example.shape)} of {example.dtype}: "
            f"{self.line}"
        )


def require_module(model: Any) -> None:
    """Raise TypeError where `model` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside DataParallel, DistributedDataParallel and torch.compile."""
    while wraps(model):
        model = model.module if hasattr(model, "module") else model._orig_mod  # type: ignore
    return model


def wraps(model: nn.Module) -> bool:
    """Whether it is torch's own wrapper; a subclass may do anything with what it wraps."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return type(model) in parallel or compiled_wrapper(model)


def compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, runs code that torch.compile made of it."""
    return any(compiled_wrapper(m) or m._compiled_call_impl is not None for m in model.modules())


def compiled_wrapper(model: nn.Module) -> bool:
    """Whether it is what torch.compile made around a module."""
    kind = type(model)
    return f"{kind.__module__}.{kind.__name__}" == _COMPILED


def cuda_devices() -> range:
    """The CUDA devices whose random state may move: none until CUDA is in use."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, whatever the model keeps of its last forward pass, and sharing what it shares.

    copy.deepcopy refuses tensors with a graph, which modules keep in attributes (attention maps,
    weight_norm's weight): the copy has their values without the graph. It gives a parameter memory
    of its own where another parameter or an attribute is a view of it: here the copies share too.
    """
    memo: dict[int, Any] = {}
    tensors = list(reached_tensors(model))
    owners = Counter(_storage(t) for t in tensors)
    for t in tensors:
        if not t.is_leaf:
            memo[id(t)] = copy.deepcopy(t.detach(), memo)
        elif type(t) is nn.Parameter and owners[_storage(t)] > 1:
            memo[id(t)] = nn.Parameter(copy.deepcopy(t.detach(), memo), t.requires_grad)
    return copy.deepcopy(model, memo)


def _storage(t: Tensor) -> int:
    """The same number for tensors in one storage; for another kind of tensor one of its own."""
    ordinary = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
    return t.untyped_storage()._cdata if ordinary else -id(t)


def reached_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that the model's modules hold, in whatever containers and objects, once."""
    # what deepcopy does not copy, or what holds nothing
    alone = (type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float)
    seen, left = set(), [model]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, alone):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        else:
            left.extend(gc.get_referents(value))


def input_of(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """The input that `module` gets when the model runs on x; nothing after it is computed.

    Runs eagerly, in the caller's grad mode and the model's mode. Raises ValueError where the
    forward pass ends without reaching the module.
    """
    caught: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["input"])
        raise _Stop

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with eager():
            unwrap(model)(x.clone())  # a forward may work in place on its input
    except _Stop:
        return caught[0]
    finally:
        handle.remove()
    raise ValueError("model: its forward pass does not reach the layer that was asked for")


def rows_into(model: nn.Module, chain: list[nn.Module], x: Tensor) -> Tensor:
    """The input of chain[0], [rows, features]; the chain ends at the last layer.

    A row is a sample. Where the layers run on every token, the rows that the model gives, all or
    one that it picks: each layer of the chain hands its input on, and the model's output is
    returned.
    """
    caught = input_of(model, chain[0], x)
    if caught.dim() <= 2:
        return caught

    handed = 0  # modules of the chain that have, in their order: one may run elsewhere too

    def handing_on(place: int, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            nonlocal handed
            if handed != place:
                return own(input)
            handed += 1
            return input

        return forward

    for place, module in enumerate(chain):  # none of them has a replaced forward: gate.py
        object.__setattr__(module, "forward", handing_on(place, module.forward))
    try:
        with eager():
            return unwrap(model)(x.clone())
    finally:
        for module in chain:
            object.__delattr__(module, "forward")


def require_runnable(model: nn.Module, example: Any) -> None:
    """Raise TypeError or ValueError where no run of the model on the example would say anything."""
    if not isinstance(example, Tensor):
        raise TypeError(f"example_input: expected a tensor, got {type(example).__name__}")
    if example.dim() == 0 or example.numel() == 0:
        raise ValueError(
            f"example_input: expected at least one sample, got shape {tuple(example.shape)}"
        )
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError("model: its lazy modules are not initialised yet; run it once first")


def record(model: nn.Module, example: Tensor, wanted: Any) -> tuple[list[Call], Any]:
    """Run the model once: the calls of `wanted` modules in order of completion, and its output.

    Raises ValueError where torch.func runs one of them.
    """
    require_runnable(model, example)
    calls: list[Call] = []
    inputs: dict[nn.Module, list[tuple[Any, int]]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs.get("input")
        inputs.setdefault(module, []).append((value, _version(value)))

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and is_functorch_wrapped_tensor(output):
            raise ValueError(
                f"model: torch.func (vmap, grad) runs its {type(module).__name__} layer, whose "
                "values cannot be seen then; expected a forward that calls it on batches"
            )
        calls.append(Call(module, *inputs[module].pop(), output, _version(output)))

    handles = []
    for module in model.modules():
        if isinstance(module, wanted):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        with untouched(model), eager():
            output = model(example.clone())  # a forward may work in place on its input
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def main_output(output: Any) -> Tensor | None:
    """A model's output; of several the one called "logits" or "out", else the first: auxiliary
    heads come after it.
    """
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if not isinstance(output, Tensor) and isinstance(found, Tensor):
            return found
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def eager() -> AbstractContextManager[Any]:
    """Runs compiled submodules eagerly: compiled code need not see a hook that came after it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _version(value: Any) -> int:
    """-1 where none is kept."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else -1


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes, parameters' values, buffers and torch's random state
    come back after it. No version counter moves, and no graph stays in a module's attributes.
    nn.TransformerEncoder makes no nested tensors within, which have neither shape nor strides.
    """
    attributes = {module: dict(vars(module)) for module in model.modules()}
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    nested = [encoder for encoder in encoders if encoder.use_nested_tensor]
    modes = {module: module.training for module in model.modules()}
    buffers = {module: dict(module._buffers) for module in modes}
    parameters = {module: dict(module._parameters) for module in modes}
    values = [(t, t.detach().clone()) for t in state_tensors(model) if not is_lazy(t)]
    model.eval()
    for encoder in nested:
        encoder.use_nested_tensor = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cuda_devices()):
            yield
    finally:
        for encoder in nested:
            encoder.use_nested_tensor = True
        for module, mode in modes.items():
            module.training = mode
            for name, value in list(vars(module).items()):
                kept = attributes[module].get(name) is value
                if isinstance(value, Tensor) and value.grad_fn is not None and not kept:
                    object.__setattr__(module, name, value.detach())
        for module in modes:
            # a forward may bind new tensors to its names, or write into the old ones
            if isinstance(module, torch.jit.ScriptModule):  # its names are fixed
                continue
            module._buffers.clear()
            module._buffers.update(buffers[module])
            module._parameters.clear()
            module._parameters.update(parameters[module])
        with torch.no_grad():
            for tensor, value in values:
                if not same_bits(tensor, value):
                    tensor.data.copy_(value)


def state_tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, once each."""
    return [*model.parameters(), *model.buffers()]


class State:
    """The values of a model's parameters and buffers at one moment."""

    def __init__(self, model: nn.Module) -> None:
        """Copy them."""
        self._model = model
        self._values = {name: t.detach().clone() for name, t in self._now()}

    def _now(self) -> list[tuple[str, Tensor]]:
        return [*self._model.named_parameters(), *self._model.named_buffers()]

    def changed(self) -> list[str]:
        """Names of those that have other bits now, are new, or are gone."""
        now = dict(self._now())
        found = [n for n, v in self._values.items() if n not in now or not same_bits(now[n], v)]
        return found + [n for n in now if n not in self._values]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; equal numbers for kinds without bits of their own."""
    if a.dtype != b.dtype or a.is_nested != b.is_nested:
        return False
    if not a.is_nested and a.shape != b.shape:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    if a.is_nested or b.is_nested:
        parts = [t.unbind() if t.is_nested else [t] for t in (a, b)]
        return len(parts[0]) == len(parts[1]) and all(map(same_bits, *parts))
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a.layout is b.layout and same_bits(a.to_dense(), b.to_dense())
    if in_plain_memory(a) and in_plain_memory(b):
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        bits = words.get(a.itemsize, torch.int64)
        one, other = (t.detach().contiguous().view(-1).view(bits) for t in (a, b))
        return torch.equal(one, other)
    return torch.equal(a, b) or bool(((a == b) | (a != a) & (b != b)).all())


def in_plain_memory(t: Tensor) -> bool:
    """Whether its numbers lie in memory as of any ordinary tensor."""
    ordinary = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
    return ordinary and not is_lazy(t) and not t.is_meta and not t.is_inference()


def unchanged(then: Tensor, version: int, now: Any, now_version: int | None = None) -> bool:
    """Are these the same values: the same memory, seen in the same way and not written since?

    Equal values would not do: a branch that is zero at initialisation adds nothing, then.
    """
    if not isinstance(now, Tensor) or not isinstance(then, Tensor):
        return False
    seen_alike = then.shape == now.shape and then.stride() == now.stride()
    return seen_alike and same_memory(then, version, now, now_version)


def same_memory(then: Tensor, version: int, now: Tensor, now_version: int | None = None) -> bool:
    """Whether these are the same numbers, seen in whatever way, and not written since."""
    if version == -1:  # of inference mode: nothing tells whether it was written
        return False
    written = (_version(now) if now_version is None else now_version) != version
    same = then is now or (
        then.data_ptr() == now.data_ptr()
        and then.numel() == now.numel()
        and then.dtype == now.dtype
    )
    return same and not written
