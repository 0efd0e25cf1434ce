"""
The player of autoresearch: a GPT trained with Muon and AdamW for five minutes on one device. The agent edits this file.

    uv run train.py > run.log 2>&1

It trains on the data prepared last and ends with the report of referee.py, whose first line is val_bpb, validation bits
per byte: lower is better. Sections, in the order used: constants, model, optimizer, schedules, training.
"""

import ctypes
import functools
import math
import os
import shutil
import sysconfig
import timeit
from dataclasses import asdict, dataclass
from itertools import cycle, islice, takewhile

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import SCALE, Tokenizer, TokenStore, cache_root, current_folder, make_dataloader, pack_rows
from referee import Run

# === Constants, read by main() alone. Edit a line, commit, run ========================================================

# Model
DEPTH = 8  # layers
N_EMBD = 768  # width, a multiple of HEAD_DIM; 8 x 768 beats 8 x 512 in public logs of H100 and B200
HEAD_DIM = 128  # of query, key and value; 64 is slower on a GPU
MLP_RATIO = 4  # hidden width of the MLP / N_EMBD
WINDOW_PATTERN = "SSSL"  # attention of the layers in turn, S short, L all of the past; the last layer is always L
SHORT_WINDOW = 256  # tokens before itself that a token of an S layer sees
VALUE_EMBED_EVERY = 3  # layers 0, 3, 6, .. and the last add a value embedding; 0: none
RECALL = ()  # lengths of n-grams, as (1, 2, 3): look up what followed them earlier in the row; not tried on a GPU
MEMORY = ()  # lengths of n-grams: look up what mostly follows them in the rest of the text; not tried on a GPU
MEMORY_SLOTS = 2**24  # n-grams of each length at most, 4 bytes each: 470 MB with seven lengths
TRAIN_ROWS = 2**14  # with MEMORY the model trains on so many rows: on those of the rest it would learn blind trust
ROPE_BASE = 10_000
QK_GAIN = 1.15  # fixed gain on normalised queries and keys
SHIFT_KEYS = False  # half of a key is that of the token before; not tried on a GPU
SOFTCAP = 15.0  # logits are capped to (-SOFTCAP, SOFTCAP) by tanh; 0: not at all

# Batch and speed
TOTAL_BATCH = 2**17  # tokens of an optimizer step, rounded to whole rows; 2**19 has too few steps
DEVICE_BATCH = 64  # rows of a forward at most: about 34 GB; halved by itself when out of memory
COMPILE = True  # torch.compile for the training step: a third more steps on two cores, for 20 to 120 s before the clock

# Optimizer: learning rates hold at width 768, those of AdamW's matrices scale with (N_EMBD / 768)^-0.5
MATRIX_LR = 0.04  # Muon
EMBED_LR = 0.8  # AdamW, token and value embeddings; good from 0.74 to 0.9
HEAD_LR = 0.008  # AdamW; good from 0.006 to 0.01
RESID_LR, X0_LR = 0.005, 0.5  # AdamW, per-layer scalars
ADAM_BETAS = (0.8, 0.95)
MATRIX_DECAY = 0.125  # cautious: only where update and weight agree in sign; fades as (1 - progress)^2
EMBED_DECAY, VALUE_DECAY, HEAD_DECAY = 0.0005, 0.004, 0.002  # decoupled
MOMENTUM = (0.85, 0.92, 0.05)  # of Muon: from, to, over this share of the run

# Schedule, by share of the time budget
WARMDOWN = 0.8  # the last part of the run, in which learning rates fall linearly
FINAL_LR = 0.04  # share of the learning rate left at the end; good from 0.03 to 0.05

