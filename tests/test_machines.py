"""The README's commands for Slurm and Ray, where these are installed, and sky.yaml as SkyPilot parses it."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

import pytest
from conftest import until
from test_run import BREAKS, Lab, prepared

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def command(where):
    return re.search(rf"^\| {where} \| `(.+)` \|$", README, re.M)[1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class UvLab(Lab):
    """A lab that is a project of uv and uses the environment of this repository."""

    def __init__(self, folder, toy, budget=0.2):
        super().__init__(None, folder, toy, budget)
        for name in ("pyproject.toml", "uv.lock"):
            shutil.copy(ROOT / name, self.repository)
        self.env = os.environ | dict(AUTORESEARCH_CACHE=str(self.cache), UV_PROJECT_ENVIRONMENT=sys.prefix,
                                     UV_NO_SYNC="1", UV_FROZEN="1", GIT_CONFIG_GLOBAL=os.devnull)

    def submit(self, where, **env):
        return subprocess.Popen(["bash", "-c", command(where)], cwd=self.repository, env=self.env | env)

    def log(self):
        return (self.repository / "run.log").read_text()

    def head(self):
        return self.git("rev-parse", "--short=7", "HEAD")


@pytest.fixture
def slurm(tmp_path):
    """Start Slurm on one node with a fake GPU. Yields the environment variables that select it."""
    if os.getuid() or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs root and Debian's slurmctld, slurmd, slurm-client and munge")
    tmp_path.chmod(0o755)
    (tmp_path / "munge.key").write_bytes(os.urandom(128))
    (tmp_path / "munge.key").chmod(0o400)
    (tmp_path / "gres.conf").write_text("Name=gpu File=/dev/zero\n")
    (tmp_path / "slurm.conf").write_text("\n".join([
        "ClusterName=test", f"SlurmctldHost={socket.gethostname()}", "SlurmUser=root", "MpiDefault=none",
        f"SlurmctldPort={free_port()}", f"SlurmdPort={free_port()}", "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none", f"AuthInfo=socket={tmp_path}/munge.socket", f"StateSaveLocation={tmp_path}/state",
        f"SlurmdSpoolDir={tmp_path}/spool", f"SlurmctldPidFile={tmp_path}/slurmctld.pid", "GresTypes=gpu",
        f"SlurmdPidFile={tmp_path}/slurmd.pid", "SelectType=select/cons_tres", "ReturnToService=2",
        f"NodeName={socket.gethostname()} CPUs={os.cpu_count()} Gres=gpu:1 State=UNKNOWN",
        "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP", "",
    ]))
    env = dict(SLURM_CONF=str(tmp_path / "slurm.conf"))
    files = dict(key_file="key", socket="socket", pid_file="pid", log_file="log", seed_file="seed")
    munged = ["munged", "--foreground", "--force",
              *(f"--{option.replace('_', '-')}={tmp_path}/munge.{name}" for option, name in files.items())]
    daemons = []

    def idle():
        sinfo = ["sinfo", "--noheader", "--format=%T"]
        return subprocess.run(sinfo, env=os.environ | env, capture_output=True, text=True).stdout.strip() == "idle"

    try:
        with open(tmp_path / "daemons.log", "w") as log:
            for words in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
                daemons.append(subprocess.Popen(words, env=os.environ | env, stdout=log, stderr=log))
                if words is munged:
                    until((tmp_path / "munge.socket").exists, "munged")
        until(idle, f"Slurm, see {tmp_path}/daemons.log")
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def test_slurm(slurm, tmp_path, toy):
    lab = UvLab(tmp_path / "lab", toy)
    assert lab.submit("Slurm", **slurm).wait(100) == 0, lab.log()
    assert "\nstatus:           ok\n" in lab.log() and f"\ncommit:           {lab.head()}\n" in lab.log()
    lab.set_line(BREAKS["crash"])
    lab.commit("too bold")
    assert lab.submit("Slurm", **slurm).wait(100) != 0
    assert "error:            ValueError: no\n" in lab.log()
    assert [row[3] for row in lab.results()] == ["keep", "crash"]
    assert [record["status"] for record in lab.journal()] == ["ok", "crash"]


@pytest.fixture
def ray_nodes(tmp_path, toy):
    """Start two Ray nodes, each with a fake GPU and its own cache. Yields the variables that select them."""
    pytest.importorskip("ray", reason="needs uv sync --group ray")
    port, dashboard = free_port(), free_port()
    sockets = tempfile.TemporaryDirectory(prefix="ray-")  # tmp_path is too long for sockets
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={sockets.name}"]
    ray, nodes = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus=1", "--num-gpus=1"], []
    address = f"http://127.0.0.1:{dashboard}"

    def alive():
        with contextlib.suppress(OSError), urlopen(f"{address}/api/v0/nodes", timeout=10) as answer:
            return answer.read().count(b'"ALIVE"') == len(nodes)

    try:
        for name, words in (("first", head), ("second", [f"--address=127.0.0.1:{port}"])):
            env = dict(AUTORESEARCH_CACHE=str(prepared(tmp_path / name, toy)), RAY_USAGE_STATS_ENABLED="0",
                       CUDA_VISIBLE_DEVICES="0")  # Ray refuses a node with a GPU that is hidden
            with open(tmp_path / f"{name}.log", "w") as log:
                nodes.append(subprocess.Popen([*ray, *words], env=os.environ | env, stdout=log, stderr=log,
                                                start_new_session=True))
            until(alive, f"Ray, see {log.name}")
        yield dict(RAY_ADDRESS=address)
    finally:
        for node in reversed(nodes):
            os.killpg(node.pid, signal.SIGTERM)
            node.wait(30)
        sockets.cleanup()


def test_ray_with_two_nodes(ray_nodes, tmp_path, toy):
    labs = [UvLab(tmp_path / name, toy, 5.0) for name in ("a", "b")]
    runs = [lab.submit("Ray Jobs", **ray_nodes) for lab in labs]  # at the same time, each on its own node
    for lab, run in zip(labs, runs, strict=True):
        assert run.wait(100) == 0, lab.log()
        assert f"\ncommit:           {lab.head()}\n" in lab.log() and [row[3] for row in lab.results()] == ["keep"]
    journals = [(tmp_path / name / "runs.jsonl").read_text().splitlines() for name in ("first", "second")]
    assert [len({json.loads(line)["run"] for line in lines if line}) for lines in journals] == [1, 1]
    labs[0].set_line(BREAKS["crash"])
    labs[0].commit("too bold")
    assert labs[0].submit("Ray Jobs", **ray_nodes).wait(100) != 0
    assert [row[3] for row in labs[0].results()] == ["keep", "crash"]


def test_the_file_for_skypilot():
    sky = pytest.importorskip("sky", reason="needs uv run --with skypilot==0.10.3")
    words = command("SkyPilot").split()
    task = sky.Task.from_yaml(str(ROOT / next(word for word in words if word.endswith(".yaml"))))
    assert task.run.strip() == "uv run train.py" and task.workdir == "."
    assert [accelerators for r in task.resources for accelerators in r.accelerators.values()] == [1]
