"""Can gated blocks undo what the heads of two layers do together?

    python -m figures.layers        about 45 minutes on one core

A toy of two layers learns skip trigrams. It is *across* if some trigram is held only by
heads of both layers together; other toys are not used. Four things are tried on it:

    a penalty for each layer    Gated heads in both layers; the second one reads what
                                the first one writes. Each layer has an error and a
                                penalty of its own.
    one penalty                 The same, but with one error, of the sum of what both
                                layers write, and one penalty for the heads of both.
    one block                   One gated block in place of both layers. It reads what
                                the first one reads, and learns the sum of what both
                                write.
    one block, no penalty       The same, and its heads may share. It tells how much the
                                layers compute by composition, the second one from what
                                the first one has written, which no single block can.

Readers of the authors' post expected that two layers of n heads hold n^2 + n trigrams
at most before heads of both layers have to hold some together. (Two heads can hold any
number, see `gatedref.handmade_superposition`.) So there are toys of two kinds: one head
a layer and three trigrams, and two heads a layer and seven trigrams.
"""

import itertools
from collections import Counter
from functools import lru_cache

import autograd.numpy as np

import gatedref
import train
from figures import common

TOY = "toy"
EACH_LAYER = "a penalty for each layer"
ONE_PENALTY = "one penalty"
ONE_BLOCK = "one block"
NO_PENALTY = "one block, no penalty"

# Heads a layer, trigrams, and how often a toy must be right on each trigram at least.
TOYS = {"1H3T": (1, 3, 0.99), "2H7T": (2, 7, 0.98)}
N_SEEDS = {"1H3T": 20, "2H7T": 5}
VARIANTS = {
    "1H3T": (TOY, EACH_LAYER, ONE_PENALTY, ONE_BLOCK, NO_PENALTY),
    "2H7T": (TOY, ONE_BLOCK, NO_PENALTY),
}
KINDS = {
    "apart": ("#332288", "apart: a head of its own for each trigram"),
    "shared": ("#88CCEE", "shared: in one block, heads share a trigram"),
    "within one": ("#44AA99", "within one: heads of one layer share a trigram"),
    "across": ("#DDCC77", "across: a trigram takes heads of both layers"),
    "wrong": ("#BBBBBB", "wrong: a trigram is not right"),
}

RECIPES = {
    ONE_BLOCK: train.RECIPE,
    NO_PENALTY: train.RECIPE._replace(alpha=0, takeovers=False),
    "two layers": train.RECIPE._replace(  # where both layers are gated
        steps=1200, rate=0.02, expansion=3, d_head=2, takeovers=False, alpha=3
    ),
}


def main():
    options = common.parse(__doc__, n_seeds=20)
    jobs = []
    for key, variants in VARIANTS.items():
        seeds = [seed for seed in options.seeds if seed < N_SEEDS[key]]
        for seed in seeds:
            for variant in variants:
                jobs.append({"key": key, "variant": variant, "seed": seed})
    rows = common.run("layers", jobs, work, options, RECIPES)
    print(*tables_of(rows))
    draw(options.out / "layers.png", rows)


def work(job, is_smoke):
    _, n_trigrams, least = TOYS[job["key"]]
    seed, variant = job["seed"], job["variant"]
    toy, n_drawn = toy_across(job["key"], seed, is_smoke)
    task = train.fresh_task(n_trigrams, seed, train.n_fresh(is_smoke))
    if variant == TOY:
        return {**row_of(toy, toy, task, least), "drawn": n_drawn}

    tokens, target = train.record(toy, n_trigrams, seed)
    if variant in BY_LAYER:
        recipe = train.shortened(RECIPES["two layers"], is_smoke)
        gated = gate_layers(toy, tokens, BY_LAYER[variant], seed, recipe)
    else:
        recipe = train.shortened(RECIPES[variant], is_smoke)
        gated = gate_as_block(toy, tokens, target, seed, recipe)
    return row_of(gated, toy, task, least)


# ---- The toy -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def toy_across(key, seed, is_smoke):
    """The layers of the first toy that is across, and how many toys were drawn for it.

    (In a smoke run any toy will do.)
    """
    n_heads, n_trigrams, least = TOYS[key]
    recipe = train.shortened(train.TOY, is_smoke)
    task = train.skip_trigram_task(n_trigrams, 10000, train.seeds_of(seed).selection)
    for n_drawn in itertools.count(1):
        toy_seed = train.seeds_of(seed, n_drawn).toy
        toy = train.train_toy(n_heads, n_trigrams, toy_seed, recipe, n_layers=2)
        found = train.judge_on(train.writes(toy), task)
        if is_smoke or kind_of(found, 2, least) == "across":
            return toy, n_drawn


