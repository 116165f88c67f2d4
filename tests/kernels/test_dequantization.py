"""4-bit weights as numbers: Triton's kernel bit by bit against bitsandbytes, and bitsandbytes where it is not used."""

from __future__ import annotations

import re

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState

from lightning_qlora.kernels import dequantization
from lightning_qlora.kernels.dequantization import constants_of, dequantize_into

MARGIN = 7.0
ALIGNED = [
    "packed",
    "absmax",
    "absmax2",
    "code2",
    "code",
    "out",
    "width",
    "numel",
    "num_bytes",
]  # not stride
SHAPES = [(16, 256), (128, 96), (5, 66), (3, 7), (1, 64), (33, 4096)]


@pytest.fixture
def interpreted(interpret):
    return interpret("dequantization_triton")


def random_weight(shape, blocksize=64, quant_type="nf4", nested=True, device="cpu"):
    kind = dequantization._Kind(torch.device(device), torch.float32, blocksize, quant_type, nested)
    return dequantization._random_weight(shape[0] * shape[1], kind)


def arithmetic(packed, constants, shape, blocksize, quant_type):
    """What the values are, in float32: a value of the code times its block's constant."""
    absmax, *second = constants
    if second:
        offset, absmax2, code2 = second
        absmax = code2[absmax.int()] * absmax2.repeat_interleave(256)[: len(absmax)] + offset
    byte = packed.flatten().int()
    values = bnb.get_4bit_type(quant_type, device="cpu")[torch.stack([byte >> 4, byte & 15], 1).flatten()]
    numel = shape[0] * shape[1]
    return (values[:numel] * absmax.repeat_interleave(blocksize)[:numel]).view(shape)


