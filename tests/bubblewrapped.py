"""What the tests of the sandbox, and of what runs in it, begin with."""

from __future__ import annotations

import os
import shutil

import pytest


def require_bubblewrap() -> None:
    """Fail without bubblewrap; skip where ANTIPASTO_NO_SANDBOX says so."""
    message = "These tests need bubblewrap (Debian: apt-get install bubblewrap)"
    if os.environ.get("ANTIPASTO_NO_SANDBOX"):
        pytest.skip(f"{message}; ANTIPASTO_NO_SANDBOX leaves them out.")
    if shutil.which("bwrap") is None:
        pytest.fail(f"{message}. ANTIPASTO_NO_SANDBOX=1 leaves them out.")
