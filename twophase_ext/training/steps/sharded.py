"""The second phase on several processes: each rank holds some columns of h and of the last layer.

Rows would need the sum of the last layer's gradient, [k, m_H], at every step. Columns need the sum
of the logits, [batch, k]: each rank adds what its features give, and updates its own weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ... import ops, optim
from ...model.losses import ConvexLoss
from ...model.network import Network
from ..data.samples import BATCH, Samples
from ..distributed.ranks import Ranks
from ..features.cache import Features
from .last_layer import LastLayerStep

# Their update of an element depends on nothing but that element's gradients.
ELEMENTWISE = (
    optim.SGD,
    torch.optim.SGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model that several processes do not train."""
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        raise ValueError(f"model: expected the module itself, got it in {type(model).__name__}")
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "model: expected no SyncBatchNorm, whose layers wait for each other where each rank "
            "passes its own batches; leave BatchNorm as it is"
        )


def check_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for hooks on gradients, which would see one rank's part of them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        raise ValueError("optimizer: expected no hooks on gradients on several processes")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer that cannot step each rank's columns by themselves."""
    kind = type(optimizer)
    if kind not in ELEMENTWISE:
        names = ", ".join(sorted({k.__name__ for k in ELEMENTWISE}))
        raise ValueError(
            f"optimizer: expected one of {names} for the second phase on several processes, each "
            f"of which updates its own columns of the last layer, got {kind.__name__}"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(
            "optimizer: expected no hooks on steps in the second phase on several processes, which "
            "would see one rank's columns"
        )


class ShardedFeatures(Features):
    """This rank's columns of h, for all samples; with mode "backbone" z whole, as it is small.

    Each rank passes every size-th batch through the network. `batch` gives its own columns of h,
    `outputs` and `in_order` what all of them make together.
    """

    def __init__(
        self,
        samples: Samples,
        network: Network,
        mode: str,
        on_batch: Any,
        copies: int | None,
        ranks: Ranks,
    ) -> None:
        """As of Features; mode: not "none"."""
        self.ranks, self.own = ranks, ranks.shard(network.width)
        super().__init__(samples, network, mode, on_batch, copies)

    def _computed(self, copies: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        ranks, network = self.ranks, self.network
        compact = self.mode == "backbone" or network.wide is not None
        function = network.backbone if compact else network.hidden
        jobs = [(copy, *batch) for copy in range(self.copies) for batch in self._batches()]
        like: list[tuple[torch.Size, torch.dtype]] | None = None
        for first in range(0, len(jobs), ranks.size):
            mine = None
            if first + ranks.rank < len(jobs):
                copy, start, end = jobs[first + ranks.rank]
                with self._as_copy(copy, copies):
                    x, y = self.samples.fetch(torch.arange(start, end, device="cpu"))
                mine = function(x), y
            if like is None:  # rank 0 always has the first batch
                shapes = [] if mine is None else [(t.shape[1:], t.dtype) for t in mine]
                like = ranks.all_gather_object(shapes)[0]
            for owner, (_, start, end) in enumerate(jobs[first : first + ranks.size]):
                rows, y = (
                    mine[i].contiguous()
                    if mine is not None and owner == ranks.rank
                    else torch.empty((end - start, *shape), dtype=dtype, device=self.samples.device)
                    for i, (shape, dtype) in enumerate(like)
                )
                ranks.broadcast(rows, owner)
                ranks.broadcast(y, owner)
                if self.mode != "backbone":
                    rows = self._widen(rows) if compact else rows[:, self.own]
                yield rows, y

    def _widen(self, z: Tensor) -> Tensor:
        """This rank's columns of h from z."""
        wide = self.network.wide_layer
        linear = wide.linear
        bias = None if linear.bias is None else linear.bias.detach()[self.own]
        return ops.softplus_(F.linear(z, linear.weight.detach()[self.own], bias), wide.beta)

    def _h(self, rows: Tensor) -> Tensor:
        return self._widen(rows) if self.mode == "backbone" else super()._h(rows)

    def own_blocks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (own columns of h, y) of `size` in index order, of all copies."""
        return super().in_order(size)

    def in_order(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (h, y): the columns of all ranks put together, block by block."""
        for h, y in self.own_blocks(size):
            yield self.ranks.columns(h, self.network.width), y

    @torch.no_grad()
    def outputs(self, network: Network, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As of Features, on every rank."""
        layer = network.last.module
        weight = layer.weight.detach()[:, self.own].contiguous()
        bias = None if layer.bias is None else layer.bias.detach()
        for h, y in self.own_blocks(size):
            yield (
                self.logits(weight, bias, h, torch.arange(len(h), device="cpu")).to(weight.dtype),
                y,
            )

    def logits(self, weight: Tensor, bias: Tensor | None, h: Tensor, index: Tensor) -> Tensor:
        """Float64 logits of all columns, from this rank's of weight and of the rows h[index]."""
        logits = self.ranks.all_reduce_(_logits(weight, h, index))
        return logits if bias is None else logits + bias

    @torch.no_grad()
    def gradient(self, layer: nn.Linear, loss: ConvexLoss) -> tuple[float, Tensor, Tensor]:
        """(mean loss, its gradient by the weight [k, m_H], by the bias [k]) over all rows."""
        weight = layer.weight.detach()[:, self.own].contiguous()
        bias = None if layer.bias is None else layer.bias.detach()
        targets = torch.cat([y for _, y in self.own_blocks(BATCH)])
        partial = [
            _logits(weight, h, torch.arange(len(h), device="cpu"))
            for h, _ in self.own_blocks(BATCH)
        ]
        logits = self.ranks.all_reduce_(torch.cat(partial))
        logits = logits if bias is None else logits + bias
        value, delta = _loss_and_delta(loss, logits, targets)
        total = weight.new_zeros(weight.shape, dtype=torch.float64)
        for (h, _), part in zip(self.own_blocks(BATCH), delta.split(BATCH), strict=True):
            total += part.to(weight.dtype).T @ h
        by_weight = self.ranks.columns(total.to(weight.dtype), self.network.width)
        return float(value), by_weight, delta.sum(0).to(weight.dtype)


def cached(
    samples: Samples, network: Network, mode: str, on_batch: Any, copies: int | None, ranks: Ranks
) -> Features:
    """The features of `samples`: whole in one process, columns on several."""
    if ranks.size == 1:
        return Features(samples, network, mode, on_batch, copies)
    return ShardedFeatures(samples, network, mode, on_batch, copies, ranks)


def _logits(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """h[index] @ weight^T, float64."""
    if weight.is_cuda:
        return (h[index.to(h.device)].to(weight.dtype) @ weight.T).double()
    return ops.last_layer_logits(weight, h, index)


def _loss_and_delta(loss: ConvexLoss, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean loss, its derivative by the logits) in float64."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        value = loss(logits, y.double() if y.is_floating_point() else y)
        (delta,) = torch.autograd.grad(value, logits)
    return value.detach(), delta


class OwnShard:
    """Within it the layer's weight, and what the optimizer keeps of it, are this rank's columns.

    Afterwards they are whole and the same everywhere; after an error, as they were before.
    """

    def __init__(self, layer: nn.Linear, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        """layer: the last one; optimizer: of `ELEMENTWISE`, with or without state."""
        self.weight, self.optimizer, self.ranks = layer.weight, optimizer, ranks
        self.whole_weight = layer.weight.data
        self.own = ranks.shard(self.whole_weight.shape[1])
        self.kept: dict[str, Tensor] = {}

    def __enter__(self) -> "OwnShard":
        """Keep the columns alone."""
        self.kept = self._state()
        self._set(
            self.whole_weight[:, self.own].contiguous(),
            {key: value[:, self.own].contiguous() for key, value in self.kept.items()},
        )
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Put the columns of all ranks together."""
        if kind is not None:
            self._set(self.whole_weight, self.kept)
            return
        total = self.whole_weight.shape[1]
        try:
            whole = self.ranks.columns(self.weight.data, total)
            state = {key: self.ranks.columns(v, total) for key, v in self._state().items()}
        except BaseException:
            self._set(self.whole_weight, self.kept)
            raise
        self._set(self.whole_weight.copy_(whole), state)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it they are whole, for a checkpoint."""
        self.__exit__(None)
        yield
        self.__enter__()

    def _state(self) -> dict[str, Tensor]:
        """The optimizer's tensors that have an element for each of the weight's."""
        state, shape = self.optimizer.state.get(self.weight, {}), self.weight.shape
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == shape}

    def _set(self, weight: Tensor, state: dict[str, Tensor]) -> None:
        self.weight.grad, self.weight.data = None, weight
        if state:
            self.optimizer.state[self.weight].update(state)


class ShardedStep(LastLayerStep):
    """LastLayerStep on this rank's columns, within `OwnShard`."""

    def __init__(
        self, layer: nn.Linear, loss: ConvexLoss, optimizer: torch.optim.Optimizer
    ) -> None:
        """As of LastLayerStep; ValueError for an optimizer that cannot."""
        check_hooks(optimizer)
        check_optimizer(optimizer)
        super().__init__(layer, loss, optimizer)

    def run(
        self,
        features: Features,
        order: Tensor,
        bounds: Sequence[int],
        rates: Sequence[float] | None = None,
        on_batch: Any = None,
    ) -> list[float]:
        """As of LastLayerStep; features: `ShardedFeatures`."""
        if not isinstance(features, ShardedFeatures):
            raise TypeError(f"features: expected a rank's columns, got {type(features).__name__}")
        weight, losses = self.layer.weight.detach(), []
        group = None if weight.is_cuda else self.group
        for s, (begin, end) in enumerate(pairwise(bounds)):
            index, rate = order[begin:end], None if rates is None else rates[s]
            if features.hidden is not None and group is not None:
                rows = features.rows(index)
                h, targets = features.hidden
                y = targets.index_select(0, rows)
            else:
                h, y = features.batch(index)
                rows = torch.arange(len(y), device="cpu")
            logits = features.logits(weight, None, h, rows)
            if group is not None:
                state = self._state(group)
                rule = self._rule(group, group["lr"] if rate is None else rate)
                losses.append(ops.last_layer_update_(*state, h, rows, logits, y, **rule))
            else:
                losses.append(self._by_gradient(h, logits, y, rate))
        return torch.stack(losses).tolist()

    def _by_gradient(self, h: Tensor, logits: Tensor, y: Tensor, rate: float | None) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        value, delta = _loss_and_delta(self.loss, logits if bias is None else logits + bias, y)
        self.optimizer.zero_grad(set_to_none=True)
        weight.grad = delta.to(weight.dtype).T @ h
        if bias is not None and bias.requires_grad:
            bias.grad = delta.sum(0).to(bias.dtype)
        self.optimizer.step()
        return value
