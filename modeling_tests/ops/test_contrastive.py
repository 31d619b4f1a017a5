# SPDX-License-Identifier: Apache-2.0
"""The public losses against dense formulas in fp64: options, gradients, operators, compilation, bad input."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck

from llm2clip_hf import ops
from llm2clip_hf.ops import contrastive_loss, contrastive_torch, operators, sigmoid_loss
from llm2clip_hf.ops import inputs as argument_checks


def embeds(n, m, d, dtype=torch.float64):
    """Unit rows that require grad."""
    x = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(dtype)
    y = F.normalize(torch.randn(m, d, dtype=torch.float64), dim=1).to(dtype)
    return x.requires_grad_(), y.requires_grad_()


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def dense_contrastive(
    x,
    y,
    scale,
    row_offset=0,
    weights=None,
    ids=None,
    same_group="positive",
    smoothing=0.0,
    masks=None,
    direction="both",
):
    """The definition, with every logit: target distributions and log-softmax in both directions, for each pair."""
    n, m = len(x), len(y)
    logits = scale * x @ y.T
    pair = torch.zeros(n, m, dtype=torch.bool)
    pair[torch.arange(n), row_offset + torch.arange(n)] = True
    positive = pair
    if ids is not None:
        same = ids[row_offset : row_offset + n, None] == ids[None, :]
        if same_group == "positive":
            positive = same
        else:
            logits = logits.masked_fill(same & ~pair, -1e30)
    if masks is not None:
        same = ((masks[0][:, None] == masks[1][None]) & (masks[0][:, None] != -1)).any(2)
        logits = logits.masked_fill(same & ~pair, -1e30)
    rows = positive.to(x.dtype) / positive.sum(1, keepdim=True)
    cols = positive[:, row_offset : row_offset + n].to(x.dtype)
    cols = cols / cols.sum(0, keepdim=True)
    rows = (1 - smoothing) * rows + smoothing / m
    cols = (1 - smoothing) * cols + smoothing / n
    by_row = -(rows * logits.log_softmax(1)).sum(1)
    by_col = -(cols * logits.log_softmax(0)[:, row_offset : row_offset + n]).sum(0)
    return {"both": (by_row + by_col) / 2, "rows": by_row, "columns": by_col}[direction]


def dense_sigmoid(x, y, scale, bias, row_offset=0, ids=None, same_group="positive", masks=None):
    n, m = len(x), len(y)
    pair = torch.zeros(n, m, dtype=torch.bool)
    pair[torch.arange(n), row_offset + torch.arange(n)] = True
    positive, kept = pair, torch.ones_like(pair)
    if ids is not None:
        same = ids[row_offset : row_offset + n, None] == ids[None, :]
        positive = same if same_group == "positive" else pair
        kept = kept if same_group == "positive" else ~same | pair
    if masks is not None:
        kept = ~((masks[0][:, None] == masks[1][None]) & (masks[0][:, None] != -1)).any(2) | pair
    sign = torch.where(positive, 1.0, -1.0).to(x.dtype)
    return -(F.logsigmoid(sign * (scale * x @ y.T + bias)) * kept).sum(1)


def reduced(losses, weights, reduction):
    if reduction == "none":
        return losses
    weights = torch.ones_like(losses) if weights is None else weights
    total = (losses * weights).sum()
    return total / weights.sum() if reduction == "mean" else total


def assert_same(got, want, inputs, rtol=1e-10):
    """Values, and gradients under the same random upstream gradient."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-11)
    upstream = torch.randn_like(want)
    ours = torch.autograd.grad(got, inputs, upstream)
    theirs = torch.autograd.grad(want, inputs, upstream)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


def test_contrastive_loss_equals_its_docstring():
    x, y = embeds(7, 7, 5)
    scale = scalar(20.0)
    for given in (scale, scale.reshape(1)):
        logits, target = scale * x @ y.T, torch.arange(7)
        want = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        assert_same(contrastive_loss(x, y, given), want, (x, y, scale))


def test_sigmoid_loss_equals_its_docstring():
    x, y = embeds(7, 7, 5)
    scale, bias = scalar(9.0), scalar(-4.0)
    logits = scale * x @ y.T + bias
    want = -F.logsigmoid((2 * torch.eye(7) - 1) * logits).sum() / 7
    assert_same(sigmoid_loss(x, y, scale, bias), want, (x, y, scale, bias))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("same_group", [None, "positive", "ignore"])
