# SPDX-License-Identifier: Apache-2.0
"""
Text of the demo: captions that tell a scene in eight ways, in English, German and Spanish, and dictionary lines.

Only the wordings in `PAIRED` ever stand beside a picture in training; the others are known to the language model from
text alone. They differ in words, in what a clause begins with and in how they say where two digits stand to each
other. A caption is a function of the scene's facts and of the order in which they are told.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from .scenes import COLOURS, DIGITS, SIZES, PlacedDigit, Scene, render, sample_scenes, split_scans


Digits = tuple[PlacedDigit, ...]
Relate = Callable[[PlacedDigit, str, PlacedDigit], str]
ENGLISH_PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
ENGLISH_CORNERS = (
    ("the upper left corner", "the upper edge", "the upper right corner"),
    ("the left edge", "the middle", "the right edge"),
    ("the lower left corner", "the lower edge", "the lower right corner"),
)
ENGLISH_COMPASS = (
    ("north west", "due north", "north east"),
    ("due west", "amid the frame", "due east"),
    ("south west", "due south", "south east"),
)
GERMAN_PLACES = (
    ("oben links", "oben mittig", "oben rechts"),
    ("links mittig", "genau im Zentrum", "rechts mittig"),
    ("unten links", "unten mittig", "unten rechts"),
)
SPANISH_PLACES = (
    ("arriba a la izquierda", "arriba en medio", "arriba a la derecha"),
    ("en medio a la izquierda", "justo en el centro", "en medio a la derecha"),
    ("abajo a la izquierda", "abajo en medio", "abajo a la derecha"),
)
GERMAN_DIGITS = ("Null", "Eins", "Zwei", "Drei", "Vier", "F\u00fcnf", "Sechs", "Sieben", "Acht", "Neun")
SPANISH_DIGITS = ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve")
# German colours and sizes as they stand before a feminine noun (all German digits are feminine).
GERMAN_COLOURS = dict(zip(COLOURS, ("rote", "gr\u00fcne", "blaue", "gelbe", "wei\u00dfe", "violette")))
GERMAN_SIZES = {"small": "kleine", "large": "gro\u00dfe"}
SPANISH_COLOURS = dict(zip(COLOURS, ("rojo", "verde", "azul", "amarillo", "blanco", "morado")))
SPANISH_SIZES = {"small": "peque\u00f1o", "large": "grande"}
COMPASS_SIZES = {"small": "tiny", "large": "huge"}
# Above, below, left of, right of, by the wording that uses the words.
RELATIONS = {
    "english_dense": ("above", "below", "left of", "right of"),
    "english_corners": ("over", "under", "before", "after"),
    "english_compass": ("northward", "southward", "westward", "eastward"),
    "german_dense": ("oberhalb", "unterhalb", "links von", "rechts von"),
    "spanish_dense": ("encima", "debajo", "a la izquierda", "a la derecha"),
}


def _join(parts: list[str], last: str) -> str:
    """Lists the parts with commas and the word `last` before the last one."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" {last} " + parts[-1]


def _sentences(clauses: list[str], told: Digits, wording: str, relate: Relate) -> str:
    """
    The clauses and, of two digits or more, how the first one told stands to the last one.

    Rows come first: only digits of one row are said to be left or right of each other.
    """
    first, last = told[0], told[-1]
    if first is not last:
        above, below, left, right = RELATIONS[wording]
        if first.row != last.row:
            word = above if first.row < last.row else below
        else:
            word = left if first.column < last.column else right
        clauses = [*clauses, relate(first, word, last)]
    return ". ".join(clauses) + "."


def _english_name(d: PlacedDigit) -> str:
    return f"{d.colour} {DIGITS[d.digit]}"


def _german_name(d: PlacedDigit) -> str:
    return f"{GERMAN_COLOURS[d.colour]} {GERMAN_DIGITS[d.digit]}"


def _spanish_name(d: PlacedDigit) -> str:
    return f"{SPANISH_DIGITS[d.digit]} {SPANISH_COLOURS[d.colour]}"


def _english_short(told: Digits) -> str:
    """ "a red seven and a blue two" """
    return _join([f"a {_english_name(d)}" for d in told], "and")


def _english_dense(told: Digits) -> str:
    """ "a small red seven at the top left and a large blue two in the centre. the red seven is above ..." """
    parts = [f"a {d.size} {_english_name(d)} {ENGLISH_PLACES[d.row][d.column]}" for d in told]
    return _sentences(
        [_join(parts, "and")], told, "english_dense",
        lambda first, word, last: f"the {_english_name(first)} is {word} the {_english_name(last)}",
    )  # fmt: skip


