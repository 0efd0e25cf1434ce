"""
Train a GPT for five minutes on one device. The agent edits this file.

    uv run train.py > run.log 2>&1

It uses the data prepared last. It prints the configuration, the progress and the report of referee.py. The
report starts with val_bpb, validation bits per byte: lower is better.
"""

import copy
import ctypes
import math
import os
from dataclasses import dataclass
from functools import partial
from itertools import islice

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # CPU threads that spin longer stall on a busy machine
if "microsoft" not in os.uname().release:  # WSL has no expandable segments
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from prepare import SCALE, Tokenizer, flash_attention_3, make_dataloader, out_of_memory
from referee import Run

# === Constants: only main() reads them. Edit a line, commit, run ===

# Unless noted, the values of scale full come from the best public logs on H100 and H200 at this size
# Model
DEPTH = 8  # layers
N_EMBD = 768  # width, a multiple of HEAD_DIM; 8 x 768 beats 8 x 512 in public H100 and B200 logs
HEAD_DIM = 128  # channels of a query, key or value; 64 is slower on a GPU
MLP_RATIO = 4  # hidden width of the MLP / N_EMBD
WINDOW_PATTERN = "SSSL"  # repeated over the layers: S short, L full attention; the last is always L
SHORT_WINDOW = 256  # earlier tokens that a token sees in an S layer
VALUE_EMBED_EVERY = 3  # layers 0, 3, 6, .. and the last add a value embedding; 0: none
ROPE_BASE = 10_000
QK_GAIN = 1.15  # fixed gain on normalised queries and keys
SHIFT_KEYS = False  # half of each key comes from the previous token
NGRAMS = ()  # orders of n-grams with an embedding, added to that of the token
RECALL = ()  # for these n, embed the token that last followed the same n tokens
CONTEXT_ROWS = 1_048_573  # rows of the table for both, a prime
# SHIFT_KEYS, NGRAMS (2, 3), RECALL (2, 4), on an H200, text seen 1.5 times: +0.010, training loss -0.3
SOFTCAP = 15.0  # tanh caps the logits to (-SOFTCAP, SOFTCAP); 0: no cap

# Batch and speed
TOTAL_BATCH = 2**17  # tokens per optimizer step, rounded to whole rows (sequences); 2**19 gives too few steps
DEVICE_BATCH = 64  # maximum rows per forward; halved when out of memory
COMPILE = True  # torch.compile; takes 10 to 120 s before the clock starts; small, tried False: +0.016

# Optimizer: EMBED_LR and HEAD_LR are for width 768; they scale by (N_EMBD / 768)^-0.5
MATRIX_LR = 0.04  # Muon
EMBED_LR = 0.8  # AdamW, embeddings of tokens and values; good from 0.74 to 0.9
CONTEXT_LR = 0.6  # Adagrad, n-grams and RECALL; constant, since Adagrad lowers it for often used rows
HEAD_LR = 0.008  # AdamW; good from 0.006 to 0.01
RESID_LR, X0_LR = 0.005, 0.5  # AdamW, per-layer scalars
ADAM_BETAS = (0.8, 0.95)
MATRIX_DECAY = 0.125  # cautious: only where update and weight have the same sign; fades as (1 - progress)^2
EMBED_DECAY, VALUE_DECAY, HEAD_DECAY = 0.0005, 0.004, 0.002  # decoupled weight decay
MOMENTUM = (0.85, 0.92, 0.05)  # Muon: from, to, over this fraction of the run

# Schedule
WARMDOWN = 0.8  # fraction of the run, at its end: learning rates fall linearly
FINAL_LR_FRAC = 0.04  # of the peak learning rates, left at the end; good from 0.03 to 0.05

if SCALE == "medium":  # for smaller GPUs; the shape is from public logs of RTX 3060, 3090, 4090 and GB10
    DEPTH, N_EMBD, TOTAL_BATCH = 5, 512, 2**16  # 8 x 768 gets only 140 steps on an RTX 3090

