# SPDX-License-Identifier: Apache-2.0
"""
Addresses, damaged files and oversized images at every place where an image enters.

What is passed to the model's interface by address is fetched, within a time limit. What merely stands in a data set is
not: there, an address is refused, and nothing is asked of its server.
"""

import io
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from llm2clip_hf.data import CenterCropTransform, ImageTextStream, load_image_text
from llm2clip_hf.data.image_sources import open_image_table
from llm2clip_hf.data.images import decode_image, load_image
from llm2clip_hf.demo.search import open_image
from llm2clip_hf.evaluation import encode_images
from llm2clip_hf.modeling import processing_llm2clip


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 41, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def white_png(size: int) -> bytes:
    """A square of one bit per pixel, a few kilobytes however large it is."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(1)
    row = b"\0" + b"\xff" * ((size + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(size)) + packer.flush()
    header = struct.pack(">IIBBBBB", size, size, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GOOD = encoded(picture(), "PNG")
READABLE = {
    "good.png": GOOD,
    "print.jpg": encoded(picture().convert("CMYK"), "JPEG"),
    "moving.gif": encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(90)]),
}
DAMAGED = {
    "page.png": b"<html><body>There is no such image.</body></html>",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "empty.png": b"",
    "cut.png": GOOD[: len(GOOD) // 2],
    "bomb.png": white_png(20_000),  # an error of Pillow
    "large.png": white_png(10_000),  # a mere warning of Pillow
}
# Not files: what a server may do.
FAILING = ["missing.png", "circle.png", "silent.png"]


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        name = self.path.removeprefix("/")
        content = (READABLE | DAMAGED).get(name, b"<html>not found</html>")
        if name == "silent.png":
            self.server.closing.wait(20)
            return
        if name in ("moved.png", "circle.png"):
            self.send_response(302)
            self.send_header("Location", "/good.png" if name == "moved.png" else "/circle.png")
            content = b""
        else:
            self.send_response(404 if name == "missing.png" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.requests, running.closing = [], threading.Event()  # type: ignore[attr-defined]
        running.base = f"http://127.0.0.1:{running.server_port}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.closing.set()  # type: ignore[attr-defined]
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _fresh(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.requests.clear()
    monkeypatch.setattr(processing_llm2clip, "FETCH_TIMEOUT", 0.5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# ---------------------------------------------------------------------------- what is passed to the model's interface


@pytest.mark.parametrize("name", [*READABLE, "moved.png"])
def test_processor_fetches_what_it_is_given(server: Any, name: str) -> None:
    processor = tiny_models.processor()
    wanted = processor(images=decode_image(READABLE.get(name, GOOD)))["pixel_values"]
    for images in (f"{server.base}/{name}", [f"{server.base}/{name}"]):
        assert torch.equal(processor(images=images)["pixel_values"], wanted)
    assert f"/{name}" in server.requests


@pytest.mark.parametrize("name", [*DAMAGED, *FAILING])
def test_processor_names_the_image_and_its_address(server: Any, name: str) -> None:
    address = f"{server.base}/{name}"
    with pytest.raises(ValueError) as error:
        tiny_models.processor()(images=[picture(), address])
    text = str(error.value)
    assert text.startswith(f"Image 1 of `images` (`{address}`) cannot be read: ")
    assert text.endswith("Check the path or address, or pass an image of PIL.") and "object at 0x" not in text
    assert f"/{name}" in server.requests


@pytest.mark.parametrize("name", list(DAMAGED))
def test_processor_names_a_damaged_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=r"^The image \(`.*" + name + r"`\) cannot be read: "):
        tiny_models.processor()(images=str(path))


@pytest.mark.parametrize("image", ["nowhere.png", "ftp://127.0.0.1/a.png", "file:///etc/hostname", "x" * 5000])
def test_processor_refuses_other_strings(image: str, server: Any) -> None:
    with pytest.raises(ValueError, match="^The image .* cannot be read: there is no image of a kind") as error:
        tiny_models.processor()(images=image)
    assert len(str(error.value)) < 500 and server.requests == []


def test_connection_that_is_refused(server: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    with pytest.raises(ValueError, match=f"`http://127.0.0.1:{port}/a.png`.*cannot be read: .*[Cc]onnect"):
        tiny_models.processor()(images=[f"http://127.0.0.1:{port}/a.png"])


def test_sentence_transformers_fetches_images_and_no_texts(server: Any, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tiny_models.model().save_pretrained(tmp_path)
    tiny_models.processor().save_pretrained(tmp_path)
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    address = f"{server.base}/good.png"
    encoder.encode([address, {"text": address}])
    assert server.requests == []
    given = encoder.encode(["a dog", {"image": address}])
    np.testing.assert_allclose(given, encoder.encode(["a dog", picture()]), atol=1e-6)
    assert server.requests == ["/good.png"]
    for name in ("missing.png", "large.png"):
        with pytest.raises(ValueError, match=rf"An image of `encode` \(`{server.base}/{name}`\) cannot be read"):
            encoder.encode(["a dog", picture(), {"image": f"{server.base}/{name}"}])


# ----------------------------------------------------------------------------------------- what stands in a data set


def addresses(server: Any) -> list[str]:
    return [f"{server.base}/{name}" for name in (*READABLE, *DAMAGED, *FAILING)]


def image_column(server: Any) -> Dataset:
    names = addresses(server)
    rows = {"image": names, "caption": [f"caption {row}" for row in range(len(names))]}
    return Dataset.from_dict(rows).cast_column("image", ImageFeature())


def test_address_in_a_sequence_of_images_is_refused(server: Any) -> None:
    address = f"{server.base}/good.png"
    column = image_column(server).select([0])["image"]
    for images in ([address], [{"bytes": None, "path": address}], column):
        for read in (
            lambda: load_image(images, 0),  # noqa: B023
            lambda: encode_images(tiny_models.model(), images, processor=tiny_models.processor()),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=rf"Image 0 \(`{address}`\) cannot be read: it is an address"):
                read()
    assert server.requests == []


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "Dataset", "image column", "parquet with images"])
def test_address_in_a_table_is_refused_when_it_is_loaded(kind: str, server: Any, tmp_path: Path) -> None:
    names = addresses(server)
    captions = [f"caption {row}" for row in range(len(names))]
    plain = Dataset.from_dict({"url": names, "caption": captions})
    source: Any = plain
    column = "url"
    if kind == "jsonl":
        source = tmp_path / "a.jsonl"
        rows = zip(names, captions)
        source.write_text("".join(json.dumps({"url": name, "caption": text}) + "\n" for name, text in rows))
    elif kind in ("csv", "parquet"):
        source = tmp_path / f"a.{kind}"
        getattr(plain, f"to_{kind}")(source)
    elif kind != "Dataset":
        source, column = image_column(server), "image"
        if kind == "parquet with images":
            pq.write_table(source.data.table, tmp_path / "a.parquet")
            source = tmp_path / "a.parquet"
    with pytest.raises(ValueError, match=f"`{names[0]}` is an address, and nothing is fetched"):
        load_image_text(source, image_column=column)
    with pytest.raises(ValueError, match=f"(?s)No row is left of {len(names)} rows.*is an address"):
        load_image_text(source, image_column=column, on_bad_row="skip")
    if column == "url" and kind != "Dataset":
        with pytest.raises(ValueError, match=f"Row 0 names the image `{names[0]}`, which is an address"):
            open_image_table(source, image_column="url")
    assert server.requests == []


def test_row_with_an_address_is_left_out_on_request(server: Any, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(GOOD)
    rows = [("good.png", "here"), (f"{server.base}/good.png", "elsewhere")]
    text = "".join(json.dumps({"file_name": name, "caption": caption}) + "\n" for name, caption in rows)
    (tmp_path / "metadata.jsonl").write_text(text)
    table = load_image_text(tmp_path, on_bad_row="skip")
    assert (table.keys, table.captions[0], table.report.num_bad) == (["good.png"], ["here"], 1)
    assert server.requests == []


def test_address_in_a_shard_is_refused(server: Any, tmp_path: Path) -> None:
    pq.write_table(image_column(server).select([0]).data.table, tmp_path / "a.parquet")
    # `select` leaves an indices mapping; the file has all rows, so the first sample is one of them.
    stream = ImageTextStream(
        [str(tmp_path / "a.parquet")], {"real": "caption"}, transform=CenterCropTransform(8), shuffle_buffer=0
    )
    with pytest.raises(ValueError, match="The image of sample .* cannot be read: it is an address"):
        next(iter(stream))
    assert server.requests == []


# ------------------------------------------------------------------------------------------------ files, everywhere


@pytest.mark.parametrize("name", list(READABLE))
def test_readers_agree_on_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(READABLE[name])
    wanted = np.asarray(Image.open(path).convert("RGB"))
    for image in (load_image([path], 0), load_image([{"bytes": READABLE[name]}], 0), open_image(path)):
        assert np.array_equal(np.asarray(image), wanted)


@pytest.mark.parametrize("name", list(DAMAGED))
def test_readers_refuse_damaged_and_oversized_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=rf"Image 1 \(`.*{name}`\) cannot be read: (?!.*object at 0x)"):
        load_image(["unused", path], 1)
    with pytest.raises(ValueError, match="(no image that can be read|cannot be (read|opened)).*(?<!object)"):
        open_image(path)
