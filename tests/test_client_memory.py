"""What a site keeps of a run: it survives a restart, belongs to one run, and is taken for whole only when it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client.memory import Memory
from common import checkpoint
from common.messages import Freeze

CONTENT = checkpoint.to_bytes({"trunk.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})
SHA256 = checkpoint.sha256(CONTENT)
FREEZE = Freeze("print", np.array([0.1, -2.0], np.float32), np.array([1.0, 3.0], np.float32), np.array([0.5, 1.5]))


def full(root: Path, site: str = "north") -> Memory:
    memory = Memory.at(root, site)
    memory.remember_run("seed = 1\n")
    memory.remember_trunk(SHA256, CONTENT)
    memory.remember_frozen(FREEZE)
    return memory


def test_a_fresh_memory_is_empty(tmp_path: Path) -> None:
    memory = Memory.at(tmp_path, "north")
    assert (memory.run(), memory.trunk(), memory.trunk_content(), memory.frozen()) == (None, "", None, None)


def test_a_restart_keeps_run_trunk_and_standardiser(tmp_path: Path) -> None:
    given = full(tmp_path).frozen()
    memory = Memory.at(tmp_path, "north")
    assert (memory.run(), memory.trunk(), memory.trunk_content()) == ("seed = 1\n", SHA256, CONTENT)
    frozen = memory.frozen()
    assert frozen is not None
    assert given is not None
    assert frozen.keys() == given.keys() == {"mean", "scale", "class_weights", "lr"}
    for name, value in frozen.items():
        sent = getattr(FREEZE, name)
        assert value.dtype == sent.dtype
        np.testing.assert_array_equal(value, sent)


def test_what_is_remembered_is_returned_as_it_will_be_read(tmp_path: Path) -> None:
    memory = full(tmp_path)
    given, read = memory.remember_frozen(FREEZE), memory.frozen()
    assert read is not None
    assert all(given[name].tobytes() == read[name].tobytes() for name in given)


def test_a_new_run_forgets_what_belonged_to_the_one_before(tmp_path: Path) -> None:
    memory = full(tmp_path)
    memory.remember_run("seed = 2\n")
    assert (memory.run(), memory.trunk(), memory.trunk_content(), memory.frozen()) == ("seed = 2\n", "", None, None)


def test_sites_of_one_folder_share_trunks_and_nothing_else(tmp_path: Path) -> None:
    full(tmp_path)
    south = Memory.at(tmp_path, "south")
    assert (south.run(), south.trunk(), south.frozen()) == (None, "", None)
    south.remember_trunk(SHA256, CONTENT)
    south.remember_run("seed = 9\n")
    assert [path.name for path in (tmp_path / "trunks").iterdir()] == [f"{SHA256}.safetensors"]
    north = Memory.at(tmp_path, "north")
    assert (north.run(), north.trunk(), north.trunk_content()) == ("seed = 1\n", SHA256, CONTENT)


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT + b"x", b"", CONTENT[:-1] + b"\xff"])
def test_a_damaged_trunk_is_none_and_can_be_received_again(tmp_path: Path, damage: bytes) -> None:
    memory = full(tmp_path)
    (tmp_path / "trunks" / f"{SHA256}.safetensors").write_bytes(damage)
    assert memory.trunk_content() is None
    memory.remember_trunk(SHA256, CONTENT)
    assert Memory.at(tmp_path, "north").trunk_content() == CONTENT


def test_a_trunk_that_went_away_is_none(tmp_path: Path) -> None:
    memory = full(tmp_path)
    (tmp_path / "trunks" / f"{SHA256}.safetensors").unlink()
    assert memory.trunk_content() is None


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 64])
def test_a_damaged_standardiser_is_none(tmp_path: Path, damage: bytes) -> None:
    memory = full(tmp_path)
    (memory.folder / "frozen.safetensors").write_bytes(damage)
    assert memory.frozen() is None


def test_a_run_in_any_script_survives(tmp_path: Path) -> None:
    text = '[task]\nlabels = ["gutartig", "悪性", "ж"]\n'
    Memory.at(tmp_path, "north").remember_run(text)
    assert Memory.at(tmp_path, "north").run() == text


READ_BACK = """
import sys
from pathlib import Path
from client.memory import Memory
text = Memory.at(Path(sys.argv[1]), "north").run()
sys.exit(0 if text == '[task]\\nlabels = ["\\u60aa\\u6027"]\\n' else 3)
"""


@pytest.mark.slow
def test_a_run_is_read_the_same_in_every_locale(tmp_path: Path) -> None:
    Memory.at(tmp_path, "north").remember_run('[task]\nlabels = ["悪性"]\n')
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", READ_BACK, str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], env=plain, check=True, capture_output=True)


def test_no_half_written_file_stays(tmp_path: Path) -> None:
    memory = full(tmp_path)
    memory.remember_frozen(FREEZE)
    assert {path.name for path in memory.folder.iterdir()} == {"run.toml", "trunk.sha256", "frozen.safetensors"}
