"""The two phases in a training loop of your own, without the Trainer.

Each step of Algorithm 1 is one call: your optimizer up to tau, then `tp.perturb_`,
`tp.verify_expressivity`, the hidden layers' output computed once, and `tp.ops.last_layer_epoch_`
over it. With the Trainer's seeds, which `tp.stream_seed` gives, the weights are those of
`tp.Trainer`, bit for bit.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import twophase_ext as tp

LR, MOMENTUM, WEIGHT_DECAY, BATCH = 0.05, 0.9, 1e-5, 64


def digits(n: int) -> tuple[Tensor, Tensor]:
    """The first n of scikit-learn's digits, x [n, 64] in [0, 1] and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[:n] / 16, dtype=torch.float32), torch.tensor(labels[:n])


def network(n: int) -> tuple[nn.Module, tp.nn.WideHead]:
    """64 -> 32, and the head 32 -> ceil(1.1 n) -> 10, with exact softplus."""
    backbone = nn.Sequential(nn.Linear(64, 32), tp.nn.Softplus())
    return backbone, tp.nn.WideHead(32, tp.nn.wide_units(n), 10)


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order in which an epoch visits the n samples, int64 [n]."""
    generator = torch.Generator().manual_seed(tp.stream_seed(seed, "shuffle", epoch))
    return torch.randperm(n, generator=generator)


def main(
    n: int = 400, epochs: int = 20, tau: int = 12, seed: int = 1
) -> tuple[nn.Module, tp.Verdict, dict[str, Tensor]]:
    """Train on n digits for `epochs` epochs, the last layer alone from epoch `tau` on.

    Returns the model, the verdict at w^tau and the hidden layers' parameters at tau.
    """
    torch.manual_seed(1)
    x, y = digits(n)
    backbone, head = network(n)
    model, last = nn.Sequential(backbone, head), head.last_layer
    own = {id(p) for p in last.parameters()}
    hidden = {name: p for name, p in model.named_parameters() if id(p) not in own}
    optimizer = tp.optim.SGD(
        model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )

    # First phase: the base algorithm.
    for epoch in range(tau):
        for index in epoch_order(seed, epoch, n).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.4f}")

    # At tau: noise on the hidden layers. Is the condition fulfilled?
    tp.perturb_(hidden, 1e-3, seed=tp.stream_seed(seed, "noise"))
    verdict = tp.verify_expressivity(model, x)
    print(verdict)

    # Second phase: the hidden layers stay as they are, so their output is computed once.
    at_tau = {name: p.detach().clone() for name, p in hidden.items()}
    model.eval().requires_grad_(False)
    h = torch.cat([head.activation(head.wide(backbone(part))) for part in x.split(256)])
    weight_buffer, bias_buffer = (
        optimizer.state[p]["momentum_buffer"] for p in (last.weight, last.bias)
    )
    for epoch in range(tau, epochs):
        losses = tp.ops.last_layer_epoch_(
            last.weight,
            last.bias,
            weight_buffer,
            bias_buffer,
            h,
            y,
            epoch_order(seed, epoch, n),
            batch_size=BATCH,
            lr=LR,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        )
        print(f"epoch {epoch}: mean loss {losses.mean().item():.4f}")

    loss, _, _ = tp.ops.last_layer_gradient(last.weight, last.bias, h, y)
    print(f"training loss {loss.item():.4f}")
    return model, verdict, at_tau


if __name__ == "__main__":
    main()
