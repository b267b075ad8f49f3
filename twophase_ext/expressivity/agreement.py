"""Is what was bounded what the model computes? Compared over all samples.

Bounds come from a graph, a certificate from weights and features: none of them calls the model. So
the model is called too, on every sample, in another order and other batches than the features were
computed in, with hooks, replaced forwards and control flow as they are; what it gives has to lie
within the bounds. A float64 copy with random last-layer weights answers for the certified numbers,
the user's own model in its own precision for the copy.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.messages import type_and_line
from ..linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma
from ..linalg.norms import frobenius_upper, norm_upper
from ..linalg.progress import Stage
from ..model.activations import SLOPE
from ..model.drawn import drawn
from ..model.holding import trainable
from ..model.probing import State, compiled, cuda_devices, rows_into
from .bounded import Disagrees
from .problem import Problem

BATCH = 192  # samples; the features are computed 256 at a time
# The model's own float64 evaluation rounds as the bounded one does, in another order: twice its
# bound would do. Without bounds: networks that mix nothing agree to 1e-10 between batch sizes.
ERRORS, RELATIVE = 8, 1e-9
WHOLE = 1 << 20  # numbers of inputs that make one batch, too
OWN_EPS = 256  # roundings of the model's own precision, relative to the sizes that enter
SCALES = (1.0, 30.0)  # of the wide layer's weights drawn anew: guards show at large values
NOISE = (1e-2, 3.0)  # relative, of the weights at which equal inputs have to give equal rows


@dataclass
class _Seen:
    """One batch as the model computes it: z into the wide layer, h into the last, its output."""

    z: Tensor | None
    h: Tensor
    output: Tensor


@dataclass
class Expected:
    """z and h of a batch, with how far from them the model's own may be, a number a sample.

    size: what rounding in another precision is relative to.
    """

    z: Tensor | None
    z_allowed: Tensor | None
    h: Tensor | None
    h_allowed: Tensor | None
    size: Tensor


class Reference:
    """What the bounded features say that the model computes."""

    def __init__(self, problem: Problem, wide: nn.Linear | None) -> None:
        """Of the weights as they are in the copy. wide: the layer whose input is bounded.

        None: the bounded features are h itself.
        """
        found = problem.bounded
        if found is None:
            raise ValueError("problem: expected bounded features, got none yet")
        self.problem, self.wide = problem, wide
        self.z, self.error = found.z, found.error
        if wide is not None:
            self.weight = wide.weight.detach()
            own = wide.bias
            self.bias = self.weight.new_zeros(len(self.weight)) if own is None else own.detach()
            self.norm, self.sizes = norm_upper(self.weight), frobenius_upper(self.weight)
            self.shift = frobenius_upper(self.bias)

    def __call__(self, index: Tensor) -> Expected:
        """Of the samples `index`."""
        row = self.problem.data.group[index]
        z, error = self.z[row], self.error[row]
        norms = z.norm(dim=1)
        allowed = ERRORS * error + 64 * UNIT_ROUNDOFF * norms
        if self.problem.narrowed:  # the model rounds to float32 what was bounded without
            allowed = allowed + OWN_EPS * self.problem.eps * (norms + norms.mean())
        if self.wide is None:
            return Expected(None, None, z, allowed, norms)
        d, m = z.shape[1], len(self.weight)
        h = self.problem.activation(torch.addmm(self.bias, z, self.weight.T))
        rounding = gamma(d + 2) * (self.sizes * norms + self.shift)
        # near its kink softplus errs by the size of its bend
        bend = 1 / self.problem.beta if self.problem.wide is not None else 1.0
        evaluation = 8 * UNIT_ROUNDOFF * (h.norm(dim=1) + math.sqrt(m) * bend)
        h_allowed = ERRORS * SLACK * SLOPE * (self.norm * error + rounding + evaluation)
        if self.problem.narrowed:
            h_allowed = h_allowed + SLOPE * self.norm * allowed
        size = h.norm(dim=1) + self.sizes * norms + self.shift
        return Expected(z, allowed, h, h_allowed, size)


class Stored:
    """Features that were computed without bounds, in index order: the model gives them again."""

    def __init__(self, h: Tensor, problem: Problem) -> None:
        """h [N, m_H]: of the distinct inputs."""
        self.h, self.group = h, problem.data.group
        eps = problem.eps
        self.relative = max(RELATIVE, OWN_EPS * eps if eps > 1e-15 else 0.0)
        self.mean = float(h.norm(dim=1).mean())

    def __call__(self, index: Tensor) -> Expected:
        """Of the samples `index`."""
        h = self.h[self.group[index]]
        size = h.norm(dim=1) + self.mean
        return Expected(None, None, h, self.relative * size, size)


@torch.no_grad()
def require_agreement(
    problem: Problem, expected: Reference | Stored, stage: Stage | None = None
) -> None:
    """The model's own features and outputs are those expected, over all samples.

    Raise Disagrees where the model gives other features, or another output, than expected.

    Two passes over all samples (`Problem.compared` of them, drawn at random, where these cost more
    than OPERATIONS): the float64 copy, its last layer's weights drawn anew, in a random
    order and batches of BATCH; and the user's own model, or a copy of it that holds the witness, in
    its own precision. Both keep every parameter and buffer to the bit. Features that are not finite
    are left to the methods.
    """
    _require_copy(problem, expected, stage)
    with problem.own_model() as own, torch.enable_grad(), _constant(own):
        for index, seen in _passes(problem, own, problem.dtype, stage, shuffled=False, size=256):
            with torch.no_grad():
                _compare_own(problem, own, expected(index), seen, index)


def _require_copy(problem: Problem, expected: Reference | Stored, stage: Stage | None) -> None:
    with _other_last_layer(problem), _constant(problem.model):
        for size in _sizes(problem):
            for index, seen in _passes(
                problem, problem.model, torch.float64, stage, shuffled=True, size=size
            ):
                _compare(problem, expected(index), seen, index, "float64")


@torch.no_grad()
def require_free_wide_layer(problem: Problem, stage: Stage | None = None) -> None:
    """Raise Disagrees where h is not activation(z W^T + b) at other W and b, or z is another one.

    The claim "some weights of the wide layer" is about weights that the model does not hold.
    """
    wide = problem.analytic_linear
    for scale in SCALES:
        with drawn(list(wide.parameters()), scale):
            _require_copy(problem, Reference(problem, wide), stage)
    require_agreement(problem, Reference(problem, wide), stage)


@torch.no_grad()
def require_equal_rows(problem: Problem) -> None:
    """Raise Disagrees where equal inputs do not give equal rows of h at other weights, too.

    Their places in the batches are drawn, and the trainable weights moved: a model that adds
    something by position, or mixes the samples of a batch, has other rows.
    """
    data = problem.data
    equal = torch.tensor([i for g in data.repeated for i in g], device="cpu")
    chosen = None if problem.compared == data.n else equal[: problem.compared]
    tolerance = max(RELATIVE, OWN_EPS * problem.eps if problem.eps > 1e-15 else 0.0)
    for noise in NOISE:
        with _moved(problem, noise), _constant(problem.model):
            for size in _sizes(problem):
                passes = _passes(
                    problem, problem.model, torch.float64, None, shuffled=True, size=size,
                    chosen=chosen,
                )  # fmt: skip
                _require_equal(passes, data.group, tolerance)
    with problem.own_model() as own, _constant(own):
        passes = _passes(problem, own, problem.dtype, None, shuffled=False, size=256, chosen=chosen)
        _require_equal(passes, data.group, OWN_EPS * torch.finfo(problem.dtype).eps)


def _require_equal(passes: Iterator[tuple[Tensor, _Seen]], group: Tensor, tolerance: float) -> None:
    first: dict[int, Tensor] = {}
    for index, seen in passes:
        for row, i in enumerate(index.tolist()):
            h = seen.h[row]
            other = first.setdefault(int(group[i]), h)
            if not bool((h - other).norm() <= tolerance * (h.norm() + other.norm())):
                raise Disagrees(
                    f"sample {i} has an input equal to another one's, but not its row of h: "
                    "the model depends on a sample's place or on the others of its batch"
                )


def _sizes(problem: Problem) -> list[int]:
    """Of the batches of each pass: few samples come in several batches, and in one."""
    n = problem.data.n
    small = [BATCH] if n > BATCH else [-(-3 * n // 8)]
    return small + ([n] if n * problem.inputs[0][0].numel() <= WHOLE else [])


def _passes(
    problem: Problem,
    model: nn.Module,
    dtype: torch.dtype,
    stage: Stage | None,
    *,
    shuffled: bool,
    size: int,
    chosen: Tensor | None = None,
) -> Iterator[tuple[Tensor, _Seen]]:
    """(samples, what the model computes of them) until every sample has come once.

    chosen: these alone.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    order = torch.randperm(problem.data.n, generator=generator, device="cpu")[: problem.compared]
    if chosen is not None:
        order = chosen[torch.randperm(len(chosen), generator=generator, device="cpu")]
    order = order if shuffled else order.sort().values
    for index in order.split(size):
        x = problem.data.rows(index)
        yield index, _observe(problem, model, x.to(dtype) if x.is_floating_point() else x)
        if stage is not None:
            stage.advance(len(index))


