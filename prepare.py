"""
Prepare text, tokenizer, tokens and validation rows for train.py. Nobody edits this file.

    uv run prepare.py                  ClimbMix: download, train the tokenizer, tokenize (once)
    uv run prepare.py --data python    the Python source of this environment, offline

train.py uses the data prepared last. Each section uses only those above it.
"""

import argparse
import base64
import bisect
import codecs
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import sysconfig
import time
import timeit
from collections import Counter
from itertools import chain, compress, islice, pairwise, repeat
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

# === 1. Settings, files, device ===

FORMAT = 3  # of the cache; data in another format are rebuilt
SCALES = {  # see device_scale(); train.py has constants for each
    "full": dict(seq_len=2048, vocab_size=8192, val_rows=10_240, num_shards=10),
    "medium": dict(seq_len=2048, vocab_size=8192, val_rows=4_096, num_shards=10),
    "small": dict(seq_len=512, vocab_size=2048, val_rows=1_024, num_shards=1),
}
FULL_MEMORY, FULL_SPEED = 38e9, 200e12  # full scale needs: bytes; FLOP/s of a bf16 matmul
CORPORA = ("climbmix", "tinystories", "python")
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # the last ids; the first is BOS
SPLIT_PATTERN = (  # GPT-4's, but at most two digits per token
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


class PrepareError(SystemExit):
    """A user's mistake or an outside failure; ends the program with one line."""

    def __init__(self, sentence):
        super().__init__(f"error: {sentence}")


def cache_root():
    try:
        return Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser().absolute()
    except RuntimeError:
        raise PrepareError("no home folder; set AUTORESEARCH_CACHE to a folder") from None


def write_text(path, text):
    """Replace a text file atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def append_line(path, line):
    """Append `line` and sync. A newline comes first: a kill may have left half a line."""
    with open(path, "a", encoding="utf-8") as f:
        print(f"\n{line}", file=f, flush=True)
        os.fsync(f.fileno())


def lock_file(path, owner):
    """Lock `path` until the returned file is closed. BlockingIOError names the owner."""
    file = open(path, "a+")
    for _ in range(4):  # lock_holder() takes a lock for a moment
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            print(owner, file=file, flush=True)
            return file
        time.sleep(0.1)
    raise BlockingIOError(path.read_text().strip())


def lock_holder(path):
    """The owner of the lock `path`, "" if it is free."""
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
    return ""


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_manifest(folder=None, thorough=False):
    """The manifest of `folder` (default: current); checks sizes and, if `thorough`, sha256."""
    folder = folder or current_folder()
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.pop("digest") != digest(manifest) or manifest["format"] != FORMAT:
            raise ValueError("its manifest was changed or is old")
        for name, (size, sha256) in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != size or (thorough and sha256_of(path) != sha256):
                raise ValueError(f"{name} was changed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrepareError(f"{folder} is not ready ({error}); run: uv run prepare.py [--data NAME]") from None
    return manifest


def current_folder():
    pointer = cache_root() / "current"
    if not pointer.exists():
        raise PrepareError(f"no prepared data in {pointer.parent}; run: uv run prepare.py [--data python]")
    return pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip()


def __getattr__(name):
    """Read from manifest or environment on access, so that importing needs no data."""
    if name == "MAX_SEQ_LEN":  # tokens
        return read_manifest()["seq_len"]
    if name == "SCALE":  # "full" without data, so that train.py can be imported; Run() gives the error
        with contextlib.suppress(PrepareError):
            return read_manifest()["scale"]
        return "full"
    if name == "TIME_BUDGET":  # seconds of training
        return env_number("AUTORESEARCH_TIME_BUDGET", 300.0, 1, 10**6)
    raise AttributeError(f"prepare has no {name}")


def env_number(name, default, low, high):
    """The environment variable `name`, or `default`, as a number of the type of `default`."""
    text = os.environ.get(name) or str(default)
    try:
        value = type(default)(text)
    except ValueError:
        value = -1
    if not low <= value <= high:
        kind = type(default).__name__
        raise PrepareError(f"{name}={text!r} must be a number ({kind}) from {low} to {high}; fix or unset it")
    return value


def default_device():
    """The first available of CUDA, MPS and CPU; the CPU if CUDA_VISIBLE_DEVICES is empty."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    mps = torch.backends.mps.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return torch.device("mps" if mps else "cpu")


def device_scale():
    """The scale for this machine, from the memory of its GPU, then the speed of a matmul."""
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not torch.backends.cuda.is_built():
        return "small"
    try:
        torch.cuda.init()
        if torch.cuda.get_device_properties(0).total_memory < FULL_MEMORY:
            return "medium"
        matrix = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
        seconds = timeit.repeat(lambda: (matrix @ matrix, torch.cuda.synchronize()), number=1)
    except RuntimeError as error:
        if re.search("no NVIDIA driver|No CUDA GPUs", str(error)):
            return "small"
        problem = str(error).partition(". ")[0]
        raise PrepareError(f"torch for CUDA {torch.version.cuda} cannot use the GPU: {problem}; update its "
                           "driver (R580 or later), free or hide it: export CUDA_VISIBLE_DEVICES=") from None
    return "full" if 2 * 8192**3 / min(seconds) >= FULL_SPEED else "medium"


@functools.cache
def flash_attention_3(download=False):
    """FlashAttention-3 for Hopper, or None. Without `download` only from the Hugging Face cache."""
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        return None
    try:
        if not download:
            os.environ["HF_HUB_OFFLINE"] = "1"  # training needs no network
        from kernels import get_kernel

        kernel = get_kernel("kernels-community/flash-attn3", revision="v1", trust_remote_code=True)
        return kernel.flash_attn_func
    except Exception as error:  # many types: not downloaded, no network, no build for this torch
        print(f"no FlashAttention-3, using torch's kernel ({error!r:.200})")


def out_of_memory(error):
    """Whether an exception says that memory ran out; torch has several types and texts for it."""
    return bool(re.search("MemoryError|out of memory|ALLOC_FAILED|can't allocate memory", repr(error)))


def device_names(device):
    """(display name, name of the lock file)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(), f"cuda-{torch.cuda.get_device_properties(0).uuid}.lock"
    return f"{device.type} ({torch.get_num_threads()} threads)", f"cpu-{os.uname().nodename}.lock"


def mfu_percent(name, flops):
    """`flops` (FLOP/s) as a percentage of the dense bf16 peak of the GPU `name`, or "n/a"."""
    peaks = {"B200": 2250e12, "H200": 989.5e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.5e12,
             "A100": 312e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12}
    return next((100 * flops / peak for part, peak in peaks.items() if re.search(rf"{part}\b", name)), "n/a")


def peak_memory():
    """Peak bytes of tensors on the GPU, or, without CUDA, of the process."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# === 2. Corpus: documents for training and validation ===

LAST_SHARD = 6542  # of ClimbMix, always for validation
STORY_GROUPS = 293  # of tinystories count as a shard: 250 MB, as in ClimbMix
ENDINGS = (".txt", ".md", ".py", ".jsonl", ".parquet")
CUT_FROM, CUT_AT = 1_500, 6_000  # characters of a document cut from a file: usual minimum, maximum
LONGEST = 500_000  # most characters of a document: tiktoken fails on a million spaces
GROUP = 1_024  # documents per group
HELD_OUT, LEAST, MOST = 0.02, 100_000, 0.1  # validation split: 2% of the bytes, at least 100 kB, at most 10%


def download(repo, names, folder):
    """Download the files `names` of a Hugging Face dataset to `folder`, if missing or changed."""
    from huggingface_hub import hf_hub_download, logging

    logging.set_verbosity_error()
    print("shards:   ", len(names), "to check or download", flush=True)
    for part in folder.rglob("*.incomplete"):  # leftovers
        part.unlink()
    try:  # one by one: threads share a client, and a failed connection closes it for all
        return [Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=folder)) for name in names]
    except Exception as error:
        why = " ".join(str(error.__cause__ or error).split())[:300]
        raise PrepareError(f"cannot download {repo} ({why}); check network, disk (AUTORESEARCH_CACHE), "
                           "HF_ENDPOINT, HF_TOKEN and run this again, or use --data python") from None


