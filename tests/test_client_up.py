"""A whole site, as a hospital runs it: the command, its two processes, and a true SuperLink over TLS."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from common.messages import REFUSALS, Describe, to_record, unpacked

ROOT = Path(__file__).parent.parent


def _sibling() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "link_against_superlink", Path(__file__).with_name("test_client_link.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def consilium(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    code = "from common.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, **options)


def standing(path: Path) -> tuple[int, dict[str, Any]]:
    process = consilium("site", "status", str(path), "--json")
    out, err = process.communicate(timeout=60)
    assert out, err
    return process.returncode, json.loads(out)


@pytest.mark.slow
def test_a_site_is_up_survives_and_goes_down(tmp_path: Path) -> None:
    helpers = _sibling()
    superlink = helpers.SuperLink(tmp_path)
    superlink.start()
    running = None
    try:
        key = ec.generate_private_key(ec.SECP384R1())
        node = superlink.register(key)
        settings = helpers.make_settings(tmp_path / "link", superlink, key)
        generator = np.random.default_rng(0)
        for label in ("no", "yes"):
            (tmp_path / "images" / label).mkdir(parents=True)
            for number in range(12):
                values = generator.integers(0, 255, (32, 32), dtype=np.uint8)
                Image.fromarray(values).save(tmp_path / "images" / label / f"{number}.png")
        path = tmp_path / "site.toml"
        path.write_text(
            '[site]\nname = "st-anna"\n[data]\nimages = "images"\n'
            f'[coordinator]\naddress = "{superlink.address}"\n'
            'ca_certificate = "link/ca.pem"\nprivate_key = "link/node.key"\n'
        )
        checked = consilium("site", "check", str(path))
        _, said = checked.communicate(timeout=120)
        assert checked.returncode == 0, said

        running = consilium("site", "up", str(path))
        helpers.until(helpers.says(settings, "connected"), 30)

        def healthy() -> bool:
            code, found = standing(path)
            return code == 0 and found["daemon"]["state"] == "ready"

        helpers.until(healthy, 60)
        with superlink.grid() as grid:
            reply, seconds = helpers.ask(grid, node, "query.describe", to_record(Describe("no toml")))
            assert unpacked(reply.content)["facts"]["refused"] in REFUSALS
            assert seconds < 5
            _, found = standing(path)
            for name in ("link", "daemon"):
                os.kill(found["supervisor"]["children"][name]["pid"], signal.SIGKILL)
            begin = time.monotonic()
            reply, _ = helpers.ask(grid, node, "query.describe", to_record(Describe("no toml")), 30)
            assert reply.has_content()
            assert time.monotonic() - begin < 15
        second = consilium("site", "up", str(path))
        assert "runs already, as process" in second.communicate(timeout=60)[1]
        assert second.returncode == 1
        _, found = standing(path)
        running.send_signal(signal.SIGTERM)
        assert running.wait(15) == 0
        for child in found["supervisor"]["children"].values():
            assert not Path(f"/proc/{child['pid']}").exists()
        code, found = standing(path)
        assert code == 1
        assert {finding["about"] for finding in found["findings"] if finding["level"] == "wrong"} == {"daemon", "link"}
    finally:
        if running is not None:
            running.kill()
            running.communicate()
        superlink.stop()
