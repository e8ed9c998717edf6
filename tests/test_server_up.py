from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common import certificates
from common.errors import ConfigError, ConsiliumError
from common.files import write_atomic
from common.locks import exclusive
from common.supervisor import read_state
from server import founding, up
from server.control import Control
from server.server_config import ServerConfig, read_server

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        public, operator = (listener.getsockname()[1] for listener in (one, other))
    made = founding.found(tmp_path / "chest", f"127.0.0.1:{public}", "chest", f"127.0.0.1:{public}")
    made.config.write_text(made.config.read_text().replace("operator_port = 9444", f"operator_port = {operator}"))
    return read_server(made.config)


def sign(config: ServerConfig, now: datetime) -> None:
    write_atomic(
        config.certificate,
        certificates.make_server(config.ca_certificate, config.ca_key, config.key, ["127.0.0.1"], now),
    )


def soon(days: int) -> datetime:
    return datetime.now(UTC) - timedelta(days=certificates.SERVER_DAYS - days)


def test_a_certificate_that_ends_soon_is_said_and_one_that_has_ended_keeps_it_down(config: ServerConfig) -> None:
    assert up._check(config) == ""
    sign(config, soon(3))
    assert up._check(config).endswith("expires in 2 days; run `consilium server renew`")
    sign(config, soon(0))
    with pytest.raises(
        ConfigError, match=r"^no hospital could connect: .*expired on .*; run `consilium server renew`$"
    ):
        up._check(config)


def test_behind_a_proxy_the_certificate_is_the_proxys_affair(config: ServerConfig) -> None:
    config.certificate.unlink()
    text = config.path.read_text().replace("[network]", '[network]\ntls = "proxy"')
    config.path.write_text(text)
    assert up._check(read_server(config.path)) == ""


def test_who_is_up_already_is_named(config: ServerConfig) -> None:
    up._check_alone(config)
    up.logs(config).mkdir()
    told = f"up already, as process {os.getpid()}; end that one first: kill {os.getpid()}"
    with exclusive(up.logs(config) / "supervisor.lock", "it"), pytest.raises(ConsiliumError, match=told):
        up.up(config)
    up._check_alone(config)


@contextmanager
def running(config: ServerConfig) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "server.up", "up", str(config.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def await_up(config: ServerConfig, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 60
    with Control(config.endpoints) as control:
        while not control.is_up():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)


def superlink_of(config: ServerConfig) -> int:
    state = read_state(up.logs(config))
    assert state is not None and state.running
    pid = state.children["superlink"].pid
    assert pid is not None
    return pid


@pytest.mark.slow
def test_a_superlink_that_dies_comes_back_and_none_outlives_its_supervisor(config: ServerConfig) -> None:
    sign(config, soon(3))
    with running(config) as process:
        assert process.stderr is not None
        await_up(config, process)
        said = [process.stderr.readline() for _ in range(4)]
        assert said[0].startswith("coordinator chest: hospitals reach it at 127.0.0.1:")
        assert said[1].startswith("warning: ") and "expires in 2 days" in said[1]
        assert said[2].startswith("superlink: started as process ")
        assert said[3].startswith("keeper: started as process ")
        first = superlink_of(config)
        os.kill(first, signal.SIGKILL)
        assert "ended with exit code -9; starts again in 1 s" in process.stderr.readline()
        await_up(config, process)
        second = superlink_of(config)
        assert second != first
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while Path(f"/proc/{second}").exists() and "Z" not in Path(f"/proc/{second}/stat").read_text().split()[2]:
            assert time.monotonic() < end
            time.sleep(0.05)
    with running(config) as process:
        await_up(config, process)
        process.terminate()
        assert process.wait(30) == 0
    said_by_it = "".join(path.read_text() for path in up.logs(config).glob("*.log"))
    # A SuperLink that is well says nothing, but for a roll call that its end cut short.
    assert all("consilium.roll" in line and "does not answer" in line for line in said_by_it.splitlines()), said_by_it


def test_its_own_command_ends_in_one_line(config: ServerConfig, capfd: pytest.CaptureFixture[str]) -> None:
    (config.state / "operator.secret").chmod(0o644)
    assert up.main(["up", str(config.path)]) == 2
    err = capfd.readouterr().err
    assert err.startswith("consilium: ") and err.count("\n") == 1 and "chmod 600" in err