if SCALE == "small":  # what differs on a CPU; "tried" are runs on two cores with rows of 256 or 512 tokens
    DEPTH = 2  # tried 3: +0.016
    N_EMBD = 128  # tried 192: +0.019
    HEAD_DIM = 64  # tried 128: equal
    RECALL = (1, 2, 3)  # tried none: far worse; 4 and 6 beside: little
    MEMORY = (2, 3, 4, 5, 6, 8, 12)  # tried none: +0.17; (2, 3, 4, 6): +0.025; 16 beside: equal
    MATRIX_LR, EMBED_LR, HEAD_LR = 0.02, 0.05, 0.002  # tried 0.04, 0.2, 0.008: +0.02; 0.01, 0.03, 0.001: +0.015
    ADAM_BETAS = (0.8, 0.99)  # tried (0.8, 0.95): worse
    SHIFT_KEYS = True  # tried False: +0.035
    WINDOW_PATTERN, SOFTCAP = "L", 0.0
    TOTAL_BATCH = 2**11  # tried 2**10: +0.044
    FINAL_LR = 0.0  # tried 0.04: +0.01

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
    attention: str  # see attention_kernel()
    shift_keys: bool = False
    recall: tuple = ()
    memory: tuple = ()
    memory_slots: int = 0

    def has_value_embed(self, layer):
        return self.value_embed_every > 0 and (layer % self.value_embed_every == 0 or layer == self.n_layer - 1)


def layer_windows(pattern, n_layer, short_window, sequence_len):
    """The window of every layer: `pattern` repeated, the last layer full."""
    if not pattern or set(pattern) - set("SL"):
        raise ValueError(f"WINDOW_PATTERN = {pattern!r} may hold the letters S and L only")
    widths = dict(S=min(short_window, sequence_len), L=sequence_len)
    return [widths[letter] for letter in islice(cycle(pattern), n_layer - 1)] + [sequence_len]


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


@functools.cache
def flash_attention_3():
    """FlashAttention-3, built for Hopper, from the hub; None, said once, where it cannot be had."""
    try:
        from kernels import get_kernel

        repo, revision = "varunneal/flash-attention-3", "de87b9b5af06dd9984df595bef90b2eba44b181a"
        return get_kernel(repo, revision=revision, trust_remote_code=[repo]).flash_attn_interface.flash_attn_func
    except Exception as error:  # no network, no build for this torch: many kinds of one thing
        print(f"no FlashAttention-3, torch's own kernel instead ({type(error).__name__}: {str(error)[:100]})")


def attention_kernel(device, dtype, sequence_len):
    """The fastest `kernel` of attend(): "fa3" on Hopper, if it can be had; "varlen", torch's flash kernel, for bf16 on
    CUDA from sm_80 on; "dense", which writes the scores down, (B, H, T, T), for short rows on a CPU; or "sdpa"."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return "fa3" if torch.cuda.get_device_capability() == (9, 0) and flash_attention_3() else "varlen"
    return "dense" if device.type == "cpu" and sequence_len <= 512 else "sdpa"


def attend(q, k, v, window, kernel):
    """Causal attention in which a token sees itself and `window` tokens before it: (B, T, H, D) -> (B, T, H, D)."""
    B, T, H, D = q.shape
    full = window >= T - 1
    if callable(kernel):  # FlashAttention-3
        return kernel(q, k, v, causal=True, window_size=(-1 if full else window, 0))
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
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(-window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


def rotary(sequence_len, head_dim, base):
    """Tables of cos and sin for positions 0 .. sequence_len - 1: (T, 1, D / 2) each."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(sequence_len, dtype=torch.float32), frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding (RoFormer), the two halves of a head being the pairs: x (B, T, H, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def ngram(idx, n, vocab_size):
    """A number for the last n tokens at each place, one to one while (vocab_size + 2)^n < 2^63: int64 (B, T)."""
    key, base = idx, (vocab_size + 1) | 1  # odd, so that no token is lost where the number overflows
    for i in range(1, n):
        key = key * base + F.pad(idx, (i, 0), value=vocab_size)[:, : idx.size(1)]
    return key


