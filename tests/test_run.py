"""How runs end, what they log, and how git commands affect the log. Runs train.py and a tiny model as processes."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import begin, block, driver_of, until

import referee

ROOT = Path(__file__).parent.parent
CPU_LOCK = f"cpu-{os.uname().nodename}.lock"  # machines may share a cache

# A train.py whose model has one parameter tensor. The value of WASTE decides its score
SOURCE = """
import ctypes, os, resource, sys, time
import torch
from prepare import Tokenizer
from referee import Run

WASTE = 10.0  # logit of a token that never occurs: lower is better

class Model(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(size).index_fill_(0, torch.tensor([size - 1]), WASTE))

    def forward(self, idx):
        return self.bias.expand(*idx.shape, -1)

with Run() as run:
    tokenizer = Tokenizer.from_directory()
    run.start()
    while run.progress() < 1:
        run.step(torch.tensor(WASTE), 1)
        time.sleep(0.05)
        pass  # in the loop
    run.score(Model(tokenizer.get_vocab_size()), tokenizer, 16)
    pass  # after the score
"""


@pytest.fixture(scope="module")
def driver():
    with driver_of("tiktoken", "torch", "torch._dynamo") as process:
        yield process


def edit(path, *replacements):
    text = path.read_text()
    for old, new in replacements:
        text, count = re.subn(old, lambda _, new=new: new, text, flags=re.M)
        assert count == 1, f"{path.name}: {count} times {old!r}"
    path.write_text(text)


def prepared(cache, toy):
    """A new cache in which the toy corpus is current."""
    cache.mkdir(parents=True)
    (cache / toy.name).symlink_to(toy)
    (cache / "current").write_text(toy.name)
    return cache


class Lab:
    """A scratch repository with a tiny train.py and a small default budget, and its cache with the toy corpus."""

    def __init__(self, driver, folder, toy, budget=0.2, source=SOURCE):
        self.driver, self.folder, self.repository, self.clock = driver, folder, folder / "repo", 1_700_000_000
        self.repository.mkdir(parents=True)
        self.cache = prepared(folder / "cache", toy)
        for name in ("prepare.py", "referee.py"):
            shutil.copy(ROOT / name, self.repository)
        (self.repository / ".gitignore").write_text("__pycache__/\n")
        (self.repository / "results.tsv").write_text(f"{referee.HEADER}\n1234567\t1.000000\t0.0\tkeep\tas shipped\n")
        edit(self.repository / "prepare.py", (r'(?<="AUTORESEARCH_TIME_BUDGET", )300\.0, 1', f"{budget}, 0"))
        (self.repository / "train.py").write_text(source)
        self.git("init", "-q", "-b", "main")
        self.git("add", ".")
        self.commit("the repository")

    def git(self, *words, **env):
        self.clock += 1  # every commit has its own time
        env = os.environ | dict(GIT_AUTHOR_DATE=f"{self.clock} +0000") | env
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(command, cwd=self.repository, check=True, capture_output=True, env=env).stdout.decode(
            errors="replace").strip()

    def commit(self, subject):
        self.git("commit", "-q", "-a", "--allow-empty", "-m", subject)

    def head(self):
        return self.git("rev-parse", "HEAD")[:7]

    def start(self, folder=None, script="train.py", **env):
        """Start train.py. The driver writes its output to `folder`."""
        env["AUTORESEARCH_CACHE"] = str(self.cache)
        begin(self.driver, [script], self.repository, folder or self.folder, env)

    def running(self):
        """The pid of a run that has printed two losses."""
        log = self.folder / "run.log"
        until(lambda: log.exists() and "step 00002" in log.read_text(), f"two losses in {log}")
        return int((self.folder / "pid").read_text())

    def wait(self, folder=None):
        """(exit code, output), once all processes of the run have ended."""
        folder = folder or self.folder
        until((folder / "exit").exists, f"all writers of {folder / 'run.log'} to exit")
        return int((folder / "exit").read_text()), (folder / "run.log").read_text(errors="replace")

    def end(self, folder=None):
        """(exit code, log, report) of a run that has ended."""
        code, log = self.wait(folder)
        assert log.count("---\n") == 1, log
        return code, log, block(log)

    def experiment(self, **env):
        self.start(**env)
        return self.end()[2]

    def look(self):
        """The lines that `uv run referee.py` prints."""
        folder = self.folder / "look"
        folder.mkdir(exist_ok=True)
        self.start(folder, script="referee.py")
        code, output = self.wait(folder)
        assert code == 0, output
        return output.splitlines()

    def set_waste(self, waste):
        edit(self.repository / "train.py", ("^WASTE = [0-9.]+", f"WASTE = {waste}"))

    def set_line(self, line, where="in the loop"):
        indent = "        " if where == "in the loop" else "    "
        edit(self.repository / "train.py", (f".*# {where}", f"{indent}{line}  # {where}"))

    def set_limits(self, train, evaluate=60):
        edit(self.repository / "referee.py", ("(?<=EVAL_LIMIT = )900, 300, 1800", f"60, {train}, {evaluate}"))

    def journal(self):
        """The last record of each run, in the order of their starts."""
        records = {}
        for line in (self.cache / "runs.jsonl").read_text().splitlines():
            if line:
                record = json.loads(line)
                records[record["run"]] = record
        return [*records.values()]

    def results(self):
        header, *rows = (self.repository / "results.tsv").read_text().split("\n")
        assert header == "commit\tval_bpb\tmemory_gb\tstatus\tdescription" and rows.pop() == ""
        return [row.split("\t") for row in rows]


@pytest.fixture
def lab(driver, tmp_path, toy):
    return Lab(driver, tmp_path, toy)


def memory_gb(record):
    """memory_gb in results.tsv: without a GPU, the peak memory of the process; 0 without a score."""
    if record["status"] != "ok":
        return "0.0"
    assert record["peak_vram_mb"] > 100
    return f"{record['peak_vram_mb'] / 1024:.1f}"


def test_one_experiment_from_start_to_report(driver, tmp_path, toy):
    source = (ROOT / "train.py").read_text().replace("\nCOMPILE = True", "\nCOMPILE = False")
    lab = Lab(driver, tmp_path, toy, 3.0, source)
    lab.start()
    code, log, report = lab.end()
    assert code == 0
    assert [*report][:9] == ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent",
                             "total_tokens_M", "num_steps", "num_params_M", "depth"]
    assert report["status"] == "ok" and report["mfu_percent"] == "n/a" and report["device"].startswith("cpu")
    assert float(report["training_seconds"]) >= 3 and 0 < float(report["val_bpb"]) < 4
    losses = [float(loss) for loss in re.findall(r"^step \d+ .* loss ([\d.]+)", log, re.M)]
    assert losses[-1] < losses[0]
    assert "\r" not in log and log.startswith(f"commit {report['commit']}, seed 42: ")


# Every ending of the real train.py

KILLED = "killed from outside, or by the system because memory ran out"
HUNG = r"hung; the traceback is in .*\.trace"
ENDINGS = {  # name: a line or a signal after the third step, status, error, exit code
    "hung": ("exec('while True: pass')", "timeout", HUNG, 1),
    "hung in C": ("ctypes.PyDLL(None).sleep(100)", "timeout", HUNG, 1),
    "Ctrl-C": (signal.SIGINT, "crash", "interrupted", 1),
    "terminated": (signal.SIGTERM, "crash", KILLED, -15),
    "hung up": (signal.SIGHUP, "crash", KILLED, -1),
    "killed": (signal.SIGKILL, "crash", KILLED, -9),
    "crash": (r"raise ValueError('no such\nlayer')", "crash", "ValueError: no such layer", 1),
    "exit": ("sys.exit('gave up')", "crash", "SystemExit: gave up", 1),
    "nan": ("loss.mul_(math.nan)", "nan", "training loss is nan at step 3", 1),
    "oom": ("raise torch.OutOfMemoryError('of 80 GB')", "oom", "OutOfMemoryError: of 80 GB", 1),
    "refused": ("break", "refused", r"trained for \d+\.\d s of a budget of 60\.0 s: stop when progress\(\) is 1", 1),
    "ok": ("pass", "ok", "", 0),
}  # fmt: skip


def small_train(line):
    """train.py with a tiny model, and `line` after the third step."""
    source = (ROOT / "train.py").read_text()
    changes = {rf"^    {name} = .*": f"    {name} = {value}"
               for name, value in dict(DEPTH=1, N_EMBD=32, HEAD_DIM=16, TOTAL_BATCH=256, NGRAMS=()).items()}
    changes |= {"^COMPILE = True": "COMPILE = False", "^CONTEXT_ROWS = .*": "CONTEXT_ROWS = 2053"}
    changes["(?<=run.step.loss, accum . micro . T.)"] = f"\n            if run.record['num_steps'] == 3: {line}"
    for old, new in changes.items():
        source, count = re.subn(old, lambda _, new=new: new, source, flags=re.M)
        assert count == 1, old
    return f"import ctypes, sys, time\n{source}"


@pytest.fixture(scope="module")
def endings(driver, toy, tmp_path_factory):
    """{name: Lab}, one for each ending of train.py."""
    labs = {}
    for name, (what, status, *_) in ENDINGS.items():
        number = what if isinstance(what, int) else None
        source = small_train("time.sleep(60)" if number else what)
        budget = {"timeout": 5.0, "ok": 5.0}.get(status, 60.0)  # enough for three steps under load
        lab = labs[name] = Lab(driver, tmp_path_factory.mktemp("ending"), toy, budget, source)
        (lab.cache / CPU_LOCK).write_text("999999999\n")  # of a dead process
        if status == "timeout":
            lab.set_limits(3)
            lab.commit("the repository")
        lab.start()
        if number or status == "timeout":
            pid = lab.running()  # before the other runs slow it down
        if number:
            os.kill(pid, number)
    return labs


@pytest.mark.parametrize("name", ENDINGS)
def test_every_ending_leaves_a_row_and_a_reason(endings, name):
    lab, (_, status, error, expected_code) = endings[name], ENDINGS[name]
    code, log = lab.wait()
    table = lab.look()
    [row], [record], commit = lab.results(), referee_runs(lab), lab.head()
    assert (code, record["status"], record["commit"]) == (expected_code, status, commit)
    assert re.fullmatch(error, record["error"]) and (record["error"] in table[1])
    assert record["depth"] == 1 and record["description"] == "the repository"
    state = "keep" if status == "ok" else "crash"
    score = f"{record['val_bpb']:.6f}" if status == "ok" else "0.000000"
    assert row == [commit, score, memory_gb(record), state, "the repository"]
    silent = error in (KILLED, HUNG)  # only a later command reports its end
    assert ("Traceback" in log) == (name in ("crash", "exit")), log
    if not silent:
        report = block(log)
        assert (report["status"], report.get("error", "")) == (status, record["error"])
        assert report.get("val_bpb", "0.000000") == score and record["num_steps"] >= 2
    assert len([*lab.cache.glob("*.trace")]) == silent
    with open(lab.cache / CPU_LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def referee_runs(lab):
    """The runs as referee.py reads them: killed ones get a status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(lab.cache))
        return referee.all_runs()


