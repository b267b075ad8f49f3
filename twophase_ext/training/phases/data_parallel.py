"""A step of the first phase on several processes: the batch cut in parts, one for each rank."""

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...core.seeds import stream_seed
from ..distributed.ranks import Ranks
from ..run import Run


def own_part(index: Tensor, ranks: Ranks, least: int) -> tuple[Tensor, float, int]:
    """(samples of the batch `index` that this rank takes, their share, rows of the shortest part).

    A part has at least `least` samples; a rank for which none is left takes some with share 0.
    """
    b = len(index)
    parts = max(1, min(ranks.size, b // least))
    first, last = (-(-b * min(r, parts) // parts) for r in (ranks.rank, ranks.rank + 1))
    rows = b // parts
    return index[first:last] if last > first else index[:rows], (last - first) / b, rows


class DataParallelStep:
    """The base algorithm's step on the mean loss of the whole batch, by DistributedDataParallel.

    The parts need not be of one length: each rank's loss is weighted by its share of the batch, so
    that DDP's mean over ranks is the gradient of the batch's mean loss. A rank without a part goes
    along with weight 0. Dropout draws from (seed, epoch, step, rank).
    """

    def __init__(self, run: Run) -> None:
        """Wraps the run's model; rank 0's parameters and buffers are copied to all ranks."""
        self.run = run
        self.model = DistributedDataParallel(
            run.context.base_step.forward,
            gradient_as_bucket_view=True,
            find_unused_parameters=self._some_unused(),
        )

    def _some_unused(self) -> bool:
        """Whether the loss does not depend on some parameter: DDP has to look for those."""
        run, model = self.run, self.run.context.network.model
        x, y = run.context.train.fetch(
            torch.arange(min(2, run.context.train.n), device="cpu"), augmented=False
        )
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.enable_grad():
            parameters = list(run.context.network.parameters().values())
            loss = run.context.loss(model(x), y)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for module, mode in modes.items():
            module.training = mode
        return any(grad is None for grad in grads)

    def _seed(self, seed: int) -> None:
        # torch.manual_seed keeps a stack trace for CUDA, which takes longer than a small step
        torch.default_generator.manual_seed(seed)
        if self.run.context.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step on the samples `index`: (mean loss before it, correct), over the batch."""
        run, ranks = self.run, self.run.context.ranks
        own, share, rows = own_part(index, ranks, run.context.base_step.least)
        x, y = run.context.train.fetch(own)
        self._seed(
            stream_seed(
                run.context.config.seed, "model", run.state.epoch, run.state.batch, ranks.rank
            )
        )
        with ranks.together():
            loss, outputs = run.context.base_step(
                x, y, forward=self.model, weight=share * ranks.size, rows=rows
            )
        correct = run.correct(outputs, y)
        sums = torch.stack([loss / ranks.size, torch.zeros_like(loss)])
        if correct is not None and share:
            sums[1] += correct
        ranks.all_reduce_(sums)
        return sums[0], None if correct is None else sums[1]
