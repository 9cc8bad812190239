"""train: superposition appears in a toy model, and a gated block takes it apart.

    python train.py                 the three published settings (half a minute)
    python train.py sweep price     how often it works, and what separation costs (long)
    python train.py --help

The toy is one attention block with fewer heads than there are skip trigrams, trained on next-token
cross-entropy. The gated block then learns to put out what the toy's block does, under the L0.6
penalty. The maths of the method is in `gatedref.py`. Here are, in order: a faster form of it for
tokens without positions, training, what a model does, experiments, tables, pictures, the command.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

# For this process and its workers: one BLAS thread each, since several train at once; and glibc
# keeps the memory it has instead of handing it back at every step, which costs more than the sums.
os.environ.update({f"{blas}_NUM_THREADS": "1" for blas in ("OPENBLAS", "OMP", "MKL")})
os.environ.update({"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)})

import autograd.numpy as np
from autograd import grad, grad_and_aux
from autograd.extend import defvjp, primitive
from autograd.misc.optimizers import adam
from autograd.tracer import getval

import gatedref

# ------------------------------------------------------------------------------------------------
# The table form. Without positions, a one-hot token sees its context through its token counts
# alone: what a block puts out is a function of the query token and of how often each token stands
# at or before it, and a gate is a function of two tokens. Axes as in gatedref, and R rows.


def tabulate(tokens, n_tokens):
    """Each position of each sequence as a row, kept by its query token: `counts` [V, R, V], how
    often each token stands at or before it; `after` [V, R], the next token, or -1 where there is
    none; `n_rows` [V], how many of the R are real. And `pairs` [V, V]: how often a query and a key
    are these two tokens, of all pairs that the penalty is a mean over."""
    counts = np.cumsum(np.eye(n_tokens)[tokens], axis=1)  # [S, T, V]
    after = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    n_rows = np.bincount(tokens.ravel(), minlength=n_tokens)
    rows = {"n_rows": n_rows, "after": np.full((n_tokens, n_rows.max()), -1)}
    rows["counts"] = np.repeat(np.eye(n_tokens)[:, None], n_rows.max(), axis=1)
    for token, n in enumerate(n_rows):
        rows["counts"][token, :n] = counts[tokens == token]
        rows["after"][token, :n] = after[tokens == token]
    whole = counts[:, -1]  # [S, V]; the gate has no mask, so keys after the query count, too
    return {**rows, "pairs": whole.T @ whole / (tokens.size * tokens.shape[1])}


def draw(rows, size, rng):
    """A batch of `size` rows for each query token: `counts`, `after`, and the `weight` [V, size] by
    which a mean over it is one over the sequences."""
    n_rows = rows["n_rows"][:, None]
    drawn = rng.integers(np.maximum(n_rows, 1), size=(len(n_rows), size))
    weight = np.broadcast_to(n_rows / n_rows.sum() / size, drawn.shape)
    picks = np.arange(len(n_rows))[:, None], drawn
    return rows["counts"][picks], rows["after"][picks], weight


def tables(params, *, activation="clamp", value_scale=None):
    """What a block makes of each pair of tokens: the weights [V, V, H] of its softmax before they
    are normalised and the gate [H, V, V] (None without one); each key's value [V, H, K]; W_O."""
    gate = None
    if "W_gate_Q" in params:
        gate_q, gate_k = (params["W_gate_" + n] + params["b_gate_" + n][:, None] for n in "QK")
        activate = activation if callable(activation) else gatedref.ACTIVATIONS[activation]
        gate = activate(gate_q @ np.swapaxes(gate_k, 1, 2))
        params = {**params, **gatedref.normalised(params, value_scale)}
    q, k, v = (params["W_" + n] + params["b_" + n][:, None] for n in "QKV")  # [H, V, K]
    scores = np.transpose(q @ np.swapaxes(k, 1, 2), (1, 2, 0)) / q.shape[2] ** 0.5
    weights = np.exp(scores - getval(scores).max(axis=1, keepdims=True))
    return weights, gate, np.swapaxes(v, 0, 1), params["W_O"]


def table_attention(params, counts, **options):
    """`attn_out` [V, R, D] of the rows, by `attention` or `gated_attention` with these options, and
    the gate [H, V, V]. FloatingPointError: a row whose keys all have weights too small to hold."""
    weights, gate, v, W_O = tables(params, **options)
    n_tokens, n_heads, d_head = v.shape
    total = counts @ weights  # [V, R, H]
    if (getval(total) == 0).any():
        raise FloatingPointError("one query's attention scores are more than 700 apart")
    gated = weights if gate is None else weights * np.transpose(gate, (1, 2, 0))
    values = np.reshape(gated[..., None] * v, (n_tokens, n_tokens, -1))  # [V, V, H K]
    z = np.reshape(counts @ values, (*total.shape, d_head)) / total[..., None]  # [V, R, H, K]
    z = np.reshape(z, (n_tokens, -1, n_heads * d_head))
    return z @ np.reshape(W_O, (n_heads * d_head, -1)), gate


def gated_loss(params, batch, target, pairs, alpha, *, p=0.6, **options):
    """`gatedref.loss` on rows. c times the gates have c times the norm, so the gates of a pair are
    charged for as often as it occurs when they are multiplied by that."""
    counts, _, weight = batch
    attn_out, gate = table_attention(params, counts, **options)
    error = attn_out - target
    mse = (weight[..., None] * error * error).sum() / target.shape[-1]
    penalty = gatedref.lp_penalty((gate * (pairs * pairs.size))[None], p)
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}


