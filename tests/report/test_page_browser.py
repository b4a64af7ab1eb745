"""The page in a real browser, opened from disk: no error, no network, and no text that is anything but text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_folders import silent, trace, write_evaluation, write_run

from mrpo.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: apt install chromium chromium-driver)"
)
MANY = 10_000
# Elements of the list at any moment: some tens of rows of at most a few tens of elements each.
MOST_LIST_ELEMENTS = 2_000
HOSTILE = "<img src=x onerror=\"document.title='broken'\"></script><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def window(browser: Any) -> Iterator[Any]:
    """A desktop window in which no test may leave an error."""
    browser.set_window_size(1300, 900)
    browser.get("about:blank")
    browser.get_log("browser")
    yield browser
    assert browser.get_log("browser") == []


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def visit(window: Any, page: Path, fragment: str = "") -> None:
    window.get("about:blank")
    window.get(f"{page.as_uri()}#{fragment}" if fragment else page.as_uri())
    until(lambda: find(window, "#traces[data-loaded]"))


def find(window: Any, selector: str) -> list[Any]:
    return window.find_elements("css selector", selector)


def text(window: Any, selector: str) -> str:
    return find(window, selector)[0].text


def count(window: Any) -> str:
    return text(window, "#traces output")


def press(window: Any, key: str) -> None:
    find(window, "body")[0].send_keys(key)


def set_field(window: Any, name: str, value: str) -> None:
    """Types into a field, picks from a selection, or clicks a box."""
    (field,) = find(window, f".filters [name={name}]")
    if field.get_attribute("type") == "checkbox":
        field.click()
    elif field.tag_name == "select":
        find(field, f'option[value="{value}"]')[0].click()
    else:
        field.clear()
        field.send_keys(value)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with advantages and images, and two models with wrong, early, unjudged and hostile traces."""
    folder = tmp_path_factory.mktemp("page")
    traces = [
        trace(0, (True, True)),
        trace(1, (False, True, True), correct=False),
        trace(2, (True, True, False), correct=False, dataset="other"),
        trace(3, (None, None), correct=None),
        trace(4, (True, True), id="q0", question="Question 0?", sample=1, correct=False),
        trace(5, (True, True), images=["nowhere.png"]),
    ]
    hostile = trace(9, (True, False), correct=False, text=f"<think>Step 1 of 9. {HOSTILE}</think>")
    texts = dict.fromkeys(("id", "dataset", "question", "gold", "rationale", "answer", "finish_reason"), HOSTILE)
    hostile |= texts | {"images": [HOSTILE], "reward": {HOSTILE: 1.0}}
    hostile["steps"] = [{"text": HOSTILE, "valid": True, "reason": HOSTILE}, {"text": "b", "valid": None}]
    write_evaluation(folder / "eval", {"a": traces, HOSTILE: [hostile]})
    return write_report([write_run(folder / "run"), folder / "eval"], folder / "out", silent)


def test_the_page_opens_without_errors_and_shows_its_figures(window: Any, page: Path) -> None:
    visit(window, page)
    assert len(find(window, "figure svg")) == 5
    assert count(window) == "10 of 10 traces"
    assert window.title.startswith("run, eval")
    policy = find(window, "meta[http-equiv=Content-Security-Policy]")[0].get_attribute("content")
    assert policy.startswith("default-src 'none'")


def test_a_trace_shows_what_is_known_of_it(window: Any, page: Path) -> None:
    visit(window, page)
    set_field(window, "model", "run")
    find(window, ".row")[0].click()
    detail = text(window, ".detail")
    for shown in ("Which organ?", "liver", "It is dark.", "It is not.", "step 1", "right answer", "early"):
        assert (shown in detail) == (shown != "early"), shown
    assert [step.get_attribute("class") for step in find(window, ".step")] == ["step good", "step bad"]
    assert [mark.text for mark in find(window, ".step .mark")] == ["✓", "✗"]
    assert [value.text for value in find(window, ".step .advantage")] == ["+0.50", "\N{MINUS SIGN}1.00"]
    assert text(window, ".completion").startswith("<think>")
    (image,) = find(window, ".picture img")
    assert until(lambda: image.get_property("naturalWidth")) == 40
    tints = [part.value_of_css_property("background-color") for part in find(window, ".completion .part")]
    assert len(set(tints)) == 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"wrong": ""}, 4),
        ({"early": ""}, 1),
        ({"unjudged": ""}, 2),
        ({"wrong": "", "early": ""}, 1),
        ({"model": "run"}, 3),
        ({"dataset": "other"}, 1),
        ({"from": "2"}, 2),
        ({"from": "2", "to": "2"}, 1),
        ({"text": "organ DARK"}, 3),
        ({"text": '"step 3 of 2"'}, 1),
        ({"text": "step 3 of 2"}, 3),
        ({"text": "of.*"}, 0),
        ({"wrong": "", "model": "a"}, 3),
    ],
)
def test_filters(window: Any, page: Path, fields: dict[str, str], expected: int) -> None:
    visit(window, page)
    for name, value in fields.items():
        set_field(window, name, value)
    until(lambda: count(window) == f"{expected} of 10 traces")
    assert len(find(window, ".row")) == expected
    find(window, ".filters [type=reset]")[0].click()
    until(lambda: count(window) == "10 of 10 traces")


