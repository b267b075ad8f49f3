"""Networks of which something is easily believed that is not so; what they compute is what counts.

Each builds a fresh module [b, 4] -> [b, 2] with a wide layer of 10 units (`wide`, `act`, `last`),
and says for which samples the claim would be false.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp

CALLS = {"count": 0}


class Net(nn.Module):
    """x -> last(act(wide(before(x)))), with places to reach in."""

    def __init__(self, before=None, between=None, after=None, beta=10.0):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.wide, self.act, self.last = nn.Linear(4, 10), tp.nn.Softplus(beta), nn.Linear(10, 2)
        self.before, self.between, self.after = before, between, after

    def forward(self, x):
        z = self.stem(x)
        z = z if self.before is None else self.before(self, z)
        a = self.wide(z)
        h = self.act(a if self.between is None else self.between(self, a))
        out = self.last(h)
        return out if self.after is None else self.after(self, out)


def _instance(module, function):
    module.forward = types.MethodType(function, module)


class Scaled(tp.nn.Softplus):
    def forward(self, x):
        return super().forward(x * 0)


class Kept(nn.Linear):
    """Its weight is read through a property of sorts."""

    def reset_parameters(self):
        for parameter in self._parameters.values():  # not through what reads them as 0
            nn.init.uniform_(parameter, -0.5, 0.5)

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value * 0 if name == "weight" else value


class Called(tp.nn.Softplus):
    def __call__(self, x):
        return super().__call__(x) * 0


def _data(model, a):
    a.data.mul_(0)
    return a


def _numpy(model, a):
    a.detach().numpy()[:] = 0.0
    return a


def _by_size(model, a):
    return a * 0 if len(a) > 2 else a


def _by_count(model, a):
    model.calls = getattr(model, "calls", 0) + 1
    return a * 0 if model.calls > 4 else a


def _by_value(model, a):
    return a.clamp(max=-50.0) if a.abs().max() > 1e-3 else a


def _by_type(model, a):
    return a if isinstance(a, torch.fx.Proxy) else a * 0


def _by_dtype(model, a):
    return a if a.dtype == torch.float64 else a * 0


def _tried(model, a):
    try:
        return a * 0 if bool(a.sum() == a.sum()) else a
    except Exception:
        return a


def _mean(model, z):
    return z - z.mean(0)


def _own_weight(model, z):
    return torch.tanh(F.linear(F.linear(z, torch.ones(4, 4).to(z)), 0 * model.wide.weight[:4]))


def _clipped(model, z):
    with torch.no_grad():
        model.wide.weight.clamp_(-1e-9, 1e-9)
    return z


def _collapse(model, z):
    return z * 0 + 1


def _changed(change):
    def build(**settings):
        model = Net(**settings)
        change(model)
        return model

    return build


def _forward_hook(m):
    m.act.register_forward_hook(lambda _, __, out: out * 0)


def _pre_hook(m):
    m.wide.register_forward_pre_hook(lambda _, a: (a[0] * 0,))


def _parametrized(m):
    class Zero(nn.Module):
        def forward(self, w):
            return w * 0

    nn.utils.parametrize.register_parametrization(m.wide, "weight", Zero())


def _bound(m):
    old = m.act.forward
    m.act.forward = lambda x: old(x) * 0


def _subclass(m):
    m.act = Scaled(10.0)


def _weights(m):
    wide = Kept(4, 10)
    m.wide = wide


def _called(m):
    m.act = Called(10.0)


def _stem_hook(m):
    m.stem.register_forward_hook(lambda _, __, out: out * 0)


def _frozen_stem(m):
    nn.init.zeros_(m.stem.weight)
    m.stem.requires_grad_(False)


def _frozen_wide(m):
    nn.init.zeros_(m.wide.weight)
    m.wide.requires_grad_(False)


# All samples have one row of h, at w and at whatever weights can be reached.
RANK_ONE = {
    "a replaced forward": _changed(lambda m: _instance(m.act, lambda self, x: x * 0)),
    "a wrapped forward": _changed(_bound),
    "a forward hook": _changed(_forward_hook),
    "a pre-hook": _changed(_pre_hook),
    "a hook on a hidden layer": _changed(_stem_hook),
    "a parametrization": _changed(_parametrized),
    "a subclass of the softplus": _changed(_subclass),
    "weights through __getattr__": _changed(_weights),
    "__call__ of a subclass": _changed(_called),
    "in place through .data": lambda: Net(between=_data),
    "in place through NumPy": lambda: Net(between=_numpy),
    "the batch size": lambda: Net(between=_by_size),
    "a proxy": lambda: Net(between=_by_type),
    "an attempt": lambda: Net(between=_tried),
    "a frozen stem": _changed(_frozen_stem),
    "a frozen wide layer": _changed(_frozen_wide),
    "all the same": lambda: Net(before=_collapse),
    "the wide layer's weights": lambda: Net(before=_own_weight),
    "clipped weights": lambda: Net(before=_clipped),
}
# Claims about them depend on something else than the sample: none is made.
NO_CLAIM = {
    "the fifth call": lambda: Net(between=_by_count),
    "a value": lambda: Net(between=_by_value),
    "the precision": lambda: Net(between=_by_dtype),
    "the mean of the batch": lambda: Net(before=_mean),
    "a scaled output": lambda: Net(after=lambda m, out: out * out.detach().abs().mean()),
    "a clamped output": lambda: Net(after=lambda m, out: out.clamp(-1, 1)),
    "an output in place": lambda: Net(after=lambda m, out: _data(m, out)),
    "a layer normalised over the batch": lambda: Net(before=lambda m, z: F.layer_norm(z, z.shape)),
    "batch statistics": lambda: Net(
        before=lambda m, z: F.batch_norm(z, None, None, training=True) if len(z) > 1 else z * 0
    ),
    "the sample's place": lambda: Net(before=lambda m, z: z + torch.arange(len(z)).to(z)[:, None]),
    "a global": lambda: Net(before=_global),
    "random numbers": lambda: Net(before=lambda m, z: z + torch.rand_like(z)),
}


def _global(model, z):
    CALLS["count"] += 1
    return z * (1 + CALLS["count"])
