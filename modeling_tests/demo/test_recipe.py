# SPDX-License-Identifier: Apache-2.0
"""The demo: scenes and captions are repeatable, split cleanly and true; table, picture and saved folder agree."""

import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from llm2clip_hf.cli.demo import idle_cores, share_cores
from llm2clip_hf.demo import captions as text
from llm2clip_hf.demo import report
from llm2clip_hf.demo.captions import (
    PAIRED,
    WORDINGS,
    DemoData,
    caption,
    dictionary_line,
    glossary,
    make_data,
    text_pairs,
)
from llm2clip_hf.demo.language_model import build_tokenizer
from llm2clip_hf.demo.report import (
    CRA_SETS,
    MODEL_TITLES,
    PICTURE_QUERIES,
    RETRIEVAL_SETS,
    STAGE_TITLES,
    format_table,
)
from llm2clip_hf.demo.scenes import (
    CELL,
    COLOURS,
    DIGITS,
    IMAGE_SIZE,
    PlacedDigit,
    Scene,
    digit_scans,
    render,
    sample_scenes,
    split_scans,
)
from llm2clip_hf.evaluation.tasks.pictures import draw_gallery


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes(400, split_scans()["train"], seed=3, num_digits=(1, 2, 3))


def small_data(split: str = "test", seed: int = 0) -> DemoData:
    return make_data(num_text=300, num_pairs=60, num_held_out=70, num_single=30, split=split, seed=seed)


# ------------------------------------------------------------------------------------------------------------ scenes


def test_scenes_follow_their_seed() -> None:
    scans = split_scans()["train"]
    assert sample_scenes(20, scans, seed=1) == sample_scenes(20, scans, seed=1)
    assert sample_scenes(20, scans, seed=1) != sample_scenes(20, scans, seed=2)
    assert small_data(seed=4) == small_data(seed=4)


def test_scans_are_split_without_overlap_and_by_digit() -> None:
    parts = split_scans()
    labels = digit_scans()[1]
    flat = [scan for part in parts.values() for scans in part for scan in scans]
    assert sorted(flat) == list(range(len(labels)))
    for part in parts.values():
        for digit, scans in enumerate(part):
            assert set(labels[scans]) == {digit}
    assert split_scans(0) != split_scans(1)


def test_held_out_scenes_and_scans_are_not_in_training() -> None:
    for split in ("test", "validation"):
        data = small_data(split)
        trained = {scene.facts for scene in data.text + data.pairs}
        assert not trained & {scene.facts for scene in data.held_out}
        used = {d.scan for scene in data.text + data.pairs for d in scene.digits}
        assert not used & {d.scan for scene in data.held_out + data.held_out_single for d in scene.digits}
    test, validation = small_data("test"), small_data("validation")
    assert not {s.facts for s in test.held_out} & {s.facts for s in validation.held_out}
    scans = [{d.scan for s in data.held_out + data.held_out_single for d in s.digits} for data in (test, validation)]
    assert not scans[0] & scans[1]


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_caption_identifies_its_held_out_scene(wording: str) -> None:
    told = [caption(scene, wording) for scene in small_data().held_out]
    assert len(set(told)) == len(told)


