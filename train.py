"""train: superposition appears in a toy model, and a gated block takes it apart.

    python train.py            the three published settings, about a minute; see --help

The toy is one attention block with fewer heads than it has skip trigrams to learn. A
gated block with more heads then learns to write what the toy's block writes, and a
penalty on its gates (L0.6) makes each trigram the work of one head.

The file is meant to be read from top to bottom: the recipe; the optimiser; the
takeover; `take_apart`, which puts them together; the toy; what a model does; the main
job. The formulas are those of `gatedref.py`, and autograd differentiates them.
"""

import argparse
import itertools
import os
import sys
import time
from collections import namedtuple
from pathlib import Path

if __name__ == "__main__":
    # As a command, and only then, keep BLAS to one thread: for arrays as small as these
    # more threads do not help. This must be set before NumPy is loaded.
    for library in ("OPENBLAS", "OMP", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import autograd.numpy as np
from autograd import grad_and_aux
from autograd.extend import defvjp, primitive
from autograd.misc import flatten
from autograd.misc.optimizers import adam
from autograd.tracer import getval

import gatedref

# ---- The recipe ----------------------------------------------------------------------


@primitive
def reopening(scores):
    """The clamp, with a gradient that leads back for gates outside of [0, 1].

    The derivative of a clamp is 0 outside, so a gate that has left would never come
    back. Here it is 1 there too, where a step downhill leads back inside.
    """
    return np.clip(scores, 0, 1)


def reopening_vjp(_, scores):
    def backward(slope):  # a step downhill goes up where the slope is negative
        passes_below = (scores >= 0) | (slope < 0)
        passes_above = (scores <= 1) | (slope > 0)
        return np.where(passes_below & passes_above, slope, 0.0)

    return backward


defvjp(reopening, reopening_vjp)

# Of a gated block. alpha is in units of the target's variance, so that one recipe
# serves every toy: loss / variance = unexplained + alpha * penalty.
RECIPE = {
    "heads": 4,  # times the heads of the block: spare ones can take over
    "d_head": 4,
    "d_gate": 2,
    "value_scale": 2.0,  # times the target's largest entry; None: the published block
    "activation": reopening,  # while it is trained; afterwards it is the clamp
    "takeovers": True,  # whether spare heads take over shared pairs, see `take_over`
    "p": 0.6,
    "alpha": 2.5,  # more of it separates better, less of it fits better
    "steps": 1600,
    "batch": 40,  # sequences
    "rate": 0.01,
    "legs": (1.0, 1.0, 1.0, 0.3, 0.1),  # of the rate, for equal parts of the steps
}

# The post's recipe for 4H5T, in the same words. Of the others, 2H3T has an alpha of 1.9
# in units of the variance, 3H4T one of 0.38, and both a rate of 0.0005. The post goes
# through the same 100 batches again and again; `take_apart` draws each anew.
PUBLISHED = {
    "heads": 2,
    "d_head": 1,
    "d_gate": 1,
    "value_scale": None,
    "activation": gatedref.clamp,
    "takeovers": False,
    "p": 0.6,
    "alpha": 1.2,
    "steps": 100_000,
    "batch": 1000,
    "rate": 0.001,
    "legs": (1.0,),
}

TOY = {"steps": 1500, "batch": 40, "rate": 0.05, "legs": (1.0, 1.0, 1.0, 0.3, 0.1)}


# ---- The optimiser: autograd's Adam --------------------------------------------------


def fit(objective, params, recipe, *, between=None, watch=None):
    """Minimises a loss by Adam. Returns the parameters, and the scalars of each step.

    objective(params) returns the loss, and a dict of scalars, `loss` among them.
    recipe: `steps`, `rate` and `legs`. Each leg is an equal part of the steps; Adam
    starts afresh in it, and its rate is `rate` times the leg's number. Between two legs
    the parameters become between(params). watch(done, params) is called a hundred times
    or so, with the fraction of the steps that is done.

    FloatingPointError: the loss or a parameter is not finite any more.
    """
    flat, unflatten = flatten(params)
    gradient_at = grad_and_aux(objective)
    curves = []

    def downhill(flat, _):
        step = len(curves)
        check_finite(flat, step)
        if watch is not None and step % max(1, recipe["steps"] // 100) == 0:
            watch(step / recipe["steps"], unflatten(flat))
        gradient, scalars = gradient_at(unflatten(flat))
        curves.append({name: getval(scalar) for name, scalar in scalars.items()})
        check_finite(curves[-1]["loss"], step)
        return flatten(gradient)[0]

    for number, leg in enumerate(recipe["legs"], 1):
        n_steps = recipe["steps"] * number // len(recipe["legs"]) - len(curves)
        rate = leg * recipe["rate"]
        with np.errstate(over="ignore", invalid="ignore"):  # check_finite tells
            flat = adam(downhill, flat, num_iters=n_steps, step_size=rate)
        check_finite(flat, len(curves))
        if between is not None and number < len(recipe["legs"]):
            flat, _ = flatten(between(unflatten(flat)))

    if watch is not None:
        watch(1.0, unflatten(flat))
    return unflatten(flat), curves


def check_finite(numbers, step):
    if not np.isfinite(numbers).all():
        raise FloatingPointError(f"training diverged: not finite at step {step}")


# ---- The takeover --------------------------------------------------------------------
#
# A closed gate passes no gradient to its head's values. So a spare head stays idle
# while others share what it could do alone, and has to be put to work by hand.


def take_over(params, look, frequency, p, reach, write):
    """Spare heads take over the (query, key) pairs of tokens most expensive to share.

    The head whose gates cost least is the next to take over. It is given the pair where
    one head in place of all would save most of the penalty. It drops its old job, and
    writes there what all heads write there together, through a gate that is just wide
    enough; the other heads' gates are closed there. This is repeated until it would
    save less than the head's own gates cost. (Idle neurons of sparse autoencoders are
    resampled similarly: Bricken et al., 2023.)

    look(params): returns `gate`, `pattern` and `written`, like `survey`. frequency [V,
    V]: see `pair_frequency`. p: of the penalty. reach: the norm that a head can write
    through a gate of 1. write: `write_vector`, or a function like it. Returns the new
    parameters.
    """
    params = {name: array.copy() for name, array in params.items()}
    spare = list(range(len(params["W_Q"])))
    while spare:
        gate, pattern, written = look(params)
        costs = {head: cost_of(head, gate, frequency, p) for head in spare}
        head = min(spare, key=costs.get)

        together = np.sum(written, axis=0)  # [V, V, D]
        leader = np.argmax(np.linalg.norm(written, axis=-1), axis=0)  # it writes most
        attention = np.take_along_axis(pattern, leader[None], axis=0)[0]  # [V, V]
        width = np.linalg.norm(together, axis=-1) / np.maximum(attention * reach, 1e-12)

        saved = frequency * (charge(gate, p) - width)  # one gate is charged its width
        saved = np.where((width > 0) & (width <= 1), saved, 0.0)
        query, key = np.unravel_index(np.argmax(saved), saved.shape)
        if saved[query, key] <= costs[head]:
            break

        spare.remove(head)
        close_gates(params, query, key)
        attend_like(params, head, leader[query, key])
        write(params, head, key, together[query, key])
        open_gate(params, head, query, key, width[query, key])
    return params


def survey(gated, tokens, activation=gatedref.clamp):
    """What the heads of a gated block do at each pair of a query token and a key token.

    Over the sequences `tokens` [S, T]. Returns `gate` [H, V, V]; `pattern` [H, V, V],
    the mean attention of a query token to all keys of one token; and `written` [H, V,
    V, D], what a head writes there on average.
    """
    one_hot = np.eye(gated["W_Q"].shape[1])
    x = one_hot[tokens]  # [S, T, V]
    pattern = gatedref.gated_attention(gated, x)["pattern"]  # [S, H, query, key]
    to_token = pattern @ x[:, None]  # [S, H, query, V]
    summed = np.einsum("stu,shtv->huv", x, to_token)  # u: query token, v: key token
    n_queries = np.sum(x, axis=(0, 1))
    mean_pattern = summed / np.maximum(n_queries, 1)[:, None]

    each_token_once = one_hot[None]
    all_pairs = gatedref.gated_attention(gated, each_token_once, activation=activation)
    gate = all_pairs["gate"][0]
    v = np.swapaxes(all_pairs["v"][0], 0, 1)  # [H, V, K]
    value = v @ gatedref.normalised(gated)["W_O"]  # [H, key, D]
    written = (gate * mean_pattern)[..., None] * value[:, None]
    return gate, mean_pattern, written


def pair_frequency(tokens, V):
    """How often a query and a key are these two tokens, of all pairs: [V, V]."""
    counts = np.sum(np.eye(V)[tokens], axis=1)  # [S, V]
    return counts.T @ counts / (tokens.size * tokens.shape[1])


def charge(gate, p):
    """What the penalty charges for each pair: [H, V, V] -> [V, V]"""
    return np.sum(gate**p, axis=0) ** (1 / p)


def cost_of(head, gate, frequency, p):
    """By how much the penalty would fall if this head were closed everywhere."""
    without = charge(np.delete(gate, head, axis=0), p)
    return np.sum(frequency * (charge(gate, p) - without))


def close_gates(params, query, key):
    """Brings gate scores above 0 at a pair to 0, by the least change of `W_gate_Q`.

    The gates from the same query to other keys change as well. Training mends that.
    """
    gate_q = params["W_gate_Q"][:, query] + params["b_gate_Q"]  # [H, G]
    gate_k = params["W_gate_K"][:, key] + params["b_gate_K"]
    excess = np.maximum(np.sum(gate_q * gate_k, axis=1), 0)
    square = np.maximum(np.sum(gate_k**2, axis=1), 1e-12)
    params["W_gate_Q"][:, query] -= (excess / square)[:, None] * gate_k


def attend_like(params, head, leader):
    """Gives a head the queries and keys of another."""
    for name in ("W_Q", "W_K", "b_Q", "b_K"):
        params[name][head] = params[name][leader]


def write_vector(params, head, key, wanted):
    """Lets a head write along `wanted` [D] where it attends to a key token."""
    params["W_V"][head] *= 0.1  # a trace of the old keeps its columns from being alike
    params["b_V"][head] *= 0.1
    params["W_V"][head, key] += 1
    params["W_O"][head] = wanted / np.linalg.norm(wanted)


def open_gate(params, head, query, key, width):
    """Gives a head a gate of this width at one pair, and closes it elsewhere.

    Elsewhere the score is -0.01 for each column of the gate after the first (0, if
    there is only one).
    """
    for name in gatedref.GATE:
        params[name][head] = 0
    params["b_gate_Q"][head, 1:] = -0.1
    params["b_gate_K"][head, 1:] = 0.1
    lowered = 0.01 * (params["b_gate_Q"].shape[1] - 1)
    root = (width + lowered) ** 0.5
    params["W_gate_Q"][head, query, 0] = root
    params["W_gate_K"][head, key, 0] = root


# ---- Taking a block apart ------------------------------------------------------------


def take_apart(tokens, target, n_heads, *, seed=0, recipe=RECIPE, watch=None):
    """A gated block that writes what was recorded, with its heads out of superposition.

    tokens: integers [S, T] in [0, V), some thousands of the sequences that the block is
    to be right on. target: [S, T, V], what the attention of a model wrote on them,
    without the residual: one layer of it, or the sum of several. The model must read
    its tokens one-hot and have no positions; what hangs on more than the tokens before
    stays unexplained. n_heads: how many heads the model has there, a whole number >= 1.
    seed: a whole number >= 0. recipe: a dict like `RECIPE`. watch(done, gated): a
    function that is called a hundred times or so, with the part of the steps that is
    done and the block as it stands.

    Returns the parameters of the gated block, with their `value_scale` where the recipe
    has one, and the curves: for each step a dict of `penalty`, and of `mse` and `loss`
    divided by the target's variance. Gates at pairs of tokens that never occur in
    `tokens` are left over from the start, and mean nothing.

    ValueError, TypeError: an argument that is not as above. FloatingPointError:
    training diverged.
    """
    check_recipe(recipe)
    n_heads = gatedref.check_whole("n_heads", n_heads, 1)
    seed = gatedref.check_whole("seed", seed, 0)
    if watch is not None and not callable(watch):
        raise TypeError(f"watch must be None or a function, got {type(watch)}")
    tokens, target = check_recorded(tokens, target)
    V = target.shape[2]

    n_gated = recipe["heads"] * n_heads
    d_head, d_gate = recipe["d_head"], recipe["d_gate"]
    start = gatedref.init_params(n_gated, V, d_head, seed, d_gate=d_gate)
    fixed = fixed_params(target, recipe)
    rng = np.random.default_rng([seed, 1])
    objective = objective_of(tokens, target, fixed, recipe, rng)
    between = None
    if recipe["takeovers"]:
        between = takeover_of(tokens, V, fixed, recipe, rng)

    def watch_block(done, params):
        if watch is not None:
            watch(done, {**params, **fixed})

    params, curves = fit(objective, start, recipe, between=between, watch=watch_block)
    return {**params, **fixed}, curves


def fixed_params(target, recipe):
    """What is part of the block, but is not trained."""
    if recipe["value_scale"] is None:
        return {}
    return {"value_scale": np.array(recipe["value_scale"] * np.max(np.abs(target)))}


def objective_of(tokens, target, fixed, recipe, rng):
    """The function of the parameters that `take_apart` minimises, for `fit`."""
    one_hot = np.eye(target.shape[2])
    variance = variance_of(target)
    alpha = recipe["alpha"] * variance
    options = {"activation": recipe["activation"], "p": recipe["p"]}

    def objective(params):
        batch = rng.integers(len(tokens), size=recipe["batch"])
        x = one_hot[tokens[batch]]
        gated = {**params, **fixed}
        scalars = gatedref.loss(gated, x, target[batch], alpha, **options)
        mse = scalars["mse"] / variance
        loss = scalars["loss"] / variance
        return loss, {"mse": mse, "penalty": scalars["penalty"], "loss": loss}

    return objective


def takeover_of(tokens, V, fixed, recipe, rng):
    """The function that `fit` calls between two legs: it applies `take_over`."""
    frequency = pair_frequency(tokens, V)
    # All columns of a head may write in the same direction; their lengths then add up.
    reach = recipe["d_head"]
    if fixed:
        reach = recipe["d_head"] * fixed["value_scale"]

    def look(params):
        some = tokens[rng.integers(len(tokens), size=500)]
        return survey({**params, **fixed}, some, recipe["activation"])

    def let_take_over(params):
        return take_over(params, look, frequency, recipe["p"], reach, write_vector)

    return let_take_over


def check_recorded(tokens, target):
    target = gatedref.check_array("target", target, "STV").astype(float)
    sizes = gatedref.sizes_of("target", target, "STV")
    V = target.shape[2]
    tokens = gatedref.check_tokens("tokens", tokens, "ST", V, sizes)
    if variance_of(target) <= 1e-20 * np.mean(target**2):
        raise ValueError("target must depend on the tokens, got a constant")
    return tokens, target


def variance_of(target):
    """The variance over all positions, averaged over the components."""
    return np.mean(np.var(target, axis=(0, 1)))


def check_recipe(recipe):
    if not isinstance(recipe, dict):
        raise TypeError(f"recipe must be a dict like RECIPE, got {type(recipe)}")
    wrong = sorted(set(recipe) ^ set(RECIPE), key=str)  # in one, but not in both
    if wrong:
        change = "a change is written {**RECIPE, 'steps': 3000}"
        raise ValueError(
            f"recipe must have the keys of RECIPE ({change}), not so: {wrong}"
        )

    for name in ("heads", "d_head", "d_gate", "steps", "batch"):
        gatedref.check_whole(f"recipe[{name!r}]", recipe[name], 1)
    for name in ("p", "rate"):
        gatedref.check_positive(f"recipe[{name!r}]", recipe[name])
    if recipe["value_scale"] is not None:
        gatedref.check_positive("recipe['value_scale']", recipe["value_scale"])
    if gatedref.check_number("recipe['alpha']", recipe["alpha"]) < 0:
        raise ValueError(f"recipe['alpha'] must be >= 0, got {recipe['alpha']}")
    if not callable(recipe["activation"]):
        raise TypeError(
            f"recipe['activation'] must be a function: {recipe['activation']}"
        )
    if not isinstance(recipe["takeovers"], bool):
        raise TypeError(f"recipe['takeovers'] must be a bool: {recipe['takeovers']}")
    if not isinstance(recipe["legs"], (tuple, list)) or not recipe["legs"]:
        raise ValueError(f"recipe['legs'] must be a tuple of numbers: {recipe['legs']}")
    for number, leg in enumerate(recipe["legs"]):
        gatedref.check_positive(f"recipe['legs'][{number}]", leg)


# ---- The toy -------------------------------------------------------------------------


def train_toy(n_heads, n_trigrams, seed, recipe=TOY, *, n_layers=1, watch=None):
    """The layers of a toy model, trained to predict the next token of skip trigrams."""
    V = 2 * n_trigrams + 2
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, 5000, seed=seed)
    rng = np.random.default_rng([seed, 2])
    one_hot = np.eye(V)

    def objective(layers):
        batch = tokens[rng.integers(len(tokens), size=recipe["batch"])]
        logits = gatedref.transformer(layers, batch)["logits"]
        loss = cross_entropy(logits[:, :-1], one_hot[batch[:, 1:]])
        return loss, {"loss": loss}

    start = []
    for layer in range(n_layers):
        start.append(gatedref.init_params(n_heads, V, 1, seeds_of(seed, layer).toy))
    layers, _ = fit(objective, start, recipe, watch=watch)
    return layers


def cross_entropy(logits, answers):
    """The mean of -log p(answer). logits, and answers one-hot: [..., V]."""
    largest = np.max(getval(logits), axis=-1, keepdims=True)
    logits = logits - largest  # so that exp is finite
    log_sum = np.log(np.sum(np.exp(logits), axis=-1))
    return np.mean(log_sum - np.sum(logits * answers, axis=-1))


Seeds = namedtuple("Seeds", "toy selection recording verdict")


def seeds_of(*numbers):
    """Four independent seeds, made from these numbers."""
    states = np.random.SeedSequence(numbers).generate_state(4)
    return Seeds(*[int(state) for state in states])


# ---- What a model does ---------------------------------------------------------------


def skip_trigram_task(n_trigrams, n_sequences, seed):
    """Fresh sequences, and what is due in them.

    Returns a dict of integers [S, T]: `tokens`; `answers`, the C that is due, at the B
    of a sequence's only trigram, -1 elsewhere; and `lures`, the C that would be due, at
    each B that no A came before, -1 elsewhere.
    """
    n = n_trigrams
    tokens, completes = gatedref.sample_skip_trigrams(n, n_sequences, seed=seed)
    is_only = np.sum(completes, axis=1, keepdims=True) == 1
    is_B = (tokens >= 1) & (tokens <= n)
    no_A_yet = np.cumsum(tokens == 0, axis=1) == 0
    answers = np.where(completes & is_only, tokens + n, -1)
    lures = np.where(is_B & no_A_yet, tokens + n, -1)
    return {"tokens": tokens, "answers": answers, "lures": lures}


def in_parts(tokens):
    """Slices of 500 sequences each, as many fit into memory with all intermediates."""
    return [slice(start, start + 500) for start in range(0, len(tokens), 500)]


def results_where(layers, tokens, at):
    """What each head writes [N, H, V], heads of all layers, and the logits [N, V].

    at: booleans [S, T], N of them true: the positions in question.
    """
    results, logits = [], []
    for part in in_parts(tokens):
        model = gatedref.transformer(layers, tokens[part])
        result = [block["result"] for block in model["blocks"]]
        results.append(np.concatenate(result, axis=2)[at[part]])
        logits.append(model["logits"][at[part]])
    return np.concatenate(results), np.concatenate(logits)


def judge(layers, tokens, answers):
    """What a model of attention blocks does with each answer that is asked of it.

    layers: a list of parameter dicts, as in `gatedref.transformer`. tokens: integers
    [S, T] in [0, V). answers: integers [S, T]: the token that is due, -1 where none is.

    Returns a dict of lists, an entry for each answer in rising order: `answers`;
    `accuracy`, the part of its positions where the model, residual included, says it;
    `holders`, the smallest sets of heads that hold it (see `gatedref.holders`; on its
    first 1,000 positions), heads of all layers counted on; `shares` [H], each head's
    mean share in the sum of the norms of what all heads write there.

    ValueError, TypeError: an argument that is not as above, or no answer is asked.
    """
    tokens = gatedref.check_array("tokens", tokens, "ST", kinds="iu")
    sizes = gatedref.sizes_of("tokens", tokens, "ST")
    answers = gatedref.check_array("answers", answers, "ST", sizes, kinds="iu")
    if np.max(answers) < 0:
        raise ValueError("answers must hold a token that is due, got none")
    results, logits = results_where(layers, tokens, answers >= 0)
    return judge_results(results, logits, answers[answers >= 0])


def judge_results(results, logits, due):
    """The dict of `judge`, from what heads write [N, H, V], logits [N, V], due [N]."""
    shares = shares_of(results)  # [N, H]
    is_right = np.argmax(logits, axis=1) == due

    found = {"answers": [], "accuracy": [], "holders": [], "shares": []}
    for answer in np.unique(due):
        mine = due == answer
        held_by = gatedref.holders(results[mine][:1000], due[mine][:1000])
        found["answers"].append(int(answer))
        found["accuracy"].append(float(np.mean(is_right[mine])))
        found["holders"].append(held_by)
        found["shares"].append(np.mean(shares[mine], axis=0).tolist())
    return found


def shares_of(results):
    """Each head's share in the sum of all heads' norms: [N, H, V] -> [N, H]"""
    norms = np.linalg.norm(results, axis=2)
    total = np.sum(norms, axis=1, keepdims=True)
    return norms / np.where(total > 0, total, 1)


def singles(holders):
    """For each answer the heads that hold it by themselves."""
    alone = []
    for sets in holders:
        alone.append([heads[0] for heads in sets if len(heads) == 1])
    return alone


def is_apart(found, least=0.99):
    """Whether each answer is right and has a head of its own that holds it.

    found: what `judge` returns. An answer is right if its accuracy is above `least`. Of
    the heads that hold each answer alone, one can be chosen so that none is chosen
    twice.
    """
    if min(found["accuracy"]) <= least:
        return False
    for chosen in itertools.product(*singles(found["holders"])):
        if len(set(chosen)) == len(chosen):
            return True
    return False


def share_of(found):
    """How much one head does: the mean over the answers of the largest share."""
    return float(np.mean([max(shares) for shares in found["shares"]]))


def unexplained(gated, tokens, target):
    """The part of the target's variance that a gated block leaves unexplained.

    The sum of squared errors over that of squared deviations from the target's mean: 0
    is a copy, 1 is no better than the mean. tokens: integers [S, T] in [0, V); target:
    [S, T, V]. ValueError, TypeError: they are not so.
    """
    tokens, target = check_recorded(tokens, target)
    one_hot = np.eye(target.shape[2])
    errors = []
    for part in in_parts(tokens):
        attn_out = gatedref.gated_attention(gated, one_hot[tokens[part]])["attn_out"]
        errors.append(np.sum((attn_out - target[part]) ** 2))
    deviation = target - np.mean(target, axis=(0, 1))
    return float(sum(errors) / np.sum(deviation**2))


def fires_without_A(layers, tokens, answers, lures, found):
    """For each answer, whether every head that holds it alone fires without its A, too.

    A head may write C whenever B comes, whether an A came before or not, while another
    head takes it back where none did: it copies, the other cancels. It holds the
    trigram by the published rule, which looks at completed trigrams only. A head *fires
    without A* if its lead on C (what it writes there less the largest of what else it
    writes) is, on average over the lures, more than half of what it is where the
    trigram is complete.

    tokens, answers, lures: see `skip_trigram_task`. found: what `judge` returns.
    ValueError: an answer of `found` is never due in `answers`, or never a lure.
    """
    complete, _ = results_where(layers, tokens, answers >= 0)
    lured, _ = results_where(layers, tokens, lures >= 0)
    due = answers[answers >= 0]
    lure = lures[lures >= 0]
    return results_without_A(complete, due, lured, lure, found)


def results_without_A(complete, due, lured, lure, found):
    """The list of `fires_without_A`, from what heads write [N, H, V] at each answer due
    [N], and at each lure [N]."""
    fires = []
    for answer, heads in zip(found["answers"], singles(found["holders"])):
        if answer not in due or answer not in lure:
            raise ValueError(f"answer {answer} must be due somewhere, and a lure")
        lead = mean_lead(complete[due == answer], answer)  # [H]
        lead_without_A = mean_lead(lured[lure == answer], answer)
        is_fired = lead_without_A[heads] > 0.5 * lead[heads]
        fires.append(len(heads) > 0 and bool(np.all(is_fired)))
    return fires


def mean_lead(result, answer):
    """How far each head writes an answer above all else: [N, H, V] -> mean, [H]"""
    others = np.delete(result, answer, axis=2)
    return np.mean(result[:, :, answer] - np.max(others, axis=2), axis=0)


# ---- A toy, its gated block, the verdict ---------------------------------------------


def toy_and_record(n_heads, n_trigrams, seed, recipe=TOY, watch=None):
    """A toy that shows superposition, and what a gated block learns from.

    The toy is the first of all drawn that is right on more than 99.8% of each trigram
    while at least one trigram is distributed. (In a short run any toy will do.) Returns
    its parameters, 5,000 sequences of tokens, and what its attention writes on them.
    """
    task = skip_trigram_task(n_trigrams, 10_000, seeds_of(seed).selection)
    is_short = recipe["steps"] < TOY["steps"]
    for draw in itertools.count():
        draw_seed = seeds_of(seed, draw).toy
        layers = train_toy(n_heads, n_trigrams, draw_seed, recipe, watch=watch)
        if is_short or shows_superposition(layers, task):
            return layers[0], *record(layers, n_trigrams, seed)


def shows_superposition(layers, task):
    """Whether a toy is right on each trigram, and at least one is distributed."""
    found = judge(layers, task["tokens"], task["answers"])
    is_right = min(found["accuracy"]) > 0.998
    return is_right and [] in singles(found["holders"])


def record(layers, n_trigrams, seed):
    """What a gated block learns from: 5,000 sequences and what layers write there."""
    tokens_seed = seeds_of(seed).recording
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, 5000, seed=tokens_seed)
    return tokens, written(layers, tokens)


