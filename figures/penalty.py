"""Why the power 0.6? What the penalty charges for two heads on one (query, key) pair.

    python -m figures.penalty         a second

A penalty takes heads apart only if two heads that share a pair pay more than one head
which does the work of both.
"""

import numpy as np

import gatedref
from figures import common

GATES = {"one open": [1.0, 0.0], "both half open": [0.5, 0.5], "both open": [1.0, 1.0]}
COLOURS = {0.6: "#000000", 1.0: "#CC79A7", 2.0: "#56B4E9"}  # by p


def main():
    options = common.parse(__doc__)
    title = (
        "Sharing a pair: L0.6 charges more for it, L1 does not mind, L2 charges less"
    )
    with common.picture(options.out / "penalty.png", title, 3, 1, 1) as axes:
        ax = axes[0, 0]
        for number, (p, colour) in enumerate(COLOURS.items()):
            charges = []
            for gates in GATES.values():
                gate = np.reshape(gates, (1, 2, 1, 1))  # [B, H, query, key]
                charges.append(gatedref.lp_penalty(gate, p))
            places = np.arange(3) + 0.28 * number
            bars = ax.bar(places, charges, 0.26, color=colour, label=f"L{p:g}")
            ax.bar_label(bars, fmt="%.2f", fontsize=8)
        ax.set_xticks(np.arange(3) + 0.28, GATES)
        ax.set(xlabel="gates of two heads on one pair", ylabel="penalty", ylim=(0, 3.5))
    print(f"penalty.png is in {options.out}")


if __name__ == "__main__":
    main()
