"""A small real federation: three hospitals with pictures of blobs, a real backbone with random weights, no network.

And, for what a hospital does alone, a ward: files on disk, a table of labels, a site.toml.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import io
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.primitives.asymmetric import private_key_to_bytes, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from PIL import Image

from client import catalogue, intake
from client.app import make_app as make_client_app
from client.cohort import SPLITS, Cohort
from client.findings import FileFinding, Findings, Warned
from client.pool import Read
from client.records import RECORD, unpack
from client.site_config import SiteConfig, read_site
from client.worker import look
from client.workshop import Workshop
from common import checkpoint, model
from common.model import Built
from common.run_config import RunConfig
from server.app import make_app as make_server_app
from server.company import Start
from server.control import Control
from server.coordinator import Coordinator, Outcome
from server.endpoints import Endpoints
from server.federation import Federation
from simulations import encodings
from simulations.grid import Fault, InProcessGrid, run_in_process
from simulations.hospitals import open_in_process
from tests.fault_report import (  # noqa: F401  hooks of pytest
    fault_seed,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_terminal_summary,
)

SIDE = 32
SITES = ("north", "south", "west")
LABELS = ("dark", "bright")
FINDINGS = ("glow", "third")
# Examples by site: (train, validation, test); labels alternate.
SIZES = {"north": (16, 10, 10), "south": (24, 10, 10), "west": (8, 10, 10)}


class Grids:
    """The grids that tests look through."""

    class Recording(InProcessGrid):
        """Remembers every message that was pushed."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.sent: list[Message] = []

        def push_messages(self, messages: Any) -> Any:
            listed = list(messages)
            self.sent.extend(listed)
            return super().push_messages(listed)

        def of_kind(self, kind: str) -> list[tuple[str, RecordDict]]:
            """Return (site, content) of the messages of one type, in the order they were sent."""
            return [
                (self._sites[message.metadata.dst_node_id], message.content)
                for message in self.sent
                if message.metadata.message_type == kind
            ]

    class Shuffled(InProcessGrid):
        """Lets answers arrive in another order each time."""

        def __init__(self, *args: Any, order: int = 1, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._random = np.random.default_rng(order)

        def pull_messages(self, message_ids: Any) -> Any:
            wanted = list(message_ids)
            return super().pull_messages([wanted[place] for place in self._random.permutation(len(wanted))])


def _blobs(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return grey images (n, 1, 32, 32) of one blob each, whose brightness tells the label, most of the time."""
    random = np.random.default_rng(seed)
    grid = np.arange(SIDE)
    centres = random.uniform(10, 22, (len(labels), 2))
    distance = (grid[:, None] - centres[:, 0, None, None]) ** 2 + (grid[None, :] - centres[:, 1, None, None]) ** 2
    level = np.where(labels == 0, 80.0, 150.0) + random.normal(0, 45, len(labels))
    noise = random.normal(0, 25, (len(labels), SIDE, SIDE))
    images = 60 + level[:, None, None] * np.exp(-distance / 40) + noise
    return images.clip(0, 255).astype(np.uint8)[:, None]


def _pool() -> tuple[Cohort, dict[str, Any]]:
    """Return all examples, two to a patient, and each site's rows."""
    splits = np.concatenate([np.repeat(np.arange(3), counts) for counts in SIZES.values()])
    given = np.arange(len(splits)) % len(LABELS)
    images = _blobs(given, seed=0)
    digests = np.frombuffer(b"".join(hashlib.sha256(image).digest() for image in images), np.uint8).reshape(-1, 32)
    ends = np.cumsum([sum(counts) for counts in SIZES.values()])
    parts = dict(zip(SIZES, np.split(np.arange(len(images)), ends[:-1]), strict=True))
    pool = Cohort(
        source=lambda rows: images[rows],
        rows=np.arange(len(images)),
        digests=digests,
        labels=given,
        splits=splits.astype(np.int8),
        patients=np.arange(len(images)) // 2,
        label_names=LABELS,
        preprocessing="blobs",
    )
    return pool, parts


@dataclass
class Lab:
    """Builds runs, sites and federations; models and features are made once and shared."""

    cache: Path
    scratch: Callable[[], Path]
    pool: Cohort
    parts: dict[str, Any]
    grids: type[Grids] = Grids
    _built: dict[str, tuple[Built, bytes, dict[str, Any]]] = field(default_factory=dict)

    def other_cohorts(self, sizes: Mapping[str, Sequence[int]], labels: tuple[str, ...] = LABELS) -> dict[str, Cohort]:
        """Return sites of other sizes, dealt from the same images; with more than two labels these mean nothing."""
        splits = np.concatenate([np.repeat(np.arange(3), counts) for counts in sizes.values()]).astype(np.int8)
        dealt = replace(
            self.pool.subset(np.arange(len(splits))),
            splits=splits,
            labels=np.arange(len(splits)) % len(labels),
            label_names=labels,
        )
        ends = np.cumsum([sum(counts) for counts in sizes.values()])[:-1]
        parts = np.split(np.arange(len(splits)), ends)
        return {name: dealt.subset(part) for name, part in zip(sizes, parts, strict=True)}

    def clinics(self, masked: str = "") -> dict[str, Cohort]:
        """Return the sites with two findings an image, one told by brightness; `masked` never annotated the second.

        Of each site some annotations are open, some uncertain.
        """
        rows = np.arange(len(self.pool))
        labels = np.stack([self.pool.labels, rows % 3 == 0], axis=1).astype(np.float32)
        labels[rows % 11 == 5, 0] = np.nan
        labels[rows % 13 == 6, 1] = 0.5
        if masked:
            labels[self.parts[masked], 1] = np.nan
        several = replace(self.pool, labels=labels, label_names=FINDINGS)
        return {name: several.subset(self.parts[name]) for name in SITES}

    def cohorts(self, *names: str) -> dict[str, Cohort]:
        """Return the cohorts of some sites, of all by default."""
        return {name: self.pool.subset(self.parts[name]) for name in names or SITES}

    def plan(self, names: Sequence[str] = SITES, **sections: Any) -> RunConfig:
        """Return a run that is not resolved yet; values given win over a quick default."""
        values: dict[str, Any] = {
            "task": {"name": "blobs", "labels": LABELS},
            "data": {"preset": "generic", "image_size": SIDE, "views": 1, "preprocessing": "blobs"},
            "model": {"backbone": "test_efficientnet", "weights": "none", "ridge": (1.0,)},
            "training": {"rounds": 3, "local_epochs": 1, "batch_size": 8, "lr": 0.01},
            "sites": {"names": tuple(names), "quorum": len(names), "deadline_s": 30.0},
        }
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes} if isinstance(changes, Mapping) else changes
        return RunConfig.model_validate(values)

    def build(self, plan: RunConfig) -> tuple[Built, bytes, dict[str, Any]]:
        """Return model, trunk content and first weights."""
        key = repr((plan.model, plan.data.image_size, len(plan.task.labels), plan.seed))
        if key not in self._built:
            built = model.pretrained(plan)
            self._built[key] = (built, model.frozen_content(built, plan), model.trainable_values(built.upper))
        return self._built[key]

    def start(self, folder: Path | None = None, names: Sequence[str] = SITES, **sections: Any) -> Start:
        """Return what a coordinator starts with."""
        plan = self.plan(names, **sections)
        _, trunk, weights = self.build(plan)
        resolved = plan.model.model_copy(update={"trunk_sha256": checkpoint.sha256(trunk)})
        stages = self.build(plan)[0].upper.head.stages
        return Start(plan.model_copy(update={"model": resolved}), trunk, weights, folder, stages=stages)

    def workshop(self, start: Start) -> Workshop:
        """Return a workshop that need not build the run's model again."""
        workshop = Workshop(self.cache, "cpu")
        workshop.lend(start.run.fingerprint(), self.build(start.run)[0])
        return workshop

    def client(
        self, start: Start, cohorts: Mapping[str, Cohort] | None = None, memory: Path | None = None
    ) -> ClientApp:
        """Return the app of real sites; by default they remember nothing of earlier runs."""
        cohorts = self.cohorts() if cohorts is None else cohorts
        return make_client_app(open_in_process(cohorts, self.workshop(start), memory or self.scratch()))

    def grid(
        self,
        start: Start,
        cohorts: Mapping[str, Cohort] | None = None,
        faults: Sequence[str] = (),
        memory: Path | None = None,
        kind: type[InProcessGrid] = InProcessGrid,
        **options: Any,
    ) -> Any:
        """Return a grid over real sites."""
        cohorts = self.cohorts() if cohorts is None else cohorts
        app = self.client(start, cohorts, memory)
        return kind(app, list(cohorts), [Fault.parse(fault) for fault in faults], memory, **options)

    def execute(self, start: Start, grid: Any = None, cast: Any = None) -> Outcome:
        """Run the coordinator inside a true ServerApp."""
        outcomes: list[Outcome] = []

        def coordinate(connected: Any) -> None:
            federation = Federation(connected, start.run.sites.deadline_s)
            outcomes.append(Coordinator(federation, start, cast=cast).execute())

        run_in_process(make_server_app(coordinate), grid if grid is not None else self.grid(start))
        return outcomes[0]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.set_num_threads(1)
    return Lab(
        tmp_path_factory.mktemp("cache"),
        lambda: tmp_path_factory.mktemp("memory"),
        *_pool(),
    )


@pytest.fixture(scope="session")
def outcome(lab: Lab) -> Outcome:
    """One run that went well: three sites, three rounds."""
    return lab.execute(lab.start())


@pytest.fixture(scope="session")
def grid_identity() -> None:
    """Let messages be made: a grid of the process sets what Flower's messages read."""
    InProcessGrid(ClientApp(), [])


@pytest.fixture(scope="session")
def findings() -> Callable[..., Any]:
    """Return a maker of what an examination found at one hospital; what is given wins."""

    def make(**changes: Any) -> Findings:
        images = np.random.default_rng(3).integers(0, 256, (9, 1, SIDE, SIDE), np.uint8)
        values: dict[str, Any] = {
            "site": "st-anna",
            "examples": {"train": 700, "validation": 150, "test": 151},
            "patients": 812,
            "labels": {
                "train": {"normal": 500, "pneumonia": 200},
                "validation": {"normal": 100, "pneumonia": 50},
                "test": {"normal": 101, "pneumonia": 50},
            },
            "quarantine": {"damaged": 2, "no_pixels": 11},
            "ignored": {"report": 40, "hidden": 1},
            "modalities": {"DX": 900, "CR": 101},
            "views": {"PA": 800, "AP": 201},
            "devices": {"GE 3f2a": 700, "Siemens 91bc": 301},
            "transfer_syntaxes": {"JPEG 2000": 900, "Explicit VR Little Endian": 101},
            "months": (201903, 202411),
            "burned_in": {"yes": 3, "no": 900, "unknown": 98},
            "files_without_label": 7,
            "rows_without_file": 5,
            "rows": 1013,
            "key": "SOPInstanceUID",
            "decode": {"JPEG 2000": (900, 45.0), "Explicit VR Little Endian": (101, 0.6)},
            "confounding": (("pneumonia", "device", 0.31, 1001), ("pneumonia", "view", 0.72, 1001)),
            "near_duplicates": 4,
            "duplicates": 6,
            "warnings": (Warned("confounding", "view tells pneumonia"), Warned("burned_in", "3 images hold text")),
            "manifest_sha256": "ab" * 32,
            "preprocessing_id": "0123456789abcdef",
            "preset": "chest-xray",
            "image_size": 224,
            "seconds": 61.2,
            "from_cache": 12,
            "sheet": images,
            "sheet_labels": ("normal", "pneumonia") * 4 + ("normal",),
            "files": (
                FileFinding("a/1.dcm", "accepted", pixel_sha256="cd" * 32),
                FileFinding("a/2.dcm", "quarantined", "damaged"),
                FileFinding("b/report.dcm", "ignored", "report"),
            ),
        }
        return Findings(**{**values, **changes})

    return make


# ---------------------------------------------------------------------------------------------- a hospital's own data


def scan(seed: int, rows: int = 64, columns: int = 56, bits: int = 12) -> np.ndarray:
    """Return a grey picture (rows, columns) unlike that of any other seed: soft blots, and a little noise."""
    random = np.random.default_rng(seed)
    knots = Image.fromarray(random.uniform(0.1, 0.9, (6, 6)).astype(np.float32))
    plane = np.asarray(knots.resize((columns, rows), Image.Resampling.BICUBIC)) + random.normal(
        0, 0.01, (rows, columns)
    )
    top = 2**bits - 1
    return np.asarray(np.clip(plane * top, 0, top), np.uint8 if bits <= 8 else np.uint16)


class InProcess:
    """Reads files as a decoding process does, without starting one: for tests that read many times."""

    def __init__(self, task: Any, workers: int | None = None) -> None:
        self._task = task

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""

    def read(self, paths: Sequence[Path]) -> Any:
        shape = {"grey": (1, self._task.size, self._task.size), "colour": (3, self._task.size, self._task.size)}
        for number, path in enumerate(paths):
            record, pixels = look(path, self._task, io.BytesIO())
            entry = unpack(np.frombuffer(record, RECORD)[0])
            image = np.frombuffer(pixels, np.uint8).reshape(shape[entry.kind]) if pixels else None
            yield Read(number, entry, image)


@dataclass
class Ward:
    """A hospital on disk: images, a table of labels, a site.toml and, once it was looked at, a state."""

    folder: Path
    secret: bytes = b"s" * 32

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def dicom(self, name: str, pixels: Any, syntax: str = "raw", bits: int = 12, **elements: Any) -> Path:
        """Write one DICOM file; numbers stand for the pictures of `scan`."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = scan(pixels, bits=bits) if isinstance(pixels, int) else pixels
        return encodings.write(path, drawn, bits, encodings.SYNTAXES[syntax], **elements)

    def picture(self, name: str, pixels: Any, **options: Any) -> Path:
        """Write a PNG, JPEG or TIFF."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = scan(pixels, bits=8) if isinstance(pixels, int) else pixels
        Image.fromarray(drawn).save(path, **options)
        return path

    def table(self, rows: Sequence[Mapping[str, object]], name: str = "labels.csv") -> Path:
        """Write a table of labels."""
        with (self.folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return self.folder / name

    def site(self, **data: Any) -> SiteConfig:
        """Write site.toml, with these keys of [data], and return it; the state is made if there is none."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        labels = {"labels": "labels.csv"} if (self.folder / "labels.csv").exists() else {}
        values = {"images": "images", "image_size": SIDE, **labels, **data}
        whole = {"site": {"name": "st-anna"}, "data": values, "compute": {"threads": 1}}
        (self.folder / "site.toml").write_text(tomli_w.dumps(whole), encoding="utf-8")
        if not self.state.exists():
            self.state.mkdir(mode=0o700)
            secret = self.state / "secret"
            secret.touch(mode=0o600)
            secret.write_bytes(self.secret)
        return read_site(self.folder / "site.toml")

    def take_in(self, **data: Any) -> Any:
        """Return the decided data."""
        return intake.take_in(self.site(**data), lambda *_: None)

    def examine(self, **data: Any) -> Findings:
        """Return what is found."""
        return intake.examine(self.site(**data), lambda *_: None)

    def outcomes(self, **data: Any) -> dict[str, tuple[str, str]]:
        """Return path -> status and code."""
        return {file.path: (file.status, file.code) for file in self.examine(**data).files}

    def splits(self, **data: Any) -> dict[str, str]:
        """Return path -> split of the images in use."""
        taken = self.take_in(**data)
        paths = [taken.gathered.found.paths[place] for place in taken.places.tolist()]
        return {path: SPLITS[split] for path, split in zip(paths, taken.splits.tolist(), strict=True)}


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ward:
    """A hospital whose files are read within this process."""
    monkeypatch.setattr(catalogue, "Pool", InProcess)
    (tmp_path / "images").mkdir()
    return Ward(tmp_path)


@pytest.fixture
def wards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ward]:
    """Return a maker of further hospitals, by name."""
    monkeypatch.setattr(catalogue, "Pool", InProcess)

    def make(name: str, secret: bytes = b"s" * 32) -> Ward:
        (tmp_path / name / "images").mkdir(parents=True)
        return Ward(tmp_path / name, secret)

    return make


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def write_certificate(certificate: Path, private_key: Path) -> None:
    """Write a certificate of 127.0.0.1 that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    private_key.write_bytes(private_key_to_bytes(key))


class SuperLink:
    """The coordinator's SuperLink in a process of its own, and the endpoints that lead to it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        names = ("superlink.db", "superexec.secret", "operator.secret", "server.pem", "server.key")
        self.endpoints = Endpoints(
            *(folder / name for name in names), listen=f"127.0.0.1:{free_port()}", operator_port=free_port()
        )
        self.endpoints = replace(self.endpoints, **changes)
        for path in (self.endpoints.superexec_secret, self.endpoints.operator_secret):
            path.write_bytes(os.urandom(32))
            path.chmod(0o600)
        write_certificate(self.endpoints.certificate, self.endpoints.private_key)
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, **options: Any) -> subprocess.Popen[bytes]:
        """Start the process; it may not answer yet."""
        file = self.folder / "endpoints.json"
        self.endpoints.write(file)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        command = [sys.executable, "-P", "-m", "server.superlink", str(file)]
        return subprocess.Popen(command, env=environment, **options)

    def start(self) -> SuperLink:
        """Start the process and wait until it answers."""
        self.process = self.launch()
        with Control(self.endpoints) as control:
            end = time.monotonic() + 60
            while not control.is_up():
                assert self.process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        return self

    def end(self, number: int = signal.SIGTERM) -> int:
        """End the process and return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(10)


class Link:
    """A hospital's end: Flower's own client and its own signature."""

    def __init__(self, address: str, root: Path | None, key: ec.EllipticCurvePrivateKey | None = None) -> None:
        self.key = key or ec.generate_private_key(ec.SECP384R1())
        self.node = Node()
        self.client = FleetHttpClient.from_server_address(
            address,
            root is None,
            None if root is None else root.read_bytes(),
            interceptors=[NodeAuthHttpInterceptor(self.key, self.key.public_key())],
        )

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    @property
    def public_key(self) -> str:
        """In OpenSSH form."""
        form = serialization.PublicFormat.OpenSSH
        return self.key.public_key().public_bytes(serialization.Encoding.OpenSSH, form).decode()

    def activate(self) -> int:
        """Come online and return the node's number."""
        request = ActivateNodeRequest(public_key=public_key_to_bytes(self.key.public_key()), heartbeat_interval=30)
        self.node = Node(node_id=self.client.ActivateNode(request).node_id)
        return self.node.node_id

    def answer(self, reply: Callable[[Message], RecordDict]) -> bool:
        """Answer a waiting message, as Flower's SuperNode does; False where none waits."""
        pulled = self.client.PullMessages(PullMessagesRequest(node=self.node))
        if not pulled.messages_list:
            return False
        meta = message_from_proto(pulled.messages_list[0]).metadata
        ids = [tree.object_id for tree in iterate_object_tree(pulled.message_object_trees[0])]
        contents = pull_objects(ids, make_pull_object_fn_protobuf(self.client.PullObject, self.node, meta.run_id))
        received = ConfirmMessageReceivedRequest(node=self.node, run_id=meta.run_id, message_object_id=meta.message_id)
        self.client.ConfirmMessageReceived(received)
        message = inflate_object_from_contents(meta.message_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = meta.message_id
        self._push(Message(reply(message), reply_to=message))
        return True

    def _push(self, answer: Message) -> None:
        with no_object_id_recompute():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            bare = message_to_proto(remove_content_from_message(answer))
            pushed = self.client.PushMessages(
                PushMessagesRequest(
                    node=self.node,
                    messages_list=[bare],
                    message_object_trees=[get_object_tree(answer)],
                    clientapp_runtime_list=[0.0],
                )
            )
            run_id = answer.metadata.run_id
            push = make_push_object_fn_protobuf(self.client.PushObject, self.node, run_id, pushed.session_id)
            push_objects(get_all_nested_objects(answer), push, object_ids_to_push=set(pushed.objects_to_push))


@pytest.fixture
def superlinks(tmp_path: Path) -> Iterator[Callable[..., SuperLink]]:
    """Return a maker of SuperLinks that are gone after the test."""
    made: list[SuperLink] = []

    def make(**changes: Any) -> SuperLink:
        folder = tmp_path / f"coordinator-{len(made)}"
        folder.mkdir()
        made.append(SuperLink(folder, **changes))
        return made[-1]

    yield make
    for superlink in made:
        if superlink.process is not None and superlink.process.poll() is None:
            superlink.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """A SuperLink that the tests of a module share."""
    running = SuperLink(tmp_path_factory.mktemp("coordinator")).start()
    yield running
    assert running.end() == 0


@pytest.fixture(scope="module")
def superlink_behind_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """A SuperLink that leaves TLS to a proxy."""
    running = SuperLink(tmp_path_factory.mktemp("coordinator"), tls=False).start()
    yield running
    assert running.end() == 0


@pytest.fixture
def links() -> Iterator[Callable[..., Link]]:
    """Return a maker of hospitals' ends at a SuperLink's public listener."""
    with contextlib.ExitStack() as stack:

        def make(superlink: SuperLink, **options: Any) -> Link:
            endpoints = superlink.endpoints
            root = endpoints.certificate if endpoints.tls else None
            return stack.enter_context(Link(**{"address": endpoints.listen, "root": root, **options}))

        yield make