def fresh_task(n_trigrams, seed, n_sequences=10_000):
    """What a verdict is based on: sequences that nothing was trained on."""
    return skip_trigram_task(n_trigrams, n_sequences, seeds_of(seed).verdict)


def written(layers, tokens):
    """What the attention of all layers writes, summed: integers [S, T] -> [S, T, V]"""
    parts = []
    for part in in_parts(tokens):
        blocks = gatedref.transformer(layers, tokens[part])["blocks"]
        parts.append(sum(block["attn_out"] for block in blocks))
    return np.concatenate(parts)


def verdict(gated, layers, n_trigrams, seed, n_sequences=10_000):
    """What a gated block is worth in place of some layers, on fresh sequences.

    Returns a dict: what `judge` found of it, and `apart`, `share`, `unexplained`, and
    `fires_without_A`, for how many trigrams.
    """
    task = fresh_task(n_trigrams, seed, n_sequences)
    tokens, answers, lures = task["tokens"], task["answers"], task["lures"]
    found = judge([gated], tokens, answers)
    some = slice(2000)  # of the sequences: a mean needs no more
    fires = fires_without_A([gated], tokens[some], answers[some], lures[some], found)
    return {
        **found,
        "apart": is_apart(found),
        "share": share_of(found),
        "unexplained": unexplained(gated, tokens, written(layers, tokens)),
        "fires_without_A": sum(fires),
    }


