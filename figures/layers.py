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
COLOURS = {
    "apart": "#332288",  # each trigram has a head of its own
    "shared": "#88CCEE",  # not so, in one block
    "within one": "#44AA99",  # not so, but each trigram is held by heads of one layer
    "across": "#DDCC77",  # some trigram is held only by heads of both layers together
    "wrong": "#BBBBBB",  # some trigram is not right
}

TWO_LAYERS = {  # where both layers are gated
    "heads": 3,
    "d_head": 2,
    "d_gate": 2,
    "value_scale": 2.0,
    "alpha": 3,
    "steps": 1200,
    "batch": 40,
    "rate": 0.02,
    "legs": train.RECIPE["legs"],
}
FREE = {**train.RECIPE, "alpha": 0, "takeovers": False}


def main():
    options = common.parse(__doc__, n_seeds=20)
    jobs = []
    for key, variants in VARIANTS.items():
        seeds = [seed for seed in options.seeds if seed < N_SEEDS[key]]
        for seed in seeds:
            for variant in variants:
                jobs.append({"key": key, "variant": variant, "seed": seed})
    rows = common.run("layers", jobs, work, options)
    print(*tables_of(rows))
    draw(options.out / "layers.png", rows)


def work(job, changes):
    _, n_trigrams, least = TOYS[job["key"]]
    seed, variant = job["seed"], job["variant"]
    toy, n_drawn = toy_of(job["key"], seed, changes.get("steps"))
    if variant == TOY:
        row = judged(toy, toy, seed, common.n_fresh(changes), least)
        return {**row, "drawn": n_drawn}

    tokens, target = train.record(toy, n_trigrams, seed)
    if variant == EACH_LAYER:
        gated = gate_layers(toy, tokens, by_layer, seed, {**TWO_LAYERS, **changes})
    elif variant == ONE_PENALTY:
        gated = gate_layers(toy, tokens, as_one, seed, {**TWO_LAYERS, **changes})
    elif variant == ONE_BLOCK:
        gated = gate_as_block(toy, tokens, target, seed, {**train.RECIPE, **changes})
    else:
        gated = gate_as_block(toy, tokens, target, seed, {**FREE, **changes})
    return judged(gated, toy, seed, common.n_fresh(changes), least)


# ---- The toy -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def toy_of(key, seed, n_steps=None):
    """The layers of the first toy that is across, and how many toys were drawn for it.

    (In a short run any toy will do.)
    """
    n_heads, n_trigrams, least = TOYS[key]
    recipe = train.TOY if n_steps is None else {**train.TOY, "steps": n_steps}
    task = train.skip_trigram_task(n_trigrams, 10000, train.seeds_of(seed).selection)
    for n_drawn in itertools.count(1):
        toy_seed = train.seeds_of(seed, n_drawn).toy
        toy = train.train_toy(n_heads, n_trigrams, toy_seed, recipe, n_layers=2)
        if n_steps is not None:
            return toy, n_drawn
        found = train.judge(toy, task["tokens"], task["answers"])
        if kind_of(found, 2, least) == "across":
            return toy, n_drawn


# ---- What is tried -------------------------------------------------------------------


def gate_as_block(toy, tokens, target, seed, recipe):
    """One gated block that learns the sum of what all layers write."""
    n_heads = sum(len(layer["W_Q"]) for layer in toy)
    gated, _ = train.take_apart(tokens, target, n_heads, seed=seed, recipe=recipe)
    return [gated]


def gate_layers(toy, tokens, mse_and_penalty, seed, recipe):
    """Gated heads in both layers, which read the stream of the gated model itself.

    mse_and_penalty: `by_layer` or `as_one`.
    """
    blocks = gatedref.transformer(toy, tokens)["blocks"]
    targets = [block["attn_out"] for block in blocks]
    variance = train.variance_of(sum(targets))
    value_scale = recipe["value_scale"] * np.max(np.abs(targets))
    rng = np.random.default_rng([seed, 3])

    def objective(layers):
        batch = rng.integers(len(tokens), size=recipe["batch"])
        scaled = [{**layer, "value_scale": value_scale} for layer in layers]
        model = gatedref.transformer(scaled, tokens[batch], activation=train.reopening)
        errors, gates = [], []
        for block, target in zip(model["blocks"], targets):
            errors.append(block["attn_out"] - target[batch])
            gates.append(block["gate"])
        mse, penalty = mse_and_penalty(errors, gates)
        loss = mse / variance + recipe["alpha"] * penalty
        return loss, {"loss": loss}

    layers, _ = train.fit(objective, gated_start(toy, seed, recipe), recipe)
    return [{**layer, "value_scale": value_scale} for layer in layers]


def gated_start(toy, seed, recipe):
    start = []
    for number, layer in enumerate(toy):
        H, V, _ = layer["W_Q"].shape
        sizes = (recipe["heads"] * H, V, recipe["d_head"])
        _, layer_seed, _, _ = train.seeds_of(seed, number)
        params = gatedref.init_params(*sizes, layer_seed, d_gate=recipe["d_gate"])
        start.append(params)
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


# ---- What came out -------------------------------------------------------------------


def judged(layers, toy, seed, n_sequences, least):
    """The row of a toy, or of what takes its place, on fresh sequences."""
    V = toy[0]["W_Q"].shape[1]
    n_trigrams = (V - 2) // 2
    task = train.fresh_task(n_trigrams, seed, n_sequences)
    found = train.judge(layers, task["tokens"], task["answers"])
    target = train.written(toy, task["tokens"])
    error = train.written(layers, task["tokens"]) - target
    unexplained = np.mean(error**2) / train.variance_of(target)
    return {
        "kind": kind_of(found, len(layers), least),
        "share": train.share_of(found),
        "unexplained": float(unexplained),
        "holders": found["holders"],
    }


def kind_of(found, n_layers, least=0.99):
    """One of `COLOURS`, for what `judge` found of one layer, or of two of one size.

    least: how often each trigram must be right.
    """
    if min(found["accuracy"]) <= least:
        return "wrong"
    if train.is_apart(found, least):
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
    head = ["toys", "variant", *COLOURS, "share", "unexplained", "most"]
    lines = []
    for (key, variant), group in common.grouped(rows, "key", "variant").items():
        kinds = Counter(row["kind"] for row in group)
        share = np.mean([row["share"] for row in group])
        left = [row["unexplained"] for row in group]
        line = [key, variant, *(kinds[kind] for kind in COLOURS)]
        line += [f"{share:.2f}", f"{np.median(left):.4f}", f"{max(left):.4f}"]
        lines.append(line)
    return [common.table(head, lines)]


def draw(path, rows):
    counts = {}
    for (key, variant), group in common.grouped(rows, "key", "variant").items():
        counts[f"{key}: {variant}"] = Counter(row["kind"] for row in group)
    common.bars(path, "How two layers hold their trigrams", counts, COLOURS, "toys")


if __name__ == "__main__":
    main()
