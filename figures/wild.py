"""Superposition in the wild: can a model of real text be taken apart, too?

    python -m figures.wild          an hour and a half on one core
    python -m figures.wild --seeds 1 --text FILE        on any other text

A word model learns to say the next word: an embedding, learned positions, one attention
block, an unembedding. A gated block learns to write what its attention writes, from the
residual stream, by `train.RESIDUAL`. The text is the reference pages that come with
Python: lower-cased words and single signs, the commonest 255 of them, in sequences of
32. A tenth is held out, and all that is told is measured there:

    unexplained     as everywhere
    recovered       (loss with the mean - loss) / (loss with the mean - the model's):
                    how much of what attention is worth is kept. *With the mean* is the
                    model whose attention writes its mean everywhere
    pair_share      of what the heads write from one key to one query (the norms), the
                    largest over the sum. The mean over pairs, by how much is written
    heads_a_pair    (sum)^2 / sum of squares of these norms: as many heads, if all wrote
                    alike. The same mean
    words_a_head    the number of key words that a head writes from: exp of the entropy
                    of how much it writes from each. The mean over heads, by how much
                    each writes
    heads_used      the same over heads: exp of the entropy of how much each writes
    words_hurt      by intervention: a head's output is set to 0, and the rise of the
                    loss is counted for each word that comes next. exp of the entropy of
                    the rises over words; the mean over heads, by their rises
    loss            in nats a word

The variants: the model itself; this recipe, and other alphas; without growth of alpha;
p = 0.6; no more gated heads than the model has; and no gates, but of as many heads only
the k kept that write most at a query (top-k).
"""

import platform
import re
from collections import Counter, namedtuple
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import autograd.numpy as np

import gatedref
import train
from figures import ablations, common

SHAPES = {"4 heads of 16": (4, 16), "8 heads of 8": (8, 8)}  # heads, d_head
MAIN = "4 heads of 16"
V, T, D = 256, 32, 64  # words, positions of a sequence, width of the residual stream
UNKNOWN = "<other>"

MODEL = train.TOY._replace(steps=2500, batch=24, rate=0.003)
OURS = train.RESIDUAL
GATED = {
    "this recipe": OURS,
    "no penalty": OURS._replace(alpha=0.0),
    "alpha / 4": OURS._replace(alpha=OURS.alpha / 4),
    "alpha * 4": OURS._replace(alpha=OURS.alpha * 4),
    "alpha does not grow": OURS._replace(alpha_growth=0.0),
    "p = 0.6": OURS._replace(p=0.6),
    "as many heads as the model": OURS._replace(expansion=1),
}
TOP = {"top-1, no gates": 1, "top-2, no gates": 2, "top-4, no gates": 4}
CURVE = ("no penalty", "alpha / 4", "this recipe", "alpha * 4")
ALWAYS = ("the model", "this recipe", "top-2, no gates")  # the rest is for seed 0 only
COMMON = 40  # words in the picture
N_DRAWN, N_TOLD = 24, 8  # heads in the picture, and in the table


def main():
    options = common.parse(__doc__, n_seeds=5, reads_text=True)
    text = text_of(options.text)

    def work_on_text(job, is_smoke):
        return work(job, is_smoke, options.text)

    recipes = {"model": MODEL, **GATED, "text": text.name}
    rows = common.run("wild", jobs_of(options), work_on_text, options, recipes)
    print("\n\n".join(tables_of(rows)))
    if 0 in options.seeds:  # the pictures are of its model
        draw(options.out / "wild.png", rows)
        draw_curve(options.out / "wild_curve.png", rows)


def jobs_of(options):
    """All variants for seed 0 (few in a smoke run), and another shape of the model."""
    first = None if options.is_smoke else 0
    jobs = []
    for seed in options.seeds:
        variants = ("the model", *GATED, *TOP) if seed == first else ALWAYS
        for variant in variants:
            jobs.append({"key": MAIN, "variant": variant, "seed": seed})
    if first in options.seeds:
        for variant in ("the model", "this recipe"):
            jobs.append({"key": "8 heads of 8", "variant": variant, "seed": 0})
    return jobs


