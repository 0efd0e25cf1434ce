"""User text (`--data PATH`): it is read as intended, or refused in one sentence that names the file."""

import json
import os
import random
import re
import subprocess
import sys
import time
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SCRIPT, document, start
from hub import write_shard

import prepare

RNG = random.Random(8)
PLAIN = [document(RNG, 3_000).replace("\r", "") for _ in range(150)]
MARK = "\ufeff"


@pytest.fixture
def folder(cache, tmp_path):
    """An empty folder for text, and an empty cache."""
    (tmp_path / "text").mkdir()
    return tmp_path / "text"


def fill(folder, count=40):
    """Enough plain text to train on."""
    for number in range(count):
        (folder / f"plain{number}.txt").write_text(PLAIN[number], newline="")


def documents(split):
    """The prepared documents of a split, as text."""
    tokenizer, store = prepare.Tokenizer.from_directory(), prepare.TokenStore(prepare.current_folder() / split)
    return [tokenizer.decode(store.tokens[a + 1 : b].tolist()) for starts, stops in store.batches()
            for a, b in zip(starts, stops, strict=True)]


def prepared(path, vocab_size=300):
    """(training, validation) documents of a path."""
    prepare.prepare(str(path), "small", None, vocab_size)
    return documents("train"), documents("val")


def refused(path):
    """The one-sentence error for a path that is refused."""
    with pytest.raises(prepare.PrepareError) as error:
        prepared(path)
    assert "\n" not in str(error.value) and not (prepare.cache_root() / "current").exists()
    return str(error.value)


# Encodings and line ends


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_names_the_encoding(folder, encoding, name):
    fill(folder)
    text = json.dumps(dict(text="ñandú " * 300), ensure_ascii=False) if name == "a.jsonl" else "ñandú " * 300
    (folder / name).write_bytes(((MARK if encoding == "utf-16-be" else "") + text).encode(encoding))
    train, val = prepared(folder)
    assert "ñandú " * 300 in train + val and not any(MARK in text or "\0" in text for text in train + val)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "shift_jis"])
def test_files_in_other_encodings_are_counted_and_one_is_named(folder, capsys, encoding):
    fill(folder)
    for name in ("x.txt", "y.md"):
        (folder / name).write_bytes(("日本語" if encoding == "shift_jis" else "naïve café ").encode(encoding) * 200)
    prepared(folder)
    line, = re.findall(r"^odd text: .*", capsys.readouterr().out, re.M)
    assert " 2 of 42 files " in line and ("x.txt" in line or "y.md" in line) and "UTF-8" in line


def test_utf16_without_a_mark_is_reported(folder, capsys):
    fill(folder)
    (folder / "x.txt").write_bytes(("plain text " * 200).encode("utf-16-le"))
    prepared(folder)
    assert " 1 of 41 files " in capsys.readouterr().out.partition("odd text:")[2]


def test_clean_text_is_not_reported(folder, capsys):
    fill(folder)
    prepared(folder)
    assert "odd text" not in (out := capsys.readouterr().out) and "skipped" not in out


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_make_no_difference(folder, tmp_path, end):
    plain = "".join(PLAIN)
    for name, text in (("text", plain.replace("\n", end)), ("other", plain)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "a.py").write_text(text, newline="")
    assert prepared(folder) == prepared(tmp_path / "other")


# What is found, and what is skipped


def test_endings_in_any_case_are_read_and_skipped_files_counted(folder, capsys):
    fill(folder)
    (folder / "README.TXT").write_text("upper " * 300)
    write_shard(folder / "DATA.PARQUET", [["table " * 300]])
    (folder / ".git" / "deep").mkdir(parents=True)
    for name in ("a.gz", "b.gz", "c.CSV", "d.html", "Makefile", ".hidden.txt", ".git/deep/e.txt"):
        (folder / name).write_text("never " * 300)
    os.mkfifo(folder / "pipe.txt")
    (folder / "dangling.txt").symlink_to("nowhere")
    train, val = prepared(folder)
    assert {"upper " * 300, "table " * 300} <= {*train, *val} and not any("never" in text for text in train + val)
    line, = re.findall(r"^skipped: +(.*)", capsys.readouterr().out, re.M)
    assert sorted(line.split(", ")) == ["1 .csv", "1 .html", "1 without an extension", "2 .gz", "2 .txt", "2 hidden"]


