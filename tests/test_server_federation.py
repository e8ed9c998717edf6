"""Each site answers for itself: the late, the absent, the unwilling and the unreadable stop nobody else."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_app
from common.errors import QuorumLost, SiteRefusal
from common.messages import (
    REFUSALS,
    Describe,
    Description,
    Done,
    Freeze,
    InstallTrunk,
    Prepare,
    Train,
    Trained,
    count_bytes,
    refusal,
    to_record,
)
from server import federation as module
from server.federation import Federation, Traffic, require_quorum
from simulations.grid import Fault, InProcessGrid

NAMES = ("a", "b", "c")
STATISTICS = {
    "confusion": np.zeros((2, 2), np.int64),
    "positives": np.zeros((1, 4), np.int64),
    "negatives": np.zeros((1, 4), np.int64),
    "calibration": np.zeros((15, 3)),
    "brier": np.zeros(1),
    "log_loss": np.zeros(1),
}


@dataclass
class Station:
    """The least that a site can be: it says its name, and its training says the round back."""

    name: str

    def handle(self, request):
        match request:
            case Describe():
                return Description(self.name, np.ones((3, 2), np.int64), "")
            case Train():
                return Trained(np.zeros(5, np.float16), request.round, float(request.round), **STATISTICS)
            case Prepare() if self.name == "refuser":
                raise SiteRefusal("unknown_run")
            case Prepare() if self.name == "faulty":
                raise RuntimeError("the file of Mrs Miller cannot be read")
        return Done()


def grid_of(*names, faults=(), kind=InProcessGrid):
    """A grid of stations; the name on the grid is the place, the station may call itself otherwise."""
    stations = [Station(name) for name in names]
    app = make_app(lambda node: stations[node["partition-id"]].handle)
    return kind(app, [f"{name}" for name in names], [Fault.parse(fault) for fault in faults])


def joined(grid, names=NAMES, deadline=5.0):
    federation = Federation(grid, deadline)
    federation.find(names, "run")
    return federation


def train(number):
    return Train("print", number, np.zeros(7, np.float16), np.zeros((1, 3)))


def asked(federation, request, names=NAMES):
    return {answer.site: answer for answer in federation.ask(dict.fromkeys(names, request))}


# ------------------------------------------------------------------------------------------------ finding the sites


def test_the_sites_are_found_by_the_name_they_give():
    federation = Federation(grid_of("c", "a", "b"), 5.0)
    answers = federation.find(NAMES, "run")
    assert list(answers) == federation.sites == list(NAMES)
    assert {name: answer.reply.site for name, answer in answers.items()} == {name: name for name in NAMES}
    assert {answer.status for answer in answers.values()} == {"contributed"}


class Recording(InProcessGrid):
    """Remembers which node was sent what."""

    def push_messages(self, messages):
        messages = list(messages)
        self.sent = [*getattr(self, "sent", []), *messages]
        return super().push_messages(messages)


def test_unknown_nodes_are_asked_who_they_are_and_never_again():
    grid = grid_of("stranger", "a", "b", "guest", kind=Recording)
    federation = Federation(grid, 5.0)
    answers = federation.find(("a", "b"), "run")
    assert list(answers) == ["a", "b"]
    asked(federation, Prepare("print"), ("a", "b"))
    later = [message.metadata for message in grid.sent if message.metadata.message_type != "query.describe"]
    assert sorted(metadata.dst_node_id for metadata in later) == [2, 3]


def test_who_is_not_there_is_lost_and_the_others_are_found():
    begin = time.monotonic()
    answers = Federation(grid_of("a", "c"), 0.2).find(NAMES, "run")
    assert (answers["b"].status, answers["b"].reason, answers["b"].reply) == ("lost", "absent", None)
    assert answers["b"].traffic == Traffic()
    assert {answers["a"].status, answers["c"].status} == {"contributed"}
    assert 0.2 <= time.monotonic() - begin < 2.0


def test_of_two_nodes_with_one_name_the_first_stands():
    grid = grid_of("a", "a", "b", "c", kind=Recording)
    federation = Federation(grid, 5.0)
    assert [answer.status for answer in federation.find(NAMES, "run").values()] == ["contributed"] * 3
    answers = list(federation.ask(dict.fromkeys(NAMES, train(1))))
    assert sorted(answer.site for answer in answers) == list(NAMES)
    assert [message.metadata.dst_node_id for message in grid.sent if message.metadata.message_type == "train"] == [
        1,
        3,
        4,
    ]


def test_a_node_that_declines_the_run_is_nobody():
    def open_site(node):
        def decline(request):
            raise SiteRefusal("labels_differ")

        return decline if node["partition-id"] == 1 else Station("a").handle

    federation = Federation(InProcessGrid(make_app(open_site), ["a", "b"]), 5.0)
    assert federation.find(("a", "b"), "run")["b"].reply is None
    assert federation.sites == ["a"]


# ------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_is_its_code(code):
    answer = module._answer("a", reply_with(refusal(code)), Done, (0, 0))
    assert (answer.status, answer.reason, answer.reply) == ("refused", code, None)


def test_one_site_refuses_or_fails_and_the_others_go_on():
    names = ("a", "faulty", "refuser")
    answers = asked(joined(grid_of(*names), names), Prepare("print"), names)
    assert (answers["refuser"].status, answers["refuser"].reason) == ("refused", "unknown_run")
    assert (answers["faulty"].status, answers["faulty"].reason) == ("refused", "internal")
    assert (answers["a"].status, answers["a"].reply) == ("contributed", Done())


def test_a_refusal_of_an_invented_code_carries_no_text_along():
    told = RecordDict({"facts": ConfigRecord({"refused": "Mrs Miller, born 1950"})})
    answer = module._answer("a", reply_with(told), Done, (0, 0))
    assert (answer.status, answer.reason) == ("refused", "internal")


def test_a_flower_error_is_a_loss_without_its_text():
    grid = grid_of(*NAMES, faults=["drop:b@1"])
    answer = asked(joined(grid), train(1))["b"]
    assert (answer.status, answer.reason, answer.reply) == ("lost", "unreachable", None)
    assert answer.traffic == Traffic(weights_down=14, other_down=count_bytes(to_record(train(1)))[1])
    assert "dropped" not in repr(answer)


def reply_with(content):
    app = ClientApp()
    grid = InProcessGrid(app, ["a"])

    @app.query("prepare")
    def answer(message, context):
        return Message(content, reply_to=message)

    message = Message(to_record(Prepare("print")), dst_node_id=1, message_type="query.prepare")
    (identity,) = grid.push_messages([message])
    (reply,) = grid.pull_messages([identity])
    return reply


def raw(value=None, **changes):
    value = np.zeros(5, np.float16) if value is None else value
    facts = {"dtype": value.dtype.name, "shape": value.shape, "stype": "consilium.raw", "data": value.tobytes()}
    return Array(**{**facts, **changes})


def trained_record(weights=None, facts=None, **others):
    record = to_record(Trained(np.zeros(5, np.float16), 3, 0.5, **STATISTICS))
    if weights is not None:
        record["weights"] = ArrayRecord({"weights": weights})
    if facts is not None:
        record["facts"] = ConfigRecord(facts)
    for name, content in others.items():
        record[name] = content
    return record


def without(name):
    record = trained_record()
    return RecordDict({key: value for key, value in record.items() if key != name})


GARBAGE = {
    "empty": RecordDict({}),
    "another reply": to_record(Done()),
    "a description": to_record(Description("a", np.ones((3, 2), np.int64), "")),
    "no facts": without("facts"),
    "no arrays": without("arrays"),
    "no weights": without("weights"),
    "facts that are metrics": RecordDict({"facts": MetricRecord({"num_examples": 3})}),
    "weights that are facts": RecordDict({**without("weights"), "weights": ConfigRecord({"weights": 1})}),
    "a fact too many": trained_record(facts={"num_examples": 3, "train_loss": 0.5, "name": "Miller"}),
    "a refusal with more": trained_record(facts={"refused": "internal", "num_examples": 3, "train_loss": 0.5}),
    "a count as a real": trained_record(facts={"num_examples": 3.0, "train_loss": 0.5}),
    "a count as a truth": trained_record(facts={"num_examples": True, "train_loss": 0.5}),
    "a count as a list": trained_record(facts={"num_examples": [3], "train_loss": 0.5}),
    "a loss as a text": trained_record(facts={"num_examples": 3, "train_loss": "0.5"}),
    "a pickle": trained_record(raw(stype="pickle")),
    "a numpy file": trained_record(raw(stype="numpy.ndarray")),
    "an object array": trained_record(raw(dtype="object")),
    "too few bytes": trained_record(raw(data=b"\0" * 9)),
    "too many bytes": trained_record(raw(data=b"\0" * 11)),
    "a shape of more": trained_record(raw(shape=(6,))),
    "a negative side": trained_record(raw(shape=(-5,))),
    "two negative sides": trained_record(raw(shape=(-1, -5))),
    "a side that wraps around": trained_record(raw(shape=(2**62, 8), data=b"")),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_quarantined(kind):
    answer = module._answer("a", reply_with(GARBAGE[kind]), Trained, (2, 3))
    assert (answer.status, answer.reason, answer.reply) == ("quarantined", "unreadable", None)
    assert (answer.traffic.weights_down, answer.traffic.other_down) == (2, 3)


def test_garbage_from_one_site_stops_nobody():
    app = ClientApp()

    @app.query("describe")
    def describe(message, context):
        return Message(
            to_record(Station("abc"[context.node_config["partition-id"]]).handle(Describe(""))), reply_to=message
        )

    @app.train()
    def answer(message, context):
        if context.node_config["partition-id"] == 1:
            return Message(GARBAGE["too few bytes"], reply_to=message)
        if context.node_config["partition-id"] == 2:
            return Message(Error(code=1, reason="/data/patients/miller.dcm"), reply_to=message)
        return Message(trained_record(), reply_to=message)

    answers = asked(joined(InProcessGrid(app, NAMES)), train(1))
    assert {name: answer.status for name, answer in answers.items()} == {
        "a": "contributed",
        "b": "quarantined",
        "c": "lost",
    }
    assert "miller" not in repr(answers)


# ------------------------------------------------------------------------------------------------- deadlines


def test_who_answers_after_the_deadline_is_lost():
    grid = grid_of(*NAMES, faults=["slow:b@1:60"])
    federation = joined(grid, deadline=0.2)
    begin = time.monotonic()
    answers = list(federation.ask(dict.fromkeys(NAMES, train(1))))
    assert 0.2 <= time.monotonic() - begin < 2.0
    assert [answer.site for answer in answers[:2]] == ["a", "c"]
    assert (answers[2].site, answers[2].status, answers[2].reason) == ("b", "lost", "deadline")
    assert answers[2].traffic == Traffic(weights_down=14, other_down=answers[0].traffic.other_down)


def test_who_is_slow_within_the_deadline_is_waited_for():
    answers = list(joined(grid_of(*NAMES, faults=["slow:a@1:0.2"])).ask(dict.fromkeys(NAMES, train(1))))
    assert [answer.site for answer in answers] == ["b", "c", "a"]
    assert all(answer.status == "contributed" for answer in answers)


class Gushing(InProcessGrid):
    """Delivers whatever is due, asked for or not, and everything twice."""

    def pull_messages(self, message_ids):
        arrived = list(super().pull_messages([*self._late, *message_ids]))
        return [message for message in arrived for _ in range(2)]


@pytest.mark.parametrize("kind", [InProcessGrid, Gushing])
def test_a_late_answer_is_never_taken_for_one_of_a_later_round(kind):
    grid = grid_of(*NAMES, faults=["slow:b@1:0.3"], kind=kind)
    federation = joined(grid, deadline=0.1)
    assert asked(federation, train(1))["b"].reason == "deadline"
    time.sleep(0.3)  # by now the answer to round 1 is there
    answers = list(federation.ask(dict.fromkeys(NAMES, train(2))))
    assert sorted(answer.site for answer in answers) == list(NAMES)
    assert [answer.reply.num_examples for answer in answers] == [2, 2, 2]


# --------------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize("dtype", ["float32", "uint16", "float16"])
def test_bytes_of_weights_are_values_times_the_size_of_the_wire_type(dtype):
    request = Train("print", 1, np.zeros(7, dtype), np.zeros((1, 3)))
    answers = asked(joined(grid_of(*NAMES)), request)
    for answer in answers.values():
        assert answer.traffic.weights_down == 7 * np.dtype(dtype).itemsize
        assert answer.traffic.weights_up == 5 * 2
        assert answer.traffic.other_down == 3 * 8 + len("fingerprint") + len("print") + len("round") + 8
        statistics = sum(value.nbytes for value in STATISTICS.values())
        assert answer.traffic.other_up == statistics + len("num_examples") + 8 + len("train_loss") + 8


def test_traffic_adds_up():
    assert Traffic(1, 2, 3, 4) + Traffic(10, 20, 30, 40) == Traffic(11, 22, 33, 44)


def test_a_trunk_is_no_weights_of_a_round():
    request = InstallTrunk("print", "ab", np.zeros(1000, np.uint8))
    traffic = asked(joined(grid_of(*NAMES)), request)["a"].traffic
    assert traffic.weights_down == 0
    assert traffic.other_down > 1000


def test_one_request_for_several_sites_is_encoded_once(monkeypatch):
    federation = joined(grid_of(*NAMES))
    encoded = []
    monkeypatch.setattr(module, "to_record", lambda request: encoded.append(request) or to_record(request))
    asked(federation, train(1))
    assert len(encoded) == 1


def test_sites_can_be_sent_requests_of_their_own():
    federation = joined(grid_of(*NAMES))
    answers = {answer.site: answer for answer in federation.ask({"a": train(4), "c": train(9)})}
    assert {site: answer.reply.num_examples for site, answer in answers.items()} == {"a": 4, "c": 9}


def test_nobody_asked_nobody_answers():
    assert list(joined(grid_of(*NAMES)).ask({})) == []


# ----------------------------------------------------------------------------------------------------- quorum


def test_a_quorum_that_holds_says_nothing():
    require_quorum(3, 3, 5, "round 4")


def test_a_lost_quorum_says_where_how_many_and_what_to_do():
    with pytest.raises(QuorumLost) as caught:
        require_quorum(2, 3, 5, "round 4")
    text = str(caught.value)
    assert text.startswith("round 4: 2 of 5 sites gave a usable answer, the quorum is 3")
    assert "--resume" in text
    assert "--quorum" in text
    assert "\n" not in text


def test_settled_values_reach_every_site_unchanged():
    heard = {}

    def open_site(node):
        station = Station(NAMES[node["partition-id"]])

        def handle(request):
            if isinstance(request, Freeze):
                heard[station.name] = request
            return station.handle(request)

        return handle

    request = Freeze("print", np.arange(3, dtype=np.float32), np.ones(3, np.float32), np.array([0.5, 2.0]))
    asked(joined(InProcessGrid(make_app(open_site), NAMES)), request)
    assert sorted(heard) == list(NAMES)
    for received in heard.values():
        assert received.fingerprint == "print"
        np.testing.assert_array_equal(received.mean, request.mean)
        assert received.class_weights.dtype == np.float64
