"""The page in a real headless Chromium, on the shipped checkpoint."""

import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
if not shutil.which("chromium"):
    pytest.skip("there is no chromium", allow_module_level=True)

import gradio as gr  # noqa: E402
import gradio_client  # noqa: E402
import torch  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from zero123plus import page as app  # noqa: E402
from zero123plus.loading import Checkpoint  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def address():
    page = app.build(*app.load(Checkpoint(None, "cpu", None)))
    _, url, _ = app.launch(page, prevent_thread_lock=True, footer_links=[])
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
        "use-angle=swiftshader",  # WebGL without a GPU, for the mesh
        "enable-unsafe-swiftshader",
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


def open_settings(browser):
    if not browser.find_elements(By.CSS_SELECTOR, "#steps input[type=number]"):
        browser.find_element(By.CSS_SELECTOR, "#settings button").click()
    wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#steps input[type=number]").is_displayed())


def set_steps(browser, steps):
    open_settings(browser)
    box = browser.find_element(By.CSS_SELECTOR, "#steps input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(str(steps), Keys.TAB)


def sources(browser, where):
    return [image.get_attribute("src") for image in browser.find_elements(By.CSS_SELECTOR, f"{where} img")]


def fetch(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def is_done(browser):
    return browser.find_element(By.ID, "archive").is_enabled()


def test_an_example_then_generate_then_an_upload(browser, tmp_path):
    """What a visitor does first. A click on an example makes its views."""
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#examples button.gallery-item"))[1].click()
    wait(browser, lambda: is_done(browser))
    assert len(sources(browser, "#views")) >= 6
    first = sources(browser, "#tile")
    set_steps(browser, 1)
    browser.find_element(By.ID, "generate").click()
    wait(browser, lambda: is_done(browser) and sources(browser, "#tile") != first)
    second = sources(browser, "#tile")
    browser.find_element(By.CSS_SELECTOR, "#picture button[aria-label='Remove Image']").click()
    upload(browser, ROOT / "examples" / "images" / "car.png")
    browser.find_element(By.ID, "generate").click()
    wait(browser, lambda: is_done(browser) and sources(browser, "#tile") != second)
    assert not messages(browser)


def messages(browser):
    return [toast.text for toast in browser.find_elements(By.CSS_SELECTOR, ".toast-body") if toast.text]


def test_upload_to_result(browser, tmp_path):
    upload(browser, ROOT / "examples" / "images" / "cactus.png")
    set_steps(browser, 3)
    browser.find_element(By.ID, "generate").click()
    forming = wait(browser, lambda: sources(browser, "#tile"))  # before there is any result
    assert not sources(browser, "#views")
    wait(browser, lambda: "making the mesh" in browser.find_element(By.ID, "bar").text or is_done(browser))
    wait(browser, lambda: is_done(browser))
    tile = PIL.Image.open(io.BytesIO(fetch(sources(browser, "#tile")[0])))
    assert tile.size == (256, 384) and sources(browser, "#tile") != forming
    assert len(wait(browser, lambda: sources(browser, "#views"))) >= 6
    browser.find_element(By.ID, "archive").click()
    (path,) = wait(browser, lambda: list(tmp_path.glob("*.zip")))
    browser.find_element(By.ID, "mesh_file").click()
    (glb,) = wait(browser, lambda: list(tmp_path.glob("*.glb")))
    assert glb.read_bytes()[:4] == b"glTF"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        assert len(json.loads(archive.read("views/cameras.json"))["frames"]) == 6
        saved = PIL.Image.open(io.BytesIO(archive.read("views/tile.png")))
    files = {"input.png", "view_5.png", "nerfstudio/transforms.json", "glb/mesh.glb"}
    assert {f"views/{name}" for name in files} <= names
    link = wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#mesh [data-testid=model3d-download-link]"))
    assert fetch(link.get_attribute("href"))[:4] == b"glTF"
    assert np.array_equal(np.asarray(saved), np.asarray(tile.convert("RGB")))
    for width in (1280, 390):  # nothing of the page lies beside the window, and the mesh is drawn
        browser.set_window_size(width, 4000)
        wait(browser, lambda: colours_of(browser.find_element(By.CSS_SELECTOR, "#mesh canvas").screenshot_as_png) > 50)
        edges = browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
        assert edges[0] == width and edges[1] <= width


def colours_of(png):
    return len(np.unique(np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3), axis=0))


def test_call_from_another_program(address, tmp_path, monkeypatch):
    """The snippet of the README, with the address of this page and few steps. Each argument explains itself."""
    snippet = re.search(r"```py\n(from gradio_client.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(ROOT)
    namespace = {}
    exec(re.sub(r'Client\(".*?"\)', f'Client("{address}")', snippet).replace("seed=", "steps=1, seed="), namespace)
    assert PIL.Image.open(namespace["tile"]).size == (256, 384) and len(namespace["views"]) == 6
    assert Path(namespace["mesh"]).read_bytes()[:4] == b"glTF"
    assert "views/cameras.json" in zipfile.ZipFile(namespace["archive"]).namelist()
    (endpoint,) = (
        gradio_client.Client(address, verbose=False).view_api(return_format="dict")["named_endpoints"].values()
    )
    names = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
    assert names == [
        "picture",
        "remove_background",
        "centre",
        "foreground_ratio",
        "steps",
        "guidance_scale",
        "seed",
        "upscale",
        "transparent",
        "faces",
        "fast",
        "back",
        "left",
        "right",
    ]
    with pytest.raises(gradio_client.exceptions.AppError, match="There is no picture yet"):
        gradio_client.Client(address, verbose=False).predict(None, api_name="/generate")


@pytest.mark.parametrize("part", (0, 0.5), ids=("nothing", "half"))
def test_a_damaged_file_is_refused_at_upload(browser, tmp_path, capsys, part):
    picture = (ROOT / "examples" / "images" / "cactus.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(picture[: int(part * len(picture))] or b"this is no picture")
    wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]")).send_keys(
        str(tmp_path / "broken.png")
    )
    wait(browser, lambda: "cannot be read as a picture" in browser.find_element(By.TAG_NAME, "body").text)
    wait(browser, lambda: not sources(browser, "#picture"))
    assert "Traceback" not in "".join(capsys.readouterr())


def test_what_the_model_sees_of_a_photograph(browser, tmp_path):
    photograph = PIL.Image.new("RGB", (80, 60), "white")
    photograph.paste((180, 20, 20), (10, 10, 30, 30))
    photograph.save(tmp_path / "photograph.png")
    upload(browser, tmp_path / "photograph.png")
    (seen,) = wait(browser, lambda: sources(browser, "#seen"))
    pixels = np.asarray(PIL.Image.open(io.BytesIO(fetch(seen))).convert("RGB")).astype(int)
    edge = len(pixels)
    assert np.abs(pixels[0] - 127).max() <= 2 and np.abs(pixels[edge // 2, edge // 2] - (180, 20, 20)).max() <= 4


def test_buttons_while_it_runs(browser):
    """Generate is off and Stop is on, a bar says how far it is, and there is nothing to download until the end."""
    upload(browser, ROOT / "examples" / "images" / "cactus.png")
    set_steps(browser, 100)
    generate, stop, archive = (browser.find_element(By.ID, name) for name in ("generate", "stop", "archive"))
    enabled = [button.is_enabled() for button in (generate, stop, archive)]
    assert enabled == [True, False, False]
    generate.click()
    wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#bar progress").get_attribute("value") > "1")
    box = browser.find_element(By.CSS_SELECTOR, "#seed input, #seed textarea")
    assert int(box.get_attribute("value")) > 0  # drawn at random, which is on
    assert "of 100 steps" in browser.find_element(By.ID, "bar").text
    assert [button.is_enabled() for button in (generate, stop, archive)] == [False, True, False]
    stop.click()
    wait(browser, lambda: [button.is_enabled() for button in (generate, stop, archive)] == [True, False, False])
    time.sleep(3)
    # Nothing of a run that was stopped, or of the one before, stays
    assert not sources(browser, "#tile") and not sources(browser, "#views")
    assert not browser.find_elements(By.CSS_SELECTOR, "#mesh canvas")
    set_steps(browser, 1)
    generate.click()
    wait(browser, lambda: [button.is_enabled() for button in (generate, stop, archive)] == [True, False, True])


def test_a_phone_reaches_the_results(browser):
    browser.set_window_size(390, 800)
    upload(browser, ROOT / "examples" / "images" / "cactus.png")
    set_steps(browser, 1)
    browser.execute_script(
        "document.getElementById('generate').scrollIntoView(); arguments[0].click()",
        browser.find_element(By.ID, "generate"),
    )
    inside = "const box = document.getElementById('tile').getBoundingClientRect(); return box.top < window.innerHeight"
    wait(browser, lambda: browser.execute_script(inside))


def test_stop_stays_in_sight_on_a_phone(browser):
    browser.set_window_size(390, 800)
    upload(browser, ROOT / "examples" / "images" / "cactus.png")
    set_steps(browser, 100)
    browser.execute_script("arguments[0].click()", browser.find_element(By.ID, "generate"))
    wait(browser, lambda: browser.find_element(By.ID, "stop").is_enabled())
    for part in ("picture", "tile", "mesh"):
        browser.execute_script(f"document.getElementById('{part}').scrollIntoView()")
        box = browser.execute_script("return document.getElementById('stop').getBoundingClientRect().toJSON()")
        assert 0 <= box["top"] and box["bottom"] <= browser.execute_script("return window.innerHeight")
    browser.find_element(By.ID, "stop").click()


def test_one_screen_has_all_that_is_needed(browser):
    """Picture, Generate and the examples, with the settings folded away."""
    browser.set_window_size(1280, 900)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#examples button.gallery-item"))
    for part in ("#picture", "#generate", "#examples", "#settings"):
        box = browser.find_element(By.CSS_SELECTOR, part).rect
        assert box["y"] + box["height"] < 800, part
    assert not browser.find_elements(By.CSS_SELECTOR, "#steps input")
    words = browser.find_element(By.TAG_NAME, "body").text
    assert "small checkpoint" in words and "128 pixels" in words and "licence" in words
    assert browser.find_elements(By.CSS_SELECTOR, "a[href='https://arxiv.org/abs/2310.15110']")


@pytest.mark.parametrize("width", (1280, 390))
def test_all_six_views_are_seen_without_a_scroll_bar(browser, width):
    browser.set_window_size(width, 1000)
    upload(browser, ROOT / "examples" / "images" / "cactus.png")
    set_steps(browser, 1)
    browser.execute_script("arguments[0].click()", browser.find_element(By.ID, "generate"))
    wait(browser, lambda: is_done(browser))
    inside = """
        const frame = document.getElementById('views').getBoundingClientRect();
        const boxes = [...document.querySelectorAll('#views img')].map(view => view.getBoundingClientRect());
        const parts = [...document.querySelectorAll('#views, #views *')];
        const scrolls = parts.some(part => part.scrollHeight > part.clientHeight + 1
            && ['auto', 'scroll'].includes(getComputedStyle(part).overflowY));
        return boxes.length >= 6 && !scrolls
            && boxes.every(box => box.height > 20 && box.bottom <= frame.bottom && box.top >= frame.top);"""
    wait(browser, lambda: browser.execute_script(inside))
    assert not browser.find_elements(By.CSS_SELECTOR, "[title=Share], [aria-label=Share]")


def test_views_without_their_background(browser):
    """A switch, before and after they are made."""
    upload(browser, ROOT / "examples" / "images" / "cactus.png")
    set_steps(browser, 1)
    browser.find_element(By.ID, "generate").click()
    wait(browser, lambda: is_done(browser))

    def mode():
        return PIL.Image.open(io.BytesIO(fetch(sources(browser, "#views")[-1]))).mode

    for expected in ("RGBA", "RGB"):
        browser.find_element(By.CSS_SELECTOR, "#clear input").click()
        wait(browser, lambda expected=expected: mode() == expected)


def test_the_student_is_a_choice(browser):
    upload(browser, ROOT / "examples" / "images" / "cactus.png")
    open_settings(browser)
    browser.find_element(By.CSS_SELECTOR, "#fast input").click()
    browser.find_element(By.ID, "generate").click()
    wait(browser, lambda: "of 2 steps" in browser.find_element(By.ID, "bar").text)
    wait(browser, lambda: is_done(browser))


def test_a_picture_of_the_back(browser):
    """With it the views of one seed are others."""
    upload(browser, ROOT / "examples" / "images" / "car.png")
    set_steps(browser, 1)
    browser.find_element(By.CSS_SELECTOR, "#dice input").click()
    tiles = []
    for more in (False, True):
        if more:
            browser.find_element(By.CSS_SELECTOR, "#more button").click()
            field = wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#back input[type=file]"))
            field.send_keys(str(ROOT / "evaluation" / "groups" / "toys-known" / "car-0" / "input_180.webp"))
            wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#back img"))
        browser.execute_script("arguments[0].click()", browser.find_element(By.ID, "generate"))
        wait(browser, lambda: is_done(browser) and sources(browser, "#tile") not in ([], *tiles))
        tiles.append(sources(browser, "#tile"))
    first, second = (np.asarray(PIL.Image.open(io.BytesIO(fetch(tile[0]))).convert("RGB")) for tile in tiles)
    assert np.abs(first.astype(int) - second).max() > 30 and not messages(browser)


def test_no_picture_is_a_message(browser):
    wait(browser, lambda: browser.find_element(By.ID, "generate")).click()
    (message,) = wait(browser, lambda: messages(browser))
    assert "There is no picture yet" in message


def test_messages_are_no_html():
    assert str(app.user_error("<urlopen error [Errno 111]>: look at it").message).startswith("&lt;urlopen error")


def test_an_empty_seed_is_a_message(browser):
    upload(browser, ROOT / "examples" / "images" / "cactus.png")
    open_settings(browser)
    browser.find_element(By.CSS_SELECTOR, "#dice input").click()
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
        app.Picture().preprocess(gr.data_classes.ImageData(path=str(tmp_path / "large.png")))


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


def test_the_folder_of_a_space(tmp_path):
    """What the README uploads to a Space starts, with the packages that its requirements.txt names, and answers."""
    make = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("git archive"))
    folder = tmp_path / "out" / "space"
    folder.mkdir(parents=True)
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
    subprocess.run(
        ["bash", "-c", make.replace("git ", f"git -C {shlex.quote(str(ROOT))} ", 1)], cwd=tmp_path, check=True
    )
    packages = {re.split(r"[\[=>]", line)[0] for line in (folder / "requirements.txt").read_text().splitlines()}
    assert {"torch", "diffusers", "gradio", "ncnn", "trimesh"} <= packages and not (folder / ".git").exists()
    command = [sys.executable, "app.py", "--device", "cpu", "--port", "7871"]
    with open(tmp_path / "log", "w") as log:
        page = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        while "Running on local URL" not in (tmp_path / "log").read_text():
            assert page.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        client = gradio_client.Client("http://127.0.0.1:7871", verbose=False)
        picture = gradio_client.handle_file(str(ROOT / "examples" / "images" / "car.png"))
        tile, *_ = client.predict(picture, steps=1, api_name="/generate")
        assert PIL.Image.open(tile).size == (256, 384)
    finally:
        page.terminate()
        page.wait()


def test_on_zerogpu_the_denoising_has_the_gpu(monkeypatch):
    """There `spaces.GPU` marks the one function; its place is taken by a mark of the test's."""
    marked = []
    monkeypatch.setattr(app, "spaces", SimpleNamespace(GPU=lambda function: marked.append(function) or function))
    app.build(Checkpoint(None, "cpu", None).load())
    assert [function.__name__ for function in marked] == ["denoise"]
    picture = PIL.Image.open(ROOT / "examples" / "images" / "car.png").convert("RGB")
    *shown, (kind, (tile, views)) = marked[0](picture, 2, 2.0, 0)
    assert [value[0] for _, value in shown] == [1, 2] and kind == "done" and len(views) == 6
    pickle.dumps((shown, tile, views))  # they come from another process