def test_a_folder_without_text_lists_what_was_skipped(folder, capsys):
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text("text")
    assert ".parquet" in refused(folder) and "2 .csv" in capsys.readouterr().out


NAMES = [" text", "text ", "x" * 250, os.fsdecode(b"caf\xe9"), "日本", "two\nlines", "$HOME; ls", "-dash", ".text",
         "a.b.c"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_path_may_have_any_name(folder, tmp_path, name):
    folder = folder.rename(tmp_path / name)
    fill(folder)
    (folder / f"a{name[:200]}.txt").write_text("oddly named " * 200)
    assert "oddly named " * 200 in sum(prepared(folder), [])
    parts = prepare.current_folder().relative_to(prepare.cache_root()).parts
    assert all(re.fullmatch(r"[\w.-]{1,80}", part, re.ASCII) for part in parts)


def test_a_path_that_is_not_utf8_on_the_command_line(folder, tmp_path, cache):
    folder = folder.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    fill(folder)
    out, err = start(cache, "--data", str(folder), "--scale", "small", "--vocab-size", "300").communicate()
    assert err == "" and "next:      uv run train.py" in out
    out, err = start(cache, "--data", f"{folder}/none").communicate()
    assert err.startswith("error: --data ") and err.count("\n") == 1


def test_two_folders_of_one_name_are_two_corpora(folder, tmp_path):
    (tmp_path / "other/text").mkdir(parents=True)
    fill(folder)
    (tmp_path / "other/text/a.txt").write_text("".join(PLAIN[50:]))
    first, _ = prepared(folder)
    second, _ = prepared(tmp_path / "other/text")
    assert first != second and first == prepared(folder)[0]


# Formats


def test_every_type_of_string_in_parquet(folder):
    fill(folder)
    types = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()),
             pa.dictionary(pa.int8(), pa.large_string())]
    for number, kind in enumerate(types):
        column = pa.array([f"type {number} " * 100, None, ""]).cast(pa.string())
        column = column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column.cast(kind)
        pq.write_table(pa.table(dict(text=column)), folder / f"{number}.parquet")
    assert {f"type {number} " * 100 for number in range(len(types))} <= {*sum(prepared(folder), [])}


COLUMNS = dict(
    list=pa.array([["a", "b"]]), struct=pa.array([dict(text="a")]), int64=pa.array([5]), binary=pa.array([b"a"]),
    map=pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), null=pa.nulls(1),
)


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_that_is_not_text_is_named_with_its_type(folder, kind):
    pq.write_table(pa.table(dict(text=COLUMNS[kind])), folder / "a.parquet")
    assert "a.parquet" in (said := refused(folder)) and re.search(f"'text': ['\"]{kind}", said)


def test_a_parquet_string_that_is_not_utf8(folder):
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table(dict(text=broken)), folder / "a.parquet")
    assert "a.parquet" in refused(folder)


@pytest.mark.parametrize("content", [b"garbage" * 100, b"", b"PAR1" * 20], ids=["garbage", "empty", "magic"])
def test_a_file_that_is_not_parquet_is_named(folder, content):
    (folder / "a.parquet").write_bytes(content)
    assert "a.parquet" in refused(folder)


def test_a_parquet_file_cut_short_or_damaged_inside(folder):
    write_shard(folder / "a.parquet", [PLAIN[:50]] * 3)
    data = bytearray((folder / "a.parquet").read_bytes())
    (folder / "a.parquet").write_bytes(data[:-100])
    assert "a.parquet" in refused(folder)
    data[100:20_000] = bytes(19_900)
    (folder / "a.parquet").write_bytes(data)
    assert "a.parquet" in refused(folder)


