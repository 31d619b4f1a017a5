# SPDX-License-Identifier: Apache-2.0
"""The documentation keeps up with the code: its Python, its command lines, its links, and how docstrings are shown."""

import ast
import contextlib
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import evaluation_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
import yaml
from original_models import SIZES, make, write_folder
from shard_files import image_bytes, write_tar
from tiny_data import write_training_files
from transformers import AutoModel

from llm2clip_hf.cli import main as cli
from llm2clip_hf.cli.main import VERBS
from llm2clip_hf.demo import app


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
        inline = [match.replace("\n", " ") for match in re.findall(r"`(llm2clip [^`]+)`", prose(path))]
        for lines, is_inline in (("\n".join(blocks(path, "bash")), False), ("\n".join(inline), True)):
            for words in calls(lines):
                yield pytest.param(words, is_inline, id=f"{path.stem}: {' '.join(words)}"[:90])


def calls(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if "llm2clip" in line else []
        for name in ("llm2clip", "llm2clip_hf"):
            start = words.index(name) + 1 if name in words else 0
            is_call = start == 1 or (start > 1 and words[start - 2] == "-m")
            if is_call and "VERB" not in words:
                yield words[start:]


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
    read_options: Callable[..., Any],
) -> None:
    verb, *rest = words
    assert verb in VERBS
    monkeypatch.chdir(tmp_path)
    if "--config" in rest:
        Path(rest[rest.index("--config") + 1]).write_text(yaml.safe_dump(CONFIGS[verb]))
    status: Any = 0
    try:
        read_options(verb, rest)
    except SystemExit as stop:
        status = stop.code
    # A sentence may name a verb, or one of its options, without all that it needs.
    told = capsys.readouterr().err
    assert not status or (inline and re.search(r"missing --|(is|are) required", told)), told


# ------------------------------------------------------------------- the commands, on small stand-ins of their files

# What makes a run small; all else is as the page says.
TRAINING = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu", "True", "--report_to", "none"]
SMALL = {
    "train-captions": [*TRAINING, "--num_test_images", "4"],
    "train-clip": TRAINING,
    "embed-captions": ["--device", "cpu"],
    "evaluate": ["--device", "cpu", "--max_images", "4"],
}


def run_small(*words: str) -> None:
    more = [] if "--show" in words else SMALL.get(words[0], [])
    if words[1] == "open_clip_pytorch_model.bin":
        more = ["--text-model", "llm"]  # an adaptor of that width, where it is new
    assert cli.main([*words, *more]) == 0, words


