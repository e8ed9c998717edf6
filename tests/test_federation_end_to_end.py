"""docs/federation.md, made true: its commands run in their order, with a real coordinator and two real hospitals."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.link_status import WORDS
from client.site_config import parse_site
from common.messages import REFUSALS
from common.run_config import build
from server.server_config import parse_server

ROOT = Path(__file__).parents[1]
MANUAL = ROOT / "docs" / "federation.md"
SCRIPT = "from common.cli import main; main()"
ADDRESS = "coordinator.example.org:9443"
PATIENCE_S = 300.0


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Return the code blocks of these languages, in their order: language and content."""
    return re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```$", MANUAL.read_text(), flags=re.MULTILINE | re.DOTALL)


def run_toml() -> str:
    return next(content for _, content in blocks("toml") if "[task]" in content)


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table of a section."""
    section = MANUAL.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [[code.strip("`"), *others] for code, *others in rows]


# ------------------------------------------------------------------------------------------------------ what it lists


def test_the_refusals_are_those_of_the_code() -> None:
    assert tuple(row[0] for row in table("What a site refuses")) == REFUSALS


def test_the_states_of_a_link_are_those_of_the_code() -> None:
    listed = [[code, words.state, words.sentence] for code, words in WORDS.items()]
    assert table("What a link says") == listed


def test_the_examples_are_read() -> None:
    examples = [tomllib.loads(content) for _, content in blocks("toml")]
    runs = [build(example, "run.toml") for example in examples if "task" in example]
    servers = [parse_server(example, "server.toml") for example in examples if "server" in example]
    sites = [parse_site(example, "site.toml") for example in examples if "site" in example]
    assert [len(runs), len(servers), len(sites)] == [1, 2, 1]
    assert runs[0].sites.quorum == 2 and sites[0].policy.max_rounds == 200
    assert [one.network.tls for one in servers] == ["direct", "proxy"]


# ------------------------------------------------------------------------------------------------- what it says to do


def picture_folder(folder: Path, seed: int) -> None:
    """Write 24 images whose stripes lie or stand, and their table beside them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    wave = (np.sin(np.arange(48) * 1.1) * 60 + 120)[None, :].repeat(48, 0)
    rows = []
    for number in range(24):
        image = (wave if number % 2 else wave.T) + rng.normal(0, 25, (48, 48))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        rows.append((f"{number}.png", ("normal", "effusion")[number % 2]))
    with folder.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


class Folder:
    """Where the manual's commands are run, with its address and its /data replaced by what is here."""

    def __init__(self, folder: Path) -> None:
        self.port, self.operator_port = free_ports(2)
        self.data, self.work = folder / "data", folder / "work"
        self.work.mkdir()
        shims = folder / "bin"
        shims.mkdir()
        (shims / "consilium").write_text(f"#!/bin/sh\nexec {sys.executable} -P -c '{SCRIPT}' \"$@\"\n")
        (shims / "consilium").chmod(0o755)
        self.environment = {
            "PATH": f"{shims}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "COLUMNS": "200",
        }

    def here(self, text: str) -> str:
        return text.replace(ADDRESS, f"127.0.0.1:{self.port}").replace("/data/", f"{self.data}/")

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", self.here(command)],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def move_operator(self) -> None:
        """Give the operator's listener a port that nobody has."""
        path = self.work / "chest" / "server.toml"
        text, count = re.subn(r"(?m)^operator_port = .*$", f"operator_port = {self.operator_port}", path.read_text())
        assert count == 1
        path.write_text(text)

    @contextmanager
    def running(self, command: str) -> Iterator[None]:
        """Run a command in the background, from when it is up until the end of the block."""
        with (self.work / "up.log").open("ab") as log:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {self.here(command)}"],
                cwd=self.work,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.await_up(command, process)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
        assert code == 0, (self.work / "up.log").read_text()

    def await_up(self, command: str, process: subprocess.Popen[bytes]) -> None:
        question = command.replace(" up ", " status ")
        end = time.monotonic() + PATIENCE_S
        while self.run(question).returncode != 0:
            assert process.poll() is None and time.monotonic() < end, (self.work / "up.log").read_text()
            time.sleep(0.5)


def require_output(expected: str, printed: str) -> None:
    """Check that the lines of an example are printed in their order; … stands for anything."""
    place = 0
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for wanted in (" ".join(line.split()) for line in expected.splitlines()):
        pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
        found = next((n for n in range(place, len(lines)) if pattern.fullmatch(lines[n])), None)
        assert found is not None, f"{wanted!r} is not in:\n{printed}"
        place = found + 1


@pytest.mark.slow
def test_the_first_federation_of_the_manual() -> None:
    """Every command of the manual, in its order; what it shows of an output is what the commands before it print."""
    with tempfile.TemporaryDirectory(prefix="manual-") as place:  # short: the path of a socket has 107 bytes
        run_the_manual(Folder(Path(place)))


def run_the_manual(folder: Folder) -> None:
    picture_folder(folder.data / "chest", 0)
    picture_folder(folder.data / "chest-2", 1)
    short = (
        run_toml()
        .replace("rounds = 20", "rounds = 1")
        .replace("views = 2", "views = 1")
        .replace('init = "analytic"', 'init = "zero"')
    )
    (folder.work / "chest.toml").write_text(short)
    seen: list[str] = []
    printed = ""
    with ExitStack() as stack:
        for language, content in blocks("sh", "text"):
            if language == "text":
                require_output(folder.here(content), printed)
                continue
            printed = ""
            for command in content.splitlines():
                seen.append(command)
                if re.match(r"consilium (server|site) up ", command):
                    stack.enter_context(folder.running(command))
                    continue
                done = folder.run(command)
                assert done.returncode == 0, (command, done.stdout, done.stderr)
                printed += done.stdout
                if " server init " in command:
                    folder.move_operator()
    runs = sorted((folder.work / "chest" / "runs").iterdir())
    assert [json.loads((run / "result.json").read_text())["status"] for run in runs] == ["completed"] * 2
    models = [(run / "model/upper.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1], "a run that was stopped and resumed ends with the bytes of one that was not"
    assert sum(" up " in command for command in seen) == 3
