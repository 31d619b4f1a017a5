# SPDX-License-Identifier: Apache-2.0
"""The checkpoints that the authors of LLM2CLIP have released, as facts: what they are, their licences, their numbers.

What is not established is left out. The numbers are those of the paper and of its issue tracker, each with its source;
none has been measured with this package.
"""

from dataclasses import dataclass
from pathlib import Path


PAPER = "arXiv 2411.04997"
_LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"
_LLAMA32 = "meta-llama/Llama-3.2-1B-Instruct"
LLM_8B = "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
LLM_1B = "microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned"
_SETS = ("Flickr30k", "COCO", "ShareGPT4V", "Urban1k", "DOCCI")


@dataclass(frozen=True)
class Numbers:
    """Published numbers of one model."""

    source: str
    values: dict[str, str]


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A released checkpoint."""

    repo_id: str
    contents: str
    license: str
    license_note: str
    llm: str
    parameters: float
    llm_hidden_size: int
    projection_dim: int = 0
    image_size: int = 0
    weights_file: str = ""
    numbers: tuple[Numbers, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo_id.split("/")[1]

    @property
    def is_llm(self) -> bool:
        """Whether it is a language model alone."""
        return self.projection_dim == 0


def _retrieval(source: str, *values: str) -> Numbers:
    return Numbers(source, dict(zip(_SETS, values, strict=True)))


_APACHE = "The repository states apache-2.0 for these weights. The LLM that it needs has its own licence (Meta Llama)."
_ROW = (
    "The row is the paper's for this tower and the same 8B LLM; that the released weights are those of the row is not "
    "stated."
)

RELEASED = (
    ReleasedCheckpoint(
        "microsoft/LLM2CLIP-Openai-B-16",
        "OpenAI CLIP ViT-B/16 at 224 pixels, projection and text adaptor, as a folder with remote code",
        "apache-2.0",
        _APACHE,
        LLM_8B,
        360.55,
        4096,
        1280,
        224,
        numbers=(
            _retrieval(
                f"{PAPER} v1, CLIP-B/16 + LLM2CLIP with Llama-3-8B",
                *("89.2 / 78.1", "62.2 / 48.7", "98.1 / 97.4", "86.1 / 90.0", "84.1 / 85.0"),
            ),
        ),
        notes=(_ROW, "The first commit held the vision side only."),
    ),
    ReleasedCheckpoint(
        "microsoft/LLM2CLIP-Openai-L-14-224",
        "OpenAI CLIP ViT-L/14 at 224 pixels, projection and text adaptor, as a folder with remote code",
        "apache-2.0",
        _APACHE,
        LLM_8B,
        578.26,
        4096,
        1280,
        224,
        numbers=(
            _retrieval(
                f"{PAPER} v1, CLIP-L/14 + LLM2CLIP with Llama-3-8B",
                *("92.6 / 81.7", "64.9 / 52.5", "98.4 / 98.4", "87.6 / 92.0", "87.6 / 88.7"),
            ),
        ),
        notes=(_ROW,),
    ),
    ReleasedCheckpoint(
        "microsoft/LLM2CLIP-Openai-L-14-336",
        "OpenAI CLIP ViT-L/14 at 336 pixels, projection and text adaptor, as a folder with remote code",
        "apache-2.0",
        _APACHE,
        LLM_8B,
        578.59,
        4096,
        1280,
        336,
        numbers=(
            _retrieval(
                f"{PAPER} v1, CLIP-L/14-336 + LLM2CLIP on 60 M pairs with Llama-3-8B",
                *("93.9 / 82.3", "68.5 / 54.8", "98.9 / 99.1", "94.6 / 95.9", "89.6 / 90.6"),
            ),
        ),
        notes=(
            _ROW,
            "Released on 8 November 2024 without the adaptor, which followed on 17 November (DOI 10.57967/hf/3480).",
        ),
    ),
    ReleasedCheckpoint(
        "microsoft/LLM2CLIP-EVA02-B-16",
        "EVA02-CLIP-B/16 at 224 pixels, projection and text adaptor in a `.pt` file, and the vision side as a folder",
        "apache-2.0",
        _APACHE,
        LLM_8B,
        360.62,
        4096,
        1280,
        224,
        weights_file="LLM2CLIP-EVA02-B-16.pt",
        numbers=(
            _retrieval(
                f"{PAPER} v6 table 1, EVA02-B/16 + LLM2CLIP on 15 M pairs, with Llama-3.1-8B instead of this LLM",
                *("91.2 / 81.4", "66.0 / 53.9", "98.5 / 98.5", "88.2 / 91.3", "86.8 / 88.5"),
            ),
        ),
        notes=("The `.pt` file was added on 22 November 2024. It is the whole model, and what is converted.",),
    ),
    ReleasedCheckpoint(
        "microsoft/LLM2CLIP-EVA02-L-14-336",
        "EVA02-CLIP-L/14 at 336 pixels, projection and text adaptor in a `.pt` file",
        "apache-2.0",
        _APACHE,
        LLM_8B,
        578.73,
        4096,
        1280,
        336,
        weights_file="LLM2CLIP-EVA02-L-14-336.pt",
        numbers=(
            Numbers("microsoft/LLM2CLIP issue 28, a user's measurement of these weights", {"Urban1k": "96.0 / 97.5"}),
            _retrieval(
                f"{PAPER} v6 table 1, EVA02-L/14-336 + LLM2CLIP on 60 M pairs, with Llama-3.1-8B instead of this LLM",
                *("95.9 / 85.4", "72.4 / 58.8", "98.8 / 99.2", "95.5 / 97.3", "90.7 / 92.6"),
            ),
        ),
        notes=("Its authors say that it was trained on 60 M pairs (issue 28).",),
    ),
    ReleasedCheckpoint(
        "microsoft/LLM2CLIP-Llama3.2-1B-EVA02-L-14-336",
        "EVA02-CLIP-L/14 at 336 pixels, projection and text adaptor for the 1B LLM in a `.pt` file, half precision",
        "apache-2.0",
        _APACHE,
        LLM_1B,
        374.73,
        2048,
        1280,
        336,
        numbers=(
            Numbers("microsoft/LLM2CLIP issue 28, a user's measurement of these weights", {"Urban1k": "93.6 / 94.1"}),
        ),
        notes=("Its authors say that it was trained on 60 M pairs (issue 28).",),
    ),
    ReleasedCheckpoint(
        LLM_8B,
        "Llama-3-8B-Instruct, tuned on captions and merged, with remote code that makes it bidirectional",
        "llama3",
        "The weights derive from Meta Llama 3: the Meta Llama 3 Community License applies.",
        _LLAMA3,
        0,
        4096,
        numbers=(
            Numbers(f"{PAPER} v4 to v6, caption retrieval accuracy (CRA) of Llama3-8B-CC, COCO 5K", {"CRA": "29.5"}),
        ),
        notes=("Its remote code points to a repository of another owner; it is neither needed nor run.",),
    ),
    ReleasedCheckpoint(
        LLM_1B,
        "Llama-3.2-1B-Instruct, tuned on captions and merged, with remote code that makes it bidirectional",
        "llama3.2",
        "The repository states mit; the weights derive from Meta Llama 3.2, whose Community License applies too.",
        _LLAMA32,
        0,
        2048,
        numbers=(
            Numbers(f"{PAPER} v4 to v6, caption retrieval accuracy (CRA) of Llama3.2-1B-CC, COCO 5K", {"CRA": "29.4"}),
        ),
    ),
)


def find_release(source: str | Path) -> ReleasedCheckpoint | None:
    """The released checkpoint that a source is by its name."""
    text = str(source)
    for release in RELEASED:
        path = Path(text)
        if (
            text == release.repo_id
            or path.name == release.name
            or path.name in (release.weights_file, f"{release.name}.pt")
        ):
            return release
    return None


__all__ = ["LLM_1B", "LLM_8B", "PAPER", "RELEASED", "Numbers", "ReleasedCheckpoint", "find_release"]
