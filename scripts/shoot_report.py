"""The pictures of docs/report.md and docs/watching.md: the top of a page, in light and in dark.

python scripts/shoot_report.py runs/demo/report.html docs/pictures
python scripts/shoot_report.py runs/demo/watch/watch.html docs/pictures
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1100, 1130


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            page.goto(arguments.report.resolve().as_uri())
            page.screenshot(path=arguments.folder / f"{arguments.report.stem}-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
