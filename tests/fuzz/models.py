"""What takes a model: certificates, bounds, surgery, the optimizer, the Trainer."""

import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import twophase_ext as tp
from twophase import reference
from twophase_ext.model.groups import firsts, groups_of

from .harness import CALLS, Refused, attempt, close
from .ops import L, wide
from .values import FLOATS, STRANGE, numbers, relaid, wrong


def network(r: random.Random, d: int, width: int, k: int, dtype: torch.dtype) -> nn.Module:
    """An analytic network whose last hidden layer has `width` units."""
    beta = r.choice((1.0, 10.0, 100.0))
    layers = [nn.Linear(d, width), tp.nn.Softplus(beta), nn.Linear(width, k, bias=r.random() < 0.8)]
    if r.random() < 0.3:
        layers = [nn.Linear(d, d), nn.Tanh(), *layers]
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(r.getrandbits(32))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * r.choice((0.3, 1.0)))
    return model.to(dtype)


def hidden(model: nn.Module, x: Tensor) -> Any:
    """The last hidden layer in extended precision, [n, m]."""
    z = wide(x)
    for layer in list(model)[:-1]:  # type: ignore[arg-type]
        if isinstance(layer, nn.Linear):
            z = z @ wide(layer.weight).T + wide(layer.bias)
        elif isinstance(layer, nn.Tanh):
            z = np.tanh(z)
        else:
            z = np.maximum(z, 0) + np.log1p(np.exp(-L(layer.beta) * np.abs(z))) / L(layer.beta)
    return z


def with_ones(model: nn.Module, h: Any) -> Any:
    """M, as the last layer's bias says."""
    return h if model[-1].bias is None else np.hstack([h, np.ones((len(h), 1))])  # type: ignore[index]


def certificates(r: random.Random) -> None:
    """verify_expressivity, ntk_rank and check_assumptions: no proof of what does not hold."""
    n, d, k = r.randrange(1, 6), r.randrange(1, 4), r.randrange(1, 3)
    dtype = r.choice(FLOATS)
    model = network(r, d, max(1, n + r.randrange(-1, 3)), k, dtype)
    x: Any = numbers(r, (n, d), dtype, 0.1)
    if n > 1 and r.random() < 0.3:
        x[-1] = x[0] * r.choice((1.0, 1 + 1e-12))
    x = relaid(r, x)
    odd = r.random()
    subject: Any = model
    if odd < 0.15:
        x = wrong(r, x)
    elif odd < 0.2:
        subject = r.choice(STRANGE)
    extra: dict[str, Any] = {}
    which = r.choice(("verify", "ntk", "assumptions"))
    function = {
        "verify": tp.verify_expressivity,
        "ntk": tp.ntk_rank,
        "assumptions": tp.check_assumptions,
    }[which]
    if which == "verify":
        extra["w"] = r.choice(("current", "current", "init", "witness", "else"))
    if r.random() < 0.5:
        methods = ("auto", "separation", "certificate", "svd", "full", "bound", *STRANGE)
        extra["method"] = r.choice(methods)
    got = attempt(function, subject, x, names=("the", "example_input"), **extra)
    if isinstance(got, Refused):
        return
    x = torch.as_tensor(np.array(x)) if isinstance(x, np.ndarray | list) else x.resolve_neg()
    if x._is_zerotensor():
        return
    if which == "verify":
        _check_verdict(got, model, x)
    elif which == "ntk" and got.lower is not None and got.proved:
        jacobian = _jacobian(model, x[firsts(groups_of(x))])
        smallest = float(np.linalg.eigvalsh(jacobian @ jacobian.T)[0])
        largest = float(np.abs(jacobian @ jacobian.T).max())
        assert got.lower <= smallest + 1e-12 * largest * len(jacobian)