def test_digits_of_a_scene_differ(scenes: list[Scene]) -> None:
    assert {len(scene.digits) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        for values in zip(*[(d.digit, d.colour, (d.row, d.column)) for d in scene.digits]):
            assert len(set(values)) == len(scene.digits)


def test_a_picture_shows_the_scan_in_its_cell_and_colour() -> None:
    scan = int(np.flatnonzero(digit_scans()[1] == 4)[0])
    for size, colour, row, column in [("small", "red", 0, 2), ("large", "green", 2, 0)]:
        offset = (2, 2) if size == "small" else (0, 0)
        scene = Scene((PlacedDigit(4, colour, size, row, column, scan, offset),), noise_seed=5)
        empty = Scene((), noise_seed=5)
        shown, background = (np.asarray(render(s), dtype=float) for s in (scene, empty))
        assert shown.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        outside[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = False
        np.testing.assert_array_equal(shown[outside], background[outside])
        cell = shown[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        brightest = cell.reshape(-1, 3)[cell.sum(-1).argmax()]
        np.testing.assert_allclose(brightest, COLOURS[colour], atol=3)
        if size == "small":
            ink = digit_scans()[0][scan]
            window = cell[2:10, 2:10]
            np.testing.assert_allclose(window[ink == 1], np.broadcast_to(COLOURS[colour], window[ink == 1].shape))
        np.testing.assert_array_equal(np.asarray(render(scene)), shown)


# ---------------------------------------------------------------------------------- captions, read back word for word

GERMAN = ("Null", "Eins", "Zwei", "Drei", "Vier", "F\u00fcnf", "Sechs", "Sieben", "Acht", "Neun")
SPANISH = ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve")
GERMAN_COLOURS = {"rot": "red", "gr\u00fcn": "green", "blau": "blue", "gelb": "yellow", "wei\u00df": "white"}
GERMAN_COLOURS["violett"] = "purple"
SPANISH_COLOURS = {"rojo": "red", "verde": "green", "azul": "blue", "amarillo": "yellow", "blanco": "white"}
SPANISH_COLOURS["morado"] = "purple"
ENGLISH_COLOURS = {colour: colour for colour in COLOURS}
SIZE_WORDS = {"small": "small", "tiny": "small", "kleine": "small", "peque\u00f1o": "small"}
SIZE_WORDS |= {"large": "large", "huge": "large", "gro\u00dfe": "large", "grande": "large"}
# A word that occurs in a place and what it says of the row or the column; the middle is where nothing else is said.
ROW_WORDS = {"top": 0, "upper": 0, "north": 0, "oben": 0, "arriba": 0}
ROW_WORDS |= {"bottom": 2, "lower": 2, "south": 2, "unten": 2, "abajo": 2}
COLUMN_WORDS = {"left": 0, "west": 0, "links": 0, "izquierda": 0, "right": 2, "east": 2, "rechts": 2, "derecha": 2}

# Wording: (separator of clauses, pattern of a clause).
CLAUSES = {
    "english_dense": (r", | and (?=a )", r"a (?P<size>\w+) (?P<colour>\w+) (?P<digit>\w+) (?P<place>(at|on|in) .+)"),
    "english_corners": (r"; ", r"(?P<place>the .+) holds a (?P<colour>\w+) (?P<digit>\w+) of (?P<size>\w+) size"),
    "english_compass": (r"\. ", r"(?P<size>\w+), (?P<colour>\w+) and (?P<place>[\w ]+): (?P<digit>\w+)"),
    "german_dense": (r", ", r"(?P<place>.+) steht eine (?P<size>\w+) (?P<colour>\w+)e (?P<digit>\w+)"),
    "spanish_dense": (r", ", r"un (?P<digit>\w+) (?P<colour>\w+) y (?P<size>\w+) (?P<place>.+)"),
    "english_short": (r", | and ", r"a (?P<colour>\w+) (?P<digit>\w+)"),
    "german_short": (r", | und ", r"eine (?P<colour>\w+)e (?P<digit>\w+)"),
    "spanish_short": (r", | y ", r"un (?P<digit>\w+) (?P<colour>\w+)"),
}
ABOVE, BELOW, LEFT, RIGHT = "above", "below", "left", "right"
# Wording: (pattern of the relation sentence, meaning of its word); `a` stands in this relation to `b`.
RELATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "english_dense": (
        r"the (?P<a>\w+ \w+) is (?P<word>.+) the (?P<b>\w+ \w+)",
        {"above": ABOVE, "below": BELOW, "left of": LEFT, "right of": RIGHT},
    ),
    "english_corners": (
        r"(?P<word>\w+) the (?P<b>\w+ \w+) stands the (?P<a>\w+ \w+)",
        {"over": ABOVE, "under": BELOW, "before": LEFT, "after": RIGHT},
    ),
    "english_compass": (
        r"(?P<a>\w+) lies (?P<word>\w+) from (?P<b>\w+)",
        {"northward": ABOVE, "southward": BELOW, "westward": LEFT, "eastward": RIGHT},
    ),
    "german_dense": (
        r"die (?P<a>\w+ \w+) ist (?P<word>.+) der (?P<b>\w+ \w+)",
        {"oberhalb": ABOVE, "unterhalb": BELOW, "links von": LEFT, "rechts von": RIGHT},
    ),
    "spanish_dense": (
        r"el (?P<a>\w+ \w+) queda (?P<word>.+) del (?P<b>\w+ \w+)",
        {"encima": ABOVE, "debajo": BELOW, "a la izquierda": LEFT, "a la derecha": RIGHT},
    ),
}


def language_of(wording: str) -> tuple[tuple[str, ...], dict[str, str]]:
    return {
        "english": (DIGITS, ENGLISH_COLOURS),
        "german": (GERMAN, GERMAN_COLOURS),
        "spanish": (SPANISH, SPANISH_COLOURS),
    }[wording.split("_")[0]]


def read_clause(clause: str, wording: str) -> tuple:
    digits, colours = language_of(wording)
    match = re.fullmatch(CLAUSES[wording][1], clause)
    assert match, clause
    found = match.groupdict()
    told: tuple = (digits.index(found["digit"]), colours[found["colour"]])
    if "place" in found:
        words = found["place"].split()
        row = next((ROW_WORDS[word] for word in words if word in ROW_WORDS), 1)
        column = next((COLUMN_WORDS[word] for word in words if word in COLUMN_WORDS), 1)
        told += (SIZE_WORDS[found["size"]], row, column)
    return told


def find(scene: Scene, name: str, wording: str) -> PlacedDigit:
    digits, colours = language_of(wording)
    words = name.split()
    digit = next(digits.index(word) for word in words if word in digits)
    (placed,) = [d for d in scene.digits if d.digit == digit]
    for word in set(words) - set(digits):  # an inflected German colour starts with its stem
        assert next(colour for stem, colour in colours.items() if word.startswith(stem)) == placed.colour
    return placed


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("wording", WORDINGS)
def test_captions_tell_the_facts_of_the_scene(wording: str, backwards: bool, scenes: list[Scene]) -> None:
    for scene in scenes:
        told = caption(scene, wording, backwards=backwards)
        relation = None
        if wording in RELATIONS:
            assert told.endswith(".")
            told = told[:-1]
            if len(scene.digits) > 1:
                told, relation = told.rsplit(". ", 1)
        read = [read_clause(clause, wording) for clause in re.split(CLAUSES[wording][0], told)]
        facts = [(d.digit, d.colour, d.size, d.row, d.column)[: len(read[0])] for d in scene.digits]
        assert read == (facts[::-1] if backwards else facts)
        if relation is not None:
            pattern, meanings = RELATIONS[wording]
            match = re.fullmatch(pattern, relation)
            assert match, relation
            a, b = find(scene, match["a"], wording), find(scene, match["b"], wording)
            holds: dict[str, Callable[[], bool]] = {
                ABOVE: lambda a=a, b=b: a.row < b.row,
                BELOW: lambda a=a, b=b: a.row > b.row,
                LEFT: lambda a=a, b=b: a.row == b.row and a.column < b.column,
                RIGHT: lambda a=a, b=b: a.row == b.row and a.column > b.column,
            }
            assert a is not b
            assert holds[meanings[match["word"]]](), told


def test_glossary_translates() -> None:
    entries = {frozenset(entry) for entry in glossary()}
    for digits in zip(DIGITS, GERMAN, SPANISH):
        assert frozenset(digits) in entries
    colours = {(e, g, s) for g, e in GERMAN_COLOURS.items() for s, other in SPANISH_COLOURS.items() if e == other}
    for english, german, spanish in colours:
        assert frozenset({english, f"{german}e", f"{german}en", spanish}) in entries
    line = dictionary_line(random.Random(1))
    for entry in line.removesuffix(".").split("; "):
        terms = set(entry.split(" = "))
        assert len(terms) == 3
        assert any(terms <= known for known in entries)


# ------------------------------------------------------------------------------------------------------------- splits


def test_images_are_paired_with_english_in_some_wordings_only() -> None:
    data = small_data()
    unpaired = [wording for wording in WORDINGS if wording not in PAIRED]
    assert {"english_compass", "german_dense", "spanish_dense"} <= set(unpaired)
    for source, rows in data.pair_captions.items():
        assert len(rows) == len(data.pairs) == len(data.pair_images)
        for scene, captions in zip(data.pairs, rows):
            allowed = {caption(scene, w, backwards=b) for w in PAIRED for b in (False, True)}
            assert set(captions) <= allowed
            assert all(("short" in source) == ("." not in told) for told in captions)
    words = {
        word for rows in data.pair_captions.values() for row in rows for c in row for word in re.findall(r"\w+", c)
    }
    foreign = {*GERMAN, *SPANISH, *text.GERMAN_COLOURS.values(), *text.SPANISH_COLOURS.values()}
    assert not words & foreign
    assert not words & {"tiny", "huge", "north", "south", "east", "west", "lies"}


def test_stage1_rows_tell_one_scene_twice() -> None:
    scenes = small_data().text
    rows = text_pairs(scenes, seed=0)
    assert rows == text_pairs(scenes, seed=0)
    languages = set()
    for scene, (first, second) in zip(scenes, rows):
        told = {caption(scene, w, backwards=b): w.split("_")[0] for w in WORDINGS for b in (False, True)}
        assert first != second
        languages.add((told[first], told[second]))
    assert languages == {(a, b) for a, b in [("english", b) for b in ("english", "german", "spanish")]} | {
        ("german", "german"),
        ("spanish", "spanish"),
    }


def test_tokenizer_knows_every_word_and_wraps_texts() -> None:
    data = small_data()
    tokenizer = build_tokenizer(data.text)
    rng = random.Random(0)
    texts = [caption(s, w, backwards=b) for s in data.held_out for w in WORDINGS for b in (False, True)]
    texts += [dictionary_line(rng) for _ in range(50)]
    for ids in tokenizer(texts)["input_ids"]:
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids
        assert ids.count(tokenizer.bos_token_id) == 1


# ------------------------------------------------------------------------------------------------ a run and its report


def made_up_metrics() -> dict[str, Any]:
    """Every figure is another one, so that a cell in a wrong place shows."""
    values = iter(np.linspace(0.011, 0.989, 80).round(3).tolist())
    return {
        "split": "test",
        "seed": 0,
        "settings": {"num_held_out": 77},
        "caption_retrieval_accuracy": {
            when: {name: next(values) for name in CRA_SETS} for when in ("before", "after")
        },
        "models": {
            model: {
                name: {"image_to_text_recall@1": next(values), "text_to_image_recall@1": next(values)}
                for name in RETRIEVAL_SETS
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
    for name, (*_, title) in CRA_SETS.items():
        assert cells(table, title) == [shown(cra["before"][name]), shown(cra["after"][name])]
    for name, (_, title) in RETRIEVAL_SETS.items():
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


def test_picture_shows_what_both_models_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, drawn = small_data(), []
    right = [scene for scene, _ in PICTURE_QUERIES]
    # The one model finds the scenes, the other one everything but them.
    monkeypatch.setattr(report, "encode_images", lambda model, images, processor: torch.eye(len(images)))
    monkeypatch.setattr(
        report, "encode_texts", lambda sign, texts, processor: sign * torch.eye(len(data.held_out))[right]
    )
    monkeypatch.setattr(report, "draw_gallery", lambda *arguments: drawn.append(arguments) or draw_gallery(*arguments))
    report.draw(data, {"cc_llm": (1, None), "clip_from_scratch": (-1, None)}, tmp_path / "retrieval.png", top=3)
    ((_, rows, _, note),) = drawn
    for row, (scene, wording) in zip(rows, PICTURE_QUERIES, strict=True):
        assert (row.query, row.right, row.found[0]) == (caption(data.held_out[scene], wording), scene, scene)
        assert len(row.found) == 6 and scene not in row.found[1:]
    assert "(c) CC-tuned LLM + CLIP training, then of (a)" in note


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


@pytest.mark.parametrize(
    ("idle", "quota", "cores"),
    [((50, 25, 0), "max 100000", 2), ((0, 0, 0), "max 100000", 1), ((50, 50, 50), "150000 100000", 2)],
)
def test_the_demo_takes_the_cores_that_are_idle(
    monkeypatch: pytest.MonkeyPatch, idle: tuple[int, int, int], quota: str, cores: int
) -> None:
    """Three cores are allowed of four; a container's quota of one core and a half."""
    reads = iter([(0, 0, 0), idle])

    def read_text(path: Path, encoding: str) -> str:
        if path.name == "cpu.max":
            return quota
        ticks = enumerate((*next(reads), 50))
        return "cpu 0 0 0 0 0 0\n" + "\n".join(f"cpu{core} 7 0 7 {count} 0 0" for core, count in ticks) + "\nintr 1"

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert idle_cores() == cores


def test_threads_that_are_asked_for_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3"})
    share_cores()
    assert os.environ == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
