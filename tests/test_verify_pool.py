"""The processes that compare expressions: limits, deaths, threads, forks, what is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlkit import verify_pool
from rlkit.paths import root
from rlkit.verify import GoldError, Verdict, check_gold, verify, verify_all
from rlkit.verify_nursery import ForkError, Nursery, Pair, Worker
from rlkit.verify_pool import Judged, Pool

BOMB = "10^{10^{10}}"
BOMBS = [BOMB, "9^{9^{9^{9}}}", "99999999!", "11^{11^{11}}", "88888888!"]
DEADLINE = 30.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Pool]:
    pool = Pool(workers=2, seconds=0.4)
    pool.judge([("x", "x")])
    yield pool
    pool.close()


@pytest.fixture
def pool(shared: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """The pool behind ``verify``, with a short limit and nothing remembered."""
    monkeypatch.setattr(verify_pool, "_pool", shared)
    monkeypatch.setattr(verify_pool, "_cache", type(verify_pool._cache)())
    return shared


def asked(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """A list that fills with the pairs that reach the processes."""
    seen: list[Pair] = []
    judge = pool.judge

    def noted(pairs: list[Pair], seconds: float | None = None) -> list[Judged]:
        seen.extend(pairs)
        return judge(pairs, seconds)

    monkeypatch.setattr(pool, "judge", noted)
    return seen


def verdicts(pool: Pool, *pairs: Pair) -> list[str]:
    return [judged.verdict for judged in pool.judge(pairs)]


def until(done: Callable[[], bool]) -> None:
    """Wait for something that is due soon; a deadline instead of waiting for ever."""
    end = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(host: int) -> list[int]:
    """Nursery and workers of a host, by their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[-2:-1] == [b"%d" % host] and any(b"_verify_worker" in w for w in words):
            found.append(int(folder.name))
    return [pid for pid in found if runs(pid)]


def test_bombs_run_in_parallel_and_each_costs_one_worker(pool: Pool) -> None:
    before = pool.forked
    plain = [(rf"\frac{{{n}}}{{7}}", rf"\frac{{{2 * n}}}{{14}}") for n in range(1, 6)]
    mixed = [pair for n, bomb in enumerate(BOMBS) for pair in (("x^7+1", bomb), plain[n])]
    assert verdicts(pool, *mixed) == ["timeout", "right"] * 5
    assert 5 <= pool.forked - before <= 7  # at most the two that start, and one for each bomb
    assert len(pool._all) <= 2


def test_a_bomb_off_the_main_thread(pool: Pool) -> None:
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.append(verify(BOMB, "x^7+1", "expression")))
    thread.start()
    thread.join()
    assert found == [Verdict.TIMEOUT]
    assert verify(r"\frac{4}{6}", r"\frac{2}{3}", "expression") is Verdict.RIGHT


