"""Any timm classifier by name, cut at a stage boundary into a frozen `Trunk` and a trainable `Upper`.

The cut is exact. The model is traced with torch.fx, a node across which one tensor alone is alive is chosen, and the
nodes before and after it become two graph modules over the same modules: the same operations on the same values in
the same order. Only the model's own top-level code is traced, its blocks are leaves, so code that looks at shapes
(vision transformers, "same" padding) never meets a symbolic value.

Stages are those of timm's `group_matcher(coarse=True)`, counted from the output; the classifier is no stage.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from common.analytic import STAGE_NORM
from common.errors import ConfigError
from common.seeds import derive

TAPPED_STAGES = 4
"""How many stages, counted from the output, the multi-layer head reads: the measured optimum on several data sets."""

NORMS_WITH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class InputSpec:
    """What a backbone expects: uint8 pixels / 255, minus mean, over std, per RGB channel, S x S."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


@dataclass(frozen=True)
class Layout:
    """How one flat row of features, (D,), is made up: the activation at the cut, then the pooled taps below it."""

    activation: tuple[int, ...]  # shape without the batch; () when nothing above the cut reads it
    pooled: int

    @property
    def width(self) -> int:
        """D."""
        return (torch.Size(self.activation).numel() if self.activation else 0) + self.pooled


class Tracer(fx.Tracer):
    """Traces a model's own code alone: every module is one node, but containers and whatever holds the classifier."""

    def __init__(self, classifier: str) -> None:
        super().__init__()
        self._classifier = classifier

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a call of this module becomes one node."""
        opened = isinstance(m, (nn.Sequential, nn.ModuleList))
        return not opened and not self._classifier.startswith(f"{module_qualified_name}.")


def trace(model: nn.Module) -> fx.GraphModule:
    """Return the model as a graph of its blocks, over the same modules, in eval mode.

    Optional arguments (masks and the like) are settled at their defaults, or the traced code would take the branch of a
    caller who gives them.

    Raises:
        ConfigError: the model's top-level code cannot be traced.
    """
    model.eval()
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    settled = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
    try:
        return fx.GraphModule(model, Tracer(_classifier_name(model)).trace(model, settled))
    except (fx.proxy.TraceError, TypeError, RuntimeError, AttributeError, ValueError, AssertionError) as error:
        name = type(model).__name__
        reason = _first_line(error)
        raise ConfigError(f"backbone {name}: cannot be cut ({reason}); choose another timm model") from None


def split(model: nn.Module, cut: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a model in two so that `upper(trunk(x))` equals `model(x)` to the last bit.

    Args:
        model: a timm classifier.
        cut: `head` (the classifier alone is above), `stages:N` (the last N stages and the head), or `all`.

    Raises:
        ConfigError: more stages asked for than there are, or a model that cannot be cut.

    Examples:
        >>> import timm
        >>> model = timm.create_model("resnet18").eval()
        >>> trunk, upper = split(model, "stages:1")
        >>> x = torch.zeros(1, 3, 64, 64)
        >>> torch.equal(upper(trunk(x)), model(x))
        True
    """
    traced = trace(model)
    node = _cut_node(traced, model, cut)
    return _between(traced, [_placeholder(traced)], [node]), _between(traced, [node], [_result(traced)])


