# SPDX-License-Identifier: Apache-2.0
"""Length-sorted and recomputed mini-batches give the embeddings and gradients of the padded batch."""

import itertools

import pytest
import tiny_models
import torch
from process_groups import run_ranks

from llm2clip_hf.data.sampling import length_groups
from llm2clip_hf.training import build_caption_encoder, gradcache
from llm2clip_hf.training.captions import batches as caption_batches
from llm2clip_hf.training.captions.batches import embed_columns, mini_batches
from llm2clip_hf.training.captions.loss import CaptionContrastiveLoss


COLUMNS = [
    ["a red boat", "two dogs run over the green grass " * 3, "x", "a photo of a house", "the sea", "one"],
    ["a small red boat on the sea near the house", "dogs", "x y z", "house " * 9, "blue sea " * 20, "one tree"],
    ["a tree", "old", "a photo of a dog", "a new big green house far away", "sun", "two trees and the sun " * 4],
]


def encoder_of(llm_dir: str, dropout: float = 0.0):
    torch.manual_seed(0)
    return tiny_models.draw_lora(build_caption_encoder(llm_dir, lora={"lora_dropout": dropout})).train()


def tokens(encoder, prompt: str | None = None) -> list[dict]:
    prompts = [prompt, None, None]
    return [encoder.preprocess(texts, prompt=prompt) for texts, prompt in zip(COLUMNS, prompts)]


# ------------------------------------------------------------------------------------------------------------ the cut


def partitions(rows: list[int]):
    if not rows:
        yield []
        return
    first, rest = rows[0], rows[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for remaining in partitions([row for row in rest if row not in others]):
                yield [[first, *others], *remaining]


@pytest.mark.parametrize(
    "lengths", [[3, 90, 4, 88, 91], [5, 5, 5], [7], [1, 2, 4, 8, 16, 32], [40, 30, 20, 20, 10, 10]]
)
@pytest.mark.parametrize("overhead", [0, 9, 60, 1000])
def test_length_groups_cost_least_of_all_partitions(lengths, overhead):
    def cost(groups):
        return sum(len(group) * max(lengths[row] for row in group) + overhead for group in groups)

    groups = length_groups(lengths, overhead)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert cost(groups) == min(cost(each) for each in partitions(list(range(len(lengths)))))
    longest = [max(lengths[row] for row in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limits", [(None, None), (4, None), (None, 150), (3, 150)])
def test_mini_batches_hold_every_row_once_within_the_limits(llm_dir, side, limits):
    encoder = encoder_of(llm_dir)
    encoder.tokenizer.padding_side = side
    columns = tokens(encoder)
    texts = [text for column in COLUMNS for text in column]
    batches = mini_batches(columns, *limits)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(texts)))
    for batch in batches:
        features, rows = batch.features, batch.rows
        expected = encoder.preprocess([texts[row] for row in rows])
        assert features["modality"] == "text"
        mask = expected["attention_mask"]
        assert torch.equal(features["attention_mask"], mask)
        assert torch.equal(features["input_ids"] * mask, expected["input_ids"] * mask)
        if limits[0]:
            assert len(rows) <= limits[0]
        if limits[1]:
            assert len(rows) == 1 or mask.numel() <= limits[1]


def test_columns_with_different_instructions_are_not_mixed(llm_dir):
    encoder = encoder_of(llm_dir)
    batches = mini_batches(tokens(encoder, prompt="find the sea: "))
    for batch in batches:
        assert {row < len(COLUMNS[0]) for row in batch.rows} == {"prompt_length" in batch.features}


def test_feature_of_another_shape_is_refused(llm_dir):
    columns = tokens(encoder_of(llm_dir))
    columns[0]["pixel_values"] = torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"`pixel_values` of a column has shape \(6, 3\)"):
        mini_batches(columns)


# ------------------------------------------------------------------------------------------- embeddings and gradients


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", [None, "find the sea: "])
@pytest.mark.parametrize("limits", [(None, None), (4, None), (None, 90)])
def test_embeddings_are_those_of_the_columns(llm_dir, side, prompt, limits, monkeypatch):
    monkeypatch.setattr(caption_batches, "length_groups", lambda lengths: length_groups(lengths, 20))
    encoder = encoder_of(llm_dir)
    encoder.tokenizer.padding_side = side
    columns = tokens(encoder, prompt)
    embeddings = embed_columns(encoder, columns, *limits)
    assert not encoder._forward_hooks and not encoder._forward_pre_hooks
    for embedding, column in zip(embeddings, columns, strict=True):
        expected = encoder(dict(column))["sentence_embedding"]
        torch.testing.assert_close(embedding, expected, atol=2e-6, rtol=0)


