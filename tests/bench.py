"""
How fast things are, on the Python source of this environment, in a cache that is thrown away.

    uv run python tests/bench.py            all
    uv run python tests/bench.py loader     batches of prepare.py beside the slow twin of reference.py, taking turns
    uv run python tests/bench.py prepare    prepare.py as a process: seconds and peak memory by size of the text

Other jobs spoil the figures: see the load.
"""

import os
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
BATCHES, SLOW_BATCHES = 1_000, 6  # of 131,072 tokens in one repetition: about half a second of each


def write_corpus(folder):
    """A training shard and the validation shard, of this environment's Python source."""
    files = prepare.find_files("python")
    for index, held_out, left in ((0, False, TRAIN_CHARS), (6542, True, VAL_CHARS)):
        groups = []
        for texts in prepare.text_groups(files, held_out):
            groups.append(texts)
            left -= sum(map(len, texts))
            if left <= 0:
                break
        write_shard(folder / f"shard_{index:05d}.parquet", groups)


def prepare_corpus(root):
    """Write, serve and prepare the text below the folder `root`; returns its training shards."""
    (root / "hub").mkdir()
    write_corpus(root / "hub")
    with Hub(root / "hub") as hub:
        os.environ |= dict(AUTORESEARCH_CACHE=str(root / "cache"), HF_ENDPOINT=hub.endpoint, NO_PROXY="*")
        prepare.prepare("climbmix", "full", 1, VOCAB_SIZE, 2)
    return [root / "hub/shard_00000.parquet"]


def rate(loader, batches):
    """Tokens per second of the next `batches` of a loader."""
    started = time.perf_counter()
    for _ in islice(loader, batches):
        pass
    return batches * B * T / (time.perf_counter() - started)


def compare(what, ours, theirs):
    """One row of the table: two functions that return a rate, called in turn, the first round not counted."""
    figures = [(ours(), theirs()) for _ in range(REPETITIONS + 1)][1:]
    for name, rates in zip(("prepare.py", "reference.py"), zip(*figures, strict=True), strict=True):
        print(f"{what:<22} {name:<13} {statistics.median(rates):>14,.0f} {min(rates):>14,.0f} {max(rates):>14,.0f}")
    ratio = statistics.median(ours for ours, _ in figures) / statistics.median(theirs for _, theirs in figures)
    print(f"{what:<22} {'ratio':<13} {ratio:>13,.1f}x")


def bench_loader(shards):
    """Batches of tokens, from the store against tokenized live; the first must be the same."""
    tokenizer = prepare.Tokenizer.from_directory()
    ours = prepare.make_dataloader(tokenizer, B, T, "train", device="cpu")
    theirs = reference.loader(reference.encoding(tokenizer.ranks), shards, B, T)
    for expected, found in zip(next(theirs), next(ours), strict=True):
        assert expected == found if isinstance(found, int) else torch.equal(expected, found), "the loaders disagree"
    compare("loader, tokens/s", lambda: rate(ours, BATCHES), lambda: rate(theirs, SLOW_BATCHES))
    ours.close()


def prepared(root, *args):
    """(seconds, peak MB, output) of `prepare.py args` as a process, in the cache `root`."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, prepare.__file__, *map(str, args)], stdout=subprocess.PIPE, text=True,
                          env=os.environ | dict(AUTORESEARCH_CACHE=str(root))) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, output
    return time.perf_counter() - started, usage.ru_maxrss / 1e3, output


def bench_prepare(root):
    """The whole of prepare.py by size of the text, its second run, and what ten shards of 250 MB would take."""
    files, sizes, seconds = sorted(prepare.find_files("python")), [], []
    print(f"{'prepare.py':<12} {'MB':>6} {'first, s':>9} {'peak, MB':>9} {'second, s':>10}  by part")
    for every in (4, 2, 1):
        folder = root / f"text-{every}"
        folder.mkdir()
        for number, path in enumerate(files[::every]):
            (folder / f"{number}.py").symlink_to(path)
        first, peak, output = prepared(root, "--data", folder, "--scale", "small")
        second, _, _ = prepared(root, "--data", folder, "--scale", "small")
        sizes.append(sum(path.stat().st_size for path in files[::every]) / 1e6)
        seconds.append(first)
        parts = "; ".join(" ".join(line.split()) for line in output.splitlines() if "MB/s" in line)
        print(f"{'':<12} {sizes[-1]:>6.0f} {first:>9.1f} {peak:>9.0f} {second:>10.1f}  {parts}", flush=True)
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    print(f"{'':<12} {slope:.3f} s a MB more: 2,500 MB in {seconds[-1] + slope * (2_500 - sizes[-1]):.0f} s")


def main():
    wanted = sys.argv[1:] or ["loader", "prepare"]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="autoresearch-bench-") as root:
        if "loader" in wanted:
            shards = prepare_corpus(Path(root))
            print(f"\nB {B}, T {T}, n = {REPETITIONS}\n{'':<22} {'':<13} {'median':>14} {'min':>14} {'max':>14}")
            bench_loader(shards)
        if "prepare" in wanted:
            bench_prepare(Path(root))


if __name__ == "__main__":
    main()