def _english_corners(told: Digits) -> str:
    """ "the upper left corner holds a red seven of small size; ... over the blue two stands the red seven." """
    parts = [f"{ENGLISH_CORNERS[d.row][d.column]} holds a {_english_name(d)} of {d.size} size" for d in told]
    return _sentences(
        ["; ".join(parts)], told, "english_corners",
        lambda first, word, last: f"{word} the {_english_name(last)} stands the {_english_name(first)}",
    )  # fmt: skip


def _english_compass(told: Digits) -> str:
    """ "tiny, red and north west: seven. huge, blue and amid the frame: two. seven lies northward from two." """
    places = [(COMPASS_SIZES[d.size], ENGLISH_COMPASS[d.row][d.column], d) for d in told]
    return _sentences(
        [f"{size}, {d.colour} and {place}: {DIGITS[d.digit]}" for size, place, d in places], told, "english_compass",
        lambda first, word, last: f"{DIGITS[first.digit]} lies {word} from {DIGITS[last.digit]}",
    )  # fmt: skip


def _german_short(told: Digits) -> str:
    """ "eine rote Sieben und eine blaue Zwei" """
    return _join([f"eine {_german_name(d)}" for d in told], "und")


def _german_dense(told: Digits) -> str:
    """ "oben links steht eine kleine rote Sieben, ... . die rote Sieben ist oberhalb der blauen Zwei." """
    parts = [f"{GERMAN_PLACES[d.row][d.column]} steht eine {GERMAN_SIZES[d.size]} {_german_name(d)}" for d in told]
    return _sentences(
        [", ".join(parts)], told, "german_dense",
        lambda first, word, last: f"die {_german_name(first)} ist {word} der {GERMAN_COLOURS[last.colour]}n "
        f"{GERMAN_DIGITS[last.digit]}",
    )  # fmt: skip


def _spanish_short(told: Digits) -> str:
    """ "un siete rojo y un dos azul" """
    return _join([f"un {_spanish_name(d)}" for d in told], "y")


def _spanish_dense(told: Digits) -> str:
    """ "un siete rojo y pequeno arriba a la izquierda, ... . el siete rojo queda encima del dos azul." """
    parts = [f"un {_spanish_name(d)} y {SPANISH_SIZES[d.size]} {SPANISH_PLACES[d.row][d.column]}" for d in told]
    return _sentences(
        [", ".join(parts)], told, "spanish_dense",
        lambda first, word, last: f"el {_spanish_name(first)} queda {word} del {_spanish_name(last)}",
    )  # fmt: skip


_TELLERS: dict[str, Callable[[Digits], str]] = {
    "english_short": _english_short,
    "english_dense": _english_dense,
    "english_corners": _english_corners,
    "english_compass": _english_compass,
    "german_short": _german_short,
    "german_dense": _german_dense,
    "spanish_short": _spanish_short,
    "spanish_dense": _spanish_dense,
}
WORDINGS = tuple(_TELLERS)
PAIRED = ("english_short", "english_dense", "english_corners")


def caption(scene: Scene, wording: str, *, backwards: bool = False) -> str:
    """Tells a scene."""
    return _TELLERS[wording](scene.digits[::-1] if backwards else scene.digits)


def glossary() -> list[tuple[str, ...]]:
    """What means the same: one tuple of words or phrases per digit, colour, size, place and relation."""
    entries: list[tuple[str, ...]] = list(zip(DIGITS, GERMAN_DIGITS, SPANISH_DIGITS))
    entries += [(name, word, f"{word}n", SPANISH_COLOURS[name]) for name, word in GERMAN_COLOURS.items()]
    entries += [(size, COMPASS_SIZES[size], GERMAN_SIZES[size], SPANISH_SIZES[size]) for size in SIZES]
    places = (ENGLISH_PLACES, ENGLISH_CORNERS, ENGLISH_COMPASS, GERMAN_PLACES, SPANISH_PLACES)
    entries += [tuple(table[row][column] for table in places) for row in range(3) for column in range(3)]
    return entries + list(zip(*RELATIONS.values()))


def dictionary_line(rng: random.Random) -> str:
    """Three entries of the glossary with three words each: "seven = Sieben = siete; tiny = small = kleine; ..."."""
    entries = rng.sample(glossary(), 3)
    return "; ".join(" = ".join(rng.sample(entry, 3)) for entry in entries) + "."


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
    """All scenes of a run."""

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
    """Draws the scenes of a run; equal arguments give equal scenes."""
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
    """Two different captions of each scene, in one language or in two, for stage 1."""
    rng = random.Random(f"text-pairs-{seed}")
    kinds, weights = list(LANGUAGE_PAIRS), list(LANGUAGE_PAIRS.values())
    rows = []
    for scene in scenes:
        first, second = rng.choices(kinds, weights)[0]
        one = rng.choice(both_orders(scene, [w for w in WORDINGS if w.startswith(first)]))
        others = both_orders(scene, [w for w in WORDINGS if w.startswith(second)])
        rows.append([one, rng.choice([other for other in others if other != one])])
    return rows
