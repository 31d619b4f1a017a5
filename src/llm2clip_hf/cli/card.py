# SPDX-License-Identifier: Apache-2.0
"""`llm2clip card`: the model card of a saved model, from its config, its training log and its results."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import VerbParser


EXAMPLES = """\
  llm2clip card llm2clip --license apache-2.0 --dataset org/pairs "captions of our archive"
  llm2clip card llm2clip --results llm2clip/results.json results/llm2clip/results.json --hardware "8 x H100"
  llm2clip card llm2clip --name org/LLM2CLIP --language en de --limits "Dense captions over 512 tokens are cut."
  llm2clip card llm2clip --check"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status, 1 with `--check` if the card is stale."""
    parser = _parser()
    arguments = parser.parse_args(list(argv))
    # Not left to argparse, which would name it before an option that does not exist.
    if arguments.folder is None:
        parser.error("FOLDER is required")

    from ..hub import LLM2CLIPModelCardData
    from ..hub.card_facts import FACTS_FILE
    from ..hub.cards import CARD_FILE

    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise ValueError(f"The folder `{folder}` does not exist. Give the folder of a saved LLM2CLIP.")
    data = LLM2CLIPModelCardData.from_folder(folder, **_fields(arguments))
    path = folder / CARD_FILE
    if not arguments.check:
        print(f"written   {data.save(folder, overwrite=arguments.overwrite)} and {FACTS_FILE}")
        return 0
    existing = path.read_text(encoding="utf-8") if path.is_file() else None
    if existing == data.text_for(existing, f"`{path}`"):
        print(f"current   {path}")
        return 0
    print(f"llm2clip card: `{path}` is stale; run `llm2clip card {folder}`", file=sys.stderr)
    return 1


def _parser() -> VerbParser:
    parser = VerbParser(
        "card",
        usage="[options] FOLDER",
        description="Write the model card (README.md) of a saved LLM2CLIP, and its facts (model_card.json), from its "
        "config, its training log and results. A card that somebody wrote or edited keeps its text; missing metadata "
        "are added to it.",
        examples=EXAMPLES,
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="folder of a saved model")
    parser.add_argument("--name", metavar="REPO", help="repository or title (default: the name of the folder)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, e.g. apache-2.0")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="languages of the texts, e.g. en de")
    parser.add_argument("--base-model", nargs="+", metavar="REPO", help="repositories that the model was made of")
    parser.add_argument(
        "--dataset", nargs="+", metavar="NAME", help="training data: repositories (`org/name`), or names in words"
    )
    parser.add_argument("--results", nargs="+", metavar="JSON", help="files of results, as the other verbs write them")
    parser.add_argument("--figure", nargs="+", metavar="PNG", help="pictures in the folder, to show with the results")
    parser.add_argument("--hardware", metavar="TEXT", help="what the model was trained on, e.g. '8 x H100'")
    parser.add_argument("--limits", metavar="TEXT", help="what is known not to work")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that somebody wrote")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the card is stale")
    return parser


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..modeling.configuration_llm2clip import is_repository

    datasets = arguments.dataset or []
    fields: dict[str, Any] = {
        "name": arguments.name,
        "license": arguments.license,
        "language": arguments.language,
        "base_model": arguments.base_model,
        "datasets": [name for name in datasets if is_repository(name)],
        "training_data": datasets,
        **_results(arguments.results or []),
        "figures": arguments.figure,
        "limits": arguments.limits,
    }
    if arguments.hardware:
        fields["runtime"] = {"hardware": arguments.hardware}
    return fields


def _results(files: Sequence[str]) -> dict[str, Any]:
    import json

    from ..evaluation.tasks.report import to_eval_results

    results: dict[str, Any] = {}
    entries: list[Any] = []
    for file in files:
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"The results file `{file}` does not exist.") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"The results file `{file}` is no valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"The results file `{file}` holds {type(content).__name__}, expected an object.")
        if "tasks" in content:  # of `llm2clip evaluate`
            entries += to_eval_results(content)
        else:
            results |= content
    return {"results": results, "eval_results": entries}
