""".ci/audit.py: the pins are asked for, findings fail, no network is a line and no error."""

import json
import runpy
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
AUDIT = ROOT / ".ci" / "audit.py"


@pytest.fixture
def service(monkeypatch):
    """A server that answers as `service.answer` says and keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.asked = json.loads(body)["queries"]
            status, answer = server.answer(server.asked)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("OSV_API", f"http://127.0.0.1:{server.server_port}/v1/querybatch")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def main(*arguments, **settings) -> int:
    return runpy.run_path(str(AUDIT))["main"](*map(str, arguments), **settings)


def vulnerable(**bad: list[str]):
    """An answer in which these packages have these advisories."""

    def answer(queries):
        names = [query["package"]["name"] for query in queries]
        return 200, {
            "results": [
                {"vulns": [{"id": i, "modified": "2026-01-01"} for i in bad[name]]}
                if name in bad
                else {}
                for name in names
            ]
        }

    return answer


def test_every_pin_is_asked_for(service, capsys):
    service.answer = vulnerable()
    assert main(ROOT / "constraints.txt") == 0
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    asked = [f"{query['package']['name']}=={query['version']}" for query in service.asked]
    assert asked == pins and "torch" in asked[0] and len(asked) > 8
    assert {query["package"]["ecosystem"] for query in service.asked} == {"PyPI"}
    assert f"{len(pins)} pins, 0 known vulnerabilities, 0 accepted" in capsys.readouterr().out


def test_findings_fail_unless_accepted(service, tmp_path, capsys):
    service.answer = vulnerable(a=["GHSA-1", "PYSEC-2"], b=["GHSA-3"])
    file = tmp_path / "pins.txt"
    file.write_text("# of a\na==1.0\n\nb==2.0.post1  # why\nc==3\n")
    assert main(file) == 1
    said = capsys.readouterr().out
    assert "a==1.0: GHSA-1 (https://osv.dev/vulnerability/GHSA-1)" in said
    assert "b==2.0.post1: GHSA-3" in said and "3 pins, 3 known vulnerabilities" in said
    file.write_text("# accepted: GHSA-1: not called here\n# accepted: PYSEC-2: idem\na==1.0\n")
    assert main(file) == 0
    assert "0 known vulnerabilities, 2 accepted" in capsys.readouterr().out
    file.write_text("# accepted: GHSA-1:\na==1.0\n")  # without a reason
    assert main(file) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (503, {}),
        (200, b"<html>a proxy's page</html>"),
        (200, {"results": []}),
        (200, {"message": "no"}),
        (200, {"results": [None]}),
        (200, {"results": [{"vulns": ["GHSA-1"]}]}),
        (200, b""),
    ],
)
def test_no_good_answer_is_no_verdict(service, tmp_path, capsys, answer):
    service.answer = lambda queries: answer
    (tmp_path / "pins.txt").write_text("a==1\n")
    assert main(tmp_path / "pins.txt") == 0
    assert "audit: skipped, the vulnerability service could not" in capsys.readouterr().out


def test_no_network_and_no_answer(tmp_path, monkeypatch, capsys):
    (tmp_path / "pins.txt").write_text("a==1\n")
    for address in ("http://127.0.0.1:9/", "http://no-such-host.invalid/"):
        monkeypatch.setenv("OSV_API", address)
        assert main(tmp_path / "pins.txt") == 0
        assert "audit: skipped" in capsys.readouterr().out
    with socket.socket() as silent:  # takes the question and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("OSV_API", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        began = time.monotonic()
        assert main(tmp_path / "pins.txt", seconds=0.5) == 0
        assert time.monotonic() - began < 19  # without the limit it would wait for 20
    assert "audit: skipped" in capsys.readouterr().out


def test_what_is_no_pin_is_an_error(service, tmp_path, capsys):
    service.answer = vulnerable()
    for line in ("a>=1", "a", "-r other.txt", "a==1; python_version < '3'"):
        (tmp_path / "pins.txt").write_text(f"{line}\n")
        assert main(tmp_path / "pins.txt") == 2
        assert "expected package==version" in capsys.readouterr().err


def test_make_lint_runs_it():
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert "$(BIN)/python .ci/audit.py constraints.txt" in recipe


def test_the_script_exits_as_main_says(service, tmp_path):
    service.answer = vulnerable(a=["GHSA-1"])
    (tmp_path / "pins.txt").write_text("a==1\n")
    done = subprocess.run([sys.executable, AUDIT, tmp_path / "pins.txt"], capture_output=True)
    assert done.returncode == 1 and b"GHSA-1" in done.stdout
