"""What the quantizers of bitsandbytes store, in the shapes and units of this package."""

import logging

import torch

from compress_bilinear.quantization import LEVELS

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns where there is no GPU


def bitsandbytes_int8(tensor, dim):
    """`int8_vectorwise_quant` along `dim`; on CUDA it takes float16 only."""
    from bitsandbytes import functional

    moved = tensor.float().movedim(dim, -1)
    rows = moved.reshape(-1, moved.shape[-1]).contiguous()
    qdata, absmax, _ = functional.int8_vectorwise_quant(rows.half() if rows.is_cuda else rows)
    scale = absmax.to(torch.float32).reshape(*moved.shape[:-1], 1) / LEVELS  # a step, not the largest magnitude
    return qdata.reshape(moved.shape).movedim(-1, dim).contiguous(), scale.movedim(-1, dim).contiguous()


def bitsandbytes_blocks(tensor, grid):
    """`quantize_blockwise` with the linear map, in blocks along the last axis."""
    from bitsandbytes import functional

    code = functional.create_linear_map().to(tensor.device)  # 127 steps either way; its 256th code is another zero
    indices, state = functional.quantize_blockwise(
        tensor.contiguous(), code=code, blocksize=tensor.shape[-1] // grid[-1]
    )
    qdata = (code[indices.long()] * LEVELS).round().to(torch.int8)
    return qdata.view(tensor.shape), (state.absmax / LEVELS).view(grid)


def bitsandbytes_nf4(tensor):
    """`quantize_4bit` of the flattened tensor, with float32 magnitudes."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(tensor.flatten(), blocksize=64, quant_type="nf4")
    return packed.flatten()[: -(-tensor.numel() // 2)], state.absmax
