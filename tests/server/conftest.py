"""A browser, for the tests of the chat page."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window: Playwright's own, or else the system's."""

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        installed = None if Path(playwright.chromium.executable_path).exists() else shutil.which("chromium")
        found = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield found
        found.close()
