"""gatedref: gated attention blocks in NumPy, the method as a specification that runs.

Attention heads are in *superposition* when several of them compute together what none computes
alone. A gated attention block takes them apart. It learns to reproduce the output of a trained
block with more heads. Each head has a gate for every (query, key) pair, and a penalty on the gates
makes it costly for two heads to be open on one pair.

Parameters are dicts of arrays, and autograd differentiates every function of them. Axes: B batch,
T positions, D d_model, H heads, K d_head, G d_gate, V vocabulary, S sequences; in `einsum`, q is
the query's position (destination) and s the key's (source). Arrays are float64, float32 or
integers, and results have the widest float type that came in. A wrong name, type, shape or range
is a ValueError that names it; not a dict or not a bool is a TypeError.

The post: Mathwin, Akar and Sharkey, "Gated Attention Blocks: Preliminary Progress toward Removing
Attention Head Superposition", April 2024. It, and the code published with it, is the source where
no other is named. SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
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

BLOCK = {"W_Q": "HDK", "W_K": "HDK", "W_V": "HDK", "W_O": "HKD"}  # the axes of each parameter
BLOCK.update({"b_Q": "HK", "b_K": "HK", "b_V": "HK"})
GATE = {"W_gate_Q": "HDG", "W_gate_K": "HDG", "b_gate_Q": "HG", "b_gate_K": "HG"}
GATED_BLOCK = {**BLOCK, **GATE}


# ---- The method: attention, gate, penalty, loss ------------------------------------------------
def attention(params, x):
    """Causal multi-head attention, head by head, with no output bias.

        q, k, v     = x W + b
        attn_scores = q . k / sqrt(K), and -inf where key > query
        pattern     = softmax of attn_scores over the keys
        z           = pattern v
        result      = z W_O         one output a head
        attn_out    = sum of result over the heads
    params: `W_Q W_K W_V` [H, D, K], `W_O` [H, K, D], `b_Q b_K b_V` [H, K]. x: [B, T, D].
    Returns a dict of every intermediate: `q k v z` [B, T, H, K], `attn_scores pattern` [B, H,
    query, key], `result` [B, T, H, D], `attn_out` [B, T, D], in TransformerLens's names."""
    params, x = _checked(BLOCK, params, x=x)
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


def gated_attention(params, x, *, activation="clamp", value_scale=None):
    """Attention whose pattern is multiplied, after the softmax, by a gate for each head and pair.

        gate_q, gate_k = x W_gate + b_gate
        gate_scores    = gate_q . gate_k             neither scaled nor masked
        gate           = clamp(gate_scores, 0, 1)
        gated_pattern  = gate * pattern              not renormalised: rows do not sum to 1
        z              = gated_pattern v, then `result` and `attn_out` as in `attention`
    First, each column of `W_V` [D] and each row of `W_O` [D] is divided by its L2 norm, so that a
    head cannot write more by growing while its gate, which is charged for, shrinks. A norm of 1e-12
    or less counts as the constant 1e-12, in the derivative too. In the published block a head can
    still grow `b_V`. `value_scale`, a number > 0 and this reference's own, closes the hole: each
    column of `W_V`, with `b_V` as one more row, is divided by its norm and multiplied by the scale.
    params: those of `attention`, and `W_gate_Q W_gate_K` [H, D, G], `b_gate_Q b_gate_K` [H, G].
    x: [B, T, D]. activation: "clamp", whose derivative is 1 on the closed interval [0, 1] and 0
    outside; another of `ACTIVATIONS`, all of which the post tried; or any function that autograd
    can differentiate, from the array of gate scores to that of the gates. Returns the dict of
    `attention`, `gate_q gate_k` [B, T, H, G] and `gate_scores gate gated_pattern` [B, H, T, T]."""
    if not callable(activation) and activation not in list(ACTIVATIONS):
        raise ValueError(f"activation must be callable or in {[*ACTIVATIONS]}, got {activation!r}")
    params, x = _checked(GATED_BLOCK, params, x=x)
    block = {**{name: params[name] for name in BLOCK}, **normalised(params, value_scale)}
    gate_q = einsum("btd,hdg->bthg", x, params["W_gate_Q"]) + params["b_gate_Q"]  # [B, T, H, G]
    gate_k = einsum("btd,hdg->bthg", x, params["W_gate_K"]) + params["b_gate_K"]
    gate_scores = einsum("bqhg,bshg->bhqs", gate_q, gate_k)  # [B, H, query, key]
    gate = (activation if callable(activation) else ACTIVATIONS[activation])(gate_scores)
    if np.shape(gate) != gate_scores.shape:
        raise ValueError(f"activation must keep shape {gate_scores.shape}, got {np.shape(gate)}")
    scores = {"gate_q": gate_q, "gate_k": gate_k, "gate_scores": gate_scores}
    return {**scores, **_attend(x, **block, gate=gate)}


