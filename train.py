"""train: superposition appears in a toy model, and a gated block takes it apart.

    python train.py                 the three published settings (a minute; --help tells more)
    python train.py sweep price     how often it works, and what separation costs (long)

The toy is one attention block with fewer heads than there are skip trigrams, trained on next-token
cross-entropy. The gated block then learns to put out what the toy's block does, under the L0.6
penalty. The maths of the method is in `gatedref.py`; here are a faster form of it for one-hot
tokens, training, what a model does, experiments, limits, tables, pictures, the command.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

# These arrays are too small for threads to pay.
os.environ.update({f"{blas}_NUM_THREADS": "1" for blas in ("OPENBLAS", "OMP", "MKL")})

import autograd.numpy as np
from autograd import grad_and_aux
from autograd.extend import defvjp, primitive
from autograd.misc.optimizers import adam
from autograd.tracer import getval

import gatedref

# ---- The table form ------------------------------------------------------------------------------
# Without positions, a one-hot token sees its context through its token counts alone: what a block
# puts out is a function of the query token and of how often each token stands at or before it, and
# a gate is a function of two tokens. Axes as in gatedref, and R rows.


def tabulate(tokens, n_tokens):
    """Each position of each sequence as a row, kept by its query token: `counts` [V, R, V], how
    often each token stands at or before it; `n_rows` [V], how many of the R are real. And `pairs`
    [V, V]: how often a query and a key are these two tokens, of all pairs that the penalty is a
    mean over."""
    counts = np.cumsum(np.eye(n_tokens)[tokens], axis=1)  # [S, T, V]
    n_rows = np.bincount(tokens.ravel(), minlength=n_tokens)
    rows = np.ones((n_tokens, n_rows.max(), n_tokens))
    for token, n in enumerate(n_rows):
        rows[token, :n] = counts[tokens == token]
    whole = counts[:, -1]  # [S, V]; the gate has no mask, so keys after the query count, too
    pairs = whole.T @ whole / (tokens.size * tokens.shape[1])
    return {"counts": rows, "n_rows": n_rows, "pairs": pairs}


def draw(rows, size, rng):
    """A batch of `size` rows for each query token: their counts [V, size, V], and the weight
    [V, size] by which a mean over it is one over the sequences."""
    n_rows = rows["n_rows"][:, None]
    drawn = rng.integers(np.maximum(n_rows, 1), size=(len(n_rows), size))
    weight = np.broadcast_to(n_rows / n_rows.sum() / size, drawn.shape)
    return rows["counts"][np.arange(len(n_rows))[:, None], drawn], weight


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
    counts, weight = batch
    attn_out, gate = table_attention(params, counts, **options)
    error = attn_out - target
    mse = (weight[..., None] * error * error).sum() / target.shape[-1]
    penalty = gatedref.lp_penalty((gate * (pairs * pairs.size))[None], p)
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}


# ---- Training, by autograd and its Adam ----------------------------------------------------------
# alpha is in units of the target's variance, so that one recipe serves every toy:
# loss / variance = unexplained + alpha * penalty.

RECIPE = {
    "heads": 3,  # gated heads, as a multiple of the block's: spare ones are what takes over
    "d_head": 4,  # its columns may align: a gate of 1 then writes up to d_head times value_scale
    "d_gate": 2,
    "value_scale": 2.0,  # times the target's largest entry; None: the published, free value bias
    "reopen": True,  # gates that are stuck get a gradient, see `reopening`
    "p": 0.6,
    "alpha": 2.5,  # more: heads more apart; less: a better fit. `price` shows the trade
    "steps": 1600,
    "batch": 40,  # rows of each query token
    "rate": 0.01,
    "legs": (1.0, 1.0, 1.0, 0.3, 0.1),  # times the rate: equal parts of the steps, each Adam's own
    "takeovers": True,  # between legs, little used heads take over shared pairs
}
TOY = {"steps": 1500, "batch": 40, "rate": 0.05, "legs": (1.0, 1.0, 1.0, 0.3, 0.1)}
QUICK = {"steps": 40}


@primitive
def reopening(gate_scores):
    """The clamp, whose derivative outside of [0, 1] is 0, so that a gate which leaves never comes
    back. Here it is 1 outside, too, where a step downhill leads back inside."""
    return np.clip(gate_scores, 0, 1)


defvjp(reopening, lambda _, s: lambda d: d * ((s >= 0) | (d < 0)) * ((s <= 1) | (d > 0)))


def fit(objective, params, recipe, *, between=None, note=None):
    """Adam on objective(params) -> a dict of scalars, one of them `loss`. recipe: `steps`, `rate`
    and `legs`; between these params = between(params). note(part of the steps) is called a
    hundred times or so. Returns the parameters, and the curves: the scalars at each step."""
    steps, curves = recipe["steps"], []

    def at_step(params):
        scalars = objective(params)
        return scalars["loss"], {name: getval(value) for name, value in scalars.items()}

    gradient_at = grad_and_aux(at_step)

    def downhill(params, _):
        gradient, scalars = gradient_at(params)
        if not np.isfinite(scalars["loss"]):
            raise FloatingPointError(f"the loss became {scalars['loss']} at step {len(curves)}")
        if note and len(curves) % max(1, steps // 100) == 0:
            note(len(curves) / steps)
        curves.append(scalars)
        return gradient

    for number, share in enumerate(recipe["legs"], 1):
        left = steps * number // len(recipe["legs"]) - len(curves)
        with np.errstate(over="ignore", invalid="ignore"):  # a loss that is not finite is told
            params = adam(downhill, params, num_iters=left, step_size=share * recipe["rate"])
        if between and number < len(recipe["legs"]):
            params = between(params)
    return params, curves


def write_vector(params, head, key, wanted):
    """Lets a head write along a vector [D] where it attends to a token."""
    for name in ("W_V", "b_V"):  # a trace of the old values keeps its columns from being alike
        params[name][head] *= 0.1
    params["W_V"][head, key] += 1
    params["W_O"][head] = wanted / np.linalg.norm(wanted)


def take_over(params, survey, pairs, p, gain, write=write_vector):
    """Little used heads take over the (query, key) pairs of tokens for whose sharing most is paid.

    A closed gate passes no gradient to its head's values, so a spare head stays dead while others
    share what it could do alone. So, again and again: find the pair where one would save most; let
    the head whose gates cost least drop its old job and write there what all heads write there
    together, through a gate just wide enough; close the others there. Stop when that saves less
    than the head's own gates cost. Dead neurons of sparse autoencoders are resampled likewise
    (Bricken et al., 2023).

    survey(params) -> each head's gate and mean pattern at each pair, [H, V, V], and what it writes
    there on average, [H, V, V, D]. pairs [V, V]: how often each occurs. gain: the norm that a head
    can write through a gate of 1. write: see `write_vector`. Returns the parameters.
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
        write(params, head, key, together[query, key])
        open_gate(params, head, query, key, width[query, key])
    return params


