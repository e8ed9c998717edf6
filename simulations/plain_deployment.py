"""What `simulations.wire_bench` measures a round against: Flower's own processes, on this machine, over TLS.

A stock SuperLink and stock SuperNodes with node authentication, each app in a subprocess of its own; a message app of
one array, whose client trains nothing and whose strategy is FedAvg. It is spared what a true one pays: the app imports
no framework, and the SuperLink keeps its state in memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common import certificates
from common.errors import ConsiliumError
from common.supervisor import bound_to
from server.endpoints import QUIET
from simulations.stage import free_ports

_APP = '''"""Nothing is trained: what is left is what a round costs."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    arrays = message.content.array_records["arrays"]
    metrics = MetricRecord({"train_loss": 0.0, "num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"accuracy": 1.0, "num-examples": 1})}), reply_to=message)


@server.main()
def main(grid, context):
    config = context.run_config
    marks = []
    strategy = FedAvg(
        min_train_nodes=config["nodes"], min_evaluate_nodes=config["nodes"], min_available_nodes=config["nodes"]
    )
    weights = ArrayRecord({"weights": Array(np.zeros(config["values"], np.float32))})
    # Flower calls this before the first round and after each.
    strategy.start(
        grid, weights, num_rounds=config["rounds"], evaluate_fn=lambda _round, _arrays: marks.append(time.monotonic())
    )
    Path(config["marks"]).write_text(json.dumps(marks))
'''
_CONNECTION = "bench"
_START_S, _ROUND_S, _STOP_S = 60.0, 60.0, 10.0


def round_seconds(folder: Path, nodes: int, values: int, rounds: int) -> list[float]:
    """Return the seconds of each round of a run.

    Args:
        folder: an empty one, for everything that the processes need and leave.
        nodes: SuperNodes.
        values: float32 numbers of the array that is exchanged.
        rounds: at least one.

    Raises:
        ConsiliumError: a process did not do its part.
    """
    port, *ports = free_ports(1 + nodes)
    marks = folder / "marks.json"
    _prepare(folder, port, {"nodes": nodes, "values": values, "rounds": rounds, "marks": str(marks)})
    with _deployment(folder, port, ports):
        _call(folder, "run", str(folder / "app"), _CONNECTION)
        _await(marks.exists, _START_S + rounds * _ROUND_S, "the run of plain Flower did not end")
        _await(lambda: marks.stat().st_size > 0, 5.0, "the run of plain Flower wrote nothing")
        found: list[float] = json.loads(marks.read_text())
    return [after - before for before, after in pairwise(found)]


def _prepare(folder: Path, port: int, config: Mapping[str, str | int]) -> None:
    """Write certificates, the connection of the command line, and the app."""
    for key in ("ca.key", "server.key"):
        certificates.make_key(folder / key)
    (folder / "ca.pem").write_bytes(certificates.make_ca(folder / "ca.key", "bench"))
    made = certificates.make_server(folder / "ca.pem", folder / "ca.key", folder / "server.key", ["127.0.0.1"])
    (folder / "server.pem").write_bytes(made)
    home, app = folder / "home", folder / "app"
    home.mkdir()
    app.mkdir()
    connection = {"address": f"127.0.0.1:{port}", "root-certificates": str(folder / "ca.pem")}
    superlink = {"default": _CONNECTION, _CONNECTION: connection}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": superlink}), encoding="utf-8")
    (app / "empty.py").write_text(_APP, encoding="utf-8")
    components = {"serverapp": "empty:server", "clientapp": "empty:client"}
    (app / "pyproject.toml").write_text(
        tomli_w.dumps(
            {
                "project": {"name": "empty", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
                "tool": {"flwr": {"app": {"publisher": "bench", "components": components, "config": dict(config)}}},
            }
        ),
        encoding="utf-8",
    )


@contextmanager
def _deployment(folder: Path, port: int, ports: Sequence[int]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(_end_all, folder)
        tls = ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.pem"]
        rest = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        stack.enter_context(_running(folder, "flower-superlink", *tls, "--port", str(port), *rest))
        _await(lambda: _is_registered(folder, _new_key(folder, 0)), _START_S, "plain Flower's SuperLink does not come")
        for number, own in enumerate(ports):
            if number:
                _call(folder, "supernode", "register", str(_new_key(folder, number)), _CONNECTION)
            keys = ["--auth-supernode-private-key", f"{number}.key", "--auth-supernode-public-key", f"{number}.pub"]
            where = ["--root-certificates", "ca.pem", "--superlink", f"127.0.0.1:{port}", "--port", str(own)]
            stack.enter_context(_running(folder, "flower-supernode", *where, *keys))
        yield


def _new_key(folder: Path, number: int) -> Path:
    """Return the file of a node's public key; the private one lies beside it."""
    public = folder / f"{number}.pub"
    if not public.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        form = serialization.PrivateFormat.OpenSSH
        private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        (folder / f"{number}.key").write_bytes(private)
        encoding = serialization.Encoding.OpenSSH
        public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.OpenSSH))
    return public


def _is_registered(folder: Path, public: Path) -> bool:
    return _flwr(folder, "supernode", "register", str(public), _CONNECTION).returncode == 0


def _call(folder: Path, *words: str) -> None:
    done = _flwr(folder, *words)
    if done.returncode:
        raise ConsiliumError(f"flwr {' '.join(words[:2])}: {done.stdout.decode(errors='replace')[-500:]}")


def _flwr(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # noqa: S603
        [str(_BIN / "flwr"), *words],
        cwd=folder,
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_START_S,
        check=False,
    )


@contextmanager
def _running(folder: Path, name: str, *options: str) -> Iterator[None]:
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603
            [str(_BIN / name), *options],
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=bound_to(os.getpid()),
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


_BIN = Path(sys.executable).parent


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: they find each other by PATH, and their files by FLWR_HOME."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    path = f"{_BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**kept, **QUIET, "PATH": path, _HOME: str(folder / "home")}


_HOME = "FLWR_HOME"


def _end_all(folder: Path) -> None:
    """End what Flower's processes left behind: whatever lives in this home."""
    mark = f"{_HOME}={folder / 'home'}".encode()
    for place in Path("/proc").iterdir():
        with suppress(OSError):
            if place.name.isdecimal() and mark in (place / "environ").read_bytes().split(b"\0"):
                os.kill(int(place.name), signal.SIGKILL)


def _await(is_so: Callable[[], bool], seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() >= end:
            raise ConsiliumError(f"{otherwise} within {seconds:.0f} s")
        time.sleep(0.2)
