"""A model as it runs, in 60 digits beside: every operator once more on numbers of many digits.

Twins of tensors are kept by storage, as object arrays: a view's is the same view of it, and a write
in place writes there too. Operators that only move numbers are run on the numbers' places.
"""

import itertools
import math

import mpmath
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

try:  # ten times as fast
    import gmpy2 as digits

    digits.get_context().precision = 200
    number = digits.mpfr
except ImportError:
    digits = mpmath.mp.clone()
    digits.prec = 200
    number = digits.mpf

FIRST = 1 << 40  # places of numbers begin here: what is smaller is a fill value


def numbers(values):
    """An object array of the numbers as they are."""
    flat = np.empty(values.numel(), dtype=object)
    flat[:] = [number(v) for v in values.detach().double().flatten().tolist()]
    return flat.reshape(tuple(values.shape))


def each(function):
    return np.frompyfunc(function, 1, 1)


def _sigmoid(v):
    return 1 / (1 + digits.exp(-v)) if v >= 0 else digits.exp(v) / (1 + digits.exp(v))


def _softplus(v, beta=1.0):
    b = number(beta)
    return digits.log1p(digits.exp(-abs(b * v))) / b + max(v, number(0))


def _gelu(v, tanh):
    if tanh:
        # torch's constant is a double; the function that is meant has the real number
        inner = digits.sqrt(2 / number(math.pi)) * (v + number(0.044715) * v**3)
        return v * (1 + digits.tanh(inner)) / 2
    return v * (1 + digits.erf(v / digits.sqrt(number(2)))) / 2


def _clamp(v, low=None, high=None):
    v = v if low is None else max(v, number(low))
    return v if high is None else min(v, number(high))


def _elu(v, alpha=1.0, scale=1.0, inner=1.0):
    return number(scale) * (v if v > 0 else number(alpha) * digits.expm1(v * number(inner)))


UNARY = {
    "relu": lambda v: max(v, number(0)),
    "tanh": lambda v: digits.tanh(v),
    "sigmoid": _sigmoid,
    "silu": lambda v: v * _sigmoid(v),
    "mish": lambda v: v * digits.tanh(_softplus(v)),
    "gelu": lambda v, approximate="none": _gelu(v, approximate == "tanh"),
    "elu": _elu,
    "hardswish": lambda v: v * _clamp(v + 3, 0, 6) / 6,
    "hardsigmoid": lambda v: _clamp(v + 3, 0, 6) / 6,
    "leaky_relu": lambda v, slope=0.01: v if v > 0 else v * number(slope),
    "hardtanh": _clamp,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "sin": lambda v: digits.sin(v),
    "cos": lambda v: digits.cos(v),
    "abs": abs,
    "neg": lambda v: -v,
    "exp": lambda v: digits.exp(v),
    "log": lambda v: digits.log(v),
    "sqrt": lambda v: digits.sqrt(v),
    "rsqrt": lambda v: 1 / digits.sqrt(v),
    "reciprocal": lambda v: 1 / v,
    "softplus": _softplus,  # of torch, which ends at a threshold: not drawn
    "twophase::softplus": _softplus,
}


def _power(x, exponent):
    return x ** (int(exponent) if float(exponent).is_integer() else number(exponent))


BINARY = {
    "add": lambda a, b, alpha=1: a + b * alpha,
    "sub": lambda a, b, alpha=1: a - b * alpha,
    "rsub": lambda a, b, alpha=1: b - a * alpha,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "_prelu_kernel": lambda a, b: np.where(a > 0, a, a * b),
    "pow": _power,
    "maximum": np.maximum,
    "minimum": np.minimum,
}


