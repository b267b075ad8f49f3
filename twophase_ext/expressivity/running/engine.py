"""A model runs, and every operator that it applies carries a bound of its error along.

A TorchDispatchMode sees the operators below autograd, whatever Python made them of: control flow,
hooks, functional calls, wrappers. Each is done as it comes, then its rule (rules.py) says how far
off the result may be, by sample. An operator without a rule, one that brings samples together,
draws numbers, decides by rounded ones or writes into the model's state ends it, by name.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ...core.messages import type_and_line
from ...linalg.bounds import SLACK, UNDERFLOW
from ..bounded import Bounded, Unbounded, refuse
from .notes import ALL, Note, Notes, laid_out, sample_dim, shortest
from .operand import Operand
from .rules import MOVES, RULES, Call, Result

_FLOATS = (torch.float64, torch.float32)
_EXACT = {
    *("zeros", "ones", "empty", "full", "eye", "scalar_tensor", "lift_fresh_copy"),
    *("empty_strided", "tensor"),
}
# in place, but of a tensor's shape and strides alone
_SHAPES = {
    f"aten::{name}_" for name in ("transpose", "t", "squeeze", "unsqueeze", "as_strided", "detach")
}


class Running(TorchDispatchMode):
    """One pass of a model over a batch. trace: what it did, but for the numbers of the samples."""

    def __init__(self, model: nn.Module, norms: dict[Any, Any]) -> None:
        """norms: of the model's weights, kept from pass to pass."""
        super().__init__()
        self.notes, self.norms = Notes(), norms
        self.samples = 0
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.assumed: set[str] = set()
        self.failed = ""
        self._trace = hashlib.sha256()
        state = [*model.parameters(), *model.buffers()]
        self._state = {t.untyped_storage()._cdata for t in state}
        self._made: set[int] = set()  # constants that were made under the eyes of this mode

    @property
    def trace(self) -> str:
        """Equal for two passes that did the same with other samples."""
        return self._trace.hexdigest()

    def enter(self, x: Tensor) -> None:
        """x [b, ...] is what the samples are: exact."""
        self.samples = len(x)
        ids = torch.arange(len(x))
        error = torch.zeros(len(x), dtype=torch.float64)
        self.notes.write(x, laid_out(x, 0, ids, error))

    def bounded(self, value: Tensor) -> Bounded:
        """A tensor [b, d] of this pass, with its error by sample."""
        if self.failed:
            return refuse(self.failed)
        note = self.notes.checked(value)
        if note is None or note.ids is None:
            return refuse("stop: its input does not depend on the data")
        operand = self.operand(value)
        if operand.dim != 0 and self.samples > 1:
            refuse("stop: its input has the samples in another dimension")
        if self.samples > 1 and not torch.equal(operand.ids, torch.arange(self.samples)):  # type: ignore[arg-type]
            refuse("stop: its input does not have a row for each sample, in their order")
        if note.huge:
            refuse("stop: its input may hold masks")
        return Bounded(value, operand.error)

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor with what is known of it."""
        note = self.notes.checked(tensor)
        if note is None:
            return Operand(tensor, None, None, torch.zeros(1, dtype=torch.float64), self.samples)
        if note.ids is None:
            return Operand(tensor, None, None, note.error, self.samples, note.huge)
        dim, ids = sample_dim(tensor, note)
        if dim is None and self.samples > 1:
            refuse("it takes one sample of a batch")
        return Operand(tensor, dim, ids, note.error, self.samples, note.huge)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module is called, for messages."""

        def before(module: nn.Module, *_: Any) -> None:
            self.stack.append(self.names.get(module, type(module).__name__))

        def after(*_: Any) -> None:
            self.stack.pop()

        register = nn.modules.module
        handles = [
            register.register_module_forward_pre_hook(before),
            register.register_module_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- the mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do the operator and note what it makes."""
        try:
            return self._dispatch(func, args, kwargs or {})
        except Unbounded as error:
            where = f"{self.stack[-1]}: " if self.stack and self.stack[-1] else ""
            reason = f"{where}{func._schema.name.split('::')[-1]}: {error}"
            self.failed = self.failed or reason  # a forward may catch it and go on
            raise Unbounded(reason) from None

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        given, _ = tree_flatten((args, kwargs))
        tensors = [a for a in given if isinstance(a, Tensor)]
        if any(t.layout is not torch.strided for t in tensors):
            refuse("no rule for tensors that are not dense")
        self._record(name, given)
        if torch.Tag.nondeterministic_seeded in func.tags and name not in MOVES:
            refuse("it draws random numbers")
        before = {t.untyped_storage()._cdata for t in tensors}
        written = [] if name in _SHAPES else _written(func, args, kwargs)
        for tensor in written:
            if tensor.untyped_storage()._cdata in self._state:
                refuse("it writes into a parameter or buffer")
        if written:
            return self._in_place(func, args, kwargs, written, tensors)
        out = func(*args, **kwargs)
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        fresh = [t for t in results if t.untyped_storage()._cdata not in before]
        if not fresh:
            if not results and any(self._depends(t) for t in tensors):
                refuse("it decides by what the samples are")
            if not results and any(not self.operand(t).exact for t in tensors):
                refuse("it makes a plain number of one that is rounded")
            if any(r.dtype not in {t.dtype for t in tensors} for r in results):
                refuse("it reads numbers as of another type")
            return out  # views: the storage's note is theirs
        self._note(func, args, kwargs, tensors, fresh)
        return out

    def _note(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], fresh: list[Tensor]
    ) -> None:
        name = func._schema.name
        if not tensors or name == "aten::lift_fresh_copy":
            for t in fresh:
                self._made.add(t.untyped_storage()._cdata)
                self.notes.write(t, Note(_factory_error(name, t)))
            return
        base = name.removeprefix("aten::")
        rule = RULES.get(base)
        if rule is None:
            if not any(self._depends(t) for t in tensors) and not any(
                t.is_floating_point() for t in [*tensors, *fresh]
            ):
                for t in fresh:  # integers of constants are exact
                    self.notes.write(t, Note(torch.zeros(1, dtype=torch.float64)))
                return
            raise Unbounded("no rule for its error")
        results = self._ruled(rule, Call(self, func, args, kwargs, fresh))
        if {id(result.value) for result in results} < {id(t) for t in fresh if t.numel()}:
            raise Unbounded("no rule for all that it makes")
        for result in results:
            self._write(result)

    @staticmethod
    def _ruled(rule: Callable[[Call], list[Result]], call: Call) -> list[Result]:
        try:
            return rule(call)
        except Unbounded:
            raise
        except Exception as error:  # whatever a shape that no rule foresees raises
            raise Unbounded(f"its rule fails ({type_and_line(error)})") from error

    def _write(self, result: Result) -> None:
        value, error = result.value, result.error
        if value.is_floating_point() and value.dtype not in _FLOATS:
            refuse(f"no rule for numbers of {value.dtype}")
        if value.is_complex():
            refuse("no rule for complex numbers")
        if not value.is_floating_point() and bool(error.any()):
            error = torch.full_like(error, torch.inf)  # it hangs on how numbers were rounded
        error = _with_underflow(error, value)
        if result.ids is None:
            self.notes.write(value, Note(error, huge=result.huge))
        elif result.dim is None:
            self.notes.write(value, Note(error, ALL, result.ids, result.huge))
        else:
            self.notes.write(value, laid_out(value, result.dim, result.ids, error, result.huge))

    def _in_place(
        self, func: Any, args: Any, kwargs: Any, written: list[Tensor], tensors: list[Tensor]
    ) -> Any:
        """As the operator that makes a new tensor, then written through the view."""
        if len(written) > 1:
            refuse("no rule for what it writes")
        target = written[0]
        known = self.notes.checked(target)
        base = func._schema.name.removeprefix("aten::").removesuffix("_")
        rule = RULES.get(base)
        others = [t for t in tensors if t is not target]
        # what lies in the same storage is read by the rule as it was
        own = target.untyped_storage()._cdata
        old = {id(t): t for t in tensors if t.untyped_storage()._cdata == own}
        if any(_partly_same(t, target) for t in old.values()):
            refuse("it writes over numbers that it reads in another place")
        if rule is not None and known is not None:
            old = {key: self._kept(t, known) for key, t in old.items()}
        out = func(*args, **kwargs)
        if known is None and not any(self._depends(t) or self.notes.of(t) for t in others):
            if target.untyped_storage()._cdata not in self._made:
                refuse("it writes into a tensor that was there before")
            return out
        if rule is None:
            raise Unbounded("no rule for its error")
        call = Call(self, func, args, kwargs, [target])
        call.swap(old)
        (result,) = self._ruled(rule, call)
        self._merge(target, result, known)
        return out

    def _kept(self, tensor: Tensor, known: Note) -> Tensor:
        """A copy of a tensor, of whose storage this is known, with a note of its own."""
        copy = tensor.clone()
        operand = self.operand(tensor)
        if operand.dim is not None and operand.ids is not None:
            note = laid_out(copy, operand.dim, operand.ids, operand.error, known.huge)
        else:
            note = Note(operand.error, ALL, operand.ids, known.huge)
        self.notes.write(copy, note)
        return copy

    def _merge(self, target: Tensor, result: Result, known: Note | None) -> None:
        """Of the storage of which `target`, a part or all, was written."""
        error, huge = _with_underflow(result.error, target), result.huge
        storage = target.untyped_storage()
        whole = target.numel() * target.element_size() >= storage.nbytes()
        if result.ids is None:
            if known is not None and known.ids is not None:
                error = error.expand(self.samples)
                note = Note(error, known.unit, known.ids, huge)
            else:
                note = Note(error, huge=huge)
        elif result.dim is None:
            note = Note(error, ALL, result.ids, huge)
        else:
            stride = target.stride(result.dim)
            note = Note(error, stride, shortest(result.ids), huge)
            dim, ids = sample_dim(target, note)
            if dim != result.dim or not torch.equal(ids, result.ids):
                refuse("it writes the samples as no rule expects")
            if known is not None and known.ids is not None:
                same = sample_dim(target, known)
                if same[0] != dim or not torch.equal(same[1], ids):
                    refuse("it writes one sample over another")
                note = Note(error, known.unit, known.ids, huge)
            elif not whole and not _regular(target, result.dim):
                refuse("it writes the samples as no rule expects")
        if not whole and known is not None:
            rest = known.error
            note = Note(
                (note.error.square() + rest.square()).sqrt() * SLACK,
                note.unit,
                note.ids,
                note.huge or known.huge,
            )
        if not target.is_floating_point() and bool(note.error.any()):
            note = Note(torch.full_like(note.error, torch.inf), note.unit, note.ids)
        self.notes.write(target, note)

    # --- what a pass did

    def _depends(self, tensor: Tensor) -> bool:
        note = self.notes.of(tensor)
        return note is not None and note.ids is not None

    def _record(self, name: str, given: list[Any]) -> None:
        """Into the trace: the operator, plain arguments, constants that nobody saw being made."""
        found = [name]
        for value in given:
            if not isinstance(value, Tensor):
                found.append(repr(value))
                continue
            found.append(f"{value.dtype} {list(value.shape)}")
            key = value.untyped_storage()._cdata
            if self.notes.of(value) is None and key not in self._state and value.numel():
                found.append(hashlib.sha256(_bytes(value)).hexdigest())
        self._trace.update("\0".join(found).encode())


def _with_underflow(error: Tensor, value: Tensor) -> Tensor:
    """With what may vanish below the type's range, where anything was rounded."""
    if not bool(error.any()):
        return error
    lost = UNDERFLOW
    if value.dtype == torch.float32:
        lost += 2.0**-120 * math.sqrt(value.numel())
    return error * SLACK + lost


def _factory_error(name: str, made: Tensor) -> Tensor:
    """Of a constant that an operator makes of nothing: start + i step is rounded, others not."""
    base = name.removeprefix("aten::")
    if not made.is_floating_point() or base in _EXACT:
        return torch.zeros(1, dtype=torch.float64)
    if base not in ("arange", "linspace"):
        raise Unbounded("no rule for what it makes")
    norm = float(torch.linalg.vector_norm(made.double()))
    largest = float(made.abs().max()) if made.numel() else 0.0
    size = 8 * torch.finfo(made.dtype).eps * (norm + math.sqrt(made.numel()) * largest)
    return torch.full((1,), size * SLACK, dtype=torch.float64)


def _bytes(value: Tensor) -> bytes:
    with torch._C._DisableTorchDispatch():
        return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found = []
    for k, argument in enumerate(func._schema.arguments):
        info = argument.alias_info
        value = args[k] if k < len(args) else kwargs.get(argument.name)
        if info is not None and info.is_write and value is not None:
            found += [value] if isinstance(value, Tensor) else list(value)
    return found


def _partly_same(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage show a number in common, and not all in the same places."""
    place = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (a, b)]
    if place[0] == place[1]:
        return False
    if a.dtype != b.dtype:
        return True
    numbers = torch.arange(a.untyped_storage().nbytes() // a.element_size())
    shown = [numbers.as_strided(t.shape, t.stride(), t.storage_offset()).flatten() for t in (a, b)]
    return bool(torch.isin(shown[0], shown[1]).any())


def _regular(target: Tensor, dim: int) -> bool:
    """Whether samples, along dim of this part of a storage, are the whole storage's as well."""
    storage = target.untyped_storage().nbytes() // target.element_size()
    stride, size = target.stride(dim), target.shape[dim]
    return stride > 0 and storage % (stride * size) == 0


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as the products that it is, not as one operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
