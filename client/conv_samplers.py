"""What one record gives to the gradient of a convolution, for Opacus, in place of what it brings.

Opacus 1.6 reads a convolution's input through strides that it computes itself, which are wrong for every memory format
but the contiguous one (a channels-last 3 x 3 convolution gets norms of a quarter to a half of the true ones, so records
are hardly clipped); it multiplies all groups with all groups and throws most away; and it knows no norm without the
gradient. These two samplers take its place at import, for the whole process.

Letters: n records, g groups, c and o channels of a group before and after, k positions of the kernel, q of the output.
The norms come from tables over pairs of positions, see `client.linear_samplers`; that of the inputs, over patches, is
the sum over k of the table over pixels, shifted, so patches are never formed. Where the tables cost more, gradients are
formed by one convolution with records as groups.
"""

from __future__ import annotations

from typing import cast

import torch
from opacus.grad_sample.utils import register_grad_sampler, register_norm_sampler
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from client.linear_samplers import chunks, from_tables, squared_norms

CONVOLUTIONS: tuple[type[nn.Conv2d], ...] = (nn.Conv2d, Conv2dSame)
"""Classes that pad and convolve and do nothing else. Samplers are found by exact class."""


def padded(layer: nn.Conv2d, inputs: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the input with whatever padding a plain convolution cannot do itself, and the padding left to it."""
    if isinstance(layer, Conv2dSame):
        return cast(Tensor, pad_same(inputs, list(layer.kernel_size), list(layer.stride), list(layer.dilation))), (0, 0)
    if layer.padding == "valid":
        return inputs, (0, 0)
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return inputs, cast(tuple[int, int], tuple(layer.padding))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(inputs, list(layer._reversed_padding_repeated_twice), mode=mode), (0, 0)


def weight_gradient(layer: nn.Conv2d, inputs: Tensor, backprops: Tensor) -> Tensor:
    """Return the gradient of the weight, summed over records: what a backward pass computes."""
    a, padding = padded(layer, inputs)
    return _weight_gradient(a, layer.weight.shape, backprops, layer, padding, layer.groups)


def weight_gradients(layer: nn.Conv2d, inputs: Tensor, backprops: Tensor) -> Tensor:
    """Return the gradient of the weight for each record, (n, *weight).

    Records lie side by side as channels, and a convolution of n · g groups has a weight for each of them.
    """
    a, padding = padded(layer, inputs)
    n, shape = len(a), layer.weight.shape
    side_by_side = a.contiguous().view(1, -1, *a.shape[2:])
    b = backprops.contiguous().view(1, -1, *backprops.shape[2:])
    wide = (n * shape[0], *shape[1:])
    return _weight_gradient(side_by_side, wide, b, layer, padding, n * layer.groups).view(n, *shape)


def _weight_gradient(
    a: Tensor, shape: tuple[int, ...], b: Tensor, layer: nn.Conv2d, padding: tuple[int, int], groups: int
) -> Tensor:
    found = conv2d_weight(a, shape, b, layer.stride, padding, layer.dilation, groups)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def conv_grad_sample(layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Return each record's gradient, (n, *parameter), for weight and bias, in any memory format."""
    gradients = {}
    if layer.weight.requires_grad:
        empty = layer.weight.new_zeros(0, *layer.weight.shape)
        inputs = activations[0].to(backprops.dtype)
        gradients[layer.weight] = weight_gradients(layer, inputs, backprops) if len(backprops) else empty
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = backprops.sum((2, 3))
    return gradients


def conv_norm_sample(layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Return each record's gradient norm, (n,), for weight and bias, in any memory format."""
    norms = {}
    if layer.weight.requires_grad:
        norms[layer.weight] = _squared_norms(layer, activations[0].to(backprops.dtype), backprops).sqrt()
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = backprops.sum((2, 3)).norm(dim=1)
    return norms


def _squared_norms(layer: nn.Conv2d, inputs: Tensor, backprops: Tensor) -> Tensor:
    if not len(backprops):
        return backprops.new_zeros(0)
    if _pointwise(layer):
        return squared_norms(_positions(inputs), _positions(backprops))
    a, padding = padded(layer, inputs)
    if any(padding):
        a = functional.pad(a, (padding[1], padding[1], padding[0], padding[0]))
    pixels, places = a.shape[2:].numel(), backprops.shape[2:].numel()
    tables = layer.groups * (pixels**2 + places**2)
    if _cheaper_by_tables(layer, pixels, places):
        return torch.cat([_by_tables(layer, a[part], backprops[part]) for part in chunks(len(a), tables)])
    parts = chunks(len(a), layer.weight.numel())
    return torch.cat([weight_gradients(layer, inputs[p], backprops[p]).flatten(1).square().sum(1) for p in parts])


def _pointwise(layer: nn.Conv2d) -> bool:
    plain = layer.groups == 1 and layer.kernel_size == (1, 1) and layer.stride == (1, 1)
    return plain and (isinstance(layer, Conv2dSame) or layer.padding in ((0, 0), "same", "valid"))


def _positions(maps: Tensor) -> Tensor:
    """Return (n, c, h, w) as (n, h · w, c): without a copy from channels last."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _cheaper_by_tables(layer: nn.Conv2d, pixels: int, places: int) -> bool:
    """Return whether tables take fewer products than gradients: g (pixels² c + q² (o + k)) against g o c k q."""
    o, c = layer.weight.shape[0] // layer.groups, layer.weight.shape[1]
    k = layer.weight.shape[2:].numel()
    return pixels**2 * c + places**2 * (o + k) < o * c * k * places


def _by_tables(layer: nn.Conv2d, a: Tensor, b: Tensor) -> Tensor:
    """Return squared norms from an input whose padding is done."""
    n, groups, (height, width) = len(a), layer.groups, a.shape[2:]
    pixels = a.permute(0, 2, 3, 1).reshape(n, height * width, groups, -1).transpose(1, 2).flatten(0, 1)
    table = (pixels @ pixels.transpose(1, 2)).view(-1, height, width, height, width)
    places = b.permute(0, 2, 3, 1).flatten(1, 2).reshape(n, -1, groups, b.shape[1] // groups)
    outputs = places.transpose(1, 2).flatten(0, 1)
    patches = _over_kernel(layer, table, (b.shape[2], b.shape[3]))
    return from_tables(patches, outputs @ outputs.transpose(1, 2)).view(n, groups).sum(1)


def _over_kernel(layer: nn.Conv2d, table: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the table over patches, (m, q, q), as the sum of that over pixels, (m, h, w, h, w), at each position."""
    rows = [_under(layer, 0, place, size[0]) for place in range(layer.kernel_size[0])]
    columns = [_under(layer, 1, place, size[1]) for place in range(layer.kernel_size[1])]
    total = table.new_zeros(len(table), *size, *size)
    for row in rows:
        for column in columns:
            total += table[:, row, column, row, column]
    return total.flatten(3).flatten(1, 2)


def _under(layer: nn.Conv2d, axis: int, place: int, size: int) -> slice:
    """Return the pixels that one position of the kernel meets along an axis."""
    start, stride = place * layer.dilation[axis], layer.stride[axis]
    return slice(start, start + (size - 1) * stride + 1, stride)


register_grad_sampler(CONVOLUTIONS)(conv_grad_sample)
register_norm_sampler(CONVOLUTIONS)(conv_norm_sample)
