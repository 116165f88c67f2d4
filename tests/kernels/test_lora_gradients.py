"""LoRA's two products with an output's gradient by one kernel: the same as one after the other, whatever the shapes."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from packaging.version import Version

from lightning_qlora.kernels import launching, lora_gradients
from lightning_qlora.kernels.lora_products import lora_low, lora_products, pack_adapters

MARGIN = 7.0
SHAPES = [(64, 64, 16), (50, 72, 8), (33, 31, 5), (1, 8, 8), (100, 200, 48), (96, 40, 64)]


@pytest.fixture
def interpreted(interpret):
    module = interpret("lora_gradients_triton")
    if Version(module.triton.__version__) < Version("3.7"):
        pytest.skip("with newer versions of NumPy this interpreter of Triton ends no loop where an argument says")
    return module


def matrices(height, width, rank, dtype=torch.float32, device="cpu"):
    """A gradient, rows of all B, and a product with all A, of which the adapter's are in the middle."""
    generator = torch.Generator(device).manual_seed(height + width)
    wide = [(height, width + 8), (width, 3 * rank), (height, 3 * rank)]
    gradient, rows, low = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in wide)
    return gradient[:, :width], rows[:, rank : 2 * rank], low[:, rank : 2 * rank]


def call(module, gradient, rows, low, *blocks):
    (height, width), rank = gradient.shape, rows.shape[1]
    lows = gradient.new_full((height, 3 * rank), MARGIN)
    of_b = gradient.new_full((width + 1, rank), MARGIN, dtype=torch.float32)
    module.both_products(gradient, rows, low, 0.5, lows[:, rank : 2 * rank], of_b[:width], *blocks)
    assert (lows[:, :rank] == MARGIN).all()
    assert (lows[:, 2 * rank :] == MARGIN).all()
    assert (of_b[width:] == MARGIN).all()
    return lows[:, rank : 2 * rank], of_b[:width]


def products(gradient, rows, low):
    return gradient @ rows, 0.5 * gradient.t() @ low


