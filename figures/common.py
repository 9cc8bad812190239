"""What the scripts share: their options, saved rows, tables, the pictures' style."""

import argparse
import contextlib
import io
import json
import os
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

FIGURES = Path(__file__).resolve().parent
SCRATCH = FIGURES / "quick"  # smoke runs, runs of some seeds, and rows to go on from

# ---- Runs, and their rows ------------------------------------------------------------

# seeds: a range. is_whole: all seeds of the page, so that its files are made anew.
# is_smoke: a run of seconds, in which nothing is learnt. out: where files go. text: a
# file to read, or None.
Options = namedtuple("Options", "seeds is_whole is_smoke out text", defaults=[None])


def parse(question, n_seeds=None, *, reads_text=False):
    """The options of a script; n_seeds: how many seeds its page has, if it has any."""
    parser = argparse.ArgumentParser(
        description=question, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    if n_seeds is not None:
        parser.add_argument("--seeds", type=int, default=n_seeds, help="how many")
        parser.add_argument("--first", type=int, default=0, help="the first seed")
    if reads_text:
        parser.add_argument("--text", help="a text to read, in UTF-8")
    given = parser.parse_args()
    text = given.text if reads_text else None

    first, count = 0, 1
    if n_seeds is not None:
        first, count = given.first, given.seeds
    if first < 0 or count < 1:
        parser.error("--seeds must be >= 1, and --first >= 0")
    is_whole = first == 0 and count == (n_seeds or 1)
    is_whole = is_whole and not given.quick and text is None
    if given.quick:
        count = 1
    out = FIGURES if is_whole else SCRATCH
    try_out(out)  # before hours are spent
    return Options(range(first, first + count), is_whole, given.quick, out, text)


def run(name, jobs, work, options, recipes):
    """The rows of all jobs, saved as they come. A job identifies its row.

    work(job, is_smoke) -> the rest of the row. Each finished row becomes a line of
    figures/quick/NAME.jsonl, so that a run which was interrupted goes on where it
    stopped, as long as its recipes are the same. When all rows are there they are
    written to NAME.json.
    """
    kept = SCRATCH / f"{name}.jsonl"
    if options.is_smoke:
        kept = SCRATCH / f"{name}.quick.jsonl"
        kept.unlink(missing_ok=True)
    kept.parent.mkdir(exist_ok=True)  # a whole run keeps its rows there, too
    recipes = described(recipes)
    earlier = read_kept(kept, recipes)

    rows = []
    for number, job in enumerate(jobs, 1):
        row = find_row(job, earlier)
        if row is None:
            began = time.perf_counter()
            row = rounded({**job, **work(job, options.is_smoke)})
            with kept.open("a") as file:
                file.write(json.dumps({"recipes": recipes, "row": row}) + "\n")
            seconds = time.perf_counter() - began
            print(f"{number} of {len(jobs)}: {job}, {seconds:.0f} s", flush=True)
        rows.append(row)

    write_rows(options.out / f"{name}.json", rows)
    if options.is_whole:
        kept.unlink(missing_ok=True)
    return rows


def described(value):
    """Recipes in words, the same in every process: functions by their names."""
    if isinstance(value, dict):
        return {str(name): described(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(entry) for entry in value]
    return value.__name__ if callable(value) else value


def read_kept(path, recipes):
    """The rows of an earlier run with these recipes; the file is left with just them.

    A line that is torn, as by a full disk, is dropped, and its job done again.
    """
    if not path.exists():
        return []
    lines, rows = path.read_text().splitlines(), []
    for line in lines:
        try:
            kept = json.loads(line)
        except json.JSONDecodeError:
            continue
        if kept["recipes"] == recipes:
            rows.append(kept["row"])

    print(f"{len(rows)} rows are in {path} already; delete it to start anew")
    if len(rows) < len(lines):
        n_dropped = len(lines) - len(rows)
        print(f"{n_dropped} lines there are torn, or of other recipes: dropped")
        again = [json.dumps({"recipes": recipes, "row": row}) + "\n" for row in rows]
        write(path, "".join(again).encode())
    return rows


def find_row(job, rows):
    """The row that says all that the job says, or None."""
    for row in rows:
        if job.items() <= row.items():
            return row
    return None


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


@contextlib.contextmanager
def beside(path):
    """A path to write to, which is moved to its place when it is whole, or removed."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(path, content):
    """Writes bytes to a file whole or not at all."""
    with beside(path) as part:
        part.write_bytes(content)


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
def plain_matplotlib():
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
    with plain_matplotlib():
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
            ncols = n_columns_of(labels)
            figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    write(path, file.getvalue())


def n_columns_of(labels):
    """How many entries of a legend stand side by side: all, if they are short."""
    return 6 if max(len(label) for label in labels) < 25 else 2


def bars(path, title, counts, kinds, counted):
    """A bar for each name, from top to bottom: which part of all is of each kind.

    counts: {name: {kind: how many}}, each a Counter. kinds: {kind: (colour, words for
    the legend)}, in the order of the legend; kinds that never occur are left out.
    counted: the word for what is counted.
    """
    totals = {name: sum(of_name.values()) for name, of_name in counts.items()}
    names = [f"{name} ({total})" for name, total in totals.items()]
    left = np.zeros(len(names))
    with picture(path, title, 1.3 + 0.3 * len(names), 1, 1) as axes:
        ax = axes[0, 0]
        for kind, (colour, words) in kinds.items():
            parts = [counts[name][kind] / totals[name] for name in counts]
            if any(parts):
                ax.barh(names, parts, left=left, color=colour, label=words)
            left = left + parts
        xlabel = f"fraction of the {counted} (how many there are: in brackets)"
        ax.set(xlabel=xlabel, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
