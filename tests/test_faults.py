"""prepare.py as a process under network and disk faults, kills and damage: it reports them, the next run recovers."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, begin, document, driver_of, start, until
from hub import Hub, write_shard
from huggingface_hub import constants

import prepare

ARGS = ["--num-shards", "2", "--scale", "small", "--vocab-size", "400"]


def outcome(process):
    """(exit code, stdout, stderr) of a process. Its stderr must have at most one line."""
    out, err = process.communicate(timeout=60)
    assert err.count("\n") <= 1 and "Traceback" not in err, err
    assert process.returncode == 0 or err.startswith(("error: ", "interrupted: ")), err
    return process.returncode, out, err


def run(cache, *args, **options):
    return outcome(start(cache, *args, **options))


def prepared_in(cache):
    """The folder of the data that is current in `cache`."""
    return cache / (cache / "current").read_text().strip()


def contents(cache):
    """{name: bytes} of all prepared files in `cache`."""
    folder = prepared_in(cache)
    names = [*json.loads((folder / "manifest.json").read_text())["files"], "manifest.json"]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two training shards and the validation shard, 200 kB each."""
    folder, rng = tmp_path_factory.mktemp("shards"), random.Random(4)
    for index in (0, 1, 6542):
        write_shard(folder / f"shard_{index:05d}.parquet", [[document(rng, 900) for _ in range(75)] for _ in range(3)])
    return folder


@pytest.fixture
def served(hub, shards):
    """The hub, with the shards."""
    hub.folder = shards
    return hub


@pytest.fixture(scope="module")
def sound(shards, tmp_path_factory):
    """A cache in which the shards were prepared without a fault. Its hub is closed."""
    root = tmp_path_factory.mktemp("sound") / "cache"
    with Hub(shards) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        code, out, _ = run(root, *ARGS)
    assert code == 0 and out.splitlines()[-1].split() == ["next:", "uv", "run", "train.py"]
    return root


# The network

HEALED = {"429 with Retry-After": ["limited"], "cut short": ["cut", "cut"]}
REPORTED = {"503": "busy", "Consistency check": "page", "should be of size": "unsized", "cannot be read": "wrong"}


@pytest.mark.parametrize("name", HEALED)
def test_transient_faults_of_the_hub_change_nothing(sound, served, tmp_path, name):
    served.faults = list(HEALED[name])
    assert run(tmp_path / "cache", *ARGS)[0] == 0
    assert served.faults == [] and contents(tmp_path / "cache") == contents(sound)


@pytest.mark.parametrize("words", REPORTED)
def test_other_faults_of_the_hub_are_reported_and_the_next_run_goes_on(sound, served, tmp_path, words):
    served.faults = [REPORTED[words]]
    code, _, err = run(tmp_path / "cache", *ARGS)
    assert code == 1 and words in err and served.faults == []
    if words == "cannot be read":  # of the right size: the hub's client does not notice
        Path(re.search(r"error: (\S+)", err)[1]).unlink()
    assert run(tmp_path / "cache", *ARGS)[0] == 0 and contents(tmp_path / "cache") == contents(sound)


def test_a_stalled_connection_times_out_and_is_tried_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    data = random.Random(6).randbytes(500_000)
    (hub.folder / "shard.bin").write_bytes(data)
    hub.faults = ["stalled"]
    [path] = prepare.download("owner/data", ["shard.bin"], tmp_path / "to")
    assert path.read_bytes() == data
    assert [host for host, *_ in hub.log].count("cdn") >= 2


# Kills

KILLS = 20


