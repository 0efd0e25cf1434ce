"""Models that cheat are refused with the reason. Unusual but honest models score as in a plain loop."""

import contextlib
import json
import math
import random
import re
import shutil
import tempfile
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import block

import prepare
import referee
import train
from prepare import Refused

V, T, C = 512, 256, 16

# ======================================================================================================================
# Models


def token_counts():
    return torch.from_numpy(np.bincount(np.fromfile(prepare.current_folder() / "train.bin", np.uint16), minlength=V))


class Dummy(nn.Module):
    """A unigram model, plus what leak(x) takes from later positions of the embeddings x (B, T, C)."""

    def __init__(self, leak=torch.zeros_like):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wte = nn.Parameter(F.normalize(torch.randn(V, C, generator=generator), dim=1))
        self.bias = nn.Parameter(torch.log(token_counts() + 1.0))
        self.leak = leak

    def forward(self, idx):
        return self.bias + 10 * self.leak(self.wte[idx]) @ self.wte.T


def blocks(size):
    return lambda x: x.unflatten(1, (-1, size)).mean(2).repeat_interleave(size, 1)


def chunked_recurrence(x):
    state, states = torch.zeros(len(x), 1, C), []
    for chunk in x.split(16, dim=1):
        state = (state + chunk.mean(1, keepdim=True)) / 2
        states.append(state.expand_as(chunk))
    return torch.cat(states, 1)


