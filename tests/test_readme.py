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


def test_there_are_four() -> None:
    assert len(BLOCKS) == 4


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
    elif number == 1:
        assert "torch.Size([4, 8, 18])" in result.stdout
    elif number == 3:
        assert len((tmp_path / "runs" / "routed-rollouts.jsonl").read_text().splitlines()) == 5 * 8
    else:
        lines = result.stdout.splitlines()
        without, random = (float(line.split()[1]) for line in lines[-2:])
        assert lines[0].startswith("1.0 ")
        assert without < random  # the exploit is less likely without the quarantine than without the control's book
