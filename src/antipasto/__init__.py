"""antipasto: one trainable number per singular direction of each weight, and a quarantine for what should not ship.

The maths is in `antipasto.adapter.functional`, the notation in CONTRIBUTING. Importing this package registers the method with
PEFT, so that ``get_peft_model`` and ``PeftModel.from_pretrained`` know it.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the command line, ``antipasto`` or ``python -m antipasto``."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # Python has not yet resolved the module to run
        words = sys.orig_argv
        return "antipasto" in words[words.index("-m") + 1 :][:1]
    return Path(started).name in ("antipasto", "antipasto.exe")


def _load() -> None:
    """Import the public names into this module."""
    public = importlib.import_module("antipasto.public")
    globals().update({name: getattr(public, name) for name in public.__all__}, __all__=public.__all__)


if TYPE_CHECKING:
    from antipasto.public import *  # noqa: F403
    from antipasto.public import __all__ as __all__
elif not _is_command():
    _load()
else:  # lazily: torch, transformers and PEFT take seconds, and --help does not need them

    def __getattr__(name: str) -> Any:
        if name == "__all__" or not name.startswith("__"):  # Python itself looks up other dunder names
            _load()
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]
