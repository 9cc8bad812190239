"""What does separation cost, and what becomes of it when the toys grow?

    python -m figures.price         about seven hours on one core

A weaker alpha leaves less of the toy's output unexplained, and fewer blocks apart. The
more tokens there are, the rarer is each pair of them, and the less its gate counts in
the penalty: so alpha should grow with V, and V / 4 is tried at every size.

For comparison there is a *floor* for each toy: what is left by a block with exactly one
open head at each query token (head i at token i, for every key), and with no penalty.
A block that is apart may leave less, since other heads may still help a little.
"""

import time
from functools import lru_cache

import autograd.numpy as np

import gatedref
import train
from figures import common

ALPHAS = (10, 5, train.RECIPE.alpha, 1, 0.25, 0)
BIG, BIGGEST = "8H10T", "16H20T"
SETTINGS = {**train.SETTINGS, BIG: (8, 10), BIGGEST: (16, 20)}
# The larger a toy, the longer a run: a minute at BIG, five at BIGGEST.
ALPHAS_OF = {**dict.fromkeys(train.SETTINGS, ALPHAS), BIG: ALPHAS[:4], BIGGEST: ()}
N_BIGGEST = 5  # toys
UNSEEN = range(3100, 3120)  # seeds that nothing was chosen on, at V / 4 only

FLOOR = "floor"
DEFAULT = f"alpha {train.RECIPE.alpha:g}"
BY_SIZE = "alpha V / 4"
RECIPES = dict.fromkeys(SETTINGS, train.RECIPE)
RECIPES[BIGGEST] = train.RECIPE._replace(steps=3200)
TOYS = dict.fromkeys(SETTINGS, train.TOY)
# At the usual rate hardly a toy of that size learns all its trigrams.
TOYS[BIGGEST] = train.TOY._replace(rate=0.02)
LINES = {
    "2H3T": {"color": "#0072B2", "marker": "o"},
    "3H4T": {"color": "#D55E00", "marker": "s"},
    "4H5T": {"color": "#009E73", "marker": "^"},
    BIG: {"color": "#CC79A7", "marker": "D"},
}
LOOKS = {"seeds 0 to 19": "o-k", f"seeds {UNSEEN[0]} to {UNSEEN[-1]}": "s--r"}
PANELS = {
    "apart (fraction of runs)": (0, 1.05),
    "share (mean)": (0, 1.05),
    "times the floor (median)": (0, 2),
    "seconds of a run (median)": (1, 1000),
}


def main():
    options = common.parse(__doc__, n_seeds=20)
    rows = common.run("price", jobs_of(options), work, options, [RECIPES, TOYS])
    print("\n\n".join(tables_of(rows)))
    draw(options.out / "price.png", rows)
    draw_by_size(options.out / "growth.png", rows)


def jobs_of(options):
    if options.is_smoke:  # one setting will do
        return jobs_at("2H3T", options.seeds[0], ALPHAS)
    jobs = []
    for key in SETTINGS:
        n_toys = N_BIGGEST if key == BIGGEST else len(options.seeds)
        for seed in options.seeds[:n_toys]:
            jobs += jobs_at(key, seed, ALPHAS_OF[key])
        if options.is_whole and key != BIGGEST:
            for seed in UNSEEN:
                jobs += jobs_at(key, seed, ())
    return jobs


def jobs_at(key, seed, alphas):
    """All that is computed for one toy: blocks at these alphas and V / 4, the floor."""
    jobs = []
    for alpha in alphas:
        variant = f"alpha {alpha:g}"
        jobs.append({"key": key, "variant": variant, "seed": seed, "alpha": alpha})
    _, n_trigrams = SETTINGS[key]
    by_size = (2 * n_trigrams + 2) / 4
    jobs.append({"key": key, "variant": BY_SIZE, "seed": seed, "alpha": by_size})
    jobs.append({"key": key, "variant": FLOOR, "seed": seed})
    return jobs


def work(job, is_smoke):
    key, seed = job["key"], job["seed"]
    n_heads, n_trigrams = SETTINGS[key]
    toy, tokens, target = recorded_toy(key, seed, is_smoke)
    x = np.eye(target.shape[2])[tokens]
    task = train.fresh_task(n_trigrams, seed, train.n_fresh(is_smoke))
    recipe = train.shortened(RECIPES[key], is_smoke)
    if job["variant"] == FLOOR:
        block = one_head_a_token(x, target, seed, recipe)
        return {"unexplained": left_by(block, toy, task.tokens)}

    recipe = recipe._replace(alpha=job["alpha"])
    began = time.process_time()
    gated, _ = train.take_apart(x, target, n_heads, seed=seed, recipe=recipe)
    seconds = time.process_time() - began
    # Of 64 heads too many sets would have to be tried: there, single heads and pairs.
    most = 2 if key == BIGGEST else None
    found = train.verdict(train.writes([gated]), [toy], task, most=most)
    row = common.kept_of(found)
    if job["variant"] == BY_SIZE:
        row["seconds"] = seconds
    return row


