"""
The player of autoresearch: a GPT trained with Muon and AdamW for five minutes on one device. The agent edits this file.

    uv run train.py > run.log 2>&1

It trains on the data prepared last, for exactly the time budget, and ends with the report of referee.py, whose first
line is val_bpb: validation bits per byte, lower is better.

Sections, in the order they are used: constants, model, optimizer, schedules, training.
"""

import ctypes
import math
import os
import sys
import time
from dataclasses import dataclass

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import SCALE, Tokenizer, make_dataloader
from referee import Run

# === Constants, read by main() alone. Edit a line, commit, run ========================================================

# Model
DEPTH = 8  # layers
N_EMBD = 768  # width, a multiple of HEAD_DIM
HEAD_DIM = 128  # of query, key and value
MLP_RATIO = 4  # hidden width of the MLP / N_EMBD
WINDOW_PATTERN = "SSSL"  # attention of the layers in turn, S short, L all of the past; the last layer is always L
SHORT_WINDOW = 256  # tokens before itself that a token of an S layer sees
VALUE_EMBED_EVERY = 3  # layers 0, 3, 6, .. and the last add a value embedding; 0: none
RECALL = ()  # (1, 2, 3): look up what followed the last earlier occurrence of the last 1, 2, 3 tokens; (): nothing
ROPE_BASE = 10_000
QK_GAIN = 1.15  # fixed gain on normalised queries and keys
SOFTCAP = 15.0  # logits are capped to (-SOFTCAP, SOFTCAP) by tanh; 0: not at all

# Batch
TOTAL_BATCH = 2**17  # tokens of an optimizer step, rounded to whole rows
DEVICE_BATCH = 64  # rows of a forward at most: 34 GB; halved by itself when out of memory

# Optimizer: learning rates hold at width 768, those of AdamW's matrices scale with (N_EMBD / 768)^-0.5
MATRIX_LR = 0.04  # Muon
EMBED_LR = 0.8  # AdamW, token and value embeddings
HEAD_LR = 0.008  # AdamW
RESID_LR, X0_LR = 0.005, 0.5  # AdamW, per-layer scalars
ADAM_BETAS = (0.8, 0.95)
MATRIX_DECAY = 0.125  # cautious: only where update and weight agree in sign; fades as (1 - progress)^2
EMBED_DECAY, VALUE_DECAY, HEAD_DECAY = 0.0005, 0.004, 0.002  # decoupled
MOMENTUM = (0.85, 0.92, 0.05)  # of Muon: from, to, over this share of the run

# Schedule, by share of the time budget
WARMDOWN = 0.8  # the last part of the run, in which learning rates fall linearly
FINAL_LR = 0.04  # share of the learning rate left at the end

# Speed
COMPILE = True  # torch.compile for the training step

if SCALE == "small":  # what differs on a CPU, where a step is small and compiling takes a fifth of the time
    DEPTH = 3
    N_EMBD = 128  # 192 costs 1.6 times as much a step
    HEAD_DIM = 64
    RECALL = (1, 2, 3)
    EMBED_LR = 0.2
    ADAM_BETAS = (0.8, 0.99)
    WINDOW_PATTERN = "L"
    TOTAL_BATCH = 2**11
    DEVICE_BATCH = 64
    SOFTCAP = 0.0
    COMPILE = False

# === Model ============================================================================================================


