"""The HTML report in a real browser: ``make test-report``. Needs Chromium, its driver and selenium."""

import base64
import json
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from rsanet.segment.html.cohort import write_report
from rsanet.segment.scenario import Scenario
from rsanet.segment.simulation import simulate

# As root, and without the calls home that Chromium makes at its start.
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
NARROW, WIDE = 360, 1400  # CSS pixels


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two sessions of a simulated patient, with predictions that miss a lesion and add one."""
    root = tmp_path_factory.mktemp("report")
    simulate(root / "data", 1, Scenario(spacing=(3, 3, 3), contrasts=("FLAIR", "T1w"), sessions=2), seed=3)
    (root / "pred").mkdir()
    for path in (root / "data" / "derivatives").rglob("*label-lesion_mask.nii.gz"):
        image = nib.load(path)
        mask = np.asarray(image.dataobj).copy()
        mask[: mask.shape[0] // 2] = 0  # nothing on the left
        mask[40:42, 40:42, 30] = 1
        nib.save(nib.Nifti1Image(mask, image.affine), root / "pred" / path.name)
        name = path.name.replace("_mask", "_probseg")
        nib.save(nib.Nifti1Image(mask.astype(np.float32), image.affine), root / "pred" / name)
    write_report(root / "out", root / "data", root / "pred")
    return root / "out"


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="make test-report installs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for option in OPTIONS.split():
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def case(browser, report):
    """The page of the second session, opened afresh."""
    return open_page(browser, report / "sub-001_ses-02.html")


def open_page(browser, path, width=WIDE, height=900):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(Path(path).resolve().as_uri())
    return browser


def find(page, selector):
    return page.find_elements("css selector", selector)


def shown(page, layer):
    """Whether the outlines of a layer are drawn: all, or none of them."""
    styles = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => getComputedStyle(node).display)",
        f"main .picture .line.{layer}",
    )
    assert styles
    assert len(set(styles)) == 1
    return styles[0] != "none"


def press(page, key):
    page.find_element("tag name", "body").send_keys(key)


def test_every_page_opens_without_errors_and_asks_for_nothing(browser, report):
    for path in report.iterdir():
        browser.get_log("browser")
        browser.get_log("performance")
        open_page(browser, path)
        assert browser.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert {address for address in asked if not address.startswith("data:")} == {path.resolve().as_uri()}


def test_pictures_are_drawn(case):
    sizes = case.execute_async_script(
        """const done = arguments[0];
        Promise.all([...document.querySelectorAll("svg image")].map((node) => { const image = new Image();
          image.src = node.getAttribute("href"); return image.decode().then(() => image.width * image.height); }))
        .then(done, (error) => done(String(error)));"""
    )
    assert len(sizes) > 10
    assert min(sizes) > 1000


def test_a_checkbox_switches_its_outlines_and_no_others(case):
    for place in (".controls", "#change"):
        boxes = {box.get_attribute("data-layer"): box for box in find(case, f"{place} input[data-layer]")}
        drawn = [layer for layer in boxes if find(case, f"main .picture .line.{layer}")]
        assert len(drawn) >= 3
        for layer, other in zip(drawn, drawn[1:] + drawn[:1], strict=True):
            assert shown(case, layer)
            boxes[layer].click()
            assert not shown(case, layer)
            assert shown(case, other)
            boxes[layer].click()
            assert shown(case, layer)


def test_the_keyboard_switches_outlines_and_lets_go_of_a_lesion(case):
    first = find(case, ".controls input[data-layer]")[0].get_attribute("data-layer")
    press(case, "1")
    assert not shown(case, first)
    press(case, "1")
    assert shown(case, first)
    press(case, "0")
    assert not shown(case, first)
    assert not shown(case, "missed")
    press(case, "0")
    assert shown(case, "missed")
    find(case, "#lesions .find")[0].send_keys("\ue007")  # Enter
    assert find(case, "path.chosen")
    press(case, "\ue00c")  # Escape
    assert not find(case, "path.chosen")


def test_everything_that_can_be_clicked_can_be_reached_by_the_tab_key(case):
    case.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        case.switch_to.active_element.send_keys("\ue004")
        node = case.switch_to.active_element
        reached.append(node.get_attribute("class") or node.get_attribute("data-layer") or node.tag_name)
    assert {"hit", "missed", "new", "sort", "find"} <= set(reached)


def test_a_row_leads_to_its_lesion_and_a_lesion_to_its_row(case):
    row = find(case, "#lesions tr[data-lesion]")[-1]
    name = row.get_attribute("data-lesion")
    row.find_element("css selector", "td").click()
    chosen = find(case, "path.chosen")
    assert {path.get_attribute("data-lesion") for path in chosen} == {name}
    place = find(case, "#slices .here")[0].rect
    top = case.execute_script("return window.scrollY")
    assert top <= place["y"] <= top + 900
    other = find(case, "#slices path.line.hit")[0]
    case.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", other)
    assert find(case, "#lesions tr.chosen")[0].get_attribute("data-lesion") == other.get_attribute("data-lesion")


def test_a_head_sorts_its_table_both_ways(case):
    def column(number):
        cells = find(case, f"#lesions tbody tr > :nth-child({number})")
        return [cell.text for cell in cells]

    heads = find(case, "#lesions thead th")
    names = [head.text.split("\n")[0].rstrip("↕↑↓ ") for head in heads]
    volume = names.index("Volume mm³") + 1
    button = heads[volume - 1].find_element("css selector", "button")
    button.click()
    numbers = [float(text) for text in column(volume)]
    assert numbers == sorted(numbers, reverse=True)
    assert heads[volume - 1].get_attribute("aria-sort") == "descending"
    button.send_keys("\ue007")
    assert [float(text) for text in column(volume)] == sorted(numbers)
    assert heads[volume - 1].get_attribute("aria-sort") == "ascending"
    heads[0].click()
    assert column(1)[:3] == ["1", "2", "3"]
    assert heads[volume - 1].get_attribute("aria-sort") == "none"


def test_the_slider_changes_the_size_of_pictures(case):
    picture, slider = find(case, "#slices .picture")[0], find(case, "#size")[0]
    before = picture.rect["width"]
    slider.send_keys("\ue014" * 5)  # to the right
    assert picture.rect["width"] > before + 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(browser, report, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    open_page(browser, report / "sub-001_ses-02.html")
    paper = colour(browser, "body", "backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for selector in ("h1", ".quiet", "figcaption", "td", "nav a"):
        assert contrast(colour(browser, selector, "color"), paper) >= 4.5, selector
    assert contrast(colour(browser, ".warning", "color"), colour(browser, ".warning", "backgroundColor")) >= 4.5
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def colour(page, selector, key):
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return [int(part) for part in re.findall(r"\d+", page.execute_script(script, selector, key))[:3]]


def luminance(rgb):
    """Of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, two):
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["index.html", "sub-001_ses-01.html", "sub-001_ses-02.html"])
def test_a_narrow_screen_does_not_scroll_sideways(browser, report, page):
    open_page(browser, report / page, NARROW)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= NARROW
    for warning in find(browser, ".warning strong"):
        assert warning.is_displayed()


