"""What is verified: a network, its distinct inputs, and the weights asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.hashing import describe_model, hash_tensors
from ..core.malloc import pages_kept
from ..core.messages import type_and_line
from ..core.seeds import stream_seed
from ..linalg.progress import Stage
from ..model.activations import ANALYTIC
from ..model.gate import Narrowed, Readers, overlap
from ..model.holding import trainable
from ..model.inputs import first_parameter
from ..model.layers import wide_chain
from ..model.network import Network
from ..model.probing import copy_model, eager, input_of, rows_into, untouched, unwrap
from .bounded import BoundedFeatures, Unbounded
from .certificate_file import VERSION
from .distinct import Inputs
from .kept import FeatureFiles
from .one_sided import OneSided, one_sided
from .running.features import Known, bounded_features

CHUNK = 8192  # samples
ONE_SIDED = "exact softplus, GELU, SiLU or Mish"
# Of a pass of the model over all samples; beyond it over a random part of them, FEW at least where
# four times as much allows it.
OPERATIONS, FEW = 4e10, 256


@dataclass
class Problem:
    """A float64 copy of the network in evaluation mode; the user's model is never touched.

    data: the inputs of all samples. inputs: batches [b, ...] of the n distinct ones, exact, as the
    model is fed; M has n rows, those of these inputs that count. ones: whether M has the column 1.
    changes: entries of the state dict (the model's dtype) that differ from the user's model.
    damped: whether `choose_backbone` (backbone.py) has put another backbone in; thin: where it has
    few channels (thinning.py), the batches computed at a time, else 0; all_channels: such a one is
    not tried. version: of the certificate file, for whose witness is made.
    """

    network: Network
    data: Inputs
    ones: bool
    changes: dict[str, Tensor] = field(default_factory=dict)
    damped: bool = False
    thin: int = 0
    all_channels: bool = False
    version: int = VERSION
    bounded: BoundedFeatures | None = None  # of all samples, as `features` found them last

    def __post_init__(self) -> None:
        """Copy the model; Unbounded where that fails, or where the copy does not run in float64."""
        self.inputs, self.n = self.data.representatives, self.data.distinct
        self.source = unwrap(self.network.model)
        self._names = {module: name for name, module in self.source.named_modules()}
        self.dtype = first_parameter(self.source).dtype
        try:
            self.model = copy_model(self.source).double().eval()
        except Exception as error:  # whatever a user's tensors raise
            raise Unbounded(
                f"the model cannot be copied in float64 ({type_and_line(error)})"
            ) from error
        self.last = self._twin(self.network.last.module)
        wide, analytic = self.network.wide, self.network.analytic
        self.wide = None if wide is None else self._twin(wide.linear)
        self.analytic = None if analytic is None else self._twin(analytic.linear)
        self.eps, self.narrowed = self._precision()
        self._plain: Tensor | None = None
        self._found: dict[nn.Module, BoundedFeatures] = {}  # of these weights, by the layer
        self._chosen: dict[Any, tuple[Any, ...]] = {}
        self.norms: dict[Any, Any] = {}  # of the copy's weights

    def _precision(self) -> tuple[float, str]:
        """eps of the coarsest type that float64 numbers pass through, and by which operator."""
        x = self.first(2)
        x = x.clone()
        try:
            with torch.no_grad(), eager(), Narrowed(x) as seen:
                self.model(x)
        except Exception as error:  # whatever a user's forward raises
            raise Unbounded(
                f"the model does not run in float64 ({type_and_line(error)})"
            ) from error
        own = self.inputs[0][:2].clone()
        own = own.to(self.dtype) if own.is_floating_point() else own
        with untouched(self.source), eager(), Narrowed(own, self.dtype) as narrow:
            self.source(own)
        if narrow.found:
            raise Unbounded(
                f"the model computes in {narrow.dtype} within {self.dtype} ({narrow.found[0]}), "
                "as under autocast: its own features are far from what is bounded"
            )
        return torch.finfo(seen.dtype).eps, f"{seen.found[0]} to {seen.dtype}" if seen.found else ""

    @cached_property
    def compared(self) -> int:
        """Samples on which the model itself is run beside its bounds: all, up to OPERATIONS."""
        x = self.first(2).clone()
        # gradients on: the counter fails on a module that is handed a parameter without
        with torch.enable_grad(), eager(), FlopCounterMode(display=False) as counter:
            self.model(x)
        affordable = int(OPERATIONS * len(x) // max(counter.get_total_flops(), 1))
        return max(min(self.data.n, max(affordable, min(FEW, 4 * affordable))), 1)

    def _twin(self, module: nn.Module) -> nn.Linear:
        return dict(self.model.named_modules())[self._names[module]]  # type: ignore[return-value]

    @property
    def columns(self) -> int:
        """Columns of M."""
        return self.network.width + self.ones

    @property
    def analytic_linear(self) -> nn.Linear:
        """`analytic`; Unbounded where the last hidden layer is no affine and analytic one."""
        if self.analytic is None:
            raise Unbounded("the last hidden layer is not affine, then an analytic activation")
        return self.analytic

    def activation(self, preactivations: Tensor) -> Tensor:
        """Of the last hidden layer, by its formula; Unbounded where there is none."""
        analytic = self.network.analytic
        if analytic is None:
            raise Unbounded("the last hidden layer is not affine, then an analytic activation")
        return ANALYTIC[type(analytic.activation)](analytic.activation, preactivations)

    @property
    def wide_name(self) -> str:
        """The last hidden layer's name in the model's own state dict."""
        if self.network.analytic is None:
            raise Unbounded("the last hidden layer is not affine, then an analytic activation")
        return self._names[self.network.analytic.linear]

    @property
    def one_sided(self) -> OneSided:
        """The last hidden layer's activation; Unbounded where it does not vanish on one side."""
        analytic = self.network.analytic
        found = None if analytic is None else one_sided(analytic.activation)
        if found is None:
            raise Unbounded(f"the last hidden layer is not affine, then {ONE_SIDED}")
        return found

    def constraint(self, *, witness: bool) -> str:
        """Why the wide layer's weights cannot be chosen at will, "" where they can.

        A witness chooses them, and separation says that a choice exists: neither would be true of
        weights that are shared, frozen or without bias. witness: whether only an activation that
        vanishes on one side will do.
        """
        own_wide, analytic = self.analytic, self.network.analytic
        useless = witness and analytic is not None and one_sided(analytic.activation) is None
        if own_wide is None or analytic is None or useless:
            kind = ONE_SIDED if witness else "a real analytic activation"
            return (
                f"there is no wide layer (affine + {kind}, neither parametrized nor with "
                "hooks or a replaced forward); tp.nn.widen(model, n) adds one"
            )
        wide = analytic.linear
        if wide.bias is None:
            return "the wide layer has no bias"
        own = [wide.weight, wide.bias]
        if overlap(*own) or any(torch._debug_has_internal_overlap(p) for p in own):
            return "the wide layer's weights share memory with each other"
        others = [p for m in self._names if m is not wide for p in m._parameters.values()]
        others += [b for m in self._names for b in m._buffers.values()]
        if any(overlap(p, q) for p in own for q in others if q is not None):
            return "the wide layer shares its weights with another layer"
        if not (trainable(wide, "weight") and trainable(wide, "bias")):
            return "the wide layer is frozen (requires_grad=False)"
        with torch.no_grad(), eager(), Readers(own_wide.parameters()) as readers:
            input_of(self.model, own_wide, self.first(2))
        x = self.inputs[0][:2]
        x = x.to(self.dtype) if x.is_floating_point() else x
        with untouched(self.source), Readers([wide.weight, wide.bias]) as source_readers:
            input_of(self.source, wide, x)  # what captured it still reads the original's
        readers.found += source_readers.found
        if readers.found:
            return f"the layers before it read the wide layer's weights ({readers.found[0]})"
        return ""

    def chain(self, first: nn.Module) -> list[nn.Module]:
        """The layers of the copy from `first` to the last one."""
        chain = self.chain_in(self.model)
        return chain[chain.index(first) :]

    def chain_in(self, model: nn.Module) -> list[nn.Module]:
        """The wide layer, its activation and the last one, or the last alone, in a model's copy."""
        last, wide = self.network.last, self.network.analytic
        chain = [last.module] if wide is None else wide_chain(self.source, wide, last)
        named = dict(model.named_modules())
        return [named[self._names[module]] for module in chain]

    @contextmanager
    def own_model(self) -> Iterator[nn.Module]:
        """The user's own model, with the weights that were changed; they come back afterwards."""
        with untouched(self.source):
            state = self.source.state_dict()
            for name, value in self.changes.items():
                state[name].data.copy_(value)  # no version moves: a graph of the user's stays whole
            yield self.source

    def load(self, changes: dict[str, Tensor]) -> None:
        """Change weights of the copy; names as in the model's own state dict."""
        state = self.model.state_dict()
        with torch.no_grad():
            for name, value in changes.items():
                state[name].copy_(value)
        self.changes.update(changes)
        self._plain, self._found = None, {}

    def chosen(self, key: Any, choose: Callable[[], str]) -> str:
        """What `choose` loads, and says of it; features of it are kept for the next attempt.

        Of the user's own weights, once for each key.
        """
        if self.changes:
            return choose()
        if key in self._chosen:
            what, changes, self.damped, self.thin, found = self._chosen[key]
            self.load(changes)
            self._found = found
            return str(what)
        what = choose()
        self._chosen[key] = what, dict(self.changes), self.damped, self.thin, self._found
        return what

    def kept(self) -> Callable[[], None]:
        """What puts the weights of now back. (The copy is the user's model but for `changes`.)"""
        changes, was = dict(self.changes), (self.damped, self.thin)

        def back() -> None:
            own = self.source.state_dict()
            self.load({name: changes.get(name, own[name].detach()) for name in self.changes})
            self.changes, (self.damped, self.thin) = changes, was

        return back

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The weights that are changed within are put back: what follows is about the old ones."""
        back = self.kept()
        try:
            yield
        finally:
            back()

    def reinitialise(self, seed: int) -> None:
        """Default initialisation under the seed; running statistics and frozen weights stay."""
        fresh = copy_model(self.source)
        buffers = {name: b.clone() for name, b in fresh.named_buffers()}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(stream_seed(seed, "init"))
            for module in fresh.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            for name, buffer in fresh.named_buffers():
                buffer.copy_(buffers[name])
        free = {
            f"{path}.{name}".lstrip(".")
            for path, module in self.source.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if trainable(module, name)
        }
        self.load({name: p.detach() for name, p in fresh.named_parameters() if name in free})

    def _fed(self, count: int | None) -> list[Tensor]:
        """The first `count` distinct inputs (all by default) as they are, in batches."""
        parts, left = [], len(self.data.first) if count is None else count
        for x in self.inputs:
            if left <= 0:
                break
            parts.append(x[:left])
            left -= len(x)
        return parts

    def batches(self, count: int | None = None) -> Iterator[Tensor]:
        """The same in float64: copies, as a forward may work in place on its input."""
        for part in self._fed(count):
            yield part.to(torch.float64, copy=True) if part.is_floating_point() else part

    def first(self, count: int) -> Tensor:
        """The first `count` distinct inputs, of the first batch at most, in float64."""
        return next(self.batches(count))

    def features(
        self, stop: nn.Module, stage: Stage, count: int | None = None, folder: Path | None = None
    ) -> BoundedFeatures:
        """Input of `stop` with error bounds, a row of M each; Unbounded where a layer has no rule.

        count: the first samples only. folder: keeps what is done, CHUNK samples a file, for a run
        that is killed; it belongs to one problem.
        """
        if count is None and stop in self._found:
            self.bounded = self._found[stop]
            stage.advance(len(self.bounded.z))
            return self.bounded
        known: dict[int, Known] = {}

        def compute(batches: list[Tensor], progress: Callable[[int], object]) -> BoundedFeatures:
            return bounded_features(
                self.model,
                self.chain(stop),
                batches,
                n=sum(map(len, batches)),
                progress=progress,
                norms=self.norms,
                known=known,
            )

        if folder is not None:
            compute = FeatureFiles(folder, self._content(stop), self.data.each, compute)
        n = sum(map(len, self._fed(count))) * self.data.each
        z = error = torch.empty(0)
        done, assumed, seconds = 0, [], 0.0
        with pages_kept():
            for batches in self._chunks(count, whole=folder is None):
                part = compute(batches, stage.advance)
                if len(part.z) == n:
                    z, error = part.z, part.error
                else:
                    if not done:
                        z, error = part.z.new_empty(n, part.z.shape[1]), part.error.new_empty(n)
                    rows = slice(done, done + len(part.z))
                    z[rows], error[rows] = part.z, part.error
                done, seconds = done + len(part.z), seconds + part.seconds
                assumed += [text for text in part.assumptions if text not in assumed]
        if (places := self.data.places) is not None:
            places = places[places < len(z)]
            z, error = z[places], error[places]
        found = BoundedFeatures(z, error, assumed, seconds)
        if not bool((found.z.isfinite().all(1) & found.error.isfinite()).all()):
            raise Unbounded("the features hold NaN or infinity")
        if count is None:
            self.bounded = self._found[stop] = found
        return found

    def _chunks(self, count: int | None, *, whole: bool) -> Iterator[list[Tensor]]:
        """The first `count` distinct inputs as they are: CHUNK of them at a time, or all."""
        batches, times = self._fed(count), max(self.thin, 1)
        chunk: list[Tensor] = []
        for k in range(0, len(batches), times):
            some = batches[k : k + times]
            chunk.append(torch.cat(some) if len(some) > 1 else some[0])
            if not whole and sum(map(len, chunk)) >= CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _content(self, stop: nn.Module) -> str:
        """All that features follow from, but the samples."""
        layer = next(name for name, module in self.model.named_modules() if module is stop)
        state = hash_tensors(list(self.model.state_dict().values()))
        return f"{state} {describe_model(self.source)} {layer}"

    @torch.no_grad()
    def plain_features(self) -> Tensor:
        """h [n, m_H] in float64 without error bounds, for any model."""
        if self._plain is not None:
            return self._plain
        h = None
        done = seen = 0
        for x in self.batches():
            with eager():
                rows = rows_into(self.model, [self.last], x).flatten(1)
            if (places := self.data.places) is not None:
                own = places - seen * self.data.each
                rows = rows[own[(own >= 0) & (own < len(rows))]]
            h = rows.new_empty(self.n, rows.shape[1]) if h is None else h
            h[done : done + len(rows)] = rows
            done, seen = done + len(rows), seen + len(x)
        if h is None:
            raise ValueError("x: expected at least one sample")
        self._plain = h
        return h
