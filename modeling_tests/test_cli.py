# SPDX-License-Identifier: Apache-2.0
"""The command line: exit status, help of every verb, one readable line on failure."""

import types

import pytest

from llm2clip_hf import __version__
from llm2clip_hf.cli import main as cli


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
    assert "--no-such-option" in capsys.readouterr().err


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
