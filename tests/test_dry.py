"""train.py on simulated GPUs, uncompiled and with two layers; see dry_gpu.py."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import dry_gpu
import pytest
from conftest import block

ROOT = Path(__file__).parent.parent
SMALL = ("COMPILE=False", "DEPTH=2", "N_EMBD=256", "VALUE_EMBED_EVERY=0", "NGRAMS=(2,)", "RECALL=(2,)",
         "CONTEXT_ROWS=20_011", "SHIFT_KEYS=True")

pytestmark = pytest.mark.skipif(not shutil.which("g++") or platform.system() != "Linux", reason="needs g++ and Linux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dry-gpu")


def dry_run(words, gpu, folder, driver=13000):
    env = dry_gpu.environment(gpu, folder, driver)
    env |= dict(AUTORESEARCH_TIME_BUDGET="1", PYTHONPATH=f"{ROOT}:{ROOT}/tests")
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("gpu, kernel, scale", [("h100", "flash_attn_func", "full"), ("t4", "sdpa", "medium")])
def test_experiments_with_fa3_and_sdpa(folder, gpu, kernel, scale):
    run = dry_run([dry_gpu.__file__, "--child", *SMALL], gpu, folder)
    assert run.returncode == 0, run.stdout + run.stderr
    report = block(run.stdout)
    assert report["attention"] == kernel and report["status"] == "ok" and f"-{scale}-" in report["data"]
    assert 500 < float(report["peak_vram_mb"]) < 1024 * dry_gpu.GPUS[gpu][1]


FAULTS = [  # old code in train.py, new code, output of the dry run; the first changes nothing
    ("varlen_attn(q,", "varlen_attn(q,", "attention:        varlen"),
    ("x = x0 = norm(", "x = x0 = torch.ones(1) * norm(", "found at least two devices, cuda:0 and cpu"),
    ("varlen_attn(q,", "varlen_attn(q.float(),", "FlashAttention only support fp16 and bf16"),
    ("total = total + loss.detach()", "total = total + float(loss)", " 1 waits, 1 copies to the host"),
]
PLANT = """
import sys, types, dry_gpu, prepare
for old, new, _ in FAULTS:
    prepare.evaluated.clear()
    sys.modules["train"] = train = types.ModuleType("train")
    source = open("train.py").read()
    assert old in source
    exec(compile(source.replace(old, new), "train.py", "exec"), train.__dict__)
    try:
        dry_gpu.child(SMALL)
    except SystemExit as error:
        print(f"exit {int(error.code)} in the end", flush=True)
"""


def test_planted_faults_are_found(folder):
    run = dry_run(["-c", f"FAULTS, SMALL = {FAULTS!r}, {SMALL!r}\n{PLANT}"], "4090", folder)
    runs = run.stdout.split(" in the end")
    assert len(runs) == len(FAULTS) + 1, run.stdout + run.stderr
    for output, (_, fault, words) in zip(runs, FAULTS, strict=False):
        assert words in output and output.endswith(f"exit {int(fault != FAULTS[0][1])}"), fault + output


def test_memory_and_a_timed_matmul_choose_the_scale(folder):
    code = ("import prepare as p; print(p.device_scale()); "
            "p.FULL_SPEED = 1e30; print(p.device_scale())")
    assert dry_run(["-c", code], "a100-40", folder).stdout.split() == ["full", "medium"]


def test_an_old_driver_is_named(folder):
    code = "import prepare; prepare.device_scale()"
    run = dry_run(["-c", code], "4090", folder, driver=12080)
    assert run.returncode == 1 and "The NVIDIA driver on your system is too old (found version 12080)" in run.stderr
    assert run.stderr.startswith("error: ") and "export CUDA_VISIBLE_DEVICES=" in run.stderr