def work(job, is_smoke, path=None):
    seed, variant = job["seed"], job["variant"]
    text = text_of(path)
    model, x, target = recorded_model(job["key"], seed, is_smoke, path)
    n_heads, _ = SHAPES[job["key"]]
    if variant == "the model":
        block, k = block_of(model), None
    elif variant in TOP:
        k = TOP[variant]
        recipe = train.shortened(OURS, is_smoke)
        block = ablations.fit_top(k, x, target, n_heads, seed, recipe)
    else:
        recipe, k = train.shortened(GATED[variant], is_smoke), None
        block, _ = train.take_apart(x, target, n_heads, seed=seed, recipe=recipe)

    held_out = text.held_out[:20] if is_smoke else text.held_out
    seen = observe(block, k, model, held_out)
    row = {"text": text.name, **measures_of(seen, model, held_out)}
    if (job["key"], seed) == (MAIN, 0) and variant in ("the model", "this recipe"):
        row["words"] = list(text.words[1 : COMMON + 1])
        row["heads"] = heads_of(seen, model, text.words)
    return row


# ---- The text ------------------------------------------------------------------------

# words: the V words, the first of which stands for all others. train and held_out:
# integers [S, T].
Text = namedtuple("Text", "name words train held_out")


@lru_cache(maxsize=1)
def text_of(path=None):
    """The text in a file of UTF-8, or else the reference pages of this Python."""
    name, content = named_content(path)
    found = re.findall(r"[^\W\d_]+|\S", content.lower())
    commonest = [word for word, _ in Counter(found).most_common(V - 1)]
    number_of = {word: number for number, word in enumerate(commonest, 1)}
    numbers = (number_of.get(word, 0) for word in found)
    tokens = np.fromiter(numbers, dtype=int)
    tokens = tokens[: len(tokens) // T * T].reshape(-1, T)
    if len(tokens) < 500 or len(commonest) < V - 1:
        raise SystemExit(
            f"wild: {name} is too short: {len(found)} words and signs, "
            f"{len(commonest)} different ones; 16,000 and 255 are needed"
        )
    tokens = np.unique(tokens, axis=0)  # so that no sequence is on both sides
    tokens = np.random.default_rng(0).permutation(tokens)
    n_held_out = len(tokens) // 10
    words = (UNKNOWN, *commonest)
    return Text(name, words, tokens[n_held_out:], tokens[:n_held_out])


def named_content(path):
    """What the pages call a text, and all of it."""
    if path is None:
        name = f"pydoc_data.topics of Python {platform.python_version()}"
        return name, "\n".join(topics[topic] for topic in sorted(topics))
    try:
        return Path(path).name, Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise SystemExit(f"wild: cannot read {path}: {problem}") from None


# ---- The word model ------------------------------------------------------------------


@lru_cache(maxsize=1)
def recorded_model(key, seed, is_smoke, path):
    """A trained word model, and what its attention reads and writes on the text."""
    tokens = text_of(path).train
    recipe = train.shortened(MODEL, is_smoke)
    model = train_model(*SHAPES[key], seed, tokens, recipe)
    x = stream_of(model, tokens)
    return model, x, attn_out_of(block_of(model), x)


def train_model(n_heads, d_head, seed, tokens, recipe):
    rng = np.random.default_rng([seed, 8])
    start = {
        "embedding": rng.normal(size=(V, D)) / 10,
        "positions": rng.normal(size=(T, D)) / 50,
        "W_U": rng.normal(size=(D, V)) / np.sqrt(D),
        **gatedref.init_params(n_heads, D, d_head, seed),
    }
    start = {name: array.astype(np.float32) for name, array in start.items()}

    def draw():
        return (tokens[rng.integers(len(tokens), size=recipe.batch)],)

    def loss_of(layers, batch):
        (model,) = layers
        x = stream_of(model, batch)
        attn_out = gatedref.attention(block_of(model), x)["attn_out"]
        logits = (x + attn_out) @ model["W_U"]
        return train.cross_entropy(logits[:, :-1], one_hot(batch[:, 1:]))

    (model,) = train.descend(loss_of, [start], draw, recipe)
    return model


def one_hot(tokens):
    return np.eye(V, dtype=np.float32)[tokens]


def stream_of(model, tokens):
    """The residual stream that the attention reads: [S, T] -> [S, T, D]"""
    return one_hot(tokens) @ model["embedding"] + model["positions"]


def block_of(model):
    return {name: model[name] for name in gatedref.BLOCK}


def attn_out_of(block, x):
    """What a block writes, gated or not, in parts: [S, T, D]"""
    written = []
    for part in parts_of(len(x), block):
        written.append(run(block, None, x[part]).attn_out)
    return np.concatenate(written)


def parts_of(n_sequences, block):
    n_heads = len(block["W_Q"])
    return gatedref.parts(n_sequences, 40 * n_heads * T * (T + D))


# ---- What a block does, in numbers ---------------------------------------------------

# weights [S, H, T, T]: the (gated) pattern. value [S, H, T, D]: what a head writes of a
# key, for a weight of 1. result [S, T, H, D], attn_out [S, T, D].
Run = namedtuple("Run", "weights value result attn_out")


def run(block, k, x):
    """A block on a residual stream: gated, or plain, or with the k heads kept."""
    if "W_gate_Q" in block:
        stages = gatedref.gated_attention(block, x)
        weights, W_O = stages["gated_pattern"], gatedref.normalised(block)["W_O"]
    else:
        stages = gatedref.attention(block, x)
        weights, W_O = stages["pattern"], block["W_O"]
    value = np.swapaxes(stages["v"], 1, 2) @ W_O
    if k is None:
        return Run(weights, value, stages["result"], stages["attn_out"])

    result = ablations.keep_top(k, stages["result"])
    is_kept = np.any(result != 0, axis=3)  # [S, T, H]
    weights = weights * np.swapaxes(is_kept, 1, 2)[..., None]
    return Run(weights, value, result, np.sum(result, axis=2))


# attn_out [S, T, D] and losses [S, T - 1]; and sums over all positions: pairs, see
# `pair_sums`; by_key and by_query [H, V], how much is written from a key word, and at a
# query word; distance [H], how much times how far back; rises [H, V], see `rises_of`;
# says [H, D], all that is written.
Seen = namedtuple("Seen", "attn_out losses pairs by_key by_query distance rises says")


def observe(block, k, model, tokens):
    """All that the measures and the pictures need of a block, part by part."""
    x = stream_of(model, tokens)
    attn_out, losses, sums = [], [], None
    for part in parts_of(len(x), block):
        ran = run(block, k, x[part])
        logits = (x[part] + ran.attn_out) @ model["W_U"]
        attn_out.append(ran.attn_out)
        losses.append(losses_of(logits, tokens[part]))
        now = sums_of(ran, logits, model["W_U"], tokens[part])
        sums = now if sums is None else [a + b for a, b in zip(sums, now)]
    return Seen(np.concatenate(attn_out), np.concatenate(losses), *sums)


def sums_of(ran, logits, W_U, tokens):
    """The sums of `Seen` over some sequences, from `pairs` on."""
    written = ran.weights * np.linalg.norm(ran.value, axis=3)[:, :, None]
    places = np.arange(T)
    back = places[:, None] - places  # [query, key]
    return [
        pair_sums(written),
        by_word(np.sum(written, axis=2), tokens),
        by_word(np.sum(written, axis=3), tokens),
        np.sum(written * back, axis=(0, 2, 3), dtype=float),
        rises_of(ran.result, logits, W_U, tokens),
        np.sum(ran.result, axis=(0, 1), dtype=float),
    ]


def pair_sums(written):
    """Three sums over the pairs, an array, of what is written [S, H, query, key].

    At each pair: the sum over the heads; the largest head's part; and the sum times the
    number of heads, which is (sum)^2 / (sum of squares).
    """
    total = np.sum(written, axis=1)  # [S, query, key]
    largest = np.max(written, axis=1)
    squares = np.sum(written**2, axis=1)
    n_heads = total**2 / np.where(squares > 0, squares, 1)
    sums = [np.sum(total), np.sum(largest), np.sum(total * n_heads)]
    return np.array(sums, dtype=float)


def by_word(amounts, tokens):
    """Amounts at positions [S, H, T], summed by the words there [S, T]: [H, V]"""
    return np.einsum("sht,stv->hv", amounts, one_hot(tokens), optimize=True)


def losses_of(logits, tokens):
    """What each position but the last loses on the word that comes next: [S, T - 1]"""
    logits = logits[:, :-1]
    largest = np.max(logits, axis=2, keepdims=True)
    log_sum = np.log(np.sum(np.exp(logits - largest), axis=2)) + largest[..., 0]
    due = np.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
    return log_sum - due


def rises_of(result, logits, W_U, tokens):
    """By how much the loss on each word rises in sum when one head is set to 0: [H, V]

    result: [S, T, H, D]. logits: [S, T, V], with all heads. Where the loss falls it
    counts as 0.
    """
    before = losses_of(logits, tokens)
    next_word = one_hot(tokens[:, 1:])
    rises = []
    for head in range(result.shape[2]):
        without = losses_of(logits - result[:, :, head] @ W_U, tokens)
        rise = np.maximum(without - before, 0)
        rises.append(np.einsum("st,stv->v", rise, next_word, optimize=True))
    return np.array(rises)


def effective_number(amounts):
    """exp of the entropy of the shares: n where n share alike. [..., n] -> [...]"""
    total = np.sum(amounts, axis=-1, keepdims=True)
    shares = amounts / np.where(total > 0, total, 1)
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.exp(-np.sum(shares * logs, axis=-1))


def mean_number(amounts):
    """The effective number of each row [H, V], averaged by the rows' sums."""
    weights = np.sum(amounts, axis=1)
    total = max(np.sum(weights), 1e-30)
    return float(np.sum(effective_number(amounts) * weights) / total)


def measures_of(seen, model, tokens):
    """The row of a block, from what was seen of it."""
    x = stream_of(model, tokens)
    target = attn_out_of(block_of(model), x)
    mean = np.mean(target, axis=(0, 1))
    worst = np.mean(losses_of((x + mean) @ model["W_U"], tokens))
    best = np.mean(losses_of((x + target) @ model["W_U"], tokens))
    loss = np.mean(seen.losses)
    recovered = (worst - loss) / (worst - best)
    heads_used = effective_number(np.sum(seen.by_key, axis=1))
    total, largest, n_heads = seen.pairs

    row = {"unexplained": gatedref.unexplained(seen.attn_out, target)}
    row["recovered"] = float(recovered)
    row["pair_share"] = float(largest / total)
    row["heads_a_pair"] = float(n_heads / total)
    row["words_a_head"] = mean_number(seen.by_key)
    row["heads_used"] = float(heads_used)
    row["words_hurt"] = mean_number(seen.rises)
    row["loss"] = float(loss)
    return row


def heads_of(seen, model, words):
    """What the heads do that write most: a list of dicts, most first.

    `share`: of all that is written. `looks_at`: the key words that it writes most from.
    `from`: the query words. `back`: the mean distance. `says`: the words that it makes
    likelier, more than heads do on average. `hurts`: those whose loss rises most when
    it is gone. `by_key`: its share in what is written from each of the commonest words.
    """
    amounts = np.maximum(np.sum(seen.by_key, axis=1), 1e-30)  # [H]
    in_all = np.sum(seen.by_key, axis=0)  # [V]
    says = seen.says / amounts[:, None]
    says = says - np.sum(seen.says, axis=0) / np.sum(amounts)  # than heads on average
    said = says @ model["W_U"]  # [H, V]
    shares = amounts / np.sum(amounts)
    back = seen.distance / amounts
    parts = seen.by_key / np.where(in_all > 0, in_all, 1)  # [H, V]

    heads = []
    for head in np.argsort(-amounts)[:N_DRAWN]:
        told = {"head": int(head), "share": float(shares[head])}
        told["looks_at"] = top_words(seen.by_key[head], words)
        told["from"] = top_words(seen.by_query[head], words)
        told["back"] = float(back[head])
        told["says"] = top_words(said[head], words)
        told["hurts"] = top_words(seen.rises[head], words)
        told["by_key"] = parts[head, 1 : COMMON + 1].tolist()
        heads.append(told)
    return heads


def top_words(amounts, words, n_words=5):
    return [words[number] for number in np.argsort(-amounts)[:n_words]]


# ---- What came out -------------------------------------------------------------------

MEASURES = ["unexplained", "recovered", "pair_share", "heads_a_pair"]
MEASURES += ["words_a_head", "heads_used", "words_hurt", "loss"]


def tables_of(rows):
    return [measures_table(rows), *heads_tables(rows)]


def measures_table(rows):
    """Medians over the models."""
    names = [name.replace("_", " ") for name in MEASURES]
    lines = []
    for (key, variant), group in common.grouped(rows, "key", "variant").items():
        line = [key, variant, len(group)]
        for name in MEASURES:
            median = np.median([row[name] for row in group])
            line.append(f"{median:.3g}" if median >= 10 else f"{median:.3f}")
        lines.append(line)
    return common.table(["model", "variant", "models", *names], lines)


def heads_tables(rows):
    """What heads do, in the model of seed 0 and in its gated block."""
    tables = []
    head = ["head", "of all", "looks at", "from", "back", "says", "hurts"]
    for row in rows:
        lines = []
        for told in row.get("heads", [])[:N_TOLD]:
            line = [told["head"], f"{told['share']:.0%}", in_code(told["looks_at"])]
            line += [in_code(told["from"]), f"{told['back']:.1f}"]
            lines.append([*line, in_code(told["says"]), in_code(told["hurts"])])
        if lines:
            tables.append(common.table(head, lines))
    return tables


def in_code(words):
    """Words for a table in Markdown, where a | would end the cell."""
    return " ".join(f"`{word}`".replace("|", "\\|") for word in words)


def draw(path, rows):
    """Heads by the commonest words: the model above, its gated block below."""
    shown = [row for row in rows if "heads" in row]
    words = shown[0]["words"]
    title = (
        "Which head writes from which word? The darker, the more of it is this head's"
    )
    heights = [len(row["heads"]) + 3 for row in shown]
    with common.picture(path, title, 7, 2, 1, height_ratios=heights) as axes:
        for ax, row in zip(axes[:, 0], shown):
            cells = np.array([told["by_key"] for told in row["heads"]])
            heads = np.array([told["head"] for told in row["heads"]])
            order = order_of(cells)
            ax.pcolormesh(cells[order], cmap="Greys", vmin=0, vmax=1, edgecolor="0.9")
            ax.set_xticks(np.arange(len(words)) + 0.5, words, rotation=90)
            ax.set_yticks(np.arange(len(order)) + 0.5, heads[order])
            title = f"{row['variant']}: the {len(order)} heads that write most"
            ax.set(title=title, ylabel="head", ylim=(len(order), 0))


def order_of(cells):
    """Heads in the order of the word that is most theirs, so that a diagonal shows."""
    return np.argsort(np.argmax(cells, axis=1), kind="stable")


def draw_curve(path, rows):
    """Loss recovered against share on a pair: the better, the further up and right."""
    places = places_of([row for row in rows if row["key"] == MAIN])
    lines = {
        "gates, by alpha": (CURVE, {"marker": "o", "color": "#0072B2"}),
        "top-k, no gates": (TOP, {"marker": "s", "color": "#D55E00"}),
        "the model": (["the model"], {"marker": "*", "color": "#000000"}),
    }
    title = "What separation costs in a word model (medians)"
    with common.picture(path, title, 3.6, 1, 1) as axes:
        ax = axes[0, 0]
        for label, (variants, look) in lines.items():
            shown = {name: places[name] for name in variants if name in places}
            shares, recovered = zip(*shown.values())
            ax.plot(shares, recovered, label=label, **look)
            for name, place in shown.items():
                if name != label:
                    ax.annotate(name, place, (4, 4), textcoords="offset points")
        ax.set(xlabel="share on a pair (right is good)", ylabel="loss recovered")
        ax.set(xlim=(0.35, 1.15), ylim=(None, 1.02))  # with room for the names


def places_of(rows):
    """{variant: the median share on a pair, and the median loss recovered}"""
    places = {}
    for (variant,), group in common.grouped(rows, "variant").items():
        share = np.median([row["pair_share"] for row in group])
        places[variant] = (share, np.median([row["recovered"] for row in group]))
    return places


if __name__ == "__main__":
    main()
