# SPDX-License-Identifier: Apache-2.0
"""
Whether two fingerprints are of one text encoder, and in what they differ.

Fingerprints of earlier releases have fewer entries, and an LLM may be loaded in one dtype to embed captions and in
another to train; neither makes it another encoder.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .fingerprint import FingerprintValue


if TYPE_CHECKING:
    from .embedding_store import CaptionEmbeddingStore


__all__ = ["fingerprint_differences", "identity_differences", "require_identity", "with_shared_entries"]

# Other views of the weights, which `weights_sha256` stands for; fingerprints of earlier releases lack them.
_VIEWS = ("weights_bf16_sha256", "weights_sample_sha256")
_ABSENT = "(absent)"
# Fields of a fingerprint that change embeddings by rounding or for long texts only.
_NOT_IDENTITY = ("weights_dtype", "max_length")


def fingerprint_differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The keys in which two dictionaries differ with both values, as text for a message; empty if they agree."""
    return "; ".join(
        f"`{key}`: store {stored.get(key, _ABSENT)!r}, expected {expected.get(key, _ABSENT)!r}"
        for key in sorted({*stored, *expected})
        if stored.get(key, _ABSENT) != expected.get(key, _ABSENT)
    )


def with_shared_entries(
    stored: Mapping[str, FingerprintValue], expected: Mapping[str, FingerprintValue]
) -> tuple[dict[str, FingerprintValue], dict[str, FingerprintValue]]:
    """
    Two fingerprints as one release would write them: without the views of the weights that only one of them has, and
    with the pooling, which is the mean where the fingerprint of an LLM does not name it.
    """
    old, new = dict(stored), dict(expected)
    for view in _VIEWS:
        if view not in old or view not in new:
            old.pop(view, None)
            new.pop(view, None)
    # These two entries make it a whole fingerprint, not some entries of one or the user's own.
    for one, other in ((old, new), (new, old)):
        if "pooling" in other and {"weights_sha256", "tokenizer_sha256"} <= one.keys():
            one.setdefault("pooling", "mean")
    return old, new


def identity_differences(
    stored: Mapping[str, FingerprintValue],
    expected: Mapping[str, FingerprintValue],
    *,
    shared_only: bool = False,
    ignored: tuple[str, ...] = (),
) -> str:
    """
    What tells the text encoders of two fingerprints apart, as text for a message; empty if nothing does.

    The weights are the same if their digests are, or, loaded in different dtypes, their digests rounded to bfloat16 or
    (bfloat16 and float16) a sample of them.

    Args:
        stored (mapping): fingerprint of the store.
        expected (mapping): fingerprint, or entries of one, that it should have.
        shared_only (`bool`, defaults to `False`): compare only entries that both have.
        ignored (`tuple[str, ...]`): entries not to compare.

    Returns:
        `str`: keys with both values; where only the dtype may be the reason, the remedy too.
    """
    old, new = with_shared_entries(stored, expected)
    same_weights = _same_weights(stored, expected)
    left_out = {*ignored, *_VIEWS, *(("weights_sha256", "weights_dtype") if same_weights else ())}
    if shared_only:
        left_out |= old.keys() ^ new.keys()
    differences = fingerprint_differences(
        {key: value for key, value in old.items() if key not in left_out},
        {key: value for key, value in new.items() if key not in left_out},
    )
    before, now = stored.get("weights_dtype"), expected.get("weights_dtype")
    if "weights_sha256" in stored and not same_weights and None not in (before, now) and before != now:
        differences += (
            f" (the captions were embedded with an LLM in {before}, this one is in {now}; if it is the same LLM, "
            f'load it in {before}, e.g. with `text_model_kwargs={{"dtype": "{before}"}}`)'
        )
    return differences


def require_identity(
    store: "CaptionEmbeddingStore", expected: Mapping[str, FingerprintValue], whose: str, remedy: str
) -> None:
    """
    Refuses a store that another text encoder made, by the entries that both fingerprints have.

    Args:
        store (`CaptionEmbeddingStore`): the store.
        expected (mapping): fingerprint, or entries of one, that it should have.
        whose (`str`): what `expected` describes, for the message.
        remedy (`str`): what to do, for the message.

    Raises:
        ValueError: naming what differs.
    """
    differences = identity_differences(store.fingerprint, expected, shared_only=True, ignored=_NOT_IDENTITY)
    if differences:
        raise ValueError(
            f"The embeddings in `{store.path}` were made by another text encoder than {whose}: {differences}. {remedy}"
        )


def _same_weights(stored: Mapping[str, FingerprintValue], expected: Mapping[str, FingerprintValue]) -> bool:
    if "weights_sha256" not in stored or "weights_sha256" not in expected:
        return False
    if stored["weights_sha256"] == expected["weights_sha256"]:
        return True
    dtypes = {str(stored.get("weights_dtype")), str(expected.get("weights_dtype"))}
    # In one dtype, weights that agree rounded only are those of two LLMs.
    if len(dtypes) == 1:
        return False
    rounded = _rounded_digest(stored)
    if rounded is not None and rounded == _rounded_digest(expected):
        return True
    # float16 drops bits of tiny bfloat16 values, which the sample leaves out.
    sample = stored.get("weights_sample_sha256")
    return dtypes == {"bfloat16", "float16"} and sample is not None and sample == expected.get("weights_sample_sha256")


def _rounded_digest(fingerprint: Mapping[str, FingerprintValue]) -> FingerprintValue:
    if fingerprint.get("weights_dtype") == "bfloat16":
        return fingerprint["weights_sha256"]
    return fingerprint.get("weights_bf16_sha256")