def _observe(problem: Problem, model: nn.Module, x: Tensor) -> _Seen:
    """Run the model as its owner does, and see what enters the wide and the last layer."""
    chain = problem.chain_in(model)
    caught: dict[int, Tensor] = {}

    def keep(place: int) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            caught[place] = (args[0] if args else kwargs["input"]).detach().clone()

        return hook

    handles = [
        module.register_forward_pre_hook(keep(place), with_kwargs=True)  # type: ignore[arg-type]
        for place, module in ((0, chain[0]), (len(chain) - 1, chain[-1]))
    ]
    try:
        output = model(x.clone())
        output = output.detach() if isinstance(output, Tensor) else output
    except Exception as error:
        raise Disagrees(
            f"the model does not run on these samples ({type_and_line(error)})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    h = caught.get(len(chain) - 1)
    if h is None or not isinstance(output, Tensor):
        raise Disagrees("the model does not reach its last layer on some samples")
    if h.dim() == 3:  # one token's row is picked
        h = rows_into(model, [chain[-1]], x)
        caught[0] = h if len(chain) == 1 else rows_into(model, chain, x)
    return _Seen(caught.get(0) if len(chain) > 1 else None, h, output)


def _compare(problem: Problem, expected: Expected, seen: _Seen, index: Tensor, what: str) -> None:
    for name, value, allowed, own in (
        ("the wide layer's input", expected.z, expected.z_allowed, seen.z),
        ("h", expected.h, expected.h_allowed, seen.h),
    ):
        if value is not None and allowed is not None:
            _require_close(name, own, value, allowed, index, what)
    last = problem.last
    weight, bias = last.weight, last.bias
    outputs = F.linear(seen.h, weight, bias)
    shift = 0.0 if bias is None else frobenius_upper(bias)
    sizes = frobenius_upper(weight) * seen.h.norm(dim=1) + shift
    allowed = ERRORS * gamma(weight.shape[1] + 2) * sizes
    _require_close("its output", seen.output, outputs, allowed, index, what)


def _compare_own(
    problem: Problem, own: nn.Module, expected: Expected, seen: _Seen, index: Tensor
) -> None:
    """As far as the model's own precision goes: is the float64 copy the same function?

    And is what torch.compile made of it, where the user's model is compiled?
    """
    dtype = problem.dtype
    what = f"the user's own model ({dtype})"
    relative = min(0.5, OWN_EPS * torch.finfo(dtype).eps)
    last: nn.Linear = problem.chain_in(own)[-1]  # type: ignore[assignment]
    shift = 0.0 if last.bias is None else frobenius_upper(last.bias.double())
    sizes = frobenius_upper(last.weight.double()) * seen.h.double().norm(dim=1) + shift
    outputs = F.linear(seen.h, last.weight, last.bias).double()
    _require_close("its output", seen.output, outputs, relative * sizes, index, what)
    if compiled(problem.network.model):
        _compare_compiled(problem, last, seen, index, relative)
    _compare_features(expected, seen, index, relative, what)


def _compare_compiled(
    problem: Problem, last: nn.Linear, seen: _Seen, index: Tensor, relative: float
) -> None:
    """The model as torch.compile compiled it, under weights of the last layer that hide nothing."""
    dtype = problem.dtype
    x = problem.data.rows(index)
    with drawn(list(last.parameters(recurse=False)), 1.0):
        try:
            output = problem.network.model(x.to(dtype) if x.is_floating_point() else x)
        except Exception as error:
            raise Disagrees(f"the compiled model does not run ({type_and_line(error)})") from error
        outputs = F.linear(seen.h, last.weight, last.bias).double()
        shift = 0.0 if last.bias is None else frobenius_upper(last.bias.double())
        sizes = frobenius_upper(last.weight.double()) * seen.h.double().norm(dim=1) + shift
    what = f"the model as torch.compile compiled it ({dtype})"
    _require_close("its output", output, outputs, relative * sizes, index, what)


def _compare_features(
    expected: Expected, seen: _Seen, index: Tensor, relative: float, what: str
) -> None:
    for name, value, given in (
        ("the wide layer's input", expected.z, seen.z),
        ("h", expected.h, seen.h),
    ):
        if value is not None:
            size = expected.size if name == "h" else value.norm(dim=1)
            allowed = relative * (size + value.norm(dim=1).mean())
            _require_close(name, given, value, allowed, index, what)


def _require_close(
    name: str, own: Tensor | None, value: Tensor, allowed: Tensor, index: Tensor, what: str
) -> None:
    if own is None or own.shape != value.shape:
        got = None if own is None else tuple(own.shape)
        raise Disagrees(f"{name}: expected {tuple(value.shape)}, the model gives {got}")
    apart = (own.double() - value).norm(dim=1)
    # what overflows is no proof anyway
    finite = value.isfinite().all(1) & allowed.isfinite()
    bad = finite & ~(apart <= allowed)
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        raise Disagrees(
            f"what the model computes is not what was bounded: {name} of sample {int(index[k])} "
            f"is {float(apart[k]):.2g} from it where rounding allows {float(allowed[k]):.2g} "
            f"({what}); "
            "hooks, replaced forwards, values that depend on other samples of the batch, "
            "on earlier calls or on control flow do that"
        )


@contextmanager
def _constant(model: nn.Module) -> Iterator[None]:
    """Raise Disagrees where a parameter or buffer is another one afterwards, or where torch's
    generators have moved on.
    """
    before = State(model)
    with torch.random.fork_rng(devices=cuda_devices()):
        drawn = _generators()
        yield
        if _generators() != drawn:
            raise Disagrees("the model draws random numbers in evaluation mode")
    if changed := before.changed():
        raise Disagrees(f"the model's forward pass changes its own {changed[0]!r}")


def _generators() -> list[bytes]:
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda_devices())]
    return [state.cpu().numpy().tobytes() for state in states]


@contextmanager
def _other_last_layer(problem: Problem) -> Iterator[None]:
    """Weights of the last layer at which nothing that follows it can hide."""
    with drawn([p for p in problem.last.parameters()], 1.0):
        yield


@contextmanager
def _moved(problem: Problem, noise: float) -> Iterator[None]:
    """All trainable weights of the copy moved."""
    free = [
        p
        for module in problem.model.modules()
        for name, p in module.named_parameters(recurse=False)
        if trainable(module, name)
    ]
    with drawn(free, noise, keep=True):
        yield
