"""train.main(), and a train.py with the interface of karpathy/autoresearch."""

import getpass
import json
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import begin, block, driver_of, until

import prepare
import referee
import train

ROOT = Path(__file__).parent.parent


def run_train(script, seconds, cwd=ROOT, **env):
    env = os.environ | dict(AUTORESEARCH_TIME_BUDGET=str(seconds), PYTHONPATH=str(ROOT)) | env
    return subprocess.run([sys.executable, script], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def losses(output):
    return [float(x) for x in re.findall(r"^step \d+ .* loss ([\d.]+)", output, re.M)]


@pytest.fixture
def small_main(toy, monkeypatch):
    """main() with a small model and a time budget of one second."""
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "1")
    constants = dict(DEPTH=2, N_EMBD=64, HEAD_DIM=32, TOTAL_BATCH=1024, CONTEXT_ROWS=4099, COMPILE=False)
    for name, value in constants.items():
        monkeypatch.setattr(train, name, value)

    def main():
        prepare.evaluated.clear()  # as in a new process
        return train.main()

    return main


def test_equal_seeds_give_equal_losses(small_main, monkeypatch):
    no_schedules = dict(MOMENTUM=(0.9, 0.9, 1.0), WARMDOWN=0.0, MATRIX_DECAY=0.0)
    for name, value in (no_schedules | dict(TOTAL_BATCH=256)).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(referee.Run, "progress", lambda run: run.record["num_steps"] / (50 if run.seed == 42 else 3))
    monkeypatch.setattr(referee.Run, "score", lambda *_: None)
    seen, step = [], referee.Run.step
    monkeypatch.setattr(referee.Run, "step", lambda run, loss, n: seen[-1].append(float(loss)) or step(run, loss, n))
    for seed in ("42", "42", "7"):
        monkeypatch.setenv("AUTORESEARCH_SEED", seed)
        seen.append([])
        with pytest.raises(SystemExit):  # a run without a score fails
            small_main()
    first, again, other = seen
    assert len(first) == 50 and first == again and first[1:3] != other[1:]


def test_a_run_needs_no_user_account(toy, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):  # as in a container started for a bare user id
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(SystemExit), referee.Run():  # a run without a score fails
        assert getpass.getuser() == str(os.getuid())  # torch.compile asks for it
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    with pytest.raises(prepare.PrepareError, match="set AUTORESEARCH_CACHE to a folder"):
        train.main()


def test_data_for_a_gpu_are_refused_on_a_cpu(toy, monkeypatch):
    manifest = prepare.read_manifest() | dict(scale="full")
    monkeypatch.setattr(referee, "read_manifest", lambda thorough=False: manifest)
    with pytest.raises(prepare.PrepareError, match="scale full. need a CUDA GPU and torch finds none; .*--scale small"):
        train.main()


def test_constants_set_from_outside_are_used(small_main, capsys):
    assert small_main()["depth"] == 2
    assert "a step: 1 x 4 rows of 256 tokens" in capsys.readouterr().out


# name: code that makes torch.compile fail, what the run prints; {folder} is empty
COMPILE_FAULTS = {
    "no compiler": ("os.environ['PATH'] = '{folder}'", "No working C[+][+] compiler"),
    "a space in the path": ("os.environ['TMPDIR'] = '{folder}/a b'; os.mkdir('{folder}/a b')", "fatal error"),
    "a full disk": ("mount()", "No space left on device"),
}
COMPILE = """
import ctypes, os, pathlib, sys, tempfile, referee, torch, train

def mount():
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or libc.unshare(0x20000):  # CLONE_NEWNS
        sys.exit("cannot mount")
    if libc.mount(None, b"/", None, 0x44000, None) or libc.mount(b"tmpfs", b"{folder}", b"tmpfs", 0, b"size=64k"):
        sys.exit("cannot mount")
    os.environ["TMPDIR"] = "{folder}"

{fault}
tempfile.tempdir = None
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TMPDIR", "{folder}") + "/inductor"
referee.REPOSITORY = pathlib.Path("{folder}")  # it has no results.tsv
referee.PRISTINE["referee.REPOSITORY"] = repr(referee.REPOSITORY)
train.loss_of = lambda model, *_: sum(p.sum() for p in model.parameters())  # compiles sooner than the real one
for name, value in dict(DEPTH=1, N_EMBD=64, HEAD_DIM=32, TOTAL_BATCH=1024, NGRAMS=(), RECALL=(), COMPILE=True).items():
    setattr(train, name, value)
train.main()
"""


@pytest.fixture(scope="module")
def driver():
    with driver_of("train", "torch._inductor.compile_fx") as process:
        yield process


