# SPDX-License-Identifier: Apache-2.0
"""
Model cards: of trained and converted models, released checkpoints and caption encoders.

A card is a template of `templates/`, filled with facts. Those of a trained model lie beside its card in
`model_card.json`, so that it can be rendered again, with more results say, and compared with what is there.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.tasks.report import to_eval_results
from ..files import write_json_atomically, write_text_atomically
from ..modeling import LLM2CLIPConfig
from ..modeling.configuration_llm2clip import is_repository
from ..modeling.saving_llm2clip import completed_card, read_card
from .card_facts import (
    FACTS_FILE,
    check_fields,
    config_fields,
    metric_text,
    option_rows,
    stored_facts,
    trainer_facts,
)
from .checkpoint_files import RELEASED, ReleasedCheckpoint, find_release
from .publishing import stated_license


CARD_FILE = "README.md"
# In every card of a converted folder, by which a folder is known as one that may be replaced.
CONVERTED = "<!-- Written by `llm2clip convert`; converting again replaces this folder. -->"
_INDEX_SETS = ["Flickr30k", "COCO", "ShareGPT4V", "Urban1k", "DOCCI", "CRA"]
_TEMPLATES = Path(__file__).parent / "templates"
# Carries a digest of all other lines, by which a card that nobody edited is known.
_MARKER = re.compile(r"^<!-- llm2clip_hf card ([0-9a-f]{16}): .*-->\n\n", re.MULTILINE)
_MARKER_TEXT = "<!-- llm2clip_hf card {digest}: rendered again on every push until somebody edits this file -->\n\n"


def _render(template: str, data: ModelCardData | None, /, **facts: Any) -> str:
    """A card, or, without data, a file without front matter."""
    parts: Any = jinja2.Template((_TEMPLATES / "parts.md").read_text(encoding="utf-8")).module
    path = _TEMPLATES / f"{template}.md"
    if data is None:
        text = jinja2.Template(path.read_text(encoding="utf-8")).render(parts=parts, **facts)
    else:
        text = str(ModelCard.from_template(data, template_path=str(path), parts=parts, **facts))
    # Sections that are left out leave empty lines.
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _marked(data: ModelCardData, body: str) -> str:
    front = f"---\n{data.to_yaml()}\n---\n\n"
    body = body.lstrip("\n")
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
    old, unedited = read_card(existing, where), is_unedited(existing)
    if old.text.strip() and not unedited:
        return completed_card(existing, rendered, where)
    new, kept = ModelCard(rendered), old.data.to_dict()
    data: Any = new.data
    if unedited:
        licence = ("license", "license_name", "license_link")
        kept = {} if data.license else {key: kept[key] for key in licence if key in kept}
    if not kept:
        return rendered
    for key, value in kept.items():
        data[key] = value
    return _marked(data, _MARKER.sub("", new.text, count=1))


class LLM2CLIPModelCardData(ModelCardData):
    """
    The facts of a model card; `str(card)` is the card.

    Args:
        config ([`LLM2CLIPConfig`]): Config of the model; says what it is and where its LLM is.
        name (`str`, *optional*, defaults to `"LLM2CLIP"`):
            Repository, or folder, that the code of the card loads; its last part is the title.
        license (`str`, *optional*):
            Licence of the weights, as the Hub writes it, e.g. `"apache-2.0"`. By default that of a bundled Llama of
            Meta; else none is stated.
        training_data (`list[str]`, *optional*): What the model was trained on, a line each.
        hyperparameters (`dict`, *optional*): Names and values.
        results (`dict`, *optional*):
            Metrics by name, or such dictionaries by data set, as deep as needed; what is not a number is left out.
            Recall and accuracy are fractions, which the card shows in percent. Results of a named data set also become
            entries of the front matter's `model-index`.
        eval_results (`list[EvalResult]`, *optional*): Further results, in the units that the card shows.
        figures (`list[str]`, *optional*): Picture files beside the card.
        runtime (`dict`, *optional*): What training took: hardware, hours, energy, as measured.
        limits (`str`, *optional*): What is known not to work, after what holds for every such model.
        base_model (`str` or `list[str]`, *optional*): Repositories that it was made of; that of its LLM by default.
        datasets (`str` or `list[str]`, *optional*): Repositories of its training data.
        kwargs: Further fields of the front matter: `language`, `tags`, `co2_eq_emissions`, `license_link`, ...

    Raises:
        ValueError: if a field of the front matter is none that the Hub takes.

    Example:
    >>> card = LLM2CLIPModelCardData(LLM2CLIPConfig(), name="org/LLM2CLIP", license="mit")
    >>> card.license, "# LLM2CLIP" in str(card)
    ('mit', True)
    """

    def __init__(
        self,
        config: LLM2CLIPConfig,
        *,
        name: str = "LLM2CLIP",
        license: str | None = None,
        training_data: Sequence[str] = (),
        hyperparameters: Mapping[str, Any] | None = None,
        results: Mapping[str, Any] | None = None,
        eval_results: Sequence[EvalResult] | None = None,
        figures: Sequence[str] = (),
        runtime: Mapping[str, Any] | None = None,
        limits: str | None = None,
        base_model: str | Sequence[str] | None = None,
        datasets: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {key: value for key, value in kwargs.items() if value}
        check_fields(given)
        fields = {**config_fields(config, license), **given}
        fields["tags"] = [*_listed(fields["tags"]), *(["llm2clip"] if "llm2clip" not in fields["tags"] else [])]
        fields["base_model"] = _listed(base_model) or fields["base_model"]
        fields["datasets"] = _listed(datasets) or None
        check_fields(fields)
        self._config = config
        self._facts: dict[str, Any] = {
            "title": name,
            "training_data": [str(line) for line in training_data],
            "hyperparameters": dict(hyperparameters or {}),
            "results": dict(results or {}),
            "figures": [str(figure) for figure in figures],
            "runtime": dict(runtime or {}),
            "limits": limits or "",
        }
        self._given_results = list(eval_results or [])
        self._given_license = license
        self._all_results = [*self._given_results, *to_eval_results(self._facts["results"])]
        entries = [entry for entry in self._all_results if entry.dataset_name]
        super().__init__(model_name=name.split("/")[-1] if entries else None, eval_results=entries or None, **fields)

    def _to_dict(self, data_dict: dict[str, Any]) -> None:
        super()._to_dict(data_dict)
        for key in [key for key in data_dict if key.startswith("_")]:
            del data_dict[key]

    @classmethod
    def from_trainer(cls, trainer: Any, config: LLM2CLIPConfig, **fields: Any) -> "LLM2CLIPModelCardData":
        """
        The card of what a trainer has trained: its arguments, the size of its data, its last evaluation, its time.

        Args:
            trainer ([`LLM2CLIPTrainer`]): After, or during, training.
            config ([`LLM2CLIPConfig`]): Config of the model, as it is saved.
            fields: Arguments of the class, which win over what the trainer says.

        Returns:
            [`LLM2CLIPModelCardData`]
        """
        return cls(config, **{**trainer_facts(trainer), **fields})

    @classmethod
    def from_folder(cls, folder: str | Path, **fields: Any) -> "LLM2CLIPModelCardData":
        """
        The card of a saved model: of the facts beside it, else of its config, `trainer_state.json` and
        `training_args.json`.

        Args:
            folder (`str` or `Path`): Folder with `config.json`.
            fields: Arguments of the class, which win over the stored facts; results and `runtime` are added to them.

        Returns:
            [`LLM2CLIPModelCardData`]

        Raises:
            ValueError: if the folder holds no LLM2CLIP, or the stored facts cannot be read.
        """
        root = Path(folder)
        if not (root / "config.json").is_file():
            raise ValueError(f"`{root}` holds no `config.json`. Give the folder of a saved LLM2CLIP.")
        written = json.loads((root / "config.json").read_text(encoding="utf-8"))
        if written.get("model_type") != "llm2clip":
            raise ValueError(f"`{root}` holds a model of type {written.get('model_type')!r}, not an LLM2CLIP.")
        stored = stored_facts(root)
        added = {key: value for key, value in fields.items() if value}
        for name in ("results", "runtime"):
            if name in added:
                added[name] = {**stored.get(name, {}), **added[name]}
        if "eval_results" in added:
            new = {entry.unique_identifier for entry in added["eval_results"]}
            kept = [entry for entry in stored["eval_results"] if entry.unique_identifier not in new]
            added["eval_results"] = [*kept, *added["eval_results"]]
        if not (added.get("license") or stored.get("license")) and (root / CARD_FILE).is_file():
            card = (root / CARD_FILE).read_text(encoding="utf-8")
            added["license"] = stated_license(card, f"`{root / CARD_FILE}`")
        return cls(LLM2CLIPConfig.from_dict(written), **{**stored, **added})

    def facts(self) -> dict[str, Any]:
        """What `model_card.json` holds: the arguments of the class, without the config."""
        # What the config tells is read from it again.
        known = {**config_fields(self._config, self.license), "model_name": self.model_name}
        front = {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "eval_results" and value != known.get(name)
        }
        facts = dict(self._facts)
        found = {"name": facts.pop("title"), "license": self._given_license, **front, **facts}
        found["eval_results"] = [vars(result) for result in self._given_results]
        return {key: value for key, value in found.items() if value}

    def __str__(self) -> str:
        facts, config = self._facts, self._config
        cost = dict(facts["runtime"])
        emissions = getattr(self, "co2_eq_emissions", None)
        if emissions:
            cost["CO2 equivalent (g)"] = emissions.get("emissions") if isinstance(emissions, Mapping) else emissions
        card = _render(
            "trained",
            self,
            config=config,
            name=facts["title"],
            title=facts["title"].split("/")[-1],
            base=config.text_base_model if is_repository(config.text_base_model) else None,
            license=self.license,
            training_data=facts["training_data"],
            hyperparameters=option_rows(facts["hyperparameters"]),
            cost=[(name, metric_text(value)) for name, value in cost.items()],
            results=[
                (r.dataset_name or "evaluation set", r.metric_name or r.metric_type, metric_text(r.metric_value))
                for r in self._all_results
            ],
            figures=[(name, Path(name).stem) for name in facts["figures"]],
            limits=facts["limits"],
        )
        return _marked(self, ModelCard(card).text)

    def text_for(self, existing: str | None, where: str, overwrite: bool = False) -> str:
        """
        The card to write where `existing`, named `where` in errors, may be there already: what somebody wrote is kept
        unless `overwrite`.
        """
        return str(self) if existing is None or overwrite else merged_card(existing, str(self), where)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """
        Writes the card, `README.md`, and its facts, `model_card.json`, into a folder.

        Args:
            folder (`str` or `Path`): Folder of the model.
            overwrite (`bool`, *optional*, defaults to `False`): Whether to replace a card that somebody wrote.

        Returns:
            `Path`: of the card.

        Raises:
            ValueError: if a picture is not in the folder, or the metadata of the card that is there are not valid.
        """
        root = Path(folder)
        for figure in self._facts["figures"]:
            if not (root / figure).is_file():
                raise ValueError(f"The picture {figure!r} is not in `{root}`. Put it there; it is shown in the card.")
        card = root / CARD_FILE
        existing = card.read_text(encoding="utf-8") if card.is_file() else None
        text = self.text_for(existing, f"`{card}`", overwrite)
        write_json_atomically(root / FACTS_FILE, self.facts())
        write_text_atomically(card, text)
        return card


def _listed(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _front(license: str | None = None, base_model: Sequence[str] = (), **fields: Any) -> ModelCardData:
    fields = {"library_name": "transformers", "tags": ["llm2clip"], **fields}
    return ModelCardData(license=license, base_model=list(base_model) or None, **fields)


def _shown(name: str) -> str:
    """A repository as it is, of a path its last part only: where it lies on one machine concerns nobody else."""
    return Path(name).name if os.path.isabs(name) or Path(name).exists() or name.count("/") > 1 else name


def conversion_card(
    source: str,
    kind: str,
    config: LLM2CLIPConfig | None = None,
    *,
    text_model: str | None = None,
    text_weights: str = "none",
    new_keys: int = 0,
    template: str = "",
) -> str:
    """The card of a folder that a conversion wrote: of a model with its config, or of an LLM with its template."""
    release = find_release(source)
    source, llm = _shown(source), text_model and _shown(text_model)
    bases = [*([release.repo_id] if release else []), *([llm] if llm and "/" in llm else [])]
    pipeline = "zero-shot-image-classification" if llm else "image-feature-extraction"
    return _render(
        "converted",
        _front(
            release.license if release else None,
            bases,
            pipeline_tag="feature-extraction" if config is None else pipeline,
        ),
        marker=CONVERTED,
        title=release.name if release else Path(source).stem,
        source=source,
        kind=kind,
        config=config,
        llm=llm,
        bundled=text_weights == "bundled",
        new_keys=new_keys,
        template=json.dumps(template)[1:-1],
        release=release,
    )


def released_card(release: ReleasedCheckpoint) -> str:
    """The card of a released checkpoint, as `model_cards/` holds it."""
    data = _front(
        release.license,
        [release.repo_id] if release.is_llm else [release.repo_id, release.llm],
        pipeline_tag="feature-extraction" if release.is_llm else "zero-shot-image-classification",
    )
    return _render("released", data, release=release)


def write_released_cards(folder: str | Path) -> list[Path]:
    """Writes the cards of all released checkpoints, and an index of them with their numbers, `README.md`."""
    rows = []
    for release in RELEASED:
        values = release.numbers[-1]["values"] if release.numbers else {}
        llm = "-" if release.is_llm else f"`{release.llm}`"
        size = "" if release.is_llm else f", {release.parameters:.0f} M without LLM"
        scores = [values.get(name, "-") for name in _INDEX_SETS]
        command = f"`llm2clip convert {release.repo_id} OUT`"
        rows.append([f"[{release.name}]({release.name}/{CARD_FILE}){size}", llm, *scores, release.license, command])
    texts = {Path(folder) / CARD_FILE: _render("index", None, rows=rows, sets=_INDEX_SETS)}
    texts |= {Path(folder) / release.name / CARD_FILE: released_card(release) for release in RELEASED}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _base_of(name: str) -> tuple[str | None, str]:
    """The repository that a name, or the card in a folder, stands for, and how a card names it."""
    base: Any = name
    if Path(name).is_dir():
        card = Path(name) / CARD_FILE
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card.is_file() else None
        base = getattr(data, "base_model", None)
    if not is_repository(base):
        return None, f"`{Path(name).name}`"
    return base, f"[{base}](https://huggingface.co/{base})"


def encoder_card(
    name: str,
    base_model: str,
    settings: Mapping[str, Any],
    *,
    adapter_only: bool = False,
    training_data: Sequence[str] = (),
    training_options: Mapping[str, Any] | None = None,
    results: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """The card of a caption encoder, whole or as adapters alone."""
    base, shown = _base_of(base_model)
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if adapter_only and base else None,
        library_name="peft" if adapter_only else "sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=["llm2clip", "caption-encoder", "sentence-similarity", *(["lora"] if adapter_only else [])],
        datasets=[name for name in training_data if is_repository(name)] or None,
    )
    return _render(
        "encoder",
        data,
        name=name,
        shown=shown,
        base=base or Path(base_model).name,
        settings=settings,
        adapter_only=adapter_only,
        training_data=training_data,
        training_options=option_rows(training_options or {}),
        results=[
            (evaluator, metric, f"{value:.4f}")
            for evaluator, values in (results or {}).items()
            for metric, value in values.items()
        ],
    )


def mntp_card(name: str, base_model: str) -> str:
    """The card of an LLM after masked next token prediction."""
    base, shown = _base_of(base_model)
    data = _front(base_model=[base] if base else (), pipeline_tag="feature-extraction", tags=["llm2clip", "mntp"])
    return _render("mntp", data, name=name, shown=shown)


__all__ = [
    "CARD_FILE",
    "CONVERTED",
    "LLM2CLIPModelCardData",
    "conversion_card",
    "encoder_card",
    "is_unedited",
    "merged_card",
    "mntp_card",
    "write_released_cards",
]
