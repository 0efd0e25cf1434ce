"""
The referee of autoresearch: it scores the model, keeps the clock, and reports and logs the run. Nobody edits this file.

    from referee import Run     what train.py runs in: see there
    uv run referee.py           prints the runs of this branch so far, those with other seeds, too

Three rooms, each using only those above it and prepare.py: grep -A3 '^# ===' referee.py
"""

import contextlib
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import prepare
from prepare import PrepareError, Tokenizer, cache_root, current_folder, default_device, read_manifest, sha256_of

# === 1. Evaluation ====================================================================================================
# reads: val_rows.bin
# writes: nothing
# used by: the run, any train.py as prepare.evaluate_bpb

EVAL_ROWS = 16  # of a forward at most: 16 x 2048 x 8192 logits are 1 GiB in fp32
PROBED = 0.15  # share of the forwards with which the model is probed: the first, others at random
REPEATS = 8  # probes of the first forward at the end
evaluated = []  # the models so far: a run has one score
ONE_CHANGE, MEAN_CHANGE, MEAN_GAIN = 0.5, 0.02, 0.005  # nats, below them is the rounding of honest bf16


class Refused(Exception):
    """The model, or what was done to the referee, does not allow a score; says why."""


def probe(cost, inputs, others, nats=None):
    """Refuse a model if what targets cost after `inputs` changes with tokens that it must not see, those of `others`.

    inputs and others are ids (B, T), cost(ids) is in nats (B, T), `nats` is cost(inputs) if that is known. In one
    forward every row keeps a prefix and goes on as another: all of one row is kept (its neighbours must not matter),
    1 token, T - 1 tokens and random numbers of the rest. Returns nats and how much more the target after a prefix costs
    there, (B, 1): nothing that the model sees of the future is left in it. Without `nats` the mixed rows come first,
    when the model has not met the true ones.
    """
    (B, T), rng = inputs.shape, random.SystemRandom()
    lengths = rng.sample([T, 1, T - 1, *(rng.randrange(1, T + 1) for _ in range(max(1, B - 3)))], B)
    kept = torch.tensor(lengths, device=inputs.device)[:, None]
    seen = torch.arange(T, device=inputs.device) < kept  # (B, T)
    mixed = cost(torch.where(seen, inputs, others))
    nats = cost(inputs) if nats is None else nats
    change = (mixed - nats) * seen
    if not float(change.abs().max()) <= ONE_CHANGE:  # or it is nan
        row, at = divmod(int(change.abs().argmax()), T)
        noise = float((cost(inputs) - nats).abs().max())
        among_others = others.clone()
        among_others[row] = inputs[row]
        neighbours = float((cost(among_others) - nats)[row].abs().max())
        if noise > ONE_CHANGE:
            raise Refused(f"two forwards of the same input differ by {noise:.2g} nats: logits must not be random, nor "
                          "remember what was scored")
        if neighbours > ONE_CHANGE:
            raise Refused("the logits of a row depend on the other rows of the batch, or on earlier ones")
        raise Refused(f"the model sees the future: tokens from position {lengths[row]} on change what the target of "
                      f"position {at} costs by {float(change[row, at]):.2g} nats")
    return nats, change.gather(1, kept - 1)


def bytes_of_tokens(tokenizer):
    """The number of bytes each token stands for, 0 for specials: int64 [vocab_size]."""
    lengths = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    lengths[list(tokenizer.ranks.values())] = torch.tensor([len(token) for token in tokenizer.ranks])
    return lengths


def prepared_rows():
    """The validation rows, int64 [rows, T + 1], if they are those of the manifest."""
    path, manifest = current_folder() / "val_rows.bin", read_manifest()
    if sha256_of(path) != manifest["files"][path.name][1]:
        raise Refused(f"{path} is not what was prepared; prepare the data again")
    rows = np.fromfile(path, dtype=np.uint16).reshape(-1, manifest["seq_len"] + 1)
    return torch.from_numpy(rows.astype(np.int64))