def next_token_loss(params, batch):
    """A toy model's cross-entropy on rows, those of the last position left out."""
    counts, after, weight = batch
    one_hot = np.eye(len(counts))
    logits = one_hot[:, None] + table_attention(params, counts)[0]
    return {"loss": surprise(logits, one_hot[after], weight * (after >= 0))}


def surprise(logits, answers, weight):
    """The weighted mean of -log p(answer). logits, and answers one-hot: [..., V]."""
    logits = logits - getval(logits).max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(logits).sum(axis=-1))
    return (weight * (normaliser - (logits * answers).sum(axis=-1))).sum() / weight.sum()


# ------------------------------------------------------------------------------------------------
# Training, by autograd and its Adam. alpha is in units of the target's variance, so that one recipe
# serves every toy: loss / variance = unexplained + alpha * penalty.

RECIPE = {
    "heads": 3,  # gated heads, as a multiple of the block's: spare ones are what takes over
    "d_head": 4,  # its columns may align: a gate of 1 then writes up to d_head times value_scale
    "d_gate": 2,
    "value_scale": 2.0,  # times the target's largest entry; None: the published, free value bias
    "activation": "clamp",
    "reopen": True,  # gates that are stuck get a gradient, see `reopening`
    "p": 0.6,
    "alpha": (40.0, 1.5),  # strong while heads come apart, then falling, to fit what that left
    "until": (0.14, 0.84),  # of the steps: alpha is 0 before the first, its last after the second
    "steps": 2200,
    "batch": 40,  # rows for each query token
    "rate": 0.01,
    # Where a leg ends, as a fraction of the steps, and its factor on the rate. Each leg starts Adam
    # anew, and after the first `takeovers` of them little used heads take over shared pairs.
    "legs": ((0.3, 1.0), (0.45, 1.0), (0.6, 1.0), (0.7, 0.3), (0.85, 0.3), (1.0, 0.1)),
    "takeovers": 4,
}
TOY = {"steps": 2500, "batch": 60, "rate": 0.03, "legs": ((0.6, 1.0), (0.85, 0.3), (1.0, 0.1))}
QUICK = {"steps": 40}


@primitive
def reopening(gate_scores):
    """The clamp, whose derivative outside of [0, 1] is 0, so that a gate which leaves never comes
    back. Here it is 1 outside, too, where a step downhill leads back inside."""
    return np.clip(gate_scores, 0, 1)


defvjp(
    reopening,
    lambda gate, s: lambda d: d * ((s >= 0) & (s <= 1) | (s < 0) & (d < 0) | (s > 1) & (d > 0)),
)
REOPENING = {  # other activations, likewise
    "clamp": reopening,
    "relu": lambda s: np.where(s > 1, s, reopening(s)),
    "binary": lambda s: reopening(s) + getval((s > 0.5) - reopening(s)),
}