class Trunk(nn.Module):
    """The frozen part: images (B, 3, S, S) to one flat row of features an image, (B, D)."""

    def __init__(self, body: fx.GraphModule | None, layout: Layout) -> None:
        super().__init__()
        self.body = body
        self.layout = layout
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the activation at the cut, flattened, then the pooled taps: (B, D)."""
        if self.body is None:
            return images.flatten(1)
        outputs = self.body(images)
        split_at = 1 if self.layout.activation else 0
        parts = [outputs[0].flatten(1)] if split_at else []
        return torch.cat([*parts, *(pool(output) for output in outputs[split_at:])], dim=1)

    def train(self, mode: bool = True) -> Trunk:  # noqa: ARG002
        """Stay in eval mode: a trunk has one behaviour."""
        super().train(False)
        return self


class Head(nn.Module):
    """Scale the inputs, then a linear layer: (B, W) to logits (B, K).

    Either by frozen mean and deviation over all sites, or, with `stages`, each of the S stages' parts of an image to
    the same norm by itself: u_s = 6 / sqrt(S) · x_s / ‖x_s‖, and then z_s = 6 / sqrt(S) · (u_s - m_s) / ‖u_s - m_s‖.
    The centre m is 0, or what a private run pays for. So ‖z‖ ≤ 6 whatever the image, which bounds what one image can do
    to a sum.

    Args:
        width: W.
        labels: K.
        dropout: on what the linear layer reads.
        stages: widths of the stages that make up the input, if each is scaled by itself.
    """

    def __init__(self, width: int, labels: int, dropout: float = 0.0, stages: Sequence[int] = ()) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, labels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def scaled(self, taps: Tensor) -> Tensor:
        """Return what the linear layer reads, (B, W)."""
        if self.stages:
            return self._each_to_norm(self._each_to_norm(taps) - cast(Tensor, self.mean))
        return (taps - cast(Tensor, self.mean)) * cast(Tensor, self.scale)

    def _each_to_norm(self, taps: Tensor) -> Tensor:
        """Return each stage scaled to norm 6 / sqrt(S), so that all of them have norm 6."""
        parts = [nn.functional.normalize(part, dim=1) for part in torch.split(taps, list(self.stages), dim=1)]
        return torch.cat(parts, dim=1) * float(STAGE_NORM / len(parts) ** 0.5)

    def forward(self, taps: Tensor) -> Tensor:
        """Return logits (B, K)."""
        return cast(Tensor, self.linear(self.dropout(self.scaled(taps))))


class Upper(nn.Module):
    """The trainable part: features (B, D) to logits (B, K).

    Norms that keep running statistics stay in eval mode with all their tensors frozen, whatever mode the rest is in.
    """

    def __init__(self, body: fx.GraphModule | None, layout: Layout, head: Head) -> None:
        super().__init__()
        self.body = body
        self.layout = layout
        self.head = head
        for norm in self.frozen_norms():
            norm.requires_grad_(False)
        self.train(False)

    def taps(self, features: Tensor) -> Tensor:
        """Return what the head reads, before standardisation: pooled taps from below the cut, then above: (B, W)."""
        if self.body is None:
            return features
        size = self.layout.width - self.layout.pooled
        activation = features[:, :size].reshape(-1, *self.layout.activation)
        if activation.ndim == 4 and features.shape[0] > 1:
            activation = activation.contiguous(memory_format=torch.channels_last)
        return torch.cat([features[:, size:], *(pool(output) for output in self.body(activation))], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, K)."""
        return cast(Tensor, self.head(self.taps(features)))

    def train(self, mode: bool = True) -> Upper:
        """Set the mode of everything but norms with running statistics, which never leave eval mode."""
        super().train(mode)
        for norm in self.frozen_norms():
            norm.train(False)
        return self

    def frozen_norms(self) -> Iterable[nn.Module]:
        """Return the norms that keep running statistics."""
        return [module for module in self.modules() if isinstance(module, NORMS_WITH_STATISTICS)]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes and rounds exchange, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


def pool(activation: Tensor) -> Tensor:
    """Average over positions: (B, C, H, W), (B, H, W, C) or (B, T, C) to (B, C); (B, C) as it is.

    Channels-last maps of timm's transformers are told apart by their equal sides, for inputs are square; `build`
    refuses the one size at which all three sides of such a map are equal.
    """
    if activation.ndim == 3:
        return activation.mean(1)
    if activation.ndim == 4:
        _, a, b, c = activation.shape
        return activation.mean((1, 2)) if a == b != c else activation.mean((2, 3))
    return activation.flatten(1)


def build(
    model: nn.Module,
    *,
    cut: str,
    features: str,
    labels: int,
    image_size: int,
    dropout: float = 0.0,
    scaling: str = "moments",
) -> tuple[Trunk, Upper]:
    """Cut a model and put a fresh head, at zero, on it.

    Args:
        model: a timm classifier; its own classifier is left out.
        cut: as for `split`.
        features: `multi`, the pooled outputs of the last four stages, or `last`, the input of the model's classifier.
        labels: K.
        image_size: S, pixels.
        dropout: on the head's input.
        scaling: of the head's input: `moments` over all sites, or `stages`, each by itself.

    Raises:
        ConfigError: as for `split`; or the image is too small for the model.
    """
    traced = trace(model)
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    taps = _tap_nodes(traced, model, features)
    node = _cut_node(traced, model, cut)
    below = [tap for tap in taps if order[tap] <= order[node]] if cut != "all" else []
    above = [tap for tap in taps if tap not in below]
    carried = [node] if above else []
    image = _placeholder(traced)
    trunk_body = None if cut == "all" else _between(traced, [image], [*carried, *below], several=True)
    upper_body = _between(traced, [node], above, several=True) if above else None

    def head(widths: Sequence[int]) -> Head:
        return Head(sum(widths), labels, dropout, widths if scaling == "stages" else ())

    channels_last = getattr(model, "output_fmt", None) == "NHWC"
    return _assemble(trunk_body, upper_body, bool(carried), image_size, channels_last, head)


