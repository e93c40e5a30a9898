"""The fork server: numpy and sympy warm, one thread, no secret; forks a caged child on demand.

Run by path, never imported by the package: it must start without rlkit, torch and the caller's
``__main__``. Standard library and the preloaded packages only. Descriptor 0 is a socket of whole
messages to the host; when the host closes it or dies, this process ends and the kernel ends the
children (PR_SET_PDEATHSIG). Messages, each with its descriptors:

- in: a JSON configuration, with a pidfd of the host; then ``<id> <session>`` with channel, stdout
  and stderr of a child to fork;
- out: a JSON object about this process, then ``born <id> <pid>`` with the child's pidfd,
  ``dead <id> <wait status> <CPU seconds>`` and ``fail <id> <errno>``.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib
import json
import os
import platform
import resource
import select
import signal
import site
import socket
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import cage  # type: ignore[import-not-found]
import runner  # type: ignore[import-not-found]
import seccomp  # type: ignore[import-not-found]

del sys.path[0]

MODULES = """
bisect cmath collections concurrent.futures contextlib copy csv dataclasses datetime decimal enum
fractions functools heapq io itertools json math numbers operator pprint queue random re statistics
string textwrap threading time traceback typing warnings encodings.idna
""".split()  # noqa: SIM905 - a list of these would be one line each
WARM_UP = """
import sympy as s
x, y = s.symbols("x y")
s.solve(x**2 - 5*x + 6, x), s.solve([x + y - 3, x - y - 1], [x, y]), s.solve(x**3 - 2*x + 1)
s.simplify((x**2 - 1)/(x - 1)), s.factor(x**4 - 1), s.expand((x + y)**5), s.diff(s.sin(x)*x, x)
s.integrate(x**2*s.exp(x), x), s.limit(s.sin(x)/x, x, 0), s.series(s.cos(x), x, 0, 5)
s.factorint(360360), s.divisors(60), s.isprime(10**9 + 7), s.totient(36), s.binomial(10, 3)
s.Matrix([[1, 2], [3, 4]]).inv(), s.sqrt(8).evalf(), s.summation(x, (x, 1, 10)), s.nsolve(x**2-2, 1)
str(s.Rational(1, 3) + s.pi), repr(s.sympify("x**2/2 + sin(x)")), s.latex(x/2)
"""
NUMPY_WARM_UP = """
import numpy as n
n.linalg.solve(n.eye(2), n.ones(2)), n.linalg.eig(n.eye(2)), n.fft.fft(n.ones(4)), n.random.rand(2)
repr(n.arange(3) / 2), n.roots([1, -3, 2]), n.polynomial.Polynomial([1, 2])(3)
"""


def preload(packages: list[str], roots: list[str]) -> list[str]:
    """Import everything once; the folders that children may read.

    The package folders leave ``sys.path`` again: what was not asked for cannot be imported, and
    says so in the words that Python users know.
    """
    sys.path += roots
    for name in [*MODULES, *packages]:
        importlib.import_module(name)
    site.setquit()  # exit(), quit() and help(), which -S leaves out
    site.sethelper()
    sys.argv = [""]
    if "numpy" in packages:
        exec(NUMPY_WARM_UP, {})
    if "sympy" in packages:
        exec(WARM_UP, {})
    sys.path[:] = [path for path in sys.path if path not in roots]
    sys.path_importer_cache.clear()
    readable = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    for name in packages:
        module = sys.modules[name]
        readable.update(getattr(module, "__path__", [str(module.__file__)]))
    places = {os.path.realpath(root) for root in roots}
    for line in Path("/proc/self/maps").read_text().splitlines():  # where shared libraries lie
        path = line.partition("/")[2]
        if ".so" in path:
            library = Path("/" + path)  # a module of one file may lie among the caller's own files
            readable.add(str(library if str(library.parent) in places else library.parent))
    return sorted(readable)


def child(config: dict[str, Any], ready: dict[str, Any], number: int, session: bool) -> None:
    """Shut the cage, then run cells. Descriptors 0 to 3 are already the child's own."""
    layers, parent = config["layers"], ready["pid"]
    alone = "uid" in layers
    os.setsid()
    cage.first_to_be_killed()
    if "rlimits" in layers:
        cage.limit(config["limits"], ready["bytes"], session=session, alone=alone)
    if "chroot" in layers:
        os.fchdir(ready["empty"])
        os.chroot(".")
    if alone:
        cage.become(cage.FIRST_UID + number % cage.UIDS)
    cage.no_capabilities()
    cage.seal(parent, ready["rules"])
    os.closerange(4, 1 << 16)
    if "seccomp" in layers:
        seccomp.install(ready["filter"], os.getpid())
    runner.serve()


