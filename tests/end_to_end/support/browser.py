"""A headless Chromium that a test looks at pages with, over the DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1600, 760)

# All text that a page shows, also inside of frames and of web components, which `innerText` leaves out.
_VISIBLE_TEXT = """
(() => {
  const texts = [];
  const visit = (node) => {
    if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
    if (['SCRIPT', 'STYLE'].includes(node.nodeName)) return;
    if (node.shadowRoot) visit(node.shadowRoot);
    if (node.nodeName === 'IFRAME' && node.contentDocument) visit(node.contentDocument);
    for (const child of node.childNodes) visit(child);
  };
  visit(document);
  return texts.join(' ').replace(/\\s+/g, ' ');
})()
"""


def chromium() -> str | None:
    """The browser's program, None where it is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._numbers = count(1)

    async def open(self, address: str) -> None:
        await self._command("Page.navigate", url=address)

    async def evaluate(self, script: str) -> Any:
        """The value of a script's last expression."""
        answer = await self._command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def text(self) -> str:
        return str(await self.evaluate(_VISIBLE_TEXT))

    async def text_once_it_has(self, *words: str, seconds: float = 60) -> str:
        """What the page shows, as soon as it shows all of the words. Fails where it never does."""
        deadline = time.monotonic() + seconds
        while True:
            shown = await self.text()
            missing = [word for word in words if word not in shown]
            if not missing:
                return shown
            assert time.monotonic() < deadline, f"{missing} not in: {shown}"
            await asyncio.sleep(0.2)

    async def screenshot(self) -> bytes:
        """As a PNG file."""
        return base64.b64decode((await self._command("Page.captureScreenshot", format="png"))["data"])

    async def _command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async for message in self._socket:
            answer = json.loads(message.data)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
        raise AssertionError("the browser closed the connection")


@asynccontextmanager
async def new_page(program: str) -> AsyncIterator[Page]:
    """A tab of a browser with a profile of its own, which is gone afterwards."""
    with TemporaryDirectory() as profile:
        browser = subprocess.Popen(
            [
                *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
                *("--enable-unsafe-swiftshader", "--hide-scrollbars", "--no-first-run", "--disable-extensions"),
                *(f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", browser)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    (tab,) = [target for target in await response.json() if target["type"] == "page"]
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            browser.terminate()
            browser.wait(timeout=30)


async def _port(file: Path, browser: subprocess.Popen[bytes]) -> int:
    """Of the browser's debugging server, which writes it to a file once it listens."""
    for _ in range(600):
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        assert browser.poll() is None, f"the browser ended with {browser.returncode}"
        await asyncio.sleep(0.1)
    raise AssertionError("the browser opened no debugging port within a minute")