@dataclass
class GPTConfig:
    """The shape of a GPT; `windows` has a layer's number of visible earlier tokens, sequence_len for all."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_embd: int
    head_dim: int
    mlp_ratio: int
    windows: list
    value_embed_every: int
    rope_base: float
    qk_gain: float
    softcap: float
    dtype: torch.dtype  # of activations; weights are kept in fp32
    attention: str  # "varlen", "sdpa" or "dense", see attend()
    recall: tuple = ()

    @property
    def n_head(self):
        return self.n_embd // self.head_dim

    def has_value_embed(self, layer):
        every = self.value_embed_every
        return every > 0 and (layer % every == 0 or layer == self.n_layer - 1)


def layer_windows(pattern, n_layer, short_window, sequence_len):
    """The window of every layer: `pattern` repeated, the last layer full."""
    if not pattern or set(pattern) - set("SL"):
        raise ValueError(f"WINDOW_PATTERN = {pattern!r} may hold the letters S and L only")
    short = min(short_window, sequence_len)
    windows = [short if pattern[i % len(pattern)] == "S" else sequence_len for i in range(n_layer)]
    return [*windows[:-1], sequence_len]


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def attend(q, k, v, window, kernel):
    """Causal attention in which a token sees itself and `window` tokens before it: (B, T, H, D) -> (B, T, H, D).

    "varlen" is torch's flash kernel, windowed: bf16 on CUDA from sm_80 on. "sdpa" runs anywhere: with a window it goes
    by blocks of queries, each against the keys that it can see. "dense" writes the scores down, (B, H, T, T): on a CPU
    twice as fast for rows of 256 tokens.
    """
    B, T, H, D = q.shape
    full = window >= T - 1
    if kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        edges = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
        q, k, v = (x.reshape(B * T, H, D) for x in (q, k, v))
        return varlen_attn(q, k, v, edges, edges, T, T, window_size=(-1 if full else window, 0)).view(B, T, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "dense":
        hidden = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device)
        hidden = hidden.triu(1) if full else hidden.triu(1) + hidden.tril(-window - 1)
        return ((q * D**-0.5 @ k.mT + hidden).softmax(-1) @ v).transpose(1, 2)
    if full:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    blocks, size = [], max(window, 64)
    for start in range(0, T, size):
        first, stop = max(0, start - window), min(start + size, T)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = (distance >= 0) & (distance <= window)
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        blocks.append(F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, attn_mask=visible))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def rotary(sequence_len, head_dim, base):
    """Tables of cos and sin for positions 0 .. sequence_len - 1: (T, 1, D / 2) each."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(sequence_len, dtype=torch.float32), frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding (RoFormer), the two halves of a head being the pairs: x (B, T, H, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def recall(idx, n, vocab_size):
    """The token that followed the last earlier occurrence of the last n tokens, vocab_size if there is none: (B, T).

    What an induction head (arXiv 2209.11895) has to learn, looked up: a stable sort by n-gram puts that occurrence
    just before the present one. What followed it is the present token at the latest, so nothing is seen of the future.
    """
    key = idx  # a number for each n-gram, exact while (vocab_size + 1)^n < 2^63
    for i in range(1, n):
        key = key * (vocab_size + 1) + F.pad(idx, (i, 0), value=vocab_size)[:, : idx.size(1)]
    key, order = key.sort(dim=1, stable=True)
    found = F.pad(key[:, 1:] == key[:, :-1], (1, 0))
    follower = idx.roll(-1, 1).gather(1, F.pad(order[:, :-1], (1, 0)))
    return torch.empty_like(idx).scatter_(1, order, follower.where(found, vocab_size))