@pytest.mark.parametrize("weighted", [False, True])
def test_options_equal_the_dense_definition(reduction, same_group, weighted):
    x, y = embeds(5, 11, 3)
    scale, bias = scalar(6.0), scalar(-2.0)
    weights = torch.rand(5, dtype=torch.float64) if weighted else None
    ids = torch.tensor([3, 900, 3, -7, 900, 3, 4, -7, 3, 5, 900]) if same_group else None
    group = same_group or "positive"
    options = {"row_offset": 4, "weights": weights, "group_ids": ids, "same_group": group, "reduction": reduction}
    want = reduced(dense_contrastive(x, y, scale, 4, ids=ids, same_group=group), weights, reduction)
    assert_same(contrastive_loss(x, y, scale, **options), want, (x, y, scale))
    want = reduced(dense_sigmoid(x, y, scale, bias, 4, ids, group), weights, reduction)
    assert_same(sigmoid_loss(x, y, scale, bias, **options), want, (x, y, scale, bias))


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
@pytest.mark.parametrize("rule", [None, "positive", "ignore", "masks", "smoothing"])
def test_directions_and_masks_equal_the_dense_definition(direction, rule):
    x, y = embeds(5, 11, 3)
    scale, bias = scalar(6.0), scalar(-2.0)
    ids = torch.tensor([3, 900, 3, -7, 900, 3, 4, -7, 3, 5, 900])
    masks = (torch.randint(-1, 5, (5, 3)), torch.randint(-1, 5, (11, 3)))
    options = {"group_ids": ids, "same_group": rule} if rule in ("positive", "ignore") else {}
    dense = {"ids": ids, "same_group": rule} if options else {}
    if rule == "masks":
        options, dense = {"mask_ids": masks}, {"masks": masks}
        got = sigmoid_loss(x, y, scale, bias, row_offset=4, reduction="none", mask_ids=masks)
        assert_same(got, dense_sigmoid(x, y, scale, bias, 4, masks=masks), (x, y, scale, bias))
    if rule == "smoothing":
        options, dense = {"label_smoothing": 0.2}, {"smoothing": 0.2}
    for reduction in ("mean", "none"):
        got = contrastive_loss(x, y, scale, row_offset=4, direction=direction, reduction=reduction, **options)
        want = reduced(dense_contrastive(x, y, scale, 4, direction=direction, **dense), None, reduction)
        assert_same(got, want, (x, y, scale))


