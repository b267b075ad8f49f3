#!/usr/bin/env bash
# onnxruntime 1.32.0: a NaN goes into max pooling or a maximum and a finite number comes out.
#
# Expected: the max of numbers one of which is not a number is NaN in NumPy ("The net effect is
# that NaNs are propagated", says numpy.maximum's page), in torch's amax and max_pool1d, and in
# ONNX's own reference evaluator for ReduceMax. The exported model should fail as visibly as the
# trained one.
# Seen: MaxPool of [nan, 2] is 2, ReduceMax of [1, nan, 3] is 3, and Relu lets the NaN through: so
# it depends on the operator.
# Why it matters: NaN is how an overflow or a broken sensor shows itself. A network with a pooling
# layer or a max over time, tested behind onnxruntime for "no NaN in the outputs", passes although
# its features are NaN, and says a class with confidence.
# Way round: an IsNaN on the inputs of these operators, or compare with torch on inputs that break.
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

NAN = float("nan")


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
    there = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    here = function(x)
    print(f"{name} of {values}: torch {here.tolist()}, onnxruntime {there.tolist()}")
    return model, here, torch.from_numpy(there)


print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
_, here, there = both("max_pool1d", lambda x: F.max_pool1d(x, 2), [[[NAN, 2.0, 1.0, NAN]]])
assert here.isnan().all() and there.flatten().tolist() == [2, 1]
model, here, there = both("amax", lambda x: x.amax(1), [[1.0, NAN, 3.0]])
assert here.isnan().all() and there.tolist() == [3]
x = torch.tensor([[1.0, NAN, 3.0]]).numpy()
reference = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})[0]
print("ONNX's reference evaluator, the same file:", reference.tolist())
assert reference[0] != reference[0]
_, here, there = both("relu", F.relu, [[NAN, -1.0]])
assert here[0, 0].isnan() and there[0, 0].isnan()
PYTHON
echo "as described"
