"""What is verified: a network, its inputs in index order, and the weights asked for."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..files import inside, write_atomically
from ..holding import trainable
from ..linalg.progress import Stage
from ..names import canonical_name
from ..network import Network
from ..probing import input_of, record, unwrap
from .forward_error import BoundedFeatures, Unbounded, bounded_features, damped
from .record import hash_tensors
from .witness import whiten

CHUNK = 8192  # samples
PILOT = 64  # samples that choose the backbone
# Factors of residual branches (beside a shortcut with weights, beside an identity), tried in order.
DAMPINGS = ((1.0, 1.0), (1.0, 0.0), (0.25, 0.0), (0.0, 0.0))


@dataclass
class Problem:
    """A float64 copy of the network in evaluation mode; the user's model is never touched.

    inputs: batches [b, ...] as the model is fed, exact. ones: whether M has the column 1.
    changes: entries of the state dict (the model's dtype) that differ from the user's model.
    damped: whether `choose_backbone` has put another backbone in.
    """

    network: Network
    inputs: list[Tensor]
    n: int
    ones: bool
    changes: dict[str, Tensor] = field(default_factory=dict)
    damped: bool = False

    def __post_init__(self) -> None:
        """Copy the model."""
        source = unwrap(self.network.model)
        # A forward pass without gradients first: torch.nn.utils.weight_norm keeps the weight of the
        # last training step with its graph, and deepcopy refuses such a tensor.
        parameter = next(source.parameters())
        first = self.inputs[0][:2]
        record(source, first.to(parameter.dtype) if first.is_floating_point() else first, ())
        self._names = {module: name for name, module in source.named_modules()}
        self.model = copy.deepcopy(source).double().eval()
        self.last = self._twin(self.network.last.module)
        wide = self.network.wide
        self.wide = None if wide is None else self._twin(wide.linear)
        self.dtype = parameter.dtype

    def _twin(self, module: nn.Module) -> nn.Linear:
        return dict(self.model.named_modules())[self._names[module]]  # type: ignore[return-value]

    @property
    def columns(self) -> int:
        """Columns of M."""
        return self.network.width + self.ones

    @property
    def wide_name(self) -> str:
        """The wide layer's name in the model's own state dict."""
        assert self.network.wide is not None
        return self._names[self.network.wide.linear]

    @property
    def beta(self) -> float:
        """Of the wide layer's softplus."""
        assert self.network.wide is not None
        return self.network.wide.beta

    def constraint(self) -> str:
        """Why the wide layer's weights cannot be chosen at will, "" where they can.

        A witness chooses them, and separation says that a choice exists: neither would be true of
        weights that are normalised, shared, frozen, without bias, or changed on the way by a hook.
        """
        if self.wide is None or self.network.wide is None:
            return (
                "there is no wide layer (affine + exact softplus); tp.nn.widen(model, n) adds one"
            )
        wide = self.network.wide.linear
        if wide.bias is None:
            return "the wide layer has no bias"
        if altered := self.altered():
            return altered
        own = [wide.weight, wide.bias]
        others = [p for m in self._names if m is not wide for p in m._parameters.values()]
        if any(p is q for p in own for q in others):
            return "the wide layer shares its weights with another layer"
        if not (trainable(wide, "weight") and trainable(wide, "bias")):
            return "the wide layer is frozen (requires_grad=False)"
        return ""

    def altered(self) -> str:
        """Why M may not be what the weights of the last layers say, "" where it is."""
        last: list[nn.Module] = [self.network.last.module]
        if self.network.wide is not None:
            activation = self.network.wide.activation_name
            last += [m for m, name in self._names.items() if canonical_name(name) == activation]
            last.append(self.network.wide.linear)
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        if any(is_parametrized(m) or any(getattr(m, h) for h in hooks) for m in last):
            return "the wide or the last layer is parametrized or has hooks"
        return ""

    def load(self, changes: dict[str, Tensor]) -> None:
        """Change weights of the copy; names as in the model's own state dict."""
        state = self.model.state_dict()
        with torch.no_grad():
            for name, value in changes.items():
                state[name].copy_(value)
        self.changes.update(changes)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The weights that are changed within are put back: what follows is about the old ones."""
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        changes, was_damped = dict(self.changes), self.damped
        try:
            yield
        finally:
            self.load(own)
            self.changes, self.damped = changes, was_damped

    def reinitialise(self, seed: int) -> None:
        """Default initialisation of every layer under the seed; running statistics stay."""
        from ..training.streams import stream_seed  # training imports this package

        fresh = copy.deepcopy(unwrap(self.network.model))
        buffers = {name: b.clone() for name, b in fresh.named_buffers()}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(stream_seed(seed, "init"))
            for module in fresh.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            for name, buffer in fresh.named_buffers():
                buffer.copy_(buffers[name])
        self.load({name: p.detach() for name, p in fresh.named_parameters()})

    def batches(self, count: int | None = None) -> list[Tensor]:
        """The first `count` inputs (all by default) in float64."""
        parts, left = [], self.n if count is None else count
        for x in self.inputs:
            if left <= 0:
                break
            parts.append(x[:left].double() if x.is_floating_point() else x[:left])
            left -= len(x)
        return parts

    def features(
        self, stop: nn.Module, stage: Stage, count: int | None = None, folder: Path | None = None
    ) -> BoundedFeatures:
        """Input of `stop` with error bounds; Unbounded where a layer has no rule.

        count: the first samples only. folder: keeps what is done, CHUNK samples a file, for a run
        that is killed; it belongs to one problem.
        """
        batches = self.batches(count)
        size = sum(map(len, batches))
        if folder is None:
            parts = [self._bounded(stop, batches, stage)]
        else:
            parts, chunk = [], []
            for k, batch in enumerate(batches, 1):
                chunk.append(batch)
                if sum(map(len, chunk)) >= CHUNK or k == len(batches):
                    # "auto" needs both backbones, each with files of its own
                    stem = "damped" if self.damped else "features"
                    path = inside(folder, f"{stem}{len(parts)}.pt")
                    parts.append(self._kept(stop, chunk, stage, path))
                    chunk = []
        found = BoundedFeatures(
            torch.cat([part.z for part in parts]),
            torch.cat([part.error for part in parts]),
            parts[0].assumptions,
            sum(part.seconds for part in parts),
        )
        assert len(found.z) == size
        if not bool((found.z.isfinite().all(1) & found.error.isfinite()).all()):
            raise Unbounded("the features hold NaN or infinity")
        return found

    def _bounded(self, stop: nn.Module, batches: list[Tensor], stage: Stage) -> BoundedFeatures:
        n = sum(map(len, batches))
        return bounded_features(self.model, stop, batches, n=n, progress=stage.advance)

    def _kept(
        self, stop: nn.Module, batches: list[Tensor], stage: Stage, path: Path
    ) -> BoundedFeatures:
        key = hash_tensors([*batches, *(v for v in self.model.state_dict().values())])
        if path.exists():
            found = _read_features(path, key, batches[0].device)
            stage.advance(len(found.z))
            return found
        found = self._bounded(stop, batches, stage)
        kept = {"key": key, "checksum": _checksum(found), **vars(found)}
        write_atomically(path, lambda file: torch.save(kept, file))
        return found

    @torch.no_grad()
    def plain_features(self) -> Tensor:
        """h [n, m_H] in float64 without error bounds, for any model."""
        h = None
        done = 0
        for x in self.batches():
            rows = input_of(self.model, self.last, x).flatten(1)
            h = rows.new_empty(self.n, rows.shape[1]) if h is None else h
            h[done : done + len(rows)] = rows
            done += len(rows)
        assert h is not None
        return h

    def choose_backbone(self, stage: Stage) -> str:
        """Damp residual branches where that resolves more directions of the features.

        A deep network's error bounds may exceed the spread of its features; a witness is free to
        choose a tamer one. Tried on the first PILOT samples; what resolves most wins, the model's
        own backbone on a tie. Returns what was chosen, for a person. Raises Unbounded.
        """
        assert self.wide is not None
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        best: tuple[int, str, dict[str, Tensor]] | None = None
        for factors in DAMPINGS:
            changes = damped(self.model, *factors)
            if factors != (1.0, 1.0) and not changes:
                continue
            with torch.no_grad():
                for name, value in changes.items():
                    self.model.state_dict()[name].copy_(value)
            found = self.features(self.wide, stage, PILOT)
            resolved = len(whiten(found.z, found.error, self.dtype).map)
            with torch.no_grad():
                for name in changes:
                    self.model.state_dict()[name].copy_(own[name])
            if best is None or resolved > best[0]:
                what = "residual branches times {:g} (beside an identity: {:g})".format(*factors)
                best = (resolved, what if changes else "the model's own", changes)
            if resolved >= min(len(found.z) - 1, found.z.shape[1]):
                break
        assert best is not None
        resolved, what, changes = best
        self.load({name: value.to(self.dtype) for name, value in changes.items()})
        self.damped = self.damped or bool(changes)
        return f"{what} ({resolved} directions resolved on {min(PILOT, self.n)} samples)"


def _checksum(found: BoundedFeatures) -> str:
    """Of everything that a proof is made from."""
    return hash_tensors([found.z, found.error]) + repr(found.assumptions)


def _read_features(path: Path, key: str, device: torch.device) -> BoundedFeatures:
    """A file of `Problem.features`; ValueError where it is damaged or of another problem."""
    try:
        state = torch.load(path, weights_only=True, map_location=device)
        theirs, checksum = state.pop("key"), state.pop("checksum")
        found = BoundedFeatures(**state)
        intact = checksum == _checksum(found)
    except Exception as error:  # torch raises many types for a damaged file
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"folder: {path} cannot be read: {first_line}") from error
    if theirs != key:
        raise ValueError(f"folder: {path} belongs to another problem; use another folder")
    if not intact:
        raise ValueError(f"folder: {path} has been changed since it was written (checksum)")
    return found
