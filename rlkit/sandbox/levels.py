"""Which walls this host can put around model-written code, and the proof that they stand.

Nobody guesses here: each combination of layers is tried, a real child attacks it, and the first
that holds is taken. Containers, old kernels and root-only homes all differ from what one expects.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["A", "B", "C", "D"]
CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_SYS_CHROOT")
_CORE = ("seccomp", "rlimits")


@dataclass(frozen=True)
class Attempt:
    """One combination of layers.

    Attributes:
        layers: what is put on.
        degraded: True if the caller's files and processes stay readable: only on explicit wish.
    """

    layers: tuple[str, ...]
    degraded: bool = False

    @property
    def level(self) -> Level:
        """A: namespaces and landlock. B: landlock, each child a user of its own. C: landlock.

        D: no landlock.
        """
        if "landlock" not in self.layers:
            return "D"
        return "A" if "namespaces" in self.layers else "B" if "uid" in self.layers else "C"


def attempts(root: bool) -> list[Attempt]:
    """All combinations from the strongest down."""
    uid = ("uid",) if root else ()
    combinations = [
        Attempt(("namespaces", *uid, "landlock", *_CORE)),
        Attempt(("namespaces", "landlock", *_CORE)),
        Attempt(("uid", "landlock", *_CORE)),
        Attempt(("landlock", *_CORE)),
        Attempt(("namespaces", *uid, *_CORE)),
        Attempt(("namespaces", *_CORE)),
        Attempt(("chroot", "uid", *_CORE)),
        Attempt(_CORE, degraded=True),
    ]
    return [c for c in dict.fromkeys(combinations) if root or not {"uid", "chroot"} & {*c.layers}]


def shell(layers: Sequence[str], roots: Sequence[str]) -> list[str]:
    """The bubblewrap command in front of the fork server; empty without ``namespaces``.

    One start for all children (https://github.com/containers/bubblewrap). Root keeps its user and
    the few capabilities that give each child a user of its own; others get a user namespace.

    Raises:
        OSError: bubblewrap is not installed.
    """
    if "namespaces" not in layers:
        return []
    program = shutil.which("bwrap")
    if program is None:
        raise OSError("bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap)")
    command = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    if "uid" in layers:
        command += [word for name in CAPABILITIES for word in ("--cap-add", name)]
    else:
        command += ["--unshare-user"]
    for folder in ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store"):
        if Path(folder).is_symlink():
            command += ["--symlink", str(Path(folder).readlink()), folder]
        elif Path(folder).is_dir():
            command += ["--ro-bind", folder, folder]
    here = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]
    for folder in dict.fromkeys([*here, *roots, str(Path(__file__).parent)]):
        if not folder.startswith("/usr/"):
            for parent in reversed(Path(folder).parents[:-1]):  # else made for root alone
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", folder, folder]
    command += ["--perms", "0755", "--dir", "/etc"]
    for file in ("/etc/ld.so.cache", "/etc/localtime"):
        command += ["--ro-bind-try", file, file]
    command += ["--dev", "/dev", "--proc", "/proc", "--chdir", "/"]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--"]


SELF_TEST = r"""
import ctypes, os, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()
others = {parent, HOST} - {os.getpid()}  # in a namespace of its own, numbers mean others

def tries(name, action):
    try:
        held = action() is False
    except (OSError, ValueError):
        held = True
    if not held:
        print("LEAK", name, flush=True)

def forked():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def writes(path):
    open(path, "w").close()
    try:
        os.unlink(path)
    except OSError:
        pass

def datagram(family, address):
    socket.socket(family, socket.SOCK_DGRAM).sendto(b"x", address)

tries("reading files", lambda: open(FILE).read())
tries("listing folders", lambda: os.listdir(FOLDER))
for place in (FOLDER, "/tmp", "/var/tmp", "/dev/shm", "/", "."):
    tries("writing files", lambda: writes(place + "/rlkit-self-test"))
tries("changing modes", lambda: os.chmod(FILE, 0o600))
tries("changing times", lambda: os.utime(FILE, (1, 1)))
tries("deleting files", lambda: os.unlink(FILE))
tries("TCP", lambda: socket.socket().connect(("127.0.0.1", PORT)))
tries("UDP", lambda: datagram(socket.AF_INET, ("127.0.0.1", PORT)))
tries("unix sockets", lambda: datagram(socket.AF_UNIX, NAME))
tries("unix sockets", lambda: datagram(socket.AF_UNIX, NAME[1:]))
tries("starting processes", forked)
tries("starting programs", lambda: os.execv("/bin/true", ["true"]))
for other in others:
    tries("signals to others", lambda: os.kill(other, 0))
    tries("limits of others", lambda: resource.prlimit(other, resource.RLIMIT_CORE))
    tries("tracing others", lambda: libc.ptrace(16, other, 0, 0) == 0)
    tries("other processes' memory", lambda: open(f"/proc/{other}/mem", "rb"))
    tries("other processes' environment", lambda: open(f"/proc/{other}/environ").read())
tries("signals to all", lambda: os.kill(-1, signal.SIGCONT))
tries("own limits", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)))
tries("memory outside its limit", lambda: os.memfd_create("x"))
tries("memory outside its limit", lambda: libc.shmget(0, 4096, 0o1600) >= 0)
tries("a new user namespace", lambda: libc.unshare(0x10000000) == 0)
tries("becoming root", lambda: os.setuid(0))
try:
    os.stat(FILE)
