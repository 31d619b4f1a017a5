# SPDX-License-Identifier: Apache-2.0
"""The model card: what a config alone can say, and how a new card meets one that is there already."""

import hashlib
import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..modeling.configuration_llm2clip import is_repository
from ..modeling.loading_llm2clip import read_card


PAPER = "https://arxiv.org/abs/2411.04997"
# Carries a digest of all other lines, by which a card that nobody edited is known.
_MARKER = re.compile(r"^<!-- llm2clip_hf card ([0-9a-f]{16}): .*-->\n\n", re.MULTILINE)
_MARKER_TEXT = "<!-- llm2clip_hf card {digest}: rendered again on every push until somebody edits this file -->\n\n"
_META_LLAMA = re.compile(r"meta-llama/.*llama-?(3\.[123]|[23])(?![\d.a-z])", re.IGNORECASE)

_LOAD = """\
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("NAME", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("NAME", trust_remote_code=True)
"""
_USE_TEXTS = f"""\
```python
{_LOAD}
batch = processor(images=[Image.open("image.png")], text=["a red boat", "two dogs run over the grass"])
with torch.inference_mode():
    output = model(**batch)
print(output.image_embeds @ output.text_embeds.T)  # cosines: both are L2-normalised
```

Zero-shot classification:

```python
from transformers import pipeline

classifier = pipeline("zero-shot-image-classification", model="NAME", trust_remote_code=True)
print(classifier("image.png", candidate_labels=["boat", "dog"], hypothesis_template="a photo of a {{}}"))
```""".replace("{{}}", "{}")
_USE_EMBEDS = f"""\
```python
{_LOAD}
batch = processor(images=[Image.open("image.png")])
llm_embeds = torch.load("embeddings.pt", weights_only=True)  # (texts, WIDTH), un-normalised means
with torch.inference_mode():
    output = model(**batch, llm_embeds=llm_embeds)
print(output.image_embeds @ output.text_embeds.T)  # cosines: both are L2-normalised
```"""
_TRUST = (
    "`trust_remote_code=True` runs the Python files of this repository; `revision=` with a commit hash fixes them. "
    "Torch, transformers and pillow are enough; with `llm2clip_hf` imported, its own classes are used and no trust is "
    "needed."
)
_LIMITS = (
    "The model has the biases of the images and captions that it and its parts were trained on, and was not tested "
    "for use in the world. Cosines rank candidates; their size is no probability. Texts longer than the tokenizer's "
    "maximum are cut."
)
_CITATION = """\
```bibtex
@article{huang2024llm2clip,
  title={LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation},
  author={Huang, Weiquan and others},
  journal={arXiv preprint arXiv:2411.04997},
  year={2024}
}
```"""


def bundled_license(config: Any) -> str | None:
    """The licence that a bundled LLM of Meta brings with it, e.g. `"llama3.2"`; `None` where nothing is certain."""
    if config.text_weights != "bundled":
        return None
    match = _META_LLAMA.match(config.text_base_model or "")
    return f"llama{match[1]}" if match else None


def card_metadata(config: Any, license: str | None = None) -> dict[str, Any]:
    """The fields of a card's front matter that a config tells."""
    with_texts = config.text_weights != "none"
    return {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification" if with_texts else "image-feature-extraction",
        "tags": ["llm2clip"],
        "base_model": [config.text_base_model] if is_repository(config.text_base_model) else None,
        "license": license or bundled_license(config),
    }


def card_sections(config: Any, name: str, license: str | None = None) -> dict[str, str]:
    """The sections of a card that a config tells."""
    license = license or bundled_license(config)
    use = _USE_EMBEDS if config.text_weights == "none" else _USE_TEXTS
    introduction = (
        "A CLIP-like model whose texts are read by a large language model: images and captions, short or long, become "
        f"vectors of one space ([LLM2CLIP]({PAPER}))."
    )
    return {
        "": introduction,
        "Use": use.replace("NAME", name).replace("WIDTH", str(config.llm_hidden_size)) + f"\n\n{_TRUST}",
        "Model": "\n".join(_facts(config)),
        "Limits": _LIMITS,
        "Licence": _licence(config, license),
        "Citation": _CITATION,
    }


