"""The seccomp filter: its table, its decisions, libseccomp's decisions, and the kernel's."""

import ctypes
import itertools
import json
import os
import platform
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("seccomp is a part of Linux", allow_module_level=True)

from rlkit.sandbox import seccomp

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386, ARM = 0x40000003, 0x40000028
INT, PTR = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
PID = 4242

# Written by hand, not taken from the module: allowed whatever the arguments are.
PLAIN = """
read write readv writev pread64 pwrite64 lseek close dup dup2 dup3 pipe pipe2 open openat
stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64
getcwd statfs fstatfs umask poll ppoll select pselect6 epoll_create
epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2 shutdown getsockname
getpeername munmap mprotect mremap madvise brk set_robust_list rseq membarrier
set_tid_address arch_prctl exit exit_group sched_yield sched_getaffinity sched_getparam
sched_getscheduler sched_get_priority_min sched_get_priority_max getpriority getcpu wait4 waitid
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
pause alarm setitimer getitimer restart_syscall nanosleep clock_nanosleep clock_gettime
clock_getres gettimeofday time times getrusage getrlimit sysinfo uname getrandom getpid gettid
getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid
""".split()  # noqa: SIM905
MESSAGE = INT & ~(2 | 32 | 64 | 256 | 16384)
SIGNALS = [(INT & ~15, number) for number in (0, 32, 48, 64)]
SIGNALS += [(INT, number) for number in (16, 17, *range(19, 32))]  # not 18, SIGCONT
# Alternatives of (argument, mask, value), all of one must hold.
RULED = {
    "clone": [[(0, 0xFFBFFFFF, 0x3D0F00)]],
    "close_range": [[(2, INT & ~4, 0)]],
    "kill": [[(0, INT, PID), (1, *number)] for number in SIGNALS],
    "tgkill": [[(0, INT, PID), (2, *number)] for number in SIGNALS],
    "futex": [[(1, INT & ~(128 | 256), op)] for op in (0, 9)]
    + [[(1, INT & ~256, op)] for op in (129, 131, 132, 133, 138)],
    "mmap": [[(3, 0x40000, 0)]],
    "fcntl": [[(1, INT, cmd)] for cmd in (0, 1, 2, 3, 1030, 1032)]
    + [[(1, INT, 4), (2, 0x2000, 0)]],
    "ioctl": [
        [(1, INT, request)]
        for request in (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450)
    ],
    "prctl": [[(0, INT, option)] for option in (2, 3, 15, 16, 21, 23, 39)],
    "prlimit64": [[(0, INT, pid), (2, PTR, 0)] for pid in (0, PID)],
    "socketpair": [[(0, INT, 1), (1, 15, 1)]],
    "sendto": [[(3, MESSAGE, 0), (4, PTR, 0)]],
    "recvfrom": [[(3, MESSAGE, 0)]],
    "getsockopt": [[(1, INT, 1), (2, INT, name)] for name in (3, 4, 7, 8, 38, 39)],
}
WRITES = 1 | 2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
READ_ONLY = {
    "open": [[(1, WRITES, 0)]],
    "openat": [[(2, WRITES, 0)]],
}
KINDS = list(itertools.product(("x86_64", "aarch64"), (False, True)))


def policy(read_only):
    """Name -> its alternatives, [[]] for what is always allowed, [] for what is refused."""
    return {name: [[]] for name in PLAIN} | RULED | (READ_ONLY if read_only else {})


@pytest.fixture(scope="module")
def library():
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp.so.2 is not installed: no second opinion on numbers and filters")
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
    library.seccomp_init.restype = ctypes.c_void_p
    for name in ("arch_add", "arch_remove", "attr_set", "export_bpf", "release"):
        getattr(library, f"seccomp_{name}").argtypes = [
            ctypes.c_void_p,
            *{
                "arch_add": [ctypes.c_uint32],
                "arch_remove": [ctypes.c_uint32],
                "attr_set": [ctypes.c_int, ctypes.c_uint32],
                "export_bpf": [ctypes.c_int],
            }.get(name, []),
        ]
    return library