if SCALE == "small":  # for a CPU; "tried": change of val_bpb on two cores, rows of 256 or 512 tokens
    DEPTH = 2  # tried 3: +0.016
    N_EMBD = 128  # tried 192: +0.019
    HEAD_DIM = 64  # tried 128: equal
    MATRIX_LR, EMBED_LR, HEAD_LR = 0.02, 0.05, 0.002  # tried .04, .2, .008: +0.02; .01, .03, .001: +0.015
    ADAM_BETAS = (0.8, 0.99)  # tried (0.8, 0.95): worse
    SHIFT_KEYS = True  # tried False: +0.106
    NGRAMS = (2, 3, 4)  # tried (2, 3), each with 2**15 rows and AdamW: +0.06
    RECALL = (2, 4)  # tried (): +0.047
    WINDOW_PATTERN, SOFTCAP = "L", 0.0
    TOTAL_BATCH = 2**12  # tried 2**11: +0.012
    FINAL_LR_FRAC = 0.0  # tried 0.04: +0.01

# === Model ===


@dataclass
class GPTConfig:
    """The shape of a GPT. `windows`: how many earlier tokens each layer sees (sequence_len = all)."""

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
    attention: object  # from attention_kernel()
    shift_keys: bool = False
    ngrams: tuple = ()
    recall: tuple = ()
    context_rows: int = 0

    def has_value_embed(self, layer):
        every = self.value_embed_every
        return every > 0 and (layer % every == 0 or layer == self.n_layer - 1)


def layer_windows(pattern, n_layer, short_window, sequence_len):
    """The window of each layer in tokens: `pattern` repeats, the last layer is full."""
    if not pattern or set(pattern) - set("SL"):
        raise ValueError(f"WINDOW_PATTERN = {pattern!r} must consist of the letters S and L")
    widths = dict(S=min(short_window, sequence_len), L=sequence_len)
    return [widths[letter] for letter in (pattern * n_layer)[: n_layer - 1] + "L"]


def hash_ngrams(idx, n):
    """An int64 hash of the last n tokens at each position of idx (B, T)."""
    key = idx
    for i in range(1, n):
        key = key * 0x9E3779B1 + F.pad(idx, (i, -i))
    return key


