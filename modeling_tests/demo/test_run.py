# SPDX-License-Identifier: Apache-2.0
"""The demo's results: table, JSON and picture agree, and a tiny run's saved folder gives the reported figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from llm2clip_hf.demo.captions import caption, make_data
from llm2clip_hf.demo.report import (
    CRA_TITLES,
    MODEL_TITLES,
    RETRIEVAL_TITLES,
    STAGE_TITLES,
    draw_retrieval,
    format_table,
)
from llm2clip_hf.demo.scenes import render


def made_up_metrics() -> dict[str, Any]:
    """Every figure is another one, so that a cell in a wrong place shows."""
    values = iter(np.linspace(0.011, 0.989, 80).round(3).tolist())
    return {
        "split": "test",
        "seed": 0,
        "settings": {"num_held_out": 77},
        "caption_retrieval_accuracy": {
            when: {name: next(values) for name in CRA_TITLES} for when in ("before", "after")
        },
        "models": {
            model: {
                name: {"image_to_text_recall@1": next(values), "text_to_image_recall@1": next(values)}
                for name in RETRIEVAL_TITLES
            }
            | {"zero_shot": {"zero_shot_top1": next(values)}}
            for model in MODEL_TITLES
        },
        "seconds": {name: 3.0 + i for i, name in enumerate(STAGE_TITLES)},
    }


def cells(table: str, title: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.strip().startswith(title)]
    return line.strip().removeprefix(title).replace("/", " ").split()


def test_table_shows_what_the_metrics_hold() -> None:
    metrics = made_up_metrics()
    table = format_table(metrics)

    def shown(value: float) -> str:
        return f"{100 * value:.1f}"

    cra = metrics["caption_retrieval_accuracy"]
    for name, title in CRA_TITLES.items():
        assert cells(table, title) == [shown(cra["before"][name]), shown(cra["after"][name])]
    for name, title in RETRIEVAL_TITLES.items():
        expected = [
            shown(metrics["models"][model][name][f"{way}_recall@1"])
            for model in MODEL_TITLES
            for way in ("image_to_text", "text_to_image")
        ]
        assert cells(table, title) == expected
    zero_shot = [shown(metrics["models"][model]["zero_shot"]["zero_shot_top1"]) for model in MODEL_TITLES]
    assert cells(table, "Zero-shot accuracy, ten digits") == zero_shot
    for name, title in STAGE_TITLES.items():
        assert cells(table, title) == [f"{metrics['seconds'][name]:.0f}"]
    assert cells(table, "all") == [f"{sum(metrics['seconds'].values()):.0f}"]
    assert "77 scenes" in table


def test_picture_frames_the_right_image_only(tmp_path: Path) -> None:
    images = [Image.new("RGB", (12, 12), (value, value, value)) for value in (10, 20, 30)]
    queries = [("dense", "a small red seven", 1)]
    lime = {}
    for name, ranking in {"found": [0, 1], "missed": [0, 2]}.items():
        path = tmp_path / f"{name}.png"
        draw_retrieval(images, queries, {"cc_llm": [ranking], "clip_from_scratch": [[2, 0]]}, path)
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        lime[name] = int(((pixels - (0, 255, 0)) == 0).all(-1).sum())
    assert lime["found"] > 100
    assert lime["missed"] == 0


@pytest.mark.slow
def test_tiny_run_saves_a_model_that_gives_the_reported_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm2clip_hf.demo import DemoSettings, run_demo

    settings = DemoSettings(
        num_text=200,
        num_pairs=40,
        num_held_out=20,
        num_single=12,
        text_width=32,
        text_layers=2,
        vision_width=32,
        vision_layers=2,
        projection_dim=24,
        lm_steps=3,
        lm_batch_size=8,
        cc_steps=3,
        cc_batch_size=8,
        clip_steps=3,
        clip_batch_size=8,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reported = run_demo(tmp_path, seed=1, settings=settings)
        again = run_demo(tmp_path / "again", seed=1, settings=settings)
    finally:
        torch.set_num_threads(threads)
    for name in ("caption_retrieval_accuracy", "models", "settings"):
        assert again[name] == reported[name]
    assert json.loads((tmp_path / "metrics.json").read_text())["models"] == reported["models"]
    assert format_table(reported) in capsys.readouterr().out
    assert Image.open(tmp_path / "retrieval.png").size[0] > 500

    folder = tmp_path / "model"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    data = make_data(num_text=200, num_pairs=40, num_held_out=20, num_single=12, split="test", seed=1)
    for name, wording in {"dense": "english_dense", "dense_german": "german_dense"}.items():
        batch = processor(
            images=[render(scene) for scene in data.held_out],
            text=[caption(scene, wording) for scene in data.held_out],
        )
        with torch.no_grad():
            logits = model(**batch).logits_per_image
        right = torch.arange(len(logits))
        figures = reported["models"]["cc_llm"][name]
        assert (logits.argmax(1) == right).double().mean().item() == pytest.approx(figures["image_to_text_recall@1"])
        assert (logits.argmax(0) == right).double().mean().item() == pytest.approx(figures["text_to_image_recall@1"])
