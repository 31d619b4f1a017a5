# SPDX-License-Identifier: Apache-2.0
"""`llm2clip card`: the model card of a saved model, from its config, its training log and its results."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import option, parse_options, positional


EXAMPLES = """\
  llm2clip card llm2clip --license apache-2.0 --dataset org/pairs "captions of our archive"
  llm2clip card llm2clip --results llm2clip/results.json results/llm2clip/results.json --hardware "8 x H100"
  llm2clip card llm2clip --name org/LLM2CLIP --language en de --limits "Dense captions over 512 tokens are cut."
  llm2clip card llm2clip --check"""


@dataclass
class CardOptions:
    folder: str = positional("Folder of a saved model.")
    name: str | None = option("Repository or title; the name of the folder if left out.")
    license: str | None = option("Licence of the weights, e.g. apache-2.0.")
    language: list[str] | None = option("Languages of the texts, e.g. en de.")
    base_model: list[str] | None = option("Repositories that the model was made of.")
    dataset: list[str] | None = option("Training data: repositories (`org/name`), or names in words.")
    results: list[str] | None = option("Files of results, as the other verbs write them.")
    figure: list[str] | None = option("Pictures in the folder, to show with the results.")
    hardware: str | None = option("What the model was trained on, e.g. '8 x H100'.")
    limits: str | None = option("What is known not to work.")
    overwrite: bool = option("Replace a card that somebody wrote.", False)
    check: bool = option("Write nothing; exit with 1 if the card is stale.", False)


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status, 1 with `--check` if the card is stale."""
    (options,) = parse_options(
        argv,
        verb="card",
        description="Write the model card (README.md) of a saved LLM2CLIP, and its facts (model_card.json), from its "
        "config, its training log and results. A card that somebody wrote or edited keeps its text; missing metadata "
        "are added to it.",
        examples=EXAMPLES,
        own=CardOptions,
    )
    from ..hub import LLM2CLIPModelCardData
    from ..hub.card_facts import FACTS_FILE
    from ..hub.cards import CARD_FILE

    folder = Path(options.folder)
    if not folder.is_dir():
        raise ValueError(f"The folder `{folder}` does not exist. Give the folder of a saved LLM2CLIP.")
    data = LLM2CLIPModelCardData.from_folder(folder, **_fields(options))
    path = folder / CARD_FILE
    if not options.check:
        print(f"written   {data.save(folder, overwrite=options.overwrite)} and {FACTS_FILE}")
        return 0
    existing = path.read_text(encoding="utf-8") if path.is_file() else None
    if existing == data.text_for(existing, f"`{path}`"):
        print(f"current   {path}")
        return 0
    print(f"llm2clip card: `{path}` is stale; run `llm2clip card {folder}`", file=sys.stderr)
    return 1


def _fields(options: CardOptions) -> dict[str, Any]:
    from ..modeling.configuration_llm2clip import is_repository

    datasets = options.dataset or []
    fields: dict[str, Any] = {
        "name": options.name,
        "license": options.license,
        "language": options.language,
        "base_model": options.base_model,
        "datasets": [name for name in datasets if is_repository(name)],
        "training_data": datasets,
        **_results(options.results or []),
        "figures": options.figure,
        "limits": options.limits,
    }
    return fields | ({"runtime": {"hardware": options.hardware}} if options.hardware else {})


def _results(files: Sequence[str]) -> dict[str, Any]:
    from ..evaluation import to_eval_results
    from ..files import read_json_object

    results: dict[str, Any] = {}
    entries: list[Any] = []
    for file in files:
        content = read_json_object(Path(file), "Give a file of results, as the other verbs write them.")
        if "tasks" in content:  # of `llm2clip evaluate`
            entries += to_eval_results(content)
        else:
            results |= content
    return {"results": results, "eval_results": entries}
