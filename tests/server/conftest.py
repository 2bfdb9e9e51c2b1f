"""A browser, for the tests of the chat page."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def browser():
    """Chromium without a window: Playwright's own, or else the system's.

    One for each test: as long as Playwright is open, its event loop runs in this thread, where no other can run.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own, installed = Path(playwright.chromium.executable_path), shutil.which("chromium")
        if not own.exists() and installed is None:
            pytest.skip("there is no Chromium")
        path = own if own.exists() else installed
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
