"""The two phases in a training loop of your own, without the Trainer.

Each step of Algorithm 1 is one call: your optimizer up to tau, then `tp.perturb_`, `tp.freeze`,
`tp.verify_expressivity`, `tp.FeatureCache` and `tp.fit_last_layer`. With the order and the seeds of
`tp.Trainer`, which `tp.EpochSampler` and `tp.stream_seed` give, the weights are the Trainer's, bit
for bit.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import twophase_ext as tp


def digits(n: int) -> tuple[Tensor, Tensor]:
    """The first n of scikit-learn's digits, x [n, 64] in [0, 1] and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[:n] / 16, dtype=torch.float32), torch.tensor(labels[:n])


def network(n: int) -> nn.Sequential:
    """64 -> 32 -> ceil(1.1 n) -> 10, with BatchNorm and exact softplus."""
    hidden = [nn.Linear(64, 32), nn.BatchNorm1d(32), tp.nn.Softplus()]
    return nn.Sequential(*hidden, tp.nn.WideHead(32, tp.nn.wide_units(n), 10))


def main(n: int = 400, epochs: int = 20, tau: int = 12, seed: int = 1) -> tuple[nn.Module, str]:
    """Train on n digits, the last layer alone from epoch tau on; model and the frozen hash."""
    torch.manual_seed(1)
    data, model = digits(n), network(n)
    sampler = tp.EpochSampler(n, seed=seed)
    loader = DataLoader(TensorDataset(*data), batch_size=64, sampler=sampler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-5)
    for epoch in range(tau):  # the first phase: your own loop
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    hidden = {k: p for k, p in model.named_parameters() if "last_layer" not in k}
    tp.perturb_(hidden, 1e-3, seed=tp.stream_seed(seed, "noise"))
    with tp.freeze(model, train=data) as frozen:  # verified and undone at its end
        print(tp.verify_expressivity(model, data[0]))
        cache = tp.FeatureCache(model, data)  # the second phase
        losses = tp.fit_last_layer(
            model, cache, optimizer=optimizer, epochs=epochs - tau, first_epoch=tau, seed=seed
        )
        print(losses)
    return model, frozen.hash


if __name__ == "__main__":
    main()
