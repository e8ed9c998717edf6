from __future__ import annotations

import contextlib
import io
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.serverapp import Grid

from common.errors import ConfigError, ConsiliumError
from server import control as control_module
from server.control import Control, bundle, roster
from server.control_http import Refused, RunEnded


@pytest.fixture
def control(superlink: Any) -> Iterator[Control]:
    with Control(superlink.endpoints) as opened:
        yield opened


def status_of(control: Control, run_id: int) -> tuple[str, str]:
    return next((run.status, run.sub_status) for run in control.runs() if run.run_id == run_id)


def details_of(control: Control, run_id: int) -> str:
    return str(control._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status.details)


def echo(message: Message) -> RecordDict:
    return message.content


def exchange(grid: Grid, link: Any, content: RecordDict) -> RecordDict:
    """Send a message to a hospital, let it answer, and return what came back."""
    (sent,) = grid.push_messages([Message(content, link.node.node_id, "query.describe")])
    assert link.answer(echo)
    (reply,) = grid.pull_messages([sent])
    assert reply.metadata.reply_to_message_id == sent and reply.has_content()
    return reply.content


def test_a_bundle_is_the_same_bytes_each_time_and_names_nothing_of_ours() -> None:
    content = bundle()
    assert content == bundle()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml", "stub.py"]
        stub = archive.read("stub.py").decode()
    assert "Nothing in this bundle is executed" in stub and "import " not in stub.split('"""')[2]


def test_without_a_superlink_there_is_one_line(superlinks: Callable[..., Any]) -> None:
    with Control(superlinks().endpoints, patience=0) as control:
        assert not control.is_up()
        for call in (control.nodes, control.runs, lambda: control.start_run(b""), lambda: control.stop_run(1)):
            with pytest.raises(ConsiliumError, match=r"does not answer at 127\.0\.0\.1:\d+; start it with `cons"):
                call()


@pytest.mark.slow
def test_another_coordinators_secret_is_one_line(superlink: Any, tmp_path: Path) -> None:
    superlink_secret = superlink.endpoints.operator_secret
    kept = superlink_secret.read_bytes()
    superlink_secret.write_bytes(bytes(32))
    try:
        with Control(superlink.endpoints) as stranger:
            for call in (stranger.nodes, stranger.is_up):
                with pytest.raises(ConsiliumError, match="does not take this operator's secret"):
                    call()
    finally:
        superlink_secret.write_bytes(kept)


@pytest.mark.slow
def test_a_task_goes_to_nobody_without_the_superexec_secret(superlink: Any) -> None:
    secret = superlink.endpoints.superexec_secret
    kept = secret.read_bytes()
    secret.write_bytes(bytes(32))
    try:
        with Control(superlink.endpoints) as control:
            run_id = control.start_run(bundle())
            with pytest.raises(ConsiliumError, match="does not take this SuperExec secret"), control.grid(run_id):
                pytest.fail("the block of a run whose task was not had must not begin")
            control.stop_run(run_id)
    finally:
        secret.write_bytes(kept)