def normalised(params, value_scale=None):
    """`W_V`, `b_V` and `W_O` as `gated_attention` computes with them, by its rule."""
    W_V, b_V, W_O = params["W_V"], params["b_V"], params["W_O"]
    W_O = W_O / _norm(W_O, axis=2)
    if value_scale is None:
        return {"W_V": W_V / _norm(W_V, axis=1), "b_V": b_V, "W_O": W_O}
    _array("value_scale", value_scale, wanted="None or > 0", valid=lambda scale: scale > 0)
    norm = _norm(np.concatenate([W_V, b_V[:, None]], axis=1), axis=1)  # [H, 1, K]
    return {"W_V": value_scale * W_V / norm, "b_V": value_scale * b_V / norm[:, 0], "W_O": W_O}


def _norm(W, axis):
    """The L2 norm, floored under the root, whose derivative at 0 is infinite."""
    squares = (W * W).sum(axis=axis, keepdims=True)
    return np.sqrt(np.where(squares > 1e-24, squares, 1e-24))


ACTIVATIONS = {
    # Not np.clip: libraries disagree about its derivative at exactly 0 and 1. Here it is 1.
    "clamp": lambda s: np.where(s < 0, 0.0, np.where(s > 1, 1.0, s)),
    "relu": lambda s: np.where(s > 0, s, 0.0),
    "tanh": lambda s: np.tanh(np.where(s > 0, s, 0.0)),
    "binary": lambda s: (c := ACTIVATIONS["clamp"](s)) + getval((s > 0.5) - c),  # back: the clamp
}


def lp_penalty(gate, p=0.6, *, causal=False):
    """The Lp norm of the gates over the heads, averaged over the (query, key) pairs.

        penalty = mean over b, query, key of (sum over h of gate[b, h, query, key]^p)^(1/p)
    Why 0.6: where p < 1, sharing a pair costs more than the sum of its parts. One open head costs
    1, two half open 1.587, two fully open 3.175. L1 would charge 1, 1 and 2: it cannot tell one
    head from two that do half of its work each.
    gate: [B, H, query, key], entries >= 0. p: a number > 0. causal: False for the mean over all
    T x T pairs, as published (the gate has no mask); True for that over key <= query alone.
    Returns a scalar. The derivative counts as 0 at gate 0, where for p < 1 it is infinite."""
    _array("p", p, wanted="> 0", valid=lambda p: p > 0)
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    valid = {"wanted": ">= 0", "valid": lambda gate: gate >= 0}
    gate = _checked({"gate": "BHTT"}, {"gate": gate}, valid)[0]["gate"]
    # At 0 the derivative of a power counts as 0: 1 is raised there, then wiped out.
    power = lambda base, p: (base + (getval(base) == 0)) ** p * (getval(base) != 0)
    norm = power(power(gate, p).sum(axis=1), 1 / p)  # [B, query, key]
    pairs = np.tri(*norm.shape[1:], 0 if causal else norm.shape[1], dtype=bool)
    return (norm * pairs).sum() / (len(norm) * int(pairs.sum()))