# One run at a time


def test_a_second_run_is_refused_at_once(driver, tmp_path, toy):
    lab, second = Lab(driver, tmp_path, toy, budget=60), tmp_path / "second"
    second.mkdir()
    lab.start()
    pid = lab.running()
    lab.start(second)
    code, output = lab.wait(second)
    assert code == 1 and re.fullmatch(rf"error: cpu .* is taken: process {pid} is using it; .*\n", output)
    table = lab.look()
    assert table[1].split()[:7] == ["60", "42", "0", lab.head(), "0.000000", "0.0", "running"]
    assert len(lab.journal()) == 1
    assert re.search(rf"; process {pid} is running;", table[-1])
    os.kill(pid, signal.SIGKILL)
    lab.wait()
    assert lab.look()[-1].startswith("1 runs (trials not counted), 0 kept, 1 crashed")


# Rows and verdicts


@pytest.mark.parametrize("env", [dict(AUTORESEARCH_TIME_BUDGET="1"), dict(AUTORESEARCH_SEED="7")])
def test_a_trial_is_only_in_the_journal(lab, env):
    before = (lab.repository / "results.tsv").read_text()
    report = lab.experiment(**env)
    assert report["status"] == "ok" and report["verdict"] == TRIAL
    [record] = lab.journal()
    assert (record["standard"], record["seed"]) == (False, int(env.get("AUTORESEARCH_SEED", 42)))
    assert lab.look()[1].split()[1:4:2] == [str(record["seed"]), lab.head()]
    assert (lab.repository / "results.tsv").read_text() == before


