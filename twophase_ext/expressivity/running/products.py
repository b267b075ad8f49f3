"""Products of matrices, of two activations too, and convolutions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import refuse
from ..operator_norms import OperatorNorms, conv_norms, linear_norms
from .call import Call, Result
from .notes import mark
from .operand import Operand


class AffineMap(NamedTuple):
    """x times a constant weight, and a bias: the operands, and whether all weights are zero."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    is_zero: bool


def affine_map(call: Call) -> AffineMap | None:
    """The affine map with constant weights that the call applies to samples' numbers, if any."""
    own = call.name.removeprefix("aten::")
    if own not in _OPERANDS:
        return None
    owner = call.owner
    x, weight, bias = (call[name] for name in _OPERANDS[own])
    if not owner.depends(x):
        x, weight = weight, x
    if not owner.depends(x) or any(owner.depends(t) for t in (weight, bias) if t is not None):
        return None
    notes = [owner.notes.of(t) for t in (weight, bias) if t is not None]
    exact = not any(bool(note.error.any()) for note in notes if note is not None)
    return AffineMap(x, weight, bias, exact and not bool(weight.any()))


def bias_of(call: Call) -> Tensor | float:
    """What the affine map gives where all its weights are zero, to be broadcast."""
    own = call.name.removeprefix("aten::")
    bias = call[_OPERANDS[own][2]]
    if bias is None:
        return 0.0
    return bias.view(-1, *[1] * (call.out.dim() - 2)) if own == "convolution" else bias


def _norms(
    call: Call, weight: Tensor, key: tuple[Any, ...], compute: Callable[[Tensor], OperatorNorms]
) -> OperatorNorms:
    """Of a weight, kept from pass to pass: by where it lies, and by its numbers."""
    own = (weight.data_ptr(), tuple(weight.shape), weight.stride(), mark(weight), key)
    found = call.owner.norms.get(own)
    if found is None:
        found = weight, compute(weight.detach().double())  # kept: its place is not given away
        call.owner.norms[own] = found
    return found[1]


def _product(call: Call, left: Operand, right: Operand) -> tuple[Operand, Tensor]:
    """(the result as an operand, its error) of left @ right, the last two dimensions."""
    a, b = left.value, right.value
    rank, terms = call.out.dim(), a.shape[-1]
    places = []
    for operand, contracted in ((left, a.dim() - 1), (right, b.dim() - 2)):
        if operand.ids is None:
            continue
        if operand.dim == contracted:
            refuse("it adds up the samples")
        places.append(None if operand.dim is None else operand.dim)
    sample = [o for o in (left, right) if o.ids is not None]
    dim = places[0] if places else None
    if len(sample) == 2:
        same = places[0] == places[1] and torch.equal(*(o.ids for o in sample))  # type: ignore[arg-type]
        if not same or (dim is not None and dim >= rank - 2):
            refuse("it brings different samples together")
    ids = sample[0].ids if sample else None
    gamma = call.gamma(terms + 2)
    if len(sample) == 2 or (a.dim() == 3 and (dim == 0 or dim is None)):
        # block by block: || A B - A'B' ||_F <= ||A|| ||B - B'|| + ||B|| ||A - A'|| + both errors
        left_sizes, right_sizes = _blocks(a), _blocks(b)
        by = call.made(dim, ids)
        if dim is None:
            left_largest, right_largest = left_sizes.max().reshape(1), right_sizes.max().reshape(1)
            both = torch.linalg.vector_norm(left_sizes * right_sizes).reshape(1)
        else:
            left_largest = by.by_sample(left_sizes, "amax")
            right_largest = by.by_sample(right_sizes, "amax")
            both = by.by_sample((left_sizes * right_sizes).square(), "sum").sqrt()
        error = left_largest * right.error + right_largest * left.error + left.error * right.error
        return by, (error + gamma * both) * SLACK
    x, w = (left, right) if left.ids is not None else (right, left)
    weight = w.value if w is right else w.value.mT
    if weight.dim() == 2:
        norms = _norms(call, weight, (), linear_norms)
        plain, absolute = norms.plain, norms.absolute
    else:
        plain = absolute = float(_blocks(weight).max())
    error = (plain + w.error) * x.error + w.error * x.norm + gamma * absolute * x.norm
    return call.made(dim, ids), error * SLACK


def _blocks(a: Tensor) -> Tensor:
    """Upper bounds of the Frobenius norm of each matrix [..., p, q], [blocks]."""
    norms = torch.linalg.vector_norm(a.double(), dim=(-2, -1)).reshape(-1)
    size = a.shape[-1] * a.shape[-2]
    return (norms * (1 + (size + 8) * 2.0**-53) + math.sqrt(size) * 2.0**-510) * SLACK