def loss(params, x, target, alpha, *, activation="clamp", value_scale=None, p=0.6, causal=False):
    """How far a gated block is from its target, and what its gates cost.

        mse  = mean over B, T, D of (attn_out - target)^2
        loss = mse + alpha * penalty
    target: [B, T, D], the original block's `attn_out`, without the residual stream. alpha: >= 0.
    The rest as in `gated_attention` and `lp_penalty`. Returns `mse`, `penalty`, `loss`, scalars."""
    _array("alpha", alpha, wanted=">= 0", valid=lambda alpha: alpha >= 0)
    params, x, target = _checked(GATED_BLOCK, params, x=x, target=target)
    block = gated_attention(params, x, activation=activation, value_scale=value_scale)
    mse = np.mean((block["attn_out"] - target) ** 2)
    penalty = lp_penalty(block["gate"], p, causal=causal)
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}


def loss_and_grad(
    params, x, target, alpha, *, activation="clamp", value_scale=None, p=0.6, causal=False
):
    """The dict of `loss`, and the gradient: d loss / d parameter, a dict with the keys, shapes and
    types of `params`. Arguments and options are those of `loss`."""
    params, x, target = _checked(GATED_BLOCK, params, x=x, target=target)
    options = {"activation": activation, "value_scale": value_scale, "p": p, "causal": causal}

    def objective(params):
        scalars = loss(params, x, target, alpha, **options)
        return scalars["loss"], scalars
    gradient, scalars = grad_and_aux(objective)(params)
    gradient = {name: gradient[name].astype(params[name].dtype) for name in params}
    return {name: getval(scalar) for name, scalar in scalars.items()}, gradient


# ---- Models, the task, who holds what ----------------------------------------------------------
def init_params(n_heads, d_model, d_head, seed=0, d_gate=None):
    """Random parameters of a block, as published; of a gated block where `d_gate` is given.

    `W_*` and `b_*` are Xavier-normal: standard deviation sqrt(2 / (fan_in + fan_out)), with the
    fans that PyTorch counts, b c and a c for a shape [a, b, c], b and a for [a, b]. `W_gate_*`, as
    [H, D G], have orthonormal rows (columns, where H > D G); `b_gate_*` are 0. n_heads, d_model,
    d_head, d_gate: whole numbers >= 1. seed: one >= 0, of the same `W_*`, `b_*` in both blocks."""
    sizes = {"H": _whole("n_heads", n_heads, 1), "D": _whole("d_model", d_model, 1)}
    sizes["K"] = _whole("d_head", d_head, 1)
    sizes["G"] = _whole("d_gate", 1 if d_gate is None else d_gate, 1)
    rng, params = np.random.default_rng(_whole("seed", seed, 0)), {}
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
    layers: a list of parameter dicts with D = V, each gated or not. tokens: integers [B, T] in
    [0, V). The options are those of `gated_attention`, for the gated layers. Returns a dict of
    `logits` [B, T, V] and `blocks`, the list of each layer's intermediates."""
    if not isinstance(getval(layers), (list, tuple)) or len(layers) == 0:
        raise ValueError(f"layers must be a list of one or more parameter dicts, got {layers!r}")
    layers = [_checked(None, layer, where=f"layers[{i}].")[0] for i, layer in enumerate(layers)]
    V, dtype = layers[0]["W_Q"].shape[1], layers[0]["W_Q"].dtype
    tokens = _array("tokens", tokens, "BT", "iu", f"in [0, {V})", lambda t: (t >= 0) & (t < V))
    residual, blocks = np.eye(V, dtype=dtype)[tokens], []
    options = {"activation": activation, "value_scale": value_scale}
    for layer in layers:
        gated = "W_gate_Q" in layer
        block = gated_attention(layer, residual, **options) if gated else attention(layer, residual)
        blocks.append(block)
        residual = residual + block["attn_out"]
    return {"logits": residual, "blocks": blocks}