def close_gates(params, query, key):
    """The least change of `W_gate_Q` that brings every gate score above 0 at a pair to 0, but for
    rounding: there `reopening` has a gradient, so training may open it again."""
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
    sequences that it is to be right on. seed: >= 0. recipe: a dict like RECIPE. note: see `fit`.
    Returns the gated block's parameters; the options to call `gated_attention` with; and the
    curves, for each step a dict of `penalty`, and of `mse` and `loss` over the target's variance.
    ValueError, TypeError: an argument that is not as above. FloatingPointError: scores that are too
    far apart, or a loss that is not finite.
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

    (_, weight), target = sample(500)  # to measure the variance
    deviation = target - (weight[..., None] * target).sum(axis=(0, 1))
    variance = (weight[..., None] * deviation**2).sum() / n_tokens
    if variance <= 1e-20 * (target**2).mean():
        raise ValueError("block must put out something that depends on its tokens, got a constant")
    scale = recipe["value_scale"] and recipe["value_scale"] * abs(target[weight[:, 0] > 0]).max()
    options = {"value_scale": scale}
    how = {**options, "p": recipe["p"], "activation": reopening if recipe["reopen"] else "clamp"}

    def objective(params):
        alpha, sampled = recipe["alpha"] * variance, sample(recipe["batch"])
        scalars = gated_loss(params, *sampled, rows["pairs"], alpha, **how)
        return scalars | {name: scalars[name] / variance for name in ("mse", "loss")}

    def survey(params):
        counts, _ = draw(rows, 200, rng)
        weights, gate, v, W_O = tables(params, **options)
        pattern = counts[:, :, None] * np.swapaxes(weights, 1, 2)[:, None]  # [V, R, H, V]
        pattern = (pattern / pattern.sum(axis=-1, keepdims=True)).mean(axis=1)  # [V, H, V]
        pattern, out = np.swapaxes(pattern, 0, 1), np.einsum("vhk,hkd->hvd", v, W_O)
        return gate, pattern, (gate * pattern)[..., None] * out[:, None]

    sizes = recipe["heads"] * n_heads, n_tokens, recipe["d_head"]
    start = gatedref.init_params(*sizes, seed, recipe["d_gate"])
    gatedref.loss(start, *[np.eye(n_tokens)[None]] * 2, recipe["alpha"], p=recipe["p"], **options)
    gain = recipe["d_head"] * (scale or 1)
    takes = partial(take_over, survey=survey, pairs=rows["pairs"], p=recipe["p"], gain=gain)
    params, curves = fit(objective, start, recipe, between=recipe["takeovers"] and takes, note=note)
    return params, options, curves