def benchmark(path: Path, count: int, captions: int) -> None:
    """As many rows as a benchmark must have, all of a few images."""
    path.parent.mkdir(exist_ok=True)
    images = [{"bytes": image_bytes(number), "path": None} for number in range(3)]
    texts = [[f"a photo {row} {k}" for k in range(captions)] for row in range(count)]
    pq.write_table(pa.table({"image": [images[row % 3] for row in range(count)], "captions": texts}), path)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands of the pages name, models of the Hub as folders of that name."""
    folder = tmp_path_factory.mktemp("stand-ins")
    write_training_files(folder)
    for name in ("meta-llama/Llama-3.2-1B-Instruct", "path/to/its/LLM"):
        shutil.copytree(folder / "llm", folder / name)
    for name in ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14"):
        for part in evaluation_data.clip():
            part.save_pretrained(folder / name)
    AutoModel.from_pretrained(folder / "llm").save_pretrained(
        folder / "microsoft" / "LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
    )
    tiny_models.llama3_tokenizer().save_pretrained(folder / "microsoft" / "LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned")
    sizes = {**SIZES, "width": 24, "llm": tiny_models.TEXT_WIDTH}
    clip = make("openai", 0, sizes)
    write_folder(folder / "microsoft" / "LLM2CLIP-Openai-L-14-336", clip)
    torch.save(make("eva02", 0, sizes).weights, folder / "LLM2CLIP-EVA02-L-14-336.pt")
    tower = {name: value for name, value in clip.weights.items() if not name.startswith("text.")}
    torch.save(tower, folder / "open_clip_pytorch_model.bin")
    stated = {"layers": 2, "head_width": 8, "image_size": sizes["image"]}
    settings = {"model_cfg": {"embed_dim": 22, "quick_gelu": True, "vision_cfg": stated}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))

    (folder / "train.parquet").rename(folder / "pairs.parquet")
    shutil.copy(folder / "pairs.parquet", folder / "test.parquet")
    for split in ("train", "validation", "test"):
        (folder / "org" / "name").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "pairs.parquet", folder / "org" / "name" / f"{split}.parquet")
    evaluation_data.write_image_folder(folder / "photos")
    (folder / "cc3m").mkdir()
    for number in range(288):
        record = json.dumps({"longSV_captions": [f"a long caption {number}"]}).encode()
        contents = {"png": image_bytes(number), "txt": f"a caption {number}".encode(), "json": record}
        write_tar(folder / "cc3m" / f"{number:05d}.tar", [(f"{number}.{end}", each) for end, each in contents.items()])
    evaluation_data.write_parquet(folder / "flowers.parquet", {"label_name": ["x", "y", "x"]}, folder / "source")
    emoji = {"names": [["red", "rot"], ["green", "gruen"], ["blue", "blau"]], "split": ["test"] * 3}
    emoji["languages"] = [["en", "de"]] * 3
    (folder / "flowers").mkdir()
    shutil.copy(folder / "flowers.parquet", folder / "flowers" / "test.parquet")
    columns = {"raw_caption": [f"a {k}" for k in range(20)], "longSV_captions": [f"a long {k}" for k in range(20)]}
    pq.write_table(pa.table(columns), folder / "cc3m.parquet")
    rows = [{"query": f"what is {k}?", "positive": f"a {k}"} for k in range(9)]
    (folder / "nq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext.txt").write_text("".join(f"The number of this long line is {k}.\n" for k in range(9)))
    evaluation_data.write_parquet(folder / "emoji.parquet", emoji, folder / "source")
    for root in ("benchmarks", "data"):
        for name, *counts in (("flickr30k", 1000, 5), ("coco", 5000, 5), ("urban1k", 1000, 1)):
            benchmark(folder / root / f"{name}.parquet", *counts)
    (folder / "stage2.yaml").write_text(
        "vision_model: openai/clip-vit-large-patch14-336\ntext_model: llm-cc\ndata: pairs.parquet\n"
        "output_dir: llm2clip\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        llm = "meta-llama/Llama-3.2-1B-Instruct"
        captions = "photos/metadata.jsonl"
        run_small("train-captions", "--llm", llm, "--captions", "captions.jsonl", "--output_dir", "llm-cc")
        run_small("train-clip", "--config", "stage2.yaml")
        run_small("embed-captions", "--llm", "llm-cc", "--captions", captions, "--output_dir", "photos-embeddings")
        words = ["--model", "llm2clip", "--tasks", "photos/", "--output_dir", "results/llm2clip", "--device", "cpu"]
        assert cli.main(["evaluate", *words]) == 0  # of all images: a card takes no other results
    shutil.copy(folder / "results" / "llm2clip" / "results.json", folder / "results.json")
    return folder


def output_of(words: list[str]) -> str | None:
    if words[0] == "convert":
        return words[2]
    if "--config" in words:
        return "llm2clip"
    return words[words.index("--output_dir") + 1] if "--output_dir" in words else None


# In the text too, where a sentence gives more than the name of a verb. Files of `gguf` are tried where conversion is.
RUN = [
    pytest.param(case.values[0], id=case.id)
    for case in command_lines()
    if len(case.values[0]) > 1 and not case.values[0][1].endswith(".gguf")
]


@pytest.fixture
def workplace(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with links to all stand-ins."""
    for entry in stand_ins.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", RUN)
