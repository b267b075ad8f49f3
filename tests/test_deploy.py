"""Networks in the hands of others: the rows of docs/deploy.md that CI can compute."""

import re
import runpy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import twophase_ext as tp

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "bench" / "deploy.py"))
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", PAGE, re.M)
TESTED = [
    "torch.jit.script",
    "torch.jit.trace",
    "torch.fx",
    "ONNX Runtime",
    "ONNX Runtime, dynamo=False",
]


def test_the_page_has_a_row_for_each_consumer():
    assert [row[0] for row in ROWS[1:]] == list(SCRIPT["CONSUMERS"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TESTED)
def test_consumers_get_the_networks_numbers(name):
    package, _ = SCRIPT["CONSUMERS"][name]
    try:
        version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    _, _, as_it_is, plain = next(row for row in ROWS if row[0] == name)
    model, x = SCRIPT["mlp"]()
    assert SCRIPT["difference"](name, model, tp.nn.plain(model), x) < 1e-6
    assert float(plain) < 1e-6  # what the page says
    if re.match(r"\d", as_it_is):
        assert SCRIPT["difference"](name, model, model, x) < 1e-6


def test_a_wrong_network_is_seen():
    model, x = SCRIPT["mlp"]()
    other = tp.nn.plain(model)
    other[1].beta = 90.0
    assert SCRIPT["difference"]("torch.fx", model, other, x) > 1e-4
