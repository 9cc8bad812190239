"""What the scripts share: their options, saved rows, tables, the pictures' style."""

import argparse
import contextlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np

FIGURES = Path(__file__).resolve().parent
QUICK_FOLDER = FIGURES / "quick"
# Changes to a recipe for a smoke run of seconds, in which nothing is learnt.
QUICK = {"steps": 10, "legs": (1.0, 1.0)}

# ---- Runs, and their rows ------------------------------------------------------------


def parse(question, n_seeds):
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--seeds", type=int, default=n_seeds, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    if options.quick:
        options.seeds = 1
    is_whole = options.first == 0 and options.seeds == n_seeds
    options.is_whole = is_whole and not options.quick
    options.out = FIGURES if options.is_whole else QUICK_FOLDER
    options.seeds = range(options.first, options.first + options.seeds)
    options.changes = QUICK if options.quick else {}
    try_out(options.out)  # before hours are spent
    return options


def run(name, jobs, work, options):
    """The rows of all jobs, saved as they come. A job identifies its row.

    work(job, changes) -> the rest of the row; `changes` to a recipe are for a quick
    run. Each finished row becomes a line of figures/quick/NAME.jsonl, so that a run
    which was interrupted goes on where it stopped. When all rows are there they are
    written to NAME.json.
    """
    kept = QUICK_FOLDER / f"{name}.jsonl"
    if options.quick:
        kept = QUICK_FOLDER / f"{name}.quick.jsonl"
        kept.unlink(missing_ok=True)
    kept.parent.mkdir(exist_ok=True)  # a whole run keeps its rows there, too
    earlier = read_kept(kept)

    rows = []
    for number, job in enumerate(jobs, 1):
        row = find_row(job, earlier)
        if row is None:
            began = time.perf_counter()
            row = rounded({**job, **work(job, options.changes)})
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
            seconds = time.perf_counter() - began
            print(f"{number} of {len(jobs)}: {job}, {seconds:.0f} s", flush=True)
        rows.append(row)

    write_rows(options.out / f"{name}.json", rows)
    if options.is_whole:
        kept.unlink(missing_ok=True)
    return rows


def read_kept(path):
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    print(f"{len(rows)} rows are in {path} already; delete it to start anew")
    return rows


def find_row(job, rows):
    """The row that says all that the job says, or None."""
    for row in rows:
        if job.items() <= row.items():
            return row
    return None


def n_fresh(changes):
    """On how many fresh sequences a model is judged; a few will do in a quick run."""
    return 500 if changes else 10_000


KEPT = ("apart", "share", "unexplained", "fires_without_A", "holders", "accuracy")


def kept_of(verdict):
    """What a row keeps of a verdict."""
    return {name: verdict[name] for name in KEPT}


def grouped(rows, *names):
    """The rows by what they have under these names, in the order in which they come."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


SUMMARY = ("apart", "share", "unexplained", "most", "fires without A")


def summary(rows):
    """The cells of `SUMMARY` for some runs."""
    n_apart = sum(row["apart"] for row in rows)
    left = [row["unexplained"] for row in rows]
    n_trigrams = sum(len(row["accuracy"]) for row in rows)
    n_fires = sum(row["fires_without_A"] for row in rows)
    return (
        f"{n_apart} of {len(rows)}",
        f"{np.mean([row['share'] for row in rows]):.2f}",
        f"{np.median(left):.4f}",
        f"{max(left):.4f}",
        f"{n_fires} of {n_trigrams}",
    )


def table(head, rows):
    """A table in Markdown."""
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# ---- Files and pictures --------------------------------------------------------------


def write(path, content):
    """Writes bytes to a file whole or not at all: first beside it, then in one move."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_rows(path, rows):
    """Writes rows as JSON, a line each, numbers to six digits."""
    lines = [json.dumps(rounded(row)) for row in rows]
    write(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def write_arrays(path, arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    write(path, file.getvalue())


def try_out(folder):
    """Fails if files cannot be written there, or if Matplotlib cannot draw."""
    folder.mkdir(parents=True, exist_ok=True)
    with picture(folder / ".probe.png", "", 1, 1, 1):
        pass
    (folder / ".probe.png").unlink()


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value


LOOK = {
    "savefig.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.frameon": False,
}


@contextlib.contextmanager
def look():
    """Matplotlib with its own defaults, not the user's, and without a display."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


@contextlib.contextmanager
def picture(path, title, height, n_rows, n_columns, **options):
    """Hands out axes, n_rows by n_columns, with one legend, and saves them as PNG."""
    with look():
        from matplotlib.figure import Figure

        figure = Figure((8.5, height), layout="constrained")
        figure.suptitle(title, fontsize=10)
        yield figure.subplots(n_rows, n_columns, squeeze=False, **options)

        entries = {}
        for ax in figure.axes:
            for handle, label in zip(*ax.get_legend_handles_labels()):
                entries.setdefault(label, handle)
        if entries:
            handles, labels = entries.values(), entries.keys()
            figure.legend(handles, labels, loc="outside lower center", ncols=6)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    write(path, file.getvalue())


def bars(path, title, counts, colours, counted):
    """A bar for each name, from top to bottom, of how many are of each kind.

    counts: {name: {kind: how many}}, each a Counter. colours: {kind: colour}, in the
    order of the legend; kinds that never occur are left out. counted: the word for what
    is counted.
    """
    names = list(counts)
    left = np.zeros(len(names))
    with picture(path, title, 1.3 + 0.3 * len(names), 1, 1) as axes:
        ax = axes[0, 0]
        for kind, colour in colours.items():
            lengths = np.array([counts[name][kind] for name in names])
            if lengths.any():
                ax.barh(names, lengths, left=left, color=colour, label=kind)
            left = left + lengths
        ax.set(xlabel=counted, xlim=(0, max(left)), ylim=(len(names) - 0.5, -0.5))
        ax.locator_params(axis="x", integer=True)
