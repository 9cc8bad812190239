"""Does the penalty make one head hold what comes from two tokens?

    python -m figures.sources       about a quarter of an hour on one core

Two signals of four stand among noise, and at the last token a toy is to name the pair
of them, in either order: one of ten. Heads that look at one signal each share no
(query, key) pair, so the penalty never sees them together.

Nor could any gate of this form help. A gate sees one query and one key: at one signal
it cannot know the other one. What a head writes for the pair {1, 2} is therefore a
weighted mean of what it writes for {1, 1} and for {2, 2} in the same noise, whatever
its gates and its attention are (a test says so). It cannot be silent for these two, and
speak for {1, 2}.

A toy of four heads learns the task. A gated block of twelve heads learns to write what
the toy writes, with three penalties:

    penalty             that of the method
    no penalty          none
    penalty by query    that of the method, for a head's mean gate over all keys.
                        It sees heads together that serve one query, from any sources.
"""

import itertools
from collections import Counter
from functools import lru_cache

import autograd.numpy as np

import gatedref
import train
from figures import common

KINDS = {  # by the fewest heads that hold a pair
    "one head": ("#332288", "one head"),
    "two": ("#88CCEE", "two heads"),
    "three or more": ("#DDCC77", "three or more"),
    "wrong": ("#BBBBBB", "not even all heads"),
}
RECIPE = train.RECIPE._replace(
    steps=1200, rate=0.02, expansion=3, d_head=1, d_gate=1, takeovers=False, alpha=0.1
)
N_HEADS = 4

# Token 0 asks for the pair, 1 to 4 are signals, 5 to 11 noise, 12 to 21 name a pair.
V = 22
NOISE = 5
NAMES = 12
PAIRS = np.array(list(itertools.combinations_with_replacement(range(1, 5), 2)))


def main():
    options = common.parse(__doc__, n_seeds=30)
    jobs = []
    for seed in options.seeds:
        for variant in ("toy", *PENALTIES):
            jobs.append({"variant": variant, "seed": seed})
    rows = common.run("sources", jobs, work, options, RECIPE)
    print(*tables_of(rows))
    draw(options.out / "sources.png", rows)


def work(job, is_smoke):
    seed, variant = job["seed"], job["variant"]
    toy = toy_of(seed, is_smoke)
    if variant == "toy":
        return row_of(gatedref.attention, toy, toy, seed)
    penalty_of, alpha = PENALTIES[variant]
    recipe = train.shortened(RECIPE._replace(alpha=alpha), is_smoke)
    gated = gate_toy(toy, penalty_of, seed, recipe)
    return row_of(gatedref.gated_attention, gated, toy, seed)


# ---- The task, and a toy that learns it ----------------------------------------------


def sample_pairs(size, rng):
    """Tokens one-hot, x [size, 6, 22]: two signals in noise, then token 0.

    And for each which of `PAIRS` its signals are: answers [size].
    """
    tokens = rng.integers(NOISE, NAMES, size=(size, 6))
    answers = rng.integers(len(PAIRS), size=size)
    places = rng.permuted(np.tile(np.arange(5), (size, 1)), axis=1)
    np.put_along_axis(tokens, places[:, :2], PAIRS[answers], axis=1)
    tokens[:, 5] = 0
    return np.eye(V)[tokens], answers


@lru_cache(maxsize=1)
def toy_of(seed, is_smoke):
    """A block that has learnt to name pairs at the last token."""
    recipe = train.shortened(train.TOY, is_smoke)
    rng = np.random.default_rng([seed, 5])

    def draw():
        return sample_pairs(recipe.batch, rng)

    def loss_of(layers, x, answers):
        attn_out = gatedref.attention(layers[0], x)["attn_out"]
        one_hot = np.eye(len(PAIRS))[answers]
        return train.cross_entropy(attn_out[:, -1, NAMES:], one_hot)

    start = [gatedref.init_params(N_HEADS, V, 1, seed)]
    (toy,) = train.descend(loss_of, start, draw, recipe)
    return toy


