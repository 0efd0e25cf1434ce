"""Tests use temporary caches and local hubs, not ~/.cache/autoresearch or the network."""

import faulthandler
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub import Hub, write_shard

# This comes before any test module imports train, which looks for prepared data.
for name in [name for name in os.environ if name.startswith(("AUTORESEARCH_", "HF_")) and name != "HF_HOME"]:
    del os.environ[name]
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process recompiles torch's Python files: 7 s
CACHE = tempfile.TemporaryDirectory(prefix="autoresearch-tests-")
os.environ |= dict(AUTORESEARCH_CACHE=CACHE.name, NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost",
                   OMP_NUM_THREADS="1")  # other workers of pytest use the other cores

from huggingface_hub import constants  # noqa: E402

import prepare  # noqa: E402


def pytest_configure(config):
    if config.getoption("-m") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # and no MPS


def pytest_collection_modifyitems(items):
    """Run the longest files first, so that the workers finish together."""
    items.sort(key=lambda item: item.path.name not in ("test_main.py", "test_run.py", "test_faults.py"))


def pytest_unconfigure():
    CACHE.cleanup()


SCRIPT = Path(prepare.__file__)


def start(cache, *args, **options):
    """Start `prepare.py args` as a process with the cache `cache`. `options` go to Popen."""
    return subprocess.Popen([sys.executable, SCRIPT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"AUTORESEARCH_CACHE": str(cache)}, cwd=SCRIPT.parent, **options)


# This program imports the modules named by its arguments once. Each line of its input, [argv, repository, folder,
# environment], then starts `python argv` in a forked process. It writes the output to folder/run.log and the pid to
# folder/pid. When the process and all others that hold its output have ended, it writes the exit code to folder/exit.
DRIVER = """
import gc, importlib, json, os, runpy, signal, sys

def write(path, text):
    with open(path + ".new", "w") as f:
        f.write(str(text))
    os.replace(path + ".new", path)

for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    argv, repository, folder, environment = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log, output = os.pipe()
    run = os.fork()
    if run == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", encoding=environment.get("PYTHONIOENCODING"), closefd=False)
        os.closerange(3, 100)
        os.chdir(repository)
        os.environ |= environment
        sys.path[0], sys.argv = repository, argv
        code = 0
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # skip the slow shutdown of torch
    os.close(output)
    write(folder + "/pid", run)
    with open(folder + "/run.log", "wb", 0) as f:
        while block := os.read(log, 1 << 16):
            f.write(block)
    write(folder + "/exit", os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]))
    os._exit(0)
"""


@contextmanager
def driver_of(*modules):
    """Run DRIVER as a process. At the end kill it and all that it has started."""
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", GIT_CONFIG_GLOBAL=os.devnull)
    with subprocess.Popen([sys.executable, "-c", DRIVER, *modules], stdin=subprocess.PIPE, env=env,
                          start_new_session=True) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def begin(driver, argv, repository, folder, env):
    """Have `driver` start `python argv` in `repository`; it writes to `folder`."""
    for name in ("pid", "exit", "run.log"):
        (folder / name).unlink(missing_ok=True)
    os.write(driver.stdin.fileno(), json.dumps([argv, str(repository), str(folder), env]).encode() + b"\n")


def until(condition, what):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, f"waited 100 s for {what}"
        time.sleep(0.01)


def block(output):
    """The report at the end of what a run printed: {key: value}."""
    return dict(re.findall(r"^(\w+): +(.*)$", output.rpartition("---\n")[2], re.M))


SYLLABLES = [a + b for a in ("b", "d", "g", "k", "l", "m", "n", "r", "s", "t", "v", "sh", "tr") for b in "aeiou"]
HANZI = "你好世界天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"
OTHER = ["🙂", "🚀🚀", "👩‍👩‍👧", "é", "ñandú", "Ωmega", "\t\t", "\r\n", "<|reserved_0|>"]
SHORT = ["", "a", "好", "🙂", "\n", "  ", "ok.", "1234567"]


def vocabulary():
    rng = random.Random(0)
    latin = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(1_000)]
    return latin, ["".join(rng.choices(HANZI, k=rng.randint(1, 5))) for _ in range(150)]


LATIN, CHINESE = vocabulary()
ZIPF = [1 / (rank + 3) for rank in range(len(LATIN))]