class Linear(nn.Linear):
    """A linear map without bias, its fp32 weight cast to the dtype of the activations."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    GATE_CHANNELS = 32  # of the input, that gate the value embedding

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.window = config, config.windows[layer]
        self.c_qkv = nn.Parameter(torch.empty(3, config.n_embd, config.n_embd))  # queries, keys, values: one matmul
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(self.GATE_CHANNELS, config.n_head) if config.has_value_embed(layer) else None

    def forward(self, x, value_embed, cos, sin):
        B, T, C = x.shape
        c = self.config
        q, k, v = F.linear(x, self.c_qkv.flatten(0, 1).to(x.dtype)).view(B, T, 3, c.n_head, c.head_dim).unbind(2)
        if value_embed is not None:  # value residual, gated per head; the gate starts at 1
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.GATE_CHANNELS]))
            v = v + gate[..., None] * value_embed.view(B, T, c.n_head, c.head_dim)
        q, k = (rotate(norm(x) * c.qk_gain, cos, sin) for x in (q, k))
        return self.c_proj(attend(q, k, v, self.window, c.attention).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_ratio * config.n_embd)
        self.c_proj = Linear(config.mlp_ratio * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x, value_embed, cos, sin):
        x = x + self.attn(norm(x), value_embed, cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocab_size) in fp32."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.head_dim or config.head_dim % 2 or config.n_embd < Attention.GATE_CHANNELS:
            raise ValueError(f"N_EMBD = {config.n_embd} must be a multiple of the even HEAD_DIM = "
                             f"{config.head_dim}, and at least {Attention.GATE_CHANNELS}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, config.n_embd)
                                           for i in range(config.n_layer) if config.has_value_embed(i)})
        self.recall_embeds = nn.ModuleList(nn.Embedding(config.vocab_size + 1, config.n_embd) for _ in config.recall)
        self.recall_gate = Linear(config.n_embd, len(config.recall)) if config.recall else None
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))  # x = resid * x + x0 * embedding, before a layer
        self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1))
        cos, sin = rotary(config.sequence_len, config.head_dim, config.rope_base)
        self.register_buffer("cos", cos.to(config.dtype), persistent=False)
        self.register_buffer("sin", sin.to(config.dtype), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Token embeddings of unit size, a head near zero, projections into the residual stream and lookups zero."""
        bound = (3 / self.config.n_embd) ** 0.5
        self.wte.weight.normal_()
        self.lm_head.weight.normal_(std=0.001)
        for embed in self.value_embeds.values():
            embed.weight.uniform_(-bound, bound)
        for lookup in (*self.recall_embeds, *([self.recall_gate] if self.config.recall else [])):
            lookup.weight.zero_()
        for block in self.blocks:
            block.attn.c_qkv.uniform_(-bound, bound)
            block.mlp.c_fc.weight.uniform_(-bound, bound)
            for zero in (block.attn.c_proj, block.mlp.c_proj, block.attn.ve_gate):
                if zero is not None:
                    zero.weight.zero_()

    def forward(self, idx):
        c, T = self.config, idx.size(1)
        if T > c.sequence_len:
            raise ValueError(f"a row of {T} tokens is longer than sequence_len {c.sequence_len}")
        cos, sin = self.cos[:T], self.sin[:T]
        x = self.wte(idx)
        recalled = [recall(idx, n, c.vocab_size) for n in c.recall]
        for tokens, embed in zip(recalled, self.recall_embeds, strict=True):
            x = x + embed(tokens)
        x = x0 = norm(x.to(c.dtype))
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].to(c.dtype) * x + self.x0_lambdas[i].to(c.dtype) * x0
            x = block(x, self.value_embeds[str(i)](idx).to(c.dtype) if c.has_value_embed(i) else None, cos, sin)
        x = norm(x)
        logits = self.lm_head(x).float()
        if recalled:  # each recalled token gets a bonus, as a pointer network's (arXiv 1609.07843), that x decides
            tokens = torch.stack(recalled, dim=-1)
            bonus = self.recall_gate(x).float() * (tokens < c.vocab_size)
            logits = logits.scatter_add(-1, tokens % c.vocab_size, bonus)
        return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits

    def flops_per_token(self):
        """Of forward and backward: 6 for each weight of a matmul, 12 for each channel of each visible token."""
        weights = sum(p.numel() for p in self.blocks.parameters()) + self.lm_head.weight.numel()
        return 6 * weights + 12 * self.config.n_embd * sum(self.config.windows)


def loss_of(model, idx, targets):
    """Mean cross-entropy in nats of `targets` (B, T)."""
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


# === Optimizer ========================================================================================================


