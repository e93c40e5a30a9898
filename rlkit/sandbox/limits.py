"""What one run may use."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Limits of one run, or of one cell of a session. Time in the queue never counts.

    Attributes:
        cpu_seconds: CPU time of all threads, 0.01 to 3600. The main limit: unlike wall time it
            does not depend on what else the machine does. STILL-3 had 5 s of wall time.
        wall_seconds: time since the code started, without the time it waited for a core; for code
            that sleeps. At least cpu_seconds; 3 times as much leaves room for a busy machine.
        memory_mib: address space beyond the warm interpreter's, MiB, 16 to 1,048,576.
        stack_mib: stack of the main thread, MiB, 1 to 120 (the kernel keeps 128 free for it).
        output_kib: kept of stdout and of stderr, each, KiB, 1 to 1024; half head, half tail.
        output_stop_kib: output beyond which a run is stopped, KiB, at least output_kib.
        files: open files and pipes, 8 to 1024. No file can be written, so there is no other limit.
        threads: threads, 1 to 1024. Exact where each child has a user of its own (``uid`` in the
            layers); elsewhere only memory_mib bounds them.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 15.0
    memory_mib: int = 512
    stack_mib: int = 120
    output_kib: int = 8
    output_stop_kib: int = 512
    files: int = 64
    threads: int = 64

    def __post_init__(self) -> None:
        ranges = {
            "cpu_seconds": (0.01, 3600),
            "wall_seconds": (self.cpu_seconds, 86_400),
            "memory_mib": (16, 1 << 20),
            "stack_mib": (1, 120),
            "output_kib": (1, 1024),
            "output_stop_kib": (self.output_kib, 1 << 20),
            "files": (8, 1024),
            "threads": (1, 1024),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            least, most = ranges[field.name]
            kind = float if "seconds" in field.name else int
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise TypeError(f"{field.name}={value!r}: expected a number ({kind.__name__})")
            if not least <= value <= most:
                raise ValueError(f"{field.name}={value!r}: expected {least:g} to {most:g}")