@torch.no_grad()
def evaluate_bpb(model, tokenizer, batch_size):
    """Validation bits per byte of `model`, which maps ids [B, T] to logits [B, T, vocab_size]; raises Refused.

    The mean code length, in bits per UTF-8 byte, of the targets of the fixed validation rows under a causal model;
    special tokens carry no bytes and are left out of both sums. The loss is computed here: from the logits, in fp32,
    summed in fp64. Each row is read once, whatever `batch_size`, which out of memory halves.
    """
    evaluated.append(type(model))
    rows, rng = prepared_rows(), random.SystemRandom()
    device = next((p.device for p in model.parameters()), default_device())
    token_bytes, batch = bytes_of_tokens(Tokenizer.from_directory()), max(1, min(int(batch_size), EVAL_ROWS))
    tensors = lambda: [*model.parameters(), *model.buffers()]  # noqa: E731
    was_training, state = model.training, [tensor.detach().clone() for tensor in tensors()]
    model.eval()

    def cost(inputs):
        """Nats of `targets` after `inputs`; the model gets a copy that it may write to."""
        logits = model(inputs.clone())
        if type(logits) is not torch.Tensor or logits.shape != (*inputs.shape, len(token_bytes)):
            raise Refused(f"the model returned {type(logits).__name__} {[*logits.shape]} for inputs {[*inputs.shape]}: "
                          f"a tensor with {len(token_bytes)} logits to a token is needed")
        logits = logits.detach().float()
        if not bool(torch.isfinite(logits).all()):
            raise Refused("logits must be finite")
        with torch.autocast(device.type, enabled=False):
            return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(inputs.shape)

    def probed(inputs, nats=None):
        picked = torch.tensor(rng.choices(range(len(rows)), k=len(inputs)))
        others = rows[picked, :-1].roll(rng.randrange(1, rows.size(1)), 1).to(device)
        nats, edge = probe(cost, inputs, others, nats)
        edges.append(edge)
        if not all(map(torch.equal, state, tensors())):
            raise Refused("parameters or buffers change while the model is scored")
        return nats

    total, total_bytes, at, first, edges = 0.0, 0, 0, None, []
    while at < len(rows):
        ids = rows[at : at + batch]
        inputs, targets = ids[:, :-1].to(device), ids[:, 1:].to(device)
        try:
            nats = probed(inputs) if first is None or rng.random() < PROBED else cost(inputs)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            continue
        first = first or (inputs, targets, nats)
        counted = token_bytes[ids[:, 1:]]
        total += float(nats.cpu().double()[counted > 0].sum())
        total_bytes += int(counted.sum())
        at += len(ids)
    inputs, targets, nats = first
    for _ in range(REPEATS):  # once more: nothing scored since may have left a trace
        probed(inputs, nats)
    gain, change = float(torch.cat(edges).mean()), float(torch.cat(edges).abs().mean())
    if gain > MEAN_GAIN or change > MEAN_CHANGE:
        raise Refused(f"the model sees the future or other rows: with other tokens there, the cost of a target changes "
                      f"by {change:.2g} nats and grows by {gain:.2g} on average")
    model.train(was_training)
    return total / (math.log(2) * total_bytes)


# === 2. Log: the journal, which is never lost, and results.tsv, which git may take rows out of ========================
# reads: git, results.tsv, <root>/runs.jsonl
# writes: results.tsv, <root>/runs.jsonl
# used by: the run, you, analysis.ipynb

REPOSITORY = Path(__file__).parent
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"  # of results.tsv