def recall(idx, n, vocab_size):
    """The token that followed the previous occurrence of the last n tokens; if none, vocab_size. (B, T)

    This is what an induction head (arXiv 2209.11895) learns. A stable sort by n-gram puts the previous
    occurrence just before the current one. The token after it is never a future token.
    """
    key, order = hash_ngrams(idx, n).sort(dim=1, stable=True)
    found = F.pad(key[:, 1:] == key[:, :-1], (1, 0))
    follower = idx.roll(-1, 1).gather(1, F.pad(order, (1, -1)))
    return torch.empty_like(idx).scatter_(1, order, follower.where(found, vocab_size))


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def attention_kernel(device, dtype):
    """FlashAttention-3 on Hopper if it loads, "varlen" (torch's) for bf16 on other GPUs, else "sdpa"."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return flash_attention_3() or "varlen"
    return "sdpa"


def attend(q, k, v, window, kernel):
    """Causal attention, (B, T, H, D) -> (B, T, H, D). A token sees itself and `window` earlier tokens."""
    B, T, H, D = q.shape
    span = (-1 if window >= T - 1 else window, 0)  # -1: all
    if callable(kernel):  # FlashAttention-3
        return kernel(q, k, v, causal=True, window_size=span)
    if kernel == "varlen":
        cu_seqlens = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
        q, k, v = (x.reshape(B * T, H, D) for x in (q, k, v))
        y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, window_size=span)
        return y.view(B, T, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    visible = None  # all
    if window < T - 1:
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(-window)
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None).transpose(1, 2)


def rotary(sequence_len, head_dim, base):
    """Tables of cos and sin, (T, 1, D / 2) each, for positions 0 .. sequence_len - 1."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(sequence_len, dtype=torch.float32), frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding (RoFormer) of x (B, T, H, D). It pairs the two halves of a head."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Linear(nn.Linear):
    """A linear map without bias. It casts its fp32 weight to the dtype of the activations."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    GATE_CHANNELS = 32  # input channels that gate the value embedding

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.window = config, config.windows[layer]
        self.c_qkv = nn.Parameter(torch.empty(3, config.n_embd, config.n_embd))  # q, k, v in one matmul
        self.c_proj = Linear(config.n_embd, config.n_embd)
        heads = config.n_embd // config.head_dim
        self.ve_gate = Linear(self.GATE_CHANNELS, heads) if config.has_value_embed(layer) else None

    def forward(self, x, value_embed, cos, sin):
        B, T, C = x.shape
        c = self.config
        q, k, v = F.linear(x, self.c_qkv.flatten(0, 1).to(x.dtype)).view(B, T, 3, -1, c.head_dim).unbind(2)
        if value_embed is not None:  # value embedding, gated per head; the gate starts at 1
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.GATE_CHANNELS]))
            v = v + gate[..., None] * value_embed.view(B, T, -1, c.head_dim)
        q, k = (rotate(norm(x) * c.qk_gain, cos, sin) for x in (q, k))
        if c.shift_keys:  # the half that rotates slowly comes from the previous token: induction in one layer
            fast, slow = k.unflatten(-1, (2, -1)).chunk(2, dim=-1)
            k = torch.cat((fast, F.pad(slow, (0, 0, 0, 0, 0, 0, 1, -1))), dim=-1).flatten(-2)
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
            raise ValueError(f"HEAD_DIM = {config.head_dim} must be even, and N_EMBD = {config.n_embd} a "
                             f"multiple of it and at least {Attention.GATE_CHANNELS}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        rows = config.context_rows if config.ngrams or config.recall else 0
        self.contexts = nn.Parameter(torch.zeros(rows, config.n_embd))
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, config.n_embd)
                                           for i in range(config.n_layer) if config.has_value_embed(i)})
        # Per layer: factors of x and of the embedding x0
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1))
        tables = rotary(config.sequence_len, config.head_dim, config.rope_base)
        self.register_buffer("cos_sin", torch.stack(tables).to(config.dtype), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 1) token embeddings, a head near zero, zero projections into the residual stream."""
        bound = (3 / self.config.n_embd) ** 0.5
        self.wte.weight.normal_()
        self.lm_head.weight.normal_(std=0.001)
        for embed in self.value_embeds.values():
            embed.weight.uniform_(-bound, bound)
        for block in self.blocks:
            block.attn.c_qkv.uniform_(-bound, bound)
            block.mlp.c_fc.weight.uniform_(-bound, bound)
            for zero in filter(None, (block.attn.c_proj, block.mlp.c_proj, block.attn.ve_gate)):
                zero.weight.zero_()

    @torch.compiler.disable  # it supports no sparse gradients
    def embed_contexts(self, idx):
        """The sum of the embeddings of n-grams and of recalled tokens, (B, T, C)."""
        c = self.config
        keys = [hash_ngrams(idx, n) for n in c.ngrams]
        keys += [i * (c.vocab_size + 1) + recall(idx, n, c.vocab_size) for i, n in enumerate(c.recall)]
        rows = torch.stack(keys, dim=-1).flatten(0, 1) % c.context_rows
        return F.embedding_bag(rows, self.contexts, mode="sum", sparse=idx.is_cpu).view(*idx.shape, -1)

    def forward(self, idx):
        c = self.config
        cos, sin = self.cos_sin[:, : idx.size(1)]
        x = self.wte(idx)
        if len(self.contexts):
            x = x + self.embed_contexts(idx)
        x = x0 = norm(x.to(c.dtype))
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].to(c.dtype) * x + self.x0_lambdas[i].to(c.dtype) * x0
            value_embed = self.value_embeds[str(i)](idx).to(c.dtype) if c.has_value_embed(i) else None
            x = block(x, value_embed, cos, sin)
        logits = self.lm_head(norm(x)).float()
        return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits

    def flops_per_token(self):
        """FLOPs of forward and backward: 6 per weight of a matmul, 12 per channel and token of a window."""
        weights = sum(p.numel() for p in self.blocks.parameters()) + self.lm_head.weight.numel()
        return 6 * weights + 12 * self.config.n_embd * sum(self.config.windows)


def loss_of(model, idx, targets):
    """Mean cross-entropy of `targets` (B, T), in nats."""
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


# === Optimizer ===

# Polar Express (arXiv 2505.16932): the best quintics for five iterations and singular values above 1e-3
POLAR_EXPRESS = [(8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061),
                 (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232)]