def fit(objective, params, recipe, *, rescue=None, note=None):
    """Adam on objective(params, progress) -> a dict of scalars, one of them `loss`; progress goes
    from 0 to 1. recipe: `steps`, `rate`, `legs`; and `takeovers`, the number of legs after which
    rescue(params) -> params is called. note({"done": progress}) is called a hundred times or so.
    Returns the parameters, and the curves: a list of the scalars at each step."""
    steps, curves = recipe["steps"], []

    def at_step(params):
        scalars = objective(params, len(curves) / steps)
        return scalars["loss"], {name: getval(value) for name, value in scalars.items()}

    gradient_at = grad_and_aux(at_step)

    def downhill(params, _):
        gradient, scalars = gradient_at(params)
        if not np.isfinite(scalars["loss"]):
            raise FloatingPointError(f"the loss became {scalars['loss']} at step {len(curves)}")
        if note and len(curves) % max(1, steps // 100) == 0:
            note({"done": len(curves) / steps})
        curves.append(scalars)
        return gradient

    for number, (end, share) in enumerate(recipe["legs"]):
        left, rate = round(end * steps) - len(curves), share * recipe["rate"]
        with np.errstate(over="ignore", invalid="ignore"):  # a loss that is not finite is told
            params = adam(downhill, params, num_iters=left, step_size=rate)
        if rescue and number < recipe["takeovers"]:
            params = rescue(params)
    return params, curves


def take_over(params, survey, pairs, p, gain):
    """Little used heads take over the (query, key) pairs of tokens for whose sharing most is paid.

    A closed gate passes no gradient to its head's values, so a spare head stays dead while others
    share what it could do alone. So, again and again: find the pair whose sharing costs most; take
    the head whose gates cost least, drop its old job, and let it write there what all heads write
    there together, through a gate just wide enough; close the others there. Stop when that saves
    less than the head's own gates cost. It is how dead neurons of sparse autoencoders are resampled
    (Bricken et al., 2023), for heads.

    survey(params) -> the gate and the mean pattern [H, V, V] of each head at each pair, and what it
    writes there on average, [H, V, V, D]. pairs [V, V]: how often each occurs. gain: the norm
    that a head can write through a gate of 1. Returns the parameters.
    """
    params = {name: array.copy() for name, array in params.items()}
    norm_of = lambda gate: (gate**p).sum(axis=0) ** (1 / p)  # [V, V]
    spare = list(range(len(params["W_Q"])))
    while spare:
        gate, pattern, written = survey(params)
        norm = norm_of(gate)
        costs = [(pairs * (norm - norm_of(np.delete(gate, h, axis=0)))).sum() for h in spare]
        together = written.sum(axis=0)  # [V, V, D]
        leader = np.linalg.norm(written, axis=-1).argmax(axis=0)  # [V, V]
        attention = np.take_along_axis(pattern, leader[None], axis=0)[0]
        width = np.linalg.norm(together, axis=-1) / np.maximum(attention * gain, 1e-12)
        saving = np.where((width > 0) & (width <= 1), pairs * (norm - width), 0)
        query, key = np.unravel_index(saving.argmax(), saving.shape)
        if saving[query, key] <= min(costs):
            break
        head = spare.pop(int(np.argmin(costs)))
        close_gates(params, query, key)
        for name in ("W_Q", "W_K", "b_Q", "b_K"):
            params[name][head] = params[name][leader[query, key]]
        for name in ("W_V", "b_V"):  # a trace of the old values keeps its columns from being alike
            params[name][head] *= 0.1
        params["W_V"][head, key] += 1
        params["W_O"][head] = together[query, key] / np.linalg.norm(together[query, key])
        open_gate(params, head, query, key, width[query, key])
    return params


def close_gates(params, query, key):
    """The least change of `W_gate_Q` that brings every gate score above 0 at a pair to 0, where it
    still has a gradient: training may open it again."""
    gate_q, gate_k = (params["W_gate_" + n] + params["b_gate_" + n][:, None] for n in "QK")
    score = np.maximum((gate_q[:, query] * gate_k[:, key]).sum(axis=1), 0)
    square = np.maximum((gate_k[:, key] ** 2).sum(axis=1), 1e-12)
    params["W_gate_Q"][:, query] -= (score / square)[:, None] * gate_k[:, key]


def open_gate(params, head, query, key, width):
    """A head's gate, open at one pair alone; with d_gate 2 its other scores are 0.01 below 0."""
    for name in gatedref.GATE:
        params[name][head] = 0
    params["b_gate_Q"][head, 1:], params["b_gate_K"][head, 1:] = -0.1, 0.1
    root = (width + 0.01 * (params["b_gate_Q"].shape[1] - 1)) ** 0.5
    params["W_gate_Q"][head, query, 0] = params["W_gate_K"][head, key, 0] = root


def take_apart(block, tokens, *, seed=0, recipe=RECIPE, note=None):
    """A gated block that puts out what a trained block does, its heads out of superposition.

    block: parameters of `gatedref.attention`, D = V, of a model that reads tokens one-hot and has
    neither positions nor an output bias. tokens: integers [S, T] in [0, V), some thousands of the
    sequences that it is to be right on. seed: a whole number >= 0. recipe: a dict like RECIPE.
    note: see `fit`.
    Returns the gated block's parameters; the options to call `gated_attention` with; and the
    curves, for each step a dict of `mse` and `loss`, both over the target's variance, `penalty` and
    `alpha`. ValueError, TypeError: an argument that is not as above. FloatingPointError: scores
    that are too far apart, or a loss that is not finite.
    """
    if not isinstance(recipe, dict) or set(recipe) != set(RECIPE):
        raise ValueError(f"recipe must have the keys {list(RECIPE)}, got {recipe}")
    gatedref.transformer([block], tokens)  # checks both
    block = {name: np.asarray(array, dtype=float) for name, array in block.items()}
    n_heads, n_tokens, _ = block["W_Q"].shape
    gatedref.attention(block, np.eye(n_tokens)[None])  # that it is not gated
    rows, rng = tabulate(np.asarray(tokens), n_tokens), np.random.default_rng([seed, 1])

    def sample(size):
        batch = draw(rows, size, rng)
        return batch, table_attention(block, batch[0])[0]

    (_, _, weight), target = sample(500)  # to measure the variance
    deviation = target - (weight[..., None] * target).sum(axis=(0, 1))
    variance = (weight[..., None] * deviation**2).sum() / n_tokens
    if variance <= 1e-20 * (target**2).mean():
        raise ValueError("block must put out something that depends on its tokens, got a constant")
    scale = recipe["value_scale"] and recipe["value_scale"] * float(abs(target).max())
    options = {"activation": recipe["activation"], "value_scale": scale}
    activation = recipe["activation"]
    if recipe["reopen"]:
        activation = REOPENING.get(activation, activation)

    def objective(params, progress):
        alpha, sampled = alpha_at(progress, recipe), sample(recipe["batch"])
        how = {"p": recipe["p"], "activation": activation, "value_scale": scale}
        scalars = gated_loss(params, *sampled, rows["pairs"], alpha * variance, **how)
        scaled = {name: scalars[name] / variance for name in ("mse", "loss")}
        return {**scalars, **scaled, "alpha": alpha}

    def survey(params):
        counts, _, _ = draw(rows, 200, rng)
        weights, gate, v, W_O = tables(params, **options)
        pattern = counts[:, :, None] * np.swapaxes(weights, 1, 2)[:, None]  # [V, R, H, V]
        pattern = (pattern / pattern.sum(axis=-1, keepdims=True)).mean(axis=1)  # [V, H, V]
        pattern, out = np.swapaxes(pattern, 0, 1), np.einsum("vhk,hkd->hvd", v, W_O)
        return gate, pattern, (gate * pattern)[..., None] * out[:, None]

    gain = recipe["d_head"] * (scale or 1)
    rescue = partial(take_over, survey=survey, pairs=rows["pairs"], p=recipe["p"], gain=gain)
    sizes = recipe["heads"] * n_heads, n_tokens, recipe["d_head"]
    start = gatedref.init_params(*sizes, seed, recipe["d_gate"])
    gatedref.gated_attention(start, np.eye(n_tokens)[None], **options)  # checks the options
    params, curves = fit(objective, start, recipe, rescue=rescue, note=note)
    return params, options, curves


def alpha_at(progress, recipe):
    """No alpha at first, then one that falls geometrically to its last value (to 0: a thousandfold,
    and then to 0)."""
    (first, last), (free, fallen) = recipe["alpha"], recipe["until"]
    if progress < free or progress >= fallen:
        return 0.0 if progress < free else float(last)
    return first * (max(last, first / 1000) / first) ** ((progress - free) / (fallen - free))


def train_toy(n_heads, n_trigrams, seed, recipe=TOY, note=None):
    """A toy model's parameters, trained on next-token cross-entropy."""
    n_tokens = 2 * n_trigrams + 2
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, 5000, seed=seed)
    rows, rng = tabulate(tokens, n_tokens), np.random.default_rng([seed, 2])
    start = gatedref.init_params(n_heads, n_tokens, 1, seed)
    objective = lambda params, _: next_token_loss(params, draw(rows, recipe["batch"], rng))
    return fit(objective, start, recipe, note=note)[0]


