"""Each site answers for itself: the late, the absent, the unwilling and the unreadable stop nobody else."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_app
from common.errors import SiteRefusal
from common.messages import (
    REFUSALS,
    Collect,
    Describe,
    Description,
    Done,
    InstallTrunk,
    Pending,
    Prepare,
    Train,
    Trained,
    count_bytes,
    refusal,
    to_record,
)
from server import federation as module
from server.federation import TOO_LARGE, UNREADABLE, Federation, Network, Present, Traffic
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
                vector = np.zeros(5, np.float16)
                return Trained(vector, request.round, float(request.round), **STATISTICS, round=request.round)
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
    federation.find(names, Describe("run"))
    return federation


def train(number):
    return Train("print", number, np.zeros(7, np.float16), np.zeros((1, 3)))


def asked(federation, request, names=NAMES):
    return {answer.site: answer for answer in federation.ask(dict.fromkeys(names, request))}


# ------------------------------------------------------------------------------------------------ finding the sites


def test_the_sites_are_found_by_the_name_they_give():
    federation = Federation(grid_of("c", "a", "b"), 5.0)
    answers = federation.find(NAMES, Describe("run"))
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
    answers = federation.find(("a", "b"), Describe("run"))
    assert list(answers) == ["a", "b"]
    asked(federation, Prepare("print"), ("a", "b"))
    later = [message.metadata for message in grid.sent if message.metadata.message_type != "query.describe"]
    assert sorted(metadata.dst_node_id for metadata in later) == [2, 3]


def test_who_is_not_there_is_lost_and_the_others_are_found():
    begin = time.monotonic()
    answers = Federation(grid_of("a", "c"), 0.2).find(NAMES, Describe("run"))
    assert (answers["b"].status, answers["b"].reason, answers["b"].reply) == ("lost", "absent", None)
    assert answers["b"].traffic == Traffic()
    assert {answers["a"].status, answers["c"].status} == {"contributed"}
    assert 0.2 <= time.monotonic() - begin < 2.0


def test_of_two_nodes_with_one_name_the_first_stands():
    grid = grid_of("a", "a", "b", "c", kind=Recording)
    federation = Federation(grid, 5.0)
    assert [answer.status for answer in federation.find(NAMES, Describe("run")).values()] == ["contributed"] * 3
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
    assert federation.find(("a", "b"), Describe("run"))["b"].reply is None
    assert federation.sites == ["a"]


# ------------------------------------------------------------------------------------------------------- answers


def answer_of(record, request):
    """Return what the federation makes of a record that a site sends for a request."""
    app = ClientApp()
    app.query("describe")(lambda message, _: Message(to_record(Station("a").handle(Describe(""))), reply_to=message))
    app.query("prepare")(lambda message, _: Message(record, reply_to=message))
    app.train()(lambda message, _: Message(record, reply_to=message))
    (answer,) = asked(joined(InProcessGrid(app, ["a"]), ("a",)), request, ("a",)).values()
    return answer


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_is_its_code(code):
    answer = answer_of(refusal(code), Prepare("print"))
    assert (answer.status, answer.reason, answer.reply) == ("refused", code, None)


def test_one_site_refuses_or_fails_and_the_others_go_on():
    names = ("a", "faulty", "refuser")
    answers = asked(joined(grid_of(*names), names), Prepare("print"), names)
    assert (answers["refuser"].status, answers["refuser"].reason) == ("refused", "unknown_run")
    assert (answers["faulty"].status, answers["faulty"].reason) == ("refused", "internal")
    assert (answers["a"].status, answers["a"].reply) == ("contributed", Done())


def test_a_refusal_of_an_invented_code_carries_no_text_along():
    told = RecordDict({"facts": ConfigRecord({"refused": "Mrs Miller, born 1950"})})
    answer = answer_of(told, Prepare("print"))
    assert (answer.status, answer.reason) == ("refused", "internal")


def test_a_flower_error_is_a_loss_without_its_text():
    grid = grid_of(*NAMES, faults=["drop:b@1"])
    answer = asked(joined(grid), train(1))["b"]
    assert (answer.status, answer.reason, answer.reply) == ("lost", "unreachable", None)
    assert answer.traffic == Traffic(weights_down=14, other_down=count_bytes(to_record(train(1)))[1])
    assert "dropped" not in repr(answer)


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
    answer = answer_of(GARBAGE[kind], train(1))
    assert (answer.status, answer.reason, answer.reply) == ("quarantined", "unreadable", None)
    assert (answer.traffic.weights_down, answer.traffic.other_down) == count_bytes(to_record(train(1)))


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
        facts = ("num_examples", "train_loss", "epsilon", "steps", "round")
        assert answer.traffic.other_up == statistics + sum(len(name) + 8 for name in facts)


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


# -------------------------------------------------------------------------------------------------------- a network


class Line(InProcessGrid):
    """A line to sites that loses, delays and repeats as each site's script says; the last word of a script stays."""

    def __init__(self, **scripts):
        super().__init__(ClientApp(), list(scripts))
        self.scripts = {name: list(words) for name, words in scripts.items()}
        self.since = dict.fromkeys(scripts, "first")
        self.sent = []
        self._replies = {}

    def roster(self):
        return {name: Present(number, self.since[name]) for number, name in self._sites.items() if self.since[name]}

    def push_messages(self, messages):
        identities = list(super().push_messages(list(messages)))
        for identity in identities:
            message = self._queue.pop(identity)
            name = self._sites[message.metadata.dst_node_id]
            script = self.scripts[name]
            word = script.pop(0) if len(script) > 1 else script[0]
            self.sent.append((name, message.metadata.message_type, word))
            self._replies[identity] = self._said(name, word, message)
        return identities

    def _said(self, name, word, message):
        if word == "silence":
            return None
        if word == "fall over":  # the site is started anew with the message in hand
            self.since[name] += "+"
            return None
        if word == "error":
            return Message(Error(code=0, reason="of Mrs Miller"), reply_to=message)
        record = {
            "work": to_record(Pending("t" * 64, "features", 1, 3)),
            "more": to_record(Pending("t" * 64, "features", len(self.sent), 0)),
            "done": to_record(Done()),
            "shout": to_record(Pending("t" * 64, "[/b]\x1b[31mMrs Miller", 1, 3)),
            "describe": to_record(Description(name, np.ones((3, 2), np.int64), "")),
            "impostor": to_record(Description("a", np.ones((3, 2), np.int64), "")),
        }.get(word)
        return Message(refusal(word) if record is None else record, reply_to=message)

    def pull_messages(self, message_ids):
        return [reply for identity in message_ids if (reply := self._replies.pop(identity, None)) is not None]