def test_equal_pairs_are_asked_once_and_order_is_kept(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(pool, monkeypatch)
    items = [
        ("x+1", "1+x", "expression"),
        ("12", "12", "integer"),
        (BOMB, "1+x", "expression"),
        (None, "1+x", "expression"),
        ("x+2", "1+x", "expression"),
        ("$x+1$", "1+x", "expression"),
        (r"\frac{", "1+x", "expression"),
    ]
    expected = ["right", "right", "timeout", "unparsable", "wrong", "right", "unparsable"]
    assert verify_all(items * 16) == expected * 16
    assert seen == [("1+x", "x+1"), ("1+x", BOMB), ("1+x", "x+2")]
    assert verify_all([]) == []


def test_what_is_known_starts_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [("x+1", "1+x", "expression"), ("x-1", "1+x", "expression")]
    assert verify_all(items) == ["right", "wrong"]
    monkeypatch.setattr(verify_pool, "_pool", None)  # using it would raise
    assert verify_all(items[::-1]) == ["wrong", "right"]


@pytest.mark.parametrize(("lasting", "asks"), [(True, [1, 1, 1]), (False, [1, 1, 2])])
def test_a_time_out_is_kept_for_good_only_if_the_expression_had_its_cpu_time(
    lasting: bool, asks: list[int], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 0 s, just before the time is over, and at its end, on a clock of the test."""
    calls: list[object] = []

    def judge(pairs: list[Pair]) -> list[Judged]:
        calls.append(pairs)
        return [Judged("timeout", lasting)] * len(pairs)

    monkeypatch.setattr(pool, "judge", judge)
    counts = []
    for seconds in (0.0, verify_pool.UNDECIDED_SECONDS - 0.5, verify_pool.UNDECIDED_SECONDS):
        monkeypatch.setattr(verify_pool, "_now", lambda seconds=seconds: 1000.0 + seconds)
        assert verify_all([("y", "x", "expression")] * 16) == ["timeout"] * 16
        counts.append(len(calls))
    assert counts == asks
    assert all(call == [("x", "y")] for call in calls)


class Scripted:
    """Stands in for the pool: replies by pair, one after another; the last one stays."""

    seconds = 3.0

    def __init__(self, replies: dict[Pair, list[Judged]]) -> None:
        self.replies = replies
        self.asked: list[tuple[Pair, float | None]] = []

    def judge(self, pairs: list[Pair], seconds: float | None = None) -> list[Judged]:
        found = []
        for pair in pairs:
            self.asked.append((pair, seconds))
            left = self.replies[pair]
            found.append(left.pop(0) if len(left) > 1 else left[0])
        return found


def scripted(monkeypatch: pytest.MonkeyPatch, replies: dict[Pair, list[Judged]]) -> Scripted:
    stand_in = Scripted(replies)
    monkeypatch.setattr(verify_pool, "_pool", stand_in)
    monkeypatch.setattr(verify_pool, "_cache", type(verify_pool._cache)())
    return stand_in


ALONE = ("x+1", "x+1")
LATE = Judged("timeout", lasting=False)
DIED = Judged("unparsable", lasting=False)
GOLD = Judged("gold")


@pytest.mark.parametrize("first", [LATE, DIED, Judged("timeout")])
def test_a_gold_that_is_undecided_at_first_is_asked_again_with_more_time(
    first: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = scripted(monkeypatch, {ALONE: [first, Judged("right")]})
    check_gold("x+1", "expression")
    assert stand_in.asked == [(ALONE, None), (ALONE, 9.0)]
    check_gold("x+1", "expression")
    assert len(stand_in.asked) == 2  # known by now


@pytest.mark.parametrize("reply", [LATE, DIED])
def test_a_gold_that_stays_undecided_is_not_called_unparsable(
    reply: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {ALONE: [reply]})
    with pytest.raises(GoldError, match=r"'p7': gold.*took longer than the limit.*9 s") as caught:
        check_gold("x+1", "expression", "p7")
    assert "cannot be parsed" not in str(caught.value)


@pytest.mark.parametrize("reply", [GOLD, Judged("unparsable"), Judged("wrong")])
def test_a_gold_that_does_not_equal_itself_is_refused_at_once(
    reply: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = scripted(monkeypatch, {ALONE: [reply]})
    with pytest.raises(GoldError, match="cannot be parsed"):
        check_gold("x+1", "expression")
    assert len(stand_in.asked) == 1


@pytest.mark.parametrize("alone", [LATE, DIED, Judged("right"), Judged("unparsable")])
def test_model_text_and_load_never_raise_while_a_gold_is_sound_or_undecided(
    alone: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {("x+1", "y"): [GOLD], ALONE: [alone]})
    assert verify_all([("y", "x+1", "expression")] * 2) == ["unparsable"] * 2


@pytest.mark.parametrize(("cpu", "lasting"), [(0.3, True), (0.1, False)])
def test_cpu_time_decides_whether_a_time_out_lasts(
    cpu: float, lasting: bool, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Nursery.end

    def ended(self: Nursery, worker: Worker) -> float:
        end(self, worker)
        return cpu

    monkeypatch.setattr(Nursery, "end", ended)
    assert pool.judge([("x^7+1", BOMB)]) == [Judged("timeout", lasting)]


def test_a_worker_accounts_for_its_cpu_time(pool: Pool) -> None:
    worker = pool._take(pool._epoch, fresh=True)
    assert worker.ask(("x", "x"), 30.0) is not None
    spent = worker.cpu
    assert spent >= 0
    assert worker.ask(("x^7+1", BOMB), 0.3) is None
    assert 0 < pool._give(worker, keep=False) < 2


def test_old_verdicts_make_room(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_pool, "CACHE_PAIRS", 2)
    seen = asked(pool, monkeypatch)
    for answer in ("a", "b", "a", "c", "a", "b"):
        verify(answer, "x+1", "expression")
    assert [answer for _, answer in seen] == ["a", "b", "c", "b"]


def test_a_worker_killed_while_idle_is_replaced(pool: Pool) -> None:
    assert verdicts(pool, ("x", "x"), ("x", "y")) == ["right", "wrong"]
    for worker in pool._idle:
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda pid=worker.pid: not runs(pid))
    assert verdicts(pool, ("x", "x"), ("x", "y")) == ["right", "wrong"]


def test_a_worker_that_grew_large_is_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_pool, "_RETIRE_KIB", 1)
    verdicts(pool, ("x", "x"), ("x", "x"))  # leaves no idle worker behind
    before = pool.forked
    assert verdicts(pool, ("x", "x"), ("x", "y"), ("x", "z")) == ["right", "wrong", "wrong"]
    assert pool.forked - before == 3


def in_background(pool: Pool, *pairs: Pair) -> tuple[threading.Thread, list[Judged]]:
    found: list[Judged] = []
    thread = threading.Thread(target=lambda: found.extend(pool.judge(pairs)))
    thread.start()
    return thread, found


def busy(pool: Pool) -> list[Worker]:
    return [worker for worker in list(pool._all) if worker not in pool._idle]


def test_an_item_whose_worker_dies_twice_is_unparsable() -> None:
    patient = Pool(workers=1, seconds=60.0)
    patient.judge([("x", "x")])
    thread, found = in_background(patient, ("x^7+1", BOMB))
    for _ in range(2):
        until(lambda: bool(busy(patient)))
        (worker,) = busy(patient)
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda worker=worker: worker not in patient._all)
    thread.join()
    assert found == [Judged("unparsable", lasting=False)]
    assert patient.forked == 2  # the first one was idle before
    assert verdicts(patient, ("x", "x"), ("x", "y")) == ["right", "wrong"]
    patient.close()


def test_a_killed_nursery_is_replaced() -> None:
    pool = Pool(workers=1, seconds=0.4)
    pool.judge([("x", "x")])
    assert pool._nursery is not None
    first = pool._nursery.process
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not runs(first.pid))
    assert verdicts(pool, ("x+1", "1+x")) == ["right"]  # its worker goes on
    assert verdicts(pool, ("x^7+1", BOMB), ("x", "x")) == ["timeout", "right"]
    assert pool._nursery.process.pid != first.pid
    until(lambda: len(descendants(os.getpid())) >= 2)
    pool.close()


def test_many_threads_at_once(pool: Pool) -> None:
    found: dict[int, list[Verdict]] = {}

    def work(number: int) -> None:
        gold = rf"\frac{{1}}{{{number + 3}}}"
        items = [(rf"\frac{{{n}}}{{{n * (number + 3)}}}", gold, "expression") for n in (1, 2)]
        found[number] = verify_all([*items, (BOMBS[number % 2], gold, "expression"), *items])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: ["right", "right", "timeout", "right", "right"] for number in range(6)}


def test_an_interrupted_call_shifts_no_reply(pool: Pool) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            verify_all([(bomb, "x^7+1", "expression") for bomb in BOMBS])
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    pairs = [("x", "x"), ("x", "y"), (r"\frac{", "x"), ("x", "x")] * 3
    assert verdicts(pool, *pairs) == ["right", "wrong", "gold", "right"] * 3


@pytest.mark.parametrize(
    "answer",
    [
        "\x00",
        "\ud800",
        "x\ny",
        'x"]\n[0,"x',
        "(" * 480 + "1" + ")" * 480,
        r"\sqrt{" * 160 + "2" + "}" * 160,
        r"\frac" * 200,
        "99999999!",
        r"\int_0^1 x^{x^{x}} dx",
        r"\sum_{n=1}^{10^{9}} \frac{1}{n^{n}}",
        r"\lim_{x\to 0} \int_0^x e^{t^{t}} dt",
        "{" * 400 + "}" * 400,
    ],
)
def test_hostile_texts_are_not_right_and_harm_no_neighbour(answer: str, pool: Pool) -> None:
    items = [(text, "x+1", "expression") for text in ("1+x", answer, "x+1", "x+2")]
    first, found, *rest = verify_all(items)
    assert [first, *rest] == ["right", "right", "wrong"]
    assert found is not Verdict.RIGHT


def test_a_bad_gold_is_named(pool: Pool) -> None:
    with pytest.raises(GoldError, match=r"Gold answer '\\\\frac\{' cannot be parsed.*remove"):
        verify_all([("x", "x+1", "expression"), ("x", r"\frac{", "expression")])
    with pytest.raises(ValueError, match="answer_type='number'"):
        verify_all([("x", "x+1", "number")])


def test_nothing_stays_open_after_close() -> None:
    pool = Pool(workers=2, seconds=0.3)
    before = len([*Path("/proc/self/fd").iterdir()])
    verdicts(pool, ("x^7+1", BOMB), ("x", "x"), ("x", "y"))
    assert pool._nursery is not None
    group = pool._nursery.process.pid
    pool.close()
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    until(lambda: not any(os.getpgid(pid) == group for pid in descendants(os.getpid())))
    pool.close()
    assert verdicts(pool, ("x", "x")) == ["right"]  # starts again
    pool.close()


def test_close_ends_a_call_under_way() -> None:
    pool = Pool(workers=1, seconds=60.0)
    pool.judge([("x", "x")])
    caught: list[str] = []

    def work() -> None:
        try:
            pool.judge([("x^7+1", BOMB), ("x", "x")])
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: bool(busy(pool)))
    pool.close()
    thread.join()
    assert caught and "closed" in caught[0]
    assert pool._nursery is None


def test_a_pool_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "_verify_worker.py"
    broken.write_text("raise ImportError('No module named math_verify')")
    pool = Pool(workers=2, _file=broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="No module named math_verify"):
            pool.judge([("x", "x"), ("x", "y")])
    pool.close()


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root()
    )


@pytest.fixture
def small() -> Iterator[Pool]:
    """A pool of one worker, which is idle, with a nursery of its own."""
    pool = Pool(workers=1, seconds=30.0)
    assert verdicts(pool, ("x", "x")) == ["right"]
    yield pool
    pool.close()


def test_a_start_that_fails_kills_the_group_before_its_number_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    killpg, communicate = os.killpg, subprocess.Popen.communicate

    def noted_kill(group: int, number: int) -> None:
        calls.append("killpg")
        killpg(group, number)

    def noted_wait(self: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        calls.append("communicate")
        return communicate(self)

    monkeypatch.setattr(os, "killpg", noted_kill)
    monkeypatch.setattr(subprocess.Popen, "communicate", noted_wait)
    broken = tmp_path / "_verify_worker.py"
    broken.write_text("raise ImportError('nothing here')")
    with pytest.raises(RuntimeError, match="nothing here"):
        Nursery(broken)
    assert calls == ["killpg", "communicate"]


def test_a_host_without_sockets_kills_no_worker(
    small: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nursery, idle = small._nursery, list(small._idle)

    def none_left() -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(verify_pool.socket, "socketpair", none_left)
        with pytest.raises(RuntimeError, match=r"Too many open files.*ulimit"):
            small._take(small._epoch, fresh=True)
    assert (small._nursery, small._idle) == (nursery, idle)
    assert runs(idle[0].pid)
    assert verdicts(small, ("x", "y")) == ["wrong"]


def test_a_nursery_that_cannot_fork_says_so_and_lives_on(
    small: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*_: object) -> Worker:
        raise ForkError("Resource temporarily unavailable")

    nursery = small._nursery
    with monkeypatch.context() as patch:
        patch.setattr(Nursery, "fork", no_process)
        with pytest.raises(RuntimeError, match=r"temporarily unavailable.*ulimit"):
            small._take(small._epoch, fresh=True)
    assert small._nursery is nursery
    assert verdicts(small, ("x", "y")) == ["wrong"]


def test_the_nursery_replies_the_error_of_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlkit import _verify_worker

    def no_process() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_process)
    monkeypatch.setattr(os, "killpg", lambda *_: None)  # it would be the group of the tests
    ours, theirs = socket.socketpair()
    channel, other = socket.socketpair()
    with ours, theirs, channel, other:
        socket.send_fds(ours, [b"fork\n"], [other.fileno()])
        ours.shutdown(socket.SHUT_WR)
        _verify_worker.nurse(theirs, lambda gold, answer: "right", os.getppid())
        assert ours.recv(64) == b"-11\n"


@pytest.mark.parametrize("error", [OSError(11, "no process"), ValueError("not a number")])
def test_a_new_nursery_that_fails_too_is_a_runtime_error(
    error: Exception, small: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Worker:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Nursery, "fork", fails)
        with pytest.raises(RuntimeError, match=str(error.args[-1])):
            small._take(small._epoch, fresh=True)
    assert (small._nursery, small._idle, small._all) == (None, [], set())
    assert verdicts(small, ("x", "y")) == ["wrong"]


def test_a_nursery_that_answers_late_is_given_up(
    small: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply would be taken for that of the next worker."""
    assert small._nursery is not None
    first = small._nursery
    worker = small._take(small._epoch, fresh=False)
    os.kill(first.process.pid, signal.SIGSTOP)
    first.control.settimeout(0.05)
    assert small._give(worker, keep=False) == 0.0
    assert small._nursery is None and first.process.poll() == -signal.SIGKILL
    assert verdicts(small, ("x", "y")) == ["wrong"]


def test_importing_is_light_and_no_process_outlives_the_caller() -> None:
    host = child(
        "import sys; from rlkit import verify as v, verify_pool as p\n"
        "assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)\n"
        "assert p._pool._nursery is None\n"
        "v.verify('x+1', '1+x', 'expression'); print(p._pool._nursery.process.pid)\n"
        "raise SystemExit(3)"
    )
    out, _ = host.communicate()
    assert host.returncode == 3 and int(out) > 0
    until(lambda: not descendants(host.pid))


def test_no_process_outlives_a_killed_host_not_even_a_busy_one() -> None:
    # A forked copy of the host that lives on must not keep the processes alive either.
    host = child(
        "import os, threading, time; from rlkit import verify_pool as p\n"
        "pool = p.Pool(workers=2, seconds=60.0); pool.judge([('x', 'x')])\n"
        f"threading.Thread(target=lambda: pool.judge([('x^7+1', '{BOMB}')]), daemon=True).start()\n"
        "while len(pool._all) == len(pool._idle): time.sleep(0.01)\n"
        "copy = os.fork()\n"
        "if copy: print(copy, flush=True)\n"
        "time.sleep(60)"
    )
    assert host.stdout is not None
    copy = int(host.stdout.readline())
    assert len(descendants(host.pid)) >= 2
    os.kill(host.pid, signal.SIGKILL)
    host.wait()
    try:
        until(lambda: not descendants(host.pid))
        assert runs(copy)
    finally:
        os.kill(copy, signal.SIGKILL)
        host.stdout.close()


def test_a_forked_copy_has_processes_of_its_own(pool: Pool) -> None:
    assert verify("x+1", "1+x", "expression") is Verdict.RIGHT
    read, write = os.pipe()
    copy = os.fork()
    if copy == 0:
        try:
            pair = [("x+2", "2+x", "expression"), ("x+2", "1+x", "expression")]
            os.write(write, b"%d " % len(pool._all) + ",".join(verify_all(pair)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as lines:
        assert lines.read() == "0 right,wrong"
    os.waitpid(copy, 0)
    until(lambda: not descendants(copy))
    assert verify("x+3", "3+x", "expression") is Verdict.RIGHT


def test_parsing_in_two_stages_changes_no_tree() -> None:
    code = (
        "import sys; sys.path.insert(0, 'rlkit'); sys.path.insert(0, 'benchmarks')\n"
        "import _answers, _verify_worker as w\n"
        "from latex2sympy2_extended.latex2sympy2 import PSParser, _Latex2Sympy\n"
        "if sys.argv[1] == 'two': w.parse_in_two_stages()\n"
        "def tree(text):\n"
        "    parser = _Latex2Sympy().create_parser(text)\n"
        "    try: return parser.math().toStringTree(recog=parser)\n"
        "    except Exception: return 'error'\n"
        "for batch in _answers.steps_of(3, 10, 4, 6, True):\n"
        "    for answer, gold, kind in batch:\n"
        "        if kind == 'expression': print(tree(answer), tree(gold))"
    )
    one, two = (
        subprocess.run(
            [sys.executable, "-c", code, name],
            capture_output=True, text=True, check=True, cwd=root(),
        ).stdout
        for name in ("one", "two")
    )  # fmt: skip
    assert one == two
    assert one.count("(math") > 20


def test_short_cuts_change_no_verdict() -> None:
    code = (
        "import logging, sys; sys.path.insert(0, 'rlkit'); sys.path.insert(0, 'benchmarks')\n"
        "import _answers, _verify_worker as w\n"
        "logging.disable(logging.CRITICAL)\n"
        "if sys.argv[1] == 'plain':\n"
        "    w.parse_in_two_stages = w.read_digits_at_once = w.simplify_only_in_doubt = lambda: 0\n"
        "judge = w.load_judge()\n"
        "golds = ['x^2-1', 'xy', '2\\\\pi', '\\\\sqrt{5+2\\\\sqrt{6}}', '\\\\frac13', '007',"
        " '10\\\\%', '\\\\frac{x}{3}', '4 - e', '(x-1)(x+1)']\n"
        "answers = ['(x+1)(x-1)', 'yx', '6.2831853', '\\\\sqrt{2}+\\\\sqrt{3}', '0.3333333', '7',"
        " '0.1', '0.3333x', '1.2817182', '1-x^2', '2\\\\pi+0.0000001', 'x^2-1+y']\n"
        "pairs = [(gold, answer) for gold in golds for answer in answers]\n"
        "for batch in _answers.steps_of(4, 10, 2, 6, True):\n"
        "    pairs += [(gold, answer) for answer, gold, kind in batch if kind == 'expression']\n"
        "for pair in pairs: print(judge(*pair))"
    )
    plain, short = (
        subprocess.run(
            [sys.executable, "-c", code, name],
            capture_output=True, text=True, check=True, cwd=root(),
        ).stdout.split()
        for name in ("plain", "short")
    )  # fmt: skip
    assert short == plain
    assert len(plain) == 10 * 12 + 2 * 6
    assert plain.count("right") >= 7 and plain.count("wrong") >= 80