def _assemble(
    trunk_body: fx.GraphModule | None,
    upper_body: fx.GraphModule | None,
    carried: bool,
    size: int,
    channels_last: bool,
    head: Callable[[Sequence[int]], Head],
) -> tuple[Trunk, Upper]:
    """Find the shapes with one image of zeros and join the parts."""
    image = torch.zeros(1, 3, size, size)
    try:
        with torch.inference_mode():
            outputs = trunk_body(image) if trunk_body else (image,)
            activation = tuple(outputs[0].shape[1:]) if carried else ()
            below = outputs[1 if carried else 0 :]
            taps = [*below, *(upper_body(outputs[0]) if upper_body else ())]
            widths = [pool(tap).shape[1] for tap in taps]
    except (TypeError, AttributeError):
        raise ConfigError(
            "this backbone hands on several tensors at once where it was to be cut or read; "
            "use --features last with --trainable head or all, or choose another timm model"
        ) from None
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"--image-size {size}: this backbone cannot take it ({_first_line(error)})") from None
    if channels_last and any(tap.ndim == 4 and len(set(tap.shape[1:])) == 1 for tap in taps):
        raise ConfigError(f"--image-size {size}: a stage of this backbone is as wide as its maps; choose another size")
    layout = Layout(activation, sum(widths[: len(below)]))
    return Trunk(trunk_body, layout), Upper(upper_body, layout, head(widths))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def create(name: str, *, image_size: int | None, seed: int) -> nn.Module:
    """Return a timm classifier with random weights, in eval mode.

    Args:
        name: a timm model name.
        image_size: pixels, for models whose shape depends on it; None for the model's own.
        seed: decides the random weights, which `weights="none"` alone keeps.

    Raises:
        ConfigError: no timm model of that name, or one without a single linear classifier.
    """
    import timm

    known = timm.list_models()
    if name.split(".")[0] not in known:
        from common.errors import unknown_value

        unknown_value("--backbone", name, _nearest_models(name, known))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "backbone"))
            model = cast(nn.Module, timm.create_model(name, pretrained=False, **arguments(name, image_size)))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"--backbone {name}: timm cannot make it ({_first_line(error)})") from None
    classifier = cast(Any, model).get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise ConfigError(f"--backbone {name}: expected a model with one linear classifier; choose another timm model")
    return model.eval()


def arguments(name: str, image_size: int | None) -> dict[str, Any]:
    """Return what timm's `create_model` is told beside the name.

    Models made without a classifier (DINOv2, EVA) get one of a single output, so that there is one to replace.
    """
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        return {}
    sized = {"img_size": image_size} if config.fixed_input_size and image_size is not None else {}
    return {**sized, "num_classes": 1} if config.num_classes == 0 else sized


def _nearest_models(name: str, known: list[str]) -> list[str]:
    from difflib import get_close_matches

    return get_close_matches(name, known, n=3, cutoff=0.3) or ["a name that timm.list_models() knows"]


def input_spec(model: nn.Module, image_size: int | None = None) -> InputSpec:
    """Return what the model's own `pretrained_cfg` says of its input; a size given wins over the model's."""
    config = cast(dict[str, Any], cast(Any, model).pretrained_cfg)
    return InputSpec(
        image_size=image_size or int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=str(config["interpolation"]),
    )


# Where to cut


def stage_of_parameter(model: nn.Module) -> dict[str, int]:
    """Return the stage of each parameter by name: 0 is the stem, the highest the classifier.

    Raises:
        ConfigError: timm names no stages for this model.
    """
    from timm.models import group_parameters

    try:
        groups = group_parameters(model, cast(Any, model).group_matcher(coarse=True))
    except (AttributeError, AssertionError, TypeError, NotImplementedError):
        raise ConfigError(
            f"backbone {type(model).__name__}: timm names no stages of it; "
            "use --features last with --trainable head or all, or choose another timm model"
        ) from None
    return {name: stage for stage, names in groups.items() for name in names}


def _cut_node(traced: fx.GraphModule, model: nn.Module, cut: str) -> fx.Node:
    """Return the node whose value alone crosses the cut."""
    if cut == "all":
        return _placeholder(traced)
    if cut == "head":
        return _classifier_node(traced, model).all_input_nodes[0]
    depth = int(cut.removeprefix("stages:"))
    stages = _node_stages(traced, model)
    classifier_stage = max(stages.values())
    if not 0 < depth < classifier_stage:
        raise ConfigError(f"--trainable {cut}: this backbone has stages 1 to {classifier_stage - 1}; or use all")
    return _boundary(traced, stages, classifier_stage - depth)


