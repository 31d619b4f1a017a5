# SPDX-License-Identifier: Apache-2.0
"""Splits of the demo: much text, few image-caption pairs, and scenes that no training ever sees."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from .captions import PAIRED, WORDINGS, caption
from .scenes import Scene, render, sample_scenes, split_scans


# Rows of stage 1 by the languages of their two captions. Real text is mostly in one language too, and with nothing but
# translations the contrast has no start: captions without a common word teach a small LLM to ignore what they say.
LANGUAGE_PAIRS = {
    ("english", "english"): 0.40,
    ("german", "german"): 0.15,
    ("spanish", "spanish"): 0.15,
    ("english", "german"): 0.15,
    ("english", "spanish"): 0.15,
}


@dataclass(frozen=True)
class DemoData:
    """
    All scenes of a run.

    Args:
        text (`list[Scene]`): scenes that are told and never drawn.
        pairs (`list[Scene]`): scenes that are drawn and told in the wordings of `PAIRED`, from training scans.
        held_out (`list[Scene]`): scenes of two digits from held-out scans; any of their captions identifies the scene.
        held_out_single (`list[Scene]`): scenes of one digit from held-out scans.
    """

    text: list[Scene]
    pairs: list[Scene]
    held_out: list[Scene]
    held_out_single: list[Scene]

    @property
    def pair_images(self) -> list[Image.Image]:
        """The training images."""
        return [render(scene) for scene in self.pairs]

    @property
    def pair_captions(self) -> dict[str, list[list[str]]]:
        """Captions of the training images by source: short ones and dense ones, as in the paper."""
        short = [wording for wording in PAIRED if wording.endswith("short")]
        sources = {"short": short, "dense": [wording for wording in PAIRED if wording not in short]}
        return {source: [both_orders(scene, wordings) for scene in self.pairs] for source, wordings in sources.items()}


def make_data(*, num_text: int, num_pairs: int, num_held_out: int, num_single: int, split: str, seed: int) -> DemoData:
    """
    Draws the scenes of a run; equal arguments give equal scenes.

    Args:
        num_text, num_pairs, num_held_out, num_single (`int`): numbers of scenes, see [`DemoData`].
        split (`str`): `"test"`, or `"validation"` to choose settings: other scenes, from other scans.
        seed (`int`): seed of the scans' split and of all scenes.

    Returns:
        [`DemoData`]
    """
    scans = split_scans(seed)
    held_out: dict[str, list[Scene]] = {}
    single: dict[str, list[Scene]] = {}
    for part in ("test", "validation"):
        known = [scene for scenes in held_out.values() for scene in scenes]
        held_out[part] = sample_scenes(
            num_held_out,
            scans[part],
            seed=f"{part}-{seed}",
            num_digits=(2,),
            exclude=known,
            distinct_short_captions=True,
        )
        single[part] = sample_scenes(num_single, scans[part], seed=f"{part}-single-{seed}", num_digits=(1,))
    known = held_out["test"] + held_out["validation"]
    mixed = (1, 2, 2)
    pairs = sample_scenes(num_pairs, scans["train"], seed=f"pairs-{seed}", num_digits=mixed, exclude=known)
    text = sample_scenes(num_text, scans["train"], seed=f"text-{seed}", num_digits=mixed, exclude=known)
    return DemoData(text, pairs, held_out[split], single[split])


def both_orders(scene: Scene, wordings: list[str]) -> list[str]:
    """The captions of a scene in the given wordings, told forwards and backwards; each once."""
    captions = [caption(scene, wording, backwards=backwards) for wording in wordings for backwards in (False, True)]
    return list(dict.fromkeys(captions))


def text_pairs(scenes: list[Scene], seed: int) -> list[list[str]]:
    """
    Two different captions of each scene, in one language or in two, for stage 1.

    Args:
        scenes (`list[Scene]`): the scenes.
        seed (`int`): seed of the choice.

    Returns:
        `list[list[str]]`: two captions per scene.
    """
    rng = random.Random(f"text-pairs-{seed}")
    kinds, weights = list(LANGUAGE_PAIRS), list(LANGUAGE_PAIRS.values())
    rows = []
    for scene in scenes:
        first, second = rng.choices(kinds, weights)[0]
        one = rng.choice(both_orders(scene, [w for w in WORDINGS if w.startswith(first)]))
        others = both_orders(scene, [w for w in WORDINGS if w.startswith(second)])
        rows.append([one, rng.choice([other for other in others if other != one])])
    return rows
