#!/usr/bin/env bash
# torch 2.13.0's ONNX exporter: log1p, expm1, logaddexp and erfc lose the digits they exist for.
#
# Expected: torch's page on log1p says that it "is more accurate than torch.log() for small values
# of input"; the other three exist for the same reason. One exports them for that accuracy, and
# nothing warns.
# Seen: ONNX has no such operators, so they are written as Log(x + 1), Exp(x) - 1, Log(Exp(a) +
# Exp(b)) and 1 - Erf(x). In float32 log1p(1e-8) becomes 0 (all digits gone), 1e-6 is off by 5 %,
# logaddexp(-20, 0) is 0 instead of 2.06e-9, and erfc(5) is 0 instead of 1.5e-12. logaddexp also
# overflows: at 100 it is inf where torch says 100.
# Why it matters: log1p(exp(-|x|)) is how a stable softplus, a mixture's likelihood or a focal loss
# is written by hand; a strictly positive tail becomes exactly 0, so activations that were all
# different (and a matrix of full rank) collapse, and a bound on the error of a few units in the
# last place does not hold for the exported graph.
# Way round: F.softplus, which is exported as the operator Softplus (its tail is right there), or
# log1p through atanh: 2 * atanh(x / (2 + x)).
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
from torch import nn


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def both(name, function, values):
    x = torch.tensor(values)
    model = torch.onnx.export(Module(function), (x,), dynamo=True, verbose=False).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString())
    there = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    here = function(x)
    print(name, [node.op_type for node in model.graph.node])
    print("  x       ", x.tolist())
    print("  torch   ", here.tolist())
    print("  exported", there.tolist())
    return here, there


print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
here, there = both("log1p", torch.log1p, [1e-8, 1e-6])
assert there[0] == 0 < here[0] and abs(there[1] / here[1] - 1) > 0.04
here, there = both("expm1", torch.expm1, [1e-8, 1e-6])
assert there[0] == 0 < here[0] and abs(there[1] / here[1] - 1) > 0.04
here, there = both("logaddexp", lambda x: torch.logaddexp(x, torch.zeros_like(x)), [-20.0, 100.0])
assert there[0] == 0 < here[0] and there[1] == float("inf") and here[1] == 100
here, there = both("erfc", torch.special.erfc, [5.0])
assert there[0] == 0 < here[0]
here, there = both("softplus", F.softplus, [-20.0, 100.0])
assert torch.allclose(here, there, rtol=1e-5)
here, there = both("log1p by atanh", lambda x: 2 * torch.atanh(x / (2 + x)), [1e-8, 1e-6])
assert torch.allclose(here, there, rtol=1e-5)
PYTHON
echo "as described"
