"""Is this recipe better than the published one? Both on the authors' own toys.

    python -m figures.published     about ten minutes on one core

`published.npz` holds models that the authors published. Three toys were trained, and
have a gated block each. In a fourth, *conventional*, no head holds any of the five
trigrams alone; no gated block of it was published. A fifth, *manual*, was made by hand,
and so suits its gated block. (There is a manual 2H3T as well, without a gated block.)

Ours is trained on five seeds. Theirs is one block, judged on the same five seeds' fresh
sequences.
"""

import numpy as np

import train
from figures import common

# The setting of a toy; the names, in the file, of the toy and of their gated block.
TOYS = {
    "2H3T": ("2H3T", "toy", "gated"),
    "3H4T": ("3H4T", "toy", "gated"),
    "4H5T": ("4H5T", "toy", "gated"),
    "4H5T/conventional": ("4H5T", "conventional", None),
    "4H5T/manual": ("4H5T", "manual", "gated_of_manual"),
}
AUTHORS = "the authors' block"
OURS = "this recipe"


def main():
    options = common.parse(__doc__, n_seeds=5)
    jobs = []
    for key, (_, _, gated_of_theirs) in TOYS.items():
        variants = (OURS,) if gated_of_theirs is None else (AUTHORS, OURS)
        for variant in variants:
            for seed in options.seeds:
                jobs.append({"key": key, "variant": variant, "seed": seed})
    rows = common.run("published", jobs, work, options, train.RECIPE)
    print(*tables_of(rows))


def work(job, is_smoke):
    setting, toy_name, gated_name = TOYS[job["key"]]
    n_heads, n_trigrams = train.SETTINGS[setting]
    seed = job["seed"]
    toy = published(setting, toy_name)
    if job["variant"] == AUTHORS:
        gated = published(setting, gated_name)
    else:
        tokens, target = train.record([toy], n_trigrams, seed)
        x = np.eye(target.shape[2])[tokens]
        recipe = train.shortened(train.RECIPE, is_smoke)
        gated, _ = train.take_apart(x, target, n_heads, seed=seed, recipe=recipe)
    task = train.fresh_task(n_trigrams, seed, train.n_fresh(is_smoke))
    return common.kept_of(train.verdict(train.writes([gated]), [toy], task))


def published(key, which):
    """The parameters of a model of the authors, such as the `toy` of `2H3T`."""
    prefix = f"{key}/{which}/"
    params = {}
    with np.load(common.FIGURES / "published.npz") as file:
        for name in file:
            if name.startswith(prefix):
                params[name.removeprefix(prefix)] = file[name].astype(float)
    return params


def tables_of(rows):
    lines = []
    for (key, variant), group in common.grouped(rows, "key", "variant").items():
        lines.append([key, variant, *common.summary(group)])
    return [common.table(["toy", "variant", *common.SUMMARY], lines)]


if __name__ == "__main__":
    main()
