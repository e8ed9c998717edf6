"""What a bundle's code would try if it ran as the link's user; each attempt by itself, with the error that it met.

Run as a process of that user: `python link_attacks.py FACTS.json`, and read one JSON object: attempt -> `done`, or the
name of an error. It trusts in nothing of this project but the relay, which an intruder would have as well.
"""

# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH208, PTH211  system calls by their names
from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, PTRACE_SEIZE, PTRACE_DETACH = 16, 0x4206, 17
PIDFD_GETFD, PROCESS_VM_READV, PROCESS_VM_WRITEV, PRLIMIT, KCMP = 438, 310, 311, 302, 312


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _checked(value: int) -> int:
    if value < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value


def _syscall(number: int, *arguments: Any) -> int:
    longs = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)  # else half of one is chance
    return _checked(_libc.syscall(ctypes.c_long(number), *longs))


def _readable(path: str) -> Callable[[], Any]:
    return lambda: Path(path).read_bytes()


def _writable(path: str) -> Callable[[], Any]:
    return lambda: os.close(os.open(path, os.O_WRONLY))


def _in_memory(pid: int, number: int) -> None:
    here, place = ctypes.create_string_buffer(8), 0x400000
    with suppress(OSError):  # who may read the maps knows where there is something
        place = int(Path(f"/proc/{pid}/maps").read_text().partition("-")[0], 16)
    ours, theirs = _Span(ctypes.addressof(here), 8), _Span(place, 8)
    _syscall(number, pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)


def _traced(pid: int, request: int) -> None:
    _checked(_libc.ptrace(request, pid, None, None))
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    _libc.ptrace(PTRACE_DETACH, pid, None, None)


def _limited(pid: int) -> None:
    limit = (ctypes.c_uint64 * 2)(0, 0)
    _syscall(PRLIMIT, pid, 7, ctypes.byref(limit), None)  # no files any more


def _taken_file(pid: int) -> None:
    handle = os.pidfd_open(pid)
    try:
        os.close(_syscall(PIDFD_GETFD, handle, 0, 0))
    finally:
        os.close(handle)


def _connected(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(path)


def _knocked(path: str) -> None:
    """Connect, greet as HTTP/2 does, and say whether anything came back."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(10)
        caller.connect(path)
        with suppress(BrokenPipeError, ConnectionResetError):
            caller.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            _say("answered" if caller.recv(1) else "cut off")
        _say("cut off")


def _bound(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


def _through_link(target: str) -> None:
    way = Path(tempfile.mkdtemp(), "way")
    way.symlink_to(target)
    with way.open("rb") as file:
        file.read(1)


def _changed_owner(call: Callable[[], None]) -> Callable[[], None]:
    """Try a change of user in a child, which ends with it."""

    def attempt() -> None:
        child = os.fork()
        if not child:
            try:
                call()
            except OSError as error:
                os._exit(error.errno or 255)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise OSError(code, os.strerror(code))

    return attempt


def _joined(pid: int) -> None:
    handle = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    _checked(_libc.setns(handle, 0))


def reading(facts: Any) -> dict[str, Callable[[], Any]]:
    """Return the attempts to see what is the daemon's alone."""
    pid, files = int(facts["pid"]), dict(facts["files"])
    return {
        **{f"read {name}": _readable(path) for name, path in files.items()},
        **{f"list {name}": (lambda path=path: os.listdir(path)) for name, path in facts["folders"].items()},
        **{f"reach {name} by a link": (lambda path=path: _through_link(path)) for name, path in files.items()},
        **{f"read /proc/{name}": _readable(f"/proc/{pid}/{name}") for name in ("environ", "maps", "auxv", "io")},
        "open /proc/mem": lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY)),
        "list /proc/fd": lambda: os.listdir(f"/proc/{pid}/fd"),
        "enter /proc/cwd": lambda: os.listdir(f"/proc/{pid}/cwd/"),
        "enter /proc/root": lambda: os.listdir(f"/proc/{pid}/root/"),
        "process_vm_readv": lambda: _in_memory(pid, PROCESS_VM_READV),
        "connect to the inner socket": lambda: _connected(str(facts["inner"])),
    }


def seizing(facts: Any) -> dict[str, Callable[[], Any]]:
    """Return the attempts to have a hold on the daemon."""
    pid = int(facts["pid"])
    return {
        "ptrace attach": lambda: _traced(pid, PTRACE_ATTACH),
        "ptrace seize": lambda: _traced(pid, PTRACE_SEIZE),
        "process_vm_writev": lambda: _in_memory(pid, PROCESS_VM_WRITEV),
        "pidfd_getfd": lambda: _taken_file(pid),
        "prlimit": lambda: _limited(pid),
        "lower priority": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        "pin to a core": lambda: os.sched_setaffinity(pid, {0}),
        "open /proc/mem to write": lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_WRONLY)),
        "enter its namespace": _changed_owner(lambda: _joined(pid)),
        **{f"signal {number.name}": (lambda number=number: os.kill(pid, number)) for number in _SIGNALS},
    }