def test_a_file_stop_is_named_after_the_verdict(lab):
    (lab.repository / "stop").touch()
    assert lab.experiment()["verdict"] == "keep (first); then stop" and lab.results()[0][3] == "keep"
    assert lab.look()[-2] == "last verdict: keep (first); then stop"


def run_of(commit, val_bpb, seed=42, state="keep", **changes):
    """A record as verdict_of reads it; commit "b" follows "a" in the history."""
    return dict(commit=commit, age=100 - ord(commit[0]), val_bpb=val_bpb, seed=seed, state=state, status="ok",
                time_budget=300.0, data="d", device="cpu", standard=seed == 42) | changes


BASE = [run_of("a", 1.000), run_of("a", 1.004, 1)]  # noise 0.0028
TRIAL = "none (another seed or time budget, so not in results.tsv)"
CONFIRM, SIMPLER = "confirm: run again with AUTORESEARCH_SEED=1", ": keep it only if the code is simpler"
VERDICTS = {  # name: the runs of the night, the verdict of the last one
    "first": ([run_of("a", 1.0)], "keep (first)"),
    "first, run again": ([run_of("a", 1.0), run_of("a", 1.1)], "keep (first)"),
    "worse": ([*BASE, run_of("b", 1.01)], "discard (0.0100 worse than 1.0000)"),
    "worse, within the noise": (
        [*BASE, run_of("b", 1.002)], f"discard (0.0020 worse than 1.0000, within the noise of 0.0028{SIMPLER})"),
    "better by less than half the noise": (
        [*BASE, run_of("b", 0.999)], f"discard (0.0010 better than 1.0000, within the noise of 0.0028{SIMPLER})"),
    "better by more than half the noise": (
        [*BASE, run_of("b", 0.998)], f"{CONFIRM} (0.0020 better than 1.0000, noise 0.0028)"),
    "better": ([*BASE, run_of("b", 0.990)], f"{CONFIRM} (0.0100 better than 1.0000, noise 0.0028)"),
    "confirmed": ([*BASE, run_of("b", 0.990), run_of("b", 0.992, 1)],
                  "keep (0.0110 better on the mean of two seeds, noise 0.0022)"),
    "not confirmed": ([*BASE, run_of("b", 0.990), run_of("b", 1.012, 1)],
                      f"discard (0.0010 better on the mean of two seeds, within the noise of 0.0112{SIMPLER})"),
    "refuted": ([*BASE, *[run_of("c", 1.002)] * 10, run_of("b", 0.998), run_of("b", 1.026, 1)],
                "discard (0.0090 worse on the mean of two seeds)"),
    "repeated": ([*BASE, run_of("b", 0.990), run_of("b", 1.012)],
                 f"discard (0.0010 worse than 1.0000, within the noise of 0.0112{SIMPLER})"),
    "nothing to confirm with": ([run_of("a", 1.0), run_of("b", 0.99)],
                                "keep (0.0100 better than 1.0000)"),
    "other data": ([*BASE, run_of("b", 1.5, data="e")], "keep (first)"),
    "other budget": ([*BASE, run_of("b", 1.5, time_budget=20.0, standard=False)], TRIAL),
    "other device": ([*BASE, run_of("b", 1.5, device="H100")], "keep (first)"),
    "the first seed crashed": (
        [run_of("a", None, status="crash", state="crash"), run_of("a", 1.0, 1), run_of("b", 0.9), run_of("b", 0.98, 1),
         run_of("b", 0.91)], "discard (0.0200 better than 1.0000, within the noise of 0.0436" + SIMPLER + ")"),
    "the best was undone": (
        [*BASE, run_of("b", 0.9, state="discard"), run_of("c", 0.990)],
        f"{CONFIRM} (0.0100 better than 1.0000, noise 0.0028)"),
    "a mean to beat": ([*BASE, run_of("a", 1.010), run_of("b", 1.004)],
                       f"discard (0.0010 better than 1.0050, within the noise of 0.0050{SIMPLER})"),
    "the last kept, not the best or the last run": (
        [*BASE, run_of("c", 1.05), run_of("b", 1.2), run_of("d", 1.03)],
        f"{CONFIRM} (0.0200 better than 1.0500, noise 0.0028)"),
    "the other seed of the first": (BASE, TRIAL),
    "no score": ([*BASE, run_of("b", None, status="oom", state="crash")],
                 "none (no score): fix a mistake and run again, or undo the change"),
    "uncommitted": ([*BASE, run_of("b+", 0.5, state="discard")],
                    "none (uncommitted changes): commit them and run again"),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_says_what_to_do(name):
    runs, words = VERDICTS[name]
    assert referee.verdict_of(runs[-1], runs) == words


def test_noise_is_pooled_over_runs_of_one_commit():
    alone = [run_of("a", 1.0), run_of("b", 2.0), run_of("a", 3.0, data="e"), run_of("c+", 4.0), run_of("c+", 5.0)]
    assert referee.noise(alone) == 0
    values = dict(a=[1.2, 1.22], b=[1.3, 1.33, 1.36], c=[9.0])
    repeated = [run_of(commit, value) for commit, values in values.items() for value in values]
    crash = run_of("a", None, status="crash")
    assert referee.noise([*repeated, crash]) == pytest.approx(((2 * 0.01**2 + 2 * 0.03**2) / 3) ** 0.5)


@pytest.mark.parametrize("name, mark", [("train.py", "+"), ("referee.py", "+"), ("README.md", "")])
def test_uncommitted_changes_are_marked_and_saved_in_git(lab, name, mark):
    lab.experiment()
    with open(lab.repository / name, "a") as f:
        f.write("# a change\n")
    report = lab.experiment()
    rows = lab.results()
    assert rows[1][0] == report["commit"] and rows[1][3] == ("discard" if mark else "keep")
    assert report["commit"] == (lab.head() if not mark else report["commit"][:7] + "+")
    if mark:  # the code is in git, but on no branch
        assert lab.git("show", f"refs/runs/{report['commit'][:7]}:{name}").endswith("# a change")
        assert lab.git("branch", "--contains", report["commit"][:7]) == ""
    assert lab.git("stash", "list") == "" and "\n# a change\n" in "\n" + (lab.repository / name).read_text()


def test_a_log_that_is_a_symlink_stays_one(lab):
    elsewhere = lab.folder / "log.tsv"
    shutil.move(lab.repository / "results.tsv", elsewhere)
    (lab.repository / "results.tsv").symlink_to(elsewhere)
    lab.experiment()
    assert (lab.repository / "results.tsv").is_symlink() and elsewhere.read_text().count("\n") == 2


@pytest.mark.parametrize("name", ["runs.jsonl", "results.tsv"])
def test_if_one_log_cannot_be_written_the_other_is(lab, name):
    folders = {"runs.jsonl": lab.cache, "results.tsv": lab.repository}
    path = folders[name] / name
    path.unlink(missing_ok=True)
    path.symlink_to(lab.folder / "no folder" / "log")
    report = lab.experiment()
    assert report["status"] == "ok" and "NOT LOGGED" in report["error"] and report["verdict"] == "keep (first)"
    path = next(folder / file for file, folder in folders.items() if file != name)
    assert report["val_bpb"][:-1] in path.read_text()


# Unusual events that must not lose a record

FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (1, -1)); raise OSError('no room')"  # like a full disk