# ---- What is tried -------------------------------------------------------------------


def gate_as_block(toy, tokens, target, seed, recipe):
    """One gated block that learns the sum of what all layers write."""
    n_heads = sum(len(layer["W_Q"]) for layer in toy)
    x = np.eye(target.shape[2])[tokens]
    gated, _ = train.take_apart(x, target, n_heads, seed=seed, recipe=recipe)
    return [gated]


def gate_layers(toy, tokens, mse_and_penalty, seed, recipe):
    """Gated heads in both layers, which read the stream of the gated model itself.

    mse_and_penalty: `by_layer` or `as_one`.
    """
    blocks = gatedref.transformer(toy, tokens)["blocks"]
    targets = [block["attn_out"] for block in blocks]
    variance = gatedref.variance_of(sum(targets))
    fixed = train.fixed_params(np.stack(targets), recipe)
    rng = np.random.default_rng([seed, 3])

    def draw():
        return (rng.integers(len(tokens), size=recipe.batch),)

    def loss_of(layers, batch):
        whole = [{**layer, **fixed} for layer in layers]
        model = gatedref.transformer(whole, tokens[batch], activation=recipe.activation)
        errors, gates = [], []
        for block, target in zip(model["blocks"], targets):
            errors.append(block["attn_out"] - target[batch])
            gates.append(block["gate"])
        mse, penalty = mse_and_penalty(errors, gates)
        return mse / variance + recipe.alpha * penalty

    start = gated_start(toy, seed, recipe)
    layers = train.descend(loss_of, start, draw, recipe)
    return [{**layer, **fixed} for layer in layers]


def gated_start(toy, seed, recipe):
    start = []
    for number, layer in enumerate(toy):
        H, V, _ = layer["W_Q"].shape
        layer_seed = train.seeds_of(seed, number).selection
        sizes = (recipe.expansion * H, V, recipe.d_head, layer_seed, recipe.d_gate)
        start.append(gatedref.init_params(*sizes))
    return start


def by_layer(errors, gates):
    """An error and a penalty for each layer, summed."""
    mse = sum(np.mean(error**2) for error in errors)
    penalty = sum(gatedref.lp_penalty(gate) for gate in gates)
    return mse, penalty


def as_one(errors, gates):
    """The error of what all layers write together, and one penalty for all heads."""
    mse = np.mean(sum(errors) ** 2)
    penalty = gatedref.lp_penalty(np.concatenate(gates, axis=1))
    return mse, penalty


BY_LAYER = {EACH_LAYER: by_layer, ONE_PENALTY: as_one}

# ---- What came out -------------------------------------------------------------------


def row_of(layers, toy, task, least):
    """The row of a toy, or of what takes its place, on fresh sequences."""
    found = train.judge_on(train.writes(layers), task)
    target = train.written(toy, task.tokens)
    attn_out = train.written(layers, task.tokens)
    return {
        "kind": kind_of(found, len(layers), least),
        "share": gatedref.share_of(found),
        "unexplained": gatedref.unexplained(attn_out, target),
        "holders": found["holders"],
    }


def kind_of(found, n_layers, least=0.99):
    """One of `KINDS`, for what `judge` found of one layer, or of two of one size.

    least: how often each trigram must be right.
    """
    if min(found["accuracy"]) <= least:
        return "wrong"
    if gatedref.is_apart(found, least):
        return "apart"
    if n_layers == 1:
        return "shared"
    n_in_first = len(found["shares"][0]) // 2
    for sets in found["holders"]:
        if is_across(sets, n_in_first):
            return "across"
    return "within one"


def is_across(sets, n_in_first):
    """Whether a trigram is held, but by no set of heads that are all in one layer."""
    for heads in sets:
        if max(heads) < n_in_first or min(heads) >= n_in_first:
            return False
    return len(sets) > 0


def tables_of(rows):
    head = ["toys", "variant", *KINDS, "share", "unexplained", "most"]
    lines = []
    for (key, variant), group in common.grouped(rows, "key", "variant").items():
        kinds = Counter(row["kind"] for row in group)
        share = np.mean([row["share"] for row in group])
        left = [row["unexplained"] for row in group]
        line = [key, variant, *(kinds[kind] for kind in KINDS)]
        line += [f"{share:.2f}", f"{np.median(left):.4f}", f"{max(left):.4f}"]
        lines.append(line)
    return [common.table(head, lines)]


def draw(path, rows):
    counts = {}
    for (key, variant), group in common.grouped(rows, "key", "variant").items():
        counts[f"{key}: {variant}"] = Counter(row["kind"] for row in group)
    common.bars(path, "How two layers hold their trigrams", counts, KINDS, "toys")


if __name__ == "__main__":
    main()
