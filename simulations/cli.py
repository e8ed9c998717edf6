"""`consilium simulate`: options to a plan. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click

# Each option's place in run.toml.
_PLACES = {
    "dataset": ("simulation", "dataset"),
    "data_root": ("simulation", "data_root"),
    "sites": ("simulation", "sites"),
    "partition": ("simulation", "partition"),
    "baselines": ("simulation", "baselines"),
    "backend": ("simulation", "backend"),
    "device": ("simulation", "device"),
    "backbone": ("model", "backbone"),
    "weights": ("model", "weights"),
    "trainable": ("model", "trainable"),
    "features": ("model", "features"),
    "init": ("model", "init"),
    "image_size": ("data", "image_size"),
    "preset": ("data", "preset"),
    "views": ("data", "views"),
    "uncertain": ("data", "uncertain"),
    "blank": ("data", "blank"),
    "strategy": ("training", "strategy"),
    "rounds": ("training", "rounds"),
    "local_epochs": ("training", "local_epochs"),
    "local_steps": ("training", "local_steps"),
    "batch_size": ("training", "batch_size"),
    "draw": ("training", "draw"),
    "lr": ("training", "lr"),
    "class_weights": ("training", "class_weights"),
    "wire": ("wire", "dtype"),
    "quorum": ("sites", "quorum"),
    "deadline": ("sites", "deadline_s"),
    "delta": ("privacy", "delta"),
    "noise_multiplier": ("privacy", "noise_multiplier"),
    "clip": ("privacy", "clip"),
    "histogram_epsilon": ("privacy", "histogram_epsilon"),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": False})
@click.option(
    "--dataset", metavar="NAME|FILE|FOLDER", help="phantoms (default), a MedMNIST name, an .npz file, a folder."
)
@click.option("--data-root", metavar="DIR", help="Where MedMNIST files are or go.")
@click.option("--sites", type=int, metavar="N", help="Hospitals to simulate [5].")
@click.option(
    "--partition", metavar="RULE", help="dirichlet:A [0.5], iid, shards:K, quantity:A, natural [phantoms' default]."
)
@click.option("--backbone", metavar="NAME", help="Any timm classifier [tf_efficientnet_lite0].")
@click.option("--weights", metavar="SOURCE", help="auto (default), embedded, hub, none, or a .safetensors file.")
@click.option("--trainable", metavar="CUT", help="head (default), stages:N from the output, all.")
@click.option("--image-size", type=int, metavar="PIXELS", help="Side of the square input [the preset's].")
@click.option("--preset", metavar="NAME", help="How images are shown: generic (default), chest-xray, ct, …")
@click.option("--views", type=int, metavar="K", help="Cached views an image, 1 = none [the preset's].")
@click.option(
    "--uncertain", metavar="KIND", help="What -1 among several labels means: ignore (default), zeros, ones, soft."
)
@click.option("--blank", metavar="KIND", help="What an empty one means: zeros (default), ignore.")
@click.option("--features", metavar="KIND", help="multi (default): pooled outputs of several stages; last.")
@click.option("--init", metavar="KIND", help="analytic (default): closed-form head from summed statistics; zero.")
@click.option(
    "--strategy",
    metavar="RULE",
    help="fedavg (default), analytic, fedprox:MU, fedavgm, fedadam, fedyogi, fedadagrad, median, trimmed-mean:B, krum.",
)
@click.option("--rounds", type=int, metavar="N", help="Rounds [10].")
@click.option("--local-epochs", type=int, metavar="N", help="Passes over a site's data a round [1].")
@click.option("--local-steps", type=int, metavar="N", help="Optimiser steps a round, instead of passes.")
@click.option("--batch-size", type=int, metavar="N", help="Examples a step [32].")
@click.option(
    "--draw", metavar="WHAT", help="What a pass visits once: images (default); patients, with one image each."
)
@click.option("--lr", type=float, metavar="RATE", help="Learning rate [0.0003 for the head, 0.0001 for deeper cuts].")
@click.option("--class-weights", metavar="KIND", help="balanced (default): from pooled label counts; none.")
@click.option("--wire", metavar="TYPE", help="float32 (default), bfloat16, float16.")
@click.option("--quorum", type=int, metavar="N", help="Usable answers a round needs [all sites].")
@click.option("--deadline", type=float, metavar="SECONDS", help="Time a site has to answer [3600].")
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="FAULT",
    help="drop:SITE@ROUND, slow:SITE@ROUND:SECONDS, nan:SITE@ROUND, crash:coordinator@ROUND; repeatable.",
)
@click.option(
    "--epsilon",
    metavar="EPS[,EPS…]",
    help="Differential privacy of each site's patients: the target of the whole run, or several to compare [off].",
)
@click.option("--delta", type=float, metavar="DELTA", help="Its delta [each site's own, 1 / (10 patients)].")
@click.option("--noise-multiplier", type=float, metavar="SIGMA", help="The noise itself, instead of --epsilon.")
@click.option("--clip", type=float, metavar="C", help="Norm that a patient's gradient is cut to [a good one].")
@click.option(
    "--histogram-epsilon",
    type=float,
    metavar="EPS",
    help="Laplace noise on evaluation counts, for all looks at a split [exact counts].",
)
@click.option(
    "--baselines/--no-baselines", default=None, help="Compare with pooled training and each site alone [yes]."
)
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="A run.toml; options win over it.")
@click.option("--seed", type=int, metavar="N", help="Decides every random stream [0].")
@click.option("--device", metavar="NAME", help="auto (default), cpu, cuda.")
@click.option("--backend", metavar="NAME", help="inprocess (default), ray.")
@click.option(
    "--cache", type=click.Path(path_type=Path), metavar="DIR", help="Features and images [~/.cache/consilium]."
)
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="[runs/<dataset>-<strategy>-<k>]")
@click.option("--resume", is_flag=True, help="Go on from what --output holds.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json on standard output, and nothing else there.")
@click.option("--quiet", is_flag=True, help="No progress.")
def simulate(**options: Any) -> int:
    """Run a whole federation in this process, on public or drawn data.

    \b
    Example:
      consilium simulate --dataset pneumoniamnist.npz --image-size 128 --partition dirichlet:0.5

    Ends with a table, and with result.json, report.html and model/ in the output folder.
    Exit code: 0 done, 1 failed, 2 wrong use, 3 completed in part.
    """  # noqa: D301  click wants the backspace itself
    _quiet_dependencies()
    from simulations.runner import simulate as run

    return _carried_out(options, run)


def _rehearse(**options: Any) -> int:
    """Run a federation of real processes on this machine, over TLS, with the options of `consilium simulate`.

    \b
    Example:
      consilium rehearse --dataset pneumoniamnist.npz --image-size 128 --sites 3 --no-baselines

    A coordinator and every hospital are founded, enrolled and started, the run is made, and everything but the output
    folder is taken away again. The same options give byte for byte the upper.safetensors of the simulation. --fault and
    --backend ray are for the simulation alone. Exit code: 0 done, 1 failed, 2 wrong use, 3 completed in part.
    """  # noqa: D301
    _quiet_dependencies()
    from simulations.rehearse import rehearse as run

    return _carried_out(options, run)


rehearse = click.Command(
    "rehearse",
    params=simulate.params,
    callback=_rehearse,
    help=cleandoc(_rehearse.__doc__ or ""),
    context_settings=simulate.context_settings,
)


def _carried_out(options: dict[str, Any], run: Callable[[Any, Any], tuple[Path, dict[str, Any]]]) -> int:
    """Run what the options describe, show its end, and return the exit code."""
    targets = _targets(options)
    if len(targets) > 1:
        return _swept(options, targets, run)
    job = _job({**options, "epsilon": targets[0] if targets else None})
    from common.progress import Reporter
    from server.report import closing

    logging.getLogger("flwr").setLevel(logging.ERROR)  # Flower sets its level when it is imported

    try:
        with Reporter(quiet=options["quiet"]) as reporter:
            folder, found = run(job, reporter)
    except KeyboardInterrupt:
        raise click.exceptions.Abort from None
    if options["as_json"]:
        click.echo(json.dumps(found, allow_nan=False))
    else:
        closing.show(found, folder)
    return 0 if found["status"] == "completed" else 3


def _swept(options: dict[str, Any], targets: tuple[float, ...], run: Callable[[Any, Any], Any]) -> int:
    """Run once for each epsilon and once without, show how they compare, and return the exit code."""
    from common.errors import UsageError
    from common.progress import Reporter
    from common.run_config import Privacy
    from simulations import sweep

    if options["resume"]:
        raise UsageError("--resume: goes on with one run; name the folder of one epsilon, and that epsilon alone")
    jobs = {target: _job({**options, "epsilon": target}) for target in targets}
    first = jobs[targets[0]]
    exact = replace(first, plan=first.plan.model_copy(update={"privacy": Privacy()}))  # whatever a file says of it
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        with Reporter(quiet=options["quiet"]) as reporter:
            folder, found = sweep.run_all(jobs, exact, run, options["output"], reporter)
    except KeyboardInterrupt:
        raise click.exceptions.Abort from None
    if options["as_json"]:
        click.echo(json.dumps(found, allow_nan=False))
    else:
        sweep.show(found, folder)
    return 0 if found["status"] == "completed" else 3


def _targets(options: dict[str, Any]) -> tuple[float, ...]:
    """Return the epsilons that were asked for, each once, the smallest first.

    Raises:
        ConfigError: one is no number.
    """
    from common.errors import ConfigError

    text = options["epsilon"]
    if text is None:
        return ()
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--epsilon: got {text!r}, expected a number such as 3, or several such as 1,3,8") from None
    return tuple(found)


def _quiet_dependencies() -> None:
    """Turn off what dependencies would send or print by themselves, before they are imported."""
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(name, value)


def _job(options: dict[str, Any]) -> Any:
    """Return the job that the options describe."""
    from common.run_config import build
    from simulations.grid import Fault
    from simulations.runner import Job

    given = _given(options)
    if options["resume"] and (given or options["config"]):
        return _checked_resume(options, given)
    values = _file_values(options)
    plan = build(merged(values, given), "options")
    return Job(
        plan,
        options["output"],
        _cache(options),
        options["resume"],
        tuple(Fault.parse(text) for text in options["faults"]),
    )


def _checked_resume(options: dict[str, Any], given: dict[str, Any]) -> Any:
    """Return the job of a resumed run whose options are repeated; they must be the run's own."""
    from common.errors import ConfigError, UsageError
    from common.run_config import build
    from common.strict import read_toml
    from simulations.grid import Fault
    from simulations.runner import Job

    if options["output"] is None:
        raise UsageError("--resume: name the run's folder with --output")
    path = options["output"] / "run.toml"
    if not path.is_file():
        raise UsageError(f"--resume: {options['output']} holds no run (no run.toml); leave --resume out to start one")
    held = build(read_toml(path), str(path))
    wanted = merged(_file_values(options), given)
    build(wanted, "options")
    for place, value in _leaves(wanted):
        kept: Any = held.model_dump(mode="json")
        for key in place:
            kept = kept.get(key) if isinstance(kept, dict) else None
        if kept != value and not _same_default(place, kept, value):
            raise ConfigError(
                f"--resume: {'.'.join(place)} is {kept!r} in {path}, got {value!r}; a resumed run keeps its own"
            )
    return Job(held, options["output"], _cache(options), True, tuple(Fault.parse(text) for text in options["faults"]))


