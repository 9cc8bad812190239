"""train: superposition appears in a toy model, and a gated block takes it apart.

    python train.py            the three published settings, a minute or two; see --help

The toy is one attention block with fewer heads than it has skip trigrams to learn. A
gated block with more heads then learns to write what the toy's block writes, and a
penalty on its gates (L0.6) makes each trigram the work of one head.

The file is meant to be read from top to bottom: the recipes; `take_apart`, the training
loop, and what it calls; the takeover; the gates that open again; the toy; what a model
does; the main job. The formulas are those of `gatedref.py`, and autograd differentiates
them.

MIT. Copyright (c) 2026 the gatedref authors.
"""

import argparse
import itertools
import os
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    for needed in ("gatedref.py", "figures"):
        if not Path(__file__).with_name(needed).exists():
            sys.exit(f"train.py: {needed} must lie beside it")
    # As a command, and only then, keep BLAS to one thread: for arrays as small as these
    # more threads do not help. This must be set before NumPy is loaded.
    for library in ("OPENBLAS", "OMP", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import autograd.numpy as np
from autograd import grad_and_aux, value_and_grad
from autograd.extend import defvjp, primitive
from autograd.tracer import getval

import gatedref

# ---- The recipes ---------------------------------------------------------------------


def reopening(scores):
    """The clamp to [0, 1], but a gate that has left that range can come back.

    Outside of it the clamp has the derivative 0. This one lets the derivative through
    where a step downhill leads back inside; see "Gates that open again".
    """
    return _clip_and_reopen(scores)


class Recipe(NamedTuple):
    """How a model is trained. A change is written RECIPE._replace(alpha=5)."""

    steps: int  # of Adam: enough for the curves to become flat
    batch: int  # sequences a step, drawn anew from all that were recorded
    rate: float  # of Adam: half to a fifth of what makes the loss jump
    rate_factors: tuple = (1.0, 1.0, 1.0, 0.3, 0.1)  # the steps are cut into equal
    # *legs*; each has its factor on the rate, and between them heads take over

    # What follows is for gated blocks only.
    expansion: int = None  # times the heads of the model: spare ones can take over
    d_head: int = None  # as wide as what one head is to copy
    d_gate: int = None  # with two columns a takeover can push gate scores below 0
    value_scale: float = None  # times the target's largest entry: what a gate of 1 lets
    # through, wide enough for anything; None is the published block, see `normalised`
    activation: Callable = gatedref.clamp  # while it is trained; afterwards the clamp
    takeovers: bool = False  # spare heads take over shared pairs; for one-hot x only
    p: float = 0.6  # of the penalty: below 1, sharing costs more than the sum
    alpha: float = 0.0  # of the penalty, in variances of the target, so that one number
    # serves every model: loss / variance = unexplained + alpha * penalty
    alpha_growth: float = 0.0  # alpha grows from 0 over this part of the steps, so that
    # heads learn what to write before they compete for it


# For tokens one-hot. More of alpha separates better, less of it fits better. With V
# tokens, more than a dozen, take V / 4: the more there are, the rarer is each pair of
# them, and the less its gate counts in the penalty.
RECIPE = Recipe(
    steps=1600,
    batch=40,
    rate=0.01,
    expansion=4,
    d_head=4,
    d_gate=2,
    value_scale=2.0,
    activation=reopening,
    takeovers=True,
    p=0.6,
    alpha=2.5,
)

# For any residual stream, such as that of a model with an embedding and positions. Its
# largest entries are far above the others, hence the small value_scale.
RESIDUAL = Recipe(
    steps=2500,
    batch=8,
    rate=0.002,
    expansion=12,
    d_head=32,
    d_gate=8,
    value_scale=0.5,
    activation=reopening,
    p=0.25,
    alpha=0.035,
    alpha_growth=0.7,
)

# The post's recipe for 4H5T. Of the others, 2H3T has an alpha of 1.9 in variances, 3H4T
# one of 0.38, and both a rate of 0.0005. The post goes through the same 100 batches
# again and again; `take_apart` draws each anew.
PUBLISHED = Recipe(
    steps=100_000,
    batch=1000,
    rate=0.001,
    rate_factors=(1.0,),
    expansion=2,
    d_head=1,
    d_gate=1,
    p=0.6,
    alpha=1.2,
)

TOY = Recipe(steps=1500, batch=40, rate=0.05)


def check_recipe(recipe):
    """Refuses a recipe that is not one for a gated block."""
    if not isinstance(recipe, Recipe):
        change = "RECIPE or RESIDUAL, with a change RESIDUAL._replace(steps=3000)"
        raise TypeError(f"recipe must be a Recipe ({change}), got {type(recipe)}")
    if recipe.d_gate is None:
        raise ValueError("recipe.d_gate must be a whole number: TOY is for toys only")
    for name in ("steps", "batch", "expansion", "d_head", "d_gate"):
        gatedref.check_whole(f"recipe.{name}", getattr(recipe, name), 1)
    for name in ("rate", "p"):
        gatedref.check_positive(f"recipe.{name}", getattr(recipe, name))
    if recipe.value_scale is not None:
        gatedref.check_positive("recipe.value_scale", recipe.value_scale)
    if gatedref.check_number("recipe.alpha", recipe.alpha) < 0:
        raise ValueError(f"recipe.alpha must be >= 0, got {recipe.alpha}")
    growth = gatedref.check_number("recipe.alpha_growth", recipe.alpha_growth)
    if not 0 <= growth <= 1:
        raise ValueError(f"recipe.alpha_growth must be in [0, 1], got {growth}")
    if not callable(recipe.activation):
        found = recipe.activation
        raise TypeError(f"recipe.activation must be a function, got {found!r}")
    if not isinstance(recipe.takeovers, bool):
        raise TypeError(f"recipe.takeovers must be a bool, got {recipe.takeovers!r}")
    check_rate_factors(recipe.rate_factors)


def check_rate_factors(factors):
    if not isinstance(factors, (tuple, list)) or not factors:
        found = f"got {factors!r}"
        raise ValueError(f"recipe.rate_factors must be a tuple of numbers, {found}")
    for leg, factor in enumerate(factors):
        gatedref.check_positive(f"recipe.rate_factors[{leg}]", factor)


# ---- Taking a block apart ------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")  # `check_finite` reports overflows
def take_apart(x, target, n_heads, *, seed=0, recipe=RECIPE, watch=None):
    """A gated block that writes what was recorded, with its heads out of superposition.

    x: [S, T, D], what a model's attention reads, on some thousands of the sequences
    that the block is to be right on: for tokens one-hot np.eye(V)[tokens], else the
    residual stream, behind the layer norm. target: [S, T, D], what the attention writes
    on them, before it is added to the residual stream: one layer of it, or the sum of
    several. Both come from a hook. What is supported, and how:

        causal attention with learned or no positions   works as it is
        an output bias                                  subtract it from the target
        LayerNorm or RMSNorm before the attention       record x behind it
        LayerNorm behind the attention                  record the target before it
        [T, S, D], as PyTorch has it by default         swap the first two axes
        dropout                                         record in eval mode
        grouped queries (GQA, MQA)                      works: n_heads of the queries
        padding                                         leave such sequences out, or
                                                        cut all to one length
        rotary or relative positions                    not supported: gated heads do
                                                        not see them
        attention that is not causal, attention sinks   not supported

    n_heads: how many heads the model has there, a whole number >= 1. seed: a whole
    number >= 0. recipe: a `Recipe`; one with takeovers, such as `RECIPE`, needs x
    one-hot, `RESIDUAL` takes any x. watch(done, gated): a function that is called a
    hundred times or so, with the part of the steps that is done and the block so far.

    Trains in float32 if x and target both are, else in float64. Returns the parameters
    of the gated block, with their `value_scale` where the recipe has one; and the
    curves, for each step a dict of what its batch gave: `unexplained`, `penalty` and
    `loss`, which is unexplained + alpha * penalty. For one-hot x, gates at pairs of
    tokens that never occur together keep their first values, and mean nothing.

    If the block does not come apart: `gatedref.judge` says which answers still take
    several heads. Then take more of alpha, another seed, or more heads (`expansion`).
    Where it says [], the residual stream supplies a part of the answer. Where much is
    unexplained even at alpha 0, there were too few steps, `d_head` is less than that of
    the model's heads, or the target depends on something that is not in x.

    ValueError, TypeError: an argument is not as above, or more memory would be needed
    than there is. FloatingPointError: training diverged.
    """
    x, target = checked(x, target, n_heads, seed, recipe, watch)
    params, fixed = start_of(x, target, n_heads, seed, recipe)
    variance = gatedref.variance_of(target)
    rng = np.random.default_rng([seed, 1])
    curves = []

    for leg, factor in enumerate(recipe.rate_factors):
        if leg > 0 and recipe.takeovers:
            params = let_heads_take_over(params, fixed, x, recipe, rng)

        adam = Adam(params)  # afresh: its means belong to what heads did before
        for step in steps_of(leg, recipe):
            show_to(watch, step, recipe, {**params, **fixed})
            batch = rng.integers(len(x), size=recipe.batch)
            alpha = variance * alpha_at(step, recipe)  # absolute, as `loss` takes it
            gradient, scalars = gradient_at(
                params, fixed, x[batch], target[batch], variance, alpha, recipe
            )
            params = adam.step(params, gradient, factor * recipe.rate)
            check_finite(step, scalars["loss"], [params])
            curves.append(scalars)

    show_to(watch, recipe.steps, recipe, {**params, **fixed})
    return {**params, **fixed}, curves


class Adam:
    """The optimiser of Kingma and Ba, 2015, with its usual constants.

    A step is the running mean of the gradient over the root of the running mean of its
    square. Both means start at 0, which makes them too small at first; that is
    corrected.
    """

    def __init__(self, params):
        self.n_steps = 0
        self.mean = {name: np.zeros_like(params[name]) for name in params}
        self.square = {name: np.zeros_like(params[name]) for name in params}

    def step(self, params, gradient, rate):
        """The parameters after one step. params, gradient: dicts of arrays."""
        self.n_steps += 1
        moved = {}
        for name, slope in gradient.items():
            self.mean[name] = (1 - 0.9) * slope + 0.9 * self.mean[name]
            self.square[name] = (1 - 0.999) * slope**2 + 0.999 * self.square[name]
            mean = self.mean[name] / (1 - 0.9**self.n_steps)
            square = self.square[name] / (1 - 0.999**self.n_steps)
            moved[name] = params[name] - rate * mean / (np.sqrt(square) + 1e-8)
        return moved


def gradient_at(params, fixed, x, target, variance, alpha, recipe):
    """The gradient with respect to the parameters, a dict; and the curves of one step.

    A large batch is taken in parts; its mean is the mean of theirs, weighted by their
    sizes. alpha: absolute, not in variances.
    """
    total, scalars = {}, {}
    for part in gatedref.parts(len(x), bytes_of_gradient(x, len(params["W_Q"]))):
        weight = len(x[part]) / len(x)
        gradient, of_part = grad_and_aux(loss_of_block)(
            params, fixed, x[part], target[part], variance, alpha, recipe
        )
        for name in gradient:
            total[name] = total.get(name, 0) + weight * gradient[name]
        for name in of_part:
            scalars[name] = scalars.get(name, 0) + weight * of_part[name]
    return total, scalars


def loss_of_block(params, fixed, x, target, variance, alpha, recipe):
    """The `gatedref.loss` of a gated block over the target's variance, and the curves.

    alpha: absolute, so that loss / variance = unexplained + alpha / variance * penalty.
    """
    activation, p = recipe.activation, recipe.p
    block = {**params, **fixed}
    scalars = gatedref.loss(block, x, target, alpha, activation=activation, p=p)
    loss = scalars["loss"] / variance
    curves = {
        "unexplained": getval(scalars["mse"]) / variance,
        "penalty": getval(scalars["penalty"]),
        "loss": getval(loss),
    }
    return loss, curves


def steps_of(leg, recipe):
    """The steps of a leg: each leg is an equal part of all."""
    n_legs = len(recipe.rate_factors)
    return range(recipe.steps * leg // n_legs, recipe.steps * (leg + 1) // n_legs)


def alpha_at(step, recipe):
    """alpha, which grows from 0 where the recipe says so."""
    n_growing = recipe.alpha_growth * recipe.steps
    if step >= n_growing:
        return recipe.alpha
    return recipe.alpha * step / n_growing


def start_of(x, target, n_heads, seed, recipe):
    """The parameters that are trained, and what is part of the block but is not."""
    n_gated = recipe.expansion * n_heads
    sizes = (n_gated, x.shape[2], recipe.d_head, seed, recipe.d_gate)
    params = gatedref.init_params(*sizes)
    params = {name: array.astype(x.dtype) for name, array in params.items()}
    return params, fixed_params(target, recipe)


def fixed_params(target, recipe):
    if recipe.value_scale is None:
        return {}
    largest = max(np.max(target), -np.min(target))
    return {"value_scale": np.array(recipe.value_scale * largest, dtype=target.dtype)}


def check_finite(step, loss, layers):
    numbers = [loss]
    for params in layers:
        numbers += params.values()
    if not all(np.isfinite(array).all() for array in numbers):
        raise FloatingPointError(f"training diverged: not finite at step {step}")


def show_to(watch, step, recipe, gated):
    """Lets a watcher see the block, a hundred times or so and at the end."""
    is_due = step % max(1, recipe.steps // 100) == 0
    if watch is not None and (is_due or step == recipe.steps):
        watch(step / recipe.steps, gated)


# ---- What is refused -----------------------------------------------------------------


def checked(x, target, n_heads, seed, recipe, watch):
    """x and target as `take_apart` trains on them: of one type, in C order."""
    check_recipe(recipe)
    gatedref.check_whole("n_heads", n_heads, 1)
    gatedref.check_whole("seed", seed, 0)
    if watch is not None and not callable(watch):
        raise TypeError(f"watch must be None or a function, got {type(watch)}")
    if np.ndim(x) == 2:
        hint = "tokens are one-hot as np.eye(V)[tokens], one sequence is x[None]"
        raise ValueError(f"x must be of shape [S, T, D], got {np.shape(x)}; {hint}")

    x = gatedref.check_array("x", x, "STD")
    sizes = gatedref.sizes_of("x", x, "STD")
    target = gatedref.check_array("target", target, "STD", sizes)
    is_single = x.dtype == target.dtype == np.float32
    dtype = np.float32 if is_single else np.float64
    x = np.ascontiguousarray(x, dtype=dtype)
    target = np.ascontiguousarray(target, dtype=dtype)
    if recipe.takeovers:
        check_one_hot(x)
    check_memory(x, recipe.expansion * n_heads, recipe)
    return x, target


def check_one_hot(x):
    for part in gatedref.parts(len(x), x[0].nbytes):
        is_one_hot = np.all((x[part] == 0) | (x[part] == 1))
        if not is_one_hot or np.any(np.sum(x[part], axis=2) != 1):
            raise ValueError(
                "x must be one-hot for a recipe with takeovers, which count pairs of "
                "tokens; for any other x take recipe=train.RESIDUAL"
            )


def bytes_of_gradient(x, n_heads):
    """What the gradient at one sequence takes, as measured: 30 arrays [H, T, T]."""
    _, T, _ = x.shape
    return 30 * n_heads * T**2 * x.itemsize


def check_memory(x, n_gated, recipe):
    """Refuses what cannot be computed on this machine even in the smallest parts."""
    _, T, D = x.shape
    needed = bytes_of_gradient(x, n_gated)
    if recipe.takeovers:
        needed = max(needed, 10 * n_gated * D**2 * x.itemsize)
    if not hasattr(os, "sysconf"):  # Windows does not tell
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"x [S, T, D] must be smaller: {n_gated} heads at T = {T} and D = {D} need "
            f"{needed / 2**30:.0f} GiB, and there are {there / 2**30:.0f} (is the "
            "first axis that of the sequences?)"
        )


# ---- The takeover --------------------------------------------------------------------
#
# A closed gate passes no gradient to its head's values. So a spare head stays idle
# while others share what it could do alone, and has to be put to work by hand.


def let_heads_take_over(params, fixed, x, recipe, rng):
    """`take_over`, as it is applied between two legs. x: one-hot tokens [S, T, V]."""
    # All columns of a head may write in the same direction; their lengths then add up.
    reach = recipe.d_head
    if fixed:
        reach = recipe.d_head * float(fixed["value_scale"])

    def look(params):
        some = x[rng.integers(len(x), size=500)]
        return survey({**params, **fixed}, some, recipe.activation)

    return take_over(params, look, pair_frequency(x), recipe.p, reach, write_vector)


def take_over(params, look, frequency, p, reach, write):
    """Spare heads take over the (query, key) pairs that are most expensive to share.

    1. Of the heads that have not taken over yet, the one whose gates cost least is the
       next to do so.
    2. At each pair of tokens, all heads together write one vector. One head could write
       it alone, with the attention of the head that writes most there (the pair's
       *leader*), through a gate of width = norm / (the leader's attention * reach). A
       pair that would take a width above 1 is left alone.
    3. That would save what the penalty charges for the pair now, less the width, which
       is what one head alone is charged.
    4. The head is given the pair that saves most; it drops its old job. All gates are
       closed there. Then it attends like the leader, writes what all wrote there
       together, and opens its gate as wide as that takes.
    5. This is repeated until the best pair would save no more than the next head's own
       gates cost.

    An example, with p = 0.6 and a reach of 8: at a pair that is 1/50 of all pairs, two
    heads with gates of 0.1 write a vector of norm 0.8 together, where their leader's
    attention is 0.9. The width is 0.8 / (0.9 * 8) = 0.11. The penalty charges
    (2 * 0.1^0.6)^(1/0.6) = 0.32 for the pair, so (0.32 - 0.11) / 50 is saved.

    (Idle neurons of sparse autoencoders are resampled similarly: Bricken et al., 2023.)

    look(params): returns `gate`, `pattern` and `value`, like `survey`. frequency [V,
    V]: see `pair_frequency`. p: of the penalty. reach: the norm that a head can write
    through a gate and an attention of 1. write: `write_vector`, or a function like it.
    Returns the new parameters.
    """
    params = {name: array.copy() for name, array in params.items()}
    candidates = list(range(len(params["W_Q"])))
    while candidates:
        gate, pattern, value = look(params)
        costs = {head: cost_of(head, gate, frequency, p) for head in candidates}
        head = min(candidates, key=costs.get)

        leader, width = widths(gate, pattern, value, reach)
        saved = frequency * (gatedref.charge(gate, p) - width)
        saved = np.where((width > 0) & (width <= 1), saved, 0.0)
        query, key = np.unravel_index(np.argmax(saved), saved.shape)
        if saved[query, key] <= costs[head]:
            break

        candidates.remove(head)
        together = np.sum(written_at(query, gate, pattern, value)[:, key], axis=0)
        close_gates(params, query, key)
        attend_like(params, head, leader[query, key])
        write(params, head, key, together)
        open_gate(params, head, query, key, width[query, key])
    return params


def widths(gate, pattern, value, reach):
    """The leader at each pair, and how wide one head's gate would be: [V, V] both.

    Query by query, as [H, V, V, D] may not fit into memory.
    """
    leader = np.zeros(gate.shape[1:], dtype=int)
    width = np.zeros(gate.shape[1:])
    for query in range(len(width)):
        written = written_at(query, gate, pattern, value)
        first = np.argmax(np.linalg.norm(written, axis=-1), axis=0)  # it writes most
        attention = np.take_along_axis(pattern[:, query], first[None], axis=0)[0]
        norm = np.linalg.norm(np.sum(written, axis=0), axis=-1)
        leader[query] = first
        width[query] = norm / np.maximum(attention * reach, 1e-12)
    return leader, width


def written_at(query, gate, pattern, value):
    """What each head writes at a query, by key: [H, V, D]"""
    return (gate[:, query] * pattern[:, query])[..., None] * value


def survey(gated, x, activation=gatedref.clamp):
    """What the heads of a gated block do at each pair of a query token and a key token.

    Over the sequences x [S, T, V], one-hot. Returns `gate` [H, V, V]; `pattern` [H, V,
    V], the mean attention of a query token to all keys of one token; and `value` [H, V,
    D], what a head writes of each key token, for a gate and an attention of 1.
    """
    tokens = np.argmax(x, axis=2)
    H, V, _ = gated["W_Q"].shape
    summed = np.zeros((H, V, V))  # [H, query token, key token]
    n_queries = np.zeros(V)
    for part in gatedref.parts(len(x), 20 * H * x.shape[1] ** 2 * x.itemsize):
        pattern = gatedref.gated_attention(gated, x[part])["pattern"]
        to_token = np.swapaxes(pattern @ x[part][:, None], 1, 2)  # [S, query, H, V]
        for token in range(V):
            at_token = to_token[tokens[part] == token]
            summed[:, token] += np.sum(at_token, axis=0)
            n_queries[token] += len(at_token)
    mean_pattern = summed / np.maximum(n_queries, 1)[:, None]

    each_token_once = np.eye(V, dtype=x.dtype)[None]
    all_pairs = gatedref.gated_attention(gated, each_token_once, activation=activation)
    v = np.swapaxes(all_pairs["v"][0], 0, 1)  # [H, V, K]
    value = v @ gatedref.normalised(gated)["W_O"]  # [H, key, D]
    return all_pairs["gate"][0], mean_pattern, value


def pair_frequency(x):
    """How often a query and a key are these two tokens, of all pairs: [V, V]"""
    S, T, _ = x.shape
    counts = np.sum(x, axis=1, dtype=float)  # [S, V]
    return counts.T @ counts / (S * T * T)


def cost_of(head, gate, frequency, p):
    """By how much the penalty would fall if this head were closed everywhere."""
    without = gatedref.charge(np.delete(gate, head, axis=0), p)
    return np.sum(frequency * (gatedref.charge(gate, p) - without))


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
    params["W_V"][head] *= 0.1  # a tenth is kept, so that the columns differ
    params["b_V"][head] *= 0.1
    params["W_V"][head, key] += 1
    params["W_O"][head] = wanted / np.linalg.norm(wanted)


def open_gate(params, head, query, key, width):
    """Gives a head a gate of this width at one pair, and closes it elsewhere.

    The score is a sum over the G columns of the gate. Each column but the first adds
    -0.1 * 0.1 = -0.01 at every pair, so that the gate is closed there, not just at its
    edge. The first column adds root * root at the one pair, which makes up for that.
    """
    for name in gatedref.GATE:
        params[name][head] = 0
    params["b_gate_Q"][head, 1:] = -0.1
    params["b_gate_K"][head, 1:] = 0.1
    lowered = 0.01 * (params["b_gate_Q"].shape[1] - 1)
    root = (width + lowered) ** 0.5
    params["W_gate_Q"][head, query, 0] = root
    params["W_gate_K"][head, key, 0] = root


# ---- Gates that open again -----------------------------------------------------------
#
# The derivative of a clamp is 0 outside of [0, 1], so a gate that has left would never
# come back. Here it is 1 there too, where a step downhill leads back inside:
#
#     score    gate    slope of the loss by the gate    slope by the score
#     -0.2     0       -3: open it, and the loss falls  -3: the score rises
#     -0.2     0        3: it is better closed           0: it stays


@primitive
def _clip_and_reopen(scores):
    return np.clip(scores, 0, 1)


def _reopening_vjp(_, scores):
    def backward(slope):  # a step downhill goes up where the slope is negative
        passes_below = (scores >= 0) | (slope < 0)
        passes_above = (scores <= 1) | (slope > 0)
        return np.where(passes_below & passes_above, slope, 0.0)

    return backward


defvjp(_clip_and_reopen, _reopening_vjp)


# ---- The toy -------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")  # `check_finite` reports overflows
def descend(loss_of, layers, draw, recipe):
    """Trains anything else by the loop of `take_apart`: the same legs, the same Adam.

    layers: a list of dicts of arrays. loss_of(layers, *draw()): a scalar, and draw() a
    new batch. Returns the layers as they are in the end.
    """
    loss_and_gradient_at = value_and_grad(loss_of)
    for leg, factor in enumerate(recipe.rate_factors):
        adams = [Adam(layer) for layer in layers]
        for step in steps_of(leg, recipe):
            loss, gradient = loss_and_gradient_at(layers, *draw())
            moved = []
            for adam, layer, slope in zip(adams, layers, gradient):
                moved.append(adam.step(layer, slope, factor * recipe.rate))
            layers = moved
            check_finite(step, loss, layers)
    return layers


def train_toy(n_heads, n_trigrams, seed, recipe=TOY, *, n_layers=1):
    """The layers of a toy model, trained to predict the next token of skip trigrams."""
    V = 2 * n_trigrams + 2
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, 5000, seed=seed)
    rng = np.random.default_rng([seed, 2])

    def draw():
        return (tokens[rng.integers(len(tokens), size=recipe.batch)],)

    def loss_of(layers, batch):
        logits = gatedref.transformer(layers, batch)["logits"]
        return cross_entropy(logits[:, :-1], np.eye(V)[batch[:, 1:]])

    start = []
    for layer in range(n_layers):
        start.append(gatedref.init_params(n_heads, V, 1, seeds_of(seed, layer).toy))
    return descend(loss_of, start, draw, recipe)


def cross_entropy(logits, answers):
    """The mean of -log p(answer). logits, and answers one-hot: [..., V]."""
    largest = np.max(getval(logits), axis=-1, keepdims=True)
    logits = logits - largest  # so that exp is finite
    log_sum = np.log(np.sum(np.exp(logits), axis=-1))
    return np.mean(log_sum - np.sum(logits * answers, axis=-1))


# Everything random comes from one seed, but no two things from the same stream. A block
# starts from the seed itself. Four things have seeds from `seeds_of`; batches and other
# samples come from default_rng([seed, n]), where n is
#     1 the batches and takeovers of a gated block    2 the batches of a toy
#     3 the batches of a floor, or of two gated layers (price, layers)
#     4 those of top-k, and of blocks that copy (ablations, overlap)
#     5 those of a toy with two sources, 6 those of its gated block (sources)
#     7 the fresh sequences that these are judged on (overlap, sources)
Seeds = namedtuple("Seeds", "toy selection recording verdict")


def seeds_of(*numbers):
    """Four independent seeds, made from these numbers."""
    states = np.random.SeedSequence(numbers).generate_state(4)
    return Seeds(*[int(state) for state in states])


def toy_and_record(
    n_heads, n_trigrams, seed, recipe=TOY, *, is_smoke=False, watch=None
):
    """A toy that shows superposition, and what a gated block learns from.

    The toy is the first of all drawn that is right on more than 99.8% of each trigram
    while at least one trigram is distributed. (In a smoke run any toy will do.) Returns
    its parameters, 5,000 sequences of tokens, and what its attention writes on them.
    watch(number): is told which toy is being trained.
    """
    task = skip_trigram_task(n_trigrams, 10_000, seeds_of(seed).selection)
    for draw in itertools.count():
        if watch is not None:
            watch(draw + 1)
        toy = train_toy(n_heads, n_trigrams, seeds_of(seed, draw).toy, recipe)
        if is_smoke or shows_superposition(toy, task):
            return toy[0], *record(toy, n_trigrams, seed)


def shows_superposition(layers, task):
    """Whether a toy is right on each trigram, and at least one is distributed."""
    found = judge_on(writes(layers), task, most=1)  # larger sets tell no more here
    is_right = min(found["accuracy"]) > 0.998
    return is_right and [] in gatedref.singles(found["holders"])


def record(layers, n_trigrams, seed):
    """What a gated block learns from: 5,000 sequences and what layers write there."""
    tokens_seed = seeds_of(seed).recording
    tokens, _ = gatedref.sample_skip_trigrams(n_trigrams, 5000, seed=tokens_seed)
    return tokens, written(layers, tokens)


def written(layers, tokens):
    """What the attention of all layers writes, summed: integers [S, T] -> [S, T, V]"""
    recorded = []
    n_heads = sum(len(layer["W_Q"]) for layer in layers)
    for part in parts_of(tokens, n_heads, layers[0]["W_Q"].shape[1]):
        blocks = gatedref.transformer(layers, tokens[part])["blocks"]
        recorded.append(sum(block["attn_out"] for block in blocks))
    return np.concatenate(recorded)


# ---- What a model does ---------------------------------------------------------------

# Integers [S, T]: the tokens; the C that is due at the B of a sequence's only trigram,
# -1 elsewhere; and at each B that no A came before the C that would be due, else -1.
Task = namedtuple("Task", "tokens answers lures")


def skip_trigram_task(n_trigrams, n_sequences, seed):
    """Fresh sequences, and what is due in them: a `Task`."""
    n = n_trigrams
    tokens, completes = gatedref.sample_skip_trigrams(n, n_sequences, seed=seed)
    is_only = np.sum(completes, axis=1, keepdims=True) == 1
    is_B = (tokens >= 1) & (tokens <= n)
    no_A_yet = np.cumsum(tokens == 0, axis=1) == 0
    answers = np.where(completes & is_only, tokens + n, -1)
    lures = np.where(is_B & no_A_yet, tokens + n, -1)
    return Task(tokens, answers, lures)


def fresh_task(n_trigrams, seed, n_sequences=10_000):
    """What a verdict is based on: sequences that nothing was trained on."""
    return skip_trigram_task(n_trigrams, n_sequences, seeds_of(seed).verdict)


def parts_of(tokens, n_heads, V):
    """Slices of the sequences that fit into memory with all intermediates."""
    S, T = tokens.shape
    return gatedref.parts(S, 8 * n_heads * T * (8 * T + 2 * V))


def writes(layers, activation=gatedref.clamp):
    """A function of tokens [S, T]: what each head of all layers writes, [S, T, H, V]"""

    def write(tokens):
        model = gatedref.transformer(layers, tokens, activation=activation)
        result = [block["result"] for block in model["blocks"]]
        return np.concatenate(result, axis=2)

    return write


# What is seen of a model on a task. Where an answer is due: `result` [N, H, V], what
# each head writes, `output` [N, V], the logits, and `answers` [N]. Where a lure is:
# `result_without_A` [M, H, V] and `lures` [M]. Everywhere: `written` [S, T, V].
Seen = namedtuple("Seen", "result output answers result_without_A lures written")


def observe(write, task):
    """Runs a model on a task. write: a function like those that `writes` makes."""
    _, _, H, V = write(task.tokens[:1]).shape
    seen = Seen([], [], [], [], [], [])
    for part in parts_of(task.tokens, H, V):
        result = write(task.tokens[part])
        attn_out = np.sum(result, axis=2)
        logits = np.eye(V)[task.tokens[part]] + attn_out
        answers, lures = task.answers[part], task.lures[part]

        seen.result.append(result[answers >= 0])
        seen.output.append(logits[answers >= 0])
        seen.answers.append(answers[answers >= 0])
        seen.result_without_A.append(result[lures >= 0])
        seen.lures.append(lures[lures >= 0])
        seen.written.append(attn_out)
    return Seen(*[np.concatenate(arrays) for arrays in seen])


def judge_on(write, task, *, most=None):
    """What `gatedref.judge` finds of a model on a task. most: see `holders`."""
    seen = observe(write, task)
    return gatedref.judge(seen.result, seen.output, seen.answers, most=most)


def verdict(write, toy, task, *, n_lured=2000, most=None):
    """What a model is worth in place of a toy's layers, on fresh sequences.

    n_lured: on how many sequences `fires_without_A` looks; a mean needs no more. most:
    see `gatedref.holders`. Returns a dict: what `judge` found of it, and `apart`,
    `share`, `unexplained`, and `fires_without_A`, for how many trigrams.
    """
    seen = observe(write, task)
    found = gatedref.judge(seen.result, seen.output, seen.answers, most=most)
    n_answers = np.sum(task.answers[:n_lured] >= 0)
    n_lures = np.sum(task.lures[:n_lured] >= 0)
    fires = gatedref.fires_without_A(
        found,
        seen.result[:n_answers],
        seen.answers[:n_answers],
        seen.result_without_A[:n_lures],
        seen.lures[:n_lures],
    )
    target = written(toy, task.tokens)
    return {
        **found,
        "apart": gatedref.is_apart(found),
        "share": gatedref.share_of(found),
        "unexplained": gatedref.unexplained(seen.written, target),
        "fires_without_A": sum(fires),
    }


# ---- The main job --------------------------------------------------------------------

SETTINGS = {"2H3T": (2, 3), "3H4T": (3, 4), "4H5T": (4, 5)}  # heads, trigrams
DESCRIPTION = """Trains three toy models whose attention heads are in superposition,
takes each apart with a gated block, prints which heads hold which trigram before and
after, and draws it. Takes a minute or two on one core."""
FILES = "main.json, blocks.npz, before_after.png and gates.png"


def main(argv=None):
    # Only the command needs these, and Matplotlib with them.
    from figures import before_after, common

    options = parse(argv)
    rows, blocks = [], {}
    try:
        for key in SETTINGS:
            row, params = run_setting(key, options.seed, options.quick)
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


def parse(argv):
    from figures import common

    parser = argparse.ArgumentParser("train.py", description=DESCRIPTION)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything random; another needs --out")
    add("--out", type=Path, help="where files go (default: figures)")
    add("--quick", action="store_true", help="a smoke run of seconds, to figures/quick")
    options = parser.parse_args(argv)

    if options.seed < 0:
        parser.error(f"--seed must be >= 0, got {options.seed}")
    if options.out is None and options.seed != 0 and not options.quick:
        parser.error("--seed needs --out: the pictures in figures/ show seed 0")
    if options.out is None:
        options.out = common.SCRATCH if options.quick else common.FIGURES
    try:
        common.try_out(options.out)  # before a minute is spent on training
    except OSError as problem:
        parser.error(f"cannot write to {options.out}: {problem}")
    if options.quick:
        print("A smoke run: nothing is learnt in so few steps, and no number counts.")
    return options


def shortened(recipe, is_smoke):
    """The recipe; for a smoke run of seconds one by which nothing is learnt."""
    if is_smoke:
        return recipe._replace(steps=4, rate_factors=(1.0, 1.0))
    return recipe


def n_fresh(is_smoke):
    """On how many fresh sequences a model is judged; a few will do in a smoke run."""
    return 500 if is_smoke else 10_000


def run_setting(key, seed, is_smoke):
    """A toy and its gated block: a row of main.json, and the parameters of both."""
    n_heads, n_trigrams = SETTINGS[key]
    began = time.perf_counter()

    def watch_toys(number):
        show(f"{key}: training a toy, try {number}")

    def watch_gated(done, _):
        show(f"{key}: taking it apart, {done:.0%}")

    toy, tokens, target = toy_and_record(
        n_heads,
        n_trigrams,
        seed,
        shortened(TOY, is_smoke),
        is_smoke=is_smoke,
        watch=watch_toys,
    )
    tell(f"{key}: a toy is trained", began)
    x = np.eye(target.shape[2])[tokens]
    recipe = shortened(RECIPE, is_smoke)
    gated, _ = take_apart(
        x, target, n_heads, seed=seed, recipe=recipe, watch=watch_gated
    )
    tell(f"{key}: it is taken apart", began)

    params = {f"toy/{name}": array for name, array in toy.items()}
    for name, array in gated.items():
        params[f"gated/{name}"] = array
    task = fresh_task(n_trigrams, seed, n_fresh(is_smoke))
    row = row_of(toy, gated, task)
    return {"key": key, "seed": seed, **row}, params


def row_of(toy, gated, task):
    """What main.json says of a toy and its gated block."""
    before = judge_on(writes([toy]), task)
    after = verdict(writes([gated]), [toy], task)
    V = toy["W_Q"].shape[1]
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
