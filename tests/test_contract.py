"""What the files promise each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_command_of_the_readme():
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("uv run")]
    assert commands == ["uv run pytest"]
    assert "```bash\nuv run pytest\n```" in README


def test_ruff_finds_nothing():
    run = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


LINES = {"prepare.py": 700, "referee.py": 700, "train.py": 630, "program.md": 150, "README.md": 150}


@pytest.mark.parametrize("name", LINES)
def test_files_stay_small(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= LINES[name] and (name == "README.md" or max(map(len, lines)) <= 120)


def test_dependencies_are_pinned_exactly():
    wanted = re.findall(r'^    "([^"]+)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert len(wanted) > 8 and all(re.fullmatch(r"[\w-]+==[\d.]+", name) for name in wanted)
    assert "torch==2.11.0" in wanted


def test_options_in_the_readme_exist():
    run = subprocess.run([sys.executable, ROOT / "prepare.py", "--help"], capture_output=True, text=True)
    assert {*re.findall(r"(--[a-z][a-z-]+)", README)} <= {*re.findall(r"--[a-z-]+", run.stdout)}