def _mm(call: Call) -> list[Result]:
    left, right = call.operand("self"), call.operand("mat2")
    made, error = _product(call, left, right)
    return [Result(call.out, made.dim, made.ids, error)]


def _addmm(call: Call) -> list[Result]:
    if call["beta"] != 1 or call["alpha"] != 1:
        return refuse("no rule for multiples in a product")
    names = ("mat1", "mat2") if "mat1" in call.given else ("batch1", "batch2")
    made, error = _product(call, call.operand(names[0]), call.operand(names[1]))
    bias = call.operand("self").expanded(call.out.shape, (made.dim, made.ids))
    if not bias.constant and (bias.dim != made.dim or not torch.equal(bias.ids, made.ids)):  # type: ignore[arg-type]
        return refuse("it brings different samples together")
    dim, ids = (made.dim, made.ids) if made.ids is not None else (bias.dim, bias.ids)
    terms = call.gamma(call[names[0]].shape[-1] + 4)
    return [Result(call.out, dim, ids, error + bias.error + terms * bias.norm)]


def _convolution(call: Call) -> list[Result]:
    x, w = call.operand("input"), call.operand("weight")
    if not w.constant or x.constant:
        return refuse("no rule for weights that depend on the samples")
    if x.dim not in (None, 0):
        return refuse("its batch is not the samples")
    weight, groups = w.value, call["groups"]
    if call["transposed"] or weight.dim() != 4:
        norms = _norms(call, weight, ("conv", groups, call["transposed"]), _schur(groups))
    else:
        stride, dilation = (tuple(call[n]) * (2 // len(call[n])) for n in ("stride", "dilation"))
        norms = _norms(
            call,
            weight,
            (stride, dilation, groups),
            lambda v: conv_norms(v, stride, dilation, groups),
        )
    taps = weight[0].numel() if not call["transposed"] else weight.numel() // weight.shape[1]
    # by the taps, each a matrix of norm ||E_tap||_F at most: ||E|| <= sqrt(taps) ||E||_F
    off = math.sqrt(weight[0, 0].numel()) * w.error * SLACK
    rounding = (norms.absolute + off) * x.norm
    error = (norms.plain + off) * x.error + off * x.norm
    if call["bias"] is not None:
        bias = call.operand("bias")
        places = math.prod(call.out.shape) // (call.out.shape[1] * (call.owner.samples or 1))
        share = math.sqrt(places) * float(bias.norm)
        rounding = rounding + share
        error = error + math.sqrt(places) * bias.error
    return [Result(call.out, x.dim, x.ids, error + call.gamma(taps + 4) * rounding)]


def _schur(groups: int) -> Callable[[Tensor], OperatorNorms]:
    """Any convolution, or its transpose: absolute row sums and column sums, all taps together."""

    def compute(weight: Tensor) -> OperatorNorms:
        sums = weight.abs().flatten(2).sum(2)  # [out, in / groups]
        rows = float(sums.sum(1).max())
        columns = float(sums.view(groups, -1, sums.shape[1]).sum(1).max())
        bound = math.sqrt(rows) * math.sqrt(columns) * SLACK
        return OperatorNorms(bound, bound)

    return compute


def _weight_norm(call: Call) -> list[Result]:
    """g v / ||v||, of parameters: every number to a relative error."""
    v, g = call.operand("v"), call.operand("g")
    if not (v.constant and g.constant and v.exact and g.exact):
        return refuse("no rule for weights that are computed")
    results = []
    for out in call.outs:
        made = call.made(None, None, out)
        error = call.gamma(v.value.numel() + 16) * made.norm
        results.append(Result(out, None, None, error))
    return results


_OPERANDS = {
    "mm": ("self", "mat2", ""),
    "bmm": ("self", "mat2", ""),
    "addmm": ("mat1", "mat2", "self"),
    "convolution": ("input", "weight", "bias"),
}


def _vectors(call: Call) -> list[Result]:
    """Matrix by vector, or vector by vector, of constants: |a^T b| errs by gamma |a| |b|."""
    second = next(name for name in ("vec", "tensor", "other") if name in call.given)
    a, b = call.operand("self"), call.operand(second)
    if not (a.constant and b.constant):
        return refuse("no rule for products of samples' vectors")
    gamma = call.gamma(b.value.numel() + 2)
    error = a.norm * b.error + b.norm * a.error + a.error * b.error + gamma * a.norm * b.norm
    return [Result(call.out, None, None, error * SLACK)]


PRODUCTS: dict[str, Callable[[Call], list[Result]]] = {
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "convolution": _convolution,
    "_weight_norm_interface": _weight_norm,
    **dict.fromkeys(("mv", "dot", "vdot"), _vectors),
}
