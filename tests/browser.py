"""Opens pages in the system's Chromium and collects their problems."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (390, 1280, 2560)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yields a browser. Skips the test if none is installed."""
    sync = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: apt install chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def problems(browser: Any, address: str, shots: Path | None = None) -> list[str]:
    """The problems of a page at each width, light and dark: console errors, requests, horizontal overflow, and axe's
    violations of serious or critical impact. With `shots`, also writes screenshots to that folder."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found: list[str] = []
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            where = f"{width} {scheme}: "
            page.on("console", lambda message, where=where: found.append(where + message.text))
            page.on("pageerror", lambda error, where=where: found.append(where + str(error)))
            page.on("dialog", lambda dialog, where=where: (found.append(where + "a dialog"), dialog.dismiss()))
            if address.startswith("file:"):
                page.on("request", lambda asked, where=where: _note(found, where, asked.url))
            page.goto(address)
            if page.evaluate("document.documentElement.scrollWidth") > width:
                found.append(where + "wider than the window")
            if shots is not None:
                page.screenshot(path=str(shots / f"{width}-{scheme}.png"), full_page=True)
            # The page's Content-Security-Policy blocks axe's script as well.
            context.close()
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
            )
            page = context.new_page()
            page.goto(address)
            for violation in axe.run(page).response["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    nodes = [node["html"][:120] for node in violation["nodes"][:2]]
                    found.append(f"{where}{violation['id']}: {nodes}")
            context.close()
    return found


def _note(found: list[str], where: str, url: str) -> None:
    if not url.startswith(("file:", "data:")):
        found.append(where + url[:80])
