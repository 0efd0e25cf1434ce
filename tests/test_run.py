"""How runs end and what they leave: train.py and a smaller player as processes, in scratch git repositories."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import begin, block, driver_of, until

import referee

ROOT = Path(__file__).parent.parent
CPU_LOCK = f"cpu-{os.uname().nodename}.lock"  # machines may share a cache

# A player of one parameter, whose score an edit of one line decides
PLAYER = """
import ctypes, os, sys, time
import torch
from prepare import Tokenizer
from referee import Run

WASTE = 10.0  # logit of a token that never comes: the less the better

class Player(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(size).index_fill_(0, torch.tensor([size - 1]), WASTE))

    def forward(self, idx):
        return self.bias.expand(*idx.shape, -1)

with Run(globals(), grace=30.0) as run:
    tokenizer = Tokenizer.from_directory()
    run.start()
    while run.progress() < 1:
        run.step(torch.tensor(WASTE), 1)
        time.sleep(0.05)
        pass  # in the loop
    run.score(Player(tokenizer.get_vocab_size()), tokenizer, 16)
"""


@pytest.fixture(scope="module")
def driver():
    with driver_of("tiktoken", "torch", "torch._dynamo") as process:
        yield process


def edit(path, *replacements):
    text = path.read_text()
    for old, new in replacements:
        text, count = re.subn(old, new.replace("\\", r"\\"), text, flags=re.M)
        assert count == 1, f"{path.name} has {count} times {old!r}"
    path.write_text(text)


def prepared(cache, toy):
    """A new cache in which the toy corpus is current."""
    cache.mkdir(parents=True)
    (cache / toy.name).symlink_to(toy)
    (cache / "current").write_text(toy.name)
    return cache


class Lab:
    """A scratch repository with a player and a small default budget; a cache with the toy corpus and a journal."""

    def __init__(self, driver, folder, toy, budget=0.2, player=PLAYER):
        self.driver, self.folder, self.repository = driver, folder, folder / "repo"
        self.repository.mkdir(parents=True)
        self.cache = prepared(folder / "cache", toy)
        for name in ("prepare.py", "referee.py"):
            shutil.copy(ROOT / name, self.repository)
        (self.repository / ".gitignore").write_text("__pycache__/\n")
        (self.repository / "results.tsv").write_text(referee.HEADER + "\n")
        edit(self.repository / "referee.py", (r'(?<="AUTORESEARCH_TIME_BUDGET", )300\.0, 1', f"{budget}, 0"))
        (self.repository / "train.py").write_text(player)
        self.git("init", "-q", "-b", "main")
        self.git("add", ".")
        self.commit("baseline")

    def git(self, *words):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(command, cwd=self.repository, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, subject):
        self.git("commit", "-q", "-a", "--allow-empty", "-m", subject)

    def start(self, folder=None, **env):
        """Start train.py, of which the driver writes to `folder`."""
        env["AUTORESEARCH_CACHE"] = str(self.cache)
        begin(self.driver, ["train.py"], self.repository, folder or self.folder, env)

    def running(self):
        """The pid of a run that has printed two losses."""
        log = self.folder / "run.log"
        until(lambda: log.exists() and "step 00002" in log.read_text(), f"two losses in {log}")
        return int((self.folder / "pid").read_text())

    def wait(self, folder=None):
        """Until nobody of the run is left."""
        folder = folder or self.folder
        until((folder / "exit").exists, f"the end of all who write to {folder / 'run.log'}")

    def end(self, folder=None):
        """(exit code, log, block) of a run that has ended."""
        folder = folder or self.folder
        self.wait(folder)
        log = (folder / "run.log").read_text()
        assert log.count("---\n") == 1, log
        return int((folder / "exit").read_text()), log, block(log)

    def experiment(self, **env):
        self.start(**env)
        return self.end()[2]

    def set_waste(self, waste):
        edit(self.repository / "train.py", ("^WASTE = [0-9.]+", f"WASTE = {waste}"))

    def set_in_loop(self, line, grace=30.0):
        edit(self.repository / "train.py", (".*# in the loop", f"        {line}  # in the loop"),
             ("grace=[0-9.]+", f"grace={grace}"))

    def journal(self):
        return [json.loads(line) for line in (self.cache / "runs.jsonl").read_text().splitlines()]

    def results(self):
        header, *rows = (self.repository / "results.tsv").read_text().split("\n")
        assert header == "commit\tval_bpb\tmemory_gb\tstatus\tdescription" and rows.pop() == ""
        return [row.split("\t") for row in rows]


@pytest.fixture
def lab(driver, tmp_path, toy):
    return Lab(driver, tmp_path, toy)


# Every ending of the real train.py

KILLED = "killed from outside, or by the system when memory ran out"
ENDINGS = {  # what happens after the third step, a line or a signal: status, error, exit code
    "hung": ("exec('while True: pass')", "timeout", ".*4 s .* time budget of 1 s.*", -9),
    "hung in C": ("ctypes.PyDLL(None).sleep(100)", "timeout", ".*4 s .* time budget of 1 s.*", -9),
    "interrupted": (signal.SIGINT, "crash", "interrupted", 130),
    "terminated": (signal.SIGTERM, "crash", KILLED, -15),
    "killed": (signal.SIGKILL, "crash", KILLED, -9),
    "pkill": ("[os.kill(pid, 15) for pid in (run.watcher, os.getpid())]", "crash", KILLED, -15),
    "crash": (r"raise ValueError('no such\nlayer')", "crash", "ValueError: no such layer", 1),
    "exit": ("sys.exit('gave up')", "crash", "SystemExit: gave up", 1),
    "nan": ("loss.mul_(math.nan)", "nan", "training loss is nan at step 3", 1),
    "oom": ("raise torch.OutOfMemoryError('of 80 GB')", "oom", "OutOfMemoryError: of 80 GB", 1),
    "refused": ("break", "refused", r"trained for 0\.\d s of a budget of 1\.2 s: stop when progress\(\) is 1, "
                "and let no step take more than 1% of it", 1),
    "ok": ("pass", "ok", "", 0),
}


def small_train(line, grace):
    """train.py with a tiny model, and `line` after the third step."""
    source = (ROOT / "train.py").read_text()
    changes = {rf"^    {name} = .*": f"    {name} = {value}"
               for name, value in dict(DEPTH=1, N_EMBD=32, HEAD_DIM=16, TOTAL_BATCH=256).items()}
    changes |= {"^COMPILE = .*": "COMPILE = False", r"(?<=MIX = 8, 10, )2..14": "2**6",
                r"Run\(globals\(\)": f"Run(globals(), grace={grace}",
                "(?<=run.step.loss, forwards . micro . T.)": f"\n            if run.record['num_steps'] == 3: {line}"}
    for old, new in changes.items():
        source, count = re.subn(old, lambda _, new=new: new, source, flags=re.M)
        assert count == 1, old
    return f"import ctypes, sys, time\n{source}"


@pytest.fixture(scope="module")
def endings(driver, toy, tmp_path_factory):
    """{name: Lab} in which train.py comes to each of its ends."""
    labs = {}
    for name, (what, status, *_) in ENDINGS.items():
        signalled = isinstance(what, signal.Signals)
        player = small_train("time.sleep(60)" if signalled else what, 4 if status == "timeout" else 60)
        lab = labs[name] = Lab(driver, tmp_path_factory.mktemp("ending"), toy, 1.2, player)
        (lab.cache / CPU_LOCK).write_text("999999999\n")  # of a dead process
        lab.start()
        if signalled:
            os.kill(lab.running(), what)
        elif status == "timeout":
            lab.running()  # before the others make it slow
    return labs


def memory_gb(record):
    """The column of results.tsv: without a GPU of the process, which has imported torch; 0 without a score."""
    if record["status"] != "ok":
        return "0.0"
    assert record["peak_vram_mb"] > 100
    return f"{record['peak_vram_mb'] / 1024:.1f}"


@pytest.mark.parametrize("name", ENDINGS)
def test_every_ending_is_reported(endings, name):
    lab, (_, status, error, expected_code) = endings[name], ENDINGS[name]
    code, log, block = lab.end()
    assert (code, block["status"]) == (expected_code, status)
    assert re.fullmatch(error, block.get("error", ""))
    assert ("val_bpb" in block) == (status == "ok")
    [record], [row] = lab.journal(), lab.results()
    assert [record[key] for key in ("status", "error", "commit")] == [status, block.get("error", ""), block["commit"]]
    assert record["depth"] == 1 and record["num_steps"] >= 1 and record["constants"]["TOTAL_BATCH"] == 256
    scored = [block["val_bpb"], memory_gb(record), "keep"] if status == "ok" else ["0.000000", "0.0", "crash"]
    assert row == [block["commit"], *scored, "baseline"]
    last = log[-3_000:]
    assert f"\nstatus:           {status}\n" in last
    assert ("Traceback" in last) == (name in ("crash", "exit")), last
    assert name != "crash" or "\nValueError: no such\nlayer\n---\n" in last
    with open(lab.cache / CPU_LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# One run at a time


def test_a_second_run_is_refused_at_once(driver, tmp_path, toy):
    lab, second = Lab(driver, tmp_path, toy, budget=60), tmp_path / "second"
    second.mkdir()
    lab.start()
    pid = lab.running()
    lab.start(second)
    code, _, block = lab.end(second)
    assert (code, block["status"]) == (1, "refused") and "val_bpb" not in block
    assert f"process {pid} trains on it" in block["error"]
    assert float(block["total_seconds"]) < 5
    assert lab.results() == [] and [record["status"] for record in lab.journal()] == ["refused"]
    os.kill(pid, signal.SIGKILL)
    assert lab.end()[2]["status"] == "crash"
    assert [row[3] for row in lab.results()] == ["crash"]


# Rows of results.tsv


@pytest.mark.parametrize("env", [dict(AUTORESEARCH_TIME_BUDGET="1"), dict(AUTORESEARCH_SEED="7")])
def test_a_non_standard_run_is_in_the_journal_alone(lab, env):
    block = lab.experiment(**env)
    assert block["status"] == "ok" and "val_bpb" in block and block["verdict"].startswith("none: AUTORESEARCH_")
    [record] = lab.journal()
    assert (record["standard"], record["seed"]) == (False, int(env.get("AUTORESEARCH_SEED", 42)))
    assert "row" not in record and lab.results() == []
    lab.commit("another")
    again = lab.experiment(**env)["verdict"]
    assert again.endswith(f"; the last such run of kept code: {block['val_bpb']} ({block['commit']})")
    last = lab.experiment(AUTORESEARCH_SEED="8")
    assert "such run" not in block["verdict"] + last["verdict"]
    assert "noise" not in block and last.get("noise") == ("0.000000" if "AUTORESEARCH_SEED" in env else None)


def test_noise_is_that_of_equal_runs():
    def runs(commit, *values, **changes):
        record = dict(commit=commit, status="ok", time_budget=300.0, data="d") | changes
        return [record | dict(val_bpb=value) for value in values]

    alone = [*runs("a", 1.0), *runs("b", 2.0), *runs("a", 3.0, data="e"), *runs("c+", 4.0, 5.0)]
    assert math.isnan(referee.noise(alone))
    repeated = [*runs("a", 1.2, 1.22), *runs("b", 1.3, 1.33, 1.36), *runs("c", 9.0), *runs("a", None, status="crash")]
    assert referee.noise([*repeated, {}]) == pytest.approx(((2 * 0.01**2 + 2 * 0.03**2) / 3) ** 0.5)


def test_rows_and_verdicts_agree(lab):
    expected = []
    for waste, status in ((6, "keep"), (7, "discard"), (6, "discard"), (4, "keep")):
        lab.set_waste(waste)
        lab.commit("tabs\tand\nlines of cafés\n\nand a body")
        best = f"best was {expected[0][1]}" if expected else "first"
        block = lab.experiment()
        assert block["verdict"] == f"{status} ({best})"
        hash = lab.git("rev-parse", "--short=7", "HEAD")
        expected.append([hash, block["val_bpb"], memory_gb(lab.journal()[-1]), status, "tabs and lines of cafés"])
        assert lab.results() == expected and lab.journal()[-1]["row"] == "\t".join(expected[-1])
        assert lab.journal()[-1]["constants"] == dict(WASTE=waste)


def test_a_commit_taken_back_is_no_mark_to_beat(lab):
    verdicts = []
    for waste, keep in ((6, True), (4, False), (5, True), (5.5, True)):
        lab.set_waste(waste)
        lab.commit(f"try {waste}")
        verdicts.append(lab.experiment()["verdict"])
        if not keep:
            lab.git("reset", "-q", "--hard", "HEAD~1")
    first, _, third = (row[1] for row in lab.results() if row[3] == "keep")
    best = [f"best was {first}"] * 2 + [f"best was {third}"]
    assert verdicts == ["keep (first)", *(f"{s} ({b})" for s, b in zip(["keep", "keep", "discard"], best, strict=True))]


def test_a_run_on_other_data_is_no_mark_to_beat(lab):
    first = lab.experiment()
    journal = lab.cache / "runs.jsonl"
    journal.write_text(journal.read_text().replace(f'"data": "{first["data"]}"', '"data": "other-small"'))
    lab.set_waste(11)
    lab.commit("worse, but on its own data")
    second = lab.experiment()
    assert second["verdict"] == lab.experiment()["verdict"] == "keep (first)"  # nor is what is run again
    lab.commit("the same")
    assert lab.experiment()["verdict"] == f"discard (best was {second['val_bpb']})"


def test_the_runs_of_a_branch_are_shown_with_their_seeds(lab):
    seen = [lab.experiment(), lab.experiment(AUTORESEARCH_SEED="1")]
    for waste, line in ((4, "pass"), (3, "1 / 0")):
        lab.set_waste(waste)
        lab.set_in_loop(line)
        lab.commit(f"try\t{waste}")
        seen.append(lab.experiment())
        lab.git("reset", "-q", "--hard", "HEAD~1")
    lab.experiment(AUTORESEARCH_TIME_BUDGET="1")
    env = dict(AUTORESEARCH_CACHE=str(lab.cache))
    begin(lab.driver, [str(lab.repository / "referee.py")], lab.repository, lab.folder, env)
    lab.wait()
    header, *lines, last = (lab.folder / "run.log").read_text().splitlines()
    assert header.split() == ["commit", "seed", "val_bpb", "tokens/s", "status", "description"]
    assert last == "noise: 0.000000"
    statuses, texts = ("keep", "ok", "keep", "crash"), ("baseline", "baseline", "try 4", "try 3")
    assert [line[0] for line in lines] == ["*", "*", " ", " "]
    assert [line[1:].split(maxsplit=5) for line in lines] == [
        [run["commit"], run["seed"], run.get("val_bpb", "0.000000"), run["tokens_per_second"], *words]
        for run, *words in zip(seen, statuses, texts, strict=True)
    ]


@pytest.mark.parametrize("name, mark", [("train.py", "+"), ("prepare.py", "+"), ("referee.py", "+"), ("README.md", "")])
def test_a_change_not_committed_is_marked(lab, name, mark):
    with open(lab.repository / name, "a") as f:
        f.write("# a change\n")
    commit = lab.git("rev-parse", "--short=7", "HEAD") + mark
    assert lab.experiment()["commit"] == commit
    assert lab.results()[0][0] == lab.journal()[0]["commit"] == commit


# What must not cost a run its record


AFTER = {  # the score: the exit code and the error of the run
    "raise ValueError('the sample')": (0, "ValueError: the sample"), "os.kill(os.getpid(), 9)": (-9, KILLED),
    "time.sleep(100)": (-9, "still running 2 s after its time budget of 0 s"),
}  # fmt: skip


@pytest.mark.parametrize("line", AFTER)
def test_what_ends_a_run_after_the_score_does_not_lose_it(lab, line):
    (lab.repository / "train.py").write_text(PLAYER.replace("grace=30.0", "grace=2.0") + f"    {line}\n")
    lab.start()
    code, log, block = lab.end()
    assert (code, block["error"], block["status"]) == (*AFTER[line], "ok") and ("Traceback" in log) == (code == 0)
    assert [row[1:4] for row in lab.results()] == [[block["val_bpb"], memory_gb(lab.journal()[0]), "keep"]]


@pytest.mark.parametrize("line, status", [
    ("run.record['constants']['KINDS'] = {(0, 1): 2, 'a': (torch.float32, len)}; run.note()", "ok"),  # no JSON
    ("os.fork() or (time.sleep(2), os._exit(0))", "ok"),  # a process that outlives the run and its grace
    ("r, w = os.pipe(); os.close(r); os.dup2(w, 1)", "crash"),  # nobody reads the output
    ("os.kill(run.watcher, 9); 1 / 0", "crash"),  # nobody else reports it
    ("os.write(run.pipe, b'half a record\\n')", "ok"),  # the watcher fails
])  # fmt: skip
def test_an_unusual_run_is_recorded_once(lab, line, status):
    lab.set_in_loop(f"if run.record['num_steps'] == 1: {line}", grace=1.5)
    lab.start()
    lab.wait()
    [record] = lab.journal()
    assert record["status"] == status and record["row"]


def test_a_run_without_git_is_recorded(lab):
    block = lab.experiment(PATH="/nowhere")
    assert (block["status"], block["commit"]) == ("ok", "none")


def test_a_lock_that_cannot_be_opened_is_a_crash(lab):
    (lab.cache / CPU_LOCK).mkdir()
    assert lab.experiment()["error"].startswith("IsADirectoryError: ")
    assert [record["status"] for record in lab.journal()] == ["crash"]


def test_half_a_line_stays_alone(tmp_path):
    path = tmp_path / "below" / "lines"
    referee.append_line(path, "first")
    referee.append_line(path, "second")
    path.write_bytes(path.read_bytes() + "hälf".encode()[:2])
    referee.append_line(path, "third")
    assert path.read_bytes() == b"first\nsecond\nh\xc3\nthird\n"


def test_rows_come_from_the_file_and_the_journal(lab):
    by_hand, here = "1234567\tn/a\t1\tkeep\tmade by hand", dict(repository=str(lab.repository), branch="main")
    with open(lab.repository / "results.tsv", "a") as f:
        f.write(f"{by_hand}\na row in both")  # the second without its newline
    records = [here | dict(row="a row in both"), here | dict(row="lost"), here | dict(row="lost"), here,
               dict(row="elsewhere"), here | dict(row="elsewhere", repository="/other"),
               here | dict(row="elsewhere", branch="other")]
    lines = [*map(json.dumps, records), '{"row": "ha', '{"constants": {"DEPTH": 8}', "[]", "\xe4{}", '{"row": "ha']
    (lab.cache / "runs.jsonl").write_text("\n".join(lines))
    block = lab.experiment()
    assert block["verdict"] == "keep (first)"
    last = json.loads((lab.cache / "runs.jsonl").read_text().splitlines()[-1])
    new = [block["commit"], block["val_bpb"], memory_gb(last), "keep", "baseline"]
    assert lab.results() == [by_hand.split("\t"), ["a row in both"], ["lost"], ["lost"], new]


# Git takes rows out of results.tsv


def test_on_the_branch_of_program_md_git_does_not_touch_the_log(lab):
    setup = re.search(r"```bash\n(.*?)```", (ROOT / "program.md").read_text(), re.S)[1].replace("<tag>", "nov1")
    with open(lab.repository / "results.tsv", "a") as f:
        f.write("1234567\t1.0\t0.0\tkeep\tof another machine\n")
    lab.commit("a log with a row")
    subprocess.run(["bash", "-euc", setup], cwd=lab.repository, check=True, capture_output=True,
                   env=os.environ | {f"GIT_{who}_{what}": "t" for who in ("AUTHOR", "COMMITTER")
                                     for what in ("NAME", "EMAIL")})
    assert lab.git("branch", "--show-current") == "autoresearch/nov1"
    for waste in (9.0, 9.5):
        lab.set_waste(waste)
        lab.git("commit", "-q", "-m", f"try {waste}", "train.py")
        lab.experiment()
    lab.git("reset", "-q", "--hard", "HEAD~1")
    assert [row[3:] for row in lab.results()] == [["keep", "try 9.0"], ["discard", "try 9.5"]]
    assert lab.git("status", "--porcelain") == ""


BREAKS = dict(  # in the loop of a player
    crash="raise ValueError('no')", hang="ctypes.PyDLL(None).sleep(100)", killed="os.kill(os.getpid(), 9)",
    oom="raise torch.OutOfMemoryError('of 80 GB')",
)
EXPERIMENTS = [  # what is tried, the status of its row, what is done with git after it
    (9.0, "keep", ""), (9.5, "discard", "reset"), (8.0, "keep", ""), ("crash", "crash", "reset"),
    ("hang", "crash", "reset"), ("oom", "crash", "reset"), (7.0, "keep", "undo"), ("killed", "crash", "reset"),
    (6.0, "keep", "other"), (5.0, "keep", ""), (5.5, "discard", "reset"), ("oom", "crash", "undo"),
    (4.5, "keep", "main"), (4.0, "keep", ""), (6.5, "discard", "reset"), ("hang", "crash", "undo"),
    ("killed", "crash", "undo"), (3.0, "keep", "other"), (7.5, "discard", "main"), (2.0, "keep", ""),
]  # fmt: skip
VARIANTS = ["tracked", "ignored"]  # results.tsv on main; on the other branch it is tracked, with rows if "ignored"


def try_all(lab, variant):
    """Go through EXPERIMENTS as an agent does; after each, every row of the branch is there. Returns the rows."""
    lab.git("branch", "other")
    if variant == "ignored":  # which a checkout of the other branch overwrites
        lab.git("rm", "-q", "--cached", "results.tsv")
        edit(lab.repository / ".gitignore", (r"\Z", "results.tsv\n"))
        lab.git("commit", "-q", "-a", "-m", "ignore results.tsv")
    branch, rows = "main", {"main": [], "other": []}
    for number, (what, status, after) in enumerate(EXPERIMENTS):
        if what in BREAKS:
            lab.set_in_loop(BREAKS[what], 0.5 if what == "hang" else 30.0)
        else:
            lab.set_waste(what)
        if after != "undo":
            lab.git("commit", "-q", "-m", f"{number} {what}", "-a" if variant == "ignored" else "train.py")
        block = lab.experiment()
        subject = lab.git("log", "-1", "--format=%s")
        val_bpb, memory = block.get("val_bpb", "0.000000"), memory_gb(lab.journal()[-1])
        rows[branch].append([block["commit"], val_bpb, memory, status, subject])
        now = lab.results()
        assert all(now.count(row) == rows[branch].count(row) for row in rows[branch]), (number, now)
        if after == "reset":
            lab.git("reset", "-q", "--hard", "HEAD~1")
        elif after == "undo":
            lab.git("checkout", "-q", "--", "train.py")
        elif after:
            lab.git("checkout", "-q", *(["-f"] if variant == "ignored" else []), after)
            branch = after
    return rows


@pytest.fixture(scope="module")
def loops(driver, toy, tmp_path_factory):
    with ThreadPoolExecutor() as pool:
        labs = {variant: Lab(driver, tmp_path_factory.mktemp("loop"), toy, 0.1) for variant in VARIANTS}
        yield {variant: (lab, pool.submit(try_all, lab, variant)) for variant, lab in labs.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_git_loses_no_row(loops, variant):
    lab, loop = loops[variant]
    rows = loop.result()
    journal = lab.journal()
    assert len(journal) == len(EXPERIMENTS)
    for branch in rows:
        assert [record["row"].split("\t") for record in journal if record["branch"] == branch] == rows[branch]
    statuses = {record["description"].split()[1]: record["status"] for record in journal}
    assert {what: statuses[what] for what in BREAKS} == dict(crash="crash", hang="timeout", killed="crash", oom="oom")