@pytest.mark.slow
def test_a_proxy_of_the_environment_never_sees_the_secret(
    superlink: Any, monkeypatch: pytest.MonkeyPatch, links: Callable[..., Any]
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Control(superlink.endpoints, patience=0) as control:
        assert control.is_up()
        with control.grid(control.start_run(bundle())) as grid:
            roster(grid)


@pytest.mark.slow
def test_registering_is_idempotent_and_a_new_key_replaces_the_old(
    superlink: Any, control: Control, links: Callable[..., Any]
) -> None:
    old, new, other = links(superlink), links(superlink), links(superlink)
    first = control.register("alder", old.public_key + " somebody@somewhere")
    assert control.register("alder", old.public_key) == first
    (facts,) = [node for node in control.nodes() if node.name == "alder"]
    assert (facts.node_id, facts.public_key, facts.status) == (first, old.public_key, "registered")
    assert (facts.last_activated_at, facts.online_until) == ("", 0.0)
    assert old.activate() == first
    second = control.register("alder", new.public_key)
    assert second != first
    assert [node.node_id for node in control.nodes() if node.name == "alder"] == [second]
    with pytest.raises(httpx.HTTPStatusError, match="412"):
        old.activate()
    assert new.activate() == second
    with pytest.raises(ConsiliumError, match="withdrawn before"):
        control.register("alder", old.public_key)
    control.register("alder", other.public_key)
    with pytest.raises(ConsiliumError, match="registered as 'alder'"):
        control.register("birch", other.public_key)
    control.unregister("alder")
    control.unregister("alder")
    assert not [node for node in control.nodes() if node.name == "alder"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", ["", "ssh-ed25519 AAAA", "ecdsa-sha2-nistp384", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43]
)
def test_a_key_of_another_kind_is_one_line(control: Control, key: str) -> None:
    with pytest.raises(ConfigError, match="cedar: its key is no public key on a NIST curve"):
        control.register("cedar", key)


@pytest.mark.slow
def test_a_message_arrives_and_its_reply_comes_back(
    superlink: Any, control: Control, links: Callable[..., Any]
) -> None:
    link = links(superlink)
    control.register("dogwood", link.public_key)
    values = np.arange(3_000_000, dtype=np.float32)  # 12 MB: three objects
    content = RecordDict({"weights": ArrayRecord({"x": Array(values)}), "facts": ConfigRecord({"a": "b"})})
    run_id = control.start_run(bundle())
    assert status_of(control, run_id) == ("pending", "")
    with control.grid(run_id) as grid:
        assert status_of(control, run_id) == ("running", "")
        assert "dogwood" not in roster(grid)
        node_id = link.activate()
        present = roster(grid)["dogwood"]
        assert present.node == node_id and present.since
        back = exchange(grid, link, content)
        assert np.array_equal(back.array_records["weights"]["x"].numpy(), values)
        assert dict(back.config_records["facts"]) == {"a": "b"}
        assert exchange(grid, link, RecordDict()) == RecordDict()
    assert status_of(control, run_id) == ("finished", "completed")


@pytest.mark.slow
def test_a_run_that_fails_says_so_without_the_reason(control: Control) -> None:
    run_id = control.start_run(bundle())
    with pytest.raises(ZeroDivisionError), control.grid(run_id):
        raise ZeroDivisionError("a patient's name")
    assert status_of(control, run_id) == ("finished", "failed")
    assert details_of(control, run_id) == control_module._FAILED
    with pytest.raises(ConsiliumError, match="has no task to take"), control.grid(run_id):
        pytest.fail("the block of a run that ended must not begin")


@pytest.mark.slow
def test_the_task_of_a_run_that_nobody_takes_is_failed_and_skipped(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "_OTHERS_SECONDS", 0.0)
    stale, own = control.start_run(bundle()), control.start_run(bundle())
    with control.grid(own):
        assert status_of(control, stale) == ("finished", "failed")
        assert status_of(control, own) == ("running", "")


@pytest.mark.slow
def test_a_run_whose_engine_is_about_to_take_it_is_left_alone(control: Control) -> None:
    first, second = control.start_run(bundle()), control.start_run(bundle())
    tokens: list[str] = []
    other = threading.Timer(1.0, lambda: tokens.append(control._take(first)))
    other.start()
    begun = time.monotonic()
    with control.grid(second):
        assert time.monotonic() - begun > 0.9
        assert status_of(control, second) == ("running", "")
    other.join()
    assert status_of(control, first)[0] == "starting"
    control._finish(tokens[0], "failed")


@pytest.mark.slow
def test_a_stopped_run_ends_the_block_in_one_line(control: Control) -> None:
    run_id = control.start_run(bundle())
    with pytest.raises(RunEnded, match="has ended this run"), control.grid(run_id) as grid:
        control.stop_run(run_id)
        control.stop_run(run_id)
        roster(grid)
    assert status_of(control, run_id) == ("finished", "stopped")
    with pytest.raises(Refused, match="refuses"):
        control.stop_run(1)


@pytest.mark.slow
def test_a_killed_superlink_keeps_registrations_and_a_run_survives_its_restart(
    superlinks: Callable[..., Any], links: Callable[..., Any]
) -> None:
    superlink = superlinks().start()
    with Control(superlink.endpoints) as control:
        link = links(superlink)
        node_id = control.register("elm", link.public_key)
        with control.grid(control.start_run(bundle())) as grid:
            link.activate()
            (sent,) = grid.push_messages([Message(RecordDict(), node_id, "query.describe")])
            superlink.end(signal.SIGKILL)
            again = threading.Timer(2.0, superlink.start)
            again.start()
            assert roster(grid)["elm"].node == node_id  # waits until it answers
            again.join()
            assert link.answer(echo)
            (reply,) = grid.pull_messages([sent])
            assert reply.has_content()
        assert [node.name for node in control.nodes()] == ["elm"]
        assert status_of(control, grid.run.run_id) == ("finished", "completed")


@pytest.mark.slow
def test_a_superlink_that_stays_away_ends_the_run_after_the_patience(
    superlinks: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    superlink = superlinks().start()
    with Control(superlink.endpoints, patience=2.0) as control:
        begun = 0.0
        with contextlib.ExitStack() as stack:
            stack.enter_context(pytest.raises(ConsiliumError, match="does not answer"))
            grid = stack.enter_context(control.grid(control.start_run(bundle())))
            superlink.end(signal.SIGKILL)
            begun = time.monotonic()
            roster(grid)
        assert 1.9 < time.monotonic() - begun < 8
    told = [record.getMessage() for record in caplog.records if record.name == "consilium.control"]
    assert told[0].partition("; ")[2] == "waiting for it up to 2 s"
    assert "was not told that the run is failed" in told[-1]