@lru_cache(maxsize=1)
def recorded_toy(key, seed, is_smoke):
    """The toy of a seed, and what a gated block learns from; see `toy_and_record`."""
    recipe = train.shortened(TOYS[key], is_smoke)
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

    def loss_of(layers, x, target):
        loss, _ = train.loss_of_block(layers[0], fixed, x, target, variance, 0, recipe)
        return loss

    start = [gatedref.init_params(V, V, recipe.d_head, seed)]
    draw = batches(x, target, recipe.batch, np.random.default_rng([seed, 3]))
    layers = train.descend(loss_of, start, draw, recipe)
    return {**layers[0], **fixed}


def left_by(block, toy, tokens):
    """What a block leaves unexplained of a toy on these sequences."""
    attn_out = train.written([block], tokens)
    return gatedref.unexplained(attn_out, train.written([toy], tokens))


def batches(x, target, size, rng):
    """A function that draws a new batch of both."""

    def draw():
        batch = rng.integers(len(x), size=size)
        return x[batch], target[batch]

    return draw


# ---- What came out -------------------------------------------------------------------


def tables_of(rows):
    first, unseen = split(rows)
    return [table_by_size(first), table_by_size(unseen), table_by_alpha(rows)]


def split(rows):
    """The rows of the first seeds, and those of `UNSEEN`."""
    first = [row for row in rows if row["seed"] not in UNSEEN]
    unseen = [row for row in rows if row["seed"] in UNSEEN]
    return first, unseen


def table_by_size(rows):
    """How toys of each size do at V / 4."""
    groups = common.grouped(rows, "key", "variant")
    lines = []
    for (key, variant), runs in groups.items():
        if variant == BY_SIZE:
            cells = cells_of(runs, groups[key, FLOOR])
            seconds = f"{seconds_of(runs):.0f}"
            lines.append((key, f"{runs[0]['alpha']:g}", *cells, seconds))
    return common.table((*HEAD, "seconds"), lines)


def table_by_alpha(rows):
    groups = common.grouped(rows, "key", "variant")
    lines = []
    for (key, variant), runs in groups.items():
        if variant not in (BY_SIZE, FLOOR):
            cells = cells_of(runs, groups[key, FLOOR])
            lines.append((key, f"{runs[0]['alpha']:g}", *cells))
    return common.table(HEAD, lines)


HEAD = ("setting", "alpha", *common.SUMMARY, "times the floor")


def cells_of(runs, floors):
    return *common.summary(runs), f"{times_the_floor(runs, floors):.2f}"


def times_the_floor(runs, floors):
    """What a run leaves over the floor of its own toy; the median of the runs."""
    floor_of = {row["seed"]: row["unexplained"] for row in floors}
    return np.median([run["unexplained"] / floor_of[run["seed"]] for run in runs])


def seconds_of(runs):
    return np.median([run["seconds"] for run in runs])


def draw(path, rows):
    """Against alpha, a line for each setting."""
    panels = [("apart", np.mean), ("share", np.mean), ("unexplained", np.median)]
    groups = common.grouped(rows, "key", "variant")
    with common.picture(path, "What separation costs", 3.6, 1, 3) as axes:
        for ax, (name, average) in zip(axes[0], panels):
            for key, alphas in ALPHAS_OF.items():
                shown = [a for a in alphas if (key, f"alpha {a:g}") in groups]
                runs = [groups[key, f"alpha {alpha:g}"] for alpha in shown]
                heights = [average([row[name] for row in group]) for group in runs]
                places = [ALPHAS.index(alpha) for alpha in shown]
                if places:
                    ax.plot(places, heights, label=key, **LINES[key])
            ax.set_xticks(range(len(ALPHAS)), [f"{alpha:g}" for alpha in ALPHAS])
            ax.axvline(ALPHAS.index(train.RECIPE.alpha), color="0.7", linestyle=":")
            ax.set(xlabel="alpha, strong to weak", ylim=(0, 1.03))
        axes[0, 0].set_ylabel("fraction of the runs apart (up is good)")
        axes[0, 1].set_ylabel("mean share (up is good)")
        axes[0, 2].set(ylabel="unexplained, median (down is good)", yscale="log")
        axes[0, 2].set_ylim(1e-4, 1)


def draw_by_size(path, rows):
    """From the smallest toys to the largest, at V / 4."""
    title = "As toys grow, with alpha = V / 4"
    with common.picture(path, title, 2.9, 1, 4) as axes:
        for group, (seeds, look) in zip(split(rows), LOOKS.items()):
            points = points_by_size(group)
            for ax, heights in zip(axes[0], np.transpose(points)):
                ax.plot(range(len(points)), heights, look, label=seeds)
        axes[0, 3].set_yscale("log")
        for ax, (name, limits) in zip(axes[0], PANELS.items()):
            ax.set_xticks(range(len(SETTINGS)), SETTINGS, rotation=60)
            ax.set(title=name, ylim=limits, xlim=(-0.4, len(SETTINGS) - 0.6))


def points_by_size(rows):
    """For each setting: apart, share, times the floor, seconds."""
    groups = common.grouped(rows, "key", "variant")
    points = []
    for (key, variant), runs in groups.items():
        if variant == BY_SIZE:
            apart = np.mean([run["apart"] for run in runs])
            share = np.mean([run["share"] for run in runs])
            ratio = times_the_floor(runs, groups[key, FLOOR])
            points.append((apart, share, ratio, seconds_of(runs)))
    return points


if __name__ == "__main__":
    main()