@pytest.mark.parametrize("line, code, error", [
    ("raise ValueError('too late')", 0, "ValueError: too late"), ("os.kill(os.getpid(), 9)", -9, ""),
    ("time.sleep(100)", 1, ""),  # past the limit
    (FULL, 0, "OSError: no room NOT LOGGED.*"),
])  # fmt: skip
def test_a_failure_after_the_score_does_not_lose_the_score(lab, line, code, error):
    lab.set_line(line, "after the score")
    lab.set_limits(60, 8 if "sleep" in line else 60)  # with time for a slow machine to evaluate
    lab.commit("the end")
    lab.start()
    assert lab.wait()[0] == code
    lab.look()
    [record] = lab.journal()
    assert [row[:4] for row in lab.results()] == [[lab.head(), f"{record['val_bpb']:.6f}", memory_gb(record), "keep"]]
    log = (lab.folder / "run.log").read_text()
    assert code or re.fullmatch(error, block(log)["error"]) and block(log)["status"] == "ok"


@pytest.mark.parametrize("line", [
    "me = os.getpid(); os.fork() or ([time.sleep(0.1) for _ in iter(lambda: os.getppid() == me, False)], os._exit(0))",
    "run.record['constants'] = {'KINDS': [torch.float32, len]}",  # not JSON
])  # fmt: skip
def test_an_unusual_run_is_recorded_once(lab, line):
    lab.set_line(f"if run.record['num_steps'] == 1: {line}")
    lab.commit("unusual")
    lab.start()
    lab.wait()
    assert [record["status"] for record in lab.journal()] == ["ok"]
    assert [row[3:] for row in lab.results()] == [["keep", "unusual"]]


