"""The grid in one process is a Flower grid: any app runs over it, and faults happen where and when ordered."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from client.app import make_app
from common import codec
from common.errors import ConfigError, SiteRefusal
from common.messages import Evaluate, Train, Trained, from_record, to_record
from simulations.grid import FAULT_KINDS, Fault, InProcessGrid, check_faults, run_in_process

ROOT = Path(__file__).parent.parent
NAMES = ("a", "b", "c")


# ------------------------------------------------------------------------------------------------ faults in words


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("drop:a@1", Fault("drop", "a", 1)),
        ("drop:St. Mary:s@12", Fault("drop", "St. Mary:s", 12)),
        ("nan:site-2@3", Fault("nan", "site-2", 3)),
        ("slow:a@3:0.5", Fault("slow", "a", 3, 0.5)),
        ("slow:a@3:0", Fault("slow", "a", 3, 0.0)),
        ("slow:a@3:1e1", Fault("slow", "a", 3, 10.0)),
        ("crash:coordinator@2", Fault("crash", "coordinator", 2)),
    ],
)
def test_faults_are_read(text, fault):
    assert Fault.parse(text) == fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected drop, slow, nan or crash"),
        ("dorp:a@1", r"did you mean 'drop'\?"),
        ("drop", "expected drop:SITE@ROUND"),
        ("drop:", "expected drop:SITE@ROUND"),
        ("drop:a", "expected drop:SITE@ROUND"),
        ("drop:@1", "expected drop:SITE@ROUND"),
        ("drop:a@", "expected drop:SITE@ROUND"),
        ("drop:a@0", "with a round from 1"),
        ("drop:a@-1", "expected drop:SITE@ROUND"),
        ("drop:a@1.5", "expected drop:SITE@ROUND"),
        ("drop:a@one", "expected drop:SITE@ROUND"),
        ("drop:a@²", "expected drop:SITE@ROUND"),
        ("drop:a@1:5", "expected drop:SITE@ROUND"),
        ("drop:coordinator@1", "expected drop:SITE@ROUND"),
        ("nan:a@1:5", "expected nan:SITE@ROUND"),
        ("slow:a@1", "expected slow:SITE@ROUND:SECONDS"),
        ("slow:a@1:", "expected slow:SITE@ROUND:SECONDS"),
        ("slow:a@1:soon", "expected seconds as a number from 0"),
        ("slow:a@1:-1", "expected seconds as a number from 0"),
        ("slow:a@1:nan", "expected seconds as a number from 0"),
        ("slow:a@1:inf", "expected seconds as a number from 0"),
        ("crash:a@1", "expected crash:coordinator@ROUND"),
        ("crash:coordinator@1:5", "expected crash:coordinator@ROUND"),
        ("crash:coordinator", "expected crash:coordinator@ROUND"),
    ],
)
def test_other_forms_are_errors_that_show_the_right_one(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Fault.parse(text)
    assert "\n" not in str(caught.value)


@given(st.sampled_from(["", *FAULT_KINDS]), st.text(alphabet="ab:@0123.-e \n", max_size=12))
def test_any_text_is_a_fault_or_a_configuration_error(kind, rest):
    try:
        fault = Fault.parse(f"{kind}:{rest}")
    except ConfigError:
        return
    assert fault.kind == kind
    assert fault.round >= 1
    assert fault.site
    assert 0 <= fault.seconds < float("inf")


def test_faults_of_the_run_pass_the_check():
    check_faults([Fault("drop", "a", 3), Fault("crash", "coordinator", 1)], NAMES, 3)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("drop", "d", 1), "--fault site: got 'd', expected a, b or c"),
        (Fault("nan", "A", 1), "--fault site: got 'A'"),
        (Fault("slow", "a", 4, 1.0), "round 4 is beyond the run's 3 rounds"),
        (Fault("crash", "coordinator", 4), "round 4 is beyond the run's 3 rounds"),
    ],
)
def test_faults_that_cannot_happen_are_errors(fault, words):
    with pytest.raises(ConfigError, match=words):
        check_faults([fault], NAMES, 3)


# ---------------------------------------------------------------------------------------------------- deliveries


def echoing():
    """An app that answers any training message with the node it ran on and what came."""
    app = ClientApp()

    @app.train()
    @app.evaluate()
    def answer(message, context):
        content = RecordDict({"got": ConfigRecord({"node": context.node_id, **message.content["facts"]})})
        return Message(content, reply_to=message)

    return app


def ordered(number, nodes=(1, 2, 3), kind="train"):
    return [
        Message(RecordDict({"facts": ConfigRecord({"round": number})}), dst_node_id=node, message_type=kind)
        for node in nodes
    ]


def grid_of(*faults, app=None, once=None):
    return InProcessGrid(app or echoing(), NAMES, [Fault.parse(fault) for fault in faults], once)


def nodes_of(replies):
    return [reply.content["got"]["node"] for reply in replies]


def test_it_is_a_flower_grid():
    grid = grid_of()
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    message = grid.create_message(RecordDict({"facts": ConfigRecord({"round": 1})}), "train", 2, "group")
    assert nodes_of(grid.send_and_receive([message])) == [2]


def test_each_pull_runs_one_message_and_no_more():
    grid = grid_of()
    identities = list(grid.push_messages(ordered(1)))
    assert len(set(identities)) == 3
    arrived = [list(grid.pull_messages(identities)) for _ in range(4)]
    assert [len(part) for part in arrived] == [1, 1, 1, 0]
    assert nodes_of(part[0] for part in arrived[:3]) == [1, 2, 3]
    assert [part[0].metadata.reply_to_message_id for part in arrived[:3]] == identities


def test_only_what_is_asked_for_is_delivered():
    grid = grid_of()
    first, second, third = grid.push_messages(ordered(1))
    assert nodes_of(grid.pull_messages([second])) == [2]
    assert list(grid.pull_messages([second, "another"])) == []
    assert nodes_of(grid.pull_messages([third, first])) == [3]


def test_send_and_receive_brings_everything():
    assert nodes_of(grid_of().send_and_receive(ordered(1))) == [1, 2, 3]
    assert grid_of().send_and_receive([]) == []


def test_a_node_keeps_its_state_between_messages():
    app = ClientApp()

    @app.train()
    def count(message, context):
        seen = context.state.config_records.get("seen", ConfigRecord({"times": 0}))["times"] + 1
        context.state["seen"] = ConfigRecord({"times": seen})
        return Message(RecordDict({"got": ConfigRecord({"node": seen})}), reply_to=message)

    grid = InProcessGrid(app, NAMES)
    grid.send_and_receive(ordered(1))
    assert nodes_of(grid.send_and_receive(ordered(2, (1, 1, 2)))) == [2, 3, 2]


# --------------------------------------------------------------------------------------------------------- faults


def test_a_dropped_answer_is_an_error_and_the_site_never_worked():
    worked = []
    app = ClientApp()

    @app.train()
    def answer(message, context):
        worked.append(context.node_id)
        return Message(RecordDict({}), reply_to=message)

    replies = grid_of("drop:b@1", app=app).send_and_receive(ordered(1))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].metadata.src_node_id == 2
    assert worked == [1, 3]


def test_a_fault_happens_in_its_round_at_its_site_and_in_training_alone():
    grid = grid_of("drop:b@2")
    assert nodes_of(grid.send_and_receive(ordered(1))) == [1, 2, 3]
    assert nodes_of(grid.send_and_receive(ordered(2, kind="evaluate"))) == [1, 2, 3]
    assert [reply.has_error() for reply in grid.send_and_receive(ordered(2))] == [False, True, False]
    assert nodes_of(grid.send_and_receive(ordered(3))) == [1, 2, 3]


def test_a_slow_answer_is_withheld_and_then_comes():
    grid = grid_of("slow:b@1:0.2")
    identities = list(grid.push_messages(ordered(1)))
    begin = time.monotonic()
    arrived = []
    while len(arrived) < 3:
        arrived += grid.pull_messages(identities)
        if time.monotonic() - begin < 0.15:
            assert 2 not in nodes_of(arrived)
    assert time.monotonic() - begin >= 0.2
    assert nodes_of(arrived) == [1, 3, 2]
    assert list(grid.pull_messages(identities)) == []


def test_send_and_receive_waits_for_the_slow_but_not_longer_than_allowed():
    assert sorted(nodes_of(grid_of("slow:a@1:0.1").send_and_receive(ordered(1), timeout=5))) == [1, 2, 3]
    begin = time.monotonic()
    assert nodes_of(grid_of("slow:a@1:30").send_and_receive(ordered(1), timeout=0.1)) == [2, 3]
    assert time.monotonic() - begin < 5


WIRES = ("float32", "bfloat16", "float16")
STATISTICS = {
    "confusion": np.eye(2, dtype=np.int64),
    "positives": np.ones((1, 4), np.int64),
    "negatives": np.ones((1, 4), np.int64),
    "calibration": np.ones((15, 3)),
    "brier": np.ones(1),
    "log_loss": np.ones(1),
}


def training_app(wire, refuse=False):
    def handle(request):
        if refuse:
            raise SiteRefusal("not_prepared")
        vector = codec.encode({"w": np.arange(5, dtype=np.float32)}, wire)
        return Trained(vector, 3, 0.5, **STATISTICS)

    return make_app(lambda node: handle)


def train_request(number=1, node=1):
    record = to_record(Train("print", number, np.zeros(1, np.float32), np.zeros((1, 3))))
    return Message(record, dst_node_id=node, message_type="train")


@pytest.mark.parametrize("wire", WIRES)
def test_poison_makes_every_weight_a_nan_and_leaves_the_rest(wire):
    grid = grid_of("nan:b@1", app=training_app(wire))
    healthy, poisoned, _ = (
        from_record(reply.content, Trained)
        for reply in grid.send_and_receive([train_request(node=node) for node in (1, 2, 3)])
    )
    assert poisoned.weights.dtype == healthy.weights.dtype
    values = codec.decode(poisoned.weights, {"w": (5,)}, wire)["w"]
    assert np.isnan(values).all()
    assert np.array_equal(codec.decode(healthy.weights, {"w": (5,)}, wire)["w"], np.arange(5))
    assert (poisoned.num_examples, poisoned.train_loss) == (3, 0.5)
    for name, value in STATISTICS.items():
        assert np.array_equal(getattr(poisoned, name), value)


def test_a_refusal_has_no_weights_to_poison():
    (reply,) = grid_of("nan:a@1", app=training_app("float32", refuse=True)).send_and_receive([train_request()])
    with pytest.raises(SiteRefusal, match="not_prepared"):
        from_record(reply.content, Trained)


def test_poison_and_delay_can_meet():
    grid = grid_of("nan:a@1", "slow:a@1:0.05", app=training_app("float32"))
    (reply,) = grid.send_and_receive([train_request()])
    assert np.isnan(from_record(reply.content, Trained).weights).all()


def test_evaluation_of_another_kind_is_never_poisoned():
    record = to_record(Evaluate("print", "test", np.zeros(1, np.float32), np.zeros((1, 3))))
    message = Message(record, dst_node_id=1, message_type="evaluate")
    (reply,) = grid_of("nan:a@1", app=training_app("float32")).send_and_receive([message])
    assert np.array_equal(from_record(reply.content, Trained).weights, np.arange(5))


CRASH = """
import sys
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from simulations.grid import Fault, InProcessGrid
app = ClientApp()
@app.train()
def answer(message, context):
    return Message(RecordDict({}), reply_to=message)