def recall(idx, n, vocab_size):
    """The token that followed the last earlier occurrence of the last n tokens, vocab_size if there is none: (B, T).

    What an induction head (arXiv 2209.11895) has to learn, looked up: a stable sort by n-gram puts that occurrence
    just before the present one. What followed it is the present token at the latest: nothing of the future.
    """
    key, order = ngram(idx, n, vocab_size).sort(dim=1, stable=True)
    found = F.pad(key[:, 1:] == key[:, :-1], (1, 0))
    follower = idx.roll(-1, 1).gather(1, F.pad(order[:, :-1], (1, 0)))
    return torch.empty_like(idx).scatter_(1, order, follower.where(found, vocab_size))


class Memory(nn.Module):
    """What mostly follows an n-gram in a text, and how surely: a hash table for each n of `orders`.

    It reads, in seconds, the text that training has no time for, as infini-gram does (arXiv 2401.17377). An entry is a
    check of the n-gram, a token and a count, which agreement raises and disagreement lowers until another takes the
    place (the majority vote of Boyer and Moore). For small vocabularies `follow` has log p(token) in rows, one for each
    token before it and for each of FREQUENT pairs: after two tokens `row[first * vocab_size + second]` is to be read.
    """

    COUNTS, PRIOR, FREQUENT, MIX = 8, 10, 2**14, -7046029254386353131  # 2^64 over the golden ratio, odd, as an int64

    def __init__(self, orders, slots, vocab_size):
        super().__init__()
        self.orders, self.vocab_size = orders, vocab_size
        self.register_buffer("table", torch.zeros(len(orders), slots, dtype=torch.int32))
        rows = vocab_size if orders and vocab_size <= 2**13 else 0  # 2**13: 0.9 GB; 2**16: 45 GB
        self.register_buffer("follow", torch.zeros(rows + min(self.FREQUENT, rows**2), rows, dtype=torch.bfloat16))
        self.register_buffer("row", torch.arange(rows).repeat(rows))

    def places(self, idx, n):
        """The slot and the check, from 1 up, of the n-gram that ends at each token of idx (B, T): (B, T) each."""
        mixed = ngram(idx, n, self.vocab_size) * self.MIX
        mixed = (mixed ^ (mixed >> 32)) * self.MIX
        checks = 2**31 // (self.COUNTS * self.vocab_size) - 1
        return (mixed >> 32) % self.table.size(1), (mixed >> 14) % checks + 1

    def learn(self, texts):
        """Read arrays of tokens, once; of several meetings with an n-gram in one of them one counts."""
        counts, V = torch.zeros_like(self.follow, dtype=torch.float32), self.vocab_size
        pairs = torch.zeros(len(counts[V:]), dtype=torch.int64, device=counts.device)
        for number, tokens in enumerate(texts):
            ids = torch.from_numpy(tokens.astype("int64")).to(self.table.device)
            if len(counts):
                counts.index_put_((self.row[ids[:-2] * V + ids[1:-1]], ids[2:]), counts.new_ones(()), accumulate=True)
                if number == 16:  # about 4M tokens tell which pairs are frequent
                    pairs = counts[:V].flatten().topk(len(pairs)).indices
                    self.row[pairs] = torch.arange(V, len(counts), device=pairs.device)
            for table, n in zip(self.table, self.orders, strict=True):
                slot, check = (x[0] for x in self.places(ids[None, :-1], n))
                old, entry = table[slot], ((check * V + ids[1:]) * self.COUNTS).int()
                count = old % self.COUNTS
                agreed = old + (count < self.COUNTS - 1)
                table.scatter_(0, slot, agreed.where(old - count == entry, (old - 1).where(count > 0, entry)))
        counts[:V] += self.PRIOR * (counts[:V].sum(0) + 1) / (counts[:V].sum() + V)  # what follows any token
        counts[V:] += self.PRIOR * (counts[:V] / counts[:V].sum(1, keepdim=True))[pairs % V]
        self.follow.copy_((counts / counts.sum(1, keepdim=True)).log())

    def read(self, idx):
        """(tokens, counts), (B, T) each, for each of `orders`; vocab_size and 0 where the n-gram is not known."""
        for table, n in zip(self.table, self.orders, strict=True):
            slot, check = self.places(idx, n)
            entry = table[slot].long()
            known = entry // (self.COUNTS * self.vocab_size) == check
            tokens, counts = entry // self.COUNTS % self.vocab_size, entry % self.COUNTS
            yield tokens.where(known, self.vocab_size), counts.where(known, 0)