def number(library, machine, name):
    """The call's number by libseccomp, negative where the architecture has no such call."""
    return library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(AUDIT[machine]), name.encode())


def program(machine, read_only=False, pid=PID):
    packed = seccomp.build(machine, read_only=read_only)
    own = seccomp.OWN_PID
    code = list(struct.iter_unpack("<HBBI", packed))
    assert 0 < sum(k == own for *_, k in code) == packed.count(own.to_bytes(4, "little"))
    return [(op, jt, jf, pid if k == own else k) for op, jt, jf, k in code]


def decide(code, arch, nr, args=()):
    """What the kernel would return for one call: a classic-BPF interpreter."""
    padded = [argument & PTR for argument in (*args, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.unpack("<16I", struct.pack("<IIQ6Q", nr & INT, arch, 0, *padded))
    accumulator = at = 0
    while True:
        op, jt, jf, k = code[at]
        at += 1
        if op == 0x20:
            assert k % 4 == 0
            accumulator = data[k // 4]
        elif op == 0x54:
            accumulator &= k
        elif op == 0x05:
            at += k
        elif op == 0x06:
            return k
        else:
            hit = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: accumulator & k != 0,
            }[op]
            at += jt if hit else jf


def holds(alternatives, args):
    return any(
        all(args[argument] & mask == value for argument, mask, value in rule)
        for rule in alternatives
    )


def near(alternatives):
    """Arguments that satisfy an alternative, and each with one bit of one argument flipped."""
    for rule in alternatives or [[]]:
        base = [0] * 6
        for argument, _, value in rule:
            base[argument] = value
        yield tuple(base)
        for argument in {argument for argument, *_ in rule} or {0, 1, 2}:
            for bit in range(64):
                yield (*base[:argument], base[argument] ^ 1 << bit, *base[argument + 1 :])
    for value in (0, 1, PID, seccomp.OWN_PID, INT, INT + 1, PTR):
        yield (value,) * 6


# -- the table ------------------------------------------------------------------------------------


def test_the_table_has_the_numbers_that_libseccomp_knows(library):
    names = []
    for entry in seccomp._CALLS.split(","):
        name, *columns = entry.split()
        names.append(name)
        for machine, written in zip(("x86_64", "aarch64"), columns, strict=True):
            known = number(library, machine, name)
            assert (int(written) == known) if written != "-" else (known < 0), (name, machine)
    assert len(names) == len(set(names))
    assert set(names) == {*PLAIN, *RULED, "clone3"}
    assert number(library, platform.machine(), "seccomp") == seccomp._NR_SECCOMP


def test_another_machine_is_told_which_are_known():
    with pytest.raises(ValueError, match=r"machine='riscv64'.*x86_64 and aarch64"):
        seccomp.build("riscv64")


# -- the decisions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "read_only"), KINDS)
def test_every_number_is_decided_as_the_list_says(library, machine, read_only):
    code = program(machine, read_only)
    names = {number(library, machine, name): name for name in (*policy(read_only), "clone3")}
    seen = set()
    for nr in range(601):
        name = names.get(nr)
        seen |= {name}
        for args in ((0,) * 6, (1,) * 6, (PTR,) * 6, (PID,) * 6):
            if name == "clone3":
                expected = ENOSYS
            else:
                expected = ALLOW if holds(policy(read_only).get(name, []), args) else EPERM
            assert decide(code, AUDIT[machine], nr, args) == expected, (nr, name, args)
    assert seen - {None} == {name for nr, name in names.items() if nr >= 0}


@pytest.mark.parametrize(("machine", "read_only"), KINDS)
def test_foreign_architectures_and_x32_are_killed(machine, read_only):
    code = program(machine, read_only)
    other = AUDIT["aarch64" if machine == "x86_64" else "x86_64"]
    for arch, nr in itertools.product(
        (I386, ARM, other, 0, INT), (0, 1, 39, 57, 63, 172, 0x4000002)
    ):
        assert decide(code, arch, nr) == KILL
    for nr in (0x40000000, 0x40000001, 0x40000027, 0x40000039, 0x7FFFFFFF, 0x80000000, INT):
        assert decide(code, AUDIT[machine], nr) == (KILL if machine == "x86_64" else EPERM)
    assert decide(code, AUDIT[machine], 0x3FFFFFFF) == EPERM


HIGH = 1 << 32
CASES = [  # name on x86_64, arguments, allowed
    ("clone", (0x3D0F00,), True),  # glibc
    ("clone", (0x7D0F00,), True),  # musl
    ("clone", (0x11,), False),  # fork
    ("clone", (0x4111,), False),  # vfork, posix_spawn
    ("clone", (0x3D0B00,), False),  # a thread with its own descriptors
    ("clone", (0x3D0D00,), False),  # ... its own working directory
    *[("clone", (0x3D0F00 | 1 << bit,), False) for bit in (7, 12, 13, 15, 17, *range(25, 32))],
    ("kill", (PID, 9), True),
    ("kill", (PID | HIGH, 9), True),  # the kernel reads 32 bits
    *[("kill", (pid, 0), False) for pid in (0, 1, PID - 1, PID + 1, -1, -PID, seccomp.OWN_PID)],
    ("tgkill", (PID, 1, 9), True),
    ("tgkill", (1, PID, 9), False),
    ("kill", (PID, 18), False),  # SIGCONT
    ("tgkill", (PID, 1, 18), False),
    ("tkill", (PID, 9), False),
    ("rt_sigqueueinfo", (PID, 9), False),
    ("pidfd_open", (PID,), False),
    ("pidfd_send_signal", (PID,), False),
    ("fcntl", (0, 3), True),
    ("fcntl", (0, 4, 0o4000 | 1), True),  # O_NONBLOCK
    ("fcntl", (0, 4, 0x2000), False),  # O_ASYNC
    ("fcntl", (0, 3 | HIGH), True),
    *[("fcntl", (0, cmd), False) for cmd in (5, 6, 7)],  # locks
    *[("fcntl", (0, cmd, PID), False) for cmd in (8, 10, 15, 1024, 1026, 1031, 1033, 36, 37, 38)],
    ("ioctl", (0, 0x5401), True),
    ("ioctl", (0, 0x5412), False),  # TIOCSTI
    ("ioctl", (0, 0x541C), False),  # TIOCLINUX
    ("ioctl", (0, 0x5452), False),  # FIOASYNC
    ("prctl", (15,), True),
    *[("prctl", (option, 1), False) for option in (1, 4, 8, 22, 24, 35, 36, 38, 47, 0x53564D41)],
    ("prlimit64", (0, 7, 0, 1), True),
    ("prlimit64", (PID, 7, 0, 1), True),
    ("prlimit64", (1, 7, 0, 1), False),
    ("prlimit64", (0, 7, 1, 0), False),
    ("prlimit64", (0, 7, HIGH, 0), False),  # a pointer whose low half is 0
    ("socketpair", (1, 1 | 0o2000000 | 0o4000), True),
    ("socketpair", (1, 2), False),
    ("socketpair", (1, 5), False),
    ("socketpair", (2, 1), False),
    ("sendto", (3, 1, 1, 0x4000, 0, 0), True),
    ("sendto", (3, 1, 1, 0, 1, 8), False),
    ("sendto", (3, 1, 1, 0, HIGH, 8), False),
    ("sendto", (3, 1, 1, 1, 0, 0), False),  # MSG_OOB
    ("recvfrom", (3, 1, 1, 2), True),
    ("recvfrom", (3, 1, 1, 1), False),
    ("getsockopt", (3, 1, 4), True),
    ("getsockopt", (3, 1, 77), False),  # SO_PEERPIDFD
    ("getsockopt", (3, 6, 4), False),
    ("futex", (1, 128), True),
    ("futex", (1, 0), True),
    ("futex", (1, 1), False),  # a wake-up on a page that others map
    ("futex", (1, 129), True),
    ("futex", (1, 9 | 128 | 256), True),
    ("futex", (1, 6 | 128), False),  # FUTEX_LOCK_PI
    ("mmap", (0, 4096, 3, 0x22), True),
    ("mmap", (0, 4096, 3, 0x40022), False),  # MAP_HUGETLB
    ("close_range", (3, INT, 4), True),
    ("close_range", (3, INT, 2), False),  # CLOSE_RANGE_UNSHARE
]
WRITING = [
    ("openat", (0, 0, 0o2000000), True),
    *[("openat", (0, 0, flags), False) for flags in (1, 2, 3, 0o100, 0o1000, 0o2000, 0o20000000)],
    ("openat", (0, 1, 0, 0o777), True),  # the mode is not looked at
    ("open", (1, 0), True),
    ("open", (2, 0), True),
    ("open", (0, 0o20200000), False),
    ("open", (0, 0o101), False),
]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_arguments_are_decided_exactly(library, machine):
    default, read_only = program(machine), program(machine, True)
    for name, args, allowed in CASES + WRITING:
        nr = number(library, machine, name)
        if nr < 0:  # aarch64 has no open
            continue
        got = decide(read_only, AUDIT[machine], nr, args)
        assert got == (ALLOW if allowed else EPERM), (name, args)
        if (name, args, allowed) in CASES:
            assert decide(default, AUDIT[machine], nr, args) == got, (name, args)
        else:
            assert decide(default, AUDIT[machine], nr, args) == ALLOW, (name, args)


def test_a_program_without_its_pid_lets_nobody_be_signalled():
    code = program("x86_64", pid=seccomp.OWN_PID)
    for pid in (0, 1, PID, 4194304, -1, INT):
        assert decide(code, AUDIT["x86_64"], 62, (pid, 9)) == EPERM


class Comparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp; operator 7 compares under a mask."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


def by_libseccomp(library, machine, read_only):
    """The same policy as libseccomp compiles it."""
    context = library.seccomp_init(ctypes.c_uint32(EPERM))
    add = library.seccomp_rule_add_array
    add.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    if machine != platform.machine():
        assert library.seccomp_arch_add(context, AUDIT[machine]) == 0
        assert library.seccomp_arch_remove(context, AUDIT[platform.machine()]) == 0
    assert library.seccomp_attr_set(context, 2, KILL) == 0  # SCMP_FLTATR_ACT_BADARCH
    for name, alternatives in policy(read_only).items():
        if number(library, machine, name) < 0:
            continue
        nr = number(library, platform.machine(), name)  # it translates from the native number
        for rule in alternatives:
            checks = (Comparison * max(len(rule), 1))(*[(a, 7, m, v) for a, m, v in rule])
            assert add(context, ALLOW, nr, len(rule), checks) == 0, (name, rule)
    assert add(context, ENOSYS, number(library, platform.machine(), "clone3"), 0, None) == 0
    reader, writer = os.pipe()
    try:
        assert library.seccomp_export_bpf(context, writer) == 0
        raw = os.read(reader, 1 << 16)
    finally:
        os.close(reader)
        os.close(writer)
        library.seccomp_release(context)
    return list(struct.iter_unpack("<HBBI", raw))


@pytest.mark.parametrize(("machine", "read_only"), KINDS)
def test_libseccomp_decides_the_same(library, machine, read_only):
    ours, theirs = program(machine, read_only), by_libseccomp(library, machine, read_only)
    calls = [(nr, args) for nr in range(601) for args in ((0,) * 6, (PTR,) * 6)]
    for name, alternatives in policy(read_only).items():
        nr = number(library, machine, name)
        if nr >= 0 and alternatives != [[]]:
            calls += [(nr, args) for args in near(alternatives)]
    draw = random.Random(0)
    words = (0, 1, 2, 3, 4, 9, PID, 0x2000, 0x3D0F00, INT, HIGH, PTR)
    calls += [(draw.randrange(480), draw.choices(words, k=6)) for _ in range(2000)]
    # Not -1: libseccomp lets that number through to the default, for tracers; we kill it as x32.
    calls += [(nr, (0,) * 6) for nr in (1000, 0x3FFFFFFF, 0x40000000, 0x40000039, 0x7FFFFFFF)]
    assert len(calls) > 4000
    cases = [(AUDIT[machine], nr, args) for nr, args in calls]
    cases += [(arch, nr, (0,) * 6) for arch in (I386, ARM, 0) for nr in range(0, 600, 7)]
    assert [case for case in cases if decide(ours, *case) != decide(theirs, *case)] == []
    assert {decide(ours, *case) for case in cases} == {ALLOW, KILL, EPERM, ENOSYS}


# -- the kernel -----------------------------------------------------------------------------------

PRELUDE = """
import asyncio, concurrent.futures, ctypes, errno, fcntl, importlib.util, json, mmap, os, platform
import resource, select, shutil, signal, socket, sqlite3, subprocess, sys, threading, time
import numpy
spec = importlib.util.spec_from_file_location("seccomp", sys.argv[1])
seccomp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(seccomp)
libc = ctypes.CDLL(None, use_errno=True)
NR = json.loads(sys.argv[2])
folder, parent = sys.argv[3], os.getpid()
def raw(name, *args):
    if libc.syscall(ctypes.c_long(NR[name]), *map(ctypes.c_ulong, args)) < 0:
        raise OSError(ctypes.get_errno(), name)
def told(action):
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno]
def report(program, actions, before=lambda: None):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before()
            if program:
                seccomp.install(program, os.getpid())
            answers = {name: told(action) for name, action in actions.items()}
            os.write(writer, json.dumps(answers).encode())
        except BaseException as error:
            os.write(writer, json.dumps(repr(error)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answers:
        text = answers.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if text else -os.waitstatus_to_exitcode(status)
"""


def run(script, tmp_path, library=None):
    names = ["tkill", "tgkill", "clone", "clone3", "futex", "prlimit64", "close_range", "openat2"]
    names += ["pidfd_open", "unshare", "seccomp", "io_uring_setup", "rt_sigqueueinfo", "prctl"]
    numbers = {name: number(library, platform.machine(), name) for name in names} if library else {}
    (tmp_path / "readable").write_text("42")
    module = str(Path(seccomp.__file__))
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, module, json.dumps(numbers), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


supported = pytest.mark.skipif(
    platform.machine() not in AUDIT, reason=f"no table for {platform.machine()}"
)

ORDINARY = """
hits = []
def alarm():
    signal.signal(signal.SIGALRM, lambda *_: hits.append("alarm"))
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    time.sleep(0.1)
    return hits.pop()
def own_signals():
    signal.signal(signal.SIGUSR1, lambda number, _: hits.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    return len(hits)
def pool():
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        return sum(threads.map(lambda n: n * n, range(10)))
async def coroutine():
    await asyncio.sleep(0.001)
    return await asyncio.to_thread(lambda: 7)
def pair():
    left, right = socket.socketpair()
    left.setblocking(False)
    left.send(b"hello")
    return right.recv(10).decode()
def lines():
    with open(folder + "/readable") as file:
        return file.read()
def written():
    with open(folder + "/new", "w") as file:
        print("text", file=file)
    shutil.copyfile(folder + "/new", folder + "/copy")  # without sendfile
    return open(folder + "/copy").read()
def mapped():
    with mmap.mmap(-1, 1 << 20) as memory:
        memory[:3] = b"abc"
        return memory[:3].decode()
print(json.dumps(report(seccomp.build(platform.machine()), {
    "alarm": alarm,
    "own signals": own_signals,
    "pool": pool,
    "asyncio": lambda: asyncio.run(coroutine()),
    "socketpair": pair,
    "read": lines,
    "write": written,
    "mmap": mapped,
    "numpy": lambda: numpy.linalg.solve([[2.0, 0], [0, 4]], [2, 4]).tolist(),
    "random": lambda: len(os.urandom(8)) + len(numpy.random.default_rng().bytes(8)),
    "directory": lambda: "readable" in os.listdir(folder),
    "limits": lambda: resource.getrlimit(resource.RLIMIT_NOFILE)
        == resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE),
    "sqlite": lambda: sqlite3.connect(":memory:").execute("select 1 + 1").fetchone(),
    "terminal": lambda: os.isatty(0),
    "late import": lambda: __import__("fractions").__name__,
    "pipe": lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_GETPIPE_SZ) > 0,
    "poll": lambda: select.select([], [], [], 0),
    "no children": lambda: os.waitpid(-1, 0),
    "clock": lambda: time.thread_time() >= 0 and os.times().user >= 0,
    "raised": lambda: subprocess.run(["true"]),
})))
"""


@supported
def test_ordinary_code_runs_under_the_filter(tmp_path):
    assert run(ORDINARY, tmp_path) == {
        "alarm": "alarm",
        "own signals": 3,
        "pool": 285,
        "asyncio": 7,
        "socketpair": "hello",
        "read": "42",
        "write": "text\n",
        "mmap": "abc",
        "numpy": [1.0, 1.0],
        "random": 16,
        "directory": True,
        "limits": True,
        "sqlite": [2],
        "terminal": False,
        "late import": "fractions",
        "pipe": True,
        "poll": [[], [], []],
        "no children": "ECHILD",
        "clock": True,
        "raised": "EPERM",
    }


FORBIDDEN = """
limits = (ctypes.c_uint64 * 2)(*resource.getrlimit(resource.RLIMIT_NOFILE))
def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
def send_to_path():
    left, right = socket.socketpair()
    left.sendto(b"x", folder + "/nothing")
def out_of_band():
    left, right = socket.socketpair()
    left.send(b"x", socket.MSG_OOB)
safe = {  # without the filter none of these ends with EPERM
    "fork": fork,
    "exec": lambda: os.execv(folder + "/nothing", ["x"]),
    "socket": lambda: socket.socket().close(),
    "datagrams": lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].close(),
    "send to a path": send_to_path,
    "out of band": out_of_band,
    "peer pidfd": lambda: socket.socketpair()[0].getsockopt(1, 77) and None,
    "kill the parent": lambda: os.kill(parent, 0),
    "take back a stop": lambda: os.kill(os.getpid(), signal.SIGCONT),
    "lock": lambda: fcntl.lockf(open(folder + "/readable"), fcntl.LOCK_SH),
    "kill the group": lambda: os.kill(0, 0),
    "kill all": lambda: os.kill(-os.getpgrp(), 0),
    "signal a thread of the parent": lambda: raw("tgkill", parent, parent, 0),
    "tkill": lambda: raw("tkill", os.getpid(), 0),
    "queue a signal": lambda: raw("rt_sigqueueinfo", os.getpid(), 0, 0),
    "pidfd": lambda: raw("pidfd_open", os.getpid(), 0),
    # Not by resource.setrlimit, which makes a ValueError of EPERM.
    "setrlimit": lambda: raw("prlimit64", 0, resource.RLIMIT_NOFILE, ctypes.addressof(limits), 0),
    "limits of the parent": lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE) and None,
    "memfd": lambda: os.close(os.memfd_create("x")),
    "pipe size": lambda: fcntl.fcntl(os.pipe()[0], 1031, 4096) and None,
    "owner": lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getpid()) and None,
    "async": lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETFL, os.O_ASYNC) and None,
    "terminal input": lambda: fcntl.ioctl(os.pipe()[0], 0x5412, b"x"),
    "mkdir": lambda: os.mkdir(folder + "/made"),
    "chmod": lambda: os.chmod(folder + "/readable", 0o600),
    "rename": lambda: os.rename(folder + "/readable", folder + "/readable"),
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0)),
    "processors": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    "death signal": lambda: raw("prctl", 1, 0, 0, 0, 0),
    "dumpable": lambda: raw("prctl", 4, 1, 0, 0, 0),
    "openat2": lambda: raw("openat2", 0, 0, 0, 0),
    "inherit futex": lambda: raw("futex", 0, 6, 0, 0, 0, 0),
    "unshare": lambda: raw("unshare", 0),
    "second filter": lambda: raw("seccomp", 0xFFFF, 0, 0),
    "own table": lambda: raw("close_range", 4000, 4000, 2),
}
unsafe = {  # these would do harm here without the filter
    "thread with its own table": lambda: raw("clone", 0x3D0B00, 0, 0, 0, 0),
    "namespaces": lambda: raw("clone", 0x10000000 | 17, 0, 0, 0, 0),
    "io_uring": lambda: raw("io_uring_setup", 0, 0),
    "huge pages": lambda: mmap.mmap(-1, 4096, flags=0x22 | 0x40000) and None,
    "clone3": lambda: raw("clone3", 0, 0),
}
program = seccomp.build(platform.machine())
print(json.dumps([report(None, safe), report(program, safe | unsafe)]))
"""


@supported
def test_forbidden_calls_fail_with_eperm(library, tmp_path):
    free, caged = run(FORBIDDEN, tmp_path, library)
    refused = {name for name, answer in free.items() if answer == "EPERM"}
    assert refused <= {"unshare"}  # which containers refuse without our help
    assert caged.pop("clone3") == "ENOSYS"
    assert len(caged) > 30
    assert {name: answer for name, answer in caged.items() if answer != "EPERM"} == {}


READING = """
program = seccomp.build(platform.machine(), read_only=True)
path = folder + "/readable"
print(json.dumps(report(program, {
    "read": lambda: open(path).read(),
    "write": lambda: open(path, "w").close(),
    "append": lambda: open(path, "a").close(),
    "create": lambda: open(folder + "/new", "x").close(),
    "unnamed": lambda: os.open(folder, os.O_TMPFILE),
    "truncate": lambda: os.open(path, os.O_TRUNC),
    "lock": lambda: fcntl.lockf(open(path), fcntl.LOCK_SH),
    "flush": lambda: os.fsync(os.open(path, 0)),
})))
"""


@supported
def test_read_only_reads_and_writes_nothing(tmp_path):
    got = run(READING, tmp_path)
    assert got.pop("read") == "42"
    assert got.pop("write") == "EPERM"
    assert set(got.values()) == {"EPERM"}, got
    assert [path.name for path in tmp_path.iterdir()] == ["readable"]
    assert (tmp_path / "readable").read_text() == "42"


THREADS = """
ready, answers = threading.Event(), []
def old_thread():
    ready.wait()
    answers.append(told(lambda: socket.socket().close()))
def start():
    global thread
    thread = threading.Thread(target=old_thread)
    thread.start()
def join():
    ready.set()
    thread.join()
    return answers
print(json.dumps(report(seccomp.build(platform.machine()), {"thread": join}, before=start)))
"""


@supported
def test_a_thread_from_before_is_under_the_filter_too(tmp_path):
    assert run(THREADS, tmp_path) == {"thread": ["EPERM"]}


KILLED = """
def interrupt():  # mov eax, 20 (getpid of i386); int 0x80; ret
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
def x32():
    return libc.syscall(ctypes.c_long(0x40000000 + 39))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
program = seccomp.build(platform.machine())
print(json.dumps([report(program, {"": interrupt}), report(program, {"": x32})]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="int 0x80 and x32 are of x86_64")
def test_other_entries_to_the_kernel_end_the_process(tmp_path):
    assert run(KILLED, tmp_path) == [signal.SIGSYS, signal.SIGSYS]


REFUSED = """
bad = bytes(8)  # not a program: the kernel takes no load of a constant
def caught():
    try:
        seccomp.install(bad, os.getpid())
    except OSError as error:
        return [errno.errorcode[error.errno], "seccomp filter not installed" in str(error)]
print(json.dumps(report(None, {"install": caught})))
"""


@supported
def test_a_program_that_the_kernel_refuses_is_an_error(tmp_path):
    assert run(REFUSED, tmp_path) == {"install": ["EINVAL", True]}
