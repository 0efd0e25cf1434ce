"""The documents, the settings and the code agree."""

import doctest
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import reference

import prepare

ROOT = Path(__file__).parent.parent
README, PROGRAM = (ROOT / "README.md").read_text(), (ROOT / "program.md").read_text()


def test_ci_runs_the_command_of_the_readme():
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("uv run")]
    assert commands == ["uv run pytest"]
    assert "\n`uv run pytest` runs the tests" in README


def test_ruff_finds_nothing():
    run = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


BYTES = {"prepare.py referee.py train.py": 80_000, "train.py": 24_690, "program.md": 7 * 1024, "README.md": 9 * 1024}


@pytest.mark.parametrize("names", BYTES)
def test_files_stay_small(names):
    texts, width = [(ROOT / name).read_text() for name in names.split()], 110 if ".py" in names else 120
    assert sum(len(text.encode()) for text in texts) <= BYTES[names]
    lines = [line for text in texts for line in text.splitlines()]
    assert max(len(line) for line in lines if line[:1] != "|") <= width  # except tables


def test_dependencies_are_pinned_exactly():
    wanted = re.findall(r'^    "([^"]+)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert len(wanted) > 8 and all(re.fullmatch(r"[\w-]+(\[default\])?==[\d.]+", name) for name in wanted)
    assert "torch==2.11.0" in wanted


def test_options_in_the_readme_exist():
    scripts = (ROOT / name for name in ("prepare.py", "tests/bench.py", "tests/dry_gpu.py"))
    offered = [subprocess.check_output([sys.executable, script, "--help"], text=True) for script in scripts]
    others = r"(?s)\n## (Run the agent.*?(?=\n## Your job)|More machines.*?(?=\n## Design))"  # commands of other tools
    ours = re.sub(others, "", README)
    assert {*re.findall(r"(--[a-z][a-z-]+)", ours)} <= {*re.findall(r"--[a-z-]+", "".join(offered))}


def test_the_night_loop_restarts_the_agent_until_a_file_stop_exists(tmp_path):
    [loop] = re.findall(r"```bash\n(rm -f stop; pause=.*?)```", README, re.S)
    assert len(loop.splitlines()) <= 7
    for name, script in dict(
        claude='[ "$1" = -p ] && echo "$2" >> agents && [ $(wc -l < agents) = 9 ] && touch stop; false',
        sleep="echo $1 >> pauses",
    ).items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}")
    subprocess.run(["bash", "-c", loop], cwd=tmp_path, env=env, check=True, timeout=50)
    assert (tmp_path / "agents").read_text().count("program.md") == 9
    assert (tmp_path / "pauses").read_text().split() == "20 40 80 160 320 600 600 600 600".split()


def test_settings_let_the_agent_edit_train_py_and_run_the_loop():
    rules = json.loads((ROOT / ".claude/settings.json").read_text())["permissions"]
    edited = [rule[7:-1] for rule in rules["allow"] if rule.startswith("Edit(./")]
    patterns = [rule[5:-1] for rule in rules["allow"] if rule.startswith("Bash(")]
    assert edited == ["train.py", "run.log"] and len(edited + patterns) == len(rules["allow"])
    commands = re.findall(r"(?:^ +|`)((?:(?:git|uv|echo|tail|cat) |ls\b|AUTORESEARCH_\w+=)[^`\n]*)", PROGRAM, re.M)
    commands = [command for command in commands if " " in command or command == "ls"]
    commands = [command.replace(" 2>&1", "") for command in commands]
    parts = [part for command in commands for part in re.split(" ?(?:&&|;)(?: |$)", command) if part]
    redirected = [re.split(" >+ ", part) for part in parts]  # [command, its output file]
    assert {target for _, *targets in redirected for target in targets} == {*edited}
    refused = [part for part, *_ in redirected if not any(fnmatch(part, p) or fnmatch(f"{part} ", p) for p in patterns)]
    assert len(parts) > 12 and refused == []


@pytest.mark.parametrize("module", [prepare, reference])
def test_the_examples_in_docstrings_are_right(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