# ---- Training ------------------------------------------------------------------------


def gate_toy(toy, penalty_of, seed, recipe):
    """A gated block that learns to write what the toy writes at the last token.

    penalty_of(gate) -> a scalar.
    """
    rng = np.random.default_rng([seed, 6])
    x, _ = sample_pairs(5000, rng)
    target = target_of(toy, x)
    variance = gatedref.variance_of(target)
    params, fixed = train.start_of(x, target, N_HEADS, seed, recipe)
    params["b_gate_Q"] = params["b_gate_Q"] + 0.7  # the gates begin half open
    params["b_gate_K"] = params["b_gate_K"] + 0.7

    def draw():
        x, _ = sample_pairs(recipe.batch, rng)
        return (x,)

    def loss_of(layers, x):
        whole = {**layers[0], **fixed}
        block = gatedref.gated_attention(whole, x, activation=recipe.activation)
        error = block["attn_out"][:, -1:] - target_of(toy, x)
        penalty = penalty_of(block["gate"])
        return np.mean(error**2) / variance + recipe.alpha * penalty

    (params,) = train.descend(loss_of, [params], draw, recipe)
    return {**params, **fixed}


def target_of(toy, x):
    """What the toy writes at the last token: [S, 1, V]"""
    return gatedref.attention(toy, x)["attn_out"][:, -1:]


def penalty_by_query(gate):
    """The penalty, where each gate is its head's mean over all keys."""
    mean = np.mean(gate, axis=3, keepdims=True)
    return gatedref.lp_penalty(np.repeat(mean, gate.shape[3], axis=3))


# The penalty of each variant, and its alpha.
PENALTIES = {
    "penalty": (gatedref.lp_penalty, RECIPE.alpha),
    "no penalty": (gatedref.lp_penalty, 0),
    "penalty by query": (penalty_by_query, RECIPE.alpha),
}

# ---- What came out -------------------------------------------------------------------


def row_of(attend, params, toy, seed):
    """The row of a toy or of a gated block, on 5,000 fresh sequences.

    attend: `attention` or `gated_attention`.
    """
    x, answers = sample_pairs(5000, np.random.default_rng([seed, 7]))
    block = attend(params, x)
    left = gatedref.unexplained(block["attn_out"][:, -1:], target_of(toy, x))
    kinds = kinds_of(block["result"][:, -1, :, NAMES:], answers)
    return {"kinds": kinds, "unexplained": left}


def kinds_of(result, answers):
    """One of `KINDS` for each pair, by the fewest heads that hold it.

    result: [S, H, pair], what each head writes. answers: [S].
    """
    names = ["wrong", "one head", "two", "three or more"]
    kinds = []
    for pair in range(len(PAIRS)):
        is_mine = answers == pair
        sets = gatedref.holders(result[is_mine], answers[is_mine])
        n_heads = len(sets[0]) if sets else 0
        kinds.append(names[min(n_heads, 3)])
    return kinds


def kinds_by_variant(rows):
    """How many pairs are of which kind: {variant: {kind: how many}}"""
    counts = {}
    for row in rows:
        counts.setdefault(row["variant"], Counter()).update(row["kinds"])
    return counts


def tables_of(rows):
    counts = kinds_by_variant(rows)
    lines = []
    for (variant,), group in common.grouped(rows, "variant").items():
        median = np.median([row["unexplained"] for row in group])
        numbers = [counts[variant][kind] for kind in KINDS]
        lines.append([variant, *numbers, f"{median:.4f}"])
    return [common.table(["variant", *KINDS, "unexplained"], lines)]


def draw(path, rows):
    title = "How many heads hold a pair: with the penalty as many as in the toys"
    common.bars(path, title, kinds_by_variant(rows), KINDS, "pairs")


if __name__ == "__main__":
    main()
