"""
A slow, simple reference for prepare.py: tokenizer training, packing, validation rows and metric. It reads parquet
shards and tokenizes live. It is written from the rules below and imports nothing from prepare.py.

Documents come in the order of shards and row groups. The tokenizer sees the first 10,000 characters of each document,
1e9 characters in all. A buffer holds documents, each after a BOS. While it holds fewer than 1,000, it is refilled with
up to 128 documents of one row group at a time. They fill rows of T + 1 tokens: the longest document that still fits
comes next, the first of equals. If none fits, the shortest is cropped to fill the row, and its rest is dropped.
"""

import math
from collections import Counter

import pyarrow.parquet as pq
import regex
import tiktoken
import torch

SPECIALS = ["<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>"]
PATTERN = "|".join([
    r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word, with the one character before it
    r"\p{N}{1,2}",  # at most two digits
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # punctuation
    r"\s*[\r\n]",
    r"\s+(?!\S)",
    r"\s+",
])


def row_groups(paths):
    for path in paths:
        file = pq.ParquetFile(path)
        for number in range(file.num_row_groups):
            yield file.read_row_group(number)["text"].to_pylist()


def training_documents(paths, max_chars=1_000_000_000, max_doc_chars=10_000):
    seen = 0
    for texts in row_groups(paths):
        for text in texts:
            yield text[:max_doc_chars]
            seen += len(text[:max_doc_chars])
            if seen >= max_chars:
                return


def merged(ids, pair, new):
    """`ids` with every `pair`, from the left, replaced by `new`.

    >>> merged((1, 1, 1, 2), (1, 1), 9)
    (9, 1, 2)
    """
    out = []
    for token in ids:
        out.append(token)
        if tuple(out[-2:]) == pair:
            out[-2:] = [new]
    return tuple(out)


def train_ranks(documents, vocab_size):
    """{bytes: id} by byte-pair encoding: repeatedly merge the most frequent pair, among equals the smallest ids."""
    chunks = Counter(chunk for text in documents for chunk in regex.findall(PATTERN, text))
    words = Counter()
    for chunk, count in chunks.items():
        words[tuple(chunk.encode())] += count
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size - len(SPECIALS):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = Counter({word if pair[0] not in word else merged(word, pair, len(tokens)): count
                         for word, count in words.items()})
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return {token: rank for rank, token in enumerate(tokens)}


def encoding(ranks):
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("reference", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def token_batches(enc, paths, epochs=None):
    """Yield (up to 128 documents of one row group as lists of ids, epoch); forever without `epochs`."""
    bos, epoch = enc.encode_single_token(SPECIALS[0]), 1
    while epochs is None or epoch <= epochs:
        for texts in row_groups(paths):
            for at in range(0, len(texts), 128):
                yield [[bos] + ids for ids in enc.encode_ordinary_batch(texts[at : at + 128], num_threads=8)], epoch
        epoch += 1


def rows(batches, capacity):
    """Yield (row of `capacity` ids, epoch of the documents read last) until the documents no longer fill a row."""
    batches, documents, epoch = iter(batches), [], 0
    while True:
        row = []
        while len(row) < capacity:
            while len(documents) < 1_000:
                batch, epoch = next(batches, (None, epoch))
                if batch is None:
                    break
                documents.extend(batch)
            if not documents:
                return
            left, lengths = capacity - len(row), [len(ids) for ids in documents]
            fitting = [length for length in lengths if length <= left]
            ids = documents.pop(lengths.index(max(fitting) if fitting else min(lengths)))  # index: the first of equals
            row.extend(ids[:left])
        yield row, epoch


def loader(enc, paths, B, T):
    """Yield (inputs, targets, epoch) forever."""
    source = rows(token_batches(enc, paths), T + 1)
    while True:
        batch = [next(source) for _ in range(B)]
        ids = torch.tensor([row for row, _ in batch])
        yield ids[:, :-1], ids[:, 1:], batch[-1][1]


def validation_rows(enc, path, T, limit):
    """The first `limit` rows of the validation shard, or all rows of one epoch if there are fewer."""
    source = rows(token_batches(enc, [path], epochs=1), T + 1)
    return [row for (row, _), _ in zip(source, range(limit), strict=False)]


def bits_per_byte(model, enc, rows):
    """Cross-entropy of the targets in bits, over their UTF-8 bytes. Special tokens count in neither sum."""
    specials = {enc.encode_single_token(name) for name in SPECIALS}
    nats, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row[:-1]]))[0].double()
        for target, scores in zip(row[1:], logits, strict=True):
            if target not in specials:
                nats += float(scores.logsumexp(0) - scores[target])
                count += len(enc.decode_single_token_bytes(target))
    return nats / math.log(2) / count