def fft(x):
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * (torch.arange(T // 2 + 1) < 32)[:, None], T, dim=1)


def next_token(x):
    return F.pad(x[:, 1:], (0, 0, 0, 1))


def late(x):
    return next_token(x) * (torch.arange(T) > 200)[:, None]


def faint_attention(x):
    at = torch.arange(T)
    return 0.02 * (-(at[:, None] + 1 - at).square().float()).softmax(-1) @ x


def first_row(x):
    return next_token(x) * (torch.arange(len(x)) < 1)[:, None, None] * (torch.arange(T) > 0)[:, None]


def noise_on_specials(logits):
    return logits + 0.15 * F.pad(torch.rand(*logits.shape[:2], 4), (V - 4, 0))


class Learner(Dummy):
    """Trains a bigram table on the row that it must predict. If `sly`, it resets the table at every other call."""

    def __init__(self, sly):
        super().__init__()
        self.table, self.sly, self.calls = nn.Parameter(torch.zeros(V, V)), sly, 0

    def forward(self, idx):
        self.calls += 1
        if self.sly and self.calls % 2:
            self.table.data.zero_()
        else:
            with torch.enable_grad():
                logits = super().forward(idx[:, :-1]) + self.table[idx[:, :-1]]
                loss = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
            self.table.data.sub_(*torch.autograd.grad(loss, self.table), alpha=1_000)
        return super().forward(idx) + self.table[idx]


class Counter(Dummy):
    """Counts the bigrams of all rows that it has seen, in a buffer or, if `hidden`, in a closure."""

    def __init__(self, hidden):
        super().__init__()
        counts = torch.zeros(V, V)
        self.counts = (lambda: counts) if hidden else None
        if not hidden:
            self.register_buffer("count", counts)

    def forward(self, idx):
        counts = self.counts() if self.counts else self.count
        counts.index_put_((idx[:, :-1], idx[:, 1:]), torch.ones(()), accumulate=True)
        return super().forward(idx) + 2 * counts[idx].log1p()


class Collector(Dummy):
    """Remembers all rows that it has seen, and predicts their next tokens when it sees them again."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, idx):
        known = torch.tensor([tuple(row) in self.seen for row in idx.tolist()])
        self.seen.update(map(tuple, idx.tolist()))
        self.leak = lambda x: next_token(x) * known[:, None, None]
        return super().forward(idx)


class Edited(Dummy):
    """Returns edit(logits) instead of logits."""

    def __init__(self, edit, leak=torch.zeros_like):
        super().__init__(leak)
        self.edit = edit

    def forward(self, idx):
        return self.edit(super().forward(idx))


def one_logit(value):
    """An edit of one logit of the last token in the vocabulary, which no text contains."""
    return lambda logits: logits.index_put((*torch.tensor([[0], [5], [V - 1]]),), logits.new_tensor(value))


class Packer(Dummy):
    """Packs the next token into each token of its input, and reads it if it gets the same input again."""

    def forward(self, idx):
        tokens, packed = idx % V, idx // V - 1
        following = torch.where(idx < V, F.pad(tokens[:, 1:], (0, 1), value=V - 1), packed)
        idx.copy_(tokens + V * (following + 1))
        return super().forward(tokens) + 10 * self.wte[following] @ self.wte.T


class Writer(Dummy):
    """Overwrites its input with one token, and the targets if they share its memory. Predicts that token."""

    def forward(self, idx):
        return 50 * F.one_hot(idx.fill_(7), V).float()


class OwnTensor(torch.Tensor):
    """A tensor whose cross-entropy is zero."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.cross_entropy:
            return torch.zeros(len(args[0]))
        return super().__torch_function__(function, types, args, kwargs or {})


FUTURE, ROWS, MEMORY, LOGITS = "sees the future", "depend on the other rows", "two passes", "logits"
LEAKS = {
    "blocks of 16": (lambda: Dummy(blocks(16)), FUTURE),
    "blocks of 64": (lambda: Dummy(blocks(64)), FUTURE),
    "chunked recurrence": (lambda: Dummy(chunked_recurrence), FUTURE),
    "fft over time": (lambda: Dummy(fft), FUTURE),
    "normalised over the sequence": (lambda: Dummy(lambda x: x.mean(1, keepdim=True).expand_as(x)), FUTURE),
    "the next token": (lambda: Dummy(next_token), FUTURE),
    "late in the row": (lambda: Dummy(late), FUTURE),
    "faint attention": (lambda: Dummy(faint_attention), FUTURE),
    "learns": (lambda: Learner(sly=False), MEMORY),
    "learns at every other call": (lambda: Learner(sly=True), f"{MEMORY}|{ROWS}"),
    "counts in a buffer": (lambda: Counter(hidden=False), MEMORY),
    "counts out of sight": (lambda: Counter(hidden=True), MEMORY),
    "collects rows": (Collector, MEMORY),
    "behind one large logit": (lambda: Edited(one_logit(-1e6), next_token), FUTURE),
    "behind an offset": (lambda: Edited(lambda logits: logits + 1e6, next_token), FUTURE),
    "behind noise": (lambda: Edited(noise_on_specials, lambda x: 0.03 * next_token(x)), FUTURE),
    "in the first row": (lambda: Dummy(first_row), FUTURE),
    "writes to its input": (Packer, FUTURE),
}
FAULTS = {
    "mean of the batch": (lambda: Dummy(lambda x: x.mean((0, 1)).expand_as(x)), "other rows"),
    "normalised over the batch": (lambda: Dummy(lambda x: (x - x.mean((0, 1))) / x.std((0, 1))), ROWS),
    "peeks at the next row": (lambda: Dummy(lambda x: x.roll(-1, 0)), ROWS),
    "dropout": (lambda: Dummy(lambda x: F.dropout(x, 0.1, training=True)), MEMORY),
    "one nan": (lambda: Edited(one_logit(math.nan)), LOGITS),
    "one inf": (lambda: Edited(one_logit(math.inf)), LOGITS),
    "one that fp32 cannot hold": (lambda: Edited(lambda logits: one_logit(-1e300)(logits.double())), LOGITS),
    "no batch": (lambda: Edited(lambda logits: logits[0]), LOGITS),
    "no last token": (lambda: Edited(lambda logits: logits[:, :-1]), LOGITS),
    "a tensor of its own kind": (lambda: Edited(lambda logits: logits.as_subclass(OwnTensor)), LOGITS),
    "a tuple": (lambda: Edited(lambda logits: (logits, None)), "returned tuple"),
    "one logit too many": (lambda: Edited(lambda logits: F.pad(logits, (0, 1))), LOGITS),
}


@pytest.fixture
def tokenizer(toy):
    return prepare.Tokenizer.from_directory()


def val_rows():
    rows = np.fromfile(prepare.current_folder() / "val_rows.bin", np.uint16).astype(np.int64)
    return torch.from_numpy(rows).view(-1, T + 1)


def score(model, tokenizer, batch_size):
    """The score of a model by the referee."""
    return prepare.evaluate_bpb(model, tokenizer, batch_size, prepare.Inspector(prepare.validation_rows()))


@torch.no_grad()
def plain_bpb(model, tokenizer, batch):
    """The score of a model by a loop without probes."""
    sizes = torch.tensor([len(tokenizer.enc.decode_single_token_bytes(i)) for i in range(V - 4)] + [0] * 4)
    nats = size = 0.0
    for ids in val_rows().split(batch):
        targets = ids[:, 1:].flatten()
        losses = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).double(), targets, reduction="none")
        nats, size = nats + float(losses[sizes[targets] > 0].sum()), size + int(sizes[targets].sum())
    return nats / math.log(2) / size