# ------------------------------------------------------------------------------------------------
# What a model does, measured with the reference itself


def forward(layers, tokens, **options):
    """A model's logits, and each head's output [B, T, H, V], those of all layers together."""
    model = gatedref.transformer(layers, tokens, **options)
    return model["logits"], np.concatenate([b["result"] for b in model["blocks"]], axis=2)


def measure(run, n_trigrams, seed, n_sequences):
    """What a model does with each trigram, on sequences that complete just one: `accuracy` [n],
    where its B is not last; `holders` [n], the smallest sets of heads that hold it, on 1,000
    sequences at most; `shares` [n, H], the mean share of each head's output in the sum of their
    norms. run(tokens) -> what `forward` returns."""
    tokens, completes = gatedref.sample_skip_trigrams(n_trigrams, n_sequences, seed=seed)
    tokens, completes = (a[completes.sum(axis=1) == 1] for a in (tokens, completes))
    sequence, position = np.nonzero(completes)
    answers, made = tokens[sequence, position] + n_trigrams, []
    for part in np.array_split(sequence, math.ceil(len(tokens) / 500)):
        made.append([a[np.arange(len(part)), position[part]] for a in run(tokens[part])])
    logits, result = (np.concatenate(arrays) for arrays in zip(*made))
    norms, right = np.linalg.norm(result, axis=2), logits.argmax(axis=1) == answers
    shares = norms / np.maximum(norms.sum(axis=1, keepdims=True), 1e-300)  # [S, H]
    accuracy, held, mean_shares = [], [], []
    for answer in range(n_trigrams + 1, 2 * n_trigrams + 1):
        mine = np.flatnonzero(answers == answer)
        accuracy.append(right[mine[position[mine] < tokens.shape[1] - 1]].mean())
        held.append(gatedref.holders(result[mine[:1000]], answers[mine[:1000]]))
        mean_shares.append(shares[mine].mean(axis=0))
    return {"accuracy": accuracy, "holders": held, "shares": np.array(mean_shares)}


def unexplained(toy, gated, n_trigrams, seed, n_sequences, **options):
    """FVU, the fraction of the toy's output variance that the gated block leaves unexplained; and
    the L0.6 penalty, whatever it was trained with. Both on fresh sequences."""
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, n_sequences, seed=seed)
    errors, targets, penalties = [], [], []
    for part in np.array_split(tokens, math.ceil(n_sequences / 500)):
        targets.append(gatedref.transformer([toy], part)["blocks"][0]["attn_out"])
        block = gatedref.transformer([gated], part, **options)["blocks"][0]
        errors.append(((block["attn_out"] - targets[-1]) ** 2).sum())
        penalties.append(gatedref.lp_penalty(block["gate"]) * len(part))
    targets = np.concatenate(targets)
    deviations = ((targets - targets.mean(axis=(0, 1))) ** 2).sum()
    return sum(errors) / deviations, sum(penalties) / n_sequences


def singles(holders):
    """For each trigram the heads that hold it by themselves."""
    return [[heads[0] for heads in sets if len(heads) == 1] for sets in holders]


def is_apart(accuracy, holders):
    """Whether every trigram is right and has a head of its own: of the heads that hold each, one
    can be chosen so that none is chosen twice."""
    chosen = itertools.product(*singles(holders))
    return min(accuracy) > 0.99 and any(len(set(heads)) == len(heads) for heads in chosen)


# ------------------------------------------------------------------------------------------------
# Experiments. Each returns rows for results.json; tables and pictures are made from these alone.

SETTINGS = {"2H3T": (2, 3), "3H4T": (3, 4), "4H5T": (4, 5)}
SIZES = {**SETTINGS, "8H10T": (8, 10)}  # heads, trigrams
FIGURES = Path(__file__).resolve().parent / "figures"
OURS, AUTHORS = "this recipe", "the authors' block"
ABLATIONS = {
    OURS: {},
    "published objective": {"value_scale": None},
    "constant alpha": {"alpha": RECIPE["alpha"][1:] * 2, "until": (0, 1)},
    "no takeover": {"takeovers": 0},
    "no takeover, best of six": {"takeovers": 0, "starts": 6},
    **{f"p = {p}": {"p": p} for p in (0.4, 1.0, 2.0)},
    "no penalty": {"alpha": (1e-12, 1e-12), "takeovers": 0},
    "as many heads as the toy": {"heads": 1},
    "d_head 1": {"d_head": 1},
    "d_gate 1": {"d_gate": 1},
    "stuck gates stay stuck": {"reopen": False},
    "ReLU": {"activation": "relu"},
    "binary": {"activation": "binary"},
}
PRICE = {f"{last:g}": {"alpha": (RECIPE["alpha"][0], last)} for last in (6, 3, 1.5, 0.75, 0.25, 0)}


