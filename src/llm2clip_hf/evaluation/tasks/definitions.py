# SPDX-License-Identifier: Apache-2.0
"""Tasks by name, by path or from a YAML file: what a user writes becomes definitions."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl


TaskKind = Literal["retrieval", "cross-lingual", "zero-shot", "cra"]


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub, pinned."""

    repo: str
    revision: str
    split: str = "test"
    columns: Mapping[str, Any] = field(default_factory=dict)
    language_splits: bool = False


@dataclass(frozen=True)
class TaskDefinition:
    """One evaluation: its data, its protocol and what its data must be like."""

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
_KINDS: tuple[str, ...] = get_args(TaskKind)
_TUPLES = ("caption_columns", "languages")
_NUMBERS = ("first_captions", "min_images")
_FLAGS = ("allow_duplicate_names",)
_TEXTS = (
    "title", "split", "subset", "image_column", "image_root", "key_column", "label_column", "language_column",
    "text_column", "class_names", "templates", "published",
)  # fmt: skip
_COUNTS = tuple(
    field.name
    for field in dataclasses.fields(TaskDefinition)
    if field.name.startswith("num_") or field.name == "captions_per_image"
)


def resolve_tasks(specs: Sequence[str | TaskDefinition]) -> list[TaskDefinition]:
    """
    Definitions of tasks that are named in any of four ways, all of them distinct.

    Args:
        specs (sequence of `str` or `TaskDefinition`):
            A name of `TASKS`; `KIND:PATH`, with settings as in `zero-shot:PATH?label_column=name&split=validation`
            (`where=COLUMN:VALUE` selects rows; lists are separated by commas); a `.yaml` or `.yml` file with one
            mapping of settings per task name, each with `path` and `kind`; or a path, which is a retrieval task. A
            definition stays as it is.

    Returns:
        `list[TaskDefinition]`: one per task; names are distinct.

    Raises:
        ValueError: if a name, kind or setting is unknown, or two tasks have the same name.

    Example:
    >>> [task] = resolve_tasks(["zero-shot:flowers/test.parquet?label_column=label_name"])
    >>> task.name, task.kind, task.label_column
    ('flowers/test', 'zero-shot', 'label_name')
    """
    if isinstance(specs, (str, TaskDefinition)):
        raise ValueError(f"`{specs}` is one task where a list of tasks is expected. Put it into a list.")
    if not specs:
        raise ValueError(f"No task is given. Name at least one of {sorted(TASKS)}, or a path.")
    tasks: list[TaskDefinition] = []
    for spec in specs:
        if isinstance(spec, TaskDefinition):
            tasks.append(spec)
        elif spec in TASKS:
            tasks.append(TASKS[spec])
        elif spec.partition(":")[0] in _KINDS:
            kind, _, rest = spec.partition(":")
            path, _, query = rest.partition("?")
            tasks.append(_own_task(kind, path, _query_settings(query, spec), spec))
        elif spec.endswith((".yaml", ".yml")):
            tasks += _tasks_of_file(spec)
        elif Path(spec.partition("?")[0]).exists() or "/" in spec or set(spec) & set("*?"):
            path, _, query = (spec, "", "") if Path(spec).exists() else spec.partition("?")
            tasks.append(_own_task("retrieval", path, _query_settings(query, spec), spec))
        else:
            raise ValueError(f"There is no task or file `{spec}`. Tasks: {', '.join(TASKS)}; or `KIND:PATH`.")
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"The tasks {repeated} are named more than once. Drop one, or name them apart in a YAML file."
        )
    return tasks


def _query_settings(query: str, spec: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
        if key == "where":
            column, separator, wanted = value.partition(":")
            if not separator:
                raise ValueError(f"`where={value}` in `{spec}` is not of the form `where=COLUMN:VALUE`.")
            settings.setdefault("where", {})[column] = wanted
        else:
            settings[key] = value.split(",") if key in _TUPLES else value
    return settings


def _own_task(kind: str, path: str, settings: Mapping[str, Any], spec: str, name: str | None = None) -> TaskDefinition:
    if not path:
        raise ValueError(f"Task `{spec}` names no path. Write `{kind}:PATH`.")
    fields: dict[str, Any] = {}
    for key, value in settings.items():
        if key in (*_NUMBERS, *_COUNTS):
            if not str(value).isdigit() or int(value) < 1:
                raise ValueError(f"`{key}` of task `{spec}` is {value!r}. Give a positive integer.")
            fields[key] = int(value)
        elif key in _TUPLES:
            fields[key] = (value,) if isinstance(value, str) else tuple(map(str, value))
        elif key in _FLAGS:
            fields[key] = str(value).lower() in ("true", "1", "yes")
        elif key in ("class_names", "templates") and isinstance(value, (list, tuple)):
            fields[key] = tuple(map(str, value))
        elif key == "where" and isinstance(value, Mapping):
            fields[key] = {str(column): str(wanted) for column, wanted in value.items()}
        elif key in _TEXTS:
            fields[key] = str(value)
        else:
            known = sorted((*_TEXTS, *_TUPLES, *_NUMBERS, *_FLAGS, *_COUNTS, "where"))
            raise ValueError(f"Task `{spec}` has no setting `{key}`. It has {', '.join(known)}.")
    if name is None:
        short = Path(path)
        name = "/".join([*short.parts[-2:-1], short.stem]).lstrip("/") if short.stem else path
    return TaskDefinition(**{"title": name, "source": "own data", "name": name, "kind": kind, "path": path} | fields)


def _tasks_of_file(path: str) -> list[TaskDefinition]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"The task file `{path}` does not exist.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The task file `{path}` is not valid YAML: {error}") from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"The task file `{path}` holds no mapping from task names to settings.")
    tasks = []
    for name, entry in content.items():
        if not isinstance(entry, Mapping) or "path" not in entry:
            raise ValueError(f"Task `{name}` of `{path}` is {entry!r}, not a mapping with at least `path`.")
        settings = {key: value for key, value in entry.items() if key not in ("path", "kind")}
        kind = entry.get("kind", "retrieval")
        if kind not in _KINDS:
            raise ValueError(f"Task `{name}` of `{path}` has the kind {kind!r}. Choose from {', '.join(_KINDS)}.")
        place = Path(entry["path"])
        # Relative to the file, where it exists there: a task file travels with its data.
        beside = Path(path).parent / place
        tasks.append(
            _own_task(kind, str(beside if beside.exists() else place), settings, f"{name} of {path}", str(name))
        )
    return tasks


__all__ = ["TASKS", "HubSource", "TaskDefinition", "TaskKind", "resolve_tasks"]
