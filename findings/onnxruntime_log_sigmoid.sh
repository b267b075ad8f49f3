#!/usr/bin/env bash
# torch 2.13.0's ONNX exporters + onnxruntime 1.32.0: log sigmoid is -inf from -18 down.
#
# Expected: torch documents F.logsigmoid as log(1 / (1 + exp(-x))) and computes -18 for x = -18;
# BCEWithLogitsLoss "is more numerically stable than using a plain Sigmoid followed by a BCELoss".
# A model that uses them should keep that when it is exported: float32 holds sigmoid(-87).
# Seen: both exporters write Log(Sigmoid(x)), and onnxruntime's Sigmoid is exactly 0 at -18 and
# below (at -10 it is off by 2e-4 of itself), so the log is -inf and the loss inf. ONNX's own
# reference evaluator gives the finite values for the very same file.
# Why it matters: a log-likelihood, a loss or a margin computed in the deployed graph is infinite
# at logits that any well trained classifier reaches; a bound proved for torch's function is no
# bound for the one that runs.
# Way round: export -softplus(-x), which arrives as the operator Softplus and is right, or take the
# two logits [x, 0] through log_softmax.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 \
  numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import onnxruntime
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import nn


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def exported(function, x):
    program = torch.onnx.export(Module(function), (x,), dynamo=True, verbose=False)
    return program.model_proto


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


x = torch.tensor([-10.0, -18.0, -30.0, -80.0])
positive = torch.ones_like(x)
model = exported(F.logsigmoid, x)
there = run(model, x)
reference = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})[0]
loss = run(
    exported(lambda x: F.binary_cross_entropy_with_logits(x, positive, reduction="none"), x), x
)
mended = run(exported(lambda x: -F.softplus(-x), x), x)
print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
print("operators of logsigmoid:", [node.op_type for node in model.graph.node])
print("logits                  ", x.tolist())
print("torch's logsigmoid      ", F.logsigmoid(x).tolist())
print("exported, onnxruntime   ", there.tolist())
print("exported, onnx reference", reference.tolist())
print("loss, onnxruntime       ", loss.tolist())
print("-softplus(-x), exported ", mended.tolist())
assert F.logsigmoid(x).isfinite().all()
assert [node.op_type for node in model.graph.node] == ["Sigmoid", "Log"]
assert (there[1:] == -float("inf")).all() and (loss[1:] == float("inf")).all()
assert abs(reference - F.logsigmoid(x).numpy()).max() < 1e-4
assert abs(mended - F.logsigmoid(x).numpy()).max() < 1e-4
PYTHON
echo "as described"
