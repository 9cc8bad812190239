"""gatedref: gated attention blocks in NumPy, the method as a specification that runs.

Attention heads are in *superposition* when several of them compute together what none of them
computes alone. A gated attention block takes them apart. It learns to reproduce the output of a
trained attention block with more heads. Each head has a gate for every (query, key) pair, and a
penalty on the gates makes it dear for two heads to be open on one pair.

    import numpy as np, gatedref
    model = gatedref.handmade_superposition(3)  # two heads that complete three skip trigrams
    tokens, completes = gatedref.sample_skip_trigrams(3, n_sequences=100)
    target = gatedref.transformer([model], tokens)["blocks"][0]["attn_out"]
    params = gatedref.init_params(n_heads=4, d_model=8, d_head=1, d_gate=1)
    scalars, grads = gatedref.loss_and_grad(params, np.eye(8)[tokens], target, alpha=0.1)

Read it from top to bottom. Parameters are plain dicts of arrays, and autograd differentiates every
function of them. Axes: B batch, T positions, D d_model, H heads, K d_head, G d_gate, V vocabulary,
S sequences. In `einsum` they are small letters, with q for the position of the query (destination)
and s for that of the key (source).

Arrays are float64, float32 or integers, which count as floats; lists will do. Results have the type
of what came in, the wider where types are mixed, and a gradient has that of its parameter. Anything
else, a wrong name or shape, NaN or infinity raises a ValueError that names the argument (a
TypeError where params is no dict or a flag no bool).

Source: Mathwin, Akar and Sharkey, "Gated Attention Blocks: Preliminary Progress toward Removing
Attention Head Superposition" (April 2024), called "the post" below, and the code published with it.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import itertools
import math
import re
import sys
from collections import namedtuple

import autograd.numpy as np
from autograd import grad, grad_and_aux
from autograd.extend import defvjp, primitive
from autograd.tracer import getval, isbox

# The axes of each parameter.
BLOCK = {"W_Q": "HDK", "W_K": "HDK", "W_V": "HDK", "W_O": "HKD"}
BLOCK.update({"b_Q": "HK", "b_K": "HK", "b_V": "HK"})
GATE = {"W_gate_Q": "HDG", "W_gate_K": "HDG", "b_gate_Q": "HG", "b_gate_K": "HG"}
GATED_BLOCK = {**BLOCK, **GATE}


# ---- Attention ---------------------------------------------------------------------------------


def attention(params, x):
    """Causal multi-head attention, head by head, with no output bias.

        q, k, v     = x W + b
        attn_scores = q . k / sqrt(K), and -inf where key > query
        pattern     = softmax of attn_scores over the keys
        z           = pattern v
        result      = z W_O         one output a head
        attn_out    = sum of result over the heads

    params: `W_Q W_K W_V` [H, D, K], `W_O` [H, K, D], `b_Q b_K b_V` [H, K]. x: [B, T, D].
    Returns a dict of every intermediate: `q k v z` [B, T, H, K], `attn_scores pattern`
    [B, H, query, key], `result` [B, T, H, D], `attn_out` [B, T, D].
    ValueError: a parameter that is missing or unknown; a wrong type, shape or entry.
    Source: the original block of the post, in TransformerLens's names.
    """
    params, x = _checked_block(params, BLOCK, x=x)
    return _attend(x, **params)


def _attend(x, W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, gate=None):
    """The formulas of `attention`; where there is a gate, it multiplies the pattern."""
    q = einsum("btd,hdk->bthk", x, W_Q) + b_Q  # [B, T, H, K]
    k = einsum("btd,hdk->bthk", x, W_K) + b_K
    v = einsum("btd,hdk->bthk", x, W_V) + b_V
    scores = einsum("bqhk,bshk->bhqs", q / q.shape[-1] ** 0.5, k)  # [B, H, query, key]
    attn_scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    # A softmax does not notice what is subtracted from a row: the maximum counts as a constant.
    weights = np.exp(attn_scores - getval(attn_scores).max(axis=-1, keepdims=True))
    pattern = weights / weights.sum(axis=-1, keepdims=True)
    gated = {} if gate is None else {"gate": gate, "gated_pattern": gate * pattern}
    z = einsum("bhqs,bshk->bqhk", gated.get("gated_pattern", pattern), v)  # [B, T, H, K]
    result = einsum("bqhk,hkd->bqhd", z, W_O)  # [B, T, H, D]
    out = {"q": q, "k": k, "v": v, "attn_scores": attn_scores, "pattern": pattern, **gated}
    return {**out, "z": z, "result": result, "attn_out": result.sum(axis=2)}


# ---- The gate ----------------------------------------------------------------------------------


def gated_attention(params, x, *, activation="clamp", value_scale=None):
    """Attention whose pattern is multiplied, after the softmax, by a gate for each head and pair.

        gate_q, gate_k = x W_gate + b_gate
        gate_scores    = gate_q . gate_k             neither scaled nor masked
        gate           = clamp(gate_scores, 0, 1)
        gated_pattern  = gate * pattern              not renormalised: rows do not sum to 1
        z              = gated_pattern v, then `result` and `attn_out` as in `attention`

    First, each column of `W_V` [D] and each row of `W_O` [D] is divided by its L2 norm, so that a
    head cannot write more by growing while its gate, which is charged for, shrinks. A norm of 1e-12
    or less counts as the constant 1e-12, in the derivative too. The published block leaves `b_V` as
    it is, and a head can grow that instead. `value_scale` closes the hole: a number > 0, by which
    `W_V` and `b_V` are multiplied once each column of the two together, `b_V` as one more row, has
    been divided by its norm.

    params: those of `attention`, and `W_gate_Q W_gate_K` [H, D, G], `b_gate_Q b_gate_K` [H, G].
    x: [B, T, D]. activation, of a gate score s: "clamp", whose derivative is 1 on the closed
    interval [0, 1] and 0 outside; or another of the post's trials: "relu" = max(s, 0), "tanh" =
    tanh(max(s, 0)), "binary" = 1 where s > 1/2 and else 0, with the derivative of "clamp"; or a
    function, which autograd can differentiate, from the array of gate scores to that of the gates.
    Returns the dict of `attention`, and `gate_q gate_k` [B, T, H, G], `gate_scores gate
    gated_pattern` [B, H, query, key]. Gates are in [0, 1]; with "relu", >= 0.
    ValueError: as `attention`; an activation or a value_scale that is not as above.
    Source: the post; `value_scale` is this reference's own.
    """
    _check_options(activation, value_scale)
    params, x = _checked_block(params, GATED_BLOCK, x=x)
    W_V, b_V, W_O = params["W_V"], params["b_V"], params["W_O"]
    if value_scale is None:
        W_V = W_V / _norm(W_V, axis=1)
    else:
        norm = _norm(np.concatenate([W_V, b_V[:, None]], axis=1), axis=1)  # [H, 1, K]
        W_V, b_V = value_scale * W_V / norm, value_scale * b_V / norm[:, 0]
    block = {name: params[name] for name in BLOCK}
    block.update(W_V=W_V, b_V=b_V, W_O=W_O / _norm(W_O, axis=2))

    gate_q = einsum("btd,hdg->bthg", x, params["W_gate_Q"]) + params["b_gate_Q"]  # [B, T, H, G]
    gate_k = einsum("btd,hdg->bthg", x, params["W_gate_K"]) + params["b_gate_K"]
    gate_scores = einsum("bqhg,bshg->bhqs", gate_q, gate_k)  # [B, H, query, key]
    gate = (activation if callable(activation) else ACTIVATIONS[activation])(gate_scores)
    if np.shape(gate) != gate_scores.shape:
        wanted = f"gates of the shape of their scores, {gate_scores.shape}"
        raise ValueError(f"activation must give {wanted}, got shape {np.shape(gate)}")
    gate_parts = {"gate_q": gate_q, "gate_k": gate_k, "gate_scores": gate_scores}
    return {**gate_parts, **_attend(x, **block, gate=gate)}


def _norm(W, axis):
    """The L2 norm, floored under the root, whose derivative at 0 is infinite."""
    squares = (W * W).sum(axis=axis, keepdims=True)
    return np.sqrt(np.where(squares > 1e-24, squares, 1e-24))


def _clamp(s):
    # Not np.clip: libraries disagree about its derivative at exactly 0 and 1. Here it is 1.
    return np.where(s < 0, 0.0, np.where(s > 1, 1.0, s))


ACTIVATIONS = {
    "clamp": _clamp,
    "relu": lambda s: np.where(s > 0, s, 0.0),
    "tanh": lambda s: np.tanh(np.where(s > 0, s, 0.0)),
    # The step's value with the derivative of the clamp.
    "binary": lambda s: _clamp(s) + getval((s > 0.5) - _clamp(s)),
}


# ---- The penalty -------------------------------------------------------------------------------


def lp_penalty(gate, p=0.6, *, causal=False):
    """The Lp norm of the gates over the heads, averaged over the (query, key) pairs.

        penalty = mean over b, query, key of (sum over h of gate[b, h, query, key]^p)^(1/p)

    Why 0.6: where p < 1, sharing a pair costs more than the sum of its parts. One open head costs
    1, two half open 1.587, two fully open 3.175. L1 would charge 1, 1 and 2: it cannot tell one
    head from two that do half of its work each.

    gate: [B, H, query, key], entries >= 0. p: a finite number > 0. causal: False for the mean over
    all T x T pairs, as published (the gate has no mask); True for that over key <= query alone.
    Returns a scalar; for gates in [0, 1], from 0 to H^(1/p). The derivative counts as 0 at gate 0,
    where for p < 1 it has no finite value, and where all gates of a pair are 0.
    ValueError: a wrong type, shape or entry; a p that is not as above. TypeError: such a causal.
    Source: the post.
    """
    _number("p", p, "a finite number > 0", lambda p: p > 0)
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    gate = _checked({"gate": gate}, {"gate": "BHTT"})["gate"]
    if (getval(gate) < 0).any():
        raise ValueError(f"gate must be >= 0, got {getval(gate).min()}")
    norm = _power(_power(gate, p).sum(axis=1), 1 / p)  # [B, query, key]
    if not causal:
        return np.mean(norm)
    pairs = np.tri(norm.shape[1], dtype=bool)
    return (norm * pairs).sum() / (len(norm) * int(pairs.sum()))


def _power(base, exponent):
    """base^exponent, base >= 0. At 0 the derivative is 0: 1 is raised there, then wiped out."""
    zero = getval(base) == 0
    return (base + zero) ** exponent * ~zero


# ---- The loss ----------------------------------------------------------------------------------


def loss(params, x, target, alpha, *, activation="clamp", value_scale=None, p=0.6, causal=False):
    """How far a gated block is from its target, and what its gates cost.

        mse  = mean over B, T, D of (attn_out - target)^2
        loss = mse + alpha * penalty

    target: [B, T, D], the original block's `attn_out`, without the residual stream, at every
    position. alpha: a finite number >= 0. The rest as in `gated_attention` and `lp_penalty`.
    Returns a dict of the scalars `mse`, `penalty` and `loss`.
    ValueError: as those two functions, and a target or an alpha that is not as above.
    Source: the post.
    """
    _number("alpha", alpha, "a finite number >= 0", lambda alpha: alpha >= 0)
    params, x, target = _checked_block(params, GATED_BLOCK, x=x, target=target)
    block = gated_attention(params, x, activation=activation, value_scale=value_scale)
    error = block["attn_out"] - target
    mse, penalty = np.mean(error * error), lp_penalty(block["gate"], p, causal=causal)
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}


def loss_and_grad(
    params, x, target, alpha, *, activation="clamp", value_scale=None, p=0.6, causal=False
):
    """The dict of `loss`, and the gradient: d loss / d parameter, a dict with the keys, shapes and
    types of `params`. Arguments, options, errors and source are those of `loss`."""
    params, x, target = _checked_block(params, GATED_BLOCK, x=x, target=target)
    options = {"activation": activation, "value_scale": value_scale, "p": p, "causal": causal}

    def objective(params):
        scalars = loss(params, x, target, alpha, **options)
        return scalars["loss"], scalars

    gradient, scalars = grad_and_aux(objective)(params)
    scalars = {name: getval(scalar) for name, scalar in scalars.items()}
    return scalars, {name: gradient[name].astype(params[name].dtype) for name in params}


# ---- Models ------------------------------------------------------------------------------------


def init_params(n_heads, d_model, d_head, seed=0, d_gate=None):
    """Random parameters of a block, as published; of a gated block where `d_gate` is given.

    `W_*` and `b_*` are Xavier-normal: standard deviation sqrt(2 / (fan_in + fan_out)), with the
    fans that PyTorch counts, b c and a c for a shape [a, b, c], b and a for [a, b]. `W_gate_Q`,
    seen as [H, D G], has orthonormal rows (columns, where H > D G); so has `W_gate_K`. The gate's
    biases are 0.

    n_heads, d_model, d_head, d_gate: whole numbers >= 1. seed: a whole number >= 0.
    Returns a dict of float64 arrays, shaped as in `attention` or `gated_attention`; one seed gives
    both kinds of block the same `W_*` and `b_*`.
    ValueError: an argument that is not as above. Source: the code published with the post.
    """
    sizes = {"H": _whole("n_heads", n_heads, 1), "D": _whole("d_model", d_model, 1)}
    sizes["K"] = _whole("d_head", d_head, 1)
    sizes["G"] = 0 if d_gate is None else _whole("d_gate", d_gate, 1)
    rng = np.random.default_rng(_whole("seed", seed, 0))
    params = {}
    for name, axes in (BLOCK if d_gate is None else GATED_BLOCK).items():
        a, b, *c = shape = [sizes[axis] for axis in axes]
        if name in BLOCK:
            params[name] = rng.normal(scale=math.sqrt(2 / ((a + b) * math.prod(c))), size=shape)
        elif name.startswith("b"):
            params[name] = np.zeros(shape)
        else:  # the polar factor: the nearest matrix whose rows, or columns, are orthonormal
            left, _, right = np.linalg.svd(rng.normal(size=(a, b * c[0])), full_matrices=False)
            params[name] = (left @ right).reshape(shape)
    return params


def transformer(layers, tokens, *, activation="clamp", value_scale=None):
    """A model of attention blocks alone, which reads and writes tokens one-hot.

        residual = onehot(tokens), then residual += attn_out(residual) layer by layer
        logits   = residual

    layers: a list of parameter dicts with D = V, each gated (with `W_gate_Q`, ...) or not. tokens:
    integers [B, T] in [0, V). The options are those of `gated_attention`, for every gated layer.
    Returns a dict of `logits` [B, T, V] and `blocks`, the list of each layer's intermediates.
    ValueError: no layers; tokens that are not as above; as the two blocks. TypeError: a layer that
    is no dict. Source: the toy model of the post, for any number of layers.
    """
    if not isinstance(getval(layers), (list, tuple)) or len(layers) == 0:
        raise ValueError(f"layers must be a list of one or more parameter dicts, got {layers!r}")
    _check_options(activation, value_scale)
    checked, options = [], {"activation": activation, "value_scale": value_scale}
    for number, layer in enumerate(layers):
        try:
            checked += _checked_block(layer)
        except (TypeError, ValueError) as wrong:
            raise type(wrong)(f"layers[{number}]: {wrong}") from None
    d_models = [layer["W_Q"].shape[1] for layer in checked]
    if len(set(d_models)) > 1:
        raise ValueError(f"layers must share one d_model, got {d_models}")
    tokens = _tokens("tokens", tokens, "BT", d_models[0])
    residual, blocks = np.eye(d_models[0], dtype=checked[0]["W_Q"].dtype)[tokens], []
    for layer in checked:
        gated = "W_gate_Q" in layer
        block = gated_attention(layer, residual, **options) if gated else attention(layer, residual)
        residual = residual + block["attn_out"]
        blocks.append(block)
    return {"logits": residual, "blocks": blocks}


def handmade_superposition(n_trigrams):
    """Two heads, d_head 1, that complete n trigrams between them, written down without training.

    Head 0 writes along cos(angle_i) and head 1 along sin(angle_i), where angle_i = (i - 1/2) / n *
    90 degrees is the direction of the answer to trigram i. Query token i attends to token 0 with
    weights e cos(angle_i) and e sin(angle_i), against 1 to any other token. As e = 1e-6 is tiny,
    the rest of the context changes how long the output is, but not where it points; and a head
    reads 0 from every other token. With one head removed the output points at trigram 1's answer,
    or at trigram n's: head 0 holds the first and head 1 the last, and all others are distributed.

    n_trigrams: a whole number >= 2. Returns the parameters of an `attention` block, D = 2 n + 2.
    ValueError: n_trigrams is not as above. Source: this reference's own.
    """
    n = _whole("n_trigrams", n_trigrams, 2)
    sizes = {"H": 2, "D": 2 * n + 2, "K": 1}
    params = {name: np.zeros([sizes[axis] for axis in axes]) for name, axes in BLOCK.items()}
    angles = (np.arange(n) + 0.5) / n * np.pi / 2
    directions = np.stack([np.cos(angles), np.sin(angles)])  # [H, trigram]
    params["W_Q"][:] = math.log(1e-12)  # other queries barely attend to token 0
    params["W_Q"][:, 1 : n + 1, 0] = np.log(1e-6 * directions)
    params["W_K"][:, 0] = 1
    params["W_V"][:, 0] = 1e8
    params["W_O"][:, 0, n + 1 : 2 * n + 1] = directions
    return params


# ---- The task ----------------------------------------------------------------------------------


def sample_skip_trigrams(n_trigrams, n_sequences, n_positions=11, seed=0):
    """Sequences of OV-incoherent skip trigrams [0] ... [i] -> [i + n], for i = 1 to n.

    V = 2 n + 2 tokens: 0 is A, 1 to n are the B, n + 1 to 2 n their C, 2 n + 1 is BOS. Position 0
    is BOS. Then, from left to right, each token is uniform over all V, BOS included, until a 0 is
    drawn: that arms the sequence, and draws go on over 1 to V - 1 until a B, say i, is drawn; the
    next token is then i + n, not drawn, and the sequence is disarmed. A B on the last position
    leaves no room for its C. In every trigram the source token is 0, and what must be written
    depends on the query token B: an OV circuit, which sees only the source, cannot tell them apart.

    n_trigrams, n_sequences, n_positions: whole numbers >= 1. seed: a whole number >= 0.
    Returns `tokens`, integers [S, T], and `completes`, booleans [S, T]: true at the B of each
    completed trigram, also where B is last.
    ValueError: an argument that is not as above. Source: the code published with the post.
    """
    n = _whole("n_trigrams", n_trigrams, 1)
    shape = _whole("n_sequences", n_sequences, 1), _whole("n_positions", n_positions, 1)
    rng = np.random.default_rng(_whole("seed", seed, 0))
    tokens, completes = np.full(shape, 2 * n + 1), np.zeros(shape, dtype=bool)
    armed = np.zeros(shape[0], dtype=bool)
    for t in range(1, shape[1]):
        drawn = rng.integers(armed, 2 * n + 2)  # from 1 where armed, else from 0
        tokens[:, t] = np.where(completes[:, t - 1], tokens[:, t - 1] + n, drawn)
        completes[:, t] = armed & (tokens[:, t] >= 1) & (tokens[:, t] <= n)
        armed = (armed | (tokens[:, t] == 0)) & ~completes[:, t]
    return tokens, completes


# ---- Who holds what ----------------------------------------------------------------------------


def holders(result, answers, threshold=0.99):
    """The smallest sets of heads that hold an answer.

    Heads *hold* an answer when it survives whatever else is removed: with A the set of those heads,
    each set R of heads that contains A must say it, np.argmax over V of (sum over R of result) =
    answer, all those R at once, on more than `threshold` of the sequences. An answer that the model
    gets right and that no single head holds is *distributed*: it is in superposition.

    Of all the sets R, the worst for the answer adds to A just the heads that prefer a rival. Let
    m_h = result_h[answer] - result_h[c] be a head's lead over rival c. So A holds exactly when

        sum over h in A of max(m_h, 0)  >  sum over all h of max(-m_h, 0)      for every rival c

    (>= where c comes after the answer, as np.argmax breaks ties): what A pushes the answer above
    each rival is more than what all heads together push the rival up.

    result: [S, H, V], each head's output at one position of each sequence. answers: integers [S]
    in [0, V). threshold: a number in [0, 1).
    Returns the sets of fewest heads that hold it, as sorted tuples in a sorted list; [] for none.
    ValueError: an argument that is not as above. Source: the code published with the post, which
    asks it of single heads, and whose sets R leave out that of all heads: it asks about the intact
    sum apart. Here the intact sum must be right in the same sequences.
    """
    _number("threshold", threshold, "a number in [0, 1)", lambda t: 0 <= t < 1)
    result = _checked({"result": result}, {"result": "SHV"})["result"].astype(float)
    n_sequences, n_heads, n_tokens = result.shape
    answers = _tokens("answers", answers, "S", n_tokens)
    if len(answers) != n_sequences:
        raise ValueError(f"answers has {len(answers)} along S, where result has {n_sequences}")
    lead = np.take_along_axis(result, answers[:, None, None], axis=2) - result
    lead = np.swapaxes(lead, 0, 1)  # [H, S, V]
    pushes, against = np.maximum(lead, 0), np.maximum(-lead, 0).sum(axis=0)
    tie_will_do = np.arange(n_tokens) >= answers[:, None]  # the answer is its own rival: 0 >= 0

    def enough(push):
        right = (push > against) | (push == against) & tie_will_do
        return right.all(axis=1).mean() > threshold

    everyone = set(range(n_heads))
    if not enough(pushes.sum(axis=0)):  # who holds, holds with more heads, too
        return []
    needed = {h for h in everyone if not enough(pushes[[*everyone - {h}]].sum(axis=0))}
    for n in range(max(1, len(needed)), n_heads + 1):
        if enough(np.sort(pushes, axis=0)[-n:].sum(axis=0)):  # no n heads push more than that
            more = itertools.combinations(everyone - needed, n - len(needed))
            sets = (tuple(sorted(needed.union(heads))) for heads in more)
            if held := sorted(A for A in sets if enough(pushes[list(A)].sum(axis=0))):
                return held
    return []


# ---- The conformance kit: is another implementation right, and if not, from which stage on? ----

Case = namedtuple("Case", "name params x target alpha expected value_scale")
_DRAWS = {"x": (-2, 5, 1 / 2), "W_gate_Q": (-1, 3, 1), "W_gate_K": (-1, 3, 1)}
_DRAWS.update({"b_gate_Q": (-1.5, 4, 1 / 2), "b_gate_K": (-1.5, 4, 1 / 2)})
_ONE_HOT, _EDGES = {"x": (0, 6, 1)}, {"b_gate_Q": (-1, 4, 1 / 2), "b_gate_K": (-1, 4, 1 / 2)}
_SHUT = {"b_gate_Q": (8.5, 4, 1 / 2), "b_gate_K": (-11.5, 4, 1 / 2)}
_LARGE = {"W_Q": (-127, 255, 1), "W_K": (-127, 255, 1 / 32)}
# Columns of W_V and rows of W_O with a norm of 0, just above the floor of 1e-12, and below it.
_TINY = {"W_V": (-127, 255, [[[0, 2**-7]], [[2**-46, 2**-7]], [[2**-7, 2**-48]]])}
_TINY["W_O"] = (-127, 255, [[[2**-7], [2**-46]], [[2**-48], [2**-7]], [[0], [2**-7]]])
_CASES = {  # name: the first state, the sizes B T H D K G, alpha, and the draws of its own
    "one_hot": (1, (2, 7, 4, 6, 1, 1), 1 / 8, _ONE_HOT),
    "dense": (2, (2, 5, 3, 4, 2, 3), 1 / 4, {}),
    "equal_sizes": (3, (3, 3, 3, 3, 3, 3), 1 / 4, {}),
    "one_position": (4, (3, 1, 2, 4, 2, 1), 1 / 8, {}),
    "one_head": (5, (2, 33, 1, 4, 2, 1), 1 / 2, {}),
    "large_scores": (1323, (2, 6, 3, 4, 1, 1), 1 / 4, _LARGE),
    "large_b_V": (7, (2, 5, 3, 6, 1, 1), 1 / 2, {**_ONE_HOT, "b_V": (-127, 255, 1 / 4)}),
    "tiny_norms": (8, (2, 5, 3, 4, 2, 1), 1 / 4, _TINY),
    "all_closed": (9, (2, 4, 2, 4, 2, 1), 1 / 4, _SHUT),
    "gate_edges": (48, (2, 6, 3, 6, 2, 1), 1 / 4, {**_ONE_HOT, **_EDGES}),
}


def cases(value_scale=None):
    """Yields ten named tuples: `name`, the arguments of `loss`, and `expected`, a dict of every
    intermediate, the losses, and `grads`, a dict of d loss / d parameter, and of d loss / d x.
    With a value_scale, a number > 0, they are those of the block with that option.

    The arguments never change by a bit: x, target, then the parameters are filled with draws

        state = (1664525 * state + 1013904223) mod 2^32        before each draw
        draw  = (lowest + floor(state / 2^24) mod count) * step

    where `_CASES`, else `_DRAWS`, else -127, 255, 1/128 are the three numbers. No entry has more
    than 8 significant bits. Gate scores are odd multiples of 1/16, so that no rounding flips a
    clamp, but in `gate_edges`, where many are exactly 0 or 1. Source: this reference's own.
    """
    for name, (state, sizes, alpha, own) in _CASES.items():
        sizes, arrays = dict(zip("BTHDKG", sizes)), {}
        for key, axes in {"x": "BTD", "target": "BTD", **GATED_BLOCK}.items():
            lowest, count, step = own.get(key) or _DRAWS.get(key, (-127, 255, 1 / 128))
            one_hot = key == "x" in own  # drawn as tokens [B, T]
            array = np.zeros([sizes[axis] for axis in axes[: 2 if one_hot else 3]])
            for i in np.ndindex(array.shape):
                state = (1664525 * state + 1013904223) % 2**32
                array[i] = lowest + (state >> 24) % count
            arrays[key] = np.eye(count)[array.astype(int)] if one_hot else array * np.array(step)
        inputs = {key: arrays[key] for key in GATED_BLOCK}, arrays["x"], arrays["target"], alpha
        yield Case(name, *inputs, _evaluate(*inputs, value_scale), value_scale)


def _evaluate(params, x, target, alpha, value_scale):
    option, both = {"value_scale": value_scale}, {**params, "x": x}

    def scalars(both):
        return loss({name: both[name] for name in params}, both["x"], target, alpha, **option)

    grads = grad(lambda both: scalars(both)["loss"])(both)
    return {**gated_attention(params, x, **option), **scalars(both), "grads": grads}


_USAGE = """python gatedref.py FILE.npz writes the conformance cases: CASE/W_Q, ..., CASE/x,
CASE/target, CASE/alpha, CASE/expected/z, ..., CASE/expected/grads/W_Q, ....
python gatedref.py check FILE.npz says of each case whether CASE/z, ..., CASE/grads/W_Q, ... match.
Cases:"""


def _flat(stages):
    """{"loss": 1, "grads": {"x": 2}} -> {"loss": 1, "grads/x": 2}"""
    grads = {"grads/" + name: g for name, g in stages.get("grads", {}).items()}
    return {**{name: stages[name] for name in stages if name != "grads"}, **grads}


def assert_matches(case, got, *, rtol=None, strict=False):
    """Raises an AssertionError where `got` differs from `case.expected`. It names the first stage
    in the data's flow that differs, its largest difference, and the other stages. One differs if

        |got - expected| > tolerance * max |expected|        (a max of 0 counts as 1)
        tolerance = rtol, else 64 eps of the type that is given: 1.4e-14, or 7.6e-6 in float32

    anywhere. All gradients share one max. Those of `W_V` and `W_O` count times the norms that these
    are divided by, else a zero column's, of 1e12, would hide the others.

    got: a dict of any of the names in `expected` and in its `grads`: NumPy, PyTorch or JAX floats.
    `attn_scores` may be anything where key > query. rtol: None, or a number in [0, 1). strict: True
    to compare also the gradients that pass through gates of exactly 0 or 1, `W_gate_* b_gate_* x`
    in `gate_edges`, where libraries differ.
    ValueError: an unknown name, another type or shape, NaN, infinity. TypeError: a case that is no
    Case, a strict that is no bool. Source: this reference's own.
    """
    if not isinstance(case, Case) or not isinstance(strict, (bool, np.bool_)):
        raise TypeError(f"case must be a Case, strict a bool, got {type(case)} and {strict!r}")
    if rtol is not None:
        _number("rtol", rtol, "None or a number in [0, 1)", lambda r: 0 <= r < 1)
    _known("got", got, case.expected)
    _known("got['grads']", got.get("grads", {"x": 0}), case.expected["grads"])
    expected, got = _flat(case.expected), _flat(got)
    got = {n: _shown(n, got[n], expected[n]) for n in expected if n in got}
    W_V, b_V = case.params["W_V"], case.params["b_V"][:, None]
    joined = W_V if case.value_scale is None else np.concatenate([W_V, b_V], axis=1)
    norms = {"grads/W_V": _norm(joined, 1), "grads/W_O": _norm(case.params["W_O"], 2)}
    skipped = [] if strict else ["grads/" + name for name in ("x", *GATE)]
    if not np.isin(expected["gate_scores"], (0, 1)).any():
        skipped = []
    wanted = {n: np.where(np.isinf(a), 0.0, a) for n, a in expected.items()}
    top = {n: abs(a * norms.get(n, 1)).max() for n, a in wanted.items()}
    top.update(dict.fromkeys(grads := [n for n in top if "/" in n], max(top[n] for n in grads)))
    differ = {}
    for name, (array, eps) in got.items():
        error = abs(array - wanted[name])
        weighted, scale = error * norms.get(name, 1), top[name] or 1
        tolerance = 64 * eps if rtol is None else rtol
        if name not in skipped and weighted.max() > tolerance * scale:
            at = np.unravel_index(np.argmax(weighted), error.shape)
            place = f"{name}[{', '.join(map(str, at))}]" if at else name
            differ[name] = (
                f"{place} is {array[at]:.17g}, should be {wanted[name][at]:.17g}: off by "
                f"{error[at]:.3g}, where {tolerance:.1e} of {scale:.3g} is allowed"
            )
    if differ:
        first, *others = differ
        others = f". These differ too: {', '.join(others)}" if others else ""
        raise AssertionError(f"{case.name}: {differ[first]}{others}")


def _known(name, values, known):
    if not isinstance(values, dict) or not values or any(n not in known for n in values):
        values = list(values) if isinstance(values, dict) else type(values)
        raise ValueError(f"{name} must be a dict of any of {list(known)}, got {values}")


def _shown(name, value, want):
    """What a port shows, in float64 and with 0 for masked scores, and the eps of its type."""
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)  # PyTorch
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(f"{name} must be an array of floats: {problem}") from None
    if array.dtype not in (np.float64, np.float32) or array.shape != np.shape(want):
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{name} must be float64 or float32 of shape {np.shape(want)}, got {got}")
    shown = np.where(np.isinf(want), 0.0, array).astype(float)
    if not np.isfinite(shown).all():
        at = np.argwhere(~np.isfinite(shown))[0].tolist()
        row = array[tuple(at[:-1])] if name in ("attn_scores", "pattern") else np.zeros(1)
        empty = "" if np.isfinite(row).any() else ": does the mask leave this query no key at all?"
        raise ValueError(f"{name} must be finite, got {array[tuple(at)]} first at {at}{empty}")
    return shown, np.finfo(array.dtype).eps


def _check_file(path):
    given, failed = dict(np.load(path)), False
    for case in cases():
        mine = [name for name in given if name.startswith(case.name + "/")]
        got = {name.partition("/")[2]: given[name] for name in mine}
        grads = {n[6:]: got.pop(n) for n in list(got) if n.startswith("grads/")}
        try:
            assert_matches(case, {**got, "grads": grads} if grads else got)
            print(f"{case.name}: matches")
        except (AssertionError, ValueError) as wrong:
            print(str(wrong) if str(wrong).startswith(case.name) else f"{case.name}: {wrong}")
            failed = True
    return int(failed)


def _main(arguments):
    """Writes the cases to a file, or checks the results in one."""
    check = arguments[:1] == ["check"]
    if len(arguments) != 1 + check or arguments[-1].startswith("-"):
        print(_USAGE, *_CASES)
        return 0 if arguments in ([], ["-h"], ["--help"]) else 2
    try:
        if check:
            return _check_file(arguments[1])
        arrays = {}
        for case in cases():
            inputs = {**case.params, "x": case.x, "target": case.target, "alpha": case.alpha}
            expected = {"expected/" + name: value for name, value in _flat(case.expected).items()}
            arrays.update({f"{case.name}/{n}": a for n, a in {**inputs, **expected}.items()})
        with open(arguments[0], "wb") as file:
            np.savez(file, **arrays)
    except OSError as problem:
        print(f"{arguments[-1]}: {problem.strerror}", file=sys.stderr)
        return 2
    return 0


# ---- The checks, which every public function begins with, and einsum ---------------------------


def _array(name, value, letters, kinds="iuf"):
    """A value as an array of finite numbers, with the axes that the letters spell."""
    wanted = "integers" if kinds == "iu" else "float64, float32 or integer numbers"
    try:
        array = np.asarray(getval(value))
    except (TypeError, ValueError, RuntimeError) as problem:  # ragged, or of another library
        raise ValueError(f"{name} must be an array, got {type(value)}: {problem}") from None
    masked = type(value).__module__.startswith("numpy.ma")  # the mask would be dropped
    if masked or array.dtype.kind not in kinds or array.dtype.char in "eg":
        raise ValueError(f"{name} must hold {wanted}, got {type(value)} of {array.dtype}")
    if array.ndim != len(letters) or array.size == 0:
        wanted = f"axes {list(letters)}, none of them empty"
        raise ValueError(f"{name} must have {wanted}, got shape {array.shape}")
    if not np.isfinite(array).all():
        where = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise ValueError(f"{name} must be finite, got {array[where]} at {where}")
    return array


def _checked(values, axes):
    """The named values as arrays of floats, each with the axes that `axes` spells, a letter for
    each: a letter has one size throughout, so no size is ever made up by broadcasting."""
    arrays, sizes = {}, {}
    for name, letters in axes.items():
        array = _array(name, values[name], letters)
        for letter, size in zip(letters, array.shape):
            expected, owner = sizes.setdefault(letter, (size, name))
            if size != expected:
                wanted = f"{owner} has {expected}; its shape is {array.shape}"
                raise ValueError(f"{name} has {size} along {letter}, where {wanted}")
        arrays[name] = values[name] if isbox(values[name]) else array
    floats = [array.dtype for array in arrays.values() if array.dtype.kind == "f"]
    dtype = np.result_type(*floats) if floats else np.float64
    return {n: a if a.dtype.kind == "f" else a.astype(dtype) for n, a in arrays.items()}


def _checked_block(params, axes=None, **others):
    """A block's parameters, of the kind that their names say where `axes` does not, and the arrays
    [B, T, D] that go with them."""
    if not isinstance(getval(params), dict):
        raise TypeError(f"params must be a dict of arrays, got {type(params)}")
    axes = axes or (GATED_BLOCK if any(name in params for name in GATE) else BLOCK)
    missing, unknown = [n for n in axes if n not in params], [n for n in params if n not in axes]
    if missing or unknown:
        raise ValueError(f"params must be {list(axes)}: missing {missing}, unknown {unknown}")
    values = {**{name: params[name] for name in axes}, **others}
    arrays = _checked(values, {**axes, **dict.fromkeys(others, "BTD")})
    return {name: arrays[name] for name in axes}, *(arrays[name] for name in others)


def _tokens(name, value, letters, n_tokens):
    array = _array(name, value, letters, "iu")
    if array.min() < 0 or array.max() >= n_tokens:
        worst = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{name} must be in [0, {n_tokens}), got {worst}")
    return array


def _check_options(activation, value_scale):
    known = isinstance(activation, str) and activation in ACTIVATIONS
    if not known and not callable(activation):
        wanted = f"one of {list(ACTIVATIONS)} or a function"
        raise ValueError(f"activation must be {wanted}, got {activation!r}")
    if value_scale is not None:
        _number("value_scale", value_scale, "None or a finite number > 0", lambda s: s > 0)


def _number(name, value, wanted, valid, kinds="iuf"):
    try:
        number = _array(name, value, "", kinds)
    except ValueError:
        number = None
    if number is None or not valid(number):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _whole(name, value, least):
    if type(value) is not int or value < least:  # an int may be longer than NumPy's own
        _number(name, value, f"a whole number >= {least}", lambda n: n >= least, "iu")
    return int(value)


@primitive
def einsum(axes, a, b):
    """np.einsum of two arrays, by matmul: autograd's own takes three times as long at d_head 4."""
    in_a, in_b, out = re.split(",|->", axes)
    size = dict(zip(in_a + in_b, a.shape + b.shape))
    both = [i for i in out if i in in_a and i in in_b]
    summed = [i for i in in_a if i not in out]
    left, right = ([i for i in out if i in of and i not in both] for of in (in_a, in_b))
    stack, inner = [size[i] for i in both], math.prod(size[i] for i in summed)
    a = a.transpose([in_a.index(i) for i in both + left + summed]).reshape(*stack, -1, inner)
    b = b.transpose([in_b.index(i) for i in both + summed + right]).reshape(*stack, inner, -1)
    made = both + left + right
    product = (a @ b).reshape([size[i] for i in made])
    return product.transpose([made.index(i) for i in out])


defvjp(  # the way back to the first array, and to the second
    einsum,
    lambda ans, axes, a, b: lambda g: einsum(re.sub("(.*),(.*)->(.*)", r"\3,\2->\1", axes), g, b),
    lambda ans, axes, a, b: lambda g: einsum(re.sub("(.*),(.*)->(.*)", r"\3,\1->\2", axes), g, a),
    argnums=(1, 2),
)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
