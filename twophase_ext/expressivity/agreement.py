"""Is what was bounded what the model computes? Compared over all samples.

Bounds come from a graph, a certificate from weights and features: none of them calls the model. So
the model is called too, on every sample, in another order and other batches than the features were
computed in, with hooks, replaced forwards and control flow as they are; what it gives has to lie
within the bounds. A float64 copy with random last-layer weights answers for the certified numbers,
the user's own model in its own precision for the copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.messages import type_and_line
from ..linalg.bounds import gamma
from ..linalg.norms import frobenius_upper
from ..linalg.progress import Stage
from ..model.drawn import drawn
from ..model.holding import trainable
from ..model.probing import State, compiled, cuda_devices, rows_into
from .bounded import Disagrees
from .expected import ERRORS, OWN_EPS, RELATIVE, Expected, Reference, Stored
from .problem import Problem

BATCH = 192  # samples; the features are computed 256 at a time
WHOLE = 1 << 20  # numbers of inputs that make one batch, too
FEATURES = 1 << 24  # of their features h, of which some four copies are held: of every batch
SCALES = (1.0, 30.0)  # of the wide layer's weights drawn anew: guards show at large values
NOISE = (1e-2, 3.0)  # relative, of the weights at which equal inputs have to give equal rows


@dataclass
class _Seen:
    """One batch as the model computes it: z into the wide layer, h into the last, its output.

    x: its inputs; places: of all its rows those that count; owners: whose these are.
    """

    z: Tensor | None
    h: Tensor
    output: Tensor
    x: Tensor
    places: Tensor
    owners: Tensor


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
    part = None if problem.compared == problem.data.n else _order(problem)[::2]
    _require_copy(problem, expected, stage, part)
    _require_own(problem, expected, stage)


def _require_own(problem: Problem, expected: Reference | Stored, stage: Stage | None) -> None:
    with problem.own_model() as own, torch.enable_grad(), _constant(own):
        for index, seen in _passes(problem, own, problem.dtype, stage, shuffled=False, size=256):
            with torch.no_grad():
                _compare_own(problem, own, expected(index), seen)


def _require_copy(
    problem: Problem,
    expected: Reference | Stored,
    stage: Stage | None,
    chosen: Tensor | None = None,
) -> None:
    with _other_last_layer(problem), _constant(problem.model):
        for size in _sizes(problem):
            for index, seen in _passes(
                problem,
                problem.model,
                torch.float64,
                stage,
                shuffled=True,
                size=size,
                chosen=chosen,
            ):
                _compare(problem, expected(index), seen, "float64")


@torch.no_grad()
def require_free_wide_layer(problem: Problem, stage: Stage | None = None) -> None:
    """Raise Disagrees where h is not activation(z W^T + b) at other W and b, or z is another one.

    The claim "some weights of the wide layer" is about weights that the model does not hold: the
    float64 copy gets two draws of them, each for a quarter of the samples where not all are run; at
    its own weights the user's own model is asked.
    """
    wide, order = problem.analytic_linear, _order(problem)
    step = 1 if problem.compared == problem.data.n else 2 * len(SCALES)
    for k, scale in enumerate(SCALES):
        with drawn(list(wide.parameters()), scale):
            expected = Reference(problem, wide)
            _require_copy(problem, expected, stage, order[k % step :: step])
    _require_own(problem, Reference(problem, wide), stage)


@torch.no_grad()
def require_equal_rows(problem: Problem) -> None:
    """Raise Disagrees where equal inputs do not give equal rows of h at other weights, too.

    Their places in the batches are drawn, and the trainable weights moved: a model that adds
    something by position, or mixes the samples of a batch, has other rows.
    """
    data = problem.data
    equal = torch.tensor([i for g in data.repeated for i in g], device="cpu")
    again = data.rows_of(equal)[0].unique()
    chosen = None if problem.compared == data.n else equal[: problem.compared]
    tolerance = max(RELATIVE, OWN_EPS * problem.eps if problem.eps > 1e-15 else 0.0)
    for noise in NOISE:
        with _moved(problem, noise), _constant(problem.model):
            for size in _sizes(problem):
                passes = _passes(
                    problem, problem.model, torch.float64, None, shuffled=True, size=size,
                    chosen=chosen,
                )  # fmt: skip
                _require_equal(passes, again, tolerance)
    with problem.own_model() as own, _constant(own):
        passes = _passes(problem, own, problem.dtype, None, shuffled=False, size=256, chosen=chosen)
        _require_equal(passes, again, OWN_EPS * torch.finfo(problem.dtype).eps)


def _require_equal(passes: Iterator[tuple[Tensor, _Seen]], again: Tensor, tolerance: float) -> None:
    """The rows of M numbered `again` (ascending) are the same whenever they come."""
    first = torch.empty(0)
    known = torch.zeros(len(again), dtype=torch.bool, device="cpu")
    for index, seen in passes:
        chosen = torch.isin(index, again)
        h, owners = seen.h[chosen.to(seen.h.device)], seen.owners[chosen]
        place = torch.searchsorted(again, index[chosen])
        if not len(first):  # of the rows that come again alone, whatever the number of all
            first = h.new_empty(len(again), h.shape[1])
        new = ~known[place]
        first[place[new]] = h[new.to(h.device)]
        known[place] = True
        other = first[place]
        allowed = tolerance * (h.norm(dim=1) + other.norm(dim=1))
        bad = ~((h - other).norm(dim=1) <= allowed)
        if bool(bad.any()):
            raise Disagrees(
                f"sample {int(owners[int(bad.nonzero()[0])])} has an input equal to another "
                "one's, but not its row of h: "
                "the model depends on a sample's place or on the others of its batch"
            )


def _sizes(problem: Problem) -> list[int]:
    """Of the batches of each pass: few samples come in several batches, and in one."""
    n = problem.data.n
    if problem.compared < n:
        return [BATCH]
    small = [BATCH] if n > BATCH else [-(-3 * n // 8)]
    numbers, features = problem.inputs[0][0].numel(), problem.data.each * problem.columns
    return small + ([n] if n * numbers <= WHOLE and n * features <= FEATURES else [])


def _most(problem: Problem) -> int:
    """Samples of a batch whose h is not too large."""
    return max(1, FEATURES // (problem.columns * problem.data.each))


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
    """(rows of M, what the model computes of them) until every sample has come once.

    chosen: these alone.
    """
    order = _order(problem, chosen)
    order = order if shuffled else order.sort().values
    size = min(size, _most(problem))
    for index in order.split(size):
        x = problem.data.inputs_of(index)
        rows, places = problem.data.rows_of(index)
        x = x.to(dtype) if x.is_floating_point() else x
        owners = index.repeat_interleave(problem.data.each)[places]
        yield rows, _observe(problem, model, x, places, owners)
        if stage is not None:
            stage.advance(len(rows))


def _order(problem: Problem, chosen: Tensor | None = None) -> Tensor:
    """Samples that are run, `chosen` or as many as there is time for, in an order of chance."""
    generator = torch.Generator("cpu").manual_seed(0)
    if chosen is not None:
        return chosen[torch.randperm(len(chosen), generator=generator, device="cpu")]
    return torch.randperm(problem.data.n, generator=generator, device="cpu")[: problem.compared]


def _observe(
    problem: Problem, model: nn.Module, x: Tensor, places: Tensor, owners: Tensor
) -> _Seen:
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
    if h.dim() > 2:  # every token's, of which the model gives all or one
        h = rows_into(model, [chain[-1]], x)
        caught[0] = h if len(chain) == 1 else rows_into(model, chain, x)
    z = caught[0] if len(chain) > 1 else None
    if not len(h) == len(output) == problem.data.each * len(x):
        raise Disagrees(
            f"the model gives {len(output)} outputs of {len(h)} rows of features for {len(x)} "
            "samples"
        )
    z = None if z is None else z[places]
    return _Seen(z, h[places], output[places], x, places, owners)


def _compare(problem: Problem, expected: Expected, seen: _Seen, what: str) -> None:
    for name, value, allowed, own in (
        ("the wide layer's input", expected.z, expected.z_allowed, seen.z),
        ("h", expected.h, expected.h_allowed, seen.h),
    ):
        if value is not None and allowed is not None:
            _require_close(name, own, value, allowed, seen.owners, what)
    last = problem.last
    weight, bias = last.weight, last.bias
    outputs = F.linear(seen.h, weight, bias)
    shift = 0.0 if bias is None else frobenius_upper(bias)
    sizes = frobenius_upper(weight) * seen.h.norm(dim=1) + shift
    allowed = ERRORS * gamma(weight.shape[1] + 2) * sizes
    _require_close("its output", seen.output, outputs, allowed, seen.owners, what)


def _compare_own(problem: Problem, own: nn.Module, expected: Expected, seen: _Seen) -> None:
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
    _require_close("its output", seen.output, outputs, relative * sizes, seen.owners, what)
    if compiled(problem.network.model):
        _compare_compiled(problem, last, seen, relative)
    _compare_features(expected, seen, relative, what)


def _compare_compiled(problem: Problem, last: nn.Linear, seen: _Seen, relative: float) -> None:
    """The model as torch.compile compiled it, under weights of the last layer that hide nothing."""
    with drawn(list(last.parameters(recurse=False)), 1.0):
        try:
            output = problem.network.model(seen.x.clone())[seen.places]
        except Exception as error:
            raise Disagrees(f"the compiled model does not run ({type_and_line(error)})") from error
        outputs = F.linear(seen.h, last.weight, last.bias).double()
        shift = 0.0 if last.bias is None else frobenius_upper(last.bias.double())
        sizes = frobenius_upper(last.weight.double()) * seen.h.double().norm(dim=1) + shift
    what = f"the model as torch.compile compiled it ({problem.dtype})"
    _require_close("its output", output, outputs, relative * sizes, seen.owners, what)


def _compare_features(expected: Expected, seen: _Seen, relative: float, what: str) -> None:
    for name, value, given in (
        ("the wide layer's input", expected.z, seen.z),
        ("h", expected.h, seen.h),
    ):
        if value is not None:
            size = expected.size if name == "h" else value.norm(dim=1)
            allowed = relative * (size + value.norm(dim=1).mean())
            _require_close(name, given, value, allowed, seen.owners, what)


def _require_close(
    name: str, own: Tensor | None, value: Tensor, allowed: Tensor, owners: Tensor, what: str
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
            f"what the model computes is not what was bounded: {name} of sample {int(owners[k])} "
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
