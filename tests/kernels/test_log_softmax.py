"""The loss's softmax and its gradient: Triton's kernel against arithmetic, torch's operators where it is not used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny_models import tiny_config
from torch import nn

from lightning_qlora.kernels import log_softmax
from lightning_qlora.kernels.log_softmax import PLAIN_BYTES, bytes_per_logit, log_softmax_with_gradient
from lightning_qlora.losses.log_probs import head_log_probs
from lightning_qlora.memory import build_skeleton, simulate_step

# The interpreter computes by NumPy, which remarks on what a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK = 8192
MARGIN = 7.0
INF, NAN = float("inf"), float("nan")


@pytest.fixture
def interpreted(interpret):
    module = interpret("log_softmax_triton")
    assert module._BLOCK == BLOCK
    standard = module.tl.standard  # which the interpreter knows as a whole, and is fast with
    module._larger, module._smaller = standard._elementwise_max, standard._elementwise_min
    module._add = standard._sum_combine
    return module


@pytest.fixture
def used(interpreted, monkeypatch):
    """The kernel, interpreted, taken for that of a GPU; it notes the shapes of the logits that it has had."""
    seen = []

    def run(logits, *others):
        seen.append(tuple(logits.shape))
        interpreted.log_softmax(logits, *others)

    monkeypatch.setattr(log_softmax, "triton_log_softmax", run)
    monkeypatch.setattr(log_softmax, "on_gpu", lambda tensor: True)
    log_softmax._is_trusted.cache_clear()
    yield seen
    log_softmax._is_trusted.cache_clear()


def arithmetic(logits, targets):
    """Log-probabilities and minus their gradient, in float64."""
    log_probs = logits.double().log_softmax(-1)
    ones = nn.functional.one_hot(targets, logits.shape[1])
    return log_probs.gather(1, targets[:, None])[:, 0], log_probs.exp() - ones


def run_kernel(module, logits, targets):
    """Run it into the midst of memory that it has no business with."""
    rows = len(logits)
    before = torch.full((rows + 2, logits.shape[1]), MARGIN, dtype=logits.dtype)
    before[1:-1] = logits
    given_logits = before.clone()
    log_probs, negative = (torch.full_like(x, MARGIN) for x in (before[:, 0].float(), before))
    correct = torch.zeros(rows + 2, dtype=torch.bool)
    middle = slice(1, rows + 1)
    module.log_softmax(given_logits[middle], targets, log_probs[middle], correct[middle], negative[middle])
    assert torch.equal(given_logits.nan_to_num(), before.nan_to_num())
    for outside in (log_probs[[0, -1]], negative[[0, -1]]):
        assert (outside == MARGIN).all()
    assert not correct[[0, -1]].any()
    return log_probs[middle], correct[middle], negative[middle]


def check(module, logits, targets):
    log_probs, correct, negative = run_kernel(module, logits, targets)
    expected_log_probs, expected = arithmetic(logits, targets)
    close = {"equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(log_probs, expected_log_probs.float(), rtol=1e-6, atol=1e-5, **close)
    # Triton's interpreter cuts off what bfloat16 has no bits for.
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[logits.dtype]
    torch.testing.assert_close(negative.double(), expected, rtol=tolerance, atol=1e-6, **close)
    numbers = ~logits.isnan().any(-1)
    assert torch.equal(correct[numbers], (logits.argmax(-1) == targets)[numbers])


def extreme_logits(width, dtype):
    """Return rows of every kind, and targets."""
    generator = torch.Generator().manual_seed(width)
    logits = (3 * torch.randn(12, width, generator=generator)).to(dtype)
    targets = torch.randint(width, (12,), generator=generator)
    middle, late = width // 2, width - 1
    logits[1] *= 3000
    logits[2] = -60_000.0
    logits[3, :middle] = logits[4, middle + 1 :] = -INF
    logits[5, [middle, late]] = logits[6, [middle, late]] = logits[7, [middle, late]] = 100.0
    targets[5], targets[6], targets[7] = middle, late, 0
    logits[8] = -INF
    logits[9, late], logits[10, middle] = NAN, INF
    logits[11, :] = 0.0
    targets[11] = 0
    return logits, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 1024, 5000, BLOCK, BLOCK + 1, 2 * BLOCK + 100])
def test_the_kernel_computes_rows_of_every_kind(interpreted, width, dtype):
    check(interpreted, *extreme_logits(width, dtype))


def test_every_token_can_be_the_most_likely(interpreted, monkeypatch):
    monkeypatch.setattr(interpreted, "_BLOCK", 8)
    width = 21
    logits = 5 * torch.eye(width) + 2 * torch.eye(width).roll(1, 1)
    for shift in (0, 1):
        _, correct, _ = run_kernel(interpreted, logits, (torch.arange(width) + shift) % width)
        assert correct.all() == (shift == 0) == correct.any()
    _, first, _ = run_kernel(interpreted, torch.zeros(width, width), torch.arange(width))
    assert first.tolist() == [True] + [False] * (width - 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_kernel_computes_any_logits(interpret, data):
    module = interpret("log_softmax_triton")  # with reductions of its own
    module._BLOCK = 8  # many blocks of few elements
    width = data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from(DTYPES))
    number = st.sampled_from([-INF, INF, NAN, 0.0, -0.0, 60_000.0, -60_000.0]) | st.floats(-6e4, 6e4, width=16)
    number |= st.integers(-3, 3).map(float)
    logits = torch.tensor(data.draw(st.lists(number, min_size=width, max_size=width)), dtype=dtype)[None]
    check(module, logits, torch.tensor([data.draw(st.integers(0, width - 1))]))


def test_a_target_that_is_no_token_gives_nan_and_reads_nothing(interpreted):
    logits = torch.randn(3, 50)
    log_probs, correct, negative = run_kernel(interpreted, logits, torch.tensor([-100, 50, 2**40]))
    assert log_probs.isnan().all()
    assert not correct.any()
    torch.testing.assert_close(negative, logits.softmax(-1))


@pytest.mark.parametrize("width", ["any", "aligned", "one"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(dtype, width, tmp_path, monkeypatch):
    """What the interpreter lets pass the compiler may not; and aligned rows are read and written 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from lightning_qlora.kernels.log_softmax_triton import _WARPS, _log_softmax

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"BLOCK": BLOCK} | ({"width": 1} if width == "one" else {})  # of which Triton makes a constant
    names = _log_softmax.arg_names
    others = {"targets": "*i64", "log_probs": "*fp32", "correct": "*i1", "width": "i32"}
    signature = {name: "constexpr" if name in constants else others.get(name, f"*{dtype}") for name in names}
    aligned = [name for name in names if name not in constants and (name != "width" or width == "aligned")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(_log_softmax, signature, constexprs=constants, attrs=attrs)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _WARPS}).asm["ptx"]
    large = [line for line in ptx.splitlines() if "global" in line and ".v4.b32" in line]
    assert {kind for kind in ("ld.global", "st.global") if any(kind in line for line in large)} == (
        {"ld.global", "st.global"} if width == "aligned" else set()
    )