def start(config: dict[str, Any]) -> dict[str, Any]:
    """Preload and prepare every layer; what the children and the host need to know."""
    layers = config["layers"]
    if "landlock" in layers and not cage.landlock_abi():
        raise OSError("this kernel has no landlock, or it is switched off (lsm= at boot)")
    program = seccomp.build(platform.machine(), read_only="landlock" not in layers)
    readable = preload(config["packages"], config["roots"])
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if threads != 1:
        raise RuntimeError(f"{threads} threads after the imports; forking needs exactly one")
    rules = cage.ruleset(readable) if "landlock" in layers else None
    gc.collect()
    cage.collapse()
    gc.freeze()  # or the first collection in a child would copy every page
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE")
    cage.opaque()  # without landlock, a child of the same user could read its memory
    ready = {"pid": os.getpid(), "bytes": size, "rules": rules, "filter": program}
    if "chroot" in layers:
        empty = tempfile.mkdtemp()
        ready["empty"] = os.open(empty, os.O_RDONLY | os.O_DIRECTORY)
        Path(empty).rmdir()  # still a place to be, and nothing can be made in it
    return ready


def fork(config: dict[str, Any], ready: dict[str, Any], message: bytes, fds: list[int]) -> int:
    """Fork one child that owns ``fds``; its process id."""
    number, session = map(int, message.split())
    pid = os.fork()
    if pid:
        return pid
    try:
        # A descriptor passed in may sit on 0 to 3: first all of them away, then each to its place.
        null = os.open(os.devnull, os.O_RDONLY)
        away = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (null, fds[1], fds[2], fds[0])]
        for i, fd in enumerate(away):
            os.dup2(fd, i)
        child(config, ready, number, bool(session))
    except BaseException:
        traceback.print_exc()  # before the cell it can only be the cage: the host shows it
    finally:
        os._exit(0)


def serve(control: socket.socket, host: int, config: dict[str, Any], ready: dict[str, Any]) -> None:
    """Fork and reap until the host is gone."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(host, select.POLLIN)
    children: dict[int, tuple[int, int]] = {}  # pidfd -> id, pid
    try:
        while True:
            for event, _ in poll.poll():
                if event in children:
                    number, pid = children.pop(event)
                    poll.unregister(event)
                    os.close(event)
                    _, status, used = os.wait4(pid, 0)
                    seconds = used.ru_utime + used.ru_stime
                    control.send(b"dead %d %d %.6f" % (number, status, seconds))
                elif event == host or not (order := socket.recv_fds(control, 64, 3))[0]:
                    return
                elif (child := born(control, order, config, ready)) is not None:
                    pidfd = os.pidfd_open(child[1])
                    children[pidfd] = child
                    poll.register(pidfd, select.POLLIN)
                    socket.send_fds(control, [b"born %d %d" % child], [pidfd])
    finally:  # a host that is process 1 of a container would inherit zombies
        for _, pid in children.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def born(
    control: socket.socket, order: tuple[Any, ...], config: dict[str, Any], ready: dict[str, Any]
) -> tuple[int, int] | None:
    """Fork the child of an order; its id and pid, None if there is no process left."""
    message, fds, *_ = order
    number = int(message.split()[0])
    try:
        return number, fork(config, ready, message, fds)
    except OSError as error:  # the host may try later
        control.send(b"fail %d %d" % (number, error.errno or errno.EAGAIN))
        return None
    finally:
        for fd in fds:  # a copy here, or in a later child, would hold the pipes open
            os.close(fd)


def main() -> None:
    """Start, report, serve; a failure to start is told to the host in words."""
    control = socket.socket(fileno=os.dup(0))
    message, fds, _, _ = socket.recv_fds(control, 1 << 18, 1)
    config = json.loads(message)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a pidfd for each child
    try:
        ready = start(config)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    control.send(json.dumps({"abi": cage.landlock_abi(), "python": sys.version}).encode())
    try:
        serve(control, fds[0], config, ready)
    except OSError:  # the host closed its end while we were telling it something
        return


if __name__ == "__main__":
    main()
