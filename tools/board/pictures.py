"""Pictures of every page of the board, to be looked at, and the one of docs/guides/board.md.

python tools/board/pictures.py RUNS... --out FOLDER [--first NAME] [--phone] [--dark]
python tools/board/pictures.py RUNS... --docs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import browser  # beside this script

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "board.png"
PAGES = {
    "runs": "runs",
    "curves": "runs/{0}",
    "system": "runs/{0}/system",
    "plan": "runs/{0}/plan?cluster=laptop",
    "samples": "runs/{0}/samples",
    "recipe": "runs/{0}/recipe",
    "record": "runs/{0}/record",
    "compare": "compare?run={0}&run={1}",
    "methods": "methods",
    "method": "methods/sophia",
}


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    parser.add_argument("--first", default="", help="the run to look at, by its name")
    parser.add_argument("--phone", action="store_true")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--docs", action="store_true")
    asked = parser.parse_args()
    size = {"width": 390, "height": 800} if asked.phone else {"width": 1280, "height": 860}
    with browser.board(*asked.runs) as address, browser.chromium() as chromium:
        page = chromium.new_page(viewport=size, color_scheme="dark" if asked.dark else "light")
        if asked.docs:
            shown(page, address, "runs")
            page.screenshot(path=GUIDE)
            return
        asked.out.mkdir(parents=True, exist_ok=True)
        shown(page, address, "runs")
        links = page.query_selector_all(".run .name")
        links.sort(key=lambda link: link.inner_text() != asked.first)
        ids = [link.get_attribute("href").split("/")[2] for link in links[:2]]
        for name, place in PAGES.items():
            shown(page, address, place.format(*ids, *ids))
            page.screenshot(path=asked.out / f"{name}.png", full_page=True)


def shown(page: Any, address: str, place: str) -> None:
    """Open a page and wait until it has what it needs."""
    page.goto(f"{address}#/{place}")
    page.wait_for_selector("h1", timeout=20_000)
    page.locator(".reading").first.wait_for(state="detached", timeout=60_000)
    page.wait_for_timeout(700)


if __name__ == "__main__":
    main()
