# SPDX-License-Identifier: Apache-2.0
"""
Parts of long captions as captions of their own.

A dense caption describes an image in several sentences, each of which is true of the image. Training on some of the
sentences instead of the whole text is an option of long-caption CLIP training (DreamLIP, arXiv 2403.17007).
"""

import re
from collections.abc import Sequence


__all__ = ["choose_sub_caption", "split_sentences", "split_sub_captions"]

# After the end of a sentence and the blank behind it; CJK texts have no blank there.
_SENTENCE_END = re.compile("(?<=[.!?])[\"')\\]]*\\s+|(?<=[\u3002\uff01\uff1f])\\s*")


def split_sentences(text: str) -> list[str]:
    """
    The sentences of a text, by their closing punctuation; abbreviations inside a sentence end it too.

    Example:
    >>> split_sentences("A cat sleeps. Is it grey? Yes!")
    ['A cat sleeps.', 'Is it grey?', 'Yes!']
    """
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def split_sub_captions(captions: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """
    The single sentences of long captions, as a caption source of their own.

    Stored embeddings need the sub-captions as captions that were embedded: pass the result as a further source to
    `embed_captions`, e.g. `{"dense": dense, "sentence": split_sub_captions(dense)}`.

    Args:
        captions (sequence): one caption or a list of captions per image.

    Returns:
        `list[list[str]]`: per image the distinct sentences of its captions, in order. An image whose captions have
        only one sentence each keeps those.

    Source: DreamLIP (arXiv 2403.17007).

    Example:
    >>> split_sub_captions(["A cat. It sleeps.", ["A dog", "Grass. A dog"]])
    [['A cat.', 'It sleeps.'], ['A dog', 'Grass.']]
    """
    if isinstance(captions, str):
        raise ValueError("`captions` is one string. Pass one caption or one list of captions per image.")
    result = []
    for entry in captions:
        texts = [entry] if isinstance(entry, str) else entry
        result.append(list(dict.fromkeys(sentence for text in texts for sentence in split_sentences(text))))
    return result


def choose_sub_caption(text: str, probability: float, draws: Sequence[float]) -> str:
    """
    With some probability a contiguous run of sentences of `text`, else `text`.

    The length of the run is uniform in 1 to `n - 1` of the `n` sentences, its position uniform given the length.

    Args:
        text (`str`): caption; with one sentence it stays whole.
        probability (`float`): in `[0, 1]`.
        draws (3 `float`): uniform values in `[0, 1)` for whether, how long, and where.

    Returns:
        `str`: the sentences of the run, joined by a blank.

    Example:
    >>> choose_sub_caption("One. Two. Three.", 1.0, (0.0, 0.9, 0.9))
    'Two. Three.'
    """
    if draws[0] >= probability:
        return text
    sentences = split_sentences(text)
    if len(sentences) < 2:
        return text
    length = 1 + int(draws[1] * (len(sentences) - 1))
    start = int(draws[2] * (len(sentences) - length + 1))
    return " ".join(sentences[start : start + length])
