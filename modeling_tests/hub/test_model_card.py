# SPDX-License-Identifier: Apache-2.0
"""Model cards say what the config and the run say, are kept when somebody wrote them, and their code runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from llm2clip_hf.hub import LLM2CLIPModelCardData
from llm2clip_hf.hub.card_facts import metric_rows
from llm2clip_hf.hub.card_text import bundled_license, is_unedited, merged_card
from llm2clip_hf.hub.publishing import publishable_files
from llm2clip_hf.modeling.configuration_llm2clip import is_repository


COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESULTS = {
    "flickr30k": {"image_to_text_recall@1": 0.5, "runtime": 3.0, "captions": "five"},
    "imagenet": {"80 templates": {"zero_shot_top1": 0.25}},
    "command": {"time": 1},
}


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_front_matter_and_text_hold_the_facts() -> None:
    config = tiny_models.config(text_weights="external", text_base_model="org/llm", text_base_revision=COMMIT)
    flickr = EvalResult("image-text-retrieval", "org/xm", "XM3600", "text_to_image_recall@1", 12.5, dataset_split="de")
    data = LLM2CLIPModelCardData(
        config,
        name="org/tiny",
        license="apache-2.0",
        training_data=["CC3M, 3 million rows"],
        datasets="org/cc3m",
        hyperparameters={"learning_rate": 1e-5},
        results=RESULTS,
        eval_results=[flickr],
        runtime={"hardware": "8 x H200", "hours": 4.5},
        limits="No digits.",
        language=["en", "de"],
        co2_eq_emissions={"emissions": 1200, "source": "measured"},
    )
    card = ModelCard(str(data))
    assert card.data.to_dict() == data.to_dict()
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("apache-2.0", ["org/cc3m"], ["org/llm"])
    assert (card.data.tags, card.data.language) == (["llm2clip"], ["en", "de"])
    entries = {(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert entries == {
        ("XM3600", "text_to_image_recall@1", 12.5),
        ("flickr30k", "image_to_text_recall_at_1", 50.0),
        ("imagenet / 80 templates", "zero_shot_top1", 25.0),
    }
    for line in (
        "# tiny",
        "- CC3M, 3 million rows",
        "| `learning_rate` | 1e-05 |",
        "| flickr30k | image to text recall@1 | 50.00 |",
        "| XM3600 | text_to_image_recall@1 | 12.50 |",
        "| hardware | 8 x H200 |",
        "| CO2 equivalent (g) | 1200 |",
    ):
        assert line in card.text.splitlines(), line
    assert (
        "No digits." in card.text and f"[org/llm](https://huggingface.co/org/llm) at revision `{COMMIT}`" in card.text
    )


def test_nested_results_leave_out_what_is_no_metric() -> None:
    results = {
        "a": {"b": {"c": 1}, "flag": True, "loss": 2.0},
        "versions": {"torch": 2},
        "train_runtime": 5.0,
        "d": 0.5,
    }
    assert list(metric_rows(results)) == [("a / b", "c", 1), ("", "d", 0.5)]


@pytest.mark.parametrize(
    ("base", "weights", "expected"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "bundled", "llama3.2"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "bundled", "llama3"),
        ("meta-llama/Llama-3.1-8B", "bundled", "llama3.1"),
        ("meta-llama/Llama-2-7b-hf", "bundled", "llama2"),
        ("meta-llama/Llama-3.2-1B-Instruct", "external", None),
        ("nvidia/Llama-3.1-Nemotron-70B", "bundled", None),
        ("org/open-llama-3b", "bundled", None),
        (None, "bundled", None),
    ],
)
def test_licence_is_derived_only_where_it_is_certain(base: str | None, weights: str, expected: str | None) -> None:
    config = tiny_models.config(text_weights=weights, text_base_model=base)
    assert bundled_license(config) == expected
    data = LLM2CLIPModelCardData(config)
    assert data.license == expected
    assert ("license:" in str(data)) is (expected is not None)
    assert LLM2CLIPModelCardData(config, license="other").license == "other"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("license", "Apache License 2.0", "`license` must be an identifier of the Hub such as 'apache-2.0'"),
        ("datasets", "my data", "`datasets` names 'my data', which is no repository.*`training_data`"),
        ("base_model", ["a/b/c"], "`base_model` names 'a/b/c', which is no repository"),
        ("language", [1], r"`language` must be a string or a list of strings, got \[1\]"),
        ("tags", {"a": 1}, "`tags` must be a string or a list of strings"),
        ("co2_eq_emissions", object(), "`co2_eq_emissions` is object, which front matter cannot hold"),
    ],
)
def test_invalid_fields_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM2CLIPModelCardData(tiny_models.config(), **{field: value})


def test_the_card_of_others_is_kept_and_an_unedited_one_is_not() -> None:
    config = tiny_models.config()
    first, second = (str(LLM2CLIPModelCardData(config, name=name, license="mit")) for name in ("org/one", "org/two"))
    assert is_unedited(first)
    assert merged_card(first, second, "it") == second
    # The licence that the first one states outlives a second one that states none.
    unlicensed = str(LLM2CLIPModelCardData(config, name="org/two"))
    merged = merged_card(first, unlicensed, "it")
    assert ModelCard(merged).data.license == "mit" and is_unedited(merged) and "# two" in merged

    for edited in (first + "\nMine.\n", first.replace("license: mit", "license: other")):
        assert not is_unedited(edited)
        assert merged_card(edited, second, "it") == edited
    assert ModelCard(merged_card("# Text only\n", first, "it")).text == "# Text only\n"
    with pytest.raises(ValueError, match=r"The metadata of `README.md` cannot be read: .* Repair its first lines"):
        merged_card("---\ntags: [a\n---\ntext", first, "`README.md`")


@pytest.mark.parametrize("text_weights", ["bundled", "none"])
def test_code_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_weights: str) -> None:
    model = tiny_models.model("clip")
    model.save_pretrained(tmp_path / "folder", text_weights=text_weights)
    tiny_models.processor().save_pretrained(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (37, 41), (9, 90, 200)).save("image.png")
    torch.save(torch.randn(2, tiny_models.TEXT_WIDTH), "embeddings.pt")
    blocks = code_blocks(str(LLM2CLIPModelCardData.from_folder("folder")))
    assert len(blocks) == (2 if text_weights == "bundled" else 1)
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block, scope)
        if "output" in scope:
            cosines = scope["output"].image_embeds @ scope["output"].text_embeds.T
            assert cosines.shape == (1, 2) and cosines.abs().max() <= 1 + 1e-5


def test_a_folder_is_rendered_again_from_its_facts(tmp_path: Path) -> None:
    tiny_models.config().save_pretrained(tmp_path)
    log = [{"eval_image_to_text_recall@1": 0.1}, {"eval_image_to_text_recall@1": 0.2}, {"train_runtime": 7200.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    first = LLM2CLIPModelCardData.from_folder(tmp_path)
    assert "| evaluation set | image to text recall@1 | 20.00 |" in str(first)
    assert "| hours | 2.00 |" in str(first)
    result = EvalResult("image-text-retrieval", "org/a", "A", "recall", 0.5)
    full = LLM2CLIPModelCardData.from_folder(
        tmp_path, name="org/a", license="mit", language="en", eval_results=[result], results=RESULTS
    )
    full.save(tmp_path)
    again = LLM2CLIPModelCardData.from_folder(tmp_path)
    assert str(again) == str(full) == (tmp_path / "README.md").read_text()
    # New results join the stored ones, and take the place of the same ones.
    better = EvalResult("image-text-retrieval", "org/a", "A", "recall", 0.75)
    replaced = LLM2CLIPModelCardData.from_folder(tmp_path, eval_results=[better])
    assert [r.metric_value for r in replaced.eval_results if r.dataset_name == "A"] == [0.75]
    more = LLM2CLIPModelCardData.from_folder(tmp_path, results={"coco": {"recall": 0.75}})
    assert {r.dataset_name for r in more.eval_results} == {"A", "flickr30k", "imagenet / 80 templates", "coco"}

    with pytest.raises(ValueError, match=r"The picture 'plot.png' is not in"):
        LLM2CLIPModelCardData.from_folder(tmp_path, figures=["plot.png"]).save(tmp_path)
    assert (tmp_path / "README.md").read_text() == str(full)
    (tmp_path / "plot.png").write_bytes(b"")
    LLM2CLIPModelCardData.from_folder(tmp_path, figures=["plot.png"]).save(tmp_path)
    assert "![plot](plot.png)" in (tmp_path / "README.md").read_text()


def test_only_what_loads_is_published(tmp_path: Path) -> None:
    published = ["README.md", "clip_text_model/config.json", "config.json", "model.safetensors", "modeling_x.py"]
    others = [
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        ".env",
        ".hidden.json",
        "_draft.md",
        "checkpoint-1/model.safetensors",
        "runs/events.json",
        "__pycache__/modeling_x.py",
    ]
    for name in (*published, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in publishable_files(tmp_path)] == published


def test_a_folder_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_repository("org/name")
    assert not any(map(is_repository, ["name", "a/b/c", "/a/b", None, "a b/c"]))
    Path("org/name").mkdir(parents=True)
    assert not is_repository("org/name")
