"""The page in a real headless Chromium, from a real function with known answers."""

import os
import shutil
import uuid
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from known import release_known
from playwright.sync_api import expect, sync_playwright

from build import local

SCREENSHOTS = Path(".local/screenshots")
SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1440, "height": 900}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None and not os.environ.get("CI"), reason="chromium is not installed: apt has it"
    ),
]


@pytest.fixture(scope="module")
def address(bucket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    uri = f"gs://{local.BUCKET}/{uuid.uuid4().hex}"
    release_known(uri, folder / "release")
    settings = {"MODEL_URI": uri, "CACHE_DIR": str(folder / "cache"), "THREADS": "16", "MAX_QUEUE": "8"}
    with local.run_function(bucket, environment=settings) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; at the end it must not have complained, nor asked anyone but its own server."""
    contexts, complaints, asked = [], [], []

    def open_(size="desktop", scheme="light"):
        context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, locale="ko-KR")
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert all(url.startswith((address, "data:")) for url in asked)
    assert [text for text in complaints if "Failed to load resource" not in text] == []  # a refusal's status


def ask(page, text):
    page.get_by_label("글", exact=False).fill(text)
    page.get_by_role("button", name="살펴보기").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_reads_well_at_any_size_and_light(open_page, size, scheme):
    page = open_page(size, scheme)
    assert_accessible(page)
    page.get_by_text("예문 고르기").click()
    page.get_by_role("button", name="요즘 너무 불안하고").click()
    expect(page.get_by_role("heading", name="드러난 욕구: 안정감")).to_be_visible()
    expect(page.locator("mark").first).to_be_visible()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{size}-{scheme}.png", full_page=True)
    assert_accessible(page)


def assert_accessible(page):
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("text", ["가" * 2000, "a" * 2000, "친구 " * 660], ids=["hangul", "latin", "words"])
def test_two_thousand_characters_never_scroll_sideways(open_page, text):
    page = open_page("phone")
    ask(page, text)
    expect(page.locator("#found")).to_be_visible()
    widths = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] <= widths[1]


def test_needs_over_their_threshold_are_named_with_score_time_and_release(open_page):
    page = open_page()
    ask(page, "안전한 공간")
    expect(page.get_by_role("heading", name="드러난 욕구: 안정감, 공정성")).to_be_visible()
    rows = page.locator("#scores li")
    expect(rows).to_have_count(10)
    expect(rows.first).to_contain_text("안정감")
    expect(rows.first).to_contain_text("security")
    expect(rows.first).to_contain_text("✓ 0.88")
    expect(page.locator("#took")).to_contain_text("ms (모델")
    expect(page.locator("#release")).to_contain_text("Z-")
    expect(page.locator("mark")).to_have_text(["안전한", "공간"])


def test_neutral_text_has_no_need(open_page):
    page = open_page()
    ask(page, "오늘 점심은 김밥")
    expect(page.get_by_role("heading", name="뚜렷한 욕구가 없습니다.")).to_be_visible()
    expect(page.locator("#reasons")).to_be_hidden()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("가" * 5001, "글은 5000자까지 쓸 수 있는데 지금은 5001자입니다. 조금 줄여 주세요."),
        ("  ", "글이 비어 있습니다. 한 글자라도 적어 주세요."),
    ],
    ids=["long", "blank"],
)
def test_a_problem_is_said_in_korean_and_the_text_kept(open_page, text, said):
    page = open_page()
    ask(page, text)
    expect(page.get_by_text(said)).to_be_visible()
    expect(page.locator("#text")).to_have_value(text)


def test_a_server_out_of_reach_is_said_and_the_text_kept(open_page):
    page = open_page()
    page.route("**/", lambda route: route.abort())
    ask(page, "안녕")
    expect(page.get_by_text("서버에 닿지 못했습니다.")).to_be_visible()
    expect(page.locator("#text")).to_have_value("안녕")


def test_the_keyboard_alone_is_enough(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    page.keyboard.type("공평하게")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("heading", name="드러난 욕구: 공정성")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="드러난 욕구: 안정감")).to_be_visible()
    expect(page.get_by_role("button", name="요즘 너무 불안하고")).to_be_hidden()  # the answer is what is read now


def test_offsets_survive_emoji(open_page):
    page = open_page()
    ask(page, "😊😊 공평 😊")
    expect(page.locator("mark")).to_have_text(["공평"])
