# SPDX-License-Identifier: Apache-2.0
"""The stage-1 loss is the original formula, leaves out what is right as well, and is exact on several devices."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_groups import run_ranks
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn

from llm2clip_hf.training.captions.loss import CaptionContrastiveLoss, hash_token_rows


ROWS, WIDTH = 7, 11


def embeddings(columns: int = 3, rows: int = ROWS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for _ in range(columns)]


def brute_force(columns, keys=None, scale=50.0, symmetric=False):
    """Mean of -log(exp(own) / sum over the candidates that count), pair by pair."""
    unit = [[row / row.norm() for row in column] for column in columns]
    count, rows = len(columns), len(columns[0])
    label = None if keys is None or keys.shape[1] == count else keys[:, count].tolist()
    text = [[(c, i) for i in range(rows)] for c in range(count)]  # all different
    if keys is not None:
        text = [keys[:, c].tolist() for c in range(count)]

    def counts(i, j, query, answer, c):
        if c == answer and i == j:
            return True
        same = text[c][j] in (text[query][i], text[answer][i])
        if c == answer:
            same = same or text[query][i] == text[query][j] or (label is not None and label[i] == label[j])
        return not same

    def direction(query, answer, candidates):
        total = 0.0
        for i in range(rows):
            similarity = {(c, j): scale * unit[query][i] @ unit[c][j] for c in candidates for j in range(rows)}
            kept = torch.stack([s for (c, j), s in similarity.items() if counts(i, j, query, answer, c)])
            total += kept.logsumexp(0) - similarity[answer, i]
        return total / rows

    loss = direction(0, 1, range(1, count))
    return (loss + direction(1, 0, [0])) / 2 if symmetric else loss


def dense_loss(columns, keys, symmetric, scale=50.0):
    """The same by the matrix of logits, for batches of any size."""
    unit = [F.normalize(column, dim=1) for column in columns]
    rows, count = len(columns[0]), len(columns)

    def direction(query, answer, candidates):
        logits = scale * unit[query] @ torch.cat([unit[c] for c in candidates]).T
        known = [
            (keys[None, :, c] == keys[:, None, query]) | (keys[None, :, c] == keys[:, None, answer])
            for c in candidates
        ]
        for key in (query, *range(count, keys.shape[1])):
            known[0] |= keys[None, :, key] == keys[:, None, key]
        known[0].fill_diagonal_(False)
        return F.cross_entropy(logits.masked_fill(torch.cat(known, dim=1), -torch.inf), torch.arange(rows))

    loss = direction(0, 1, range(1, count))
    return (loss + direction(1, 0, [0])) / 2 if symmetric else loss


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [2, 4])
def test_loss_and_gradients_are_those_of_dense_logits(columns, symmetric):
    rows = 501  # more than a chunk of the operator holds
    given = [each.float() for each in embeddings(columns, rows)]
    given[1] = given[0] + 0.5 * given[1]  # trained in part
    keys = torch.randint(300, (rows, columns + 1), generator=torch.Generator().manual_seed(1))
    keys[:, -1] -= 1  # a label of -1 is a label
    wide = [each.double().requires_grad_() for each in given]
    expected = dense_loss(wide, keys, symmetric)
    exact = torch.autograd.grad(expected, wide)
    given = [each.requires_grad_() for each in given]
    value = CaptionContrastiveLoss(nn.Identity(), symmetric=symmetric).loss_of_embeddings(given, keys)
    torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(value, given), exact):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-6)
    small = [each[:ROWS].double().detach() for each in given]
    torch.testing.assert_close(
        dense_loss(small, keys[:ROWS], symmetric), brute_force(small, keys[:ROWS], 50.0, symmetric)
    )


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_objective_is_the_formula(columns, symmetric):
    loss = CaptionContrastiveLoss(nn.Identity(), symmetric=symmetric)
    given = [each.requires_grad_() for each in embeddings(columns)]
    expected = brute_force(given, symmetric=symmetric)
    value = loss.loss_of_embeddings(given)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    for ours, theirs in zip(torch.autograd.grad(value, given), torch.autograd.grad(expected, given)):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    single = loss.loss_of_embeddings([each.detach().float() for each in given])
    torch.testing.assert_close(single.double(), expected.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("columns", [2, 3])
def test_unmasked_objective_is_that_of_sentence_transformers(columns):
    given = [each.float() for each in embeddings(columns)]
    theirs = MultipleNegativesRankingLoss(nn.Identity(), scale=50.0)
    expected = theirs.compute_loss_from_embeddings(given, None)
    value = CaptionContrastiveLoss(nn.Identity()).loss_of_embeddings(given)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)


def test_loss_stands_in_for_that_of_sentence_transformers_on_any_model():
    model = Lookup()
    columns = [column([1, 2], [3], [4, 5, 6]), column([7], [8, 9], [10]), column([11], [12], [13])]
    theirs = MultipleNegativesRankingLoss(model, scale=20.0)([dict(each) for each in columns], None)
    ours = CaptionContrastiveLoss(model, scale=20.0)([dict(each) for each in columns], None)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, model.table.weight)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


REPEATED = torch.tensor(
    [  # anchor, positive, negative, label
        [1, 11, 21, 0],
        [2, 12, 22, 1],
        [3, 1, 23, 2],  # the positive is row 0's anchor
        [2, 14, 24, 3],  # the anchor is row 1's
        [5, 12, 15, 4],  # the positive is row 1's; the negative is row 5's positive
        [6, 15, 6, 0],  # row 0's image; the negative is the row's own anchor
        [7, 17, 17, 6],  # the negative is the row's own positive
    ]
)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("with_labels", [False, True])
def test_false_negatives_are_left_out(symmetric, with_labels):
    keys = REPEATED if with_labels else REPEATED[:, :3]
    loss = CaptionContrastiveLoss(nn.Identity(), symmetric=symmetric)
    given = embeddings(3)
    expected = brute_force(given, keys, symmetric=symmetric)
    assert abs(expected - brute_force(given, symmetric=symmetric)) > 1e-3
    torch.testing.assert_close(loss.loss_of_embeddings(given, keys), expected, atol=1e-10, rtol=0)
    different = torch.arange(ROWS * keys.shape[1]).reshape(ROWS, -1)
    unmasked = loss.loss_of_embeddings(given)
    assert torch.equal(loss.loss_of_embeddings(given, different), unmasked)


def test_row_whose_candidates_are_all_right_has_no_loss_and_no_gradient():
    given = [each[:2].requires_grad_() for each in embeddings(2)]
    keys = torch.tensor([[1, 2], [1, 3]])
    loss = CaptionContrastiveLoss(nn.Identity()).loss_of_embeddings(given, keys)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, given))


class Lookup(nn.Module):
    """Embeds token ids by a table: mean over the attended tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH, dtype=torch.float64)
        self.tokenizer = self

    def forward(self, features):
        mask = features["attention_mask"].double()[..., None]
        hidden = self.table(features["input_ids"])
        return {"sentence_embedding": (hidden * mask).sum(1) / mask.sum(1)}

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids.tolist()))