LINES = ["7", "NaN", "null", "true", '["text"]', '"text"', "not json", '{"body": "x"}', '{"text": 5}', '{"text": 0}',
         '{"text": ["x"]}', '{"text": "x"', "[" * 100_000, '{"a":' * 100_000, "9" * 5_000, '{"text": "a"}{"text": "b"}']


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:20])
def test_a_bad_record_is_reported_with_file_line_and_content(folder, line):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    said = refused(folder)
    assert all(part in said for part in ("a.jsonl line 3", "'text'", line[:50])) and len(said) < 400


def test_unusual_but_valid_records_are_read(folder):
    fill(folder)
    records = ['{"text": "large number", "id": ' + "9" * 5_000 + "}", '{"id": NaN, "text": "not a number"}', "   ",
               '{"text": null}', '{"text": ""}', '{"text": "first", "text": "last"}', '{"text": "half \\ud83d of one"}']
    (folder / "a.jsonl").write_text("\r\n".join(records) + "\r\n")
    found = sum(prepared(folder), [])
    assert {"large number", "not a number", "last", "half ? of one"} <= {*found} and "first" not in found


# The validation split


def shapes():
    rng = random.Random(9)
    line = [text.replace("\n", " ") for text in PLAIN]
    long, small = "".join(line), {f"{i}.txt": PLAIN[i] for i in range(60)}
    chinese = ["".join(rng.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张", k=80_000)) for _ in "ab"]
    return {
        "60 small files": {f"{i}.txt": PLAIN[i] * 4 for i in range(60)},
        "one large file among 60 small ones": {"large.txt": "".join(PLAIN) * 10} | small,
        "a large table among 60 small files": {"large.jsonl": PLAIN * 10} | small,
        "one long document": {"a.jsonl": [long * 3]},
        "two long documents": {"a.jsonl": [long, long[::-1]]},
        "16 long documents": {"a.jsonl": [long[i:] + long[:i] for i in range(0, 160_000, 10_000)]},
        "7 documents of 40 kB": {"a.jsonl": ["".join(line[i : i + 13]) for i in range(0, 91, 13)]},
        "one file of lines": {"a.txt": "".join(PLAIN)},
        "one file of one line": {"a.txt": long},
        "many short records": {"a.jsonl": [sentence for text in PLAIN * 3 for sentence in text.split(". ")]},
        "long Chinese documents": {"a.jsonl": chinese},
    }


def write_shape(folder, shape):
    for name, content in shape.items():
        if name.endswith(".jsonl"):
            content = "\n".join(json.dumps(dict(text=text)) for text in content)
        (folder / name).write_text(content)


@pytest.mark.parametrize("name", shapes())
def test_the_validation_split_has_its_share_of_the_bytes(folder, name):
    write_shape(folder, shapes()[name])
    train, val = (sum(len(text.encode()) for text in split) for split in prepared(folder))
    total = train + val
    wanted = min(0.1 * total, max(0.02 * total, 100_000))
    assert 0.7 * wanted < val < min(1.3 * wanted, 0.101 * total)


@pytest.mark.parametrize("count", [3, 120], ids=["few files", "many files"])
def test_splits_share_no_document_and_lose_none(folder, tmp_path, count):
    rng = random.Random(9)
    for number in range(count):
        text = document(rng, 600_000 // count).replace("\r", "")
        for copy in "ab":  # every file twice
            (folder / f"{number}{copy}.txt").write_text(text)
    files = prepare.find_files(folder)
    train, val = (sum(split(), []) for split in prepare.split_text(files))
    assert val and not set(val) & set(train)
    assert sorted(train + val) == sorted(text for path in files for text in prepare.records(path))
    moved = prepare.split_text(prepare.find_files(folder.rename(tmp_path / "moved")))
    assert train == sum(moved[0](), []), "the same text in another folder comes in another order"
    assert [path.name for path in files] != sorted(path.name for path in files)


def test_training_documents_are_shuffled(folder):
    fill(folder)
    (folder / "a.jsonl").write_text("\n".join(json.dumps(dict(text=f"record {i} " * 50)) for i in range(400)))
    numbers = [int(text.split()[1]) for text in prepared(folder)[0] if text.startswith("record ")]
    assert len(numbers) > 300 and sum(b == a + 1 for a, b in pairwise(numbers)) < 20


def test_an_edit_of_equal_size_and_time_is_noticed(folder):
    fill(folder)
    (folder / "a.txt").write_text("before " * 300)
    before = (folder / "a.txt").stat()
    assert "before " * 300 in sum(prepared(folder), [])
    (folder / "a.txt").write_text("edited " * 300)
    os.utime(folder / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "edited " * 300 in sum(prepared(folder), [])


# Long repetitions: before 0.14, tiktoken's time grew with the square of their length

REPEATED = {
    "equal signs": "=" * 400_000, "NUL": "\0" * 400_000, "emoji": "🙂" * 100_000, "base64": "aGVsbG8gd29ybGQ" * 30_000,
    "combining marks": "e" + "\u0301" * 400_000, "spaces": " " * 1_200_000, "newlines": "\n" * 400_000,
    "letters": "x" * 400_000, "digits": "7" * 400_000, "tabs": "\t" * 400_000, "mixed": "=-" * 200_000,
    "Chinese": "天" * 200_000, "zero width": "\u200b" * 400_000,
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_long_repetition_takes_seconds(folder, name):
    fill(folder)
    (folder / "a.jsonl").write_text(json.dumps(dict(text=REPEATED[name])) + "\n")
    (folder / "a.md").write_text(REPEATED[name], newline="")
    begun = time.process_time()
    train, val = prepared(folder)
    assert "".join(train + val).count(REPEATED[name][-1]) >= 2 * REPEATED[name].count(REPEATED[name][-1])
    assert time.process_time() - begun < 60, "CPU time; tiktoken before 0.14 took over 100 s"


# Missing permissions and homes


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_unreadable_files_are_named_and_unreadable_folders_counted(folder, tmp_path, what):
    fill(folder)
    (folder / "locked").mkdir()
    (folder / "locked/a.txt").write_text("secret " * 300)
    (folder / "locked" / ("a.txt" if what == "file" else "")).chmod(0)
    for path in (tmp_path, *tmp_path.parents[:-1]):
        if path.stat().st_uid == 0 and path.parts[:3] != ("/", "root"):
            path.chmod(path.stat().st_mode | 0o755)
    code = (f"import os, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import prepare, encodings.utf_8_sig; "
            f"os.setuid(65534); prepare.split_text(prepare.find_files({str(folder)!r}))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    if what == "file":
        assert run.returncode == 1 and "locked/a.txt cannot be read" in run.stderr and "Traceback" not in run.stderr
    else:
        assert run.returncode == 0 and "1 unreadable folder" in run.stdout


@pytest.mark.parametrize("home", ["unset", "no account"])
def test_without_a_home_one_line_names_the_variable(folder, home):
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "AUTORESEARCH_CACHE")}
    code = (f"import os, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import prepare, pwd, gettext, locale; "
            f"pwd.getpwuid = {{}}.__getitem__; {'os.setuid(54321);' * (home == 'no account')} "
            "sys.argv[1:] = ['--data', 'python', '--scale', 'small']; prepare.main()")
    if home == "no account" and os.getuid():
        pytest.skip("needs root, to become another user")
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd="/")
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert "AUTORESEARCH_CACHE" in run.stderr


def test_a_path_in_an_unknown_home_is_a_mistake(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--data", "~nobody-has-this-name/text"])
    with pytest.raises(SystemExit) as error:
        prepare.main()
    assert error.value.code == 2
