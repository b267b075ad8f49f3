"""Known vulnerabilities of the pins in constraints.txt, as https://osv.dev lists them.

    python .ci/audit.py [constraints.txt]

Exit code 0: none, or the service could not be asked (a line says so); 1: some, each in a line; 2: a
line of the file is no pin. An advisory that does not concern this package is accepted by a line
"# accepted: ID: reason" in the file. OSV_API names another address of the service.
"""

import json
import os
import re
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

API = "https://api.osv.dev/v1/querybatch"
SECONDS = 20.0  # for everything: a firewall that swallows packets must not stop the linters
PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)$")
ACCEPTED = re.compile(r"^# accepted: (\S+): \S")


def read_pins(text: str) -> tuple[list[tuple[str, str]], set[str]]:
    """([(package, version)], accepted advisories); ValueError for a line that is neither."""
    pins, accepted = [], set()
    for line in map(str.strip, text.splitlines()):
        if found := ACCEPTED.match(line):
            accepted.add(found[1])
        elif line and not line.startswith("#"):
            pin = PIN.match(line.partition(" #")[0].strip())
            if pin is None:
                raise ValueError(f"expected package==version, got {line!r}")
            pins.append((pin[1], pin[2]))
    return pins, accepted


def ask(pins: list[tuple[str, str]], address: str, seconds: float) -> list[list[str]]:
    """Advisories of each pin, in order; OSError or ValueError where there is no good answer."""
    queries = [{"package": {"name": n, "ecosystem": "PyPI"}, "version": v} for n, v in pins]
    request = urllib.request.Request(  # noqa: S310  the address is ours
        address, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    found: list[Any] = []

    def fetch() -> None:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310, TID251
                found.append(json.load(answer)["results"])
        except Exception as error:  # handed to the caller's thread
            found.append(error)

    # urlopen's timeout is of each read and of no name look-up: a thread bounds the whole.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(found[0], OSError):
        raise found[0]
    try:
        answers = [[entry["id"] for entry in result.get("vulns", [])] for result in found[0]]
    except (AttributeError, KeyError, TypeError):
        answers = []
    if len(answers) != len(pins):
        raise ValueError(f"no answer to {len(pins)} questions: {found[0]!r:.200}")
    return answers


def main(path: str = "constraints.txt", seconds: float = SECONDS) -> int:
    """See the module."""
    try:
        pins, accepted = read_pins(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"audit: {path}: {error}", file=sys.stderr)
        return 2
    try:
        answers = ask(pins, os.environ.get("OSV_API", API), seconds)
    except (OSError, ValueError) as error:
        print(f"audit: skipped, the vulnerability service could not be asked ({error})")
        return 0
    known = [
        (f"{name}=={version}: {advisory} (https://osv.dev/vulnerability/{advisory})", advisory)
        for (name, version), advisories in zip(pins, answers, strict=True)
        for advisory in advisories
    ]
    bad = [line for line, advisory in known if advisory not in accepted]
    for line in bad:
        print(f"audit: {line}")
    print(
        f"audit: {len(pins)} pins, {len(bad)} known vulnerabilities, {len(known) - len(bad)} "
        "accepted"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
