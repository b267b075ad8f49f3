"""Squared loss on real-valued targets, with the guaranteed loss beside the measured one.

scikit-learn's diabetes data: 442 patients, 10 features, one number to predict. The second phase is
gradient descent with steps of 1 / L_H (Theorem 1 i). After t steps the loss is at most
L(v) + L_H ||v - w^tau||^2 / (2 t) for every last layer v; "comparator" is the v that was taken.
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import twophase_ext as tp


def main(epochs: int = 20, steps: int = 500) -> tp.Result:
    """Train, `steps` gradient steps an epoch in the second phase, and print the curve."""
    torch.manual_seed(1)
    features, progression = load_diabetes(return_X_y=True)
    x, y = torch.tensor(features), torch.tensor(progression)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()  # so that the loss of 0 is about 1

    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    tp.nn.widen(model, n=len(x), beta=10.0)
    result = tp.Trainer(
        model,
        loss="squared_error",  # the paper's ||q - y||^2, averaged over samples
        epochs=epochs,
        tau=0.5,
        second_phase="gd",
        gd={"steps": steps},
        precision="float64",
        run_dir=False,
        progress=False,
    ).fit((x, y))
    print(result)

    print(f"\n{'steps':>6}  {'measured':>9}  {'guaranteed':>10}  comparator")
    for point in result.guarantee.curve:
        print(
            f"{point['steps']:>6}  {point['loss']:>9.5f}  {point['bound']:>10.5f}  "
            f"{point['comparator']}"
        )
    return result


if __name__ == "__main__":
    main()
