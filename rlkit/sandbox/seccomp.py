"""The system calls that sandboxed code may make: an allow-list as a classic-BPF seccomp filter.

What is not listed fails with EPERM, which Python shows as PermissionError. Refused on purpose,
though they look harmless: ``tkill``, ``rt_sigqueueinfo`` and ``pidfd_*`` (signals to others),
``io_uring`` (its work passes no filter), ``timer_create``, ``memfd_create``, ``shmget`` and
``sendmsg`` (kernel memory outside RLIMIT_AS, some of it outlives the process; passed
descriptors), ``get_robust_list`` (addresses in other processes), ``process_madvise``,
``setpriority``, ``sched_setaffinity``, ``ioprio_set`` (change other processes), ``splice`` and
``sendfile`` (in-kernel passing of pages; ``shutil`` falls back to reading), ``openat2`` (its
flags lie in memory, where no filter looks), ``fsync`` and ``fadvise64`` (they slow the disk for
all), ``mlock``, ``add_key``.

The fork server loads this file by its path: standard library only. Sources:
https://docs.kernel.org/userspace-api/seccomp_filter.html and the kernel's tables of call numbers.
"""

import ctypes
import os
import platform
import struct

Instruction = tuple[int, int, int, int]
"""One instruction of classic BPF: code, jump if true, jump if false (0-255), k (32 bits)."""
Check = tuple[int, int, tuple[int, ...]]
"""Half-word of the arguments (2 i = low, 2 i + 1 = high half of argument i), mask, allowed values
of the masked half-word."""
Rule = tuple[tuple[Check, ...], ...]
"""Alternatives; the call is allowed when all checks of one of them hold."""

OWN_PID = 0x7FFFFFFF
"""Stands for the pid until ``install``; above every pid, so that a forgotten one allows nobody."""
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit value, column
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_DENY = _ERRNO | 1  # EPERM
_LOAD, _AND, _JEQ, _JGE, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06

# name, number on x86_64, number on aarch64
_CALLS = """
    read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62,
    close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
    open 2 -, openat 257 56, fcntl 72 25, ioctl 16 29, stat 4 -, fstat 5 80, lstat 6 -,
    newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
    readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, statfs 137 43,
    fstatfs 138 44, umask 95 166,
    poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -,
    epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
    epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19,
    socketpair 53 199, sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockname 51 204,
    getpeername 52 205, getsockopt 55 209,
    mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214,
    clone 56 220, clone3 435 435, futex 202 98, set_robust_list 273 99, rseq 334 293,
    membarrier 324 283, set_tid_address 218 96, arch_prctl 158 -, prctl 157 167, exit 60 93,
    exit_group 231 94, sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121,
    sched_getscheduler 145 120, sched_get_priority_min 147 126, sched_get_priority_max 146 125,
    getpriority 140 141, getcpu 309 168, wait4 61 260, waitid 247 95,
    kill 62 129, tgkill 234 131, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
    rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132,
    pause 34 -, alarm 37 -, setitimer 38 103, getitimer 36 102, restart_syscall 219 128,
    nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
    gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165,
    getrlimit 97 163, prlimit64 302 261, sysinfo 99 179, uname 63 160, getrandom 318 278,
    getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175,
    getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158,
    getpgrp 111 -, getpgid 121 155, getsid 124 156
"""


# The kernel cuts an argument to its C type: of an int only the low half counts, so only that is
# checked and garbage above it is let through; of a pointer both halves count.
def _is(argument: int, *values: int, mask: int = 0xFFFFFFFF) -> Check:
    return (2 * argument, mask & 0xFFFFFFFF, values)


def _without(argument: int, bits: int) -> Check:
    return _is(argument, 0, mask=bits)


def _null(argument: int) -> tuple[Check, Check]:
    return _is(argument, 0), (2 * argument + 1, 0xFFFFFFFF, (0,))


