# SPDX-License-Identifier: Apache-2.0
"""
The model card of a trained model: what its config says, and how it was trained and measured.

A card is rendered from facts. They lie beside it in `model_card.json`, so that it can be rendered again, with more
results say, and compared with what is there.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..modeling import LLM2CLIPConfig
from .card_facts import check_fields, entries_of_results, metric_text, run_options, trainer_facts, trainer_state_facts
from .card_text import card_metadata, card_sections, merged_card, render_card
from .publishing import stated_license


CARD_FILE = "README.md"
FACTS_FILE = "model_card.json"
STATE_FILE = "trainer_state.json"
ARGUMENTS_FILE = "training_args.json"


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
        fields = {**card_metadata(config, license), **given}
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
        self._all_results = [*self._given_results, *entries_of_results(self._facts["results"])]
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
        stored = _read_json(root / FACTS_FILE)
        if not stored:
            state, arguments = _read_json(root / STATE_FILE), _read_json(root / ARGUMENTS_FILE)
            stored = trainer_state_facts(state)
            if arguments:
                stored["hyperparameters"] = run_options(SimpleNamespace(**arguments), state.get("global_step", 0))
            stored["name"] = root.resolve().name
        stored["eval_results"] = [_eval_result(entry, root) for entry in stored.get("eval_results", [])]
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
        known = {**card_metadata(self._config, self.license), "model_name": self.model_name}
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
        return render_card(self._facts["title"].split("/")[-1], self.to_dict(), self._sections())

    def _sections(self) -> dict[str, str]:
        known = card_sections(self._config, self._facts["title"], self.license)
        sections: dict[str, str] = {}
        for heading, text in known.items():
            if heading == "Limits":
                sections |= {name: body for name, body in self._measured().items() if body}
                text = "\n\n".join(part for part in (text, self._facts["limits"]) if part)
            sections[heading] = text
        return sections

    def _measured(self) -> dict[str, str]:
        facts = self._facts
        data = "\n".join(f"- {line}" for line in facts["training_data"])
        options = [
            (f"`{name}`", f"{value:g}" if isinstance(value, float) else value)
            for name, value in facts["hyperparameters"].items()
        ]
        cost = dict(facts["runtime"])
        emissions = getattr(self, "co2_eq_emissions", None)
        if emissions:
            grams = emissions.get("emissions") if isinstance(emissions, Mapping) else emissions
            cost["CO2 equivalent (g)"] = grams
        rows = [
            (entry.dataset_name or "evaluation set", entry.metric_name or entry.metric_type, entry.metric_value)
            for entry in self._all_results
        ]
        figures = [f"![{Path(name).stem}]({name})" for name in facts["figures"]]
        results = _table(("data", "metric", "value"), rows)
        unit = "Recall and accuracy are in percent." if rows else ""
        return {
            "Training data": data,
            "Training": _table(("option", "value"), options),
            "Cost of training": _table(("", ""), list(cost.items())),
            "Results": "\n\n".join(part for part in (results, unit, *figures) if part),
        }

    def text_for(self, existing: str | None, where: str, overwrite: bool = False) -> str:
        """
        The card to write where there may be one already; see `push_to_hub` for what is kept of it.

        Args:
            existing (`str`, *optional*): The card that is there.
            where (`str`): Its name, for errors.
            overwrite (`bool`, *optional*, defaults to `False`): Whether to replace it.

        Returns:
            `str`
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
        facts = json.dumps(self.facts(), indent=2, ensure_ascii=False) + "\n"
        for path, content in ((root / FACTS_FILE, facts), (card, text)):
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, path)
        return card


def _listed(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [list(header), ["---"] * len(header), *([metric_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is no valid JSON: {error}. Repair or delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` holds {type(content).__name__}, expected an object. Repair or delete it.")
    return content


def _eval_result(entry: Mapping[str, Any], folder: Path) -> EvalResult:
    try:
        return EvalResult(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"An entry of `eval_results` in `{folder / FACTS_FILE}` is not valid: {error}") from error


__all__ = ["CARD_FILE", "FACTS_FILE", "LLM2CLIPModelCardData"]