def _check_verdict(verdict: tp.Verdict, model: nn.Module, x: Tensor) -> None:
    x = x[firsts(groups_of(x))]
    assert len(x) == verdict.distinct
    if verdict.status == "deficient":
        assert verdict.distinct > with_ones(model, hidden(model, x)).shape[1]
    if verdict.status != "proved" or verdict.sigma_min_lower is None:
        return
    if verdict.witness is not None:
        model = copy.deepcopy(model)
        model.load_state_dict(verdict.witness, strict=False)
    m = with_ones(model, hidden(model, x)).astype(float)
    sigma = np.linalg.svd(m, compute_uv=False)
    assert m.shape[0] <= m.shape[1]
    allowed = sigma[-1] + 1e-13 * sigma[0]
    assert verdict.sigma_min_lower <= allowed, (verdict.sigma_min_lower, sigma[-1])


def _jacobian(model: nn.Module, x: Tensor) -> Any:
    model = copy.deepcopy(model).double()
    rows = []
    for output in model(x.double()).reshape(-1):
        model.zero_grad()
        output.backward(retain_graph=True)
        rows.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy())
    return np.stack(rows)


def bound(r: random.Random) -> None:
    """guarantee: gradient descent with its own step never ends above the bound."""
    n, m, k = r.randrange(1, 6), r.randrange(1, 5), r.randrange(1, 4)
    dtype = r.choice(FLOATS)
    loss: Any = r.choice(("cross_entropy", "squared_error"))
    h: Any = numbers(r, (n, m), dtype, 0.1, r.choice((0.1, 1.0, 10.0)))
    y: Any = torch.tensor([r.randrange(k) for _ in range(n)])
    y = y if loss == "cross_entropy" else numbers(r, (n, k), dtype, 0.1)
    weight: Any = numbers(r, (k, m), dtype, 0.1)
    bias: Any = r.choice((None, numbers(r, (k,), dtype, 0)))
    steps: Any = sorted({0, r.randrange(1, 5), r.randrange(1, 30)})
    extra: dict[str, Any] = {"l2": r.choice((0.0, 0.0, 0.1))}
    odd = r.random()
    if odd < 0.3:
        place = r.randrange(7)
        h, y = (wrong(r, h), y) if place == 0 else (h, wrong(r, y)) if place == 1 else (h, y)
        weight = wrong(r, weight) if place == 2 else weight
        bias = wrong(r, torch.zeros(k, dtype=dtype)) if place == 3 else bias
        steps = r.choice((*STRANGE, [-1], [1.5], ["a"])) if place == 4 else steps
        extra["l2"] = r.choice(STRANGE) if place == 5 else extra["l2"]
        loss = r.choice(STRANGE) if place == 6 else loss
    got = attempt(
        *(tp.guarantee, (h, y), weight, bias),
        names=("features", "targets", "blocks", "target"),
        loss=loss,
        steps=steps,
        **extra,
    )
    if isinstance(got, Refused):
        assert odd < 0.3 or not all(bool((t.abs() < 1e30).all()) for t in (h, weight, y)), got.error
        return
    assert not any(math.isnan(p["bound"]) for p in got.curve), "a bound that is no number"
    if odd < 0.3:
        return
    h, y, weight = h.double(), y if loss == "cross_entropy" else y.double(), weight.double()
    b = None if bias is None else bias.double()
    decay = float(extra["l2"])
    for t in range(max(steps) + 1):
        parameters = [weight.requires_grad_()] + ([] if b is None else [b.requires_grad_()])
        q = nn.functional.linear(h, weight, b)
        value = (
            nn.functional.cross_entropy(q, y)
            if loss == "cross_entropy"
            else (q - y).square().sum(1).mean()
        ) + decay / 2 * sum(p.square().sum() for p in parameters)  # fmt: skip
        for point in got.curve:
            if point["steps"] == t:
                slack = 1e-9 * (1 + abs(float(value.detach())))
                if not math.isfinite(value.detach()):  # it overflows here
                    continue
                assert float(value.detach()) <= point["bound"] + slack, (t, value, point)
        gradients = torch.autograd.grad(value, parameters)
        rate = 1 / got.constants["L_H"] if got.constants["L_H"] else 0.0
        moved = [(p - rate * g).detach() for p, g in zip(parameters, gradients, strict=True)]
        weight, b = moved[0], None if b is None else moved[1]


