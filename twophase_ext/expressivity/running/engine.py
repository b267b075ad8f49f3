"""A model runs, and every operator that it applies carries a bound of its error along.

A TorchDispatchMode sees the operators below autograd, whatever Python made them of: control flow,
hooks, functional calls, wrappers. Each is done as it comes, then its rule (rules.py) says how far
off the result may be, by sample. An operator without a rule, one that brings samples together,
draws numbers, decides by rounded ones or writes into the model's state ends it, by name.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ..bounded import CONSTANTS, LIFTED, Bounded, Lost, Refused, Unbounded, refuse
from ..operator_norms import convolve
from .moves import EXACT, MOVES
from .notes import ALL, Note, Notes, laid_out, sample_dim
from .operand import Operand
from .products import affine_map
from .rules import RULES, Call, Result
from .skipping import geometry, skip
from .tape import Step, Tape
from .thin import TOUCHED, thinned, whole
from .trace import Trace
from .untouched import Untouched, available
from .writes import holds_huge, ruled, with_underflow, write_through, written_by

_FLOATS = (torch.float64, torch.float32)
# in place, but of a tensor's shape and strides alone
_SHAPES = {
    f"aten::{name}_" for name in ("transpose", "t", "squeeze", "unsqueeze", "as_strided", "detach")
}


class Running(TorchDispatchMode):
    """One pass of a model over a batch.

    tape: its steps. trace: what it did, whatever the samples are.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: dict[Any, Any],
        skipped: Mapping[int, Step] | None = None,
        *,
        lift: bool = True,
        thin: bool = False,
        pruned: dict[str, Tensor] | None = None,
    ) -> None:
        """norms: of the model's weights, kept from pass to pass. lift: whether what is cast to
        float32 stays in float64, as real arithmetic knows no casts.

        skipped: steps that need not be computed, by an earlier pass's tape. Without it the pass
        goes on where a rule is missing: the numbers are lost, which may not matter in the end.
        thin: whether channels that are constant are left out (thin.py). pruned: as of `live_part`.
        """
        super().__init__()
        self.notes, self.norms = Notes(), norms
        self.samples = 0
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.assumed: set[str] = set()
        self.failed = ""
        state = [*model.parameters(), *model.buffers()]
        self._state = {t.untyped_storage()._cdata for t in state}
        self.weights = {
            p.untyped_storage()._cdata: name for name, p in reversed([*model.named_parameters()])
        }
        self.fresh: set[int] = set()  # constants that were made under the eyes of this mode
        self.trace = Trace()
        self.tape, self._index, self._skipped = Tape(), -1, skipped or {}
        self._lenient, self._lift, self.pruned = skipped is None, lift, pruned
        self._thin, self.untouched = thin and available(), Untouched()
        self._device = torch.device("cpu")
        self._there: AbstractContextManager[Any] = nullcontext()

    def _seen(self, tensor: Tensor) -> bool:
        own = tensor.untyped_storage()._cdata in self._state
        return own or self.notes.of(tensor) is not None

    def enter(self, x: Tensor, error: Tensor | None = None) -> None:
        """x [b, ...] is what the samples are: exact, or off by error [b]."""
        self.samples = len(x)
        self._device = x.device
        self._thin = self._thin and x.device.type == "cpu"
        if x.device != torch.get_default_device():
            self._there = x.device  # a context: what rules make lies there
        with self._there:
            ids = torch.arange(len(x))
            error = torch.zeros(len(x), dtype=torch.float64) if error is None else error
            self.notes.write(x, laid_out(x, 0, ids, error))

    def bounded(self, value: Tensor) -> Bounded:
        """A tensor [rows, d] of this pass, with its error by row: that of all of its sample's."""
        if self.failed:
            return refuse(self.failed)
        with self._there:
            whole(self, value)
            note = self.notes.checked(value)
            if note is not None and note.lost:
                raise Lost(note.lost)
            if note is None or note.ids is None:
                return refuse("stop: its input does not depend on the data")
            operand = self.operand(value)
            if operand.ids is None or (operand.dim != 0 and self.samples > 1):
                return refuse("stop: its input has the samples in another dimension")
            each = len(value) // self.samples
            ids = torch.arange(self.samples).repeat_interleave(each)
            if len(ids) != len(value) or (len(ids) > each and not torch.equal(operand.ids, ids)):
                refuse("stop: its input does not have the rows of each sample, in their order")
            if note.huge:
                refuse("stop: its input may hold masks")
            if not self.untouched.all_whole():
                refuse(TOUCHED)
        return Bounded(value, operand.error[ids])

    def skippable(self, value: Tensor) -> dict[int, Step]:
        """Steps that a further pass up to `value` need not compute."""
        steps = self.tape.steps
        dead = self.tape.dead(self.notes.token(value))
        return {k: s for k, s in steps.items() if k in dead or s.unread}

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor with what is known of it."""
        note = self.notes.checked(tensor)
        if note is None:
            return Operand(tensor, None, None, torch.zeros(1, dtype=torch.float64), self.samples)
        if note.lost:
            raise Lost(note.lost)
        if note.ids is None:
            return Operand(tensor, None, None, note.error, self.samples, note.huge)
        dim, ids = sample_dim(tensor, note.ids, note.unit)
        if dim is None and self.samples > 1:
            refuse("it takes one sample of a batch")
        return Operand(tensor, dim, ids, note.error, self.samples, note.huge, note.sizes)

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
            with self._there:
                return self._dispatch(func, args, kwargs or {})
        except Unbounded as error:
            reason = self._reason(func, error)
            self.failed = self.failed or reason  # a forward may catch it and go on
            raise Unbounded(reason) from None

    def _reason(self, func: Any, error: Unbounded) -> str:
        where = f"{self.stack[-1]}: " if self.stack and self.stack[-1] else ""
        return f"{where}{func._schema.name.split('::')[-1]}: {error}"

    def _lose(self, func: Any, made: list[Tensor], error: Unbounded) -> None:
        """Nothing is known of these; raise `error` again where nothing may be lost."""
        if not self._lenient or isinstance(error, Refused):
            raise error
        note = Note(torch.zeros(1), lost=_first(error) or self._reason(func, error))
        for tensor in made:
            self.notes.write(tensor, note)

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        given, _ = tree_flatten((args, kwargs))
        tensors = [a for a in given if isinstance(a, Tensor)]
        if any(t.layout is not torch.strided for t in tensors):
            refuse("no rule for tensors that are not dense")
        self.trace.add(name, given, self._seen)
        if torch.Tag.nondeterministic_seeded in func.tags and name not in MOVES:
            refuse("it draws random numbers")
        self._index += 1
        skipped = self._skipped.get(self._index)
        if self._thin and (skipped is None or skipped.unread):
            made = self._thinned(func, args, kwargs, tensors)
            if made is not None:
                return made
        if skipped is not None:
            return skip(self, skipped, func, args, kwargs, self._device)
        for tensor in () if func.is_view else tensors:
            whole(self, tensor)
        before = {t.untyped_storage()._cdata for t in tensors}
        reads = dict.fromkeys(self.notes.token(t) for t in tensors if self.depends(t))
        written = [] if name in _SHAPES else written_by(func, args, kwargs)
        for tensor in written:
            if tensor.untyped_storage()._cdata in self._state:
                refuse("it writes into a parameter or buffer")
        if written:
            out = written[0]
            try:
                out = write_through(self, func, args, kwargs, written, tensors)
            except Unbounded as error:
                self._lose(func, written, error)
            self._step(name, tuple(reads), written)
            return out
        out = self.compute(func, args, kwargs)
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        fresh = [t for t in results if t.untyped_storage()._cdata not in before]
        if not fresh:
            if not results:
                self._plain_number(tensors, out)
            if any(r.dtype not in {t.dtype for t in tensors} for r in results) and not any(
                note.lost or note.made for note in map(self.notes.of, results) if note
            ):
                refuse("it reads numbers as of another type")
            return out  # views: the storage's note is theirs
        try:
            self._note(func, args, kwargs, tensors, fresh)
        except Unbounded as error:
            self._lose(func, fresh, error)
        step = self._step(name, tuple(reads), fresh)
        if step is not None:
            step.in_place, step.whole = False, len(fresh) == len(results)
            step.made = tree_map(partial(geometry, self), out)
            self._affine(step, Call(self, func, args, kwargs, fresh))
        return out

    def _thinned(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        reads = dict.fromkeys(self.notes.token(t) for t in tensors if self.depends(t))
        try:
            out = thinned(self, func, args, kwargs)
        except Unbounded:
            return None  # as all of the tensor it may have a rule
        if out is None:
            return None
        made = out[0] if isinstance(out, tuple) else out
        step = self._step(func._schema.name, tuple(reads), [made])
        if step is not None and not any(made is t for t in tensors):
            step.in_place, step.made = False, tree_map(partial(geometry, self), out)
            self._affine(step, Call(self, func, args, kwargs, [made]))
        return out

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator itself; on a GPU a convolution as plain sums of products."""
        name = func._schema.name
        if name == "aten::convolution" and args[0].is_cuda:
            x, weight, bias, stride, padding, dilation, transposed, _, groups = args
            if transposed or weight.dim() != 4 or weight.dtype != torch.float64:
                refuse("on a GPU no rule but for 2-d convolutions in float64")
            sides = [(p, p) for p in padding]
            return convolve(x, weight, bias, stride, sides, dilation, groups).contiguous()
        if self._lift and name == "aten::_to_copy" and kwargs.get("dtype") == torch.float32:
            self.assumed.add(LIFTED)
            return func(*args, **{**kwargs, "dtype": torch.float64})
        return func(*args, **kwargs)

    def _plain_number(self, tensors: list[Tensor], out: Any) -> None:
        """What Python may decide by: of samples, exact numbers alone, the same in every pass."""
        samples = any(self.depends(t) for t in tensors)
        if samples and any(self.decides(t) for t in tensors):
            refuse("it decides by what the samples are")
        if any(not self.operand(t).exact for t in tensors):
            refuse("it makes a plain number of one that is rounded")
        if samples:
            self._pin(tensors, out)

    def _pin(self, tensors: list[Tensor], value: Any) -> None:
        """What was made of samples' numbers, and has to be the same in every pass."""
        self.trace.pin(value)
        self.tape.decided.update(self.notes.token(t) for t in tensors if self.depends(t))

    def decides(self, tensor: Tensor) -> bool:
        """Whether its numbers are samples' real numbers, or integers that hang on such."""
        note = self.notes.of(tensor)
        real = tensor.is_floating_point() or tensor.is_complex()
        return note is not None and (note.decided or (real and note.ids is not None))

    def _step(self, name: str, reads: tuple[int, ...], made: list[Tensor]) -> Step | None:
        """Onto the tape, where what is made hangs on the samples: a write in place."""
        if not any(self.depends(t) for t in made):
            return None
        writes = tuple(self.notes.token(t) for t in made)
        step = Step(name.removeprefix("aten::").removesuffix("_"), reads, writes)
        self.tape.steps[self._index] = step
        return step

    def _affine(self, step: Step, call: Call) -> None:
        found = affine_map(call)
        if found is None:
            return
        own = [found.weight, *([] if found.bias is None else [found.bias])]
        names = [self.weights.get(t.untyped_storage()._cdata) for t in own]
        step.weights = tuple(k for k in names if k is not None) if names[0] else ()
        if found.is_zero:
            step.unread = (self.notes.token(found.x),)

    def _note(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], fresh: list[Tensor]
    ) -> None:
        name = func._schema.name
        if not tensors or name == "aten::lift_fresh_copy" or all(map(self.is_made, tensors)):
            self.note_made(fresh, exact=name.removeprefix("aten::") in EXACT)
            return
        rule = RULES.get(name.removeprefix("aten::"))
        whole = not any(t.is_floating_point() or t.is_complex() for t in [*tensors, *fresh])
        if whole and not any(self.depends(t) for t in tensors):
            for t in fresh:  # integers of constants are exact
                self.notes.write(t, Note(torch.zeros(1, dtype=torch.float64)))
            return
        call = Call(self, func, args, kwargs, fresh)
        try:
            if rule is None:
                raise Unbounded("no rule for its error")
            results = ruled(rule, call)
            if {id(result.value) for result in results} < {id(t) for t in fresh if t.numel()}:
                raise Unbounded("no rule for all that it makes")
        except Unbounded:
            if not whole or any(self.decides(t) or not self.operand(t).exact for t in tensors):
                raise
            for t in fresh:  # of several samples, it may be: the same in every pass, or refused
                self._pin(tensors, t)
                self.notes.write(t, Note(torch.zeros(1, dtype=torch.float64)))
            return
        decides = any(self.decides(t) for t in tensors)
        for result in results:
            self._write(result, decides and not result.value.is_floating_point())

    def keep(self, result: Result) -> None:
        """Note what a rule said of a tensor that nobody else sees."""
        self._write(result, False, seen=False)

    def _write(self, result: Result, decided: bool, *, seen: bool = True) -> None:
        value, error = result.value, result.error
        if value.is_floating_point() and value.dtype not in _FLOATS:
            refuse(f"no rule for numbers of {value.dtype}")
        if value.is_complex():
            refuse("no rule for complex numbers")
        if not value.is_floating_point() and bool(error.any()):
            error = torch.full_like(error, torch.inf)  # it hangs on how numbers were rounded
        error = with_underflow(error, value)
        huge = result.huge and holds_huge(value)
        if result.ids is None or result.dim is None:
            note = Note(error, ALL, result.ids, huge)
        else:
            note = laid_out(value, result.dim, result.ids, error, huge)
        note = replace(note, decided=decided)
        if result.norm is not None and result.ids is not None:
            note.sizes["norm"] = result.norm
        self.notes.write(value, note, seen=seen)

    def is_made(self, tensor: Tensor) -> bool:
        """Whether its numbers are made of neither weights nor samples."""
        note = self.notes.of(tensor)
        if note is None:  # whole numbers of the model, or what Python brings to every pass
            real = tensor.is_floating_point() or tensor.is_complex()
            return not (real and tensor.untyped_storage()._cdata in self._state)
        return note.made and self.notes.checked(tensor) is not None

    def note_made(self, tensors: list[Tensor], *, exact: bool) -> None:
        """Constants of neither weights nor samples; exact: whether that says all about them."""
        for t in tensors:
            real = t.is_floating_point()
            self.fresh.add(t.untyped_storage()._cdata)
            huge = real and holds_huge(t)
            self.notes.write(t, Note(torch.zeros(1, dtype=torch.float64), huge=huge, made=True))
            if real and not exact:
                self.assumed.add(CONSTANTS)

    def depends(self, tensor: Tensor) -> bool:
        """Whether its storage holds samples' numbers."""
        note = self.notes.of(tensor)
        return note is not None and (note.ids is not None or bool(note.lost))


def _first(error: Unbounded) -> str:
    """Why an operand was lost, where that is what the rule stumbled over."""
    return str(error) if isinstance(error, Lost) else ""
