"""Chromium without a window, driven over the W3C WebDriver protocol: open a page, run script in it, click, type, look."""

import base64
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import requests

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which WebDriver names an element


class Browser:
    """A browser with a new, empty profile."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines = (re.search(r"started successfully on port (\d+)", line) for line in self.driver.stdout)
        port = next(filter(None, lines))[1]
        threading.Thread(target=self.driver.stdout.read, daemon=True).start()  # or its pipe might fill
        self.http, self.url = requests.Session(), f"http://127.0.0.1:{port}/session"
        self.http.trust_env = False  # no proxy
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={self.profile.name}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.url += "/" + self._send("post", "", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def _send(self, method, path, body=None):
        answer = self.http.request(method, self.url + path, json=body, timeout=120).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{answer['error']}: {answer['message']}")
        return answer

    def open(self, path):
        """Open a file and wait until it is loaded."""
        self.logs("browser")
        self._send("post", "/url", {"url": Path(path).as_uri()})

    def script(self, text, *arguments):
        """What a function with this body returns in the page; a promise is waited for."""
        return self._send("post", "/execute/sync", {"script": text, "args": arguments})

    def until(self, condition, *arguments, seconds=120):
        """Wait until a JavaScript expression is true; returns its value. Raises TimeoutError."""
        found = self.script(f"""return new Promise((done) => {{
            const end = Date.now() + {seconds * 1000}, given = arguments;
            const look = () => {{ const found = (function () {{ return {condition}; }}).apply(null, given);
                if (found || Date.now() > end) done(found || null); else setTimeout(look, 20); }};
            look(); }})""", *arguments)
        if found is None:
            raise TimeoutError(condition)
        return found

    def find(self, selector):
        """The path of the first element that a CSS selector finds."""
        return f"/element/{self._send('post', '/element', {'using': 'css selector', 'value': selector})[ELEMENT]}"

    def click(self, selector):
        """Click as a mouse does: what is covered cannot be clicked."""
        self._send("post", self.find(selector) + "/click", {})

    def type(self, selector, text):
        """Type into an element."""
        self._send("post", self.find(selector) + "/value", {"text": text})

    def press(self, *keys):
        """Press keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("post", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def logs(self, kind="browser"):
        """What was logged since the last call: "browser", the console; "performance", the requests among other things."""
        return self._send("post", "/se/log", {"type": kind})

    def devtools(self, command, **parameters):
        """A command of the DevTools protocol, such as Emulation.setEmulatedMedia."""
        return self._send("post", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def size(self, width, height):
        """Set the size of the window."""
        self._send("post", "/window/rect", {"width": width, "height": height})

    def picture(self, path):
        """Write what the window shows, a PNG."""
        Path(path).write_bytes(base64.b64decode(self._send("get", "/screenshot")))

    def close(self):
        """End browser and driver."""
        try:
            self._send("delete", "")
        finally:
            self.driver.terminate()
            self.driver.wait(30)
            self.http.close()
            self.profile.cleanup()