@contextlib.contextmanager
def reading(path):
    """Turn an error while reading a file into one sentence that names the file."""
    try:
        yield
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise PrepareError(f"{path} cannot be read ({error}); replace or remove it") from None


def shard(path):
    """Open a parquet file with a column `text` of strings."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    columns = {field.name: str(field.type) for field in file.schema_arrow}
    if not re.match("(dictionary<values=)?(large_)?string", columns.get("text", "")):
        raise ValueError(f"it needs a column 'text' of strings, its columns are {columns}")
    return file


def row_groups(paths):
    """The documents of parquet shards, one list per row group."""
    for path in paths:
        with reading(path):
            file = shard(path)
            for i in range(file.num_row_groups):
                yield file.read_row_group(i, ["text"])["text"].drop_null().to_pylist()


def cut(text):
    """Documents of at most CUT_AT characters, cut at blank lines before unindented text if possible."""
    documents = [""]
    for block in re.split(r"(?<=\n\n)(?=\S)", text):
        for i in range(0, len(block), CUT_AT):
            piece = block[i : i + CUT_AT]
            if len(documents[-1]) >= CUT_FROM or len(documents[-1] + piece) > CUT_AT:
                documents.append("")
            documents[-1] += piece
    return documents


def records(path):
    """The documents of one file: rows of .parquet and .jsonl, pieces of other text."""
    with reading(path):
        if path.suffix.lower() == ".parquet":
            for batch in shard(path).iter_batches(GROUP, columns=["text"]):
                yield from batch["text"].to_pylist()
            return
        with open(path, "rb") as f:
            wide = f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with open(path, encoding="utf-16" if wide else "utf-8-sig", errors="replace") as f:
            if path.suffix.lower() != ".jsonl":
                yield from cut(f.read())
                return
            for number, line in enumerate(f, 1):
                try:
                    text = json.loads(line, parse_int=float)["text"] if line.strip() else None
                    if text is not None:
                        yield text.encode("utf-8", "replace").decode()  # no lone surrogates
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    found = line.strip()[:60]
                    raise PrepareError(f"{path} line {number} is {found!r}, not a JSON object with a string "
                                       "under 'text'; correct or delete it") from None


def find_files(data):
    """The text files of `data` ('python': this environment's source), shuffled by a hash of their path."""
    tops, endings, others = {Path(data).absolute()}, ENDINGS, set()
    if data == "python":
        tops = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")}
        endings, others = (".py",), {"site-packages", "dist-packages"}  # of other environments
    found, skipped = {}, Counter()
    for top in tops:
        walk = os.walk(top, onerror=lambda error: skipped.update(["unreadable folder"]))
        for folder, folders, names in walk if top.is_dir() else [(top.parent, [], [top.name])]:
            skipped.update("hidden" for name in folders + names if name.startswith("."))
            folders[:] = [name for name in folders if not name.startswith(".") and name not in others]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                if path.suffix.lower() in endings and os.path.isfile(path):
                    found[path] = digest(str(path.relative_to(top)))
                else:
                    skipped[path.suffix.lower() or "without an extension"] += 1
    if data != "python" and skipped:
        print("skipped:  ", ", ".join(f"{number:,} {kind}" for kind, number in skipped.items()))
    if not found:
        raise PrepareError(f"--data {data} has no file ending in {' '.join(ENDINGS)}; convert the text")
    return sorted(found, key=lambda path: (found[path], path))


def split_text(files, limit=None, report=True):
    """(train, val): functions that yield groups of documents, train at most `limit` groups.

    The lowest hashes go to val: a small file as a whole, a large one by document. Duplicates stay
    together.
    """
    def held_out(size):
        return min(MOST * size, max(HELD_OUT * size, LEAST))

    small = held_out(sum(path.stat().st_size for path in files)) / 4
    longest = int(min(LONGEST, max(CUT_AT, small / 4)))

    def documents(path):
        return (text[i : i + longest] for text in records(path) if text for i in range(0, len(text), longest))

    digests, sizes, odd = {}, [0], []
    for path in tqdm(files, "read", disable=None, leave=False):
        digests[path] = []
        for text in ["".join(documents(path))] if path.stat().st_size <= small else documents(path):
            digests[path].append(int(hashlib.sha256(data := text.encode()).hexdigest()[:12], 16))
            sizes.append(len(data))
            if path not in odd[-1:] and ("\ufffd" in text or "\0" in text):
                odd.append(path)
    if odd and report:
        print(f"odd text:  {len(odd):,} of {len(files):,} files are not clean UTF-8, for example {odd[0]}")
    values = np.array([-1, *chain(*digests.values())])
    order = np.argsort(values)
    reached = np.cumsum(np.array(sizes)[order])
    at = np.searchsorted(reached, held_out(reached[-1]))
    last = values[order[at - (reached[at] > MOST * reached[-1])]]

    def texts(held):
        for path, found in digests.items():
            chosen = [(one <= last) == held for one in found]
            if any(chosen):
                yield from compress(documents(path), chosen if len(chosen) > 1 else repeat(True))

    def groups(held):
        found = texts(held)
        while group := list(islice(found, GROUP)):
            yield group

    return lambda: islice(groups(False), limit), lambda: groups(True)


def gather(data, shards, num_shards):
    """The files of the corpus `data`, downloaded to `shards` or found on disk."""
    if data == "climbmix":
        names = [f"shard_{i:05d}.parquet" for i in (*range(num_shards), LAST_SHARD)]
        return download("karpathy/climbmix-400b-shuffle", names, shards)
    if data == "tinystories":
        return download("karpathy/tinystories-gpt4-clean", ["tinystories_gpt4_clean.parquet"], shards)
    return find_files(data)


def split(data, files, num_shards):
    """(train, val) of the corpus `data`: functions that yield groups of documents."""
    if data == "climbmix":
        return lambda: row_groups(files[:-1]), lambda: row_groups(files[-1:])
    limit = num_shards * STORY_GROUPS if data == "tinystories" else None
    return split_text(files, limit, data not in CORPORA)


# === 3. Tokenizer: rustbpe trains, tiktoken encodes ===

TRAIN_CHARS, TRAIN_DOC_CHARS = 10**9, 10_000  # to train the tokenizer: in all, per document


class Tokenizer:
    """Byte-pair encoding. `ranks` maps the bytes of a token to its id; the special tokens follow."""

    def __init__(self, ranks):
        specials = {name: i for i, name in enumerate(SPECIAL_TOKENS, len(ranks))}
        self.ranks = ranks
        self.enc = tiktoken.Encoding("autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                                     special_tokens=specials)

    @classmethod
    def train(cls, groups, vocab_size):
        """Train on groups of documents; `vocab_size` includes the special tokens."""
        import rustbpe

        def capped(left=TRAIN_CHARS):
            for text in (text[:TRAIN_DOC_CHARS] for texts in groups for text in texts):
                yield text
                left -= len(text)
                if left <= 0:
                    return

        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(capped(), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        tokenizer = cls({bytes(token): rank for token, rank in bpe.get_mergeable_ranks()})
        found = tokenizer.get_vocab_size()
        if found < vocab_size:
            raise PrepareError(f"the text is too short for {vocab_size} tokens; use --vocab-size {found}")
        return tokenizer

    def save(self, directory):
        """Write tokenizer.tiktoken: one line per token, its bytes in base64 and its rank."""
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items()]
        (Path(directory) / "tokenizer.tiktoken").write_bytes(b"".join(lines))

    @classmethod
    def from_directory(cls, directory=None):
        lines = (Path(directory or current_folder()) / "tokenizer.tiktoken").read_bytes().splitlines()
        return cls({base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)})

    def get_vocab_size(self):
        return self.enc.n_vocab

    def get_bos_token_id(self):
        return self.enc.encode_single_token(SPECIAL_TOKENS[0])

    def encode(self, text, prepend=None, num_threads=8):
        """Ids of a str, or of each str in a list; `prepend` is an id or the name of a special token."""
        if isinstance(prepend, str):
            prepend = self.enc.encode_single_token(prepend)
        first = [] if prepend is None else [prepend]
        if isinstance(text, str):
            return first + self.enc.encode_ordinary(text)
        return [first + ids for ids in self.enc.encode_ordinary_batch(text, num_threads=num_threads)]

    def decode(self, ids):
        return self.enc.decode(ids)


# === 4. Token store: all documents in one flat file, each after a BOS ===


def write_store(tokenizer, groups, stem, shuffle=False):
    """Tokenize `groups`, lists of documents. Returns the number of tokens.

    stem.bin: the tokens, uint16. stem.npz: documents (2, n), where each starts and stops in the tokens;
    groups, their boundaries in the documents. `shuffle` separates documents of one file.
    """
    lengths, group_starts = [], [0]
    with open(stem.with_suffix(".bin"), "wb") as f:
        for texts in tqdm(groups, stem.name, disable=None, leave=False):
            for ids in tokenizer.encode(texts, prepend=SPECIAL_TOKENS[0], num_threads=os.cpu_count()):
                f.write(np.array(ids, np.uint16))
                lengths.append(len(ids))
            group_starts.append(len(lengths))
    edges = np.cumsum([0, *lengths])
    documents = np.array([edges[:-1], edges[1:]])
    if shuffle:
        documents = np.random.default_rng(0).permutation(documents, axis=1)
    np.savez(stem.with_suffix(".npz"), documents=documents, groups=group_starts)
    return int(edges[-1])


class TokenStore:
    """What write_store() wrote, memory-mapped."""

    def __init__(self, stem):
        index = np.load(stem.with_suffix(".npz"))
        self.documents, self.groups = index["documents"], index["groups"].tolist()
        self.tokens = np.asarray(np.memmap(stem.with_suffix(".bin"), np.uint16, "r"))

    def batches(self):
        """One epoch in batches (starts, stops) of up to 128 documents of one group."""
        for first, last in pairwise(self.groups):
            for i in range(first, last, 128):
                yield self.documents[:, i : min(i + 128, last)].tolist()

    def rows(self, packed, capacity):
        """The tokens of rows from pack_rows: uint16 [len(packed), capacity]."""
        return np.concatenate([self.tokens[a:b] for row in packed for a, b in row]).reshape(-1, capacity)


# === 5. Loader: best-fit packing of documents into rows ===

BUFFER_DOCS = 1_000  # documents to choose from


def pack_rows(batches, capacity):
    """Yield rows of `capacity` tokens, lists of (start, stop), from batches of (starts, stops).

    A gap takes the longest document that fits, the first of equals. If none fits, the shortest is cropped.
    Stops before a row that it cannot fill.

    >>> list(pack_rows([([0, 4, 6], [4, 6, 9])], 5))  # documents of 4, 2 and 3 tokens
    [[(0, 4), (4, 5)]]
    """
    def longest_first(document):
        return document[0] - document[1]

    waiting, batches = [], iter(batches)
    while True:
        row, gap = [], capacity
        while gap:
            while len(waiting) < BUFFER_DOCS and (batch := next(batches, None)):
                waiting += zip(*batch, strict=True)
                waiting.sort(key=longest_first)  # a stable sort
            if not waiting:
                return
            shortest = longest_first(waiting[-1])
            start, stop = waiting.pop(bisect.bisect_left(waiting, min(-gap, shortest), key=longest_first))
            row.append((start, min(stop, start + gap)))
            gap -= min(stop - start, gap)
        yield row


def make_dataloader(tokenizer, B, T, split, device=None):
    """Yield (inputs, targets, epoch) forever: int64 [B, T] on `device`; rows begin with BOS."""
    if split not in ("train", "val") or min(B, T) < 1:
        raise ValueError(f"split must be 'train' or 'val', B and T at least 1, not {split!r}, {B}, {T}")
    import torch

    device = torch.device(device or default_device())
    store, epoch = TokenStore(current_folder() / split), 0

    def epochs():
        nonlocal epoch
        while True:
            epoch += 1
            yield from store.batches()

    def read():
        rows = pack_rows(epochs(), T + 1)
        while True:
            tokens = store.rows(list(islice(rows, B)), T + 1)
            # torch reuses pinned memory once its copy is done
            batch = torch.empty((2, B, T), dtype=torch.int64, pin_memory=device.type == "cuda")
            batch.numpy()[:] = tokens[:, :-1], tokens[:, 1:]
            yield *batch.to(device, non_blocking=True), epoch

    return read()


# === 6. Evaluation: the metric, and the probe for leaks ===

EVAL_ROWS = 16  # most rows per forward: 16 x 2048 x 8192 fp32 logits are 1 GiB
PROBED, REPEATS = 0.15, 8  # share of batches probed; probes of the first batch at the end
ONE_CHANGE, MEAN_CHANGE, MEAN_GAIN = 0.5, 0.02, 0.005  # limits in nats, above bf16 rounding
evaluated = []  # types of the models scored


class Refused(Exception):
    """Why a model or a run gets no score."""


def bytes_of_tokens(tokenizer):
    """UTF-8 bytes of each token, 0 for specials: int64 [vocab_size]."""
    return np.array([*map(len, sorted(tokenizer.ranks, key=tokenizer.ranks.get)), *[0] * len(SPECIAL_TOKENS)])


def validation_rows():
    """The rows to score, int64 [rows, T + 1]; raises Refused or PrepareError if they were changed."""
    import torch

    path, manifest = current_folder() / "val_rows.bin", read_manifest()
    if sha256_of(path) != manifest["files"][path.name][1]:
        raise Refused(f"{path} is not what was prepared; prepare it again")
    rows = np.fromfile(path, np.uint16).reshape(-1, manifest["seq_len"] + 1)
    return torch.from_numpy(rows.astype(np.int64))


def evaluate_bpb(model, tokenizer, batch_size, inspect=None):
    """Bits per byte of `model`, which maps ids [B, T] to logits [B, T, vocab_size]. Lower is better.

    The metric: the sum of the targets' cross-entropies in bits over the sum of their UTF-8 bytes. Special
    tokens count in neither sum. Losses are in fp32; the batch is halved when out of memory.
    `inspect(loss, inputs, targets)` may add checks and must return loss(inputs, targets). `tokenizer` is
    ignored, since train.py could change it. Raises Refused.
    """
    import torch
    from torch.nn.functional import cross_entropy

    def loss(inputs, targets):
        logits = model(inputs.clone())  # the model may write to its input
        shape = *inputs.shape, len(token_bytes)
        if type(logits) is not torch.Tensor or logits.shape != shape:
            raise Refused(f"the model returned {type(logits).__name__} {getattr(logits, 'shape', '')}, "
                          f"not a tensor of logits {shape}")
        with torch.autocast(device.type, enabled=False):
            logits = logits.detach().float()
            if not torch.isfinite(logits).all():
                raise Refused("logits must be finite")
            return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(inputs.shape)

    evaluated.append(type(model))
    rows, token_bytes = validation_rows(), torch.from_numpy(bytes_of_tokens(Tokenizer.from_directory()))
    device = next((p.device for p in model.parameters()), default_device())
    batch = max(1, min(int(batch_size), EVAL_ROWS))
    training, nats, size, at = model.training, 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        while at < len(rows):
            ids = rows[at : at + batch]
            inputs, targets, counted = ids[:, :-1].to(device), ids[:, 1:].to(device), token_bytes[ids[:, 1:]]
            try:
                losses = inspect(loss, inputs, targets) if inspect else loss(inputs, targets)
            except (RuntimeError, MemoryError) as error:
                if len(ids) == 1 or not out_of_memory(error):
                    raise
                batch //= 2
                continue
            nats += float(losses.cpu().double()[counted > 0].sum())
            size += int(counted.sum())
            at += len(ids)
    model.train(training)
    return nats / math.log(2) / size


class Inspector:
    """Probes random batches of `rows` (n, T + 1) for leaks, as `inspect` of evaluate_bpb."""

    def __init__(self, rows):
        self.rows, self.random, self.scored, self.first, self.edges = rows, random.SystemRandom(), 0, None, []

    def __call__(self, loss, inputs, targets):
        import torch

        chosen = self.first is None or self.random.random() < PROBED
        nats = self.probe(loss, inputs, targets) if chosen else loss(inputs, targets)
        self.first = self.first or (inputs, targets, nats)
        if self.scored + len(inputs) == len(self.rows):
            for _ in range(REPEATS):  # exposes a model that has learned from the rows
                self.probe(loss, *self.first)
            edges = torch.cat(self.edges)
            change = float(edges.abs().mean())
            if change > MEAN_CHANGE or float(edges.mean()) > MEAN_GAIN:
                raise Refused(f"the model sees the future or other rows: losses change by {change:.2g} nats")
        self.scored += len(inputs)  # not reached if out of memory
        return nats

    def probe(self, loss, inputs, targets, nats=None):
        """Raise Refused if tokens that the model must not see change the loss of a target.

        A mixed row is a prefix of its row, then the rest of another; of more than three, one stays whole.
        They run before `inputs`, unless `nats`, its losses, is given.
        """
        import torch

        (B, T), rng = inputs.shape, self.random
        others = self.rows[rng.choices(range(len(self.rows)), k=B), 1:]
        others = others.roll(rng.randrange(T), 1).to(inputs.device)
        lengths = rng.sample([T, 1, T - 1, *(rng.randrange(1, T + 1) for _ in range(max(1, B - 3)))], B)
        kept = inputs.new_tensor(lengths)[:, None]
        seen = torch.arange(T, device=inputs.device) < kept  # (B, T)
        mixed = loss(torch.where(seen, inputs, others), targets)
        nats = loss(inputs, targets) if nats is None else nats
        change = (mixed - nats) * seen
        self.edges.append(change.gather(1, kept - 1))  # where leaks show most
        if float(change.abs().max()) <= ONE_CHANGE:
            return nats
        row, at = divmod(int(change.abs().argmax()), T)
        others[row] = inputs[row]
        again, mixed_in = (loss(idx, targets) - nats for idx in (inputs, others))
        if float(again.abs().max()) > ONE_CHANGE:
            raise Refused("two passes over one input differ: the model must be deterministic and stateless")
        if float(mixed_in[row].abs().max()) > ONE_CHANGE:
            raise Refused("the logits of a row depend on the other rows, or on rows seen before")
        raise Refused(f"the model sees the future: tokens {lengths[row]} and later change the loss of "
                      f"target {at} by {float(change[row, at]):.2g} nats")


# === 7. main: prepare one corpus and make it current ===


def prepare(data, scale, num_shards=None, vocab_size=None):
    """Gather the corpus `data`, build what is missing, and make it current."""
    spec, path = SCALES[scale] | dict(format=FORMAT, scale=scale), os.path.abspath(data)
    spec["num_shards"] = num_shards or spec["num_shards"]
    spec["vocab_size"] = vocab_size or spec["vocab_size"]
    stem = re.sub("[^A-Za-z0-9_]", "-", Path(path).stem)[:40]
    name = data if data in CORPORA else f"{stem}-{digest(path)[:8]}"
    folder = cache_root() / f"{name}-{scale}"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / "lock", os.getpid()):
        files = gather(data, folder / "shards", spec["num_shards"])
        hashes = []
        for path in files if data not in CORPORA else ():  # an installed package does not change python
            with reading(path):
                hashes.append(sha256_of(path))
        spec |= dict(data=name, text=digest(hashes))
        target = folder.with_name(f"{folder.name}-{digest(spec)[:8]}")
        try:
            manifest = read_manifest(target, thorough=True)
        except PrepareError:
            size = sum(path.stat().st_size for path in files) / 1e6
            print(f"text:      {size:,.1f} MB to split and tokenize", flush=True)
            manifest = build(target, spec, *split(data, files, spec["num_shards"]))
        if scale != "small" and default_device().type == "cuda":
            flash_attention_3(download=True)
        write_text(cache_root() / "current", target.name)
        for path in {*folder.parent.glob(folder.name + "-????????")} - {target}:
            shutil.rmtree(path)
    print("tokens:    {train_tokens:,} for training, {val_rows:,} validation rows of {seq_len}, "
          "vocabulary {vocab_size:,}".format(**manifest))
    print(f"ready:     {target}\nnext:      uv run train.py")


