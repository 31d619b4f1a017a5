# SPDX-License-Identifier: Apache-2.0
"""Tasks of composition: one image, its caption and wrong ones (SugarCrepe, ARO), or two of each (Winoground)."""

from dataclasses import dataclass, replace

from ...data.store.fingerprint import digest_of
from .data import MAX_NAMED, ImageData, Location, check_counts, image_keys, named_column, open_table, source_digest


@dataclass
class CompositionData(ImageData):
    """Images, each with its caption, the wrong captions made from it, and a category."""

    captions: list[str]
    negatives: list[list[str]]
    categories: list[str]


@dataclass
class PairData(ImageData):
    """Two images and their two captions an item, one after the other."""

    captions: list[str]


def load_composition(location: Location, on_bad_row: str, max_images: int | None) -> CompositionData:
    """One image, its caption and one or more wrong captions per row: SugarCrepe, ARO."""
    task = location.definition
    table = open_table(location)
    keys = image_keys(table, task, unique=False)
    caption_column = named_column(table, task.text_column, ("caption", "text", "true_caption"), "text_column")
    usual = ("negative_caption", "negative_captions", "false_caption")
    negative_columns = task.negative_columns or (named_column(table, None, usual, "negative_columns"),)
    category_column = task.category_column or ("category" if "category" in table.columns else None)
    categories = ["all"] * len(table) if category_column is None else [*map(str, table.column(category_column))]
    captions, negatives, bad = [], [], dict[int, str]()
    for row, (text, *found) in enumerate(zip(*map(table.column, (caption_column, *negative_columns)))):
        texts = [(caption_column, text)]
        for column, wrong in zip(negative_columns, found):
            texts += [(column, each) for each in (wrong or [None] if isinstance(wrong, (list, tuple)) else [wrong])]
        captions.append(text)
        negatives.append([each for _, each in texts[1:]])
        for column, each in texts:
            if not isinstance(each, str) or not each.strip():
                bad[row] = f"Image `{keys[row]}` has the text {each!r} in column `{column}`"
    if bad and on_bad_row == "error":
        raise ValueError(
            f'{next(iter(bad.values()))} ({len(bad)} such rows). Mend them, or pass `on_bad_row="skip"` to leave them '
            "out."
        )
    kept = [row for row in range(len(table)) if row not in bad][:max_images]
    if not kept:
        raise ValueError(f"`{table.name}` has no row with a caption and a wrong one.")
    table = table.select(kept)
    captions, negatives = [captions[row] for row in kept], [negatives[row] for row in kept]
    categories = [categories[row] for row in kept]
    counts = {"images": len(kept), "captions": len(kept) + sum(map(len, negatives))}
    if max_images is None:
        check_counts(task, counts, "images", "captions")
    return CompositionData(
        images=table.images,
        keys=[keys[row] for row in kept],
        captions=captions,
        negatives=negatives,
        categories=categories,
        counts=counts,
        fingerprint={"captions_sha256": digest_of([captions, negatives, categories]), **source_digest(location)},
        skipped={"rows": len(bad), "examples": list(bad.values())[:MAX_NAMED]} if bad else {},
    )


def load_pairs(location: Location, on_bad_row: str, max_images: int | None) -> PairData:
    """The columns `image_0`, `image_1`, `caption_0` and `caption_1`: Winoground. A bad row is an error in any case."""
    columns = [replace(location.definition, image_column=f"image_{number}") for number in (0, 1)]
    tables = [open_table(replace(location, definition=definition)) for definition in columns]
    keys = [f"{key}, image {number}" for key in image_keys(tables[0], location.definition) for number in (0, 1)]
    texts = [table.column(named_column(table, None, (f"caption_{n}",), "")) for n, table in enumerate(tables)]
    captions = [text for pair in zip(*texts) for text in pair]
    for key, text in zip(keys, captions):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The caption of {key} is {text!r}. Every item needs two images and two captions.")
    images = [image for pair in zip(*(table.images for table in tables)) for image in pair]
    count = 2 * min(len(tables[0]), max_images or len(tables[0]))
    if max_images is None:
        check_counts(location.definition, {"images": count}, "images")
    return PairData(
        images=images[:count],
        keys=keys[:count],
        captions=captions[:count],
        counts={"images": count, "captions": count},
        fingerprint={"captions_sha256": digest_of(captions[:count]), **source_digest(location)},
    )


__all__ = ["CompositionData", "PairData", "load_composition", "load_pairs"]
