# SPDX-License-Identifier: Apache-2.0
"""Cards say what config, run and release say, are kept when somebody wrote them, and their code runs."""

import json
import re
from pathlib import Path
from typing import Any

import original_models as original
import pytest
import tiny_models
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from llm2clip_hf import LLM2CLIPConfig
from llm2clip_hf.cli import main as cli
from llm2clip_hf.evaluation.tasks.report import metric_rows
from llm2clip_hf.hub import LLM2CLIPModelCardData, convert_checkpoint
from llm2clip_hf.hub.cards import conversion_card, is_unedited, merged_card, write_released_cards
from llm2clip_hf.hub.checkpoint_files import RELEASED, find_release
from llm2clip_hf.hub.publishing import publishable_files
from llm2clip_hf.modeling.configuration_llm2clip import is_repository


CARDS = Path(__file__).resolve().parents[2] / "model_cards"
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


# ---------------------------------------------------------------------------------------- released and converted ones


def test_committed_cards_are_those_of_the_table(tmp_path: Path) -> None:
    written = {path.relative_to(tmp_path): path.read_text() for path in write_released_cards(tmp_path)}
    committed = {path.relative_to(CARDS): path.read_text() for path in CARDS.rglob("*.md")}
    assert committed == written, "render them again: `write_released_cards('model_cards')` of hub.cards"


