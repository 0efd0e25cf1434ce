"""prepare.py, section by section, against a local hub and the slow reference.py."""

import hashlib
import json
import math
import os
import random
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import reference
import torch
from conftest import document, start, use
from hub import write_shard
from torch import nn

import prepare


def one_sentence(error):
    """The text of an error, which must be one line."""
    text = str(error)
    assert text and "\n" not in text.strip() and "Traceback" not in text
    return text


def copy_cache(source, target):
    """Copy the prepared data in `source` to a new cache. Returns the copy."""
    (target / source.name).mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (target / source.name / path.name).write_bytes(path.read_bytes())
    (target / "current").write_text(source.name)
    return target / source.name


def ruin(folder, how):
    manifest = json.loads((folder / "manifest.json").read_text())
    if how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "manifest cut short":
        (folder / "manifest.json").write_text(json.dumps(manifest)[:-20])
    elif how == "other format":
        old = {key: value for key, value in manifest.items() if key != "digest"} | dict(format=-1)
        (folder / "manifest.json").write_text(json.dumps(old | dict(digest=prepare.digest(old))))
    elif how == "file missing":
        (folder / "train.bin").unlink()
    elif how == "file cut short":
        (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])


# ======================================================================================================================
# 1. Settings, files, device


def test_prepared_data_are_current(toy):
    manifest = prepare.read_manifest(toy)
    assert prepare.current_folder() == toy and prepare.cache_root() in toy.parents
    assert prepare.MAX_SEQ_LEN == manifest["seq_len"] == 256
    assert prepare.Tokenizer.from_directory().get_vocab_size() == manifest["vocab_size"] == 512


def test_missing_data_give_one_sentence_with_the_command(cache):
    with pytest.raises(prepare.PrepareError) as error:
        prepare.current_folder()
    assert "uv run prepare.py" in one_sentence(error.value)


@pytest.mark.parametrize("how", ["no manifest", "manifest cut short", "other format", "file missing", "file cut short"])
def test_incomplete_data_give_one_sentence_with_the_command(toy, cache, how):
    folder = copy_cache(toy, cache)
    assert prepare.read_manifest(folder)
    ruin(folder, how)
    with pytest.raises(prepare.PrepareError) as error:
        prepare.read_manifest(folder)
    assert "uv run prepare.py" in one_sentence(error.value)
    with pytest.raises(SystemExit) as error:  # as karpathy's train.py does
        from prepare import MAX_SEQ_LEN  # noqa: F401
    assert "uv run prepare.py" in one_sentence(error.value)


def test_a_kill_at_any_rename_leaves_the_old_state(toy, toy_text, tmp_path, monkeypatch):
    def state(folder):
        prepare.read_manifest(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def killed(source, target):
        if not renames_left:
            raise KeyboardInterrupt
        renames_left.pop()
        replace(source, target)

    def again(cache):
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(cache))
        prepare.prepare(str(toy_text), "small", None, 400)
        return state(prepare.current_folder())

    replace, old, new, seen, kills = os.replace, state(toy), again(tmp_path / "new"), [], 0
    while True:
        folder, renames_left = copy_cache(toy, tmp_path / f"{kills}"), [None] * kills
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", killed)
                again(folder.parent)
            break
        except KeyboardInterrupt:
            seen.append(state(prepare.current_folder()))
        assert again(folder.parent) == new
        kills += 1
    assert old != new and kills == 2 and seen == [old, old]  # one rename for the data, one for `current`


# ======================================================================================================================
# 2. Corpus


def fetch(folder, *names):
    return prepare.download("owner/data", names, folder)


@pytest.fixture
def data(hub):
    """3 MB, served by the hub as shard.bin."""
    content = random.Random(3).randbytes(3_000_000)
    (hub.folder / "shard.bin").write_bytes(content)
    return content


