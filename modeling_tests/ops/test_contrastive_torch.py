# SPDX-License-Identifier: Apache-2.0
"""The chunked twin: many chunks, extreme logits, what autograd keeps."""

import pytest
import torch
import torch.nn.functional as F

from llm2clip_hf.ops import contrastive_loss, contrastive_torch, sigmoid_loss
from llm2clip_hf.ops.contrastive_torch import LseGrads, Pairs


@pytest.mark.parametrize("chunk_elements", [1, 37, 1000])
def test_chunks_change_nothing(monkeypatch, chunk_elements):
    x, y = (torch.randn(size, 4, dtype=torch.float64, requires_grad=True) for size in (9, 13))
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 5, 6, 6])
    results = []
    for elements in (1 << 24, chunk_elements):
        monkeypatch.setattr(contrastive_torch, "_BUFFER_ELEMENTS", elements)
        losses = [
            loss(x, y, *scalars, row_offset=3, group_ids=group, same_group=rule)
            for loss, scalars in ((contrastive_loss, (2.0,)), (sigmoid_loss, (2.0, -1.0)))
            for group, rule in ((None, "positive"), (ids, "positive"), (ids, "ignore"))
        ]
        results.append([*losses, *torch.autograd.grad(sum(losses), (x, y))])
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-13)


def hard_features(name):
    torch.manual_seed(3)
    x, y = F.normalize(torch.randn(40, 16), dim=1), F.normalize(torch.randn(40, 16), dim=1)
    if name == "duplicates":
        y = x.clone()
    elif name == "opposites":
        y = -x
    elif name == "one hot row":
        x[7] *= 300
    elif name == "one hot column":
        y[11] *= -300
    return x, y


@pytest.mark.parametrize("name", ["random", "duplicates", "opposites", "one hot row", "one hot column"])
@pytest.mark.parametrize("scale", [20.0, 100.0, 300.0])
def test_log_sum_exp_survives_extreme_logits(monkeypatch, name, scale):
    # One exponential serves rows and columns; columns far below a row's maximum must not underflow.
    monkeypatch.setattr(contrastive_torch, "_BUFFER_ELEMENTS", 400)
    x, y = hard_features(name)
    logits = scale * x.double() @ y.double().T
    pairs = Pairs(0, None, None, False)
    rows, cols, pair, *nothing = contrastive_torch.lse_pair(x, y, torch.tensor(scale), pairs)
    largest = float(logits.abs().max())
    paired = logits.diagonal().clone()
    logits.fill_diagonal_(-torch.inf)
    for got, want in ((rows, logits.logsumexp(1)), (cols, logits.logsumexp(0)), (pair, paired)):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6 * max(largest, 1.0))
    # The gradient of the sum of all log-sum-exps: softmax over rows plus softmax over columns.
    ones = torch.ones(40)
    grads = LseGrads(ones, ones, torch.zeros(40), *nothing, rows, cols)
    dx, dy = contrastive_torch.lse_pair_backward(x, y, torch.tensor(scale), pairs, grads, True, True)
    g = logits.softmax(1) + logits.softmax(0)
    tolerance = 1e-6 * max(largest, 10.0)
    assert (dx.double() - scale * g @ y.double()).norm() <= tolerance * (scale * g @ y.double()).norm()
    assert (dy.double() - scale * g.T @ x.double()).norm() <= tolerance * (scale * g.T @ x.double()).norm()


@pytest.mark.parametrize("shift", [-14.0, -17.0, -20.0, -30.0])
def test_sigmoid_negatives_keep_their_digits(shift):
    # log(1 + exp(z)) evaluated naively in fp32 is 99 % off at z = -20.
    x = torch.zeros(8, 4)
    got = sigmoid_loss(x, x, 1.0, shift, reduction="none").double()
    z = torch.tensor(shift, dtype=torch.float64)
    torch.testing.assert_close(got, (F.softplus(z) * 7 + F.softplus(-z)).expand(8), rtol=1e-6, atol=0)
    negatives = sigmoid_loss(x[:1], x, 1.0, shift) - sigmoid_loss(x[:1], x[:1], 1.0, shift)
    alone = contrastive_torch.sigmoid_sum(
        x, x, torch.tensor(1.0), torch.tensor(shift), torch.ones(8), Pairs(8, None, None, False), False, False
    )[0]
    assert negatives.isfinite()
    torch.testing.assert_close(alone.double(), (F.softplus(z) * 8).expand(8), rtol=1e-6, atol=0)


def test_autograd_keeps_vectors_only(monkeypatch):
    # Beyond the logits of a constant number of rows.
    saved = []
    monkeypatch.setattr(contrastive_torch, "_KEPT_LOGITS", 300)
    x, y = (torch.randn(300, 8, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        contrastive_loss(x, y, torch.tensor(5.0, requires_grad=True))
        sigmoid_loss(x, y, torch.tensor(5.0, requires_grad=True), -3.0)
    assert 300 * 8 <= sum(saved) <= 8 * 300 * 8 < 300 * 300


def test_masked_out_row_and_column_give_zero_gradient():
    # All pairs of a block hidden: log-sum-exp is -inf there, and must not turn gradients into NaN.
    x = torch.randn(2, 3, requires_grad=True)
    y = torch.randn(3, 3, requires_grad=True)
    ids = torch.tensor([4, 4, 9])
    arguments = (torch.tensor([[4], [4]]), ids[:, None], -5, True, torch.float32, False, "both", True, False)
    rows, cols, *_ = torch.ops.llm2clip_hf.lse_pair(x, y, torch.tensor(2.0), *arguments)
    logits = 2.0 * x @ y.T
    torch.testing.assert_close(rows, logits[:, 2])
    assert cols.tolist()[:2] == [-torch.inf, -torch.inf]
    (rows.sum() + cols[2] + cols[:2].nan_to_num(neginf=0.0).sum()).backward()
    assert x.grad.isfinite().all()
    assert (y.grad[:2] == 0).all()
    assert (y.grad[2] != 0).any()


def test_products_of_bf16_operands_have_fp32_results(monkeypatch):
    # What CUDA does, followed on tensors without data.
    monkeypatch.setattr(contrastive_torch, "_multiplies_in_16_bits", lambda x: True)
    x, y = (torch.empty(size, 8, dtype=torch.bfloat16, device="meta") for size in (5, 9))
    out = torch.empty(5, 9, device="meta")
    assert contrastive_torch.operand(x, x.dtype).dtype == torch.bfloat16
    assert contrastive_torch._product(x, y.t(), out).dtype == torch.float32
    assert contrastive_torch._product(out, y, torch.empty(5, 8, device="meta")).shape == (5, 8)
    results = contrastive_torch.lse_pair(x, y, torch.empty((), device="meta"), Pairs(2, None, None, False))
    assert [(len(result), result.dtype) for result in results[:3]] == [(size, torch.float32) for size in (5, 9, 5)]