# ---- The main job --------------------------------------------------------------------

SETTINGS = {"2H3T": (2, 3), "3H4T": (3, 4), "4H5T": (4, 5)}  # heads, trigrams
DESCRIPTION = """Trains three toy models whose attention heads are in superposition,
takes each apart with a gated block, prints which heads hold which trigram before and
after, and draws it. Takes about a minute on one core."""
FILES = "main.json, blocks.npz, before_after.png and gates.png"


def main(argv=None):
    # Only the command needs these, and Matplotlib with them.
    from figures import before_after, common

    options = parse(argv, common)
    rows, blocks = [], {}
    try:
        for key in SETTINGS:
            row, params = run_setting(key, options)
            rows.append(row)
            for name, array in params.items():
                blocks[f"{key}/{name}"] = array
    except KeyboardInterrupt:
        print(f"\ntrain.py: interrupted; nothing in {options.out} has changed")
        return 130
    except FloatingPointError as problem:
        print(f"\ntrain.py: {problem}; nothing in {options.out} has changed")
        return 1

    common.write_rows(options.out / "main.json", rows)
    common.write_arrays(options.out / "blocks.npz", blocks)
    before_after.draw(options.out, rows)
    before_after.report(rows)
    print(f"{FILES} are in {options.out}")
    return 0


