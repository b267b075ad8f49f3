"""What the tests of determinism compare: operators, runs and verdicts, and digests of them.

`python determinism_cases.py report|other FOLDER` prints them from a process of its own.
"""

import functools
import hashlib
import itertools
import json
import sys
from pathlib import Path

import torch

import twophase_ext as tp
from helpers import bits, quiet, toy_convnet, toy_data, toy_images, toy_mlp
from test_last_layer_epoch import Problem
from twophase_ext import ops


def operators(device: str = "cpu") -> dict[str, list[torch.Tensor]]:
    """What every public operator returns, or leaves behind, for the same numbers."""
    g = torch.Generator().manual_seed(5)
    found = {}
    for dtype in (torch.float32, torch.float64):
        x = (3 * torch.randn(40_001, generator=g)).to(dtype).to(device).requires_grad_()
        y = tp.softplus(x, 3.0)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), x)
        in_place = tp.softplus_(x.detach().clone(), 3.0)
        found[f"softplus {dtype}"] = [y, first, second, in_place]
        images = x.detach()[:40_000].view(5, 4, 40, 50).requires_grad_()
        pooled = ops.smooth_max_pool(images, 3, 2, 1, beta=3.0)
        (first,) = torch.autograd.grad(pooled.square().sum(), images)
        found[f"smooth_max_pool {dtype}"] = [pooled, first]
        noisy = {name: x.detach()[:n].clone() for name, n in (("a", 33_001), ("b", 70))}
        tp.perturb_(noisy, 0.1, seed=3)
        found[f"perturb_ {dtype}"] = list(noisy.values())
        p, grad, b = x.detach().clone(), x.detach().flip(0), torch.zeros_like(x)
        ops.sgd_([p], [grad], [b], lr=0.1, momentum=0.9, weight_decay=1e-3)
        found[f"sgd_ {dtype}"] = [p, b]
        problem = Problem(70, 10, 1031, 16, dtype=dtype)
        found[f"last_layer_epoch_ {dtype}"] = problem.ours(device, momentum=0.9)
        layer = [t.to(device) for t in (problem.weight, problem.bias, problem.h, problem.y)]
        found[f"last_layer_gradient {dtype}"] = list(ops.last_layer_gradient(*layer))
        weight, bias, h, target = (t.clone() for t in layer)
        loss = ops.last_layer_step_(weight, bias, None, None, h, target, lr=0.1)
        found[f"last_layer_step_ {dtype}"] = [loss, weight, bias]
        h, y, index = problem.h, problem.y[:60], torch.arange(60)  # these two on the CPU alone
        weight = problem.weight.clone()
        logits = ops.last_layer_logits(weight, h, index)
        ops.last_layer_update_(weight, None, None, None, h, index, logits, y, lr=0.1)
        found[f"last_layer_logits, last_layer_update_ {dtype}"] = [logits, weight]
        found[f"gram_logdet {dtype}"] = list(
            ops.gram_logdet(layer[2][:40].view(4, 10, -1)[..., :60])
        )
    return {name: [t.detach().cpu() for t in parts] for name, parts in found.items()}


def digest(tensors) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


CACHES = ("hidden", "backbone", "disk", "hidden-bfloat16", "none")
PHASES = {
    "none": {"second_phase": "none"},
    "lazy": {"second_phase": "lazy", "verify": "svd"},
    **{
        f"{mode} {cache}": {"second_phase": mode, "feature_cache": cache}
        for mode, cache in itertools.product(("base", "gd", "sgd"), CACHES)
    },
}
ELSEWHERE = ("none", "lazy", "base hidden", "base none", "gd backbone", "sgd disk")
SETTINGS = {"epochs": 3, "tau": 1}


def trained(name: str, folder=False, *, seed: int = 0, resume=None, **settings):
    """(weights, history without seconds, result) of a small run of this kind."""
    model = toy_convnet(seed=seed)
    trainer = quiet(model, folder, **{**SETTINGS, **PHASES[name], **settings})
    result = trainer.fit(toy_images(33), resume=resume)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    return bits(model), rows, result


@functools.cache
def reference(name: str):
    """`trained`, once for all tests."""
    return trained(name)


MEASURED = ("seconds", "peak_bytes", "stages", "environment", "witness")


@functools.cache
def verdicts() -> dict[str, dict]:
    x, _ = toy_data()
    model = toy_mlp()
    found = {}
    for w, method in itertools.product(
        ("current", "init", "witness"), ("separation", "certificate", "svd")
    ):
        verdict = tp.verify_expressivity(model, x, w=w, method=method)
        plain = {k: v for k, v in verdict.as_dict().items() if k not in MEASURED}
        found[f"{w} {method}"] = json.loads(json.dumps(plain))
    return found


def report() -> dict[str, dict]:
    """Digests of everything, for a comparison between processes."""
    return {
        "operators": {name: digest(parts) for name, parts in operators().items()},
        "runs": {name: digest(reference(name)[0].values()) for name in ELSEWHERE},
        "verdicts": verdicts(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "report":
        print(json.dumps(report()))
    else:
        print(json.dumps(tp.build_info()["isa"]))
        print(json.dumps({name: digest(parts) for name, parts in operators().items()}))
        written = tp.Verdict.load(Path(sys.argv[2]) / "verdict.json")
        print(json.dumps(written.recheck(toy_mlp(), toy_data()[0], say=lambda _: None)))
