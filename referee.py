"""
The referee: it times, probes and logs a run, and says what to do next. Nobody edits this file.

    from referee import Run    what train.py trains in
    uv run referee.py          prints the runs of this night, rewrites results.tsv

Four rooms, each using only those above it and prepare.py: grep -n '^# ===' referee.py
"""

import contextlib
import faulthandler
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict, deque
from pathlib import Path
from statistics import fmean, variance

import torch

import prepare
from prepare import PrepareError, Refused, cache_root, read_manifest

# === 1. Probe: does the model see what it must predict? ===

PROBED, REPEATS = 0.15, 8  # share of the batches that are probed; probes of the first batch at the end
ONE_CHANGE, MEAN_CHANGE, MEAN_GAIN = 0.5, 0.02, 0.005  # nats; honest bf16 rounding stays below


class Inspector:
    """The `inspect` of evaluate_bpb: scores a model on `rows`, (n, T + 1), and probes it at random."""

    def __init__(self, rows):
        self.rows, self.random, self.scored, self.first, self.edges = rows, random.SystemRandom(), 0, None, []

    def __call__(self, cost, inputs, targets):
        """cost(inputs, targets): nats (B, T)."""
        chosen = self.first is None or self.random.random() < PROBED
        nats = self.probe(cost, inputs, targets) if chosen else cost(inputs, targets)
        self.first = self.first or (inputs, targets, nats)
        self.scored += len(inputs)
        if self.scored == len(self.rows):
            for _ in range(REPEATS):  # the rows scored since must have left no trace
                self.probe(cost, *self.first)
            edges = torch.cat(self.edges)
            if edges.mean() > MEAN_GAIN or edges.abs().mean() > MEAN_CHANGE:
                raise Refused("the model sees the future or other rows: hiding them costs "
                              f"{float(edges.mean()):.2g} nats a target on average")
        return nats

    def probe(self, cost, inputs, targets, nats=None):
        """Raise Refused if the cost of a target changes with tokens that the model must not see.

        Each row keeps a prefix and goes on as another row. Prefixes have T tokens, since other rows must not
        matter, 1, T - 1 and random numbers. Unless `nats` is known, the mixed rows come before the true ones.
        """
        (B, T), rng = inputs.shape, self.random
        others = self.rows[torch.tensor(rng.choices(range(len(self.rows)), k=B)), 1:]
        others = others.roll(rng.randrange(T), 1).to(inputs.device)
        lengths = rng.sample([T, 1, T - 1, *(rng.randrange(1, T + 1) for _ in range(max(1, B - 3)))], B)
        kept = torch.tensor(lengths, device=inputs.device)[:, None]
        seen = torch.arange(T, device=inputs.device) < kept  # (B, T)
        mixed = cost(torch.where(seen, inputs, others), targets)
        nats = cost(inputs, targets) if nats is None else nats
        change = (mixed - nats) * seen
        self.edges.append(change.gather(1, kept - 1))  # at the end of the prefix, where leaks show most
        if not float(change.abs().max()) <= ONE_CHANGE:  # nan is refused, too
            row, at = divmod(int(change.abs().argmax()), T)
            others[row] = inputs[row]
            again, among_others = (cost(idx, targets) - nats for idx in (inputs, others))
            if max(again.abs().max(), among_others[row].abs().max()) > ONE_CHANGE:
                raise Refused("the logits of a row are random, remember what was scored, or depend on the "
                              "other rows of the batch")
            raise Refused(f"the model sees the future: tokens from {lengths[row]} on change what target "
                          f"{at} costs by {float(change[row, at]):.2g} nats")
        return nats


# === 2. Log: the journal of this machine, and results.tsv, a view of it ===

REPOSITORY = Path(__file__).parent
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"  # of results.tsv


@functools.cache
def git(*words, stdin=""):
    """What git prints, asked once; if it fails, its complaint is printed and "" returned."""
    command = ["/usr/bin/env", "git", "-C", str(REPOSITORY), *words]  # env complains where git is missing
    run = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", errors="replace")
    if run.returncode:
        print(f"git {words[0]} failed: {' '.join(run.stderr.split())}")
    return "" if run.returncode else run.stdout.strip()


