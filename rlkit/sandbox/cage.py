"""What a child does to itself before it runs a line of foreign code.

Imported by the fork server by path, so standard library only. Everything that looks something up
(libraries, paths, tables) happens here at import or in ``ruleset``, before the fork: once the cage
is shut nothing can be looked up any more, and a layer that failed late would fail open.

Landlock: https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAP_VERSION_3 = 0x20080522

FIRST_UID, UIDS = 61_184, 4_096
"""Users for children of root: the range that systemd keeps for dynamic users, so nobody's files."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_NOBODY_ELSE = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", *DEVICES)


def landlock_abi() -> int:
    """Version of landlock in this kernel, 0 if there is none (or a seccomp profile hides it)."""
    return max(0, _LIBC.syscall(_CREATE, None, ctypes.c_size_t(0), 1))


def ruleset(readable: Iterable[str]) -> int:
    """Descriptor of a landlock ruleset: nothing but reading below ``readable`` is allowed.

    No TCP port, and with a new enough kernel no abstract socket and no signal to the outside. A
    child enters it with one call. Paths that do not exist are left out.

    Raises:
        OSError: the kernel has no landlock.
    """
    abi = landlock_abi()
    if not abi:
        raise OSError("this kernel has no landlock, or it is switched off")
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = _call(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    for path in (*readable, *_NOBODY_ELSE):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = _READ_FILE | (_READ_DIR if stat.S_ISDIR(os.fstat(place).st_mode) else 0)
        if path == "/dev/null":
            allowed |= _WRITE_FILE
        _call(_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    return rules


def limit(limits: Mapping[str, float], base_bytes: int, *, session: bool, alone: bool) -> None:
    """Set the kernel's limits of this process.

    Args:
        limits: the fields of ``Limits``.
        base_bytes: address space that the process has before it runs anything.
        session: a live session adds up the CPU seconds of its cells, so it gets no sum of its own.
        alone: it will have a user of its own. Otherwise threads cannot be counted: the kernel
            would count those of the whole user, the trainer's included.
    """
    seconds = int(limits["cpu_seconds"]) + 2  # whole seconds: the host enforces the exact limit
    memory = base_bytes + (int(limits["memory_mib"]) << 20)
    for name, value in (
        ("CPU", resource.RLIM_INFINITY if session else seconds),
        ("AS", memory),
        ("STACK", int(limits["stack_mib"]) << 20),
        ("FSIZE", 1 << 20),
        ("NOFILE", int(limits["files"])),
        ("NPROC", int(limits["threads"]) if alone else resource.RLIM_INFINITY),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("SIGPENDING", 64),  # counted per user: the trainer's own must not run out
    ):
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        if hard != resource.RLIM_INFINITY:
            value = hard if value == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def become(uid: int) -> None:
    """Give up root for ``uid``, and every capability with it."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def no_capabilities() -> None:
    """Empty all capability sets of this process."""
    header = struct.pack("Ii", _CAP_VERSION_3, 0)
    if _LIBC.capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def seal(parent: int, rules: int | None) -> None:
    """Die with the parent, be opaque to others, gain nothing by exec, enter landlock's ``rules``.

    After any change of user: that would reset the first two.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    opaque()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if os.getppid() != parent:  # it died before we asked to be told
        os._exit(1)
    if rules is not None:
        _call(_RESTRICT, rules, 0)


def opaque(yes: bool = True) -> None:
    """Close this process's memory and environment to others of its user, or open them."""
    _prctl(_PR_SET_DUMPABLE, int(not yes))


def first_to_be_killed() -> None:
    """Let the kernel's out-of-memory killer take this process before any other."""
    opaque(False)  # or the file would belong to root
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)  # pathlib takes 0.4 ms in a child
        os.write(fd, b"1000")
        os.close(fd)
    except OSError:  # /proc is read-only or missing in some containers; only a preference is lost
        return


def collapse() -> None:
    """Put this process's memory into huge pages: a fork, and a child's end, walk the page table.

    Saves a quarter of the CPU time of a run. Kernels before 6.1 refuse, and nothing is lost.
    """
    size, advice = 1 << 21, 25  # MADV_COLLAPSE
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, mode, *_, name = [*line.split(), "anonymous"][:6]
        if mode.startswith("rw") and name in ("anonymous", "[heap]"):
            first, last = (int(word, 16) for word in where.split("-"))
            for at in range(-(-first // size) * size, last - size + 1, size):
                _LIBC.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), advice)


def _call(number: int, *arguments: object) -> int:
    result: int = _LIBC.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock call {number}")
    return result


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")
