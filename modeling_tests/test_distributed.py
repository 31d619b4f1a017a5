# SPDX-License-Identifier: Apache-2.0
"""Collectives with gradients on gloo ranks, and without a process group."""

import pytest
import torch
import torch.distributed as dist
from process_groups import run_ranks

from llm2clip_hf import distributed


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_process_needs_no_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert not distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather(x) is x
    assert distributed.all_reduce_sum(x) is x
    assert distributed.merge_log_sum_exp(x) is x
    assert distributed.ring_shift(x)() is x
    assert distributed.all_gather_sizes(3, x.device) == [3]


def gather(sizes):
    rank = distributed.rank()
    rows = numbers(sum(sizes), 3).split(sizes)
    own = rows[rank].clone().requires_grad_()
    gathered = distributed.all_gather(own)
    assert distributed.all_gather_sizes(len(own), own.device, alike={"own": own}) == sizes
    torch.testing.assert_close(gathered, torch.cat(rows), rtol=0, atol=0)
    # Each rank weighs all rows in its own way; a row's gradient is the sum over ranks.
    weights = [numbers(sum(sizes), 3, seed=7 + other) for other in range(len(sizes))]
    (gathered * weights[rank]).sum().backward()
    torch.testing.assert_close(own.grad, sum(weights).split(sizes)[rank])


@pytest.mark.parametrize("sizes", [[2, 2], [3, 1, 2], [1, 4, 4, 2]])
def test_all_gather_with_gradient_of_equal_and_unequal_rows(sizes):
    run_ranks(len(sizes), gather, sizes)


def gather_of_two_dtypes():
    with pytest.raises(ValueError, match="process 0 has torch.float32 of width 3 and process 1 has torch.float16"):
        distributed.all_gather(torch.ones(2, 3, dtype=torch.float16 if distributed.rank() else torch.float32))


def test_all_gather_of_two_dtypes_is_refused():
    run_ranks(2, gather_of_two_dtypes)


def reductions():
    rank, count = distributed.rank(), distributed.world_size()
    parts = [numbers(6, seed=other) * 30 for other in range(count)]
    for part in parts:
        part[0] = -torch.inf  # nowhere
    parts[1][1] = -torch.inf  # only on one rank
    own = parts[rank].clone().requires_grad_()
    merged = distributed.merge_log_sum_exp(own)
    torch.testing.assert_close(merged, torch.stack(parts).logsumexp(0))
    weights = numbers(6, seed=50 + rank)
    grad = torch.autograd.grad(merged[1:], own, weights[1:])[0]
    total = sum(numbers(6, seed=50 + other) for other in range(count))
    want = torch.stack(parts).softmax(0)[rank] * total
    torch.testing.assert_close(grad[1:], want[1:])
    assert grad[0] == 0

    plain = numbers(4, seed=rank).requires_grad_()
    summed = distributed.all_reduce_sum(plain)
    torch.testing.assert_close(summed, sum(numbers(4, seed=other) for other in range(count)))
    (summed * (rank + 1)).sum().backward()
    torch.testing.assert_close(plain.grad, torch.full((4,), count * (count + 1) / 2, dtype=torch.float64))


def test_reductions_with_gradient():
    run_ranks(3, reductions)


def ring():
    rank, count = distributed.rank(), distributed.world_size()
    tensor = torch.full((2, 3), float(rank))
    for step in range(1, count + 1):
        tensor = distributed.ring_shift(tensor)()
        assert (tensor == (rank - step) % count).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ring_shift_visits_every_rank(world_size):
    run_ranks(world_size, ring)


def within_subgroups():
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    own = torch.full((1, 1), float(dist.get_rank()), requires_grad=True)
    assert distributed.world_size(group) == 2
    assert distributed.rank(group) == dist.get_rank() // 2
    gathered = distributed.all_gather(own, group)
    assert gathered.flatten().tolist() == [dist.get_rank() % 2, dist.get_rank() % 2 + 2]
    (gathered.sum() * (1 + dist.get_rank())).backward()
    assert own.grad.item() == sum(1 + r for r in (dist.get_rank() % 2, dist.get_rank() % 2 + 2))
    received = distributed.ring_shift(own.detach(), group)()
    assert received.item() == (dist.get_rank() + 2) % 4


def test_other_groups_than_the_default():
    run_ranks(4, within_subgroups)


def half_precision():
    # Adding 1 and 1/512 in bf16 would give 1; the sum over ranks is taken in fp32.
    own = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    weight = [1.0, 2.0**-8, 2.0**-8][distributed.rank()]
    (distributed.all_gather(own).float() * weight).sum().backward()
    assert own.grad.dtype == torch.bfloat16
    assert (own.grad == 1.0 + 2.0**-7).all()


def test_gradients_of_half_precision_are_added_in_fp32():
    run_ranks(3, half_precision)


def test_older_names_of_the_collectives_are_found(monkeypatch):
    calls = []
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    ):
        monkeypatch.delattr(dist, new, raising=False)
        monkeypatch.setattr(dist, old, lambda out, tensor, group=None, name=old: calls.append(name))
    distributed._gather_into(torch.empty(2), torch.empty(1), None)
    distributed._reduce_scatter_into(torch.empty(1), torch.empty(2), None)
    assert calls == ["all_gather_into_tensor", "reduce_scatter_tensor"]


def fail_on_the_last_rank():
    if distributed.rank() == 1:
        raise ValueError("on purpose")


def test_a_failing_rank_fails_the_test():
    with pytest.raises(AssertionError, match="on purpose"):
        run_ranks(2, fail_on_the_last_rank)
