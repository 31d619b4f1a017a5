# SPDX-License-Identifier: Apache-2.0
"""Sources of caption batches: one source per global batch on all processes, an order given by seed and epoch."""

from collections import Counter

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from caption_training import Stream, Texts

from llm2clip_hf.training.captions.sources import (
    CaptionCollator,
    EvaluationBatchSampler,
    SingleSourceBatchSampler,
    SourceRows,
    StreamRows,
    ordered_columns,
)


# --------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("processes", [1, 3])
def test_global_batches_have_one_source_and_drop_the_rest(processes):
    sizes, batch = [17, 4, 31], 2
    step = batch * processes
    sampler = SingleSourceBatchSampler(sizes, batch, processes, seed=5)
    batches = list(sampler)
    assert len(batches) == len(sampler) == processes * sum(size // step for size in sizes)
    rows = [row for each in batches for row in each]
    assert len(set(rows)) == len(rows)
    source_of = [source for source, size in enumerate(sizes) for _ in range(size)]
    found = []
    for start in range(0, len(batches), processes):
        (source,) = {source_of[row] for each in batches[start : start + processes] for row in each}
        found.append(source)
    assert Counter(found) == Counter({source: size // step for source, size in enumerate(sizes) if size >= step})
    assert found != sorted(found)  # the order of batches is shuffled over the sources


@pytest.mark.parametrize(("rows", "batch", "processes"), [(17, 8, 1), (17, 8, 2), (3, 8, 3), (40, 4, 3), (5, 1, 2)])
def test_evaluation_takes_every_row_once_in_batches_of_about_equal_size(rows, batch, processes):
    shares = [list(EvaluationBatchSampler(rows, batch, processes, process)) for process in range(processes)]
    assert sorted(row for share in shares for each in share for row in each) == list(range(rows))
    assert len({len(share) for share in shares}) == 1
    sizes = [len(each) for share in shares for each in share]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch, -(-rows // len(sizes)))
    # Process by process, the parts of a global batch are a batch of one process.
    whole = list(EvaluationBatchSampler(rows, batch * processes))
    if len(whole) == len(shares[0]):
        assert [sum(parts, []) for parts in zip(*shares)] == whole
    order = sum(whole, [])
    assert rows < 6 or list(range(rows)) != order != sum(EvaluationBatchSampler(rows, rows, seed=1), [])
    with pytest.raises(ValueError, match="2 rows for 3 processes"):
        EvaluationBatchSampler(2, 8, 3)


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = SingleSourceBatchSampler([9, 12], 3, seed=seed)
        list(sampler)  # what was read before plays no part
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(0, 1)
    torch.manual_seed(2)
    assert order(0, 1) == first
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    # Both shuffles are uniform: each row is first in a batch of its source about as often as any other.
    counts = Counter(next(iter(SingleSourceBatchSampler([4], 1, seed=seed)))[0] for seed in range(400))
    assert all(70 < counts[row] < 130 for row in range(4))


def test_last_batches_can_be_kept_by_one_process():
    sampler = SingleSourceBatchSampler([5, 2], 3, drop_last=False)
    assert sorted(map(len, sampler)) == [2, 2, 3]
    assert len(sampler) == 3
    with pytest.raises(ValueError, match="2 processes.*dataloader_drop_last=True"):
        SingleSourceBatchSampler([5], 3, 2, drop_last=False)
    for sizes, batch in (([], 1), ([3, 0], 1), ([3], 0)):
        with pytest.raises(ValueError, match="must be positive"):
            SingleSourceBatchSampler(sizes, batch)


def rows_of_rank(rank: int, epoch: int, split_batches: bool) -> list[list[int]]:
    size, parts = (4, 1) if split_batches else (2, 2)
    sampler = SingleSourceBatchSampler([13, 9, 8], size, parts, seed=3)
    loader = torch.utils.data.DataLoader(range(30), batch_sampler=sampler, collate_fn=torch.tensor)
    prepared = prepare_data_loader(
        loader, num_processes=2, process_index=rank, split_batches=split_batches, even_batches=False
    )
    sampler.set_epoch(epoch)
    prepared.set_epoch(epoch)
    return [batch.tolist() for batch in skip_first_batches(prepared, epoch)]


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("epoch", [0, 2])
def test_accelerate_keeps_all_processes_at_the_same_source(split_batches, epoch):
    first, second = (rows_of_rank(rank, epoch, split_batches) for rank in (0, 1))
    whole = SingleSourceBatchSampler([13, 9, 8], 4, seed=3)
    whole.set_epoch(epoch)
    assert [a + b for a, b in zip(first, second, strict=True)] == list(whole)[epoch:]
    assert {len(rows) for rows in first + second} == {2}


# -------------------------------------------------------------------------------------------------- rows and streams


def test_columns_are_ordered_and_unknown_ones_named():
    assert ordered_columns(["label", "positive", "anchor"], "x") == ["anchor", "positive", "label"]
    names = ["negative_10", "anchor", "negative_2", "positive"]
    assert ordered_columns(names, "x") == ["anchor", "positive", "negative_2", "negative_10"]
    with pytest.raises(ValueError, match=r"The source `a` has the unknown columns \['score', 'url'\]"):
        ordered_columns(["anchor", "positive", "score", "url"], "The source `a`")
    with pytest.raises(ValueError, match="needs `anchor` and `positive`"):
        ordered_columns(["query", "document"], "x")
    with pytest.raises(ValueError, match="needs `positive`"):
        ordered_columns(["anchor"], "x")
    with pytest.raises(ValueError, match=r"\['negative', 'negative_1'\]"):
        ordered_columns(["anchor", "positive", "negative", "negative_1"], "x")


def test_rows_of_several_sources_are_numbered_one_after_the_other():
    plain = {"positive": ["p0", "p1"], "anchor": ["a0", "a1"], "negative": ["n0", "n1"]}
    sources = {"one": Texts("one", 3, "find: "), "two": datasets.Dataset.from_dict(plain), "three": Texts("three", 4)}
    rows = SourceRows(sources)
    assert len(rows) == 9
    rows.set_epoch(6)
    assert list(rows[2].items()) == [
        ("anchor", "one 2"),
        ("positive", "one 2 in epoch 6"),
        ("label", 2),
        ("instruction", "find: "),
        ("dataset_name", "one"),
    ]
    assert list(rows[4].items()) == [
        *(("anchor", "a1"), ("positive", "p1"), ("negative", "n1"), ("dataset_name", "two")),
    ]
    picked = [8, 0, 4, 5, 0, 3]
    assert rows.__getitems__(picked) == [rows[row] for row in picked]
    assert rows[8]["anchor"] == "three 3"
    with pytest.raises(IndexError, match="Row 9 is out of range"):
        rows[9]


def test_bad_sources_are_named():
    with pytest.raises(ValueError, match="mapping of training sources is empty"):
        SourceRows({})
    with pytest.raises(ValueError, match="source `b` is empty"):
        SourceRows({"a": Texts("a", 1), "b": Texts("b", 0)})
    with pytest.raises(ValueError, match="source `b` is generator, which has no row numbers"):
        SourceRows({"a": Texts("a", 1), "b": (row for row in [])})
    with pytest.raises(ValueError, match=r"source `b` has the unknown columns \['extra'\]"):
        SourceRows({"b": datasets.Dataset.from_dict({"anchor": ["a"], "positive": ["p"], "extra": [1]})})


def test_stream_is_read_again_and_shared_out_in_global_batches():
    def take(count: int, processes: int, process: int) -> list[str]:
        rows = iter(StreamRows(Stream(7), 2, processes, process))
        return [next(rows)["positive"] for _ in range(count)]

    whole = take(12, 1, 0)
    assert whole == [f"s {row % 7} in epoch {row // 7}" for row in range(12)]
    first, second = take(6, 2, 0), take(6, 2, 1)
    assert [*first[:2], *second[:2], *first[2:4], *second[2:4], *first[4:], *second[4:]] == whole
    assert next(iter(StreamRows(Stream(1), 2)))["instruction"] == "find: "
    with pytest.raises(ValueError, match="gives no row"):
        next(iter(StreamRows(Stream(0), 2)))


# -------------------------------------------------------------------------------------------------------- the collator


def test_collator_gives_the_instruction_to_anchors_and_numbers_texts():
    calls = []

    def preprocess(texts, prompt=None, task=None):
        calls.append((texts, prompt))
        return {"input_ids": torch.tensor([[len(text)] for text in texts])}

    rows = [
        {"anchor": "a", "positive": "b", "label": 4, "instruction": "find: "},
        {"anchor": "b", "positive": "a", "label": 5, "instruction": "find: "},
    ]
    batch = CaptionCollator(preprocess, with_text_ids=True)(rows)
    assert calls == [(["a", "b"], "find: "), (["b", "a"], None)]
    assert torch.equal(batch["anchor_text_id"], batch["positive_text_id"].flip(0))
    assert batch["anchor_text_id"].dtype == torch.int64
    assert batch["anchor_text_id"][0] != batch["anchor_text_id"][1]
    assert batch["label"].tolist() == [4, 5]
    assert not any("instruction" in name for name in batch)
    assert not any("text_id" in name for name in CaptionCollator(preprocess)(rows))
    with pytest.raises(ValueError, match=r"2 instructions, first \['None', 'find: '\]"):
        CaptionCollator(preprocess)([rows[0], {"anchor": "b", "positive": "a"}])
