"""The README's pictures: the release that is current, in a headless Chromium, into docs/.

PYTHONPATH=. python tests/pictures.py
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from build.local import BUCKET, BUCKET_FOLDER, run_bucket, run_function
from training.files import read_json

DOCS = Path("docs")
TEXT = "팀장님이 내 발표를 칭찬해 줘서 하루 종일 기분이 좋았다. 다음에는 내 방식대로 해 보고 싶다."


def main() -> None:
    """Write page.png and report.png."""
    DOCS.mkdir(exist_ok=True)
    current = read_json(BUCKET_FOLDER / BUCKET / "needs" / "current.json")["release"]
    report = BUCKET_FOLDER / BUCKET / "needs" / "releases" / current / "report.html"
    with run_bucket() as bucket, run_function(bucket) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 900, "height": 800}, locale="ko-KR")
        page.goto(address)
        page.get_by_label("글", exact=False).fill(TEXT)
        page.get_by_role("button", name="살펴보기").click()
        page.locator("mark").first.wait_for()
        page.screenshot(path=DOCS / "page.png", full_page=True)
        page.goto(report.resolve().as_uri())
        page.screenshot(path=DOCS / "report.png", clip={"x": 0, "y": 0, "width": 900, "height": 1600}, full_page=True)
        chromium.close()


if __name__ == "__main__":
    main()
