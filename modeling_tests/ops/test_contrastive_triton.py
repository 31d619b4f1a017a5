# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter (natively on a GPU) against fp64 and the chunked twin."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from llm2clip_hf.ops import contrastive_loss, operators, sigmoid_loss


pytest.importorskip("triton")

from llm2clip_hf.ops import contrastive_blocks as blocks
from llm2clip_hf.ops import contrastive_triton as kernels
from llm2clip_hf.ops.contrastive_torch import Pairs


# numpy, which computes for the interpreter, warns where IEEE arithmetic gives the inf or NaN that is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHITECTURES = [blocks.architecture(torch.device("cuda"))] if DEVICE == "cuda" else [80, 90, 100]
# Relative error of gradients by dtype of the features: rounding of G and of the result.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(params=ARCHITECTURES)
def arch(request, monkeypatch):
    monkeypatch.setattr(blocks, "architecture", lambda device: request.param)
    return request.param


@pytest.fixture
def hopper(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(blocks, "architecture", lambda device: 90)


def unit(n, d, dtype):
    return F.normalize(torch.randn(n, d, device=DEVICE), dim=1).to(dtype)


def value_and_gradients(loss, tensors, scalars, **options):
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    inputs += [torch.tensor(value, dtype=dtype, device=DEVICE, requires_grad=True) for value in scalars]
    out = loss(*inputs, **options)
    upstream = torch.linspace(-1, 2, max(1, out.numel()), dtype=dtype, device=DEVICE).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def assert_close_to_fp64(loss, x, y, *scalars, atol=1e-5, **options):
    got = value_and_gradients(loss, (x, y), scalars, implementation="triton", **options)
    want = value_and_gradients(loss, (x.double(), y.double()), scalars, implementation="torch", **options)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-6, atol=atol * max(1.0, scalars[0] / 20))
    for ours, exact in zip(got[1:3], want[1:3]):
        assert ours.dtype == x.dtype
        assert (ours.double() - exact).norm() <= TOLERANCE[x.dtype] * exact.norm()
    for ours, exact in zip(got[3:], want[3:]):
        assert abs(ours.double() - exact) <= 5e-3 * abs(exact) + 1e-4


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_batches_on_every_architecture(arch, dtype):
    x, y = unit(150, 40, dtype), unit(150, 40, dtype)
    assert_close_to_fp64(contrastive_loss, x, y, 20.0)
    assert_close_to_fp64(sigmoid_loss, x, y, 10.0, -10.0)


@pytest.mark.parametrize("n, m, d, offset", [(1, 1, 8, 0), (31, 257, 20, 200), (128, 256, 64, 128), (129, 130, 72, 1)])
def test_sizes_and_offsets(hopper, n, m, d, offset):
    x, y = unit(n, d, torch.float16), unit(m, d, torch.float16)
    atol = 1e-4 if n == 1 else 1e-5
    if n > 1:
        assert_close_to_fp64(contrastive_loss, x, y, 30.0, row_offset=offset, atol=atol)
        assert_close_to_fp64(contrastive_loss, x, y, 30.0, row_offset=offset, reduction="none", atol=atol)
    else:
        assert abs(contrastive_loss(x, y, 30.0, implementation="triton").item()) <= atol
    assert_close_to_fp64(sigmoid_loss, x, y, 8.0, -6.0, row_offset=offset)
    assert_close_to_fp64(sigmoid_loss, x, y, 8.0, -6.0, row_offset=offset, reduction="none")


@pytest.mark.parametrize("same_group", ["positive", "ignore"])
def test_group_ids_on_every_architecture(arch, same_group):
    x, y = unit(100, 33, torch.float32), unit(140, 33, torch.float32)
    ids = torch.randint(0, 30, (140,), device=DEVICE)
    options = {"row_offset": 35, "group_ids": ids, "same_group": same_group}
    assert_close_to_fp64(contrastive_loss, x, y, 25.0, **options)
    assert_close_to_fp64(sigmoid_loss, x, y, 10.0, -8.0, **options)


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
@pytest.mark.parametrize("rule", [None, "positive", "ignore", "masks"])
def test_directions_and_masks(hopper, direction, rule):
    x, y = unit(70, 24, torch.float16), unit(150, 24, torch.float16)
    options = {}
    if rule == "masks":
        options = {"mask_ids": [torch.randint(-1, 20, (size, 4), device=DEVICE) for size in (70, 150)]}
        assert_close_to_fp64(sigmoid_loss, x, y, 10.0, -8.0, row_offset=60, **options)
    elif rule:
        options = {"group_ids": torch.randint(0, 30, (150,), device=DEVICE), "same_group": rule}
    assert_close_to_fp64(contrastive_loss, x, y, 25.0, row_offset=60, direction=direction, **options)


