# SPDX-License-Identifier: Apache-2.0
"""`llm2clip card`: writes a card from what lies in a folder, notices a stale one, names what it cannot read."""

import json
from pathlib import Path

import pytest
import tiny_models
from huggingface_hub import ModelCard

from llm2clip_hf.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_models.config(text_weights="external", text_base_model="org/llm").save_pretrained(path)
    return path


def test_card_is_written_checked_and_written_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(folder), "--check"]) == 1
    assert "is stale; run `llm2clip card" in capsys.readouterr().err
    assert not (folder / "README.md").exists()
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"test": {"image_to_text_recall@1": 0.5}, "versions": {"torch": "2"}}))
    options = ["--license", "mit", "--dataset", "org/pairs", "captions of ours", "--results", str(results)]
    assert main(["card", str(folder), *options, "--hardware", "1 x CPU"]) == 0
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["org/pairs"])
    assert [(r.dataset_name, r.metric_value) for r in card.data.eval_results] == [("test", 50.0)]
    assert "- captions of ours" in card.text and "| hardware | 1 x CPU |" in card.text
    assert main(["card", str(folder), "--check"]) == 0
    assert main(["card", str(folder), "--name", "org/tiny"]) == 0
    assert "| hardware | 1 x CPU |" in (folder / "README.md").read_text()

    # The config has changed since.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_base_revision": "0" * 40}))
    assert main(["card", str(folder), "--check"]) == 1
    assert main(["card", str(folder)]) == 0
    assert main(["card", str(folder), "--check"]) == 0
    assert "0" * 40 in (folder / "README.md").read_text()
    assert ModelCard.load(folder / "README.md").data.license == "mit"


def test_results_of_the_evaluation_are_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {
        "kind": "cra",
        "title": "CRA on COCO",
        "partial": False,
        "split": "test",
        "fingerprint": {},
        "metrics": {"caption_retrieval_accuracy": 0.295},
    }
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"model": {}, "tasks": {"cra": task}}))
    assert main(["card", str(folder), "--results", str(results)]) == 0
    [entry] = ModelCard.load(folder / "README.md").data.eval_results
    assert (entry.dataset_name, entry.metric_value) == ("CRA on COCO", 29.5)
    results.write_text(json.dumps({"model": {}, "tasks": {"cra": {**task, "partial": True}}}))
    assert main(["card", str(folder), "--results", str(results)]) == 1
    assert "`cra` is of a part of the images" in capsys.readouterr().err


def test_card_of_somebody_keeps_its_text(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Mine\n")
    assert main(["card", str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.text == "# Mine\n"
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", ["org/llm"])
    assert main(["card", str(folder), "--check"]) == 0
    assert main(["card", str(folder), "--overwrite"]) == 0
    assert "Licence of the weights: `cc-by-4.0`" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "My Licence"], "`license` must be an identifier of the Hub"),
        (["--results", "missing.json"], "`missing.json` does not exist. Give a file of results"),
        (["--figure", "plot.png"], "The picture 'plot.png' is not in"),
        (["--base-model", "a/b/c"], "`base_model` names 'a/b/c'"),
    ],
)
def test_card_names_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["card", str(folder), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_card_needs_a_model_and_readable_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(tmp_path)]) == 1
    assert "holds no `config.json`. Give the folder of a saved LLM2CLIP" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["card", str(tmp_path)]) == 1
    assert "a model of type 'llama', not an LLM2CLIP" in capsys.readouterr().err
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    assert main(["card", str(folder)]) == 1
    assert "README.md` cannot be read" in capsys.readouterr().err
    (folder / "README.md").unlink()
    (folder / "model_card.json").write_text("{")
    assert main(["card", str(folder)]) == 1
    assert "model_card.json` is no valid JSON" in capsys.readouterr().err