def sentence(rng):
    kind = rng.random()
    if kind < 0.75:
        end = rng.choice([". ", ", and ", "! ", ".\n", ".\n\n"])
        return " ".join(rng.choices(LATIN, ZIPF, k=rng.randint(4, 16))) + end
    if kind < 0.85:
        return f"def {rng.choice(LATIN)}_{rng.choice(LATIN)}(x):\n    return x + {rng.randrange(1_970, 2_030)}\n\n"
    if kind < 0.95:
        return "，".join(rng.choices(CHINESE, k=6)) + "。 "
    return f" {rng.choice(OTHER)} "


def document(rng, length):
    """Made-up text of at least `length` characters, up to the end of a sentence: prose, code, Chinese, emoji."""
    sentences = []
    while length > 0:
        sentences.append(sentence(rng))
        length -= len(sentences[-1])
    return "".join(sentences)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """A Run in a test writes results.tsv to tmp_path. Afterwards its limit is cancelled."""
    if referee := sys.modules.get("referee"):
        monkeypatch.setattr(referee, "REPOSITORY", tmp_path)
        monkeypatch.setitem(referee.PRISTINE, "referee.REPOSITORY", repr(tmp_path))
        referee.git.cache_clear()
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for one test; its folder does not exist yet."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory):
    """A folder with about 400 kB of text in every format that prepare.py reads."""
    folder, rng = tmp_path_factory.mktemp("text") / "toy", random.Random(1)
    (folder / "below").mkdir(parents=True)
    for name in ("a.txt", "b.md", "c.py", "below/d.txt"):
        (folder / name).write_text(document(rng, 60_000), encoding="utf-8")
    lines = [json.dumps({"text": document(rng, rng.choice([50, 150, 1_500]))}) for _ in range(80)]
    (folder / "e.jsonl").write_text("\n".join(lines) + "\n")
    write_shard(folder / "f.parquet", [[document(rng, rng.choice([50, 150, 1_500])) for _ in range(50)] for _ in "ab"])
    (folder / "not-text.bin").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(scope="session")
def toy(toy_text):
    """The folder of a small prepared corpus, current in the cache of this session. Rows of 256, vocabulary 512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.SCALES["small"], "seq_len", 256)  # half the work for the models
        prepare.prepare(str(toy_text), "small", None, 512)
    return prepare.current_folder()


@pytest.fixture(scope="session")
def climbmix_like(tmp_path_factory):
    """A folder with two training shards and the validation shard, shaped like ClimbMix's.

    Each has 3,000 documents. Most have a few hundred characters. Some are empty, some longer than a row of 2048 tokens.
    Some have only q's after character 10,000, which must not train the tokenizer.
    """
    folder, rng = tmp_path_factory.mktemp("climbmix"), random.Random(2)
    for index in (0, 1, 6542):
        texts = [document(rng, int(rng.lognormvariate(5.2, 1.2))) for _ in range(3_000)]
        for at in rng.sample(range(3_000), 100):
            texts[at] = rng.choice(SHORT)
        for at in rng.sample(range(3_000), 3):
            texts[at] = document(rng, 9_000)[:9_000].ljust(10_000) + "q" * 9_000
        groups = []
        while texts:
            size = rng.choice([1, 127, 128, 129, 300, 1_000])
            groups.append(texts[:size])
            del texts[:size]
        write_shard(folder / f"shard_{index:05d}.parquet", groups)
    return folder


def use(patch, endpoint):
    """Have this process and those it starts download from the hub `endpoint`."""
    patch.setenv("HF_ENDPOINT", endpoint)
    patch.setattr(constants, "ENDPOINT", endpoint)  # read from the environment at import
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub for one test, named by HF_ENDPOINT. It serves the folder tmp_path/hub."""
    (tmp_path / "hub").mkdir()
    with Hub(tmp_path / "hub") as served:
        use(monkeypatch, served.endpoint)
        yield served


@pytest.fixture(scope="session")
def climbmix(climbmix_like, tmp_path_factory):
    """(cache, shards): the shards of `climbmix_like`, prepared from a hub at full scale with vocabulary 512."""
    root = tmp_path_factory.mktemp("climbmix-cache")
    with Hub(climbmix_like) as served, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(root))
        use(patch, served.endpoint)
        prepare.prepare("climbmix", "full", 2, 512)
    return root, sorted(Path(climbmix_like).iterdir())