@pytest.fixture
def quick(monkeypatch):
    """Looks and retries without the waiting that a real network needs."""
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    monkeypatch.setattr(module, "LONGEST_EXCHANGE_S", 0.3)
    monkeypatch.setattr(module, "EXCUSED_S", 0.5)


def over(line, names, *, deadline=5.0, patience=0.3, watch=None):
    federation = Federation(line, deadline, Network(line.roster, patience_s=patience), watch)
    federation.find(names, Describe("run"))
    return federation


def test_on_a_network_only_the_enrolled_names_are_sent_anything(quick):
    line = Line(a=["describe"], b=["describe"], stranger=["describe"])
    assert over(line, ("a", "b")).sites == ["a", "b"]
    assert {name for name, _, _ in line.sent} == {"a", "b"}


def test_a_site_that_gives_another_name_than_it_was_enrolled_under_is_quarantined(quick):
    line = Line(a=["describe"], b=["impostor"])
    answers = Federation(line, 5.0, Network(line.roster)).find(("a", "b"), Describe("run"))
    assert (answers["b"].status, answers["b"].reason, answers["b"].reply) == ("quarantined", "identity", None)
    assert answers["a"].reply.site == "a"


def test_a_refusal_to_be_described_is_told(quick):
    line = Line(a=["describe"], b=["policy"])
    answers = Federation(line, 5.0, Network(line.roster)).find(("a", "b"), Describe("run"))
    assert (answers["b"].status, answers["b"].reason) == ("refused", "policy")


