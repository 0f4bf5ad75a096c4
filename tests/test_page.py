"""The 503 page as a visitor sees it, in a real browser."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright

from tests.conftest import create_tables, register, unregister
from tests.served import served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
ARGUMENTS = [
    "--no-sandbox",  # as root there is none
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
NARROW, WIDE = {"width": 320, "height": 640}, {"width": 1440, "height": 900}

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
COLOURS = """() => {
    const style = getComputedStyle(document.body);
    return [style.color, style.backgroundColor];
}"""


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield chromium
        chromium.close()


def brightness(colour: str) -> int:
    """Return the sum of red, green and blue."""
    return sum(int(each) for each in colour.removeprefix("rgb(").removesuffix(")").split(","))


@pytest.mark.skipif(BROWSER is None, reason="No Chromium was found on PATH.")
def test_page(new_server: Any, tmp_path: Any) -> None:
    """It fits a telephone and a wide screen, light and dark, loads nothing, and its link works.

    Screenshots are kept in the folder that SCREENSHOTS names.
    """
    server = new_server("mariadb")
    register("site", server.django())
    create_tables("site")
    unregister("site")
    folder = os.environ.get("SCREENSHOTS", str(tmp_path))
    with served("gunicorn gthread", {"default": server.django()}) as site, browser() as chromium:
        server.stop()
        for size, name in ((NARROW, "narrow"), (WIDE, "wide")):
            for scheme in ("light", "dark"):
                page = chromium.new_page(viewport=size, color_scheme=scheme)
                requested: list[str] = []
                page.on("request", lambda request, seen=requested: seen.append(request.url))
                response = page.goto(f"{site.address}/count/default/")
                assert response is not None
                assert response.status == 503
                assert page.get_by_role("heading", name="Back in a moment").is_visible()
                assert page.evaluate(OVERFLOW) == 0
                text, background = page.evaluate(COLOURS)
                assert abs(brightness(text) - brightness(background)) > 500
                assert (brightness(background) < 100) is (scheme == "dark")
                assert requested == [f"{site.address}/count/default/"]
                page.screenshot(path=f"{folder}/503-{name}-{scheme}.png")
                page.close()
        page = chromium.new_page()
        page.goto(f"{site.address}/count/default/")
        server.start()
        page.get_by_role("link", name="try again").click()
        page.get_by_text("0 rows").wait_for()