class Linear(nn.Linear):
    """A linear map without bias, its fp32 weight cast to the dtype of the activations."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Lookups(nn.Module):
    """Recall and memory in a model: what they find is embedded, and gets a bonus in the logits."""

    def __init__(self, config):
        super().__init__()
        self.recalls, self.vocab_size, lookups = config.recall, config.vocab_size, len(config.recall + config.memory)
        self.memory = Memory(config.memory, config.memory_slots, config.vocab_size)
        sizes = [config.vocab_size + 1] * lookups + [Memory.COUNTS] * len(config.memory)
        self.register_buffer("first", torch.tensor([0, *sizes[:-1]]).cumsum(0), persistent=False)
        self.embeds = nn.EmbeddingBag(sum(sizes), config.n_embd, mode="sum")  # of tokens, then of counts
        self.gate = Linear(config.n_embd, lookups + 1)

    def forward(self, idx):
        """The tokens found, vocab_size where there is none: (B, T, lookups), and their embedding: (B, T, C)."""
        known = [*self.memory.read(idx)]
        found = [recall(idx, n, self.vocab_size) for n in self.recalls] + [tokens for tokens, _ in known]
        rows = torch.stack(found + [counts for _, counts in known], dim=-1) + self.first
        return torch.stack(found, dim=-1), self.embeds(rows.flatten(0, 1)).view(*idx.shape, -1)

    def add_bonus(self, logits, x, idx, found):
        """Logits (B, T, V) start from triples, and a token found is copied, as x (B, T, C) says (arXiv 1609.07843)."""
        gates = self.gate(x).float()
        if len(self.memory.follow):
            row = self.memory.row[F.pad(idx, (1, 0))[:, :-1] * self.vocab_size + idx]
            logits = logits + (1 + gates[..., -1:]) * self.memory.follow[row].float()
        return logits.scatter_add(-1, found % self.vocab_size, gates[..., :-1] * (found < self.vocab_size))


class Attention(nn.Module):
    GATE_CHANNELS = 32  # of the input, that gate the value embedding

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.window = config, config.windows[layer]
        self.kernel = flash_attention_3() if config.attention == "fa3" else config.attention
        self.c_qkv = nn.Parameter(torch.empty(3, config.n_embd, config.n_embd))  # queries, keys, values: one matmul
        self.c_proj = Linear(config.n_embd, config.n_embd)
        heads = config.n_embd // config.head_dim
        self.ve_gate = Linear(self.GATE_CHANNELS, heads) if config.has_value_embed(layer) else None

    def forward(self, x, value_embed, cos, sin):
        B, T, C = x.shape
        c = self.config
        q, k, v = F.linear(x, self.c_qkv.flatten(0, 1).to(x.dtype)).view(B, T, 3, -1, c.head_dim).unbind(2)
        if value_embed is not None:  # value residual, gated per head; the gate starts at 1
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.GATE_CHANNELS]))
            v = v + gate[..., None] * value_embed.view(B, T, -1, c.head_dim)
        q, k = (rotate(norm(x) * c.qk_gain, cos, sin) for x in (q, k))
        if c.shift_keys:  # the half that rotates slowly is that of the token before: induction in one layer
            fast, slow = k.unflatten(-1, (2, -1)).chunk(2, dim=-1)
            k = torch.cat((fast, F.pad(slow[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))), dim=-1).flatten(-2)
        return self.c_proj(attend(q, k, v, self.window, self.kernel).reshape(B, T, C))


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
        self.lookups = Lookups(config) if config.recall or config.memory else None
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))  # x = resid * x + x0 * embedding, before a layer
        self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1))
        tables = rotary(config.sequence_len, config.head_dim, config.rope_base)
        self.register_buffer("cos_sin", torch.stack(tables).to(config.dtype), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Token embeddings of unit size, a head near zero, projections into the residual stream and lookups zero."""
        bound = (3 / self.config.n_embd) ** 0.5
        self.wte.weight.normal_()
        self.lm_head.weight.normal_(std=0.001)
        for embed in self.value_embeds.values():
            embed.weight.uniform_(-bound, bound)
        for zero in self.lookups.parameters() if self.lookups else ():
            zero.zero_()
        for block in self.blocks:
            block.attn.c_qkv.uniform_(-bound, bound)
            block.mlp.c_fc.weight.uniform_(-bound, bound)
            for zero in filter(None, (block.attn.c_proj, block.mlp.c_proj, block.attn.ve_gate)):
                zero.weight.zero_()

    def forward(self, idx):
        c, T = self.config, idx.size(1)
        if T > c.sequence_len:
            raise ValueError(f"a row of {T} tokens is longer than sequence_len {c.sequence_len}")
        cos, sin = self.cos_sin[:, :T]
        x = self.wte(idx)
        if self.lookups:
            found, embedding = self.lookups(idx)
            x = x + embedding
        x = x0 = norm(x.to(c.dtype))
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].to(c.dtype) * x + self.x0_lambdas[i].to(c.dtype) * x0
            x = block(x, self.value_embeds[str(i)](idx).to(c.dtype) if c.has_value_embed(i) else None, cos, sin)
        x = norm(x)
        logits = self.lm_head(x).float()
        if self.lookups:
            logits = self.lookups.add_bonus(logits, x, idx, found)
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
POLAR_EXPRESS = [(8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061),
                 (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232)]  # fmt: skip


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
            lr = group["lr"] * max(1, weights.size(-2) / weights.size(-1)) ** 0.5
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
    tables, heads, lookups = [*model.value_embeds.parameters()], [model.lm_head.weight], model.lookups
    if lookups:
        tables, heads = [*tables, lookups.embeds.weight], [*heads, lookups.gate.weight]
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