def _signal(argument: int) -> Rule:
    # Not SIGCONT (18): sent again and again, it takes back the stop of a session between its cells.
    numbers = _is(argument, 0, 32, 48, 64, mask=~0xF), _is(argument, 16, 17, *range(19, 32))
    return tuple((_is(0, OWN_PID), check) for check in numbers)


_MESSAGE_FLAGS = 0x2 | 0x20 | 0x40 | 0x100 | 0x4000  # PEEK, TRUNC, DONTWAIT, WAITALL, NOSIGNAL
_RULES: dict[str, Rule] = {
    # Exactly the flags of pthread_create (musl adds the bit of CLONE_DETACHED). A thread without
    # CLONE_FILES has its own descriptors: its pipes would escape both RLIMIT_NOFILE and RLIMIT_AS.
    "clone": ((_is(0, 0x3D0F00, mask=0xFFBFFFFF),),),
    "close_range": ((_without(2, ~0x4),),),  # CLOEXEC yes; UNSHARE is that same escape
    "kill": _signal(1),
    "tgkill": _signal(2),
    # WAIT and WAIT_BITSET; WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAKE_BITSET on private words only:
    # on a page that two runs map, such as a library's, a wake-up would carry bits between them.
    # Not the priority-inheriting ones: nothing here needs them and they break kernels often.
    "futex": ((_is(1, 0, 9, mask=~0x180),), (_is(1, 129, 131, 132, 133, 138, mask=~0x100),)),
    "mmap": ((_without(3, 0x40000),),),  # MAP_HUGETLB: one pool for the whole host
    # O_ASYNC asks for signals to an owner, which for a terminal is the foreground job. Not
    # F_SETOWN, F_SETSIG (signals to others), F_SETPIPE_SZ (memory), F_NOTIFY, F_SETLEASE.
    "fcntl": (
        (_is(1, 4), _without(2, 0x2000)),  # F_SETFL
        # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. No locks: F_GETLK tells
        # one run what another has locked of a library, and without landlock they stop a writer.
        (_is(1, 0, 1, 2, 3, 1030, 1032),),
    ),
    # TCGETS, TCGETS2 (glibc >= 2.42), TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX; TIOCSTI
    # and TIOCLINUX would type into a terminal.
    "ioctl": ((_is(1, 0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450),),),
    # SET_NAME, GET_NAME, CAPBSET_READ, GET_DUMPABLE, GET_PDEATHSIG, GET_SECCOMP, GET_NO_NEW_PRIVS
    "prctl": ((_is(0, 15, 16, 23, 3, 2, 21, 39),),),
    "prlimit64": ((_is(0, 0, OWN_PID), *_null(2)),),  # to read one's own limits
    # AF_UNIX, SOCK_STREAM below the flags: from a datagram pair one can send to any path's socket,
    # such as /dev/log, which landlock does not cover.
    "socketpair": ((_is(0, 1), _is(1, 1, mask=0xF)),),
    "sendto": ((*_null(4), _without(3, ~_MESSAGE_FLAGS)),),  # MSG_OOB: CVE-2025-38236
    "recvfrom": ((_without(3, ~_MESSAGE_FLAGS),),),
    # SOL_SOCKET: TYPE, ERROR, SNDBUF, RCVBUF, PROTOCOL, DOMAIN. SO_PEERPIDFD would open a pidfd.
    "getsockopt": ((_is(1, 1), _is(2, 3, 4, 7, 8, 38, 39)),),
}
_NO_WRITING = 0x1 | 0x2 | 0x40 | 0x200 | 0x400 | 0x400000  # WRONLY RDWR CREAT TRUNC APPEND TMPFILE
_READ_ONLY: dict[str, Rule] = {
    "open": ((_without(1, _NO_WRITING),),),
    "openat": ((_without(2, _NO_WRITING),),),
}


def _return(action: int) -> list[Instruction]:
    return [(_RETURN, 0, 0, action)]


