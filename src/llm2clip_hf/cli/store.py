# SPDX-License-Identifier: Apache-2.0
"""`llm2clip store`: finish, check, mend, extend and describe stores of caption embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from .embed_captions import EmbedCaptionsOptions, describe, embed_into
from .options import option, parse_options, positional


EXAMPLES = """\
  llm2clip store merge store
  llm2clip store merge store --others machine-1 machine-2
  llm2clip store verify store
  llm2clip store repair store --llm llm-cc --data pairs.parquet
  llm2clip store append store --others newer-store
  llm2clip store info s3://bucket/store"""
_ACTIONS = {
    "merge": "write the index over the shards of a folder and those of `others`, which are copied into it",
    "verify": "read all files and compare their checksums",
    "repair": "embed again what is missing, damaged or of other captions, with the options of embed-captions",
    "append": "put copies of the shards of `others` behind those of the store",
    "info": "say what the store holds and what made it",
}


@dataclass(kw_only=True)
class StoreOptions(EmbedCaptionsOptions):
    action: str = positional(f"What to do: {'; '.join(f'{name}: {text}' for name, text in _ACTIONS.items())}.")
    store: str = positional("Folder of the store, or an address such as s3://bucket/store.")
    others: list[str] | None = option("Of `merge` and `append`: folders with further shards.")


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    (options,) = parse_options(
        argv,
        verb="store",
        description="Finish, check, mend, extend and describe stores of caption embeddings.",
        examples=EXAMPLES,
        own=StoreOptions,
    )
    action = options.action
    if action not in _ACTIONS:
        raise ValueError(f"ACTION must be one of {', '.join(_ACTIONS)}, got {action!r}.")
    if (options.others is None) != (action not in ("append", "merge")) and action != "merge":
        raise ValueError(
            f"`--others` is needed by `append`, taken by `merge`, and by no other; the action is {action}."
        )
    if action == "repair":
        options.output_dir, options.repair = options.store, True
        return embed_into(options)
    taken = ("action", "store", "others")
    if given := [f.name for f in fields(options) if f.name not in taken and getattr(options, f.name) != f.default]:
        raise ValueError(f"`--{given[0]}` has no effect on `llm2clip store {action}`. Leave it out.")
    if action in ("verify", "info"):
        {"verify": verify, "info": info}[action](options.store)
        return 0
    from ..data import CaptionEmbeddingStore
    from ..data.store import build
    from ..data.store.folder import StoreFolder

    folder, others = StoreFolder(options.store), [StoreFolder(other) for other in options.others or ()]
    {"merge": build.merge, "append": build.append}[action](folder, others)
    describe(CaptionEmbeddingStore.open(options.store))
    return 0


def verify(path: str) -> None:
    """Compares every file of a store, or every shard of an unfinished one, with its checksum."""
    from ..data import CaptionEmbeddingStore
    from ..data.store import build
    from ..data.store.folder import StoreFolder

    folder = StoreFolder(path)
    names = build.shard_names(folder)
    if folder.size(build.INDEX_FILE) is None and names:
        if damage := [text for name in names if (text := build.damage_of(folder, name))]:
            raise ValueError(f"{'; '.join(damage)}. Embed their captions again with `llm2clip store repair`.")
        print(f"{path}: {len(names)} shards without an index, all checksums agree")
        return
    store = CaptionEmbeddingStore.open(path)
    store.verify()
    print(f"{path}: {store.num_captions} captions of {store.num_images} images, all checksums agree")


def info(path: str) -> None:
    """Prints what a store holds and its fingerprint."""
    from ..data import CaptionEmbeddingStore

    store = CaptionEmbeddingStore.open(path)
    describe(store)
    print(f"keys      {'one per image' if store.has_keys else 'none'}")
    for name, value in store.fingerprint.items():
        print(f"made by   {name} {value}")
