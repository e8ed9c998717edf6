"""The report is whole, silent towards the network, honest about what is undefined, and not to be fooled by names."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UsageError
from server.report.page import render, write

HOSTILE = '<script>alert("x")</script>&<img src=x onerror=alert(1)>'
VOID = {"meta", "br", "hr", "img", "input", "link"}
UNSEEN = {"style", "title", "head"}


def wave(*keys: float) -> float:
    """A repeatable number in [-1, 1] that looks irregular."""
    return math.sin(sum((place + 1) * 12.9898 * (key + 1) for place, key in enumerate(keys)) * 43.7585)


def metrics(labels: Sequence[str], n: int, auc: float, shift: float = 0.0) -> dict[str, Any]:
    """METRICS with every figure defined."""
    share = n // len(labels)
    support = {label: share + (n - share * len(labels) if place == 0 else 0) for place, label in enumerate(labels)}
    half = 1.6 * math.sqrt(auc * (1 - auc) / max(n, 1))
    one = {"precision": auc - 0.05, "recall": auc - 0.03, "f1": auc - 0.04, "specificity": auc - 0.02}
    return {
        "examples": n,
        "support": support,
        "accuracy": auc - 0.06 + shift,
        "balanced_accuracy": auc - 0.065,
        **one,
        "auc": auc,
        "auc_bound": 0.0021,
        "auc_ci95": [max(0.0, auc - half), min(1.0, auc + half)],
        "average_precision": auc - 0.01,
        "ece": 0.034,
        "brier": 0.082,
        "per_class": {
            label: {**one, "auc": auc - 0.01 * place * (len(labels) > 2), "auc_bound": 0.002}
            for place, label in enumerate(labels)
        },
        "operating_point": {"threshold": 0.41, "precision": 0.87, "recall": 0.871, "specificity": 0.9},
    }


def undefined(labels: Sequence[str], n: int) -> dict[str, Any]:
    """METRICS of images that carry one label only, or of none."""
    figures = metrics(labels, max(n, 1), 0.5)
    nothing: dict[str, Any] = dict.fromkeys(figures)
    support = {label: n if place == 0 else 0 for place, label in enumerate(labels)}
    blank = dict.fromkeys(figures["per_class"][labels[0]])
    return {
        **nothing,
        "examples": n,
        "support": support,
        "accuracy": 0.75 if n else None,
        "per_class": dict.fromkeys(labels, blank),
        "operating_point": dict.fromkeys(figures["operating_point"]),
    }


def round_entry(number: int, names: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """One entry of `rounds`; round 0 is the start."""
    level = 0.955 - 0.09 * math.exp(-0.6 * number) + 0.004 * wave(number)
    late = names[-1] if number == 3 and len(names) > 2 else None
    reports = {
        name: {"status": "lost", "reason": "timeout", "examples": 0, "train_loss": None, "validation": None}
        if name == late
        else {
            "status": "contributed",
            "examples": 120 + 13 * place % 90,
            "train_loss": 0.15
            + 0.5 * math.exp(-0.4 * number) * (1 + 0.25 * wave(place, 3))
            + 0.01 * wave(place, number),
            "validation": metrics(labels, 40, level),
        }
        for place, name in enumerate(names)
    }
    return {
        "round": number,
        "seconds": 0 if number == 0 else 3.1 + 0.4 * wave(number),
        "bytes_down": 0 if number == 0 else 1_284_000 * len(names),
        "bytes_up": 0 if number == 0 else 642_000 * len(names),
        "evaluation_bytes_down": 0 if number == 0 else 2048 * len(names),
        "evaluation_bytes_up": 0 if number == 0 else 4096 * len(names),
        "validation": metrics(labels, 40 * len(names), level),
        "sites": reports if number else {},
    }


def curve(labels: Sequence[str]) -> dict[str, Any]:
    """ROC and reliability curves."""
    steps = [k / 40 for k in range(41)]
    drawn = labels[1:] if len(labels) == 2 else labels
    roc = {label: [[x, x ** (0.06 + 0.02 * place)] for x in steps] for place, label in enumerate(drawn)}
    bins = [(0.52 + 0.05 * k, 0.49 + 0.051 * k, 12 + 8 * k * k) for k in range(10)]
    return {"roc": roc, "reliability": [{"confidence": c, "accuracy": a, "n": n} for c, a, n in bins]}


def sample(
    names: Sequence[str] = ("berlin", "zürich", "site-10", "site-2", "aarhus"),
    labels: Sequence[str] = ("normal", "pneumonia"),
    rounds: int = 10,
    test_images: int = 624,
) -> dict[str, Any]:
    """A realistic result.json; the same arguments give the same result."""
    local = {name: metrics(labels, test_images, 0.87 + 0.08 * wave(place, 1)) for place, name in enumerate(names)}
    each = max(10 * len(labels), test_images // len(names))
    sites = {
        name: {
            "examples": {"train": 420 + 31 * place % 700, "validation": 60 + place % 25, "test": each},
            "labels": {label: int(120 + 100 * wave(place, k)) for k, label in enumerate(labels)},
            "rounds": rounds - (place == len(names) - 1 and rounds >= 3 and len(names) > 2),
            "status": "contributed",
        }
        for place, name in enumerate(names)
    }
    return {
        "schema": 1,
        "status": "completed",
        "fingerprint": "9f2c4be1" * 8,
        "config": {
            "task": {"name": "Chest X-ray: pneumonia", "labels": list(labels), "kind": "classification"},
            "data": {"preset": "chest-xray-1", "image_size": 224, "views": 1},
            "model": {
                "backbone": "tf_efficientnet_lite0",
                "weights": "embedded",
                "trainable": "stages:1",
                "features": "multi",
                "init": "analytic",
            },
            "training": {
                "strategy": "fedavg",
                "rounds": rounds,
                "local_epochs": 1,
                "local_steps": None,
                "batch_size": 32,
                "lr": 0.003,
            },
            "privacy": {"epsilon": None, "delta": 1e-5},
            "sites": {"names": list(names), "quorum": len(names), "deadline_s": 600.0},
            "wire": {"dtype": "float16"},
            "simulation": {
                "partition": "dirichlet:0.5",
                "faults": [],
                "options": {"deterministic": True, "nested": {"depth": 2}},
            },
            "seed": 0,
        },
        "trunk": {
            "sha256": "a7d1" * 16,
            "parameters": 3_371_008,
            "bytes": 13_582_344,
            "transfers": dict.fromkeys(names, 1),
        },
        "upper": {"parameters": 321_026, "wire_dtype": "float16"},
        "sites": sites,
        "rounds": [round_entry(number, names, labels) for number in range(rounds + 1)],
        "best_round": min(8, rounds),
        "test": {
            "pooled": metrics(labels, test_images, 0.961),
            "sites": {name: metrics(labels, each, 0.95 + 0.035 * wave(place, 2)) for place, name in enumerate(names)},
        },
        "baselines": {"pooled": metrics(labels, test_images, 0.965), "local": local},
        "privacy": None,
        "seconds": {"total": 133.2, "features": 41.7, "rounds": 32.9, "baselines": 52.4},
        "weights": {"source": "embedded", "sha256": "c0ffee" * 10},
        "quarantine": {"decode_failed": 3, "no_label": 12},
        "dropped": {"duplicate_in_other_split": 4},
        "warnings": [{"code": "small_validation", "message": "Site berlin has 60 validation images."}],
        "curves": curve(labels),
        "software": {"consilium": "0.1.0", "python": "3.11.2", "flwr": "1.41.0"},
    }


def hostile() -> dict[str, Any]:
    """Names that try to break out of the page."""
    names = (HOSTILE, "'\" onmouseover='x", "{{ 7*7 }}", "line\nbreak\x00\u202egnp", "x" * 300)
    return sample(names, (HOSTILE + "0", "</style><b>"), rounds=2)


def blanked() -> dict[str, Any]:
    """Undefined figures wherever the schema allows them."""
    result = sample(rounds=4)
    labels = result["config"]["task"]["labels"]
    result["test"]["sites"]["aarhus"] = undefined(labels, 18)
    result["test"]["sites"]["berlin"] = undefined(labels, 0)
    result["baselines"]["local"]["aarhus"] = undefined(labels, 624)
    result["baselines"]["local"]["site-2"] = None
    result["test"]["pooled"]["auc_ci95"] = None
    result["test"]["pooled"]["brier"] = None
    result["rounds"][2]["validation"] = undefined(labels, 200)
    result["rounds"][3]["validation"] = None
    result["sites"]["zürich"] = {"examples": {"train": None}, "labels": None, "rounds": None, "status": None}
    result["seconds"] = {"total": None, "features": None, "rounds": None, "baselines": None}
    result["trunk"]["bytes"] = None
    result["fingerprint"] = None
    result["software"] = {"torch": None}
    return result


def failed() -> dict[str, Any]:
    """A run that ended before its first round."""
    result = sample(rounds=0)
    nothing = {"test": None, "baselines": None, "curves": None, "best_round": None, "rounds": [], "warnings": []}
    return {**result, **nothing, "status": "failed", "error": "2 of 5 sites answered, expected a quorum of 5."}


def partial() -> dict[str, Any]:
    """A run that missed contributions."""
    result = sample(rounds=6)
    result["config"]["training"]["rounds"] = 10
    return {**result, "status": "completed_partial"}


def unpretrained() -> dict[str, Any]:
    return {**sample(rounds=1), "weights": {"source": "none"}}


def crowd() -> dict[str, Any]:
    """Many sites, some without a defined AUC."""
    result = sample([f"site-{k}" for k in range(300)], rounds=2, test_images=12_480)
    for k in range(0, 300, 50):
        result["test"]["sites"][f"site-{k}"] = undefined(("normal", "pneumonia"), 7)
    return result


def private() -> dict[str, Any]:
    spent = {"epsilon": 2.9871, "delta": 1e-5, "noise_multiplier": 1.1, "sampling_rate": 0.05, "steps": 240}
    spent["planned_epsilon"] = 3.0
    result = sample(rounds=5)
    outside = ["Sizes are known <b>to the coordinator</b>."]
    return {
        **result,
        "privacy": {"unit": "patient", "outside": outside, "sites": dict.fromkeys(result["sites"], spent)},
    }


def swept() -> dict[str, Any]:
    """The result of several epsilons, one of which a site could not take."""
    points = [
        {
            "epsilon": epsilon,
            "folder": "none" if epsilon is None else f"epsilon-{epsilon:g}",
            "status": "completed",
            "federated": {"auc": auc, "auc_ci95": None if auc is None else [auc - 0.02, auc + 0.02], "accuracy": auc},
            "pooled": {"auc": 0.96, "auc_ci95": None, "accuracy": 0.9},
            "local": {"a": 0.8, "b": None, "c": 0.9},
        }
        for epsilon, auc in ((8.0, 0.93), (None, 0.95), (1.0, None), (3.0, 0.9))
    ]
    return {**private(), "sweep": points}


SAMPLES = {
    "plain": sample,
    "hostile": hostile,
    "blanked": blanked,
    "failed": failed,
    "partial": partial,
    "unpretrained": unpretrained,
    "crowd": crowd,
    "private": private,
    "swept": swept,
    "many labels": lambda: sample(labels=[f"finding {k}" for k in range(20)], test_images=3000, rounds=3),
    "three labels": lambda: sample(labels=("a", "b", "c"), rounds=200),
    "one site": lambda: sample(("alone",), rounds=1),
    "bare": lambda: {"schema": 1, "status": "failed"},
}


class Page(HTMLParser):
    """Collects what a reader sees and complains about tags that do not balance."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.first_in_body: list[str] = []
        self.feed(document)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), f"an attribute of <{tag}> is given twice"
        self.tags.append((tag, dict(attrs)))
        if self.open[-1:] == ["body"]:
            self.first_in_body.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "body" in self.open and not UNSEEN & set(self.open) and data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\u202f", "").split())

    @property
    def hints(self) -> list[str]:
        """Texts that show on pointing or are read aloud."""
        return [value or "" for _, attrs in self.tags for key, value in attrs.items() if key in {"title", "aria-label"}]


