"""Runs model-written Python where it can do no harm, thousands of times per training step.

```python
with PythonExecutor(Limits(cpu_seconds=1, wall_seconds=3)) as executor:
    executor.run("print(1 + 1)").stdout
```

Processes: the host (``executor``, ``host``, ``child``) → the fork server (``zygote``), warm and
without secrets → a child per run or session (``cage`` shuts it, ``runner`` executes). ``levels``
picks the strongest isolation that a real child cannot break.

Covered; each line is a class of ``tests/hostile.jsonl``, run by ``tests/test_sandbox_hostile.py``:

- reading the host's files, also through libraries, links and ctypes (file-read, symlink, ctypes);
- writing, deleting, changing modes or times, filling disks, leaving something for another run
  (file-write, file-delete, disk, cross-talk);
- network and unix sockets (network); other processes: starting, signalling, tracing, reading,
  limiting them (process, fork-bomb, signal, ptrace, proc); the GPU (gpu);
- the caller's environment, memory and gold answers (env-secret, reward-hack, python-escape);
- loops that nothing inside can stop, sleep, recursion, compile-time bombs (hang, cpu-loop,
  uncatchable-loop, huge-pow, regex, sympy-hang, recursion, source);
- memory, also outside RLIMIT_AS, and threads (memory-bomb, threads); output floods (stdout-flood);
- crashes, exits, closed descriptors, hostile objects, patched built-ins (crash, sys.exit, os._exit,
  closing-fds, hostile-object, monkeypatch): they end or mislead their own run only;
- forged results and text that poses as the prompt's own (reward-hack; ``rlkit.tool_text``);
- the same between the cells of a session (session-*); risky system calls (kernel).

Not covered:

- a flaw in the kernel itself, in one of some 120 system calls that are allowed: run the whole job
  in a virtual machine where that matters;
- at levels B and C, names, sizes and times of files (``stat``); see ``Info.hides_names``;
- threads made by raw system calls where children share a user (levels A and C without root):
  ``memory_mib`` bounds them only in so far as they have stacks;
- page tables, which RLIMIT_AS does not count: up to about three times ``memory_mib`` in all;
- time and cache side channels, also between runs that work together;
- what lies in Python's library folders is readable;
- level D with ``allow_degraded``: files and memory of the user's processes are readable;
- a run's own report: code can hide its error or forge the value of its last line, never a limit
  that it ran into, and nothing of another run. Rewards must not read it.
- aarch64: the table of system calls is checked against libseccomp's, nothing was run there.
"""

from rlkit.sandbox.executor import Info, IsolationError, PythonExecutor, Trace
from rlkit.sandbox.host import InfraError
from rlkit.sandbox.limits import Limits
from rlkit.sandbox.result import Result

__all__ = ["Info", "InfraError", "IsolationError", "Limits", "PythonExecutor", "Result", "Trace"]