# Polar Express (arXiv 2505.16932): the best quintic of each of five iterations, for singular values from 1e-3 up
POLAR_EXPRESS = [
    (8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
]  # fmt: skip


def orthogonalize(g):
    """The nearest semi-orthogonal matrices, roughly, to g (..., M, N): all singular values near 1."""
    wide = g.size(-2) <= g.size(-1)
    x = g if wide else g.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT


def muon_update(weights, grads, momentum_buffer, lr, momentum, decay, dtype):
    """One step of Muon, in place, on a stack of weights (n, ..., M, N); lr, momentum and decay are 0-d tensors."""
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momentum_buffer, momentum).to(dtype)).to(weights.dtype)  # Nesterov
    agree = (update * weights) >= 0
    weights.sub_(lr * (update + decay * weights * agree))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Keller Jordan), with cautious weight decay; all weights of a group have one shape."""

    def __init__(self, groups, dtype, compiled):
        super().__init__(groups, dict(momentum=0.0, weight_decay=0.0))
        self.dtype = dtype  # of the orthogonalization
        self.update = torch.compile(muon_update, dynamic=False) if compiled else muon_update

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            weights, grads = torch.stack(params), torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grads)
            rows, columns = params[0].shape[-2:]
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            numbers = (torch.tensor(x) for x in (lr, group["momentum"], group["weight_decay"]))  # no recompilation
            self.update(weights, grads, state["momentum_buffer"], *numbers, self.dtype)
            torch._foreach_copy_(params, list(weights.unbind()))


def build_optimizers(model, matrix_lr, embed_lr, head_lr, resid_lr, x0_lr, betas, decays, compiled):
    """[AdamW, Muon] with every parameter in exactly one group; a group keeps its peak rate as `initial_lr`.

    Muon gets the matrices of the blocks, AdamW the embeddings, the head and the scalars. `decays` are those of
    embeddings, value embeddings, head and matrices.
    """
    size = (model.config.n_embd / 768) ** -0.5
    embed_decay, value_decay, head_decay, matrix_decay = decays
    tables = [*model.value_embeds.parameters(), *model.recall_embeds.parameters()]
    heads = [model.lm_head.weight] + ([model.recall_gate.weight] if model.config.recall else [])
    shapes = {}
    for p in model.blocks.parameters():
        shapes.setdefault(p.shape, []).append(p)
    adamw_groups = [
        dict(params=[model.wte.weight], lr=embed_lr * size, weight_decay=embed_decay),
        dict(params=tables, lr=embed_lr * size, weight_decay=value_decay),
        dict(params=heads, lr=head_lr * size, weight_decay=head_decay),
        dict(params=[model.resid_lambdas], lr=resid_lr, weight_decay=0.0),
        dict(params=[model.x0_lambdas], lr=x0_lr, weight_decay=0.0, betas=(0.96, 0.95)),
    ]
    adamw_groups = [group for group in adamw_groups if group["params"]]
    muon_groups = [dict(params=params, lr=matrix_lr, weight_decay=matrix_decay) for params in shapes.values()]
    grouped = [id(p) for group in adamw_groups + muon_groups for p in group["params"]]
    left_out = [name for name, p in model.named_parameters() if grouped.count(id(p)) != 1]
    if left_out:
        raise ValueError(f"parameters {left_out} must be in exactly one group of build_optimizers")
    adamw = torch.optim.AdamW(adamw_groups, betas=betas, eps=1e-10, fused=True)
    optimizers = [adamw, Muon(muon_groups, model.config.dtype, compiled)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"], group["initial_decay"] = group["lr"], group["weight_decay"]
    return optimizers


# === Schedules: functions of progress, the share of the time budget used so far =======================================


def lr_scale(progress, warmdown, final):
    """1, then over the last `warmdown` of the run linearly down to `final`."""
    return final + (1 - final) * min(1.0, max(0.0, 1 - progress) / warmdown)


def set_schedules(optimizers, progress, warmdown, final_lr, momentum):
    start, stop, share = momentum
    adamw, muon = optimizers
    for group in adamw.param_groups + muon.param_groups:
        group["lr"] = group["initial_lr"] * lr_scale(progress, warmdown, final_lr)
    for group in muon.param_groups:
        group["momentum"] = start + (stop - start) * min(1.0, progress / share)
        group["weight_decay"] = group["initial_decay"] * max(0.0, 1 - progress) ** 2


# === Training =========================================================================================================


def fast_dtype(device):
    """bf16 where the device computes in it: CUDA from sm_80 on, a CPU on which it measures faster; fp32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    if device.type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, times = torch.ones(1024, 256, dtype=dtype), []
        for _ in range(10):
            begun = time.perf_counter()
            x @ x.mT
            times.append(time.perf_counter() - begun)
        seconds[dtype] = min(times)
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


