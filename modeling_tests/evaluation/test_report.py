# SPDX-License-Identifier: Apache-2.0
"""The view of a result: the paper's Table 1 from a stored result, pictures of its numbers, model-card entries."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import picture
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from llm2clip_hf.evaluation.tasks.pictures import draw_gallery, draw_languages, draw_recalls, write_pictures
from llm2clip_hf.evaluation.tasks.report import ENGLISH_SETS, PUBLISHED, format_report, to_eval_results
from llm2clip_hf.evaluation.tasks.runner import Evaluation, GalleryRow


STORED = Path(__file__).resolve().parents[1] / "helpers" / "evaluation_results.json"

# The paper's Table 1 (version 6) with averages computed from the columns, and the stored result below it.
TABLE_1 = """\
model                          tower            Flickr30k       COCO ShareGPT4V-1k    Urban1k      DOCCI        avg
-------------------------------------------------------------------------------------------------------------------
CLIP                           B/16-224         82.3/62.2  52.4/33.1     84.5/79.8  67.5/53.1  60.7/57.1  69.5/57.1
CLIP + LLM2CLIP-15M            B/16-224         91.8/80.7  64.8/52.4     97.8/97.6  90.1/92.1  86.1/86.9  86.1/81.9
EVA02                          B/16-224         86.2/71.5  58.7/42.1     90.5/85.5  67.0/60.8  67.7/68.0  74.0/65.6
EVA02 + LLM2CLIP-15M           B/16-224         91.2/81.4  66.0/53.9     98.5/98.5  88.2/91.3  86.8/88.5  86.1/82.7
CLIP                           L/14-224         85.2/65.0  56.3/36.5     84.2/83.6  68.3/55.6  63.1/65.8  71.4/61.3
CLIP + LLM2CLIP-15M            L/14-224         93.0/83.5  67.4/56.4     98.7/98.6  91.5/94.1  88.3/90.4  87.8/84.6
EVA02                          L/14-224         89.7/77.3  63.7/47.5     91.9/89.3  73.3/68.5  73.5/75.0  78.4/71.5
EVA02 + LLM2CLIP-3M            L/14-224         94.3/84.3  65.2/56.0     98.0/98.0  91.0/94.7  87.8/90.7  87.3/84.7
EVA02 + LLM2CLIP-15M           L/14-224         94.6/85.0  69.5/58.3     98.9/99.1  93.6/95.7  89.8/91.2  89.3/85.9
EVA02 + LLM2CLIP-60M           L/14-224         95.9/85.1  71.7/58.5     99.2/99.2  95.2/97.0  90.1/92.0  90.4/86.4
Long-CLIP                      L/14-224         90.0/76.2  62.8/46.3     97.2/97.3  82.5/86.1  66.5/78.6  79.8/76.9
CLIP                           L/14-336         87.7/67.0  58.0/37.1     86.2/84.0  72.8/57.0  67.4/65.7  74.4/62.2
CLIP + LLM2CLIP-15M            L/14-336         91.2/82.1  65.5/53.6     98.1/98.4  90.3/93.2  87.7/89.0  86.6/83.3
CLIP + LLM2CLIP-60M            L/14-336         93.9/84.3  68.5/54.8     98.9/99.1  96.6/97.9  89.6/91.6  89.5/85.5
EVA02                          L/14-336         89.6/78.0  64.2/47.9     91.5/89.4  76.6/70.0  74.7/76.4  79.3/72.3
EVA02 + LLM2CLIP-15M           L/14-336         94.7/85.1  69.7/58.5     98.8/99.2  93.5/96.2  89.2/91.3  89.2/86.1
EVA02 + LLM2CLIP-60M           L/14-336         95.9/85.4  72.4/58.8     98.8/99.2  95.5/97.3  90.7/92.6  90.7/86.7
SigLIP2                        So400m/14-224    93.9/82.9  72.0/55.5     90.2/87.2  75.7/74.5  77.0/78.9  81.8/75.8
SigLIP2 + LLM2CLIP-60M         So400m/14-224    95.2/84.6  73.7/57.6     99.4/99.4  96.2/97.3  91.5/92.9  91.2/86.4
EVA02 + LLM2CLIP, released     L/14-336                 -          -             -  96.0/97.5          -          -
EVA02 + LLM2CLIP-1B, released  L/14-336                 -          -             -  93.6/94.1          -          -
-------------------------------------------------------------------------------------------------------------------
LLM2CLIP-EVA02-L-14-336        this run         95.9/85.4  72.4/58.8     98.8/99.2  95.5/97.3  90.7/92.6  90.7/86.7
R@1 in percent, image to text/text to image.
avg: mean of the five sets, computed from the columns; some averages printed in the paper's Table 1 are not."""


def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text())


def recalls(first: float, step: float = 0.01) -> dict[str, float]:
    values = {}
    for direction, lower in (("image_to_text", 0.0), ("text_to_image", 0.1)):
        for number, k in enumerate((1, 5, 10)):
            values[f"{direction}_recall@{k}"] = first - lower + number * step
        values |= {f"{direction}_median_rank": 2.0, f"{direction}_mean_rank": 3.0}
    return values


def test_table_1_is_rebuilt_from_a_stored_result() -> None:
    assert format_report(stored()).split("\n\n")[0] == TABLE_1


