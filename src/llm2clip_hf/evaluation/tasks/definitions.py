# SPDX-License-Identifier: Apache-2.0
"""Tasks by name, by path or from a YAML file: what a user writes becomes definitions."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl


TaskKind = Literal["retrieval", "cross-lingual", "zero-shot", "cra", "composition", "winoground"]


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
    negative_columns: tuple[str, ...] | None = None
    category_column: str | None = None
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
    published: str | None = None


def read_table(name: str) -> Any:
    """A YAML file beside this one."""
    import yaml

    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _benchmark(name: str, entry: dict[str, Any]) -> TaskDefinition:
    if hub := entry.pop("hub", None):
        entry["hub"] = HubSource(**hub | {"columns": _with_tuples(hub.get("columns", {}))})
    return TaskDefinition(name=name, **_with_tuples(entry))


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


TASKS: dict[str, TaskDefinition] = {
    name: _benchmark(name, entry) for name, entry in read_table("benchmarks.yaml").items()
}
_KINDS: tuple[str, ...] = get_args(TaskKind)
_TUPLES = ("caption_columns", "negative_columns", "languages")
_NUMBERS = ("first_captions", "min_images")
_TEXTS = (
    "title", "split", "subset", "image_column", "image_root", "key_column", "label_column", "language_column",
    "text_column", "category_column", "class_names", "templates", "published",
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
        elif key in ("class_names", "templates") and isinstance(value, (list, tuple)):
            fields[key] = tuple(map(str, value))
        elif key == "where" and isinstance(value, Mapping):
            fields[key] = {str(column): str(wanted) for column, wanted in value.items()}
        elif key in _TEXTS:
            fields[key] = str(value)
        else:
            known = sorted((*_TEXTS, *_TUPLES, *_NUMBERS, *_COUNTS, "where"))
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


__all__ = ["TASKS", "TaskDefinition", "resolve_tasks"]
