"""
The referee: it times and logs a run, and says what to do next. Nobody edits this file.

    from referee import Run    train.py trains inside a Run
    uv run referee.py          prints the runs since the commit "baseline", rewrites results.tsv

Each section uses only those above it and prepare.py.
"""

import contextlib
import faulthandler
import functools
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections import defaultdict, deque
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import torch

import prepare
from prepare import PrepareError, Refused, cache_root, out_of_memory, read_manifest

# === 1. Log: the journal of all runs, and results.tsv, a view of it ===

REPOSITORY = Path(__file__).parent
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"  # of results.tsv


@functools.cache
def git(*words, stdin=""):
    """The output of git, cached. If git fails, print its error and return ""."""
    command = ["/usr/bin/env", "git", "-C", str(REPOSITORY), *words]  # env reports a missing git
    run = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", errors="replace")
    if run.returncode:
        print(f"git {words[0]} failed: {' '.join(run.stderr.split())}")
        return ""
    return run.stdout.strip("\n\0")


def history():
    """[(hash, twin, subject)] of HEAD and its ancestors, newest first.

    The twin (author date, hash of train.py) recognises a commit after an amended message or a rebase.
    """
    log = git("log", "-z", "-n5000", "--no-show-signature", "--encoding=UTF-8", "--format=%H%x09%at%x09%s")
    if not log:
        return [("none", "none", "")]
    commits = [line.split("\t", 2) for line in log.split("\0")]
    files = git("cat-file", "--batch-check", stdin="".join(f"{c[0]}:./train.py\n" for c in commits))
    pairs = zip_longest(commits, files.split("\n"), fillvalue="")  # no files in an offline partial clone
    return [(sha, f"{at} {file}", subject) for (sha, at, subject), file in pairs]


