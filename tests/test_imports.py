"""What importing the package costs: nothing that is heavy, optional or tried out."""

import subprocess
import sys

CODE = """
import sys
import time

import torch

before, started = set(sys.modules), time.process_time()
import twophase_ext as tp

seconds = time.process_time() - started
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"scipy", "sklearn", "pandas", "matplotlib", "rich", "lightning", "sympy"}, new
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
assert seconds < 2, seconds

assert tp.sklearn.TwoPhaseClassifier and "sklearn" in sys.modules
try:
    tp.nothing
except AttributeError as error:
    assert str(error) == "module 'twophase_ext' has no attribute 'nothing'"
else:
    raise AssertionError("tp.nothing")

assert len([finder for finder in sys.meta_path if "WithDynamo" in type(finder).__name__]) == 2
import torch._dynamo  # as torch.compile does: from then on it keeps softplus whole

assert not [finder for finder in sys.meta_path if "WithDynamo" in type(finder).__name__]
trace_rules = sys.modules["torch._dynamo.trace_rules"]
for name in ("softplus", "smooth_max_pool"):
    traced = sys.modules[f"twophase_ext.ops.{name}"]._traced
    assert id(traced) in trace_rules._allowed_callable_ids, name
"""


def test_a_light_import_and_what_comes_on_demand():
    subprocess.run([sys.executable, "-c", CODE], check=True)