@pytest.mark.parametrize("name", COMPILE_FAULTS)
def test_if_torch_compile_fails_the_run_continues_uncompiled(toy, driver, tmp_path, name):
    (tmp_path / "empty").mkdir()
    fault, words = COMPILE_FAULTS[name]
    code = COMPILE.replace("{fault}", fault).replace("{folder}", str(tmp_path / "empty"))
    (tmp_path / "run.py").write_text(code)
    env = dict(AUTORESEARCH_TIME_BUDGET="1", PYTHONPATH=str(ROOT), TORCHINDUCTOR_COMPILE_THREADS="1")
    begin(driver, [str(tmp_path / "run.py")], ROOT, tmp_path, env)
    until((tmp_path / "exit").exists, name)
    log = (tmp_path / "run.log").read_text(errors="replace")
    if "cannot mount" in log:
        pytest.skip("needs root to mount a file system")
    assert re.search(f"^the compiled step failed; trying it uncompiled: .*{words}", log, re.M), log
    assert (tmp_path / "exit").read_text() == "0" and block(log)["status"] == "ok", log


@pytest.mark.parametrize("name, value, rule", [
    ("AUTORESEARCH_TIME_BUDGET", "soon", "(float) from 1 to 1000000"),
    ("AUTORESEARCH_TIME_BUDGET", "-3", "(float) from 1 to 1000000"),
    ("AUTORESEARCH_SEED", "1.5", "(int) from 0 to 4294967295"),
])
def test_a_bad_number_in_the_environment_is_named(toy, monkeypatch, name, value, rule):
    monkeypatch.setenv(name, value)
    with pytest.raises(prepare.PrepareError, match=re.escape(f"error: {name}={value!r} must be a number {rule}; fix")):
        train.main()


def test_missing_data_give_one_sentence(tmp_path):
    run = run_train("train.py", 1, AUTORESEARCH_CACHE=str(tmp_path))
    assert run.returncode == 1 and run.stdout == ""
    assert re.fullmatch(r"error: no prepared data in .*; run: uv run prepare.py .*\n", run.stderr)


# The interface of the original: a train.py that imports its five names and nothing else

FIVE_NAMES = """
import torch, torch.nn as nn, torch.nn.functional as F
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

class Bigram(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None, reduction="mean"):
        logits = self.table(idx)
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1, reduction=reduction)

tokenizer = Tokenizer.from_directory()
assert tokenizer.decode(tokenizer.encode(["a b"], prepend=tokenizer.get_bos_token_id())[0]) == "<|reserved_0|>a b"
model = torch.compile(Bigram(tokenizer.get_vocab_size()), backend="eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
loader = make_dataloader(tokenizer, 4, MAX_SEQ_LEN, "train")
print("before:", evaluate_bpb(model, tokenizer, 4))
for step in range(30):
    x, y, epoch = next(loader)
    loss = model(x, y)
    loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
with torch.autocast("cpu", torch.bfloat16):
    print("after:", evaluate_bpb(model, tokenizer, 4))
print("budget:", TIME_BUDGET)
"""


def test_the_interface_of_the_original_works(toy, tmp_path):
    (tmp_path / "train.py").write_text(FIVE_NAMES)
    run = run_train("train.py", 5, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = dict(line.split(": ") for line in run.stdout.splitlines())
    assert float(said["after"]) < 0.8 * float(said["before"])
    assert float(said["budget"]) == 5


# Import


def test_import_is_silent_and_needs_neither_data_nor_gpu(tmp_path):
    code = "import prepare, train, torch; assert not torch.cuda.is_initialized()"
    env = os.environ | dict(AUTORESEARCH_CACHE=str(tmp_path / "none"))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not (tmp_path / "none").exists()


OLD = dict(format=prepare.FORMAT - 1, scale="small", files={})
MANIFEST = json.dumps(OLD | dict(digest=prepare.digest(OLD))).encode()
NOT_READY = {  # what happened to the data: the files of the cache
    "old format": {"current": b"data", "data/manifest.json": MANIFEST},
    "garbage": {"current": b"data", "data/manifest.json": b"\xff{"},
    "a list": {"current": b"data", "data/manifest.json": b"[]"},
    "gone": {"current": b"data"}, "an empty pointer": {"current": b""}, "not UTF-8": {"current": b"d\xffta"},
    "NUL": {"current": b"\0data"},
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READY)
def test_data_that_are_not_ready_do_not_prevent_import_and_a_run_names_them(tmp_path, monkeypatch, name):
    for file, content in NOT_READY[name].items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    assert prepare.SCALE == "full"
    with pytest.raises(prepare.PrepareError, match=r"is not ready \(.*\); run: uv run prepare.py \[--data NAME\]$"):
        train.main()


def test_only_main_reads_the_constants():
    source = (ROOT / "train.py").read_text()
    constants = {*re.findall(r"\b([A-Z][A-Z0-9_]+)\b", re.sub("#.*", "", source[: source.index("# === Model")]))}
    constants = {name for name in constants if hasattr(train, name)} - {"SCALE", "GPT"}
    assert len(constants) > 20
    body = source[source.index("# === Model") : source.index("def main")]
    code = re.sub(r'"""[\s\S]*?"""|#.*|"[^"\n]*"', "", body)
    assert not [name for name in constants if re.search(rf"\b{name}\b", code)]
    main = source[source.index("def main") :]
    assert not [name for name in constants if not re.search(rf"\b{name}\b", main)]


def test_prepare_has_the_names_of_the_original(toy):
    assert prepare.MAX_SEQ_LEN == 256 and prepare.TIME_BUDGET == 300
    with pytest.raises(AttributeError):
        prepare.NO_SUCH_NAME  # noqa: B018
