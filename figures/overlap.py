"""Do gated heads stop overlapping, where each task takes two of them?

    python -m figures.overlap       about three minutes on one core

Each of three queries copies two of three numbers: query 0 the first and the second,
query 1 the second and the third, query 2 the third and the first. A head of width 1
copies one number, so each query takes two heads. Three heads will do, if each serves
two queries; or six, if each serves one. Either way two gates are open for each query,
so that error and penalty are the same: `copying_block` makes both, and a test says that
their losses are equal, 0.0595 (in the units of the table). So nothing drives training
from three heads to six.

A head of width 2 could do a query by itself, and three such heads would have a loss of
0.0187. Does training find them? Six gated heads are trained: of width 1; of width 2; of
width 2 with takeovers, where spare heads take over what others share.
"""

import math
from collections import Counter

import autograd.numpy as np

import gatedref
import train
from figures import common

# The width of a head, and whether there are takeovers.
VARIANTS = {
    "width 1": (1, False),
    "width 2": (2, False),
    "width 2, takeovers": (2, True),
}
KINDS = {
    "one a query": ("#332288", "one a query: one head for each query"),
    "several a query": ("#88CCEE", "several a query: no head serves two queries"),
    "shared": ("#DDCC77", "shared: some head serves two queries"),
    "wrong": ("#BBBBBB", "wrong: more than 1% is unexplained"),
}
N_HEADS = 6
RECIPE = train.RECIPE._replace(
    steps=1200, rate=0.02, d_gate=1, value_scale=None, alpha=0.1
)

D = 7  # components 0 to 2 are the queries, 3 is the source, 4 to 6 are its numbers
IS_WANTED = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]])  # [query, number]


def main():
    options = common.parse(__doc__, n_seeds=12)
    jobs = []
    for seed in options.seeds:
        for variant in VARIANTS:
            jobs.append({"variant": variant, "seed": seed})
    rows = common.run("overlap", jobs, work, options, RECIPE)
    print(*tables_of(rows))
    draw(options.out / "overlap.png", rows)


def work(job, is_smoke):
    d_head, takeovers = VARIANTS[job["variant"]]
    recipe = RECIPE._replace(d_head=d_head, takeovers=takeovers)
    params = train_block(job["seed"], train.shortened(recipe, is_smoke))
    return row_of(params, job["seed"])


# ---- The task, and blocks that do it by hand -----------------------------------------


def sample_copies(size, rng):
    """Tokens, and what is to be written: x and target [size, 4, 7].

    The tokens are the three queries and the source, in any order, one-hot; the source
    has three normal numbers besides. All attention is uniform: where the source has
    come before a query at position t, the query is to write 1 / (t + 1) of its two
    numbers.
    """
    tokens = rng.permuted(np.tile(np.arange(4), (size, 1)), axis=1)
    x = np.eye(D)[tokens]
    is_source = x[:, :, 3:4]
    x[:, :, 4:] = is_source * rng.normal(size=(size, 4, 3))

    n_keys = np.arange(1, 5)[:, None]
    seen = np.cumsum(x[:, :, 4:], axis=1) / n_keys
    is_wanted = x[:, :, :3] @ IS_WANTED
    target = np.zeros((size, 4, D))
    target[:, :, 4:] = is_wanted * seen
    return x, target


def copying_block(numbers, queries):
    """A gated block by hand, whose head h copies `numbers[h]` for `queries[h]`.

    numbers, queries: a list for each head. A head has a column for each number.
    """
    params = gatedref.init_params(len(numbers), D, len(numbers[0]), d_gate=1)
    params = {name: np.zeros_like(array) for name, array in params.items()}
    params["W_gate_K"][:, 3] = 1
    for head in range(len(numbers)):
        params["W_gate_Q"][head, queries[head]] = 1
        for column, number in enumerate(numbers[head]):
            params["W_V"][head, 4 + number, column] = 1
            params["W_O"][head, column, 4 + number] = 1
    return params


# ---- Training ------------------------------------------------------------------------


