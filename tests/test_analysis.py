"""analysis.ipynb on valid and invalid logs, and by the command of the README."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import referee

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "analysis.ipynb").read_text())


def row(val_bpb, status, description="an idea", commit="abcdef0"):
    return f"{commit}\t{val_bpb:.6f}\t0.0\t{status}\t{description}"


def night(count):
    """A log in which one experiment in five wins, and one in ten crashes."""
    rng, best, rows = random.Random(count), 1.2, [row(1.2, "keep", "baseline"), row(1.203, "discard", "baseline")]
    for number in range(count - 2):
        kind, commit = rng.random(), f"{number:07x}"
        if kind < 0.1:
            rows.append(row(0, "crash", "too bold", commit))
            continue
        value = best + rng.uniform(-0.004, -0.001) if kind < 0.3 else best + rng.uniform(0, 0.5)
        best = min(best, value)
        rows.append(row(value, "keep" if value == best else "discard", f"idea {number}", commit))
    return rows


def journal_record(commit, **changes):
    seconds = dict.fromkeys(("total_seconds", "training_seconds", "eval_seconds", "startup_seconds"), 1.0)
    return seconds | dict(commit=commit, run=f"{commit} {changes}", status="ok", time_budget=300.0, data="python",
                          device="cpu", time=0, tokens_per_second=5, standard=True, names=[], lock="") | changes


@pytest.fixture
def read(tmp_path, monkeypatch, capsys):
    """Run the cells on a log in tmp_path. Returns their output and their variables."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(referee, "REPOSITORY", tmp_path)

    def run(rows, records=()):
        Path("results.tsv").write_text("\n".join([referee.HEADER, *rows]) + "\n")
        Path("runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"half')
        names = {}
        for cell in NOTEBOOK["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        assert Path("progress.png").stat().st_size > 5_000
        return capsys.readouterr().out, names

    return run


def test_a_log_without_rows(read):
    output, names = read([])
    assert names["experiments"] == [] and "keep           0" in output and "noise: not known" in output


def test_a_first_crash_is_not_a_score(read):
    wider = row(1.1, "keep", "wider, for $5 and $", commit="2")
    output, names = read([row(0, "crash"), row(1.2, "keep", commit="1"), wider])
    assert names["running"] == [1.2, 1.1]
    assert "from 1.2000 to 1.1000, the last by 2 wider, for $5" in output and "crash          1    33%" in output


def test_invalid_rows_are_reported_by_line(read):
    wrong = ["<<<<<<< HEAD", row(1.1, "kept"), "a\tnan\t0.0\tkeep\tb"]
    output, names = read([row(1.2, "keep"), *wrong, row(1.3, "discard")])
    assert [e["val_bpb"] for e in names["experiments"]] == [1.2, 1.3]
    assert [f"line {number} is skipped" in output for number in range(2, 7)] == [False, True, True, True, False]


def test_noise_comes_from_the_journal_or_else_from_the_log(read):
    rows = [row(1.2, "keep", commit="a"), row(1.3, "discard", commit="a"), row(1.4, "discard", commit="b")]
    values = dict(a=(1.2, 1.22), c=(9.0, 9.1))  # c has no row
    records = [journal_record(commit, val_bpb=value) for commit in values for value in values[commit]]
    assert "noise: 0.0141\n" in read(rows, records)[0]
    assert "noise: 0.0707\n" in read(rows)[0]


def test_a_second_run_of_a_kept_commit_changes_its_mean(read):
    scores = dict(zip((1.2, 1.1, 1.3, 1.0, 1.15), "abbcb", strict=True))
    names = read([row(value, "keep", commit=commit) for value, commit in scores.items()])[1]
    assert names["running"] == pytest.approx([1.2, 1.1, 1.2, 1.0, 1.0])
    gains = [(round(gain, 4), i, e["commit"]) for gain, i, e in names["gains"]]
    assert gains == [(0.1833, 3, "c"), (0.0167, 1, "b")]


def test_two_thousand_rows(read):
    rows = night(2_000)
    output, names = read(rows)
    values = [e["val_bpb"] for e in names["experiments"] if e["status"] == "keep"]
    assert len(names["experiments"]) == 2_000 and names["running"][-1] == min(values) == values[-1]
    assert names["spread"] == pytest.approx(0.003 / 2**0.5)
    gains = [line.split()[0] for line in output.splitlines() if " #" in line]
    assert len(gains) == 15 and gains == sorted(gains, reverse=True)


def test_the_command_of_the_readme(tmp_path):
    command = "uv run jupyter execute analysis.ipynb"
    assert command in (ROOT / "README.md").read_text()
    for name in ("analysis.ipynb", "prepare.py", "referee.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    rows = night(30)
    (tmp_path / "results.tsv").write_text("\n".join([referee.HEADER, *rows]) + "\n")
    (tmp_path / "runs.jsonl").write_text(json.dumps(journal_record(rows[-1][:7], val_bpb=1.0)) + '\n{"half')
    jupyter = [Path(sys.executable).with_name("jupyter"), *command.split()[3:]]
    run = subprocess.run(jupyter, cwd=tmp_path, env=os.environ | dict(AUTORESEARCH_CACHE=str(tmp_path)),
                         capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "progress.png").stat().st_size > 5_000


def test_the_notebook_is_committed_without_outputs():
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"])
