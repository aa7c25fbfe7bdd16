"""A headless Chromium that tells what a page asked for and complained about; skips the test where there is none."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

#: WebGL 2 without a graphics card, by name for older and newer Chromiums
SOFTWARE_GL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of a fresh headless Chromium with its logs switched on."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium with chromedriver on PATH (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    flags = ["--headless=new", "--window-size=1280,1000", "--disable-dev-shm-usage", *SOFTWARE_GL]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium refuses to start as root with it
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    opened.set_page_load_timeout(240)
    opened.set_script_timeout(240)
    try:
        yield opened
    finally:
        opened.quit()


def open_page(driver: Any, path: Path) -> None:
    """Open a file by its ``file://`` address."""
    driver.get(path.resolve().as_uri())


def complaints(driver: Any) -> list[str]:
    """Every warning and error on the console since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def requests(driver: Any) -> set[str]:
    """Every address that was asked for since the last call, with ``data:`` and ``blob:`` cut to their scheme."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {url if url.startswith("file:") else url.partition(":")[0] + ":" for url in asked}


def until(what: Callable[[], bool], seconds: float = 240) -> None:
    """Wait for something to become true; fail if it does not."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "the page did not get there in time"
        time.sleep(0.2)