def _facts(config: Any) -> list[str]:
    vision = config.vision_config
    size = getattr(vision, "image_size", None)
    layers = getattr(vision, "num_hidden_layers", None)
    details = [
        *([f"{layers} layers"] if layers else []),
        f"width {config.vision_hidden_size}",
        *([f"{size} pixels"] if size else []),
    ]
    head = "sigmoid" if config.logit_bias_init_value is not None else "softmax"
    return [
        f"- vision tower: `{vision.model_type}`, {', '.join(details)}",
        f"- language model: {_language_model(config)}",
        f"- pooling: `{config.text_pooling}`, the first {config.text_prefix_length or 0} tokens left out",
        f"- text adaptor: {config.adapter_num_layers} blocks, {config.llm_hidden_size} -> {config.projection_dim}, "
        f"LLM embeddings {'are' if config.normalize_llm_embeds else 'are not'} L2-normalised before it",
        f"- joint space: {config.projection_dim} dimensions, {head} head",
    ]


def _language_model(config: Any) -> str:
    base = config.text_base_model
    shown = f"[{base}](https://huggingface.co/{base})" if is_repository(base) else ""
    if config.text_weights == "none":
        return f"none; texts enter as stored embeddings{f' of {shown}' if shown else ''}"
    family = f"`{config.text_config.model_type}` of width {config.llm_hidden_size}" if config.text_config else "named"
    if config.text_weights == "bundled":
        return f"{family}, in this repository{f', from {shown}' if shown else ''}"
    revision = f" at revision `{config.text_base_revision}`" if config.text_base_revision else ""
    return f"{family}, fetched from {shown or 'a folder'}{revision} when the model is loaded"


def _licence(config: Any, license: str | None) -> str:
    stated = f"Licence of the weights: `{license}`." if license else "No licence of the weights is stated."
    if config.text_weights == "none":
        return stated
    shown = f"`{config.text_base_model}`" if is_repository(config.text_base_model) else "the language model"
    where = "are in this repository" if config.text_weights == "bundled" else "are fetched from its own repository"
    return f"{stated} The weights of {shown} {where}, and its licence applies to them."


def render_card(title: str, metadata: dict[str, Any], sections: dict[str, str]) -> str:
    """A card as text: front matter, a marker by which an unedited card is known, title and sections."""
    front = f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n"
    parts = [f"# {title}"]
    for heading, text in sections.items():
        parts += [*([f"## {heading}"] if heading else []), text]
    body = "\n\n".join(parts) + "\n"
    return front + _MARKER_TEXT.format(digest=_digest(front + body)) + body


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_unedited(text: str) -> bool:
    """Whether a card was rendered by this package and is as it was rendered."""
    match = _MARKER.search(text)
    return match is not None and _digest(_MARKER.sub("", text, count=1)) == match[1]


def merged_card(existing: str, rendered: str, where: str) -> str:
    """
    The card of a repository that has one already.

    A card that nobody edited is rendered anew, with the licence it states. The text of any other card is kept word for
    word; of its metadata, missing fields are filled in. A file with metadata only, as the Hub makes it for a new
    repository, gets the new text and keeps its fields.
    """
    old, new = read_card(existing, where), ModelCard(rendered)
    fields, filled = old.data.to_dict(), new.data.to_dict()
    if is_unedited(existing):
        fields = {key: fields[key] for key in ("license", "license_name", "license_link") if key in fields}
        fields = {} if "license" in filled else fields
    elif old.text.strip():
        for key, value in filled.items():
            if key == "tags":
                value = [*fields.get(key, []), *(tag for tag in value if tag not in fields.get(key, []))]
            elif key in fields:
                continue
            old.data[key] = value
        return str(old)
    if not fields:
        return rendered
    for key, value in fields.items():
        new.data[key] = value
    body = _MARKER.sub("", new.text.lstrip("\n"), count=1)
    front = f"---\n{new.data.to_yaml()}\n---\n\n"
    return front + _MARKER_TEXT.format(digest=_digest(front + body)) + body