# Where it is used, and where not


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_is_trusted_that_computes_what_torch_does(used, dtype, caplog):
    with caplog.at_level("INFO"):
        assert log_softmax.has_kernel(torch.device("cpu"), dtype)
        assert log_softmax.has_kernel(torch.device("cpu"), dtype)
    assert not caplog.records
    assert used == [(6, width) for width in log_softmax._CHECK_WIDTHS]
    assert any(width > BLOCK and width % BLOCK for width in log_softmax._CHECK_WIDTHS)


def off_by_little(logits, targets, log_probs, correct, negative):
    log_probs[-1] += 1e-4


def off_in_gradient(logits, targets, log_probs, correct, negative):
    negative[0, -1] *= 1.05


def not_the_first(logits, targets, log_probs, correct, negative):
    correct.copy_(logits.gather(1, targets[:, None])[:, 0] == logits.amax(-1))


def without_nan(logits, targets, log_probs, correct, negative):
    negative.nan_to_num_()


def failing(*_):
    raise OSError("no compiler")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (off_by_little, "its log-probabilities differ"),
        (off_in_gradient, "its gradients differ"),
        (not_the_first, "other tokens for the most likely"),
        (without_nan, "its gradients differ"),
        (failing, "no compiler"),
    ],
)
def test_a_kernel_is_refused_that_does_not_and_it_is_said_once(used, monkeypatch, error, reason, caplog):
    right = log_softmax.triton_log_softmax
    monkeypatch.setattr(log_softmax, "triton_log_softmax", lambda *given: (right(*given), error(*given)))
    logits, targets = torch.randn(3, 50), torch.arange(3)
    with caplog.at_level("INFO"):
        found = log_softmax_with_gradient(logits, targets)
        assert bytes_per_logit(logits, torch.float32) == PLAIN_BYTES
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert "torch's own operators are used" in caplog.text
    for one, two in zip(found, log_softmax._plain(logits, targets), strict=True):
        assert torch.equal(one, two)


def test_without_triton_and_for_other_dtypes_torch_computes(used, monkeypatch):
    logits, targets = torch.randn(3, 50, dtype=torch.float64), torch.arange(3)
    assert log_softmax_with_gradient(logits, targets)[2].dtype == torch.float64
    monkeypatch.setattr(log_softmax, "triton_log_softmax", None)
    log_probs, _, _ = log_softmax_with_gradient(logits.float(), targets)
    torch.testing.assert_close(log_probs, arithmetic(logits.float(), targets)[0].float())
    assert not used


def test_the_bytes_of_a_logit_are_known_where_it_is_used_and_where_not(used, monkeypatch):
    near = torch.zeros(1)
    assert [bytes_per_logit(near, dtype) for dtype in (*DTYPES, torch.float64)] == [8, 4, 4, PLAIN_BYTES]
    monkeypatch.setattr(log_softmax, "on_gpu", lambda tensor: tensor.is_cuda)
    assert bytes_per_logit(near, torch.bfloat16) == PLAIN_BYTES