def _axes(dim, x):
    dims = range(x.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return tuple(d % x.ndim for d in dims)


def _sum(x, dim=None, keepdim=False, dtype=None):
    return np.sum(x, axis=_axes(dim, x), keepdims=keepdim)


def _mean(x, dim=None, keepdim=False, dtype=None):
    axes = _axes(dim, x)
    return np.sum(x, axis=axes, keepdims=keepdim) / math.prod(x.shape[a] for a in axes)


def _var(x, dim=None, *, correction=None, keepdim=False):
    axes = _axes(dim, x)
    c = x - _mean(x, axes, True)
    count = math.prod(x.shape[a] for a in axes) - (1 if correction is None else correction)
    return np.sum(c * c, axis=axes, keepdims=keepdim) / count


def _exps(x, dim):
    # masks are -inf, or so large that their exponential is nothing
    e = each(lambda v: digits.exp(v))(x - np.max(x, axis=dim, keepdims=True))
    return e, np.sum(e, axis=dim, keepdims=True)


def _softmax(x, dim, half=False):
    e, total = _exps(x, dim)
    return e / total


def _log_softmax(x, dim, half=False):
    _, total = _exps(x, dim)
    return x - np.max(x, axis=dim, keepdims=True) - each(lambda v: digits.log(v))(total)


def _logsumexp(x, dim, keepdim=False):
    (axis,) = _axes(dim, x)
    _, total = _exps(x, axis)
    found = np.max(x, axis=axis, keepdims=True) + each(lambda v: digits.log(v))(total)
    return found if keepdim else np.squeeze(found, axis)


def _norm(x, ord=2, dim=None, keepdim=False, dtype=None):
    return each(lambda v: digits.sqrt(v))(np.sum(x * x, axis=_axes(dim, x), keepdims=keepdim))


def _normalized(x, axes, eps):
    mean, var = _mean(x, axes, True), _var(x, axes, correction=0, keepdim=True)
    return (x - mean) / each(lambda v: digits.sqrt(v))(var + number(eps))


def _affine(x, weight, bias, shape):
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _layer_norm(x, shape, weight, bias, eps):
    found = _normalized(x, tuple(range(x.ndim - len(shape), x.ndim)), eps)
    return _affine(found, weight, bias, shape)


def _group_norm(x, weight, bias, n, c, hw, groups, eps):
    found = _normalized(x.reshape(n, groups, -1), (2,), eps).reshape(x.shape)
    return _affine(found, weight, bias, (1, c) + (1,) * (x.ndim - 2))


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    if training:
        found = _normalized(x, (0, *range(2, x.ndim)), eps)
    else:
        root = each(lambda v: digits.sqrt(v))(var + number(eps))
        found = (x - mean.reshape(shape)) / root.reshape(shape)
    return _affine(found, weight, bias, shape)


def _convolution(x, weight, bias, stride, padding, dilation, transposed, extra, groups):
    assert not transposed and x.ndim == 4
    out, depth, kh, kw = weight.shape
    margins = [(p, p) for p in padding]
    x = np.pad(x, [(0, 0), (0, 0), *margins], constant_values=number(0))
    (sh, sw), (dh, dw) = stride, dilation
    rows = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.empty((len(x), out, rows, columns), dtype=object)
    for i, j, g in itertools.product(range(rows), range(columns), range(groups)):
        own = slice(g * out // groups, (g + 1) * out // groups)
        part = x[:, g * depth : (g + 1) * depth, i * sh : i * sh + dh * kh : dh]
        part = part[..., j * sw : j * sw + dw * kw : dw].reshape(len(x), -1)
        y[:, own, i, j] = part @ weight[own].reshape(out // groups, -1).T
    return y if bias is None else y + bias[:, None, None]


def _windows(x, kernel, stride, padding, ceil):
    """[b, c, rows, columns] lists of the numbers within each window."""
    stride = stride or kernel
    given = (kernel, stride, padding)
    two = [[v, v] if isinstance(v, int) else list(v) * (2 // len(v)) for v in given]
    shape = [
        (math.ceil if ceil else math.floor)((n + 2 * p - k) / s) + 1
        for n, k, s, p in zip(x.shape[2:], *two, strict=True)
    ]
    shape = [
        m - (ceil and (m - 1) * s >= n + p)
        for m, n, s, p in zip(shape, x.shape[2:], two[1], two[2], strict=True)
    ]
    for i, j in itertools.product(*map(range, shape)):
        ranges = [
            slice(max(0, t * s - p), max(0, t * s - p + k))
            for t, k, s, p in zip((i, j), *two, strict=True)
        ]
        yield shape, i, j, x[:, :, ranges[0], ranges[1]].reshape(*x.shape[:2], -1)


def _pooled(x, kernel, stride, padding, ceil, what):
    y = None
    for shape, i, j, window in _windows(x, kernel, stride, padding, ceil):
        y = np.empty((*x.shape[:2], *shape), dtype=object) if y is None else y
        y[:, :, i, j] = what(window)
    return y


def _max_pool(x, kernel, stride=(), padding=0, dilation=1, ceil=False):
    return _pooled(x, kernel, stride, padding, ceil, lambda w: np.max(w, axis=2))


def _avg_pool(x, kernel, stride=(), padding=0, ceil=False, count_include_pad=True, divisor=None):
    assert count_include_pad and not ceil and divisor is None
    size = math.prod([kernel, kernel] if isinstance(kernel, int) else kernel)
    return _pooled(x, kernel, stride, padding, ceil, lambda w: np.sum(w, axis=2) / size)


def _adaptive(x, shape):
    y = np.empty((*x.shape[:2], *shape), dtype=object)
    for i, j in itertools.product(*map(range, shape)):
        ranges = [
            slice(t * n // m, -(-(t + 1) * n // m))
            for t, n, m in zip((i, j), x.shape[2:], shape, strict=True)
        ]
        y[:, :, i, j] = _mean(x[:, :, ranges[0], ranges[1]], (2, 3))
    return y


def _weight_norm(v, g, dim=0):
    axes = tuple(a for a in range(v.ndim) if a != dim)
    root = each(lambda s: digits.sqrt(s))(np.sum(v * v, axis=axes, keepdims=True))
    return v * (g / root)


OTHERS = {
    "sum": _sum,
    "mean": _mean,
    "var": _var,
    "amax": lambda x, dim=(), keepdim=False: np.max(x, axis=_axes(dim, x), keepdims=keepdim),
    "cumsum": lambda x, dim: np.cumsum(x, axis=dim),
    "_softmax": _softmax,
    "_safe_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "linalg_vector_norm": _norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "mm": lambda a, b: a @ b,
    "bmm": lambda a, b: np.stack([p @ q for p, q in zip(a, b, strict=True)]),
    "addmm": lambda c, a, b, beta=1, alpha=1: c * beta + (a @ b) * alpha,
    "convolution": _convolution,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _avg_pool,
    "_adaptive_avg_pool2d": _adaptive,
    "_weight_norm_interface": _weight_norm,
    "addcmul": lambda x, a, b, value=1: x + a * b * value,
}
MOVES = {
    *("cat", "stack", "clone", "copy", "index", "index_select", "roll", "flip", "repeat"),
    *("constant_pad_nd", "reflection_pad2d", "upsample_nearest2d", "masked_fill", "where"),
    *("_to_copy", "gather", "embedding", "contiguous", "_unsafe_view", "fill"),
}


class Digits(TorchDispatchMode):
    """Within it every tensor made of real numbers has a twin of 60 digits."""

    def __init__(self):
        super().__init__()
        self.twins = {}  # of each storage, with a tensor that keeps it alive

    def of(self, tensor):
        """The twin of a tensor: a view of its storage's."""
        key = tensor.untyped_storage()._cdata
        if key not in self.twins:
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            whole = torch.as_strided(tensor.detach(), (size,), (1,), 0)
            self.twins[key] = numbers(whole), tensor
        base = self.twins[key][0]
        strides = tuple(s * base.itemsize for s in tensor.stride())
        start = base[tensor.storage_offset() :] if tensor.numel() else base
        return np.lib.stride_tricks.as_strided(start, tuple(tensor.shape), strides)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        real = [t for t in given if t.is_floating_point()]
        written = [
            (args[i] if i < len(args) else kwargs[a.name])
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        before = {t.untyped_storage()._cdata for t in given}
        value = self._value(name, func, args, kwargs) if real else None  # before it is written
        out = func(*args, **kwargs)
        results = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        new = [t for t in results if t.untyped_storage()._cdata not in before]
        if name in ("transpose", "t", "squeeze", "unsqueeze"):  # of shapes and strides alone
            return out
        if written and written[0].is_floating_point():
            self.of(written[0])[...] = self.value_of(name, value, args, func)
        elif real and new and new[0].is_floating_point():
            if value is None:
                raise NotImplementedError(name)
            value = np.asarray(value, dtype=object)
            assert value.shape == tuple(new[0].shape), (name, value.shape, new[0].shape)
            self.of(new[0])[...] = value
        return out

    def value_of(self, name, value, args, func):
        if value is not None:
            return value
        if name in ("zero", "fill"):
            return number(0.0 if name == "zero" else float(args[1]))
        raise NotImplementedError(name)

    def _value(self, name, func, args, kwargs):
        def twin(a):
            real = isinstance(a, torch.Tensor) and a.is_floating_point()
            return self.of(a) if real else a

        if name == "copy" and func._schema.name.endswith("_"):
            return np.broadcast_to(self.of(args[1]), tuple(args[0].shape))
        if name in MOVES:
            return self._moved(func, args, kwargs)
        if name in UNARY:
            rest = [a for a in args[1:] if not isinstance(a, torch.Tensor)]
            return each(lambda v: UNARY[name](v, *rest, **kwargs))(self.of(args[0]))
        if name in BINARY:
            a, b, *rest = (twin(a) for a in args)
            b = number(b) if isinstance(b, float) else b
            a = number(a) if isinstance(a, float) else a
            b = b.numpy() if isinstance(b, torch.Tensor) else b
            return BINARY[name](a, b, *rest, **kwargs)
        if name in OTHERS:
            return OTHERS[name](*tree_map(twin, args), **tree_map(twin, kwargs))
        return None

    def _moved(self, func, args, kwargs):
        """The operator on places: of all numbers of its operands, one after the other."""
        pool, start = [], FIRST

        def places(a):
            nonlocal start
            if not (isinstance(a, torch.Tensor) and a.is_floating_point()):
                return a
            pool.append(self.of(a).flatten())
            own = torch.arange(start, start + a.numel(), dtype=torch.float64).reshape(a.shape)
            start += a.numel()
            return own

        replaced, named = tree_map(places, (args, kwargs))
        named.pop("dtype", None)
        found = func(*replaced, **named)
        values = np.concatenate(pool)
        flat = [
            values[int(p) - FIRST] if p >= FIRST else number(p) for p in found.flatten().tolist()
        ]
        result = np.empty(len(flat), dtype=object)
        result[:] = flat
        return result.reshape(tuple(found.shape))
