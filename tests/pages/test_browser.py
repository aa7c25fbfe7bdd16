"""The page in a browser, opened from a disk: tables sort and filter, volumes appear, nothing complains or goes out."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cfrbench.pages.writing import write_page
from tests.pages.browser import chromium, complaints, open_page, requests, until
from tests.pages.runs import SMALL, small_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser with the page of a small run open, viewer included."""
    pytest.importorskip("ipyniivue", reason="the extra `viewer` is not installed")
    with chromium() as opened:
        store = tmp_path_factory.mktemp("store")
        small_run(store)
        done = write_page("latest", store, tmp_path_factory.mktemp("page") / "a folder, with spaces")
        assert done.volumes == SMALL["data.phantom.test"]
        assert done.notes == ()
        assert done.bytes < 60 * 2**20
        open_page(opened, done.path)
        yield opened


def table(driver: Any, title: str) -> Any:
    return driver.find_element("xpath", f"//figure[figcaption[contains(., '{title}')]]")


def column(figure: Any, place: int) -> list[str]:
    """The texts of a column in the rows that are shown."""
    script = (
        "return [...arguments[0].tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[arguments[1]].textContent)"
    )
    found: list[str] = figure.parent.execute_script(script, figure.find_element("tag name", "table"), place)
    return found


def test_a_click_sorts_and_another_one_turns_it_round(driver: Any) -> None:
    figure = table(driver, "Every score")
    head = figure.find_elements("css selector", "thead th")[9]
    assert head.text == "95HD (voxel)"
    before = column(figure, 9)
    driver.execute_script("arguments[0].click()", head)
    rising = [float(text) for text in column(figure, 9)]
    assert rising == sorted(map(float, before))
    assert head.get_attribute("aria-sort") == "ascending"
    head.send_keys("\n")
    assert [float(text) for text in column(figure, 9)] == rising[::-1]
    names = figure.find_elements("css selector", "thead th")[4]
    driver.execute_script("arguments[0].click()", names)
    assert column(figure, 4) == sorted(column(figure, 4))


def test_words_and_choices_filter_rows(driver: Any) -> None:
    figure = table(driver, "Every score")
    every = len(column(figure, 0))
    search = figure.find_element("css selector", "input[type=search]")
    search.send_keys("cfr TEST-01")
    assert column(figure, 0) == ["MT + CFR"]
    assert figure.find_element("tag name", "output").text == f"1 of {every} rows"
    search.clear()
    search.send_keys(" ")
    choice = figure.find_element("css selector", "select[aria-label='only this Variant']")
    choice.send_keys("pseudo-label")
    assert set(column(figure, 1)) == {"pseudo-label"}
    assert len(column(figure, 1)) == SMALL["data.phantom.train"] - 1  # type: ignore[operator]


def shot(canvas: Any) -> NDArray[np.int_]:
    """What the canvas shows, ``(H, W, 3)``."""
    return np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB")).astype(int)


def ready(canvas: Any, case: str) -> bool:
    state = canvas.get_attribute("data-state")
    assert state != "failed", canvas.parent.find_element("id", "viewer-place").text
    return bool(state == "ready" and canvas.get_attribute("data-case") == case)


def test_the_viewer_shows_the_volume_with_every_overlay_and_no_other(driver: Any) -> None:
    canvas = driver.find_element("id", "viewer-canvas")
    driver.execute_script("document.getElementById('viewer').scrollIntoView()")
    until(lambda: ready(canvas, "test-00"))
    labels = [label.text for label in driver.find_elements("css selector", "#viewer-layers label")]
    assert [text.partition(" (")[0] for text in labels] == ["truth", "MT", "MT + CFR", "pseudo-label"]
    until(lambda: bool(colourful(shot(canvas)).any()))
    shown = shot(canvas)
    assert (shown.max(axis=2) > 40).mean() > 0.05, "the canvas is black"
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 50
    for box in driver.find_elements("css selector", "#viewer-layers input"):
        driver.execute_script("arguments[0].click()", box)
    # The axes' letters are grey, the crosshair is not: overlays are the most of what is coloured.
    until(lambda: bool(colourful(shot(canvas)).sum() < 0.7 * colourful(shown).sum()))
    driver.find_element("id", "viewer-case").send_keys("test-01")
    until(lambda: ready(canvas, "test-01"))
    assert (shot(canvas) != shown).any()


def colourful(pixels: NDArray[np.int_]) -> NDArray[np.bool_]:
    """Pixels that are no grey."""
    return np.asarray(pixels.max(axis=2) - pixels.min(axis=2) > 40)


def test_nothing_complained_and_nothing_left_the_machine(driver: Any) -> None:
    assert complaints(driver) == []
    asked = requests(driver)
    assert len([url for url in asked if url.startswith("file:")]) == 1, "the page is one file"
    assert asked <= {driver.current_url, "data:", "blob:"}
