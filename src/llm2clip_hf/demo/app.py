# SPDX-License-Identifier: Apache-2.0
"""The search app: a page in the browser around a `SearchIndex`, which talks to nobody but that browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.model_loading import load_model_and_processor
from .search import SearchIndex, demo_scenes, find_images, open_image, read_captions


TOP_K = 8
_TITLE = "LLM2CLIP search"
_THUMBNAIL = 320  # pixels; smaller images are enlarged by whole factors, so that their pixels stay sharp
# Fonts of the machine: those of a theme are fetched from elsewhere.
_FONTS, _MONOSPACED = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
_CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#search {align-self: end; min-height: 3.2em}
#images .grid-wrap {max-height: none; overflow: visible}
#images .thumbnail-lg {aspect-ratio: auto; height: auto}
#images .caption-label {position: static; display: block; max-width: none; text-align: center}
#captions * {font-family: system-ui, sans-serif}
"""


def load_index(
    model: str | None = None,
    images: str | None = None,
    captions: str | None = None,
    *,
    demo_dir: str = "demo_output",
    trust_remote_code: bool = False,
) -> SearchIndex:
    """Loads a model, and embeds a folder of images and a file of captions with it."""
    if model is not None and images is None:
        raise ValueError("`--model` needs `--images`. Give a folder of images to search among.")
    if model is None:
        model = str(Path(demo_dir) / "model")
        if not Path(model).is_dir():
            raise ValueError(f"There is no model `{model}`. Run `llm2clip demo` first, or name one with `--model`.")
    # What can be wrong with files is told before the model is loaded.
    pictures: list[Any] = []
    texts: list[str] = []
    if images is not None:
        pictures += find_images(images)
    else:
        pictures, texts = demo_scenes(demo_dir)
    if captions is not None:
        texts = read_captions(captions)
    loaded, processor = load_model_and_processor(model, trust_remote_code=trust_remote_code)
    return SearchIndex.build(loaded, processor, pictures, texts, show_progress=True)


def thumbnail(image: Any) -> Image.Image:
    """An image in the size of the page."""
    picture = open_image(image)
    factor = _THUMBNAIL // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    small = picture.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return small


def answer_text(index: SearchIndex, query: str) -> tuple[list[tuple[Image.Image, str]], str]:
    """What the page shows for a sentence."""
    try:
        found = [(index.images[match.row], match) for match in index.by_text(query, TOP_K)]
        shown = [(thumbnail(image), f"{match.score:.3f}{_name(image)}") for image, match in found]
    except ValueError as error:
        return [], str(error)
    return shown, f"The best {len(shown)} of {len(index.images)} images, with cosines."


def answer_image(index: SearchIndex, path: str | None) -> tuple[Image.Image | None, list[list[str]], str]:
    """What the page shows for an image."""
    if path is None:
        return None, [], ""
    try:
        picture = thumbnail(path)
        matches = index.by_image(path, TOP_K)
    except ValueError as error:
        return None, [], str(error)
    rows = [[f"{match.score:.3f}", index.captions[match.row]] for match in matches]
    return picture, rows, f"The best {len(rows)} of {len(index.captions)} captions, with cosines."


def build_app(index: SearchIndex) -> Any:
    """The page."""
    gr = import_gradio()
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True) as app:
        gr.Markdown(f"# {_TITLE}\n{len(index.images)} images, {len(index.captions)} captions")
        with gr.Tab("Find images"):
            with gr.Row():
                query = gr.Textbox(
                    label="Describe an image, in any language",
                    elem_id="query",
                    lines=1,
                    max_lines=2,
                    scale=5,
                    max_length=4000,
                )
                button = gr.Button("Search", variant="primary", elem_id="search", scale=1)
            text_status = gr.Markdown(elem_id="status")
            gallery = gr.Gallery(
                label="Images", show_label=False, columns=4, object_fit="contain", elem_id="images", interactive=False,
                allow_preview=False, buttons=[], height=None,
            )  # fmt: skip
        with gr.Tab("Find captions"), gr.Row():
            with gr.Column(scale=1):
                # Not `gr.Image`, which would decode what was sent before we can look at it.
                upload = gr.File(label="Drop an image here", type="filepath", elem_id="upload", height=150)
                preview = gr.Image(label="Your image", interactive=False, elem_id="preview", buttons=[])
            with gr.Column(scale=2):
                image_status = gr.Markdown(elem_id="image-status")
                table = gr.Dataframe(
                    headers=["cosine", "caption"], datatype="str", interactive=False, wrap=True, elem_id="captions",
                    column_widths=["15%", "85%"], buttons=[], show_label=False, max_height=1000,
                )  # fmt: skip

        def on_text(text: str) -> Any:
            return answer_text(index, text)

        def on_image(path: str | None) -> Any:
            return answer_image(index, path)

        gr.on(
            [query.submit, button.click], on_text, query, [gallery, text_status], api_name=False,
            show_progress="minimal",
        )  # fmt: skip
        upload.change(on_image, upload, [preview, table, image_status], api_name=False, show_progress="minimal")
    return app


def launch_app(index: SearchIndex, *, host: str = "127.0.0.1", port: int = 7860, block: bool = True) -> str:
    """Serves the page until the program is interrupted."""
    gr = import_gradio()
    theme = gr.themes.Soft(font=_FONTS, font_mono=_MONOSPACED, radius_size="sm")
    app = build_app(index)
    _, url, _ = app.launch(
        server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
        ssr_mode=False, footer_links=[], max_file_size="50mb", theme=theme, css=_CSS, show_error=False,
    )  # fmt: skip
    print(f"search    {url}  (end with Ctrl-C)", flush=True)
    if block:
        app.block_thread()
    return str(url)


def import_gradio() -> Any:
    """Gradio, told to stay at home."""
    # Read at import: no version check, no usage statistics.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError("The app needs `gradio`. Install it with `pip install llm2clip-hf[app]`.") from error
    return gradio


def _name(image: Any) -> str:
    return f"  {Path(image).name}" if isinstance(image, str | Path) else ""