def test_a_run_whose_output_is_closed_crashes_with_the_reason(lab):
    lab.set_line("if run.record['num_steps'] == 1: r, w = os.pipe(); os.close(r); os.dup2(w, 1)")
    lab.commit("nobody reads")
    lab.start()
    lab.wait()
    assert [record["error"] for record in lab.journal()] == ["BrokenPipeError: [Errno 32] Broken pipe"]
    assert [row[3:] for row in lab.results()] == [["crash", "nobody reads"]]


def test_a_crash_reports_the_time_until_it(driver, tmp_path, toy):
    lab = Lab(driver, tmp_path, toy, budget=60)
    lab.set_line("if run.record['num_steps'] == 30: raise ValueError('late')")  # after 29 pauses of 0.05 s
    lab.commit("late")
    report = lab.experiment()
    assert float(report["training_seconds"]) >= 1.4 and float(report["tokens_per_second"]) <= 30 / 1.4


def test_without_git_a_run_is_recorded_and_the_reason_printed(lab):
    lab.start(PATH="/nowhere")
    _, log, report = lab.end()
    assert (report["status"], report["commit"], report["verdict"]) == ("ok", "none", "keep (first)")
    assert len(re.findall("^git log failed: .*git.*", log, re.M)) == 1


def test_an_error_of_git_is_printed(lab):
    (lab.repository / ".git/config").write_text("[nonsense\n")
    lab.start()
    _, log, report = lab.end()
    assert "git log failed: fatal: bad config line 1 in file" in log and report["commit"] == "none"