def rounded(values, dtype):
    """Rounded as Triton's interpreter does, which cuts off what bfloat16 has no bits for."""
    if dtype is torch.bfloat16:
        values = (values.view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


def buffer(shape, dtype, margin):
    return torch.full((shape[0], shape[1] + margin), MARGIN, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
def test_the_kernel_writes_every_shape_bit_by_bit(interpreted, blocksize, quant_type, nested, dtype):
    code = bnb.get_4bit_type(quant_type, device="cpu")
    for index, shape in enumerate(SHAPES):
        packed, constants = random_weight(shape, blocksize, quant_type, nested)
        out = buffer(shape, dtype, index)
        interpreted.dequantize(out[:, : shape[1]], packed.flatten(), constants, code, blocksize, 256)
        expected = rounded(arithmetic(packed, constants, shape, blocksize, quant_type), dtype)
        assert torch.equal(out[:, : shape[1]], expected)
        assert (out[:, shape[1] :] == MARGIN).all()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("in_rows", [True, False])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(nested, in_rows, tmp_path, monkeypatch):
    """What the interpreter lets pass the compiler may not; and no product is fused with a sum, which rounds once."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from lightning_qlora.kernels import dequantization_triton

    _dequantize = dequantization_triton._dequantize
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"packed": "*u8", "absmax": "*u8" if nested else "*fp32", "out": "*bf16"}
    constants = {"NESTED": nested, "NESTED_BLOCK": 256, "BLOCK": 64, "BLOCKS": 64, "IN_ROWS": in_rows, "ALIGNMENT": 8}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "*fp32") for name in _dequantize.arg_names
    } | dict.fromkeys(("num_bytes", "numel", "width", "stride", "tiles"), "i32")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(_dequantize.arg_names) if n in ALIGNED}
    source = triton.compiler.ASTSource(_dequantize, signature, constexprs=constants, attrs=aligned)
    options = {"enable_fp_fusion": False, "num_warps": dequantization_triton._WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    moves = set(re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"]))
    assert "st.global.v4.b32" in moves  # 16 bytes at once, whatever the distance of the rows
    assert "st.global.b16" not in moves
    assert "ld.global.v4.b32" in moves or not in_rows
    assert "mul.rn.f32" in compiled.asm["ptx"]
    assert "fma" not in compiled.asm["ptx"]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_arithmetic_is_bitsandbytes_own(quant_type, nested):
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    expected = bnb.dequantize_4bit(packed, state)
    assert torch.equal(arithmetic(packed, constants_of(state), weight.shape, 64, quant_type), expected)
    assert 0 < (expected - weight).norm() / weight.norm() < 0.2


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_where_the_kernel_is_not_used_bitsandbytes_is_copied(storage, nested):
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    out = buffer((30, 128), torch.bfloat16, 3)
    dequantize_into(out[2:26, :128], packed, constants_of(state), 64, "nf4")
    assert torch.equal(out[2:26, :128], bnb.dequantize_4bit(packed, state))
    assert (out[:2] == MARGIN).all()
    assert (out[26:] == MARGIN).all()
    assert (out[:, 128:] == MARGIN).all()


def test_constants_make_bitsandbytes_state_again():
    weight = torch.randn(24, 128)
    _, state = bnb.quantize_4bit(weight, quant_type="fp4", blocksize=128, compress_statistics=True)
    again = dequantization.quant_state(constants_of(state), state.shape, 128, "fp4", torch.float32)
    assert isinstance(again, QuantState)
    assert again.nested
    assert again.state2.blocksize == state.state2.blocksize == dequantization.NESTED_BLOCK


@pytest.fixture
def checked(monkeypatch):
    """A kernel in the place of Triton's, compared on the CPU as on a device."""
    dequantization._is_trusted.cache_clear()

    def put(kernel):
        monkeypatch.setattr(dequantization, "triton_dequantize", kernel)
        return dequantization._is_trusted(dequantization._Kind(torch.device("cpu"), torch.float32, 64, "nf4", True))

    yield put
    dequantization._is_trusted.cache_clear()


def right(out, packed, constants, code, blocksize, nested_blocksize):
    out.copy_(arithmetic(packed, constants, out.shape, blocksize, "nf4"))


def test_a_kernel_is_trusted_that_writes_what_bitsandbytes_does(checked, interpreted, caplog):
    with caplog.at_level("INFO"):
        assert checked(right)
        dequantization._is_trusted.cache_clear()
        assert checked(interpreted.dequantize)
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo asks every input for it
def test_compiled_code_takes_the_answer_as_it_is(checked):
    assert checked(right)

    def ask(x):
        trusted = dequantization.has_kernel(x.device, x.dtype, 64, "nf4", True)
        return x + 1 if trusted else x

    x = torch.zeros(3)
    assert torch.equal(torch.compile(ask, backend="eager", fullgraph=True)(x), x + 1)
    torch._dynamo.reset()


def wrong(out, *arguments):
    right(out, *arguments)
    out[-1, -1] *= 1 + 2**-20


def outside(out, *arguments):
    right(out, *arguments)
    out.as_strided((1,), (1,), out.stride(0) - 1).fill_(1.0)


def failing(out, *arguments):
    raise OSError("no compiler")


@pytest.mark.parametrize(
    ("kernel", "reason"), [(wrong, "its values differ"), (outside, "its values differ"), (failing, "no compiler")]
)
def test_a_kernel_is_refused_that_does_not_and_it_is_said_once(checked, kernel, reason, caplog):
    with caplog.at_level("INFO"):
        assert not checked(kernel)
        assert not checked(kernel)
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert "bitsandbytes' own is used" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_kernel_on_the_gpu(quant_type, nested, dtype):
    pytest.importorskip("triton")
    for blocksize in (64, 128, 4096):
        for index, shape in enumerate([*SHAPES, (1024, 4096), (3000, 14336)]):
            packed, constants = random_weight(shape, blocksize, quant_type, nested, "cuda")
            out = buffer(shape, dtype, 8 * index).cuda()
            assert dequantization.is_fast(out, constants, blocksize, quant_type)
            dequantize_into(out[:, : shape[1]], packed, constants, blocksize, quant_type)
            flat = torch.Size((1, shape[0] * shape[1]))
            state = dequantization.quant_state(constants, flat, blocksize, quant_type, dtype)
            assert torch.equal(out[:, : shape[1]].flatten(), bnb.dequantize_4bit(packed, state).flatten())
            assert (out[:, shape[1] :] == MARGIN).all()