def column(*rows: list[int], left: bool = False, width: int = 5) -> dict[str, torch.Tensor]:
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def test_equal_tokens_are_found_in_padded_and_flattened_columns():
    rows = [[5, 6, 7], [5, 6], [7, 6, 5], [5, 6, 0], [5, 6, 7]]
    right = hash_token_rows(column(*rows))
    assert torch.equal(right, hash_token_rows(column(*rows, left=True, width=9)))
    flat = {"input_ids": torch.tensor([sum(rows, [])]), "cu_seq_lens_q": torch.tensor([0, 3, 5, 8, 11, 14])}
    assert torch.equal(right, hash_token_rows(flat))
    assert right[0] == right[4]
    assert len(set(right.tolist())) == 4
    many = torch.cartesian_prod(*[torch.arange(23)] * 3)
    assert len(hash_token_rows({"input_ids": many}).unique()) == len(many)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("given_ids", [True, False])
def test_loss_of_token_columns_masks_equal_texts_and_labels(masked, given_ids):
    model = Lookup()
    columns = [
        column([1, 2], [3], [4, 5, 6], [7]),
        column([8], [9, 10], [1, 2], [11]),
        column([12], [13], [14, 15], [16, 17]),
    ]
    labels = torch.tensor([0, 1, 2, 1])
    given = [model(each)["sentence_embedding"] for each in columns]
    keys = torch.arange(12).reshape(3, 4).T.clone()
    keys[2, 1] = keys[0, 0]
    if given_ids:  # the numbers of the batch win over the tokens
        keys[3, 2] = keys[1, 1]
        columns = [each | {"text_id": keys[:, number]} for number, each in enumerate(columns)]
    expected = brute_force(given, torch.cat([keys, labels[:, None]], dim=1) if masked else None)
    loss = CaptionContrastiveLoss(model, mask_false_negatives=masked)(columns, labels)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)


