"""The public face of the verification: `verify_expressivity` and the `Verdict` that it returns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import inference_mode, nn

from ..model.network import Network
from .outcome import Outcome
from .recheck import recheck
from .verify import verify_model, verify_samples


class Verdict(Outcome):
    """The outcome of `verify_expressivity`.

    status: "proved"; "full rank" (numerically, or certified for the stored matrix only: not a
    proof); "deficient" (proved: N > m_H + 1); "undecided" (a numerically low rank, or no method
    that fits).
    claim: "exists" (some w has full rank: Assumption 1) or "at w" (this very w).
    n: samples. distinct = N: distinct inputs X' among them, compared by content as the model is
    fed; repeated: the groups of more than one sample; disagreeing: how many of these have targets
    that are not all equal, None where no targets were given.
    method: "separation", "certificate", "svd", or what proved a deficiency. factorization: the
    certificate's: "triangular", "gram" or "preconditioned".
    width = m_H; the matrix is M = [h_X', 1], N x (width + 1); bias: whether the last layer has a
    trainable bias; without one there is no column of ones and the matrix is h_X' alone.

    Proved, of the exact function (real arithmetic on the stored weights and inputs), rounded down:
    sigma_min_lower <= sigma_min(M), logabsdet_lower <= log det(M M^T); margin: the certified lower
    bound over the sum of all errors it has to exceed (separation: the smallest distance over its
    errors); above 1 is a proof. feature_error: upper bound of ||computed - exact h||_F (separation:
    of the largest error of one sample's backbone features).
    Estimated in float64, not proved: rank, sigma_min, condition, logabsdet = log det(M M^T).

    culprits: groups of sample indices that keep the rank from being N, or from being proved;
    explanation: the same in words. dtype: the arithmetic used; batch_norm: the family of networks
    meant ("frozen": the running statistics are constants). w, seed: whose weights; witness: their
    state, loadable by model.load_state_dict(verdict.witness, strict=False), not saved to the file.
    assumptions, constants: what the proof takes for granted, and its numbers. hashes: SHA-256 of
    data and hidden layers. stages: name, seconds, flops of each. peak_bytes: the process's largest
    memory. source: how to build model and data again (the command line's). version: of the
    certificate file's form; the condition of version 1 is rank n over all samples, and distinct is
    n there.
    """

    @classmethod
    def of(cls, outcome: Outcome) -> Self:
        """The same, with `recheck`."""
        return cls(**vars(outcome))

    @inference_mode(False)
    def recheck(
        self,
        model: nn.Module,
        x: Any,
        *,
        folder: str | Path | None = None,
        rows: Any = None,
        say: Callable[[str], None] = print,
    ) -> bool:
        """Prove the verdict again from the model and the data: does it hold?

        False, with the reason given to `say`, where the data or the hidden layers are others,
        where any field but those that the printed line names as not compared is not what is proved
        now, or where nothing can be proved, for whatever reason: it raises nothing. A bound may
        exceed the one proved now, which is printed, by another processor's rounding (recheck.py
        has the tolerances). Only "proved" and "deficient" can hold. x, folder, rows as in
        `verify_expressivity`.
        """
        holds, found = recheck(self, model, x, folder, rows)
        say(f"holds: {self.status}, {self.claim}{found}" if holds else f"does not hold: {found}")
        return holds


@torch.inference_mode(False)
def verify_expressivity(
    model: nn.Module,
    x: Any,
    *,
    w: str = "current",
    method: str = "auto",
    factorization: str = "auto",
    last_layer: nn.Module | str | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    rows: Any = None,
    progress: bool = False,
) -> Verdict:
    """Whether [h_X'^(H)(w), 1] has rank N for the N distinct inputs X' among the n of x.

    That is what Theorem 1 needs of Assumption 1 (docs/theory.md): equal inputs have equal rows for
    every w, and the loss over a group of them is one convex function of one output.

    x: the n training inputs (tensor or array; uint8 becomes k / 255 in the model's dtype), a dict
    or tuple of them for a model of several inputs, or a Dataset or DataLoader, of whose samples the
    inputs count, if they do not change from visit to visit; of the outputs the logits count. Where
    the model gives an output for every token or pixel, [b, t, k] or [b, k, height, width], its rows
    are those, sample by sample: n counts them, and rows (bool [samples, t]) says which count.
    Everything is computed in float64, in evaluation mode, on a copy: the model is not changed,
    BatchNorm's running statistics are constants of it.

    w: "current", the model's weights; "init", its default initialisation under `seed` (the paper's
    procedure); "witness", weights of the wide layer made for the proof (witness.py).
    method:
    - "separation": some w exists, as distinct backbone features suffice where m_H >= N - 1
      (NUMERICS: Pinkus 1999 and others). O(n d + n log n) after the backbone features.
    - "certificate": a proved lower bound of sigma_min([h_X, 1]) and of log det, for the exact
      function (Rump, BIT 46, 2006). factorization: "triangular" (w="witness", O(n^2 d)), "gram"
      (O(n^2 m), tiles in memory or in a file in `folder`, which makes it resumable),
      "preconditioned" (ill-conditioned M, in memory), "auto": the first of them that proves.
    - "svd": singular values above max(n, p) eps sigma_max (numpy.linalg.matrix_rank's rule).
    - "auto": separation, then what says more at this w where it fits into memory and time; the
      plan is printed before it starts.
    N > m_H + 1 comes first: it proves that no weights at all have rank N. A last layer without a
    trainable bias has no use for the column 1: then h_X' alone counts.

    Returns a Verdict. Raises ValueError for unknown w, method or factorization, for x empty or with
    NaN or infinity, for a model that does not run on x, for a folder that cannot be written;
    TypeError for arguments of other types.
    """
    return Verdict.of(
        verify_model(
            model,
            x,
            w=w,
            method=method,
            factorization=factorization,
            last_layer=last_layer,
            seed=seed,
            folder=folder,
            rows=rows,
            progress=progress,
        )
    )


def verify_network(network: Network, samples: Any, **settings: Any) -> Verdict:
    """`verify_expressivity` for a Network and samples; see `verify_samples`."""
    return Verdict.of(verify_samples(network, samples, **settings))
