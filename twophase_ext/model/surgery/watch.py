"""A model is run, and every operator that acts on what hangs on its weights is judged.

Nothing is read from the source: hooks, replaced forwards, parametrizations, subclasses, weights
read by any way and compiled functions come down to operators, which all pass here. What leaves
torch (numbers read by Python, arrays) or comes from elsewhere is said to be unknown.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twophase_ext.model import probing

from ...core.messages import type_and_line
from .catalog import judge_module
from .operators import RANDOM, SIZES_ONLY, Call, Judgement, is_random, is_real, judge, plain
from .signs import ABOVE, Signs

CONSTANT, INPUT, WEIGHT = 0, 1, 2  # what a tensor's numbers hang on, at most

# Ways out of torch that are no operators.
_EXITS = {
    *("numpy", "tolist", "data_ptr", "untyped_storage", "storage", "storage_type"),
    *("__array__", "__dlpack__", "__reduce_ex__", "__cuda_array_interface__"),
}
_ELSEWHERE = Judgement("unknown", "takes a tensor that was made out of torch's sight")
_NUMBERS = Judgement("unknown", "numbers leave torch here; what Python does with them is not seen")
_OF_INPUTS = (
    "of the inputs alone, constant in the weights: no objection, as long as it keeps different "
    "inputs apart, which tp.check_assumptions and the verdict see on your data"
)


@dataclass
class Watched:
    """What a run saw, by the path of the module whose forward did it.

    calls: (path, name of the function) -> what is not analytic about it. reached: the modules that
    were called. weighed: those in which an operator took what hangs on weights. failure: why there
    was no run to the end, "" where there was.
    """

    calls: dict[tuple[str, str], Judgement] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    weighed: set[str] = field(default_factory=set)
    failure: str = ""


def watch(
    model: nn.Module, batches: Sequence[Tensor], *, whole: bool, frozen: bool = False
) -> Watched:
    """Run a copy of the model, in eval mode, on each of the batches; twice where there is one.

    whole: whether the batches are all the inputs that count, so that a path chosen by the values
    of inputs is the only one. frozen: whether parameters without requires_grad are constants, and
    what is a constant in the weights is no objection. The copy shares its parameters with the
    model, which is not changed.
    """
    try:
        with probing.untouched(model), probing.eager():
            return _Watch(twin_of(model), whole, frozen).run(batches)
    # whatever a user's model raises means one thing here: it was not seen
    except Exception as error:
        return Watched(failure=f"could not be run: {type_and_line(error)}")


def twin_of(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the parameters: its forward may change its attributes.

    Activations that it keeps of an earlier pass, which torch does not copy, come without a graph.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    return copy.deepcopy(model, memo).eval()


class _Watch:
    def __init__(self, twin: nn.Module, whole: bool, frozen: bool) -> None:
        self.twin, self.whole, self.frozen, self.found = twin, whole, frozen, Watched()
        self.settled = self.trusted = self.read = False
        self.function = ""
        self.sources: dict[StorageWeakRef, int] = {}
        self.signs = Signs()
        for buffer in twin.buffers():
            self.sources[_storage(buffer)] = CONSTANT
        # trainable ones last: memory that both kinds share is no constant
        for p in sorted(twin.parameters(), key=lambda p: p.requires_grad):
            source = CONSTANT if frozen and not p.requires_grad else WEIGHT
            self.sources[_storage(p)] = source
        self.stack: list[str] = []
        self.paths = {module: name for name, module in twin.named_modules()}
        # torch's own code: there the catalogue knows better than the rules of single operators
        self.settled_by_rule = {name for module, name in self.paths.items() if _by_rule(module)}
        for module, path in self.paths.items():
            module.register_forward_pre_hook(self._enter(path), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    def run(self, batches: Sequence[Tensor]) -> Watched:
        batches = batches if len(batches) > 1 else [*batches, *batches]
        for i, batch in enumerate(batches):
            batch = batch.clone()  # a forward may write into it
            self.sources[_storage(batch)] = INPUT
            # the first run fills caches: from the second on, a model in eval mode stays as it is
            self.settled, before = i > 0, self._state()
            drawn = _python_random()
            self.stack = [""]
            # a forward may ask for the grad mode: every other run has gradients on
            with torch.set_grad_enabled(i % 2 == 1), _Functions(self), _Operators(self):
                self.twin(batch)
            if _python_random() != drawn:
                self.note("(random)", RANDOM, "")
            if self.settled:
                now = self._state()
                for path, name in sorted(k for k in {*now, *before} if now.get(k) != before.get(k)):
                    reason = f"it changes its own {name!r}: another call may compute something else"
                    self.note("forward", Judgement("unknown", reason), path)
        return self.found

    def _enter(self, path: str) -> Any:
        def enter(*_: Any) -> None:
            self.found.reached.add(path)
            self.stack.append(path)

        return enter

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def _state(self) -> dict[tuple[str, str], Any]:
        """Plain attributes, lengths of lists, and versions of buffers, by path and name."""
        state: dict[tuple[str, str], Any] = {}
        for module, path in self.paths.items():
            for name, value in vars(module).items():
                if isinstance(value, int | float | str | None):
                    state[path, name] = value
                elif isinstance(value, list | dict | set) and not name.startswith("_"):
                    state[path, name] = len(value)
            for name, buffer in module._buffers.items():
                state[path, name] = None if buffer is None else (id(buffer), buffer._version)
        return state

    def note(self, function: str, judged: Judgement, path: str | None = None) -> None:
        path = self.stack[-1] if path is None else path
        known = self.found.calls.get((path, function))
        if known is None or known.status == "unknown":
            self.found.calls[path, function] = judged

    def source(self, tensor: Tensor) -> int:
        """What the tensor hangs on, at most; a tensor that nobody saw come counts as a weight."""
        key = _storage(tensor)
        if key not in self.sources:
            if self.settled:
                self.note(self.function or "(tensor)", _ELSEWHERE)
            leaf = tensor.is_leaf and tensor.requires_grad
            self.sources[key] = WEIGHT if leaf or self.settled else CONSTANT
        return self.sources[key]

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(func, args, kwargs, lambda t: is_real(t) and self.source(t) == WEIGHT)
        known = call

        def above(value: Any) -> bool:
            return self.signs.of(value, known) == ABOVE

        call = call._replace(above=above)
        name = self.function or call.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in tensors:
            if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                reason = f"takes a {type(tensor).__name__}, whose operators are not seen"
                self.note(name, Judgement("unknown", reason))
        if call.name == "lift_fresh":  # of numbers that Python gave
            self.sources.setdefault(_storage(tensors[0]), CONSTANT)
        source = max(map(self.source, tensors), default=CONSTANT)
        random = is_random(call)
        real = any(is_real(t) and self.source(t) == source for t in tensors)
        if source == WEIGHT:
            self.found.weighed.add(self.stack[-1])

        result = func(*args, **kwargs)
        outputs = [*tree_leaves(result), *_written(call)]
        made = [t for t in outputs if isinstance(t, Tensor)]
        if call.name in SIZES_ONLY:
            source = CONSTANT
        for tensor in made:
            key = _storage(tensor)
            self.sources[key] = max(source, self.sources.get(key, CONSTANT))
        judged = judge(call, made) if real else None
        self.signs.note(call, made)
        if random:
            self.note(name, RANDOM)
        elif result is not None and not made:
            if source == INPUT and self.function:
                self.read = True  # by torch itself, or for the caller: that function's result shows
            else:
                self.leaves(name, source)
        elif source == WEIGHT and judged is not None:
            trusted = self.trusted or self.stack[-1] in self.settled_by_rule
            if judged.status == "not analytic" or (judged.status == "unknown" and not trusted):
                self.note(name, judged)
        elif source == INPUT and any(map(is_real, made)) and judged is not None:
            self.note_input(name, judged)
        return result

    def note_input(self, name: str, judged: Judgement) -> None:
        """A function of inputs alone, and of frozen parameters."""
        if not self.frozen and judged.status == "not analytic":
            self.note(name, Judgement("unknown", _OF_INPUTS))

    def leaves(self, name: str, source: int) -> None:
        """Numbers are read by Python, which may choose its path by them."""
        if source == WEIGHT or (source == INPUT and not self.whole):
            self.note(name, _NUMBERS)


class _Operators(TorchDispatchMode):
    def __init__(self, seen_by: _Watch) -> None:
        super().__init__()
        self.seen_by = seen_by

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.is_inference_mode_enabled():  # composite operators arrive whole there
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunction():
            return self.seen_by.operator(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Gives the operators the name by which the user called them, and watches the ways out."""

    def __init__(self, seen_by: _Watch) -> None:
        super().__init__()
        self.seen_by = seen_by

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        seen_by, kwargs = self.seen_by, kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of an attribute
            name = getattr(func.__self__, "__name__", name)
        if name in _EXITS and args and isinstance(args[0], Tensor):
            seen_by.leaves(plain(name), seen_by.source(args[0]))
        before = seen_by.function, seen_by.trusted
        seen_by.function, seen_by.read = plain(name.split(".")[0]), False
        # torch writes it out as a root and a quotient, which stay off 0 for eps > 0
        eps = args[3] if len(args) > 3 else kwargs.get("eps")
        seen_by.trusted = func in (F.rms_norm, torch.rms_norm) and (eps is None or eps > 0)
        try:
            result = func(*args, **kwargs)
        finally:
            seen_by.function, seen_by.trusted = before
        if seen_by.read and not any(isinstance(t, Tensor) for t in tree_leaves(result)):
            seen_by.leaves(plain(name), INPUT)
        seen_by.read = False
        return result


def _by_rule(module: nn.Module) -> bool:
    judged = judge_module(module)
    return judged is not None and judged.status == "analytic"


def _storage(tensor: Tensor) -> StorageWeakRef:
    """The tensor's memory; its address is not used again while this is held."""
    return StorageWeakRef(tensor.untyped_storage())


def _written(call: Call) -> Iterator[Any]:
    """The arguments that the operator writes into."""
    for argument in call.operator._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(call.argument(argument.name))


def _python_random() -> Any:
    state: Any = numpy.random.get_state(legacy=True)
    return random.getstate(), state[1].tobytes(), state[2:]