_SIGNALS = (signal.SIGTERM, signal.SIGSTOP, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL)


def rising(facts: Any) -> dict[str, Callable[[], Any]]:
    """Return the attempts to become somebody else."""
    user, group = int(facts["user"]), int(facts["group"])
    return {
        "setuid root": _changed_owner(lambda: os.setuid(0)),
        "setuid daemon": _changed_owner(lambda: os.setuid(user)),
        "setgid root": _changed_owner(lambda: os.setgid(0)),
        "setgroups": _changed_owner(lambda: os.setgroups([group, 0])),
        "mount": lambda: _checked(_libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
        "chroot": _changed_owner(lambda: os.chroot("/")),
    }


def replacing(facts: Any) -> dict[str, Callable[[], Any]]:
    """Return the attempts to stand where the daemon's socket is, or to lead it astray."""
    public = Path(facts["socket"])
    folder = public.parent
    return {
        "unlink the socket": lambda: os.unlink(public),
        "rename the socket": lambda: os.rename(public, folder / "old"),
        "bind beside the socket": lambda: _bound(str(folder / "other.sock")),
        "bind on the socket": lambda: _bound(str(public)),
        "a symlink in the runtime folder": lambda: os.symlink("/tmp", folder / "way"),
        "a folder in the runtime folder": lambda: os.mkdir(folder / "x"),
        "take the inner folder away": lambda: os.rmdir(Path(facts["inner"]).parent),
        "rename the runtime folder": lambda: os.rename(folder, folder.with_name("y")),
        "chmod the socket": lambda: os.chmod(public, 0o777),
        "chmod the runtime folder": lambda: os.chmod(folder, 0o777),
        "chown the socket": lambda: os.chown(public, os.getuid(), -1),
        "write site.toml": lambda: os.close(os.open(str(facts["config"]), os.O_WRONLY)),
        "take site.toml away": lambda: os.unlink(str(facts["config"])),
        **{f"write {name}": _writable(path) for name, path in facts["files"].items()},
    }


def squatting(facts: Any) -> dict[str, Callable[[], Any]]:
    """Return what is tried while no daemon runs."""
    public = Path(facts["socket"])
    return {
        "bind on the socket": lambda: _bound(str(public)),
        "make the runtime folder": lambda: os.mkdir(public.parent),
        "a symlink for the runtime folder": lambda: os.symlink("/tmp", public.parent),
    }


def speaking(facts: Any) -> dict[str, Callable[[], Any]]:
    """Return what the link is there for: the closed protocol, and nothing else."""
    from client.relay import Relay
    from common.messages import Prepare, to_record

    relay = Relay(Path(facts["socket"]), facts["site"])

    def answered(kind: str) -> None:
        _say(str(relay.answer(kind, to_record(Prepare("0" * 64))).config_records["facts"]["refused"]))

    return {
        "status": lambda: _say(str(relay.status()["state"])),
        "a request of the list": lambda: answered("query.prepare"),
        "a request outside of it": lambda: answered("query.shell"),
    }


def knocking(facts: Any) -> dict[str, Callable[[], Any]]:
    """Return the attempt to get a single byte out of the daemon."""
    return {"knock": lambda: _knocked(str(facts["socket"]))}


class _Said(Exception):
    """What was answered."""


def _say(text: str) -> None:
    raise _Said(text)


def walking(facts: Any) -> dict[str, Callable[[], Any]]:
    """Look for anything at all of the daemon's user that can be opened; the socket is what is left to be found."""
    user, opened = int(facts["user"]), []
    for place, folders, names in os.walk("/"):
        if place == "/":
            folders[:] = set(folders) - {
                "proc",
                "sys",
                "usr",
                "work",
                "data",
            }  # kernel, system, checkout: none is theirs
        for name in names:
            path = Path(place, name)
            with suppress(OSError):
                if path.lstat().st_uid == user:
                    with suppress(OSError):
                        os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
                        opened.append(str(path))
    return {"opened of the daemon's": lambda: _say(json.dumps(opened))}


GROUPS = {made.__name__: made for made in (reading, seizing, rising, replacing, squatting, speaking, knocking, walking)}


def _outcome(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except _Said as said:
        return str(said)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "done"


def main(arguments: list[str]) -> None:
    """Try the groups that are named, and print what came of it."""
    facts = json.loads(Path(arguments[0]).read_text())
    attempts = {name: attempt for group in arguments[1:] for name, attempt in GROUPS[group](facts).items()}
    sys.stdout.write(json.dumps({name: _outcome(attempt) for name, attempt in attempts.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