def seed_of(*numbers):
    """A seed of its own for everything random, from a run's seed and what it is for."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def published(key, which):
    """Parameters of the authors' `toy` or `gated` block of a setting."""
    with np.load(FIGURES / "published.npz") as file:
        names = [name for name in file if name.startswith(f"{key}/{which}/")]
        return {name.split("/")[2]: file[name].astype(float) for name in names}


def run_setting(job, note):
    """A toy, and for each variant the gated block that it becomes: [(row, blocks, options)]. job:
    `key` of SIZES, `seed`, `quick`; `variants`, name -> changes to RECIPE, and `starts`, of which
    that with the lowest last loss counts, or None for the authors' gated block; `toy`, a block, or
    None to train one. A toy is drawn again unless all its trigrams are right, one distributed."""
    n_heads, n = SIZES[job["key"]]
    steps, n_sequences = (QUICK, 2000) if job["quick"] else ({}, 20000)
    seeds = partial(seed_of, job["seed"], n_heads, n)
    judge = partial(measure, n_trigrams=n, seed=seeds(0), n_sequences=n_sequences)
    tokens, _ = gatedref.sample_skip_trigrams(n, 5000, seed=seeds(1))
    size = 1 / (1 + len(job["variants"]))  # of a part of the job

    def phase(name, start, size):
        return lambda told: note({"phase": name, "done": start + size * told["done"]})

    for redraws in itertools.count():
        told = phase("redrawing the toy" if redraws else "toy", 0, size)
        toy = job["toy"] or train_toy(n_heads, n, seeds(2, redraws), {**TOY, **steps}, told)
        before = judge(partial(forward, [toy]))
        good = min(before["accuracy"]) > 0.998 and not all(singles(before["holders"]))
        if good or job["toy"] or job["quick"]:
            break
    results = []
    for number, (variant, changes) in enumerate(job["variants"].items(), 1):
        if changes is None:
            gated, options = published(job["key"], "gated"), {}
        else:
            recipe = {**RECIPE, **steps, **changes}
            starts, made = recipe.pop("starts", 1), []
            for start in range(starts):
                told = phase("search", (number + start / starts) * size, size / starts)
                made.append(take_apart(toy, tokens, seed=seeds(3, start), recipe=recipe, note=told))
            last_loss = lambda made: np.mean([scalars["loss"] for scalars in made[2][-100:]])
            gated, options, _ = min(made, key=last_loss)
        after = judge(partial(forward, [gated], **options))
        fvu, penalty = unexplained(toy, gated, n, seeds(4), n_sequences // 2, **options)
        row = {"key": job["key"], "variant": variant, "seed": job["seed"], "redraws": redraws}
        for which, found in (("toy", before), ("gated", after)):
            row |= {f"{name}_{which}": value for name, value in found.items()}
        row |= {"n_gated_heads": len(gated["W_Q"]), "fvu": fvu, "penalty": penalty}
        row |= {"apart": is_apart(after["accuracy"], after["holders"])}
        row |= {"share": after["shares"].max(axis=1).mean()}
        results.append((row, {"toy": toy, "gated": gated}, options))
    return results


def run_settings(arguments, keys, seeds, variants, toys=False):
    """(row, blocks, options) of all these runs, by setting and variant, with the authors' `toys` or
    ours. The largest settings begin, so that the cores are done together."""
    if arguments.quick:
        seeds, variants = seeds[:1], dict(itertools.islice(variants.items(), 2))
    jobs = [
        {"run": run_setting, "key": key, "seed": seed, "quick": arguments.quick}
        | {"variants": variants, "toy": published(key, "toy") if toys else None}
        for key in reversed(keys)
        for seed in seeds[: None if key in SETTINGS else 5]
    ]
    order = {which: i for i, which in enumerate(itertools.product(keys, variants))}
    return sorted(run_all(jobs), key=lambda made: order[made[0]["key"], made[0]["variant"]])


RATED = ("key", "variant", "seed", "apart", "share", "fvu")


def rows_of(results, names=None):
    """The rows alone, and of these what is named, else all but what is for a picture of one run."""
    names = names or [name for name in results[0][0] if not name.startswith("shares")]
    return [{name: row[name] for name in names} for row, *_ in results]


def run_main(arguments):
    """The three settings of the post, for one seed. Writes the blocks, too."""
    results, stored, rows = run_settings(arguments, SETTINGS, [arguments.seed], {OURS: {}}), {}, []
    for row, blocks, options in results:
        for block, params in blocks.items():
            stored |= {f"{row['key']}/{block}/{name}": array for name, array in params.items()}
        stored[f"{row['key']}/gated/value_scale"] = options["value_scale"]
        x = np.eye(blocks["toy"]["W_Q"].shape[1])[None]  # every token once
        gate = gatedref.gated_attention(blocks["gated"], x, **options)["gate"][0]  # [H, V, V]
        rows.append({**row, "gates": gate[:, :, [0, -1]]})  # at keys A and BOS
    write(arguments.out / "blocks.npz", lambda file: np.savez(file, **stored))
    return rows


def benchmark(arguments):
    """Prints the milliseconds of a loss and gradient of one block on the same 1,000 sequences, in
    plain form, table form, and PyTorch where it is installed, in turn: medians."""
    rows = run_all([{"run": time_forms, "key": "benchmark", "seed": 0, "quick": arguments.quick}])
    print("\n".join(table(rows[0], [row.values() for row in rows])))


def time_forms(job, note):
    rows, forms, repeats = [], {}, 2 if job["quick"] else 15
    for n_heads, n in ((4, 3), (8, 5), (16, 10)):
        tokens, _ = gatedref.sample_skip_trigrams(n, 1000)
        params = gatedref.init_params(n_heads, 2 * n + 2, 4, 0, d_gate=2)
        x, context = np.eye(2 * n + 2)[tokens], tabulate(tokens, 2 * n + 2)
        real = np.arange(context["n_rows"].max()) < context["n_rows"][:, None]
        batch = context["counts"], context["after"], real / tokens.size
        given = batch, 0 * context["counts"], context["pairs"], 0.1
        slope = grad(lambda params, given: gated_loss(params, *given)["loss"])
        forms["plain"] = partial(gatedref.loss_and_grad, params, x, 0 * x, 0.1)
        forms["table"] = partial(slope, params, given)
        with contextlib.suppress(ImportError):
            import torch

            from test_gatedref import torch_block

            torch.set_num_threads(1)
            case = gatedref.Case("", params, x, 0 * x, 0.1, None, None)
            forms["PyTorch"] = partial(torch_block, torch, case, torch.float64)
        times = [[timeit.timeit(form, number=1) for form in forms.values()] for _ in range(repeats)]
        medians = [f"{1000 * seconds:.3g}" for seconds in np.median(times, axis=0)]
        told = {f"{name} (ms)": median for name, median in zip(forms, medians)}
        rows.append({"heads": n_heads, "trigrams": n, **told})
    return rows


# ------------------------------------------------------------------------------------------------
# Tables, in Markdown as the pages have them


def table(head, rows):
    return [f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *rows]]


