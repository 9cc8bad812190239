"""What does the recipe need? One change to it at a time, on the toys of `price`.

    python -m figures.ablations     about three hours on one core

Among the changes are two activations that the authors tried in place of the clamp
(tanh, binary gates), and their own recipe for 4H5T at our number of steps and batch.
None of these lets a gate that is stuck come back, so compare them with "stuck gates".
(The third, ReLU, gave the same bits as "stuck gates", since no gate ever reached 1.) A
binary gate cannot be opened just as wide as a takeover needs it: no takeovers there.
(Under tanh it opens a little less wide than meant.)

The last two have no gates at all. Of all heads, the k that write most at a query are
kept, a plain form of what Lorsa does (He et al., 2025). Why not do that?

The unchanged recipe, and the one with no penalty, are read from `price.json`.
"""

import json

import autograd.numpy as np
from autograd.tracer import getval

import gatedref
import train
from figures import common, price

KEYS = ("3H4T", "4H5T")


def main():
    options = common.parse(__doc__, n_seeds=20)
    jobs = []
    for key in KEYS[:1] if options.is_smoke else KEYS:
        for seed in options.seeds:
            for variant in (*CHANGES, *TOP):
                jobs.append({"key": key, "variant": variant, "seed": seed})
    rows = common.run("ablations", jobs, work, options, CHANGES)
    print(*tables_of(rows))


def work(job, is_smoke):
    n_heads, n_trigrams = train.SETTINGS[job["key"]]
    variant, seed = job["variant"], job["seed"]
    toy, tokens, target = price.recorded_toy(job["key"], seed, is_smoke)
    x = np.eye(target.shape[2])[tokens]
    if variant in TOP:
        recipe = train.shortened(train.RECIPE, is_smoke)
        params = fit_top(TOP[variant], x, target, n_heads, seed, recipe)
        write = writes_top(TOP[variant], params)
    else:
        recipe = train.shortened(CHANGES[variant], is_smoke)
        gated, _ = train.take_apart(x, target, n_heads, seed=seed, recipe=recipe)
        write = train.writes([gated], recipe.activation)

    n_fresh = train.n_fresh(is_smoke)
    task = train.fresh_task(n_trigrams, seed, n_fresh)
    return common.kept_of(train.verdict(write, [toy], task, n_lured=n_fresh))


# ---- The changes ---------------------------------------------------------------------


def tanh(scores):
    return np.tanh(np.where(scores > 0, scores, 0.0))


def binary(scores):
    """1 above a half, else 0. The derivative is that of the clamp, as an estimate."""
    clamped = gatedref.clamp(scores)
    gate = np.where(getval(scores) > 0.5, 1.0, 0.0)
    return clamped + (gate - getval(clamped))  # the bracket has no derivative


OURS = train.RECIPE
CHANGES = {
    "published recipe": train.PUBLISHED._replace(steps=OURS.steps, batch=OURS.batch),
    "published objective": OURS._replace(value_scale=None),
    "no takeover": OURS._replace(takeovers=False),
    "p = 0.4": OURS._replace(p=0.4),
    "p = 1": OURS._replace(p=1.0),
    "p = 2": OURS._replace(p=2.0),
    "as many heads as the toy": OURS._replace(expansion=1),
    "three times the heads": OURS._replace(expansion=3),
    "d_head 1": OURS._replace(d_head=1),
    "d_gate 1": OURS._replace(d_gate=1),
    "stuck gates": OURS._replace(activation=gatedref.clamp),
    "tanh": OURS._replace(activation=tanh),
    "binary gates, no takeover": OURS._replace(activation=binary, takeovers=False),
}


# ---- Top-k in place of gates ---------------------------------------------------------

TOP = {"top-1, no gates": 1, "top-2, no gates": 2}


def fit_top(k, x, target, n_heads, seed, recipe):
    """An ungated block with spare heads, trained while k heads are kept at a query."""
    n_kept_from = recipe.expansion * n_heads
    start = gatedref.init_params(n_kept_from, x.shape[2], recipe.d_head, seed)
    start = {name: array.astype(x.dtype) for name, array in start.items()}
    variance = gatedref.variance_of(target)

    def loss_of(layers, x, target):
        kept = keep_top(k, gatedref.attention(layers[0], x)["result"])
        return np.mean((np.sum(kept, axis=2) - target) ** 2) / variance

    draw = price.batches(x, target, recipe.batch, np.random.default_rng([seed, 4]))
    layers = train.descend(loss_of, [start], draw, recipe)
    return layers[0]


def writes_top(k, params):
    """A function of tokens, like `train.writes`, of what is kept.

    For `holders`, too, a head that is not kept writes 0, and taking heads away lets no
    other one in.
    """
    V = params["W_Q"].shape[1]

    def write(tokens):
        return keep_top(k, gatedref.attention(params, np.eye(V)[tokens])["result"])

    return write


def keep_top(k, result):
    """What the k heads write that write most at each query, and 0 for the others."""
    norms = np.linalg.norm(getval(result), axis=3)  # [B, T, H]
    least = np.sort(norms, axis=2)[:, :, -k]  # of those that are kept
    is_kept = norms >= least[:, :, None]
    return np.where(is_kept[..., None], result, 0.0)


# ---- The table -----------------------------------------------------------------------


def priced(seeds):
    """The rows of `price` that belong here, under the names that they have here."""
    names = {price.DEFAULT: "this recipe", "alpha 0": "no penalty"}
    rows = []
    for row in json.loads((common.FIGURES / "price.json").read_text()):
        if row["seed"] in seeds and row["variant"] in names:
            rows.append({**row, "variant": names[row["variant"]]})
    return rows


def tables_of(rows):
    """A line for each variant, with both settings side by side."""
    keys = list(dict.fromkeys(row["key"] for row in rows))
    rows = [*priced({row["seed"] for row in rows}), *rows]
    groups = common.grouped(rows, "variant", "key")
    head = ["variant"]
    for key in keys:
        head += [f"{key}: apart", "share", "unexplained", "fires without A"]
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        line = [variant]
        for key in keys:
            apart, share, left, _, fires = common.summary(groups[variant, key])
            line += [apart, share, left, fires]
        lines.append(line)
    return [common.table(head, lines)]


if __name__ == "__main__":
    main()
