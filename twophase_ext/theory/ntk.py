"""The neural tangent kernel K(w) of Algorithm 1's rank condition: its rank and smallest eigenvalue.

K(w) = J J^T in R^{N m_y x N m_y}, J = d vec(f_X'(w)) / dw over every trainable parameter, X' the N
distinct inputs. The last layer's part of J is I (x) M, M = [h_X', 1], the other parts add positive
semidefinite terms: lambda_min(K) >= sigma_min(M)^2, and K has full rank N m_y wherever M has rank N
(proof of Theorem 3).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ..core.memory import available_memory
from ..core.messages import first_line, type_and_line
from ..expressivity import Verdict, verify_network
from ..expressivity.verify import network_hashes
from ..linalg.bounds import bound_text
from ..model.calling import one_tensor
from ..model.groups import firsts, groups_of
from ..model.inputs import as_example, batches, checked_inputs, first_parameter
from ..model.layers import named_last_layer
from ..model.network import Network
from ..model.probing import copy_model, unwrap

METHODS = ("auto", "full", "bound")
FULL_SIZE = 2000  # N m_y up to which "auto" forms K
BLOCK = 2**28  # bytes of Jacobian held at once where the parameters' sizes allow it
CHUNK = 64  # samples differentiated together
SHARE = 0.6  # of the memory available, for the largest parameter's Jacobian and K
SVD_OPERATIONS = 4e11  # of float64, some ten seconds: above it the certificate is used


@dataclass
class NtkRank:
    """What `ntk_rank` found about K(w), an N m_y x N m_y matrix (m_y = outputs).

    n: samples; distinct = N: distinct inputs among them. rank and smallest: of K itself, by numpy's
    rule and LAPACK in float64: numerical, not proved; None with method "bound". lower:
    sigma_min(M)^2 <= lambda_min(K), None where it is not known; proved: whether that bound, and
    with it full rank, is a proof. full: whether rank N m_y was shown, numerically or by proof;
    False means not shown. reason: why something is missing.
    """

    n: int
    distinct: int
    outputs: int
    method: str
    rank: int | None = None
    smallest: float | None = None
    lower: float | None = None
    proved: bool = False
    reason: str = ""

    @property
    def size(self) -> int:
        """N m_y, the largest rank that K can have."""
        return self.distinct * self.outputs

    @property
    def full(self) -> bool:
        """Whether rank N m_y was shown."""
        return self.rank == self.size or bool(self.lower)

    def __str__(self) -> str:
        """An explanation for a person."""
        inputs = f"n = {self.n}"
        if self.distinct < self.n:
            inputs = f"N = {self.distinct} distinct inputs of {inputs}"
        lines = [
            f"NTK K(w), {self.size} x {self.size} ({inputs}, m_y = {self.outputs}): full rank "
            + ("not shown" if not self.full else "proved" if self.proved else "shown numerically")
        ]
        if self.rank is not None:
            lines.append(
                f"  rank {self.rank} of {self.size}, smallest eigenvalue {self.smallest:.3e} "
                "(numerical, float64)"
            )
        if self.lower is not None:
            label = "proved" if self.proved else "numerical, not proved"
            lines.append(f"  lambda_min(K) >= sigma_min(M)^2 >= {bound_text(self.lower)} ({label})")
        if self.reason:
            lines.append(f"  {self.reason}")
        return "\n".join(lines)


@torch.inference_mode(False)
def ntk_rank(
    model: nn.Module,
    x: Any,
    *,
    last_layer: nn.Module | str | None = None,
    method: str = "auto",
    verdict: Verdict | None = None,
) -> NtkRank:
    """Rank of the neural tangent kernel K(w) at the model's weights, over all trainable parameters.

    x: the n inputs (tensor or array [n, ...]; uint8 is scaled to [0, 1]), or a dict or tuple of
    them, of which K counts the N distinct ones: equal inputs have equal rows of J for every w.
    Everything is computed in
    float64 on a copy in evaluation mode (BatchNorm with its running statistics): the model is not
    changed. method: "full" forms K by torch.func, parameter by parameter, with 8 (N m_y)^2 bytes
    for K and 8 N m_y |p| for the largest parameter p; "bound" uses
    lambda_min(K) >= sigma_min([h_X', 1])^2 alone; "auto" is "full" up to N m_y = 2000 where it fits
    into memory. verdict: one of `verify_expressivity` about this model at these weights and these
    inputs: the hashes are compared, and it is made again by its method, as no hash sees all that a
    model computes (a hook, a global); without it the method is chosen by size. Returns an NtkRank.

    Raises ValueError for an unknown method, for x empty or with NaN or infinity, for a verdict
    about other weights or inputs or that is not found again, for a frozen last weight, for a model
    that cannot be copied in float64; MemoryError where "full" does not
    fit; RuntimeError where torch.func cannot differentiate the model sample by sample or the
    Jacobian is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    with one_tensor(model, x) as packed:
        return _ntk_rank(model, checked_inputs(packed), last_layer, method, verdict)


def _ntk_rank(
    model: nn.Module,
    x: Tensor,
    last_layer: nn.Module | str | None,
    method: str,
    verdict: Verdict | None,
) -> NtkRank:
    parameter = first_parameter(model)
    network = Network(model, as_example(x, parameter), last_layer)
    if not network.last.module.weight.requires_grad:
        raise ValueError(
            f"last_layer: {network.last.name}.weight does not require a gradient: K then lacks "
            "the part that its rank is shown by"
        )
    first = firsts(groups_of(x.to(parameter.dtype) if x.is_floating_point() else x))
    each = network.last.rows
    found = NtkRank(len(x) * each, len(first) * each, network.outputs, method)
    if verdict is not None:
        _check_verdict(verdict, network, found.n)
        if verdict.hashes != network_hashes(network, [part for part, _ in batches(x, parameter)]):
            raise ValueError("verdict: expected one about these weights and inputs, hashes differ")
    if method != "bound":
        refused = _too_large(network, found.size, parameter.device)
        if method == "auto":
            found.method = "bound" if refused or found.size > FULL_SIZE else "full"
        elif refused:
            raise MemoryError(f"method: 'full' needs {refused}; 'bound' needs no Jacobian")
    x = x.to(parameter.device)
    x = x.to(parameter.dtype) / 255 if x.dtype == torch.uint8 else x
    if verdict is None or rank_shown(verdict):
        given = verdict
        by_size = method_at_w(found.distinct, network.width + 1)
        verdict = verify_network(
            network,
            ((part, None) for part in x.split(256)),
            n=len(x),
            method=by_size if given is None else given.method,
        )
        if given is not None and not rank_shown(verdict):
            raise ValueError(
                f"verdict: expected one that holds for this model now, got {given.status}, and "
                f"{verdict.status} when it is made again: {verdict.reason}"
            )
    _bound(found, verdict)
    if found.method == "full":
        copied, _ = float64_copy(network)
        x = x.double() if x.is_floating_point() else x
        kernel = _kernel(copied, x[first.to(x.device)], found.size)
        if not bool(torch.isfinite(kernel).all()):
            raise RuntimeError("model: its Jacobian holds NaN or infinity")
        eigenvalues = torch.linalg.eigvalsh(kernel).abs()
        # numpy.linalg.matrix_rank's rule: sigma > max(shape) * eps * sigma_max
        tolerance = float(eigenvalues.max()) * found.size * torch.finfo(torch.float64).eps
        found.rank = int((eigenvalues > tolerance).sum())
        found.smallest = float(eigenvalues.min())
    return found


def method_at_w(n: int, columns: int) -> str:
    """The method of `verify_network` that speaks of the weights as they are, by the cost of an SVD.

    n: distinct inputs. (Separation, which "auto" may prefer, only proves that some weights exist.)
    """
    return "svd" if 4.0 * n * n * columns <= SVD_OPERATIONS else "certificate"


def rank_shown(verdict: Verdict) -> bool:
    """Whether the verdict shows rank [h_X', 1] = N at the weights as they are."""
    return verdict.claim == "at w" and verdict.status in ("proved", "full rank")


def float64_copy(network: Network) -> tuple[nn.Module, nn.Linear]:
    """A float64 copy of the network's model in evaluation mode, and the last layer in it."""
    model = unwrap(network.model)
    name = next(k for k, module in model.named_modules() if module is network.last.module)
    try:
        model = copy_model(model).double().eval()
    except Exception as error:  # whatever a user's attributes raise: locks, files, generators
        raise ValueError(
            f"model: it cannot be copied in float64 ({type_and_line(error)})"
        ) from error
    return model, named_last_layer(model, name).module


def _check_verdict(verdict: Verdict, network: Network, n: int) -> None:
    if (verdict.n, verdict.width) != (n, network.width):
        raise ValueError(
            f"verdict: expected one for n = {n}, m_H = {network.width}, got n = {verdict.n}, "
            f"m_H = {verdict.width}"
        )
    bias = network.last.module.bias
    if verdict.bias != (bias is not None and bias.requires_grad):
        raise ValueError(
            f"verdict: expected one {'without' if verdict.bias else 'with'} the column of ones, "
            "the derivative by the last layer's bias"
        )
    if verdict.claim != "at w" and verdict.status != "deficient":
        raise ValueError(
            "verdict: expected one about the model's own weights (claim 'at w'), got claim "
            f"{verdict.claim!r}"
        )


def _bound(found: NtkRank, verdict: Verdict) -> None:
    """lambda_min(K) >= sigma_min(M)^2 from the verdict: proved where it is, else an estimate."""
    if not rank_shown(verdict):
        found.reason = f"no bound from M = [h_X', 1]: {verdict.reason or verdict.status}"
    elif verdict.status == "proved" and verdict.sigma_min_lower:
        found.lower = math.nextafter(verdict.sigma_min_lower**2, 0.0)
        found.proved = True
    elif verdict.sigma_min is not None:
        found.lower = verdict.sigma_min**2


def _too_large(network: Network, size: int, device: torch.device) -> str:
    """Why the Jacobians do not fit into memory; "" where they do."""
    largest = max(p.numel() for p in network.parameters().values())
    needed, available = 8 * size * (size + 2 * largest), available_memory(device)
    if needed <= SHARE * available:
        return ""
    return f"{needed / 2**30:.1f} GiB, {SHARE * available / 2**30:.1f} GiB are available"


def _kernel(model: nn.Module, x: Tensor, size: int) -> Tensor:
    """K = J J^T, J by reverse mode under vmap over the samples, some parameters at a time."""
    state = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
    sizes = {k: 8 * size * p.numel() for k, p in model.named_parameters() if p.requires_grad}
    groups: list[list[str]] = []
    held = math.inf
    for name, needed in sizes.items():
        if held + needed > BLOCK:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += needed
    kernel = x.new_zeros(size, size, dtype=torch.float64)
    for names in groups:

        def output(chosen: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(model, {**state, **chosen}, (sample[None],)).flatten()

        try:
            jacobian = vmap(jacrev(output), (None, 0), chunk_size=CHUNK)(
                {name: state[name] for name in names}, x
            )
        except RuntimeError as error:
            raise RuntimeError(
                "model: torch.func cannot differentiate it sample by sample; method='bound' needs "
                f"no Jacobian ({first_line(error)})"
            ) from error
        for part in jacobian.values():
            rows = part.reshape(size, -1)
            kernel.addmm_(rows, rows.T)
    return kernel
