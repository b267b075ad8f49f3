"""Adam in the first phase, and what that means for the second.

The first phase may be any torch optimizer: Theorem 1 says nothing of it. The second phase decides
what is guaranteed. Two second phases start from the same first one: "base" keeps Adam, now on the
last layer alone, and no bound is claimed; "gd" takes the theorem's own gradient steps, and the
bound holds although Adam came before.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import twophase_ext as tp


def main(n: int = 400, epochs: int = 10, steps: int = 200) -> dict[str, tp.Result]:
    """Train on the first n digits, `steps` gradient steps an epoch in the theorem's second phase.

    Returns the runs by name: "adam", "theorem".
    """
    torch.manual_seed(1)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels[:n] / 16, dtype=torch.float32), torch.tensor(labels[:n])
    model = nn.Sequential(nn.Linear(64, 64), tp.nn.Softplus(), nn.Linear(64, 10))
    tp.nn.widen(model, n=n)

    trainer = tp.Trainer(
        model,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        epochs=epochs,
        tau=0.6,
        run_dir=False,
        progress=False,
    )
    results = trainer.branch(
        {"adam": {}, "theorem": {"second_phase": "gd", "gd": {"steps": steps}}}, (x, y)
    )
    for name, result in results.items():
        print(f"{name}: {result}\n")
    return results


if __name__ == "__main__":
    main()