def keep_memory():
    """Have the C library keep freed blocks of any size: on a CPU, fetching them anew took a quarter of a step."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for parameter, size in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, size)


def split_batch(rows, at_most):
    """(rows of a forward, forwards of a step) that make `rows` or a few more with forwards of `at_most` rows."""
    forwards = math.ceil(rows / at_most)
    return math.ceil(rows / forwards), forwards


def train_step(loss_fn, model, optimizers, batches, forwards):
    """One optimizer step over `forwards` batches (inputs, targets, epoch); returns the mean loss, not waited for."""
    total = 0.0
    for _ in range(forwards):
        inputs, targets, _ = next(batches)
        loss = loss_fn(model, inputs, targets) / forwards
        loss.backward()
        total = total + loss.detach()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def warm_up(loss_fn, model, optimizers, rows, at_most, device):
    """Compile and try the step on made-up batches, then put everything back; returns split_batch() of what fits."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shape = lambda micro: (micro, model.config.sequence_len)  # noqa: E731
    while True:
        micro, forwards = split_batch(rows, at_most)
        try:
            with torch.random.fork_rng():
                made_up = torch.randint(model.config.vocab_size, shape(micro), device=device)
                for _ in range(2):
                    train_step(loss_fn, model, optimizers, iter([(made_up, made_up, 1)] * forwards), forwards)
            break
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
            at_most = micro // 2
            print(f"out of memory with {micro} rows of a forward; trying {at_most}")
        finally:
            model.load_state_dict(before)
            for optimizer in optimizers:
                optimizer.state.clear()
                optimizer.zero_grad(set_to_none=True)
    return micro, forwards


def main():
    with Run(globals()) as run:
        keep_memory()
        torch.manual_seed(run.seed)
        torch.set_float32_matmul_precision("high")
        tokenizer, T, dtype = Tokenizer.from_directory(), run.data["seq_len"], fast_dtype(run.device)
        flash = run.device.type == "cuda" and dtype == torch.bfloat16
        config = GPTConfig(
            sequence_len=T, vocab_size=tokenizer.get_vocab_size(), n_layer=DEPTH, n_embd=N_EMBD, head_dim=HEAD_DIM,
            mlp_ratio=MLP_RATIO, windows=layer_windows(WINDOW_PATTERN, DEPTH, SHORT_WINDOW, T),
            value_embed_every=VALUE_EMBED_EVERY, rope_base=ROPE_BASE, qk_gain=QK_GAIN, softcap=SOFTCAP,
            dtype=dtype, attention="varlen" if flash else "dense" if run.device.type == "cpu" and T <= 512 else "sdpa",
            recall=RECALL,
        )
        model = GPT(config).to(run.device)
        decays = (EMBED_DECAY, VALUE_DECAY, HEAD_DECAY, MATRIX_DECAY)
        optimizers = build_optimizers(model, MATRIX_LR, EMBED_LR, HEAD_LR, RESID_LR, X0_LR, ADAM_BETAS, decays, COMPILE)
        loss_fn = torch.compile(loss_of, dynamic=False) if COMPILE else loss_of
        num_params = sum(p.numel() for p in model.parameters())
        run.note(depth=DEPTH, num_params=num_params, attention=config.attention)
        run.note(flops_per_token=model.flops_per_token())
        print(f"{config}\n{num_params:,} parameters on {run.device}")

        set_schedules(optimizers, 0.0, WARMDOWN, FINAL_LR, MOMENTUM)
        rows = max(1, round(TOTAL_BATCH / T))
        begun = time.perf_counter()
        micro, forwards = warm_up(loss_fn, model, optimizers, rows, DEVICE_BATCH, run.device)
        run.note(warm_up_seconds=time.perf_counter() - begun, rows=micro, forwards=forwards, shape=str(config))
        print(f"a step: {forwards} x {micro} rows of {T} tokens; training for {run.budget:.0f} s")

        batches = make_dataloader(tokenizer, micro, T, "train")
        run.start()
        while (progress := run.progress()) < 1:
            set_schedules(optimizers, progress, WARMDOWN, FINAL_LR, MOMENTUM)
            loss = train_step(loss_fn, model, optimizers, batches, forwards)
            run.step(loss, forwards * micro * T)
        run.score(model, tokenizer, micro)
    return run.record


if __name__ == "__main__":
    main()
