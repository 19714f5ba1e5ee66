"""The report in a real browser: by mouse and by keyboard, light and dark, wide and on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from report_runs import cases, rich

from descend.compare.results.content import report_page

CASES = {
    "rich": rich(),
    **{name: cases()[name] for name in ("nothing", "one step", "all diverged", "thirty", "hostile")},
}

# Texts whose contrast with the ground behind them is below 4.5, by WCAG 2.2's formula.
LOW_CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = (colour) => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = colour.slice(0, 3).map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (let one = element; one; one = one.parentElement) {
    const colour = rgba(getComputedStyle(one).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
};
const found = [];
let checked = 0;
for (const element of document.querySelectorAll("body *")) {
  const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();
  const style = getComputedStyle(element);
  if (!text || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName) || !element.getClientRects().length) continue;
  checked += 1;
  const colour = rgba(element instanceof SVGElement ? style.fill : style.color);
  const [low, high] = [luminance(colour), luminance(ground(element))].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) found.push([text.slice(0, 40), style.color, ratio]);
}
return [checked, found];
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    paths = {name: folder / f"{name}.html" for name in CASES}
    for name, path in paths.items():
        path.write_text(report_page(*CASES[name]), encoding="utf-8")
    return paths


@pytest.mark.parametrize("case", CASES)
def test_page_opens_alone_and_fits_a_phone(browser: Browser, pages: dict[str, Path], case: str) -> None:
    browser.open(pages[case], width=360)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    assert browser.errors() == []
    assert browser.requests() == []
    assert browser.run("return window.hacked") is None
    wrong = browser.run(
        "return [...document.querySelectorAll('.chart')].filter((chart) => !chart.closest('[hidden]') "
        "&& (!chart.querySelector('svg') || chart.clientWidth > 360)).length"
    )
    assert wrong == 0


def test_policy_forbids_what_is_not_the_pages_own(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"])
    browser.run(
        "const one = document.createElement('script'); one.textContent = 'window.hacked = 3'; document.body.append(one)"
    )
    browser.run("new Image().src = 'http://127.0.0.1:9/picture.png'")
    assert browser.run("return window.hacked") is None
    errors = browser.errors()
    assert len(errors) == 2
    assert all("Content Security Policy" in error for error in errors)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    browser.open(pages["rich"], scheme=scheme)
    browser.run("document.querySelector('.legend button').click(); document.querySelector('details').open = true")
    checked, low = browser.run(LOW_CONTRAST)
    assert checked > 200
    assert low == []
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
    browser.run("document.querySelector('.lead').style.color = 'gray'; document.body.style.background = 'silver'")
    assert browser.run(LOW_CONTRAST)[1]  # the check can fail


def test_theme_button_recolours_page_and_charts(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"])
    look = (
        "const chart = document.querySelector('.chart'); return [document.getElementById('theme').textContent, "
        "getComputedStyle(document.body).backgroundColor, chart.layout.paper_bgcolor, chart.layout.font.color]"
    )
    assert browser.run(look) == ["Dark colours", "rgb(255, 255, 255)", "#ffffff", "#1b1f24"]
    browser.run("document.getElementById('theme').click()")
    assert browser.run(look) == ["Light colours", "rgb(20, 23, 28)", "#14171c", "#e6e9ed"]


def visible(browser: Browser, group: str) -> set[Any]:
    """Return whether the traces of a series are shown, in all charts that are drawn."""
    return set(
        browser.run(
            "return [...document.querySelectorAll('.chart')].flatMap((chart) => chart.data || [])"
            ".filter((trace) => trace.legendgroup === arguments[0]).map((trace) => trace.visible)",
            group,
        )
    )


def test_legend_toggles_a_curve_everywhere(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(pages["rich"])
    shown = "return document.querySelectorAll('.chart .scatterlayer .trace').length"
    before = browser.run(shown)
    first, *_ = browser.driver.find_elements("css selector", ".legend button[data-group=series2]")
    assert visible(browser, "series2") == {True}
    first.click()
    assert visible(browser, "series2") == {False}
    assert visible(browser, "series1") == {True}
    assert browser.run(shown) < before
    states = "return [...document.querySelectorAll('[data-group=series2]')].map((one) => one.ariaPressed)"
    assert set(browser.run(states)) == {"false"}
    first.send_keys(Keys.SPACE)
    assert visible(browser, "series2") == {True}
    assert browser.run(shown) == before


def test_tabs_work_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(pages["rich"])
    active = browser.driver.switch_to
    browser.driver.find_element("css selector", "[role=tab]").send_keys(Keys.ARROW_RIGHT)
    state = (
        "const tabs = [...document.querySelector('[role=tablist]').children]; return tabs.map((tab) => "
        "[tab.ariaSelected, tab.tabIndex, document.getElementById(tab.getAttribute('aria-controls')).hidden])"
    )
    off, on = ["false", -1, True], ["true", 0, False]
    assert active.active_element.text == "Time"
    assert browser.run(state) == [off, on, off]
    title = "return document.querySelector('[role=tabpanel]:not([hidden]) .chart').layout.xaxis.title.text"
    assert browser.run(title) == "seconds"
    active.active_element.send_keys(Keys.END)
    assert browser.run(state) == [off, off, on]
    assert browser.run(title) == "gradients evaluated"
    active.active_element.send_keys(Keys.ARROW_RIGHT)
    assert browser.run(state) == [on, off, off]
    assert browser.errors() == []


def test_everything_that_can_be_used_is_reached_by_tab(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(pages["one step"])
    wanted = browser.run(
        "return [...document.querySelectorAll('a, button, summary, [tabindex=\"0\"]')]"
        ".filter((one) => one.tabIndex >= 0 && one.checkVisibility())"
        ".map((one, i) => { one.dataset.place = i; return i; })"
    )
    reached = []
    for _ in wanted:
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        reached.append(browser.run("return Number(document.activeElement.dataset.place)"))
        outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
    assert reached == wanted


@pytest.mark.parametrize("case", ["rich", "hostile"])
def test_controls_and_landmarks_have_names(browser: Browser, pages: dict[str, Path], case: str) -> None:
    browser.open(pages[case])
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named: dict[str, list[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in (
        "button",
        "link",
        "tab",
        "tablist",
        "tabpanel",
        "region",
        "table",
        "navigation",
        "heading",
        "DisclosureTriangle",
    ):
        assert named.get(role), role
        assert all(named[role]), role
    assert len(named["main"]) == 1
    charts = browser.run(
        "return [...document.querySelectorAll('.chart')].map((one) => [one.getAttribute('role'), one.ariaLabel])"
    )
    assert charts
    assert all(role == "img" and len(label) > 20 for role, label in charts)
