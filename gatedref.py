"""gatedref: gated attention blocks in NumPy, the method as a specification that runs.

Attention heads are in *superposition* when several of them compute together what none
of them computes alone. A gated attention block takes them apart. It has more heads than
the block it replaces, and learns to write what that block writes. Each head has a gate
for every (query, key) pair of positions, and a penalty on the gates makes it expensive
for two heads to be open on the same pair.

The file is meant to be read from top to bottom: attention, the gated block, the
penalty, the loss; then models, a task and the rule that says which head holds what;
then a kit that checks other implementations against this one.

Parameters are dicts of arrays, and autograd differentiates every function of them.
The axes are B batch, T positions, D d_model, H heads, K d_head, G d_gate,
V vocabulary, S sequences. An array is [B, T, D] when it has these three axes.
Arrays may be float64, float32 or integers; integers are converted to float64.
An array or a number of the wrong type, shape or range is a ValueError that names the
argument; an argument that should be a dict or a function, and is not, is a TypeError.

Source, where no other is named: Mathwin, Akar and Sharkey, "Gated Attention Blocks:
Preliminary Progress toward Removing Attention Head Superposition", April 2024, and the
code published with it.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import argparse
import hashlib
import itertools
import math
import operator
import os
import sys
import zipfile
from typing import NamedTuple

import autograd.numpy as np
from autograd import grad, grad_and_aux
from autograd.tracer import getval, isbox
from numpy.ma import isMaskedArray

__version__ = "1.0"

# The axes of each parameter, a letter each.
BLOCK = {
    "W_Q": "HDK",
    "W_K": "HDK",
    "W_V": "HDK",
    "W_O": "HKD",
    "b_Q": "HK",
    "b_K": "HK",
    "b_V": "HK",
}
GATE = {"W_gate_Q": "HDG", "W_gate_K": "HDG", "b_gate_Q": "HG", "b_gate_K": "HG"}
GATED_BLOCK = {**BLOCK, **GATE}

# ---- Attention -----------------------------------------------------------------------


def attention(params, x):
    """Causal multi-head attention, head by head, with no output bias.

        q, k, v     = x W + b
        attn_scores = q . k / sqrt(K), and -inf where key > query
        pattern     = softmax of attn_scores over the keys
        z           = pattern v
        result      = z W_O                      one output a head
        attn_out    = sum of result over the heads

    params: `W_Q W_K W_V` [H, D, K], `W_O` [H, K, D], `b_Q b_K b_V` [H, K].
    x: [B, T, D].

    Returns a dict of every intermediate, under TransformerLens's names: `q k v z`
    [B, T, H, K], `attn_scores pattern` [B, H, query, key], `result` [B, T, H, D] and
    `attn_out` [B, T, D].

    From a torch.nn.MultiheadAttention `mha` (without biases: zeros in their place):

        H, D = mha.num_heads, mha.embed_dim
        W_in = mha.in_proj_weight.detach().numpy().reshape(3, H, D // H, D)
        b_Q, b_K, b_V = mha.in_proj_bias.detach().numpy().reshape(3, H, D // H)
        W_Q, W_K, W_V = np.swapaxes(W_in, 2, 3)
        W_O = mha.out_proj.weight.detach().numpy().T.reshape(H, D // H, D)

    They are right if `unexplained` of this attn_out, on what was recorded, is below
    1e-9. Some thousandths are often an output bias, tenths an x from before the layer
    norm, 1 or more mixed-up axes.
    """
    params, sizes = check_params(BLOCK, params)
    x = check_array("x", x, "BTD", sizes)
    return _attend(params, x)


def _attend(params, x, gate=None):
    """The formulas of `attention`; a gate, if there is one, multiplies the pattern."""
    q = _per_head(x, params["W_Q"], params["b_Q"])  # [B, H, T, K]
    k = _per_head(x, params["W_K"], params["b_K"])
    v = _per_head(x, params["W_V"], params["b_V"])

    T, K = q.shape[2:]
    scores = q @ np.swapaxes(k, 2, 3) / math.sqrt(K)  # [B, H, query, key]
    attn_scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    pattern = _softmax(attn_scores)

    weights = pattern if gate is None else gate * pattern
    z = weights @ v  # [B, H, T, K]
    result = z @ params["W_O"]  # [B, H, T, D]

    stages = {
        "q": _heads_last(q),
        "k": _heads_last(k),
        "v": _heads_last(v),
        "attn_scores": attn_scores,
        "pattern": pattern,
    }
    if gate is not None:
        stages["gate"] = gate
        stages["gated_pattern"] = weights
    stages["z"] = _heads_last(z)
    stages["result"] = _heads_last(result)
    stages["attn_out"] = np.sum(result, axis=1)
    return stages


def _per_head(x, W, b):
    """x W + b for each head: [B, T, D] -> [B, H, T, K]"""
    return x[:, None] @ W + b[:, None]


def _heads_last(array):
    """[B, H, T, K] -> [B, T, H, K], the order of TransformerLens."""
    return np.swapaxes(array, 1, 2)


def _softmax(scores):
    # Subtracting a constant from a row does not change its softmax; the row's largest
    # score keeps exp from overflowing. `getval` takes the plain number out of
    # autograd's box, which makes it a constant to the derivative, too.
    weights = np.exp(scores - getval(scores).max(axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True)


# ---- The gated block -----------------------------------------------------------------


def clamp(scores):
    """min(max(score, 0), 1), whose derivative is 1 on [0, 1], ends included, else 0.

    At exactly 0 and 1 frameworks differ, and only there: PyTorch's clamp has the
    derivative 1 up to version 2.13 and 0 from 2.14 on, JAX's 1/2, autograd's np.clip 0.
    All of them are right.
    """
    return np.where(scores < 0, 0.0, np.where(scores > 1, 1.0, scores))


def gated_attention(params, x, *, activation=clamp):
    """Attention whose pattern is multiplied, after the softmax, by each head's gate.

        gate_q, gate_k = x W_gate + b_gate
        gate_scores    = gate_q . gate_k         neither divided by sqrt(G) nor masked
        gate           = clamp(gate_scores, 0, 1)
        gated_pattern  = gate * pattern          rows do not sum to 1 any more
        z              = gated_pattern v, then `result` and `attn_out` as in `attention`

    The values are computed with `W_V`, `b_V` and `W_O` as `normalised` returns them.

    params: those of `attention`, and `W_gate_Q W_gate_K` [H, D, G], `b_gate_Q b_gate_K`
    [H, G]; optionally `value_scale`, a number > 0, see `normalised`. x: [B, T, D].
    activation: a function from gate scores to gates, of the same shape, which autograd
    can differentiate.

    Returns the dict of `attention`, with `gate_q gate_k` [B, T, H, G] and `gate_scores
    gate gated_pattern` [B, H, query, key].
    """
    if not callable(activation):
        kind = type(activation)
        raise TypeError(f"activation must be a function of the scores, got {kind}")
    params, sizes = check_params(GATED_BLOCK, params)
    x = check_array("x", x, "BTD", sizes)

    gate_q = _per_head(x, params["W_gate_Q"], params["b_gate_Q"])  # [B, H, T, G]
    gate_k = _per_head(x, params["W_gate_K"], params["b_gate_K"])
    gate_scores = gate_q @ np.swapaxes(gate_k, 2, 3)  # [B, H, query, key]
    gate = activation(gate_scores)
    _check_gate(gate, gate_scores)

    gate_stages = {
        "gate_q": _heads_last(gate_q),
        "gate_k": _heads_last(gate_k),
        "gate_scores": gate_scores,
    }
    return {**gate_stages, **_attend({**params, **_normalise(params)}, x, gate)}


def _check_gate(gate, gate_scores):
    """What an activation returns must be floats, and finite if all scores are."""
    numbers, scores = np.asarray(getval(gate)), getval(gate_scores)
    if numbers.shape != scores.shape or numbers.dtype.kind != "f":
        found = f"{numbers.dtype} of shape {numbers.shape}"
        raise ValueError(
            f"activation must return floats of shape {scores.shape}, got {found}"
        )
    if not np.isfinite(numbers).all() and np.isfinite(scores).all():
        at = _first(~np.isfinite(numbers))
        raise ValueError(
            f"activation must return finite numbers, got {numbers[at]} for {scores[at]}"
        )


def normalised(params):
    """`W_V`, `b_V` and `W_O`, as a gated block computes with them.

        W_V[h, :, k] / norm(W_V[h, :, k])       each column of W_V has length 1
        W_O[h, k, :] / norm(W_O[h, k, :])       each row of W_O has length 1
        b_V                                     as it is

    Without this a head could write more by growing its weights while its gate, which is
    what the penalty sees, shrinks. A norm of 1e-12 or less counts as the constant
    1e-12, in the derivative too, so both are finite at 0.

    The published rule has a hole: `b_V`, which is added to every value, is not
    normalised. So a head can still shrink its gate by growing `b_V`. A block with
    `value_scale` c, which is this reference's own, closes the hole. There `b_V` counts
    as one more row of `W_V`, and the length of a column is c in place of 1:

        norm_hk = norm of (W_V[h, :, k], b_V[h, k])
        W_V[h, :, k] / norm_hk * c   and   b_V[h, k] / norm_hk * c

    params: those of `gated_attention`. Returns a dict of the three, shapes unchanged.
    """
    params, _ = check_params(GATED_BLOCK, params)
    return _normalise(params)


def _normalise(params):
    W_V, b_V, W_O = params["W_V"], params["b_V"], params["W_O"]
    W_O = W_O / _norm(W_O, axis=2)

    if "value_scale" not in params:
        return {"W_V": W_V / _norm(W_V, axis=1), "b_V": b_V, "W_O": W_O}

    norm = _norm(np.concatenate([W_V, b_V[:, None]], axis=1), axis=1)  # [H, 1, K]
    scale = params["value_scale"].astype(getval(W_V).dtype)
    return {"W_V": scale * W_V / norm, "b_V": scale * b_V / norm[:, 0], "W_O": W_O}


def _norm(W, axis):
    """The L2 norm, 1e-12 at least."""
    # The floor is under the root, whose derivative is infinite at 0.
    squares = np.sum(W * W, axis=axis, keepdims=True)
    return np.sqrt(np.where(squares > 1e-24, squares, 1e-24))


# ---- The penalty and the loss --------------------------------------------------------


def lp_penalty(gate, p=0.6):
    """The Lp norm of the gates over the heads, averaged over all (query, key) pairs.

        norm    = (sum over h of gate[b, h, query, key]^p)^(1/p)
        penalty = mean of norm over b, query, key

    Why p = 0.6: below 1, sharing a pair costs more than the sum of its parts. One open
    head costs 1, two half open cost 1.587, two fully open 3.175. With p = 1 they would
    cost 1, 1 and 2, so that one head could not be told from two which do half each.

    The mean is over all T x T pairs, key > query included, since the gate has no mask.
    For one-hot tokens nothing is lost by that: where a gate is open to a token that
    comes later, it is open to the same token before, too. (With positions in x, a gate
    is also charged at keys that its query never sees.) The derivative counts as 0 where
    a gate is 0; for p < 1 it would be infinite.

    gate: [B, H, query, key], entries >= 0. p: a number > 0. Returns a scalar >= 0.
    """
    p = check_positive("p", p)
    return _penalty(check_array("gate", gate, "BHTT"), p)


def _penalty(gate, p):
    lowest = getval(gate).min()
    if lowest < 0:
        raise ValueError(f"gate must be >= 0, got {lowest}")
    return np.mean(charge(gate, p))


def charge(gate, p):
    """The norm over the heads: gate [..., H, query, key] -> [..., query, key]"""
    sums = np.sum(_power(gate, p), axis=-3)
    return _power(sums, 1 / p)


def _power(base, exponent):
    """base^exponent for base >= 0, with the derivative 0 at base 0.

    The inner `where` keeps 0 from being raised at all: the derivative there may be
    infinite, and infinity times 0, which the outer `where` would make of it, is NaN.
    """
    is_zero = getval(base) == 0
    raised = np.where(is_zero, 1.0, base) ** exponent
    return np.where(is_zero, 0.0, raised)


def loss(params, x, target, alpha, *, activation=clamp, p=0.6):
    """How far a gated block is from its target, and what its gates cost.

        mse  = mean over B, T, D of (attn_out - target)^2
        loss = mse + alpha * penalty

    params, x, activation: as in `gated_attention`. target: [B, T, D], the `attn_out` of
    the block that is replaced, without the residual stream. alpha: a number >= 0.
    p: as in `lp_penalty`. Returns a dict of the scalars `mse`, `penalty` and `loss`.
    """
    alpha = check_number("alpha", alpha)
    if alpha < 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    p = check_positive("p", p)

    block = gated_attention(params, x, activation=activation)
    attn_out = block["attn_out"]
    sizes = sizes_of("x", attn_out, "BTD")
    target = check_array("target", target, "BTD", sizes)

    mse = np.mean((attn_out - target) ** 2)
    penalty = _penalty(block["gate"], p)
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}


def loss_and_grad(params, x, target, alpha, *, activation=clamp, p=0.6):
    """The dict of `loss`, and the gradient of its `loss` by every parameter.

    The gradient is a dict with the names, shapes and types of `params`, `value_scale`
    included where the block has one. The arguments are those of `loss`.
    """
    params, _ = check_params(GATED_BLOCK, params)

    def objective(params):
        scalars = loss(params, x, target, alpha, activation=activation, p=p)
        return scalars["loss"], scalars

    gradient, scalars = grad_and_aux(objective)(params)
    return {name: getval(scalar) for name, scalar in scalars.items()}, gradient


# ---- Models and a task ---------------------------------------------------------------


def init_params(n_heads, d_model, d_head, seed=0, d_gate=None):
    """Random parameters of a block; of a gated block where `d_gate` is given.

    `W_*` and `b_*` are Xavier-normal, as published: normal with a standard deviation of
    sqrt(2 / (fan_in + fan_out)). As PyTorch counts, fan_in is the length of the second
    axis and fan_out that of the first, each times the length of a third axis.
    `W_gate_*`, taken as a matrix [H, D G], has orthonormal rows (columns, where H > D
    G). `b_gate_*` is 0.

    n_heads, d_model, d_head, d_gate: whole numbers >= 1. seed: a whole number >= 0;
    both kinds of block get the same `W_*` and `b_*` from one seed.
    """
    sizes = {
        "H": check_whole("n_heads", n_heads, 1),
        "D": check_whole("d_model", d_model, 1),
        "K": check_whole("d_head", d_head, 1),
    }
    if d_gate is not None:
        sizes["G"] = check_whole("d_gate", d_gate, 1)
    rng = np.random.default_rng(check_whole("seed", seed, 0))

    params = {}
    for name, axes in BLOCK.items():
        shape = [sizes[axis] for axis in axes]
        field = math.prod(shape[2:])
        fan_in, fan_out = shape[1] * field, shape[0] * field
        deviation = math.sqrt(2 / (fan_in + fan_out))
        params[name] = rng.normal(scale=deviation, size=shape)
    if d_gate is None:
        return params

    for name, axes in GATE.items():
        shape = [sizes[axis] for axis in axes]
        if name.startswith("W"):
            params[name] = _orthonormal(rng, len(params["W_Q"]), shape)
        else:
            params[name] = np.zeros(shape)
    return params


def _orthonormal(rng, n_rows, shape):
    """The matrix with orthonormal rows that is nearest to a random one.

    So the heads start with gates that are as different as can be.
    """
    matrix = rng.normal(size=(n_rows, math.prod(shape[1:])))
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return (left @ right).reshape(shape)


def transformer(layers, tokens, *, activation=clamp):
    """A model of attention blocks alone, which reads and writes tokens one-hot.

        residual = onehot(tokens)
        residual = residual + attn_out(residual)      layer by layer
        logits   = residual

    There are no positions, no layer norm and no MLP. layers: a list of parameter dicts
    with D = V, each gated or not. tokens: integers [B, T] in [0, V). activation: that
    of the gated layers. Returns a dict of `logits` [B, T, V] and `blocks`, the dict of
    every intermediate for each layer.
    """
    if not isinstance(getval(layers), (list, tuple)) or len(layers) == 0:
        raise ValueError(
            f"layers must be a list of parameter dicts, got {type(layers)}"
        )
    checked = []
    V = None  # d_model of the first layer, and so of all
    for number, layer in enumerate(layers):
        axes = GATED_BLOCK if _is_gated(layer) else BLOCK
        known = {} if V is None else {"D": (V, "layers[0]")}
        try:
            params, sizes = check_params(axes, layer, known)
        except (TypeError, ValueError) as problem:
            raise type(problem)(f"layers[{number}]: {problem}") from None
        checked.append(params)
        V, _ = sizes["D"]

    tokens = check_tokens("tokens", tokens, "BT", V)
    dtype = getval(checked[0]["W_Q"]).dtype
    residual = np.eye(V, dtype=dtype)[tokens]  # [B, T, V]
    blocks = []
    for layer in checked:
        if _is_gated(layer):
            block = gated_attention(layer, residual, activation=activation)
        else:
            block = attention(layer, residual)
        residual = residual + block["attn_out"]
        blocks.append(block)
    return {"logits": residual, "blocks": blocks}


def _is_gated(params):
    return isinstance(getval(params), dict) and "W_gate_Q" in params


def sample_skip_trigrams(n_trigrams, n_sequences, n_positions=11, seed=0):
    """Sequences of skip trigrams A ... B_i -> C_i, for i = 1 to n.

    The first B after an A is followed by its own C, B_i by C_i. There are V = 2 n + 2
    tokens: 0 is A, i is B_i, i + n is C_i, and 2 n + 1 is BOS, which comes first. Then
    tokens are drawn from left to right:

        uniformly over all V tokens, until an A is drawn;
        then uniformly over all but A, until a B is drawn, say B_i;
        then C_i, and from the start again.

    The trigrams are *OV-incoherent*: they all read the same source token A, and what
    must be written depends on the query token B_i, which the OV circuit of a head
    cannot see.

    n_trigrams, n_sequences, n_positions: whole numbers >= 1. seed: one >= 0. Returns
    `tokens`, integers [S, T], and `completes`, booleans [S, T], which are true at the B
    of each trigram, the last position included.
    """
    n = check_whole("n_trigrams", n_trigrams, 1)
    S = check_whole("n_sequences", n_sequences, 1)
    T = check_whole("n_positions", n_positions, 1)
    rng = np.random.default_rng(check_whole("seed", seed, 0))

    tokens = np.full((S, T), 2 * n + 1)
    completes = np.zeros((S, T), dtype=bool)
    armed = np.zeros(S, dtype=bool)  # an A was drawn, and no B since
    for t in range(1, T):
        lowest = armed.astype(int)  # no A, which is 0, while armed
        drawn = rng.integers(lowest, 2 * n + 2)
        forced = tokens[:, t - 1] + n  # the C of a B before
        tokens[:, t] = np.where(completes[:, t - 1], forced, drawn)

        is_B = (tokens[:, t] >= 1) & (tokens[:, t] <= n)
        completes[:, t] = armed & is_B
        armed = (armed | (tokens[:, t] == 0)) & ~completes[:, t]
    return tokens, completes


def handmade_superposition(n_trigrams):
    """Two heads with d_head 1 that complete n trigrams together, without any training.

    Trigram i has the angle a_i = (i - 1/2) / n * 90 degrees. Its factor is cos(a_i) for
    head 0 and sin(a_i) for head 1. For n = 3 the angles are 15, 45 and 75 degrees, the
    factors of head 0 are 0.97, 0.71, 0.26, and those of head 1 are 0.26, 0.71, 0.97.

    A factor enters twice. At the query B_i a head attends to A in proportion to
    factor_i, and what it writes of A is in proportion to factor_j on C_j. So the two
    heads together write on C_j

        c * (cos(a_i) cos(a_j) + sin(a_i) sin(a_j)) = c * cos(a_i - a_j),

    which is largest for j = i. Alone, head 0 writes most on C_1 whatever the query is,
    and head 1 on C_n. So they hold the first trigram and the last, and all others are
    distributed.

    The numbers: in the softmax A has the weight 1e-6 * factor_i at B_i (1e-12 at other
    queries, where next to nothing is written), and each of m other keys has 1. So A's
    part of the pattern is about 1e-6 / m * factor_i, and the value at A is 1e8. That
    makes c = 100 / m.

    n_trigrams: a whole number >= 2. Returns `attention` parameters, D = V.
    """
    n = check_whole("n_trigrams", n_trigrams, 2)
    angles = (np.arange(n) + 0.5) / n * np.pi / 2
    factors = np.stack([np.cos(angles), np.sin(angles)])  # [H, n]

    params = init_params(2, 2 * n + 2, 1)  # for the shapes
    params = {name: np.zeros_like(array) for name, array in params.items()}
    params["W_Q"][:, :, 0] = math.log(1e-12)  # the score of A, for any query
    params["W_Q"][:, 1 : n + 1, 0] = np.log(1e-6 * factors)
    params["W_K"][:, 0, 0] = 1
    params["W_V"][:, 0, 0] = 1e8
    params["W_O"][:, 0, n + 1 : 2 * n + 1] = factors
    return params


# ---- Verdicts: which heads hold an answer --------------------------------------------

RIGHT = 0.99  # the part of the positions on which a model, or a head, must be right


def unexplained(written, target):
    """The part of the target's variance that is left unexplained.

        sum of (written - target)^2  /  sum of (target - mean)^2

    The mean is that of each of the D components, over all positions of all sequences.
    0 is a copy; 1 is no better than always writing the mean. (Interpretability papers
    call it FVU.)

    written, target: [S, T, D], what a block writes and what it is to write, the
    residual stream left out of both. Returns a float. ValueError: the target is the
    same everywhere, or so large that its square overflows.
    """
    target = check_array("target", target, "STD")
    written = check_array("written", written, "STD", sizes_of("target", target, "STD"))
    squares = variance_of(target) * target.size
    error = 0.0
    for part in parts(len(target), target[0].nbytes):
        error += np.sum((written[part] - target[part]) ** 2, dtype=float)
    return float(error / squares)


@np.errstate(over="ignore", invalid="ignore")  # an overflow is reported below
def variance_of(target):
    """The variance of each component over all positions, averaged over the components.

    target: [S, T, D]. Returns a float. ValueError: it is constant, or its square
    overflows.
    """
    S, T, _ = target.shape
    slices = parts(S, target[0].nbytes)
    mean = sum(np.sum(target[part], axis=(0, 1), dtype=float) for part in slices)
    mean = mean / (S * T)
    squares = sum(np.sum((target[part] - mean) ** 2, axis=(0, 1)) for part in slices)
    variance = float(np.mean(squares / (S * T)))  # squares [D]

    if not math.isfinite(variance):
        raise ValueError("target must have a finite variance, but its square overflows")
    if variance <= 1e-20 * np.mean(mean**2):  # no more than rounding
        raise ValueError("target must depend on x, got the same everywhere")
    return variance


PART = 2**28  # bytes


def parts(n_sequences, bytes_each):
    """Slices of some sequences each, one at least, so that none takes over 256 MiB."""
    size = max(1, PART // max(1, bytes_each))
    return [slice(start, start + size) for start in range(0, n_sequences, size)]


def judge(result, output, answers, *, most=None):
    """What a model, and each of its heads, does with every answer that is asked of it.

    result: [N, H, V], what each head writes at N positions, in the space of the
    answers. Where a model has an unembedding W_U [D, V], that is `result` @ W_U.
    output: [N, V], the model's logits there: (the residual stream that attn_out is
    added to + attn_out + output bias) @ W_U, plus the unembedding's bias. (Where a
    layer norm stands before the unembedding, give both of them the scale that it has
    there on the whole stream.) answers: integers [N] in [0, V), what it should say.
    most: see `holders`.

    What heads hold is judged by what they write, without the residual stream. So where
    that, or a bias, supplies a part of the answer, not even all heads together hold it,
    and `holders` says []. To see who takes part, give what else there is as one more
    head: np.concatenate([result, rest[:, None]], axis=1).

    Returns a dict of lists, an entry for each answer in rising order:

        answers     the answer
        accuracy    the part of its positions where it is the largest entry of `output`
        holders     the smallest sets of heads that hold it, see `holders`, as judged on
                    its first 1,000 positions
        shares      [H]: the norm of what a head writes, over the sum of all heads'
                    norms; the mean over the positions
    """
    result = check_array("result", result, "NHV")
    sizes = sizes_of("result", result, "NHV")
    output = check_array("output", output, "NV", sizes)
    answers = check_tokens("answers", answers, "N", result.shape[2], sizes)
    is_right = np.argmax(output, axis=1) == answers
    shares = shares_of(result)

    found = {"answers": [], "accuracy": [], "holders": [], "shares": []}
    for answer in np.unique(answers):
        mine = answers == answer
        held_by = holders(result[mine][:1000], answers[mine][:1000], most=most)
        found["answers"].append(int(answer))
        found["accuracy"].append(float(np.mean(is_right[mine])))
        found["holders"].append(held_by)
        found["shares"].append(np.mean(shares[mine], axis=0).tolist())
    return found


def shares_of(result):
    """Each head's share in the sum of all heads' norms: [N, H, V] -> [N, H]"""
    norms = np.linalg.norm(result, axis=2)
    total = np.sum(norms, axis=1, keepdims=True)
    return norms / np.where(total > 0, total, 1)


def share_of(found):
    """How much one head does: the largest share, averaged over what `judge` found."""
    return float(np.mean([max(shares) for shares in found["shares"]]))


def holders(result, answers, threshold=RIGHT, *, most=None):
    """The smallest sets of heads that hold an answer.

    A group of heads *holds* an answer when it is enough, whichever other heads are
    removed (their output set to 0). By brute force, `others` being the heads outside of
    the group:

        right = np.ones(len(answers), dtype=bool)
        for size in range(len(others) + 1):
            for kept in itertools.combinations(others, size):
                written = result[:, [*group, *kept]].sum(axis=1)
                right &= written.argmax(axis=1) == answers
        holds = right.mean() > threshold

    An answer that is right, and that no single head holds, is *distributed*: it is in
    superposition. (The published rule, for one head, always removes at least one other
    head. It tests separately whether all heads together are right.)

    Not every set has to be tried. The lead of head h over a rival token c is

        m_h = result_h[answer] - result_h[c].

    For a rival c, the worst set keeps, beside the group, exactly the other heads whose
    lead is negative. So the group holds the answer where, for every rival c,

        sum over the group of max(m_h, 0)  >  sum over all heads of max(-m_h, 0):

    it pushes the answer further up than all heads, its own included, push the rival.
    (>= where c comes after the answer: np.argmax takes the first of equals.) It follows
    that turning other heads down, by factors between 0 and 1, does no more harm than
    removing them.

    It costs a pass over `result` for every set of heads up to the size that holds: with
    16 heads 65,535 sets at most; with 24 or more it can take minutes, unless a small
    set holds, or `most` ends the search.

    result: [N, H, V], what each head writes at N positions. answers: integers [N] in
    [0, V). threshold: in [0, 1). most: how many heads a set may have; a
    whole number >= 1, or None for all. Returns a list of tuples of heads, all of the
    smallest size that holds; empty where not even all heads do, or no set up to `most`.
    """
    threshold = check_number("threshold", threshold)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    result = check_array("result", result, "NHV")
    N, H, V = result.shape
    answers = check_tokens(
        "answers", answers, "N", V, sizes_of("result", result, "NHV")
    )
    most = H if most is None else min(check_whole("most", most, 1), H)

    lead = result[np.arange(N), :, answers][:, :, None] - result  # [N, H, V]
    push = np.maximum(lead, 0)
    against = np.sum(np.maximum(-lead, 0), axis=1)  # [N, V]
    wins_ties = np.arange(V) >= answers[:, None]  # the answer itself is 0 against 0

    def holds(group):
        pushed = np.sum(push[:, group], axis=1)
        right = (pushed > against) | ((pushed == against) & wins_ties)
        return np.mean(np.all(right, axis=1)) > threshold

    if not holds(range(H)):  # then no fewer do: a head only adds to the left side
        return []
    for size in range(1, most + 1):
        groups = itertools.combinations(range(H), size)
        holding = [group for group in groups if holds(group)]
        if holding:
            return holding
    return []


def singles(holders):
    """For each answer the heads that hold it by themselves."""
    alone = []
    for sets in holders:
        alone.append([heads[0] for heads in sets if len(heads) == 1])
    return alone


def is_apart(found, least=RIGHT):
    """Whether each answer is right and has a head of its own that holds it.

    found: what `judge` returns. An answer is right if its accuracy is above `least`.
    For each answer one of the heads that hold it alone must be chosen, none twice; so
    an answer that nothing holds makes it False.
    """
    if min(found["accuracy"]) <= least:
        return False
    alone = singles(found["holders"])
    chosen_by = {}  # head: the answer that has it
    for answer in range(len(alone)):
        if not _choose(answer, alone, chosen_by, set()):
            return False
    return True


def _choose(answer, alone, chosen_by, tried):
    """Finds a head for an answer, if need be by moving earlier answers to other heads.

    (An augmenting path of a matching in a bipartite graph: Kuhn, 1955.)
    """
    for head in alone[answer]:
        if head in tried:
            continue
        tried.add(head)
        is_free = head not in chosen_by
        if is_free or _choose(chosen_by[head], alone, chosen_by, tried):
            chosen_by[head] = answer
            return True
    return False


def fires_without_A(found, result, answers, result_without_A, lures):
    """For each answer, whether every head that holds it alone fires without its A, too.

    A head may write C whenever B comes, whether an A came before or not, while another
    head takes it back where none did: it copies, the other cancels. It holds the
    trigram by the rule of `holders`, which looks at completed trigrams only. A head's
    *lead* on C is what it writes there, less the largest of what else it writes. It
    *fires without A* if its lead is, on average where no A came, more than half of what
    it is where the trigram is complete.

    found: what `judge` returns. result: [N, H, V], what heads write at B in completed
    trigrams; answers: integers [N], their C. result_without_A: [M, H, V], what heads
    write at a B with no A before it; lures: integers [M], the C that B would call for.
    Returns a list of booleans, False for an answer that no head holds alone.
    ValueError: an answer of `found` is not among `answers`, or not among `lures`.
    """
    result = check_array("result", result, "NHV")
    sizes = sizes_of("result", result, "NHV")
    _, H, V = result.shape
    answers = check_tokens("answers", answers, "N", V, sizes)
    both = {"H": (H, "result"), "V": (V, "result")}
    without = check_array("result_without_A", result_without_A, "MHV", both)
    sizes = sizes_of("result_without_A", without, "MHV")
    lures = check_tokens("lures", lures, "M", V, sizes)

    fires = []
    for answer, heads in zip(found["answers"], singles(found["holders"])):
        if answer not in answers or answer not in lures:
            raise ValueError(f"answer {answer} must be among answers, and among lures")
        lead = _mean_lead(result[answers == answer], answer)  # [H]
        lead_without_A = _mean_lead(without[lures == answer], answer)
        is_fired = lead_without_A[heads] > 0.5 * lead[heads]
        fires.append(len(heads) > 0 and bool(np.all(is_fired)))
    return fires


def _mean_lead(result, answer):
    """How far each head writes an answer above all else: [N, H, V] -> mean, [H]"""
    others = np.delete(result, answer, axis=2)
    return np.mean(result[:, :, answer] - np.max(others, axis=2), axis=0)


# ---- The conformance kit: is another implementation right, and if not, where? --------
#
# A test calls your block on each of `cases()`, differentiates its loss by every
# parameter and by x, and gives everything to `assert_matches`; the README has the lines
# for PyTorch. What is worth knowing:
#
#     JAX               grads, got = jax.jit(jax.grad(loss, has_aux=True))(
#                           {**case.params, "x": case.x}), where loss is a function of
#                       this dict that returns got["loss"], got. Without
#                       jax_enable_x64 this is float32. On a GPU set
#                       jax_default_matmul_precision to "highest".
#     Layouts           W_V is [H, D, K], W_O [H, K, D]. Rearrange fused weights inside
#                       your block, so that gradients come back in this layout.
#     Modules           torch.func.functional_call(
#                           module, {**dict(module.named_buffers()), **params}, (x,),
#                           strict=True). Through load_state_dict no gradients come
#                       back.
#     Caches            If a module keeps anything, such as normalised weights, try the
#                       same one on two cases: random_case(0, **sizes), and 1.
#     torch.compile     torch.compiler.reset() between cases, or the cache of shapes
#                       fills up and the rest runs uncompiled, with only a warning.
#     Low precision     Cast to float32, and give the rtol that `assert_matches` lists.
#     Training          Steps of Adam blow rounding up. Compare `make_case` of the
#                       parameters after some steps, in float64. Its alpha is absolute:
#                       recipe.alpha * variance_of(target). (While it trains, train.py
#                       has `reopening` in place of the clamp.)
#     No value_scale    Leave out the cases whose names end in "_scaled".
#     Other languages   The command at the end of this file: results are read as
#                       "dense/z", "dense/grads/W_Q" and so on.
#
# Where ports go wrong most: at gates of 0, at norms of 0, at the ends of the clamp.


class Case(NamedTuple):
    """What a block is given, and what is expected of it. All arrays are read-only.

    params, x, target, alpha: arguments of `loss`. expected: what comes out of them, a
    dict with the names of `gated_attention` and `loss`; the gradients of `loss` have
    the names "grads/W_O" and so on, and "grads/x". unit: for each of these names, what
    a difference is measured in; a number, or an array. See `assert_matches`.
    """

    name: str
    params: dict
    x: np.ndarray
    target: np.ndarray
    alpha: float
    expected: dict
    unit: dict


# The gradients in the order in which a backward pass reaches them.
BACKWARD = ("W_O", "W_V", "b_V", "value_scale")
BACKWARD += ("W_gate_Q", "b_gate_Q", "W_gate_K", "b_gate_K")
BACKWARD += ("W_K", "b_K", "W_Q", "b_Q", "x")

# The gradients that hang on the derivative of the clamp.
THROUGH_CLAMP = ("W_gate_Q", "b_gate_Q", "W_gate_K", "b_gate_K", "x")


def make_case(name, params, x, target, alpha):
    """A `Case` from your own arrays, which are the arguments of `loss`.

    Everything is computed in float64; arrays of other types are cast first. To check
    training, make a case of the parameters after some steps of it.

    Take care with random numbers: the derivative of gate^0.6 grows without bound
    towards gate 0. With normal inputs and some thousand pairs one gate is always close
    to 0, and a right block in float32 fails there; compare in float64, or give an rtol.
    `random_case` has inputs on a grid, whose gates are either 0 or well above it.
    """
    params, sizes = check_params(GATED_BLOCK, params)
    params = _read_only(params)
    arrays = {"x": check_array("x", x, "BTD", sizes)}
    sizes = sizes_of("x", arrays["x"], "BTD")
    arrays["target"] = check_array("target", target, "BTD", sizes)
    arrays = _read_only(arrays)
    alpha = check_number("alpha", alpha)

    expected = _read_only(_expected(params, **arrays, alpha=alpha))
    unit = _read_only(_units(params, expected))
    return Case(name, params, **arrays, alpha=alpha, expected=expected, unit=unit)


def _read_only(arrays):
    """Copies in float64, so that the code under test cannot move what it is held to."""
    copies = {}
    for name, array in arrays.items():
        copies[name] = np.array(array, dtype=float)
        copies[name].setflags(write=False)
    return copies


def _expected(params, x, target, alpha):
    """All stages, losses and gradients by name, in the order in which they are told."""

    def loss_of_x(x):
        return loss(params, x, target, alpha)["loss"]

    with np.errstate(under="ignore"):  # exp of a score far below the largest is 0
        stages = gated_attention(params, x)
        scalars, gradient = loss_and_grad(params, x, target, alpha)
        gradient["x"] = grad(loss_of_x)(x)

    expected = {**stages, **scalars}
    for name in BACKWARD:
        if name in gradient:
            expected[f"grads/{name}"] = gradient[name]
    return expected


def _units(params, expected):
    """What differences are measured in, by the rule of `assert_matches`."""
    norms = _norms(params)
    units, sizes = {}, {}
    for name, array in expected.items():
        if name.startswith("grads/"):
            sizes[name] = np.max(np.abs(array * norms.get(name, 1.0)))
        else:
            units[name] = _or_1(np.max(np.abs(array[np.isfinite(array)])))

    largest = _or_1(max(sizes.values()))
    for name in sizes:
        units[name] = largest / norms.get(name, 1.0)
    if np.isin(expected["gate_scores"], (0, 1)).any():
        for name in THROUGH_CLAMP:
            units[f"grads/{name}"] = math.inf
    return units


def _or_1(largest):
    return largest if largest > 0 else 1.0


def _norms(params):
    """{the name of a gradient: the norms that its parameter is divided by}, if any."""
    W_V, b_V, W_O = params["W_V"], params["b_V"], params["W_O"]
    norms = {"grads/W_O": _norm(W_O, axis=2)}  # [H, K, 1]
    if "value_scale" in params:
        norm = _norm(np.concatenate([W_V, b_V[:, None]], axis=1), axis=1)
        norms["grads/b_V"] = norm[:, 0]  # [H, K]
    else:
        norm = _norm(W_V, axis=1)
    norms["grads/W_V"] = norm  # [H, 1, K]
    return norms


def cases():
    """Yields seven cases, each a `Case` that is hard in a way of its own, twice.

    First it is a block as published, then one with a `value_scale`, whose name ends in
    "_scaled". Gate scores stay far enough away from 0 and 1 that no rounding flips a
    clamp; but in `gate_edges` many are exactly 0 or 1. All inputs are exact in
    float32 and, save those of `dense`, in bfloat16.
    """
    for name, params, x, target, alpha in _inputs():
        published = {parameter: params[parameter] for parameter in GATED_BLOCK}
        yield make_case(name, published, x, target, alpha)
        yield make_case(f"{name}_scaled", params, x, target, alpha)


def _inputs():
    # No two sizes alike: an axis that is taken for another has the wrong length. The
    # factor makes all numbers inexact in bfloat16, so that a step which is computed in
    # it shows in the forward pass.
    params, x, target = _draw(2, B=2, T=7, H=3, D=6, K=4, G=5)
    inexact = 1 + 2.0**-12
    params = {name: array * inexact for name, array in params.items()}
    yield "dense", params, x * inexact, target * inexact, inexact / 4

    # A softmax over one key.
    params, x, target = _draw(4, B=3, T=1, H=2, D=4, K=2, G=3)
    yield "one_position", params, x, target, 1 / 8

    # Several tiles of 16 to 128 positions, the last one not full, and several sequences
    # and heads.
    params, x, target = _draw(11, B=2, T=140, H=2, D=8, K=16, G=4)
    yield "tiles", params, x, target, 1 / 4

    # Several tiles of 16 to 256, and an axis of heads of length 1. Of the first 60
    # seeds this is the one at which it shows most that a kernel does not rescale its
    # running sum, or its z, with any of these tiles. (With two it does not show.)
    params, x, target = _draw(8, B=1, T=300, H=1, D=8, K=16, G=2)
    yield "many_tiles", params, x, target, 1 / 4

    # Two heads of three have scores from -1400 to 1700: exp overflows, unless the
    # largest score of a row is subtracted first, and a mask of -100 is no mask. The
    # seed is the first at which all scores of some query are below -745, where exp is
    # 0, and each query's best key leads by 24, so that no rounding decides between two.
    params, x, target = _draw(95, B=2, T=6, H=3, D=4, K=1, G=1)
    params["W_Q"][1:] *= 128
    params["W_K"][1:] *= 4
    yield "large_scores", params, x, target, 1 / 4

    # Columns of W_V (with b_V) and rows of W_O whose norm is 0, or just above the floor
    # of 1e-12, or below it, beside ordinary ones. And all sizes alike: an axis that is
    # taken for another has the right length.
    params, x, target = _draw(8, B=3, T=3, H=3, D=3, K=3, G=3)
    factors = np.array([[0, 1, 1], [2.0**-39, 1, 1], [1, 2.0**-41, 1]])  # [H, K]
    params["W_V"] *= factors[:, None]
    params["b_V"] *= factors
    params["W_O"] *= factors[:, ::-1, None]
    yield "tiny_norms", params, x, target, 1 / 4

    # Gate scores of exactly 0 and 1: the ends of the clamp. The seed is the first at
    # which more than a tenth of them are 0, as many 1, and as many between.
    params, x, target = _draw(24, B=2, T=6, H=3, D=4, K=2, G=1)
    for parameter in GATE:
        params[parameter] = np.sign(params[parameter])
    yield "gate_edges", params, x, target, 1 / 4


def random_case(seed, *, B, T, H, D, K, G, value_scale=None):
    """A `Case` of any size, drawn like those of `cases`, to try many of them.

    The inputs are on a grid that is exact in bfloat16, gate scores are never closer to
    0 or 1 than rounding can reach, and a third to a half of them lie between.
    Scores have a deviation of 1 to 2 at any size, so that no softmax is saturated.

    seed: a whole number >= 0. B, T, H, D, K, G: whole numbers >= 1. value_scale: a
    number > 0; None for the published block.
    """
    sizes = {"B": B, "T": T, "H": H, "D": D, "K": K, "G": G}
    for name, size in sizes.items():
        sizes[name] = check_whole(name, size, 1)
    params, x, target = _draw(seed, **sizes)
    if value_scale is None:
        del params["value_scale"]
    else:
        params["value_scale"] = value_scale
    return make_case(f"random_{seed}", params, x, target, 1 / 4)


def _draw(seed, *, B, T, H, D, K, G):
    """Parameters, x and target, of whole numbers that any language can draw again.

    x is in halves, the gate's weights are -1, 0 or 1, their biases odd quarters, and
    everything else is in 128ths between -1 and 1. Then `_spread_scores`.
    """
    draw = _Numbers(seed)
    x = draw.whole([B, T, D], -2, 5) / 2
    target = draw.whole([B, T, D], -127, 255) / 128

    sizes = {"H": H, "D": D, "K": K, "G": G}
    params = {"value_scale": np.array(2.5)}
    for name, axes in GATED_BLOCK.items():
        shape = [sizes[axis] for axis in axes]
        if name in BLOCK:
            params[name] = draw.whole(shape, -127, 255) / 128
        elif name.startswith("W"):
            params[name] = draw.whole(shape, -1, 3)
        else:
            params[name] = draw.whole(shape, 0, 4) / 2 - 3 / 4
    _spread_scores(params)
    return params, x, target


class _Numbers:
    """A source of whole numbers: of each state its upper eight bits, modulo a count.

    state = (1664525 state + 1013904223) mod 2^32, from the seed on
    """

    def __init__(self, seed):
        self.state = check_whole("seed", seed, 0)

    def whole(self, shape, lowest, count):
        array = np.empty(shape)
        for index in np.ndindex(array.shape):
            self.state = (1664525 * self.state + 1013904223) % 2**32
            array[index] = lowest + (self.state >> 24) % count
        return array


def _spread_scores(params):
    """Scales the drawn queries and keys by powers of 2, which is exact, at any size.

    Attention scores have a deviation of about D / 6 + 1 / 3 as drawn, and of 1 to 2
    here. Gate scores have one of about sqrt(G) (D / 3 + 5 / 16), and of 1/2 to 1 here,
    so that a third to a half of them lie inside (0, 1). None is exactly 0 or 1:

        gate_q, gate_k                       an odd number of quarters
        their products, for each of the G    an odd number of 16ths
        the first of them, halved            an odd number of 32nds, the others even
        the sum                              an odd number of 32nds, for an even G too
    """
    _, D, G = params["W_gate_Q"].shape
    _shrink(params, "Q", "K", math.floor(math.log2(D / 6 + 1 / 3)))
    deviation = math.sqrt(G) * (D / 3 + 5 / 16)
    _shrink(params, "gate_Q", "gate_K", math.ceil(math.log2(deviation)))
    params["W_gate_Q"][:, :, 0] /= 2
    params["b_gate_Q"][:, 0] /= 2


def _shrink(params, query, key, exponent):
    """Divides scores by 2^exponent: queries by the one half of it, keys by the other.

    So neither's gradient grows so large that it hides the other's.
    """
    of_query = exponent // 2
    for name, power in ((query, of_query), (key, exponent - of_query)):
        params[f"W_{name}"] /= 2.0**power
        params[f"b_{name}"] /= 2.0**power


def assert_matches(case, got, *, rtol=None):
    """Raises an AssertionError where `got` differs from `case.expected`.

    got: a dict of any of the names in `expected`; the gradients may also stand in a
    dict of their own, {"grads": {"W_O": ...}}. Arrays of NumPy, PyTorch or JAX, in
    float64 or float32. (Cast bfloat16 to float32 first; float16 needs an rtol.) An
    array is right where

        |got - expected| <= tolerance * unit

    rtol: the tolerance; None for 64 eps of the type that is given: 1.4e-14 in float64
    and anything longer, 7.6e-6 in float32. Lower precision needs more. Right blocks
    were measured to need 2e-3 with TF32, 3e-3 in float16 (where `tiny_norms` overflows)
    and 0.02 in bfloat16.

    The unit of an array is its largest expected entry, 1 if all are 0. All gradients
    share one, the largest entry of them all, where those of `W_V` and `W_O` (and `b_V`,
    with a value_scale) count times the norms that these are divided by, and their unit
    is the largest entry divided by these norms. (For a column of zeros the gradient is
    1e12 times as large, and would hide all others.)

    Masked `attn_scores` may be anything. Where a gate score is exactly 0 or 1,
    frameworks differ in the derivative of a clamp (see `clamp`): there the unit of the
    gradients of x and of the gate's parameters is infinite, so that these only have to
    be finite, and of the right shape. A loss may have the shape (1,).

    Everything is compared before anything is raised. The message tells of the first
    array that is wrong in whatever way, in the order of `expected`: of the data's flow,
    then of a backward pass. It names the others. Returns the names of what was
    compared. ValueError: `got` has names that are not in `expected`, or nothing that
    can be compared.
    """
    __tracebackhide__ = True  # pytest then shows the line that called
    _check_rtol(rtol)
    given = _given(case, got)
    compared, wrong = [], {}
    for name in case.expected:
        if name in given:
            problem = _problem(case, name, given[name], rtol)
            if problem:
                wrong[name] = problem
            elif np.isfinite(case.unit[name]).all():
                compared.append(name)

    if wrong:
        first, *others = wrong
        message = f"{case.name}: {first}{wrong[first]}"
        if others:
            stop = "" if message.endswith("?") else "."
            message += f"{stop} These differ too: {', '.join(others)}"
        raise AssertionError(message)
    if not compared:
        why = f"got must have something to compare, got {list(given)}"
        raise ValueError(f"{case.name}: {why}")
    return compared


def _check_rtol(rtol):
    if rtol is not None and not 0 < check_number("rtol", rtol) < 1:
        raise ValueError(f"rtol must be None or in (0, 1), got {rtol}")


def _given(case, got):
    """What is to be compared: {"loss": 1, "grads": {"x": 2}} -> {..., "grads/x": 2}"""
    # By its fields, since a reload of this module makes another class.
    if getattr(case, "_fields", None) != Case._fields:
        raise TypeError(f"case must be a Case, got {type(case)}")
    if not isinstance(got, dict):
        raise TypeError(f"{case.name}: got must be a dict of arrays, got {type(got)}")
    given = {}
    for name, value in got.items():
        if name == "grads" and isinstance(value, dict):
            for parameter, array in value.items():
                given[f"grads/{parameter}"] = array
        else:
            given[name] = value

    unknown = [name for name in given if name not in case.expected]
    if unknown:
        names = f"names that can be compared: {list(case.expected)}"
        raise ValueError(f"{case.name}: got must not have {unknown}; {names}")
    return given


def _problem(case, name, value, rtol):
    """What is wrong with an array, to be read after its name; "" if it matches."""
    want = case.expected[name]
    array = _numpy(value)
    problem = _wrong_kind(name, array, value, want, rtol)
    if problem:
        return problem

    array = array.reshape(want.shape)
    is_masked = np.isinf(want)
    is_wrong = ~(np.isfinite(array) | is_masked)
    if is_wrong.any():
        at = _first(is_wrong)
        hint = _hint(case, name, array, at)
        return f"{_place(at)} is {array[at]}, should be finite{hint}"

    off = np.abs(np.where(is_masked, 0.0, array) - np.where(is_masked, 0.0, want))
    tolerance = _tolerance(array.dtype, rtol)
    if np.all(off <= tolerance * case.unit[name]):
        return ""
    at = np.unravel_index(np.argmax(off / case.unit[name]), off.shape)
    numbers = f"{array[at]:.17g}, should be {want[at]:.17g}, off by {off[at]:.3g}"
    unit = np.broadcast_to(case.unit[name], off.shape)[at]
    allowed = f"{tolerance:.1e} of {unit:.3g} is allowed in {array.dtype}"
    if case.unit[name].ndim > 0:
        allowed += " (the largest gradient, divided by the norm here)"
    return f"{_place(at)} is {numbers}, where {allowed}"


def _numpy(value):
    """A port's array as NumPy's; None where there is none to be had."""
    try:
        if hasattr(value, "detach"):  # PyTorch
            value = value.detach().cpu()
        return np.asarray(value)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def _wrong_kind(name, array, value, want, rtol):
    """What is wrong with an array's type or shape; "" if nothing is."""
    if array is None or array.dtype.kind != "f":
        kind = getattr(value, "dtype", "no numbers")
        return f" must be float64 or float32, got {type(value)} of {kind}"
    if isMaskedArray(value):
        return " must have no mask"
    if rtol is None and array.dtype.itemsize < 4:
        return f" is of {array.dtype}: give an rtol"
    is_loss = name in ("mse", "penalty", "loss")
    if array.shape != want.shape and not (is_loss and array.shape == (1,)):
        return f" has shape {array.shape}, should have {want.shape}"
    return ""


def _tolerance(dtype, rtol):
    if rtol is not None:
        return rtol
    return 64 * max(np.finfo(dtype).eps, np.finfo(float).eps)


def _place(at):
    """An index as it is written in code; of a scalar, nothing."""
    return str([int(i) for i in at]) if at else ""


def _hint(case, name, array, at):
    """Where to look for the cause of a number that is not finite, if that is known."""
    if name in ("attn_scores", "pattern") and not np.isfinite(array[at[:-1]]).any():
        return ": is it 0 times -inf, or does the mask leave this query no key?"

    weight = {"v": "W_V", "result": "W_O"}.get(name, name.removeprefix("grads/"))
    norm = _norms(case.params).get(f"grads/{weight}")
    if norm is not None and norm.min() <= 1e-12:
        if name.startswith("grads/"):
            return ": is it the root of a norm of 0, whose derivative is infinite?"
        return f": is it 0/0, where a norm of {weight} is 0?"

    is_closed = case.expected["gate"] == 0
    if weight in GATE and is_closed.any():
        return ": is it the power in the penalty, whose derivative is infinite at 0?"
    return ""


# ---- The checks of arguments ---------------------------------------------------------


def check_array(name, value, axes, sizes=None, kinds="fiu"):
    """A value as an array with these axes, of finite numbers; integers become floats.

    axes: a letter each. sizes: the axes whose length is known, see `sizes_of`. So an
    array of a wrong length is refused, where NumPy's broadcasting would make up a
    number.
    """
    if isMaskedArray(value):
        raise ValueError(
            f"{name} must have no mask: fill in what is masked, or drop it"
        )
    try:
        array = value if isbox(value) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as problem:  # ragged, or of PyTorch
        raise ValueError(f"{name} must be an array: {problem}") from None
    if isbox(value) and np.isscalar(getval(value)):  # a Python number, differentiated
        array = np.array(value)
    numbers = getval(array)
    if numbers.dtype.kind not in kinds:
        wanted = "integers" if kinds == "iu" else "floats or integers"
        found = f"{type(value)} of {numbers.dtype}" if axes else repr(value)
        raise ValueError(f"{name} must be {wanted}, got {found}")

    _check_shape(name, numbers, axes, {} if sizes is None else sizes)
    if not np.isfinite(numbers).all():
        at = _first(~np.isfinite(numbers))
        where = f" at {at}" if at else ""
        raise ValueError(f"{name} must be finite, got {numbers[at]}{where}")
    if kinds == "fiu" and numbers.dtype.kind != "f":
        return array.astype(float)
    return array


def sizes_of(name, array, axes):
    """How long each axis is, and in which array: {"T": (11, "x")}"""
    return {axis: (size, name) for axis, size in zip(axes, np.shape(array))}


def _check_shape(name, array, axes, sizes):
    known = dict(sizes)
    fits = array.ndim == len(axes) and array.size > 0
    for axis, size in zip(axes, array.shape):
        wanted, _ = known.setdefault(axis, (size, name))
        fits = fits and size == wanted

    if not fits:
        wanted = []
        for axis in axes:
            if axis in sizes:
                size, whose = sizes[axis]
                axis = f"{axis} = {size} (as in {whose})"
            wanted.append(axis)
        shapes = f"[{', '.join(wanted)}], got shape {array.shape}"
        raise ValueError(f"{name} must be of shape {shapes}")


def _first(is_wrong):
    """The index of the first entry that is True."""
    return tuple(int(i) for i in np.argwhere(is_wrong)[0])


def check_params(axes, params, sizes=None):
    """The parameters of a block as arrays, each with its axes, and their `sizes_of`.

    sizes: the axes whose length is known before.
    """
    if not isinstance(getval(params), dict):
        raise TypeError(f"params must be a dict of arrays, got {type(params)}")
    missing = [name for name in axes if name not in params]
    optional = ["value_scale"] if "W_gate_Q" in axes else []
    unknown = [name for name in params if name not in [*axes, *optional]]
    if missing or unknown:
        found = f"missing {missing}, unknown {unknown}"
        raise ValueError(f"params must have the names {list(axes)}: {found}")

    checked = {}
    known = {} if sizes is None else sizes
    for name in params:
        letters = axes.get(name, "")
        checked[name] = check_array(name, params[name], letters, known)
        known = {**sizes_of(name, checked[name], letters), **known}
    if "value_scale" in checked and getval(checked["value_scale"]) <= 0:
        scale = getval(checked["value_scale"])
        raise ValueError(f"value_scale must be > 0, got {scale}")
    return checked, known


def check_tokens(name, value, axes, V, sizes=None):
    tokens = check_array(name, value, axes, sizes, kinds="iu")
    is_wrong = (tokens < 0) | (tokens >= V)
    if is_wrong.any():
        at = _first(is_wrong)
        raise ValueError(f"{name} must be in [0, {V}), got {tokens[at]} at {at}")
    return tokens.astype(int)


def check_number(name, value):
    return float(check_array(name, value, ""))


def check_positive(name, value):
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be > 0, got {number}")
    return number


def check_whole(name, value, least):
    """A whole number, as large as it may be; True and 2.0 are none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {number}")
    return number


# ---- The command: python gatedref.py write FILE, python gatedref.py check FILE -------

WRITE_HELP = """Writes the cases to a new file: CASE/W_Q and so on (the parameters),
CASE/x, CASE/target, CASE/alpha, and what is expected: CASE/expected/z and so on,
CASE/expected/grads/W_Q and so on. A result is right where |result - expected| <=
tolerance * unit; the units are CASE/unit/z and so on, the tolerance 64 eps of the type.
Where -inf is expected, a result may be anything."""

CHECK_HELP = """Compares the results in a file with what is expected: CASE/z, CASE/loss,
CASE/grads/W_Q and so on. Any of them may be missing, but no case; what was compared is
counted."""


def _main(argv=None):
    parser = argparse.ArgumentParser(
        "gatedref.py",
        description="The cases of gatedref as .npz files, for other languages.",
    )
    version = f"gatedref {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help=WRITE_HELP, description=WRITE_HELP)
    write.add_argument("file", help="an .npz file")
    check = commands.add_parser("check", help=CHECK_HELP, description=CHECK_HELP)
    check.add_argument("file", help="an .npz file")
    check.add_argument("--rtol", type=float, help="the tolerance of all arrays")
    arguments = parser.parse_args(argv)

    try:
        if arguments.command == "write":
            status, lines = _write_cases(arguments.file)
        else:
            status, lines = _check_results(arguments.file, arguments.rtol)
    except (OSError, ValueError) as problem:
        print(f"gatedref.py: {problem}", file=sys.stderr)
        return 2
    _print(lines)
    return status


def _print(lines):
    """Prints lines, as far as the console has the letters and is not closed."""
    if sys.stdout is None:  # closed from the start
        return
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(lines).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
    except OSError:  # as with `| head -1`; the status tells what matters
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or Python complains when it ends


def _write_cases(path):
    """Writes all cases to a new .npz file. Returns the status, and what to print."""
    arrays = {}
    inputs = hashlib.sha256()
    for case in cases():
        given = {**case.params, "x": case.x, "target": case.target, "alpha": case.alpha}
        for name, array in given.items():
            arrays[f"{case.name}/{name}"] = array
            inputs.update(np.asarray(array, "<f8").tobytes())
        for name, array in case.expected.items():
            arrays[f"{case.name}/expected/{name}"] = array
            arrays[f"{case.name}/unit/{name}"] = case.unit[name]
    _save(path, arrays)
    written = f"{path}: {len(arrays)} arrays written by gatedref {__version__}"
    return 0, [written, f"SHA-256 of the inputs: {inputs.hexdigest()}"]


def _save(path, arrays):
    """Writes a new .npz file, whole or not at all: beside its place, then one move."""
    beside = f"{path}.{os.getpid()}.part"  # a name that nobody else has
    try:
        with open(beside, "wb") as file:
            np.savez(file, **arrays)
        if os.path.lexists(path):
            raise ValueError(f"{path} must be a new file, and exists")
        os.rename(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def _check_results(path, rtol):
    """Compares a file with all cases. Returns the status, and what to print.

    The status is 0 only if every case is there and matches, and nothing else is.
    """
    _check_rtol(rtol)
    results = _read_results(path)
    lines, wrong = [], []
    for case in cases():
        got = results.pop(case.name, {})
        try:
            compared = assert_matches(case, got, rtol=rtol)
        except (AssertionError, ValueError) as problem:
            lines.append(str(problem) if got else f"{case.name}: not in the file")
            wrong.append(case.name)
        else:
            kinds = _kinds(got, rtol)
            lines.append(f"{case.name}: {len(compared)} arrays match ({kinds})")
    for name in results:
        lines.append(f"{name}: there is no case of this name")
        wrong.append(name)

    if wrong:
        return 1, [*lines, f"wrong or missing: {', '.join(wrong)}"]
    return 0, [*lines, "every case matches"]


def _kinds(arrays, rtol):
    """The types of some arrays, and the tolerance for each, in words."""
    kinds = {}
    for array in arrays.values():
        tolerance = _tolerance(array.dtype, rtol)
        kinds[str(array.dtype)] = f"{array.dtype}, tolerance {tolerance:.1e}"
    return "; ".join(kinds.values())


def _read_results(path):
    """The arrays of an .npz file: {"dense/loss": 1} -> {"dense": {"loss": 1}}

    ValueError: the file cannot be read as one.
    """
    with open(path, "rb") as file:
        is_zip = zipfile.is_zipfile(file)
    if not is_zip:
        raise ValueError(f"{path} must be an .npz file: it is no zip file")

    results = {}
    try:
        with np.load(path) as arrays:
            for name in arrays.files:
                if not name.endswith("/"):  # a folder, as some programs write
                    case_name, _, stage = name.partition("/")
                    results.setdefault(case_name, {})[stage] = arrays[name]
    except Exception as problem:  # noqa: BLE001, what it is depends on the file
        raise ValueError(f"{path} must be an .npz file of arrays: {problem}") from None
    return results


if __name__ == "__main__":
    sys.exit(_main())
