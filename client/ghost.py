"""Gradients of each record of a batch, weighted and summed, at the cost of one backward pass and some norms.

The gradient of a layer's weight is a product of its input a and of b, the gradient of the loss by its output. One
forward pass notes a, one backward pass computes b and no weight's gradient, and both are kept until the norm of each
record over all layers is known; then b is scaled by the record's factor and the weight's gradient is computed once, as
a plain backward pass would (the book-keeping of Bu et al., Differentially Private Optimization on Large Foundation
Models at Small Cost, ICML 2023, Algorithm 1).

Each trainable parameter belongs to one *tap*, a module that is called once in a forward pass; `client.taps` says which.
How a tap gives norms and sums depends on what it is:

    Ghost        nn.Linear and convolutions: norms by Opacus' registry of norm samplers, nothing is formed
    Sampled      a class in Opacus' registry of gradient samplers (norms, embeddings): gradients are formed and kept
    Recomputed   anything else, such as a block with a scale of its own: torch.func runs the module again, record by
                 record, for those parameters alone; the modules below it are taps of their own

The output of a tap is noted as an edge of autograd's graph, not as a tensor: so it is the value before anything that
works in place changed it, and no hook stands in autograd's way.

Letters: n records; a module may see m rows for each, side by side (windows of an image).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from client.conv_samplers import weight_gradient
from client.linear_samplers import chunks
from common.errors import ConsiliumError

Sums = dict[Tensor, Tensor]


class NotPrivate(ConsiliumError):
    """This model's gradients cannot be had for each record, so their sum cannot be bounded."""