def _boundary(traced: fx.GraphModule, stages: dict[fx.Node, int], stage: int) -> fx.Node:
    """Return the last node before `stage` begins whose value is all that later nodes need."""
    nodes: list[fx.Node] = list(traced.graph.nodes)
    begin = next(place for place, node in enumerate(nodes) if stages.get(node, -1) >= stage)
    alone = [node for place, node in enumerate(nodes[:begin]) if _alive_after(nodes, place) == {node}]
    if not alone:
        raise ConfigError("--trainable: several tensors cross this stage boundary; choose another number of stages")
    return alone[-1]


def _alive_after(nodes: Sequence[fx.Node], place: int) -> set[fx.Node]:
    """Return the nodes up to `place` that later nodes read, without those that both sides of a cut can have."""
    later = set(nodes[place + 1 :])
    return {node for node in nodes[: place + 1] if not _constant(node) and later.intersection(node.users)}


def _constant(node: fx.Node) -> bool:
    """Return whether a node is a parameter, or an optional argument left at its default."""
    return node.op == "get_attr" or (node.op == "placeholder" and node is not next(iter(node.graph.nodes)))


def _node_stages(traced: fx.GraphModule, model: nn.Module) -> dict[fx.Node, int]:
    """Return the stage of each node that holds parameters."""
    of_parameter = stage_of_parameter(model)
    found: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            inside = [
                s for name, s in of_parameter.items() if name == node.target or name.startswith(f"{node.target}.")
            ]
            if inside:
                found[node] = min(inside)
    return found


def _tap_nodes(traced: fx.GraphModule, model: nn.Module, features: str) -> list[fx.Node]:
    """Return the nodes whose pooled values the head reads, in the order of the graph."""
    last = _classifier_node(traced, model).all_input_nodes[0]
    if features == "last":
        return [last]
    stages = _node_stages(traced, model)
    classifier_stage = max(stages.values())
    first = max(1, classifier_stage - TAPPED_STAGES)
    return list(dict.fromkeys(_stage_output(traced, stages, stage) for stage in range(first, classifier_stage)))


def _stage_output(traced: fx.GraphModule, stages: dict[fx.Node, int], stage: int) -> fx.Node:
    """Return the output of a stage's blocks, before what only prepares the classifier (a last convolution or norm).

    Measured on EfficientNet-Lite0: the 320 channels of the last block serve a linear head better than the 1,280 of the
    convolution behind it.
    """
    members = [node for node, of in stages.items() if of == stage]
    family = str(members[0].target).split(".")[0]
    end = [node for node in members if str(node.target).split(".")[0] == family][-1]
    nodes: list[fx.Node] = list(traced.graph.nodes)
    place = nodes.index(end)
    later = [number for number, node in enumerate(nodes) if number > place and node in stages]
    alone = [
        node
        for number, node in enumerate(nodes[: later[0]])
        if number >= place and _alive_after(nodes, number) == {node}
    ]
    if not alone:
        raise ConfigError("--features multi: several tensors leave a stage of this backbone; use --features last")
    return alone[-1]


def _classifier_node(traced: fx.GraphModule, model: nn.Module) -> fx.Node:
    """Return the call of the model's own classifier."""
    name = _classifier_name(model)
    calls = [node for node in traced.graph.nodes if node.op == "call_module" and _inside(name, str(node.target))]
    if not calls:
        raise ConfigError("this backbone has no classifier that can be replaced; choose another timm model")
    return cast(fx.Node, calls[-1])


def _classifier_name(model: nn.Module) -> str:
    name = cast(Any, model).pretrained_cfg["classifier"]
    if not isinstance(name, str):
        raise ConfigError("this backbone has several classifiers; choose another timm model")
    return name


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _placeholder(traced: fx.GraphModule) -> fx.Node:
    return cast(fx.Node, next(iter(traced.graph.nodes)))


def _result(traced: fx.GraphModule) -> fx.Node:
    output = next(node for node in traced.graph.nodes if node.op == "output")
    return cast(fx.Node, output.args[0])


def _between(
    traced: fx.GraphModule, inputs: list[fx.Node], outputs: list[fx.Node], *, several: bool = False
) -> fx.GraphModule:
    """Copy the nodes that lead from `inputs` to `outputs` into a graph of their own, over the same modules."""
    wanted = _ancestors(outputs, stop=set(inputs))
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for number, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"x{number}")
    for node in traced.graph.nodes:
        if node in wanted and node not in copies:
            copies[node] = _default(node) if node.op == "placeholder" else graph.node_copy(node, copies.__getitem__)
    results = tuple(copies[node] for node in outputs)
    graph.output(results if several else results[0])
    part = fx.GraphModule(traced, graph)
    part.delete_all_unused_submodules()
    return part.eval()


def _default(placeholder: fx.Node) -> Any:
    return placeholder.args[0] if placeholder.args else None


def _ancestors(nodes: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    waiting = [node for node in nodes if node not in stop]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(source for source in node.all_input_nodes if source not in stop)
    return seen
