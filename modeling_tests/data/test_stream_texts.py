# SPDX-License-Identifier: Apache-2.0
"""Streams with captions and a store: the text and the embedding of the same caption."""

import pytest
from modeling_tests.data.test_image_text_streaming import (  # noqa: F401
    TABLE,
    TRANSFORM,
    assert_same,
    folder,
    hash_of,
    map_style,
    store,
)
from shard_files import CAPTION_FIELDS

from llm2clip_hf.data import ImageTextDataset, ImageTextStream


def test_the_text_beside_a_stored_embedding_is_that_of_the_same_caption(folder, store):  # noqa: F811
    # The order of the fields is not that of the store.
    fields = dict(reversed(CAPTION_FIELDS.items()))
    stream = ImageTextStream(
        str(folder / "{000..004}.tar"), fields, store=store, transform=TRANSFORM, shuffle_buffer=4, seed=5
    )
    oracle = ImageTextDataset(map_style().images, TABLE, store=store, with_text=True, transform=TRANSFORM, seed=5)
    for epoch in range(3):
        stream.set_epoch(epoch)
        oracle.set_epoch(epoch)
        for sample in stream:
            assert_same(sample, oracle[sample["index"]])
            assert sample["llm_embeds"][0] == hash_of(sample["text"])


def test_captions_that_are_not_those_of_the_store_are_refused_or_replaced(folder, store):  # noqa: F811
    shards, options = str(folder / "{000..004}.tar"), {"store": store, "transform": TRANSFORM, "shuffle_buffer": 4}
    with pytest.raises(ValueError, match=r"names the sources \['real'\], the store .* has \['dense', 'real'\]"):
        ImageTextStream(shards, {"real": "txt"}, **options)
    swapped = {"real": "json.dense", "dense": "txt"}
    # Samples with one caption of each kind are the same both ways round.
    with pytest.raises(ValueError, match=r"captions in the sources \['real', 'dense'\], but the store"):
        list(ImageTextStream(shards, swapped, **options))
    stream = ImageTextStream(shards, swapped, on_bad_sample="skip", **options)
    assert {sample["index"] % 3 for sample in stream} == {1}
    assert stream.skipped.number > 0