def test_logits_of_any_layout(used):
    logits, targets = torch.randn(40, 6).t(), torch.arange(12)[::2]
    for one, two in zip(log_softmax_with_gradient(logits, targets), log_softmax._plain(logits, targets), strict=True):
        torch.testing.assert_close(one, two)


class Softcapped(nn.Linear):
    def forward(self, hidden):
        return 3 * torch.tanh(super().forward(hidden) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Softcapped])
def test_the_gradient_of_hidden_states_is_the_same_with_the_kernel(used, monkeypatch, kind, dtype):
    torch.manual_seed(0)
    head = kind(16, 300, bias=False, dtype=dtype).requires_grad_(False)
    hidden, weights = torch.randn(30, 16, dtype=dtype, requires_grad=True), torch.randn(30)
    targets = torch.randint(0, 300, (30,))
    found = []
    for fast in (True, False):
        monkeypatch.setattr(log_softmax, "on_gpu", lambda tensor, fast=fast: fast)
        log_probs, correct = head_log_probs(hidden, head, targets, chunk_size=13)
        (gradient,) = torch.autograd.grad((log_probs * weights).sum(), hidden)
        found.append((log_probs.detach(), correct, gradient))
    assert used[-3:] == [(13, 300), (13, 300), (4, 300)]
    assert len(used) == len(log_softmax._CHECK_WIDTHS) + 3
    for one, two in zip(*found, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    assert found[0][2].any()


# A step that is only counted


def test_on_the_meta_device_it_takes_its_outputs_alone():
    logits, targets = torch.empty(5, 70, dtype=torch.bfloat16, device="meta"), torch.empty(5).long().to("meta")
    found = log_softmax._by_kernel(logits, targets)
    assert [(x.dtype, tuple(x.shape)) for x in found] == [
        (torch.float32, (5,)), (torch.bool, (5,)), (torch.bfloat16, (5, 70)),
    ]  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_counted_step_of_a_gpu_has_longer_chunks_or_holds_less_and_one_of_a_cpu_neither(monkeypatch, softcap):
    family = "llama" if softcap is None else "gemma2"
    vocab, count = 131_072, 1500
    skeleton = build_skeleton(
        tiny_config(family, vocab_size=vocab), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    held = {}
    for trusted in (False, True):
        monkeypatch.setattr(log_softmax, "has_kernel", lambda device, dtype, trusted=trusted: trusted)
        for device in ("cuda", "cpu"):
            dtype = torch.bfloat16 if device == "cuda" else None
            held[device, trusted] = simulate_step(skeleton, (count,), count, device=device, dtype=dtype)
    assert held["cpu", False] == held["cpu", True]
    plain, fast = held["cuda", False], held["cuda", True]
    assert fast._replace(head=plain.head) == plain
    if softcap is None:  # in as much memory a chunk more than twice as long: the logits and their gradient
        assert fast.head == pytest.approx(plain.head, rel=0.05)
        assert fast.head - fast.kept == pytest.approx(4 * 640 * vocab, rel=0.05)
    else:
        assert fast.head < 0.95 * plain.head


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_on_the_gpu(dtype):
    pytest.importorskip("triton")
    assert log_softmax._compare(log_softmax._Kind(torch.device("cuda"), dtype)) is None
    for width in (1, 7, 1024, 5000, BLOCK + 1, 50_257):
        logits, targets = extreme_logits(width, dtype)
        log_probs, correct, negative = (x.cpu() for x in log_softmax._by_kernel(logits.cuda(), targets.cuda()))
        expected_log_probs, expected = arithmetic(logits, targets)
        torch.testing.assert_close(log_probs, expected_log_probs.float(), rtol=1e-6, atol=1e-5, equal_nan=True)
        tolerance = log_softmax._TOLERANCES[dtype]
        torch.testing.assert_close(negative.double(), expected, rtol=tolerance, atol=1e-6, equal_nan=True)
        numbers = ~logits.isnan().any(-1)
        assert torch.equal(correct[numbers], (logits.argmax(-1) == targets)[numbers])


@pytest.mark.gpu
def test_the_kernel_on_the_gpu_for_a_large_vocabulary():
    pytest.importorskip("triton")
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(1000, 128_256, device="cuda", generator=generator)).bfloat16()
    targets = torch.randint(128_256, (1000,), device="cuda", generator=generator)
    targets[::2] = logits[::2].argmax(-1)  # of which several are the largest, as bfloat16 has them
    before = logits.clone()
    assert bytes_per_logit(logits, logits.dtype) == 4
    log_probs, correct, negative = log_softmax_with_gradient(logits, targets)
    assert torch.equal(logits, before)
    expected = log_softmax._plain(logits, targets)
    torch.testing.assert_close(log_probs, expected[0], rtol=1e-6, atol=1e-5)
    assert torch.equal(correct, expected[1])
    assert correct[::2].all()
    torch.testing.assert_close(negative, expected[2], rtol=2**-7, atol=1e-7)
