"""A page in a headless Chromium, by the DevTools protocol over two pipes: no driver and no further package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """Evaluates JavaScript in the page and takes its picture."""

    def __init__(self, commands: Any, answers: Any) -> None:
        self._commands, self._answers = commands, answers
        self._count, self._session = 0, None

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url=url)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a method of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._next()).get("id") != self._count:
            pass  # an event
        assert "result" in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def text(self) -> str:
        return self.evaluate("document.body ? document.body.innerText : ''")

    def picture(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def opened(url: str, profile: Path) -> Iterator[Page]:
    """The page at `url`; `profile` is a folder for what the browser writes."""
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    options = "--headless --no-sandbox --disable-gpu --window-size=1300,1400 --remote-debugging-pipe"
    # the browser reads commands from descriptor 3, and writes answers to descriptor 4
    start = f'exec "$1" {options} --user-data-dir="$2" 3<&{to_browser} 4>&{from_browser} 2>"$2.log"'
    process = subprocess.Popen(
        ["bash", "-c", start, "bash", str(CHROMIUM), str(profile)], pass_fds=(to_browser, from_browser)
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        with open(commands, "wb") as writing, open(answers, "rb") as reading:
            page = Page(writing, reading)
            page.open(url)
            yield page
            process.terminate()
    finally:
        process.kill()
        process.wait()
