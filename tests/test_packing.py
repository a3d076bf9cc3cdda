"""Bit packing against Python's unbounded integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import ConfigError, StorageError
from fxquant.packing import pack, packed_size, unpack


def oracle(codes, bits):
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(stream.to_bytes((len(codes) * bits + 7) // 8, "little"))


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


@settings(deadline=None)
@given(codes_and_bits())
def test_bytes_are_those_of_one_big_integer_and_come_back(case):
    codes, bits = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == oracle(codes, bits)
    assert len(packed) == packed_size(len(codes), bits)
    back = unpack(packed, bits, len(codes))
    assert back.dtype == torch.uint8
    assert back.tolist() == codes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float32, torch.float64])
def test_any_shape_and_dtype_is_read_in_row_major_order(dtype):
    codes = torch.randint(0, 8, (3, 5, 7)).to(dtype)
    assert torch.equal(unpack(pack(codes, 8), 8, 105), codes.flatten().to(torch.uint8))
    assert torch.equal(unpack(pack(codes, 3), 3, 105), codes.flatten().to(torch.uint8))
    assert torch.equal(pack(codes.transpose(0, 2), 3), pack(codes.transpose(0, 2).contiguous(), 3))


def test_a_large_tensor_comes_back():
    codes = torch.randint(0, 32, (100_003,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 5), 5, codes.numel()), codes)


@pytest.mark.parametrize("codes", [[4], [-1], [0.5], [float("nan")], [256], [1e30]])
def test_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(ConfigError, match="a code is"):
        pack(torch.tensor(codes), 2)


@pytest.mark.parametrize("bits", [0, 9, 2.0, True, None])
def test_bad_widths_are_refused(bits):
    with pytest.raises(ConfigError, match="width"):
        pack(torch.zeros(3, dtype=torch.uint8), bits)
    with pytest.raises(ConfigError, match="width"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, 3)


@settings(deadline=None)
@given(codes_and_bits(), st.integers(-3, 3).filter(bool))
def test_a_wrong_length_is_damage(case, change):
    codes, bits = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    damaged = packed[:change] if change < 0 else torch.cat([packed, torch.zeros(change, dtype=torch.uint8)])
    if len(damaged) != len(packed):
        with pytest.raises(StorageError, match="cannot hold"):
            unpack(damaged, bits, len(codes))


@settings(deadline=None)
@given(codes_and_bits())
def test_a_stray_bit_in_the_padding_is_damage(case):
    codes, bits = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    for bit in range(len(codes) * bits % 8 or 8, 8):
        damaged = packed.clone()
        damaged[-1] |= 1 << bit
        with pytest.raises(StorageError, match="behind the last code"):
            unpack(damaged, bits, len(codes))


@pytest.mark.parametrize("packed", [torch.zeros(2), torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int8)])
def test_what_is_not_a_row_of_bytes_is_refused(packed):
    with pytest.raises(StorageError, match="packed codes are"):
        unpack(packed, 8, 2)


def test_a_negative_number_of_codes_is_refused():
    with pytest.raises(StorageError):
        unpack(torch.zeros(0, dtype=torch.uint8), 2, -1)
