"""What the files promise each other."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README, PROGRAM = (ROOT / "README.md").read_text(), (ROOT / "program.md").read_text()


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
    scripts = (ROOT / "prepare.py", ROOT / "tests/bench.py")
    offered = [subprocess.check_output([sys.executable, script, "--help"], text=True) for script in scripts]
    ours = re.sub(r"```bash\n(?:claude|codex)[\s\S]*?```", "", README)
    assert {*re.findall(r"(--[a-z][a-z-]+)", ours)} <= {*re.findall(r"--[a-z-]+", "".join(offered))}


def test_settings_let_the_agent_edit_the_player_and_run_the_loop():
    rules = json.loads((ROOT / ".claude/settings.json").read_text())["permissions"]
    assert [rule for rule in rules["allow"] if not rule.startswith("Bash(")] == ["Edit(/train.py)"]
    patterns = [rule[5:-1] for rule in rules["allow"] if rule.startswith("Bash(")]
    commands = re.findall(r"(?:^ +|`)((?:git|uv|echo|tail|cat|AUTORESEARCH_\w+=)\b[^`\n]*)", PROGRAM, re.M)
    parts = [part for command in commands if " " in command for part in command.split(" && ")]
    refused = [part for part in parts if not any(fnmatch(f"{part} ", f"{pattern}*") for pattern in patterns)]
    assert len(parts) > 12 and [part[:16] for part in refused] == ["git worktree add"]  # a human's part