except OSError:
    print("HIDDEN")
try:
    if IMPORTS:
        import colorsys, wave  # two that nobody preloads
    print("DONE")
except ImportError:
    print("UNREADABLE")
"""
_READING = {"reading files", "listing folders", "other processes' environment"}
_READING |= {"other processes' memory"}
Run = Callable[[str], "tuple[str, str]"]


def attack(run: Run, attempt: Attempt) -> tuple[list[str], bool]:
    """Let a real child try to get out; what is wrong, and whether it sees file names.

    Args:
        run: executes code in a fresh child; its stdout, and an error text.
        attempt: a degraded one may read; with ``chroot`` nothing can be imported later.
    """
    with _canaries() as names:
        names["IMPORTS"] = "chroot" not in attempt.layers
        head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        out, error = run(head + SELF_TEST)
    lines = out.splitlines()
    leaks = [line.removeprefix("LEAK ") for line in lines if line.startswith("LEAK ")]
    if attempt.degraded:
        leaks = [leak for leak in leaks if leak not in _READING]
    problems = [f"code in it got through to: {', '.join(dict.fromkeys(leaks))}"] if leaks else []
    if "UNREADABLE" in lines:
        problems.append("its user cannot read Python's library (below a folder of root alone?)")
    elif "DONE" not in lines:
        problems.append(f"the self-test did not come to its end: {error or out[-200:] or 'mute'}")
    return problems, "HIDDEN" not in lines


@contextmanager
def _canaries() -> Iterator[dict[str, object]]:
    """A file, a folder, a port and two unix sockets that no child may reach."""
    with ExitStack() as stack:
        try:
            place = tempfile.gettempdir()
        except FileNotFoundError:  # a container with a read-only root
            place = "/dev/shm"
        temporary = tempfile.TemporaryDirectory(prefix="rlkit-self-test-", dir=place)
        folder = stack.enter_context(temporary)
        file = Path(folder, "secret")
        file.write_text("secret")
        Path(folder).chmod(0o777)  # what a child of another user is stopped by must be the cage
        file.chmod(0o666)
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        name = f"\0{folder}/socket"
        for address in (name, f"{folder}/socket"):
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind(address)
        yield {"FILE": str(file), "FOLDER": folder, "PORT": port.getsockname()[1], "NAME": name} | {
            "HOST": os.getpid()
        }
