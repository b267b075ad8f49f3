"""Networks that hooks, wrappers, replaced forwards and control flow make into other functions.

The truth is what the owner's own network gives, called as the owner calls it.
"""

import copy
import itertools
import random
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twophase_ext as tp
from twophase_ext.model.groups import firsts, groups_of

from .harness import CALLS

NAMED = ("model", "last_layer", "example_input", "x", "optimizer", "train", "feature_cache", "loss")
METHODS = ("auto", "separation", "certificate", "svd")


class Altered(nn.Module):
    """stem, a tail of functions, a wide softplus layer, functions, the last layer, functions."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(d, d), nn.Linear(d, d)
        self.wide, self.act = nn.Linear(d, width), tp.nn.Softplus(10.0)
        self.last = nn.Linear(width, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.early: list[Callable[..., Tensor]] = []
        self.middle: list[Callable[..., Tensor]] = []
        self.late: list[Callable[..., Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        for f in self.early:
            x = f(self, x)
        h = self.wide(torch.tanh(self.stem(x)))
        h = self.act(h)
        for f in self.middle:
            h = f(self, h)
        out = self.last(h)
        for f in self.late:
            out = f(self, out)
        return out


def _clip(m: Altered, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.wide.weight.clamp_(-0.01, 0.01)
    return x


def _count(m: Altered, x: Tensor) -> Tensor:
    m.seen += 1
    return x * m.seen


EARLY: list[Callable[..., Tensor]] = [
    lambda m, x: x.sub_(0.5).div_(0.25),
    lambda m, x: x + m.branch(x),
    lambda m, x: x - x.mean(0),
    lambda m, x: F.layer_norm(x, x.shape),
    lambda m, x: F.layer_norm(x, x.shape[1:]),
    lambda m, x: x.clamp(max=0.5) if isinstance(x, Tensor) else x,
    lambda m, x: x.clamp(max=0.3) if x.max() > 0.7 else x,
    lambda m, x: x * 0,
    lambda m, x: x.round(),
    lambda m, x: x.to(torch.float32).to(x.dtype),
    lambda m, x: x + m.wide.weight.mean(),
    lambda m, x: x + m.last.weight.detach().mean(),
    lambda m, x: x * m.wide.weight.detach().numpy().mean(),
    lambda m, x: x + torch.arange(len(x)).to(x)[:, None],
    lambda m, x: x + torch.rand_like(x),
    lambda m, x: x if m.training else x.flip(0),
    _clip,
    _count,
]
MIDDLE: list[Callable[..., Tensor]] = [
    lambda m, h: h * 0 if len(h) > 2 else h,
    lambda m, h: h.clamp(max=0.01) if h.max() > 2 else h,
    lambda m, h: h.mul_(0),
    lambda m, h: h.data.mul_(0),
    lambda m, h: h * 0.5,
    lambda m, h: h.relu(),
    lambda m, h: F.dropout(h, 0.5, m.training),
    lambda m, h: F.dropout(h, 0.5, True),
    lambda m, h: h[:, :1].expand(-1, h.shape[1]),
    lambda m, h: h - h.mean(0, keepdim=True),
]
LATE: list[Callable[..., Tensor]] = [
    lambda m, o: o / 3,
    lambda m, o: o.clamp(-1, 1),
    lambda m, o: o.data.mul_(2),
    lambda m, o: o.contiguous(),
    lambda m, o: o.view_as(o),
]


def _hook(r: random.Random, m: Altered) -> None:
    module = r.choice([m.stem, m.wide, m.act, m.last, m])
    effect = r.choice([lambda out: out * 0, lambda out: out.relu(), lambda out: None])
    if r.random() < 0.5:
        module.register_forward_hook(lambda _, __, out: effect(out))
    else:
        module.register_forward_pre_hook(
            lambda _, a: None if effect(a[0]) is None else (effect(a[0]),)
        )


def _replace(r: random.Random, m: Altered) -> None:
    module = r.choice([m.stem, m.wide, m.act, m.last])
    scale, old = r.choice((0.0, 0.5, 1.0)), module.forward
    if r.random() < 0.5:
        module.forward = lambda x: old(x) * scale
    else:
        kind = type(module)
        module.forward = types.MethodType(lambda self, x: kind.forward(self, x) * scale, module)


def _parametrize(r: random.Random, m: Altered) -> None:
    module = r.choice([m.stem, m.wide, m.last])
    change = r.choice([nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
    change(module)


def _freeze(r: random.Random, m: Altered) -> None:
    for module in (m.stem, m.branch, m.wide):
        if r.random() < 0.5:
            with torch.no_grad():
                module.weight.mul_(r.choice((0.0, 1.0)))
            module.requires_grad_(False)


def _tie(r: random.Random, m: Altered) -> None:
    if r.random() < 0.5:
        m.branch.weight = m.stem.weight
    elif len(m.wide.weight) >= len(m.stem.weight):
        m.stem.weight.data = m.wide.weight.data[: len(m.stem.weight)]


CHANGES = [_hook, _replace, _parametrize, _freeze, _tie]


def build(r: random.Random, n: int) -> tuple[Altered, Tensor]:
    """A network, and its inputs [n, d]."""
    torch.manual_seed(r.getrandbits(32))
    d = r.randrange(1, 4)
    model = Altered(d, n + r.randrange(0, 3))
    for place, known in ((model.early, EARLY), (model.middle, MIDDLE), (model.late, LATE)):
        if r.random() < 0.35:
            place.append(r.choice(known))
    if r.random() < 0.5:
        r.choice(CHANGES)(r, model)
    dtype = r.choice((torch.float32, torch.float64))
    x = torch.rand(n, d, dtype=dtype)
    if r.random() < 0.2:
        x[-1] = x[0]
    return model.to(dtype), x


def matrix(model: nn.Module, x: Tensor, state: dict[str, Tensor] | None = None) -> Tensor | None:
    """[h, 1] in float64 of the network as its owner calls it, `state` loaded; None: no one row."""
    own = copy.deepcopy(model).eval()
    if state is not None:
        own.load_state_dict(state, strict=False)
    own = own.double()
    caught: list[Tensor] = []
    own.last.register_forward_pre_hook(lambda _, a: caught.append(a[0].detach().clone()))
    with torch.no_grad(), torch.random.fork_rng():
        own(x.double().clone())
    h = caught[-1]
    return torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], 1)


def claims(r: random.Random) -> None:
    """verify_expressivity: no claim that the owner's own network does not keep."""
    model, x = build(r, r.randrange(2, 7))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = x.clone()
    w, method = r.choice(("current", "current", "witness", "init")), r.choice(METHODS)
    CALLS["verify_expressivity (altered)"] += 1
    try:
        verdict = tp.verify_expressivity(model, x, w=w, method=method)
    except (ValueError, TypeError) as error:
        assert str(error).split(":")[0] in NAMED, error
        verdict = None
    assert torch.equal(x, before), "the inputs were written"
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} was changed"
    if verdict is None or verdict.status not in ("proved", "full rank", "deficient"):
        return
    x = x[firsts(groups_of(x))]
    assert len(x) == verdict.distinct
    if verdict.status == "deficient":
        assert len(x) > matrix(model, x).shape[1]
        return
    if verdict.method == "separation":  # some weights of the wide layer, at this backbone
        weights = dict(state)
        weights.update(verdict.witness or {})
        ranks = []
        for scale in (1.0, 3.0, 10.0, 30.0):
            for _ in range(3):
                drawn = {k: v for k, v in weights.items() if k in ("wide.weight", "wide.bias")}
                free = {
                    k: scale * torch.randn(v.shape, dtype=torch.float64) for k, v in drawn.items()
                }
                ranks.append(torch.linalg.matrix_rank(matrix(model, x, weights | free)))
        # twelve draws may miss weights for rows that are close; equal ones have none
        rows = matrix(model, x, weights)
        equal = any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))
        assert max(ranks) == len(x) or (max(ranks) >= len(x) - 2 and not equal)
        return
    sigma = torch.linalg.svdvals(matrix(model, x, verdict.witness))
    if verdict.sigma_min_lower is not None:
        assert verdict.sigma_min_lower <= float(sigma[-1]) * (1 + 1e-9) + 1e-13 * float(sigma[0])
    elif verdict.w == "current":
        assert verdict.rank is None or float(sigma[-1]) > 0