def history():
    """[(hash, twin, subject)] of HEAD and its ancestors, newest first.

    The twin, the author's time and the hash of train.py, survives an amended message and a rebase.
    """
    log = git("log", "--no-show-signature", "--encoding=UTF-8", "--format=%H%x09%at%x09%s")
    if not log:
        return [("none", "none", "")]
    hashes, times, subjects = zip(*(line.split("\t", 2) for line in log.split("\n")), strict=True)
    files = git("cat-file", "--batch-check", stdin="".join(f"{code}:./train.py\n" for code in hashes))
    return [*zip(hashes, map(" ".join, zip(times, files.split("\n"), strict=True)), subjects, strict=True)]


def all_runs():
    """The runs of this machine, oldest first. One that did not end and has no process crashed."""
    path, records = cache_root() / "runs.jsonl", {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
            record = json.loads(line)
            records[record["run"]] = record
    for run, r in records.items():
        if r["status"] is None and prepare.lock_holder(cache_root() / r["lock"]) != run:
            r |= dict(status="crash", error="killed from outside, or by the system when memory ran out")
            trace = cache_root() / f"{run}.trace"  # of faulthandler, when a limit was passed
            if trace.exists() and trace.stat().st_size:
                r |= dict(status="timeout", error=f"hung; the traceback is in {trace}")
    return [*records.values()]


def night_of(commits, runs):
    """The night of HEAD: that of its nearest ancestor with a run. A commit "baseline" begins a new one."""
    nights = {name: r["night"] for r in runs for name in r["names"]}
    for code, twin, subject in commits:
        night = nights.get(code) or nights.get(twin) or subject.startswith("baseline") and code
        if night:
            return night
    return commits[-1][0]


def runs_of_night(own=None):
    """The runs of HEAD's night, oldest first, each with its state: running, crash, keep or discard.

    A run is kept while its commit is in HEAD's history. `own` is a record that the journal may lack.
    """
    commits, runs = history(), [r for r in all_runs() if not own or r["run"] != own["run"]]
    runs += [own] if own else []
    night, kept = night_of(commits, runs), {name for code, twin, _ in commits for name in (code, twin)}
    runs = [r for r in runs if r["night"] == night]
    for r in runs:
        state = "keep" if kept.intersection(r["names"]) else "discard"
        r["state"] = state if r["status"] == "ok" else "crash" if r["status"] else "running"
    return runs


def row(r):
    """A run as a line of results.tsv."""
    score = f"{r['val_bpb']:.6f}\t{r['peak_vram_mb'] / 1024:.1f}" if r["status"] == "ok" else "0.000000\t0.0"
    return f"{r['commit']}\t{score}\t{r['state']}\t{r['description']}"


def write_results(runs):
    """Write results.tsv: every run that has ended and was no trial."""
    rows = [row(r) for r in runs if r["standard"] and r["state"] != "running"]
    if rows:
        prepare.write_text((REPOSITORY / "results.tsv").resolve(), "\n".join([HEADER, *rows]) + "\n")


# === 3. Verdict: what to do after a run ===

def noise(runs):
    """The standard deviation of val_bpb between runs of one commit, pooled; 0 if no commit ran twice."""
    scores = defaultdict(list)
    for r in runs:
        if r["status"] == "ok" and not r["commit"].endswith("+"):
            scores[r["commit"], r["time_budget"], r["data"]].append(r["val_bpb"])
    freedom = sum(len(values) - 1 for values in scores.values())
    squares = sum((len(values) - 1) * variance(values) for values in scores.values() if len(values) > 1)
    return math.sqrt(squares / freedom) if freedom else 0.0


def verdict_of(run, runs):
    """What to do after `run`, in words; `runs` are those of its night.

    On each seed the mean of a commit is compared with the best of the other kept ones. A gain on one seed
    must be confirmed on a second, if others ran on that, too; then the mean gain must exceed the noise.
    """
    own, scores, marks = run["commit"], defaultdict(list), {}
    if run["status"] != "ok":
        return "none (no score): fix a mistake and run again, or undo the commit"
    if own.endswith("+"):
        return "none (uncommitted changes): commit them and run again"
    runs = [r for r in runs if r["data"] == run["data"] and r["time_budget"] == run["time_budget"]]
    for r in runs:
        if r["status"] == "ok" and (r["commit"] == own or r["state"] == "keep"):
            scores[r["seed"], r["commit"]].append(r["val_bpb"])
    for (seed, commit), values in scores.items():
        if commit != own:
            marks[seed] = min(marks.get(seed, math.inf), fmean(values))
    gains = [mark - fmean(scores[seed, own]) for seed, mark in marks.items() if (seed, own) in scores]
    if len(gains) < 2 and not run["standard"]:
        return "none (a trial, not in results.tsv)"
    if not gains:
        return "keep (first)"
    gain, spread, confirm = fmean(gains), noise(runs), len(gains) == 1 and 1 in marks  # the second seed
    than = "on the mean of two seeds" if len(gains) > 1 else f"than {marks[run['seed']]:.4f}"
    words = f"{abs(gain):.4f} {'better' if gain > 0 else 'worse'} {than}"
    if gain > (spread / 2 if confirm else spread):
        word = "confirm: run again with AUTORESEARCH_SEED=1" if confirm else "keep"
        return f"{word} ({words}{f', noise {spread:.4f}' * (spread > 0)})"
    if abs(gain) <= spread:
        words += f", within the noise of {spread:.4f}: keep it only if the code is simpler"
    return f"discard ({words})"


# === 4. Run: clock, limits, lock and report ===

OPENED = time.monotonic()  # so that work before Run() counts as start-up
START_LIMIT, TRAIN_LIMIT, EVAL_LIMIT = 900, 300, 1800  # seconds until a run is hung; TRAIN_: over budget
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STATUS = {Refused: "refused", FloatingPointError: "nan", torch.OutOfMemoryError: "oom", MemoryError: "oom"}


def fingerprint():
    """What a player could replace at run time: constants by value, functions and methods by their code."""
    things = {}
    for owner in (prepare, sys.modules[__name__], prepare.Tokenizer, Inspector, Run):
        things |= vars(owner)
    return {name: repr(v) if name.isupper() else id(getattr(v, "__code__", v)) for name, v in things.items()}


class Run:
    """One experiment: `with Run() as run:` around start(), progress() and step(), score().

    From start() on all is on the clock: data, Python, logging. The journal gets a record when the run has its
    device and when it ends, so that no ending loses it. `record` is the report; train.py adds depth,
    num_params_M, flops_per_token and attention. Leaves by SystemExit unless the run is ok.
    """

    def __init__(self):
        self.seed = prepare.env_number("AUTORESEARCH_SEED", 42, 0, 2**32 - 1)
        self.budget, self.data = prepare.TIME_BUDGET, read_manifest(thorough=True)
        self.started = self.late_loss = self.value = None
        self.losses, self.lines, self.last, self.longest = deque(maxlen=20), 0, 0.0, 0.0
        self.record = dict(  # the report, in its order, then what only the journal has
            val_bpb=None, training_seconds=0.0, total_seconds=0.0, peak_vram_mb=0.0, mfu_percent="n/a",
            total_tokens_M=0.0, num_steps=0, num_params_M=0.0, depth=0, status=None, error="", verdict="",
            noise=None, tokens_per_second=0, startup_seconds=0.0, eval_seconds=0.0, device="", attention="",
            seed=self.seed, data=f"{self.data['data']}-{self.data['scale']}", commit="", clock=None,
            run=f"{os.getpid()}-{time.time():.3f}", time=time.time(), time_budget=self.budget, total_tokens=0,
            flops_per_token=0, standard=not {"AUTORESEARCH_TIME_BUDGET", "AUTORESEARCH_SEED"} & {*os.environ},
        )

    def __enter__(self):
        r, self.device = self.record, prepare.default_device()
        r["device"], r["lock"] = prepare.device_names(self.device)
        try:
            self.lock = prepare.lock_file(cache_root() / r["lock"], r["run"])
            self.trace = open(cache_root() / f"{r['run']}.trace", "w")
        except BlockingIOError as holder:
            raise PrepareError(f"{r['device']} is taken: process {holder} trains on it; wait, or choose "
                               "another GPU with CUDA_VISIBLE_DEVICES") from None
        except OSError as error:
            raise PrepareError(f"no log can be written: {error}; set AUTORESEARCH_CACHE") from None
        sys.stdout = prepare.Output(sys.stdout)
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler)  # which raises KeyboardInterrupt
        self.limit(START_LIMIT)
        os.environ.setdefault("LOGNAME", str(os.getuid()))  # torch needs one, also without an account
        commits, dirty = history(), ""
        head, twin, subject = code, *_ = commits[0]
        if head != "none":
            dirty = git("status", "--porcelain", "--", ":(glob)*.py")
            code = dirty and git("stash", "create") or head  # a commit of the present files, on no branch
            git("update-ref", f"refs/runs/{code[:7]}", code)  # so that git never deletes it
        r |= dict(commit=code[:7] + "+" * bool(dirty), names=[] if dirty else [head, twin],
                  description=" ".join(subject.split()), night=night_of(commits, all_runs()))
        self.log()
        print(f"commit {r['commit']}, seed {self.seed}: {r['description']}", flush=True)
        return self

    def limit(self, seconds):
        """End the process with a traceback if it takes longer."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.trace)

    def log(self):
        """Write the record to the journal, and results.tsv; one that fails does not stop the other."""
        r, runs = self.record, []
        rate = r["total_tokens"] / max(r["training_seconds"], 1e-9)
        r |= dict(peak_vram_mb=prepare.peak_memory() / 2**20, total_seconds=time.monotonic() - OPENED,
                  total_tokens_M=r["total_tokens"] / 1e6, tokens_per_second=round(rate),
                  mfu_percent=prepare.mfu_percent(r["device"], r["flops_per_token"] * rate))
        if r["status"]:
            runs = runs_of_night(r)
            r |= dict(verdict=verdict_of(r, runs), noise=noise(runs) or None)
        journal = prepare.append_line, cache_root() / "runs.jsonl", json.dumps(r, default=str)
        for write, *what in (journal, (write_results, runs)):
            try:
                write(*what)
            except OSError as error:
                r["error"] += f" NOT LOGGED: {error}"

    def start(self):
        """Start the clock; all before was start-up."""
        if self.started is not None:
            raise Refused("the clock runs already: start() is called once")
        self.synchronize()
        self.started = self.stepped = time.monotonic()
        self.limit(self.budget + TRAIN_LIMIT)
        self.record |= dict(startup_seconds=self.started - OPENED, clock=time.time())
        self.log()

    def progress(self):
        """Share of the time budget used so far; the run is over at 1."""
        return (time.monotonic() - self.started) / self.budget

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, loss, tokens):
        """Count an optimizer step on `tokens` tokens; its loss, a tensor, is read one step late."""
        self.read_loss()
        self.late_loss, now = loss, time.monotonic()
        self.longest, self.last, self.stepped = max(self.longest, self.last), now - self.stepped, now
        self.record["num_steps"] += 1
        self.record["total_tokens"] += tokens

    def read_loss(self):
        if self.late_loss is None:
            return
        self.losses.append(float(self.late_loss))
        r, progress, live = self.record, self.progress(), sys.stdout.isatty()
        if not math.isfinite(self.losses[-1]):
            raise FloatingPointError(f"training loss is {self.losses[-1]} at step {r['num_steps']}")
        if live or r["num_steps"] <= 3 or 20 * progress >= self.lines:  # in a file a line every 5%
            self.lines = math.floor(20 * progress) + 1
            seconds = r["training_seconds"] = progress * self.budget
            print(f"step {r['num_steps']:05d} | {min(100, 100 * progress):5.1f}% | loss "
                  f"{fmean(self.losses):.6f} | {r['total_tokens'] / seconds:,.0f} tok/s | "
                  f"{max(0, self.budget - seconds):.0f} s left ", end="\r" if live else "\n", flush=True)

    def score(self, model, tokenizer, batch_size):
        """Stop the clock, evaluate `model`, once, log the run, and return its val_bpb."""
        self.read_loss()
        self.synchronize()
        begun = time.monotonic()
        seconds = self.record["training_seconds"] = begun - self.started
        self.limit(EVAL_LIMIT)
        if prepare.evaluated:
            raise Refused("a run has one score: evaluate_bpb or score() was called before")
        budget, r = self.budget, self.record
        if (self.started - OPENED, budget) != (r["startup_seconds"], r["time_budget"]):
            raise Refused("the clock was set: start() and the time budget must stay as they are")
        late = 2 + 0.01 * budget + min(2 * self.longest, 0.1 * budget)  # the last step began in time
        if not -0.02 * budget <= seconds - budget <= late:
            raise Refused(f"trained for {seconds:.1f} s of a budget of {budget:.1f} s: stop at progress() 1")
        self.intact()
        inspector = Inspector(prepare.validation_rows())
        self.value = prepare.evaluate_bpb(model, tokenizer, batch_size, inspector)
        self.record |= dict(val_bpb=self.value, status="ok", eval_seconds=time.monotonic() - begun)
        self.intact()
        self.log()
        return self.value

    def intact(self):
        changed = [name for name, value in fingerprint().items() if PRISTINE.get(name, value) != value]
        if changed:
            raise Refused(f"the referee was changed at run time: {', '.join(changed)}")
        if read_manifest() != self.data:
            raise Refused("other data were prepared during the run; run it again")

    def __exit__(self, kind, error, trace):
        for number in SIGNALS:  # a second Ctrl-C must not cost the record
            signal.signal(number, signal.SIG_IGN)
        r, stopped = self.record, isinstance(error, KeyboardInterrupt)
        status = next((status for kinds, status in STATUS.items() if isinstance(error, kinds)), "crash")
        plain = status in ("refused", "nan")
        if error or self.value is None:
            text = f"{kind.__name__}: {error}" if error and not plain else str(error or "there is no score")
            r["error"] = "interrupted" if stopped else " ".join(text.split())[:500]
        lost = self.value is None or plain  # a score outlives a later crash
        r |= dict(val_bpb=None, status=status) if lost else dict(val_bpb=self.value, status="ok")
        self.log()
        if error and status == "crash" and not stopped:
            traceback.print_exception(error, file=sys.stdout)
        print("\n---" if sys.stdout.isatty() else "---")
        for key, value in [*r.items()][:21]:  # to the commit
            if isinstance(value, float):
                value = f"{value:.{6 if key in ('val_bpb', 'noise') else 1}f}"
            if value not in (None, ""):
                print(f"{key + ':':<17} {value}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        Path(self.trace.name).unlink()
        self.lock.close()
        if r["status"] != "ok":
            sys.exit(130 if stopped else 1)
        return True


def main():
    """Print the runs of this night, the last verdict and a status line; rewrite results.tsv."""
    sys.stdout = prepare.Output(sys.stdout)
    runs = runs_of_night()
    write_results(runs)
    print(f"seconds\tseed\ttokens/s\t{HEADER}".expandtabs(10))
    for r in runs:
        line = f"{r['time_budget']:.0f}\t{r['seed']}\t{r['tokens_per_second']}\t{row(r)}".expandtabs(10)
        print(f"{line} ({r['status']}: {r['error']})" if r["error"] else line)
    rows = [r for r in runs if r["standard"]]
    kept = [r for r in rows if r["state"] == "keep"]
    line = f"{len(rows)} runs, {len(kept)} kept, {sum(r['state'] == 'crash' for r in rows)} crashed"
    if kept:
        best, first = min(kept, key=lambda r: r["val_bpb"]), kept[0]
        gain = first["val_bpb"] - best["val_bpb"]
        line = f"best {best['val_bpb']:.6f} ({best['commit']}), {gain:.6f} below the first; {line}"
    for r in runs:
        if r["state"] == "running":
            left = (r["clock"] or time.time()) + r["time_budget"] - time.time()
            line += f"; process {r['run'].partition('-')[0]} is running, {max(0, left):.0f} s left"
    print(f"last verdict: {runs[-1]['verdict'] if runs else ''}\n{line}; noise {noise(runs):.6f}")


PRISTINE = fingerprint()

if __name__ == "__main__":
    main()
