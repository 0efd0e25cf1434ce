"""
Measure the speed of the loader, of preparation and of training, and the val_bpb of training.

    uv run python tests/bench.py loader     tokens per second of prepare.py and, in turn, of the slow reference.py
    uv run python tests/bench.py prepare    seconds and peak memory of prepare.py for three sizes of text
    uv run python tests/bench.py train      train.py on the data prepared last: val_bpb, steps, start-up, evaluation
    uv run python tests/bench.py train --against PATH --seconds 300
                                            the same, alternating with the train.py of another checkout on our
                                            prepare.py. It needs the interface of karpathy/autoresearch's.

The first two use the Python source of this environment and a temporary cache. Other jobs on the machine distort the
figures: check the printed load.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import reference
import torch
from hub import Hub, write_shard

import prepare

B, T, VOCAB_SIZE = 64, 2048, 8192
TRAIN_CHARS, VAL_CHARS = 30_000_000, 2_000_000
REPETITIONS = 5
ORIGINAL = dict(  # the shape of karpathy/autoresearch's model; measured only on CUDA
    DEPTH=8, N_EMBD=512, HEAD_DIM=128, WINDOW_PATTERN="SSSL", SHORT_WINDOW=1024, VALUE_EMBED_EVERY=2, TOTAL_BATCH=2**19,
)
BATCHES, SLOW_BATCHES = 1_000, 6  # per repetition, of 131,072 tokens each: about half a second for each loader


def write_corpus(folder):
    """Write a training shard and the validation shard from this environment's Python source."""
    splits = prepare.split_text(prepare.find_files("python"))
    for index, split, left in zip((0, 6542), splits, (TRAIN_CHARS, VAL_CHARS), strict=True):
        groups = []
        for texts in split():
            groups.append(texts)
            left -= sum(map(len, texts))
            if left <= 0:
                break
        write_shard(folder / f"shard_{index:05d}.parquet", groups)


def prepare_corpus(root):
    """Write shards below the folder `root`, serve and prepare them. Returns the training shards."""
    (root / "hub").mkdir()
    write_corpus(root / "hub")
    with Hub(root / "hub") as hub:
        os.environ |= dict(AUTORESEARCH_CACHE=str(root / "cache"), HF_ENDPOINT=hub.endpoint, NO_PROXY="*")
        prepare.prepare("climbmix", "full", 1, VOCAB_SIZE)
    return [root / "hub/shard_00000.parquet"]


def rate(loader, batches):
    """Tokens per second of the next `batches` of a loader."""
    started = time.perf_counter()
    for _ in islice(loader, batches):
        pass
    return batches * B * T / (time.perf_counter() - started)


def compare(what, ours, theirs):
    """Alternate two functions that return a rate, skip the first round, and print their rows of the table."""
    figures = [(ours(), theirs()) for _ in range(REPETITIONS + 1)][1:]
    for name, rates in zip(("prepare.py", "reference.py"), zip(*figures, strict=True), strict=True):
        print(f"{what:<22} {name:<13} {statistics.median(rates):>14,.0f} {min(rates):>14,.0f} {max(rates):>14,.0f}")
    ratio = statistics.median(ours for ours, _ in figures) / statistics.median(theirs for _, theirs in figures)
    print(f"{what:<22} {'ratio':<13} {ratio:>13,.1f}x")


def bench_loader(shards):
    """Compare batches from the token store with batches tokenized live. The first batches must be equal."""
    tokenizer = prepare.Tokenizer.from_directory()
    ours = prepare.make_dataloader(tokenizer, B, T, "train", device="cpu")
    theirs = reference.loader(reference.encoding(tokenizer.ranks), shards, B, T)
    for expected, found in zip(next(theirs), next(ours), strict=True):
        assert expected == found if isinstance(found, int) else torch.equal(expected, found), "the loaders disagree"
    compare("loader, tokens/s", lambda: rate(ours, BATCHES), lambda: rate(theirs, SLOW_BATCHES))
    ours.close()