def test_what_cannot_be_trained_is_refused():
    model = Lookup()
    loss = CaptionContrastiveLoss(model)
    anchors, positives = column([1], [2, 3]), column([4, 5], [6])
    with pytest.raises(ValueError, match="1 column"):
        loss([anchors])
    with pytest.raises(ValueError, match=r"same number of rows, got \[2, 1\]"):
        loss([anchors, column([1])])
    with pytest.raises(ValueError, match="whole numbers.*float32"):
        loss([anchors, positives], torch.tensor([0.5, 0.7]))
    with pytest.raises(ValueError, match="one row without a hard negative"):
        loss([column([1]), column([2])])
    assert loss([column([1]), column([2]), column([3])]) > 0
    for options in ({"scale": 0}, {"mini_batch_size": 0}, {"mini_batch_tokens": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be positive"):
            CaptionContrastiveLoss(model, **options)


def test_nonfinite_loss_names_the_rows():
    model = Lookup()
    with torch.no_grad():
        model.table.weight[6] = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss is nan.*positive 1 of the batch \('6 7'\)\."):
        CaptionContrastiveLoss(model)([column([1], [2, 3]), column([4, 5], [6, 7])])


def loss_of_rank(sizes, columns, keys, symmetric):
    start = sum(sizes[: dist.get_rank()])
    rows = slice(start, start + sizes[dist.get_rank()])
    given = [each[rows].clone().requires_grad_() for each in columns]
    loss = CaptionContrastiveLoss(nn.Identity(), symmetric=symmetric)
    value = loss.loss_of_embeddings(given, None if keys is None else keys[rows])
    value.backward()
    return value.item(), [each.grad.numpy() for each in given]


@pytest.mark.parametrize(("sizes", "symmetric"), [((4, 3), False), ((5, 2), True), ((6, 1), True)])
def test_ranks_together_equal_one_process(sizes, symmetric):
    given = [each.requires_grad_() for each in embeddings(3)]
    whole = CaptionContrastiveLoss(nn.Identity(), symmetric=symmetric).loss_of_embeddings(given, REPEATED)
    expected = torch.autograd.grad(whole, given)
    detached = [each.detach() for each in given]
    results = run_ranks(2, loss_of_rank, sizes, detached, REPEATED, symmetric)
    assert sum(value for value, _ in results) / 2 == pytest.approx(whole.item(), abs=1e-10)
    for number, gradient in enumerate(expected):
        # What DDP makes of it: the mean over ranks of gradients that hold all ranks' losses.
        parts = torch.cat([torch.from_numpy(gradients[number]) for _, gradients in results]) / 2
        torch.testing.assert_close(parts, gradient, atol=1e-10, rtol=0)


def loss_of_unlike_columns(columns):
    given = columns[: 2 + dist.get_rank()]
    try:
        CaptionContrastiveLoss(nn.Identity()).loss_of_embeddings(given)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_at_different_sources_are_refused():
    for message in run_ranks(2, loss_of_unlike_columns, embeddings(3)):
        assert "batches of [2, 3] columns" in message
