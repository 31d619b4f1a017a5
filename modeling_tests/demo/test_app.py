# SPDX-License-Identifier: Apache-2.0
"""The search app: results are the model's own cosines, bad input gets a sentence, and the page works in a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from evaluation_data import clip
from PIL import Image

from llm2clip_hf.cli.main import main
from llm2clip_hf.demo.app import answer_image, answer_text, import_gradio, load_index, thumbnail
from llm2clip_hf.demo.captions import make_data
from llm2clip_hf.demo.scenes import render
from llm2clip_hf.demo.search import SearchIndex, demo_scenes, find_images, read_captions


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "app.py"
CAPTIONS = ["a red boat on the sea", "two dogs run over the grass", "ein rotes Boot", "people in a street", "a photo"]
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'


def pictures(count: int = 7) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (33, 40, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def index() -> SearchIndex:
    return SearchIndex.build(tiny_models.model(), tiny_models.processor(), pictures(), CAPTIONS, batch_size=3)


def test_results_are_the_cosines_of_the_model(index: SearchIndex) -> None:
    with torch.no_grad():
        output = index.model(**index.processor(images=pictures(), text=CAPTIONS))
    cosines = (output.text_embeds @ output.image_embeds.T).double().numpy()
    for row, text in enumerate(CAPTIONS):
        found = index.by_text(f"  {text}\n", top_k=4)
        assert [match.row for match in found] == np.argsort(-cosines[row])[:4].tolist()
        assert [match.score for match in found] == pytest.approx(np.sort(cosines[row])[::-1][:4], abs=1e-5)
    for row, image in enumerate(pictures()):
        found = index.by_image(image, top_k=99)
        assert [match.row for match in found] == np.argsort(-cosines[:, row]).tolist()


def test_clip_of_transformers() -> None:
    model, processor = clip()
    index = SearchIndex.build(model, processor, pictures())
    with torch.no_grad():
        output = model(**processor(images=pictures(), text=CAPTIONS[:1], return_tensors="pt"))
    cosines = output.text_embeds[0] @ output.image_embeds.T
    found = index.by_text(CAPTIONS[0], top_k=7)
    assert [match.row for match in found] == cosines.argsort(descending=True).tolist()


def test_equal_captions_count_once() -> None:
    index = SearchIndex.build(tiny_models.model(), tiny_models.processor(), pictures(1), ["a", "b", "a"])
    assert index.captions == ["a", "b"]
    assert len(index.caption_embeds) == 2


def test_threads_share_an_index(index: SearchIndex) -> None:
    queries = [text * (1 + i) for i, text in enumerate(CAPTIONS)] * 4
    alone = [index.by_text(text) for text in queries]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(index.by_text, queries))
    assert together == alone


@pytest.mark.parametrize("query", ["", " \n\t", None])
def test_empty_query_is_told(index: SearchIndex, query: Any) -> None:
    assert answer_text(index, query) == ([], "The query is empty. Type a sentence that describes the image.")


@pytest.mark.parametrize("query", ["\ud800 half a character", "\x00", "日本語のクエリ", "dog " * 5000])
def test_odd_queries_find_something(index: SearchIndex, query: str) -> None:
    shown, status = answer_text(index, query)
    assert len(shown) == 7
    assert status == "The best 7 of 7 images, with cosines."


def truncated(path: Path) -> None:
    pictures(1)[0].save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("drawing.svg", lambda path: path.write_text(SVG), "no image that can be read. Use PNG, JPEG"),
        ("page.png", lambda path: path.write_text("<html><body>no</body></html>"), "no image that can be read"),
        ("empty.png", lambda path: path.touch(), "no image that can be read"),
        ("cut.png", truncated, "cannot be read: .*truncated"),
        ("print.eps", lambda path: pictures(1)[0].save(path, format="EPS"), "no image that can be read"),
        ("gone.png", lambda path: None, "There is no file `gone.png`"),
        # Above Pillow's limit, at which it warns, and above twice the limit, at which it raises.
        ("large.png", lambda path: Image.new("1", (45, 30)).save(path), "cannot be read: it has 45 x 30 pixels"),
        ("bomb.png", lambda path: Image.new("1", (90, 90)).save(path), "cannot be opened: .*8100 pixels"),
    ],
)
def test_bad_files_are_told(
    index: SearchIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], Any],
    message: str,
) -> None:
    write(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 33 * 40)
    image, rows, status = answer_image(index, str(tmp_path / name))
    assert image is None
    assert rows == []
    assert re.search(message, status), status
    assert str(tmp_path) not in status


def test_answers_of_the_page(index: SearchIndex, tmp_path: Path) -> None:
    pictures()[2].save(tmp_path / "a.png")
    image, rows, status = answer_image(index, str(tmp_path / "a.png"))
    expected = index.by_image(pictures()[2])
    assert image is not None
    assert rows == [[f"{match.score:.3f}", CAPTIONS[match.row]] for match in expected]
    assert status == "The best 5 of 5 captions, with cosines."
    assert answer_image(index, None) == (None, [], "")
    # Small images grow by a whole factor, each pixel into a block of equal ones.
    pixels = np.asarray(thumbnail(pictures()[0]))
    assert (pixels[::8, ::8] == np.asarray(pictures()[0])).all()
    assert pixels.shape == (33 * 8, 40 * 8, 3)
    assert thumbnail(Image.new("RGB", (640, 64))).size == (320, 32)


def test_index_without_captions_says_so() -> None:
    index = SearchIndex.build(tiny_models.model(), tiny_models.processor(), pictures(1))
    with pytest.raises(ValueError, match="no captions to search among. Give a file"):
        index.by_image(pictures(1)[0])


def test_unreadable_files_of_a_folder_are_left_out(
    index: SearchIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for row, image in enumerate(pictures()):
        image.save(tmp_path / f"{row}.PNG", format="PNG")
    (tmp_path / "3.PNG").write_text(SVG)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    paths = find_images(tmp_path)
    assert [path.name for path in paths] == [f"{row}.PNG" for row in range(7)]
    with caplog.at_level("WARNING"):
        built = SearchIndex.build(index.model, index.processor, paths)
    assert "3.PNG`: This file is no image" in caplog.text
    assert built.images == [path for path in paths if path.name != "3.PNG"]
    torch.testing.assert_close(built.image_embeds, index.image_embeds[[0, 1, 2, 4, 5, 6]], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="None of the 1 images can be read. The first: .*3.PNG"):
        SearchIndex.build(index.model, index.processor, [paths[3]])
    with pytest.raises(ValueError, match="no images to search among"):
        SearchIndex.build(index.model, index.processor, [])


def test_bad_folders_and_caption_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no image. Put PNG"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="`.*gone` does not exist. Give a folder"):
        find_images(tmp_path / "gone")
    (tmp_path / "captions.txt").write_text("\n a boat \n\n zwei H\u00fcnde\n", encoding="utf-8")
    assert read_captions(tmp_path / "captions.txt") == ["a boat", "zwei H\u00fcnde"]
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no caption. Write one per line"):
        read_captions(tmp_path / "blank.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cannot be read.*text file in UTF-8"):
        read_captions(tmp_path / "binary.txt")


def test_scenes_of_a_demo_are_those_it_held_out(tmp_path: Path) -> None:
    metrics = {"seed": 3, "split": "validation", "settings": {"num_held_out": 9}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    images, captions = demo_scenes(tmp_path)
    data = make_data(num_text=5, num_pairs=5, num_held_out=9, num_single=5, split="validation", seed=3)
    assert [image.tobytes() for image in images] == [render(scene).tobytes() for scene in data.held_out]
    assert len(set(captions)) == 27


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="Run `llm2clip demo` first, or name one with `--model`"):
        load_index(demo_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`--model` needs `--images`"):
        load_index("somewhere")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--app", "--output-dir", str(tmp_path)]) == 1
    assert "Install it with `pip install llm2clip-hf[app]`" in capsys.readouterr().err


# In a browser.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium with an empty profile, which logs its requests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven with selenium")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync", "window-size=1200,1000",
        f"user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def page(index: SearchIndex, tmp_path: Path) -> Iterator[str]:
    """The example, as a user starts it; gives its address."""
    pytest.importorskip("gradio", reason="the app needs gradio")
    index.model.save_pretrained(tmp_path / "model")
    index.processor.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for row, image in enumerate(pictures()):
        image.save(tmp_path / "photos" / f"{row}.png")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    port = free_port()
    command = [sys.executable, str(EXAMPLE), "--model", "model", "--images", "photos", "--captions", "captions.txt"]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--port", str(port)], cwd=tmp_path, stdout=file, stderr=file, env={**os.environ}
        )
    try:
        end = time.monotonic() + 120
        while f"http://127.0.0.1:{port}/" not in log.read_text():
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/"
        assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_page_in_a_browser(index: SearchIndex, page: str, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(condition: Callable[[], Any]) -> Any:
        return WebDriverWait(browser, 30).until(lambda _: condition())

    def shows(selector: str, text: str) -> None:
        wait(lambda: any(text in element.text for element in find(selector)))

    browser.get(page)
    box = wait(lambda: find("#query textarea, #query input"))[0]
    box.send_keys(Keys.ENTER)
    shows("#status", "The query is empty.")
    box.send_keys(CAPTIONS[2] + Keys.ENTER)
    shows("#status", "The best 7 of 7 images")
    labels = [f"{match.score:.3f} {match.row}.png" for match in index.by_text(CAPTIONS[2])]
    wait(lambda: [" ".join(element.text.split()) for element in find("#images .caption-label")] == labels)
    assert len(find("#images img")) == 7

    next(tab for tab in find("button[role=tab]") if tab.text == "Find captions").click()
    wait(lambda: find("#upload input[type=file]"))[0].send_keys(str(tmp_path / "photos" / "4.png"))
    shows("#image-status", "The best 5 of 5 captions")
    cells = [text for match in index.by_image(pictures()[4]) for text in (f"{match.score:.3f}", CAPTIONS[match.row])]
    wait(lambda: [cell.text.strip() for cell in find("#captions [role=gridcell]")] == cells)

    (tmp_path / "drawing.svg").write_text(SVG)
    find("#upload button[aria-label=Clear]")[0].click()
    wait(lambda: find("#upload input[type=file]"))[0].send_keys(str(tmp_path / "drawing.svg"))
    shows("#image-status", "This file is no image that can be read. Use PNG")

    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {a for a in addresses if a.startswith("http") and not a.startswith(page)} == set()


def test_gradio_is_told_not_to_report() -> None:
    pytest.importorskip("gradio", reason="the app needs gradio")
    assert import_gradio().__name__ == "gradio"
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
