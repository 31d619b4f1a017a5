# SPDX-License-Identifier: Apache-2.0
"""The cards: of released checkpoints, as committed, and of converted folders."""

import re
from pathlib import Path

import original_models as original
import pytest
import torch
from huggingface_hub import ModelCard

from llm2clip_hf import LLM2CLIPConfig
from llm2clip_hf.cli import main as cli
from llm2clip_hf.hub import convert_checkpoint
from llm2clip_hf.hub.checkpoint_files import RELEASED, find_release
from llm2clip_hf.hub.conversion_card import ConversionFacts, render_conversion_card, write_released_cards


CARDS = Path(__file__).resolve().parents[2] / "model_cards"


def test_committed_cards_are_those_of_the_table(tmp_path: Path) -> None:
    written = {path.relative_to(tmp_path): path.read_text() for path in write_released_cards(tmp_path)}
    committed = {path.relative_to(CARDS): path.read_text() for path in CARDS.rglob("*.md")}
    assert committed == written, "render them again: `write_released_cards('model_cards')` of hub.conversion_card"


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
    facts = ConversionFacts("laion/CLIP", "starting tower, clip", "some-org/LLM", "bundled", 54, config, None)
    text = render_conversion_card(facts)
    assert "**untrained**: 54 weights" in text
    assert "llm2clip convert laion/CLIP OUTPUT_DIR --text-model some-org/LLM --text-weights bundled" in text
    assert ModelCard(text).data.pipeline_tag == "zero-shot-image-classification"
    release = RELEASED[-1]
    text = render_conversion_card(
        ConversionFacts(release.repo_id, "LLM", None, "none", 0, None, release, "<s>{text}\n")
    )
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