def test_64_bit_ids_are_told_apart_and_minus_one_is_none():
    x, y = embeds(3, 3, 4)
    far = torch.tensor([[2**62], [2**62 + 1], [-1]])
    assert contrastive_loss(x, y, 9.0, mask_ids=(far, far)) == contrastive_loss(x, y, 9.0)
    one = torch.full((3, 1), 2**62)
    assert contrastive_loss(x, y, 9.0, mask_ids=(one, one)) == 0.0


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("scale", [60.0, 100.0])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_saturated_pairs_keep_their_digits(implementation, scale):
    # Well-fitted pairs: the loss is far below the rounding of a log-sum-exp near `scale`.
    if implementation == "triton":
        pytest.importorskip("triton")
    first, other = torch.linalg.qr(torch.randn(20, 2, dtype=torch.float64))[0].T
    cosine = 1 - 12 / scale
    x = torch.stack([first, cosine * first + (1 - cosine**2) ** 0.5 * other])
    y = F.normalize(x + 0.01 * torch.randn(2, 20, dtype=torch.float64), dim=1)
    wide = [t.float().double().requires_grad_() for t in (x, y)]
    truth = dense_contrastive(*wide, scale).mean()
    exact = torch.autograd.grad(truth, wide)

    def error(loss, inputs):
        return max((g - e).norm() / e.norm() for g, e in zip(torch.autograd.grad(loss, inputs), exact))

    single = [t.detach().float().requires_grad_() for t in wide]
    logits, target = scale * single[0] @ single[1].T, torch.arange(2)
    eager = error((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, single)
    loss = contrastive_loss(*single, scale, implementation=implementation, compute_dtype=None)
    assert abs(loss.item() - truth.item()) <= 1e-4 * truth.item()
    assert 1e-6 < truth.item() < 1e-4
    assert error(loss, single) <= 3 * eager + 1e-6


@pytest.mark.parametrize("grouped", [False, True])
def test_label_smoothing_equals_cross_entropy(grouped):
    x, y = embeds(6, 6, 4)
    scale = scalar(11.0)
    ids = torch.tensor([1, 2, 1, 4, 5, 2]) if grouped else None
    got = contrastive_loss(x, y, scale, label_smoothing=0.3, group_ids=ids)
    assert_same(got, dense_contrastive(x, y, scale, ids=ids, smoothing=0.3).mean(), (x, y, scale))
    if not grouped:
        logits, target = scale * x @ y.T, torch.arange(6)
        want = sum(F.cross_entropy(side, target, label_smoothing=0.3) for side in (logits, logits.T)) / 2
        torch.testing.assert_close(got, want)


def test_weights_receive_gradients():
    x, y = embeds(4, 4, 3)
    weights = torch.rand(4, dtype=torch.float64, requires_grad=True)
    scale, bias = scalar(5.0), scalar(-1.0)
    assert_same(
        contrastive_loss(x, y, scale, weights=weights),
        reduced(dense_contrastive(x, y, scale), weights, "mean"),
        (weights, x),
    )
    assert_same(
        sigmoid_loss(x, y, scale, bias, weights=weights),
        reduced(dense_sigmoid(x, y, scale, bias), weights, "mean"),
        (weights, x),
    )


@pytest.mark.parametrize("frozen", ["x", "y", "both"])
def test_frozen_towers_leave_other_gradients_unchanged(frozen):
    x, y = embeds(5, 5, 4)
    scale, bias = scalar(8.0), scalar(-3.0)
    inputs = {"x": (y, scale), "y": (x, scale), "both": (scale,)}[frozen]
    a, b = (x.detach() if frozen != "y" else x), (y.detach() if frozen != "x" else y)
    assert_same(contrastive_loss(a, b, scale), dense_contrastive(x, y, scale).mean(), inputs)
    for reduction in ("mean", "none"):
        want = reduced(dense_sigmoid(x, y, scale, bias), None, reduction)
        assert_same(sigmoid_loss(a, b, scale, bias, reduction=reduction), want, (*inputs, bias))


def test_half_precision_error_is_at_most_that_of_eager():
    # Eager in the features' own dtype rounds the logits, too; ours keeps them in fp32.
    for dtype in (torch.bfloat16, torch.float16):
        x, y = embeds(65, 65, 48, dtype)
        wide_x, wide_y = (t.detach().double().requires_grad_() for t in (x, y))
        for scale in (20.0, 100.0):
            truth = dense_contrastive(wide_x, wide_y, scale).mean()
            exact = torch.autograd.grad(truth, (wide_x, wide_y))
            eager = torch.autograd.grad(
                sum(F.cross_entropy(s.float(), torch.arange(65)) for s in (scale * x @ y.T, scale * y @ x.T)) / 2,
                (x, y),
            )
            loss = contrastive_loss(x, y, scale)
            assert loss.dtype == torch.float32
            assert abs(loss.item() - truth.item()) <= 1e-5 * max(1.0, scale / 20)
            for ours, theirs, want in zip(torch.autograd.grad(loss, (x, y)), eager, exact):
                assert ours.dtype == dtype
                error = (ours.double() - want).norm() / want.norm()
                assert error <= (theirs.double() - want).norm() / want.norm() + 1e-4
                assert error <= 4e-3


def test_mixed_dtypes_are_promoted():
    x, y = embeds(4, 4, 6, torch.bfloat16)
    wide = y.detach().float().requires_grad_()
    loss = contrastive_loss(x, wide, 10.0)
    torch.testing.assert_close(loss, contrastive_loss(x.float(), wide, 10.0))
    loss.backward()
    assert x.grad.dtype == torch.bfloat16
    assert wide.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_compute_dtype_rounds_features_and_nothing_else(monkeypatch, dtype, autocast):
    # Equal to features that were rounded before, while loss, gradients and the sums within stay in fp32.
    x, y = embeds(33, 40, 24, torch.float32)
    scale, bias = torch.tensor(50.0, requires_grad=True), torch.tensor(-9.0)
    seen = []
    for name in ("lse_pair", "lse_pair_backward", "sigmoid_sum"):
        original = getattr(contrastive_torch, name)

        def spy(a, *arguments, original=original):
            seen.append(torch.equal(a, a.to(dtype).float()))
            return original(a, *arguments)

        monkeypatch.setattr(contrastive_torch, name, spy)
    rounded = [t.detach().to(dtype).float().requires_grad_() for t in (x, y)]
    for loss, scalars in ((contrastive_loss, (scale,)), (sigmoid_loss, (scale, bias))):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got = loss(x, y, *scalars, row_offset=3, compute_dtype=dtype)
        want = loss(*rounded, *scalars, row_offset=3)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, (x, y, scale)), torch.autograd.grad(want, (*rounded, scale))):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
    assert all(seen)
    assert not torch.equal(contrastive_loss(x, y, scale), contrastive_loss(x, y, scale, compute_dtype=dtype))