def test_templates_and_releases_are_in_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((CARDS.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = CARDS.parent / "src" / "llm2clip_hf"
    held = {path for pattern in settings["llm2clip_hf"] for path in package.glob(pattern)}
    assert {path for path in package.rglob("*") if path.suffix in (".md", ".yaml", ".typed")} == held


@pytest.mark.parametrize("release", RELEASED, ids=lambda r: r.name)
def test_released_card_says_what_a_user_needs(release: object) -> None:
    text = (CARDS / release.name / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == release.license and card.data.library_name == "transformers"
    assert release.repo_id in card.data.base_model
    command = f"llm2clip convert {release.repo_id} converted"
    assert (command if release.is_llm else f"{command} --text-model {release.llm}") in text
    for numbers in release.numbers:
        assert numbers["source"] in text
        assert all(value in text for value in numbers["values"].values())


def parameters(width: int, projection: int) -> int:
    """An adaptor of depth 4 and expansion 2, from its definition."""
    return 4 * (4 * width**2 + 3 * width + 2 * width) + 2 * width + width * projection + projection


def test_parameters_of_the_table_are_tower_projection_adaptor_and_temperature() -> None:
    towers = {
        "Openai-B-16": 85_799_424 + 768 * 1280,
        "Openai-L-14-224": 303_179_776 + 1024 * 1280,
        "Openai-L-14-336": 303_507_456 + 1024 * 1280,
        "EVA02-B-16": 85_869_312 + 768 * 1280 + 1280,
        "EVA02-L-14-336": 303_645_632 + 1024 * 1280 + 1280,
        "Llama3.2-1B-EVA02-L-14-336": 303_645_632 + 1024 * 1280 + 1280,
    }
    for release in RELEASED:
        if not release.is_llm:
            total = towers[release.name.removeprefix("LLM2CLIP-")] + parameters(release.llm_hidden_size, 1280) + 1
            assert release.parameters == round(total / 1e6, 2), release.name


def test_releases_are_found_by_repository_folder_and_file() -> None:
    for release in RELEASED:
        assert find_release(release.repo_id) is release
        assert find_release(f"/somewhere/{release.name}") is release
    assert find_release("downloads/LLM2CLIP-EVA02-L-14-336.pt").repo_id == "microsoft/LLM2CLIP-EVA02-L-14-336"
    assert find_release("epoch_3.pt") is None


def test_card_of_a_converted_folder(tmp_path: Path) -> None:
    s = original.sizes(0)
    source = tmp_path / "LLM2CLIP-EVA02-B-16.pt"
    torch.save(original.eva_weights(0, s, fused=False), source)
    convert_checkpoint(source, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert str(tmp_path) not in text
    assert card.data.license == "apache-2.0" and card.data.base_model == ["microsoft/LLM2CLIP-EVA02-B-16"]
    assert "llm2clip convert LLM2CLIP-EVA02-B-16.pt OUTPUT_DIR --text-model none" in text
    assert f"{s['depth']} blocks, {s['llm']} -> {s['out']}" in text
    assert "91.2 / 81.4" in text and "untrained" not in text
    torch.save(original.eva_weights(0, s, fused=False), tmp_path / "mine.pt")
    convert_checkpoint(tmp_path / "mine.pt", tmp_path / "other")
    text = (tmp_path / "other" / "README.md").read_text()
    assert "91.2" not in text and ModelCard(text).data.license is None


def test_card_of_a_start_and_of_an_llm() -> None:
    config = LLM2CLIPConfig(llm_hidden_size=32)
    llm = {"text_model": "some-org/LLM", "text_weights": "bundled"}
    text = conversion_card("laion/CLIP", "starting tower, clip", config, **llm, new_keys=54)
    assert "**untrained**: 54 weights" in text
    assert "llm2clip convert laion/CLIP OUTPUT_DIR --text-model some-org/LLM --text-weights bundled" in text
    assert ModelCard(text).data.pipeline_tag == "zero-shot-image-classification"
    release = RELEASED[-1]
    text = conversion_card(release.repo_id, "LLM", template="<s>{text}\n")
    assert "every text becomes `<s>{text}\\n` by itself" in text
    assert f"llm2clip convert {release.repo_id} OUTPUT_DIR\n" in text and "build_caption_encoder" in text
    assert ModelCard(text).data.license == "llama3.2"


@pytest.mark.parametrize("path", [*sorted(CARDS.rglob("*.md")), CARDS.parent / "docs" / "coming_from_the_original.md"])
def test_code_in_cards_and_guide_is_python(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        compile(block, str(path), "exec")


def test_commands_in_cards_and_guide_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        path.read_text() for path in (*CARDS.rglob("*.md"), CARDS.parent / "docs" / "coming_from_the_original.md")
    ]
    commands = re.findall(r"^llm2clip (convert .*)$", "\n".join(texts), re.M)
    assert len(commands) > len(RELEASED)
    for command in commands:
        assert cli.main([*command.split(), "--help"]) == 0, command
        assert "usage: llm2clip convert" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ the verb


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_models.config(text_weights="external", text_base_model="org/llm").save_pretrained(path)
    return path


def test_card_is_written_checked_and_written_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["card", str(folder), "--check"]) == 1
    assert "is stale; run `llm2clip card" in capsys.readouterr().err
    assert not (folder / "README.md").exists()
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"test": {"image_to_text_recall@1": 0.5}, "versions": {"torch": "2"}}))
    options = ["--license", "mit", "--dataset", "org/pairs", "captions of ours", "--results", str(results)]
    assert cli.main(["card", str(folder), *options, "--hardware", "1 x CPU"]) == 0
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["org/pairs"])
    assert [(r.dataset_name, r.metric_value) for r in card.data.eval_results] == [("test", 50.0)]
    assert "- captions of ours" in card.text and "| hardware | 1 x CPU |" in card.text
    assert cli.main(["card", str(folder), "--check"]) == 0
    assert cli.main(["card", str(folder), "--name", "org/tiny"]) == 0
    assert "| hardware | 1 x CPU |" in (folder / "README.md").read_text()

    # The config has changed since.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_base_revision": "0" * 40}))
    assert cli.main(["card", str(folder), "--check"]) == 1
    assert cli.main(["card", str(folder)]) == 0
    assert cli.main(["card", str(folder), "--check"]) == 0
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
    assert cli.main(["card", str(folder), "--results", str(results)]) == 0
    [entry] = ModelCard.load(folder / "README.md").data.eval_results
    assert (entry.dataset_name, entry.metric_value) == ("CRA on COCO", 29.5)
    results.write_text(json.dumps({"model": {}, "tasks": {"cra": {**task, "partial": True}}}))
    assert cli.main(["card", str(folder), "--results", str(results)]) == 1
    assert "`cra` is of a part of the images" in capsys.readouterr().err


def test_card_of_somebody_keeps_its_text(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Mine\n")
    assert cli.main(["card", str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.text == "# Mine\n"
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", ["org/llm"])
    assert cli.main(["card", str(folder), "--check"]) == 0
    assert cli.main(["card", str(folder), "--overwrite"]) == 0
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
    assert cli.main(["card", str(folder), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_card_needs_a_model_and_readable_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["card", str(tmp_path)]) == 1
    assert "holds no `config.json`. Give the folder of a saved LLM2CLIP" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert cli.main(["card", str(tmp_path)]) == 1
    assert "a model of type 'llama', not an LLM2CLIP" in capsys.readouterr().err
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    assert cli.main(["card", str(folder)]) == 1
    assert "README.md` cannot be read" in capsys.readouterr().err
    (folder / "README.md").unlink()
    (folder / "model_card.json").write_text("{")
    assert cli.main(["card", str(folder)]) == 1
    assert "model_card.json` is no valid JSON" in capsys.readouterr().err