once = Path(sys.argv[1]) if len(sys.argv) > 1 else None
grid = InProcessGrid(app, ["a", "b"], [Fault.parse("crash:coordinator@2")], once)
for number in (1, 2, 3):
    content = RecordDict({"facts": ConfigRecord({"round": number})})
    for node in (1, 2):
        grid.send_and_receive([Message(content, dst_node_id=node, message_type="train")])
        print(number, node, flush=True)
"""


def crashing(*arguments):
    command = [sys.executable, "-c", CRASH, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_a_crash_ends_the_process_like_a_kill_once_a_run(tmp_path):
    first = crashing(str(tmp_path))
    assert first.returncode == -signal.SIGKILL
    assert first.stdout.split("\n")[:-1] == ["1 1", "1 2", "2 1"]  # before the last site of round 2 could answer
    assert [path.name for path in tmp_path.iterdir()] == ["crashed-2"]
    second = crashing(str(tmp_path))
    assert second.returncode == 0, second.stderr[-1000:]
    assert second.stdout.split("\n")[:-1] == ["1 1", "1 2", "2 1", "2 2", "3 1", "3 2"]


@pytest.mark.slow
def test_a_crash_that_nobody_remembers_happens_again():
    assert crashing().returncode == crashing().returncode == -signal.SIGKILL


# ---------------------------------------------------------------------------------------------- true Flower on it


def stock_client():
    """A client as in Flower's own examples: it moves each weight towards its node's number."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        weights = message.content["arrays"].to_numpy_ndarrays()
        moved = [weight + 0.5 * (context.node_id - weight) for weight in weights]
        content = RecordDict(
            {
                "arrays": ArrayRecord(moved),
                "metrics": MetricRecord({"num-examples": 10 * context.node_id, "loss": float(context.node_id)}),
            }
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        error = abs(context.node_id - float(message.content["arrays"].to_numpy_ndarrays()[0].mean()))
        metrics = MetricRecord({"num-examples": 10 * context.node_id, "error": error})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def stock_run(grid, rounds=8):
    results = []
    server = ServerApp()

    @server.main()
    def main(connected, context):
        results.append(FedAvg().start(connected, ArrayRecord([np.zeros((2, 2), np.float32)]), num_rounds=rounds))

    run_in_process(server, grid)
    return results[0]


def test_a_stock_flower_strategy_and_client_run_over_it():
    found = stock_run(InProcessGrid(stock_client(), NAMES))
    mean = (1 * 1 + 2 * 2 + 3 * 3) / 6  # of the nodes' numbers, by their examples
    np.testing.assert_allclose(found.arrays.to_numpy_ndarrays()[0], mean * (1 - 0.5**8), rtol=1e-6)
    assert sorted(found.train_metrics_clientapp) == sorted(found.evaluate_metrics_clientapp) == list(range(1, 9))
    assert found.train_metrics_clientapp[1]["loss"] == pytest.approx(14 / 6)


def test_faults_are_for_rounds_of_this_project_and_leave_other_apps_alone():
    grid = InProcessGrid(stock_client(), NAMES, [Fault.parse("drop:a@1")])
    assert stock_run(grid, 2).arrays is not None
