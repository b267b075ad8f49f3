"""A headless Chromium, driven over a pipe by the DevTools protocol: no package, no port."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60  # to wait for an answer


def find_chromium() -> str:
    """The path of a Chromium; skips the test where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    root = os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "~/.cache/ms-playwright")
    found = sorted(Path(root).expanduser().glob("chromium-*/chrome-linux*/chrome"))
    if not found:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} on PATH, none of playwright's")
    return str(found[-1])


class Browser:
    """One page. events: what the browser told since it was last emptied."""

    def __init__(self, profile: Path) -> None:
        """profile: an empty folder for the browser's own files."""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads its file descriptor 3 and writes to 4.
        ends = [os.dup2(theirs_in, 103), os.dup2(theirs_out, 104)]
        os.close(theirs_in), os.close(theirs_out)
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                'exec "$0" "$@" 3<&103 4>&104 103<&- 104>&-',
                find_chromium(),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                f"--user-data-dir={profile}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in ends:
            os.close(end)
        self.events: list[dict[str, Any]] = []
        self._rest, self._count, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, *, scheme: str, width: int, height: int = 900) -> None:
        """Load a file in a colour scheme and width; `events` are those of this page alone."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        """End the browser and its own processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in), os.close(self._out)

    def _read(self) -> dict[str, Any]:
        """The next message."""
        deadline = time.monotonic() + SECONDS
        os.set_blocking(self._in, False)
        while b"\0" not in self._rest:
            assert time.monotonic() < deadline, f"no answer of the browser in {SECONDS} s"
            try:
                part = os.read(self._in, 1 << 20)
                assert part, "the browser has ended"
                self._rest += part
            except BlockingIOError:
                time.sleep(0.01)
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
