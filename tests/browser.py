"""A real browser, for looking at what people look at: Chromium without a window, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Without these, Chromium asks its maker's servers for news, and needs a sandbox that containers don't have.
_OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)

CONTRAST = """() => {
  const parse = (colour) => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const seen = (element) => {  // how much of its colour is left by its ancestors' opacity, and what is behind it
    let opacity = 1;
    for (; element; element = element.parentElement) {
      opacity *= getComputedStyle(element).opacity;
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour[3] > 0.99) return [opacity, colour];
    }
    return [opacity, [255, 255, 255]];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("script, style")) continue;
    const style = getComputedStyle(element), [opacity, ground] = seen(element);
    const colour = parse(element.closest("svg") ? style.fill : style.color);
    const ink = light(ground.map((part, place) => part + (colour[place] - part) * opacity)), paper = light(ground);
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    found.push([ratio, element.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""
"""WCAG's contrast of every visible text with what is behind it, the worst first: [[ratio, text], ...]."""


@dataclass
class Shown:
    """A page, and what happened while it was looked at.

    Attributes:
        page: To look at.
        asked: Addresses that it asked for, beside itself.
        trouble: What its console or its scripts complained about, and dialogs that opened.
    """

    page: Page
    asked: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the screen."""
        return int(self.page.evaluate("() => document.documentElement.scrollWidth - innerWidth"))

    @property
    def background(self) -> str:
        """The page's colour."""
        return str(self.page.evaluate("() => getComputedStyle(document.body).backgroundColor"))


@contextmanager
def running() -> Iterator[Browser]:
    """The browser. Where there is none the test is skipped, or fails if RAG_RERANK_REQUIRE_BROWSER is set."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        (pytest.fail if os.environ.get("RAG_RERANK_REQUIRE_BROWSER") else pytest.skip)("there is no Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def shown(browser: Browser, file: Path, *, dark: bool = False, width: int = 1000) -> Iterator[Shown]:
    """A file in a fresh window of `width` pixels, in light or dark."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
    found = Shown(context.new_page())
    address = file.as_uri()
    found.page.on("request", lambda request: found.asked.append(request.url) if request.url != address else None)
    found.page.on("console", lambda message: found.trouble.append(message.text))
    found.page.on("pageerror", lambda error: found.trouble.append(str(error)))
    found.page.on("dialog", lambda dialog: (found.trouble.append(dialog.message), dialog.dismiss()))
    try:
        found.page.goto(address)
        yield found
    finally:
        context.close()