def build(target, spec, train, val):
    """Build the folder `target` atomically; return its manifest."""
    building, capacity = target.with_name(target.name[:-8] + "building"), spec["seq_len"] + 1
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    tokenizer = Tokenizer.train(train(), spec["vocab_size"])
    tokenizer.save(building)
    tokens = write_store(tokenizer, train(), building / "train", spec["data"] != "climbmix")
    val_tokens = write_store(tokenizer, val(), building / "val")
    if not tokens or val_tokens < capacity:
        raise PrepareError(f"too little text: {tokens} training tokens, {val_tokens} validation tokens; "
                           "add more text")
    store = TokenStore(building / "val")
    rows = list(islice(pack_rows(store.batches(), capacity), spec["val_rows"]))
    store.rows(rows, capacity).tofile(building / "val_rows.bin")
    files = {path.name: [path.stat().st_size, sha256_of(path)] for path in building.iterdir()}
    manifest = dict(spec, train_tokens=tokens, val_rows=len(rows), files=files)
    manifest["digest"] = digest(manifest)
    (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(target, ignore_errors=True)  # a damaged one
    os.replace(building, target)
    return manifest


def main():
    sys.stdout.reconfigure(errors="replace")  # odd file names
    parser = argparse.ArgumentParser(description="Prepare a corpus for train.py, once.")
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    option = parser.add_argument
    option("--data", default="climbmix", metavar="NAME|PATH", type=os.path.expanduser,
           help=f"{', '.join(CORPORA)}, or a file or folder of {' '.join(ENDINGS)} (default: climbmix)")
    option("--num-shards", type=int, metavar="N",
           help="shards of climbmix or tinystories, 250 MB of text each (default: 10; small: 1)")
    option("--vocab-size", type=int, metavar="N",
           help="at least 260: bytes and 4 special tokens (default: 8192; small: 2048)")
    option("--scale", choices=SCALES,
           help="full: a GPU with 40 GB and 200 TFLOP/s; medium: other GPUs; small: a CPU (default: auto)")
    args = parser.parse_args()
    for name, value, low, high in (("num-shards", args.num_shards, 1, LAST_SHARD),
                                   ("vocab-size", args.vocab_size, 260, 2**16)):
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} {value} must be from {low} to {high}")
    if args.data not in CORPORA and not os.path.exists(args.data):
        parser.error(f"--data {args.data} is not a corpus, file or folder")
    try:
        prepare(args.data, args.scale or device_scale(), args.num_shards, args.vocab_size)
    except BlockingIOError as holder:
        sys.exit(f"error: process {holder} is preparing this data; wait for it or stop it")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again")
    except OSError as error:
        sys.exit(f"error: {error}; fix it or set AUTORESEARCH_CACHE")


if __name__ == "__main__":
    main()