def git(*words):
    if not shutil.which("git"):
        return ""
    run = subprocess.run(["git", "-C", REPOSITORY, *words], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def ancestry():
    """The short hashes of HEAD and of all that it is built on; "none", as the commit of a run, without git."""
    return git("log", "--format=%h", "--abbrev=7").split() or ["none"]


def as_json(record):
    """A record in one line, whatever constants it has: other values as text, without keys that JSON cannot have."""
    return json.dumps(record, default=str, skipkeys=True)


def append_line(path, line):
    """Append in one write, after a newline where a kill has left half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            line = line if f.read(1) == b"\n" else f"\n{line}"
        f.write(f"{line}\n".encode())


def whole_lines(path):
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def journal(**like):
    """The records of the runs of this machine so far that have these values."""
    for line in whole_lines(cache_root() / "runs.jsonl"):
        with contextlib.suppress(ValueError):  # half a line
            record = json.loads(line)
            if isinstance(record, dict) and all(record.get(key) == value for key, value in like.items()):
                yield record


def results(records):
    """The lines of results.tsv and, after them, those that git took out of it: the journal has every row."""
    lines = whole_lines(REPOSITORY / "results.tsv") or [HEADER]
    missing = Counter(record["row"] for record in records if record.get("row"))
    missing.subtract(lines)
    return lines + [row for row, count in missing.items() for _ in range(count)]


def best_kept(lines, history):
    """The lowest val_bpb among the kept rows of results.tsv whose commits are in `history`, inf without any."""
    rows = map(str.split, lines)
    return min((float(row[1]) for row in rows if row[3:4] == ["keep"] and re.fullmatch(r"\d+\.\d+", row[1])
                and row[0] in history), default=math.inf)


def noise(records):
    """The standard deviation of val_bpb between scored runs of one commit, of one time budget on the same data.

    It is pooled over commits, and nan if none was run twice. Uncommitted changes may differ: they do not count.
    """
    repeated = {}
    for r in records:
        if r.get("status") == "ok" and re.fullmatch("[0-9a-f]+", r["commit"]):
            repeated.setdefault((r["commit"], r["time_budget"], r["data"]), []).append(r["val_bpb"])
    freedom = sum(len(values) - 1 for values in repeated.values())
    squares = sum((len(values) - 1) * np.var(values, ddof=1) for values in repeated.values() if len(values) > 1)
    return math.sqrt(squares / freedom) if freedom else math.nan


def tokens_per_second(record):
    return record["total_tokens"] / record["training_seconds"] if record["training_seconds"] else 0.0


def show_runs(budget):
    """Print the runs of `budget` seconds on this repository's branch; * stands before commits not taken back."""
    history, branch = ancestry(), git("branch", "--show-current")
    records = [*journal(repository=str(REPOSITORY), branch=branch, time_budget=budget)]
    print("  commit     seed    val_bpb  tokens/s  status   description")
    for r in records:
        status = r["row"].split("\t")[3] if "row" in r and r["status"] == "ok" else r["status"]
        print("*" if r["commit"] in history else " ",
              f"{r['commit']:<8} {r['seed']:>6}  {r['val_bpb'] or 0:9.6f}  {tokens_per_second(r):8.0f}  "
              f"{status:<8} {' '.join(r['description'].split())}")
    spread = noise(records)
    print(f"noise: {spread:.6f}" if spread >= 0 else "noise: not known, no commit was run twice")


# === 3. Run: clock, watcher, lock and report ==========================================================================
# reads: the clock, the environment, the manifest
# writes: standard output, <root>/<device>.lock
# used by: train.py

OPENED = time.monotonic()  # so that work before Run() shows in startup_seconds
GRACE = 300.0  # seconds a run may take beside its time budget
PEAK_FLOPS = {  # dense bf16, by a part of the device's name; the first that matches counts
    "B200": 2250e12, "H200": 989.5e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.5e12, "A100": 312e12,
    "L40S": 362e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "NVIDIA L4": 121e12,
}
KILLED = "killed from outside, or by the system when memory ran out"
ENDINGS = ((Refused, "refused"), (FloatingPointError, "nan"), ((torch.OutOfMemoryError, MemoryError), "oom"))


def env_number(name, default, low):
    """The number in environment variable `name`, or `default` where it is unset; a whole one if `default` is."""
    text = os.environ.get(name) or str(default)
    try:
        value = type(default)(text)
    except ValueError:
        value = math.nan
    if not low <= value < math.inf:
        raise PrepareError(f"{name}={text!r} is not a number of at least {low}; set one or unset it")
    return value


def time_budget():
    """Seconds of training."""
    return env_number("AUTORESEARCH_TIME_BUDGET", 300.0, 1)


def peak_memory():
    """Bytes that tensors took on the GPU at most; without a GPU all that the process took."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fingerprint():
    """What a player could replace at run time: constants by value, functions and methods by their code."""
    things = vars(prepare) | globals()
    things |= {f"{c.__name__}.{name}": value for c in (Run, Tokenizer) for name, value in vars(c).items()}
    return {name: repr(value) if name.isupper() else id(getattr(value, "__code__", value))
            for name, value in things.items() if name != "PRISTINE"}


class Run:
    """One experiment: `with Run(globals()) as run:`, in it run.start(), run.progress() and run.step(), run.score().

    From start() on everything is on the clock: data, Python, logging. A process beside the run, its watcher, prints and
    logs the report, whatever ends the run, and kills a run that takes GRACE seconds more than its budget.
    """

    def __init__(self, constants=None, grace=GRACE):
        self.seed, self.budget, self.grace = env_number("AUTORESEARCH_SEED", 42, 0), time_budget(), grace
        self.data, self.started, self.witness = read_manifest(thorough=True), None, None
        self.losses, self.late_loss, self.lines, self.lock_file = deque(maxlen=20), None, 0, None
        self.reported = False
        dirty = "+" if git("status", "--porcelain", "--", "train.py", "prepare.py", "referee.py") else ""
        files = {name: sha256[:16] for name, (_, sha256) in self.data["files"].items()}
        self.record = dict(  # what the report and the journal say
            status=None, error="", val_bpb=None, training_seconds=0.0, total_seconds=0.0, startup_seconds=0.0,
            eval_seconds=0.0, peak_vram_mb=0.0, num_steps=0, total_tokens=0, num_params=0, flops_per_token=0, depth=0,
            attention="n/a", device="n/a", loss_curve=[], seed=self.seed, time_budget=self.budget, time=time.time(),
            standard=not any(map(os.environ.get, ("AUTORESEARCH_TIME_BUDGET", "AUTORESEARCH_SEED"))),
            data=f"{self.data['data']}-{self.data['scale']}", torch=torch.__version__, repository=str(REPOSITORY),
            commit=(git("rev-parse", "--short=7", "HEAD") or "none") + dirty, branch=git("branch", "--show-current"),
            description=git("log", "-1", "--format=%s"), tokenizer=files["tokenizer.tiktoken"],
            val_rows=files["val_rows.bin"], prepare=sha256_of(prepare.__file__)[:16], referee=sha256_of(__file__)[:16],
            constants={name: value for name, value in (constants or {}).items()
                       if name.isupper() and isinstance(value, int | float | str | tuple | list | dict)},
        )

    def __enter__(self):
        sys.stdout.flush()
        told, self.pipe = os.pipe()
        self.watcher = os.fork()
        if self.watcher == 0:
            try:
                os.close(self.pipe)
                self.watch(told)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(not self.reported)
        os.close(told)
        try:
            self.device = default_device()
            self.lock()
            print(f"commit {self.record['commit']}, seed {self.seed}: {self.record['description']}", flush=True)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
        return self

    def lock(self):
        """Hold the device's lock until the end of the run, or refuse the run."""
        unit, name = f"cpu-{os.uname().nodename}", f"cpu ({torch.get_num_threads()} threads)"
        if self.device.type == "cuda":
            name, unit = torch.cuda.get_device_name(), f"cuda-{torch.cuda.get_device_properties(0).uuid}"
        try:
            self.lock_file = prepare.hold(cache_root() / f"{unit}.lock")
        except BlockingIOError as holder:
            raise Refused(f"{name} is taken: process {holder} trains on it, and both timings would be wrong; wait for "
                          "it, stop it, or choose another GPU with CUDA_VISIBLE_DEVICES") from None
        self.note(device=name)

    def note(self, **facts):
        """Tell the report what was built: depth, num_params, flops_per_token, attention."""
        if "val_bpb" in facts:
            raise Refused("val_bpb comes from score() alone")
        self.record |= facts | dict(peak_vram_mb=peak_memory() / 2**20)
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the watcher
            os.write(self.pipe, as_json(self.record).encode() + b"\n")

    def start(self):
        """Start the clock; all before was start-up."""
        self.synchronize()
        if self.started is not None:
            raise Refused("the clock runs already: start() is called once")
        self.started, self.witness = time.monotonic(), time.perf_counter()
        self.note(startup_seconds=self.started - OPENED)

    def progress(self):
        """Share of the time budget used so far; the run is over at 1."""
        return (time.monotonic() - self.started) / self.budget

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, loss, tokens):
        """Count an optimizer step on `tokens` tokens. Its loss, a tensor, is read one step late to spare a wait."""
        self.read_loss()
        self.late_loss = loss
        self.record["num_steps"] += 1
        self.record["total_tokens"] += tokens

    def read_loss(self):
        if self.late_loss is None:
            return
        self.losses.append(float(self.late_loss))
        steps, progress, live = self.record["num_steps"], self.progress(), sys.stdout.isatty()
        if not math.isfinite(self.losses[-1]):
            raise FloatingPointError(f"training loss is {self.losses[-1]} at step {steps}")
        due = 20 * progress >= self.lines  # a file gets a line of the first steps and every 5%, a terminal a live one
        if due or steps <= 3 or live:
            recent, rate = sum(self.losses) / len(self.losses), self.record["total_tokens"] / (progress * self.budget)
            print(f"step {steps:05d} | {min(100, 100 * progress):5.1f}% | loss {recent:.6f} | {rate:,.0f} tok/s | "
                  f"{max(0, 1 - progress) * self.budget:.0f} s left ", end="\r" if live else "\n", flush=True)
            self.note(training_seconds=progress * self.budget)
        if due:
            self.lines = math.floor(20 * progress) + 1
            self.record["loss_curve"].append(round(recent, 4))

    def score(self, model, tokenizer, batch_size):
        """Stop the clock, evaluate `model`, once, and return its val_bpb."""
        self.read_loss()
        self.synchronize()
        seconds, begun = time.monotonic() - self.started, time.monotonic()
        self.note(training_seconds=seconds)
        if evaluated:
            raise Refused("a run has one score: evaluate_bpb or score() was called before")
        if (abs(time.perf_counter() - self.witness - seconds) > 1 or self.budget != self.record["time_budget"]
                or self.started - OPENED != self.record["startup_seconds"]):
            raise Refused("the clock was set: start() and the time budget must stay as they are")
        if not 0.98 * self.budget <= seconds <= 1.01 * self.budget + 2:
            raise Refused(f"trained for {seconds:.1f} s of a budget of {self.budget:.1f} s: stop when progress() is 1, "
                          "and let no step take more than 1% of it")
        self.intact()
        value = evaluate_bpb(model, tokenizer, batch_size)
        self.intact()
        self.record["val_bpb"] = value
        self.note(eval_seconds=time.monotonic() - begun)
        return value

    def intact(self):
        now = fingerprint()
        changed = [name for name in PRISTINE if now.get(name) != PRISTINE[name]]
        if changed:
            raise Refused(f"the referee was changed at run time: {', '.join(changed)}")
        if read_manifest() != self.data:
            raise Refused("other data were prepared during the run; run it again")

    def __exit__(self, kind, error, trace):
        status = next((status for kinds, status in ENDINGS if isinstance(error, kinds)), "crash" if error else "ok")
        reason = f"{kind.__name__}: {error}" if status in ("crash", "oom") else str(error or "")
        if isinstance(error, KeyboardInterrupt):
            reason = "interrupted"
        elif status == "crash":
            traceback.print_exception(error)
        elif status == "ok" and self.record["val_bpb"] is None:
            status, reason = "crash", "the run ended without a score"
        status = self.settled(status)
        with contextlib.suppress(OSError):  # nobody reads the output
            sys.stdout.flush()
        self.note(status=status, error=reason)
        if os.waitpid(self.watcher, 0)[1]:  # the watcher was killed, or has failed
            self.report()
        os.close(self.pipe)
        if self.lock_file:
            self.lock_file.close()
        if status != "ok":
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
        return True

    def settled(self, status):
        """`status`, but ok for a run that broke after its score: that holds."""
        broken = status in ("crash", "oom", "timeout")
        return "ok" if broken and self.record["val_bpb"] is not None else status

    def watch(self, told):
        """In a process of its own: follow the run through the pipe `told`, and report how it ends."""
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # pkill -f train.py means both processes
            signal.signal(number, signal.SIG_IGN)
        run, deadline, text = os.getppid(), time.monotonic() + self.budget + self.grace, b""
        while not self.record["status"]:
            left = deadline - time.monotonic()
            if left <= 0 and os.getppid() == run:
                os.kill(run, signal.SIGSTOP)
                error = f"still running {self.grace:.0f} s after its time budget of {self.budget:.0f} s"
                self.record |= dict(status="timeout", error=error)
            elif left > 0 and select.select([told], [], [], min(left, 1.0))[0]:
                block = os.read(told, 1 << 16)
                *lines, text = (text + block).split(b"\n")
                self.record = json.loads(lines[-1]) if lines else self.record
                if not block:
                    self.record |= dict(status="crash", error=KILLED)
            elif os.getppid() != run:  # what it has started lives on and holds the pipe
                self.record |= dict(status="crash", error=KILLED)
        late = self.record["status"] == "timeout"
        self.record["status"] = self.settled(self.record["status"])
        self.report()
        if late:
            os.kill(run, signal.SIGKILL)

    def report(self):
        """Log the run and print the report."""
        r = self.record
        r |= dict(error=" ".join(r["error"].split())[:500], total_seconds=time.monotonic() - OPENED)
        logged = r["standard"] and r["device"] != "n/a"  # which it is before the run has the device
        records = [*journal(repository=r["repository"], branch=r["branch"])]
        comparable = [old for old in records if all(old.get(key) == r[key] for key in ("time_budget", "data"))]
        history = ancestry()
        lines = results(records)  # a commit that was taken back is not in the history, and no mark to beat
        elsewhere = {old.get("row") for old in records} - {old.get("row") for old in comparable}  # on other data
        best = best_kept([line for line in lines if line not in elsewhere], {*history} - {r["commit"]})
        verdict = "crash"
        if r["status"] == "ok":
            verdict = "keep" if round(r["val_bpb"], 6) < best else "discard"
        if logged:
            row = [r["commit"], "0.000000", "0.0", "crash", " ".join(r["description"].split())]
            if r["status"] == "ok":
                row[1:4] = f"{r['val_bpb']:.6f}", f"{r['peak_vram_mb'] / 1024:.1f}", verdict
            r["row"] = "\t".join(row)
        try:
            append_line(cache_root() / "runs.jsonl", as_json(r))
            if logged:
                prepare.write_text(REPOSITORY / "results.tsv", "".join(line + "\n" for line in [*lines, r["row"]]))
        except OSError as error:
            r["error"] += f" NOT LOGGED: {error}"
        self.reported = True
        verdict += f" (best was {best:.6f})" if best < math.inf else " (first)"
        if not logged:
            why = "no device" if r["standard"] else "AUTORESEARCH_TIME_BUDGET or AUTORESEARCH_SEED is set"
            verdict = f"none: {why}, so not in results.tsv"
            like = [old for old in comparable if old.get("status") == "ok" and old.get("seed") == r["seed"]
                    and old["commit"] in history and old["commit"] != r["commit"]]
            if like:
                verdict += f"; the last such run of kept code: {like[-1]['val_bpb']:.6f} ({like[-1]['commit']})"
        rate = tokens_per_second(r)
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in r["device"]), None)
        spread = noise([*comparable, r])
        block = dict(
            val_bpb=f"{r['val_bpb']:.6f}" if r["status"] == "ok" else "",
            training_seconds=f"{r['training_seconds']:.1f}",
            total_seconds=f"{r['total_seconds']:.1f}",
            peak_vram_mb=f"{r['peak_vram_mb']:.1f}",
            mfu_percent=f"{100 * r['flops_per_token'] * rate / peak:.2f}" if peak else "n/a",
            total_tokens_M=f"{r['total_tokens'] / 1e6:.1f}",
            num_steps=r["num_steps"],
            num_params_M=f"{r['num_params'] / 1e6:.1f}",
            depth=r["depth"],
            status=r["status"],
            error=r["error"],
            verdict=verdict,
            noise=f"{spread:.6f}" if spread >= 0 else "",
            tokens_per_second=f"{rate:.0f}",
            startup_seconds=f"{r['startup_seconds']:.1f}",
            eval_seconds=f"{r['eval_seconds']:.1f}",
            **{key: r[key] for key in ("device", "attention", "seed", "data", "commit")},
        )
        print("\n---" if sys.stdout.isatty() else "---",
              *(f"{key + ':':<17} {value}" for key, value in block.items() if value != ""), sep="\n", flush=True)


PRISTINE = fingerprint()

if __name__ == "__main__":
    show_runs(time_budget())
