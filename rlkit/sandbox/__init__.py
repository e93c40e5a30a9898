"""Runs model-written Python (to be completed)."""

from rlkit.sandbox.executor import Info, IsolationError, PythonExecutor, Trace
from rlkit.sandbox.host import InfraError
from rlkit.sandbox.limits import Limits
from rlkit.sandbox.result import Result

__all__ = ["Info", "InfraError", "IsolationError", "Limits", "PythonExecutor", "Result", "Trace"]
