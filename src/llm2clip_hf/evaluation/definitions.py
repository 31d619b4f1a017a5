# SPDX-License-Identifier: Apache-2.0
"""
The benchmarks as data: where each comes from, what a local copy looks like, how many rows it must have.

A local copy is `DATA_ROOT/NAME`, a folder, or `DATA_ROOT/NAME.parquet` (`.jsonl`, `.json`, `.csv`, `.tsv`); the
columns are the fields below. A repository on the Hub is named only with a revision at which its content is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


__all__ = ["TASKS", "HubSource", "TaskDefinition", "TaskKind"]

TaskKind = Literal["retrieval", "cross-lingual", "zero-shot", "cra"]


@dataclass(frozen=True)
class HubSource:
    """
    A data set on the Hub, pinned.

    Args:
        repo (`str`): name of the repository.
        revision (`str`): commit.
        split (`str`): split; for a `language_splits` source the splits are the languages.
        columns (mapping): fields of the definition that differ in this copy, e.g. `{"image_column": "img"}`.
        language_splits (`bool`): whether every language is a split of its own.
    """

    repo: str
    revision: str
    split: str = "test"
    columns: Mapping[str, Any] = field(default_factory=dict)
    language_splits: bool = False


@dataclass(frozen=True)
class TaskDefinition:
    """
    One evaluation: its data, its protocol and what its data must be like.

    Args:
        name (`str`): name of the task.
        kind (`str`): `"retrieval"`, `"cross-lingual"`, `"zero-shot"` or `"cra"`.
        title (`str`): name in tables and pictures.
        data (`str`, *optional*): name of the local copy; `name` by default.
        source (`str`): where the data come from.
        protocol (`str`): what is compared with what.
        path (`str`, *optional*): file, folder, pattern or Hub name of a task of one's own.
        hub (`HubSource`, *optional*): copy on the Hub.
        split (`str`, *optional*): split of a data set with several; `test` if it is there, or the only one.
        subset (`str`, *optional*): configuration of a data set on the Hub.
        image_column (`str`, *optional*): images or image paths; found by default.
        image_root (`str`, *optional*): folder that image paths are relative to.
        caption_columns (`tuple[str, ...]`, *optional*): captions; found by their names by default.
        key_column (`str`, *optional*): id of the image; `image_id` by default, if there is one.
        label_column (`str`, defaults to `"label"`): class, a number or a name.
        language_column (`str`, *optional*): language of the row, or the list of languages of the row's texts; by
            default `langs`, `languages`, `language`, `lang` or `locale`.
        text_column (`str`, *optional*): texts of a cross-lingual table; by default `texts`, `names`, `captions`.
        languages (`tuple[str, ...]`, *optional*): languages to measure; all by default.
        min_images (`int`, defaults to 2): languages with fewer images are left out, and counted.
        where (mapping): keep the rows whose column equals the value, e.g. `{"split": "test"}`.
        class_names (`str` or `tuple[str, ...]`, *optional*): names, or a file of them; `classes.txt` or
            `classes.json` beside the data by default, or what the label column says.
        templates (`str` or `tuple[str, ...]`, *optional*): templates with `{}`, or a file of them; `"a photo of the
            {}"` by default.
        first_captions (`int`, *optional*): use the first so many captions of each image.
        num_images, captions_per_image, num_captions, num_classes, num_languages, num_templates (`int`, *optional*):
            counts that the data must have.
        class_names_sha256, templates_sha256 (`str`, *optional*): digest of the lines that class names or templates
            must be.
        allow_duplicate_names (`bool`): whether classes may share a name.
        published (`str`, *optional*): the column of published numbers; `name` by default.
    """

    name: str
    kind: TaskKind
    title: str = ""
    data: str | None = None
    source: str = ""
    protocol: str = ""
    path: str | None = None
    hub: HubSource | None = None
    split: str | None = None
    subset: str | None = None
    image_column: str | None = None
    image_root: str | None = None
    caption_columns: tuple[str, ...] | None = None
    key_column: str | None = None
    label_column: str = "label"
    language_column: str | None = None
    text_column: str | None = None
    languages: tuple[str, ...] | None = None
    min_images: int = 2
    where: Mapping[str, str] = field(default_factory=dict)
    class_names: str | tuple[str, ...] | None = None
    templates: str | tuple[str, ...] | None = None
    first_captions: int | None = None
    num_images: int | None = None
    captions_per_image: int | None = None
    num_captions: int | None = None
    num_classes: int | None = None
    num_languages: int | None = None
    num_templates: int | None = None
    class_names_sha256: str | None = None
    templates_sha256: str | None = None
    allow_duplicate_names: bool = False
    published: str | None = None


_RETRIEVAL = "Each image against all captions, each caption against all images, cosine, no prompt."
_LONG = "One long caption per image; square similarity, no prompt."
_KARPATHY = "COCO 2014, the 5,000 test images of Karpathy's split (cocodataset.org; annotations CC BY 4.0)."
_IMAGENET = "ILSVRC 2012 validation images (image-net.org, terms of access), classes in the order of the WordNet ids."
_OPENAI_NAMES = "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"
_OPENAI_TEMPLATES = "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af"
# A store of web-dataset shards: images without names of the classes.
_IMAGENET_HUB = HubSource(
    "mteb/wds_imagenet1k",
    "b54c9af96641d8a2cba5d1144629c724de94ef76",
    columns={"image_column": "jpg", "label_column": "cls"},
)
_SINGLE = "Each image against one text per class, made with the single template of the paper (Table 3)."

_XM3600_LANGUAGES = tuple(
    "ar bn cs da de el en es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te th tr uk vi "
    "zh".split()
)

_DEFINITIONS = (
    TaskDefinition(
        "flickr30k", "retrieval", "Flickr30k",
        source="Flickr30k, the 1,000 test images of Karpathy's split (shannon.cs.illinois.edu/DenotationGraph).",
        protocol=_RETRIEVAL, num_images=1000, captions_per_image=5,
    ),
    TaskDefinition(
        "coco", "retrieval", "COCO", source=_KARPATHY, first_captions=5, num_images=5000, captions_per_image=5,
        protocol=_RETRIEVAL + " Of images with more than five captions the first five are used.",
    ),
    TaskDefinition(
        "coco-all", "retrieval", "COCO, all captions", data="coco", source=_KARPATHY, num_images=5000,
        protocol=_RETRIEVAL + " All captions of an image are used, as in the released evaluation of LLM2CLIP.",
    ),
    TaskDefinition(
        "sharegpt4v-1k", "retrieval", "ShareGPT4V-1k",
        source="The first 1,000 entries of share-captioner_coco_lcs_sam_1246k_1107.json (ShareGPT4V); the caption is "
        "the answer of the assistant.",
        protocol=_LONG, num_images=1000, captions_per_image=1,
    ),
    TaskDefinition(
        "urban1k", "retrieval", "Urban1k",
        source="Urban1k of Long-CLIP, 1,000 images with one text file each, of which the first line counts.",
        protocol=_LONG, num_images=1000, captions_per_image=1,
    ),
    TaskDefinition(
        "docci", "retrieval", "DOCCI",
        source="DOCCI (google.github.io/docci), entries of docci_descriptions.jsonlines with split `test`.",
        protocol=_LONG + " The whole test split, as in the released evaluation; the paper speaks of 1.5K images.",
        hub=HubSource(
            "not-lain/docci", "0bab441ace9ef111c8a5f360b195caf760e12da1",
            columns={"image_column": "image", "caption_columns": ("description",), "key_column": "example_id"},
        ),
        num_images=5000, captions_per_image=1,
    ),
    TaskDefinition(
        "iiw", "retrieval", "IIW-400",
        source="ImageInWords (github.com/google/imageinwords), IIW-400; the caption is the field `IIW`.",
        protocol=_LONG, num_images=400, captions_per_image=1,
    ),
    TaskDefinition(
        "flickr30k-cn", "retrieval", "Flickr30k-CN",
        source="Flickr30k-CN, human translations of the 1,000 test images.",
        protocol=_RETRIEVAL + " Chinese, without an instruction.", num_images=1000, captions_per_image=5,
    ),
    TaskDefinition(
        "coco-cn", "retrieval", "COCO-CN", source="COCO-CN (github.com/li-xirong/coco-cn), the 1,000 test images.",
        protocol=_RETRIEVAL + " Chinese, without an instruction.", num_images=1000,
    ),
    TaskDefinition(
        "xm3600", "cross-lingual", "XM3600",
        source="Crossmodal-3600 (google.github.io/crossmodal-3600): 3,600 images, 36 languages, 261,375 "
        "captions, CC BY 4.0.",
        protocol="Retrieval in each language on its own, all captions; then the mean over the languages.",
        hub=HubSource(
            "mteb/xm3600", "536cd45bbfe53de9b08c0483bb4a76a4bd3673fa", language_splits=True,
            columns={"image_column": "image", "text_column": "captions", "key_column": "image_id"},
        ),
        num_images=3600, num_languages=36,
        languages=_XM3600_LANGUAGES,
    ),
    TaskDefinition(
        "imagenet", "zero-shot", "ImageNet", source=_IMAGENET, protocol=_SINGLE, hub=_IMAGENET_HUB, num_images=50000,
        num_classes=1000, class_names_sha256=_OPENAI_NAMES, allow_duplicate_names=True,
    ),
    TaskDefinition(
        "imagenet-80", "zero-shot", "ImageNet, 80 templates", data="imagenet", source=_IMAGENET, hub=_IMAGENET_HUB,
        protocol="Each image against one vector per class, the normalised mean over OpenAI's 80 templates.",
        templates="templates.txt", num_images=50000, num_classes=1000, num_templates=80,
        class_names_sha256=_OPENAI_NAMES, templates_sha256=_OPENAI_TEMPLATES, allow_duplicate_names=True,
    ),
    TaskDefinition(
        "cifar10", "zero-shot", "CIFAR-10", source="CIFAR-10, test split.", protocol=_SINGLE, num_images=10000,
        hub=HubSource("mteb/cifar10", "69a62dd171e24a133d193073e73fda4dbb823266", columns={"image_column": "img"}),
        num_classes=10,
    ),
    TaskDefinition(
        "cifar100", "zero-shot", "CIFAR-100", source="CIFAR-100, test split, fine labels.", protocol=_SINGLE,
        hub=HubSource(
            "mteb/cifar100", "ac5511f885f65fb75d31a9d8810a8440913f7721",
            columns={"image_column": "img", "label_column": "fine_label"},
        ),
        num_images=10000, num_classes=100,
    ),
    TaskDefinition(
        "food101", "zero-shot", "Food-101", source="Food-101, test images.", protocol=_SINGLE, num_images=25250,
        hub=HubSource("mteb/food101", "7cca05bfde8fdad4a9b39ed14a881c800cc1dca2", "validation"), num_classes=101,
    ),
    TaskDefinition(
        "pets", "zero-shot", "Oxford-IIIT Pets", source="Oxford-IIIT Pets, test images.", protocol=_SINGLE,
        hub=HubSource("mteb/OxfordPets", "557b480fae8d69247be74d9503b378a09425096f"), num_images=3669, num_classes=37,
    ),
    TaskDefinition(
        "flowers102", "zero-shot", "Oxford Flowers 102", source="Oxford Flowers 102, test images.", protocol=_SINGLE,
        num_images=6149, num_classes=102,
    ),
    TaskDefinition(
        "cra", "cra", "CRA on COCO", data="coco", source=_KARPATHY, num_images=5000,
        protocol="The first two captions of each image; one retrieves the other among all images', both directions "
        "(paper, section 4.2). For LLM2CLIP this is the text vector after the adaptor.",
    ),
)  # fmt: skip

TASKS: dict[str, TaskDefinition] = {definition.name: definition for definition in _DEFINITIONS}