@pytest.fixture
def no_waiting(monkeypatch):
    """Do not sleep between retries."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_a_finished_download_is_not_repeated(hub, data, tmp_path, monkeypatch, no_waiting):
    [path] = fetch(tmp_path, "shard.bin")
    assert path == tmp_path / "shard.bin" and path.read_bytes() == data
    assert [host for host, *_ in hub.log] == ["hub", "cdn"]
    fetch(tmp_path, "shard.bin")
    assert [host for host, *_ in hub.log] == ["hub", "cdn", "hub"]  # it asked only whether the file has changed
    use(monkeypatch, "http://127.0.0.1:1")
    assert fetch(tmp_path, "shard.bin") == [path]  # without a network


@pytest.mark.parametrize("content", [b"other bytes", None])
def test_a_file_that_changed_after_its_download_is_fetched_again(hub, data, tmp_path, content):
    [path] = fetch(tmp_path, "shard.bin")
    path.write_bytes(content or data[:-1])
    os.utime(path, (time.time() + 10,) * 2)
    fetch(tmp_path, "shard.bin")
    assert path.read_bytes() == data


def test_a_missing_shard_is_an_error_and_the_others_are_kept(hub, data, tmp_path):
    with pytest.raises(prepare.PrepareError) as error:
        fetch(tmp_path, "shard.bin", "absent.bin")
    assert "absent.bin" in one_sentence(error.value) and "404" in str(error.value)
    assert (tmp_path / "shard.bin").read_bytes() == data and not (tmp_path / "absent.bin").exists()


def test_the_token_goes_only_to_the_hub(hub, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(tmp_path, "shard.bin")
    assert [(host, headers.get("authorization")) for host, _, headers in hub.log] == [
        ("hub", "Bearer secret"), ("cdn", None)]


def test_an_unreachable_hub_gives_one_sentence_with_the_offline_option(cache, monkeypatch, no_waiting, capsys):
    use(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--num-shards", "1", "--scale", "small"])
    with pytest.raises(SystemExit) as error:
        prepare.main()
    assert "--data python" in one_sentence(error.value.code) and str(error.value.code).startswith("error: ")
    assert "Connection refused" in str(error.value.code) and capsys.readouterr().err == ""


def test_parquet_groups_are_kept_and_nulls_skipped(tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_shard(paths[0], [["one", None, ""], ["two"]])
    write_shard(paths[1], [["three"]])
    assert list(prepare.row_groups(paths)) == [["one", ""], ["two"], ["three"]]


def test_text_is_cut_before_unindented_lines_and_nothing_is_lost():
    text = "def f(x):\n    y = x\n\n    return y\n\n\n" * 2_000
    pieces = prepare.cut(text)
    assert "".join(pieces) == text and all(piece.startswith("def") for piece in pieces)
    assert all(1_500 <= len(piece) <= 6_000 for piece in pieces[:-1])
    unbroken = prepare.cut(text + "x" * 20_000)
    assert "".join(unbroken) == text + "x" * 20_000 and max(map(len, unbroken)) <= 6_000


def test_every_format_is_read(toy_text):
    found = {path.name: path for path in prepare.find_files(toy_text)}
    assert sorted(found) == ["a.txt", "b.md", "c.py", "d.txt", "e.jsonl", "f.parquet"]
    assert [len(list(prepare.records(found[name]))) for name in ("e.jsonl", "f.parquet")] == [80, 100]
    assert "".join(prepare.records(found["d.txt"])) == found["d.txt"].read_text()


def test_the_python_corpus_is_this_environment():
    found = prepare.find_files("python")
    assert {Path(random.__file__).resolve(), Path(torch.__file__).resolve()} <= set(found)
    assert {path.suffix for path in found} == {".py"}


def test_tinystories_comes_from_the_hub(hub, cache):
    rng = random.Random(5)
    write_shard(hub.folder / "tinystories_gpt4_clean.parquet", [[document(rng, 600) for _ in range(400)]])
    prepare.prepare("tinystories", "small", 1, 300)
    manifest = prepare.read_manifest(prepare.current_folder())
    assert (manifest["data"], manifest["scale"], manifest["vocab_size"]) == ("tinystories", "small", 300)
    assert 300 < prepare.TokenStore(prepare.current_folder() / "train").documents.shape[1] < 400


# ======================================================================================================================
# 3. Tokenizer


@pytest.fixture(scope="module")
def twin(climbmix):
    """The tokenizer of reference.py, trained on the same shards."""
    return reference.encoding(reference.train_ranks(reference.training_documents(climbmix[1][:2]), 512))


@pytest.fixture
def in_climbmix(climbmix, monkeypatch):
    """Make the data prepared from `climbmix` current. Returns their tokenizer."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(climbmix[0]))
    return prepare.Tokenizer.from_directory()


TEXTS = [
    "", "hello  world\n\n1234567 it's", "你好，世界。天地玄黄", "🙂👩\u200d👩\u200d👧🚀é\u0301", "\x00\ufffd",
    "<|reserved_0|> plain",
]


def test_training_finds_the_merges_of_the_reference(in_climbmix, twin):
    assert in_climbmix.ranks == twin._mergeable_ranks


