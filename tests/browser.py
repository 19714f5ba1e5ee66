"""Debian's chromium, driven by selenium: it opens the pages that the tools write.

Where there is no chromium or no selenium, tests that need them are skipped; with ``DESCEND_TEST_BROWSER=1`` they fail.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

IS_DEMANDED = os.environ.get("DESCEND_TEST_BROWSER") == "1"
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
]


class Browser:
    """A window of chromium.

    Args:
        driver: selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        """Open a file, in a system that is "light" or "dark", and wait until the page's script has run."""
        from selenium.webdriver.support.ui import WebDriverWait

        self.resize(width)
        self.driver.get("about:blank")
        for log in ("browser", "performance"):  # of the page before
            self.driver.get_log(log)
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        self.driver.get(path.resolve().as_uri())
        WebDriverWait(self.driver, 20).until(lambda driver: self.run("return document.documentElement.dataset.drawn"))

    def resize(self, width: int, height: int = 900) -> None:
        """Set the size of the page's view; chromium's own windows are never narrower than 500 pixels."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def run(self, script: str, *arguments: object) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script, *arguments)

    def errors(self) -> list[str]:
        """Return what the console has complained of since the page was opened, or the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses asked for since the page was opened, files and the page's own data excluded."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]

    def screenshot(self, path: Path, width: int) -> None:
        """Take a picture of the whole page."""
        self.resize(width, 900)
        height = self.run("return document.documentElement.scrollHeight")
        self.resize(width, height)
        self.driver.save_screenshot(str(path))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for a module's tests."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        chromium = None
    if not chromium or not driver:
        (pytest.fail if IS_DEMANDED else pytest.skip)("needs chromium, chromedriver and selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(window)
    finally:
        window.quit()
