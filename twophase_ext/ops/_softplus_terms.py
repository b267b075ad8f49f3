"""Sums of products that are closed under differentiation: softplus' derivatives of every order.

With s = 1 - exp(-beta y) and r = exp(-beta y) (so ds/dy = beta r, dr/dy = -beta r), every
derivative of softplus taken from its output y is a sum of c * s^a * r^b * (product of tensors).
Differentiating such a sum gives another one, so one autograd.Function serves every order.

Its jvp only calls Functions: inside a jvp torch switches forward differentiation off, and plain
operations there lose the tangents of the outer levels of nested jvps without a word.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """c * s^a * r^b * the product of tensors[i] for i in `factors`."""

    c: float
    a: int
    b: int
    factors: tuple[int, ...]


@dataclass(frozen=True)
class Terms:
    """A sum of terms. (A dataclass and not a tuple, so that functorch takes it as one argument.)"""

    beta: float
    terms: tuple[Term, ...]

    def by_y(self, new: int) -> tuple[Term, ...]:
        """The derivative by y, times tensors[new]."""

        def slopes() -> Iterator[Term]:
            for c, a, b, factors in self.terms:
                if a:
                    yield Term(c * a * self.beta, a - 1, b + 1, (*factors, new))
                if b:
                    yield Term(-c * b * self.beta, a, b, (*factors, new))

        return tuple(slopes())

    def by_factor(self, i: int, new: int) -> tuple[Term, ...]:
        """The derivative by tensors[i], times tensors[new]."""
        return tuple(
            Term(c, a, b, (*factors[:k], *factors[k + 1 :], new))
            for c, a, b, factors in self.terms
            for k, factor in enumerate(factors)
            if factor == i
        )

    def gradient(self, y: Tensor, tensors: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
        """The derivatives by y and by each tensor, times grad."""
        n = len(tensors)
        by = [self.by_y(n), *(self.by_factor(i, n) for i in range(n))]
        return [evaluate(self.beta, terms, y, *tensors, grad) for terms in by]

    def tangent(self, y: Tensor, tensors: tuple[Tensor, ...], *tangents: Tensor) -> Tensor:
        """The directional derivative; tangents: of y, then of each tensor."""
        n = len(tensors)
        terms = self.by_y(n)
        for i in range(n):
            terms += self.by_factor(i, n + 1 + i)
        return evaluate(self.beta, terms, y, *tensors, *tangents)


def evaluate(beta: float, terms: tuple[Term, ...], y: Tensor, *tensors: Tensor) -> Tensor:
    """The sum of `terms`, differentiable to any order in y and in every tensor."""
    return _Evaluate.apply(Terms(beta, terms), y, *tensors)


def batch_first(info: Any, dims: tuple, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Put vmap's dimension in front of every tensor, added where it is missing."""
    return [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(terms: Terms, y: Tensor, *tensors: Tensor) -> Tensor:
        # 16-bit types are computed in float32 and rounded once, as in the kernels
        wide = torch.promote_types(y.dtype, torch.float32)
        exponent = y.to(wide) * -terms.beta
        r, s = torch.exp(exponent), -torch.expm1(exponent)
        total = torch.zeros_like(r)
        for c, a, b, factors in terms.terms:
            product = c * s**a * r**b
            for i in factors:
                product = product * tensors[i]
            total = total + product
        return total.to(y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.terms, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, *tensors = ctx.saved_tensors
        return None, *ctx.terms.gradient(y, tuple(tensors), grad)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Tensor:
        y, *tensors = ctx.saved_tensors
        return ctx.terms.tangent(y, tuple(tensors), *tangents)

    @staticmethod
    def vmap(info: Any, dims: tuple, terms: Terms, *tensors: Tensor) -> tuple[Tensor, int]:
        return _Evaluate.apply(terms, *batch_first(info, dims[1:], tensors)), 0
