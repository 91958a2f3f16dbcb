"""The page in a real headless Chromium, on the shipped checkpoint."""

import io
import json
import os
import shutil
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
if not shutil.which("chromium"):
    pytest.skip("there is no chromium", allow_module_level=True)

import gradio as gr  # noqa: E402
import torch  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

import app  # noqa: E402
from zero123plus.loading import load_pipeline  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def address():
    page = app.build(load_pipeline(None, "cpu", None))
    _, url, _ = app.launch(page, prevent_thread_lock=True, quiet=True, footer_links=[])
    yield url
    page.close()


@pytest.fixture
def browser(address, tmp_path):
    options = webdriver.ChromeOptions()
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.binary_location = shutil.which("chromium")
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1400,1200",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.get(address)
    yield driver
    driver.quit()


def wait(browser, look):
    return WebDriverWait(browser, 240, ignored_exceptions=(Exception,)).until(lambda _: look())


def upload(browser, path):
    wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]")).send_keys(str(path))
    wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#picture img"))


def set_steps(browser, steps):
    box = browser.find_element(By.CSS_SELECTOR, "#steps input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(str(steps), Keys.TAB)


def sources(browser, where):
    return [image.get_attribute("src") for image in browser.find_elements(By.CSS_SELECTOR, f"{where} img")]


def fetch(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def test_upload_to_result(browser, tmp_path):
    upload(browser, ROOT / "examples" / "images" / "duck.png")
    set_steps(browser, 3)
    browser.find_element(By.ID, "generate").click()
    forming = wait(browser, lambda: sources(browser, "#tile"))  # before there is any result
    assert not sources(browser, "#turntable")
    (turntable,) = wait(browser, lambda: sources(browser, "#turntable"))
    tile = PIL.Image.open(io.BytesIO(fetch(sources(browser, "#tile")[0])))
    assert tile.size == (256, 384) and sources(browser, "#tile") != forming
    assert PIL.Image.open(io.BytesIO(fetch(turntable))).n_frames == 6
    assert len(wait(browser, lambda: sources(browser, "#views"))) >= 6
    browser.find_element(By.ID, "archive").click()
    (path,) = wait(browser, lambda: list(tmp_path.glob("*.zip")))
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        assert len(json.loads(archive.read("views/cameras.json"))["frames"]) == 6
        saved = PIL.Image.open(io.BytesIO(archive.read("views/tile.png")))
    files = {"input.png", "turntable.webp", "view_5.png", "nerfstudio/transforms.json", "glb/mesh.glb"}
    assert {f"views/{name}" for name in files} <= names
    link = wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#mesh [data-testid=model3d-download-link]"))
    assert fetch(link.get_attribute("href"))[:4] == b"glTF"
    assert np.array_equal(np.asarray(saved), np.asarray(tile.convert("RGB")))
    browser.save_screenshot(str(tmp_path / "page.png"))


def test_broken_file_is_a_message(browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"this is no picture")
    wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]")).send_keys(
        str(tmp_path / "broken.png")
    )
    wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#picture img"))
    browser.find_element(By.ID, "generate").click()
    wait(browser, lambda: "cannot be read as a picture" in browser.find_element(By.TAG_NAME, "body").text)


def test_no_picture_is_a_message(browser):
    wait(browser, lambda: browser.find_element(By.ID, "generate")).click()
    wait(browser, lambda: "There is no picture yet" in browser.find_element(By.TAG_NAME, "body").text)


def test_an_empty_seed_is_a_message(browser):
    upload(browser, ROOT / "examples" / "images" / "duck.png")
    box = browser.find_element(By.CSS_SELECTOR, "#seed input, #seed textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE, Keys.TAB)
    browser.find_element(By.ID, "generate").click()
    wait(
        browser, lambda: "The seed is '', but must be a whole number" in browser.find_element(By.TAG_NAME, "body").text
    )


def test_seeds_go_as_far_as_torchs():
    assert app.parse_seed(f" {2**64 - 1} ") == 2**64 - 1
    torch.Generator().manual_seed(app.parse_seed(str(2**64 - 1)))
    for text in ("", "-1", "1.5", str(2**64), "²"):
        with pytest.raises(gr.Error, match="must be a whole number from 0 to 18446744073709551615"):
            app.parse_seed(text)


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_PIXELS", 2_000_000)
    PIL.Image.new("1", (2000, 1001)).save(tmp_path / "large.png")
    with pytest.raises(gr.Error, match="2000 x 1001 pixels, more than 2 million"):
        app.read_upload(gr.data_classes.ImageData(path=str(tmp_path / "large.png")))


def test_work_ends_when_nobody_listens():
    seen = []

    def work(show):
        for i in range(1000):
            seen.append(i)
            show(i)
            time.sleep(0.01)

    listener = app.in_steps(work)
    assert next(listener) == ("shown", (0,))
    listener.close()
    assert len(seen) < 1000
    with pytest.raises(ZeroDivisionError):
        list(app.in_steps(lambda show: 1 / 0))
    assert list(app.in_steps(lambda show: show("a", 1) or 7)) == [("shown", ("a", 1)), ("done", 7)]