def all_runs(own=None):
    """All runs in the journal, oldest first. If a run has no final record and no process, it crashed.

    `own`: the record of this run, which may not be in the journal yet.
    """
    path, records = cache_root() / "runs.jsonl", {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, or not ours
            r = json.loads(line)
            records[r["run"]] = r | dict(status=r["status"], names=r["names"], lock=r["lock"])
    if own:
        records[own["run"]] = own
    for run, r in records.items():
        if r is not own and r["status"] is None and prepare.lock_holder(cache_root() / r["lock"]) != run:
            r |= dict(status="crash", error="killed from outside, or by the system because memory ran out")
            trace = cache_root() / f"{run}.trace"  # faulthandler writes it when a run hangs
            if trace.exists() and trace.stat().st_size:
                r |= dict(status="timeout", error=f"hung; the traceback is in {trace}")
    return [*records.values()]


def night_of(commits, runs):
    """HEAD's night: that of its newest commit with a run. A newer commit "baseline" starts a new one."""
    nights = {name: r["night"] for r in runs for name in r["names"]}
    for sha, twin, subject in commits:
        if night := nights.get(sha) or nights.get(twin):
            return night
        if subject.partition(":")[0] == "baseline":
            return sha
    return commits[-1][0]


def runs_of_night(own=None):
    """The runs of HEAD's night, oldest first, each with its state: running, crash, keep or discard.

    A run is kept while its commit is in HEAD's history. Its `age`: how many commits follow.
    """
    commits, runs = history(), all_runs(own)
    night, ages = night_of(commits, runs), {}
    for age, (sha, twin, _) in enumerate(commits):
        ages |= {sha: age, twin: age}
    runs = [r for r in runs if r["night"] == night]
    for r in runs:
        r["age"] = min([ages[name] for name in r["names"] if name in ages], default=len(commits))
        state = "keep" if r["age"] < len(commits) else "discard"
        r["state"] = state if r["status"] == "ok" else "crash" if r["status"] else "running"
    return runs


def row(r):
    """A run as a line of results.tsv."""
    score = f"{r['val_bpb']:.6f}\t{r['peak_vram_mb'] / 1024:.1f}" if r["status"] == "ok" else "0.000000\t0.0"
    return f"{r['commit']}\t{score}\t{r['state']}\t{r['description']}"


def write_results(runs):
    """Write results.tsv: all finished runs except trials."""
    rows = [row(r) for r in runs if r["standard"] and r["state"] != "running"]
    if rows:
        prepare.write_text((REPOSITORY / "results.tsv").resolve(), "\n".join([HEADER, *rows]) + "\n")


# === 2. Verdict: what to do after a run ===

def setting(r):
    """Two scores are comparable if these are equal."""
    return r["data"], r["time_budget"], r["device"]


def noise(runs):
    """The standard deviation of val_bpb between runs of one commit, pooled; 0 if no commit ran twice."""
    scores = defaultdict(list)
    for r in runs:
        if r["status"] == "ok" and not r["commit"].endswith("+"):
            scores[r["commit"], setting(r)].append(r["val_bpb"])
    deviations = [value - fmean(values) for values in scores.values() for value in values]
    freedom = len(deviations) - len(scores)
    return math.hypot(*deviations) / math.sqrt(freedom) if freedom else 0.0


def verdict_of(run, runs):
    """Say what to do after `run`, given all `runs` of its night.

    For each seed, compare the mean of this commit with that of the last other kept commit. (The best may
    have met a faster machine.) If one ran on seed 1, confirm a gain above half the noise on it. Keep a mean
    gain above the noise.
    """
    own, scores, last, gains = run["commit"], defaultdict(dict), {}, {}
    if run["status"] != "ok":
        return "none (no score): fix a mistake and run again, or undo the change"
    runs = [r for r in runs if r["status"] == "ok" and setting(r) == setting(run)]
    for r in sorted(runs, key=lambda r: -r["age"]):  # oldest commit first
        if r["commit"] == own or r["state"] == "keep":
            scores[r["seed"]].setdefault(r["commit"], []).append(r["val_bpb"])
    for seed, others in scores.items():
        mine = others.pop(own, [])
        if others:
            last[seed] = fmean([*others.values()][-1])
        if mine and others:
            gains[seed] = last[seed] - fmean(mine)
    if len(gains) < 2 and not run["standard"]:
        return "none (another seed or time budget, so not in results.tsv)"
    if own.endswith("+"):
        return "none (uncommitted changes): commit them and run again"
    if not gains:
        return "keep (first)"
    gain, spread, confirm = fmean(gains.values()), noise(runs), len(gains) == 1 and 1 in last
    than = "on the mean of two seeds" if len(gains) > 1 else f"than {last[max(gains)]:.4f}"
    words = f"{abs(gain):.4f} {'better' if gain > 0 else 'worse'} {than}"
    if gain > (spread / 2 if confirm else spread):
        word = "confirm: run again with AUTORESEARCH_SEED=1" if confirm else "keep"
        return f"{word} ({words}{f', noise {spread:.4f}' * (spread > 0)})"
    if abs(gain) <= spread:
        words += f", within the noise of {spread:.4f}: keep it only if the code is simpler"
    return f"discard ({words})"


def then_stop():
    """A person ends the night with `touch stop`."""
    return "; then stop" * (REPOSITORY / "stop").exists()


# === 3. Run: clock, limits, lock and report ===

OPENED = time.monotonic()  # so that work before Run() counts as start-up
START_LIMIT, TRAIN_LIMIT, EVAL_LIMIT = 900, 300, 1800  # in seconds; TRAIN_LIMIT is added to the budget
STATUS = {Refused: "refused", FloatingPointError: "nan"}


def fingerprint():
    """What train.py must not replace at run time: values of constants, code of functions."""
    owners = prepare, sys.modules[__name__], prepare.Tokenizer, prepare.Inspector, Run
    return {f"{owner.__name__}.{name}": repr(v) if name.isupper() else id(getattr(v, "__code__", v))
            for owner in owners for name, v in vars(owner).items()}


class Run:
    """One experiment: `with Run() as run:` around start(), step() until progress() is 1, and score().

    The clock runs from start() to score(). train.py adds depth, num_params_M, flops_per_token and attention
    to `record`, the journal entry. A failed run ends with SystemExit.
    """

    def __init__(self):
        self.seed = prepare.env_number("AUTORESEARCH_SEED", 42, 0, 2**32 - 1)
        self.budget, self.data = prepare.TIME_BUDGET, read_manifest(thorough=True)
        self.started = self.late_loss = self.value = None
        self.losses, self.lines, self.step_seconds = deque(maxlen=20), 0, [0.0, 0.0]
        self.record = dict(  # in the order of the report; the last keys are only in the journal
            val_bpb=None, training_seconds=0.0, total_seconds=0.0, peak_vram_mb=0.0, mfu_percent="n/a",
            total_tokens_M=0.0, num_steps=0, num_params_M=0.0, depth=0, status=None, error="", verdict="",
            noise=None, tokens_per_second=0, startup_seconds=0.0, eval_seconds=0.0, device="", attention="",
            seed=self.seed, data="{data}-{scale}-".format(**self.data) + prepare.digest(self.data)[:6],
            commit="", run=f"{os.getpid()}-{time.time():.3f}", time=time.time(), time_budget=self.budget,
            flops_per_token=0,
            standard=not any(map(os.environ.get, ("AUTORESEARCH_TIME_BUDGET", "AUTORESEARCH_SEED"))),
        )

    def __enter__(self):
        r, self.device = self.record, prepare.default_device()
        if self.device.type != "cuda" and self.data["scale"] != "small":
            raise PrepareError(f"the prepared data (scale {self.data['scale']}) need a CUDA GPU and torch "
                               "finds none; on a CPU: uv run prepare.py --scale small")
        r["device"], r["lock"] = prepare.device_names(self.device)
        try:
            self.lock = prepare.lock_file(cache_root() / r["lock"], r["run"])
            self.trace = open(cache_root() / f"{r['run']}.trace", "w")
        except BlockingIOError as holder:
            pid = str(holder).partition("-")[0]
            raise PrepareError(f"{r['device']} is taken: process {pid} is using it; wait, or choose "
                               "another GPU with CUDA_VISIBLE_DEVICES") from None
        except OSError as error:
            raise PrepareError(f"cannot write the cache: {error}; set AUTORESEARCH_CACHE") from None
        sys.stdout.reconfigure(errors="replace")  # odd subjects
        self.limit(START_LIMIT)
        os.environ.setdefault("LOGNAME", str(os.getuid()))  # torch needs a user name; the uid may have none
        commits, dirty = history(), ""
        head, twin, subject = commits[0]
        sha = head
        if head != "none":
            dirty = git("status", "--porcelain", "--", ":(glob)*.py")
            sha = dirty and git("stash", "create") or head  # a commit of the current files, on no branch
            git("update-ref", f"refs/runs/{sha[:7]}", sha)  # so that git never deletes it
        r |= dict(commit=sha[:7] + "+" * bool(dirty), names=[] if dirty else [head, twin],
                  description="uncommitted, after: " * bool(dirty) + " ".join(subject.split()),
                  night=night_of(commits, all_runs()))
        self.log()
        print(f"commit {r['commit']}, seed {self.seed}: {r['description']}", flush=True)
        return self

    def limit(self, seconds):
        """Kill the process with a traceback after `seconds`, unless called again."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.trace)

    def log(self):
        """Write the journal, then results.tsv. If one cannot be written, the other still is."""
        r = self.record
        rate = 1e6 * r["total_tokens_M"] / max(r["training_seconds"], 1e-9)
        r |= dict(peak_vram_mb=prepare.peak_memory() / 2**20, total_seconds=time.monotonic() - OPENED,
                  tokens_per_second=round(rate),
                  mfu_percent=prepare.mfu_percent(r["device"], r["flops_per_token"] * rate))
        line = json.dumps(r, default=str, skipkeys=True)
        self.attempt(prepare.append_line, cache_root() / "runs.jsonl", line)
        runs = runs_of_night(r)
        r |= dict(verdict=verdict_of(r, runs) + then_stop(), noise=noise(runs) or None)
        self.attempt(write_results, runs)

    def attempt(self, write, *what):
        try:
            write(*what)
        except OSError as error:
            if "NOT LOGGED" not in self.record["error"]:
                self.record["error"] += f" NOT LOGGED: {error}"

    def start(self):
        """Start the clock. Everything before counts as start-up."""
        if self.started is not None:
            raise Refused("start() was called twice; call it once")
        self.limit(self.budget + TRAIN_LIMIT)
        self.log()
        self.started = self.stepped = time.monotonic()
        self.record["startup_seconds"] = self.started - OPENED

    def progress(self):
        """Share of the time budget used so far; training ends at 1."""
        return (time.monotonic() - self.started) / self.budget

    def step(self, loss, tokens):
        """Count an optimizer step on `tokens` tokens. The tensor `loss` is read one step late."""
        self.read_loss()
        if self.device.type == "cuda":  # read_loss() waits for this copy, not for the next step
            loss = torch.as_tensor(loss).detach().to("cpu", non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event()
        self.late_loss, now = loss, time.monotonic()
        self.step_seconds.append(now - self.stepped)
        self.stepped = now
        self.record["num_steps"] += 1
        self.record["total_tokens_M"] += tokens / 1e6

    def read_loss(self):
        if self.late_loss is None:
            return
        if self.device.type == "cuda":
            self.copied.synchronize()
        self.losses.append(float(self.late_loss))
        r, progress, live = self.record, self.progress(), sys.stdout.isatty()
        seconds = r["training_seconds"] = progress * self.budget
        if not math.isfinite(self.losses[-1]):
            raise FloatingPointError(f"training loss is {self.losses[-1]} at step {r['num_steps']}")
        if live or r["num_steps"] <= 3 or 20 * progress >= self.lines:  # in a file one line per 5%
            self.lines = int(20 * progress) + 1
            print(f"step {r['num_steps']:05d} | {min(1, progress):6.1%} | loss "
                  f"{fmean(self.losses):.6f} | {1e6 * r['total_tokens_M'] / seconds:,.0f} tok/s | "
                  f"{max(0, self.budget - seconds):.0f} s left ", end="\r" if live else "\n", flush=True)

    def score(self, model, tokenizer, batch_size):
        """Stop the clock, evaluate `model`, log the run, return val_bpb. Once per run."""
        self.read_loss()
        getattr(torch, self.device.type).synchronize()
        begun, budget, r = time.monotonic(), self.budget, self.record
        seconds = r["training_seconds"] = begun - self.started
        self.limit(EVAL_LIMIT)
        if prepare.evaluated:
            raise Refused("a run has one score, but evaluate_bpb was called before")
        if (self.started - OPENED, budget) != (r["startup_seconds"], r["time_budget"]):
            raise Refused("the clock was changed: leave run.started and run.budget alone")
        *before, last = self.step_seconds
        slack = 2 + 0.01 * budget + 2 * min(last, max(before))  # a GPU is one step behind
        if not -0.02 * budget <= seconds - budget <= slack:
            raise Refused(f"trained for {seconds:.1f} s of a budget of {budget:.1f} s: stop when progress() "
                          "is 1")
        self.intact()
        inspector = prepare.Inspector(prepare.validation_rows())
        value = prepare.evaluate_bpb(model, tokenizer, batch_size, inspector)
        self.intact()
        self.value = value
        r |= dict(val_bpb=value, status="ok", eval_seconds=time.monotonic() - begun)
        self.log()
        return value

    def intact(self):
        changed = [name for name, value in fingerprint().items() if PRISTINE.get(name, value) != value]
        if changed:
            raise Refused(f"the referee was changed at run time: {', '.join(changed)}")
        if read_manifest() != self.data:
            raise Refused("other data were prepared during the run; run it again")

    def __exit__(self, kind, error, trace):
        r, stopped = self.record, kind is KeyboardInterrupt
        status = "oom" if out_of_memory(error) else STATUS.get(kind, "crash")
        known = kind in STATUS
        if error or self.value is None:
            text = f"{kind.__name__}: {error}" if error and not known else str(error or "there is no score")
            r["error"] = "interrupted" if stopped else " ".join(text.split())[:500]
        lost = self.value is None or known  # a later crash does not lose a score
        r |= dict(val_bpb=None, status=status) if lost else dict(val_bpb=self.value, status="ok")
        self.log()
        self.limit(60)  # a thread may block the exit
        Path(self.trace.name).unlink(missing_ok=True)
        self.lock.close()
        if error and status == "crash" and not stopped:
            traceback.print_exception(error, file=sys.stdout)
        print("\n---" if sys.stdout.isatty() else "---")
        for key, value in [*r.items()][:21]:  # up to commit
            if isinstance(value, float):
                value = f"{value:.{6 if key in ('val_bpb', 'noise') else 1}f}"
            if value not in (None, ""):
                print(f"{key + ':':<17} {value}", flush=True)
        if r["status"] != "ok":
            sys.exit(1)
        return True


def main():
    """Print the runs of this night, the last verdict and a summary; rewrite results.tsv."""
    sys.stdout.reconfigure(errors="replace")
    runs = runs_of_night()
    print(f"budget\tseed\ttokens/s\t{HEADER}".expandtabs(10))
    for r in runs:
        shown = r if r["standard"] or r["state"] in ("crash", "running") else r | dict(state="trial")
        line = f"{r['time_budget']:.0f}\t{r['seed']}\t{r['tokens_per_second']}\t{row(shown)}".expandtabs(10)
        print(f"{line} ({r['status']}: {r['error']})" if r["error"] else line)
    rows = [r for r in runs if r["standard"]]
    kept = [r for r in rows if r["state"] == "keep"]
    crashed = sum(r["state"] == "crash" for r in rows)
    line = f"{len(rows)} runs (trials not counted), {len(kept)} kept, {crashed} crashed"
    if kept:
        value, best = min((r["val_bpb"], r["commit"]) for r in kept)
        line = f"best {value:.6f} ({best}), {kept[0]['val_bpb'] - value:.6f} below the first; {line}"
    for r in runs:
        if r["state"] == "running":
            line += f"; process {r['run'].partition('-')[0]} is running"
    for r in [r for r in runs if r["status"]][-1:]:
        print(f"last verdict: {verdict_of(r, runs)}{then_stop()}")
    print(f"{line}; noise {noise(runs):.6f}")
    write_results(runs)


PRISTINE = fingerprint()

if __name__ == "__main__":
    main()