@pytest.mark.parametrize("programs", [1, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_products_of_every_shape(interpreted, shape, programs):
    inputs = matrices(*shape)
    blocks = interpreted.Blocks(16, 32, programs=programs)
    found = call(interpreted, *inputs, blocks)
    for one, two in zip(found, products(*inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
    for one, two in zip(found, call(interpreted, *inputs, blocks), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rank", [8, 64])
def test_divided_as_usual(interpreted, rank):
    inputs = matrices(70, 520, rank)
    for one, two in zip(call(interpreted, *inputs), products(*inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


def test_the_same_in_16_bits(interpreted):
    """Those that the interpreter multiplies: it takes bfloat16 for whole numbers."""
    inputs = matrices(50, 72, 8, torch.float16)
    lows, of_b = call(interpreted, *inputs, interpreted.Blocks(16, 32, programs=6))
    expected = products(*(each.float() for each in inputs))
    torch.testing.assert_close(of_b, expected[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lows.float(), expected[0], rtol=1e-3, atol=1e-3)  # rounded once


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(interpreted, number):
    """Beside what is outside, where a product with zero would be no number."""
    inputs = matrices(50, 72, 5)
    inputs[0][49, 71] = number
    found, expected = call(interpreted, *inputs, interpreted.Blocks(16, 32, programs=6)), products(*inputs)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert one[:-1].isfinite().all()
        assert not one[-1].isfinite().any()


@pytest.mark.parametrize("rank", [8, 16])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(rank, tmp_path, monkeypatch):
    """And multiplies both times what lies in shared memory, brought there in pieces of 16 bytes, and waits but once."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from lightning_qlora.kernels import lora_gradients_triton as module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled(kernel, constants, pointers, numbers, **options):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "*fp32") for name in names}
        signature |= dict.fromkeys(numbers, "i32") | ({"scale": "fp32"} if "scale" in names else {})
        attributes = {
            (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name].startswith("*")
        }
        source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    blocks = module._BLOCKS
    one = compiled(
        module._multiply,
        {"RANK": rank, "PADDED": max(16, rank), "ROWS": blocks.rows, "COLUMNS": blocks.columns, "ALIGNMENT": 8},
        dict.fromkeys(("gradient", "rows", "low"), "*bf16"),
        ("height", "width", "stride", "rows_stride", "low_stride", "steps"),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    text = one.asm["ptx"]
    assert "wgmma" in text
    assert "mma.sync" not in text.replace("wgmma", "")
    assert "cp.async.cg.shared.global" in text
    assert "ld.global.b16" not in text
    assert one.metadata.shared <= 227 * 1024
    assert one.asm["sass"].count("WARPGROUP.DEPBAR") == 2  # the other after the last tile
    two = compiled(
        module._add_up,
        {"RANK": rank, "BLOCKS": 28, "PIECES": 4, "SIZE": module._SUMS, "ALIGNMENT": 8},
        {"lows": "*bf16"},
        ("numel_of_lows", "numel_of_b", "lows_stride", "programs_of_lows"),
    )
    assert two.asm["ptx"].count("ld.global.v4") == 28 + 4


# Where it is used, and where not


@pytest.fixture
def used(interpreted, monkeypatch):
    """The kernel, interpreted, taken for that of a GPU; it notes the shapes of the gradients that it has had."""
    seen = []

    def run(gradient, *others):
        seen.append(tuple(gradient.shape))
        interpreted.both_products(gradient, *others, interpreted.Blocks(64, 128, programs=6))

    monkeypatch.setattr(lora_gradients, "triton_products", run)
    monkeypatch.setattr(lora_gradients, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(lora_gradients, "_CHECK_SHAPE", (70, 40))
    monkeypatch.setattr(lora_gradients, "_FEWEST_TOKENS", 20)
    monkeypatch.setattr(lora_gradients, "_NARROWEST", 24)
    lora_gradients._is_trusted.cache_clear()
    yield seen
    lora_gradients._is_trusted.cache_clear()


def in_room(height, width, rank, dtype=torch.float16):
    gradient, rows, low = matrices(height, width, rank, dtype)
    lows = torch.full((height, 3 * rank), MARGIN, dtype=dtype)
    of_b = lora_gradients.both_products(gradient, rows, low, 0.5, lows[:, rank : 2 * rank], torch.float32)
    assert of_b.dtype == torch.float32
    assert (lows[:, :rank] == MARGIN).all()
    assert (lows[:, 2 * rank :] == MARGIN).all()
    return lows[:, rank : 2 * rank], of_b


def test_a_kernel_is_used_that_computes_what_products_do(used, caplog):
    with caplog.at_level("INFO"):
        found = in_room(50, 72, 8)
    assert used == [(70, 40), (50, 72)]
    assert not caplog.records
    expected = products(*(each.float() for each in matrices(50, 72, 8, torch.float16)))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("height", "width", "rank", "dtype"),
    [
        (19, 72, 8, torch.float16),
        (50, 16, 8, torch.float16),
        (50, 76, 8, torch.float16),
        (50, 72, 12, torch.float16),
        (50, 72, 24, torch.float16),
        (50, 72, 8, torch.float32),
    ],
    ids=["few tokens", "narrow", "rows that begin anywhere", "rank", "high rank", "dtype"],
)
def test_what_it_is_no_faster_for_is_left_to_products(used, height, width, rank, dtype):
    found = in_room(height, width, rank, dtype)
    assert not used
    expected = products(*(each.float() for each in matrices(height, width, rank, dtype)))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), two, rtol=1e-2, atol=1e-2)


def test_who_looks_at_operators_sees_products(used, monkeypatch):
    monkeypatch.setattr(lora_gradients, "are_operators_wanted", lambda: True)
    in_room(50, 72, 8)
    assert not used
    assert not launching.are_operators_wanted()


def off_in_b(gradient, rows, low, scale, lows, of_b):
    of_b *= 1.01


def off_in_input(gradient, rows, low, scale, lows, of_b):
    lows[0] = float("nan")


def beside(gradient, rows, low, scale, lows, of_b):
    lows.as_strided(lows.shape, lows.stride(), 0)[0] = 1.0


def failing(*_):
    raise OSError("no compiler")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (off_in_b, "its gradient of B is off by 0.01"),
        (off_in_input, "its input's share is off by nan"),
        (beside, "it writes beside its output"),
        (failing, "no compiler"),
    ],
)
def test_a_kernel_is_refused_that_does_not_and_it_is_said_once(used, monkeypatch, error, reason, caplog):
    right = lora_gradients.triton_products
    monkeypatch.setattr(lora_gradients, "triton_products", lambda *given: (right(*given), error(*given)))
    with caplog.at_level("INFO"):
        found = in_room(50, 72, 8), in_room(50, 72, 8)
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert used == [(70, 40)]
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_gradients_of_a_group_are_the_same_with_it(used, monkeypatch):
    """Three outputs of one input, of which nobody used one."""
    torch.manual_seed(0)
    heights, scales, rank = (72, 32, 40), [2.0, 0.5, 1.0], 8
    packed, constants = [], []
    for height in heights:
        stored, state = bnb.quantize_4bit(torch.randn(height, 64, dtype=torch.float16), quant_type="nf4")
        packed.append(stored)
        constants.append(state.absmax)
    x = torch.randn(50, 64, dtype=torch.float16, requires_grad=True)
    a = [torch.randn(rank, 64, requires_grad=True) for _ in heights]
    b = [torch.randn(height, rank, requires_grad=True) for height in heights]
    found = []
    for fast in (True, False):
        monkeypatch.setattr(lora_gradients, "on_gpu", lambda tensor, fast=fast: fast)
        a_RI, b_OR = pack_adapters(a, b, scales, x.dtype)
        stored = (64, "nf4")
        low, *shapes = lora_low(x, packed, constants, a, b, a_RI, b_OR, scales, *stored, False, "", [], [])
        outputs = lora_products(x, low, shapes, packed, constants, [], b_OR, list(heights), *stored, False)
        loss = sum((output.float() ** 2).mean() for output in (outputs[0], outputs[2]))
        found.append(torch.autograd.grad(loss, [x, *a, *b]))
    assert used == [(70, 40), (50, 72), (50, 32), (50, 40)]
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 2e-3 * max(float(two.norm()), 1e-6)
    assert not found[0][2].any()
    assert found[0][1].any()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("height", "width", "rank"), [(8192, 14336, 16), (8192, 4096, 16), (1000, 1032, 8)])
def test_both_products_on_the_gpu(height, width, rank):
    pytest.importorskip("triton")
    from lightning_qlora.kernels import lora_gradients_triton as module

    inputs = matrices(height, width, rank, torch.bfloat16, "cuda")
    found = call(module, *inputs)
    for one, two, limit in zip(found, products(*(each.double() for each in inputs)), (1e-2, 1e-3), strict=True):
        assert (one - two).norm() <= limit * two.norm()
    for one, two in zip(found, call(module, *inputs), strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_is_used_on_the_gpu(dtype, rank):
    pytest.importorskip("triton")
    assert lora_gradients._compare(lora_gradients._Kind(torch.device("cuda"), dtype, rank)) is None
    gradient, rows, low = matrices(2048, 2048, rank, dtype, "cuda")
    lows = low.new_zeros(2048, 2 * rank)[:, rank:]
    assert lora_gradients._is_fast(gradient.contiguous(), rows, low, lows, torch.float32)