def _file_values(options: dict[str, Any]) -> dict[str, Any]:
    """Return the content of --config, checked by itself, so that an error names the file."""
    from common.run_config import build
    from common.strict import read_toml

    if options["config"] is None:
        return {}
    values = read_toml(options["config"])
    build(values, str(options["config"]))
    return values


def _same_default(place: tuple[str, ...], kept: Any, value: Any) -> bool:
    """Return whether a value was resolved into the one that the run holds."""
    return place == ("model", "weights") and value == "auto" and kept in ("embedded", "hub")


def _leaves(values: dict[str, Any], place: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in values.items():
        found.extend(_leaves(value, (*place, key)) if isinstance(value, dict) else [((*place, key), value)])
    return found


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as nested configuration."""
    values: dict[str, Any] = {}
    for name, (section, key) in _PLACES.items():
        if options[name] is not None:
            values.setdefault(section, {})[key] = options[name]
    if options["epsilon"] is not None:
        values.setdefault("privacy", {})["epsilon"] = float(options["epsilon"])
    if options["seed"] is not None:
        values["seed"] = options["seed"]
    return values


def merged(file: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the file's values with the options over them; of two exclusive keys the option's stays.

    Examples:
        >>> merged({"training": {"rounds": 3, "lr": 0.1}}, {"training": {"rounds": 5}})
        {'training': {'rounds': 5, 'lr': 0.1}, 'simulation': {}}
    """
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in file.items()}
    for key, value in options.items():
        if isinstance(value, dict) and isinstance(result.get(key, {}), dict):
            section = result.setdefault(key, {})
            for one, other in _EXCLUSIVE:
                if one in value and other not in value:
                    section.pop(other, None)
            section.update(value)
        else:
            result[key] = value
    result.setdefault("simulation", {})
    return result


_EXCLUSIVE = (
    ("local_epochs", "local_steps"),
    ("local_steps", "local_epochs"),
    ("epsilon", "noise_multiplier"),
    ("noise_multiplier", "epsilon"),
)
"""Keys of which an option takes the place of what a file says of the other."""


def _cache(options: dict[str, Any]) -> Path:
    """Return the cache folder: the option's, else the user's."""
    if options["cache"] is not None:
        return Path(options["cache"])
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "consilium"