def handmade_superposition(n_trigrams):
    """Two heads, d_head 1, that complete n trigrams between them, written down without training.

    The answer to trigram i has the angle (i - 1/2) / n * 90 degrees. Head 0 writes its cosine, head
    1 its sine: alone they point at trigram 1's answer and at trigram n's, and hold these; the
    others are distributed. n_trigrams: 2 or more. Returns `attention` parameters, D = 2 n + 2."""
    n = _whole("n_trigrams", n_trigrams, 2)
    params = {name: np.zeros_like(array) for name, array in init_params(2, 2 * n + 2, 1).items()}
    angles = (np.arange(n) + 0.5) / n * np.pi / 2
    directions = np.stack([np.cos(angles), np.sin(angles)])  # [H, trigram]
    params["W_Q"][:] = math.log(1e-12)  # the weight of token 0, against 1 for any other
    params["W_Q"][:, 1 : n + 1, 0] = np.log(1e-6 * directions)
    params["W_K"][:, 0], params["W_V"][:, 0] = 1, 1e8
    params["W_O"][:, 0, n + 1 : 2 * n + 1] = directions
    return params


def sample_skip_trigrams(n_trigrams, n_sequences, n_positions=11, seed=0):
    """Sequences of OV-incoherent skip trigrams [0] ... [i] -> [i + n], for i = 1 to n.

    V = 2 n + 2 tokens: 0 is A, 1 to n are the B, n + 1 to 2 n their C, 2 n + 1 is BOS, which comes
    first. Then each token is uniform over all V, until a 0 is drawn, and over 1 to V - 1 from then
    on, until a B is drawn, say i. The next token is then i + n, and it begins anew. The source is
    always 0, and what must be written depends on the query: an OV circuit, which sees the source
    alone, cannot tell. n_trigrams, n_sequences, n_positions: 1 or more. seed: 0 or more. Returns
    `tokens`, integers [S, T], and `completes`, booleans [S, T], true at each trigram's B."""
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
    """The smallest sets of heads that hold an answer.

    A set A of heads *holds* an answer when it survives whatever other heads are removed: np.argmax
    over V of (sum over R of result) = answer for every set R of heads that contains A, all at once,
    on more than `threshold` of the sequences. A right answer that no single head holds is
    *distributed*: it is in superposition.
    Let m_h = result_h[answer] - result_h[c] be the lead of head h over a rival token c. Of all R,
    the worst for the answer adds the heads whose lead is negative. So A holds where for every c

        sum over h in A of max(m_h, 0)  >  sum over all h of max(-m_h, 0)
    (>= where c comes after the answer, as np.argmax breaks ties): A pushes the answer further above
    each rival than all heads together push the rival up. The published rule, for one head, differs
    in one thing: R is never all heads, and whether all heads are right is tested separately.
    result: [S, H, V], each head's output at one position of each sequence. answers: [S], in [0, V).
    threshold: in [0, 1). Returns a sorted list of the smallest sets that hold, as tuples."""
    _array("threshold", threshold, wanted="in [0, 1)", valid=lambda t: (t >= 0) & (t < 1))
    given = {"result": result, "answers": answers}
    result = _checked({"result": "SHV", "answers": "S"}, given)[0]["result"].astype(float)
    _, H, V = result.shape
    answers = _array("answers", answers, "S", "iu", f"in [0, {V})", lambda a: (a >= 0) & (a < V))
    lead = np.take_along_axis(result, answers[:, None, None], axis=2) - result
    pushes = np.maximum(np.swapaxes(lead, 0, 1), 0)  # [H, S, V]
    against = np.maximum(-lead, 0).sum(axis=1)  # [S, V]
    a_tie_will_do = np.arange(V) >= answers[:, None]  # as for the answer itself: 0 >= 0
    def hold(pushes):
        push = pushes.sum(axis=0)
        right = (push > against) | (push == against) & a_tie_will_do
        return right.all(axis=1).mean() > threshold

    if not hold(pushes):  # nor do fewer heads, then
        return []
    others = [h for h in range(H) if hold(np.delete(pushes, h, axis=0))]
    needed = set(range(H)).difference(others)
    for n in range(max(1, len(needed)), H + 1):
        if hold(np.sort(pushes, axis=0)[-n:]):  # else no n heads push enough
            more = itertools.combinations(others, n - len(needed))
            sets = (sorted(needed.union(heads)) for heads in more)
            if held := sorted(tuple(A) for A in sets if hold(pushes[A])):
                return held