def set_schedules(optimizers, progress, warmdown, final_lr, momentum):
    """Learning rates, over the last `warmdown` of the run linearly down to `final_lr` of them; momentum and decay."""
    start, stop, share = momentum
    adamw, muon = optimizers
    for group in adamw.param_groups + muon.param_groups:
        group["lr"] = group["initial_lr"] * (final_lr + (1 - final_lr) * min(1.0, max(0.0, 1 - progress) / warmdown))
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
    matrices = (torch.ones(1024, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    fp32, bf16 = (min(timeit.repeat(lambda x=x: x @ x.mT, number=1, repeat=10)) for x in matrices)
    return torch.bfloat16 if bf16 < 0.8 * fp32 else torch.float32


def can_compile(device):
    """Whether torch.compile has what it needs: on a CPU a C++ compiler and the headers of Python."""
    headers = os.path.join(sysconfig.get_path("include"), "Python.h")
    return device.type == "cuda" or (device.type == "cpu" and bool(shutil.which("g++")) and os.path.exists(headers))


def split_batch(rows, at_most):
    """(rows of a forward, forwards of a step) that make `rows` or a few more with forwards of `at_most` rows."""
    forwards = math.ceil(rows / at_most)
    return math.ceil(rows / forwards), forwards


def first_rows(tokenizer, B, T, rows):
    """Training batches for ever, of the first `rows` rows again and again; None: of all."""
    while True:
        yield from islice(make_dataloader(tokenizer, B, T, "train"), rows and max(1, rows // B))


def tokens_after(rows, T, at_once=2**18):
    """The text behind the last of the first `rows` rows, in arrays of `at_once` tokens and the first of the next."""
    store = TokenStore(current_folder() / "train")
    rest = store.tokens[max(stop for row in islice(pack_rows(store.batches(), T + 1), rows) for _, stop in row) :]
    return (rest[start : start + at_once + 1] for start in range(0, len(rest) - 1, at_once))


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
    while True:
        micro, forwards = split_batch(rows, at_most)
        try:
            with torch.random.fork_rng():
                made_up = torch.randint(model.config.vocab_size, (2, micro, model.config.sequence_len), device=device)
                for _ in range(2):  # inputs and targets are two tensors, as in training, or that would compile anew
                    train_step(loss_fn, model, optimizers, iter([(*made_up, 1)] * forwards), forwards)
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


@torch.no_grad()
def sample(model, idx, count, temperature=0.8):
    """Continue the rows of idx (B, t) by `count` tokens; forwards are of whole rows, as in training."""
    for _ in range(count):
        logits = model(F.pad(idx, (0, model.config.sequence_len - idx.size(1))))[:, idx.size(1) - 1]
        idx = torch.cat((idx, torch.multinomial((logits / temperature).softmax(-1), 1)), dim=1)
    return idx


def main():
    with Run(globals()) as run:
        if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # of glibc: to fetch freed blocks anew took a third of a step
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD; for a CPU, where the step is not compiled
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        torch.manual_seed(run.seed)
        torch.set_float32_matmul_precision("high")
        compiled = COMPILE and can_compile(run.device)
        tokenizer, T, dtype = Tokenizer.from_directory(), run.data["seq_len"], fast_dtype(run.device)
        config = GPTConfig(
            sequence_len=T, vocab_size=tokenizer.get_vocab_size(), n_layer=DEPTH, n_embd=N_EMBD, head_dim=HEAD_DIM,
            mlp_ratio=MLP_RATIO, windows=layer_windows(WINDOW_PATTERN, DEPTH, SHORT_WINDOW, T),
            value_embed_every=VALUE_EMBED_EVERY, rope_base=ROPE_BASE, qk_gain=QK_GAIN, softcap=SOFTCAP,
            dtype=dtype, attention=attention_kernel(run.device, dtype, T), shift_keys=SHIFT_KEYS, recall=RECALL,
            memory=MEMORY, memory_slots=min(MEMORY_SLOTS, 2 ** run.data["train_tokens"].bit_length()),
        )
        model = GPT(config).to(run.device)
        decay = (EMBED_DECAY, VALUE_DECAY, HEAD_DECAY, MATRIX_DECAY)
        optimizers = build_optimizers(model, MATRIX_LR, EMBED_LR, HEAD_LR, RESID_LR, X0_LR, ADAM_BETAS, decay, compiled)
        loss_fn = torch.compile(loss_of, dynamic=False) if compiled else loss_of
        num_params, flops = sum(p.numel() for p in model.parameters()), model.flops_per_token()
        run.note(depth=DEPTH, num_params=num_params, attention=config.attention, flops_per_token=flops)
        print(f"{config}\n{num_params:,} parameters on {run.device}, {'' if compiled else 'not '}compiled")

        micro, forwards = warm_up(loss_fn, model, optimizers, max(1, round(TOTAL_BATCH / T)), DEVICE_BATCH, run.device)
        run.note(rows=micro, forwards=forwards, shape=str(config))
        print(f"a step: {forwards} x {micro} rows of {T} tokens; training for {run.budget:.0f} s")

        batches = first_rows(tokenizer, micro, T, TRAIN_ROWS if MEMORY else None)
        run.start()
        if MEMORY:  # of a short run a fifth at most, for it has to train, too
            model.lookups.memory.learn(takewhile(lambda _: run.progress() < 0.2, tokens_after(TRAIN_ROWS, T)))
        while (progress := run.progress()) < 1:
            set_schedules(optimizers, progress, WARMDOWN, FINAL_LR, MOMENTUM)
            loss = train_step(loss_fn, model, optimizers, batches, forwards)
            run.step(loss, forwards * micro * T)
        run.score(model, tokenizer, micro)
        torch.save(dict(config=asdict(config), weights=model.state_dict()), cache_root() / "model.pt")
        for ids in sample(model, torch.full((2, 1), tokenizer.get_bos_token_id(), device=run.device), 80).tolist():
            print("it writes:", *tokenizer.decode(ids[1:]).splitlines(), sep="\n    ")
    return run.record


if __name__ == "__main__":
    main()
