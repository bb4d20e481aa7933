"""A headless Chromium, spoken to over its debugging pipe, so that no package is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser")

# TensorBoard's elements hide their text in shadow roots.
_ALL_TEXT = """
(function text(node) {
  let found = "";
  for (const child of node.childNodes) {
    if (child.nodeType === Node.TEXT_NODE) found += child.textContent + " ";
    else if (child.nodeName !== "STYLE" && child.nodeName !== "SCRIPT") found += text(child);
  }
  return node.shadowRoot ? found + text(node.shadowRoot) : found;
})(document.body)
"""


class Chromium:
    """One page of a fresh browser.

    Args:
        folder: Where it may keep its profile.
        width: Of the window.
        height: Of the window.
    """

    def __init__(self, folder: Path, width: int = 1600, height: int = 1300) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        assert EXECUTABLE is not None
        command = [
            EXECUTABLE, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-pipe", f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank",
        ]  # fmt: skip
        # The browser reads commands from file descriptor 3 and answers on 4.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest = 0, b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.requested: list[str] = []
        """Addresses that pages have asked for, from `watch_requests` on."""

    def open(self, url: str) -> None:
        """Goes to a page."""
        self._call("Page.navigate", url=url)

    def watch_requests(self) -> None:
        """Notes from now on what pages load."""
        self._call("Network.enable")

    def emulate(self, width: int, height: int, dark: bool = False) -> None:
        """Gives the window another size, and the reader's light or dark mode."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        mode = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[mode])

    def move(self, x: float, y: float) -> None:
        """Moves the mouse."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def text(self) -> str:
        """All text of the page."""
        return self.evaluate(_ALL_TEXT) or ""  # there is no body yet

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str, timeout: float = 30) -> Any:
        """Evaluate an expression until it is true; return what it is."""
        end = time.monotonic() + timeout
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, expression
            time.sleep(0.1)
        return value

    def wait_for(self, *texts: str, timeout: float = 60) -> str:
        """Waits until the page has all these texts."""
        end = time.monotonic() + timeout
        while missing := [text for text in texts if text not in (seen := self.text())]:
            assert time.monotonic() < end, f"{missing} not in the page: {seen[:2000]}"
            time.sleep(0.3)
        return seen

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message