def test_autocast_changes_nothing():
    # Matrix products inside the operator would be cast to bf16 otherwise.
    x, y = embeds(33, 33, 40, torch.float32)
    scale, bias = torch.tensor(50.0, requires_grad=True), torch.tensor(-9.0)
    plain = [contrastive_loss(x, y, scale, label_smoothing=0.1), sigmoid_loss(x, y, scale, bias)]
    want = [torch.autograd.grad(loss, (x, y, scale)) for loss in plain]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [contrastive_loss(x, y, scale, label_smoothing=0.1), sigmoid_loss(x, y, scale, bias)]
        got = [torch.autograd.grad(loss, (x, y, scale)) for loss in cast]
    for a, b in zip([*plain, *want], [*cast, *got]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_non_contiguous_inputs():
    x, y = embeds(6, 6, 8)
    scale = scalar(7.0)
    want = dense_contrastive(x[::2, 1:6], y.T[:5, :3].T, scale).mean()
    assert_same(contrastive_loss(x[::2, 1:6], y.T[:5, :3].T, scale), want, (x, y, scale))


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_batches(n):
    x, y = embeds(n, n, 3)
    scale = scalar(4.0)
    assert_same(contrastive_loss(x, y, scale), dense_contrastive(x, y, scale).mean(), (x, y, scale))
    if n == 1:
        assert contrastive_loss(x, y, scale).item() == 0.0


def test_gradcheck_of_both_losses():
    x, y = embeds(4, 6, 3)
    scale, bias = scalar(3.0), scalar(-1.0)
    weights = torch.rand(4, dtype=torch.float64)
    ids = torch.tensor([0, 1, 0, 2, 1, 0])
    assert gradcheck(lambda *a: contrastive_loss(*a, row_offset=1, group_ids=ids, weights=weights), (x, y, scale))
    assert gradcheck(lambda *a: contrastive_loss(*a, row_offset=2, reduction="none"), (x, y, scale))
    assert gradcheck(lambda *a: sigmoid_loss(*a, row_offset=1, weights=weights), (x, y, scale, bias))
    assert gradcheck(lambda *a: sigmoid_loss(*a, row_offset=1, reduction="none"), (x, y, scale, bias))


def test_operators_pass_opcheck():
    x, y = embeds(3, 5, 4, torch.float32)
    scale, bias = torch.tensor(3.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 1], dtype=torch.int32)[:, None]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    pairs = (ids[1:4], ids, 1, True, torch.float32, False)
    for direction in ("both", "rows", "columns"):
        torch.library.opcheck(operators.lse_pair, (x, y, scale, *pairs, direction, True, False), test_utils=tests)
    torch.library.opcheck(operators.sigmoid_rows, (x, y, scale, bias, *pairs, False), test_utils=tests)
    # `sigmoid_sum` returns its own gradients; `opcheck` would differentiate them, which is refused.
    plain = [t.detach() for t in (x, y, scale, bias)]
    basic = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.sigmoid_sum, (*plain, torch.rand(3), *pairs, False, True, True), test_utils=basic)
    row, col, *rest, kept = (t.detach() for t in operators.lse_pair(x, y, scale, *pairs, "both", True, False))
    arguments = (row, col, *rest, row, col, kept, *plain[:3], *pairs, True, False)
    torch.library.opcheck(operators.lse_pair_backward, arguments, test_utils=basic)


