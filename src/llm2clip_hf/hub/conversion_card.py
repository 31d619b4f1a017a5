# SPDX-License-Identifier: Apache-2.0
"""Cards, rendered from facts: of a folder that a conversion wrote, and of the released checkpoints it starts from."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..modeling import LLM2CLIPConfig
from .checkpoint_files import RELEASED, ReleasedCheckpoint


PAPER = "arXiv 2411.04997"
# In every card of a converted folder, by which a folder is known as one that may be replaced.
MARKER = "<!-- Written by `llm2clip convert`; converting again replaces this folder. -->"
_CITATION = f"""## Citation

Huang et al., *LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation* ({PAPER}).
"""
_USE_BOTH = """import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

path = "path/to/this/folder"
model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)

batch = processor(images=[Image.open("image.png")], text=["a red boat", "two dogs run over the grass"])
with torch.inference_mode():
    output = model(**batch)
print(output.image_embeds @ output.text_embeds.T)  # cosines: both are L2-normalised"""
_USE_EMBEDS = """import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

path = "path/to/this/folder"
model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)  # images only: there is no LLM here

batch = processor(images=[Image.open("image.png")])
llm_embeds = torch.load("embeddings.pt", weights_only=True)  # (texts, {width}), un-normalised means
with torch.inference_mode():
    output = model(**batch, llm_embeds=llm_embeds)
print(output.image_embeds @ output.text_embeds.T)  # cosines: both are L2-normalised"""
_USE_LLM = """from llm2clip_hf.training import build_caption_encoder

encoder = build_caption_encoder("path/to/this/folder", lora=None)
print(encoder.encode(["a red boat", "two dogs run over the grass"]).shape)"""


@dataclass(frozen=True)
class ConversionFacts:
    """What the card of a converted folder says."""

    source: str
    kind: str
    text_model: str | None
    text_weights: str
    new_keys: int
    config: LLM2CLIPConfig | None
    release: ReleasedCheckpoint | None
    template: str = ""


def _shown(name: str) -> str:
    """A repository as it is, of a path its last part only: where it lies on one machine concerns nobody else."""
    return Path(name).name if os.path.isabs(name) or Path(name).exists() or name.count("/") > 1 else name


def _front_matter(**fields: Any) -> str:
    data = ModelCardData(library_name="transformers", **{name: value for name, value in fields.items() if value})
    return f"---\n{data.to_yaml()}\n---\n"


def _numbers(release: ReleasedCheckpoint) -> str:
    """The section with published numbers."""
    lines = ["## Published numbers", ""]
    if not release.is_llm:
        lines += ["R@1 in percent, image to text / text to image. None of them was measured with this package.", ""]
    for numbers in release.numbers:
        names = list(numbers["values"])
        lines += [f"{numbers['source']}:", ""]
        lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        lines += [f"| {' | '.join(numbers['values'].values())} |", ""]
    return "\n".join([*lines, *release.notes, ""])


def _model_facts(config: LLM2CLIPConfig) -> list[str]:
    vision = config.vision_config
    return [
        f"- vision tower: `{vision.model_type}`, {vision.num_hidden_layers} layers of width {vision.hidden_size}, "
        f"{vision.image_size} pixels in patches of {vision.patch_size}",
        f"- text adaptor: {config.adapter_num_layers} blocks, {config.llm_hidden_size} -> {config.projection_dim}, "
        f"LLM embeddings {'are' if config.normalize_llm_embeds else 'are not'} L2-normalised before it",
        f"- weights: float32 safetensors{', sigmoid head' if config.logit_bias_init_value is not None else ''}",
    ]


def render_conversion_card(facts: ConversionFacts) -> str:
    """The `README.md` of a converted folder."""
    config, release = facts.config, facts.release
    source = _shown(facts.source)
    llm = None if facts.text_model is None else _shown(facts.text_model)
    title = release.name if release else Path(source).stem
    command = f"llm2clip convert {source} OUTPUT_DIR"
    if config is not None:
        command += f" --text-model {llm or 'none'}" + (
            " --text-weights bundled" if facts.text_weights == "bundled" else ""
        )
    bases = [release.repo_id if release else "", llm if llm and "/" in llm else ""]
    pipeline = "zero-shot-image-classification" if llm else "image-feature-extraction"
    parts = [
        _front_matter(
            license=release.license if release else None,
            base_model=[name for name in bases if name] or None,
            pipeline_tag="feature-extraction" if config is None else pipeline,
            tags=["llm2clip"],
        ),
        MARKER,
        f"\n# {title}, converted\n",
        f"Converted from `{source}`, which was found to be: {facts.kind}.\n",
        *(_model_facts(config) if config is not None else _language_facts(facts.template)),
        _language_model_line(facts, llm),
    ]
    if facts.new_keys and config is not None:
        parts.append(
            f"- **untrained**: {facts.new_keys} weights of projection, adaptor or logit scale are new, so this model "
            "is a start for training and its similarities mean nothing yet"
        )
    use = (
        _USE_LLM
        if config is None
        else _USE_BOTH
        if llm
        else _USE_EMBEDS.replace("{width}", str(config.llm_hidden_size))
    )
    licence = release.license_note if release else "That of the source, which its files do not tell."
    parts += [
        f"\n## Use\n\n```python\n{use}\n```\n",
        f"## How it was made\n\n```bash\n{command}\n```\n",
        "Every key of the source was accounted for, and the folder was loaded again and compared.\n",
        f"## Licence\n\n{licence}\n",
        *([_numbers(release)] if release else []),
        _CITATION,
    ]
    return "\n".join(parts)