@dataclass
class Call:
    """One call of a tap: what it read, and where its outputs are in autograd's graph."""

    records: int
    leaves: list[Any]  # of arguments and options
    spec: TreeSpec
    versions: list[int]  # of the leaves, as autograd counts changes in place
    outputs: list[int]  # which of the results have a gradient
    edges: list[GradientEdge]
    shapes: list[torch.Size]
    backprops: list[Tensor] = field(default_factory=list)  # (n · m, ...) each
    formed: Sums = field(default_factory=dict)  # (n, *parameter) each, where they were formed for the norm and kept

    @staticmethod
    def of(records: int, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> Call:
        """Note a call; of its arguments nothing is kept but their values."""
        leaves, spec = tree_flatten((inputs, options))
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        results = _tensors(output)
        outputs = [place for place, result in enumerate(results) if result.requires_grad]
        edges = [get_gradient_edge(results[place]) for place in outputs]
        shapes = [results[place].shape for place in outputs]
        return Call(records, leaves, spec, _versions(leaves), outputs, edges, shapes)

    def close(self, gradients: Sequence[Tensor | None], like: Tensor) -> None:
        """Take the gradients by the outputs: zero where the loss does not depend on one.

        Raises:
            NotPrivate: an argument was changed in place after the module had read it.
        """
        if _versions(self.leaves) != self.versions:
            raise NotPrivate("a module's input is changed in place after it was read; choose another backbone")
        filled = zip(gradients, self.shapes, strict=True)
        self.backprops = [like.new_zeros(shape) if gradient is None else gradient for gradient, shape in filled]
        self.edges = []  # nothing of autograd's graph is held any longer

    def scaled(self, factors: Tensor) -> list[Tensor]:
        """Return the gradients by the outputs, each record's times its factor, in the memory format that they have."""
        return [self._rows(factors, b) * b for b in self.backprops]

    def _rows(self, factors: Tensor, b: Tensor) -> Tensor:
        repeated = factors.repeat_interleave(len(b) // self.records)
        return repeated.view(-1, *[1] * (b.ndim - 1))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def _versions(leaves: Sequence[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Tap(ABC):
    """A module, and the parameters that it answers for by their names in it."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]

    @abstractmethod
    def squared_norms(self, call: Call) -> Tensor:
        """Return each record's squared gradient norm over these parameters, (n,)."""

    @abstractmethod
    def sums(self, call: Call, factors: Tensor) -> Sums:
        """Return the gradients summed over records, each record's times its factor, (n,)."""


class Ghost(Tap):
    """A linear layer or a convolution."""

    def squared_norms(self, call: Call) -> Tensor:
        """Return what Opacus' registered norm sampler gives."""
        sampler = NORM_SAMPLERS[type(self.module)]
        norms = sampler(self.module, [self._by_record(call, call.leaves[0])], self._by_record(call, call.backprops[0]))
        return torch.stack([norms[parameter].square() for parameter in self.parameters.values()]).sum(0)

    def _by_record(self, call: Call, rows: Tensor) -> Tensor:
        """Return (n · m, ...) as (n, m, ...) for a linear layer, to which windows are positions like any other."""
        return rows if len(rows) == call.records else _rows_of(rows, call.records)

    def sums(self, call: Call, factors: Tensor) -> Sums:
        """Return Σ f b aᵀ, the backward pass of the weight, and Σ f b."""
        b, a = call.scaled(factors)[0], call.leaves[0]
        found: Sums = {}
        for name, parameter in self.parameters.items():
            found[parameter] = self._weight(a, b) if name == "weight" else self._bias(b)
        return found

    def _weight(self, a: Tensor, b: Tensor) -> Tensor:
        if isinstance(self.module, nn.Conv2d):
            return weight_gradient(self.module, a, b)
        return b.flatten(0, -2).transpose(0, 1) @ a.flatten(0, -2)

    def _bias(self, b: Tensor) -> Tensor:
        return b.sum((0, 2, 3)) if isinstance(self.module, nn.Conv2d) else b.flatten(0, -2).sum(0)


class Sampled(Tap):
    """A module with few parameters, whose gradients Opacus forms for each record."""

    def squared_norms(self, call: Call) -> Tensor:
        """Form the gradients, keep them, and return their norms."""
        sampler = GRAD_SAMPLERS[type(self.module)]
        formed = sampler(self.module, [call.leaves[0]], call.backprops[0])
        call.formed = {parameter: formed[parameter] for parameter in self.parameters.values()}
        return _squares(call.formed)

    def sums(self, call: Call, factors: Tensor) -> Sums:
        """Return the sums of what was kept."""
        return _weighted(call.formed, factors)


@dataclass(frozen=True)
class Recomputed(Tap):
    """Any module: its gradients by running it again."""

    by_record: list[bool]  # which leaves of the arguments have rows for each record

    def squared_norms(self, call: Call) -> Tensor:
        """Form gradients, a few records at a time where they are large, and keep them where they are small."""
        size = sum(parameter.numel() for parameter in self.parameters.values())
        parts = list(chunks(call.records, size))
        norms = []
        for part in parts:
            formed = self._formed(call, part)
            norms.append(_squares(formed))
            call.formed = formed if len(parts) == 1 else {}
        return torch.cat(norms)

    def sums(self, call: Call, factors: Tensor) -> Sums:
        """Return the sums of what was kept, or those of a backward pass of the module alone."""
        if call.formed:
            return _weighted(call.formed, factors)
        inputs, options = tree_unflatten(call.leaves, call.spec)
        parameters = list(self.parameters.values())
        with torch.enable_grad():
            results = _tensors(self.module(*inputs, **options))
        outputs = [results[place] for place in call.outputs]
        sums = torch.autograd.grad(outputs, parameters, call.scaled(factors), allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, sums, strict=True))

    def _formed(self, call: Call, part: slice) -> Sums:
        rows = [
            _rows_of(leaf, call.records)[part] if of_record else None
            for leaf, of_record in zip(call.leaves, self.by_record, strict=True)
        ]
        backprops = [_rows_of(b, call.records)[part] for b in call.backprops]
        values = {name: parameter.detach() for name, parameter in self.parameters.items()}
        ways = (None, [0 if row is not None else None for row in rows], 0)
        each = torch.func.vmap(torch.func.grad(partial(self._product, call)), ways)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention know no vmap
            gradients = each(values, rows, backprops)
        return {self.parameters[name]: gradient for name, gradient in gradients.items()}

    def _product(self, call: Call, values: dict[str, Tensor], rows: list[Any], backprops: list[Tensor]) -> Tensor:
        """Return the product of one record's outputs with their gradients."""
        leaves = [leaf if row is None else row for leaf, row in zip(call.leaves, rows, strict=True)]
        inputs, options = tree_unflatten(leaves, call.spec)
        results = _tensors(torch.func.functional_call(self.module, values, inputs, options))
        products = [(results[place] * b).sum() for place, b in zip(call.outputs, backprops, strict=True)]
        return torch.stack(products).sum()


def _rows_of(leaf: Tensor, records: int) -> Tensor:
    """Return (n · m, ...) as (n, m, ...)."""
    return torch.unflatten(leaf, 0, (records, -1))


def _squares(formed: Sums) -> Tensor:
    return torch.stack([gradient.flatten(1).square().sum(1) for gradient in formed.values()]).sum(0)


def _weighted(formed: Sums, factors: Tensor) -> Sums:
    return {p: torch.tensordot(factors, gradient, 1) for p, gradient in formed.items()}


NORM_SAMPLERS = cast(
    "dict[type[nn.Module], Callable[[nn.Module, list[Tensor], Tensor], Sums]]",
    GradSampleModuleFastGradientClipping.NORM_SAMPLERS,
)
GRAD_SAMPLERS = cast(
    "dict[type[nn.Module], Callable[[nn.Module, list[Tensor], Tensor], Sums]]", GradSampleModule.GRAD_SAMPLERS
)


@contextmanager
def noted(modules: dict[str, nn.Module], records: int) -> Iterator[dict[str, list[Call]]]:
    """Note the calls of these modules, by name."""
    calls: dict[str, list[Call]] = {}

    def note(name: str, _module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        if len(_tensors(output)) > 1:  # one may lead to another: told apart, each has the gradient of its users alone
            output = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        calls.setdefault(name, []).append(Call.of(records, inputs, options, output))
        return output

    hooks = [m.register_forward_hook(partial(note, name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