def test_kills_at_any_moment_lose_nothing(sound, served, tmp_path):
    rng, cache, codes = random.Random(5), tmp_path / "cache", []
    env = dict(HF_ENDPOINT=served.endpoint, AUTORESEARCH_CACHE=str(cache))
    # Not huggingface_hub, which reads HF_ENDPOINT when imported
    with driver_of("numpy", "pyarrow.parquet", "httpx2", "rustbpe", "tiktoken") as driver:

        def prepare_for(seconds):
            """Run prepare.py, kill it after `seconds`, and return its exit code."""
            begin(driver, ["prepare.py", *ARGS], SCRIPT.parent, tmp_path, env)
            until((tmp_path / "pid").exists, "the start of prepare.py")
            pid, end = int((tmp_path / "pid").read_text()), time.monotonic() + seconds
            until(lambda: (tmp_path / "exit").exists() or time.monotonic() > end, "its end")
            if not (tmp_path / "exit").exists():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
            until((tmp_path / "exit").exists, "its end by a kill")
            return int((tmp_path / "exit").read_text())

        for _ in range(2):  # time the second run: the first also fills caches
            shutil.rmtree(cache, ignore_errors=True)
            begun = time.monotonic()
            assert prepare_for(30) == 0
            whole = time.monotonic() - begun
        while codes.count(-signal.SIGKILL) < KILLS:
            if len(codes) % 10 == 0 or codes[-1] == 0:  # start from nothing or from what the last kill left
                shutil.rmtree(cache, ignore_errors=True)
            codes.append(prepare_for(rng.uniform(0, 0.8) * whole))
            whole *= 0.8 if codes[-1] == 0 else 1  # the machine became faster
        assert {*codes} <= {0, -signal.SIGKILL}
        assert prepare_for(30) == 0
    assert contents(cache) == contents(sound)
    assert {path.name for path in cache.iterdir()} == {"current", "climbmix-small", prepared_in(cache).name}
    assert {path.name for path in (cache / "climbmix-small").iterdir()} == {"shards", "lock"}
    assert not [*cache.rglob("*.incomplete")]
    assert {path.name for path in prepared_in(cache).iterdir()} == {*contents(sound)}


def test_an_interrupt_prints_one_line(served, tmp_path):
    served.faults = ["stalled"] * 2
    process = start(tmp_path, *ARGS)
    process.stdout.readline()  # the line about shards
    process.send_signal(signal.SIGINT)
    code, _, err = outcome(process)
    assert code == 1 and err == "interrupted: run the same command again\n"


def test_a_second_preparation_at_the_same_time_is_refused(sound, served, tmp_path):
    folder = tmp_path / "cache/climbmix-small"
    folder.mkdir(parents=True)
    with prepare.lock_file(folder / "lock", os.getpid()):
        code, _, err = run(tmp_path / "cache", *ARGS)
    assert code == 1 and f"process {os.getpid()} is preparing" in err
    assert run(tmp_path / "cache", *ARGS)[0] == 0 and contents(tmp_path / "cache") == contents(sound)


# The disk


def limited_to(size):
    """A process in which no file can grow beyond `size` bytes."""
    return dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


@pytest.mark.parametrize("size", [10, 20_000, 150_000])
def test_a_full_disk_gives_one_sentence(sound, served, tmp_path, size):
    code, _, err = run(tmp_path / "cache", *ARGS, **limited_to(size))
    assert code == 1 and "AUTORESEARCH_CACHE" in err
    assert run(tmp_path / "cache", *ARGS)[0] == 0 and contents(tmp_path / "cache") == contents(sound)


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache"])
def test_an_unwritable_cache_gives_one_sentence(cache):
    code, out, err = run(Path(cache), "--data", "python")
    assert (code, out) == (1, "") and "AUTORESEARCH_CACHE" in err


# Damage

FILES = ["current", "manifest.json", "tokenizer.tiktoken", "train.bin", "train.npz", "val.bin", "val.npz",
         "val_rows.bin", "../climbmix-small/shards/shard_00000.parquet"]


@pytest.mark.parametrize("how", ["a bit flipped", "cut short", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_repaired(sound, served, tmp_path, monkeypatch, name, how):
    cache = tmp_path / "cache"
    shutil.copytree(sound, cache)
    path = cache / name if name == "current" else prepared_in(cache) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "a bit flipped" else data[: len(data) // 2])
    if how == "missing":
        path.unlink()
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(cache))
    if "shards" not in name:
        with pytest.raises(prepare.PrepareError, match=r"run: uv run prepare.py"):
            prepare.read_manifest(thorough=True)
    if path.exists():
        os.utime(path, (time.time() + 10,) * 2)  # the hub's client ignores changes within a second
    prepare.prepare("climbmix", "small", 2, 400)
    assert contents(cache) == contents(sound)
    assert "shards" not in name or path.read_bytes() == (prepared_in(sound) / name).read_bytes()


def test_a_cache_of_another_version_is_rebuilt(sound, served, tmp_path, monkeypatch):
    shutil.copytree(sound, tmp_path / "cache")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    path = prepared_in(tmp_path / "cache") / "manifest.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"} | dict(format=0)
    path.write_text(json.dumps(old | dict(digest=prepare.digest(old))))
    with pytest.raises(prepare.PrepareError, match="changed or is old"):
        prepare.read_manifest()
    prepare.prepare("climbmix", "small", 2, 400)
    assert contents(tmp_path / "cache") == contents(sound) and {host for host, *_ in served.log} == {"hub"}