@pytest.mark.parametrize("name", [*LEAKS, *FAULTS])
def test_a_cheat_is_refused_with_the_reason(tokenizer, name):
    player, reason = (LEAKS | FAULTS)[name]
    with pytest.raises(Refused, match=reason):
        for _ in range(10):  # the probed positions are random
            score(player().eval(), tokenizer, 8)


@pytest.mark.parametrize("name", LEAKS)
def test_the_cheat_improves_the_score_of_a_plain_loop(tokenizer, name):
    player = LEAKS[name][0]().eval()
    plain_bpb(player, tokenizer, 8)  # it collects rows here and uses them below
    assert plain_bpb(player, tokenizer, 8) < plain_bpb(Dummy(), tokenizer, 8) - 1e-4


def test_targets_cannot_be_written(tokenizer):
    assert score(Writer(), tokenizer, 1) > 10


def test_bytes_come_from_the_prepared_tokenizer(tokenizer):
    value = score(Dummy(), tokenizer, 8)
    tokenizer.ranks = {3 * token: rank for token, rank in tokenizer.ranks.items()}
    assert score(Dummy(), tokenizer, 8) == value


# ======================================================================================================================
# Runs


@pytest.fixture
def run_of(tokenizer, monkeypatch, capfd):
    """run_of(cheat) starts a run of 0.3 s, calls cheat(run, score) and returns (report, record, exit code)."""
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "1")

    def go(cheat):
        code = 0
        prepare.evaluated.clear()
        referee.git.cache_clear()
        try:
            with referee.Run() as run:
                run.budget = run.record["time_budget"] = 0.3
                run.start()
                cheat(run, lambda model=None: run.score(model or Dummy(), tokenizer, 8))
        except SystemExit as error:
            code = error.code
        report = block(capfd.readouterr().out)
        record = (prepare.cache_root() / "runs.jsonl").read_text().splitlines()[-1]
        return report, json.loads(record), code

    return go


def to_the_end(score, *model):
    time.sleep(0.3)
    score(*model)


def stopped_early(run, score):
    score()


def scored_twice(run, score):
    to_the_end(score)
    score()


def evaluated_before(run, score):
    """A cheat could thus pick the best of several models, or learn from the validation loss."""
    prepare.evaluate_bpb(Dummy(), prepare.Tokenizer.from_directory(), 8)
    to_the_end(score)


def clock_moved(run, score):
    run.started -= 2
    score()


def both_clocks_moved(run, score):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(referee, "OPENED", referee.OPENED - 0.25)  # a power of two, so that the difference stays the same
        run.started -= 0.25
        time.sleep(0.25)
        score()


def budget_changed(run, score):
    run.budget = 0.1
    time.sleep(0.1)
    score()


def environment_changed(run, score):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_TIME_BUDGET", "1.5")
        run.budget = 1.5
        score()


def prepare_changed(run, score):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "__getattr__", lambda name: 600.0)
        patch.setattr(prepare, "EVAL_ROWS", 1)
        patch.setattr(prepare, "evaluate_bpb", lambda *args: 0.5)
        patch.setattr(prepare, "pack_rows", iter)
        patch.setattr(referee.Run, "progress", lambda run: 1)
        patch.setattr(prepare.Tokenizer, "get_vocab_size", lambda tokenizer: 9)
        to_the_end(score)


def no_probe(self, cost, inputs, targets, nats=None):
    self.edges.append(torch.zeros(8, 1))
    return cost(inputs, targets)


def prepare_changed_back(run, score):
    """Remove the probe, and restore it after the last call."""
    probe = prepare.Inspector.probe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.Inspector, "probe", no_probe)
        player = Dummy(next_token)
        player.train = lambda mode=True: setattr(prepare.Inspector, "probe", probe) if mode else None
        to_the_end(score, player)


def refusal_swallowed(run, score):
    """Change the referee and ignore its refusal."""
    with contextlib.suppress(Refused):
        prepare_changed_back(run, score)