def read(result: Mapping[str, Any]) -> Page:
    return Page(render(result))


@pytest.fixture(scope="module", params=sorted(SAMPLES))
def each(request: pytest.FixtureRequest) -> tuple[str, Page, str]:
    document = render(SAMPLES[request.param]())
    return request.param, Page(document), document


def test_every_page_is_well_formed(each: tuple[str, Page, str]) -> None:
    _, page, document = each
    assert document.startswith("<!doctype html>\n")
    assert document.rstrip().endswith("</html>")
    assert {tag for tag, _ in page.tags} >= {"html", "head", "body", "main", "footer"}


def test_no_page_asks_for_anything(each: tuple[str, Page, str]) -> None:
    name, page, document = each
    for tag, attrs in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "action", "data"} & set(attrs), tag
        assert not [key for key in attrs if key.startswith("on")], tag
        assert tag not in {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    assert "@import" not in document
    assert "url(" not in document
    if name != "hostile":
        assert "http://" not in document
        assert "https://" not in document


def test_null_is_a_dash_everywhere(each: tuple[str, Page, str]) -> None:
    _, page, document = each
    for text in [page.text, *page.hints]:
        assert not re.search(r"\b(None|nan|NaN|null|inf|True|False|Undefined)\b", text)
    coordinates = re.findall(r' (?:d|x|y|x1|x2|y1|y2|cx|cy|r|width|height)="([^"]*)"', document)
    assert all(re.fullmatch(r"[-MLZ0-9. %e]*|device-width.*", value) for value in coordinates)


def test_every_figure_stays_inside_its_chart(each: tuple[str, Page, str]) -> None:
    _, page, _ = each
    lengths = [
        v
        for _, attrs in page.tags
        for k, v in attrs.items()
        if k in {"x", "cx", "x1", "x2", "width"} and (v or "").endswith("%")
    ]
    assert all(0 <= float((v or "").rstrip("%")) <= 100 for v in lengths)


def test_the_same_result_gives_the_same_bytes(each: tuple[str, Page, str]) -> None:
    name, _, document = each
    again = json.loads(json.dumps(SAMPLES[name]()))
    assert render(again) == document


def test_random_weights_are_announced_before_anything_else() -> None:
    page = read(unpretrained())
    assert page.first_in_body[0] == "p"
    assert page.texts[0] == "Random weights were used."


def test_trained_weights_are_not_announced_as_random() -> None:
    assert "Random weights" not in read(sample()).text


def test_hostile_names_are_text() -> None:
    document = render(hostile())
    page = Page(document)
    assert "<script" not in document
    assert "<img" not in document
    assert HOSTILE in page.texts
    assert "{{ 7*7 }}" in page.texts
    assert not {"\u202e", "\x00"} & set(document)


def test_unencodable_names_can_be_written(tmp_path: Path) -> None:
    write(sample(("a\ud800b",), rounds=1), tmp_path / "report.html")
    assert "a\ufffdb" in (tmp_path / "report.html").read_text("utf-8")


def test_the_verdict_says_the_figures_of_the_result() -> None:
    result = sample()
    text = read(result).text
    low, high = result["test"]["pooled"]["auc_ci95"]
    alone = [score["auc"] for score in result["baselines"]["local"].values()]
    assert (
        f"The federated model reaches AUC 0.961 (95 % interval {low:.3f} to {high:.3f}) on 624 test images of 5 sites; "
        f"single sites alone reach {min(alone):.3f} to {max(alone):.3f} (mean {fmean(alone):.3f}); "
        "pooling all data would give 0.965."
    ) in text
    for tile in ("AUC n 624 0.961", "Accuracy n 624 0.901", "Precision n 624 0.911", "Recall n 624 0.931"):
        assert tile in text
    assert "exact to ± 0.003" in text


def test_failed_and_partial_runs_say_so_first() -> None:
    assert (
        "Verdict This run failed after 0 rounds: 2 of 5 sites answered, expected a quorum of 5." in read(failed()).text
    )
    text = read(partial()).text
    assert "Verdict This run is complete only in part." in text
    assert "timeout (round 3)" in text


def test_the_chosen_round_is_marked() -> None:
    assert "best: round 8" in read(sample()).text


def test_a_round_judged_on_fewer_images_is_pointed_out() -> None:
    result = sample(rounds=2)
    assert "Not every round was judged" not in read(result).text
    result["rounds"][0]["validation"]["examples"] -= 9
    assert "Not every round was judged" in read(result).text


def test_without_a_pooled_baseline_there_is_no_column_for_it() -> None:
    assert "All data pooled, n 624" in read(sample()).text
    text = read({**sample(), "baselines": None}).text
    assert "pooled, n" not in text
    assert "All data pooled" not in text


def test_a_gain_is_coloured_only_where_the_intervals_lie_apart() -> None:
    def tones(interval: list[float]) -> list[str]:
        result = sample(("a",), rounds=1)
        result["test"]["pooled"] |= {"auc_ci95": [0.95, 0.97]}
        result["baselines"]["local"]["a"] |= {"auc_ci95": interval}
        return [attrs["class"] or "" for _, attrs in read(result).tags if attrs.get("data-name") == "Gain"]

    assert tones([0.90, 0.92]) == ["r up"]
    assert tones([0.94, 0.96]) == ["r "]
    assert tones([0.98, 0.99]) == ["r down"]


def test_every_site_has_its_row_in_natural_order() -> None:
    page = read(crowd())
    shown = [text for text in page.texts if re.fullmatch(r"site-\d+", text)]
    assert shown == [f"site-{k}" for k in range(300)]
    assert "n 300 of 300 sites" in page.text
    assert "n 294 of 300 sites" in page.text


def test_the_configuration_is_printed_in_full() -> None:
    text = read(sample()).text
    for said in (
        "options.nested.depth 2",
        "lr 0.003",
        "delta 1e-05",
        "local_steps –",
        "9f2c4be1" * 8,
        "a7d1" * 16,
        "seed 0",
    ):
        assert said in text


def test_privacy_is_shown_as_spent() -> None:
    text = read(private()).text
    assert "One unit is one patient. The largest ε of a site is 2.988: sites have patients of their own" in text
    assert "berlin 2.988 3.000 1e-05 1.1 0.05 240" in text


def test_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write(sample(), path)
    assert path.read_text("utf-8") == render(sample())
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UsageError, match="expected 1"):
        write({"schema": 2}, path)
    assert path.read_text() == "old"
    with pytest.raises(OSError):
        write(sample(), tmp_path / "missing" / "report.html")


