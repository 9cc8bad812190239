"""How does a toy come apart? One run of 4H5T, to be watched from start to end.

    python -m figures.training         half a minute

On the left each head's share in each trigram, the heads in the order of what they do at
the end. On the right what is left unexplained and what the gates cost; the dotted lines
are the places where spare heads may take over.
"""

import numpy as np

import gatedref
import train
from figures import common

KEY, SEED = "4H5T", 0
UNEXPLAINED, PENALTY = "#0072B2", "#D55E00"


def main():
    options = common.parse(__doc__)
    is_smoke = options.is_smoke
    n_heads, n_trigrams = train.SETTINGS[KEY]
    recipe = train.shortened(train.RECIPE, is_smoke)
    toy_recipe = train.shortened(train.TOY, is_smoke)
    _, tokens, target = train.toy_and_record(
        n_heads, n_trigrams, SEED, toy_recipe, is_smoke=is_smoke
    )
    task = train.fresh_task(n_trigrams, SEED, 1000)
    frames = []  # (part of the steps, shares [H, n])

    def watch(done, gated):
        frames.append((done, shares_by_trigram(gated, task)))

    x = np.eye(target.shape[2])[tokens]
    _, curves = train.take_apart(
        x, target, n_heads, seed=SEED, recipe=recipe, watch=watch
    )
    smoothed = {}
    for name in ("unexplained", "penalty"):
        smoothed[name] = smooth([scalars[name] for scalars in curves])
    draw_curves(options.out / "training.png", smoothed, recipe)
    every_other = [*frames[:-1:2], frames[-1]]  # to keep the film small
    draw_film(options.out / "training.gif", every_other, smoothed, recipe)
    print(f"training.png and training.gif are in {options.out}")


def shares_by_trigram(gated, task):
    """The mean share of each head in each trigram: [H, n]"""
    seen = train.observe(train.writes([gated]), task)
    shares = gatedref.shares_of(seen.result)  # [N, H]
    columns = []
    for answer in np.unique(seen.answers):
        columns.append(np.mean(shares[seen.answers == answer], axis=0))
    return np.stack(columns, axis=1)


def smooth(curve, width=20):
    """The median of a curve over the last steps, since single batches are noisy."""
    medians = []
    for end in range(1, len(curve) + 1):
        start = max(end - width, 0)
        medians.append(np.median(curve[start:end]))
    return medians


def plot_curves(ax, curves, recipe, n_steps):
    """Both curves over the first steps of a run."""
    n_legs = len(recipe.rate_factors)
    for number in range(1, n_legs):
        place = recipe.steps * number / n_legs
        label = "spare heads may take over" if number == 1 else None
        ax.axvline(place, color="0.6", linestyle=":", label=label)
    ax.plot(curves["unexplained"][:n_steps], color=UNEXPLAINED, label="unexplained")
    ax.plot(curves["penalty"][:n_steps], color=PENALTY, label="penalty")
    ax.set(xlabel="step", ylabel="median of the last 20 steps")
    ax.set(yscale="log", xlim=(0, recipe.steps), ylim=(3e-3, 3))


def draw_curves(path, curves, recipe):
    with common.picture(path, f"{KEY} comes apart (seed {SEED})", 3, 1, 1) as axes:
        plot_curves(axes[0, 0], curves, recipe, recipe.steps)


def draw_film(path, frames, curves, recipe):
    """The frames as a GIF; the last one stays for half as long as the rest takes."""
    with common.plain_matplotlib():
        from matplotlib.animation import PillowWriter
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure((7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        ax_heads, ax_curves = figure.subplots(1, 2)
        order = order_of(frames[-1][1])
        film = PillowWriter(fps=10)
        held = [frames[-1]] * (len(frames) // 2)
        with common.beside(path) as part, film.saving(figure, part, dpi=80):
            for done, shares in [*frames, *held]:
                ax_curves.clear()
                draw_shares(ax_heads, shares, order)
                n_steps = round(done * recipe.steps)
                plot_curves(ax_curves, curves, recipe, n_steps)
                ax_curves.legend(loc="upper right")
                figure.suptitle(f"{KEY} comes apart: step {n_steps} of {recipe.steps}")
                film.grab_frame()


def order_of(shares):
    """The heads, by the trigram that each does most of, then by how much it does."""
    return np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))


def draw_shares(ax, shares, order):
    ax.clear()
    n = shares.shape[1]
    ax.pcolormesh(shares[order], cmap="Greys", vmin=0, vmax=1, edgecolor="0.85")
    ax.set_xticks(np.arange(n) + 0.5, [f"B{i + 1}" for i in range(n)])
    ax.set_yticks(np.arange(len(order)) + 0.5, order)
    ax.set(xlabel="trigram A ... Bi -> Ci", ylabel="head", ylim=(len(order), 0))
    ax.set_title("share of what all heads write")


if __name__ == "__main__":
    main()
