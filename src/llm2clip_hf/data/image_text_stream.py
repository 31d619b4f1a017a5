# SPDX-License-Identifier: Apache-2.0
"""
Image-text pairs from shards that are read in order: the samples of `ImageTextDataset` without random access.

An epoch is an equal share of samples for every rank, and a position in it means the same samples in a resumed run.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .. import distributed
from .image_text import PLACEHOLDER, ImageTextCollator
from .images import ImageTransform, content_id, decode_for, image_id
from .reports import SkipLog, SkipReport, check_choice, positive_number
from .sampling import (
    Layout,
    SampleDraws,
    WorkerPlan,
    batches_of_worker,
    check_sub_captions,
    checked_weights,
    plan_worker,
)
from .shard_index import SamplesPerShard, make_shards, resolve_counts, source_fields, warn_of_absent_sources
from .shards import WEIGHT, RawSample
from .store.embedding_store import CaptionEmbeddingStore


# So many unusable samples in a row are no accident: the data as a whole cannot be read.
_MAX_ATTEMPTS = 32
_ANY_WORKERS = -1


class ImageTextStream(torch.utils.data.IterableDataset):
    """
    Images with captions from webdataset tar shards, parquet shards or a streaming `datasets` data set.

    An epoch is `num_samples // world_size` samples per rank. The order is that of a permutation of the shards and a
    shuffle buffer per worker. Make the loader with `loader`, which hands the batch size to the split among workers.

    A sample that is skipped is replaced by one that is in the shuffle buffer at that moment, so that batches and steps
    keep their number, and a position in the epoch means the same samples in a resumed run.

    Args:
        shards: paths, or patterns with braces and wildcards (`"cc3m/{00000..00287}.tar"`), of tar files in the
            webdataset layout (also `.tar.gz`, `.tar.zst`, which are unpacked whenever they are read) or of parquet
            files; or a `datasets.IterableDataset`.
        caption_fields (mapping from source name to `str`, *optional*):
            Where the captions of each source are: in tar shards an extension (`"txt"`) or an entry of the JSON member
            (`"json.caption"`, `"json.a.b"`), otherwise a column or an entry of one; a conversation gives what the
            model says. A field holds a string or a list of strings; empty ones count as
            missing. Gives samples with `text`; together with `store`, the text beside its embedding.
        store (`CaptionEmbeddingStore`, *optional*):
            Gives samples with `llm_embeds` instead, looked up by the key of the sample; made with `keys`. Where
            `caption_fields` are given as well, they must be those that the store was made with, and every sample must
            have as many captions in each as the store has.
        transform: as for `ImageTextDataset`.
        caption_weights (mapping from source name to `float`, *optional*): as for `ImageTextDataset`.
        seed (`int`, defaults to 0): seed of order, captions and crops.
        sub_captions (`float`, defaults to 0): as for `ImageTextDataset`.
        shuffle_buffer (`int`, defaults to 5000):
            Samples that each worker holds, undecoded, to shuffle them; the original code's value. 0 keeps the order.
        samples_per_shard (*optional*):
            Number of samples of every shard: one number, one per shard, a mapping from file name, or the path of a
            JSON file with such a mapping. Without it they are counted: tar files from their headers, which takes a
            while for millions of samples (`count_samples` does it once), parquet files from their metadata.
        weight_column (`str`, *optional*):
            Where the weight of each pair is, a positive number: as of `caption_fields`. Gives samples with `weight`.
        image_column, key_column (`str`, *optional*): columns of images (`image`, or the only one, by default) and of
            keys in parquet shards and streaming data sets. Tar shards have keys of their own; there `image_column` is
            the extension of the image, where a sample has several.
        rank, world_size (`int`, *optional*):
            Which part of the data this process reads; those of the process group, or of the environment that
            `torchrun` sets, by default.
        on_bad_image (`"error"` or `"skip"`, defaults to `"error"`): what to do with an image that cannot be read.
        on_bad_sample (`"error"` or `"skip"`, defaults to `"error"`):
            What to do with a sample without image or caption, with members that do not follow each other, or whose key
            is not in the store; and with a shard that is cut off, of which the readable part is used.

    Attributes:
        shards_itself (`bool`): `True`; a loader must not split the samples among ranks again.
        num_samples (`int`): samples of all shards; `len(stream)` is the number per rank and epoch.

    Raises:
        ValueError: if no shard is found, one cannot be read, counts and shards disagree, or there are fewer samples
            than ranks. While reading: for a bad sample, named with its shard and key.

    Example:
    >>> import io, tarfile, tempfile
    >>> from PIL import Image
    >>> from llm2clip_hf.data import CenterCropTransform
    >>> path = tempfile.mkdtemp() + "/0.tar"
    >>> image = io.BytesIO()
    >>> Image.new("RGB", (9, 7)).save(image, "PNG")
    >>> with tarfile.open(path, "w") as tar:
    ...     for name, content in (("a.png", image.getvalue()), ("a.txt", b"a cat")):
    ...         member = tarfile.TarInfo(name)
    ...         member.size = len(content)
    ...         tar.addfile(member, io.BytesIO(content))
    >>> stream = ImageTextStream(path, {"real": "txt"}, transform=CenterCropTransform(8))
    >>> [(sample["text"], sample["index"]) for sample in stream]
    [('a cat', 0)]
    """

    shards_itself = True

    def __init__(
        self,
        shards: Any,
        caption_fields: Mapping[str, str] | None = None,
        *,
        store: CaptionEmbeddingStore | None = None,
        transform: ImageTransform,
        caption_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        sub_captions: float = 0.0,
        shuffle_buffer: int = 5000,
        samples_per_shard: SamplesPerShard | None = None,
        weight_column: str | None = None,
        image_column: str | None = None,
        key_column: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        on_bad_sample: Literal["error", "skip"] = "error",
    ) -> None:
        fields = source_fields(caption_fields, store)
        check_sub_captions(sub_captions, store is not None)
        if store is not None and not store.has_keys:
            raise ValueError(
                f"The store `{store.path}` has no keys, by which a stream looks samples up. Call `embed_captions` "
                "again with the same arguments and `keys`; it adds them without encoding."
            )
        if shuffle_buffer < 0:
            raise ValueError(f"`shuffle_buffer` must not be negative, got {shuffle_buffer}. 0 switches it off.")
        check_choice("on_bad_image", on_bad_image)
        check_choice("on_bad_sample", on_bad_sample)
        self.store, self.transform, self.shuffle_buffer = store, transform, shuffle_buffer
        self.batch_size = 1
        names = store.source_names if store is not None else tuple(fields)
        self._draws = SampleDraws(seed, checked_weights(caption_weights, names), sub_captions)
        self._fields = fields
        self._on_bad_image, self._on_bad_sample = on_bad_image, on_bad_sample
        self._skips = SkipLog()
        read = fields | ({} if weight_column is None else {WEIGHT: weight_column})
        self._shards = make_shards(shards, read, image_column, key_column)
        damages: list[str] | None = [] if on_bad_sample == "skip" else None
        self._counts = resolve_counts(self._shards, samples_per_shard, damages)
        self._counts_stated = samples_per_shard is not None
        for damage in damages or ():
            self._skips.add(damage)
        warn_of_absent_sources(self._shards, self._counts, fields)
        self._first_index = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)
        self.num_samples = int(self._first_index[-1])
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        # Epoch, first batch, whether to stand placeholders in for the batches before it, and the number of workers
        # that this position belongs to. In shared memory, for persistent workers.
        self._position = torch.tensor([-1, 0, 0, _ANY_WORKERS]).share_memory_()
        self.rank, self.world_size = 0, 1
        self.shard_over(*_this_process(rank, world_size))

    def __len__(self) -> int:
        """Samples per rank and epoch."""
        return self.num_samples // self.world_size

    @property
    def skipped(self) -> SkipReport:
        """Samples and shards that were skipped so far, in worker processes too."""
        return self._skips.report()

    def shard_over(self, rank: int, world_size: int) -> None:
        """
        Reads the part of one of several processes.

        Args:
            rank (`int`): number of this process among those that read different data.
            world_size (`int`): how many there are.

        Raises:
            ValueError: if the rank is out of range, or there are fewer samples than processes.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be in [0, {world_size}) for `world_size` {world_size}, got {rank}.")
        if self.num_samples < world_size:
            raise ValueError(
                f"{world_size} processes share {self.num_samples} samples in {len(self._shards)} shards, so some "
                "would have none. Use fewer processes or more data."
            )
        self.rank, self.world_size = rank, world_size

    def loader(
        self, batch_size: int, *, num_workers: int = 0, collate_fn: Any = None, **kwargs: Any
    ) -> torch.utils.data.DataLoader:
        """
        A plain `DataLoader` of this rank's batches, of which at most the last is not full.

        Args:
            batch_size (`int`): samples per batch.
            num_workers (`int`, defaults to 0): worker processes.
            collate_fn (*optional*): `ImageTextCollator()` by default.
            kwargs: further arguments of `DataLoader`, e.g. `drop_last` or `persistent_workers`.

        Returns:
            `torch.utils.data.DataLoader`: do not let accelerate split it again.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
        self.batch_size = batch_size
        collate_fn = ImageTextCollator() if collate_fn is None else collate_fn
        return torch.utils.data.DataLoader(
            self, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn, **kwargs
        )

    def set_epoch(self, epoch: int) -> None:
        """Read epoch `epoch` from the next iteration on, in worker processes too."""
        self._epoch.fill_(epoch)

    def resume_at(self, epoch: int, batch: int, *, placeholders: bool = False, num_workers: int | None = None) -> None:
        """
        Begin epoch `epoch` at batch `batch` of this rank; other epochs are read from their beginning.

        Nothing before that batch is decoded, and only shards with samples that are still to come are opened.

        Args:
            epoch (`int`): epoch to resume in; call `set_epoch` with it as well, or let the Trainer do so.
            batch (`int`): number of batches of this rank that were used.
            placeholders (`bool`, defaults to `False`):
                Yield an empty batch for each of those batches, for a loop that reads and drops them, as the Trainer
                does. `ImageTextCollator` makes `{}` of such a batch.
            num_workers (`int`, *optional*): workers of the run so far; another number is then refused.
        """
        limit = -(-len(self) // self.batch_size)
        if epoch < 0 or not 0 <= batch <= limit:
            raise ValueError(
                f"Cannot resume at epoch {epoch}, batch {batch}: an epoch has {limit} batches of {self.batch_size}. "
                "Make the loader first, with the batch size of the run so far."
            )
        workers = _ANY_WORKERS if num_workers is None else max(1, num_workers)
        self._position.copy_(torch.tensor([epoch, batch, int(placeholders), workers]))

    def state_dict(self, batch: int, *, num_workers: int = 0) -> dict[str, Any]:
        """
        The position after `batch` batches of this rank in the current epoch, with all that the order depends on.

        Args:
            batch (`int`): batches used; the loader may have read ahead, so only the training loop knows.
            num_workers (`int`, defaults to 0): workers of the loader.

        Returns:
            `dict` for `load_state_dict`; the same on all ranks.
        """
        return {**self._identity(), "epoch": int(self._epoch), "batch": batch, "num_workers": max(1, num_workers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Continue where `state_dict` was made: sets the epoch, and the next iteration begins at the next batch.

        Raises:
            ValueError: if data, seed, buffer, batch size or number of processes differ; the order would be another.
        """
        identity = self._identity()
        differing = {name: (state.get(name), value) for name, value in identity.items() if state.get(name) != value}
        if differing:
            raise ValueError(
                f"The state belongs to another stream; (state, stream) differ in {differing}. Resume with the same "
                "data, options, batch size and number of processes."
            )
        self.set_epoch(state["epoch"])
        self.resume_at(state["epoch"], state["batch"], num_workers=state["num_workers"])

    def _identity(self) -> dict[str, Any]:
        lines = [f"{Path(shard.name).name}:{count}" for shard, count in zip(self._shards, self._counts.tolist())]
        return {
            "shards": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "seed": self._draws.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }

    def __iter__(self) -> Iterator[Any]:
        """"""
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        # Read once: another worker may be told the next epoch while this one is still reading.
        epoch = int(self._epoch)
        resumed_epoch, batch, placeholders, expected_workers = self._position.tolist()
        start = batch if resumed_epoch == epoch else 0
        if start and expected_workers not in (_ANY_WORKERS, num_workers):
            raise ValueError(
                f"The position was saved with {expected_workers} workers, the loader has {num_workers}, which read in "
                "another order. Resume with the same `num_workers`."
            )
        if not placeholders:
            # The loader asks worker 0 first; the next batch is the turn of this one.
            worker = (worker + start) % num_workers
        plan = plan_worker(
            self._counts,
            Layout(self.rank, self.world_size, worker, num_workers, self.batch_size),
            seed=self._draws.seed,
            epoch=epoch,
            buffer=self.shuffle_buffer,
        )
        skip = min(batches_of_worker(start, worker, num_workers) * self.batch_size, len(plan.order))
        if placeholders:
            yield from (PLACEHOLDER for _ in range(skip))
        yield from self._samples(plan, skip)

    def _samples(self, plan: WorkerPlan, skip: int) -> Iterator[dict[str, Any]]:
        if skip == len(plan.order):
            return
        first, size = int(plan.order.min()), max(1, self.shuffle_buffer)
        order = plan.order[skip:].tolist()
        incoming = np.sort(plan.order[skip:]).tolist()
        raw = self._raw_samples(plan, incoming)
        held: dict[int, RawSample] = {}
        read = 0
        for turn, position in enumerate(order, start=skip):
            # What the buffer holds at this turn, in a resumed run as in one that was not interrupted.
            while read < len(incoming) and incoming[read] < first + turn + size:
                held[incoming[read]] = next(raw)
                read += 1
            yield self._usable_sample(plan, position, held)
            del held[position]

    def _usable_sample(self, plan: WorkerPlan, wanted: int, held: Mapping[int, RawSample]) -> dict[str, Any]:
        """The sample at a position; one that the buffer holds in its place if it is bad and may be skipped."""
        position, raw = wanted, held[wanted]
        others = sorted(held.keys() - {wanted})
        last_error: ValueError | None = None
        for attempt in range(_MAX_ATTEMPTS + 1):
            try:
                return self._sample(plan, position, raw)
            except _UnusableSample as error:
                if error.option == "error":
                    raise ValueError(str(error)) from error.__cause__
                if attempt == 0:
                    # The others are counted when their own turn comes.
                    self._skips.add(str(error))
                last_error = error
            # From the buffer at no cost; where it holds nothing that is good, from anywhere in the range.
            from_buffer = attempt < min(len(others), _MAX_ATTEMPTS // 2)
            number = self._draws.substitute(
                plan.epoch, wanted, attempt, len(others) if from_buffer else len(plan.order)
            )
            position = others[number] if from_buffer else int(plan.order[number])
            raw = held[position] if from_buffer else next(self._raw_samples(plan, [position]))
        raise ValueError(
            f"{_MAX_ATTEMPTS} samples tried in the place of a bad one are bad too; the last: {last_error}"
        ) from last_error

    def _sample(self, plan: WorkerPlan, position: int, raw: RawSample) -> dict[str, Any]:
        turn = int(np.searchsorted(plan.starts, position, side="right")) - 1
        shard = int(plan.shards[turn])
        index = int(self._first_index[shard]) + raw.position
        name = f"sample `{raw.key}` of shard `{self._shards[shard].name}`"
        if raw.problem:
            raise _UnusableSample(f"Cannot use {name}: {raw.problem}.", self._on_bad_sample)
        try:
            text = self._features(plan.epoch, index, raw)
        except ValueError as error:
            raise _UnusableSample(f"Cannot use {name}: {error}.", self._on_bad_sample) from error
        try:
            transform = decode_for(self.transform, raw.image, f"The image of {name}")
        except ValueError as error:
            raise _UnusableSample(str(error), self._on_bad_image) from error
        return {
            "pixel_values": transform(self._draws.generator(plan.epoch, index)),
            "index": index,
            "image_id": image_id(raw.image),
            **text,
        }

    def _features(self, epoch: int, index: int, raw: RawSample) -> dict[str, Any]:
        """`llm_embeds`, `text`, or both of the same caption, and the `weight` if there is one."""
        features: dict[str, Any] = {}
        fields = dict(raw.captions)
        if (given := fields.pop(WEIGHT, None)) is not None:
            features["weight"] = positive_number(next(iter(given), None))
            if not features["weight"]:
                raise ValueError(f"its weight is {next(iter(given), None)!r}, expected a positive number")
        numbers = [len(captions) for captions in fields.values()]
        source_ids = np.repeat(np.arange(len(numbers)), numbers)
        start = 0
        if self.store is not None:
            try:
                row = self.store.index_of(raw.key)
            except KeyError as error:
                raise ValueError(f"its key is not in the store `{self.store.path}`") from error
            start, stop = int(self.store.offsets[row]), int(self.store.offsets[row + 1])
            stored = self.store.source_ids[start:stop]
            if self._fields and not np.array_equal(stored, source_ids):
                expected = np.bincount(stored, minlength=len(numbers)).tolist()
                raise ValueError(
                    f"it has {numbers} captions in the sources {list(self._fields)}, but the store "
                    f"`{self.store.path}` has embeddings of {expected}"
                )
            source_ids = stored
        if not len(source_ids) or not self._draws.weights[source_ids].any():
            found = {source: len(captions) for source, captions in fields.items()}
            raise ValueError(f"it has no caption in a source of positive weight (captions: {found})")
        drawn = self._draws.caption(epoch, index, source_ids)
        if self.store is not None:
            features["llm_embeds"] = self.store.gather([start + drawn])[0].float()
        if self._fields:
            texts = [text for captions in fields.values() for text in captions]
            features["text"] = text = self._draws.sub_caption(epoch, index, texts[drawn])
            features["text_id"] = content_id(text.encode())
        return features

    def _raw_samples(self, plan: WorkerPlan, positions: Sequence[int]) -> Iterator[RawSample]:
        """The samples at ascending positions, undecoded; opens only the shards that hold one of them."""
        remaining = np.asarray(positions, dtype=np.int64)
        for turn, number in enumerate(plan.shards.tolist()):
            start, stop = plan.starts[turn], plan.starts[turn + 1]
            count = int(np.searchsorted(remaining, stop))
            if not count:
                continue
            wanted, remaining = (remaining[:count] - start).tolist(), remaining[count:]
            # One more than there should be tells whether a stated count is too low.
            beyond = [int(stop - start)] if self._counts_stated and wanted[-1] == stop - start - 1 else []
            found = -1
            for raw in self._shards[number].read(wanted + beyond):
                found = raw.position
                if beyond and found == beyond[0]:
                    break
                yield raw
            if found != wanted[-1]:
                difference = "more" if beyond and found == beyond[0] else "fewer"
                raise ValueError(
                    f"Shard `{self._shards[number].name}` has {difference} samples than the {stop - start} that it "
                    "should have. Correct `samples_per_shard`, or leave it out to have the samples counted."
                )


class _UnusableSample(ValueError):
    """A bad sample, with the option that says what to do about it."""

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option


def _this_process(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"Pass both `rank` and `world_size` or none of them, got {rank} and {world_size}.")
    if rank is not None and world_size is not None:
        return rank, world_size
    if distributed.is_initialized():
        return distributed.rank(), distributed.world_size()
    # A script may make its data before the process group; a launcher has set these by then.
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


__all__ = ["ImageTextStream"]
