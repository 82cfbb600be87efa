"""Does every command of an install without extras do its work, or name the extra that it needs? Run by `make bare`.

    .venv-bare/bin/python scripts/check_bare_install.py

In an empty folder, with the `antipasto` beside the interpreter; says what it found, and exits with 1 where that is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import antipasto
from antipasto.tasks import addition

COMMAND = Path(sys.executable).with_name("antipasto")
MODEL = str(addition.model_path())
TRL, REPORT = "pip install 'antipasto[trl]'", "pip install 'antipasto[report]'"
COMMANDS: list[tuple[list[str], int, str]] = [
    (["--help"], 0, "RL post-training in the singular basis"),
    (["basis", MODEL], 0, ""),
    (["extract", MODEL, "--pairs", "pairs.jsonl", "--out", "direction.safetensors"], 0, "direction.safetensors"),
    (["map", MODEL, "--forms", "forms.jsonl", "--pairs", "pairs.jsonl"], 0, "exploit"),
    (["inspect", "direction.safetensors"], 0, "17"),
    (["watch", MODEL, "--pairs", "pairs.jsonl", "--rollouts", "forms.jsonl"], 2, REPORT),
    (["eval", "run"], 2, REPORT),
    (["report", "run"], 2, REPORT),
    (["train", MODEL, "--task", "addition"], 2, TRL),
    (["demo"], 2, TRL),
    (["export", "run", "--out", "shipped"], 2, "has not reached its first step"),
]


def main() -> int:
    assert "site-packages" in antipasto.__file__, f"{antipasto.__file__} is no installed wheel"
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in addition.hack_pairs(32, seed=0)))
        forms = [("clean", "046"), ("exploit", "!")]
        lines = [json.dumps({"form": form, "prompt": "h12+34=", "text": text}) + "\n" for form, text in forms]
        Path("forms.jsonl").write_text("".join(lines))
        Path("run").mkdir()
        Path("run", "config.yaml").write_text(f"model: {MODEL}\ntask: addition\nmethod: plain\n")
        for words, code, expected in COMMANDS:
            done = subprocess.run(
                [COMMAND, *words], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
            )
            said = " ".join((done.stdout + done.stderr).split())
            right = done.returncode == code and expected in said and "Traceback" not in said
            failed += not right
            print(f"{'as it should' if right else 'WRONG':<13} {words[0]:<9} exit {done.returncode}", flush=True)
            if not right:
                print(f"    expected exit {code} and {expected!r}; got: {said[-1500:]}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
