"""train.py in the order of its sections, on the CPU but through the functions that a GPU uses."""

import itertools
import math
import os
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import prepare
import train

DECAYS = (0.0005, 0.004, 0.002, 0.125)


def tiny_gpt(seed=0, **changes):
    torch.manual_seed(seed)
    config = dict(
        sequence_len=24, vocab_size=50, n_layer=3, n_embd=32, head_dim=16, mlp_ratio=4, windows=[5, 24, 24],
        value_embed_every=2, rope_base=10_000, qk_gain=1.15, softcap=15.0, dtype=torch.float32, attention="sdpa",
    )
    return train.GPT(train.GPTConfig(**config | changes))


def optimizers_of(model):
    return train.build_optimizers(model, 0.04, 0.8, 0.6, 0.008, 0.005, 0.5, (0.8, 0.95), DECAYS, compiled=False)


def wake(model):
    """Add noise to the weights: initially projections are zero, so that only the embedding has an effect."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def made_up_batches(model, B, n, T=24):
    ids = torch.randint(model.config.vocab_size, (n, B, T + 1))
    return [(row[:, :-1], row[:, 1:], 1) for row in ids]


# Model


def test_windows_repeat_the_pattern_and_end_in_a_full_layer():
    assert train.layer_windows("SSSL", 6, 256, 2048) == [256, 256, 256, 2048, 256, 2048]
    assert train.layer_windows("S", 2, 256, 128) == [128, 128]
    with pytest.raises(ValueError, match="WINDOW_PATTERN = 'SX'"):
        train.layer_windows("SX", 2, 256, 2048)


def masked_softmax(q, k, v, window):
    """Attention with a dense mask, (B, T, H, D): a simple reference for attend()."""
    T = q.size(1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.size(-1))
    scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.mark.parametrize("T, window", [(1, 1), (7, 1), (64, 63), (130, 16), (200, 64), (200, 100), (256, 256), (99, 0)])
def test_attend_equals_masked_softmax_forward_and_backward(T, window):
    torch.manual_seed(T)
    ours = [torch.randn(2, T, 3, 16, requires_grad=True) for _ in range(3)]
    twin = [x.detach().clone().requires_grad_() for x in ours]
    weight = torch.randn(2, T, 3, 16)
    y, z = train.attend(*ours, window, "sdpa"), masked_softmax(*twin, window)
    (y * weight).sum().backward()
    (z * weight).sum().backward()
    torch.testing.assert_close(y, z, atol=2e-5, rtol=1e-4)
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=1e-4)


def compiled_loss(model, ids):
    """The training loss, traced as one graph, without code generation."""
    return torch.compile(train.loss_of, dynamic=False, fullgraph=True, backend="aot_eager")(model, ids, ids)


def fake_hopper(monkeypatch, get_kernel):
    """Simulate a Hopper GPU and a package `kernels` with this get_kernel()."""
    monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    train.flash_attention_3.cache_clear()


def test_on_hopper_flash_attention_3_loads_from_the_local_cache(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                        v_descale=None, window_size=(-1, -1), softcap=0.0):
        left, right = window_size
        assert causal and right == 0 and q.shape == k.shape == v.shape
        return masked_softmax(q, k, v, left if left >= 0 else q.size(1))

    def get_kernel(repo_id, *, revision, trust_remote_code):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        return types.SimpleNamespace(flash_attn_func=flash_attn_func)

    fake_hopper(monkeypatch, get_kernel)
    assert train.attention_kernel(torch.device("cuda"), torch.bfloat16) is flash_attn_func
    ids, windows = torch.randint(50, (2, 24)), [0, 7, 24]
    ours, plain = (wake(tiny_gpt(attention=attention, windows=windows)) for attention in (flash_attn_func, "sdpa"))
    torch.testing.assert_close(compiled_loss(ours, ids), train.loss_of(plain, ids, ids))


def test_without_flash_attention_3_a_kernel_of_torch_is_used(monkeypatch, capsys):
    def get_kernel(*args, **options):
        raise FileNotFoundError("no local snapshot")

    fake_hopper(monkeypatch, get_kernel)
    assert [train.attention_kernel(torch.device("cuda"), torch.bfloat16) for _ in "ab"] == ["varlen"] * 2
    assert capsys.readouterr().out.count("no local snapshot") == 1
    assert train.attention_kernel(torch.device("cuda"), torch.float32) == "sdpa"
    assert train.attention_kernel(torch.device("cpu"), torch.bfloat16) == "sdpa"


def test_rotation_depends_only_on_distance():
    cos, sin = train.rotary(40, 16, 10_000)
    q, k = torch.randn(16), torch.randn(16)
    turned = [train.rotate(x.expand(1, 40, 1, 16), cos, sin)[0, :, 0] for x in (q, k)]
    near, far = turned[0][5] @ turned[1][2], turned[0][33] @ turned[1][30]
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert abs(near - turned[0][5] @ turned[1][3]) > 1e-3


def test_half_of_a_shifted_key_comes_from_the_previous_token():
    keys, ids = [], torch.randint(50, (2, 24))
    for shift_keys in (False, True):
        def kernel(q, k, v, **_):
            keys.append(k)
            return v

        wake(tiny_gpt(shift_keys=shift_keys, n_layer=1, windows=[24], attention=kernel))(ids)
    (plain, shifted), slow = keys, [4, 5, 6, 7, 12, 13, 14, 15]  # channels of the frequencies 4 .. 7
    assert torch.equal(shifted[:, 1:, :, slow], plain[:, :-1, :, slow]) and not shifted[:, 0, :, slow].any()
    fast = [i for i in range(16) if i not in slow]
    assert torch.equal(shifted[..., fast], plain[..., fast])


def test_equal_ngrams_have_equal_hashes():
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 2, 3]])
    for n, twins, strangers in ((1, (0, 3), (0, 1)), (2, (1, 4), (5, 6)), (3, (2, 5), (2, 7))):
        found = train.hash_ngrams(ids, n)[0].tolist()
        assert found[twins[0]] == found[twins[1]] and found[strangers[0]] != found[strangers[1]]
    pairs = torch.cartesian_prod(torch.arange(200), torch.arange(200))
    counts = (train.hash_ngrams(pairs, 2)[:, 1] % 32_749).bincount(minlength=32_749)
    assert counts.max() < 12 and (counts == 0).sum() < 32_749 * 0.4  # 1.2 on average; by chance 30% are empty


def test_only_contexts_that_were_seen_are_learned():
    model = tiny_gpt(ngrams=(2, 3), recall=(1, 2), context_rows=211)
    batches = made_up_batches(model, 1, 2, T=12)
    run_steps(model, optimizers_of(model), batches)
    seen = [x % 211 for ids, *_ in batches for x in (train.hash_ngrams(ids, 2), train.hash_ngrams(ids, 3),
                                                     train.recall(ids, 1, 50), train.recall(ids, 2, 50) + 51)]
    expected = torch.cat(seen, dim=1).unique()
    assert model.contexts.detach().abs().amax(1).nonzero().flatten().tolist() == expected.tolist()
    train.loss_of(model, *batches[0][:2]).backward()
    assert model.contexts.grad.is_sparse


@pytest.mark.parametrize("n", [1, 2, 4])
def test_recall_finds_what_followed_the_last_occurrence(n):
    ids = torch.randint(1, 4, (4, 40))  # not 0, which pads a row
    expected = torch.full_like(ids, 50)
    for row, position in itertools.product(range(4), range(n - 1, 40)):  # a simple reference
        for earlier in range(n - 1, position):
            if torch.equal(ids[row, earlier - n + 1 : earlier + 1], ids[row, position - n + 1 : position + 1]):
                expected[row, position] = ids[row, earlier + 1]
    assert torch.equal(train.recall(ids, n, 50)[:, n - 1 :], expected[:, n - 1 :])


@pytest.mark.parametrize("changes", [dict(), dict(shift_keys=True), dict(ngrams=(2, 3), context_rows=64),
                                     dict(recall=(1, 2), context_rows=120)])
def test_no_logit_depends_on_a_later_token(changes):
    model = wake(tiny_gpt(**changes))
    ids = torch.randint(50, (1, 24))
    changed = ids.clone()
    changed[0, 11:] = (ids[0, 11:] + 1) % 50
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


def test_a_short_window_hides_earlier_tokens():
    model = wake(tiny_gpt(n_layer=1, windows=[3], value_embed_every=0))
    ids = torch.randint(50, (1, 24))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 50
    same = torch.isclose(model(ids), model(changed), atol=1e-5).all(-1)[0]
    assert same.tolist() == [False] * 4 + [True] * 20


def test_an_untrained_model_has_the_loss_of_uniform_logits():
    model = tiny_gpt()
    ids = torch.randint(50, (4, 24))
    assert abs(train.loss_of(model, ids, ids).item() - math.log(50)) < 0.02


def test_logits_stay_below_the_cap():
    model = wake(tiny_gpt(softcap=2.0))
    with torch.no_grad():
        model.lm_head.weight.mul_(1_000)
    assert 1.9 < model(torch.randint(50, (2, 24))).abs().max() <= 2.0


@pytest.mark.parametrize("changes", [dict(n_embd=40), dict(head_dim=5), dict(n_embd=16)])
def test_a_width_that_does_not_fit_is_named(changes):
    with pytest.raises(ValueError, match="HEAD_DIM = .* must be even, and N_EMBD = .* multiple of it"):
        tiny_gpt(**changes)


def test_flops_count_matmuls_and_visible_tokens():
    model = tiny_gpt(value_embed_every=0)
    per_layer = 12 * 32 * 32
    assert model.flops_per_token() == 6 * (3 * per_layer + 32 * 50) + 12 * 32 * (5 + 24 + 24)


# Optimizer


@pytest.mark.parametrize("shape", [(16, 16), (48, 12), (12, 48), (2, 3, 20, 20)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(train.orthogonalize(torch.randn(shape)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_orthogonalize_keeps_the_singular_vectors():
    u, _, v = torch.linalg.svd(torch.randn(20, 20))
    g = u @ torch.diag(torch.linspace(0.2, 2, 20)) @ v
    torch.testing.assert_close(train.orthogonalize(g) @ v.T @ u.T, torch.eye(20), atol=0.3, rtol=0)
    assert F.cosine_similarity(train.orthogonalize(g).flatten(), (u @ v).flatten(), dim=0) > 0.99


def test_a_stack_is_updated_like_single_matrices():
    weights, grads = torch.randn(3, 8, 12), torch.randn(3, 8, 12)
    numbers = [*map(torch.tensor, (0.1, 0.9, 0.2)), torch.float32]
    stacked, buffer = weights.clone(), torch.zeros_like(weights)
    train.muon_update(stacked, grads.clone(), buffer, *numbers)
    for i in range(3):
        single = weights[i : i + 1].clone()
        train.muon_update(single, grads[i : i + 1].clone(), torch.zeros(1, 8, 12), *numbers)
        torch.testing.assert_close(stacked[i], single[0])


def test_decay_is_cautious():
    """A weight decays where the update moves it towards zero, and nowhere else."""
    weights, grads = torch.ones(1, 6, 6), torch.randn(1, 6, 6)
    update = train.orthogonalize(grads)  # it ignores scale
    decayed = weights.clone()
    train.muon_update(decayed, grads, torch.zeros_like(grads), *map(torch.tensor, (0.5, 0.9, 0.2)), torch.float32)
    torch.testing.assert_close(decayed, weights - 0.5 * (update + 0.2 * (update >= 0)), atol=1e-4, rtol=0)


def test_every_parameter_is_in_one_group():
    model = tiny_gpt()
    grouped = [p for optimizer in optimizers_of(model) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({*map(id, grouped)}) == len([*model.parameters()])
    assert optimizers_of(tiny_gpt(value_embed_every=0))
    model.stray = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="stray.*exactly one group"):
        optimizers_of(model)


# Schedules


@pytest.mark.parametrize("progress, lr, momentum, decay", [
    (0.0, 1.0, 0.85, 0.125), (0.025, 1.0, 0.885, 0.125 * 0.975**2), (0.2, 1.0, 0.92, 0.08), (0.6, 0.52, 0.92, 0.02),
    (1.0, 0.04, 0.92, 0), (1.1, 0.04, 0.92, 0),
])
def test_schedules_set_the_groups(progress, lr, momentum, decay):
    adamw, muon, adagrad = optimizers = optimizers_of(tiny_gpt())
    train.set_schedules(optimizers, progress, 0.8, 0.04, (0.85, 0.92, 0.05))
    assert muon.param_groups[0]["lr"] == pytest.approx(0.04 * lr)
    assert muon.param_groups[0]["momentum"] == pytest.approx(momentum)
    assert muon.param_groups[0]["weight_decay"] == pytest.approx(decay)
    assert [group["lr"] / group["initial_lr"] for group in adamw.param_groups] == pytest.approx([lr] * 5)
    assert adamw.param_groups[0]["weight_decay"] == 0.0005
    assert adagrad.param_groups[0]["lr"] == 0.6


def test_without_a_warmdown_rates_stay_constant():
    optimizers = optimizers_of(tiny_gpt())
    train.set_schedules(optimizers, 0.999, 0, 0.04, (0.85, 0.92, 0.05))
    assert {group["lr"] / group["initial_lr"] for optimizer in optimizers for group in optimizer.param_groups} == {1.0}


# Training


@pytest.mark.parametrize("rows, max_rows, expected", [(64, 64, (64, 1)), (64, 16, (16, 4)), (65, 64, (33, 2)),
                                                     (96, 64, (48, 2)), (1, 64, (1, 1)), (97, 64, (49, 2))])
def test_any_batch_is_split(rows, max_rows, expected):
    assert train.split_batch(rows, max_rows) == expected


def test_accumulation_changes_nothing():
    models = [tiny_gpt(ngrams=(2,), recall=(1,), context_rows=61) for _ in "ab"]
    batches = made_up_batches(models[0], 8, 1)
    halves = [(x[i : i + 4], y[i : i + 4], 1) for x, y, _ in batches for i in (0, 4)]
    losses = [train.train_step(train.loss_of, model, optimizers_of(model), iter(data), len(data))
              for model, data in zip(models, (batches, halves), strict=True)]
    torch.testing.assert_close(*losses)
    # Adam's first step depends on the sign of a gradient, so compare only the blocks, which Muon updates
    for a, b in zip(models[0].blocks.parameters(), models[1].blocks.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


def run_steps(model, optimizers, batches):
    data = iter(batches)
    return [float(train.train_step(train.loss_of, model, optimizers, data, 1)) for _ in batches]


def test_training_learns():
    model = tiny_gpt()
    losses = run_steps(model, optimizers_of(model), made_up_batches(model, 4, 1) * 40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("changes", [dict(), dict(ngrams=(2, 3), context_rows=61)])
def test_warm_up_leaves_no_trace(changes):
    cold, warm = tiny_gpt(**changes), tiny_gpt(**changes)
    state = torch.get_rng_state()
    train.warm_up(train.loss_of, warm, partial(optimizers_of, warm), 4, 4, compiled=False)
    assert torch.equal(torch.get_rng_state(), state)
    batches = made_up_batches(cold, 4, 3)
    assert run_steps(cold, optimizers_of(cold), batches) == run_steps(warm, optimizers_of(warm), batches)
    for a, b in zip(cold.state_dict().values(), warm.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError(), torch.AcceleratorError("CUDA error: out of memory"), MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
])
def test_out_of_memory_halves_the_rows(capsys, error):
    def loss_fn(model, idx, targets):
        if len(idx) > 3:
            raise error
        return train.loss_of(model, idx, targets)

    model = tiny_gpt()
    assert train.warm_up(loss_fn, model, partial(optimizers_of, model), 12, 12, compiled=True) == (3, 4)
    assert "out of memory with 12 rows per forward; trying 6" in capsys.readouterr().out


def test_a_new_try_starts_without_gradients():
    model, clean = tiny_gpt(), []

    def loss_fn(model, idx, targets):
        clean.append(model.lm_head.weight.grad is None)
        if len(idx) > 3 and not clean[-1]:  # the second forward of a step
            raise MemoryError
        return train.loss_of(model, idx, targets)

    assert train.warm_up(loss_fn, model, partial(optimizers_of, model), 12, 6, compiled=True) == (3, 4)
    assert clean == [True, False, *([True, False, False, False] * 2)]


def test_an_error_in_the_model_is_raised():
    model = tiny_gpt()
    with pytest.raises(TypeError, match="NoneType"):
        train.warm_up(lambda *_: None, model, partial(optimizers_of, model), 4, 4, compiled=False)


def test_nothing_is_compiled_on_the_clock(toy):
    graphs, tokenizer = [], prepare.Tokenizer.from_directory()
    model = tiny_gpt(vocab_size=tokenizer.get_vocab_size(), n_layer=1, windows=[24], ngrams=(2,), context_rows=61)
    batches = prepare.make_dataloader(tokenizer, 2, 24, "train")
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    loss_fn = torch.compile(train.loss_of, dynamic=False, backend=backend)
    train.warm_up(loss_fn, model, partial(optimizers_of, model), 4, 2, compiled=True)
    warm, optimizers = len(graphs), optimizers_of(model)
    for _ in range(2):
        train.train_step(loss_fn, model, optimizers, batches, 2)
    assert len(graphs) == warm > 0
