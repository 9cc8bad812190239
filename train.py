"""train: superposition appears in a toy model, and a gated block takes it apart.

    python train.py                    the three published settings: tables, pictures (a minute)
    python train.py sweep ablations    how often it works, and what it needs (long)
    python train.py limits             what it cannot do (long)
    python train.py --help

The toy is one attention block with fewer heads than there are skip trigrams, trained on next-token
cross-entropy. The gated block then learns to reproduce the toy's `attn_out` under the L0.6 penalty.
All maths of the method is in `gatedref.py`; here are a faster form of it for tokens without
positions, the recipe of training, the experiments, and what they print and draw.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial, reduce
from importlib import metadata
from pathlib import Path
from unittest import mock

# For this process and its workers: one BLAS thread each, since several train at once (and other
# thread counts may sum in other orders), and glibc keeps the memory it has instead of handing it
# back at every step, which costs more than the arithmetic.
os.environ.update({f"{blas}_NUM_THREADS": "1" for blas in ("OPENBLAS", "OMP", "MKL")})
os.environ.update({"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)})
os.environ.update({"MALLOC_TOP_PAD_": str(2**26)})

import autograd.numpy as anp
import numpy as np
from autograd import grad_and_aux
from autograd.extend import defvjp, primitive
from autograd.misc.optimizers import adam
from autograd.tracer import getval

import gatedref

# ------------------------------------------------------------------------------------------------
# The fast form. Without positions, one-hot tokens see their context through its token counts alone:
# what a block puts out is a function of the row (query token, counts of the tokens up to it), and
# the gate one of (query token, key token). Rows are kept by query token, as `counts` [V, rows, V];
# N blocks are computed at once, their parameters stacked along a first axis.


def tabulate(tokens, n_tokens, causal=False):
    """Sequences as weighted rows: `counts` [V, R, V] and `weight` [V, R], the distinct rows of each
    query token and how often each occurs, padded by rows of weight 0; and `pairs` [V, V], how often
    a query and a key are these two tokens, over the pairs that the penalty's mean is over."""
    rows = _rows(tokens, n_tokens)
    found = [np.unique(rows[tokens == t], axis=0, return_counts=True) for t in range(n_tokens)]
    size = max(len(distinct) for distinct, _ in found)
    counts = np.repeat(np.eye(n_tokens)[:, None], size, axis=1)
    weight = np.zeros((n_tokens, size))
    for token, (distinct, times) in enumerate(found):
        counts[token, : len(distinct)] = distinct
        weight[token, : len(distinct)] = times / tokens.size
    return {"counts": counts, "weight": weight, "pairs": _pairs(tokens, rows, causal)}


def _rows(tokens, n_tokens):
    return np.cumsum(np.eye(n_tokens, dtype=np.int16)[tokens], axis=1, dtype=np.int16)  # [S, T, V]


def _pairs(tokens, rows, causal):
    seen = rows if causal else np.broadcast_to(rows[:, -1:], rows.shape)  # [S, T, V]
    n_tokens = rows.shape[2]
    pairs = np.stack([seen[tokens == token].sum(axis=0) for token in range(n_tokens)])
    return pairs / pairs.sum()


def fast_attention(block, counts, gate=1.0):
    """`gatedref.attention`'s `attn_out` on rows, and the way back through it.

    block: parameters [N, H, ...]. counts: [V, R, V]. gate: [N, H, query token, key token], or 1.
    Returns `attn_out` [N, V * R, D], and a function that turns d loss / d attn_out into a dict of
    gradients for the block, and d loss / d gate.
    """
    q, k, v = (block["W_" + n] + block["b_" + n][:, :, None] for n in "QKV")  # [N, H, V, K]
    n_blocks, n_heads, n_tokens, d_head = v.shape
    scores = q @ np.swapaxes(k, 2, 3) / d_head**0.5  # [N, H, query token, key token]
    gate = np.broadcast_to(gate, scores.shape)[..., None]
    values = gate * v[:, :, None]  # [N, H, query token, key token, K]
    # One maximum for all rows of a query token serves while no token that it leaves underflows.
    spread = (scores.max(axis=3) - scores.min(axis=3)).max()
    average = _average_by_table if spread < 600 else _average_by_row
    z, back = average(scores, values, counts)  # [V, R, N, H, K]
    z = np.swapaxes(z.reshape(-1, n_blocks, n_heads * d_head), 0, 1)  # [N, V R, H K]
    W_O = block["W_O"].reshape(n_blocks, n_heads * d_head, -1)

    def backward(d_out):
        d_z = np.swapaxes(d_out @ np.swapaxes(W_O, 1, 2), 0, 1)
        d_scores, d_values = back(d_z.reshape(n_tokens, -1, n_blocks, n_heads, d_head))
        d_scores = d_scores / d_head**0.5
        grads = {"W_Q": d_scores @ k, "W_K": np.swapaxes(d_scores, 2, 3) @ q}
        grads["W_V"] = (d_values * gate).sum(axis=2)
        grads |= {"b" + name[1:]: grad.sum(axis=2) for name, grad in grads.items()}
        grads["W_O"] = (np.swapaxes(z, 1, 2) @ d_out).reshape(block["W_O"].shape)
        return grads, _inner(d_values, v[:, :, None])

    return z @ W_O, backward


def _average_by_table(scores, values, counts):
    """Softmax-weighted mean of the values: two products of the counts with tables over tokens."""
    n_blocks, n_heads, n_tokens, _, d_head = values.shape
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    weighted = weights[..., None] * values
    by_token = (n_tokens, n_tokens, -1)
    inverse = 1 / (counts @ np.moveaxis(weights, (2, 3), (0, 1)).reshape(by_token))
    inverse = inverse.reshape(n_tokens, -1, n_blocks, n_heads, 1)
    z = counts @ np.moveaxis(weighted, (2, 3), (0, 1)).reshape(by_token)
    z = z.reshape(n_tokens, -1, n_blocks, n_heads, d_head) * inverse

    def back(d_z):
        d_sum = d_z * inverse
        d_total = -_inner(d_sum, z)

        def to_tables(d, *last):
            d = np.swapaxes(counts, 1, 2) @ d.reshape(n_tokens, d.shape[1], -1)
            d = d.reshape(n_tokens, n_tokens, n_blocks, n_heads, *last)
            return np.moveaxis(d, (0, 1), (2, 3))

        d_weighted = to_tables(d_sum, d_head)
        d_weights = to_tables(d_total) + _inner(d_weighted, values)
        return weights * d_weights, weights[..., None] * d_weighted

    return z, back


def _inner(a, b):
    """Sum of products over the last axis, without their array."""
    return np.einsum("...k,...k->...", a, b)


def _average_by_row(scores, values, counts):
    """The same with each row's own maximum, over the tokens that it has: slow, for any scores."""
    seen = np.where(counts > 0, scores[:, :, :, None], -np.inf)  # [N, H, query token, R, key token]
    weights = counts * np.exp(seen - seen.max(axis=-1, keepdims=True))
    pattern = weights / weights.sum(axis=-1, keepdims=True)

    def back(d_z):
        d_z = np.moveaxis(d_z, (2, 3), (0, 1))
        d_pattern = d_z @ np.swapaxes(values, 3, 4)
        d_scores = pattern * (d_pattern - (pattern * d_pattern).sum(axis=-1, keepdims=True))
        return d_scores.sum(axis=3), np.swapaxes(pattern, 3, 4) @ d_z

    return np.moveaxis(pattern @ values, (0, 1), (2, 3)), back


def fast_loss_and_grad(
    params, rows, target, alpha, *, activation="clamp", value_scale=None, p=0.6, reopen=False
):
    """`gatedref.loss_and_grad` on rows, for N gated blocks at once.

    params: arrays [N, H, ...]. rows: what `tabulate` returns. target: [V, R, D].
    reopen: True to let the gradient through gates that are stuck. A gate score below 0 or above 1
    has no gradient, so such a gate never comes back; with `reopen` it gets the gradient that it
    would have at 0 or 1 where that points back inside. The loss stays what it is.
    Returns a dict of `mse`, `penalty` and `loss` [N], and the gradients, keyed like `params`.
    """
    gate_q, gate_k = (params["W_gate_" + n] + params["b_gate_" + n][:, :, None] for n in "QK")
    scores = gate_q @ np.swapaxes(gate_k, 2, 3)  # [N, H, query token, key token]
    gate = gatedref.ACTIVATIONS[activation](scores)
    block = {**params, **gatedref.normalised(params, value_scale)}
    attn_out, backward = fast_attention(block, rows["counts"], gate)
    error = attn_out - target.reshape(-1, target.shape[-1])
    d_out = error * (rows["weight"].reshape(-1, 1) * 2 / target.shape[-1])
    mse = (error * d_out).sum(axis=(1, 2)) / 2
    grads, d_gate = backward(d_out)

    shut = gate == 0
    powered = (gate + shut) ** p * ~shut
    total = powered.sum(axis=1, keepdims=True)  # [N, 1, query token, key token]
    norm = total ** (1 / p)
    penalty = (rows["pairs"] * norm).sum(axis=(1, 2, 3))
    d_norm = alpha * rows["pairs"] * norm / (total + (total == 0))
    d_gate = d_gate + d_norm * powered / (gate + shut)

    inside = {"relu": scores > 0, "tanh": (scores > 0) * (1 - gate * gate)}
    d_scores = d_gate * inside.get(activation, (scores >= 0) & (scores <= 1))
    if reopen:
        above = (scores > 1) & (d_gate > 0) & (activation in ("clamp", "binary"))
        d_scores = d_scores + d_gate * (above | (scores < 0) & (d_gate < 0))
    grads["W_gate_Q"], grads["W_gate_K"] = d_scores @ gate_k, np.swapaxes(d_scores, 2, 3) @ gate_q
    grads |= {"b" + name[1:]: grads[name].sum(axis=2) for name in ("W_gate_Q", "W_gate_K")}

    grads["W_O"] = _unit_back(params["W_O"], grads["W_O"], axis=-1)
    if value_scale is None:
        grads["W_V"] = _unit_back(params["W_V"], grads["W_V"], axis=-2)
    else:
        joined = (_with_bias(a) for a in (params, grads))
        d_joined = value_scale * _unit_back(*joined, axis=-2)
        grads["W_V"], grads["b_V"] = d_joined[..., :-1, :], d_joined[..., -1, :]
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}, grads


