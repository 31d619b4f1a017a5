# SPDX-License-Identifier: Apache-2.0
"""`ContrastiveLoss`: one process equals the operators, many processes equal one process on the full batch."""

import doctest
import importlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_groups import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm2clip_hf import distributed
from llm2clip_hf.losses import ClipLoss, ContrastiveLoss, SigLipLoss
from llm2clip_hf.ops import contrastive_loss, sigmoid_loss


SIZES = [3, 5, 2, 4]
IDS = torch.tensor([5, 1, 5, 2, 3, 3, 9, 5, 1, 0, 7, 8, 7, 2])


class Towers(nn.Module):
    """Two linear towers and the scalars of a CLIP model, in fp64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))  # noqa: E731
        self.image, self.text = draw(6, 4), draw(5, 4)
        self.log_scale = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([-3.0], dtype=torch.float64))

    def forward(self, images, texts):
        image_embeds = F.normalize(images @ self.image, dim=1)
        text_embeds = F.normalize(texts @ self.text, dim=1)
        return image_embeds, text_embeds, self.log_scale.exp(), self.bias


def batch(sizes):
    generator = torch.Generator().manual_seed(11)
    return (torch.randn(sum(sizes), width, generator=generator, dtype=torch.float64) for width in (6, 5))


def loss_and_gradients(model, loss, images, texts, ids):
    image_embeds, text_embeds, scale, bias = model(images, texts)
    sigmoid = loss.loss_type == "sigmoid"
    # A parameter that gets no gradient would stop DDP.
    value = loss(image_embeds, text_embeds, scale, bias if sigmoid else None, ids) + 0.0 * bias.sum()
    value.backward()
    return value.detach(), [parameter.grad for parameter in model.parameters()]


def every_variant_under_ddp(sizes):
    rank, count = distributed.rank(), distributed.world_size()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    images, texts = batch(sizes)
    ids = IDS[: sum(sizes)]
    for loss_type, smoothing in (("softmax", 0.0), ("softmax", 0.2), ("sigmoid", 0.0)):
        for same_group in (None, "positive", "ignore"):
            if smoothing and same_group == "ignore":
                continue  # refused
            for ring in (False, True):
                options = {"same_group": same_group or "positive", "label_smoothing": smoothing}
                whole = loss_and_gradients(
                    Towers(),
                    ContrastiveLoss(loss_type, gather_across_devices=False, **options),
                    images,
                    texts,
                    ids if same_group else None,
                )
                value, gradients = loss_and_gradients(
                    DistributedDataParallel(Towers()),
                    ContrastiveLoss(loss_type, ring=ring, **options),
                    images[own],
                    texts[own],
                    ids[own] if same_group else None,
                )
                dist.all_reduce(value)
                torch.testing.assert_close(value / count, whole[0], rtol=1e-12, atol=1e-13)
                for ours, exact in zip(gradients, whole[1]):
                    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sizes", [[4], [4, 4], SIZES[:2], SIZES[:3], SIZES], ids=str)
def test_gradients_under_ddp_equal_one_process_on_the_full_batch(sizes):
    run_ranks(len(sizes), every_variant_under_ddp, sizes)


def subgroup_losses():
    # Ranks 1 and 3 form a group, 0 and 2 another; the batch of a loss is that of its group.
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    group = groups[mine]
    images, texts = batch([3, 2, 4, 1])
    owned = [slice(0, 3), slice(3, 5), slice(5, 9), slice(9, 10)]
    members = torch.cat([torch.arange(10)[owned[r]] for r in (mine, mine + 2)])
    for loss_type in ("softmax", "sigmoid"):
        for ring in (False, True):
            whole = loss_and_gradients(
                Towers(),
                ContrastiveLoss(loss_type, gather_across_devices=False),
                images[members],
                texts[members],
                None,
            )
            value, gradients = loss_and_gradients(
                DistributedDataParallel(Towers(), process_group=group),
                ContrastiveLoss(loss_type, ring=ring, process_group=group),
                images[owned[dist.get_rank()]],
                texts[owned[dist.get_rank()]],
                None,
            )
            dist.all_reduce(value, group=group)
            torch.testing.assert_close(value / 2, whole[0], rtol=1e-12, atol=1e-13)
            for ours, exact in zip(gradients, whole[1]):
                torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-13)


def test_other_process_group_than_the_default():
    run_ranks(4, subgroup_losses)


KEYS = torch.tensor(
    [  # anchor, positive, two hard negatives, label
        [1, 11, 21, 31, 0],
        [2, 12, 22, 32, 1],
        [3, 1, 23, 33, 2],  # the positive is row 0's anchor
        [2, 14, 24, 34, 3],  # the anchor is row 1's
        [5, 12, 15, 35, 4],  # the positive is row 1's; a negative is row 5's positive
        [6, 15, 6, 36, 0],  # row 0's image; a negative is the row's own anchor
        [7, 17, 17, 37, 6],  # a negative is the row's own positive
        [8, 18, 28, 3, 7],  # a negative is row 2's anchor
    ]
)


def dense_caption_loss(columns, keys, scale, symmetric):
    """Stage 1 with every logit: anchors pick their positives among positives and hard negatives; and the reverse."""
    n, count = len(keys), len(columns)
    anchor, positive, label = keys[:, :1], keys[:, 1:2], keys[:, count:]
    right = [(keys[None, :, c] == anchor) | (keys[None, :, c] == positive) for c in range(1, count)]
    right[0] |= (keys[None, :, 0] == anchor) | (keys[None, :, count] == label)
    right[0].fill_diagonal_(False)
    logits = (scale * columns[0] @ torch.cat(columns[1:]).T).masked_fill(torch.cat(right, 1), -torch.inf)
    loss = F.cross_entropy(logits, torch.arange(n))
    if not symmetric:
        return loss
    reverse = (keys[None, :, 0] == positive) | (keys[None, :, 0] == anchor) | (keys[None, :, 1] == positive)
    reverse |= keys[None, :, count] == label
    logits = (scale * columns[1] @ columns[0].T).masked_fill(reverse.fill_diagonal_(False), -torch.inf)
    return (loss + F.cross_entropy(logits, torch.arange(n))) / 2


def caption_masks(keys, count):
    """The same rule as ids: each row's anchor and positive against texts, anchors and labels against their own."""
    rows = keys[:, [0, 1, 0, count]]
    positives = keys[:, [1, 1, 0, count]]
    negatives = keys[:, 2:count].T.reshape(-1, 1)
    none = torch.full_like(negatives, -1)
    return rows, torch.cat([positives, torch.cat([negatives, negatives, none, none], 1)])


