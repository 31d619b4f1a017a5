# SPDX-License-Identifier: Apache-2.0
"""Tasks from files of every layout give what the functions on tensors give; bad data stop with the item's name."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_models
import torch
from evaluation_data import CAPTIONS, clip, picture, write_image_folder, write_parquet
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from llm2clip_hf.data import embed_captions, embedding_fingerprint, sources
from llm2clip_hf.evaluation import (
    encode_images,
    encode_texts,
    evaluate_caption_retrieval,
    evaluate_retrieval,
    evaluate_zero_shot_classification,
    joint_space_statistics,
    retrieval_metrics,
    winoground_scores,
)
from llm2clip_hf.evaluation.tasks.data import locate
from llm2clip_hf.evaluation.tasks.definitions import TASKS, resolve_tasks
from llm2clip_hf.evaluation.tasks.loading import load_task_data
from llm2clip_hf.evaluation.tasks.pictures import draw_gallery, draw_languages, draw_recalls, write_pictures
from llm2clip_hf.evaluation.tasks.report import ENGLISH_SETS, PUBLISHED, format_report, to_eval_results
from llm2clip_hf.evaluation.tasks.runner import Evaluation, GalleryRow, evaluate_tasks


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return clip()


def images(count: int = len(CAPTIONS)) -> list[Any]:
    return [picture(number) for number in range(count)]


def result(parts: tuple[Any, Any], *specs: str, **options: Any) -> dict[str, Any]:
    evaluation = evaluate_tasks(*parts, resolve_tasks(specs), batch_size=3, **options)
    [record] = evaluation.results.values()
    return record


# --------------------------------------------------------------------------------------------------------------- specs


def test_tasks_are_named_in_four_ways(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "pairs")
    (tmp_path / "own.yaml").write_text(
        "letters: {kind: zero-shot, path: pairs, class_names: [a, b], num_images: 7}\n"
        "story: {path: elsewhere.parquet}\n"
    )
    specs = ["coco", "cross-lingual:x/emoji.parquet?languages=de,fr&where=split:test", str(tmp_path / "own.yaml")]
    coco, emoji, letters, story, pairs = resolve_tasks([*specs, str(tmp_path / "pairs")])
    assert coco is TASKS["coco"]
    assert (emoji.name, emoji.languages, emoji.where) == ("x/emoji", ("de", "fr"), {"split": "test"})
    assert (letters.path, letters.class_names, letters.num_images) == (str(tmp_path / "pairs"), ("a", "b"), 7)
    assert (story.kind, story.path) == ("retrieval", "elsewhere.parquet")
    assert pairs.kind == "retrieval"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("koko", "no task or file `koko`"),
        ("cra:", "names no path"),
        ("retrieval:a.parquet?colour=red", "no setting `colour`"),
        ("retrieval:a.parquet?first_captions=none", "`first_captions` .* is 'none'"),
        ("retrieval:a.parquet?where=split", "where=COLUMN:VALUE"),
        ("missing.yaml", "does not exist"),
    ],
)
def test_wrong_specs_are_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_tasks([spec])


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'coco'.* more than once"):
        resolve_tasks(["coco", "coco"])


def test_a_name_twice_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for side, count in (("p", 5), ("q", 3)):
        write_image_folder(tmp_path / side / "x" / "same", CAPTIONS[:count])
    for pair in (("p", "p"), ("p", "q")):
        specs = [str(tmp_path / side / "x" / "same") for side in pair]
        for tasks in (specs, [*resolve_tasks(specs[:1]), specs[1]]):
            with pytest.raises(ValueError, match="'x/same'.* more than once"):
                evaluate_tasks(None, None, tasks)  # nothing is measured, so there need be no model
    with pytest.raises(ValueError, match="`coco` is one task"):
        resolve_tasks("coco")


def test_definitions_are_complete() -> None:
    for name, task in TASKS.items():
        assert task.name == name and task.title and task.source and task.protocol
        if task.hub is not None:
            assert re.fullmatch("[0-9a-f]{40}", task.hub.revision)
            dataclasses.replace(task, **dict(task.hub.columns))
        assert task.kind not in ("composition", "winoground") or task.num_images
    assert {name for row in PUBLISHED for name in row.scores} <= set(TASKS)
    assert len(TASKS["xm3600"].languages or ()) == TASKS["xm3600"].num_languages == 36


# ----------------------------------------------------------------------------------------------------------- retrieval


def test_retrieval_equals_the_function_in_every_layout(parts: tuple[Any, Any], tmp_path: Path) -> None:
    expected = evaluate_retrieval(parts[0], images(), CAPTIONS, processor=parts[1])
    columns = {"captions": CAPTIONS, "image_id": list(range(5))}
    parquet = write_parquet(tmp_path / "data" / "pairs.parquet", columns, tmp_path / "source")
    folder = write_image_folder(tmp_path / "folder")
    saved = tmp_path / "saved"
    datasets.Dataset.from_parquet(str(parquet)).save_to_disk(str(saved))
    digests = set()
    for path in (parquet, parquet.parent, folder, folder / "metadata.jsonl", saved):
        record = result(parts, f"retrieval:{path}")
        assert record["metrics"] == pytest.approx(expected), path
        assert record["counts"] == {"images": 5, "captions": 15}
        digests.add(record["fingerprint"]["captions_sha256"])
    assert len(digests) == 1
    embeds = [encode_images(parts[0], images(), processor=parts[1])]
    embeds.append(encode_texts(parts[0], sum(CAPTIONS, []), processor=parts[1]))
    owners = torch.arange(5).repeat_interleave(3)
    assert record["joint_space"] == pytest.approx(joint_space_statistics(*embeds, owners), rel=1e-5)
    with pytest.raises(ValueError, match="`match_precision` must lie between 0 and 1, both excluded, got 95"):
        evaluate_tasks(*parts, [f"retrieval:{folder}"], match_precision=95)
    assert len(result(parts, f"retrieval:{folder}")["fingerprint"]["annotation_sha256"]) == 64


def test_benchmarks_come_from_the_data_root(parts: tuple[Any, Any], tmp_path: Path) -> None:
    write_image_folder(tmp_path / "coco")
    task = dataclasses.replace(TASKS["coco"], num_images=5, first_captions=2, captions_per_image=2)
    [record] = evaluate_tasks(*parts, [task], data_root=tmp_path).results.values()
    two = [texts[:2] for texts in CAPTIONS]
    assert record["metrics"] == pytest.approx(evaluate_retrieval(parts[0], images(), two, processor=parts[1]))
    assert record["published"] == "coco"
    everything = dataclasses.replace(TASKS["coco-all"], num_images=5)
    assert load_task_data(everything, tmp_path).counts["captions"] == 15


def test_rows_are_selected_and_limited(parts: tuple[Any, Any], tmp_path: Path) -> None:
    columns = {"captions": CAPTIONS, "split": ["test", "train", "test", "test", "train"]}
    path = write_parquet(tmp_path / "pairs.parquet", columns, tmp_path / "source")
    rows = [0, 2, 3]
    record = result(parts, f"retrieval:{path}?where=split:test")
    chosen = [picture(row) for row in rows], [CAPTIONS[row] for row in rows]
    assert record["metrics"] == pytest.approx(evaluate_retrieval(parts[0], *chosen, processor=parts[1]))
    record = result(parts, f"retrieval:{path}", max_images=3)
    assert record["partial"] and record["counts"] == {"images": 3, "captions": 9}
    assert record["metrics"] == pytest.approx(
        evaluate_retrieval(parts[0], images(3), CAPTIONS[:3], processor=parts[1])
    )


def test_stored_embeddings_replace_the_llm(tmp_path: Path) -> None:
    model, processor = tiny_models.model(), tiny_models.processor()
    folder = write_image_folder(tmp_path / "folder")
    expected = result((model, processor), f"retrieval:{folder}")
    embed_captions(model, CAPTIONS, tmp_path / "store", tokenizer=processor.tokenizer, dtype="float32")
    without = tiny_models.model(text=None)
    without.load_state_dict({key: value for key, value in model.state_dict().items() if "text_model" not in key})
    record = result((without, processor), f"retrieval:{folder}", text_embeddings=[tmp_path / "store"])
    assert record["stored_texts"] and not expected["stored_texts"]
    assert record["metrics"] == pytest.approx(expected["metrics"])
    other = write_image_folder(tmp_path / "other", CAPTIONS[:3])
    with pytest.raises(ValueError, match="other` needs an LLM"):
        result((without, processor), f"retrieval:{other}", text_embeddings=[tmp_path / "store"])


def test_stores_are_compared_with_the_model(
    parts: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor, other = tiny_models.processor(), tiny_models.model(seed=1)
    folder = write_image_folder(tmp_path / "folder")
    options: dict[str, Any] = {"tokenizer": processor.tokenizer, "show_progress": False}
    store = embed_captions(other, CAPTIONS, tmp_path / "store", **options)
    half = embed_captions(tiny_models.model(seed=1).bfloat16(), CAPTIONS, tmp_path / "half", **options)
    without = tiny_models.model(text=None)
    named = tiny_models.model(text=None, text_fingerprint=tiny_fingerprint(processor))
    for model in (tiny_models.model(), named):
        for own in (store, half):
            with pytest.raises(ValueError, match="another text encoder than .*`weights_sha256`"):
                result((model, processor), f"retrieval:{folder}", text_embeddings=[own.path])
            with pytest.raises(ValueError, match="another text encoder than .*`weights_sha256`"):
                evaluate_retrieval(model, images(), own, processor=processor)
    # The LLM itself, in either type of the weights, and a model that knows of no LLM.
    for model in (other, without, tiny_models.model(text=None, text_fingerprint=store.fingerprint)):
        for own in (store, half):
            record = result((model, processor), f"retrieval:{folder}", text_embeddings=[own.path])
            assert record["text_fingerprint"] == own.fingerprint
    with pytest.raises(ValueError, match="which a CLIPModel does not take"):
        result(parts, f"retrieval:{folder}", text_embeddings=[store.path])
    three = write_image_folder(tmp_path / "three", CAPTIONS[:3])
    assert not result((other, processor), f"retrieval:{three}", text_embeddings=[store.path])["stored_texts"]
    assert "of the captions of no task" in caplog.text


def tiny_fingerprint(processor: Any) -> dict[str, Any]:
    model = tiny_models.model()
    return embedding_fingerprint(
        model.text_model, processor.tokenizer, text_prefix_length=model.config.text_prefix_length
    )


def test_gallery_holds_the_best_images(parts: tuple[Any, Any], tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "folder")
    evaluation = evaluate_tasks(*parts, [f"retrieval:{folder}"])
    [(_, rows)] = evaluation.galleries.values()
    similarity = (
        encode_texts(parts[0], [row.query for row in rows], processor=parts[1])
        @ encode_images(parts[0], images(), processor=parts[1]).T
    )
    owners = {text: image for image, texts in enumerate(CAPTIONS) for text in texts}
    for row, scores in zip(rows, similarity):
        assert row.right == owners[row.query]
        assert row.found == scores.argsort(descending=True).tolist()


# ------------------------------------------------------------------------------------------------------- cross-lingual

LANGS = [["en", "de"], ["en", "de"], ["en"], ["de", "en"], ["en", "de", "fr"]]
TEXTS = [["a boat", "ein Boot"], ["dog", "Hund"], ["people"], ["das Meer", "the sea"], ["grass", "Gras", "herbe"]]


def cross_lingual_oracle(parts: tuple[Any, Any], language: str) -> dict[str, float]:
    pairs = [(row, text) for row in range(5) for name, text in zip(LANGS[row], TEXTS[row]) if name == language]
    image_embeds = encode_images(parts[0], [picture(row) for row, _ in pairs], processor=parts[1])
    text_embeds = encode_texts(parts[0], [text for _, text in pairs], processor=parts[1])
    return retrieval_metrics(image_embeds, text_embeds, torch.arange(len(pairs)))


@pytest.mark.parametrize("layout", ["lists", "rows"])
def test_cross_lingual_measures_each_language(parts: tuple[Any, Any], tmp_path: Path, layout: str) -> None:
    if layout == "lists":
        columns: dict[str, Any] = {"langs": LANGS, "texts": TEXTS, "image_id": list("abcde")}
        path = write_parquet(tmp_path / "t.parquet", columns, tmp_path / "source")
    else:
        flat = [(row, name, text) for row in range(5) for name, text in zip(LANGS[row], TEXTS[row])]
        rows = {
            "image": [picture(row) for row, _, _ in flat],
            "image_id": ["abcde"[row] for row, _, _ in flat],
            "language": [name for _, name, _ in flat],
            "captions": [[text] for _, _, text in flat],
        }
        path = tmp_path / "t.parquet"
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    record = result(parts, f"cross-lingual:{path}")
    expected = {language: cross_lingual_oracle(parts, language) for language in ("de", "en")}
    assert set(record["languages"]) == set(expected)
    for language, metrics in expected.items():
        own = record["languages"][language]
        assert {key: own[key] for key in metrics} == pytest.approx(metrics)
        assert own["num_images"] == own["num_texts"] == {"de": 4, "en": 5}[language]
    key = "text_to_image_recall@1"
    assert record["metrics"][key] == pytest.approx((expected["de"][key] + expected["en"][key]) / 2)
    assert record["skipped"] == {"languages_with_too_few_images": ["fr"]}
    assert set(result(parts, f"cross-lingual:{path}?languages=de")["languages"]) == {"de"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"langs": [["en"]], "texts": [["a", "b"]]}, "`row 0` has 1 languages and 2 texts"),
        ({"langs": [["en", "de"]], "texts": [["a", ""]]}, "`row 0`, language `de`, has the text ''"),
        ({"captions": [["a"]]}, "no column of languages"),
        ({"language": ["en"], "captions": [["a"]]}, "one row per language"),
    ],
)
def test_bad_cross_lingual_tables_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write_parquet(tmp_path / "t.parquet", columns, tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        load_task_data(resolve_tasks([f"cross-lingual:{path}?min_images=1"])[0])


def test_empty_texts_are_counted_when_skipped(tmp_path: Path) -> None:
    columns = {"langs": [["en", "de"]] * 2, "texts": [["a", ""], ["b", "c"]]}
    path = write_parquet(tmp_path / "t.parquet", columns, tmp_path / "source")
    data = load_task_data(resolve_tasks([f"cross-lingual:{path}?min_images=1"])[0], on_bad_row="skip")
    assert data.skipped["texts"] == 1 and "language `de`" in data.skipped["examples"][0]


# ---------------------------------------------------------------------------------------------- zero-shot and captions


def test_zero_shot_equals_the_function_in_every_layout(parts: tuple[Any, Any], tmp_path: Path) -> None:
    names, labels = ["boat", "dog", "sea"], [0, 1, 1, 2, 2]
    expected = evaluate_zero_shot_classification(parts[0], images(), labels, names, processor=parts[1])
    for number, label in enumerate(labels):
        (tmp_path / "folders" / names[label]).mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "folders" / names[label] / f"{number}.png")
    (tmp_path / "names.txt").write_text("\n".join(names))
    columns = {"label": labels, "name": [names[label] for label in labels]}
    path = write_parquet(tmp_path / "t.parquet", columns, tmp_path / "source")
    for spec in (
        f"zero-shot:{tmp_path / 'folders'}",
        f"zero-shot:{path}?label_column=name",
        f"zero-shot:{path}?class_names={tmp_path / 'names.txt'}",
    ):
        record = result(parts, spec)
        assert record["metrics"] == pytest.approx(expected), spec
        assert record["counts"] == {"images": 5, "classes": 3, "templates": 1}


def test_bad_classes_are_named(parts: tuple[Any, Any], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"label": [0, 1, 2]}, tmp_path / "source")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "two.txt").write_text("boat\ndog\n")
    for query, message in (
        ("", "classes have no names"),
        (f"?class_names={tmp_path / 'empty.txt'}", "empty.txt.* is empty"),
        (f"?class_names={tmp_path / 'two.txt'}", "`row 2` has the label 2"),
        ("?label_column=colour", "no column `colour`"),
        (f"?class_names={tmp_path / 'none.txt'}", "none.txt` .* does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            result(parts, f"zero-shot:{path}{query}")
    missing = write_parquet(tmp_path / "m.parquet", {"label": ["a", None, "b"]}, tmp_path / "source")
    with pytest.raises(ValueError, match="`row 1` has the label None"):
        result(parts, f"zero-shot:{missing}")
    assert result(parts, f"zero-shot:{missing}", on_bad_row="skip")["skipped"]["rows"] == 1


def test_classes_of_benchmarks_are_written_as_words(tmp_path: Path) -> None:
    for number, name in enumerate(("english_setter", "Birman")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        picture(number).save(tmp_path / "pets" / name / "0.png")
    task = dataclasses.replace(TASKS["pets"], num_images=None, num_classes=None)
    data = load_task_data(task, tmp_path)
    assert [data.class_names[label] for label in data.labels] == ["Birman", "english setter"]
    assert data.templates == ["a photo of a {}, a type of pet."]


def test_other_names_of_the_imagenet_classes_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "imagenet" / "t.parquet", {"label": [0, 1]}, tmp_path / "source")
    (tmp_path / "imagenet" / "classes.txt").write_text("tench\ngoldfish\n")
    task = dataclasses.replace(TASKS["imagenet"], num_images=2, num_classes=2)
    with pytest.raises(ValueError, match="class names are not OpenAI's"):
        load_task_data(task, tmp_path)
    # A folder with names alone is no copy: the images are still those of the Hub.
    (tmp_path / "imagenet" / "t.parquet").unlink()
    location = locate(TASKS["imagenet"], tmp_path)
    assert location.source == "mteb/wds_imagenet1k"
    assert location.definition.class_names == str(tmp_path / "imagenet" / "classes.txt")


def test_caption_task_equals_the_function(parts: tuple[Any, Any], tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "coco")
    expected = evaluate_caption_retrieval(parts[0], CAPTIONS, processor=parts[1])
    assert result(parts, f"cra:{folder / 'metadata.jsonl'}")["metrics"] == pytest.approx(expected)
    task = dataclasses.replace(TASKS["cra"], num_images=5)
    [record] = evaluate_tasks(*parts, [task], data_root=tmp_path).results.values()
    assert record["metrics"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ bad data


# --------------------------------------------------------------------------------------------------------- composition


def composition_rows(folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    for number in range(5):
        picture(number).save(folder / f"{number}.png")
    files = [f"{folder.name}/{number}.png" for number in (0, 1, 1, 2, 3, 4)]
    texts = [text for captions in CAPTIONS for text in captions]
    return [
        {"file_name": file, "caption": texts[n], "negative_caption": texts[n + 1 : n + 3], "category": "ab"[n % 2]}
        for n, file in enumerate(files)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_composition_counts_what_single_cosines_say(parts: tuple[Any, Any], tmp_path: Path) -> None:
    rows = composition_rows(tmp_path / "images")
    right = []
    for row in rows:
        image = encode_images(parts[0], [str(tmp_path / row["file_name"])], processor=parts[1])
        texts = encode_texts(parts[0], [row["caption"], *row["negative_caption"]], processor=parts[1])
        cosines = torch.cosine_similarity(image, texts).tolist()
        right.append(float(cosines[0] > max(cosines[1:])))
    record = result(parts, f"composition:{write_lines(tmp_path / 'rows.jsonl', rows)}")
    assert 0 < sum(right) < 6
    by_category = {name: sum(right[n::2]) / 3 for n, name in enumerate("ab")}
    assert {name: each["accuracy"] for name, each in record["categories"].items()} == pytest.approx(by_category)
    assert record["metrics"] == pytest.approx(
        {"composition_accuracy": sum(right) / 6, "mean_category_accuracy": sum(by_category.values()) / 2}
    )
    split = [{**row, "wrong_1": row["negative_caption"][0], "wrong_2": row["negative_caption"][1]} for row in rows]
    columns = "negative_columns=wrong_1,wrong_2"
    again = result(parts, f"composition:{write_lines(tmp_path / 'split.jsonl', split)}?{columns}")
    assert again["metrics"] == record["metrics"] and again["counts"] == {"images": 6, "captions": 18}
    report = format_report({"model": {"name": "m"}, "tasks": {"own": record}})
    assert f"    a {100 * by_category['a']:.1f} (3 images)" in report
    [entry] = to_eval_results({"tasks": {"own": record}})
    assert entry.metric_value == round(100 * sum(right) / 6, 2)


@pytest.mark.parametrize("change", [{"negative_caption": None}, {"negative_caption": []}, {"caption": " "}])
def test_missing_halves_of_a_composition_are_named(
    parts: tuple[Any, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    rows = composition_rows(tmp_path / "images")
    rows[2] |= change
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=rf"Image `row 2` has the text .* in column `{next(iter(change))}` \(1 such"):
        load_task_data(*resolve_tasks([f"composition:{path}"]))
    data = load_task_data(*resolve_tasks([f"composition:{path}"]), on_bad_row="skip")
    assert data.counts["images"] == 5 and data.skipped["rows"] == 1
    for row in rows:
        del row["negative_caption"]
    with pytest.raises(ValueError, match=r"none of the columns \['negative_caption'.*Name it as `negative_columns`"):
        load_task_data(*resolve_tasks([f"composition:{write_lines(path, rows)}"]))


def test_winoground_equals_its_function(parts: tuple[Any, Any], tmp_path: Path) -> None:
    pictures = [picture(number) for number in (0, 1, 2, 3)]
    columns = {"image_0": pictures[::2], "image_1": pictures[1::2]}
    columns |= {f"caption_{number}": [CAPTIONS[number][0], CAPTIONS[2 + number][0]] for number in (0, 1)}
    kinds = {name: datasets.Image() if "image" in name else datasets.Value("string") for name in columns}
    path = tmp_path / "pairs.parquet"
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(str(path))
    embeds = [
        encode_images(parts[0], pictures, processor=parts[1]).unflatten(0, (2, 2)),
        encode_texts(parts[0], [CAPTIONS[number][0] for number in range(4)], processor=parts[1]).unflatten(0, (2, 2)),
    ]
    assert result(parts, f"winoground:{path}")["metrics"] == winoground_scores(*embeds)
    with pytest.raises(ValueError, match=r"the data have 4 images, the definition says 800"):
        load_task_data(dataclasses.replace(TASKS["winoground"], path=str(path)))


def test_counts_that_differ_are_errors(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "coco")
    with pytest.raises(ValueError, match="Task `coco`: the data have 5 images, the definition says 5000"):
        load_task_data(TASKS["coco"], tmp_path)
    captions = [*CAPTIONS[:4], ["alone"]]
    write_image_folder(tmp_path / "flickr30k", captions)
    task = dataclasses.replace(TASKS["flickr30k"], num_images=5, captions_per_image=3)
    with pytest.raises(ValueError, match="Image `4.png` has 1 captions, the definition says 3"):
        load_task_data(task, tmp_path)


def test_missing_and_unnamed_images_and_repeated_ids_are_errors(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "folder")
    (folder / "3.png").rename(folder / "other.png")
    with pytest.raises(ValueError, match="3.png"):
        load_task_data(resolve_tasks([f"retrieval:{folder}"])[0])
    data = load_task_data(resolve_tasks([f"retrieval:{folder}"])[0], on_bad_row="skip")
    assert data.counts["images"] == 4 and data.skipped["rows"] == 2  # the missing one and the one without captions
    columns = {"captions": CAPTIONS[:3], "image_id": [7, 8, 7]}
    path = write_parquet(tmp_path / "t.parquet", columns, tmp_path / "source")
    with pytest.raises(ValueError, match="id '7' .* rows 0 and 2"):
        load_task_data(resolve_tasks([f"retrieval:{path}"])[0])


def test_data_that_are_nowhere_are_named(tmp_path: Path) -> None:
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match="Task `urban1k` has no data.*no copy on the Hub is known"):
            locate(TASKS["urban1k"], root)
    location = locate(TASKS["docci"], tmp_path)
    assert (location.source, location.definition.caption_columns) == ("not-lain/docci", ("description",))
    with pytest.raises(ValueError, match="no folder"):
        locate(TASKS["coco"], tmp_path / "none")


def test_copies_on_the_hub_are_opened_at_their_revision(
    parts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns as the Hub's copies have them; XM3600 has one split per language, its rows in any order."""

    def load_dataset(repo: str, subset: str | None, *, split: str, revision: str) -> datasets.Dataset:
        assert revision == {"not-lain/docci": TASKS["docci"], "mteb/xm3600": TASKS["xm3600"]}[repo].hub.revision
        order = [2, 0, 1] if split == "de" else [0, 1, 2]
        columns: dict[str, Any] = {
            "image": [picture(row) for row in order],
            "description": [CAPTIONS[row][0] for row in order],
            "captions": [[f"{split} {text}" for text in CAPTIONS[row]] for row in order],
        }
        columns |= {name: [f"id{row}" for row in order] for name in ("example_id", "image_id")}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    with pytest.raises(ValueError, match="Task `docci`: The data set `not-lain/docci` at revision 0bab.* Hub"):
        load_task_data(TASKS["docci"])
    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    docci = dataclasses.replace(TASKS["docci"], num_images=3)
    [record] = evaluate_tasks(*parts, [docci]).results.values()
    first = [texts[:1] for texts in CAPTIONS[:3]]
    assert record["metrics"] == pytest.approx(evaluate_retrieval(parts[0], images(3), first, processor=parts[1]))
    assert record["fingerprint"]["revision"] == TASKS["docci"].hub.revision

    languages = dataclasses.replace(TASKS["xm3600"], languages=("en", "de"), num_languages=2, num_images=3)
    [record] = evaluate_tasks(*parts, [languages]).results.values()
    for language in ("en", "de"):
        captions = [[f"{language} {text}" for text in texts] for texts in CAPTIONS[:3]]
        expected = evaluate_retrieval(parts[0], images(3), captions, processor=parts[1])
        own = record["languages"][language]
        assert {key: own[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sugarcrepe", "aro-attribution", "aro-coco-order", "winoground"])
def test_composition_copies_have_the_columns_that_mteb_reads(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("mteb", reason="its tasks say how the columns are called")
    from mteb.tasks import image_text_pair_classification as peers

    peer = {
        "sugarcrepe": peers.SugarCrepe, "aro-attribution": peers.AROVisualAttribution,
        "aro-coco-order": peers.AROCocoOrder, "winoground": peers.Winoground,
    }[name]  # fmt: skip

    def load_dataset(repo: str, subset: str | None, *, split: str, revision: str) -> datasets.Dataset:
        assert {"path": repo, "revision": revision} == peer.metadata.dataset
        columns: dict[str, Any] = {column: images(2) for column in peer.images_column_names}
        for place, column in enumerate(peer.texts_column_names):
            columns[column] = [CAPTIONS[row][0] if not place else CAPTIONS[row + place % 2][1] for row in (0, 1)]
        table = datasets.Dataset.from_dict(columns)
        for column in peer.images_column_names:
            table = table.cast_column(column, datasets.Image())
        return table

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    task = dataclasses.replace(TASKS[name], num_images=None)
    data = load_task_data(task)
    assert data.counts["captions"] == 2 * len(peer.texts_column_names)
    [record] = evaluate_tasks(*parts, [task]).results.values()
    assert all(0 <= value <= 1 for value in record["metrics"].values())


def test_embeddings_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model, processor = clip()
    folder = write_image_folder(tmp_path / "folder")
    model.visual_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="embedding of image `0.png` is not finite .5 of 5"):
        result((model, processor), f"retrieval:{folder}")


def test_a_processor_without_its_parts_is_refused(parts: tuple[Any, Any], tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "folder")
    for part, message in (
        (parts[1].tokenizer, "no image processor"),
        (parts[1].image_processor, "no image processor"),
    ):
        with pytest.raises(ValueError, match=message):
            result((parts[0], part), f"retrieval:{folder}")


def test_real_multilingual_tables(parts: tuple[Any, Any], shared_dir: Path) -> None:
    path = shared_dir / "data" / "emoji" / "openmoji.parquet"
    settings = "text_column=names&where=split:test&languages=en,de,ja"
    record = result(parts, f"cross-lingual:{path}?{settings}", max_images=12)
    assert set(record["languages"]) == {"en", "de", "ja"}
    assert all(metrics["num_images"] == 12 for metrics in record["languages"].values())
    story = shared_dir / "data" / "african_storybook" / "test.parquet"
    data = load_task_data(resolve_tasks([f"cross-lingual:{story}?min_images=40"])[0])
    assert data.counts["images"] == 216 and len(data.texts["en"]) >= 216
    assert all(len({image for image, _ in rows}) >= 40 for rows in data.texts.values())


# ----------------------------------------------------------------------------------------- the report and its pictures

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