def test_compiles_without_graph_breaks():
    x, y = embeds(5, 5, 4, torch.float32)
    scale, bias = torch.tensor(6.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    ids = torch.tensor([1, 2, 1, 3, 2])

    def both(x, y, scale, bias):
        grouped = contrastive_loss(x, y, scale, group_ids=ids, label_smoothing=0.1, check_finite=True)
        rows = sigmoid_loss(x, y, scale, bias, reduction="none")
        return grouped + sigmoid_loss(x, y, scale, bias) + rows.square().sum()

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    inputs = (x, y, scale, bias)
    got, want = compiled(*inputs), both(*inputs)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
        torch.testing.assert_close(a, b)


def test_fakes_describe_cuda_without_cuda():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(6, 8, dtype=torch.bfloat16, device="cuda")
        y = torch.empty(9, 8, dtype=torch.bfloat16, device="cuda")
        pairs = (None, None, 0, False, torch.bfloat16, True)
        out = operators.lse_pair(x, y, torch.empty((), device="cuda"), *pairs, "both", False, False)
    assert [t.shape[0] for t in out] == [6, 9, 6, 0, 0, 0]
    assert all(t.dtype == torch.float32 and t.device.type == "cuda" for t in out[:5])


def test_double_backward_is_refused():
    x, y = embeds(3, 3, 2)
    scale, bias = scalar(2.0), scalar(0.5)
    losses = [
        contrastive_loss(x, y, scale),
        sigmoid_loss(x, y, scale, bias),
        sigmoid_loss(x, y, scale, bias, reduction="none").sum(),
    ]
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="Second derivatives"):
            grad.square().sum().backward()


@pytest.mark.parametrize("name", ["x", "y", "scale", "bias", "weights"])
def test_forward_mode_is_refused(name):
    x, y = (each.detach() for each in embeds(3, 3, 2))
    inputs = {"x": x, "y": y, "scale": torch.tensor(2.0), "bias": torch.tensor(-1.0), "weights": torch.ones(3)}

    def softmax(value):
        given = inputs | {name: value}
        return contrastive_loss(given["x"], given["y"], given["scale"], weights=given["weights"], label_smoothing=0.1)

    def sigmoid(value):
        given = inputs | {name: value}
        return sigmoid_loss(given["x"], given["y"], given["scale"], given["bias"], weights=given["weights"])

    def rows(value):
        given = inputs | {name: value}
        return sigmoid_loss(given["x"], given["y"], given["scale"], given["bias"], reduction="none")

    tangent = torch.ones_like(inputs[name])
    for loss in {"bias": (sigmoid, rows), "weights": (softmax, sigmoid)}.get(name, (softmax, sigmoid, rows)):
        with pytest.raises(NotImplementedError, match="Forward-mode derivatives"):
            torch.func.jvp(loss, (inputs[name],), (tangent,))
        with pytest.raises(NotImplementedError, match="Forward-mode derivatives"):
            torch.func.jacfwd(loss)(inputs[name])
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match="Forward-mode derivatives"):
                loss(forward_ad.make_dual(inputs[name].clone().requires_grad_(), tangent))
            assert loss(inputs[name]).isfinite().all()  # nothing is derived


def test_torch_path_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, llm2clip_hf.losses; from llm2clip_hf.ops import *;"
        "print(contrastive_loss(torch.eye(3), torch.eye(3), 2.0), sigmoid_loss(torch.eye(3), torch.eye(3), 2.0, 0.0));"
        "assert not any('contrastive_triton' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


