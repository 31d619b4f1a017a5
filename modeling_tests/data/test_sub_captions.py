# SPDX-License-Identifier: Apache-2.0
"""Parts of long captions: contiguous sentences, in order, as often as asked for."""

import collections

import pytest

from llm2clip_hf.data import split_sub_captions
from llm2clip_hf.data.sampling import choose_sub_caption, split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A cat.", ["A cat."]),
        ("A cat sleeps", ["A cat sleeps"]),
        ("A cat. A dog!  A bird?\nA 3.5 m tree", ["A cat.", "A dog!", "A bird?", "A 3.5 m tree"]),
        ("\u4e00\u53ea\u732b\u3002\u4e00\u53ea\u72d7\u3002", ["\u4e00\u53ea\u732b\u3002", "\u4e00\u53ea\u72d7\u3002"]),
        (" ", []),
    ],
)
def test_sentences_end_at_their_punctuation(text, sentences):
    assert split_sentences(text) == sentences


def test_splitting_keeps_the_images_and_drops_repetitions():
    captions = ["A. B.", ["A. B. A.", "C"], "D"]
    assert split_sub_captions(captions) == [["A.", "B."], ["A.", "B.", "C"], ["D"]]
    with pytest.raises(ValueError, match="is one string"):
        split_sub_captions("A. B.")


def test_runs_are_contiguous_shorter_than_the_caption_and_uniform():
    text = "A. B. C. D."
    steps = [(k + 0.5) / 60 for k in range(60)]
    counts = collections.Counter(
        choose_sub_caption(text, 1.0, (0.5, length, start)) for length in steps for start in steps
    )
    runs = ["A.", "B.", "C.", "D.", "A. B.", "B. C.", "C. D.", "A. B. C.", "B. C. D."]
    expected = {run: 3600 / 3 / (5 - len(run.split())) for run in runs}
    assert counts == pytest.approx(expected)


def test_the_probability_decides_and_one_sentence_stays_whole():
    text = "A. B."
    assert choose_sub_caption(text, 0.3, (0.3, 0, 0)) == text
    assert choose_sub_caption(text, 0.3, (0.29, 0, 0)) == "A."
    assert choose_sub_caption("One sentence", 1.0, (0, 0, 0)) == "One sentence"
