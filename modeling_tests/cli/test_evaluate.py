# SPDX-License-Identifier: Apache-2.0
"""`llm2clip evaluate` on LLM2CLIP and on CLIP, from folders: what it prints, what it writes, how it fails."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_models
import torch
from evaluation_data import CAPTIONS, clip, picture, siglip, write_image_folder, write_parquet
from stub_hub import COMMIT, cached_repository
from transformers import AutoProcessor

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.cli import main as cli
from llm2clip_hf.evaluation import embedding_cache as cached_encoding
from llm2clip_hf.evaluation import evaluate_retrieval


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "ours": lambda: (tiny_models.model(), tiny_models.processor()),
    "clip": clip,
    "siglip": siglip,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.model().save_pretrained(folder / "ours")
    tiny_models.processor().save_pretrained(folder / "ours")
    model, processor = clip()
    model.save_pretrained(folder / "clip")
    processor.save_pretrained(folder / "clip")
    model.save_pretrained(folder / "bare")
    for part in siglip():
        part.save_pretrained(folder / "siglip")
    tiny_models.model(seed=1).text_model.save_pretrained(folder / "llm")
    (folder / "training").mkdir()
    (folder / "training" / "results.json").write_text('{"train": {"loss": 1.0}}')
    write_image_folder(folder / "data")
    return folder


def run_and_read(output_dir: Path, *arguments: Any) -> dict[str, Any]:
    argv = ["evaluate", "--device", "cpu", "--pictures", "false", "--output_dir", output_dir, *arguments]
    assert cli.main([str(each) for each in argv]) == 0
    return json.loads((output_dir / "results.json").read_text())


def loaded_image_processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder).image_processor


@pytest.mark.parametrize("name", list(MODELS))
def test_any_model_by_the_same_command(
    folders: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flowers = write_parquet(tmp_path / "flowers.parquet", {"label": ["a", "b", "a"]}, tmp_path / "source")
    tasks = [f"retrieval:{folders / 'data'}", f"zero-shot:{flowers}", f"cra:{folders / 'data' / 'metadata.jsonl'}"]
    out = tmp_path / "out"
    argv = ["evaluate", "--model", str(folders / name), "--output_dir", str(out), "--device", "cpu", "--tasks", *tasks]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "results.json").read_text())
    model, processor = MODELS[name]()
    images = [picture(number) for number in range(len(CAPTIONS))]
    expected = evaluate_retrieval(model, images, CAPTIONS, processor=processor)
    retrieval, zero_shot, captions = record["tasks"].values()
    assert retrieval["metrics"] == pytest.approx(expected)
    assert (zero_shot["counts"]["classes"], captions["counts"]["captions"]) == (2, 15)
    assert record["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["model"]["model_type"] == model.config.model_type
    # Without torchvision, transformers has PIL's classes only.
    assert record["model"]["image_processor"] == type(loaded_image_processor(folders / name)).__name__
    assert record["model"]["image_processor_backend"] == loaded_image_processor(folders / name).backend
    assert {"llm2clip_hf", "torch", "transformers"} <= record["versions"].keys()
    assert record["hardware"]["device"] == "cpu" and record["command"].startswith("llm2clip")
    names = {path.name for path in out.iterdir()}
    galleries = {f"gallery-{task.replace('/', '-')}.png" for task in list(record["tasks"])[:2]}
    assert names == {"results.json", "recall.png", *galleries}
    # The tables come from the file alone.
    assert cli.main(["evaluate", "--show", str(out)]) == 0
    assert printed.startswith(capsys.readouterr().out.rstrip())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "bare", "--tasks", "DATA"], "no processor with an image processor and a tokenizer"),
        (["--model", "clip", "--tasks", "koko"], "no task or file `koko`"),
        (["--model", "clip", "--tasks", "urban1k"], "Task `urban1k` has no data"),
        (["--model", "clip", "--text_model", "clip", "--tasks", "DATA"], "a text encoder of its own"),
        (["--model", "clip"], "at least one of `--tasks`"),
        (["--model", "ours", "--text_model", "llm", "--text_embeddings", "s", "--tasks", "DATA"], "Give one of"),
        (["--show", "nowhere"], "`nowhere` does not exist. Give a folder"),
        (["--show", "training"], "results.json` is no result of `llm2clip evaluate`"),
    ],
)
def test_failures_are_one_line_and_write_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folders)
    monkeypatch.delenv("LLM2CLIP_DEBUG", raising=False)
    argv = [str(folders / "data") if argument == "DATA" else argument for argument in arguments]
    assert cli.main(["evaluate", *argv, "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llm2clip evaluate: ValueError: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_processor_from_elsewhere_serves(folders: Path) -> None:
    argv = ["evaluate", "--model", str(folders / "bare"), "--processor", str(folders / "clip")]
    assert cli.main([*argv, "--tasks", str(folders / "data"), "--max_images", "3"]) == 0


@pytest.mark.parametrize("given", [[], ["--revision", "main"]])
def test_a_result_names_the_commit_of_a_repository(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    shutil.copytree(folders / "clip", cached_repository(tmp_path, "org/clip"), dirs_exist_ok=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    argv = ["--model", "org/clip", "--tasks", folders / "data", "--max_images", 2, *given]
    record = run_and_read(tmp_path / "out", *argv)["model"]
    assert (record["name"], record["revision"]) == ("org/clip", COMMIT)


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--list_tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["urban1k", "retrieval", "1000", "images", "local", "copy", "only"] for line in lines)
    assert any(line.startswith("docci") and line.endswith("Hub: not-lain/docci") for line in lines)


def test_the_cache_serves_a_second_run(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["evaluate", "--model", folders / "ours", "--tasks", folders / "data", "--cache_dir", tmp_path / "cache"]

    def metrics(name: str) -> dict[str, float]:
        assert cli.main([str(each) for each in [*argv, "--output_dir", tmp_path / name]]) == 0
        [record] = json.loads((tmp_path / name / "results.json").read_text())["tasks"].values()
        return record["metrics"]

    first = metrics("first")
    monkeypatch.setattr(cached_encoding, "encode_images", None)
    monkeypatch.setattr(cached_encoding, "encode_texts", None)
    assert metrics("second") == first


# Columns of a table, the options of `embed-captions`, and the settings of the task.
STORED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "captions": ({"captions": CAPTIONS}, [], ""),
    "several columns": (
        {"real": [texts[0] for texts in CAPTIONS], "dense": [texts[1:] for texts in CAPTIONS]},
        ["--caption_columns", "real", "dense"],
        "?caption_columns=real,dense",
    ),
    "first captions": ({"captions": CAPTIONS}, [], "?first_captions=2&captions_per_image=2"),
}


@pytest.mark.parametrize("case", list(STORED))
def test_embed_captions_serves_the_task_of_the_same_table(folders: Path, tmp_path: Path, case: str) -> None:
    columns, embed_options, settings = STORED[case]
    table = write_parquet(tmp_path / "t.parquet", columns, tmp_path / "source")
    embed = ["embed-captions", "--llm", folders / "ours", "--data", table, "--output_dir", tmp_path / "store"]
    embed += ["--store_dtype", "float32", "--device", "cpu", *embed_options]
    assert cli.main([str(each) for each in embed]) == 0
    run = ["--model", folders / "ours", "--tasks", f"retrieval:{table}{settings}"]
    for more in ([], ["--max_images", 3])[: 1 + (case == "captions")]:
        [expected] = run_and_read(tmp_path / "tokens", *run, *more)["tasks"].values()
        stored = run_and_read(tmp_path / "stored", *run, *more, "--text_embeddings", tmp_path / "store")
        [record] = stored["tasks"].values()
        assert record["metrics"] == pytest.approx(expected["metrics"])
        assert record["stored_texts"] and not expected["stored_texts"]
        assert len(record["text_fingerprint"]["weights_sha256"]) == 64
        assert "text_dtype" not in stored["model"]  # the LLM stayed away


def test_embeddings_of_another_llm_are_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        tiny_models.model(seed=seed).save_pretrained(tmp_path / f"model{seed}")
        tiny_models.processor().save_pretrained(tmp_path / f"model{seed}")
        embed = ["embed-captions", "--llm", tmp_path / f"model{seed}", "--data", folders / "data", "--device", "cpu"]
        assert cli.main([str(each) for each in [*embed, "--output_dir", tmp_path / f"store{seed}"]]) == 0
    # As training on `store0` leaves it.
    config = json.loads((tmp_path / "model0" / "config.json").read_text())
    index = json.loads((tmp_path / "store0" / "index.json").read_text())
    config["text_fingerprint"] = index["fingerprint"]
    (tmp_path / "model0" / "config.json").write_text(json.dumps(config))
    run = ["--model", tmp_path / "model0", "--tasks", folders / "data", "--text_embeddings"]
    assert run_and_read(tmp_path / "out", *run, tmp_path / "store0")["tasks"]
    capsys.readouterr()
    argv = ["evaluate", *run, tmp_path / "store1", "--output_dir", tmp_path / "other"]
    assert cli.main([str(each) for each in argv]) == 1
    error = capsys.readouterr().err
    assert "another text encoder than the one that the model was trained with" in error and "weights_sha256" in error
    assert not (tmp_path / "other").exists()


def test_an_llm_from_elsewhere_and_its_type_are_recorded(folders: Path, tmp_path: Path) -> None:
    run = ["--model", folders / "ours", "--tasks", folders / "data"]
    record = run_and_read(tmp_path / "out", *run, "--text_model", folders / "llm")
    model = tiny_models.model()
    model.text_model.load_state_dict(tiny_models.model(seed=1).text_model.state_dict())
    images = [picture(number) for number in range(len(CAPTIONS))]
    expected = evaluate_retrieval(model, images, CAPTIONS, processor=tiny_models.processor())
    assert next(iter(record["tasks"].values()))["metrics"] == pytest.approx(expected)
    assert record["model"]["text_model"] == str(folders / "llm")
    assert (record["model"]["dtype"], record["model"]["text_dtype"]) == ("float32", "float32")
    half = run_and_read(tmp_path / "half", *run, "--dtype", "bfloat16")
    assert (half["settings"]["dtype"], half["model"]["text_dtype"]) == ("bfloat16", "bfloat16")
    loaded = LLM2CLIPModel.from_pretrained(folders / "ours", dtype=torch.bfloat16)
    assert half["model"]["dtype"] == str(loaded.visual_projection.weight.dtype).removeprefix("torch.")


def test_one_task_in_a_config_file_is_a_list_of_one(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {folders / 'clip'}\ntasks: {folders / 'data'}\n")
    assert len(run_and_read(tmp_path / "out", "--config", tmp_path / "run.yaml")["tasks"]) == 1


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_reports(folders: Path, tmp_path: Path) -> None:
    flowers = write_parquet(tmp_path / "flowers.parquet", {"label": ["a", "b", "a"]}, tmp_path / "source")
    argv = ["evaluate", "--model", folders / "ours", "--device", "cpu", "--batch_size", "2", "--tasks"]
    argv += [folders / "data", f"zero-shot:{flowers}", "--cache_dir", tmp_path / "cache", "--output_dir"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llm2clip_hf"]
    command = [sys.executable, "-m", *launch, *map(str, [*argv, tmp_path / "two"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written   ") == 4  # results.json and three pictures, by one process
    assert cli.main([str(each) for each in [*argv, tmp_path / "one"]]) == 0
    two, one = (json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("two", "one"))
    for task, record in one.items():
        assert two[task]["metrics"] == pytest.approx(record["metrics"], abs=1e-6), task