def orthogonalize(g):
    """Roughly the nearest semi-orthogonal matrices to g (..., M, N): all singular values are near 1."""
    if g.size(-2) > g.size(-1):
        return orthogonalize(g.mT).mT
    x = g / (g.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_update(weights, grads, momentum_buffer, lr, momentum, decay, dtype):
    """One in-place step of Muon on stacked weights (n, ..., M, N); lr, momentum, decay: 0-d tensors."""
    new = (1 - momentum) * grads
    momentum_buffer.mul_(momentum).add_(new)
    update = new + momentum * momentum_buffer  # Nesterov
    update = orthogonalize(update.to(dtype)).to(weights.dtype)
    agree = (update * weights) >= 0
    weights.sub_(lr * (update + decay * weights * agree))


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Keller Jordan), cautious weight decay. A group has weights of one shape."""

    def __init__(self, groups, dtype, compiled):
        super().__init__(groups, dict(momentum=0.0))
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
            lr = group["lr"] * max(1, weights.size(-2) / weights.size(-1)) ** 0.5
            # Tensors, because new floats would recompile the update
            numbers = map(torch.tensor, (lr, group["momentum"], group["weight_decay"]))
            self.update(weights, grads, state["momentum_buffer"], *numbers, self.dtype)
            torch._foreach_copy_(params, weights.unbind())


def build_optimizers(model, matrix_lr, embed_lr, context_lr, head_lr, resid_lr, x0_lr, betas, decays,
                     compiled):
    """(AdamW, Muon, Adagrad). Each parameter is in one group. A group keeps its peak rate as `initial_lr`.

    Muon gets all parameters of the blocks, matrices only. Adagrad gets contexts, AdamW the rest.
    `decays` has four values: embeddings, value embeddings, head, matrices.
    """
    scale = (model.config.n_embd / 768) ** -0.5
    embed_decay, value_decay, head_decay, matrix_decay = decays
    shapes = {}
    for p in model.blocks.parameters():
        shapes.setdefault(p.shape, []).append(p)
    adamw = torch.optim.AdamW([
        dict(params=[model.wte.weight], lr=embed_lr * scale, weight_decay=embed_decay),
        dict(params=[*model.value_embeds.parameters()], lr=embed_lr * scale, weight_decay=value_decay),
        dict(params=[model.lm_head.weight], lr=head_lr * scale, weight_decay=head_decay),
        dict(params=[model.resid_lambdas], lr=resid_lr, weight_decay=0.0),
        dict(params=[model.x0_lambdas], lr=x0_lr, weight_decay=0.0, betas=(0.96, 0.95)),
    ], betas=betas, eps=1e-10, fused=True)
    matrices = [dict(params=params, lr=matrix_lr, weight_decay=matrix_decay) for params in shapes.values()]
    muon = Muon(matrices, model.config.dtype, compiled)
    adagrad = torch.optim.Adagrad([model.contexts], lr=context_lr)
    groups = adamw.param_groups + muon.param_groups + adagrad.param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    wrong = [name for name, p in model.named_parameters() if grouped.count(id(p)) != 1]
    if wrong:
        raise ValueError(f"parameters {wrong} must be in exactly one group of build_optimizers")
    for group in groups:
        group["initial_lr"], group["initial_decay"] = group["lr"], group["weight_decay"]
    return adamw, muon, adagrad


# === Schedules: functions of progress, the fraction of the time budget used so far ===


def set_schedules(optimizers, progress, warmdown, final_frac, momentum):
    """Set rates, momentum, decay. Over the last `warmdown`, rates fall to `final_frac` * peak."""
    start, stop, frac = momentum
    adamw, muon, _ = optimizers  # the rate of Adagrad stays
    left = max(0.0, 1 - progress)
    fade = min(1.0, left / max(warmdown, 1e-9))
    for group in adamw.param_groups + muon.param_groups:
        group["lr"] = group["initial_lr"] * (final_frac + (1 - final_frac) * fade)
    for group in muon.param_groups:
        group["momentum"] = start + (stop - start) * min(1.0, progress / frac)
        group["weight_decay"] = group["initial_decay"] * left**2


# === Training ===


def activation_dtype(device):
    """bf16 on CUDA from sm_80 on, and on a CPU with bf16 instructions. Otherwise fp32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        cpu = torch.cpu.get_capabilities()
        has_bf16 = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.bfloat16 if has_bf16 else torch.float32


def split_batch(rows, max_rows):
    """(rows per forward, accumulation steps): at least `rows` in all, at most `max_rows` per forward."""
    accum = math.ceil(rows / max_rows)
    return math.ceil(rows / accum), accum


