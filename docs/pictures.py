"""Takes the screenshots in the README and the documentation, from a finished demo and a finished study of it.

    winnow demo && winnow study conf/study.yaml
    python docs/pictures.py                        # writes docs/images/*.png

Needs the extra `browser` and a system Chromium (apt install chromium).
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).parent / "images"
RUN, STUDY = Path("runs/demo"), Path("runs/demo-study")
WIDTH = 1280


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        report = f"file://{(RUN / 'report/index.html').resolve()}"
        take(browser, report, "report", 1150)
        take(browser, report, "report-dark", 1150, scheme="dark")
        take(browser, report, "cut", 1000, at="text=just kept")
        if (STUDY / "index.html").exists():
            take(browser, f"file://{(STUDY / 'index.html').resolve()}", "study", 1150)
        studio = subprocess.Popen(
            [sys.executable, "-m", "pipeline.studio", str(RUN), "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        assert studio.stdout is not None
        try:
            address = next(found[0] for line in studio.stdout if (found := re.search(r"http://\S+", line)))
            take(browser, address, "studio", 1150)
        finally:
            studio.terminate()
        browser.close()


def take(browser: Any, address: str, name: str, height: int, scheme: str = "light", at: str | None = None) -> None:
    """Writes a screenshot of the top of a page, or of the part at the element `at`, with at most 192 colours."""
    page = browser.new_page(viewport={"width": WIDTH, "height": height}, color_scheme=scheme)
    page.goto(address)
    page.wait_for_timeout(2000)
    if at is not None:
        page.locator(at).first.scroll_into_view_if_needed()
        page.evaluate("window.scrollBy(0, 60)")
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(OUT / f"{name}.png", optimize=True)
    page.close()


if __name__ == "__main__":
    main()
