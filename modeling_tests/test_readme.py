# SPDX-License-Identifier: Apache-2.0
"""The README tells the truth: its Python runs, its files exist, its commands are those of the Makefile."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_links_and_listed_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
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
    from tiny_data import write_training_files

    images = write_training_files(tmp_path)
    (tmp_path / "scene.png").write_bytes(Path(images[0]).read_bytes())
    use, train, evaluate = python_blocks()
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
