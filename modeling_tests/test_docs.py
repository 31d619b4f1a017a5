# SPDX-License-Identifier: Apache-2.0
"""The documentation keeps up with the code: its Python, its command lines, its links, and how docstrings are shown."""

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from verb_parsing import Parsed, stop_after_parsing

from llm2clip_hf.cli.main import VERBS


ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
# What a config file that a command line names would hold, so that nothing is missing.
CONFIGS = {
    "train-captions": {"llm": "llm", "captions": "captions.jsonl", "output_dir": "out"},
    "train-clip": {"vision_model": "vision", "text_model": "llm", "data": ["data.parquet"], "output_dir": "out"},
    "evaluate": {"model": "model", "tasks": ["coco"]},
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def python_blocks() -> Iterator[Any]:
    for path in PAGES:
        for number, block in enumerate(blocks(path, "python"), 1):
            yield pytest.param(block, id=f"{path.parent.name}-{path.stem}-{number}")


def command_lines() -> Iterator[Any]:
    """Arguments of every call of the command, in blocks and between backticks."""
    for path in PAGES:
        lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
        inline = [match.replace("\n", " ") for match in re.findall(r"`(llm2clip [^`]+)`", prose(path))]
        for line in [*lines, *inline]:
            words = shlex.split(line, comments=True)
            for name in ("llm2clip", "llm2clip_hf"):
                start = words.index(name) + 1 if name in words else 0
                is_call = start == 1 or (start > 1 and words[start - 2] == "-m")
                if is_call and "VERB" not in words:
                    yield pytest.param(
                        words[start:], line in inline, id=f"{path.stem}: {' '.join(words[start:])}"[:90]
                    )


@pytest.mark.parametrize("block", list(python_blocks()))
def test_python_compiles_and_what_it_imports_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm2clip_hf"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize(("words", "inline"), list(command_lines()))
def test_command_lines_parse(
    words: list[str],
    inline: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb, *rest = words
    assert verb in VERBS
    monkeypatch.chdir(tmp_path)
    if "--config" in rest:
        Path(rest[rest.index("--config") + 1]).write_text(yaml.safe_dump(CONFIGS[verb]))
    module = stop_after_parsing(verb, monkeypatch)
    with pytest.raises((Parsed, SystemExit)) as stop:
        module.run(rest)
    if isinstance(stop.value, SystemExit) and stop.value.code != 0:
        # A sentence may name a verb, or one of its options, without all that it needs.
        told = capsys.readouterr().err
        assert inline and re.search(r"missing --|arguments are required", told), told


def test_unknown_options_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both kinds of verbs."""
    for verb in ("demo", "evaluate"):
        with monkeypatch.context() as patch:
            module = stop_after_parsing(verb, patch)
            with pytest.raises(SystemExit, match="2"):
                module.run(["--no-such-option"])


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.M)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading.strip().lower()) for heading in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(path)):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor and file.name == "reference.md":
            module, _, attribute = anchor.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), target
        elif anchor:
            assert anchor in anchors(file), f"{target}: {sorted(anchors(file))}"


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> Iterator[str]:
        for value in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from [value] if isinstance(value, str) else pages(value)

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages(settings["nav"])) == [path.name for path in DOCS]
    for name in settings["extra_css"]:
        assert (ROOT / "docs" / name).is_file()


def test_pages_load_nothing_from_elsewhere() -> None:
    for path in [*PAGES, *(ROOT / "docs" / "assets").glob("*.css"), *(ROOT / "docs" / "assets").glob("*.svg")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:img|script|link|iframe)[^>]*https?:|url\([\"']?https?:", text)
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False


def test_docstrings_are_made_readable_for_the_reference() -> None:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("doctest_blocks", ROOT / "docs" / "doctest_blocks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = """Sum of a [`Table`], see [`Table`](table.md).

    Args:
        width (`int`, *optional*, defaults to 4): columns.
        name (`str`, defaults to `"a, b"`): name.
        rows (`torch.Tensor` of shape `(N, D)`): numbers (of [`Row`]).
        rest (*optional*): more.
        plain: without a type.

Example:
>>> total(1)
1
"""
    after = """Sum of a `Table`, see [`Table`](table.md).

    Args:
        width (int): columns.
        name (str): name.
        rows (torch.Tensor of shape (N, D)): numbers (of `Row`).
        rest: more.
        plain: without a type.

**Example**

```pycon
>>> total(1)
1

```
"""
    shown = SimpleNamespace(docstring=SimpleNamespace(value=before))
    module.DoctestBlocks().on_instance(obj=shown)
    assert shown.docstring.value == after