def caption_embeddings(dtype):
    generator = torch.Generator().manual_seed(2)
    draw = lambda: F.normalize(torch.randn(8, 6, generator=generator, dtype=torch.float64), dim=1)  # noqa: E731
    return [draw().to(dtype).requires_grad_() for _ in range(4)]


@pytest.mark.parametrize("symmetric", [False, True])
def test_caption_loss_is_one_direction_or_both_with_hard_negatives_and_masks(symmetric):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        columns = caption_embeddings(dtype)
        want = dense_caption_loss(columns, KEYS, 50.0, symmetric)
        loss = ContrastiveLoss(direction="both" if symmetric else "rows")
        negatives = torch.cat(columns[2:])
        got = loss(columns[0], columns[1], 50.0, mask_ids=caption_masks(KEYS, 4), hard_negatives=negatives)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        for ours, exact in zip(torch.autograd.grad(got, columns), torch.autograd.grad(want, columns)):
            assert (ours - exact).norm() <= tolerance * exact.norm()
    different = torch.arange(40).reshape(8, 5)
    masked, all_count = (dense_caption_loss(columns, keys, 5.0, symmetric) for keys in (KEYS, different))
    assert abs(masked - all_count) > 1e-2


def caption_loss_across_ranks(sizes):
    rank, count = distributed.rank(), len(sizes)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for symmetric in (False, True):
        for ring in (False, True):
            for known in (None, sizes):
                columns = caption_embeddings(torch.float64)
                want = torch.autograd.grad(dense_caption_loss(columns, KEYS, 50.0, symmetric), columns)
                loss = ContrastiveLoss(direction="both" if symmetric else "rows", ring=ring)
                image, text, *negatives = (column[own] for column in columns)
                masks = caption_masks(KEYS[own], 4)
                value = loss(image, text, 50.0, mask_ids=masks, hard_negatives=torch.cat(negatives), sizes=known)
                for ours, exact in zip(torch.autograd.grad(value, columns), want):
                    torch.testing.assert_close(ours[own] / count, exact[own], rtol=1e-10, atol=1e-13)
                dist.all_reduce(value := value.detach())
                exact = dense_caption_loss(columns, KEYS, 50.0, symmetric)
                torch.testing.assert_close(value / count, exact.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [[3, 5], [4, 1, 3]], ids=str)
