"""gatedref: gated attention blocks in NumPy, the method as a specification that runs.

Attention heads are in *superposition* when several of them compute together what none of them
computes alone. A gated attention block takes them apart: it learns to reproduce the output of a
trained attention block, with more heads, each switched by a gate of its own for every (query, key)
pair, under an L0.6 penalty that makes it dear for two heads to be open on one pair.

    import numpy as np, gatedref
    model = gatedref.handmade_superposition(3)  # two heads that complete three skip trigrams
    tokens, completes = gatedref.sample_skip_trigrams(3, n_sequences=100)
    target = gatedref.transformer([model], tokens)["blocks"][0]["attn_out"]
    params = gatedref.init_params(n_heads=4, d_model=8, d_head=1, d_gate=1)
    scalars, grads = gatedref.loss_and_grad(params, np.eye(8)[tokens], target, alpha=0.1)

Read it from top to bottom: attention, the gate, the penalty, the loss, models, the toy task, and
who holds what; how arguments are checked comes last. Parameters are plain dicts of arrays, and
autograd differentiates every function of them. Axes: B batch, T positions, D d_model, H heads,
K d_head, G d_gate, V vocabulary, S sequences. Of two T axes the first is the query (destination)
and the second the key (source).

Arrays may be float64, float32 or integers, which are taken as floats, and lists will do. Results
have the type of what came in; where float types are mixed, each operation takes the wider, as NumPy
does, and a gradient has the type of its parameter. Anything else, a wrong name or shape, NaN or
infinity raises a ValueError that names the argument (a TypeError where params is no dict or a flag
no bool): broadcasting never turns a wrong shape into a number. What overflows on the way is not
caught: it gives infinity or NaN, with NumPy's warning.

Source: Mathwin, Akar and Sharkey, "Gated Attention Blocks: Preliminary Progress toward Removing
Attention Head Superposition" (April 2024), called "the post" below, and the code published with it.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import math
import sys
from collections import namedtuple

import autograd.numpy as np
from autograd import grad, grad_and_aux
from autograd.tracer import getval, isbox

# The axes of each parameter.
BLOCK = {"W_Q": "HDK", "W_K": "HDK", "W_V": "HDK", "W_O": "HKD"}
BLOCK.update({"b_Q": "HK", "b_K": "HK", "b_V": "HK"})
GATE = {"W_gate_Q": "HDG", "W_gate_K": "HDG", "b_gate_Q": "HG", "b_gate_K": "HG"}
GATED_BLOCK = {**BLOCK, **GATE}


# ------------------------------------------------------------------------------------------------
# The block


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
    return _attend(*_checked_block(params, x, BLOCK))


def _attend(params, x, gate=None):
    """The formulas of `attention`, with the pattern gated where there is a `gate`."""
    q, k, v = (np.tensordot(x, params["W_" + n], ([2], [1])) + params["b_" + n] for n in "QKV")
    scores = _dot(q / q.shape[-1] ** 0.5, k)
    attn_scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    # A softmax does not notice what is subtracted from a row: the maximum counts as a constant.
    weights = np.exp(attn_scores - getval(attn_scores).max(axis=-1, keepdims=True))
    pattern = weights * (1 / weights.sum(axis=-1, keepdims=True))
    gated = {} if gate is None else {"gate": gate, "gated_pattern": gate * pattern}
    z = gated.get("gated_pattern", pattern) @ np.swapaxes(v, 1, 2)  # [B, H, T, K]
    result = z @ params["W_O"]  # [B, H, T, D]
    return {
        "q": q,
        "k": k,
        "v": v,
        "attn_scores": attn_scores,
        "pattern": pattern,
        **gated,
        "z": np.swapaxes(z, 1, 2),
        "result": np.swapaxes(result, 1, 2),
        "attn_out": result.sum(axis=1),
    }


def _dot(queries, keys):
    """Each query with each key, head by head: 2 x [B, T, H, K] -> [B, H, query, key]."""
    return np.swapaxes(queries, 1, 2) @ np.transpose(keys, (0, 2, 3, 1))


def gated_attention(params, x, *, activation="clamp", value_scale=None):
    """Attention whose pattern is multiplied, after the softmax, by a gate for each head and pair.

        gate_q, gate_k = x W_gate + b_gate
        gate_scores    = gate_q . gate_k             neither scaled nor masked
        gate           = clamp(gate_scores, 0, 1)
        gated_pattern  = gate * pattern              not renormalised: rows do not sum to 1
        z              = gated_pattern v, then `result` and `attn_out` as in `attention`

    First, each column of `W_V` [D] and each row of `W_O` [D] is divided by its L2 norm, so that a
    head cannot write more by growing while its gate, which is charged for, shrinks. A norm of 1e-12
    or less counts as the constant 1e-12, in the derivative too. In the published block `b_V` is
    left as it is, and a head can grow that instead. `value_scale` closes the hole: a number > 0, by
    which `W_V` and `b_V` are multiplied once each column of the two together (`b_V` as one more
    row) has norm 1. As the K columns may be parallel, a head's gain is K value_scale at most.

    params: those of `attention`, and `W_gate_Q W_gate_K` [H, D, G], `b_gate_Q b_gate_K` [H, G].
    x: [B, T, D]. activation, of a gate score s: "clamp", whose derivative is 1 on all of [0, 1],
    both ends included, and 0 outside; or another of the post's trials: "relu" = max(s, 0),
    "tanh" = tanh(max(s, 0)), "binary" = 1 where s > 1/2 and else 0, with the derivative of "clamp".
    Returns the dict of `attention`, and `gate_q gate_k` [B, T, H, G], `gate_scores gate
    gated_pattern` [B, H, query, key]. Gates are in [0, 1]; with "relu", >= 0.
    Good to 13 digits in float64, while `W_V` and `W_O` stay below 1e150 (in float32, 1e18), where
    their squares would overflow.
    ValueError: as `attention`, and an unknown activation, a value_scale that is not above 0.
    Source: the post; `value_scale` is this reference's own.
    """
    _checked_options(activation, value_scale)
    return _attend_gated(*_checked_block(params, x, GATED_BLOCK), activation, value_scale)


def _attend_gated(params, x, activation, value_scale):
    """The formulas of `gated_attention`."""
    block = {**{name: params[name] for name in BLOCK}, **normalised(params, value_scale)}
    gate_q, gate_k = (
        np.tensordot(x, params["W_gate_" + n], ([2], [1])) + params["b_gate_" + n] for n in "QK"
    )
    gate_scores = _dot(gate_q, gate_k)
    gate = ACTIVATIONS[activation](gate_scores)
    gate_parts = {"gate_q": gate_q, "gate_k": gate_k, "gate_scores": gate_scores}
    return {**gate_parts, **_attend(block, x, gate)}


def normalised(params, value_scale=None):
    """The dict of `W_V`, `b_V` and `W_O` that `gated_attention` computes with, by its formula and
    of its shapes; [N, H, ...] will do, too. The caller has checked the arguments."""
    W_O = _unit(params["W_O"], axis=-1)
    if value_scale is None:
        return {"W_V": _unit(params["W_V"], axis=-2), "b_V": params["b_V"], "W_O": W_O}
    joined = np.concatenate([params["W_V"], params["b_V"][..., None, :]], axis=-2)  # [H, D + 1, K]
    joined = value_scale * _unit(joined, axis=-2)
    return {"W_V": joined[..., :-1, :], "b_V": joined[..., -1, :], "W_O": W_O}


def _unit(W, axis):
    """W with norm 1 along an axis; floored under the root, whose derivative at 0 is infinite."""
    return W / _norm(W, axis)


def _norm(W, axis):
    squares = (W * W).sum(axis=axis, keepdims=True)
    return np.sqrt(np.where(squares > 1e-24, squares, 1e-24))


def _clamp(s):
    # Not np.clip: at exactly 0 and 1 its derivative is 0 in autograd, 1 in PyTorch, 1/2 in JAX.
    return np.where(s < 0, 0.0, np.where(s > 1, 1.0, s))


def _relu(s):
    return np.where(s > 0, s, 0.0)


def _binary(s):
    clamped = _clamp(s)
    return clamped + getval((s > 0.5) - clamped)  # the step's value, the clamp's derivative


ACTIVATIONS = {
    "clamp": _clamp,
    "relu": _relu,
    "tanh": lambda s: np.tanh(_relu(s)),
    "binary": _binary,
}


# ------------------------------------------------------------------------------------------------
# The penalty and the loss


def lp_penalty(gate, p=0.6, *, causal=False):
    """The Lp norm of the gates over the heads, averaged over the (query, key) pairs.

        penalty = mean over b, query, key of (sum over h of gate[b, h, query, key]^p)^(1/p)

    With p = 0.6 one open head costs 1, two half open 1.587, two fully open 3.175: sharing a pair
    costs more than the sum of its parts, where L1 would charge 1, 1 and 2.

    gate: [B, H, query, key], entries >= 0. p: a finite number > 0. causal: False for the mean over
    all T x T pairs, as published (the gate has no mask); True for that over key <= query alone.
    Returns a scalar; for gates in [0, 1], from 0 to H^(1/p). The derivative counts as 0 at gate 0,
    where for p < 1 it has no finite value, and where all gates of a pair are 0.
    Good to 13 digits at p = 0.6, down to the smallest gates that a float holds; for p from 0.1 to
    10, where gates that are not 0 lie between 1e-30 and 1e30.
    ValueError: a wrong type, shape or entry; a p that is not as above. TypeError: such a causal.
    Source: the post.
    """
    _checked_penalty(p, causal)
    gate = _checked({"gate": gate}, {"gate": "BHTT"})["gate"]
    if (getval(gate) < 0).any():
        raise ValueError(f"gate must be >= 0, got {getval(gate).min()}")
    return _penalty(gate, p, causal)


def _penalty(gate, p, causal):
    """The formula of `lp_penalty`."""
    norm = lp_norm(gate, p)  # [B, query, key]
    if not causal:
        return np.mean(norm)
    pairs = np.tri(norm.shape[1], dtype=bool)
    return (norm * pairs).sum() / (len(norm) * int(pairs.sum()))


def lp_norm(gate, p):
    """The norm in `lp_penalty`: (sum over h of gate^p)^(1/p), [..., H, query, key] -> [..., query,
    key]. The caller has checked the arguments."""
    return _power(_power(gate, p).sum(axis=-3), 1 / p)


def _power(base, exponent):
    """base^exponent, base >= 0. At 0 the derivative is 0: 1 is raised there, then wiped out."""
    zero = getval(base) == 0
    return (base + zero) ** exponent * ~zero


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
    return _loss(*_checked_loss(params, x, target, alpha, activation, value_scale, p, causal))


def _loss(params, x, target, alpha, activation, value_scale, p, causal):
    """The formulas of `loss`."""
    block = _attend_gated(params, x, activation, value_scale)
    error = block["attn_out"] - target
    mse, penalty = np.mean(error * error), _penalty(block["gate"], p, causal)
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}


def loss_and_grad(
    params, x, target, alpha, *, activation="clamp", value_scale=None, p=0.6, causal=False
):
    """The dict of `loss`, and the gradient: d loss / d parameter, a dict with the keys, shapes and
    types of `params`. Arguments, options, errors and source are those of `loss`."""
    given = params, x, target, alpha, activation, value_scale, p, causal
    params, *others = _checked_loss(*given)

    def objective(params):
        scalars = _loss(params, *others)
        return scalars["loss"], scalars

    gradient, scalars = grad_and_aux(objective)(params)
    scalars = {name: getval(scalar) for name, scalar in scalars.items()}
    return scalars, {name: gradient[name].astype(params[name].dtype) for name in params}


# ------------------------------------------------------------------------------------------------
# Models


def init_params(n_heads, d_model, d_head, seed=0, d_gate=None):
    """Random parameters of a block, as published; of a gated block where `d_gate` is given.

    `W_*` and `b_*` are Xavier-normal: standard deviation sqrt(2 / (fan_in + fan_out)), with the
    fans that PyTorch counts, fan_in = b c and fan_out = a c for a shape [a, b, c], fan_in = b and
    fan_out = a for [a, b]. The gate's weights are orthonormal across the heads: `W_gate_Q`, seen
    as [H, D G], has orthonormal rows (columns, where H > D G); so has `W_gate_K`. Its biases are 0.

    n_heads, d_model, d_head, d_gate: whole numbers >= 1. seed: a whole number >= 0.
    Returns a dict of float64 arrays with the shapes of `attention` or `gated_attention`; one seed
    gives both kinds of block the same `W_*` and `b_*`.
    ValueError: an argument that is not as above.
    Source: the code published with the post.
    """
    sizes = {"H": _whole("n_heads", n_heads, 1), "D": _whole("d_model", d_model, 1)}
    sizes["K"] = _whole("d_head", d_head, 1)
    rng = np.random.default_rng(_whole("seed", seed, 0))
    params = {}
    for name, axes in BLOCK.items():
        a, b, *c = shape = [sizes[axis] for axis in axes]
        params[name] = rng.normal(scale=math.sqrt(2 / ((a + b) * math.prod(c))), size=shape)
    if d_gate is not None:
        sizes["G"] = _whole("d_gate", d_gate, 1)
        for name, axes in GATE.items():
            shape = [sizes[axis] for axis in axes]
            params[name] = np.zeros(shape)
            if name.startswith("W"):
                rows = rng.normal(size=(shape[0], shape[1] * shape[2]))
                # The polar factor: the nearest matrix whose rows, or columns, are orthonormal.
                left, _, right = np.linalg.svd(rows, full_matrices=False)
                params[name] = (left @ right).reshape(shape)
    return params


def transformer(layers, tokens, *, activation="clamp", value_scale=None):
    """A model of attention blocks alone, which reads and writes tokens one-hot.

        residual = onehot(tokens), then residual += attn_out(residual) layer by layer
        logits   = residual

    layers: a list of parameter dicts with D = V, each gated (with `W_gate_Q`, ...) or not. tokens:
    integers [B, T] in [0, V). The options are those of `gated_attention`, for every gated layer.
    Returns a dict of `logits` [B, T, V] and `blocks`, the list of each layer's intermediates.
    ValueError: no layers; layers whose D differ; tokens that are not as above; as the two blocks.
    TypeError: a layer that is no dict.
    Source: the toy model of the post, for any number of layers.
    """
    if not isinstance(getval(layers), (list, tuple)) or len(layers) == 0:
        got = "an empty one" if isinstance(layers, (list, tuple)) else type(layers)
        raise ValueError(f"layers must be a list of one or more parameter dicts, got {got}")
    if not all(isinstance(getval(layer), dict) for layer in layers):
        raise TypeError(f"layers must be a list of parameter dicts, got {[*map(type, layers)]}")
    _checked_options(activation, value_scale)
    gated = [any(name in layer for name in GATE) for layer in layers]
    axes = [GATED_BLOCK if is_gated else BLOCK for is_gated in gated]
    checked = []
    for number, (layer, names) in enumerate(zip(layers, axes)):
        try:
            checked.append(_checked(_named(layer, names), names))
        except ValueError as wrong:
            raise ValueError(f"layers[{number}]: {wrong}") from None
    d_models = [layer["W_Q"].shape[1] for layer in checked]
    if len(set(d_models)) > 1:
        raise ValueError(f"layers must share one d_model, got {d_models}")
    tokens = _tokens("tokens", tokens, "BT", d_models[0])
    residual, blocks = np.eye(d_models[0], dtype=checked[0]["W_Q"].dtype)[tokens], []
    for layer, is_gated in zip(layers, gated):
        options = {"activation": activation, "value_scale": value_scale} if is_gated else {}
        blocks.append((gated_attention if is_gated else attention)(layer, residual, **options))
        residual = residual + blocks[-1]["attn_out"]
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


# ------------------------------------------------------------------------------------------------
# The task, and who holds what


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


def holders(result, answers, threshold=0.99):
    """The smallest sets of heads that hold an answer, by the published rule for one head.

    A set A of one head or more holds the answer when, on more than `threshold` of the sequences,
    every set R of heads with A in R, and R not all heads, has np.argmax over V of (sum over R of
    result) = answer: all those R at once, so that the answer survives whatever else is removed.
    The set of all heads, from which nothing is removed, holds it when their own sum is right as
    often. An answer that the model gets right and that no single head holds is distributed: it is
    in superposition.

    result: [S, H, V], each head's output at one position of each sequence, H <= 16 (the 2^H sets
    are all tried). answers: integers [S] in [0, V). threshold: a number in [0, 1).
    Returns the sets of fewest heads that hold it, as sorted tuples in a sorted list; [] for none.
    ValueError: an argument that is not as above. Source: the code published with the post, which
    asks it of single heads alone.
    """
    _number("threshold", threshold, "a number in [0, 1)", lambda t: 0 <= t < 1)
    result = _checked({"result": result}, {"result": "SHV"})["result"]
    n_sequences, n_heads, n_tokens = result.shape
    if n_heads > 16:
        raise ValueError(f"result must have at most 16 heads (2^16 sets), got {n_heads}")
    answers = _tokens("answers", answers, "S", n_tokens)
    if len(answers) != n_sequences:
        raise ValueError(f"answers has {len(answers)} along S, where result has {n_sequences}")
    counts = np.zeros(2**n_heads, dtype=int)
    step = max(1, 2**20 // (n_tokens * 2**n_heads))  # sequences at a time, to bound the memory
    for start in range(0, n_sequences, step):
        part, answer = result[start : start + step], answers[start : start + step, None]
        sums = np.zeros((len(part), n_tokens, 1))  # [S, V, set]: bit h of a set's number is head h
        for h in range(n_heads):
            sums = np.concatenate([sums, sums + part[:, h, :, None]], axis=2)
        holds = np.argmax(sums, axis=1) == answer  # [S, set]: this very set is right
        intact = holds[:, -1].copy()
        holds[:, -1] = True
        for h in range(n_heads):  # and with head h, and so with any more heads
            pairs = holds.reshape(len(part), -1, 2, 2**h)
            pairs[:, :, 0] &= pairs[:, :, 1]
        holds[:, -1] = intact
        counts = counts + holds.sum(axis=0)
    counts[0] = 0  # the empty set is no holder
    numbers = np.flatnonzero(counts / n_sequences > threshold)
    sets = [tuple(h for h in range(n_heads) if number >> h & 1) for number in numbers]
    fewest = min(map(len, sets), default=0)
    return sorted(heads for heads in sets if len(heads) == fewest)


# ------------------------------------------------------------------------------------------------
# The conformance kit: is another implementation right, and if not, from which stage on?

Case = namedtuple("Case", "name params x target alpha expected")
_DRAWS = {"x": (-2, 5, 1 / 2), "W_gate_Q": (-1, 3, 1), "W_gate_K": (-1, 3, 1)}
_DRAWS.update({"b_gate_Q": (-1.5, 4, 1 / 2), "b_gate_K": (-1.5, 4, 1 / 2)})
_ONE_HOT, _EDGES = {"x": (0, 6, 1)}, {"b_gate_Q": (-1, 4, 1 / 2), "b_gate_K": (-1, 4, 1 / 2)}
_SHUT = {"b_gate_Q": (8.5, 4, 1 / 2), "b_gate_K": (-11.5, 4, 1 / 2)}
_LARGE = {"W_Q": (-127, 255, 1 / 16), "W_K": (-127, 255, 1 / 32)}
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


def cases():
    """Yields named tuples: `name`, the arguments of `loss`, and `expected`, a dict of every
    intermediate, the losses, and `grads`, a dict of d loss / d parameter, and of d loss / d x.

    Any language can rebuild the arguments. x, target, then the parameters in the order of
    `GATED_BLOCK` are filled with draws, last axis fastest. `_CASES` has a case's first state, and

        state = (1664525 * state + 1013904223) mod 2^32        before each draw
        draw  = (lowest + floor(state / 2^24) mod count) * step

    where `_CASES`, else `_DRAWS`, else -127, 255, 1/128 are the three numbers. A one-hot x is drawn
    as tokens [B, T]. No entry has more than 8 significant bits: float32, TF32 and bfloat16 hold it.
    Gate scores are odd multiples of 1/16, so that no rounding flips a clamp, but in `gate_edges`:
    there they are multiples of 1/4, and often exactly 0 or 1. Source: this reference's own.
    """
    for name, (state, sizes, alpha, own) in _CASES.items():
        sizes, arrays = dict(zip("BTHDKG", sizes)), {}
        for key, axes in {"x": "BTD", "target": "BTD", **GATED_BLOCK}.items():
            lowest, count, step = own.get(key) or _DRAWS.get(key, (-127, 255, 1 / 128))
            one_hot = key == "x" in own
            array = np.zeros([sizes[axis] for axis in axes[: 2 if one_hot else 3]])
            for i in np.ndindex(array.shape):
                state = (1664525 * state + 1013904223) % 2**32
                array[i] = lowest + (state >> 24) % count
            arrays[key] = np.eye(count)[array.astype(int)] if one_hot else array * np.array(step)
        params = {key: arrays[key] for key in GATED_BLOCK}
        inputs = params, arrays["x"], arrays["target"], alpha
        yield Case(name, *inputs, _evaluate(*inputs))


def _evaluate(params, x, target, alpha):
    both = {**params, "x": x}
    grads = grad(lambda b: loss({n: b[n] for n in params}, b["x"], target, alpha)["loss"])(both)
    return {**gated_attention(params, x), **loss(params, x, target, alpha), "grads": grads}


def _flat(stages):
    """{"loss": 1, "grads": {"x": 2}} -> {"loss": 1, "grads/x": 2}"""
    grads = {"grads/" + name: g for name, g in stages.get("grads", {}).items()}
    return {**{name: stages[name] for name in stages if name != "grads"}, **grads}


def assert_matches(case, got, *, rtol=None, strict=False):
    """Raises an AssertionError where `got` differs from `case.expected`. It names the first stage
    in the data's flow that differs, its largest difference, and the other stages. One differs if

        |got - expected| > tolerance * max |expected|        (a max of 0 counts as 1)
        tolerance = rtol, else eps * max(16, 4 * e)

    anywhere. eps: 2^-52 for what is given in float64, 2^-23 in float32, 2^-10 in float16, 2^-7 in
    bfloat16. e: the error of this file's own functions in float32, in eps of it: under 1.5, and 9
    for the gradients of `large_scores`. All gradients share one max and one e. Those of `W_V` and
    `W_O` count times the norms that these are divided by, else a zero column's, of 1e12, would hide
    the others. `attn_scores` count where key <= query.

    got: a dict of any of the names in `expected` and in its `grads`: NumPy, PyTorch or JAX floats.
    rtol: None, or a number in [0, 1). strict: True to compare also the gradients that pass through
    gates of exactly 0 or 1, `W_gate_* b_gate_* x` in `gate_edges`: there frameworks differ.
    ValueError: an unknown name, another type or shape, NaN, infinity (unless float16 overflows).
    TypeError: a case that is no Case, a strict that is no bool. Source: this reference's own.
    """
    if not isinstance(case, Case) or not isinstance(strict, (bool, np.bool_)):
        raise TypeError(f"case must be a Case, strict a bool, got {type(case)} and {strict!r}")
    if rtol is not None:
        _number("rtol", rtol, "None or a number in [0, 1)", lambda r: 0 <= r < 1)
    _known("got", got, case.expected)
    _known("got['grads']", got.get("grads", {"x": 0}), case.expected["grads"])
    expected, norms = _flat(case.expected), {}

    def read(stages):
        stages = _flat(stages)
        return {n: _computed(n, stages[n], expected[n]) for n in expected if n in stages}

    single = [{n: np.float32(a) for n, a in case.params.items()}, *map(np.float32, case[2:4])]
    want, plain, got = map(read, (case.expected, _evaluate(*single, case.alpha), got))
    for name, axis in (("W_V", 1), ("W_O", 2)):
        norms["grads/" + name] = _norm(case.params[name], axis)
    top = {n: (abs(array) * norms.get(n, 1)).max() for n, (array, _) in want.items()}
    e = {n: (abs(plain[n][0] - want[n][0]) * norms.get(n, 1)).max() for n in want}
    for most in (top, e):
        grads = {n: most[n] for n in want if n.startswith("grads/")}
        most.update(dict.fromkeys(grads, max(grads.values())))
    skipped, differ = _flat({"grads": {"x": 0, **GATE}}), {}
    if strict or not np.isin(expected["gate_scores"], (0, 1)).any():
        skipped = {}
    for name in [n for n in want if n in got and n not in skipped]:
        (array, eps), scale = got[name], top[name] or 1
        tolerance = eps * max(16, 4 * e[name] / scale / 2**-23) if rtol is None else rtol
        error = abs(array - want[name][0]) * norms.get(name, 1)
        if error.max() > tolerance * scale:
            at = np.unravel_index(np.argmax(error), error.shape)
            place = f"{name}[{', '.join(map(str, at))}]" if at else name
            is_, should = array[at], want[name][0][at]
            differ[name] = (
                f"{place} is {is_:.17g}, should be {should:.17g}: off by {abs(is_ - should):.3g}, "
                f"where {tolerance:.1e} of {scale:.3g} is allowed"
            )
    if differ:
        first, *others = differ
        others = f". These differ too: {', '.join(others)}" if others else ""
        raise AssertionError(f"{case.name}: {differ[first]}{others}")


def _known(name, values, known):
    if not isinstance(values, dict) or not values or any(n not in known for n in values):
        values = list(values) if isinstance(values, dict) else type(values)
        raise ValueError(f"{name} must be a dict of any of {list(known)}, got {values}")


def _computed(name, value, want):
    """What a port computed, in float64, and the eps of the type it came in."""
    try:
        value = value.detach().cpu() if hasattr(value, "detach") else value  # PyTorch
        bfloat16 = "bfloat16" in str(getattr(value, "dtype", ""))  # a type that NumPy lacks
        if bfloat16:
            value = value.float() if hasattr(value, "float") else value.astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(f"{name} must be an array of floats: {problem}") from None
    array = _array(name, value)
    if array.dtype.name not in ("float16", "float32", "float64") or array.shape != np.shape(want):
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{name} must be floats of shape {np.shape(want)}, got {got}")
    held = abs(want) <= np.finfo(array.dtype).max  # not so: a masked score, and 1e12 in float16
    if np.isnan(array).any() or np.isinf(array[held]).any():
        at = np.argwhere(np.isnan(array) | np.isinf(array) & held)[0].tolist()
        raise ValueError(f"{name} must be finite, got NaN or infinity first at {at}")
    eps = 2**-7 if bfloat16 else np.finfo(array.dtype).eps
    return np.where(np.isinf(want), 0.0, np.where(held, array, want)).astype(float), float(eps)


def _main(arguments):
    """Writes the cases to the file that is named; without a name, says so and lists them."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("python gatedref.py FILE.npz writes the conformance cases: CASE/W_Q, ..., CASE/x,")
        print("CASE/target, CASE/alpha, CASE/expected/z, ..., CASE/expected/grads/W_Q, .... Cases:")
        for name, (_, sizes, *_) in _CASES.items():
            print(f"    {name:13}", *(f"{axis}={size:<2}" for axis, size in zip("BTHDKG", sizes)))
        return 0 if arguments in ([], ["-h"], ["--help"]) else 2
    arrays = {}
    for case in cases():
        inputs = {**case.params, "x": case.x, "target": case.target, "alpha": case.alpha}
        expected = {"expected/" + name: value for name, value in _flat(case.expected).items()}
        arrays.update({f"{case.name}/{n}": value for n, value in {**inputs, **expected}.items()})
    try:
        with open(arguments[0], "wb") as file:
            np.savez(file, **arrays)
    except OSError as problem:
        print(f"cannot write {arguments[0]}: {problem.strerror}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------
# The door: what every public function checks its arguments with


def _checked(values, axes):
    """The named values as arrays of floats, each with the axes that `axes` spells, a letter for
    each: a letter has one size throughout, so no size is ever made up by broadcasting."""
    arrays, sizes = {}, {}
    for name, letters in axes.items():
        value = values[name]
        array = _array(name, getval(value))
        if array.dtype.kind not in "iu" and array.dtype not in (np.float64, np.float32):
            wanted = "float64, float32 or integer numbers"
            raise ValueError(f"{name} must hold {wanted}, got {type(value)} of {array.dtype}")
        if array.ndim != len(letters):
            raise ValueError(f"{name} must have axes {list(letters)}, got shape {array.shape}")
        for letter, size in zip(letters, array.shape):
            expected, owner = sizes.setdefault(letter, (size, name))
            if size != expected or size == 0:
                wanted = "at least 1 is needed" if size == 0 else f"{owner} has {expected}"
                shape = f"its shape is {array.shape}"
                raise ValueError(f"{name} has {size} along {letter}, where {wanted}; {shape}")
        if not np.isfinite(array).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise ValueError(f"{name} must be finite, got {array[where]} at {where}")
        arrays[name] = value if isbox(value) else array
    floats = [array.dtype for array in arrays.values() if array.dtype.kind == "f"]
    dtype = np.result_type(*floats) if floats else np.float64
    return {n: a if a.dtype.kind == "f" else a.astype(dtype) for n, a in arrays.items()}


def _checked_block(params, x, axes):
    """A block's parameters and its input, checked together."""
    arrays = _checked({**_named(params, axes), "x": x}, {**axes, "x": "BTD"})
    return {name: arrays[name] for name in axes}, arrays["x"]


def _checked_loss(params, x, target, alpha, activation, value_scale, p, causal):
    """The arguments of `loss` in their order, the arrays among them checked together."""
    _checked_options(activation, value_scale)
    _checked_penalty(p, causal)
    _number("alpha", alpha, "a finite number >= 0", lambda a: a >= 0)
    arrays = {**_named(params, GATED_BLOCK), "x": x, "target": target}
    arrays = _checked(arrays, {**GATED_BLOCK, "x": "BTD", "target": "BTD"})
    params = {name: arrays[name] for name in GATED_BLOCK}
    return params, arrays["x"], arrays["target"], alpha, activation, value_scale, p, causal


def _checked_penalty(p, causal):
    _number("p", p, "a finite number > 0", lambda p: p > 0)
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal must be True or False, got {causal!r}")


def _named(params, axes):
    if not isinstance(getval(params), dict):
        raise TypeError(f"params must be a dict of arrays, got {type(params)}")
    missing, unknown = [n for n in axes if n not in params], [n for n in params if n not in axes]
    if missing or unknown:
        raise ValueError(f"params must be {list(axes)}: missing {missing}, unknown {unknown}")
    return {name: params[name] for name in axes}


def _array(name, value):
    if type(value).__module__.startswith("numpy.ma"):  # the mask would be dropped
        raise ValueError(f"{name} must be an array without a mask, got {type(value)}")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as problem:  # ragged, or of another library
        raise ValueError(f"{name} must be an array, got {type(value)}: {problem}") from None


def _tokens(name, value, letters, n_tokens):
    array = _array(name, value)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, got {type(value)} of {array.dtype}")
    if array.ndim != len(letters) or array.size == 0:
        raise ValueError(f"{name} must have axes {list(letters)}, got shape {array.shape}")
    if array.min() < 0 or array.max() >= n_tokens:
        worst = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{name} must be in [0, {n_tokens}), got {worst}")
    return array


def _checked_options(activation, value_scale):
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    if value_scale is not None:
        _number("value_scale", value_scale, "None or a finite number > 0", lambda s: s > 0)


def _number(name, value, wanted, valid, kinds="iuf"):
    number = _array(name, getval(value))
    if number.ndim or number.dtype.kind not in kinds or not (np.isfinite(number) and valid(number)):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return value


def _whole(name, value, least):
    if type(value) is int and value >= least:  # of any size: seeds may be longer than NumPy's own
        return value
    return int(_number(name, value, f"a whole number >= {least}", lambda n: n >= least, "iu"))


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