def _with_bias(arrays):
    return np.concatenate([arrays["W_V"], arrays["b_V"][..., None, :]], axis=-2)


def _unit_back(W, d_unit, axis):
    """d loss / d W, from that by W / max(norm of W, 1e-12)."""
    squares = (W * W).sum(axis=axis, keepdims=True)
    norm, free = np.sqrt(np.maximum(squares, 1e-24)), squares > 1e-24
    return (d_unit - free * W * ((W * d_unit).sum(axis=axis, keepdims=True) / norm**2)) / norm


# ------------------------------------------------------------------------------------------------
# Training. alpha is in units of the target's variance: loss / variance = FVU + alpha * penalty,
# whatever the toy. N starts run side by side, and the one with the lowest loss is kept.

RECIPE = {
    "heads": 3,  # gated heads, as a multiple of the toy's
    "d_head": 4,
    "d_gate": 2,
    "p": 0.6,
    "activation": "clamp",
    "value_scale": 2.0,  # times the largest entry of the target; None: the published value bias
    "causal": False,
    "copies": None,  # start from copies of the toy's heads, with noise of this standard deviation
    # The search, from all starts at once: no alpha until the first of `until`, then one that falls
    # geometrically until the second. `reopen`: gates that are stuck get a gradient.
    "starts": 12,
    "steps": 1400,
    "rate": 0.01,
    "alpha": (20.0, 3.0),
    "until": (0.14, 0.84),
    "reopen": True,
    # The finish, with larger batches and a weak alpha, of the one start whose loss is lowest when
    # its penalty counts `choose` times: at the search's last alpha heads that share may cost less.
    "choose": 8.0,
    "finish_steps": 1500,
    "finish_rate": 0.003,
    "finish_alpha": 0.25,
}
TOY = {"starts": 4, "steps": 10000, "rate": 0.03}
QUICK, QUICK_TOY = {"starts": 2, "steps": 40, "finish_steps": 20}, {"starts": 2, "steps": 40}
SETTINGS = {"2H3T": (2, 3), "3H4T": (3, 4), "4H5T": (4, 5)}
WIDE = {"8H10T": (8, 10)}  # with twice the heads: 16 are as many as `gatedref.holders` takes


def shortened(recipe, quick):
    return {**recipe, **(QUICK if quick else {})}


def stream(*numbers):
    """A seed of its own for everything that is random, from the run's seed and what it is for."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def sample_contexts(n_trigrams, n_sequences, seed, causal=False):
    """Rows to train on, by query token: their counts [V, R, V] and the token that comes next [V, R]
    (-1 after the last position), of which the first `n_rows` [V] are real; and `pairs`."""
    n_tokens = 2 * n_trigrams + 2
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, n_sequences, seed=seed)
    rows = _rows(tokens, n_tokens)
    after = np.concatenate([tokens[:, 1:], np.full((len(tokens), 1), -1)], axis=1)
    n_rows = np.bincount(tokens.ravel(), minlength=n_tokens)
    contexts = {"n_rows": n_rows, "pairs": _pairs(tokens, rows, causal)}
    contexts["counts"] = np.zeros((n_tokens, n_rows.max(), n_tokens))
    contexts["after"] = np.zeros((n_tokens, n_rows.max()), dtype=int)
    for token, n in enumerate(n_rows):
        contexts["counts"][token, :n] = rows[tokens == token]
        contexts["after"][token, :n] = after[tokens == token]
    return contexts


def draw(contexts, size, rng):
    """A batch, as `tabulate` returns it: the same number of rows for each query token, weighted."""
    n_rows = contexts["n_rows"][:, None]
    picks = np.arange(len(n_rows))[:, None], rng.integers(n_rows, size=(len(n_rows), size))
    weight = np.broadcast_to(n_rows / n_rows.sum() / size, (len(n_rows), size))
    batch = {name: contexts[name][picks] for name in ("counts", "after")}
    return {**batch, "weight": weight, "pairs": contexts["pairs"]}


def descend(gradient, params, n_steps, rate):
    """Adam, in three legs of shrinking steps, each of which starts its averages anew.
    gradient(params, step) -> a dict like params."""
    names, shapes = list(params), [array.shape for array in params.values()]
    ends = np.cumsum([array[0].size for array in params.values()])[:-1]

    def joined(arrays):  # one array [N, all parameters]: autograd's adam is slow on dicts
        return np.concatenate([arrays[n].reshape(len(arrays[n]), -1) for n in names], axis=1)

    def parted(flat):
        parts = np.split(flat, ends, axis=1)
        return {n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes)}

    def downhill(flat, _):
        return joined(gradient(parted(flat), next(steps)))

    steps, flat = itertools.count(), joined(params)
    for share, shrink in ((0.6, 1), (0.25, 0.3), (0.15, 0.1)):
        leg = round(share * n_steps)
        with np.errstate(over="ignore", invalid="ignore"):  # _watch tells of a run that diverges
            flat = adam(downhill, flat, None, leg, rate * shrink)
    return parted(flat)


def stacked(blocks):
    return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}


def part_of(params, i):
    return {name: array[i] for name, array in params.items()}


def cross_entropy(params, batch):
    """Toy models' next-token loss [N] on a batch, over all positions but the last; gradients."""
    n_tokens, size, _ = batch["counts"].shape
    attn_out, backward = fast_attention(params, batch["counts"])
    logits = attn_out + np.repeat(np.eye(n_tokens), size, axis=0)
    logits -= reduce(np.maximum, np.moveaxis(logits, -1, 0))[..., None]  # faster than max(axis=-1)
    likely = np.exp(logits)
    total = likely.sum(axis=-1)
    after = batch["after"].ravel()
    weight = batch["weight"].ravel() * (after >= 0)
    weight = weight / weight.sum()
    rows = np.arange(len(after))
    losses = (np.log(total) - logits[:, rows, after]) @ weight
    d_logits = likely * (weight / total)[..., None]
    d_logits[:, rows, after] -= weight
    return losses, backward(d_logits)[0]


def train_toy(n_heads, n_trigrams, seed, starts, steps, rate, note=None):
    """A toy model's parameters: the one with the lowest cross-entropy of all starts."""
    contexts = sample_contexts(n_trigrams, 5000, stream(seed, 1))
    rng = np.random.default_rng(stream(seed, 2))
    sizes = (n_heads, 2 * n_trigrams + 2, 1)
    params = stacked([gatedref.init_params(*sizes, stream(seed, 3, i)) for i in range(starts)])

    def evaluate(params, size, alpha, reopen):
        losses, grads = cross_entropy(params, draw(contexts, size, rng))
        return {"loss": losses}, grads

    params, _ = learn(params, evaluate, steps, rate, 60, note=note)
    return part_of(params, np.argmin(evaluate(params, 1000, 0.0, False)[0]["loss"]))


def alpha_at(recipe, progress):
    """The search's alpha: none, then a strong one that falls geometrically, then its end."""
    first, last = recipe["alpha"]
    free, fallen = recipe["until"]
    if progress < free:
        return 0.0
    return first * (last / first) ** min(1, (progress - free) / (fallen - free))


def learn(params, evaluate, steps, rate, size, alpha=lambda u: 0.0, reopen=False, note=None):
    """Trains N models at once. evaluate(params, size, alpha, reopen) -> a dict of scalars [N] on a
    batch of that size, one of them `loss`, and gradients. alpha: of the progress, from 0 to 1.
    Returns the parameters, and the curves [step, (the scalars, alpha), N]."""
    curves = []

    def gradient(params, step):
        now = alpha(step / steps)
        scalars, grads = evaluate(params, size, now, reopen)
        curves.append([*scalars.values(), 0 * scalars["loss"] + now])
        _watch(note, step, steps, {**scalars, "alpha": now})
        return grads

    return descend(gradient, params, steps, rate), np.array(curves)


def take_apart(starts, evaluate, recipe, note=None):
    """Gated blocks: the search from all starts at once, then the finish of the one with the lowest
    loss, alpha being `choose`; of all, where `choose` is None. Returns what `learn` does."""
    search = recipe["steps"], recipe["rate"], 40, partial(alpha_at, recipe), recipe["reopen"]
    params, curves = learn(stacked(starts), evaluate, *search, portion(note, 0, 2))
    if recipe["choose"] is not None:
        best = [np.argmin(evaluate(params, 1000, recipe["choose"], False)[0]["loss"])]
        params, curves = part_of(params, best), curves[:, :, best]
    if recipe["finish_steps"]:
        finish = recipe["finish_steps"], recipe["finish_rate"], 60
        weak = {"alpha": lambda u: recipe["finish_alpha"], "note": portion(note, 1, 2)}
        params, more = learn(params, evaluate, *finish, **weak)
        curves = np.concatenate([curves, more])
    return params, curves


def variance_of(target, weight):
    """The mean square of what the target, [..., D], has beside its weighted mean."""
    weight = weight[..., None]
    axes = tuple(range(target.ndim - 1))
    deviation = target - (weight * target).sum(axis=axes)
    return (weight * deviation**2).sum() / target.shape[-1]


def train_gated(toy, n_trigrams, seed, recipe, note=None):
    """A gated block that reproduces a toy block.

    Returns its parameters, the options of `gatedref.gated_attention` that it was trained with, the
    last alpha (absolute), and its training curves [step, (error, penalty, loss, alpha)], where
    error, loss and alpha are in units of the target's variance.
    """
    n_tokens = 2 * n_trigrams + 2
    contexts = sample_contexts(n_trigrams, 5000, stream(seed, 4), recipe["causal"])
    rng = np.random.default_rng(stream(seed, 5))
    teacher = stacked([toy])

    def batch_and_target(size):
        batch = draw(contexts, size, rng)
        target, _ = fast_attention(teacher, batch["counts"])
        return batch, target.reshape(n_tokens, size, n_tokens)

    def evaluate(params, size, alpha, reopen):
        inputs = params, *batch_and_target(size), alpha * variance
        scalars, grads = fast_loss_and_grad(*inputs, **options, p=recipe["p"], reopen=reopen)
        return {**scalars, **{name: scalars[name] / variance for name in ("mse", "loss")}}, grads

    batch, target = batch_and_target(500)
    variance = variance_of(target, batch["weight"])
    scale = recipe["value_scale"] and float(recipe["value_scale"] * abs(target).max())
    options = {"activation": recipe["activation"], "value_scale": scale}
    sizes = (recipe["heads"] * len(toy["W_Q"]), n_tokens, recipe["d_head"])
    starts = [
        gatedref.init_params(*sizes, stream(seed, 6, i), recipe["d_gate"])
        for i in range(recipe["starts"])
    ]
    if recipe["copies"] is not None:
        starts = [_copies(toy, start, recipe["copies"], rng) for start in starts]
    params, curves = take_apart(starts, evaluate, recipe, note)
    curves = curves[:, :, 0]
    return part_of(params, 0), options, float(curves[-1, -1] * variance), curves


