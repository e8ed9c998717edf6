"""What one record gives to the gradient of a linear layer: the norm of a sum of outer products, without the sum.

Letters: n records, q positions (tokens, pixels), p inputs, o outputs of a position, a (n, q, p) the layer's input,
b (n, q, o) the gradient of the loss by its output. A record's gradient is G = Σ_q b_q a_qᵀ, (o, p), and

    ‖G‖² = Σ_qr (a_q · a_r) (b_q · b_r)

needs two tables of q x q instead of one of o x p (Li et al., Large Language Models Can Be Strong Differentially Private
Learners, ICLR 2022, section 4). Whichever takes fewer products is computed.

Opacus' sampler for `nn.Linear` is replaced, for the whole process, at import: it takes inputs of two or three
dimensions alone (swin's have four), always makes the tables, and makes one for the bias as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from opacus.grad_sample.utils import register_norm_sampler
from torch import Tensor, nn

TABLE_VALUES = 2**23
"""Float32 values that a norm may hold at a time: 32 MiB, where the records of a batch together need more."""

SLACK = 2.0**-22
"""Four roundings of float32."""


def squared_norms(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖Σ_q b_q a_qᵀ‖² of each record: (n, q, p) and (n, q, o) to (n,)."""
    q, p, o = a.shape[1], a.shape[2], b.shape[2]
    if q == 1:
        return a.square().sum((1, 2)) * b.square().sum((1, 2))
    if q * (o + p) < o * p:
        parts = [_by_tables(a[part], b[part]) for part in chunks(len(a), 2 * q * q)]
    else:
        parts = [(b[part].transpose(1, 2) @ a[part]).square().sum((1, 2)) for part in chunks(len(a), o * p)]
    return torch.cat(parts) if parts else a.new_zeros(0)


def _by_tables(a: Tensor, b: Tensor) -> Tensor:
    return from_tables(a @ a.transpose(1, 2), b @ b.transpose(1, 2))


def from_tables(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return Σ_qr of the product of two tables, (n, q, q) each, and never less than the norm it stands for.

    Terms that cancel leave the rounding errors of what was cancelled, and a norm that came out too small would let a
    record give more than the clip. So these errors, at most `SLACK` times the square of Σ_q ‖a_q‖ ‖b_q‖ (which no norm
    exceeds), are added.
    """
    lengths = (inputs.diagonal(dim1=1, dim2=2) * outputs.diagonal(dim1=1, dim2=2)).sqrt()
    return (inputs * outputs).sum((1, 2)).clamp(min=0) + SLACK * lengths.sum(1).square()


def chunks(records: int, values: int) -> Iterator[slice]:
    """Yield slices of records whose tables, of so many values a record, stay within `TABLE_VALUES`."""
    size = max(1, TABLE_VALUES // max(values, 1))
    for start in range(0, records, size):
        yield slice(start, start + size)


def linear_norm_sample(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Return each record's gradient norm, (n,), for weight and bias."""
    n = len(backprops)
    b = backprops.reshape(n, -1, layer.out_features)
    norms = {}
    if layer.weight.requires_grad:
        a = activations[0].to(b.dtype).reshape(n, -1, layer.in_features)
        norms[layer.weight] = squared_norms(a, b).sqrt()
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = b.sum(1).norm(dim=1)
    return norms


register_norm_sampler(nn.Linear)(linear_norm_sample)