def train_toy(n_heads, n_trigrams, seed, recipe=TOY, *, n_layers=1, note=None):
    """The layers of a toy model, trained on the cross-entropy of the next token."""
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, 5000, seed=seed)
    V, rng = 2 * n_trigrams + 2, np.random.default_rng([seed, 2])

    def objective(layers):
        batch = tokens[rng.integers(len(tokens), size=recipe["batch"])]
        logits = gatedref.transformer(layers, batch)["logits"][:, :-1]
        return {"loss": surprise(logits, np.eye(V)[batch[:, 1:]])}

    start = [gatedref.init_params(n_heads, V, 1, seed_of(seed, i)) for i in range(n_layers)]
    return fit(objective, start, recipe, note=note)[0]


def surprise(logits, answers):
    """The mean of -log p(answer). logits, and answers one-hot: [..., V]."""
    logits = logits - getval(logits).max(axis=-1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(axis=-1)) - (logits * answers).sum(axis=-1))


def seed_of(*numbers):
    """A seed of its own for everything random, from a run's seed and what it is for."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ---- What a model does, measured with the reference itself ---------------------------------------


def measure(layers, n_trigrams, seed, n_sequences, **options):
    """What a model does with each of n trigrams, on sequences that complete just one: `accuracy`,
    where its B is not last; `holders`, the smallest sets of heads, of all layers, that hold it, on
    1,000 sequences at most; `shares` [n, H], each head's mean share in the sum of all norms."""
    tokens, completes = gatedref.sample_skip_trigrams(n_trigrams, n_sequences, seed=seed)
    completes &= completes.sum(axis=1, keepdims=True) == 1
    accuracy, held, shares = [], [], []
    for answer in range(n_trigrams + 1, 2 * n_trigrams + 1):
        mine = (completes & (tokens == answer - n_trigrams)).any(axis=1)
        at, model = completes[mine], gatedref.transformer(layers, tokens[mine], **options)
        right = model["logits"].argmax(axis=2) == answer
        accuracy.append(right[:, :-1][at[:, :-1]].mean())
        result = np.concatenate([block["result"] for block in model["blocks"]], axis=2)[at]
        held.append(gatedref.holders(result[:1000], np.full(len(result), answer)[:1000]))
        norms = np.linalg.norm(result, axis=2)  # [S, H]
        shares.append((norms / np.maximum(norms.sum(axis=1, keepdims=True), 1e-300)).mean(axis=0))
    return {"accuracy": accuracy, "holders": held, "shares": shares}


