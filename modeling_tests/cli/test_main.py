# SPDX-License-Identifier: Apache-2.0
"""The command line: exit status, help of every verb, one readable line on failure."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from llm2clip_hf import __version__
from llm2clip_hf.cli import main as cli
from llm2clip_hf.cli.options import parse_options, read_logit_scale


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Verb and arguments of every command line of a help text."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line) if re.match(r"  (llm2clip|accelerate launch) ", line) else []
        for name in ("llm2clip", "llm2clip_hf"):
            if name in words[:1] or name in words[1:] and words[words.index(name) - 1] == "-m":
                start = words.index(name)
                yield words[start + 1], words[start + 2 :]


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb, (_, line) in cli.VERBS.items():
        assert verb in text
        assert line in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"llm2clip {__version__}"


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert f"usage: llm2clip {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_unknown_option_is_wrong_usage(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--no-such-option"]) == 2
    assert "unknown option --no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_examples_of_the_help_parse(
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_options: Callable[..., Any],
) -> None:
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    examples = text[text.index("\nexamples:\n") :]
    # The config file that the examples name is the one that the help shows.
    config = "\n".join(line for line in examples.splitlines() if re.match(r"  +\w+:( |$)", line))
    found = list(calls(examples))
    assert found and {each for each, _ in found} == {verb}
    assert len(found) == len(re.findall(r"llm2clip(?:_hf)? (?=[a-z])", examples))
    monkeypatch.chdir(tmp_path)
    for _, arguments in found:
        if "--config" in arguments:
            Path(arguments[arguments.index("--config") + 1]).write_text(config)
        read_options(verb, arguments)


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["demo", "--fats"], "--fast"),
        (["demo", "--output_dr=x"], "--output_dir"),
        (["demo", "--app", "--trust-remote"], "--trust-remote-code"),
        (["convert", "a", "b", "--text_modle", "c"], "--text_model"),
        (["convert", "--text-weight", "bundled"], "--text-weights"),
        (["card", "x", "--chek"], "--check"),
        (["card", "--data-set", "x"], "--dataset"),
        (["evaluate", "--task", "coco"], "--tasks"),
        (["embed-captions", "--output-di", "x"], "--output-dir"),
    ],
)
def test_unknown_option_names_the_nearest(argv: list[str], nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert f"; did you mean `{nearest}`?" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert"], "SOURCE and OUTPUT_DIR are required"),
        (["convert", "a", "b", "c"], "unexpected argument c"),
        (["convert", "a", "b", "--text-weights", "none"], "invalid choice: 'none'"),
        (["card"], "FOLDER is required"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
        (["demo", "--images", "photos"], "--images belongs to --app"),
        (["demo", "photos"], "unexpected argument photos"),
    ],
)
def test_wrong_usage_of_a_verb(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_both_spellings_of_an_option(read_options: Callable[..., Any]) -> None:
    spellings = (["--output-dir", "a_b", "--seed=3"], ["--output_dir=a_b", "--seed", "3"])
    (first,), (second,) = (read_options("demo", argv) for argv in spellings)
    assert first == second and first.output_dir == "a_b"


def test_a_switch_does_not_take_the_folder_behind_it(tmp_path: Path, read_options: Callable[..., Any]) -> None:
    (tmp_path / "card.yaml").write_text("folder: a\nlicense: mit\n")
    config = ["--config", str(tmp_path / "card.yaml")]
    for argv in (["--check", "a"], ["a", "--check"], ["--check", "true", "a"], ["--check", "--name", "b", "a"]):
        [options] = read_options("card", [*argv, *config])
        assert (options.folder, options.check, options.license) == ("a", True, "mit")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["card", "nowhere"], "The folder `nowhere` does not exist"),
        (["convert", "./nowhere.pt", "out"], "'./nowhere.pt' is neither a file, nor a folder"),
        (["convert", "a.pt", "full"], "'full' holds other files"),
        (["convert", "a.pt", "a.txt"], "'a.txt' is a file. Give a folder."),
        (["demo", "--output-dir", "full"], "`full` holds other files, such as 'model'. Give a new or empty folder."),
        (["demo", "--output-dir", "a.txt"], "`a.txt` is a file. Give a folder."),
        (["demo", "--app", "--output-dir", "nowhere"], "There is no model `nowhere/model`"),
        (["demo", "--app", "--model", "m", "--images", "nowhere"], "The folder `nowhere` does not exist"),
        (["demo", "--app", "--model", "m", "--images", "pictures", "--captions", "c.txt"], "`c.txt` cannot be read"),
        (["evaluate", "--model", "m", "--tasks", "nowhere.parquet"], "no task or file `nowhere.parquet`"),
    ],
)
def test_paths_that_are_not_there_and_folders_that_are_full(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--app" in argv:
        pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM2CLIP_DEBUG", raising=False)
    Path("a.txt").write_text("mine")
    for name in ("full/model/diary.txt", "pictures/a.png"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_of_a_demo_is_used_again(tmp_path: Path) -> None:
    from llm2clip_hf.cli.demo import check_output

    check_output(tmp_path / "new")
    check_output(tmp_path)
    for name in ("stages", "model"):  # interrupted
        (tmp_path / name).mkdir()
    check_output(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        check_output(tmp_path)
    (tmp_path / "metrics.json").write_text('{"accuracy": 1.0}')
    with pytest.raises(ValueError, match="holds other files"):
        check_output(tmp_path)
    record = {"split": "test", "settings": {}, "caption_retrieval_accuracy": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    check_output(tmp_path)


def test_reader_that_has_seen_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from llm2clip_hf.cli.main import main; sys.exit(main(['evaluate', '--list_tasks']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert done.returncode == 1
    assert b"Broken" not in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(("code", "status", "told"), [(None, 0, ""), (3, 3, ""), ("no", 1, "llm2clip demo: no\n")])
def test_exit_of_a_library(
    code: Any, status: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> int:
        raise SystemExit(code)

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: types.SimpleNamespace(run=run))
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("argv", "message"), [([], "no verb given"), (["fly"], "unknown verb 'fly'"), (["evalute"], "mean 'evaluate'?")]
)
def test_wrong_verb(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(argv: list[str]) -> int:
        raise ValueError("`projection_dim` must be positive,\ngot 0.")

    monkeypatch.delenv("LLM2CLIP_DEBUG", raising=False)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: types.SimpleNamespace(run=run))
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "llm2clip demo: ValueError: `projection_dim` must be positive, got 0.\n"


# ------------------------------------------------------------------------------------- options, on made-up dataclasses


@dataclass
class Own:
    captions: str = field(metadata={"help": "Captions."})
    columns: list[str] | None = field(default=None, metadata={"help": "Columns."})
    pooling: Literal["mean", "last"] = field(default="mean", metadata={"help": "Pooling."})


@dataclass
class Training:
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak rate."})
    num_workers: int = field(default=0, metadata={"help": "Workers."})
    use_cpu: bool = field(default=False, metadata={"help": "CPU."})
    do_train: bool = field(default=False, metadata={"help": "Train."})


def parse(*argv: str) -> tuple[Any, ...]:
    return parse_options(
        argv,
        verb="train",
        description="Trains.",
        examples="  llm2clip train --captions a.jsonl",
        own=Own,
        training=Training,
        shown=("learning_rate",),
    )


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    # YAML 1.1 reads 1e-3 as a string.
    config.write_text("captions: a.jsonl\ncolumns: [raw, dense]\nlearning-rate: 1e-3\nuse_cpu: true\n")
    own, training = parse("--config", str(config), "--learning-rate", "5e-5")
    assert own == Own("a.jsonl", ["raw", "dense"])
    assert training == Training(5e-5, 0, True)
    own, training = parse(f"--config={config}", "--columns", "x", "--captions=b.jsonl")
    assert own == Own("b.jsonl", ["x"])
    assert training == Training(1e-3, 0, True)


def test_json_file_is_the_same(tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"captions": "a", "num_workers": 3}))
    assert parse("--config", str(config)) == (Own("a"), Training(num_workers=3))


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "missing --captions"),
        (["--captions", "a", "--learning_rat", "1"], "unknown option --learning_rat; did you mean `--learning_rate`?"),
        (["--captions", "a", "--do_train"], "--do_train has no effect on llm2clip train, which always trains"),
    ],
)
def test_wrong_usage_is_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("caption: a", "sets `caption`, which is no option; did you mean `captions`?"),
        ("captions: a\npooling: sum", "sets `pooling` to 'sum'; choose from mean, last"),
    ],
)
def test_wrong_key_in_the_file_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse("--config", str(tmp_path / "c.yaml"))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message", [("- a", "holds list"), ("a: [", "not valid YAML"), (None, "does not exist")]
)
def test_unreadable_file_is_an_error(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(path))


def test_help_shows_own_options_and_the_most_used_training_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--captions" in text and "--learning_rate" in text and "llm2clip train --captions a.jsonl" in text
    assert "--num_workers" not in text and "--learning-rate" not in text
    with pytest.raises(SystemExit):
        parse("--help-all")
    assert "--num_workers" in capsys.readouterr().out


def test_start_of_the_logit_scale() -> None:
    assert [read_logit_scale(value, "scale") for value in (None, "pretrained", "1.5")] == [None, "pretrained", 1.5]
    with pytest.raises(ValueError, match="`scale` must be a number or `pretrained`, got 'high'"):
        read_logit_scale("high", "scale")