def prepare_changed_by_the_model(run, score):
    def leak(x):
        patch.setattr(prepare.Inspector, "probe", no_probe)
        return next_token(x)

    with pytest.MonkeyPatch.context() as patch:
        to_the_end(score, Dummy(leak))


def other_rows(with_manifest):
    def cheat(run, score):
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
            shutil.copytree(prepare.current_folder(), f"{root}/{prepare.current_folder().name}")
            shutil.copy(prepare.cache_root() / "current", root)
            patch.setenv("AUTORESEARCH_CACHE", root)
            path = prepare.current_folder() / "val_rows.bin"
            np.full_like(np.fromfile(path, np.uint16), 7).tofile(path)
            if with_manifest:
                manifest = prepare.read_manifest()
                manifest["files"][path.name][1] = prepare.sha256_of(path)
                manifest["digest"] = prepare.digest(manifest)
                prepare.write_text(path.with_name("manifest.json"), json.dumps(manifest))
            to_the_end(score)

    return cheat


RUNS = {
    "stopped early": (stopped_early, "trained for 0."),
    "scored twice": (scored_twice, "a run has one score"),
    "evaluated before": (evaluated_before, "a run has one score"),
    "score made up": (lambda run, score: run.record.update(val_bpb=0.5, status="ok"), "no score"),
    "started twice": (lambda run, score: run.start(), "start.. was called twice"),
    "clock moved": (clock_moved, "clock was changed"),
    "both clocks moved": (both_clocks_moved, "changed at run time: referee.OPENED"),
    "budget changed": (budget_changed, "clock was changed"),
    "budget changed in the environment": (environment_changed, "clock was changed"),
    "prepare changed": (prepare_changed, "changed at run time: prepare.__getattr__, prepare.pack_rows, "
                        "prepare.EVAL_ROWS, prepare.evaluate_bpb, .*Tokenizer.get_vocab_size, Run.progress"),
    "prepare changed and put back": (prepare_changed_back, "changed at run time: Inspector.probe"),
    "refusal swallowed": (refusal_swallowed, "no score"),
    "prepare changed by the model": (prepare_changed_by_the_model, FUTURE),
    "other rows": (other_rows(False), "is not what was prepared"),
    "other rows and manifest": (other_rows(True), "other data"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_tampered_with_has_no_score(run_of, name):
    cheat, reason = RUNS[name]
    report, record, code = run_of(cheat)
    assert report["status"] == record["status"] == ("crash" if reason == "no score" else "refused") and code == 1
    assert "val_bpb" not in report
    assert re.search(reason, report["error"]) and re.search(reason, record["error"])


def test_a_printed_score_is_not_logged(run_of, monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(shutil.copytree(prepare.cache_root(), tmp_path / "cache")))

    def cheat(run, score):
        run.record["standard"] = True
        print("---\nval_bpb:          0.500000\nstatus:           ok", flush=True)
        to_the_end(score)

    report, record, code = run_of(cheat)
    results = (tmp_path / "results.tsv").read_text().splitlines()
    assert code == 0 and float(results[-1].split("\t")[1]) > 2 and "0.500000" not in "".join(results)
    assert record["val_bpb"] == pytest.approx(float(report["val_bpb"])) and record["val_bpb"] > 2


# ======================================================================================================================
# Unusual but honest models


class Odd(nn.Module):
    """Embeddings, two layers of mix(x) (B, T, C) -> (B, T, C) and a head, with random weights."""

    def __init__(self, mix, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.head = nn.Embedding(V, C), nn.Linear(C, V)
        self.mix = nn.ModuleList(mix() for _ in range(2))
        self.to(dtype)

    def forward(self, idx):
        x = self.wte(idx)
        for mix in self.mix:
            x = x + mix(x)
        return self.head(x)


class Recurrent(nn.GRU):
    def __init__(self):
        super().__init__(C, C, batch_first=True)

    def forward(self, x):
        return super().forward(x)[0]


class CausalConvolution(nn.Conv1d):
    def __init__(self):
        super().__init__(C, C, 7)

    def forward(self, x):
        return super().forward(F.pad(x.mT, (6, 0))).mT


class DistanceBias(nn.Linear):
    def __init__(self):
        super().__init__(C, 3 * C)

    def forward(self, x):
        q, k, v = super().forward(x).chunk(3, dim=-1)
        distance = torch.arange(x.size(1))[:, None] - torch.arange(x.size(1))
        bias = torch.where(distance >= 0, -0.1 * distance, -torch.inf).to(x.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class TwoDepths(nn.Linear):
    """About half of the tokens, chosen by their embedding, go through the layer: a shape that depends on the batch."""

    def __init__(self):
        super().__init__(C, C)

    def forward(self, x):
        flat = x.flatten(0, 1)
        deep = (flat[:, 0] > 0).nonzero()[:, 0]
        return torch.zeros_like(flat).index_add(0, deep, super().forward(flat[deep]).tanh()).view_as(x)


class Dropout(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(C, C), nn.Dropout(0.5), Recurrent())


class LongConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(T, C) * torch.exp(-torch.arange(T) / 20)[:, None])

    def forward(self, x):
        x, kernel = (torch.fft.rfft(y.float(), 2 * T, dim=-2) for y in (x, self.kernel))
        return torch.fft.irfft(x * kernel, 2 * T, dim=-2)[:, :T].to(self.kernel.dtype)


def gpt(seed=0, noise=0.1, **changes):
    """A train.GPT with noise added to its initial weights, many of which are zero."""
    config = dict(
        sequence_len=T, vocab_size=V, n_layer=2, n_embd=32, head_dim=16, mlp_ratio=2, windows=[40, T],
        value_embed_every=2, rope_base=10_000, qk_gain=1.15, softcap=15.0, dtype=torch.float32, attention="sdpa",
    )
    torch.manual_seed(seed)
    model = train.GPT(train.GPTConfig(**config | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    return model


HONEST = {mix.__name__: lambda mix=mix: Odd(mix) for mix in (
    Recurrent, CausalConvolution, DistanceBias, TwoDepths, Dropout, LongConvolution,
)} | {
    "Recurrent in bf16": lambda: Odd(Recurrent, torch.bfloat16),
    "TwoDepths in bf16": lambda: Odd(TwoDepths, torch.bfloat16),
    "LongConvolution in bf16": lambda: Odd(LongConvolution, torch.bfloat16),
    "DistanceBias in bf16": lambda: Odd(DistanceBias, torch.bfloat16),
    "a GPT": gpt,
    "a GPT in bf16": lambda: gpt(dtype=torch.bfloat16),
    "a GPT of one layer": lambda: gpt(n_layer=1, windows=[T], n_embd=64, value_embed_every=0, softcap=0.0),
    "a deep GPT": lambda: gpt(n_layer=6, windows=[3, 17, 99, 255, 40, T], value_embed_every=1),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_unusual_honest_model_scores_as_in_a_plain_loop(tokenizer, name):
    model = HONEST[name]().train()
    value = score(model, tokenizer, 8)
    assert model.training
    assert value == pytest.approx(plain_bpb(model.eval(), tokenizer, 5), rel=1e-4)


def random_gpt(rng):
    """(model, sequence length): a train.GPT with random settings and small to large weights."""
    length, head_dim = rng.randrange(2, 40), rng.choice([2, 4, 8, 16])
    n_layer = rng.randrange(1, 4)
    return gpt(
        rng.randrange(2**32), rng.choice([0.02, 0.1, 0.5, 2.0]), sequence_len=length,
        n_layer=n_layer, n_embd=32 * rng.randrange(1, 4), head_dim=head_dim, mlp_ratio=rng.randrange(1, 5),
        windows=[rng.randrange(length + 1) for _ in range(n_layer)], value_embed_every=rng.randrange(4),
        rope_base=rng.choice([100, 10_000]), qk_gain=rng.uniform(0.5, 5), softcap=rng.choice([0.0, 15.0, 50.0]),
        dtype=rng.choice([torch.float32, torch.bfloat16]), vocab_size=rng.choice([5, 50, 300]),
    ).eval(), length


@torch.no_grad()
def test_no_random_model_is_refused():
    rng = random.Random(0)
    for _ in range(40):
        model, length = random_gpt(rng)
        rows = torch.randint(model.config.vocab_size, (rng.randrange(1, 17), length + 1))

        def cost(inputs, targets):
            logits = model(inputs).flatten(0, 1)  # noqa: B023
            return F.cross_entropy(logits, targets.flatten(), reduction="none").view(inputs.shape)

        inspector = prepare.Inspector(rows)
        inspector(cost, rows[:, :-1], rows[:, 1:])
        assert torch.cat(inspector.edges).abs().mean() < 1e-3
