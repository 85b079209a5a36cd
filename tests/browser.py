"""A browser found on the machine, run without a network, for tests that look at the page."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=4000",
)


def find() -> str | None:
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def dom(browser: str, url: str, width: int = 1280, height: int = 900) -> str:
    """The page's markup after its scripts ran."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *OPTIONS, f"--user-data-dir={profile}", "--dump-dom"]
        command += [f"--window-size={width},{height}", url]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.stdout


def write(folder: Path, name: str, text: str) -> str:
    """A page on disk, and its address."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path.as_uri()