def test_caption_loss_across_processes_equals_one(sizes):
    run_ranks(len(sizes), caption_loss_across_ranks, sizes)


def weights_and_directions_under_ddp(sizes):
    rank, count = distributed.rank(), distributed.world_size()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    images, texts = batch(sizes)
    weights = torch.linspace(0.2, 1.7, sum(sizes), dtype=torch.float64)

    def run(model, loss, part):
        x, y, scale, bias = model(images[part], texts[part])
        bias_given = bias if loss.loss_type == "sigmoid" else None
        value = loss(x, y, scale, bias_given, weights=weights[part]) + 0.0 * bias.sum()
        value.backward()
        return value.detach(), [parameter.grad for parameter in model.parameters()]

    for loss_type, direction in (
        ("softmax", "rows"),
        ("softmax", "columns"),
        ("softmax", "both"),
        ("sigmoid", "both"),
    ):
        for ring in (False, True):
            alone = ContrastiveLoss(loss_type, gather_across_devices=False, direction=direction)
            whole = run(Towers(), alone, slice(None))
            model = DistributedDataParallel(Towers())
            value, gradients = run(model, ContrastiveLoss(loss_type, ring=ring, direction=direction), own)
            dist.all_reduce(value)
            torch.testing.assert_close(value / count, whole[0], rtol=1e-12, atol=1e-13)
            for ours, exact in zip(gradients, whole[1]):
                torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-13)


def test_weights_and_single_directions_across_processes_equal_one():
    run_ranks(2, weights_and_directions_under_ddp, [3, 5])


def numbers_as_scalars():
    torch.manual_seed(distributed.rank())
    x, y = (F.normalize(torch.randn(4, 5), dim=1) for _ in range(2))
    for ring in (False, True):
        tensors = ContrastiveLoss("sigmoid", ring=ring)(x, y, torch.tensor(9.0), torch.tensor(-4.0))
        assert torch.equal(ContrastiveLoss("sigmoid", ring=ring)(x, y, 9.0, np.float32(-4.0)), tensors)
        assert torch.equal(ContrastiveLoss(ring=ring)(x, y, 9.0), ContrastiveLoss(ring=ring)(x, y, torch.tensor(9.0)))


def test_numbers_serve_as_scale_and_bias_on_several_processes():
    run_ranks(2, numbers_as_scalars)


