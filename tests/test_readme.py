"""The README's code runs as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def test_there_are_two() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number: int, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(BLOCKS[number])
    result = subprocess.run(
        [sys.executable, "block.py"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    if number == 0:
        assert (tmp_path / "runs" / "grpo" / "adapter" / "adapter_model.safetensors").exists()
    else:
        scores = [float(number) for number in re.findall(r"-?\d\.\d+", result.stdout.splitlines()[-1])]
        assert scores[0] < 0 < min(scores[1:])  # the sum; the exploit that pairs show, and the one that none shows