def test_every_row_of_table_1_is_reproduced_as_a_result() -> None:
    """A result with the paper's numbers prints as the paper's row."""
    printed = TABLE_1.splitlines()
    full = [row for row in PUBLISHED if set(ENGLISH_SETS) <= set(row.scores)]
    assert len(full) == 19
    for row in full:
        record = stored()
        for name, (image_to_text, text_to_image) in row.scores.items():
            record["tasks"][name]["metrics"]["image_to_text_recall@1"] = image_to_text / 100
            record["tasks"][name]["metrics"]["text_to_image_recall@1"] = text_to_image / 100
        own = format_report(record).splitlines()[len(printed) - 3].split()[-6:]
        [theirs] = [line for line in printed if line.startswith(f"{row.model:<29}  {row.tower} ")]
        assert own == theirs.split()[-6:]


def test_partial_and_own_results_stand_alone() -> None:
    record = stored()
    for task in record["tasks"].values():
        task["partial"] = True
    text = format_report(record)
    assert "SigLIP2" not in text and "coco: 5000 images, 25000 captions, PARTIAL" in text
    assert "SigLIP2" not in format_report(stored(), with_published=False)
    with pytest.raises(ValueError, match="`flickr30k` is of a part of the images"):
        to_eval_results(record)


def test_all_kinds_of_tasks_are_printed() -> None:
    record = stored()
    base = record["tasks"].pop("coco")
    languages = {"de": recalls(0.8), "en": recalls(0.5)}
    kinds = {
        "xm3600": {"kind": "cross-lingual", "published": "xm3600", "metrics": recalls(0.65), "languages": languages},
        "imagenet": {"kind": "zero-shot", "published": "imagenet", "metrics": {"zero_shot_top1": 0.731}},
        "cra": {
            "kind": "cra",
            "published": "cra",
            "metrics": {"caption_retrieval_accuracy": 0.288, "num_images": 9.0},
        },
        "own": {"kind": "retrieval", "published": None, "metrics": recalls(0.3), "skipped": {"rows": 2}},
    }
    record["tasks"] = {name: base | change for name, change in kinds.items()}
    lines = format_report(record).splitlines()
    assert [line.split()[-1] for line in lines if "this run" in line] == ["65.0/55.0", "73.1", "28.8"]
    assert any(line.split() == ["de", "80.0/70.0", "en", "50.0/40.0"] for line in lines)
    assert "  left out: rows 2" in lines
    assert "  image to text   R@1  30.0   R@5  31.0   R@10  32.0   median rank 2" in lines


def test_entries_of_a_model_card_survive_the_round_trip() -> None:
    record = stored()
    record["tasks"]["docci"]["fingerprint"] = {"revision": "abc"}
    results = to_eval_results(record)
    assert len(results) == 10
    assert (results[2].dataset_name, results[2].metric_value) == ("COCO", 72.4)
    assert (results[-1].dataset_type, results[-1].dataset_revision) == ("not-lain/docci", "abc")
    card = ModelCard(f"---\n{ModelCardData(model_name='m', eval_results=results).to_yaml()}\n---\n")
    again = [(entry.dataset_name, entry.metric_name, entry.metric_value) for entry in card.data.eval_results or []]
    assert sorted(again) == sorted((e.dataset_name, e.metric_name, e.metric_value) for e in results)


def test_bars_are_as_long_as_the_metrics() -> None:
    metrics = {"A": recalls(0.62), "B": recalls(0.35)}
    axes = draw_recalls(metrics, "model").axes[0]
    widths = {round(bar.get_width(), 6) for bar in axes.patches}
    assert widths == {round(100 * v, 6) for m in metrics.values() for key, v in m.items() if "recall" in key}
    assert {text.get_text() for text in axes.texts} >= {"62.0 / 63.0 / 64.0", "25.0 / 26.0 / 27.0"}
    languages = {"en": recalls(0.5), "zh-Hant": recalls(0.9)}
    axes = draw_languages(languages, "title").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["zh-Hant", "en"]  # the best first
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([90, 50, 80, 40])
    assert "image to text, mean 70.0" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_gallery_frames_the_right_images() -> None:
    rows = [
        GalleryRow("a boat", 1, [2, 1, 0], [0.9, 0.8, 0.1]),
        GalleryRow("a class", None, [0, 1, 2], [0.5, 0.4, 0.3], rights={0, 2}),
        GalleryRow("\u0995\u09be\u0995", None, [0, 1, 2], [0.5, 0.4, 0.3], label="bn"),
    ]
    figure = draw_gallery([picture(number) for number in range(3)], rows, "model")
    widths = [axes.patches[0].get_linewidth() for axes in figure.axes]
    assert [width > 2 for width in widths] == [False, True, False, True, False, True, False, False, False]
    assert (figure.axes[0].images[0].get_array()[0, 0] == picture(2).getpixel((5, 0))).all()


def test_pictures_are_written_per_run(tmp_path: Path) -> None:
    base = stored()["tasks"]["coco"]
    languages = {"de": recalls(0.8), "en": recalls(0.5)}
    results = {"coco": base, "own/x y": base | {"kind": "cross-lingual", "title": "own", "languages": languages}}
    galleries = {"coco": ([picture(0), picture(1)], [GalleryRow("a boat", 1, [1, 0], [0.9, 0.1])])}
    written = write_pictures(Evaluation(results, galleries), tmp_path, "model")
    assert [path.name for path in written] == ["recall.png", "languages-own-x-y.png", "gallery-coco.png"]
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 500
    assert sorted(tmp_path.iterdir()) == sorted(written)