def test_subjects_in_any_encoding_with_tabs_and_signatures(lab):
    lab.git("config", "log.showSignature", "true")
    tree = lab.git("rev-parse", "HEAD^{tree}")
    who = b"t <t@t> 1700000000 +0000\n"
    raw = b"tree " + tree.encode() + b"\nauthor " + who + b"committer " + who
    raw += b"gpgsig -----BEGIN PGP SIGNATURE-----\n \n -----END PGP SIGNATURE-----\n\nna\xefve\n"
    path = lab.folder / "raw"
    path.write_bytes(raw)
    lab.git("reset", "-q", "--keep", lab.git("hash-object", "-t", "commit", "-w", str(path)))
    lab.experiment()
    lab.commit("tabs\tand\nlines of cafés \u2014\n\nand a body")
    lab.experiment()
    assert [row[4] for row in lab.results()] == ["na\ufffdve", "tabs and lines of cafés \u2014"]


def test_characters_that_the_locale_cannot_encode(lab):
    lab.set_line("print('\u2014\u4f60')", "after the score")
    lab.commit("a dash \u2014 and \u4f60")
    report = lab.experiment(PYTHONIOENCODING="latin-1", LC_ALL="C", PYTHONUTF8="0")
    assert report["status"] == "ok" and lab.results()[0][4] == "a dash \u2014 and \u4f60"


@pytest.mark.parametrize("text", ["20261125153000000000000", "-1", "1.5", "many"])
def test_a_bad_seed_gives_one_line(lab, text):
    lab.start(AUTORESEARCH_SEED=text)
    rule = "must be a number (int) from 0 to 4294967295; fix or unset it"
    assert lab.wait() == (1, f"error: AUTORESEARCH_SEED={text!r} {rule}\n")


def test_half_a_line_in_the_journal_is_skipped(lab):
    lab.experiment()
    with open(lab.cache / "runs.jsonl", "ab") as f:
        f.write('\n{"run": "h\u00e4lf'.encode()[:-3] + b"\n[]\n{}\n{\"run")
    lab.experiment()
    assert [row[3] for row in lab.results()] == ["keep", "keep"]


# What git does to the log

BREAKS = dict(  # in the loop of train.py
    crash="raise ValueError('no')", hang="ctypes.PyDLL(None).sleep(100)", killed="os.kill(os.getpid(), 9)",
    oom="raise torch.OutOfMemoryError('of 80 GB')",
)
EXPERIMENTS = [  # the change, what is done in git after the run
    (9.0, ""), (9.5, "undo"), (8.0, "main and back"), ("crash", "undo"), ("hang", "undo"), ("oom", "hard"),
    (7.0, "rename"), ("killed", "undo"), (6.0, "undo"), (5.0, "amend"), (5.5, "hard"), (5.2, ""), (4.5, "move"),
    (4.0, "full"), (6.5, "uncommitted"), ("hang", "uncommitted"), (3.5, "rebase"), (3.0, "worktree"), (7.5, "undo"),
    (2.0, ""),
]  # fmt: skip