BAD_INPUT = [
    ({"text_embeds": torch.ones(3, 5)}, "width 4.*width 5"),
    ({"text_embeds": torch.ones(2, 4)}, "`row_offset` \\(0\\) plus the number of images \\(3\\).*texts \\(2\\)"),
    ({"image_embeds": torch.ones(3, 4, 1)}, "`image_embeds` must be a matrix"),
    ({"image_embeds": torch.ones(0, 4)}, "at least one row"),
    ({"image_embeds": torch.ones(3, 4, dtype=torch.int64)}, "`image_embeds` must be float16.*int64"),
    ({"text_embeds": torch.ones(3, 4, dtype=torch.complex64)}, "`text_embeds` must be float16.*complex64"),
    ({"text_embeds": torch.ones(3, 4, device="meta")}, "cpu.*meta.*one device"),
    ({"logit_scale": torch.ones(2)}, "`logit_scale` must be one floating-point number.*\\(2,\\)"),
    ({"logit_scale": torch.tensor(3)}, "`logit_scale` must be one floating-point number.*int64"),
    ({"logit_scale": "3"}, "`logit_scale` must be a number"),
    ({"logit_scale": 0.0}, "`logit_scale` must be positive, got 0.0"),
    ({"logit_scale": torch.tensor(-1.5)}, "`logit_scale` must be positive, got -1.5"),
    ({"logit_scale": torch.ones((), device="meta")}, "`logit_scale` \\(meta\\)"),
    ({"row_offset": 1}, "`row_offset` \\(1\\)"),
    ({"row_offset": -1}, "`row_offset` \\(-1\\)"),
    ({"weights": torch.ones(4)}, "`weights` must have shape \\(3,\\), one per image, got \\(4,\\)"),
    ({"weights": torch.ones(3, dtype=torch.int64)}, "`weights` must be floating point"),
    ({"group_ids": torch.ones(4, dtype=torch.int64)}, "`group_ids` must have shape \\(3,\\)"),
    ({"group_ids": torch.ones(3)}, "`group_ids` must be integers"),
    ({"group_ids": torch.ones(3, dtype=torch.int64, device="meta")}, "`group_ids` \\(meta\\)"),
    ({"mask_ids": torch.ones(3, 1)}, "`mask_ids` must be two tensors.*got Tensor"),
    ({"mask_ids": (torch.ones(3, 1), torch.ones(3, 1))}, "`mask_ids` must be integers, got torch.float32"),
    ({"mask_ids": (torch.arange(3), torch.arange(3))}, "`mask_ids` must have shape \\(3, K\\).*got \\(3,\\)"),
    ({"mask_ids": [torch.ones(3, 5, dtype=torch.int64)] * 2}, "1 <= K <= 4, one row per image, got \\(3, 5\\)"),
    ({"mask_ids": [torch.ones(3, 1).long(), torch.ones(4, 1).long()]}, "one row per text, got \\(4, 1\\)"),
    ({"mask_ids": [torch.ones(3, 1).long()] * 2, "group_ids": torch.arange(3)}, "cannot go together"),
    ({"compute_dtype": "fp16"}, "`compute_dtype` must be .*'fp16'"),
    ({"compute_dtype": torch.int8}, "`compute_dtype` must be .*int8"),
    ({"image_embeds": [[1.0, 2.0]]}, "`image_embeds` must be a tensor, got list"),
    ({k: torch.ones(3, 4, device="meta") for k in ("image_embeds", "text_embeds")}, "meta device, which holds no"),
    ({"same_group": "drop"}, "`same_group` must be .*'drop'"),
    ({"reduction": "avg"}, "`reduction` must be .*'avg'"),
    ({"implementation": "cuda"}, "`implementation` must be .*'cuda'"),
]


@pytest.mark.parametrize("change, message", BAD_INPUT)
def test_bad_input_is_named(change, message):
    good = {"image_embeds": torch.ones(3, 4), "text_embeds": torch.ones(3, 4), "logit_scale": 2.0}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**(good | change))
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(**(good | {"logit_bias": 0.0} | change))


