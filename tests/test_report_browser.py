"""The report in a real browser: what it shows, says to the console, loads, and how wide it is."""

import pytest

from browser import Browser
from helpers import quiet, toy_data, toy_mlp
from twophase.report import write_report

WORST = """(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const paper = light(parts(getComputedStyle(document.body).backgroundColor));
  let worst = [99, ''], seen = 0;
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || ['title', 'desc'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = light(parts(element.tagName === 'text' ? style.fill : style.color));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 80)];
    seen += 1;
  }
  return [...worst, seen];
})()"""
SMALLEST = """Math.min(...[...document.querySelectorAll('.chart text')].map(t =>
  parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report about one run, and one about two whose names are long."""
    root = tmp_path_factory.mktemp("runs")
    names = ["a", "a_name_that_does_not_break_" * 3]
    for name, mode in zip(names, ("gd", "base"), strict=True):
        given = {"second_phase": mode, "verify": "auto", "epochs": 6, "tau": 3}
        quiet(toy_mlp(), root / name, **given).fit(toy_data(), toy_data(n=20))
    folders = [root / name for name in names]
    return [
        write_report(folders[:1], root / "one.html"),
        write_report(folders, root / "two.html"),
    ]


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("i", [0, 1])
def test_page(browser, pages, i, scheme, width):
    browser.open(pages[i], scheme=scheme, width=width)
    browser.value("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.value("document.querySelector('h1').innerText").startswith("Two-phase training")
    assert "The guarantee held" in browser.value("document.body.innerText")
    assert browser.value("document.querySelectorAll('svg.chart').length") == (3, 7)[i]
    inner, outer = browser.value(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert inner <= outer <= width < outer + 20  # a scroll bar
    charts = browser.value(
        "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width)"
    )
    assert all(250 < chart <= width for chart in charts)
    assert browser.value(SMALLEST) >= 9  # pixels
    ratio, where, seen = browser.value(WORST)
    assert ratio >= 4.5, where
    assert seen > 100
    dark = browser.value("matchMedia('(prefers-color-scheme: dark)').matches")
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert dark == (scheme == "dark") == (paper == "rgb(22, 24, 27)")
    methods = [event["method"] for event in browser.events]
    for told in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        assert told not in methods, browser.events
    loaded = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert loaded[0] == pages[i].as_uri()
    assert all(url.startswith("data:") for url in loaded[1:])


def test_the_browser_tells(browser, tmp_path):
    """What test_page asserts the absence of is told where it happens."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<!DOCTYPE html><meta name=viewport content='width=device-width'><div style='width:2000px'>"
        "x</div><img src='missing.png'><script>console.log(1)</script>"
    )
    browser.open(path, scheme="light", width=360)
    methods = {event["method"] for event in browser.events}
    assert {"Runtime.consoleAPICalled", "Network.requestWillBeSent", "Log.entryAdded"} <= methods
    root = "document.documentElement"
    assert browser.value(f"{root}.scrollWidth") > browser.value(f"{root}.clientWidth")