def _language_facts(template: str) -> list[str]:
    return [
        "- attention: bidirectional (`is_causal=False` in the config), in any attention implementation",
        f"- tokenizer: every text becomes `{json.dumps(template)[1:-1]}` by itself, up to 512 tokens",
        "- embedding: mean of the last hidden states over all tokens after the header, un-normalised",
    ]


def _language_model_line(facts: ConversionFacts, llm: str | None) -> str:
    if facts.config is None:
        return f"- tuned from: `{facts.release.llm}`" if facts.release else "- tuned from: not stated by its files"
    if llm is None:
        expected = f" It was trained with `{facts.release.llm}`." if facts.release else ""
        return f"- LLM: none; texts enter as stored embeddings.{expected}"
    where = "its weights are in this folder" if facts.text_weights == "bundled" else "fetched when the model is loaded"
    return f"- LLM: `{llm}`, {where}"


def render_released_card(release: ReleasedCheckpoint) -> str:
    """The card of a released checkpoint, as `model_cards/` holds it."""
    llm = "" if release.is_llm else f" --text-model {release.llm}"
    lines = [
        f"- contents: {release.contents}",
        f"- {'tuned from' if release.is_llm else 'LLM'}: `{release.llm}`, width {release.llm_hidden_size}",
    ]
    if not release.is_llm:
        lines.append(
            f"- joint space: {release.projection_dim} dimensions; {release.parameters:.2f} M parameters without LLM"
        )
    intended = (
        "Embedding captions, for CLIP training and for retrieval among captions. It is no chat model any more."
        if release.is_llm
        else "Retrieval between images and texts, short and long, in the languages that the LLM knows; zero-shot "
        "classification; image features. Research use: it is not tested for use in the world."
    )
    parts = [
        _front_matter(
            license=release.license,
            base_model=[release.repo_id] if release.is_llm else [release.repo_id, release.llm],
            pipeline_tag="feature-extraction" if release.is_llm else "zero-shot-image-classification",
            tags=["llm2clip"],
        ),
        f"# {release.name}\n",
        f"Released by the authors of LLM2CLIP ({PAPER}) as [{release.repo_id}](https://huggingface.co/{release.repo_id}).\n",
        *lines,
        "\n## Convert and use\n",
        f"```bash\nllm2clip convert {release.repo_id} converted{llm}\n```\n",
        f"```python\n{(_USE_LLM if release.is_llm else _USE_BOTH).replace('path/to/this/folder', 'converted')}\n```\n",
        f"## Intended use and limits\n\n{intended} It has the biases of web captions.\n",
        "The converter is tested on vectors of the original implementation; the released files have not been tried.\n",
        f"## Licence\n\n{release.license_note}\n",
        _numbers(release),
        _CITATION,
    ]
    return "\n".join(parts)


def render_released_index() -> str:
    """The `README.md` of `model_cards/`: one line for each released checkpoint."""
    lines = [
        "# Model cards",
        "",
        "Checkpoints of the authors of LLM2CLIP that `llm2clip convert` takes, rendered from "
        '`llm2clip_hf.hub.released`; `write_released_cards("model_cards")` of `llm2clip_hf.hub.conversion_card` '
        "renders them again.",
        "",
        "| checkpoint | LLM | parameters without LLM | licence |",
        "|---|---|---|---|",
    ]
    for release in RELEASED:
        size = "-" if release.is_llm else f"{release.parameters:.2f} M"
        llm = release.llm.split("/")[1]
        lines.append(f"| [{release.name}]({release.name}/README.md) | {llm} | {size} | {release.license} |")
    return "\n".join([*lines, ""])


def write_released_cards(folder: str | Path) -> list[Path]:
    """Writes the cards of all released checkpoints and their index."""
    texts = {Path(folder) / "README.md": render_released_index()}
    texts |= {Path(folder) / release.name / "README.md": render_released_card(release) for release in RELEASED}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


__all__ = [
    "MARKER",
    "ConversionFacts",
    "render_conversion_card",
    "render_released_card",
    "render_released_index",
    "write_released_cards",
]