def optimizer(r: random.Random) -> None:
    """optim.SGD beside torch.optim.SGD: same parameters, same buffers, nu = 0 nothing."""
    rule: dict[str, Any] = {
        "lr": r.choice((0.1, 1.0, 0.0)),
        "momentum": r.choice((0.0, 0.9)),
        "weight_decay": r.choice((0.0, 0.1)),
        "maximize": r.random() < 0.3,
    }
    if r.random() < 0.1:
        rule[r.choice(("lr", "momentum", "weight_decay"))] = r.choice((-1.0, None, "a"))
        CALLS["SGD"] += 1
        try:
            tp.optim.SGD([nn.Parameter(torch.zeros(2))], **rule)
        except (ValueError, TypeError):
            return
        raise AssertionError(f"accepted {rule}")
    sizes, dtype = [(3,), (2, 4), ()], r.choice(FLOATS)
    ours, theirs = ([nn.Parameter(torch.ones(s, dtype=dtype)) for s in sizes] for _ in range(2))
    mask = r.randrange(2)
    a = tp.optim.SGD([{"params": ours[:2]}, {"params": ours[2:], "nu": mask}], **rule)
    b = torch.optim.SGD(theirs if mask else theirs[:2], foreach=False, **rule)
    for _ in range(r.randrange(1, 4)):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = relaid(r, numbers(r, p.shape, dtype))
            q.grad = p.grad.clone()
        attempt(a.step, label="SGD.step")
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        info = torch.finfo(dtype)
        size = 1 + p.grad.abs().sum() + q.detach().abs()
        limit = np.where(wide(size) < info.max / 1e3, 64 * info.eps * wide(size), np.inf)
        close(p, wide(q.detach()), limit, "SGD")