def test_the_specials_come_last_and_the_first_is_bos(in_climbmix):
    assert in_climbmix.get_vocab_size() == 512 and in_climbmix.get_bos_token_id() == 508
    assert [in_climbmix.decode([i]) for i in range(508, 512)] == [f"<|reserved_{i}|>" for i in range(4)]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_saving(in_climbmix, tmp_path, text):
    in_climbmix.save(tmp_path)
    again = prepare.Tokenizer.from_directory(tmp_path)
    assert again.decode(again.encode(text)) == text and again.encode(text) == in_climbmix.encode(text)
    assert again.ranks == in_climbmix.ranks and max(again.encode(text), default=0) < 508


def test_encode_takes_one_text_or_many_and_prepends(in_climbmix):
    bos, plain = in_climbmix.get_bos_token_id(), in_climbmix.encode("hello")
    assert in_climbmix.encode("hello", prepend=bos) == [bos] + plain
    assert in_climbmix.encode("hello", prepend="<|reserved_0|>") == [bos] + plain
    assert in_climbmix.encode(["hello", ""], prepend=bos, num_threads=2) == [[bos] + plain, [bos]]


@pytest.mark.parametrize("text", TEXTS + ["".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x11000)]))])
def test_byte_counts_of_tokens_add_up_to_the_text(in_climbmix, text):
    assert int(prepare.bytes_of_tokens(in_climbmix)[in_climbmix.encode(text)].sum()) == len(text.encode())


def test_tokens_that_are_not_utf8_count_their_raw_bytes(in_climbmix, twin):
    lengths, broken = prepare.bytes_of_tokens(in_climbmix).tolist(), 0
    for token, rank in twin._mergeable_ranks.items():
        broken += "\ufffd" in token.decode(errors="replace")
        assert lengths[rank] == len(token)
    assert broken > 128 and lengths[508:] == [0] * 4


def test_a_vocabulary_of_260_has_only_bytes(toy_text, cache):
    prepare.prepare(str(toy_text), "small", None, 260)
    tokenizer = prepare.Tokenizer.from_directory()
    assert tokenizer.get_vocab_size() == prepare.read_manifest(prepare.current_folder())["vocab_size"] == 260
    assert tokenizer.encode("aé🙂", prepend=tokenizer.get_bos_token_id()) == [256, *"aé🙂".encode()]


@pytest.mark.parametrize("length", [0, 11, 1_000])
def test_too_little_text_for_a_validation_split_is_an_error(tmp_path, cache, length):
    (tmp_path / "a.txt").write_text(document(random.Random(7), length), encoding="utf-8")
    with pytest.raises(prepare.PrepareError, match="more text"):
        prepare.prepare(str(tmp_path / "a.txt"), "small", None, 260)
    assert not (cache / "current").exists()


def test_too_little_text_for_the_vocabulary_suggests_a_size(tmp_path, cache):
    (tmp_path / "a.txt").write_text("abc " * 100_000)
    with pytest.raises(prepare.PrepareError, match="--vocab-size"):
        prepare.prepare(str(tmp_path / "a.txt"), "small", None, 1_000)


# ======================================================================================================================
# 4. Token store


def live(tokenizer, texts):
    return [[tokenizer.get_bos_token_id()] + tokenizer.enc.encode_ordinary(text) for text in texts]


def test_the_store_equals_live_encoding_in_groups(in_climbmix, tmp_path):
    rng = random.Random(6)
    groups = [TEXTS, [document(rng, rng.randrange(3_000)) for _ in range(300)], [""], [document(rng, 500)] * 129]
    count = prepare.write_store(in_climbmix, iter(groups), tmp_path / "split")
    store = prepare.TokenStore(tmp_path / "split")
    found = [[store.tokens[a:b].tolist() for a, b in zip(*batch, strict=True)] for batch in store.batches()]
    expected = [live(in_climbmix, texts[at : at + 128]) for texts in groups for at in range(0, len(texts), 128)]
    assert found == expected and store.tokens.dtype == "uint16"
    assert count == len(store.tokens) == sum(len(ids) for batch in expected for ids in batch)


def test_the_manifest_describes_the_stored_files(toy):
    manifest, store = prepare.read_manifest(toy), prepare.TokenStore(toy / "train")
    assert manifest["train_tokens"] == len(store.tokens)
    assert manifest["val_rows"] * 257 * 2 == (toy / "val_rows.bin").stat().st_size
    for name in ("val_rows.bin", "tokenizer.tiktoken"):  # each file's sha256
        assert hashlib.sha256((toy / name).read_bytes()).hexdigest() in json.dumps(manifest)
    assert set(manifest["files"]) >= {"tokenizer.tiktoken", "train.bin", "train.npz", "val_rows.bin"}


# ======================================================================================================================
# 5. Loader


