# SPDX-License-Identifier: Apache-2.0
"""`llm2clip evaluate` on LLM2CLIP and on CLIP, from folders: what it prints, what it writes, how it fails."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from evaluation_data import CAPTIONS, clip, picture, siglip, write_image_folder, write_parquet

from llm2clip_hf.cli import main as cli
from llm2clip_hf.evaluation import cached_encoding, evaluate_retrieval


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
    write_image_folder(folder / "data")
    return folder


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
        (["--show", "nowhere"], "`nowhere` cannot be read"),
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
