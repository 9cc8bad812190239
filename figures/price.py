"""What does separation cost? Four settings, twenty toys each, at up to six alphas.

    python -m figures.price         about three hours on one core

A weaker alpha leaves less of the toy's output unexplained, and fewer blocks apart.

For comparison there is a *floor* for each toy: what is left by a block with exactly one
open head at each query token (head i at token i, for every key), and with no penalty.
A block that is apart may leave less, since other heads may still help a little.
"""

from functools import lru_cache

import autograd.numpy as np

import gatedref
import train
from figures import common

ALPHAS = (10, 5, train.RECIPE.alpha, 1, 0.25, 0)
BIG = "8H10T"  # 32 heads in the block; a run takes a minute, so at two alphas only
BIG_ALPHAS = (5, train.RECIPE.alpha)
SETTINGS = {**train.SETTINGS, BIG: (8, 10)}

FLOOR = "floor"
DEFAULT = f"alpha {train.RECIPE.alpha:g}"
RECIPES = {"blocks": train.RECIPE, FLOOR: train.RECIPE._replace(alpha=0)}
COLOURS = {"2H3T": "#0072B2", "3H4T": "#D55E00", "4H5T": "#009E73", BIG: "#CC79A7"}


def main():
    options = common.parse(__doc__, n_seeds=20)
    jobs = []
    # In a smoke run one setting will do; and of 32 untrained heads, too many sets would
    # have to be tried for what they hold.
    keys = list(train.SETTINGS)[:1] if options.is_smoke else SETTINGS
    for key in keys:
        for seed in options.seeds:
            for alpha in alphas_of(key):
                variant = f"alpha {alpha:g}"
                jobs.append(
                    {"key": key, "variant": variant, "seed": seed, "alpha": alpha}
                )
            jobs.append({"key": key, "variant": FLOOR, "seed": seed})
    rows = common.run("price", jobs, work, options, RECIPES)
    print("\n\n".join(tables_of(rows)))
    draw(options.out / "price.png", rows)


def alphas_of(key):
    return BIG_ALPHAS if key == BIG else ALPHAS


def work(job, is_smoke):
    n_heads, n_trigrams = SETTINGS[job["key"]]
    seed = job["seed"]
    toy, tokens, target = recorded_toy(job["key"], seed, is_smoke)
    x = np.eye(target.shape[2])[tokens]
    task = train.fresh_task(n_trigrams, seed, common.n_fresh(is_smoke))
    if job["variant"] == FLOOR:
        recipe = train.shortened(RECIPES[FLOOR], is_smoke)
        block = one_head_a_token(x, target, seed, recipe)
        attn_out = train.written([block], task.tokens)
        left = gatedref.unexplained(attn_out, train.written([toy], task.tokens))
        return {"unexplained": left}

    recipe = train.shortened(train.RECIPE._replace(alpha=job["alpha"]), is_smoke)
    gated, _ = train.take_apart(x, target, n_heads, seed=seed, recipe=recipe)
    return common.kept_of(train.verdict(train.writes([gated]), [toy], task))


@lru_cache(maxsize=1)
def recorded_toy(key, seed, is_smoke):
    """The toy of a seed, and what a gated block learns from; see `toy_and_record`."""
    recipe = train.shortened(train.TOY, is_smoke)
    return train.toy_and_record(*SETTINGS[key], seed, recipe, is_smoke=is_smoke)


def one_head_a_token(x, target, seed, recipe):
    """A trained block of V heads, of which just one is open at each query token."""
    V = x.shape[2]
    fixed = train.fixed_params(target, recipe)
    fixed["W_gate_Q"] = np.eye(V)[:, :, None]  # [H, V, G = 1]
    fixed["b_gate_Q"] = np.zeros((V, 1))
    fixed["W_gate_K"] = np.zeros((V, V, 1))
    fixed["b_gate_K"] = np.ones((V, 1))
    variance = gatedref.variance_of(target)
    rng = np.random.default_rng([seed, 3])

    def draw():
        batch = rng.integers(len(x), size=recipe.batch)
        return x[batch], target[batch]

    def loss_of(layers, x, target):
        loss, _ = train.loss_of_block(layers[0], fixed, x, target, variance, 0, recipe)
        return loss

    start = [gatedref.init_params(V, V, recipe.d_head, seed)]
    layers = train.descend(loss_of, start, draw, recipe)
    return {**layers[0], **fixed}


def keys_of(rows):
    return list(dict.fromkeys(row["key"] for row in rows))


def tables_of(rows):
    return [default_table(rows), alphas_table(rows)]


def default_table(rows):
    """How the recipe as it stands does, beside the floors of the same toys."""
    groups = common.grouped(rows, "key", "variant")
    lines = []
    for key in keys_of(rows):
        runs = groups[key, DEFAULT]
        floors = [row["unexplained"] for row in groups[key, FLOOR]]
        ratios = [run["unexplained"] / own for run, own in zip(runs, floors)]
        floor_cell = f"{np.median(floors):.4f}"
        ratio_cell = f"{np.median(ratios):.2f}"
        lines.append((key, *common.summary(runs), floor_cell, ratio_cell))
    return common.table(("setting", *common.SUMMARY, "floor", "times the floor"), lines)


def alphas_table(rows):
    lines = []
    for (key, variant), runs in common.grouped(rows, "key", "variant").items():
        if variant != FLOOR:
            lines.append((key, f"{runs[0]['alpha']:g}", *common.summary(runs)))
    return common.table(("setting", "alpha", *common.SUMMARY), lines)


def draw(path, rows):
    panels = [("apart", np.mean), ("share", np.mean), ("unexplained", np.median)]
    groups = common.grouped(rows, "key", "variant")
    n_toys = len({row["seed"] for row in rows})
    title = f"What separation costs ({n_toys} toys for each point)"
    with common.picture(path, title, 3.6, 1, 3) as axes:
        for ax, (name, average) in zip(axes[0], panels):
            for key in keys_of(rows):
                runs = [groups[key, f"alpha {alpha:g}"] for alpha in alphas_of(key)]
                heights = [average([row[name] for row in group]) for group in runs]
                places = [ALPHAS.index(alpha) for alpha in alphas_of(key)]
                ax.plot(places, heights, "o-", color=COLOURS[key], label=key)
            ax.set_xticks(range(len(ALPHAS)), [f"{alpha:g}" for alpha in ALPHAS])
            ax.axvline(ALPHAS.index(train.RECIPE.alpha), color="0.7", linestyle=":")
            ax.set(xlabel="alpha: strong to weak (dotted: default)", ylim=(0, 1.03))
        axes[0, 0].set_ylabel("part of the runs that come apart (up is good)")
        axes[0, 1].set_ylabel("mean share (up is good)")
        ax = axes[0, 2]
        for key in keys_of(rows):
            left = [row["unexplained"] for row in groups[key, FLOOR]]
            ax.axhline(np.median(left), color=COLOURS[key], linestyle="--", linewidth=1)
        ax.plot([], [], color="0.3", linestyle="--", label="floor")
        ax.set(
            ylabel="unexplained, median (down is good)", yscale="log", ylim=(1e-4, 1)
        )


if __name__ == "__main__":
    main()
