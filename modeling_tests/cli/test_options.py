# SPDX-License-Identifier: Apache-2.0
"""Options of the training verbs: config file, flags, help, mistakes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from llm2clip_hf.cli.options import parse_options, read_logit_scale


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
        (["--captions", "a", "b"], "unexpected argument b"),
        (["--captions", "a", "--num_workers", "many"], "invalid int value: 'many'"),
        (["--captions", "a", "--pooling", "sum"], "invalid choice: 'sum'"),
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