def _code(rule: Rule) -> list[Instruction]:
    code: list[Instruction] = []
    for alternative in rule:
        tail = _return(_ALLOW)
        for half, mask, values in reversed(alternative):
            test: list[Instruction] = [(_LOAD, 0, 0, 16 + 4 * half)]  # seccomp_data.args
            if mask != 0xFFFFFFFF:
                test.append((_AND, 0, 0, mask))
            last = len(values) - 1
            for i, value in enumerate(values):
                test.append((_JEQ, last - i, len(tail) if i == last else 0, value))
            tail = test + tail
        code += tail
    return code + _return(_DENY)


def _tree(leaves: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    # Leaves begin at a number and end before the next one's. A tree, not a chain: on loading, the
    # kernel tries every number, to let the calls that need no look at arguments pass at once.
    if len(leaves) == 1:
        return leaves[0][1]
    middle = len(leaves) // 2
    left, right = _tree(leaves[:middle]), _tree(leaves[middle:])
    return [(_JGE, len(left), 0, leaves[middle][0]), *left, *right]


def build(machine: str, *, read_only: bool = False) -> bytes:
    """Assemble the filter for ``platform.machine()`` as an array of the kernel's sock_filter.

    ``read_only`` also refuses to open files for writing: for kernels without landlock.
    Raises ValueError for another machine.
    """
    if machine not in _ARCHITECTURES:
        known = " and ".join(_ARCHITECTURES)
        raise ValueError(f"machine={machine!r} has no table of system calls: {known} have one")
    audit, column = _ARCHITECTURES[machine]
    rules = _RULES | (_READ_ONLY if read_only else {})
    allow, deny = _return(_ALLOW), _return(_DENY)
    codes: dict[int, list[Instruction]] = {}
    for name, *numbers in (entry.split() for entry in _CALLS.split(",")):
        if numbers[column] != "-":
            codes[int(numbers[column])] = _code(rules[name]) if name in rules else allow
            if name == "clone3":  # its flags lie in memory; told ENOSYS, libc falls back to clone
                codes[int(numbers[column])] = _return(_ERRNO | 38)
    leaves = [(0, codes.get(0, deny))]
    for number in range(1, max(codes) + 2):
        code = codes.get(number, deny)
        if code != leaves[-1][1]:
            leaves.append((number, code))
    if machine == "x86_64":  # the x32 calls report the same architecture but count from here
        leaves.append((0x40000000, _return(_KILL_PROCESS)))
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch: int 0x80 on x86_64 has other numbers
        (_JEQ, 1, 0, audit),
        *_return(_KILL_PROCESS),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        *_tree(leaves),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


class _Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_uint16), ("filter", ctypes.c_char_p)]


# Made at import: in the child nothing is looked up, and landlock may already be on there.
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_LIBC.syscall.argtypes = [ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, ctypes.POINTER(_Program)]
_LIBC.syscall.restype = ctypes.c_long
_NR_SECCOMP = {"x86_64": 317, "aarch64": 277}.get(platform.machine(), -1)


def install(program: bytes, pid: int) -> None:
    """Put this process with all its threads, for good, under a program from ``build``.

    ``pid`` is the process's own pid as ``os.getpid()`` tells it: the only one it may signal.
    Sets no_new_privs, which the kernel demands. Raises OSError if the kernel refuses.
    """
    patched = program.replace(OWN_PID.to_bytes(4, "little"), pid.to_bytes(4, "little"))
    if _LIBC.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    # SECCOMP_SET_MODE_FILTER with TSYNC: a thread that exists already would stay outside.
    result = _LIBC.syscall(_NR_SECCOMP, 1, 1, ctypes.byref(_Program(len(patched) // 8, patched)))
    if result != 0:  # a positive one is the thread that cannot follow
        error = ctypes.get_errno() if result < 0 else 1
        raise OSError(error, f"seccomp filter not installed: {os.strerror(error)}")