def parse(argv, common):
    parser = argparse.ArgumentParser("train.py", description=DESCRIPTION)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything random; another needs --out")
    add("--out", type=Path, help="where files go (default: figures)")
    add("--quick", action="store_true", help="a smoke run of seconds, to figures/quick")
    options = parser.parse_args(argv)

    options.changes = common.QUICK if options.quick else {}
    if options.seed < 0:
        parser.error(f"--seed must be >= 0, got {options.seed}")
    if options.out is None and options.seed != 0 and not options.quick:
        parser.error("--seed needs --out: the pictures in figures/ show seed 0")
    if options.out is None:
        options.out = common.QUICK_FOLDER if options.quick else common.FIGURES
    try:
        common.try_out(options.out)  # before a minute is spent on training
    except OSError as problem:
        parser.error(f"cannot write to {options.out}: {problem}")
    if options.quick:
        print("A smoke run: nothing is learnt in so few steps, and no number counts.")
    return options


def run_setting(key, options):
    """A toy and its gated block: a row of main.json, and the parameters of both."""
    n_heads, n_trigrams = SETTINGS[key]
    began = time.perf_counter()

    def watch_toy(done, _):
        show(f"{key}: training a toy, {done:.0%}")

    def watch_gated(done, _):
        show(f"{key}: taking it apart, {done:.0%}")

    recipe = {**TOY, **options.changes}
    toy, tokens, target = toy_and_record(
        n_heads, n_trigrams, options.seed, recipe, watch_toy
    )
    tell(f"{key}: a toy is trained", began)
    recipe = {**RECIPE, **options.changes}
    gated, _ = take_apart(
        tokens, target, n_heads, seed=options.seed, recipe=recipe, watch=watch_gated
    )
    tell(f"{key}: it is taken apart", began)

    params = {f"toy/{name}": array for name, array in toy.items()}
    for name, array in gated.items():
        params[f"gated/{name}"] = array
    row = {"key": key, "seed": options.seed, **row_of(toy, gated, options.seed)}
    return row, params


def row_of(toy, gated, seed):
    """What main.json says of a toy and its gated block."""
    V = toy["W_Q"].shape[1]
    n_trigrams = (V - 2) // 2
    task = fresh_task(n_trigrams, seed)
    before = judge([toy], task["tokens"], task["answers"])
    after = verdict(gated, [toy], n_trigrams, seed)
    gate = gatedref.gated_attention(gated, np.eye(V)[None])["gate"][0]

    row = {}
    for name in ("apart", "share", "unexplained", "fires_without_A"):
        row[name] = after[name]
    for name in ("holders", "accuracy", "shares"):
        row[f"{name}_toy"] = before[name]
        row[f"{name}_gated"] = after[name]
    row["gates_at_A"] = gate[:, :, 0].tolist()  # [H, query token]
    return row


def show(text):
    """A line on the terminal that the next one is written over; elsewhere nothing."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\033[K{text[:79]}", end="", file=sys.stderr, flush=True)


def tell(text, began):
    """A line for what is finished, and the seconds since its setting began."""
    show("")
    print(f"{text} ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