def grouped(rows, *names):
    """The rows by what they have under these names, in the order of their first."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def table_main(rows):
    """Of each setting: what holds each trigram, before and after."""

    def held(row, which):
        sets = [["+".join(map(str, heads)) for heads in held] for held in row["holders_" + which]]
        told = zip(row["accuracy_" + which], sets)
        return ", ".join(" or ".join(s) or "none" if a > 0.99 else "wrong" for a, s in told)

    head = "setting", "held in the toy by", "in the gated block by", *RATES
    return table(head, [[r["key"], held(r, "toy"), held(r, "gated"), *rates([r])] for r in rows])


RATES = "apart", "share", "unexplained"


def rates(group):
    """What is told of runs: how many are apart, the mean share, what is left unexplained."""
    fvu, share = [row["fvu"] for row in group], np.mean([row["share"] for row in group])
    apart = f"{sum(row['apart'] for row in group)} of {len(group)}"
    most = f" (most {max(fvu):.4f})" if len(fvu) > 1 else ""
    return apart, f"{share:.2f}", f"{np.median(fvu):.4f}{most}"


def table_rates(rows):
    groups = grouped(rows, "key", "variant")
    cells = [(*which, *rates(group)) for which, group in groups.items()]
    return table(("setting", "variant", *RATES), cells)


# ------------------------------------------------------------------------------------------------
# Pictures, in the colours of Okabe and Ito, which the colour-blind can tell apart: one for each
# setting, one for what holds a trigram, one for each p

COLOURS = dict(zip(SETTINGS, ("#0072B2", "#E69F00", "#009E73")))
HOLDER, OF_P = "#D55E00", {0.6: "#000000", 1.0: "#CC79A7", 2.0: "#56B4E9"}
LOOK = {"savefig.dpi": 130, "font.size": 9, "axes.titlesize": 9, "legend.frameon": False}


@contextlib.contextmanager
def picture(path, title, height, *grid, **options):
    """Hands out axes, gives them one legend, and writes them: the same bytes for the same rows."""
    import matplotlib.figure

    with matplotlib.rc_context(LOOK):
        figure, entries = matplotlib.figure.Figure((8.5, height), layout="constrained"), {}
        figure.suptitle(title, fontsize=10)
        yield figure.subplots(*grid, squeeze=False, **options)
        for ax in figure.axes:
            entries.update(reversed(pair) for pair in zip(*ax.get_legend_handles_labels()))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6)
        write(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))


def draw_heads(ax, cells, row, which, names, most):
    """Cells [H, names] in grey; what holds a trigram alone (of several, the head that writes most)
    ringed in the column of its B. The heads stand in the order of the trigrams that they hold."""
    shares, single = row["shares_" + which], enumerate(singles(row["holders_" + which]), 1)
    held = {f"B{i}": max(heads, key=lambda h: shares[i - 1][h]) for i, heads in single if heads}
    order = list(dict.fromkeys([*held.values(), *range(len(cells))]))
    look = {"cmap": "Greys", "vmin": 0, "vmax": most, "edgecolor": "0.85", "linewidth": 0.5}
    shown = ax.pcolormesh(range(len(names)), range(len(order)), cells[order], **look)
    ring = {"mfc": "none", "mec": HOLDER, "ms": 10, "mew": 2, "label": "holds the trigram alone"}
    ax.plot([names.index(B) for B in held], [*map(order.index, held.values())], "o", **ring)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(order)), order)
    ax.set(ylabel="head", ylim=(len(order) - 0.5, -0.5))
    return shown


def draw_main(results, out):
    rows = results["main"]
    title = f"Who writes the answer: toys above, their gated blocks below (seed {rows[0]['seed']})"
    with picture(out / "before_after.png", title, 5.6, 2, 3, height_ratios=[2, 3]) as axes:
        for ax, (which, row) in zip(axes.flat, itertools.product(("toy", "gated"), rows)):
            shares = np.transpose(row["shares_" + which])  # [H, n]
            title = f"{row['key']}, {which}: {len(shares)} heads"
            Bs = [f"B{i + 1}" for i in range(shares.shape[1])]
            shown = draw_heads(ax, shares, row, which, Bs, 1)
            ax.set(title=title, xlabel="trigram A ... Bi -> Ci")
        ax.figure.colorbar(shown, ax=axes, shrink=0.6, label="share of what all heads write")
    gates = np.array(row["gates"])  # [H, V, 2], of the largest setting
    names, most = ["A", *Bs, *(B.replace("B", "C") for B in Bs), "BOS"], gates.max() or 1
    with picture(out / "gates.png", f"Where gated heads of {row['key']} are open", 4, 1, 2) as axes:
        for i, (ax, key) in enumerate(zip(axes[0], ("A (token 0)", "BOS"))):
            shown = draw_heads(ax, gates[:, :, i], row, "gated", names, most)
            ax.set(title=f"at key {key}", xlabel="query token")
        ax.figure.colorbar(shown, ax=axes, label="gate (0: closed)")
    pairs = {"one open": [1, 0], "two half open": [0.5, 0.5], "two open": [1, 1]}
    title = "Two heads share a pair: L0.6 makes them pay, L1 does not mind, L2 gives a discount"
    with picture(out / "penalty.png", title, 3.4, 1, 2) as ((bars, ball),):
        for i, (p, colour) in enumerate(OF_P.items()):
            costs = [gatedref.lp_penalty(np.reshape(x, (1, 2, 1, 1)), p) for x in pairs.values()]
            drawn = bars.bar(np.arange(3) + 0.28 * i, costs, 0.26, color=colour, label=f"L{p:g}")
            bars.bar_label(drawn, fmt="%.2f", fontsize=8)
            ball.plot(gate := np.linspace(0, 1, 1000), (1 - gate**p) ** (1 / p), color=colour)
        bars.set_xticks(np.arange(3) + 0.28, pairs)
        bars.set(xlabel="gates of two heads on one pair", ylabel="penalty", ylim=(0, 3.5))
        ball.set(xlabel="gates that cost 1: one head's", ylabel="the other head's", aspect="equal")


def draw_sweep(results, out):
    groups = grouped(results["sweep"], "key")
    title = "Every run: higher is more separate, further left is truer to the toy"
    with picture(out / "sweep.png", title, 3.1, 1, len(groups), sharey=True) as axes:
        for ax, ((key,), rows) in zip(axes[0], groups.items()):
            for row in rows:
                look, label = ("ko", "apart") if row["apart"] else ("kx", "not apart")
                ax.semilogx(row["fvu"], row["share"], look, mfc="none", ms=5, label=label)
            ax.set(title=f"{key}: {rates(rows)[0]} apart", xlabel="unexplained", ylabel="share")
            ax.set(xlim=(2e-3, 0.5), ylim=(0.3, 1.02))


def draw_price(results, out):
    authors = [row for row in results.get("published", []) if row["variant"] == AUTHORS]
    told = {"apart": "apart (part of the runs)", "share": "share", "fvu": "unexplained (median)"}
    with picture(out / "price.png", "What separation costs, by the last alpha", 3.4, 1, 3) as axes:
        for ax, name in zip(axes[0], told):
            for (key,), rows in grouped(results["price"], "key").items():
                runs, mean = grouped(rows, "variant"), np.median if name == "fvu" else np.mean
                ys = [mean([row[name] for row in group]) for group in runs.values()]
                ax.plot(ys, "o-", color=COLOURS[key], label=key)
            alphas = [-float(alpha) for (alpha,) in runs]  # rising
            default = np.interp(-RECIPE["alpha"][1], alphas, range(len(alphas)))
            ax.axvline(default, color="0.6", ls=":", label="default")
            for row in authors if name != "apart" else []:
                look = {"color": COLOURS[row["key"]], "label": f"{row['key']}, authors"}
                ax.axhline(row[name], ls="--", **look)
            ax.set_xticks(range(len(alphas)), [alpha for (alpha,) in runs])
            ax.set(xlabel="last alpha", ylabel=told[name], ylim=(0, 1.02))
        axes[0][2].set(yscale="log", ylim=(1e-3, 1))


# ------------------------------------------------------------------------------------------------
# The command

TABLES = {"main": table_main}
PICTURES = {"main": draw_main, "sweep": draw_sweep, "price": draw_price}
EXPERIMENTS = {
    "main": run_main,
    "published": lambda arguments: rows_of(
        run_settings(arguments, SETTINGS, range(5), {AUTHORS: None, OURS: {}}, toys=True)
    ),
    "sweep": lambda arguments: rows_of(run_settings(arguments, SIZES, arguments.seeds, {OURS: {}})),
    "price": lambda arguments: rows_of(run_settings(arguments, ["4H5T"], range(20), PRICE), RATED),
    "ablations": lambda arguments: rows_of(
        run_settings(arguments, ["4H5T"], range(20), ABLATIONS), RATED
    ),
    "benchmark": benchmark,
}
PAGES = "pages"  # tells all results anew: prints, draws, and rewrites the tables of the pages


def run_all(jobs):
    """job["run"](job, note) -> a list, for all jobs, a process for each core: one list, in order.
    Fresh processes, since BLAS and the C library read their settings at the start."""
    context = multiprocessing.get_context("spawn")
    notes, told, began = context.SimpleQueue(), {}, time.perf_counter()
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, setattr, (_run_job, "notes", notes)) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is not for the workers
        futures = [pool.submit(_run_job, number, job) for number, job in enumerate(jobs)]
        signal.signal(signal.SIGINT, handler)
        try:
            while wait(futures, timeout=0.2, return_when="FIRST_EXCEPTION").not_done:
                if any(future.done() and future.exception() for future in futures):
                    break
                while not notes.empty():
                    number, note = notes.get()
                    most = max(note["done"], told.get(number, note)["done"])
                    told[number] = {**note, "done": most}  # a toy drawn anew is no step back
                _show_progress(jobs, told, futures, time.perf_counter() - began)
            return [result for future in futures for result in future.result()]
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            _show("")


def _run_job(number, job):
    try:
        return job["run"](job, lambda note: _run_job.notes.put((number, note)))
    except FloatingPointError as wrong:
        raise FloatingPointError(f"{job['key']}, seed {job['seed']}: {wrong}") from None


def _show_progress(jobs, told, futures, elapsed):
    finished = sum(future.done() for future in futures)
    running = {number: note for number, note in told.items() if not futures[number].done()}
    done = finished + sum(note["done"] for note in running.values())
    if running and done > 0.02 * len(jobs):
        number, note = next(iter(running.items()))
        which = f"{jobs[number]['key']}, seed {jobs[number]['seed']}: {note['phase']}"
        left = elapsed * (len(jobs) / done - 1)
        _show(f"{finished} of {len(jobs)} done; {which}; about {left:.0f} s left")


def _show(line):
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:79]}", end="", file=sys.stderr, flush=True)


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
    results = dict(json.loads(path.read_text())) if path.exists() else {}
    return {name: results[name] for name in EXPERIMENTS if name in results}


def save(out, name, rows):
    """Puts an experiment's rows into results.json, numbers to six digits; the others' stay."""
    digits = lambda text: float(f"{float(text):.6g}")
    rows = json.loads(json.dumps(rows, default=lambda array: array.tolist()), parse_float=digits)
    results = {**load(out), name: rows}
    results = {name: results[name] for name in EXPERIMENTS if name in results}
    text = json.dumps(results, separators=(",", ":")).replace('{"key"', '\n{"key"') + "\n"
    write(out / "results.json", lambda file: file.write(text.encode()))


def tell(out, names):
    """Prints the tables of these experiments and draws their pictures; and rewrites all tables in
    the pages, if these are the results that they tell of."""
    results = load(out)
    for name in [name for name in names if name in results]:
        print("\n".join([f"{name}:", *TABLES.get(name, table_rates)(results[name]), ""]))
        PICTURES.get(name, lambda *_: None)(results, out)
    for page in (FIGURES / "README.md", FIGURES.parent / "README.md") if out == FIGURES else ():
        text = rewritten(page.read_text(), results).encode()
        write(page, lambda file, text=text: file.write(text))


def rewritten(text, results):
    """A page with the tables of results, each between `<!-- table: NAME -->` and `<!-- end -->`."""
    for name, rows in results.items():
        lines = "\n".join(TABLES.get(name, table_rates)(rows))
        marked = f"<!-- table: {name} -->", "<!-- end -->"
        told = f"\n{lines}\n".join(marked)
        text = re.sub(".*?".join(marked), lambda _, told=told: told, text, flags=re.DOTALL)
    return text


def parse(argv):
    parser = argparse.ArgumentParser("train.py", description=__doc__.split("\n")[0])
    parser.allow_abbrev = False
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")

    names, add = [*EXPERIMENTS, PAGES], parser.add_argument
    add("experiments", nargs="*", help=f"which to run, of {', '.join(names)} (default: main)")
    add("--seed", type=int, help="seed of main (default: 0)")
    add("--seeds", type=int, nargs=2, help="first and last seed of sweep (default: 0 19)")
    add("--out", type=Path, help="where to write (default: figures, or figures/quick)")
    add("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    arguments = parser.parse_args(argv)
    asked = arguments.experiments = arguments.experiments or ["main"]
    for name in [name for name in asked if name not in names]:
        parser.error(f"unknown experiment {name!r}, choose from {', '.join(names)}")
    for option, user, default in (("seed", "main", 0), ("seeds", "sweep", (0, 19))):
        if getattr(arguments, option) is None:
            setattr(arguments, option, default)
        elif user not in asked:
            parser.error(f"--{option} goes with {user}, got {', '.join(asked)}")
    if arguments.seed < 0 or not 0 <= arguments.seeds[0] <= arguments.seeds[1]:
        parser.error("--seed must be >= 0, and --seeds two such numbers, the first and the last")
    arguments.seeds = range(arguments.seeds[0], arguments.seeds[1] + 1)
    arguments.out = (arguments.out or FIGURES / ("quick" if arguments.quick else "")).resolve()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write(arguments.out / ".writable", lambda file: None)
        (arguments.out / ".writable").unlink()
    except OSError as problem:
        parser.error(f"cannot write to --out {arguments.out}: {problem.strerror}")
    try:
        load(arguments.out)
    except (OSError, ValueError, TypeError) as problem:
        parser.error(f"cannot read {arguments.out / 'results.json'}: {problem}")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    if arguments.quick:
        print("A smoke run: a few steps each, so that nothing is learnt. No number means anything.")
    try:
        for name in arguments.experiments:
            if name == PAGES:
                tell(arguments.out, EXPERIMENTS)
            elif rows := EXPERIMENTS[name](arguments):
                save(arguments.out, name, rows)
                tell(arguments.out, [name])
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    except (FloatingPointError, OSError, BrokenProcessPool) as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        return 1
    print(f"results and pictures are in {arguments.out}/")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the workers, too
    sys.exit(main())