def test_the_result_is_left_as_it_was() -> None:
    result = blanked()
    before = copy.deepcopy(result)
    render(result)
    assert result == before


SMALL = sample(("a", "b"), rounds=1)
WHOLE = {"schema", "round", "warnings", "roc", "reliability", "transfers"}  # what is in there is never null


@st.composite
def incomplete(draw: st.DrawFn) -> dict[str, Any]:
    """A result in which a few figures or groups, at any depth, are null or missing."""
    result = copy.deepcopy(SMALL)
    for _ in range(draw(st.integers(1, 4))):
        place: Any = result
        while isinstance(place, dict) and (keys := sorted(set(place) - WHOLE)):
            group, key = place, draw(st.sampled_from(keys))
            place = group[key]
            if draw(st.integers(0, 2)) == 0:
                break
            if isinstance(place, list) and place and isinstance(place[0], dict):
                place = draw(st.sampled_from(place))
        if draw(st.booleans()):
            group[key] = None
        else:
            del group[key]
    return result


@settings(max_examples=60, deadline=None)
@given(incomplete())
def test_any_figure_or_group_may_be_null_or_missing(result: dict[str, Any]) -> None:
    assert not re.search(r"\b(None|nan|Undefined)\b", read(result).text)


# Several labels an image


def several(labels: Sequence[str] = ("mass", "effusion", "nodule"), hidden: str = "nodule") -> dict[str, Any]:
    """A result with several labels an image, one of which nobody annotated in the test split."""
    found = sample(labels=labels)
    found["config"]["task"] = {"name": "chest", "labels": list(labels), "kind": "multi-label"}
    pooled = found["test"]["pooled"]
    pooled["operating_point"] = None
    for place, (label, figures) in enumerate(pooled["per_class"].items()):
        point = {"threshold": 0.3 + 0.1 * place, "precision": 0.7, "recall": 0.8, "specificity": 0.9}
        figures |= {"annotated": 500 - place, "auc_ci95": [0.81, 0.93], "operating_point": point}
        if label == hidden:
            pooled["support"][label] = 0
            figures |= dict.fromkeys(figures) | {"annotated": 0}
    return found


def test_the_page_of_several_labels_tells_each_with_its_annotations_and_operating_point() -> None:
    page = " ".join(re.sub(r"<[^>]+>", " ", render(several())).split())
    assert "Label Present Annotated AUC Precision Recall Specificity F1 AUC, 95 % interval" in page
    assert "Each label at its operating point, frozen on validation Label Threshold" in page
    assert "mean over 3 labels" in page and "annotations, those of all labels together" in page
    assert "0.810 to 0.930" in page.replace("\N{NO-BREAK SPACE}", " ")
    assert 'title="undefined: not annotated in any image"' in render(several())


def test_two_labels_an_image_are_not_taken_for_one_of_two() -> None:
    found = several(("mass", "effusion"), hidden="")
    page = render(found)
    assert "mean over 2 labels" in page and "of label “" not in page
    found["sites"]["berlin"]["labels"] = {"mass": 30, "effusion": 0}
    assert "of one label only" not in render(found)
    found["config"]["task"]["kind"] = "single-label"
    assert "of one label only" in render(found)
