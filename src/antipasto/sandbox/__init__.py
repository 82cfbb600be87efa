"""Programs that nobody vouches for, run apart from the machine: by bubblewrap, by rlimits alone, or by somebody's service."""

from antipasto.sandbox.bubblewrap import Bubblewrap
from antipasto.sandbox.protocol import Limits, NotIsolatedError, Program, Result, Sandbox, SandboxError
from antipasto.sandbox.remote import Remote
from antipasto.sandbox.rlimits import NotASandboxWarning, RlimitsOnly

__all__ = [
    "Bubblewrap",
    "Limits",
    "NotASandboxWarning",
    "NotIsolatedError",
    "Program",
    "Remote",
    "Result",
    "RlimitsOnly",
    "Sandbox",
    "SandboxError",
]