# ---- The conformance kit: is another implementation right, and if not, from which stage on? ----
Case = namedtuple("Case", "name params x target alpha expected value_scale")
_DRAWS = {"x": (-2, 5, 1 / 2), "W_gate_Q": (-1, 3, 1), "W_gate_K": (-1, 3, 1)}
_DRAWS.update({"b_gate_Q": (-1.5, 4, 1 / 2), "b_gate_K": (-1.5, 4, 1 / 2)})
_ONE_HOT, _EDGES = {"x": (0, 6, 1)}, {"b_gate_Q": (-1, 4, 1 / 2), "b_gate_K": (-1, 4, 1 / 2)}
_SHUT = {"b_gate_Q": (8.5, 4, 1 / 2), "b_gate_K": (-11.5, 4, 1 / 2)}
_LARGE = {"W_Q": (-127, 255, 1), "W_K": (-127, 255, 1 / 32)}  # up to 987, yet exact in float32
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
    intermediate, the losses, and `grads`, a dict of d loss / d parameter and d loss / d x. With a
    value_scale, a number > 0, they are the same cases for the block with that option.
    No rounding flips a clamp; in `gate_edges` many gate scores are exactly 0 or 1."""
    option = {"value_scale": value_scale}
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
        scalars, grads = loss_and_grad(*inputs, **option)
        grads["x"] = grad(lambda *inputs: loss(*inputs, **option)["loss"], 1)(*inputs)
        expected = {**gated_attention(*inputs[:2], **option), **scalars, "grads": grads}
        yield Case(name, *inputs, expected, value_scale)


def assert_matches(case, got, *, rtol=None, strict=False):
    """Raises an AssertionError where `got` differs from `case.expected`: it names the first stage
    in the data's flow that differs, its largest difference, and the other stages. One differs where

        |got - expected| > tolerance * max |expected|        (a max of 0 counts as 1)
    The tolerance is rtol, in [0, 1), else 64 eps of the type that is given: 1.4e-14 in float64,
    7.6e-6 in float32. All gradients share one max; those of `W_V` and `W_O` are multiplied by the
    norms that these are divided by, or a zero column's, of 1e12, would hide the others. got: a dict
    of any names of `expected` and `grads`, float32 or float64 of NumPy, PyTorch or JAX; masked
    `attn_scores` may be anything; else what is not finite is a ValueError. strict: True to compare
    in `gate_edges` the gradients of x and the gate, too: at gates of 0 and 1 libraries differ."""
    if not isinstance(case, Case) or not isinstance(strict, (bool, np.bool_)):
        raise TypeError(f"case must be a Case, strict a bool, got {type(case)} and {strict!r}")
    _array("rtol", rtol or 0, wanted="None or in [0, 1)", valid=lambda r: (r >= 0) & (r < 1))
    want, given, differ = _flat(case.expected), _flat(got) if isinstance(got, dict) else {}, {}
    if not given or any(name not in want for name in given):
        wrong = [name for name in given if name not in want] or got
        raise ValueError(f"got must be a dict of any of {list(case.expected)}, got {wrong!r}")
    given = {name: _shown(name, given[name], want[name]) for name in want if name in given}
    if not strict and np.isin(want["gate_scores"], (0, 1)).any():
        given = {n: g for n, g in given.items() if n.removeprefix("grads/") not in ("x", *GATE)}
    want = {name: np.where(np.isinf(array), 0.0, array) for name, array in want.items()}
    b_V = case.params["b_V"][:, None] * (case.value_scale is not None)
    W_V = np.concatenate([case.params["W_V"], b_V], axis=1)  # b_V, too, where it is normalised
    norms = {"grads/W_V": _norm(W_V, 1), "grads/W_O": _norm(case.params["W_O"], 2)}
    of_grads = max(abs(want[n] * norms.get(n, 1)).max() for n in want if n.startswith("grads/"))
    for name, (array, eps) in given.items():
        off, scale = abs(array - want[name]), of_grads if "/" in name else abs(want[name]).max()
        weighted, tolerance = off * norms.get(name, 1), 64 * eps if rtol is None else rtol
        if weighted.max() > tolerance * (scale or 1):
            at = np.unravel_index(np.argmax(weighted), off.shape)
            numbers = f"{array[at]:.17g}, should be {want[name][at]:.17g}, off by {off[at]:.3g}"
            allowed = f"{tolerance:.1e} of {scale:.3g} is allowed"
            differ[name] = f"{name}{[*map(int, at)] or ''} is {numbers}, where {allowed}"
    if differ:
        others = f". These differ too: {', '.join([*differ][1:])}" if len(differ) > 1 else ""
        raise AssertionError(f"{case.name}: {next(iter(differ.values()))}{others}")


def _flat(stages):
    """{"loss": 1, "grads": {"x": 2}} -> {"loss": 1, "grads/x": 2}"""
    inner = {name: _flat(value) for name, value in stages.items() if isinstance(value, dict)}
    flat = {name: value for name, value in stages.items() if name not in inner}
    return flat | {f"{name}/{n}": value for name in inner for n, value in inner[name].items()}


def _shown(name, value, want):
    """What a port shows, in float64 and with 0 for masked scores, and the eps of its type."""
    value = value.detach().cpu() if hasattr(value, "detach") else value  # PyTorch
    array = _array(name, value, np.shape(want), "f", valid=None)
    shown = np.where(np.isinf(want), 0.0, array).astype(float)
    for at in map(tuple, np.argwhere(~np.isfinite(shown)).tolist()):
        row = array[at[:-1]] if name in ("attn_scores", "pattern") else [0]
        why = "" if np.isfinite(row).any() else ": does the mask leave this query no key at all?"
        raise ValueError(f"{name} must be finite, got {array[at]} at {at}{why}")
    return shown, np.finfo(array.dtype).eps


def _main(path, check=None):
    """python gatedref.py CASES.npz writes the arguments, CASE/W_Q, ..., CASE/x, CASE/target,
    CASE/alpha, and what is expected, CASE/expected/z, ..., CASE/expected/grads/W_Q, ... python
    gatedref.py check GOT.npz says which cases match its CASE/z, ..., CASE/grads/W_Q, ..."""
    if not check:
        files = {c.name: {**c.params, **dict(zip(c._fields[2:6], c[2:6]))} for c in cases()}
        return np.savez(path, **_flat(files))  # c[2:6]: x, target, alpha, expected
    given = np.load(path)
    failed = [print(f"{n}: of no case") for n in given if n.partition("/")[0] not in _CASES]
    for case in cases():
        got = {n.partition("/")[2]: given[n] for n in given if n.startswith(case.name + "/")}
        try:
            print(assert_matches(case, got) or f"{case.name}: {len(got)} arrays match")
        except (AssertionError, ValueError) as wrong:
            failed += [print(case.name, str(wrong).removeprefix(case.name + ": "), sep=": ")]
    return len(failed) > 0


# ---- The checks, which every public function begins with, and einsum ---------------------------
def _array(name, value, letters="", kinds="iuf", wanted="finite", valid=lambda array: True):
    """A value as an array of finite, valid numbers with these axes; where kinds is "f", sizes."""
    try:
        array = np.asarray(getval(value))
    except (TypeError, ValueError, RuntimeError) as problem:  # ragged, or of another library
        raise ValueError(f"{name} must be an array, got {type(value)}: {problem}") from None
    kind = {"iu": "integers", "f": "float64 or float32"}.get(kinds, "float64, float32 or integers")
    masked = type(value).__module__.startswith("numpy.ma")  # the mask would be dropped
    if masked or array.dtype.kind not in kinds or array.dtype.char in "eg":
        raise ValueError(f"{name} must be {wanted} {kind}, got {type(value)} of {array.dtype}")
    if letters != array.shape and (kinds == "f" or array.ndim != len(letters) or array.size == 0):
        axes = f"axes {list(letters)}, none empty, got shape {array.shape}"
        raise ValueError(f"{name} must be {wanted} with {axes}")
    if valid and not (fits := np.isfinite(array) & valid(array)).all():
        at = tuple(np.argwhere(~fits)[0].tolist())
        raise ValueError(f"{name} must be {wanted}, got {array[at]}" + f" at {at}" * bool(at))
    return array


def _whole(name, value, least):
    return int(_array(name, value, "", "iu", f"{least} or more,", lambda whole: whole >= least))


def _checked(axes, params, valid=(), where="", **others):
    """The params, named as in `axes`, and others [B, T, D] as arrays of floats. Each has the axes
    that its letters spell; a letter has one size throughout: none is made up by broadcasting."""
    if not isinstance(getval(params), dict):
        raise TypeError(f"{where}params must be a dict of arrays, got {type(params)}")
    axes = axes or (GATED_BLOCK if any(name in params for name in GATE) else BLOCK)
    missing, unknown = [n for n in axes if n not in params], [n for n in params if n not in axes]
    if missing or unknown:
        raise ValueError(f"{where}params must be {[*axes]}: missing {missing}, unknown {unknown}")
    arrays, sizes = {}, {}
    for name, value in {**{name: params[name] for name in axes}, **others}.items():
        letters = axes.get(name, "BTD")
        array = _array(where + name, value, letters, **dict(valid))
        for letter, size in zip(letters, array.shape):
            expected, owner = sizes.setdefault(letter, (size, name))
            if size != expected:
                wanted = f"{size} along {letter}, where {owner} has {expected}"
                raise ValueError(f"{where}{name} has {wanted}; its shape is {array.shape}")
        arrays[name] = value if isbox(value) else array
    dtype = np.result_type(*{a.dtype for a in arrays.values() if a.dtype.kind == "f"} or {float})
    arrays = {n: a if a.dtype.kind == "f" else a.astype(dtype) for n, a in arrays.items()}
    return {name: arrays[name] for name in axes}, *(arrays[name] for name in others)


@primitive
def einsum(axes, a, b):
    """np.einsum of two arrays by matmul: autograd's own takes three times as long at d_head 4."""
    of_a, of_b, out = re.split(",|->", axes)
    size = dict(zip(of_a + of_b, a.shape + b.shape))
    both, summed = [i for i in out if i in of_a and i in of_b], [i for i in of_a if i not in out]
    left, right = ([i for i in out if i in of and i not in both] for of in (of_a, of_b))
    stack, inner = [size[i] for i in both], math.prod(size[i] for i in summed)
    a = a.transpose([of_a.index(i) for i in both + left + summed]).reshape(*stack, -1, inner)
    b = b.transpose([of_b.index(i) for i in both + summed + right]).reshape(*stack, inner, -1)
    made = both + left + right
    return (a @ b).reshape([size[i] for i in made]).transpose([made.index(i) for i in out])

defvjp(  # the way back to the first array, and to the second
    einsum,
    lambda ans, axes, a, b: lambda g: einsum(re.sub("(.*),(.*)->(.*)", r"\3,\2->\1", axes), g, b),
    lambda ans, axes, a, b: lambda g: einsum(re.sub("(.*),(.*)->(.*)", r"\3,\1->\2", axes), g, a),
    argnums=(1, 2),
)
if __name__ == "__main__":
    sys.exit(_main.__doc__ if sys.argv[1:] in ([], ["check"]) else _main(*sys.argv[:0:-1]))