def surgery(r: random.Random) -> None:
    """nn.analytic, classify, widen, plain, WideHead and Softplus."""
    which = r.randrange(5)
    if which == 0:
        beta: Any = r.choice((1.0, 100.0, *STRANGE))
        got = attempt(tp.nn.Softplus, beta, r.random() < 0.5, label="nn.Softplus")
        if not isinstance(got, Refused):
            x = torch.linspace(-1, 1, 5)
            close(got(x.clone()), wide(tp.softplus(x, beta)), 0, "nn.Softplus")
        return
    d, n = r.randrange(1, 4), r.randrange(1, 6)
    model: Any = nn.Sequential(nn.Linear(d, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(4, d, generator=torch.Generator().manual_seed(r.getrandbits(16)))
    if r.random() < 0.2:
        model = r.choice(STRANGE)
    if which == 1:
        found = attempt(tp.nn.classify, model)
        assert isinstance(found, Refused) or not isinstance(model, nn.Module) or found
    elif which == 4:
        got = attempt(tp.nn.plain, model)
        if not isinstance(got, Refused):
            close(got(x), wide(model(x)), 1e-6, "nn.plain")
    elif which == 2:
        wanted = None if not isinstance(model, nn.Module) else model[0](x).detach()
        got = attempt(tp.nn.analytic, model, r.choice((1.0, 100.0)), changes=[model])
        if wanted is not None and not isinstance(got, Refused):
            beta = model[1].beta
            truth = np.logaddexp(0, beta * wide(wanted)) / beta
            y = truth @ wide(model[2].weight).T + wide(model[2].bias)
            close(model(x), y, 1e-5 * (1 + np.abs(y)), "nn.analytic")
    else:
        size: Any = r.choice((n, n, n, None, "a", 0, -1, 1.5, True))
        got = attempt(tp.nn.widen, model, size, changes=[model])
        if not isinstance(got, Refused):
            head = model[2]
            assert head.wide.out_features == tp.nn.wide_units(size) and model(x).shape == (4, 2)


SETTINGS = {
    "epochs": (2, 3, *STRANGE),
    "tau": (0.5, 1, 2.0, *STRANGE),
    "noise_std": (1e-3, 0.0, {"0.weight": 1.0}, *STRANGE),
    "batch_size": (2, 64, 0, *STRANGE),
    "second_phase": ("base", "gd", "sgd", "none", *STRANGE),
    "loss": ("cross_entropy", "hinge", *STRANGE),
    "feature_cache": ("auto", "hidden", "none", *STRANGE),
    "verify": (False, "svd", *STRANGE),
    "precision": ("float32", "float64", *STRANGE),
    "gd": (None, {"steps": 2}, {"steps": 0}, {"what": 1}, *STRANGE),
    "sgd": (None, {"c": 0.1}, {"c": -1}, *STRANGE),
    "lazy": (None, {"eta_bar": 2}, *STRANGE),
    "seed": (1, 2**63, *STRANGE),
    "checkpoint_every": (None, 1, 0, *STRANGE),
}
OF_SETTINGS = {
    tp.GradientDescent: ("smoothness", "l2", "steps"),
    tp.StochasticDescent: ("c", "eps"),
    tp.AcceleratedDescent: ("damping", "l2", "steps", "early_stopping"),
    tp.Exact: ("gap", "l2", "steps", "early_stopping"),
    tp.Lazy: ("smoothness", "eta_bar", "verify_every"),
    tp.ConvexLoss: ("function", "smoothness", "name"),
}


def settings(r: random.Random) -> None:
    """The settings' classes: what comes back is in range, or a refusal."""
    cls = r.choice(list(OF_SETTINGS))
    names = OF_SETTINGS[cls]
    values = {
        name: r.choice((0.3, 0.5, 1, "tight", *STRANGE)) for name in names if r.random() < 0.7
    }
    got = attempt(cls, **values, names=("gd", "sgd", "lazy", "agd", "exact", *names, cls.__name__))
    if isinstance(got, tp.StochasticDescent):
        assert 0 < got.eps <= 0.5 and (got.c is None or 0 < got.c < math.inf)
    if isinstance(got, tp.Lazy):
        assert 0 < got.eta_bar < 1 and got.verify_every >= 1
    if isinstance(got, tp.GradientDescent):
        assert 0 <= got.l2 < math.inf and got.steps >= 1


def trainer(r: random.Random) -> None:
    """Trainer and fit: a refusal leaves the model's bits, a run's losses are the model's."""
    values: dict[str, Any] = {"epochs": 2, "tau": 1, "verify": False, "batch_size": 4}
    for name in r.sample(list(SETTINGS), r.randrange(3)):
        values[name] = r.choice(SETTINGS[name])
    model = network(r, 2, 8, 2, torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x: Any = numbers(r, (6, 2), torch.float32, 0.05)
    y: Any = torch.tensor([r.randrange(2) for _ in range(6)])
    if r.random() < 0.2:
        x, y = (wrong(r, x), y) if r.random() < 0.5 else (x, wrong(r, y))
    names = ("train", "std", "model", "gd", "sgd", "lazy", "feature_cache", "resume", *SETTINGS)

    def run(**given: Any) -> tp.Result:
        return tp.Trainer(model, run_dir=False, progress=False, **given).fit((x, y))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = attempt(run, names=names, label="Trainer.fit", changes=[model], **values)
    if isinstance(got, Refused):
        after = model.state_dict()
        assert all(torch.equal(after[name], t) for name, t in before.items()), "a refusal trained"
        return
    assert got.status in ("completed", "diverged", "stopped")
    if got.status == "completed" and isinstance(values.get("loss", "cross_entropy"), str):
        x, y = torch.as_tensor(x).double(), torch.as_tensor(y).long()
        value = float(nn.functional.cross_entropy(model.double()(x), y.reshape(-1)).detach())
        assert abs(got.final["train_loss"] - value) <= 1e-4 * (1 + value)


def own_loop(r: random.Random) -> None:
    """freeze, FeatureCache, EpochSampler and fit_last_layer beside SGD written out."""
    n, k = r.randrange(1, 8), 2
    model: Any = network(r, 2, 5, k, torch.float32)
    x: Any = numbers(r, (n, 2), torch.float32, 0.1)
    y: Any = torch.tensor([r.randrange(k) for _ in range(n)])
    odd = r.random()
    if odd < 0.2:
        x, y = (wrong(r, x), y) if r.random() < 0.5 else (x, wrong(r, y))
    elif odd < 0.25:
        model = r.choice(STRANGE)
    # BatchNorm's statistics are all that freezing may change, and there are none here
    if isinstance(attempt(tp.freeze, model, train=(x, y), names=("data", "index")), Refused):
        return
    cache = attempt(tp.FeatureCache, model, (x, y), names=("train",))
    if isinstance(cache, Refused):
        return
    wild = odd < 0.2 or not bool((x.abs() < 1e3).all())
    if not wild:
        found, _ = cache.batch(torch.arange(n))
        h = hidden(model, x)
        close(found, h, 1e-4 * (1 + np.abs(h)), "FeatureCache")
    rule: dict[str, Any] = {
        "epochs": r.choice((1, 2, 2, 0, *STRANGE)) if r.random() < 0.2 else 2,
        "batch_size": r.choice((1, 2, 64)),
        "seed": r.getrandbits(20),
        "lr": r.choice((0.1, 1.0, "a")) if r.random() < 0.2 else 0.1,
        "momentum": r.choice((0.0, 0.9)),
        "weight_decay": r.choice((0.0, 0.1)),
    }
    last = copy.deepcopy(model[-1])
    try:
        losses = attempt(tp.fit_last_layer, model, cache, changes=[model], **rule)
    except AssertionError as error:  # the one RuntimeError that is documented
        if "finite" in str(error) and wild:
            return
        raise
    if isinstance(losses, Refused) or wild:
        return
    buffers: list[Any] = [None, None]
    parameters = [p.detach().double() for p in last.parameters()]
    h = torch.from_numpy(hidden(model, x).astype(float))
    for epoch, loss in zip(range(rule["epochs"]), losses, strict=True):
        sampler = attempt(tp.EpochSampler, n, seed=rule["seed"])
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(n))
        total = 0.0
        for start in range(0, n, rule["batch_size"]):
            rows = torch.tensor(order[start : start + rule["batch_size"]])
            bias = parameters[1] if len(parameters) == 2 else None
            value, *grads = reference.last_layer_gradient(
                parameters[0], bias, h[rows], y.reshape(-1).long()[rows], loss="cross_entropy"
            )
            total += float(value) * len(rows)
            settings_ = {name: rule[name] for name in ("lr", "momentum", "weight_decay")}
            own = buffers[: len(parameters)]
            reference.sgd_(parameters, grads[: len(parameters)], own, **settings_)
            buffers = own
        assert abs(loss - total / n) <= 1e-3 * (1 + total / n), (loss, total / n)
    for got, truth in zip(model[-1].parameters(), parameters, strict=True):
        close(got, truth.numpy(), 1e-3 * (1 + truth.abs().numpy()), "fit_last_layer")


CASES: dict[str, tuple[Callable[[random.Random], None], float]] = {
    "optimizer": (optimizer, 1),
    "surgery": (surgery, 1),
    "settings": (settings, 10),
    "own_loop": (own_loop, 0.3),
    "bound": (bound, 0.1),
    "certificates": (certificates, 0.1),
    "trainer": (trainer, 0.1),
}