def partial_gradients():
    """The texts' gradient of bf16 features in a gather: rounded once per rank it would be off by more."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda: F.normalize(torch.randn(32, 16, generator=generator), dim=1).bfloat16()  # noqa: E731
    x, y = draw(), draw()
    own = slice(8 * distributed.rank(), 8 * distributed.rank() + 8)
    exact = y.double().requires_grad_()
    (want,) = torch.autograd.grad(contrastive_loss(x.double(), exact, 30.0), exact)
    text = y[own].clone().requires_grad_()
    (got,) = torch.autograd.grad(ContrastiveLoss()(x[own], text, 30.0), text)
    rounded = (want[own] * 4).bfloat16()
    assert got.dtype == torch.bfloat16
    assert (got != rounded).float().mean() < 0.05


def test_partial_gradients_are_added_before_they_are_rounded():
    run_ranks(4, partial_gradients)


def count_traffic():
    """Elements that this rank puts into each collective, for 4 pairs of width 16 on each of two ranks."""
    sent = {"gather": [], "scatter": [], "ring": []}
    originals = distributed._gather_into, distributed._reduce_scatter_into, distributed.ring_shift

    def gather(output, tensor, group):
        sent["gather"].append(tensor.numel())
        originals[0](output, tensor, group)

    def scatter(output, tensor, group):
        sent["scatter"].append(tensor.numel())
        originals[1](output, tensor, group)

    def ring(tensor, group=None):
        sent["ring"].append(tensor.numel())
        return originals[2](tensor, group)

    distributed._gather_into, distributed._reduce_scatter_into, distributed.ring_shift = gather, scatter, ring
    found = {}
    for variant in (False, True):
        for name in sent:
            sent[name] = []
        x, y = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
        ContrastiveLoss(ring=variant)(x, y, torch.tensor(5.0)).backward()
        assert x.grad.isfinite().all()
        found[variant] = {name: list(values) for name, values in sent.items()}
    return found


def test_only_texts_travel_and_the_ring_holds_one_block():
    for found in run_ranks(2, count_traffic):
        # What all must know of one another, one block of texts out, one gradient back: images stay where they are.
        assert found[False] == {"gather": [26, 64], "scatter": [128], "ring": []}
        # Texts once forward and once backward, their gradient twice; nothing is as large as all texts.
        assert found[True]["gather"] == [26]
        assert found[True]["scatter"] == []
        assert found[True]["ring"] == [64] * 4


def half_precision_with_autocast():
    torch.manual_seed(distributed.rank())
    x, y = (F.normalize(torch.randn(6, 16), dim=1).bfloat16() for _ in range(2))
    scale = torch.tensor(30.0)
    results = []
    for enabled in (False, True):
        for loss in (ContrastiveLoss(), ContrastiveLoss(ring=True)):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                value = loss(a, b, scale)
            value.backward()
            assert value.dtype == torch.float32
            results.append((value.detach(), a.grad, b.grad))
    for other in results[1:]:
        for mine, reference in zip(other[1:], results[0][1:]):
            # The ring adds in fp32 what the gather rounds to bf16 once per rank.
            assert (mine.float() - reference.float()).norm() <= 5e-3 * reference.float().norm()
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-6, atol=1e-6)


def test_half_precision_and_autocast_keep_fp32_logits():
    run_ranks(2, half_precision_with_autocast)


def ranks_that_differ():
    """The error of each way in which this rank's input can be unlike the other's."""
    rank, width = distributed.rank(), 4
    x, scale, ids = F.normalize(torch.randn(3 + rank, width), dim=1), torch.tensor(5.0), torch.arange(3 + rank)
    narrow = F.normalize(torch.randn(3 + rank, width - rank), dim=1)
    half = x.half() if rank else x.bfloat16()
    masks = [torch.zeros(3 + rank, 1 + rank, dtype=torch.int64)] * 2
    trained = x.clone().requires_grad_(rank == 0)
    inputs = {
        "dtype": ((half, half), {}, {}),
        "width": ((narrow, narrow), {}, {}),
        "no ids": ((x, x), {"group_ids": ids if rank else None}, {}),
        "dtype of ids": ((x, x), {"group_ids": ids.int() if rank else ids}, {}),
        "masks": ((x, x), {"mask_ids": masks}, {}),
        "weights": ((x, x), {"weights": torch.ones(3 + rank) if rank else None}, {}),
        "gradient": ((trained, x), {}, {}),
        "gradient of texts": ((x.clone().requires_grad_(), trained), {}, {}),
        "smoothing": ((x, x), {}, {"label_smoothing": 0.25 * rank}),
        "direction": ((x, x), {}, {"direction": ("rows", "both")[rank]}),
        "compute": ((x, x), {}, {"compute_dtype": (torch.float16, None)[rank]}),
    }
    found = {}
    for name, (features, arguments, options) in inputs.items():
        for ring in (False, True):
            with pytest.raises(ValueError, match="on all processes") as error:
                ContrastiveLoss(ring=ring, **options)(*features, scale, **arguments)
            found[name, ring] = str(error.value)
    with pytest.raises(ValueError, match="`ring` must be alike.*process 0 has False and process 1 has True"):
        ContrastiveLoss(ring=rank == 1)(x, x, scale)
    # One promoted dtype on each rank is one dtype.
    mixed = (x.bfloat16(), x) if rank else (x, x.bfloat16())
    assert ContrastiveLoss()(*mixed, scale).isfinite()
    return found


def test_ranks_that_differ_get_the_same_error():
    first, second = run_ranks(2, ranks_that_differ)
    assert first == second
    assert "process 0 has torch.bfloat16 of width 4 and process 1 has torch.float16" in first["dtype", False]
    assert "torch.float32 of width 4 and process 1 has torch.float32 of width 3" in first["width", True]
    assert "`group_ids`" in first["no ids", False]
    assert "has none and process 1 has torch.int64" in first["no ids", False]
    assert "torch.int64 of width 1 and process 1 has torch.int32" in first["dtype of ids", True]
    assert "`mask_ids` must be alike" in first["masks", True]
    assert "`requires_grad` must be alike on all processes, but process 0 has True" in first["gradient", False]
    assert "`requires_grad of the texts`" in first["gradient of texts", False]
    assert "process 0 has 0.0 and process 1 has 0.25" in first["smoothing", False]
    assert "process 0 has 'rows' and process 1 has 'both'" in first["direction", False]
    assert "process 0 has torch.float16 and process 1 has torch.float32" in first["compute", False]


def without_gathering():
    torch.manual_seed(distributed.rank())
    x, y = (F.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    local = ContrastiveLoss(gather_across_devices=False)(x, y, scale)
    torch.testing.assert_close(local, contrastive_loss(x, y, scale))
    for ring, message in ((True, "once_differentiable"), (False, "Second derivatives")):
        a = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(ContrastiveLoss(ring=ring)(a, y, scale), a, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            grad.sum().backward()


def test_local_negatives_only_and_double_backward():
    run_ranks(2, without_gathering)


def test_one_process_equals_the_operators():
    x, y = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    scale, bias, ids = torch.tensor([9.0]), torch.tensor([-2.0]), torch.tensor([1, 2, 2, 3, 1, 4])
    assert torch.equal(ContrastiveLoss()(x, y, scale), contrastive_loss(x, y, scale))
    assert torch.equal(ContrastiveLoss("sigmoid")(x, y, scale, bias), sigmoid_loss(x, y, scale, bias))
    got = ContrastiveLoss(same_group="ignore", ring=True)(x, y, scale, group_ids=ids)
    assert torch.equal(got, contrastive_loss(x, y, scale, group_ids=ids, same_group="ignore"))
    assert not list(ContrastiveLoss().parameters())
    assert "sigmoid" in repr(ContrastiveLoss("sigmoid"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "hinge"}, "`loss_type` must be .*'hinge'"),
        ({"implementation": "cuda"}, "`implementation` must be .*'cuda'"),
        ({"same_group": "drop"}, "`same_group` must be .*'drop'"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "`label_smoothing` \\(0.1\\) has no effect on the sigmoid"),
        ({"direction": "rows", "loss_type": "sigmoid"}, "`direction` \\('rows'\\) has no effect on the sigmoid"),
        ({"direction": "up"}, "`direction` must be .*'up'"),
        ({"compute_dtype": "half"}, "`compute_dtype` must be .*'half'"),
        ({"ring": True, "gather_across_devices": False}, "`ring=True` has no effect"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(**options)


def test_bad_inputs_are_named():
    x = torch.eye(4)
    with pytest.raises(ValueError, match="`logit_bias` is needed by the sigmoid loss"):
        ContrastiveLoss("sigmoid")(x, x, torch.tensor(2.0))
    with pytest.raises(ValueError, match="`logit_bias` has no effect on the softmax loss"):
        ContrastiveLoss()(x, x, torch.tensor(2.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="Images \\(3\\) and texts \\(4\\) must pair one to one"):
        ContrastiveLoss()(x[:3], x, torch.tensor(2.0))
    with pytest.raises(ValueError, match="`hard_negatives` \\(width 3\\) must have one width"):
        ContrastiveLoss()(x, x, 2.0, hard_negatives=x[:, :3])
    with pytest.raises(ValueError, match="`hard_negatives` have none. Use `mask_ids`"):
        ContrastiveLoss()(x, x, 2.0, hard_negatives=x, group_ids=torch.arange(4))
    with pytest.raises(ValueError, match="`sizes` must hold one number per process, got \\[4, 4\\]"):
        ContrastiveLoss()(x, x, 2.0, sizes=[4, 4])


@pytest.mark.parametrize("module", ["llm2clip_hf.losses", "llm2clip_hf.distributed", "llm2clip_hf.ops.contrastive"])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


# -------------------------------------------------------------------------------------------------- open_clip's names


def open_clip_formulas(image, text, scale, bias, own):
    """Dense losses of open_clip on the whole batch: softmax, its part for some rows, sigmoid of these rows."""
    logits, target = scale * image @ text.T, torch.arange(len(image))
    both = [F.cross_entropy(each, target, reduction="none") for each in (logits, logits.T)]
    sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    pairs = -F.logsigmoid(sign * (logits + bias))
    return sum(each.mean() for each in both) / 2, sum(each[own].mean() for each in both) / 2, pairs[own].sum(1).mean()


def gradients_of(loss, parameters):
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


def open_clip_calls(size):
    rank, count = distributed.rank(), distributed.world_size()
    own = slice(rank * size, (rank + 1) * size)
    model = Towers()
    images, texts = batch([count * size])
    parameters = list(model.parameters())
    image, text, scale, bias = model(images, texts)
    whole, part, sigmoid = open_clip_formulas(image, text, scale, bias, own)
    expected = gradients_of(whole, parameters)
    everywhere = {"rank": rank, "world_size": count}
    losses = {
        "whole": (ClipLoss(gather_with_grad=True, **everywhere), whole),
        "part": (ClipLoss(True, True, True, rank, count), part),
    }
    for name, (loss, formula) in losses.items():
        image, text, scale, bias = model(images[own], texts[own])
        for value in (
            loss(image, text, scale),
            loss(image_features=image, text_features=text, logit_scale=scale, logit_bias=bias, output_dict=True)[
                "contrastive_loss"
            ],
        ):
            torch.testing.assert_close(value, formula, rtol=1e-12, atol=1e-13, msg=name)
            for ours, exact in zip(gradients_of(value, parameters), expected):
                if ours is not None:
                    ours = distributed.all_reduce_sum(ours) / count
                    torch.testing.assert_close(ours, torch.zeros_like(ours) if exact is None else exact)
        assert value.grad_fn is not None
    rows = [distributed.all_reduce_sum(each) / count for each in gradients_of(sigmoid, parameters)]
    for exchange in (None, "bidir", "shift", "gather", "reduce"):
        image, text, scale, bias = model(images[own], texts[own])
        value = SigLipLoss(rank=rank, world_size=count, dist_impl=exchange)(image, text, scale, bias, True)
        torch.testing.assert_close(value["contrastive_loss"], sigmoid, rtol=1e-12, atol=1e-13)
        for ours, exact in zip(gradients_of(value["contrastive_loss"], parameters), rows):
            torch.testing.assert_close(distributed.all_reduce_sum(ours) / count, exact)
    if count > 1:
        with pytest.raises(ValueError, match=f"are {1 - rank} and 2, but this is process {rank} of 2"):
            ClipLoss(gather_with_grad=True, rank=1 - rank, world_size=2)(image, text, scale)
        alone = SigLipLoss()(image, text, scale, bias)  # its own batch only
        torch.testing.assert_close(alone, sigmoid_loss(image, text, scale, bias))


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_under_open_clips_names_are_its_formulas(world_size):
    run_ranks(world_size, open_clip_calls, 4)


def test_options_of_open_clip_that_cannot_be_honoured_are_refused():
    with pytest.raises(ValueError, match="`use_horovod=True` is not supported"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="`gather_with_grad=False` with `world_size=8` leaves out the gradient"):
        ClipLoss(world_size=8)
    with pytest.raises(ValueError, match="`dist_impl` must be .* got 'ring'"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="are 0 and 2, but this is process 0 of 1"):
        SigLipLoss(world_size=2)(torch.eye(3), torch.eye(3), torch.tensor(2.0), torch.tensor(0.0))
