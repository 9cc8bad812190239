"""Which heads hold which trigram, before and after? `train.py` prints and draws this.

The table, the sentences and the pictures are made from the rows of `main.json`. A ring
is where `gatedref.holders` finds that a head holds a trigram alone, if the model is
right on that trigram at all.
"""

import numpy as np

from figures.common import picture, table
from gatedref import RIGHT, singles

RING = "#D55E00"  # Okabe and Ito's vermilion, which the colour-blind can tell from grey


# ---- The table, and a sentence for each change ---------------------------------------


def report(rows):
    print()
    print(*tables_of(rows))
    print()
    for row in rows:
        for sentence in changes_of_hands(row):
            print(sentence)
    print()


def tables_of(rows):
    head = ["setting", "held in the toy by", "in the gated block by"]
    head += ["apart", "share", "unexplained", "fires without A"]
    lines = []
    for row in rows:
        line = [row["key"]]
        line.append(held_by(row["holders_toy"], row["accuracy_toy"]))
        line.append(held_by(row["holders_gated"], row["accuracy_gated"]))
        line.append("yes" if row["apart"] else "no")
        line.append(f"{row['share']:.2f}")
        line.append(f"{row['unexplained']:.4f}")
        line.append(f"{row['fires_without_A']} of {len(row['accuracy_gated'])}")
        lines.append(line)
    return [table(head, lines)]


def held_by(holders, accuracy):
    """The sets of heads that hold each trigram: "2, 0+1, 1 or 3, wrong"."""
    cells = []
    for sets, right in zip(holders, accuracy):
        names = ["+".join(map(str, heads)) for heads in sets]
        if right <= RIGHT:
            cells.append("wrong")
        elif names:
            cells.append(" or ".join(names))
        else:
            cells.append("none")
    return ", ".join(cells)


def changes_of_hands(row):
    """A sentence for each trigram that several heads held, and one alone does now."""
    sentences = []
    alone = singles(row["holders_gated"])
    for number, sets in enumerate(row["holders_toy"], 1):
        after = alone[number - 1]
        right_before = row["accuracy_toy"][number - 1] > RIGHT
        right_after = row["accuracy_gated"][number - 1] > RIGHT
        took_several = len(sets) > 0 and len(sets[0]) > 1
        if took_several and after and right_before and right_after:
            heads = " and ".join(map(str, sets[0]))
            now = " or ".join(map(str, after))
            before = f"{row['key']}: B{number} took heads {heads} together"
            sentences.append(f"{before}; now head {now} holds it alone.")
    return sentences


# ---- The pictures --------------------------------------------------------------------


def draw(folder, rows):
    draw_before_after(folder / "before_after.png", rows)
    draw_gates(folder / "gates.png", rows)


def draw_before_after(path, rows):
    seed = rows[0]["seed"]
    title = f"How much each head writes: toys above, gated blocks below (seed {seed})"
    with picture(path, title, 6.4, 2, 3, height_ratios=[1, 3]) as axes:
        for ax_toy, ax_gated, row in zip(*axes, rows):
            for ax, which in ((ax_toy, "toy"), (ax_gated, "gated")):
                shares = np.transpose(row[f"shares_{which}"])  # [H, n]
                names = [f"B{i + 1}" for i in range(shares.shape[1])]
                shown = draw_heads(ax, shares, names, 1, row, which)
                title = f"{row['key']}, {which}: {len(shares)} heads"
                ax.set(title=title, xlabel="trigram A ... Bi -> Ci")
        label = "share of what all heads write"
        axes[0, 0].figure.colorbar(shown, ax=axes, shrink=0.6, label=label)


def draw_gates(path, rows):
    title = "How far each gated head is open towards A, for every query token"
    most = max(np.max(row["gates_at_A"]) for row in rows)
    most = max(most, 1e-6)  # in a smoke run all gates may be closed
    with picture(path, title, 4.4, 1, 3, width_ratios=[8, 10, 12]) as axes:
        for ax, row in zip(axes[0], rows):
            n = len(row["accuracy_gated"])
            names = ["A"]
            names += [f"B{i + 1}" for i in range(n)]
            names += [f"C{i + 1}" for i in range(n)]
            names += ["BOS"]
            gates = np.array(row["gates_at_A"])
            shown = draw_heads(ax, gates, names, most, row, "gated")
            ax.set(title=row["key"], xlabel="query token")
            ax.tick_params(axis="x", rotation=90)
        axes[0, 0].figure.colorbar(shown, ax=axes, label="gate (0 is closed)")


def draw_heads(ax, cells, names, most, row, which):
    """Cells [H, names] in grey, heads in the order of what they hold.

    A ring is around each head that holds a trigram alone, in the column of its B.
    """
    rings = []
    for number, heads in enumerate(singles(row[f"holders_{which}"]), 1):
        if row[f"accuracy_{which}"][number - 1] > RIGHT:
            rings += [(head, f"B{number}") for head in heads]
    order = [head for head, _ in rings] + list(range(len(cells)))
    order = list(dict.fromkeys(order))  # each once

    grid = {"edgecolor": "0.85", "linewidth": 0.5}
    shown = ax.pcolormesh(cells[order], cmap="Greys", vmin=0, vmax=most, **grid)
    columns = [names.index(name) + 0.5 for _, name in rings]
    lines = [order.index(head) + 0.5 for head, _ in rings]
    look = {"mfc": "none", "mec": RING, "ms": 9, "mew": 1.8}
    ax.plot(columns, lines, "o", label="holds the trigram alone", **look)
    ax.set_xticks(np.arange(len(names)) + 0.5, names)
    ax.set_yticks(np.arange(len(order)) + 0.5, order)
    ax.set(ylabel="head", ylim=(len(order), 0))
    return shown