def test_many_blocks_and_row_chunks(hopper, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", 128)
    monkeypatch.setattr(blocks, "_PARTIALS", 1)
    monkeypatch.setattr(blocks, "_ROWS", 50)
    config = blocks.Config(64, 128, 64, 4, 3)
    monkeypatch.setitem(blocks._TUNED, ("lse", 90, 64, torch.float16), config)
    x, y = unit(1100, 64, torch.float16), unit(300, 64, torch.float16)
    pairs = Pairs(-3, None, None, False)
    rows, cols, pair, *_ = blocks.lse_pair(x, y, torch.tensor(20.0, device=DEVICE), pairs)
    logits = 20.0 * x.double() @ y.double().T
    torch.testing.assert_close(pair[3:303].double(), logits[3:303].diagonal(), rtol=0, atol=1e-5)
    assert (pair[:3] == 0).all()
    logits[3:303].fill_diagonal_(-torch.inf)
    torch.testing.assert_close(rows.double(), logits.logsumexp(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(cols.double(), logits.logsumexp(0), rtol=0, atol=1e-5)
    assert_close_to_fp64(contrastive_loss, x[:300], y, 20.0)
    assert_close_to_fp64(sigmoid_loss, x[:300], y, 9.0, -9.0)


@pytest.mark.parametrize("case", ["duplicates", "opposites", "hot row", "hot column", "two scales"])
@pytest.mark.parametrize("scale", [100.0, 300.0])
def test_one_reference_per_tile_is_repaired_where_it_fails(hopper, case, scale):
    # Without the second kernel, some of these rows or columns come out infinite or tens of nats off.
    x, y = unit(160, 24, torch.float32), unit(200, 24, torch.float32)
    if case == "duplicates":
        y[:160] = x
    elif case == "opposites":
        y[:160] = -x
    elif case == "hot row":
        x[5] *= 4
    elif case == "hot column":
        y[150] *= -4
    else:
        x[:64] *= 0.01
    logits = scale * x.double() @ y.double().T
    rows, cols, *_ = blocks.lse_pair(x, y, torch.tensor(scale, device=DEVICE), Pairs(0, None, None, False))
    tolerance = 2e-6 * float(logits.abs().max())
    logits.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(rows.double(), logits.logsumexp(1), rtol=0, atol=tolerance)
    torch.testing.assert_close(cols.double(), logits.logsumexp(0), rtol=0, atol=tolerance)
    upstream = value_and_gradients(contrastive_loss, (x, y), (scale,), implementation="triton")
    exact = value_and_gradients(contrastive_loss, (x.double(), y.double()), (scale,), implementation="torch")
    for ours, want in zip(upstream[1:3], exact[1:3]):
        # Next to a loss of zero, p - 1 has no correct digits in fp32; an absolute bound of the right size remains.
        assert (ours.double() - want).norm() <= 2e-4 * want.norm() + 2e-5 * scale


def test_flag_is_set_only_where_needed(hopper, monkeypatch):
    flagged = []
    launch = kernels.lse_exact_kernel

    class Spy:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                flagged.append(int(arguments[7].sum()))
                return launch[grid](*arguments, **options)

            return run

    monkeypatch.setattr(kernels, "lse_exact_kernel", Spy())
    x, y = unit(384, 16, torch.float32), unit(384, 16, torch.float32)
    scale = torch.tensor(100.0, device=DEVICE)
    pairs = Pairs(0, None, None, False)
    blocks.lse_pair(x / 10, y, scale, pairs)
    # Pairs that stand 55 nats above everything else, as after training: they are not in the way.
    y = F.normalize(0.55 * x + 0.05 * y, dim=1)
    x = torch.nn.functional.pad(x * 0.08, (0, 384))
    y = torch.nn.functional.pad(y * 0.08, (0, 384))
    x[:, 16:] = y[:, 16:] = 0.75 * torch.eye(384, device=DEVICE)
    blocks.lse_pair(x, y, scale, pairs)
    x[130, :16] *= 500
    blocks.lse_pair(x, y, scale, pairs)
    assert flagged[:2] == [0, 0]
    assert flagged[2] > 0


def test_poison_around_inputs_and_in_outputs_does_not_leak(hopper, monkeypatch):
    # Inputs are views with NaN behind them; every new tensor starts as NaN.
    def behind(tensor):
        store = torch.full((tensor.shape[0] + 9, tensor.shape[1]), torch.nan, dtype=tensor.dtype, device=DEVICE)
        store[: tensor.shape[0]] = tensor
        return store[: tensor.shape[0]]

    x, y = behind(unit(70, 24, torch.float16)), behind(unit(90, 24, torch.float16))
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *arguments, **options):
        out = new_empty(self, *arguments, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    ids = torch.arange(90, device=DEVICE) // 2
    for options in ({}, {"group_ids": ids}, {"group_ids": ids, "same_group": "ignore"}):
        assert_close_to_fp64(contrastive_loss, x, y, 20.0, row_offset=20, **options)
        assert_close_to_fp64(sigmoid_loss, x, y, 9.0, -9.0, row_offset=20, **options)


def test_results_are_bitwise_reproducible(hopper):
    x, y = unit(200, 48, torch.float16), unit(200, 48, torch.float16)
    ids = torch.randint(0, 50, (200,), device=DEVICE)
    for loss, scalars in ((contrastive_loss, (40.0,)), (sigmoid_loss, (10.0, -9.0))):
        for group in (None, ids):
            runs = [
                value_and_gradients(loss, (x, y), scalars, group_ids=group, implementation="triton") for _ in range(3)
            ]
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_non_finite_features_propagate(hopper):
    for value in (torch.nan, torch.inf):
        x, y = unit(40, 16, torch.float32), unit(40, 16, torch.float32)
        x[9, 3] = value
        assert not contrastive_loss(x, y, 10.0, implementation="triton").isfinite()
        rows = sigmoid_loss(x, y, 10.0, -5.0, reduction="none", implementation="triton")
        assert rows[9].isnan() or rows[9].isinf()
        assert rows[:9].isfinite().all()


@pytest.mark.parametrize("shift", [-14.0, -17.0, -20.0, -30.0, -3.0, 25.0])
def test_sigmoid_negatives_keep_their_digits(hopper, shift):
    x = torch.zeros(5, 16, device=DEVICE)
    out = blocks.sigmoid_sum(
        x,
        x,
        torch.tensor(1.0, device=DEVICE),
        torch.tensor(shift, device=DEVICE),
        torch.ones(5, device=DEVICE),
        Pairs(5, None, None, False),
        True,
        False,
    )
    z = torch.tensor(shift, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(out[0].double(), (5 * F.softplus(z)).expand(5), rtol=4e-6, atol=0)
    torch.testing.assert_close(out[3].double(), 25 * z.sigmoid(), rtol=4e-6, atol=0)


def test_small_fp16_gradients_do_not_underflow(hopper):
    # With 16-bit G unscaled, weights of 1e-6 would leave nothing but subnormal numbers.
    x, y = unit(64, 16, torch.float16), unit(64, 16, torch.float16)
    pairs, one = Pairs(0, None, None, False), torch.tensor(10.0, device=DEVICE)
    weights = torch.full((64,), 1e-8, device=DEVICE)
    _, dx, _, dbias = blocks.sigmoid_sum(x, y, one, -one, weights, pairs, True, True)
    want = blocks.sigmoid_sum(x.double().float(), y.float(), one, -one, weights, pairs, True, True)
    assert (dx - want[1]).norm() <= 1e-3 * want[1].norm()
    torch.testing.assert_close(dbias, want[3], rtol=1e-5, atol=0)
    assert blocks._headroom(torch.tensor([3.0, -70.0]), torch.float16) == 32.0
    assert blocks._headroom(torch.tensor([3.0]), torch.bfloat16) == 1.0
    options = {"compute_dtype": torch.float16, "reduction": "sum", "implementation": "triton"}
    grads = []
    for weight in (1.0, 2.0**-30, 2.0**20):
        weights = torch.full((64,), weight, device=DEVICE)
        _, dx, dy, _ = value_and_gradients(
            contrastive_loss, (x.float(), y.float()), (20.0,), weights=weights, **options
        )
        grads.append((dx / weight, dy / weight))
    for small in grads[1:]:
        for got, want in zip(small, grads[0]):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_operands_that_fit_are_not_copied(hopper):
    config = blocks.Config(64, 128, 64, 4, 3)
    x, y, scale = unit(128, 40, torch.float16), unit(256, 40, torch.float16), torch.tensor(3.0, device=DEVICE)
    wide_x, wide_y, same = blocks.pack(x, y, scale, config)
    assert wide_x is x
    assert wide_y is y
    assert same is scale
    wide_x, wide_y, same = blocks.pack(x[:100], y, scale, config)
    assert wide_x.shape == (128, 48)
    assert wide_y.shape == (256, 48)
    assert same is scale
    logits = wide_x.float() @ wide_y.float().T
    torch.testing.assert_close(logits[:100], x[:100].float() @ y.float().T)
    assert (logits[100:] < -1e8).all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
def test_halves_of_fp32_features_multiply_as_exactly_as_fp32(hopper, size):
    x, y, scale = unit(100, 1280, torch.float32) * size, unit(90, 1280, torch.float32), torch.tensor(100.0)
    scale = scale.to(DEVICE)
    wide_x, wide_y, wide_scale = blocks.pack(x, y, scale, blocks.CONFIGS["lse", 90][0])
    assert wide_x.dtype == wide_y.dtype == torch.float16
    exact = 100.0 * x.double() @ y.double().T
    halves = wide_scale.double() * (wide_x.double() @ wide_y.double().T)
    largest = 100.0 * size
    assert (halves[:100, :90] - exact).abs().max() <= 1.5e-7 * largest + 1e-9
    padding = torch.cat([halves[100:].flatten(), halves[:, 90:].flatten()])
    assert padding.max() < min(-50 * largest, -250.0)


class Count(TorchDispatchMode):
    """Counts operators that launch a kernel: not views, and not those on nothing."""

    # The last two: changes of dtype that only the CPU's products need, and the gradient that `backward` starts from.
    passing = ("view", "slice", "detach", "expand", "select", "unbind", "empty", "alias", "t", "promote_types", "to",
               "ones")  # fmt: skip

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1].removeprefix("new_").removesuffix("_like").strip("_")
        own = function.namespace.startswith("llm2clip")
        if not own and name not in self.passing and not (isinstance(result, torch.Tensor) and not result.numel()):
            self.names.append(name)
        return result


@pytest.mark.parametrize("dtype, compute", [(torch.float32, torch.float16), (torch.bfloat16, None)])
def test_few_launches_per_step(hopper, monkeypatch, dtype, compute):
    # Forward, reduction, backward. The eager loss has 28, and each of them visits all logits.
    names = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        kernel = getattr(kernels, name)

        class Spy:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                def run(*arguments, **options):
                    names.append(self.name)
                    with _disable_current_modes():
                        return self.kernel[grid](*arguments, **options)

                return run

        monkeypatch.setattr(kernels, name, Spy(kernel, name))
    for name in ("lse_pair", "lse_pair_backward"):
        original = getattr(blocks, name)

        def counted(*arguments, original=original):
            with Count(names):
                return original(*arguments)

        monkeypatch.setattr(blocks, name, counted)
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    inner = operators._inner
    monkeypatch.setattr(operators, "_inner", lambda *a: names.extend(["mul", "sum", "div"]) or inner(*a))
    x, y = (unit(256, 64, dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    with Count(names):
        contrastive_loss(x, y, scale, implementation="triton", compute_dtype=compute).backward()
    # Rounding: of features before, or of gradients after.
    assert len(names) + (2 if compute is not None else 0) <= 22, " ".join(names)
    assert sum(name.endswith("_kernel") for name in names) == 6


def test_tuner_uses_the_fastest_configuration(hopper, monkeypatch):
    monkeypatch.setattr(blocks, "_TUNED", {})
    x, y = unit(64, 16, torch.float16), unit(64, 16, torch.float16)
    alternatives = blocks.CONFIGS["lse", 90]
    assert len(alternatives) > 1

    def timer(call):
        call()
        return -float(alternatives.index(blocks.config_for("lse", x)))

    chosen = blocks.tune(x, y, torch.tensor(5.0, device=DEVICE), timer)
    assert chosen["lse"] == alternatives[-1] == blocks.config_for("lse", x)
    assert blocks.config_for("lse", x.float()) == blocks.CONFIGS["lse", 90][0]
    assert_close_to_fp64(contrastive_loss, x, y, 20.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_more_than_two_billion_elements_on_a_gpu():
    x = F.normalize(torch.randn(1 << 21, 1280, device="cuda", dtype=torch.bfloat16), dim=1)
    y = F.normalize(torch.randn(256, 1280, device="cuda", dtype=torch.bfloat16), dim=1)
    rows, *_ = blocks.lse_pair(x, y, torch.tensor(20.0, device="cuda"), Pairs(256, None, None, False))
    want = (20.0 * x[-300:].double() @ y.double().T).logsumexp(1)
    torch.testing.assert_close(rows[-300:].double(), want, rtol=0, atol=1e-4)
