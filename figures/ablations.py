"""What does the recipe need? One change to it at a time, on the toys of `price`.

    python -m figures.ablations     about three hours on one core

Among the changes are the three activations that the authors tried in place of the clamp
(ReLU, tanh, binary gates), and their own recipe for 4H5T at our number of steps and
batch. None of these lets a gate that is stuck come back, so compare them with "stuck
gates". A binary gate cannot be opened just as wide as a takeover needs it: no takeovers
there. (Under tanh it opens a little less wide than meant.)

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
    for key in KEYS:
        for seed in options.seeds:
            for variant in (*CHANGES, *TOP):
                jobs.append({"key": key, "variant": variant, "seed": seed})
    rows = common.run("ablations", jobs, work, options)
    print(*tables_of(rows))


def work(job, changes):
    n_heads, n_trigrams = train.SETTINGS[job["key"]]
    variant, seed = job["variant"], job["seed"]
    toy, tokens, target = price.toy_of(job["key"], seed, changes.get("steps"))
    recipe = {**train.RECIPE, **CHANGES.get(variant, {}), **changes}

    if variant in TOP:
        k = TOP[variant]
        params = fit_top(k, tokens, target, n_heads, seed, recipe)

        def write(x):
            return keep_top(k, gatedref.attention(params, x)["result"])

    else:
        gated, _ = train.take_apart(tokens, target, n_heads, seed=seed, recipe=recipe)
        activation = recipe["activation"]

        def write(x):
            return gatedref.gated_attention(gated, x, activation=activation)["result"]

    return verdict(write, toy, n_trigrams, seed, common.n_fresh(changes))


# ---- The changes ---------------------------------------------------------------------


def relu(scores):
    return np.where(scores > 0, scores, 0.0)


def tanh(scores):
    return np.tanh(relu(scores))


def binary(scores):
    """1 above a half, else 0. The derivative is that of the clamp, as an estimate."""
    clamped = gatedref.clamp(scores)
    gate = np.where(getval(scores) > 0.5, 1.0, 0.0)
    return clamped + (gate - getval(clamped))  # the bracket has no derivative


OUR_LENGTH = {"steps": train.RECIPE["steps"], "batch": train.RECIPE["batch"]}
CHANGES = {
    "published recipe": {**train.PUBLISHED, **OUR_LENGTH},
    "published objective": {"value_scale": None},
    "no takeover": {"takeovers": False},
    "p = 0.4": {"p": 0.4},
    "p = 1": {"p": 1.0},
    "p = 2": {"p": 2.0},
    "as many heads as the toy": {"heads": 1},
    "three times the heads": {"heads": 3},
    "d_head 1": {"d_head": 1},
    "d_gate 1": {"d_gate": 1},
    "stuck gates": {"activation": gatedref.clamp},
    "ReLU": {"activation": relu},
    "tanh": {"activation": tanh},
    "binary gates, no takeover": {"activation": binary, "takeovers": False},
}


# ---- Top-k in place of gates ---------------------------------------------------------

TOP = {"top-1, no gates": 1, "top-2, no gates": 2}


def fit_top(k, tokens, target, n_heads, seed, recipe):
    """An ungated block with spare heads, trained while k heads are kept at a query."""
    V = target.shape[2]
    start = gatedref.init_params(recipe["heads"] * n_heads, V, recipe["d_head"], seed)
    rng = np.random.default_rng([seed, 4])
    variance = train.variance_of(target)

    def objective(params):
        batch = rng.integers(len(tokens), size=recipe["batch"])
        x = np.eye(V)[tokens[batch]]
        kept = keep_top(k, gatedref.attention(params, x)["result"])
        mse = np.mean((np.sum(kept, axis=2) - target[batch]) ** 2)
        loss = mse / variance
        return loss, {"loss": loss}

    params, _ = train.fit(objective, start, recipe)
    return params


def keep_top(k, result):
    """What the k heads write that write most at each query, and 0 for the others."""
    norms = np.linalg.norm(getval(result), axis=3)  # [B, T, H]
    least = np.sort(norms, axis=2)[:, :, -k]  # of those that are kept
    is_kept = norms >= least[:, :, None]
    return np.where(is_kept[..., None], result, 0.0)


# ---- The verdict, and the table ------------------------------------------------------


def verdict(write, toy, n_trigrams, seed, n_sequences):
    """The verdict of `train.verdict`, of a block that is no plain gated one.

    write(x) -> what each head writes, [B, T, H, V], for tokens x one-hot, [B, T, V]. Of
    top-k that is what is kept: for `holders`, too, a head that is not kept writes 0,
    and taking heads away lets no other one in.
    """
    task = train.fresh_task(n_trigrams, seed, n_sequences)
    tokens = task["tokens"]
    x = np.eye(2 * n_trigrams + 2)[tokens]
    result = np.concatenate([write(x[part]) for part in train.in_parts(tokens)])
    attn_out = np.sum(result, axis=2)
    target = train.written([toy], tokens)
    mse = np.mean((attn_out - target) ** 2)

    at, lured = task["answers"] >= 0, task["lures"] >= 0
    due, lure = task["answers"][at], task["lures"][lured]
    found = train.judge_results(result[at], (x + attn_out)[at], due)
    fires = train.results_without_A(result[at], due, result[lured], lure, found)
    found["apart"] = train.is_apart(found)
    found["share"] = train.share_of(found)
    found["unexplained"] = float(mse / train.variance_of(target))
    found["fires_without_A"] = sum(fires)
    return common.kept_of(found)


def priced(seeds):
    """The rows of `price` that belong here, under the names that they have here."""
    names = {price.DEFAULT: "this recipe", "alpha 0": "no penalty"}
    rows = []
    for row in json.loads((common.FIGURES / "price.json").read_text()):
        is_same_toy = row["key"] in KEYS and row["seed"] in seeds
        if is_same_toy and row["variant"] in names:
            rows.append({**row, "variant": names[row["variant"]]})
    return rows


def tables_of(rows):
    rows = [*priced({row["seed"] for row in rows}), *rows]
    lines = []
    for key in KEYS:
        mine = [row for row in rows if row["key"] == key]
        for (variant,), group in common.grouped(mine, "variant").items():
            lines.append([key, variant, *common.summary(group)])
    return [common.table(["setting", "variant", *common.SUMMARY], lines)]


if __name__ == "__main__":
    main()
