"""What every call must fulfil: a refusal is the documented one and has changed nothing."""

import collections
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPEATS = 20  # of an accepted call, on the same numbers in other memory
CALLS: collections.Counter[str] = collections.Counter()  # by function
# What torch itself says where it dispatches, of kinds of tensors that the operators do not know.
OF_TORCH = re.compile(
    r"Could not run 'twophase::|Could not run 'aten::|mutable TensorLists with negation|"
    r"ZeroTensors are immutable|(a leaf|a view of a leaf) Variable that requires grad|"
    r"twophase::\w+\(\) Expected a value of type|twophase::\w+\(\): argument '|"
    r"mat1 and mat2|Input type|Cannot access accelerator device|"
    r"Tensor.item\(\) cannot be called on meta tensors|Cannot copy out of meta tensor|"
    r"model: its Jacobian holds NaN or infinity"
)


@functools.lru_cache(64)
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


class Refused:
    """The call was refused as documented."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def storages(value: Any) -> Iterable[tuple[str, Any]]:
    """Every piece of memory among arguments, in order."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided and value.is_cpu and not value._is_zerotensor():
            yield "tensor", value.untyped_storage()
    elif isinstance(value, np.ndarray):
        yield "array", value
    elif isinstance(value, torch.nn.Module):
        yield from storages(list(value.state_dict().values()))
    elif isinstance(value, dict):
        yield from storages(list(value.values()))
    elif isinstance(value, list | tuple):
        yield "list", list(value)
        for item in value:
            yield from storages(item)


def content(kind: str, memory: Any) -> Any:
    """What a piece of memory holds."""
    if kind == "tensor":
        return bytes(memory.nbytes()) if not memory.data_ptr() else _bytes(memory)
    return memory.tobytes() if kind == "array" else [id(item) for item in memory]


def _bytes(storage: torch.UntypedStorage) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()


def attempt(
    function_: Callable[..., Any],
    /,
    *args: Any,
    label: str = "",
    names: Iterable[str] = (),
    changes: Iterable[Any] = (),
    **kwargs: Any,
) -> Any:
    """The result, or Refused; AssertionError where neither is as it must be.

    names: arguments that an error may name, beside those of the signature. changes: arguments that
    an accepted call writes to; every other one keeps its bytes, after a refusal all do.
    """
    label = label or function_.__name__
    CALLS[label] += 1
    before = [(k, m, content(k, m)) for k, m in storages([args, kwargs])]
    refused: BaseException | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function_(*args, **kwargs)
        except (ValueError, TypeError) as error:
            refused = error
            begin = re.match(r"(?:std of )?(\w+)", str(error))
            assert begin and begin[1] in {*parameters(function_), *names}, (
                f"{label}: no argument is named: {type(error).__name__}: {error}"
            )
        except (RuntimeError, NotImplementedError) as error:
            refused = error
            text = str(error)
            assert "INTERNAL ASSERT" not in text, f"{label}: {text}"
            assert OF_TORCH.search(text), f"{label}: {type(error).__name__}: {text}"
    for warning in caught:
        text = str(warning.message)
        assert "internal" not in text.lower() and "read" not in text, f"{label}: warned: {text}"
    written = [] if refused else [m.data_ptr() for k, m in storages(list(changes)) if k == "tensor"]
    for k, memory, old in before:
        if k == "tensor" and memory.data_ptr() in written:
            continue
        if k == "list" and not refused:
            continue
        assert content(k, memory) == old, f"{label}: changed an argument ({refused!r})"
    return Refused(refused) if refused else result


def again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An accepted call on the same numbers in other memory: it is accepted too."""
    CALLS[function.__name__] += 1
    return function(*args, **kwargs)


def close(got: Tensor, wanted: Any, bound: Any, what: str) -> None:
    """|got - wanted| <= bound elementwise; an infinite bound (overflow) asks nothing.

    Where `wanted` is not finite, `got` is not either. A bound of NaN asks no more than that.
    """
    g = got.detach().double().numpy().astype(np.longdouble)
    w, b = np.asarray(wanted, np.longdouble), np.asarray(bound, np.longdouble)
    with np.errstate(all="ignore"):
        near = (np.abs(g - w) <= b) | np.isnan(b)
        good = np.where(np.isfinite(w), near, ~np.isfinite(g)) | np.isinf(b)
    assert g.shape == w.shape and good.all(), (
        f"{what}: {g[~good][:3]} where {w[~good][:3]} was expected, "
        f"within {np.broadcast_to(b, w.shape)[~good][:3]}"
    )


def same_bits(got: Tensor, wanted: Tensor, what: str) -> None:
    """The same bytes, NaN included."""
    a, b = (
        t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        for t in (got, wanted)
    )
    assert torch.equal(a, b), f"{what}: {got} and {wanted} differ in their bits"
