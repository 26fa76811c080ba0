"""The report of the tiny pipeline's release: one page that needs nothing else, with every section and picture."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from build.report import STUDY
from training.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def release(released, pipeline) -> Path:
    steps, _ = pipeline
    return Path(steps[0]["dir"]) / ".local" / "build" / "release"


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_has_its_pictures(release):
    content = (release / "report.html").read_text("utf-8")
    page = _Page()
    page.feed(content)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert all(address.startswith("#") for address in addresses if address)
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    assert sum(tag == "section" for tag, _ in page.tags) >= 12


def test_korean_in_pictures_is_outlines_that_need_no_font(release):
    content = (release / "report.html").read_text("utf-8")
    pictures = re.findall(r"<svg.*?</svg>", content, re.S)
    assert not any("<text" in picture for picture in pictures)
    assert all(picture.count("<use ") + picture.count("<path ") > 20 for picture in pictures)


def test_the_studys_own_figures_are_quoted_as_its_own(release):
    report = (release / "report.md").read_text("utf-8")
    assert (
        f"| 공개 연구: 파인튜닝 후 (the study, after) | {STUDY['after'][0]:.4f} | {STUDY['after'][1]:.4f} |" in report
    )
    assert "its own, on its own unpublished data" in report


def test_every_recipe_and_candidate_stands_in_the_report(release):
    report, metrics = (release / "report.md").read_text("utf-8"), read_json(release / "metrics.json")
    for row in metrics["quantization"]["searched"]:
        assert f"| {row['recipe']} |" in report or f"| **{row['recipe']}** |" in report
    assert f"**{metrics['quantization']['recipe']}**" in report
    assert f"Released: **{metrics['candidates']['chosen']}**" in report


def test_the_card_has_the_hubs_metadata(release):
    _, front, body = (release / "README.md").read_text("utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["language"] == "ko"
    assert card["pipeline_tag"] == "text-classification"
    values = {metric["name"]: metric["value"] for metric in card["model-index"][0]["results"][0]["metrics"]}
    expected = read_json(release / "metrics.json")["verification"]["int8"]["macro_f1"]
    assert values["macro-F1 at 0.5"] == pytest.approx(expected, abs=1e-4)
    assert "**Not for** diagnosis" in body
