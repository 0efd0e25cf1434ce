"""Tests that need a CUDA GPU with bf16; skipped without one. uv run pytest -m gpu"""

import pytest
import torch
from conftest import block
from test_main import losses, run_train
from test_train import masked_softmax

import prepare
import train

BF16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not BF16, reason="needs a CUDA GPU with bf16")]


@pytest.mark.parametrize("T, window", [(256, 256), (256, 64), (300, 100), (2048, 256)])
def test_the_flash_kernel_equals_masked_softmax_forward_and_backward(T, window):
    torch.manual_seed(T)
    ours = [torch.randn(2, T, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    twin = [x.detach().float().cpu().requires_grad_() for x in ours]
    y, z = train.attend(*ours, window, "varlen"), masked_softmax(*twin, window)
    y.float().square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(y.float().cpu(), z, atol=2e-2, rtol=2e-2)
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a.grad.float().cpu(), b.grad, atol=6e-2, rtol=6e-2)


def test_batches_on_gpu_and_cpu_are_equal(toy):
    """Copies are delayed, so that a host buffer reused too early gives wrong batches."""
    tokenizer = prepare.Tokenizer.from_directory()
    gpu, cpu = (prepare.make_dataloader(tokenizer, 8, 256, "train", device) for device in ("cuda", "cpu"))
    kept = []
    for _ in range(200):
        torch.cuda._sleep(10_000_000)  # the copy of the next batch waits behind this
        kept.append(next(gpu)[:2])
    for (inputs, targets), (expected, expected_targets, _) in zip(kept, cpu, strict=False):
        assert torch.equal(inputs.cpu(), expected) and torch.equal(targets.cpu(), expected_targets)


def test_one_experiment_on_the_gpu(toy):
    run = run_train("train.py", 5)
    assert run.returncode == 0, run.stderr
    report = block(run.stdout)
    assert report["attention"] in ("flash_attn_func", "varlen") and float(report["peak_vram_mb"]) > 0
    assert losses(run.stdout)[-1] < losses(run.stdout)[0]