def test_the_warning_stays_in_sight(case):
    case.execute_script("window.scrollTo(0, document.documentElement.scrollHeight)")
    place = case.execute_script("return document.querySelector('.warning').getBoundingClientRect().toJSON()")
    assert place["top"] == 0
    assert "no clinical meaning" in find(case, ".warning")[0].text


def test_printed_to_pdf_every_outline_is_there_even_if_it_was_switched_off(case):
    everything = strokes(base64.b64decode(case.print_page()))
    press(case, "0")
    for box in find(case, "#change input"):
        box.click()
    again = strokes(base64.b64decode(case.print_page()))
    assert everything["pages"] >= 3
    assert again == everything
    # Blue, orange and magenta of the outlines, as PDF writes them.
    for name in ("#56B4E9", "#E69F00", "#D40078"):
        rgb = [int(name[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        drawn = sum(n for found, n in everything["lines"].items() if np.allclose(rgb, found, atol=0.005))
        assert drawn > 4, name


def strokes(pdf):
    """The number of pages of a PDF, and how often it sets which colour to draw with."""
    content = b""
    for match in re.finditer(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            content += zlib.decompress(match[1])
        except zlib.error:
            continue  # a picture
    # A dashed line is filled dash by dash: its colour is set for both.
    found = Counter(re.findall(rb"([\d.]+ [\d.]+ [\d.]+) RG\b", content))
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf + content))
    return {"pages": pages, "lines": {tuple(map(float, colour.split())): count for colour, count in found.items()}}