def test_keys_go_through_the_list(window: Any, page: Path) -> None:
    visit(window, page)
    set_field(window, "model", "a")
    find(window, "h1")[0].click()
    chosen = lambda: [row.get_attribute("data-place") for row in find(window, ".row[aria-selected=true]")]  # noqa: E731
    for key, place in (("j", "0"), ("j", "1"), ("j", "2"), ("k", "1"), ("k", "0"), ("k", "0")):
        press(window, key)
        assert chosen() == [place]
    shown = text(window, ".detail")
    assert "Question 0?" in shown
    set_field(window, "text", "jjk")
    until(lambda: count(window).startswith("0 "))
    assert text(window, ".detail") == shown


def test_completions_of_one_question_lead_to_each_other(window: Any, page: Path) -> None:
    visit(window, page)
    set_field(window, "text", '"step 1 of 0"')
    until(lambda: count(window).startswith("1 "))
    find(window, ".row")[0].click()
    buttons = find(window, ".siblings button")
    assert [button.text for button in buttons] == ["1 ✓", "2 ✗"]
    buttons[1].click()
    assert "yes 4" in text(window, ".detail")


def test_the_address_leads_back(window: Any, page: Path) -> None:
    visit(window, page)
    set_field(window, "wrong", "")
    press(window, "j")
    press(window, "j")
    shown, fragment = text(window, ".detail"), window.current_url.partition("#")[2]
    visit(window, page, fragment)
    assert text(window, ".detail") == shown
    assert count(window) == "4 of 10 traces"
    assert len(find(window, ".row[aria-selected=true]")) == 1


def test_an_address_of_no_trace_says_so(window: Any, page: Path) -> None:
    visit(window, page, "trace=" + "%3Cimg+src%3Dx%3E")
    assert "This report has no trace <img src=x>." in text(window, ".detail")


def test_missing_images_have_a_placeholder(window: Any, page: Path) -> None:
    visit(window, page)
    set_field(window, "text", '"question 5?"')
    until(lambda: count(window).startswith("1 "))
    find(window, ".row")[0].click()
    assert "nowhere.png" in text(window, ".detail .no-image")


def test_text_is_never_markup(window: Any, page: Path) -> None:
    visit(window, page)
    set_field(window, "text", '"of 9"')
    until(lambda: count(window).startswith("1 "))
    find(window, ".row")[0].click()
    detail = text(window, ".detail")
    assert detail.count("onerror=") >= 9
    assert not find(window, ".detail img, .detail script, .list img, .list script, .card img, figure img")
    assert "broken" not in window.title


def test_many_traces_stay_light(window: Any, tmp_path: Path) -> None:
    traces = [trace(n, (n % 3 > 0, True, False), correct=n % 4 > 0) for n in range(MANY)]
    page = write_report([write_evaluation(tmp_path / "eval", {"a": traces})], tmp_path / "out", silent)
    visit(window, page)
    assert count(window) == "10,000 of 10,000 traces"

    def elements() -> int:
        return window.execute_script("return document.querySelectorAll('.list *').length")

    assert 0 < elements() < MOST_LIST_ELEMENTS
    set_field(window, "wrong", "")
    assert count(window) == "2,500 of 10,000 traces"
    assert 0 < elements() < MOST_LIST_ELEMENTS
    (box,) = find(window, ".list")
    box.send_keys("\ue010")  # End
    until(lambda: "Question 9996?" in text(window, ".detail"))
    assert find(window, ".row[aria-posinset='2500'][aria-selected=true]")
    assert 0 < elements() < MOST_LIST_ELEMENTS
    set_field(window, "text", '"question 9988?"')
    until(lambda: count(window) == "1 of 10,000 traces")
    assert elements() < 30


@pytest.mark.parametrize("width", [420, 820, 1600])
def test_no_width_scrolls_the_page_sideways(window: Any, page: Path, width: int) -> None:
    window.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    visit(window, page)
    press(window, "j")
    widths = window.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert widths[0] <= widths[1] == width


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_letters_stand_out_in_both_themes(window: Any, page: Path, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    visit(window, page)
    press(window, "j")
    read = lambda selector, name: luminance(find(window, selector)[0].value_of_css_property(name))  # noqa: E731
    paper = read("body", "background-color")
    inks = [read(s, "color") for s in ("body", ".row-answer", ".chip", ".bar nav a", ".note")]
    inks.append(read("figure svg text", "fill"))
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert (paper > 0.5) == (theme == "light")
    # 4.5 is what WCAG 2.1 (1.4.3) asks of text.
    assert min((max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) for ink in inks) >= 4.5


def luminance(color: str) -> float:
    """Relative luminance of a CSS rgb() colour (WCAG 2.1)."""
    channels = [float(value) / 255 for value in color.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_lost_chunk_is_said(browser: Any, page: Path, tmp_path: Path) -> None:
    shutil.copytree(page.parent, tmp_path / "out")
    (tmp_path / "out" / "data" / "traces-0000.js").unlink()
    visit(browser, tmp_path / "out" / "index.html")
    assert "could not load data/traces-0000.js" in count(browser)
