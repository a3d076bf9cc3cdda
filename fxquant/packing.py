"""Dense storage of small integers: n codes of b bits in ceil(n b / 8) bytes.

The codes form one stream of bits, least significant bit first, and the stream fills bytes least significant bit first:

    3 bits, codes a b c ...          byte 0              byte 1
                              (bit 7) c1 c0 b2 b1 b0 a2 a1 a0 (bit 0)   ... c2

so packed bytes, read as one little-endian integer, are ``sum_i code_i * 2^(b i)``. The bits behind the last code are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigError, StorageError

# Eight codes of b bits fill b bytes exactly. An int64 holds such a group: all arithmetic is on whole groups.
_GROUP = 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return the bit stream of codes as a uint8 tensor of ``ceil(numel * bits / 8)`` elements.

    Args:
        codes: integers in ``0 .. 2^bits - 1``, of any shape and any dtype (floats that hold integers included).
        bits: 1 to 8.

    Raises:
        ConfigError: bits is no width from 1 to 8, or a code does not fit.
    """
    _check_bits(bits)
    # Compared as Python numbers: 255 and 256 would wrap around in int8 and uint8.
    if codes.numel() and not (codes.min().item() >= 0 and codes.max().item() < 2**bits):
        raise ConfigError(f"a code is outside 0..{2**bits - 1}", fix=f"Shift signed codes by {2 ** (bits - 1)}, or use more bits")
    if codes.is_floating_point() and not bool((codes == codes.floor()).all()):
        raise ConfigError("a code is not an integer", fix="Pack what UniformQuantizer.quantize returns")
    flat = codes.detach().reshape(-1).to(torch.uint8)
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % _GROUP)).view(-1, _GROUP)
    word = torch.zeros(len(groups), dtype=torch.int64, device=flat.device)
    for i in range(_GROUP):
        word |= groups[:, i].long() << (bits * i)
    packed = torch.stack([(word >> (8 * i)) & 255 for i in range(bits)], 1).to(torch.uint8)
    return packed.flatten()[: packed_size(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Return the ``numel`` codes that :func:`pack` wrote, as a uint8 tensor of one dimension.

    Raises:
        ConfigError: bits is no width from 1 to 8.
        StorageError: packed is not a one-dimensional uint8 tensor of the right length, or bits behind the last code are set.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise StorageError(f"packed codes are {packed.dtype} of shape {list(packed.shape)}", fix="Expected a row of uint8")
    if numel < 0 or packed.numel() != packed_size(numel, bits):
        raise StorageError(
            f"{packed.numel()} bytes cannot hold {numel} codes of {bits} bits",
            fix="The file is damaged, or its header does not belong to it",
        )
    used = numel * bits % 8
    if used and int(packed[-1]) >> used:
        raise StorageError("bits behind the last code are set", fix="The file is damaged; save the model again")
    groups = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    word = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= groups[:, i].long() << (8 * i)
    codes = torch.stack([(word >> (bits * i)) & (2**bits - 1) for i in range(_GROUP)], 1).to(torch.uint8)
    return codes.flatten()[:numel].clone()


def packed_size(numel: int, bits: int) -> int:
    """Return how many bytes ``numel`` codes of ``bits`` bits take."""
    return (numel * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits!r} is not a width from 1 to 8", fix="Use an integer from 1 to 8")