@pytest.mark.parametrize("seed", range(12))
def test_packing_equals_the_reference(seed):
    rng = random.Random(seed)
    capacity, longest = rng.choice([(1, 3), (7, 5), (16, 40), (64, 20), (257, 300), (100, 1_000)])
    edges, batches = 0, []
    for _ in range(rng.randint(1, 25)):
        starts, stops = [], []
        for _ in range(rng.choice([0, 1, 127, 128])):
            starts.append(edges)
            edges += rng.randint(1, longest if rng.random() < 0.9 else 3 * longest)
            stops.append(edges)
        batches.append((starts, stops))
    expected = [row for row, _ in reference.rows(
        (([list(range(a, b)) for a, b in zip(*batch, strict=True)], 1) for batch in batches), capacity)]
    found = list(prepare.pack_rows(batches, capacity))
    assert [[i for a, b in row for i in range(a, b)] for row in found] == expected


def test_batches_and_epochs_equal_the_reference(in_climbmix, climbmix, twin):
    ours = prepare.make_dataloader(in_climbmix, 8, 2048, "train")
    theirs = reference.loader(twin, climbmix[1][:2], 8, 2048)
    epochs = []
    for (inputs, targets, epoch), expected in zip(islice(ours, 64), theirs, strict=False):
        assert torch.equal(inputs.cpu(), expected[0]) and torch.equal(targets.cpu(), expected[1])
        assert epoch == expected[2]
        epochs.append(epoch)
    ours.close()
    assert len(epochs) == 64 and set(epochs) == {1, 2}


def test_validation_rows_equal_the_reference(in_climbmix, climbmix, twin):
    expected = reference.validation_rows(twin, climbmix[1][2], 2048, 10_240)
    rows = torch.frombuffer(bytearray((prepare.current_folder() / "val_rows.bin").read_bytes()), dtype=torch.uint16)
    assert len(expected) > 100 and rows.view(-1, 2049).tolist() == expected
    loader = prepare.make_dataloader(in_climbmix, 4, 2048, "val")
    assert next(loader)[0].tolist() == [row[:-1] for row in expected[:4]]
    loader.close()


def test_a_batch_is_int64_shifted_by_one_and_starts_with_bos(toy):
    tokenizer = prepare.Tokenizer.from_directory()
    loader = prepare.make_dataloader(tokenizer, 5, 33, "train")
    for inputs, targets, _ in islice(loader, 20):
        assert inputs.shape == targets.shape == (5, 33) and inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert set(inputs[:, 0].tolist()) == {tokenizer.get_bos_token_id()}
        assert inputs.device.type == prepare.default_device().type
    loader.close()


def test_packing_the_next_batch_does_not_change_a_batch(toy):
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 4, 64, "train")
    store = prepare.TokenStore(toy / "train")
    rows = prepare.pack_rows((batch for _ in range(10) for batch in store.batches()), 65)
    for inputs, targets, _ in list(islice(loader, 3)):
        expected = store.rows(list(islice(rows, 4)), 65).tolist()
        assert inputs.tolist() == [row[:-1] for row in expected] and targets.tolist() == [row[1:] for row in expected]
    loader.close()


@pytest.mark.parametrize("B, T, split", [(0, 8, "train"), (8, 0, "train"), (8, 8, "test")])
def test_invalid_arguments_of_the_loader_are_an_error(toy, B, T, split):
    with pytest.raises(ValueError, match="split"):
        prepare.make_dataloader(prepare.Tokenizer.from_directory(), B, T, split)


# ======================================================================================================================
# 6. Evaluation


class Causal(nn.Module):
    """A small random model that sees the mean of the tokens so far. More than `memory` rows raise OutOfMemoryError."""

    def __init__(self, vocab_size, memory=math.inf):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wte = nn.Parameter(torch.randn(vocab_size, 24, generator=generator))
        self.lm_head = nn.Parameter(torch.randn(24, vocab_size, generator=generator))
        self.memory, self.batches = memory, []

    def forward(self, idx):
        self.batches.append(len(idx))
        if len(idx) > self.memory:
            raise torch.OutOfMemoryError("simulated")
        mean = self.wte[idx].cumsum(1) / torch.arange(1, idx.shape[1] + 1)[:, None]
        return torch.tanh(mean + self.wte[idx]) @ self.lm_head


class Uniform(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, idx):
        return torch.zeros(*idx.shape, self.vocab_size, dtype=torch.bfloat16, device=idx.device)


@pytest.fixture
def rows(toy):
    """The validation rows of the toy corpus, as lists."""
    data = torch.frombuffer(bytearray((toy / "val_rows.bin").read_bytes()), dtype=torch.uint16)
    return data.view(-1, prepare.MAX_SEQ_LEN + 1).tolist()


