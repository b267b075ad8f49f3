"""Every Python block of the README and of docs runs; links, excerpts and tables are true."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import twophase_ext as tp
from twophase.cli import make_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.MULTILINE | re.DOTALL
BLOCK = re.compile(r"^```python\n(.*?)^```$", FENCED)
FENCE = re.compile(r"^```(?:bash|sh)?\n(.*?)^```$", FENCED)
# The first line names the file.
EXCERPT = re.compile(r"^```(?:cpp|py)\n(?://|#) (\S+)\n(.*?)^```$", FENCED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, page.name, "exec"), names)


def test_shell_lines_are_commands():
    """Every line that begins with twophase, in a fence: the parser takes it."""
    parser, _ = make_parser()
    lines = [
        line
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for fence in FENCE.findall(page.read_text(encoding="utf-8"))
        for line in fence.splitlines()
        if line.startswith("twophase ")
    ]
    assert len(lines) > 15
    for line in lines:
        chosen = parser.parse_args(shlex.split(line, comments=True)[1:])
        assert chosen.subcommand == line.split()[1], line
    with pytest.raises(SystemExit):
        parser.parse_args(["reproduce", "table1", "--no-such-option", "1"])


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=FENCED)
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if not target.startswith("http"):
                file = page.parent / target if target else page
                assert file.exists(), (page, target)
                assert not anchor or anchor in anchors(file), (page, target, anchor)


def test_readme_names_every_page_and_example():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    assert len(files) > 10
    for file in files:
        assert f"]({file.relative_to(ROOT).as_posix()})" in readme, file.name


def test_excerpts_are_in_the_files_they_name():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = EXCERPT.findall(text)
        assert len(found) == len(re.findall(r"^```(?:cpp|py)$", text, re.MULTILINE)), page.name
        for name, code in found:
            assert code in (ROOT / name).read_text(encoding="utf-8"), (page.name, name, code)


def test_certificate_page_describes_the_file(tmp_path):
    page = (ROOT / "docs" / "certificate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z_, ]+) \|", page.split("## The file")[1], re.MULTILINE)
    described = [name for row in rows if row != "field" for name in row.split(", ")]
    verdict = tp.Verdict(
        status="proved", claim="exists", method="certificate", n=3, width=4, margin=float("inf")
    )
    verdict.save(tmp_path / "verdict.json")
    written = json.loads((tmp_path / "verdict.json").read_text(encoding="utf-8"))
    assert sorted(described) == sorted(written)
    assert f"`{written['schema']}`" in page
    assert (written["margin"], written["rank"]) == ({"number": "inf"}, None)
    checksum = written.pop("checksum")
    plain = json.dumps(written, sort_keys=True).encode()
    assert hashlib.sha256(plain).hexdigest() == checksum


def test_the_tests_that_the_pages_name_exist():
    found = [
        (page.name, *names)
        for page in PAGES
        for names in re.findall(r"`(test_\w+)::(test_\w+)`", page.read_text(encoding="utf-8"))
    ]
    assert {name for name, *_ in found} >= {"resuming.md", "determinism.md"}
    for page, file, test in found:
        code = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert f"\ndef {test}(" in code, (page, file, test)
