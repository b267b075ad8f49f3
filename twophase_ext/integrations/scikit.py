"""The two-phase method as estimators of scikit-learn. Needs the extra `sklearn`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state, column_or_1d, compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import nn

from ..core.arguments import integer
from ..model.labels import decode, encode
from ..model.softplus import Softplus
from ..model.surgery.widen import widen
from ..training import Result, Trainer

WIDTH, RATE = 64, 1e-3  # of `adam`: its rate, of layers of at most so many inputs
Module = nn.Module | Callable[[int, int, int], nn.Module]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, lr 1e-3; weights of a layer of more than 64 inputs get less in proportion.

    A step of Adam moves each weight by about lr, and so the sum over m inputs by m lr: with
    1.1 n units before the last layer the rate has to fall with n (Yang & Hu, "Tensor programs V",
    2022).
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for p in parameters:
        inputs = p[0].numel() if p.dim() > 1 else 1
        groups.setdefault(RATE * min(1.0, WIDTH / inputs), []).append(p)
    return torch.optim.Adam([{"params": ps, "lr": lr} for lr, ps in groups.items()])


class _TwoPhase(BaseEstimator):
    """What both estimators share."""

    def _outputs(self, X: Any) -> np.ndarray:
        """The network's outputs of validated inputs, [n, outputs], float64."""
        check_is_fitted(self, "result_")
        X = validate_data(self, X, reset=False, **self._form())
        return self.result_.predict(X).double().cpu().numpy()

    def _form(self) -> dict[str, Any]:
        """How inputs are validated: for a network of the user's own they may be images, or whole
        numbers.
        """
        own = self.module is not None
        return {"dtype": "numeric" if own else [np.float64, np.float32], "allow_nd": own}

    def _network(self, n: int, features: int, outputs: int) -> nn.Module:
        """The network to train, on the device asked for; self.module stays as it is."""
        if isinstance(self.module, nn.Module):
            return copy.deepcopy(self.module)
        if self.module is not None:
            return self.module(n, features, outputs)
        sizes = [features, *(integer("hidden", units, 1) for units in self.hidden)]
        if len(sizes) == 1:
            raise ValueError("hidden: expected one layer or more, got none")
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), Softplus()]
        layers.append(nn.Linear(sizes[-1], outputs))
        model = nn.Sequential(*layers)
        if self.ratio is not None:
            widen(model, n, self.ratio, last_layer=str(len(layers) - 1))
        return model

    def _train(
        self, X: np.ndarray, y: np.ndarray, w: np.ndarray | None, loss: str, outputs: int
    ) -> Self:
        seed = int(check_random_state(self.random_state).randint(2**31))
        given = {"run_dir": False, "progress": False, **(self.settings or {})}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._network(len(X), X[0].size, outputs)
        if "device" in given:
            model = model.to(given["device"])
        result = Trainer(
            model,
            loss=loss,
            optimizer=self.optimizer or adam,
            epochs=self.epochs,
            tau=self.tau,
            noise_std=self.noise_std,
            second_phase=self.second_phase,
            batch_size=self.batch_size,
            verify=self.verify,
            seed=seed,
            **given,
        ).fit((X, y) if w is None else (X, y, w))
        if result.status == "interrupted":  # a search would go on with its next fit
            raise KeyboardInterrupt
        if result.status == "diverged":
            raise RuntimeError(
                f"fit: the training diverged, {result.divergence}; standardise inputs and targets, "
                "or give an optimizer with a smaller learning rate"
            )
        self.result_: Result = result
        self.model_ = result.model
        return self


def _weights(
    sample_weight: Any, X: np.ndarray, factor: np.ndarray | None = None
) -> tuple[np.ndarray | slice, np.ndarray | None]:
    """(samples whose weight is not 0, their weights; None where there are none)."""
    if sample_weight is None and factor is None:
        return slice(None), None
    w = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    w = w if factor is None else w * factor
    kept = w > 0
    if not kept.any():
        raise ValueError("sample_weight: expected a weight above zero, all are zero")
    return kept, w[kept]


