# SPDX-License-Identifier: Apache-2.0
"""The model card of a caption encoder: what it is, how to use it, what it was made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


_POOLINGS = {
    "mean": "the mean of the last hidden states of the text's own tokens, the template's header left out",
    "eos": "the last hidden state of the end token that the tokenizer puts after every text",
    "last": "the last hidden state of the text's last token",
}
_MERGED_USE = """\
With sentence-transformers (the folder carries the code of its pooling):

```python
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("{name}", trust_remote_code=True)
embeddings = encoder.encode(["a red boat on the sea", "ein rotes Boot auf dem Meer"])
```

With transformers alone, the bidirectional LLM and the tokenizer with the template built in:

```python
from transformers import AutoModel, AutoTokenizer

llm = AutoModel.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

As the text side of an LLM2CLIP model (`pip install llm2clip-hf`), to be trained on images next:

```python
from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor

model = LLM2CLIPModel.from_vision_text_pretrained("openai/clip-vit-large-patch14-336", "{name}")
processor = LLM2CLIPProcessor.from_vision_text_pretrained("openai/clip-vit-large-patch14-336", "{name}")
```
"""
_ADAPTER_USE = """\
These are LoRA adapters; the LLM is loaded from where it is.

```python
from llm2clip_hf.training import build_caption_encoder  # pip install llm2clip-hf[train]

encoder = build_caption_encoder("{name}", lora=None)
embeddings = encoder.encode(["a red boat on the sea", "ein rotes Boot auf dem Meer"])
encoder.save_pretrained("merged")  # a folder that sentence-transformers and LLM2CLIPModel load
```

**Do not open this folder with PEFT, `AutoModel` or `SentenceTransformer`**: an adapter cannot say that attention looks
both ways, so they would run these weights in a causal LLM, without an error and with worse embeddings.
"""
_CITATION = """\
```bibtex
@article{huang2024llm2clip,
  title={LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation},
  author={Huang, Weiquan and others},
  journal={arXiv preprint arXiv:2411.04997},
  year={2024}
}
```
"""


@dataclass
class EncoderCard:
    """What the card of a caption encoder says."""

    name: str
    base_model: str
    settings: Mapping[str, Any]
    adapter_only: bool = False
    training_data: Sequence[str] = ()
    training_options: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        base = _repository(self.base_model)
        data = ModelCardData(
            base_model=base,
            base_model_relation="adapter" if self.adapter_only and base else None,
            library_name="peft" if self.adapter_only else "sentence-transformers",
            pipeline_tag="feature-extraction",
            tags=["llm2clip", "caption-encoder", "sentence-similarity", *(["lora"] if self.adapter_only else [])],
            datasets=[name for name in self.training_data if _is_repository(name)] or None,
        )
        shown = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(self.base_model).name}`"
        parts = [
            f"---\n{data.to_yaml()}\n---",
            f"# {self.name}",
            f"A caption encoder: the language model {shown}, tuned so that captions of the same image are close and "
            "captions of other images are not. This is stage 1 of LLM2CLIP "
            "([arXiv 2411.04997](https://arxiv.org/abs/2411.04997)), made with `llm2clip_hf`.",
            "## Use",
            (_ADAPTER_USE if self.adapter_only else _MERGED_USE).format(name=self.name).strip(),
            "## How a text becomes a vector",
            self._settings_table(base or Path(self.base_model).name),
            *self._training(),
            *self._results(),
            "## Licence and citation",
            f"The weights derive from {shown}, whose licence applies to them. Please cite the paper:",
            _CITATION.strip(),
        ]
        return "\n\n".join(parts) + "\n"

    def _settings_table(self, base: str) -> str:
        values = self.settings
        template = str(values["template"]).replace("\n", "\\n").replace("|", "\\|")
        rows = {
            "Base model": base,
            "Attention": "causal" if values["is_causal"] else "bidirectional",
            "Template": f"<code>{template.replace('<', '&lt;')}</code>, part of the tokenizer",
            "Pooling": f"`{values['pooling']}`: {_POOLINGS[values['pooling']]}",
            "Maximum length": f"{values['max_length']} tokens, template included",
            "Dimensions": f"{values['dimension']}, {'L2-normalised' if values['normalize'] else 'not normalised'}",
        }
        return _table(("", ""), list(rows.items()))

    def _training(self) -> list[str]:
        parts = []
        if self.training_data:
            parts += ["## Training data", "\n".join(f"- {name}" for name in self.training_data)]
        if self.training_options:
            rows = [
                (f"`{name}`", f"{value:g}" if isinstance(value, float) else str(value))
                for name, value in self.training_options.items()
            ]
            parts += ["## Training", _table(("option", "value"), rows)]
        return parts

    def _results(self) -> list[str]:
        rows = [
            (name, metric, f"{value:.4f}") for name, values in self.results.items() for metric, value in values.items()
        ]
        if not rows:
            return []
        text = "Caption retrieval accuracy (CRA): how often one caption of an image finds the other among all images."
        return ["## Results", text, _table(("Evaluator", "Metric", "Value"), rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _repository(name: str) -> str | None:
    """The Hub repository that a name, or the card in a folder, stands for."""
    if not Path(name).is_dir():
        return name if _is_repository(name) else None
    card = Path(name) / "README.md"
    if not card.is_file():
        return None
    base = getattr(ModelCard.load(card, ignore_metadata_errors=True).data, "base_model", None)
    return base if isinstance(base, str) and _is_repository(base) else None


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def mntp_card(name: str, base_model: str) -> str:
    """The card of a language model after masked next token prediction."""
    base = _repository(base_model)
    data = ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="feature-extraction", tags=["llm2clip", "mntp"]
    )
    shown = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(base_model).name}`"
    text = (
        f"The language model {shown} after masked next token prediction with attention in both directions (MNTP, "
        "[arXiv 2404.05961](https://arxiv.org/abs/2404.05961)), made with `llm2clip_hf`. It is the start of a caption "
        f'encoder, `build_caption_encoder("{name}")`, and writes no text: its config says `is_causal=False`.\n\n'
        f"The weights derive from {shown}, whose licence applies to them."
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{text}\n"


def stored_training_data(card_data: Any, train_datasets: Sequence[str] | None) -> list[str]:
    """Names of the training sets: those given, else those that the trainer of sentence-transformers noted."""
    if train_datasets:
        return [str(name) for name in train_datasets]
    names = []
    for entry in getattr(card_data, "train_datasets", None) or []:
        name = entry.get("id") or entry.get("name") or ""
        size = entry.get("size")
        if name and name != "Unnamed Dataset":
            names.append(name if entry.get("id") or not size else f"{name} ({size} rows)")
    return names


def stored_results(card_data: Any) -> dict[str, dict[str, float]]:
    """The last metrics of each evaluator that ran, as sentence-transformers keeps them."""
    results = {}
    for evaluator, metrics in (getattr(card_data, "eval_results_dict", None) or {}).items():
        values = {key: float(value) for key, value in metrics.items() if isinstance(value, (int, float))}
        results[getattr(evaluator, "name", "") or type(evaluator).__name__] = values
    return results