def test_bad_options_of_one_loss_are_named():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="`label_smoothing` must lie in \\[0, 1\\], got 1.5"):
        contrastive_loss(x, x, 2.0, label_smoothing=1.5)
    with pytest.raises(ValueError, match="`label_smoothing` .*cannot go with"):
        contrastive_loss(x, x, 2.0, label_smoothing=0.1, same_group="ignore", group_ids=torch.arange(3))
    with pytest.raises(ValueError, match="`direction` must be .*'left'"):
        contrastive_loss(x, x, 2.0, direction="left")
    with pytest.raises(ValueError, match="`label_smoothing` .*cannot go with `mask_ids`"):
        contrastive_loss(x, x, 2.0, label_smoothing=0.1, mask_ids=[torch.arange(3)[:, None]] * 2)
    assert contrastive_loss(x, x, np.float32(2.0)) == contrastive_loss(x, x, 2.0)
    with pytest.raises(ValueError, match="`logit_bias` must be one floating-point number"):
        sigmoid_loss(x, x, 2.0, torch.ones(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_propagate_or_are_named(value):
    x, y = torch.eye(4), torch.eye(4)
    y[2, 1] = value
    assert not contrastive_loss(x, y, 3.0).isfinite()
    assert not sigmoid_loss(x, y, 3.0, -1.0).isfinite()
    for call in (
        lambda: contrastive_loss(x, y, 3.0, check_finite=True),
        lambda: sigmoid_loss(x, y, 3.0, -1.0, check_finite=True),
        lambda: sigmoid_loss(x, y, 3.0, -1.0, reduction="none", check_finite=True),
    ):
        with pytest.raises(ValueError, match="`text_embeds` must be finite, but row 2 of 4"):
            call()
    assert contrastive_loss(x, x, 3.0, check_finite=True).isfinite()


def test_triton_on_a_cpu_tensor_or_uninstalled_is_refused(monkeypatch):
    x = torch.eye(3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='`implementation="triton"` needs CUDA tensors, got cpu'):
        contrastive_loss(x, x, 2.0, implementation="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="16-bit and 32-bit floats, got torch.float64"):
        contrastive_loss(x.double(), x.double(), 2.0, implementation="triton")
    monkeypatch.setattr(argument_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install llm2clip-hf\\[kernels\\]"):
        contrastive_loss(x, x, 2.0, implementation="triton")
    assert contrastive_loss(x, x, 2.0, implementation="auto").isfinite()


@pytest.mark.parametrize("hip, capability", [(None, (7, 5)), ("6.2", (9, 0))])
def test_gpus_that_the_kernels_do_not_know_take_the_other_way(monkeypatch, hip, capability):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        x = torch.empty(8, 4, device="cuda")
    assert not argument_checks.choose_triton("auto", x, 1 << 30)
    assert argument_checks.choose_compute("auto", x) == torch.float32
    with pytest.raises(ValueError, match=f"compute capability 8.0 or newer, got cuda:0 .*{'ROCm' if hip else '7, 5'}"):
        argument_checks.choose_triton("triton", x, 1 << 30)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert argument_checks.choose_triton("auto", x, 1 << 30)
    assert argument_checks.choose_compute("auto", x) == torch.float16
    assert argument_checks.choose_compute("auto", x.bfloat16()) == torch.bfloat16
    assert argument_checks.choose_compute(None, x) == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_dense_ids_renumber_any_integers(dtype):
    ids = torch.randint(-128, 127, (200,), dtype=dtype)
    dense = argument_checks.dense_ids(ids)
    assert torch.equal(dense, torch.unique(ids, return_inverse=True)[1].int())
    want = (ids[:50, None] == ids[None, :]).sum(1)
    assert torch.equal(argument_checks.count_equal(dense[:50], dense), want)


def test_no_warning_is_raised():
    x, y = embeds(4, 4, 3, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contrastive_loss(x, y, torch.tensor([5.0], requires_grad=True)).backward()
        sigmoid_loss(x, y, 5.0, torch.tensor(-1.0)).backward()


# ------------------------------------------------------------------------------------------ as a kernel of the Hub


def test_kernel_repository_gives_the_losses_of_the_package(tmp_path):
    script = Path(__file__).parents[2] / "kernels" / "contrastive_loss" / "build.py"
    output = tmp_path / "contrastive-loss"
    subprocess.run([sys.executable, str(script), str(output)], check=True)
    again = subprocess.run([sys.executable, str(script), str(output)], capture_output=True, text=True)
    assert again.returncode == 1 and "exists. Give a new folder." in again.stderr
    library = importlib.util.find_spec("kernels")
    if library is not None and library.origin is not None:  # the library, not the folder of that name in this project
        kernel = importlib.import_module("kernels").get_local_kernel(output)
    else:
        folder = output / "build" / "torch-cpu"
        name = json.loads((folder / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernel)
    for name, scalars in {"contrastive_loss": (30.0,), "sigmoid_loss": (10.0, -5.0)}.items():
        results = []
        for module in (kernel, ops):
            x, y = (torch.randn(9, 5, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (1, 2))
            loss = getattr(module, name)(x, y, *scalars)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
        assert all(map(torch.equal, *results)), name
    assert kernel.contrastive_loss is not ops.contrastive_loss