def prepared(root, *args):
    """(seconds, peak MB) of `prepare.py args` as a process, in the cache `root`."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, prepare.__file__, *map(str, args)], stdout=subprocess.PIPE, text=True,
                          env=os.environ | dict(AUTORESEARCH_CACHE=str(root))) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, output
    return time.perf_counter() - started, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def bench_prepare(root):
    """Time a first and a second run of prepare.py on three sizes of text. Extrapolate to ten shards of 250 MB."""
    files, sizes, seconds = sorted(prepare.find_files("python")), [], []
    print(f"{'prepare.py':<12} {'MB':>6} {'first, s':>9} {'peak, MB':>9} {'second, s':>10}")
    for every in (4, 2, 1):
        folder = root / f"text-{every}"
        folder.mkdir()
        for number, path in enumerate(files[::every]):
            (folder / f"{number}.py").symlink_to(path)
        first, peak = prepared(root, "--data", folder, "--scale", "small")
        second, _ = prepared(root, "--data", folder, "--scale", "small")
        sizes.append(sum(path.stat().st_size for path in files[::every]) / 1e6)
        seconds.append(first)
        print(f"{'':<12} {sizes[-1]:>6.0f} {first:>9.1f} {peak:>9.0f} {second:>10.1f}", flush=True)
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    total = seconds[-1] + slope * (2_500 - sizes[-1])
    print(f"{'':<12} {slope:.3f} s per additional MB: 2,500 MB would take {total:.0f} s")


def experiment(folder, changes, cache, seconds, i):
    """Run the train.py in `folder` as a process and return its report, {key: number or text}.

    The key `outside` has the seconds outside training. `changes`: constants to set before the run. Run i has seed
    42 + i. Run 0 starts with an empty compile cache.
    """
    env = os.environ | dict(AUTORESEARCH_TIME_BUDGET=str(seconds), AUTORESEARCH_SEED=str(42 + i),
                            AUTORESEARCH_CACHE=str(cache), PYTHONPATH=str(folder))
    script = ["-c", f"import train; vars(train).update({changes}); train.main()"] if changes else ["train.py"]
    with tempfile.TemporaryDirectory() as compiled:
        if i == 0:
            env["TORCHINDUCTOR_CACHE_DIR"] = compiled
        begun = time.perf_counter()
        run = subprocess.run([sys.executable, *script], cwd=folder, env=env, capture_output=True, text=True)
        wall = time.perf_counter() - begun
    report = dict(re.findall(r"^(\w+): +(.*)$", run.stdout, re.M))
    if run.returncode or "val_bpb" not in report:
        sys.exit(f"train.py in {folder} failed: {report.get('error') or run.stderr[-1000:]}")
    report = {key: float(value) if re.fullmatch(r"-?[\d.]+", value) else value for key, value in report.items()}
    rate = 1e6 * report["total_tokens_M"] / report["training_seconds"]
    return report | dict(outside=wall - report["training_seconds"], rate=report.get("tokens_per_second", rate))


def bench_train(against, cache, seconds, n):
    """n runs each, in turn, of our train.py, of ours with the original's shape, and of another checkout's train.py."""
    with tempfile.TemporaryDirectory(prefix="autoresearch-bench-") as folder:
        here = Path(prepare.__file__).parent
        variants = {"ours": (here, None, prepare.cache_root())}
        if torch.cuda.is_available():
            variants["ours, 8 x 512"] = here, ORIGINAL, prepare.cache_root()
        if against:
            variants["theirs"] = Path(folder), None, cache or prepare.cache_root()
            shutil.copy(Path(against, "train.py"), folder)
            for name in ("prepare.py", "referee.py"):
                shutil.copy(here / name, folder)
        reports = {name: [] for name in variants}
        columns = dict(val_bpb="val_bpb", rate="tokens/s", num_steps="steps", outside="outside, s",
                       startup_seconds="start-up", eval_seconds="evaluation", peak_vram_mb="peak, MB")
        print(f"\ntraining for {seconds:.0f} s\n{'':<16} " + " ".join(f"{title:>11}" for title in columns.values()))

        def row(name, report):
            cells = (f"{report[c]:,.{4 if report[c] < 10 else 1}f}" if c in report else "" for c in columns)
            print(f"{name:<16} " + " ".join(f"{cell:>11}" for cell in cells), flush=True)

        for i in range(n):
            for name, what in variants.items():
                reports[name].append(experiment(*what, seconds, i))
                row(f"{name}, {i + 1}", reports[name][-1])
        means = {name: {c: statistics.mean(r[c] for r in runs) for c in columns if c in runs[0]}
                 for name, runs in reports.items()}
        for name, mean in means.items():
            row(f"{name}, mean", mean)
        if against:
            row("ratio", {c: means["ours"][c] / value for c, value in means["theirs"].items() if value})


def main():
    parser = argparse.ArgumentParser(description="Measure loader, preparation or training.")
    parser.add_argument("what", choices=["loader", "prepare", "train"])
    parser.add_argument("--against", metavar="PATH", help="a checkout with a train.py to compare ours with")
    parser.add_argument("--cache", metavar="PATH", help="AUTORESEARCH_CACHE for the other checkout (default: ours)")
    parser.add_argument("--seconds", type=float, default=20, help="time budget of a training run (default: 20)")
    parser.add_argument("-n", type=int, default=3, help="runs of each train.py (default: 3)")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if args.what == "train":
        return bench_train(args.against, args.cache, args.seconds, args.n)
    with tempfile.TemporaryDirectory(prefix="autoresearch-bench-") as root:
        if args.what == "loader":
            shards = prepare_corpus(Path(root))
            print(f"\nB {B}, T {T}, n = {REPETITIONS}\n{'':<22} {'':<13} {'median':>14} {'min':>14} {'max':>14}")
            bench_loader(shards)
        else:
            bench_prepare(Path(root))


if __name__ == "__main__":
    main()