def test_work_that_takes_long_is_asked_after(quick):
    told = []
    line = Line(a=["describe", "work", "work", "done"])
    federation = over(line, ("a",), watch=lambda *facts: told.append(facts))
    answer = asked(federation, Prepare("print"), ("a",))["a"]
    assert (answer.status, answer.reply) == ("contributed", Done())
    assert [kind for _, kind, _ in line.sent] == ["query.describe", "query.prepare", "query.collect", "query.collect"]
    assert ("a", "features", 1, 3) in told
    collect = count_bytes(to_record(Collect("t" * 64)))[1]
    assert answer.traffic.other_down == count_bytes(to_record(Prepare("print")))[1] + 2 * collect


@pytest.mark.parametrize("trouble", ["error", "unavailable", "fall over", "silence"])
@pytest.mark.slow
def test_what_was_lost_on_the_way_is_asked_again(quick, trouble):
    line = Line(a=["describe", trouble, "done"], b=["describe", "done"])
    answers = asked(over(line, ("a", "b"), patience=3.0), Prepare("print"), ("a", "b"))
    assert {answer.status for answer in answers.values()} == {"contributed"}
    assert [(kind, word) for name, kind, word in line.sent if name == "a"][1:] == [
        ("query.prepare", trouble),
        ("query.prepare", "done"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["work", "more"])
def test_work_that_moves_gives_a_site_more_time_to_prepare(quick, word):
    line = Line(a=["describe", *[word] * 12, "done"])
    federation = over(line, ("a",), deadline=0.3)
    (answer,) = federation.ask({"a": Prepare("print")}, preparing=True)
    assert (answer.status, answer.reason) == (("lost", "deadline") if word == "work" else ("contributed", ""))


def test_work_that_moves_gives_no_more_time_to_train(quick):
    line = Line(a=["describe", *["more"] * 12, "done"])
    (answer,) = over(line, ("a",), deadline=0.3).ask({"a": train(1)})
    assert (answer.status, answer.reason) == ("lost", "deadline")


def test_what_a_site_calls_its_work_is_shown_only_if_it_is_a_plain_word(quick):
    told = []
    line = Line(a=["describe", "shout", "done"])
    federation = over(line, ("a",), watch=lambda *facts: told.append(facts))
    assert asked(federation, Prepare("print"), ("a",))["a"].status == "contributed"
    assert ("a", "at work", 1, 3) in told and "Miller" not in repr(told)


def test_a_site_that_forgot_its_work_is_sent_the_request_again(quick):
    line = Line(a=["describe", "work", "unknown_ticket", "done"])
    assert asked(over(line, ("a",)), Prepare("print"), ("a",))["a"].status == "contributed"
    assert [kind for _, kind, _ in line.sent][1:] == ["query.prepare", "query.collect", "query.prepare"]


def test_a_site_that_is_gone_is_given_up_before_the_deadline(quick):
    line = Line(a=["describe", "silence"], b=["describe", "done"])
    federation = over(line, ("a", "b"), deadline=60.0)
    line.since["a"] = ""
    begin = time.monotonic()
    answers = asked(federation, Prepare("print"), ("a", "b"))
    assert (answers["a"].status, answers["a"].reason) == ("lost", "absent")
    assert answers["b"].status == "contributed"
    assert 0.3 <= time.monotonic() - begin < 3.0


@pytest.mark.parametrize(("word", "reason"), [("silence", "deadline"), ("unavailable", "unavailable")])
def test_a_site_of_which_nothing_is_heard_is_given_up_before_the_deadline(quick, word, reason):
    line = Line(a=["describe", word])
    begin = time.monotonic()
    answer = asked(over(line, ("a",), deadline=60.0), Prepare("print"), ("a",))["a"]
    assert (answer.status, answer.reason) == ("lost", reason)
    assert 0.3 <= time.monotonic() - begin < 3.0


@pytest.mark.slow
def test_a_site_that_works_is_not_given_up_before_the_deadline(quick):
    line = Line(a=["describe", "work"])
    begin = time.monotonic()
    answer = asked(over(line, ("a",), deadline=1.5), train(1), ("a",))["a"]
    assert (answer.status, answer.reason) == ("lost", "deadline")
    assert time.monotonic() - begin >= 1.5


@pytest.mark.slow
def test_who_was_lost_has_to_show_itself_sooner_the_next_time(quick, monkeypatch):
    monkeypatch.setattr(module, "PROBATION_S", 0.2)
    line = Line(a=["describe", "silence", "silence", "silence", "silence", "silence", "done"])
    monkeypatch.setattr(module, "LONGEST_EXCHANGE_S", 60.0)
    federation = over(line, ("a",), deadline=60.0, patience=1.0)
    spent = []
    for _ in range(2):
        begin = time.monotonic()
        assert asked(federation, Prepare("print"), ("a",))["a"].reason == "deadline"
        spent.append(time.monotonic() - begin)
    assert spent[0] >= 1.0 > spent[1]
    line.scripts["a"] = ["done"]
    assert asked(federation, Prepare("print"), ("a",))["a"].status == "contributed"


def test_sites_that_never_connect_are_waited_for_and_then_absent(quick):
    line = Line(a=["describe"], b=["describe"])
    line.since["b"] = ""
    answers = Federation(line, 60.0, Network(line.roster, patience_s=0.2)).find(("a", "b"), Describe("run"))
    assert (answers["b"].status, answers["b"].reason) == ("lost", "absent")
    assert answers["a"].status == "contributed"


def test_large_replies_are_pulled_a_few_at_a_time(quick):
    pulled = []

    class Counting(Line):
        def pull_messages(self, message_ids):
            pulled.append(len(list(message_ids)))
            return super().pull_messages(message_ids)

    names = tuple("abcdef")
    line = Counting(**{name: ["describe", "done"] for name in names})
    federation = Federation(line, 5.0, Network(line.roster, pull_bytes=2500))
    federation.find(names, Describe("run"))
    pulled.clear()
    answers = asked(federation, InstallTrunk("print", "ab", np.zeros(1000, np.uint8)), names)
    assert {answer.status for answer in answers.values()} == {"contributed"}
    assert max(pulled) == 2


def test_nobody_pays_for_time_in_which_nobody_could_be_heard(quick):
    line = Line(a=["describe"], b=["describe"])
    pull, stalled = line.pull_messages, []

    def away(identities):
        if stalled:
            return pull(identities)
        time.sleep(0.8)  # the SuperLink is being restarted
        stalled.append(True)
        return []

    line.pull_messages = away
    answers = Federation(line, 5.0, Network(line.roster, patience_s=0.3)).find(("a", "b"), Describe("run"))
    assert {name: answer.status for name, answer in answers.items()} == {"a": "contributed", "b": "contributed"}


@pytest.mark.parametrize(("code", "reason"), [(TOO_LARGE, "too_large"), (UNREADABLE, "unreadable")])
def test_a_reply_that_cannot_be_had_is_no_loss_on_the_way(quick, code, reason):
    line = Line(a=["describe"], b=["describe"])
    said = line._said

    def mismade(name, word, message):
        return Message(Error(code=code, reason="x"), reply_to=message) if name == "b" else said(name, word, message)

    line._said = mismade
    answers = Federation(line, 5.0, Network(line.roster)).find(("a", "b"), Describe("run"))
    assert (answers["b"].status, answers["b"].reason) == ("quarantined", reason)
    assert [name for name, _, _ in line.sent].count("b") == 1, "it was asked again"