@pytest.fixture(scope="module")
def expected(toy):
    """The bits per byte of the random model by reference.py."""
    data = torch.frombuffer(bytearray((toy / "val_rows.bin").read_bytes()), dtype=torch.uint16)
    tokenizer = prepare.Tokenizer.from_directory(toy)
    return reference.bits_per_byte(Causal(512), reference.encoding(tokenizer.ranks), data.view(-1, 257).tolist())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 16, 33, 64])
def test_bits_per_byte_equal_the_reference_at_any_batch_size(toy, expected, batch_size):
    value = prepare.evaluate_bpb(Causal(512), prepare.Tokenizer.from_directory(), batch_size)
    assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_uniform_logits_cost_log2_v_per_token(rows, batch_size):
    tokenizer = prepare.Tokenizer.from_directory()
    targets = [target for row in rows for target in row[1:] if target < 508]
    assert len(targets) < 256 * len(rows), "the targets have no special token, so this test shows nothing"
    size = sum(len(tokenizer.enc.decode_single_token_bytes(target)) for target in targets)
    value = prepare.evaluate_bpb(Uniform(512), tokenizer, batch_size)
    assert value == pytest.approx(math.log2(512) * len(targets) / size, abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_in_eval_mode_and_restores_training_mode(toy, training):
    model, modes = Causal(512).train(training), set()
    model.register_forward_pre_hook(lambda module, _: modes.add((module.training, torch.is_grad_enabled())))
    prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), 8)
    assert modes == {(False, False)} and model.training is training and torch.is_grad_enabled()


def test_out_of_memory_halves_the_batch_and_changes_nothing_else(toy, expected):
    model = Causal(512, memory=2)
    value = prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), 64)
    assert value == pytest.approx(expected, abs=1e-6) and max(model.batches) > 2
    with pytest.raises(torch.OutOfMemoryError):
        prepare.evaluate_bpb(Causal(512, memory=0), prepare.Tokenizer.from_directory(), 64)


# ======================================================================================================================
# 7. main, as a command

MISTAKES = [
    ["--num-shards", "0"], ["--data", "nowhere/at/all"], ["--data", ""], ["--num-shards", "abc"],
    ["--num-shards", "-1"], ["--num-shards", "6543"], ["--vocab-size", "256"], ["--vocab-size", "many"],
    ["--scale", "huge"], ["--shards", "3"], ["--data", "shakespeare"],
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """The first two mistakes as commands, started together."""
    root = tmp_path_factory.mktemp("mistakes")
    return [(root / f"{i}", start(root / f"{i}", *MISTAKES[i])) for i in range(2)]


@pytest.mark.parametrize("number", range(2))
def test_the_command_answers_a_mistake_with_one_line_and_exit_2(mistakes, number):
    cache, process = mistakes[number]
    out, err = process.communicate()
    assert process.returncode == 2 and out == "" and one_sentence(err).startswith("error: ")
    assert MISTAKES[number][1] in err and not cache.exists()


@pytest.mark.parametrize("args", MISTAKES, ids=" ".join)
def test_every_mistake_gives_one_line_and_exit_2(cache, monkeypatch, capsys, args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
    with pytest.raises(SystemExit) as error:
        prepare.main()
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == "" and one_sentence(err).startswith("error: ") and args[0] in err
    assert not cache.exists()


def test_the_command_prepares_climbmix_from_a_hub(climbmix_like, hub, cache):
    hub.folder = climbmix_like
    process = start(cache, "--num-shards", "2", "--scale", "small", "--vocab-size", "600")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "") and "uv run train.py" in out
    manifest = prepare.read_manifest(prepare.current_folder())
    assert (manifest["data"], manifest["scale"]) == ("climbmix", "small")
    assert prepare.TokenStore(prepare.current_folder() / "train").documents.shape == (2, 6_000)
    asked = len(hub.log)
    before = (prepare.current_folder() / "manifest.json").stat().st_mtime_ns
    prepare.prepare("climbmix", "small", 2, 600)
    assert (asked, len(hub.log)) == (6, 9) and (prepare.current_folder() / "manifest.json").stat().st_mtime_ns == before


def test_a_missing_shard_gives_one_line_and_exit_1(climbmix_like, hub, cache):
    hub.folder = climbmix_like
    process = start(cache, "--num-shards", "3", "--scale", "small")
    out, err = process.communicate()
    assert process.returncode == 1 and "shard_00002" in one_sentence(err) and "404" in err
    assert not (cache / "current").exists()
