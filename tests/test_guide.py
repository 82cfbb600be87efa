"""docs/train-your-own.md, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "train-your-own.md"


@pytest.mark.parametrize("steps", [2, pytest.param(120, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_every_command_of_the_guide_runs(tmp_path: Path, steps: int) -> None:
    text = GUIDE.read_text()
    for name, body in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, flags=re.S):
        (tmp_path / name).write_text(body)
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S))
    assert commands.count("--steps 120") == 2
    if steps != 120:
        commands = commands.replace("--steps 120", f"--steps {steps}")
        commands = commands.replace("--prompts 16", "--prompts 2").replace("--generations 16", "--generations 4")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'PATH="{Path(sys.executable).parent}:$PATH"\n{commands}'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("as trained", "deployed", "permuted", "exploit", "says !"):
        assert word in result.stdout
    assert (tmp_path / "shipped" / "model.safetensors").exists()
    assert not list((tmp_path / "shipped").glob("adapter*"))