def training(r: random.Random) -> None:
    """Trainer.fit: what is reported is what the owner's own network gives; it ends, or refuses."""
    n = r.randrange(4, 8)
    model, x = build(r, n)
    y = torch.randint(2, (n,))
    before = x.clone()
    CALLS["Trainer.fit (altered)"] += 1
    settings: dict[str, Any] = {
        "epochs": 4,
        "tau": 2,
        "batch_size": r.choice((2, 4)),
        "second_phase": r.choice(("base", "gd", "none")),
        "precision": str(x.dtype)[6:],
        "verify": r.choice(("auto", False)),
        "run_dir": False,
        "progress": False,
    }
    try:
        result = tp.Trainer(model, **settings).fit((x, y))
    except (ValueError, TypeError) as error:
        named = (*NAMED, *dict(model.named_parameters()))
        assert str(error).split(":")[0] in named, error
        return
    except RuntimeError as error:  # the network's own: it overwrites what its gradient needs
        assert "modified by an inplace operation" in str(error), error
        return
    finally:
        assert torch.equal(x, before), "the inputs were written"
    rows = dict(row[:2] for row in result.guarantee.premises)
    if result.status != "completed" or rows.get("fixed features") != "held":
        return
    with torch.no_grad():
        own = float(F.cross_entropy(result.model.eval()(x.clone()), y))
    assert abs(own - result.final["train_loss"]) <= 1e-3 * (1 + abs(own))
    for point in result.guarantee.curve[-1:]:
        assert own <= point["bound"] * (1 + 1e-3) + 1e-3 or result.guarantee.reason


CASES = {"claims": (claims, 3.0), "training": (training, 1.0)}