def train_block(seed, recipe):
    rng = np.random.default_rng([seed, 4])
    _, target = sample_copies(5000, rng)
    variance = gatedref.variance_of(target)
    alpha = recipe.alpha * variance

    def draw():
        return sample_copies(recipe.batch, rng)

    def loss_of(layers, x, target):
        block = blind(layers[0])
        loss, _ = train.loss_of_block(block, {}, x, target, variance, alpha, recipe)
        return loss

    params = gatedref.init_params(N_HEADS, D, recipe.d_head, seed, recipe.d_gate)
    for name in ("W_Q", "W_K", "b_Q", "b_K"):  # at 0 they have no gradient, and stay
        params[name] = np.zeros_like(params[name])
    for leg, factor in enumerate(recipe.rate_factors):
        if leg > 0 and recipe.takeovers:
            params = take_over(params)
        n_steps = len(train.steps_of(leg, recipe))
        this_leg = recipe._replace(steps=n_steps, rate_factors=(factor,))
        (params,) = train.descend(loss_of, [params], draw, this_leg)
    return blind(params)


def blind(params):
    """The block with gates that see no number, or they could copy it themselves."""
    is_seen = np.arange(D)[:, None] < 4
    W_gate_Q = params["W_gate_Q"] * is_seen
    W_gate_K = params["W_gate_K"] * is_seen
    return {**params, "W_gate_Q": W_gate_Q, "W_gate_K": W_gate_K}


def take_over(params):
    """`train.take_over`, where a head writes a map from three numbers to three."""
    frequency = np.zeros((D, D))
    frequency[:3, 3] = 1 / 16  # at other pairs there is nothing to write
    reach = math.sqrt(2)  # the norm of a map of two columns, each of length 1
    return train.take_over(params, look, frequency, RECIPE.p, reach, write_map)


def look(params):
    """Gates, attention (the same for all) and maps to write, as `train.survey`."""
    params = blind(params)
    gate = gates_of(params)
    weights = gatedref.normalised(params)
    maps = weights["W_V"][:, 4:] @ weights["W_O"][:, :, 4:]  # [H, 3, 3]
    value = np.reshape(maps, (-1, 1, 9))  # the same for every key
    return gate, np.ones_like(gate), np.repeat(value, D, axis=1)


def gates_of(params):
    """The gate of each head at each pair of tokens: [H, D, D]"""
    return gatedref.gated_attention(params, np.eye(D)[None])["gate"][0]


def write_map(params, head, _, wanted):
    """Lets a head write along the two strongest directions of a map [9], both as
    strongly: its columns have length 1. That is so of what copies two numbers.
    """
    left, _, right = np.linalg.svd(np.reshape(wanted, (3, 3)))
    for name in ("W_V", "b_V", "W_O"):
        params[name][head] = 0
    params["W_V"][head, 4:] = left[:, :2]
    params["W_O"][head, :, 4:] = right[:2]


# ---- What came out -------------------------------------------------------------------


def row_of(params, seed):
    """The row of a gated block, on 2,000 fresh sequences."""
    x, target = sample_copies(2000, np.random.default_rng([seed, 7]))
    attn_out = gatedref.gated_attention(params, x)["attn_out"]
    unexplained = gatedref.unexplained(attn_out, target)
    variance = gatedref.variance_of(target)
    scalars = gatedref.loss(params, x, target, RECIPE.alpha * variance)
    loss = float(scalars["loss"] / variance)
    kind = "wrong" if unexplained > 0.01 else kind_of(params)
    return {"kind": kind, "unexplained": unexplained, "loss": loss}


def kind_of(params):
    """How heads share the queries, as their gates tell; above 0.1 counts as open."""
    is_open = gates_of(params)[:, :3, 3] > 0.1  # [H, query]
    if np.max(np.sum(is_open, axis=1)) > 1:
        return "shared"
    if np.max(np.sum(is_open, axis=0)) > 1:
        return "several a query"
    return "one a query"


def tables_of(rows):
    lines = []
    for (variant,), group in common.grouped(rows, "variant").items():
        kinds = Counter(row["kind"] for row in group)
        line = [variant, *(kinds[kind] for kind in KINDS)]
        for name in ("unexplained", "loss"):
            line.append(f"{np.median([row[name] for row in group]):.4f}")
        lines.append(line)
    return [common.table(["variant", *KINDS, "unexplained", "loss"], lines)]


def draw(path, rows):
    counts = {}
    for (variant,), group in common.grouped(rows, "variant").items():
        counts[variant] = Counter(row["kind"] for row in group)
    common.bars(path, "Do heads serve several queries?", counts, KINDS, "blocks")


if __name__ == "__main__":
    main()