class TwoPhaseClassifier(ClassifierMixin, _TwoPhase):
    """A network trained in two phases (`tp.Trainer`), cross-entropy, as a classifier.

    hidden: units of the default network's layers, each followed by exact softplus; before its last
    layer stands one of ceil(ratio n) units (section 7 of the paper), ratio None: none. module: a
    network of your own instead, which is copied and trained as it is, or a callable
    (n, features, outputs) -> nn.Module, called with the random state's seed set.

    epochs, tau, noise_std, second_phase, optimizer, batch_size, verify: as of `tp.Trainer`, but
    that optimizer None is `adam` and that verify is the proof in O(n log n) by default. settings:
    further arguments of the Trainer; "device" moves the network there. class_weight: "balanced" or
    {label: weight}, times sample_weight. random_state: of initialisation, order and noise.

    After `fit`: result_, the run's `tp.Result`, with the verdict on the condition; model_, the
    network, features -> logits in the order of classes_. Inputs are not standardised: put a
    StandardScaler before it, as for any network.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (64,),
        *,
        ratio: float | None = 1.1,
        module: Module | None = None,
        epochs: int = 100,
        tau: float | int = 0.6,
        noise_std: float | dict[str, float] = 1e-3,
        second_phase: str = "base",
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        batch_size: int = 64,
        verify: bool | str = "separation",
        settings: Mapping[str, Any] | None = None,
        class_weight: str | Mapping[Any, float] | None = None,
        random_state: Any = None,
    ) -> None:
        """See the class."""
        self.hidden, self.ratio, self.module = hidden, ratio, module
        self.epochs, self.tau, self.noise_std = epochs, tau, noise_std
        self.second_phase, self.optimizer, self.batch_size = second_phase, optimizer, batch_size
        self.verify, self.settings = verify, settings
        self.class_weight, self.random_state = class_weight, random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X [n, features] (any array or data frame of numbers) and labels y [n].

        The loss is the mean weighted by sample_weight; samples of weight 0 are left out. Raises
        ValueError or TypeError for what cannot be trained on, RuntimeError where the training
        diverges, KeyboardInterrupt after Ctrl-C.
        """
        X, y = validate_data(self, X, y, **self._form())
        check_classification_targets(y)
        y = column_or_1d(y, warn=True)
        labels, classes = encode(y, "y")
        if len(classes) < 2:
            raise ValueError(f"y: expected 2 classes or more, got 1 class, {classes[0]}")
        factor = None
        if self.class_weight is not None:
            factor = compute_sample_weight(self.class_weight, y)
        kept, w = _weights(sample_weight, X, factor)
        self.classes_ = classes
        return self._train(X[kept], labels[kept], w, "cross_entropy", len(classes))

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of `predict_proba`, [n, classes]."""
        return torch.from_numpy(self._outputs(X)).log_softmax(1).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """The softmax of the logits that cross-entropy trained, [n, classes], float64."""
        return torch.from_numpy(self._outputs(X)).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The label of the largest logit, [n]."""
        return decode(torch.from_numpy(self._outputs(X)).argmax(1), self.classes_)


class TwoPhaseRegressor(RegressorMixin, _TwoPhase):
    """A network trained in two phases (`tp.Trainer`), squared error, as a regressor.

    Arguments and attributes as of `TwoPhaseClassifier`, but for class_weight and classes_. Several
    targets are one network's outputs. Neither inputs nor targets are standardised: a
    StandardScaler before it and a TransformedTargetRegressor around it do that.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (64,),
        *,
        ratio: float | None = 1.1,
        module: Module | None = None,
        epochs: int = 100,
        tau: float | int = 0.6,
        noise_std: float | dict[str, float] = 1e-3,
        second_phase: str = "base",
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        batch_size: int = 64,
        verify: bool | str = "separation",
        settings: Mapping[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        """See the class."""
        self.hidden, self.ratio, self.module = hidden, ratio, module
        self.epochs, self.tau, self.noise_std = epochs, tau, noise_std
        self.second_phase, self.optimizer, self.batch_size = second_phase, optimizer, batch_size
        self.verify, self.settings, self.random_state = verify, settings, random_state

    def __sklearn_tags__(self) -> Any:
        """Several targets are taken."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X [n, features] and targets y [n] or [n, targets]; as the classifier's."""
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, **self._form())
        kept, w = _weights(sample_weight, X)
        self._single = y.ndim == 1
        target = np.array(y, np.float64).reshape(len(y), -1)[kept]
        return self._train(X[kept], target, w, "squared_error", target.shape[1])

    def predict(self, X: Any) -> np.ndarray:
        """The network's outputs, [n] or [n, targets] as the targets were."""
        found = self._outputs(X)
        return found[:, 0] if self._single else found