def gradients(encoder, columns, seed: int = 3, **limits: int) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    torch.manual_seed(seed)
    CaptionContrastiveLoss(encoder, scale=20.0, **limits)(columns).backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.requires_grad}


def assert_equal_gradients(ours: dict, expected: dict, tolerance: float) -> None:
    assert len(expected) == 28  # A and B of 7 linear layers in 2 blocks
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(ours[name] / scale, gradient / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("limits", [{"mini_batch_size": 4}, {"mini_batch_tokens": 90}])
def test_recomputed_gradients_are_those_of_one_pass_with_dropout(llm_dir, checkpointing, limits, monkeypatch):
    encoder = encoder_of(llm_dir, dropout=0.4)
    columns = tokens(encoder, prompt="find the sea: ")
    if checkpointing:
        encoder.activation_checkpointing_enable()
    cached = gradients(encoder, columns, **limits)
    # The same mini-batches in one graph that keeps all activations.
    monkeypatch.setattr(gradcache, "checkpoint", lambda run, *tensors, use_reentrant: run(*tensors))
    assert_equal_gradients(cached, gradients(encoder, columns, **limits), 1e-6)
    other = gradients(encoder, columns, seed=4, **limits)
    assert any((other[name] != gradient).any() for name, gradient in cached.items())  # dropout is on


@pytest.mark.parametrize("limits", [{}, {"mini_batch_size": 4}, {"mini_batch_tokens": 90}])
def test_gradients_are_those_of_padded_columns(llm_dir, limits):
    encoder = encoder_of(llm_dir)
    columns = tokens(encoder)
    loss = CaptionContrastiveLoss(encoder, scale=20.0)
    loss.loss_of_embeddings([encoder(dict(column))["sentence_embedding"] for column in columns]).backward()
    expected = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.requires_grad}
    assert_equal_gradients(gradients(encoder, columns, **limits), expected, 1e-5)


def test_recomputation_keeps_no_activations(llm_dir):
    encoder = encoder_of(llm_dir)
    columns = tokens(encoder)

    def kept(**limits: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            CaptionContrastiveLoss(encoder, **limits)(columns)
        return sum(sizes)

    assert kept(mini_batch_size=4) < kept() / 20


# ----------------------------------------------------------------------------------------------------- flattened rows


class FlatModel(torch.nn.Module):
    """Embeds rows laid end to end as FlashAttention is given them; checks the boundaries that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(60, 5, dtype=torch.float64)
        self.passes = 0

    def forward(self, features):
        self.passes += 1
        ends = features["cu_seq_lens_q"]
        lengths = ends.diff()
        assert ends.dtype == torch.int32
        assert torch.equal(features["cu_seq_lens_k"], ends)
        assert features["max_length_q"] == features["max_length_k"] == max(lengths)
        rows = torch.arange(len(lengths)).repeat_interleave(lengths)
        assert torch.equal(features["seq_idx"][0], rows.int())
        assert torch.equal(features["position_ids"][0], torch.cat([torch.arange(n) for n in lengths]))
        hidden = self.table(features["input_ids"][0]) * (1 + features["position_ids"][0, :, None])
        sums = torch.zeros(len(lengths), 5, dtype=torch.float64).index_add(0, rows, hidden)
        return {"sentence_embedding": sums}


def flattened(rows: list[list[int]]) -> dict:
    lengths = torch.tensor([len(row) for row in rows])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "input_ids": torch.tensor([sum(rows, [])]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.arange(len(rows)).repeat_interleave(lengths)[None].int(),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(len(row) for row in rows),
        "max_length_k": max(len(row) for row in rows),
        "modality": "text",
    }


@pytest.mark.parametrize(("limits", "passes"), [((None, None), 1), ((2, None), 3), ((None, 7), 4)])
def test_flattened_columns_are_cut_at_their_boundaries(limits, passes):
    model = FlatModel()
    rows = [[[1, 2, 3], [4], [5, 6, 7, 8, 9]], [[10, 11], [12, 13, 14, 15], [16]]]
    columns = [flattened(each) for each in rows]
    embeddings = embed_columns(model, columns, *limits)
    assert model.passes == passes
    for embedding, column in zip(embeddings, columns):
        assert torch.equal(embedding, model(column)["sentence_embedding"])


# ----------------------------------------------------------------------------------------------------- several devices


def passes_of_rank(lengths):
    rank = torch.distributed.get_rank()
    rows = [[1] * length for length in lengths[rank]]
    batches = mini_batches([flattened(rows)], None, 12)
    return [batch.rows for batch in batches]


def test_all_ranks_make_equally_many_passes():
    lengths = [[1] * 5, [12, 9, 8, 7, 12]]
    short, long = run_ranks(2, passes_of_rank, lengths)
    assert len(short) == len(long) == 5
    for passes in (short, long):
        assert sorted(row for rows in passes for row in rows) == list(range(5))