def _copies(toy, start, noise, rng):
    """The toy's heads, over and over, in the first dimension of each head, and noise on all."""
    block = {name: noise * rng.normal(size=start[name].shape) for name in gatedref.BLOCK}
    for head in range(len(start["W_Q"])):
        for name, array in block.items():
            original = toy[name][head % len(toy[name])]
            array[head][tuple(slice(size) for size in original.shape)] += original
    return {**start, **block}


def _watch(note, step, steps, scalars):
    """Stops a run that diverges, and tells how far a run has come."""
    if not np.isfinite(scalars["loss"]).all():
        told = f"the loss became {scalars['loss'].max()}"
        raise FloatingPointError(f"{told} at step {step} of {steps}")
    if note and step % max(1, steps // 100) == 0:
        means = {name: float(np.mean(value)) for name, value in scalars.items()}
        note({"done": step / steps, "step": step, **means})


def portion(note, number, parts):
    """What tells how far the whole has come, for one of its parts."""
    return note and (lambda told: note({**told, "done": (number + told["done"]) / parts}))


# ------------------------------------------------------------------------------------------------
# What a model does, measured with the reference itself


def forward(layers, tokens, **options):
    """A model's logits, and each head's output [B, T, H, V], those of all layers together."""
    model = gatedref.transformer(layers, tokens, **options)
    return model["logits"], np.concatenate([b["result"] for b in model["blocks"]], axis=2)


def measure(run, n_trigrams, seed, n_sequences):
    """Of a model, for each trigram: accuracy, the holding sets, and each head's mean output on the
    answer [H, n]. run(tokens) -> what `forward` returns. On sequences with just one completed
    trigram; where its B is last that counts for holding alone. Holding is judged on 1,000
    sequences a trigram, if there are; for 16 heads, which form 65,536 sets, on 256."""
    tokens, completes = gatedref.sample_skip_trigrams(n_trigrams, n_sequences, seed=seed)
    tokens, completes = (a[completes.sum(axis=1) == 1] for a in (tokens, completes))
    sequence, position = np.nonzero(completes)
    answers = tokens[sequence, position] + n_trigrams
    logits, result = [], []
    for part in np.array_split(np.arange(len(tokens)), math.ceil(len(tokens) / 500)):
        here = np.arange(len(part)), position[part]
        for found, array in zip((logits, result), run(tokens[part])):
            found.append(array[here])
    right = np.concatenate(logits).argmax(axis=-1) == answers
    result = np.concatenate(result)
    accuracy, holding, outputs = [], [], []
    for answer in range(n_trigrams + 1, 2 * n_trigrams + 1):
        mine = np.flatnonzero(answers == answer)
        accuracy.append(float(right[mine][position[mine] < tokens.shape[1] - 1].mean()))
        few = mine[: min(1000, 2**24 // 2 ** result.shape[1])]
        held = gatedref.holders(result[few], answers[few])
        holding.append([list(heads) for heads in held])
        outputs.append(result[mine, :, answer].mean(axis=0))
    return accuracy, holding, np.array(outputs).T


def unexplained(toy, gated, n_trigrams, seed, n_sequences, **options):
    """FVU, the fraction of the toy's output variance that the gated block leaves unexplained; and
    the L0.6 penalty, over all pairs whatever it was trained with. Both on fresh sequences."""
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, n_sequences, seed=seed)
    errors, targets, penalties = [], [], []
    for part in np.array_split(tokens, math.ceil(n_sequences / 500)):
        targets.append(gatedref.transformer([toy], part)["blocks"][0]["attn_out"])
        block = gatedref.transformer([gated], part, **options)["blocks"][0]
        errors.append(((block["attn_out"] - targets[-1]) ** 2).sum())
        penalties.append(gatedref.lp_penalty(block["gate"]) * len(part))
    targets = np.concatenate(targets)
    deviations = ((targets - targets.mean(axis=(0, 1))) ** 2).sum()
    return float(sum(errors) / deviations), float(sum(penalties) / n_sequences)


def is_distributed(accuracy, holding):
    return accuracy > 0.99 and not any(len(heads) == 1 for heads in holding)


def is_superposition(run):
    """Whether the toy has every trigram right, and one at least distributed over its heads."""
    distributed = map(is_distributed, run["accuracy_toy"], run["holders_toy"])
    return bool(min(run["accuracy_toy"]) > 0.99 and any(distributed))


def is_taken_apart(run):
    """Every trigram right and held by just one head, and no head holding two."""
    single = [held[0][0] for held in run["holders_gated"] if len(held) == 1 and len(held[0]) == 1]
    one_each = len(single) == len(set(single)) == run["n_trigrams"]
    return bool(is_superposition(run) and min(run["accuracy_gated"]) > 0.99 and one_each)


def is_success(run):
    return is_taken_apart(run) and run["fvu"] <= 0.01


def run_setting(job, note=None):
    """A toy model, and a gated block for each variant of the recipe. Returns for each the run, as
    results.json tells it, and the rest."""
    began = time.perf_counter()
    n_heads, n_trigrams, seed = job["n_heads"], job["n_trigrams"], job["seed"]
    n_sequences, parts = 2000 if job["quick"] else 20000, 1 + len(job["variants"])
    toy_recipe = {**TOY, **(QUICK_TOY if job["quick"] else {})}
    for redraws in range(1 if job["quick"] else 10):
        toy_seed = stream(seed, n_heads, n_trigrams, redraws)
        toy = train_toy(n_heads, n_trigrams, toy_seed, **toy_recipe, note=portion(note, 0, parts))
        inputs = partial(forward, [toy]), n_trigrams, stream(seed, 7), n_sequences
        accuracy, holding, toy_outputs = measure(*inputs)
        if is_superposition({"accuracy_toy": accuracy, "holders_toy": holding}):
            break
    toy_seconds = time.perf_counter() - began
    results = []
    for number, (variant, changes) in enumerate(job["variants"].items(), 1):
        began = time.perf_counter()
        recipe = {**shortened(RECIPE, job["quick"]), **changes}
        gated_seed = stream(seed, n_heads, n_trigrams, 8)
        inputs = toy, n_trigrams, gated_seed, recipe, portion(note, number, parts)
        gated, options, alpha, curves = train_gated(*inputs)
        model = partial(forward, [gated], **options)
        after = measure(model, n_trigrams, stream(seed, 9), n_sequences)
        fresh = stream(seed, 10), n_sequences // 2
        fvu, penalty = unexplained(toy, gated, n_trigrams, *fresh, **options)
        run = {
            "key": job["key"],
            "variant": variant,
            "seed": seed,
            "redraws": redraws,
            "n_heads": n_heads,
            "n_trigrams": n_trigrams,
            "n_gated_heads": len(gated["W_Q"]),
            "alpha": alpha,
            "steps": recipe["steps"] + recipe["finish_steps"],
            "starts": recipe["starts"],
            "accuracy_toy": accuracy,
            "accuracy_gated": after[0],
            "holders_toy": holding,
            "holders_gated": after[1],
            "fvu": fvu,
            "penalty": penalty,
        }
        run["success"] = is_success(run)
        run["seconds"] = toy_seconds + time.perf_counter() - began
        scale = options["value_scale"]
        params = {"toy": toy, "gated": {**gated, **({"value_scale": scale} if scale else {})}}
        rest = {"params": params, "outputs": (toy_outputs, after[2]), "curves": curves}
        results.append((run, rest))
    return results


# ------------------------------------------------------------------------------------------------
# Experiments. Each returns its rows for results.json, and whatever its pictures need beside them.


def make_job(key, seed, variants=None, quick=False):
    n_heads, n_trigrams = (SETTINGS | WIDE)[key]
    sizes = {"key": key, "n_heads": n_heads, "n_trigrams": n_trigrams}
    what = {"run": run_setting, "variants": variants or {"default": {}}}
    return {**sizes, **what, "seed": seed, "quick": quick}


def experiment_main(arguments):
    keys = sorted(SETTINGS, reverse=True)  # the longest first: the cores are then done together
    variants = {name: VARIANTS[name] for name in ["published objective"] if arguments.published}
    jobs = [make_job(key, arguments.seed, variants, arguments.quick) for key in keys]
    results = sorted(run_all(jobs), key=lambda result: result[0]["key"])
    runs = [run for run, _ in results]
    for run in runs:
        describe(run)
    params = {
        f"{run['key']}/{block}/{name}": array
        for run, rest in results
        for block, arrays in rest["params"].items()
        for name, array in arrays.items()
    }
    write(arguments.out / "blocks.npz", lambda file: np.savez(file, **params))
    draw_before_after(results, arguments.out)
    draw_gates(results[-1], arguments.out)
    draw_training(results, arguments.out)
    draw_penalty(arguments.out)
    return runs


def run_all(jobs):
    """Runs the jobs, a process for each core, with one line of progress; all results, in order.

    Fresh processes, since BLAS threads and the C library read their settings at the start."""
    context = multiprocessing.get_context("spawn")
    notes = context.SimpleQueue()
    workers = min(len(jobs), os.cpu_count() or 1)
    began, progress = time.perf_counter(), {}
    with ProcessPoolExecutor(workers, context, _listen, (notes,)) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is not for workers
        futures = [pool.submit(_run_job, number, job) for number, job in enumerate(jobs)]
        signal.signal(signal.SIGINT, handler)
        try:
            while wait(futures, timeout=0.2, return_when="FIRST_EXCEPTION").not_done:
                while not notes.empty():
                    number, note = notes.get()
                    progress[number] = note
                if any(future.done() and future.exception() for future in futures):
                    break
                done = [future.done() for future in futures]
                _show_progress(jobs, progress, done, time.perf_counter() - began)
            return [result for future in futures for result in future.result()]
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            _clear_line()


def _listen(notes):
    _run_job.notes = notes


def _run_job(number, job):
    note = lambda told: _run_job.notes.put((number, told))
    try:
        return job["run"](job, note)
    except FloatingPointError as diverged:
        settings = {name: job[name] for name in ("key", "seed", "variants") if name in job}
        raise FloatingPointError(f"{diverged}, with {settings}") from None


def _show_progress(jobs, progress, done, elapsed):
    if not (sys.stderr.isatty() and progress):
        return
    number, told = max(progress.items())  # any of those that run will do
    running = sum(note["done"] for n, note in progress.items() if not done[n])
    left = elapsed * (len(jobs) / max(sum(done) + running, 0.01) - 1)
    shown = [name for name in ("loss", "penalty", "alpha") if name in told]
    values = "  ".join(f"{name} {told[name]:.4f}" for name in shown)
    which = f"{jobs[number]['key']} seed {jobs[number]['seed']}"
    line = f"{sum(done)}/{len(jobs)} done  {which}  step {told['step']}  {values}"
    print(f"\r\033[K{line}  {left:.0f} s left"[:160], end="", file=sys.stderr, flush=True)


def _clear_line():
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def told(holding):
    """[[0], [2]] -> "0 or 2", [[0, 1]] -> "0+1", [] -> "none"."""
    return " or ".join("+".join(map(str, heads)) for heads in holding) or "none"


def describe(run):
    """Prints a run of the main job."""
    print(
        f"\n{run['key']}: {run['n_heads']} heads, {run['n_trigrams']} trigrams, then "
        f"{run['n_gated_heads']} gated heads (seed {run['seed']}, {run['redraws']} toys redrawn)"
    )
    print(f"  {'trigram':<17}{'toy: right':>11}  {'held by':<13}{'gated: right':>13}  held by")
    n = run["n_trigrams"]
    columns = ("accuracy_toy", "holders_toy", "accuracy_gated", "holders_gated")
    for i, (before, toy, after, gated) in enumerate(zip(*(run[name] for name in columns)), 1):
        name = f"[0] ... [{i}] -> [{i + n}]"
        print(f"  {name:<17}{before:>11.2%}  {told(toy):<13}{after:>13.2%}  {told(gated)}")
    print(
        f"  unexplained {run['fvu']:.4f}, penalty {run['penalty']:.4f}, {run['seconds']:.0f} s: "
        f"{'each trigram held by one head' if is_taken_apart(run) else 'NOT taken apart'}"
    )


VARIANTS = {
    "default": {},
    "published objective": {"value_scale": None},
    "constant alpha": {"alpha": (1.0, 1.0), "until": (0, 1), "choose": 1.0, "finish_alpha": 1.0},
}
ABLATIONS = {
    **VARIANTS,
    **{f"p = {p}": {"p": p} for p in (0.4, 0.5, 0.8, 1.0, 2.0)},
    "no penalty": {"alpha": (1e-12, 1e-12), "choose": 0.0, "finish_alpha": 0.0},
    **{f"{n} x the heads": {"heads": n} for n in (1, 2, 4)},
    "one start": {"starts": 1},
    "penalty on causal pairs": {"causal": True},
    "stuck gates stay stuck": {"reopen": False},
    "no finish": {"finish_steps": 0},
    "d_gate 1": {"d_gate": 1},
    **{f"d_head {n}": {"d_head": n} for n in (1, 2)},
    "d_head 1, value_scale 8": {"d_head": 1, "value_scale": 8.0},  # the most that d_head 4 can gain
    "value_scale 0.5": {"value_scale": 0.5},
    "chosen at the last alpha": {"choose": RECIPE["alpha"][1]},
    **{name: {"activation": name} for name in ("relu", "tanh", "binary")},
    "copies with noise": {"copies": 0.3},
}


def experiment_sweep(arguments):
    first, last = (0, 0) if arguments.quick else arguments.seeds
    seeds = range(first, last + 1)
    jobs = [make_job(key, seed, VARIANTS, arguments.quick) for key in SETTINGS for seed in seeds]
    if not arguments.quick:
        few = {"2 x the heads": {"heads": 2}}
        jobs += [make_job(key, seed, few) for key in WIDE for seed in seeds[:5]]
    runs = [run for run, _ in run_all(jobs)]
    runs.sort(key=lambda run: [*VARIANTS, "2 x the heads"].index(run["variant"]))
    print("\n".join(summary(runs, RATES)))
    draw_sweep([run for run in runs if run["variant"] == "default"], arguments.out)
    return runs


def experiment_ablations(arguments):
    seeds, variants = range(10), ABLATIONS
    if arguments.quick:
        quick = ("default", "copies with noise")
        seeds, variants = range(1), {name: ABLATIONS[name] for name in quick}
    jobs = [make_job("3H4T", seed, variants, arguments.quick) for seed in seeds]
    runs = [run for run, _ in run_all(jobs)]
    runs.sort(key=lambda run: list(variants).index(run["variant"]))
    print("\n".join(summary(runs, RATES)))
    draw_ablations(runs, arguments.out)
    return runs


def count_holders(run):
    """How many of a run's trigrams one head holds, several in turn, all distributed, and wrong."""
    counts = [0, 0, 0, 0]
    for accuracy, held in zip(run["accuracy_gated"], run["holders_gated"]):
        singles = sum(len(heads) == 1 for heads in held)
        counts[3 if accuracy <= 0.99 else 2 if singles == 0 else min(singles - 1, 1)] += 1
    return counts


def grouped(runs):
    """The runs by variant and setting, in the order of their first."""
    groups = {}
    for run in runs:
        groups.setdefault((run["variant"], run["key"]), []).append(run)
    return groups


def table(head, rows):
    """Markdown, as the README has it: `head` and the rows hold their cells."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def summary(runs, columns):
    """A table with a line for each variant and setting. columns: name -> what to say of a group."""
    rows = [
        [*which, len(group), *(cell(group) for cell in columns.values())]
        for which, group in grouped(runs).items()
    ]
    return table(["variant", "setting", "runs", *columns], rows)


def count(test):
    return lambda group: sum(map(test, group))


def counted(count_kinds, *names):
    """Columns of the sums of what count_kinds(run) -> [n] counts."""
    cell = lambda i: lambda group: sum(count_kinds(run)[i] for run in group)
    return {name: cell(i) for i, name in enumerate(names)}


def over(name, how=np.median, form=".4f"):
    """A column of the median, or what `how` makes, of a number that runs have under that name."""

    def cell(group):
        values = [run[name] for run in group if name in run]
        return format(how(values), form) if values else ""

    return cell


HOLDING = counted(count_holders, "one head", "in turn", "distributed", "wrong")
RATES = {
    "good toys": count(lambda run: run["redraws"] == 0 and is_superposition(run)),
    "taken apart": count(is_taken_apart),
    "success": count(is_success),
    "unexplained": over("fvu"),
    **HOLDING,
}


def experiment_benchmark(arguments):
    """Milliseconds for one loss-and-gradient: plain and fast form in turn, medians."""
    base = {"n_heads": 8, "n_positions": 11, "n_sequences": 1000, "n_trigrams": 5}
    sizes = [{**base, "n_heads": n} for n in (4, 8, 16)]
    sizes += [{**base, "n_positions": n, "n_sequences": 11000 // n // n} for n in (11, 33, 99)]
    sizes += [{**base, "n_sequences": n} for n in (250, 500, 1000, 2000)]
    sizes += [{**base, "n_trigrams": n} for n in (3, 5, 10, 20)]
    job = {"run": time_steps, "sizes": sizes, "repeats": 15, "key": "benchmark", "seed": 0}
    if arguments.quick:
        job |= {"sizes": sizes[:1], "repeats": 2}
    rows = run_all([job])
    shown = ("plain_ms", "fast_ms", "ratio")
    cells = [[*row.values()][:6] + [f"{row[name]:.3g}" for name in shown] for row in rows]
    print("\n".join(table([*rows[0]], cells)))
    return rows


def time_steps(job, note=None):
    rows = []
    for sizes in job["sizes"]:
        n_tokens = 2 * sizes["n_trigrams"] + 2
        sampled = (sizes["n_trigrams"], sizes["n_sequences"], sizes["n_positions"], 0)
        tokens, _ = gatedref.sample_skip_trigrams(*sampled)
        params = gatedref.init_params(sizes["n_heads"], n_tokens, 1, 0, d_gate=1)
        x, rows_of = np.eye(n_tokens)[tokens], tabulate(tokens, n_tokens)
        targets = np.zeros_like(x), np.zeros_like(rows_of["counts"])
        several = stacked([params])
        seconds = []
        for _ in range(job["repeats"]):
            times = [time.perf_counter()]
            gatedref.loss_and_grad(params, x, targets[0], 0.1)
            times.append(time.perf_counter())
            fast_loss_and_grad(several, rows_of, targets[1], 0.1)
            times.append(time.perf_counter())
            seconds.append(np.diff(times))
        plain, fast = 1000 * np.median(seconds, axis=0)
        row = {**sizes, "vocabulary": n_tokens, "rows": int((rows_of["weight"] > 0).sum())}
        rows.append({**row, "plain_ms": plain, "fast_ms": fast, "ratio": plain / fast})
    return rows


# ------------------------------------------------------------------------------------------------
# Pictures: one look for all, in the colours of Okabe and Ito, which the colour-blind can tell apart

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#8A8A8A"


def picture(path, rows, columns, size, paint, **options):
    """Opens a grid of axes, lets `paint` fill it, and writes the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    look = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    look |= {"axes.titlesize": 10, "savefig.dpi": 130, "figure.constrained_layout.use": True}
    with pyplot.rc_context(look):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, **options)
        paint(figure, axes)
        write(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
        pyplot.close(figure)


def draw_before_after(results, out):
    limit = max(abs(outputs).max() for _, rest in results for outputs in rest["outputs"])

    def paint(figure, axes):
        for column, (run, rest) in zip(axes.T, results):
            for ax, outputs, which in zip(column, rest["outputs"], ("toy", "gated")):
                look = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit, "aspect": "auto"}
                shown = ax.imshow(outputs, **look)
                n_heads, n = outputs.shape
                holding, names = run[f"holders_{which}"], []
                for i, (accuracy, held) in enumerate(zip(run[f"accuracy_{which}"], holding)):
                    state = "distributed" if is_distributed(accuracy, held) else ""
                    names.append(f"0…{i + 1}→{i + 1 + n}\n{state if accuracy > 0.99 else 'wrong'}")
                    for heads in held:
                        if len(heads) == 1:
                            ax.plot(i, heads[0], "o", ms=9, mfc="none", mec="black", mew=2)
                ax.set_xticks(range(n), names, fontsize=7)
                ax.set_yticks(range(n_heads))
                kind = {"toy": "toy model", "gated": "gated block"}[which]
                ax.set_title(f"{kind}, {n_heads} heads")
                ax.spines[:].set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("head")
        figure.colorbar(shown, ax=axes, shrink=0.6, label="head's output on the right logit")
        figure.suptitle("Which head writes the answer to which skip trigram (ring: holds it alone)")

    picture(out / "before_after.png", 2, len(results), (11, 6), paint)


def draw_gates(result, out):
    run, rest = result
    gated = {name: array for name, array in rest["params"]["gated"].items()}
    scale = gated.pop("value_scale", None)
    n, n_heads = run["n_trigrams"], run["n_gated_heads"]
    n_tokens = 2 * n + 2
    x = np.eye(n_tokens)[None]  # every token once: the gate of each (query, key) pair of tokens
    gate = gatedref.gated_attention(gated, x, value_scale=scale)["gate"][0]
    names = ["A", *(f"B{i}" for i in range(1, n + 1)), *(f"C{i}" for i in range(1, n + 1)), "BOS"]

    def paint(figure, axes):
        for head, ax in enumerate(axes.flat):
            ax.set_axis_off()
            if head >= n_heads:
                continue
            ax.set_axis_on()
            shown = ax.imshow(gate[head], cmap="Blues", vmin=0, vmax=gate.max())
            holds = [i for i, held in enumerate(run["holders_gated"], 1) if [head] in held]
            ax.set_title(f"head {head}" + "".join(f", holds {i}" for i in holds))
            ax.set_xticks(range(n_tokens), names, fontsize=6, rotation=90)
            ax.set_yticks(range(n_tokens), names, fontsize=6)
        figure.supxlabel("key token (source)")
        figure.supylabel("query token (destination)")
        figure.colorbar(shown, ax=axes, shrink=0.5, label="gate")
        figure.suptitle(f"{run['key']}: where each gated head is open")

    columns = 4
    rows = math.ceil(n_heads / columns)
    picture(out / "gates.png", rows, columns, (10, 2.4 * rows + 0.8), paint)


def draw_training(results, out):
    names = ("error / variance of the target", "penalty", "alpha (in target variance)")

    def paint(figure, axes):
        for ax, name, column in zip(axes[0], names, (0, 1, -1)):
            for (run, rest), colour in zip(results, (BLUE, ORANGE, GREEN)):
                curve = rest["curves"][:, column]
                width = max(1, len(curve) // 200)
                whole = len(curve) // width * width
                steps = np.arange(whole).reshape(-1, width)[:, 0]
                mean = curve[:whole].reshape(-1, width).mean(axis=1)
                ax.plot(steps, mean, color=colour, label=run["key"])
            ax.set(title=name, xlabel="step")
            if column >= 0:
                ax.set_yscale("log")
        axes[0][0].legend(frameon=False)

    picture(out / "training.png", 1, 3, (10, 3), paint)


def draw_penalty(out):
    gates = {"one open": [1, 0], "two half open": [0.5, 0.5], "two open": [1, 1]}

    def charge(pair, p):
        return float(gatedref.lp_penalty(np.reshape(pair, (1, 2, 1, 1)), p))

    def paint(figure, axes):
        bars, ball = axes[0]
        angles = np.linspace(0, np.pi / 2, 400)
        circle = np.clip([np.cos(angles), np.sin(angles)], 0, None)
        for i, (p, colour) in enumerate(((0.6, BLUE), (1.0, ORANGE), (2.0, GREEN))):
            heights = [charge(pair, p) for pair in gates.values()]
            place = np.arange(3) + 0.27 * (i - 1)
            drawn = bars.bar(place, heights, 0.25, color=colour, label=f"L{p:g}")
            bars.bar_label(drawn, fmt="%.3f", fontsize=8)
            radius = [1 / charge(pair, p) for pair in circle.T]
            ball.plot(*(circle * radius), color=colour, label=f"L{p:g} = 1")
        bars.set_xticks(range(3), list(gates))
        bars.set(title="what two heads on one (query, key) pair cost", ylabel="penalty")
        ball.set(title="gates that cost 1", xlabel="gate of one head", ylabel="gate of the other")
        ball.set_aspect("equal")
        bars.legend(frameon=False, loc="upper left")
        ball.legend(frameon=False, loc="lower left")

    picture(out / "penalty.png", 1, 2, (9, 3.6), paint)


def draw_sweep(runs, out):
    def paint(figure, axes):
        for ax, ((_, key), group) in zip(axes[0], grouped(runs).items()):
            for run in group:
                apart = is_taken_apart(run)
                look = {"marker": "o" if apart else "X", "color": BLUE if apart else ORANGE}
                ax.plot(run["seed"], run["fvu"], ms=7, **look)
            ax.axhline(0.01, color=GREY, lw=0.8, ls="--")
            ax.set(title=f"{key}: {sum(map(is_taken_apart, group))} of {len(group)}", xlabel="seed")
            ax.set_yscale("log")
        axes[0][0].set_ylabel("variance unexplained")
        figure.suptitle("Every run (blue: each trigram held by one head; orange cross: not)")

    picture(out / "sweep.png", 1, len(SETTINGS), (10, 3.6), paint, sharey=True)


def draw_ablations(runs, out):
    groups = {variant: group for (variant, _), group in grouped(runs).items()}

    def paint(figure, axes):
        ax = axes[0][0]
        stacked_bars(ax, groups, HOLDING)
        for i, group in enumerate(groups.values()):
            ax.text(1.01, i, f"{count(is_success)(group)}/{len(group)}", va="center")
        ax.text(1.01, -1, "successes", va="center")
        ax.set_xlabel("share of the trigrams")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)

    picture(out / "ablations.png", 1, 1, (9, 6), paint)


def stacked_bars(ax, groups, columns):
    """For each group a bar of the shares that columns of `summary` have in their sum."""
    counts = np.array([[cell(group) for cell in columns.values()] for group in groups.values()])
    shares = counts / counts.sum(axis=1, keepdims=True)
    starts = np.cumsum(shares, axis=1) - shares
    for i, (label, colour) in enumerate(zip(columns, (BLUE, GREEN, ORANGE, GREY))):
        ax.barh(range(len(groups)), shares[:, i], left=starts[:, i], color=colour, label=label)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.invert_yaxis()


# ------------------------------------------------------------------------------------------------
# What the method cannot do: three predictions of the discussion under the post, each with a toy of
# its own, the method on it, and a variant of the method. In the plain form, starts side by side,
# all of which are finished; the lowest loss is that with the search's last alpha.

LIMITS = {**RECIPE, "d_head": 2, "starts": 3, "steps": 800, "choose": None, "finish_steps": 300}


@primitive
def reopening(scores):
    """The clamp, with a gradient for stuck gates: see `fast_loss_and_grad`."""
    return np.clip(scores, 0, 1)


defvjp(
    reopening,
    lambda gate, s: lambda d: d * ((s >= 0) & (s <= 1) | (s < 0) & (d < 0) | (s > 1) & (d > 0)),
)


def plainly(objective, sample):
    """`learn`'s evaluate, of objective(params, *sample(size), alpha) -> a dict of scalars [N], one
    of them `loss`. Where gates are to reopen, `reopening` stands in for the clamp."""

    def evaluate(params, size, alpha, reopen):
        batch = sample(size)

        def total(params):
            scalars = objective(params, *batch, alpha)
            return scalars["loss"].sum(), scalars

        with mock.patch.dict(gatedref.ACTIVATIONS, {"clamp": reopening} if reopen else {}):
            grads, scalars = grad_and_aux(total)(params)
        return {name: getval(value) for name, value in scalars.items()}, grads

    return evaluate


def plain_toy(start, loss, sample, steps, note=None):
    """A toy's parameters, trained from a start by loss(params, *sample(size))."""

    def objective(params, *batch_and_alpha):
        return {"loss": anp.reshape(loss(part_of(params, 0), *batch_and_alpha[:-1]), 1)}

    params, _ = learn(stacked([start]), plainly(objective, sample), steps, 0.03, 60, note=note)
    return part_of(params, 0)


def gate_starts(starts, objective, sample, recipe, note=None):
    """For each start the parameters of the gated block that it becomes, and its scalars."""
    evaluate = plainly(objective, sample)
    params, _ = take_apart(starts, evaluate, recipe, note)
    scalars, _ = evaluate(params, 1000, recipe["alpha"][1], False)
    return [(part_of(params, i), part_of(scalars, i)) for i in range(len(starts))]


def side_by_side(params, x, value_scale=None):
    """N gated blocks [N, H, ...] as the N H heads of one: what each puts out [B, T, N, D], and its
    gate scores and gates [B, N, H, query, key]."""
    n_blocks, n_heads = params["W_Q"].shape[:2]
    heads = {name: array.reshape((-1, *array.shape[2:])) for name, array in params.items()}
    block = gatedref.gated_attention(heads, x, value_scale=value_scale)
    out = block["result"].reshape((*x.shape[:2], n_blocks, n_heads, -1)).sum(axis=3)
    of_blocks = len(x), n_blocks, n_heads, x.shape[1], x.shape[1]
    return out, block["gate_scores"].reshape(of_blocks), block["gate"].reshape(of_blocks)


def deviation_of(target):
    return target.reshape(-1, target.shape[-1]).var(axis=0).mean() ** 0.5


def scalars_of(errors, scores, gates, alpha):
    """The scalars of N blocks: lists of errors [B, T, N, D] in units of the target's deviation, of
    gate scores and of gates [B, N, H, query, key]; the mean, if there are several of a kind. Above
    a score of 1 there is no gradient in the clamp, so the highest is worth a look."""
    mse = sum(anp.mean(error**2, axis=(0, 1, 3)) for error in errors) / len(errors)
    norms = [gatedref.lp_norm(gate, 0.6).mean(axis=(0, 2, 3)) for gate in gates]
    penalty = sum(norms) / len(norms)
    highest = np.max([getval(score).max(axis=(0, 2, 3, 4)) for score in scores], axis=0)
    loss = mse + alpha * penalty
    return {"mse": mse, "penalty": penalty, "loss": loss, "highest score": highest}


def surprise(logits, answers):
    """The mean of -log p(answer). logits: [..., V]. answers: one-hot, [..., V]."""
    logits = logits - getval(logits).max(axis=-1, keepdims=True)
    normaliser = anp.log(anp.exp(logits).sum(axis=-1))
    return (normaliser - (logits * answers).sum(axis=-1)).mean()


def next_token_loss(layers, tokens):
    logits = gatedref.transformer(layers, tokens)["logits"]
    return surprise(logits[:, :-1], np.eye(logits.shape[2])[tokens[:, 1:]])


def report(name, jobs, columns, out):
    """The rows of jobs, their table, and their parameters in a file: those of a setting and variant
    as one stack, in the order of the rows."""
    rows = run_all(jobs)
    params = {
        f"{key}/{variant}/{parameter}": array
        for (variant, key), group in grouped(rows).items()
        for parameter, array in stacked([row.pop("params") for row in group]).items()
    }
    write(out / f"{name}.npz", lambda file: np.savez(file, **params))
    print("\n".join([*summary(rows, columns), ""]))
    return rows


def ranked(rows):
    """The rows of each seed in turn, those with the lowest loss first (toys have none)."""
    rows = sorted(rows, key=lambda row: (row["seed"], row.get("loss", 0)))
    return [list(starts) for _, starts in itertools.groupby(rows, key=lambda row: row["seed"])]


def below(wanted, other):
    """A column: on how many seeds, of those with rows of both kinds, a wanted one's loss is the
    lowest."""

    def cell(group):
        starts = ranked([row for row in group if wanted(row) or other(row)])
        both = [rows for rows in starts if len({*map(wanted, rows)}) == 2]
        return f"{sum(wanted(rows[0]) for rows in both)} of {len(both)}"

    return cell


FIT = {"unexplained": over("mse"), "highest score": over("highest score", max, ".2f")}


# 1. Across layers: first the premise that two heads hold three trigrams, then two layers.


def run_premise(job, note=None):
    """The two heads written down for n trigrams, and two heads trained on them: what each holds."""
    n, seed = job["n_trigrams"], job["seed"]
    blocks = {"handmade": gatedref.handmade_superposition(n)} if seed == 0 else {}
    if n <= 8:
        blocks["trained"] = train_toy(2, n, stream(seed, n, 12), 1, job["steps"], 0.03, note)
    tokens, _ = gatedref.sample_skip_trigrams(n, 2000, seed=stream(seed, 11))
    rows = []
    for variant, block in blocks.items():
        inputs = partial(forward, [block]), n, stream(seed, 13), 2000 if job["quick"] else 20000
        accuracy, holding, _ = measure(*inputs)
        row = {"variant": variant, "key": job["key"], "seed": seed, "n_trigrams": n}
        row |= {"accuracy": accuracy, "holders": holding, "params": block}
        row |= {"right": sum(a > 0.99 for a in accuracy), "single": sum(map(has_single, holding))}
        rows.append({**row, "loss": next_token_loss([block], tokens), "guess": np.log(2 * n + 2)})
    return rows


def has_single(sets):
    return any(len(heads) == 1 for heads in sets)


PREMISE = {
    "right": over("right", np.mean, ".1f"),
    "most right": over("right", max, "d"),
    "held by one head": over("single", np.mean, ".1f"),
    "cross-entropy": over("loss", form=".3f"),
    "of a guess": over("guess", form=".3f"),
}


def experiment_premise(arguments):
    """Premise of prediction 1: n heads hold n trigrams, and one more for each pair of them."""
    quick = arguments.quick
    more = {"run": run_premise, "quick": quick, "steps": 20 if quick else 1500}
    jobs = [
        {**more, "key": f"2H{n}T", "n_trigrams": n, "seed": seed}
        for n in ((3,) if quick else (3, 4, 5, 6, 7, 8, 10, 20, 30, 50))
        for seed in range(10 if n <= 8 and not quick else 1)
    ]
    return report("premise", jobs, PREMISE, arguments.out)


def two_layers(n_heads, d_model, d_head, seeds, d_gate=None):
    """A start for two layers, as one dict: `0/W_Q`, `1/W_Q`, ...."""
    layers = [gatedref.init_params(n_heads, d_model, d_head, seed, d_gate) for seed in seeds]
    return {f"{i}/{name}": array for i in range(2) for name, array in layers[i].items()}


def parted_layers(params):
    return [{n[2:]: a for n, a in params.items() if n[0] == layer} for layer in "01"]


def run_two_layers(job, note=None):
    """A two-layer model. If it is right and needs both layers for a trigram, gated blocks for each
    layer by itself; of two heads in all, from the same starts, also for the sum of both layers."""
    n_heads, n, seed, recipe = job["n_heads"], job["n_trigrams"], job["seed"], job["recipe"]
    n_tokens, n_gated = 2 * n + 2, recipe["heads"] * n_heads
    pool, _ = gatedref.sample_skip_trigrams(n, 5000, seed=stream(seed, 14))
    rng = np.random.default_rng(stream(seed, 15))
    sample = lambda size: (pool[rng.integers(len(pool), size=size)],)
    loss = lambda params, tokens: next_token_loss(parted_layers(params), tokens)
    start = two_layers(n_heads, n_tokens, 1, [stream(seed, n, 16, i) for i in range(2)])
    toy = plain_toy(start, loss, sample, job["steps"], portion(note, 0, 4))
    layers = parted_layers(toy)

    def told(variant, model, params, n_heads, scalars):
        row = {"variant": variant, "key": job["key"], "seed": seed, "n_heads": n_heads, **scalars}
        sequences = stream(seed, 17), 2000 if job["quick"] else 10000
        accuracy, holding, _ = measure(model, n, *sequences)
        return {**row, "accuracy": accuracy, "holders": holding, "params": params}

    rows = [told("two layers", partial(forward, layers), toy, n_heads, {})]
    if not (job["quick"] or is_across(rows[0])):
        return rows

    def inputs(tokens):
        """What goes into each layer of the model, and what each puts out."""
        x = np.eye(n_tokens)[tokens]
        outs = [block["attn_out"] for block in gatedref.transformer(layers, tokens)["blocks"]]
        return (x, x + outs[0]), outs

    _, outs = inputs(pool)
    scales = [float(recipe["value_scale"] * abs(out).max()) for out in outs]
    deviations = {False: [deviation_of(out) for out in outs], True: [deviation_of(sum(outs))]}

    def objective(params, xs, targets, alpha, summed):
        made = [side_by_side(*trio) for trio in zip(parted_layers(params), xs, scales)]
        outs, scores, gates = zip(*made)
        errors = [out - target[:, :, None] for out, target in zip(outs, targets)]
        if summed:
            errors, gates = [sum(errors)], [anp.concatenate(gates, axis=2)]
        errors = [error / deviation for error, deviation in zip(errors, deviations[summed])]
        return scalars_of(errors, scores, gates, alpha)

    def gated_model(params, tokens):
        xs, _ = inputs(tokens)
        trios = zip(parted_layers(params), xs, scales)
        made = [gatedref.gated_attention(block, x, value_scale=scale) for block, x, scale in trios]
        logits = xs[0] + sum(block["attn_out"] for block in made)
        return logits, np.concatenate([block["result"] for block in made], axis=2)

    starts = []
    for i in range(recipe["starts"]):
        seeds = [stream(seed, 18, i, layer) for layer in range(2)]
        starts.append(two_layers(n_gated, n_tokens, recipe["d_head"], seeds, recipe["d_gate"]))
    at_once = {**recipe, "until": (0, recipe["until"][1])}
    variants = (
        ("each layer gated", False, recipe),
        ("gated for the sum", True, recipe),
        ("for the sum, alpha at once", True, at_once),
    )[: 1 if n_heads > 1 else 3]
    for number, (variant, summed, changed) in enumerate(variants, 1):
        trained = partial(objective, summed=summed), lambda size: inputs(*sample(size)), changed
        for params, scalars in gate_starts(starts, *trained, portion(note, number, 4)):
            model, kept = partial(gated_model, params), {**params, "value_scales": scales}
            rows.append(told(variant, model, kept, n_gated, scalars))
    return rows


def spans(holding, n_heads):
    """Whether a trigram is held, and only by sets with heads of both layers of n_heads."""
    return bool(holding) and all(min(heads) < n_heads <= max(heads) for heads in holding)


def is_right(row):
    return min(row["accuracy"]) > 0.99


def is_across(row):
    """Whether all trigrams are right, and one at least needs both layers."""
    return is_right(row) and any(spans(held, row["n_heads"]) for held in row["holders"])


def is_apart(row):
    """Whether all trigrams are right, and each has a head of its own that holds it."""
    singles = [[heads[0] for heads in held if len(heads) == 1] for held in row["holders"]]
    own = any(len({*heads}) == len(heads) for heads in itertools.product(*singles))
    return is_right(row) and own


def is_within(row):
    """Whether all trigrams are right, but neither so: within a layer heads share a trigram, or one
    head holds two."""
    return is_right(row) and not is_across(row) and not is_apart(row)


LAYERS = {"across layers": is_across, "within a layer": is_within, "apart": is_apart}


def is_late(row):
    """Whether they are apart, held by heads of the second layer alone, which reads what the first
    wrote in the original, finished."""
    return is_apart(row) and all(min(min(held)) >= row["n_heads"] for held in row["holders"])


LAYERS_TABLE = {
    "all right": count(is_right),
    **{name: count(kind) for name, kind in LAYERS.items()},
    "in layer 2 alone": count(is_late),
    "apart below across": below(is_apart, is_across),
    "apart below within": below(is_apart, is_within),
    **FIT,
}


def experiment_layers(arguments):
    """Prediction 1: what two layers compute together stays together."""
    quick, recipe = arguments.quick, shortened(LIMITS, arguments.quick)
    more = {"run": run_two_layers, "recipe": {**recipe, "finish_alpha": recipe["alpha"][1]}}
    more |= {"quick": quick, "steps": 20 if quick else 1500}
    jobs = [
        {**more, "key": f"{h}+{h}H{n}T", "n_heads": h, "n_trigrams": n, "seed": seed}
        for h, n, seeds in ((2, 7, 16), (1, 3, 20))[quick:]
        for seed in range(1 if quick else seeds)
    ]
    rows = report("layers", jobs, LAYERS_TABLE, arguments.out)
    draw_layers(rows, arguments.out)
    return rows


def draw_layers(rows, out):
    groups = [(variant, group) for (variant, key), group in grouped(rows).items() if key[0] == "1"]

    def paint(figure, axes):
        for ax, (variant, group) in zip(axes[0], groups[1:]):
            for place, starts in enumerate(ranked(group)):
                for row in starts:
                    kinds = [kind(row) for kind in LAYERS.values()]
                    colour = (ORANGE, GREEN, BLUE)[kinds.index(True)] if any(kinds) else GREY
                    ax.plot(place, row["loss"], "o", color=colour, ms=5)
            ax.set(title=variant, xlabel="model", xticks=[], ylim=(0, None))
        axes[0][0].set_ylabel("loss of each start")
        figure.suptitle("Orange: across layers. Green: within one. Blue: apart. Grey: not right")

    picture(out / "layers.png", 1, 3, (11, 3.4), paint)


# 2. Necessary and overlapping: three queries ask for two of the three numbers of a payload.

COPYING = {"BOS": 0, "A": 1, "B": 2, "C": 3, "N": 4, "source": 5}
D_COPYING = len(COPYING) + 3
SHARED = ((0, "AC"), (1, "AB"), (2, "BC"))  # of each head, what it copies, and for which queries
DISJOINT = ((0, "A"), (1, "A"), (1, "B"), (2, "B"), (2, "C"), (0, "C"))


def sample_copies(size, rng):
    """x [size, 4, 9]: BOS, the source with its payload, two random queries of A, B, C and N; and
    what uniform attention copies, [size, 4, 9]: for A the payload's numbers 1 and 2, for B 2 and
    3, for C 3 and 1, each over the number of positions that the query sees."""
    queries = rng.integers(COPYING["A"], COPYING["N"] + 1, size=(size, 2))
    first = np.tile([COPYING["BOS"], COPYING["source"]], (size, 1))
    tokens = np.concatenate([first, queries], axis=1)
    x = np.eye(D_COPYING)[tokens]
    x[:, 1, -3:] = payload = rng.normal(size=(size, 3))
    asked = np.array([[0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 0]])
    target = np.zeros_like(x)
    target[..., -3:] = asked[tokens] * payload[:, None] / np.arange(1, 5)[:, None]
    return x, target


def copying_block(arrangement):
    """A gated block that copies exactly, of heads with d_head 1: SHARED or DISJOINT."""
    sizes = {"H": len(arrangement), "D": D_COPYING, "K": 1, "G": 1}
    axes = gatedref.GATED_BLOCK.items()
    params = {name: np.zeros([sizes[axis] for axis in letters]) for name, letters in axes}
    for head, (number, queries) in enumerate(arrangement):
        place = len(COPYING) + number
        params["W_V"][head, place] = params["W_O"][head, :, place] = 1
        params["W_gate_Q"][head, [COPYING[query] for query in queries]] = 1
        params["W_gate_K"][head, COPYING["source"]] = 1
    return params


def orthonormal(W):
    """The two columns of [..., D, 2], made orthonormal."""
    first = W[..., :1] / anp.sqrt((W[..., :1] ** 2).sum(axis=-2, keepdims=True))
    second = W[..., 1:] - first * (first * W[..., 1:]).sum(axis=-2, keepdims=True)
    second = second / anp.sqrt((second**2).sum(axis=-2, keepdims=True))
    return anp.concatenate([first, second], axis=-1)


def for_copying(params):
    """Uniform attention, a gate that does not see the payload, and wide heads whose columns cannot
    add up to a greater gain."""
    fixed = {name: 0 * params[name] for name in ("W_Q", "W_K", "b_Q", "b_K")}
    blind = np.arange(D_COPYING)[:, None] < len(COPYING)
    fixed |= {name: params[name] * blind for name in ("W_gate_Q", "W_gate_K")}
    if params["W_V"].shape[-1] == 2:
        fixed["W_V"] = orthonormal(params["W_V"])
        fixed["W_O"] = anp.swapaxes(orthonormal(anp.swapaxes(params["W_O"], -1, -2)), -1, -2)
    return {**params, **fixed}


def half_open(sizes, seed, n_starts):
    """Gated blocks to start from, with gate scores about 1/2."""
    starts = [gatedref.init_params(*sizes, stream(seed, 21, i), 1) for i in range(n_starts)]
    for start in starts:
        start["b_gate_Q"] += 0.5
        start["b_gate_K"] += 1.0
    return starts


def run_overlap(job, note=None):
    """Three heads and six that copy exactly; six that learn to; then six of twice the width."""
    seed, recipe = job["seed"], job["recipe"]
    rng = np.random.default_rng(stream(seed, 20))
    sample = lambda size: sample_copies(size, rng)
    x, target = sample(2000)
    tokens, deviation = x[..., : len(COPYING)].argmax(axis=2), deviation_of(target)

    def objective(params, x, target, alpha):
        out, score, gate = side_by_side(for_copying(params), x)
        return scalars_of([(out - target[:, :, None]) / deviation], [score], [gate], alpha)

    def told(variant, params, scalars):
        params = for_copying(params)
        gate = gatedref.gated_attention(params, x)["gate"][:, :, :, 1].transpose(0, 2, 1)
        gates = [gate[tokens == COPYING[query]].mean(axis=0).tolist() for query in "ABC"]
        row = {"variant": variant, "key": job["key"], "seed": seed, "gates": gates}
        return {**row, **scalars, "params": params}

    rows = []
    for variant, arrangement in (("three, written down", SHARED), ("six, written down", DISJOINT)):
        params = copying_block(arrangement)
        scalars = objective(stacked([params]), x, target, recipe["alpha"][1])
        rows.append(told(variant, params, part_of(scalars, 0)))
    for number, variant in enumerate(("six, trained", "six of twice the width, trained")):
        starts = half_open((6, D_COPYING, number + 1), seed, recipe["starts"])
        trained = gate_starts(starts, objective, sample, recipe, portion(note, number, 2))
        rows += [told(variant, params, scalars) for params, scalars in trained]
    return rows


def is_fit(row):
    return row["mse"] < 0.01


def is_shared(row):
    """Whether a block that fits has a head with its gate above 1/2 for two tasks. `gates`: [task,
    head]."""
    return is_fit(row) and bool(((np.array(row["gates"]) > 0.5).sum(axis=0) > 1).any())


def is_one_a_task(row):
    opened = np.array(row["gates"]) > 0.5
    return is_fit(row) and bool((opened.sum(axis=1) == 1).all()) and not is_shared(row)


OVERLAP = {
    "fit": count(is_fit),
    "a head for two tasks": count(is_shared),
    "one head a task": count(is_one_a_task),
    "lower in loss": below(is_one_a_task, lambda row: is_fit(row) and not is_one_a_task(row)),
    "penalty": over("penalty"),
    **FIT,
}


def experiment_overlap(arguments):
    """Prediction 2: heads that overlap, each of them necessary for two tasks."""
    weak = {"alpha": (0.1, 0.1), "until": (0, 1), "finish_alpha": 0.1}
    recipe = {**shortened(LIMITS, arguments.quick), **weak}
    more = {"run": run_overlap, "key": "copying", "recipe": recipe}
    jobs = [more | {"seed": seed} for seed in range(1 if arguments.quick else 12)]
    rows = report("overlap", jobs, OVERLAP, arguments.out)
    draw_overlap(rows, arguments.out)
    return rows


def draw_overlap(rows, out):
    groups = {v: group for (v, _), group in grouped(rows).items() if v.endswith("trained")}

    def paint(figure, axes):
        *maps, dots = axes[0]
        for place, (ax, (variant, group)) in enumerate(zip(maps, groups.items())):
            best = min(group, key=lambda row: row["loss"])
            shown = ax.imshow(best["gates"], cmap="Blues", vmin=0, vmax=1)
            ax.set_yticks(range(3), "ABC")
            ax.set(title=variant, xlabel="head", ylabel="task")
            for row in filter(is_fit, group):
                colour = BLUE if is_one_a_task(row) else ORANGE if is_shared(row) else GREY
                dots.plot(place + row["seed"] / 40 - 0.15, row["loss"], "o", color=colour, ms=4)
        dots.set_xticks(range(len(maps)), ["six", "six of twice the width"])
        dots.set(title="loss of all that fit", xlim=(-0.5, 1.5), ylim=(0, None))
        figure.colorbar(shown, ax=maps, shrink=0.6, label="gate")
        figure.suptitle(
            "Gates of the lowest loss. Blue: one head a task, orange: one for two, grey: else"
        )

    picture(out / "overlap.png", 1, 3, (11, 3.4), paint)


# 3. Different sources: two signals among noise, in any order; the answer, at the read-off token, is
# their unordered pair. Assumed, since the post does not say: five places before the read-off, no
# positions, all pairs equally often, and the mean squared error at the read-off alone.

N_SIGNALS, N_INPUTS, D_PAIRS = 4, 12, 22
PAIRS = list(itertools.combinations_with_replacement(range(1, N_SIGNALS + 1), 2))
MIXED = [p for p, (first, second) in enumerate(PAIRS) if first != second]


def sample_pairs(size, rng):
    """tokens [size, 6], of which the last is the read-off token 0; and which of PAIRS they hold."""
    tokens = rng.integers(N_SIGNALS + 1, N_INPUTS, size=(size, 6))
    tokens[:, -1] = 0
    answers = rng.integers(len(PAIRS), size=size)
    places = rng.permuted(np.tile(np.arange(5), (size, 1)), axis=1)[:, :2]
    np.put_along_axis(tokens, places, np.array(PAIRS)[answers], axis=1)
    return tokens, answers


def between(attend):
    """Of a block's heads, mixed pairs and noise: how often z at the read-off lies between those of
    the two pairs of equals, in the same noise."""
    noise = list(itertools.combinations_with_replacement(range(N_SIGNALS + 1, N_INPUTS), 3))
    tokens = [[*pair, *others, 0] for pair in PAIRS for others in noise]
    z = attend(np.eye(D_PAIRS)[tokens])["z"][:, -1].reshape(len(PAIRS), len(noise), -1)
    inside = []
    for pair in MIXED:
        first, second = (z[PAIRS.index((signal, signal))] for signal in PAIRS[pair])
        inside.append((z[pair] - first) * (z[pair] - second) <= 1e-12)
    return float(np.mean(inside))


def run_sources(job, note=None):
    """A block that names the pair of signals, and gated blocks in its place."""
    seed, recipe = job["seed"], job["recipe"]
    rng, one_hot = np.random.default_rng(stream(seed, 22)), np.eye(D_PAIRS)

    def loss(params, tokens, answers):
        out = gatedref.attention(params, one_hot[tokens])["attn_out"][:, -1, N_INPUTS:]
        return surprise(out, np.eye(len(PAIRS))[answers])

    tokens, answers = sample_pairs(500 if job["quick"] else 5000, rng)
    of_pair = [answers == pair for pair in range(len(PAIRS))]

    def told(variant, attend, params, **scalars):
        """A row. `pattern` and `gates`: at the read-off, of a sequence with each source once."""
        block, alone = attend(one_hot[tokens]), attend(one_hot[None, [*range(1, N_INPUTS), 0]])
        right = block["attn_out"][:, -1, N_INPUTS:].argmax(axis=-1) == answers
        result = block["result"][:, -1, :, N_INPUTS:]
        held = [gatedref.holders(result[mine], answers[mine]) for mine in of_pair]
        row = {"variant": variant, "key": job["key"], "seed": seed, **scalars}
        row |= {"accuracy": [float(right[mine].mean()) for mine in of_pair]}
        row |= {"holders": [[list(heads) for heads in sets] for sets in held]}
        for name in ("pattern", "gate"):
            row |= {name: alone[name][0, :, -1].tolist()} if name in alone else {}
        return row | {"between": between(attend), "params": params}

    for redraws in range(1 if job["quick"] else 10):
        start = gatedref.init_params(4, D_PAIRS, 1, stream(seed, 23, redraws))
        sample = partial(sample_pairs, rng=rng)
        toy = plain_toy(start, loss, sample, job["steps"], portion(note, 0, 5))
        rows = [told("toy", partial(gatedref.attention, toy), toy, redraws=redraws)]
        if is_right(rows[0]):
            break

    def inputs(size):
        x = one_hot[sample_pairs(size, rng)[0]]
        return x, gatedref.attention(toy, x)["attn_out"][:, -1:]

    _, target = inputs(5000)
    scale, deviation = float(recipe["value_scale"] * abs(target).max()), deviation_of(target)

    def objective(params, x, target, alpha, by_query):
        out, scores, gate = side_by_side(params, x, scale)
        active = gate[..., -1:, :]
        if by_query:  # how active a head is for the query, whatever the source
            active = active.mean(axis=-1, keepdims=True)
        error = (out[:, -1:] - target[:, :, None]) / deviation
        return scalars_of([error], [scores[..., -1:, :]], [active], alpha)

    free = {"alpha": (1e-12, 1e-12), "finish_alpha": 0.0}
    variants = (
        ("2 x the heads", 2, False, {}),
        ("3 x the heads", 3, False, {}),
        ("3 x, no penalty", 3, False, free),
        ("3 x, penalty by query", 3, True, {}),
    )
    for number, (variant, times, by_query, changes) in enumerate(variants, 1):
        starts = half_open((4 * times, D_PAIRS, 1), seed, recipe["starts"])
        trained = partial(objective, by_query=by_query), inputs, {**recipe, **changes}
        made = gate_starts(starts, *trained, portion(note, number, 5))
        params, scalars = min(made, key=lambda start: start[1]["loss"])
        attend = partial(gatedref.gated_attention, params, value_scale=scale)
        rows.append(told(variant, attend, {**params, "value_scale": scale}, **scalars))
    return rows


def count_sets(row):
    """How many answers are held by one head, by sets of two, of more, and how many are wrong."""
    counts = [0, 0, 0, 0]
    for accuracy, sets in zip(row["accuracy"], row["holders"]):
        size = len(sets[0]) if sets else 3
        counts[3 if accuracy <= 0.99 else min(size, 3) - 1] += 1
    return counts


def own_attention(row):
    """Of the attention, gated if there is a gate, that holders of a mixed pair pay to the four
    signals, if to any, the mean share that the pair's own two get; half, if they do not care."""
    seen = np.multiply(row["pattern"], row.get("gate", 1))[:, :N_SIGNALS]  # of the tokens from 1 on
    shares = []
    for pair in MIXED:
        for head in (row["holders"][pair] or [[]])[0]:
            own, paid = sum(seen[head, signal - 1] for signal in PAIRS[pair]), seen[head].sum()
            shares += [own / paid] if paid > 0 else []
    return np.mean(shares or np.nan)


def several_open(group):
    """On how many of the read-off's twelve pairs of tokens several gates are open (above 0.01)."""
    opened = [(np.array(row["gate"]) > 0.01).sum(axis=0) for row in group if "gate" in row]
    return f"{np.mean([(heads > 1).sum() for heads in opened]):.1f}" if opened else ""


SETS = counted(count_sets, "one head", "two", "three or more", "wrong")
SOURCES = {
    **SETS,
    "mixed, one head": lambda group: sum(has_single(r["holders"][p]) for r in group for p in MIXED),
    "own attention": lambda group: f"{np.mean([*map(own_attention, group)]):.2f}",
    "between": over("between", min, ".1%"),
    "several gates open": several_open,
    **FIT,
}


def experiment_sources(arguments):
    """Prediction 3: heads that work together on different source tokens."""
    weak = {"alpha": (0.05, 0.03), "finish_alpha": 0.01}
    recipe = {**shortened(LIMITS, arguments.quick), **weak}
    more = {"run": run_sources, "key": "pairs", "recipe": recipe, "quick": arguments.quick}
    more |= {"steps": 20 if arguments.quick else 2000}
    jobs = [more | {"seed": seed} for seed in range(1 if arguments.quick else 30)]
    rows = report("sources", jobs, SOURCES, arguments.out)
    draw_sources(rows, arguments.out)
    return rows


def draw_sources(rows, out):
    groups = {variant: group for (variant, _), group in grouped(rows).items()}

    def paint(figure, axes):
        bars, toy, gated = axes[0]
        stacked_bars(bars, groups, SETS)
        bars.set_xlabel("share of the pairs of signals")
        bars.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        for ax, variant, name in ((toy, "toy", "pattern"), (gated, "3 x the heads", "gate")):
            ax.imshow(groups[variant][0][name], cmap="Blues", aspect="auto", vmin=0, vmax=1)
            ax.set(title=f"{variant}, seed 0: {name}", xlabel="source token", ylabel="head")
            ax.set_xticks(range(N_INPUTS), [*range(1, N_INPUTS), 0])
            ax.yaxis.get_major_locator().set_params(integer=True)

    picture(out / "sources.png", 1, 3, (12, 3.6), paint)


# ------------------------------------------------------------------------------------------------
# The command

EXPERIMENTS = {
    "main": experiment_main,
    "sweep": experiment_sweep,
    "ablations": experiment_ablations,
    "benchmark": experiment_benchmark,
    "premise": experiment_premise,
    "layers": experiment_layers,
    "overlap": experiment_overlap,
    "sources": experiment_sources,
}
GROUPS = {"limits": ["premise", "layers", "overlap", "sources"]}


def write(path, fill):
    """Writes a file as a whole or not at all: under another name first, then in one move."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def load(out):
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    return dict(results)


def save(out, name, rows):
    """Puts one experiment's rows into results.json and leaves the others' as they are."""
    versions = {package: metadata.version(package) for package in ("numpy", "autograd")}
    environment = {"python": platform.python_version(), **versions}
    environment["platform"] = platform.platform()
    results = {**load(out), "environment": environment, name: rows}
    text = json.dumps(results, indent=1) + "\n"
    write(out / "results.json", lambda file: file.write(text.encode()))


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")

    def whole(text):
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"a whole number >= 0 is expected, got {text!r}")
        return int(text)

    add = parser.add_argument
    names = ", ".join([*EXPERIMENTS, *GROUPS])
    add("experiments", nargs="*", help=f"which to run, of {names} (default: main)")
    add("--seed", type=whole, default=0, help="seed of main (default: %(default)s)")
    add("--seeds", type=whole, nargs=2, default=(0, 19), help="first and last seed of the sweep")
    add("--out", type=Path, help="where to write (default: figures, or figures/quick)")
    add("--published", action="store_true", help="main: the published block, its value bias free")
    add("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    arguments = parser.parse_args(argv)
    asked = arguments.experiments or ["main"]
    arguments.experiments = [name for group in asked for name in GROUPS.get(group, [group])]
    for name in arguments.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"unknown experiment {name!r}, choose from {names}")
    if arguments.seeds[0] > arguments.seeds[1]:
        parser.error(f"--seeds must be first and last, got {arguments.seeds}")
    if arguments.published and arguments.experiments != ["main"]:
        parser.error("--published goes with main alone")
    arguments.out = arguments.out or Path("figures/quick" if arguments.quick else "figures")
    try:
        load(arguments.out)
    except (OSError, ValueError, TypeError) as problem:
        parser.error(f"cannot read {arguments.out / 'results.json'}: {problem}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write(arguments.out / ".writable", lambda file: None)
        (arguments.out / ".writable").unlink()
    except OSError as problem:
        parser.error(f"cannot write to --out {arguments.out}: {problem.strerror}")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    try:
        for name in arguments.experiments:
            save(arguments.out, name, EXPERIMENTS[name](arguments))
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    except (FloatingPointError, OSError, BrokenProcessPool) as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        return 1
    print(f"\nresults and pictures are in {arguments.out}/")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the workers too
    sys.exit(main())