def train_step(loss_fn, model, optimizers, batches, accum):
    """One step, gradients accumulated over `accum` batches (inputs, targets, epoch). The mean loss."""
    total = 0.0
    for inputs, targets, _ in islice(batches, accum):
        loss = loss_fn(model, inputs, targets) / accum
        loss.backward()
        total = total + loss.detach()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def warm_up(loss_fn, model, build, rows, max_rows, compiled):
    """Compile and try the step on made-up batches, then undo it. Returns the split_batch() that fits.

    Each try gets new optimizers from build(). When out of memory, a forward gets half the rows. If a
    compiled step fails, the run goes on uncompiled.
    """
    before = copy.deepcopy(model.state_dict())
    vocab_size, T, device = model.config.vocab_size, model.config.sequence_len, model.lm_head.weight.device
    while True:
        micro, accum = split_batch(rows, max_rows)
        optimizers = build()
        try:
            # Two tensors, as in training, or it would recompile
            made_up = torch.arange(2 * micro * T, device=device).view(2, micro, T) % vocab_size
            for _ in range(2):  # the second step needs more memory: the optimizers have state
                train_step(loss_fn, model, optimizers, [(*made_up, 1)] * accum, accum)
            return micro, accum
        except Exception as error:
            if out_of_memory(error):
                if micro == 1:
                    raise
                max_rows = micro // 2
                print(f"out of memory with {micro} rows per forward; trying {max_rows}")
            elif compiled:
                compiled = False
                torch.compiler.set_stance("force_eager")
                print(f"the compiled step failed; trying it uncompiled: {error!r}")
            else:
                raise
        finally:
            model.load_state_dict(before)
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # forget all tries


def main():
    with Run() as run:
        # glibc must keep freed blocks: fetching them again took a third of an uncompiled step on a CPU
        if hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older glibc allow 32 MiB
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        torch.manual_seed(run.seed)
        torch.set_float32_matmul_precision("high")
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default; unset, Adagrad warns
        tokenizer, T, dtype = Tokenizer.from_directory(), run.data["seq_len"], activation_dtype(run.device)
        config = GPTConfig(
            sequence_len=T, vocab_size=tokenizer.get_vocab_size(), n_layer=DEPTH, n_embd=N_EMBD,
            head_dim=HEAD_DIM, mlp_ratio=MLP_RATIO,
            windows=layer_windows(WINDOW_PATTERN, DEPTH, SHORT_WINDOW, T),
            value_embed_every=VALUE_EMBED_EVERY, rope_base=ROPE_BASE, qk_gain=QK_GAIN, softcap=SOFTCAP,
            dtype=dtype, attention=attention_kernel(run.device, dtype), shift_keys=SHIFT_KEYS,
            ngrams=NGRAMS, recall=RECALL, context_rows=CONTEXT_ROWS,
        )
        model = GPT(config).to(run.device)
        build = partial(
            build_optimizers, model, MATRIX_LR, EMBED_LR, CONTEXT_LR, HEAD_LR, RESID_LR, X0_LR, ADAM_BETAS,
            (EMBED_DECAY, VALUE_DECAY, HEAD_DECAY, MATRIX_DECAY), COMPILE,
        )
        loss_fn = torch.compile(loss_of, dynamic=False) if COMPILE else loss_of
        num_params = sum(p.numel() for p in model.parameters())
        run.record |= dict(depth=DEPTH, num_params_M=num_params / 1e6,
                           flops_per_token=model.flops_per_token(),
                           attention=getattr(config.attention, "__name__", config.attention))
        print(f"{config}\n{num_params:,} parameters on {run.device}, {'' if COMPILE else 'not '}compiled")

        rows = max(1, round(TOTAL_BATCH / T))
        micro, accum = warm_up(loss_fn, model, build, rows, DEVICE_BATCH, COMPILE)
        print(f"a step: {accum} x {micro} rows of {T} tokens; training for {run.budget:.0f} s")

        optimizers = build()
        batches = make_dataloader(tokenizer, micro, T, "train")
        run.start()
        while (progress := run.progress()) < 1:
            set_schedules(optimizers, progress, WARMDOWN, FINAL_LR_FRAC, MOMENTUM)
            loss = train_step(loss_fn, model, optimizers, batches, accum)
            run.step(loss, accum * micro * T)
        run.score(model, tokenizer, micro)
    return run.record


if __name__ == "__main__":
    main()