def test_command_lines_run(words: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = output_of(words)
    if output is not None:
        (workplace / output.split("/")[0]).unlink(missing_ok=True)
    if words[0] == "demo":
        # A page in the browser, of what `make demo` has trained.
        monkeypatch.setattr(app, "import_gradio", lambda: None)
        monkeypatch.setattr(app, "launch_app", lambda index, **address: None)
        if "--model" not in words:
            monkeypatch.setattr(app, "load_index", lambda *args, **kwargs: None)
    if "FOLDER" in words:
        shutil.copytree("photos-embeddings" if "--verify" in words else "llm2clip", "FOLDER")
    run_small(*words)
    if output is not None:
        assert Path(output).is_dir() == ("--check" not in words)


def test_config_files_run(workplace: Path) -> None:
    for path in PAGES:
        for block in blocks(path, "yaml"):
            (workplace / "page.yaml").write_text(block)
            if "sources" in yaml.safe_load(block):
                (workplace / "llm-cc").unlink()
                run_small("train-captions", "--config", "page.yaml", "--check")
                run_small("train-captions", "--config", "page.yaml")
            else:
                run_small("evaluate", "--model", "llm2clip", "--tasks", "page.yaml")
    assert (workplace / "llm-cc" / "results.json").is_file()


def test_forms_of_captions_are_read_as_the_page_says(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image_id": row // 2, "id": row, "caption": f"a photo {row}"} for row in range(40)]
    (workplace / "captions_val2017.json").write_text(json.dumps({"images": [], "annotations": rows}))
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(workplace / "saved")
    by_image = ["--image_column", "image_id"]
    forms = [["captions_val2017.json"], ["rows.jsonl", *by_image], ["saved", "--split", "train", *by_image]]
    text = (ROOT / "docs" / "own_data.md").read_text()
    for words in ("captions_val2017.json", "--image_column image_id", "--captions org/name --split train"):
        assert f"`{words}`" in text
    for number, form in enumerate(forms):
        run_small("embed-captions", "--llm", "llm-cc", "--captions", *form, "--output_dir", f"store{number}")
        assert "captions  40 of 20 images" in capsys.readouterr().out
        run_small("train-captions", "--llm", "llm", "--captions", *form, "--output_dir", "out", "--check")
        assert "captions: 16 rows" in capsys.readouterr().out


def test_options_in_prose_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        for option in ("--help", "--help-all"):
            with contextlib.suppress(SystemExit):  # some verbs have `--help` alone
                cli.main([verb, option])
    printed = capsys.readouterr().out
    known = set(re.findall(r"--[a-z][\w-]*", printed)) | {"--num_processes"}  # of `accelerate launch`
    for path in PAGES:
        if not path.stem.startswith("coming_from"):  # which names options of others
            code = " ".join(re.findall(r"`([^`]+)`", prose(path)))
            assert set(re.findall(r"--[a-z][\w-]*", code)) <= known, path


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


def test_files_of_the_architecture_page_exist() -> None:
    names = re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(names) > 40
    for name in names:
        assert (ROOT / name).exists() or list((ROOT / "src").rglob(name)), name


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


# ---------------------------------------------------------------------------------------------------------- the README

README = (ROOT / "README.md").read_text()


def test_listed_files_exist() -> None:
    tree = README.split("## Files")[1].split("```")[1]
    for line in tree.splitlines():
        name = line.strip().split(" ")[0]
        if name.endswith("/") and not name.startswith("src"):
            place = ROOT / "src/llm2clip_hf" if line.startswith("  ") else ROOT
            assert (place / name).is_dir(), name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    """The three blocks in order, as one script, on tiny models; only names, paths and batch sizes are exchanged."""
    pytest.importorskip("sentence_transformers")
    images = write_training_files(tmp_path)
    (tmp_path / "scene.png").write_bytes(Path(images[0]).read_bytes())
    use, train, evaluate = blocks(ROOT / "README.md", "python")
    exchanged = {
        '"meta-llama/Llama-3.2-1B-Instruct"': '"llm"',
        '"openai/clip-vit-large-patch14-336"': '"vision"',
        'CaptionContrastiveTrainingArguments("cc")': (
            'CaptionContrastiveTrainingArguments("cc", per_device_train_batch_size=4, report_to=[])'
        ),
        'LLM2CLIPTrainingArguments("clip")': (
            'LLM2CLIPTrainingArguments("clip", per_device_train_batch_size=4, num_train_epochs=1, report_to=[])'
        ),
        'path = "demo_output/model"': 'path = "llm2clip"',
    }
    script = "\n".join(
        [
            train,
            "images, captions, labels, class_names = train.images, train.captions, [0, 1] * 10, ['red sea', 'boat']",
            evaluate,
            use,
        ]
    )
    for old, new in exchanged.items():
        assert old in script, old
        script = script.replace(old, new)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"tensor\(\[\[.*, .*\]\]\)", done.stdout), done.stdout
