"""Which module answers for which trainable parameter when gradients are taken record by record.

It is the smallest module above the parameter that is called once in a forward pass: usually the layer that owns it. A
layer that is called twice, or whose weight others read past it, or share, leaves it to what is around it; at last that
is the upper itself. Two forward passes of random features, of two records and of three, show what is called and which
arguments have rows for each record.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from client.conv_samplers import CONVOLUTIONS
from client.ghost import GRAD_SAMPLERS, NORM_SAMPLERS, Call, Ghost, NotPrivate, Recomputed, Sampled, Tap, noted
from common.backbone import Upper


def taps(upper: Upper) -> list[Tap]:
    """Return the taps of an upper, in the mode that it is in.

    Raises:
        NotPrivate: a module that must be recomputed drops out at random.
    """
    first, second = (_probe(upper, records) for records in (2, 3))
    owners: dict[str, dict[str, nn.Parameter]] = {}
    for names in _names_of_parameters(upper).values():
        owner = _owner(names, first)
        parameter = upper.get_parameter(names[0])
        owners.setdefault(owner, {})[names[0].removeprefix(f"{owner}.")] = parameter
    return [
        _tap(name, upper.get_submodule(name), parameters, first[name][0], second[name][0])
        for name, parameters in owners.items()
    ]


def _names_of_parameters(upper: Upper) -> dict[nn.Parameter, list[str]]:
    """Return every name of each trainable parameter; a shared one has several."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in upper.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            found.setdefault(parameter, []).append(name)
    return found


def _owner(names: list[str], calls: dict[str, list[Call]]) -> str:
    """Return the smallest module above all names that is called once; the upper itself, "", at the latest."""
    above = [name.rpartition(".")[0] for name in names]
    candidate = above[0]
    while candidate and not (_called_once(candidate, calls) and all(_inside(candidate, name) for name in above)):
        candidate = candidate.rpartition(".")[0]
    return candidate


def _called_once(name: str, calls: dict[str, list[Call]]) -> bool:
    return len(calls.get(name, [])) == 1 and bool(calls[name][0].outputs)


def _inside(module: str, name: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _tap(name: str, module: nn.Module, parameters: dict[str, nn.Parameter], two: Call, three: Call) -> Tap:
    """Return the tap of a module that two and three records showed."""
    own = all("." not in parameter for parameter in parameters)
    single = own and len(two.leaves) == len(two.outputs) == 1 and isinstance(two.leaves[0], Tensor)
    whole = single and len(two.leaves[0]) == two.records  # m = 1
    if single and type(module) in NORM_SAMPLERS and (type(module) is nn.Linear or (whole and _is_convolution(module))):
        return Ghost(name, module, parameters)
    if whole and type(module) in GRAD_SAMPLERS:
        return Sampled(name, module, parameters)
    if any(drops_out(inner) for inner in module.modules()):
        raise NotPrivate(f"{_label(name, module)} drops out at random and must be run twice; set its dropout to 0")
    by_record = [_grows(a, b) for a, b in zip(two.leaves, three.leaves, strict=True)]
    return Recomputed(name, module, parameters, by_record)


def _is_convolution(module: nn.Module) -> bool:
    return type(module) in CONVOLUTIONS


def _grows(two: Any, three: Any) -> bool:
    return isinstance(two, Tensor) and two.ndim > 0 and 3 * len(two) == 2 * len(three)


def drops_out(module: nn.Module) -> bool:
    """Return whether a module is at present one that leaves out values or paths at random."""
    rate = getattr(module, "p", getattr(module, "drop_prob", 0.0))
    random = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in ("DropPath", "PatchDropout")
    return random and module.training and isinstance(rate, float) and rate > 0


def _label(name: str, module: nn.Module) -> str:
    return f"{name or 'the upper part'} ({type(module).__name__})"


def _probe(upper: Upper, records: int) -> dict[str, list[Call]]:
    """Return the calls of every module with trainable parameters, of random features, by name."""
    modules = {
        name: module for name, module in upper.named_modules() if any(p.requires_grad for p in module.parameters())
    }
    device = next(upper.parameters()).device
    features = torch.randn(records, upper.layout.width, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), noted(modules, records) as calls:
        upper(features)
    return calls