def view(lab):
    """Write results.tsv as `uv run referee.py` does, but in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(lab.cache))
        patch.setattr(referee, "REPOSITORY", lab.repository)
        referee.git.cache_clear()
        referee.write_results(referee.runs_of_night())


def test_git_loses_no_row(lab, monkeypatch):
    """Twenty experiments like an agent's, with a person's git commands between them: each run keeps one correct row."""
    setup = re.search(r"```bash\n(.*?)```", (ROOT / "program.md").read_text(), re.S)[1].replace("<tag>", "nov1")
    who = {f"GIT_{who}_{what}": "t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    lab.experiment()  # by a human, on main
    subprocess.run(["bash", "-euc", setup], cwd=lab.repository, check=True, env=os.environ | who)
    expected, name = [], "autoresearch/nov1"
    for number, (what, after) in enumerate(EXPERIMENTS):
        lab.set_limits(4) if number == 0 else None
        edit(lab.repository / "train.py", (".*# in the loop", "        pass  # in the loop"))
        lab.set_line(BREAKS[what]) if what in BREAKS else lab.set_waste(what)
        if after == "full":
            lab.set_line(FULL, "after the score")
        subject = f"{number} {what}"
        if after != "uncommitted":
            lab.git("commit", "-q", "-m", subject, "train.py", "referee.py")
        else:
            subject = "uncommitted, after: " + lab.git("log", "-1", "--format=%s")
        lab.start()
        lab.wait()
        if what in ("hang", "killed"):  # the next command writes their row
            view(lab)
        record = referee_runs(lab)[-1]
        score = "0.000000" if what in BREAKS else f"{record['val_bpb']:.6f}"
        state = "crash" if what in BREAKS else "discard" if after == "uncommitted" else "keep"
        expected.append([record["commit"], score, memory_gb(record), state, subject])
        assert lab.results() == expected, (number, what, after)
        if after in ("undo", "hard"):
            lab.git("reset", "-q", "--hard" if after == "hard" else "--keep", "HEAD~1")
            expected[-1][3] = "crash" if what in BREAKS else "discard"
        elif after == "uncommitted":
            lab.git("checkout", "-q", "--", "train.py")
        elif after == "full":
            lab.set_line("pass", "after the score")
            lab.git("commit", "-q", "-m", "pass", "train.py")
        elif after == "main and back":
            lab.git("checkout", "-q", "main")
            assert lab.look()[-1].startswith("best") and [row[4] for row in lab.results()] == ["the repository"]
            lab.git("checkout", "-q", name)
        elif after == "rename":
            name = "autoresearch/other"
            lab.git("branch", "-m", name)
        elif after == "move":
            moved = lab.folder / "moved"
            lab.repository.rename(moved)
            lab.repository = moved
        elif after == "amend":
            lab.git("commit", "-q", "--amend", "-m", "reworded")
        elif after == "rebase":
            lab.git("checkout", "-q", "main")
            (lab.repository / "README.md").write_text("news")
            lab.git("add", "README.md")
            lab.git("commit", "-q", "-m", "news", "README.md")
            lab.git("checkout", "-q", name)
            lab.git("-c", "rebase.autoStash=true", "rebase", "-q", "main")
        elif after == "worktree":
            lab.git("worktree", "add", "-q", "--detach", "../worktree")
            lab.repository = lab.folder / "worktree"
        view(lab)
        assert lab.results() == expected, (number, what, after)
    pins = lab.git("for-each-ref", "--format=%(refname)", "refs/runs").split()
    assert {f"refs/runs/{row[0].rstrip('+')}" for row in expected} <= {*pins}
    lab.git("reflog", "expire", "--expire=now", "--all")
    lab.git("gc", "-q", "--prune=now")
    undone = next(row for row in expected if row[3] == "discard")
    assert "WASTE = 9.5" in lab.git("show", f"{undone[0]}:train.py")
    check_notebook(lab, expected, monkeypatch)


def check_notebook(lab, expected, monkeypatch):
    """analysis.ipynb counts the runs of the log."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(lab.cache))
    monkeypatch.setattr(referee, "REPOSITORY", lab.repository)
    names = {}
    for cell in json.loads((ROOT / "analysis.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert [e["status"] for e in names["experiments"]] == [row[3] for row in expected]
    assert len(names["standard"]) == len(expected)