def unexplained(toy, gated, n_trigrams, seed, n_sequences, **options):
    """FVU, the fraction of the toy's output variance that the gated block leaves unexplained; and
    the L0.6 penalty, whatever it was trained with. Both on fresh sequences."""
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, n_sequences, seed=seed)
    parts = np.split(np.eye(toy["W_Q"].shape[1])[tokens], n_sequences // 500)
    targets = [gatedref.attention(toy, x)["attn_out"] for x in parts]
    losses = [gatedref.loss(gated, x, y, 0, **options) for x, y in zip(parts, targets)]
    mse, penalty = (np.mean([scalars[name] for scalars in losses]) for name in ("mse", "penalty"))
    return mse / np.concatenate(targets).var(axis=(0, 1)).mean(), penalty


def singles(holders):
    """For each trigram the heads that hold it by themselves."""
    return [[heads[0] for heads in sets if len(heads) == 1] for sets in holders]


def is_apart(accuracy, holders):
    """Whether every trigram is right and has a head of its own: of the heads that hold each, one
    can be chosen so that none is chosen twice."""
    chosen = itertools.product(*singles(holders))
    return min(accuracy) > 0.99 and any(len(set(heads)) == len(heads) for heads in chosen)


# ---- Experiments: rows for results.json, from which alone tables and pictures are made -----------

SETTINGS = {"2H3T": (2, 3), "3H4T": (3, 4), "4H5T": (4, 5)}
SIZES = {**SETTINGS, "8H10T": (8, 10)}  # heads, trigrams
FIGURES = Path(__file__).resolve().parent / "figures"
OURS, AUTHORS = "this recipe", "the authors' block"
BOTH = {AUTHORS: None, OURS: {}}
ABLATIONS = {
    OURS: {},
    "published objective": {"value_scale": None},
    "no takeover": {"takeovers": False},
    **{f"p = {p}": {"p": p} for p in (0.4, 1.0, 2.0)},
    "no penalty": {"alpha": 0, "takeovers": False},
    "as many heads as the toy": {"heads": 1},
    "d_head 1": {"d_head": 1},
    "d_gate 1": {"d_gate": 1},
    "stuck gates stay stuck": {"reopen": False},
}
PRICE = {f"{alpha:g}": {"alpha": alpha} for alpha in (10, 5, RECIPE["alpha"], 1, 0.25, 0)}
RATED = ("key", "variant", "seed", "apart", "share", "fvu")
JUDGED = (*RATED, "accuracy_toy", "holders_toy", "accuracy_gated", "holders_gated")
JUDGED += ("redraws", "penalty", "n_gated_heads")


def published(key, which):
    """Parameters of the authors' `toy` or `gated` block of a setting."""
    with np.load(FIGURES / "published.npz") as file:
        names = [name for name in file if name.startswith(f"{key}/{which}/")]
        return {name.split("/")[2]: file[name].astype(float) for name in names}


def run_setting(key, seed, steps, note, variants, theirs=False):
    """A toy, and for each variant the gated block that it becomes: rows, with their `blocks`. key:
    of SIZES. steps: QUICK or {}. note(phase, start, size, done): a phase that is a part of it all,
    and what part of that is done. variants: name -> changes to RECIPE, or None for the authors'
    block. theirs: their toy. Ours is drawn again unless it is right and a trigram distributed."""
    (n_heads, n), n_sequences = SIZES[key], 2000 if steps else 10000
    seeds, recipe = partial(seed_of, seed, n_heads, n), {**TOY, **steps}
    judge = partial(measure, n_trigrams=n, seed=seeds(0), n_sequences=n_sequences)
    tokens, _ = gatedref.sample_skip_trigrams(n, 5000, seed=seeds(1))
    size, rows = 1 / (1 + len(variants)), []  # of a part of the job
    for redraws in itertools.count():
        left = size / 2**redraws  # each draw takes half of it
        say = partial(note, "redrawing the toy" if redraws else "toy", size - left, left / 2)
        make = partial(train_toy, n_heads, n, seeds(2, redraws), recipe, note=say)
        toy = published(key, "toy") if theirs else make()[0]
        before = judge([toy])
        good = min(before["accuracy"]) > 0.998 and not all(singles(before["holders"]))
        if good or theirs or steps:
            break
    for number, (variant, changes) in enumerate(variants.items(), 1):
        if changes is None:
            gated, options = published(key, "gated"), {"value_scale": None}
        else:
            say, recipe = partial(note, "search", number * size, size), RECIPE | changes | steps
            gated, options, _ = take_apart(toy, tokens, seed=seeds(3, 0), recipe=recipe, note=say)
        after = judge([gated], **options)
        fvu, penalty = unexplained(toy, gated, n, seeds(4), n_sequences // 2, **options)
        row = {"key": key, "variant": variant, "seed": seed, "redraws": redraws}
        for which, found in (("toy", before), ("gated", after)):
            row |= {f"{name}_{which}": value for name, value in found.items()}
        row |= {"n_gated_heads": len(gated["W_Q"]), "fvu": fvu, "penalty": penalty}
        row["apart"] = is_apart(after["accuracy"], after["holders"])
        row["share"] = np.max(after["shares"], axis=1).mean()
        gate = gatedref.gated_attention(gated, np.eye(2 * n + 2)[None], **options)["gate"][0]
        row["gates"] = gate[:, :, [0, -1]]  # [H, V, 2], at keys A and BOS
        row["blocks"] = {"gated/value_scale": options["value_scale"]}
        for which, block in (("toy", toy), ("gated", gated)):
            row["blocks"] |= {f"{which}/{name}": array for name, array in block.items()}
        rows.append(row)
    return rows


def run_each(run, keys, n_seeds, names, asked, **more):
    """The rows of run(key, seed, ...) for each of these, or what is named of them."""
    seeds = range(asked.seed, asked.seed + (1 if asked.quick else n_seeds))
    jobs = [(key, seed) for key in keys for seed in (seeds if key != "8H10T" else seeds[:5])]
    rows, began, steps = [], time.perf_counter(), QUICK if asked.quick else {}
    for number, (key, seed) in enumerate(jobs):

        def note(phase, start, size, done, number=number, which=f"{key}, seed {seed}"):
            done = max(number + start + size * done, 0.01) / len(jobs)
            left = (time.perf_counter() - began) * (1 / done - 1)
            line = f"{number} of {len(jobs)} done; {which}: {phase}; {left:.0f} s left"
            if sys.stderr.isatty():
                print(f"\r\033[K{line[:79]}", end="\r", file=sys.stderr, flush=True)

        try:
            made = run(key, seed, steps, note, **more)
        except FloatingPointError as wrong:
            raise FloatingPointError(f"{key}, seed {seed}: {wrong}") from None
        rows += [{name: row[name] for name in names or row} for row in made]
    if sys.stderr.isatty():
        print("\033[K", end="", file=sys.stderr, flush=True)
    return rows


def run_main(asked):
    """The three settings of the post, for one seed; their blocks go to `blocks.npz`."""
    rows = run_each(run_setting, SETTINGS, 1, None, asked, variants={OURS: {}})
    arrays = {f"{r['key']}/{name}": a for r in rows for name, a in r.pop("blocks").items()}
    write(asked.out / "blocks.npz", lambda file: np.savez(file, **arrays))
    return rows


# ---- What the method cannot do: three predictions from the discussion under the post -------------
# Each is a toy, a sampler, and variants of the objective, in the plain form.


def run_limit(key, seed, steps, note):
    """The rows of a limit. Its `build` in LIMITS gives the kinds of what its toy does; variants:
    loss(params, n_sequences) -> (unexplained, penalty), the parameters to start from, alpha, and
    what `fit` does between legs; and judge(params), the kinds of what a gated block does."""
    kinds, variants, judge = LIMITS[key][0](seed, steps)
    rows = [{"variant": "toy", "kinds": kinds}] if kinds else []
    for number, (variant, (loss, start, alpha, between)) in enumerate(variants.items()):

        def objective(params, size=40, loss=loss, alpha=alpha):
            fvu, penalty = loss(params, size)
            return {"unexplained": fvu, "loss": fvu + alpha * penalty}

        recipe = {**RECIPE, "steps": 1200, "rate": 0.02, **steps}
        say = partial(note, variant, number / len(variants), 1 / len(variants))
        params, _ = fit(objective, start, recipe, between=between, note=say)
        rows.append({"variant": variant, "kinds": judge(params), **objective(params, 2000)})
    return [{"key": key, "seed": seed, **row} for row in rows]


def across_layers(seed, steps):
    """Two layers: which heads hold a toy's trigrams. One head a layer in the toy, three when gated.
    Error and penalty count for each layer by itself, or for both as if they were one block."""
    judge = partial(measure, n_trigrams=3, seed=seed_of(seed, 3), n_sequences=10000)
    pool, _ = gatedref.sample_skip_trigrams(3, 5000, seed=seed_of(seed, 4))

    def kinds_of(layers, **options):
        """Across: some trigram is held, but not by heads of one layer, the first or second half."""
        accuracy, holders, shares = judge(layers, **options).values()
        half = len(shares[0]) / 2
        if min(accuracy) <= 0.99:
            return ["wrong"]
        if any(s and all(min(heads) < half <= max(heads) for heads in s) for s in holders):
            return ["across"]
        return ["apart" if is_apart(accuracy, holders) else "within one"]

    kinds, rng = [], np.random.default_rng([seed, 3])
    while kinds[-1:] != ["across"] and not (kinds and steps):
        toy = train_toy(1, 3, seed_of(seed, 5, len(kinds)), {**TOY, **steps}, n_layers=2)
        kinds += kinds_of(toy)
    written = [block["attn_out"] for block in gatedref.transformer(toy, pool)["blocks"]]
    variance, scale = sum(written).var(axis=(0, 1)).mean(), 2 * np.abs(written).max()

    def loss(layers, size, as_one):
        tokens, gated = pool[rng.integers(len(pool), size=size)], {"value_scale": scale}
        ours = gatedref.transformer(layers, tokens, activation=reopening, **gated)["blocks"]
        theirs = gatedref.transformer(toy, tokens)["blocks"]
        errors = [a["attn_out"] - b["attn_out"] for a, b in zip(ours, theirs)]
        gates = [block["gate"] for block in ours]
        if as_one:
            errors, gates = [sum(errors)], [np.concatenate(gates, axis=1)]
        mse = sum(np.mean(error * error) for error in errors)
        return mse / variance, sum(map(gatedref.lp_penalty, gates))

    variants = {"a penalty for each layer": (False, 0), "one penalty": (True, 0)}
    variants["one penalty, another start"] = True, 2
    for name, (as_one, first) in variants.items():
        seeds = [seed_of(seed, first + layer) for layer in range(2)]
        start = [gatedref.init_params(3, 8, 2, each, d_gate=2) for each in seeds]
        variants[name] = partial(loss, as_one=as_one), start, 3, None
    return kinds, variants, partial(kinds_of, value_scale=scale)


def sample_copies(size, rng):
    """x [size, 4, 7] has tokens 0 to 3 in any order, one-hot, then three numbers, which token 3
    alone has. Wanted by 0 are the first and second number, by 1 the second and third, by 2 the
    third and first, as uniform attention gives them; nothing else."""
    x = np.eye(7)[rng.permuted(np.tile(np.arange(4), (size, 1)), axis=1)]
    x[..., 4:] += x[..., 3:4] * rng.normal(size=(size, 4, 3))
    asked = x[..., :3] @ [[1, 1, 0], [0, 1, 1], [1, 0, 1]]
    seen = np.cumsum(x[..., 4:], axis=1) / np.arange(1, 5)[:, None]
    return x, np.concatenate([0 * x[..., :4], asked * seen], axis=2)


def overlapping(seed, _):
    """Copies that overlap: whether heads serve several tasks. Six heads copy two numbers for each
    query: of width 1, so that it takes two, or of width 2, where one could do it."""
    rng, pairs, tokens = np.random.default_rng([seed, 4]), np.zeros((7, 7)), np.eye(7)[None]
    variance, pairs[:3, 3] = sample_copies(5000, rng)[1].var(axis=(0, 1)).mean(), 1

    def block_of(params, x, activation="clamp"):  # whose gate sees no number: it could copy it
        seen = {"W_gate_" + n: params["W_gate_" + n] * (np.arange(7) < 4)[:, None] for n in "QK"}
        return gatedref.gated_attention({**params, **seen}, x, activation=activation)

    def loss(params, size):
        x, target = sample_copies(size, rng)
        block = block_of(params, x, reopening)
        error = block["attn_out"] - target
        return np.mean(error * error) / variance, gatedref.lp_penalty(block["gate"])

    def survey(params):
        gate, W = block_of(params, tokens)["gate"][0], gatedref.normalised(params)
        maps = np.reshape(W["W_V"][:, 4:] @ W["W_O"][:, :, 4:], (-1, 1, 1, 9))
        return gate, np.ones_like(gate), gate[..., None] * maps

    def write_map(params, head, _, wanted):  # of rank 2, from three numbers to three
        left, _, right = np.linalg.svd(np.reshape(wanted, (3, 3)))
        params["W_O"][head] = 0
        params["W_V"][head, 4:], params["W_O"][head, :, 4:] = left[:, :2], right[:2]

    def judge(params):
        opened = block_of(params, tokens)["gate"][0, :, :3, 3] > 0.1  # [H, task]
        if loss(params, 2000)[0] > 0.01:
            return ["wrong"]
        if opened.sum(axis=1).max() > 1:
            return ["shared"]
        return ["one a task" if (opened.sum(axis=0) == 1).all() else "several a task"]

    takes = partial(take_over, survey=survey, pairs=pairs, p=0.6, gain=2**0.5, write=write_map)
    variants = {"width 1": (1, None), "width 2": (2, None), "width 2, takeovers": (2, takes)}
    for name, (d_head, between) in variants.items():
        start = gatedref.init_params(6, 7, d_head, seed, d_gate=1)
        # Queries and keys of 0 have no gradient: attention stays uniform.
        start |= {name: 0 * start[name] for name in ("W_Q", "W_K", "b_Q", "b_K")}
        variants[name] = loss, start, 0.1, between
    return [], variants, judge


PAIRS = np.array(list(itertools.combinations_with_replacement(range(1, 5), 2)))  # of signals


def sample_pairs(size, rng):
    """x [size, 6, 22] has two signals of 1 to 4 among noise, 5 to 11, in any order, and last the
    token 0, where it is to be said which of PAIRS they are, token 12 to 21."""
    tokens, answers = rng.integers(5, 12, size=(size, 6)), rng.integers(10, size=size)
    places = rng.permuted(np.tile(np.arange(5), (size, 1)), axis=1)[:, :2]
    np.put_along_axis(tokens, places, PAIRS[answers], axis=1)
    tokens[:, -1] = 0
    return np.eye(22)[tokens], answers


def different_sources(seed, steps):
    """Pairs of signals: by how many heads each is held. Four heads in the toy, twelve when gated.
    The penalty is the method's, or that of a head's mean gate over all keys, for any source."""
    rng = np.random.default_rng([seed, 5])
    x, answers = sample_pairs(5000, np.random.default_rng([seed, 6]))

    def name_pair(params):
        x, answers = sample_pairs(40, rng)
        logits = gatedref.attention(params, x)["attn_out"][:, -1, 12:]
        return {"loss": surprise(logits, np.eye(10)[answers])}

    toy, _ = fit(name_pair, gatedref.init_params(4, 22, 1, seed), {**TOY, **steps})
    target = gatedref.attention(toy, x)["attn_out"][:, -1]
    variance, scale = target.var(axis=0).mean(), 2 * np.abs(target).max()

    def loss(params, size, by_query):
        x, _ = sample_pairs(size, rng)
        block = gatedref.gated_attention(params, x, activation=reopening, value_scale=scale)
        error = (block["attn_out"] - gatedref.attention(toy, x)["attn_out"])[:, -1]
        gate = block["gate"]
        if by_query:
            gate = np.repeat(np.mean(gate, axis=3, keepdims=True), 6, axis=3)
        return np.mean(error * error) / variance, gatedref.lp_penalty(gate)

    def kinds_of(block):
        result, kinds = block["result"][:, -1, :, 12:], []  # [S, H, 10]
        for mine in (answers == pair for pair in range(10)):
            sets = gatedref.holders(result[mine], answers[mine])
            n_heads = min(3, len(sets[0])) if sets else 0
            kinds.append(("wrong", "one head", "two", "three or more")[n_heads])
        return kinds

    start = gatedref.init_params(12, 22, 1, seed, d_gate=1)
    start |= {name: start[name] + 0.7 for name in ("b_gate_Q", "b_gate_K")}  # gates half open
    variants = {"penalty": (False, 0.1), "no penalty": (False, 0), "penalty by query": (True, 0.1)}
    for name, (by_query, alpha) in variants.items():
        variants[name] = partial(loss, by_query=by_query), start, alpha, None
    judge = lambda params: kinds_of(gatedref.gated_attention(params, x, value_scale=scale))
    return kinds_of(gatedref.attention(toy, x)), variants, judge


LIMITS = {  # how many seeds, and the kinds
    "layers": (across_layers, 20, ("across", "within one", "apart", "wrong")),
    "overlap": (overlapping, 12, ("shared", "several a task", "one a task", "wrong")),
    "sources": (different_sources, 30, ("three or more", "two", "one head", "wrong")),
}


# ---- Tables, in Markdown as the pages have them --------------------------------------------------


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
    cells = [(*which, *rates(group)) for which, group in grouped(rows, "key", "variant").items()]
    return table(("setting", "variant", *RATES), cells)


def by_variant(rows):
    """Of each variant of a limit: its name, its rows, and how many are of each of its kinds."""
    for (variant,), group in grouped(rows, "variant").items():
        found = [kind for row in group for kind in row["kinds"]]
        yield variant, group, [found.count(kind) for kind in LIMITS[rows[0]["key"]][2]]


def table_limit(rows):
    lines, names = [], ("unexplained", "loss")
    for variant, group, (*counts, _) in by_variant(rows):
        numbers = [[row[name] for row in group if name in row] for name in names]
        lines.append((variant, *counts, *(f"{np.median(n):.4f}" if n else "" for n in numbers)))
    return table(("variant", *LIMITS[rows[0]["key"]][2][:-1], *names), lines)


# ---- Pictures, in colours that the colour-blind can tell apart (Okabe and Ito; Tol) --------------

HOLDER, OF_P = "#D55E00", {0.6: "#000000", 1.0: "#CC79A7", 2.0: "#56B4E9"}
OF_KIND = "#332288", "#88CCEE", "#DDCC77", "#BBBBBB"
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
            Bs = [f"B{i + 1}" for i in range(shares.shape[1])]
            shown = draw_heads(ax, shares, row, which, Bs, 1)
            title = f"{row['key']}, {which}: {len(shares)} heads"
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
    with picture(out / "penalty.png", title, 3, 1, 1) as ((ax,),):
        for i, (p, colour) in enumerate(OF_P.items()):
            costs = [gatedref.lp_penalty(np.reshape(x, (1, 2, 1, 1)), p) for x in pairs.values()]
            drawn = ax.bar(np.arange(3) + 0.28 * i, costs, 0.26, color=colour, label=f"L{p:g}")
            ax.bar_label(drawn, fmt="%.2f", fontsize=8)
        ax.set_xticks(np.arange(3) + 0.28, pairs)
        ax.set(xlabel="gates of two heads on one pair", ylabel="penalty", ylim=(0, 3.5))


def draw_price(results, out):
    authors = [row for row in results.get("published", []) if row["variant"] == AUTHORS]
    panels = {"apart": np.mean, "share": np.mean, "fvu": np.median}
    with picture(out / "price.png", "What separation costs, by alpha", 3.4, 1, 3) as axes:
        for ax, (name, average) in zip(axes[0], panels.items()):
            for (key,), rows in grouped(results["price"], "key").items():
                runs = grouped(rows, "variant").values()
                ys = [average([row[name] for row in group]) for group in runs]
                (line,) = ax.plot(list(PRICE), ys, "o-", label=key)
                theirs = [row[name] for row in authors if row["key"] == key and name != "apart"]
                look = {"colors": line.get_color(), "ls": "--", "label": f"{key}, authors"}
                ax.hlines(theirs, 0, len(PRICE) - 1, **look)
            ax.axvline(f"{RECIPE['alpha']:g}", color="0.6", ls=":", label="default")
            ax.set(xlabel="alpha", ylabel=name, ylim=(0, 1.02))
        axes[0][0].set(ylabel="apart (part of the runs)")
        axes[0][2].set(ylabel="unexplained (median)", yscale="log", ylim=(1e-4, 1))


def draw_limit(results, out, name):
    build, _, kinds = LIMITS[name]
    variants, _, counts = zip(*by_variant(results[name]))
    with picture(out / f"{name}.png", build.__doc__.split(".")[0], 2.4, 1, 1) as ((ax,),):
        left = np.zeros(len(variants))
        for kind, n, colour in zip(kinds, np.transpose(counts), OF_KIND):
            ax.barh(variants, n, left=left, color=colour, label=kind)
            left += n
        ax.set(xlabel="how many", ylim=(len(variants) - 0.5, -0.5))


# ---- The command ---------------------------------------------------------------------------------

TABLES = {"main": table_main, **dict.fromkeys(LIMITS, table_limit)}
PICTURES = {"main": draw_main, "price": draw_price}
PICTURES |= {name: partial(draw_limit, name=name) for name in LIMITS}
EXPERIMENTS = {
    "main": run_main,
    "published": partial(run_each, run_setting, SETTINGS, 5, JUDGED, variants=BOTH, theirs=True),
    "sweep": partial(run_each, run_setting, SIZES, 20, JUDGED, variants={OURS: {}}),
    "price": partial(run_each, run_setting, SETTINGS, 20, RATED, variants=PRICE),
    "ablations": partial(run_each, run_setting, ["3H4T", "4H5T"], 20, RATED, variants=ABLATIONS),
    **{name: partial(run_each, run_limit, [name], n, None) for name, (_, n, _) in LIMITS.items()},
    "benchmark": lambda asked: import_module("test_gatedref").benchmark(asked.quick, asked.seed),
}


def write(path, fill):
    """Writes a file as a whole or not at all: under another name first, then in one move."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            fill(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(out):
    path = out / "results.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def save(out, results):
    """Puts rows of experiments into results.json, numbers to six digits; the others' stay."""
    digits = lambda text: float(f"{float(text):.6g}")
    text = json.dumps(results, default=lambda array: array.tolist())
    results = {**load(out), **json.loads(text, parse_float=digits)}
    text = json.dumps(results, separators=(",", ":")).replace('{"key"', '\n{"key"') + "\n"
    write(out / "results.json", lambda file: file.write(text.encode()))


def tell(out, name):
    """Prints an experiment's table, draws its pictures, and rewrites the tables in the pages, if
    these are the results that they tell of."""
    results = load(out)
    print("\n".join([f"{name}:", *TABLES.get(name, table_rates)(results[name]), ""]))
    PICTURES.get(name, lambda *_: None)(results, out)
    for page in [*out.glob("README.md"), *out.parent.glob("README.md")] if out == FIGURES else []:
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
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    names, add = [*EXPERIMENTS, "limits"], parser.add_argument
    add("experiments", nargs="*", help=f"which to run, of {', '.join(names)} (default: main)")
    add("--seed", type=int, default=0, help="the first seed (default: 0); another needs --out")
    add("--out", type=Path, help="where to write (default: figures, or figures/quick)")
    add("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    arguments = parser.parse_args(argv)
    asked = arguments.experiments or ["main"]
    for name in [name for name in asked if name not in names]:
        parser.error(f"unknown experiment {name!r}, choose from {', '.join(names)}")
    if arguments.seed < 0 or arguments.seed and not arguments.out:
        parser.error("--seed must be >= 0, and but for 0 needs --out, to keep figures/ as it is")
    arguments.experiments = [n for name in asked for n in (LIMITS if name == "limits" else [name])]
    arguments.out = (arguments.out or FIGURES / ("quick" if arguments.quick else "")).resolve()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        save(arguments.out, {})  # that it can be read and written, before hours are spent
    except (OSError, ValueError, TypeError) as problem:
        parser.error(f"cannot use --out {arguments.out}: {problem}")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    if arguments.quick:
        print("A smoke run: a few steps each, so that nothing is learnt. No number means anything.")
    try:
        for name in arguments.experiments:
            if rows := EXPERIMENTS[name](arguments):
                save(arguments.out, {name: rows})
                tell(arguments.out, name)
    except (KeyboardInterrupt, FloatingPointError, OSError) as problem:
        print(f"train.py: {str(problem) or 'interrupted'}", file=sys.stderr)
        return 130 if isinstance(problem, KeyboardInterrupt) else 1
    print(f"results and pictures are in {arguments.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
