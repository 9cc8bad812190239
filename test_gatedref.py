"""What gatedref computes, in statements: what equals what, and to how many digits.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import contextlib
import hashlib
import itertools
import math
import subprocess
import sys
import time
import timeit
from collections import Counter
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import elementwise_grad, grad
from autograd.tracer import getval

import gatedref
import train

# Matplotlib 3.9 calls pyparsing by names that the newest pyparsing deprecates.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning:matplotlib", "ignore::DeprecationWarning:pyparsing"
)


# ---- Helpers -----------------------------------------------------------------------------------

UNGATED, GATED = gatedref.BLOCK, gatedref.GATED_BLOCK
SIZES = {"B": 2, "T": 3, "H": 4, "D": 5, "K": 6, "G": 7, "S": 8, "V": 9}  # no two alike
SMALL = {"B": 2, "T": 3, "H": 2, "D": 3, "K": 2, "G": 2}

ACTIVATIONS = {
    "clamp": lambda s: min(max(s, 0.0), 1.0),
    "relu": lambda s: max(s, 0.0),
    "tanh": lambda s: math.tanh(max(s, 0.0)),
    "binary": lambda s: 1.0 if s > 0.5 else 0.0,
}


def randoms(axes, seed=0, scale=0.3, **sizes):
    """Normal numbers: an array for axes such as "BTD", a dict of arrays for a dict of axes."""
    rng, sizes = np.random.default_rng(seed), {**SIZES, **sizes}
    if isinstance(axes, str):
        return rng.normal(size=[sizes[a] for a in axes])
    return {n: scale * rng.normal(size=[sizes[a] for a in axes[n]]) for n in axes}


def one_head(gate_score=0.5, **changes):
    """One head, D = 2, K = G = 1, whose gate score is b_gate_Q, and which passes on x's first
    component: with an open gate attn_out[..., 0] is the running mean of x[..., 0]."""
    params = {name: np.zeros([{"D": 2}.get(a, 1) for a in axes]) for name, axes in GATED.items()}
    params["W_V"][0, 0, 0] = params["W_O"][0, 0, 0] = params["b_gate_K"][0, 0] = 1
    params["b_gate_Q"][0, 0] = gate_score
    return {**params, **changes}


def assert_close(actual, expected, digits):
    """Equal to so many digits of the largest entry, which in a dict is that of all its arrays."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        assert [np.shape(actual[n]) for n in expected] == [np.shape(a) for a in expected.values()]
        actual = np.concatenate([np.ravel(actual[n]) for n in expected])
        expected = np.concatenate([np.ravel(a) for a in expected.values()])
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    largest = np.abs(expected[np.isfinite(expected)]).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=largest / 10**digits)


def table(sizes, entry):
    """An array written number by number."""
    array = np.empty(sizes)
    for index in np.ndindex(*sizes):
        array[index] = entry(*index)
    return array


def naive_block(params, x, activation=None, value_scale=None):
    """`attention`, or given an activation `gated_attention`, in loops over single numbers."""
    (B, T, D), (H, _, K), P = x.shape, params["W_Q"].shape, dict(params)
    dot = lambda a, b: sum(m * n for m, n in zip(a, b))

    def divisor(numbers):
        return max(math.hypot(*numbers), 1e-12)

    if activation is not None:
        W_V, b_V, W_O = P["W_V"], P["b_V"], P["W_O"]
        if value_scale is None:
            norms = table((H, K), lambda h, k: divisor(W_V[h, :, k]))
        else:
            norms = table((H, K), lambda h, k: divisor([*W_V[h, :, k], b_V[h, k]]) / value_scale)
            P["b_V"] = table((H, K), lambda h, k: b_V[h, k] / norms[h, k])
        P["W_V"] = table((H, D, K), lambda h, d, k: W_V[h, d, k] / norms[h, k])
        P["W_O"] = table((H, K, D), lambda h, k, d: W_O[h, k, d] / divisor(W_O[h, k]))

    def linear(name):
        W, bias = P["W_" + name], P["b_" + name]
        sizes = B, T, H, W.shape[2]
        return table(sizes, lambda b, t, h, k: dot(x[b, t], W[h, :, k]) + bias[h, k])

    def scores(q, k):
        return table((B, H, T, T), lambda b, h, i, j: dot(q[b, i, h], k[b, j, h]))

    out = {"q": linear("Q"), "k": linear("K"), "v": linear("V")}
    raw = scores(out["q"], out["k"])
    out["attn_scores"] = A = table(
        raw.shape, lambda b, h, i, j: raw[b, h, i, j] / math.sqrt(K) if j <= i else -math.inf
    )
    out["pattern"] = weights = table(
        A.shape,
        lambda b, h, i, j: j <= i and 1 / sum(math.exp(a - A[b, h, i, j]) for a in A[b, h, i]),
    )
    if activation is not None:
        out.update(gate_q=linear("gate_Q"), gate_k=linear("gate_K"))
        out["gate_scores"] = scores(out["gate_q"], out["gate_k"])
        out["gate"] = table(A.shape, lambda *i: ACTIVATIONS[activation](out["gate_scores"][i]))
        out["gated_pattern"] = table(A.shape, lambda *i: out["gate"][i] * out["pattern"][i])
        weights = out["gated_pattern"]
    v = out["v"]
    z = out["z"] = table((B, T, H, K), lambda b, i, h, c: dot(weights[b, h, i], v[b, :, h, c]))
    out["result"] = table((B, T, H, D), lambda b, i, h, d: dot(z[b, i, h], P["W_O"][h, :, d]))
    out["attn_out"] = table(x.shape, lambda b, i, d: sum(out["result"][b, i, :, d]))
    return out


def naive_penalty(gate, p=0.6, causal=False):
    B, H, T, _ = gate.shape
    pairs = [(b, i, j) for b, i, j in np.ndindex(B, T, T) if j <= i or not causal]
    norms = [sum(gate[b, h, i, j] ** p for h in range(H)) ** (1 / p) for b, i, j in pairs]
    return sum(norms) / len(pairs)


def slopes(function, array, step=3e-6):
    """The gradient of a function of one array, or of a dict of arrays, by central differences."""
    if isinstance(array, dict):
        return {
            n: slopes(lambda a, n=n: function({**array, n: a}), array[n], step) for n in array
        }

    def shifted(index, by):
        moved = array.copy()
        moved[index] += by
        return function(moved)

    return table(array.shape, lambda *i: (shifted(i, step) - shifted(i, -step)) / (2 * step))


# ---- Attention and its gate --------------------------------------------------------------------

OPTIONS = [{}, {"value_scale": 0.7}, {"value_scale": 30}, *({"activation": a} for a in ACTIVATIONS)]


@pytest.mark.parametrize("d_gate", [1, 7])
@pytest.mark.parametrize("options", [None, *OPTIONS])
def test_the_block_equals_plain_loops_to_13_digits(options, d_gate):
    params, x = randoms(GATED if options is not None else UNGATED, G=d_gate), randoms("BTD", 1)
    if options is None:
        out, naive = gatedref.attention(params, x), naive_block(params, x)
    else:
        out = gatedref.gated_attention(params, x, **options)
        naive = naive_block(params, x, **{"activation": "clamp", **options})
        scores = naive["gate_scores"]
        assert (scores < 0).any() and (scores > 1).any() and ((scores > 0) & (scores < 1)).any()
    for name in naive.keys() | out.keys():
        assert_close(out[name], naive[name], 13)


# ---- The penalty and the loss ------------------------------------------------------------------

def test_sharing_a_pair_costs_more_than_the_sum_of_its_parts():
    for gates, charge, by_l1 in [([1, 0], 1, 1), ([0.5, 0.5], 1.5874, 1), ([1, 1], 3.1748, 2)]:
        gate = np.reshape(gates, (1, 2, 1, 1))
        assert gatedref.lp_penalty(gate) == pytest.approx(charge, rel=1e-5)
        assert gatedref.lp_penalty(gate, p=1) == pytest.approx(by_l1, rel=1e-14)


@pytest.mark.parametrize("causal", [False, True, np.True_])
@pytest.mark.parametrize("p", [0.3, 0.6, 1, 2])
def test_the_penalty_equals_plain_loops_to_14_digits(p, causal):
    gate = np.maximum(randoms("BHTT"), 0)
    assert_close(gatedref.lp_penalty(gate, p, causal=causal), naive_penalty(gate, p, causal), 14)


@pytest.mark.parametrize("options", [{"activation": "tanh", "p": 1}, {"value_scale": 5}])
def test_the_loss_equals_plain_loops_to_13_digits(options):
    params, x, target = randoms(GATED), randoms("BTD", 1), randoms("BTD", 2)
    block = naive_block(params, x, options.get("activation", "clamp"), options.get("value_scale"))
    mse = sum((block["attn_out"][i] - target[i]) ** 2 for i in np.ndindex(x.shape)) / x.size
    penalty = naive_penalty(block["gate"], options.get("p", 0.6))
    scalars = gatedref.loss(params, x, target, 0.3, **options)
    naive = {"mse": mse, "penalty": penalty, "loss": mse + 0.3 * penalty}
    assert scalars == pytest.approx(naive, rel=1e-13)


# ---- Gradients ---------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "options",
    [{}, {"value_scale": 4}, {"activation": "relu"}, {"activation": "tanh"}, {"causal": True}]
    + [{"p": p, "causal": p == 2} for p in (0.5, 1, 2)],
)
def test_gradients_equal_central_differences_to_8_digits(options):
    params, x = randoms(GATED, 48, 0.7, **SMALL), randoms("BTD", 1, **SMALL)
    target = randoms("BTD", 2, **SMALL)
    scores = gatedref.gated_attention(params, x)["gate_scores"]
    assert np.abs(scores).min() > 0.01 and np.abs(scores - 1).min() > 0.01  # away from the kinks
    scalars, gradient = gatedref.loss_and_grad(params, x, target, 0.3, **options)
    assert scalars == gatedref.loss(params, x, target, 0.3, **options)

    loss = lambda params, x: gatedref.loss(params, x, target, 0.3, **options)["loss"]
    assert_close(gradient, slopes(lambda params: loss(params, x), params), 8)
    assert_close(grad(lambda x: loss(params, x))(x), slopes(lambda x: loss(params, x), x), 8)


def test_gradients_of_a_model_and_of_its_input_equal_central_differences():
    layers = [randoms(UNGATED, 3, 0.7, **SMALL), randoms(GATED, 4, 0.7, **SMALL)]
    x, weights = randoms("BTD", 1, **SMALL), randoms("BTD", 2, **SMALL)
    attn = lambda x: (gatedref.attention(layers[0], x)["attn_out"] * weights).sum()
    assert_close(grad(attn)(x), slopes(attn, x), 8)
    tokens = [[0, 2, 1], [1, 0, 0]]
    model = lambda layers: (gatedref.transformer(layers, tokens)["logits"] * weights).sum()
    for i in (0, 1):
        numeric = slopes(lambda p, i=i: model([*layers[:i], p, *layers[i + 1 :]]), layers[i])
        assert_close(grad(model)(layers)[i], numeric, 8)


KINKS = [  # a gate score, the gate, and its derivative
    *(("clamp", *k) for k in ((-1e-9, 0, 0), (0, 0, 1), (1, 1, 1), (1 + 1e-9, 1, 0))),
    *(("relu", *k) for k in ((-1, 0, 0), (0, 0, 0), (1e-9, 1e-9, 1), (3, 3, 1))),
    *(("tanh", *k) for k in ((0, 0, 0), (2, math.tanh(2), 1 - math.tanh(2) ** 2))),
    *(("binary", *k) for k in ((-1e-9, 0, 0), (0.5, 0, 1), (0.5 + 1e-9, 1, 1), (1 + 1e-9, 1, 0))),
]


@pytest.mark.parametrize("activation, score, value, slope", KINKS)
def test_each_activation_has_its_derivative_also_at_its_kinks(activation, score, value, slope):
    options, b = {"activation": activation}, np.array([[float(score)]])
    block = lambda b: gatedref.gated_attention(one_head(b_gate_Q=b), [[[1, 0]]], **options)
    gate = lambda b: block(b)["gate"].sum()
    assert gate(b) == pytest.approx(value, 1e-15, 0)
    assert grad(gate)(b) == pytest.approx(slope, 1e-14, 0)


@pytest.mark.parametrize("p", [0.5, 0.6, 1, 2])
def test_a_closed_gate_has_no_gradient(p):
    gate = np.maximum(randoms("BHTT"), 0)
    gate[0, :, 1, 2] = 0  # a pair that every head leaves closed
    sums = np.where(gate.any(axis=1), (gate**p).sum(axis=1), 1)[:, None]
    slope = np.where(gate > 0, gate, 1) ** (p - 1) * sums ** (1 / p - 1) / 18
    assert_close(grad(gatedref.lp_penalty)(gate, p), np.where(gate > 0, slope, 0), 13)


@pytest.mark.parametrize("length", [0, 1e-300, 0.99e-12, 1.01e-12, 1])
def test_a_norm_below_1e_minus_12_counts_as_a_constant(length):
    y, u = np.array([2.0, 1.0]), np.array([0.6, 0.8])

    block = lambda w: gatedref.gated_attention(one_head(1, W_V=w.reshape(1, 2, 1)), [[y]])
    written = lambda w: block(w)["attn_out"].sum()  # y . w / max(|w|, 1e-12)
    slope = y / 1e-12 if length < 1e-12 else (y - (y @ u) * u) / length
    assert written(length * u) == pytest.approx(y @ u * length / max(length, 1e-12), 1e-13)
    assert_close(grad(written)(length * u), slope, 13)


def test_a_seed_makes_the_same_numbers_for_ever():
    params, block = gatedref.init_params(4, 5, 6, 3, d_gate=2), gatedref.init_params(4, 5, 6, 3)
    assert all((params[name] == block[name]).all() for name in UNGATED)
    assert not params["b_gate_Q"].any() and not params["b_gate_K"].any()
    bits = [b"".join(a.tobytes() for a in block.values())]
    bits += [b"".join(a.tobytes() for a in gatedref.sample_skip_trigrams(3, 50, seed=3))]
    told = [hashlib.sha256(b).hexdigest()[:16] for b in bits]
    assert told == ["83fa7ad28f4befd6", "fddd98bc7b6bc4da"]


def test_weights_and_biases_are_xavier_normal_within_5_sigma():
    params = gatedref.init_params(n_heads=40, d_model=30, d_head=20)
    fans = {"W_Q": 70 * 20, "W_K": 70 * 20, "W_V": 70 * 20, "W_O": 60 * 30}
    for name, a in params.items():
        a = a / math.sqrt(2 / fans.get(name, 60))
        for moment, mean, variance in ((a, 0, 1), (a**2, 1, 2), (a**4, 3, 96)):
            assert abs(moment.mean() - mean) < 5 * (variance / a.size) ** 0.5


@pytest.mark.parametrize("n_heads, d_gate", [(3, 1), (12, 2), (30, 2)])
def test_gate_weights_are_orthonormal_across_the_heads(n_heads, d_gate):
    params = gatedref.init_params(n_heads, 6, 2, d_gate=d_gate)
    for name in ("W_gate_Q", "W_gate_K"):
        rows = params[name].reshape(n_heads, 6 * d_gate)
        product = rows @ rows.T if n_heads <= 6 * d_gate else rows.T @ rows
        assert_close(product, np.eye(len(product)), 14)


@pytest.mark.parametrize("kinds", [[UNGATED], [GATED, UNGATED, GATED]])
def test_a_transformer_adds_each_layer_to_the_residual_stream(kinds):
    layers = [randoms(axes, seed, H=seed + 1) for seed, axes in enumerate(kinds)]
    tokens = np.array([[0, 4, 2], [1, 1, 3]])
    out = gatedref.transformer(layers, tokens, activation="tanh", value_scale=2)
    residual = np.eye(5)[tokens]
    for params, block in zip(layers, out["blocks"], strict=True):
        naive = naive_block(params, residual, *(("tanh", 2) if "W_gate_Q" in params else ()))
        for name in naive.keys() | block.keys():
            assert_close(block[name], naive[name], 12)
        residual = residual + naive["attn_out"]
    assert_close(out["logits"], residual, 13)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_two_handmade_heads_hold_the_first_and_last_trigram_and_share_the_others(n):
    tokens, completes = gatedref.sample_skip_trigrams(n, 2000)
    out = gatedref.transformer([gatedref.handmade_superposition(n)], tokens)
    trigram, result = tokens[completes], out["blocks"][0]["result"][completes]
    assert (out["logits"][completes].argmax(axis=1) == trigram + n).all()
    for i in range(1, n + 1):
        held = gatedref.holders(result[trigram == i], np.full((trigram == i).sum(), i + n))
        assert held == {1: [(0,)], n: [(1,)]}.get(i, [(0, 1)])


# ---- The task, and who holds what --------------------------------------------------------------

def rewalk(n, sequence):
    """What the law makes of a sequence: a (state, token) for each token drawn, and where a trigram
    completes. Fails where the law forbids the sequence."""
    assert sequence[0] == 2 * n + 1
    state, draws, completes = "plain", [], [False]
    for before, token in itertools.pairwise(sequence):
        completes.append(state == "armed" and 1 <= token <= n)
        if state == "forced":
            assert token == before + n
            state = "plain"
            continue
        draws.append((state, token))
        state = "forced" if completes[-1] else "armed" if token == 0 or state == "armed" else state
    return draws, completes


@pytest.mark.parametrize("n, n_positions", [(1, 11), (3, 1), (3, 2), (10, 50)])
def test_every_sequence_obeys_the_law(n, n_positions):
    tokens, completes = gatedref.sample_skip_trigrams(n, 400, n_positions, seed=1)
    assert tokens.shape == completes.shape == (400, n_positions)
    for sequence, found in zip(tokens.tolist(), completes.tolist()):
        assert rewalk(n, sequence)[1] == found
    if n_positions > 10:
        assert completes[:, -1].any() and completes.sum(axis=1).max() > 1


def test_draws_are_uniform_over_all_tokens_and_when_armed_over_all_but_0_within_5_sigma():
    tokens, _ = gatedref.sample_skip_trigrams(2, 20000)
    draws = Counter(d for sequence in tokens.tolist() for d in rewalk(2, sequence)[0])
    for state, allowed in (("plain", range(6)), ("armed", range(1, 6))):
        total, chance = sum(draws[state, t] for t in range(-9, 9)), 1 / len(allowed)
        assert total == sum(draws[state, t] for t in allowed)
        for token in allowed:
            sigma = math.sqrt(total * chance * (1 - chance))
            assert abs(draws[state, token] - total * chance) < 5 * sigma


def brute_holders(result, answers, threshold="0.99"):
    """The definition, set by set and sequence by sequence, in whole numbers: all heads included."""
    everyone = range(len(result[0]))
    subsets = [c for n in range(len(everyone) + 1) for c in itertools.combinations(everyone, n)]

    def holds(A, r, answer):
        larger = [R for R in subsets if {*A} <= {*R}]
        sums = [[sum(r[h][v] for h in R) for v in range(len(r[0]))] for R in larger]
        return all(total.index(max(total)) == answer for total in sums)

    for size in range(1, len(everyone) + 1):
        sets = list(itertools.combinations(everyone, size))
        counts = [sum(holds(A, r, a) for r, a in zip(result, answers)) for A in sets]
        found = [A for A, c in zip(sets, counts) if Fraction(c, len(result)) > Fraction(threshold)]
        if found:
            return found
    return []


def test_the_fewest_heads_that_keep_the_answer_whatever_else_is_removed_hold_it():
    for outputs, held in [  # the answer is token 1
        ([[0, 5], [0, 3], [1, 0]], [(0,), (1,)]),
        ([[0, 5], [9, 0], [0, 5]], [(0, 2)]),  # head 1 outvotes head 0, not heads 0 and 2
        ([[0, 2], [0, 2], [0, 2], [3, 0]], [(0, 1), (0, 2), (1, 2)]),
        ([[1, 1], [0, 0]], []),  # a tie goes to the first token, 0
        ([[4, 0, 3], [0, 4, 3]], []),  # 4 4 6 together: token 2, which no single head says
    ]:
        assert gatedref.holders([outputs], [1]) == held


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 5])
def test_holders_equal_every_set_tried_one_by_one(n_heads):
    rng, found = np.random.default_rng(n_heads), Counter()
    for case in range(60):
        result = rng.integers(-3, 4, size=(4, n_heads, 3))
        result[:, : case % (n_heads + 1), 1] += 3  # some heads favour token 1
        answers = rng.integers(0, 3, size=4) if case % 3 else np.ones(4, dtype=int)
        threshold = ["0", "0.25", "0.5", "0.7", "0.99"][case % 5]
        expected = brute_holders(result.tolist(), answers.tolist(), threshold)
        assert gatedref.holders(result, answers, float(threshold)) == expected
        found[len(expected[0]) if expected else 0] += 1
    assert len(found) > min(n_heads, 3)


def test_holders_of_24_heads_are_found_in_well_under_a_second():
    rng, start = np.random.default_rng(0), time.perf_counter()
    answers, result = rng.integers(1, 22, 500), 9 * rng.normal(size=(500, 24, 22))
    result[np.arange(500), 5, answers] += 900
    assert gatedref.holders(result, answers) == [(5,)]
    assert gatedref.holders(-result, answers) == []
    result[:] = 0  # twelve heads, none of which can go, against one
    result[:, 7:19], result[:, 0, 0] = 0.1 * np.eye(22)[answers][:, None], 1.15
    assert gatedref.holders(result, answers) == [tuple(range(7, 19))]
    assert time.perf_counter() - start < 1


# ---- The authors' models, which nobody here trained: figures/published.npz ---------------------

HELD = {  # of trigram 1, 2, ...: the head that holds it, None where it is distributed
    "2H3T/toy": [1, None, 0],
    "3H4T/toy": [None, 0, None, 2],
    "4H5T/toy": [1, 2, 0, None, 3],
    "2H3T/manual": [0, 1, None],
    "4H5T/manual": [0, 1, None, 2, 3],
    "2H3T/gated": [1, 0, 3],
    "3H4T/gated": [2, 1, 0, 4],
    "4H5T/gated": [5, 3, 7, 0, 1],
}
UNEXPLAINED = {"2H3T/gated": 0.32, "3H4T/gated": 0.052, "4H5T/gated": 0.064}


def published(model, tokens):
    return gatedref.transformer([train.published(*model.split("/"))], tokens)["blocks"][0]


@pytest.mark.parametrize("model", HELD)
def test_the_authors_models_hold_and_leave_unexplained_what_they_did(model):
    n = len(HELD[model])
    tokens, completes = gatedref.sample_skip_trigrams(n, 10000)
    block, found = published(model, tokens), []
    single = completes & (completes.sum(axis=1, keepdims=True) == 1)
    for i in range(1, n + 1):
        result = block["result"][single & (tokens == i)]
        held = gatedref.holders(result, np.full(len(result), i + n))
        found.append(held[0][0] if len(held) == 1 and len(held[0]) == 1 else None)
    assert found == HELD[model]
    if model in UNEXPLAINED:
        target = published(model.replace("gated", "toy"), tokens)["attn_out"]
        error, deviation = block["attn_out"] - target, target - target.mean((0, 1))
        unexplained = (error**2).sum() / (deviation**2).sum()
        assert unexplained == pytest.approx(UNEXPLAINED[model], rel=0.04)


def test_a_head_escapes_the_published_penalty_through_its_value_bias_and_value_scale_holds_it():
    params = train.published("2H3T", "gated")
    smaller = {name: params[name] / (1000 if "gate_Q" in name else 1) for name in params}
    smaller["b_V"] = 1000 * params["b_V"]
    x = np.eye(8)[gatedref.sample_skip_trigrams(3, 1000)[0]]
    target = published("2H3T/toy", x.argmax(axis=2))["attn_out"]
    before, after = (gatedref.loss(block, x, target, 1) for block in (params, smaller))
    assert before["penalty"] == pytest.approx(0.0155, rel=0.02)
    assert after["penalty"] == pytest.approx(before["penalty"] / 1000)
    assert after["mse"] == pytest.approx(before["mse"], rel=0.01)
    before, after = (gatedref.loss(b, x, target, 1, value_scale=20) for b in (params, smaller))
    assert after["mse"] > 2.5 * before["mse"]


# ---- What is refused, and what is taken --------------------------------------------------------

BLOCK, X = randoms(GATED), randoms("BTD", 1)
NAN, INF = float("nan"), float("inf")
ONES = np.ones((2, 3, 4))
UNGATED_BLOCK = {name: BLOCK[name] for name in UNGATED}
SIZES_OF = {"n_heads": 1, "d_model": 2, "d_head": 1, "d_gate": 1}


def bad(array, value):
    """A copy whose last entry is bad."""
    array = np.array(array, dtype=float)
    array.flat[-1] = value
    return array


def of(function, *arguments, **options):
    return lambda: getattr(gatedref, function)(*arguments, **options)


of_x = partial(of, "gated_attention", BLOCK)
of_block = lambda **changes: of("gated_attention", {**BLOCK, **changes}, X)
of_loss = lambda target=X, alpha=0.1, **options: of("loss", BLOCK, X, target, alpha, **options)
of_tokens = lambda tokens, layers=(BLOCK,): of("transformer", layers, tokens)
of_sizes = lambda **sizes: of("init_params", **{**SIZES_OF, **sizes})
REFUSED = [  # how the message begins, and the call
    *(("x must be .*'B', 'T', 'D'.*got", of_x(w)) for w in (X[0], X[None], 1.0, X[:0], [])),
    *(("x must be .*got", of_x(X.astype(t))) for t in (bool, complex, object, str, np.float16)),
    *(("x must be .*got", of_x(w)) for w in (None, "x", {}, np.ma.masked_array(X), [[1, 2], [3]])),
    *((r"x must be finite, got .* at \(1, 2, 4\)", of_x(bad(X, w))) for w in (NAN, INF, -INF)),
    (r"x has 4 along D, where W_Q has 5; its shape is \(2, 3, 4\)", of_x(X[..., 1:])),
    ("W_K has 1 along H, where W_Q has 4", of_block(W_K=BLOCK["W_K"][:1])),
    (r"params must be .*missing \[\], unknown \['W_X'\]", of_block(W_X=X)),
    (r"params must be .*missing \['W_gate_Q'", of("gated_attention", UNGATED_BLOCK, X)),
    (r"params must be .*unknown \['W_gate_Q'", of("attention", BLOCK, X)),
    *((TypeError, of("gated_attention", w, X)) for w in (None, [BLOCK], X)),
    ("target has 2 along T, where x has 3", of_loss(X[:, 1:])),
    *(("alpha must be >= 0", of_loss(alpha=w)) for w in (-1, NAN, INF, True, "1", None, [1.0], 1j)),
    *(("p must be > 0", of_loss(p=w)) for w in (0, -1, NAN, INF, True, "1", None, [1.0], 1j)),
    *(("value_scale must be None or > 0", of_loss(value_scale=w)) for w in (0, -1, INF, "1", [1])),
    *(("activation must be callable or in .*clamp.*, got", of_loss(activation=w))
      for w in ("sigmoid", "", None, 1, ["clamp"], {})),
    *((TypeError, of_loss(causal=w)) for w in (0, 1, None, "yes")),
    ("gate must be >= 0, got -1e-300", of("lp_penalty", bad(np.ones((1, 2, 3, 3)), -1e-300))),
    ("gate has 3 along T, where gate has 2", of("lp_penalty", np.ones((1, 2, 2, 3)))),
    *(("tokens must be .*got", of_tokens(w)) for w in ([0, 1], [[0.0]], [[True]], [[]], None)),
    *((rf"tokens must be in \[0, 5\), got {w} at \(0, 1\)", of_tokens([[0, w]])) for w in (5, -1)),
    *(("layers must be a list", of_tokens([[0]], w)) for w in ([], None, BLOCK, "x", 3)),
    *((TypeError, of_tokens([[0]], w)) for w in ([None], [3], ["W_Q"], [BLOCK, X])),
    (r"layers\[1\].W_K has 1", of_tokens([[0]], [BLOCK, {**BLOCK, "W_K": BLOCK["W_K"][:1]}])),
    ("x has 5 along D, where W_Q has 6", of_tokens([[0]], [BLOCK, randoms(GATED, D=6)])),
    *((r"threshold must be in \[0, 1\)", of("holders", ONES, [0, 1], w))
      for w in (1, 1.5, -0.1, NAN, True, "0.9", None, [0.9])),
    ("answers has 3 along S, where result has 2", of("holders", ONES, [0, 1, 2])),
    *((r"answers must be in \[0, 4\)", of("holders", ONES, [0, w])) for w in (4, -1)),
    *((f"{name} must be 1 or more,", of_sizes(**{name: w}))
      for name in SIZES_OF for w in (0, -1, 2.0, True, "3", [2], NAN, 1j)),
    *(("seed must be 0 or more,", of_sizes(seed=w)) for w in (-1, 0.0, True, "0", None)),
    ("n_trigrams must be 2 or more", of("handmade_superposition", 1)),
]  # fmt: skip


@pytest.mark.parametrize("message, call", REFUSED)
def test_what_is_wrong_is_refused_by_name(message, call):
    wrong = ValueError if isinstance(message, str) else message
    with pytest.raises(wrong, match=f"^{message}" if wrong is ValueError else " must be "):
        call()


def test_the_checks_are_there_while_autograd_differentiates():
    once = grad(lambda x: gatedref.loss(BLOCK, x, X, 0.1)["loss"])
    for gradient in (once, grad(lambda x: (once(x) ** 2).sum())):
        assert np.isfinite(gradient(X)).all()
        for wrong in (X[:, :, :4], X[:1], X[0], bad(X, NAN)):
            with pytest.raises(ValueError, match=r"\bx\b"):
                gradient(wrong)


def test_an_activation_may_be_a_function_of_the_gate_scores():
    function = lambda s: anp.tanh(anp.where(s > 0, s, 0.0))
    named = gatedref.loss_and_grad(BLOCK, X, X, 0.3, activation="tanh")
    for one, other in zip(named, gatedref.loss_and_grad(BLOCK, X, X, 0.3, activation=function)):
        assert_close(one, other, 15)
    with pytest.raises(ValueError, match=r"activation must keep shape \(2, 4, 3, 3\), got"):
        gatedref.gated_attention(BLOCK, X, activation=lambda s: s[:, 0])


def test_lists_and_integers_are_taken_and_float32_in_gives_float32_out():
    whole = {name: np.ceil(2 * a) for name, a in BLOCK.items()}
    right, grads = gatedref.loss_and_grad(whole, X, X, 0.1)
    for kind in (np.ndarray.tolist, lambda a: a.astype(int)):
        given = {name: kind(a) for name, a in whole.items()}
        scalars, by_kind = gatedref.loss_and_grad(given, X.tolist(), X, np.float64(0.1))
        assert scalars == right
        assert_close(by_kind, grads, 16)
    single, x = {name: a.astype(np.float32) for name, a in whole.items()}, X.astype(np.float32)
    scalars, by_single = gatedref.loss_and_grad(single, x, x, 0.1)
    assert {a.dtype for a in [*scalars.values(), *by_single.values()]} == {np.dtype(np.float32)}
    assert_close(scalars, right, 5)
    assert_close(by_single, grads, 4)
    _, mixed = gatedref.loss_and_grad({**whole, "b_Q": single["b_Q"]}, X, X, 0.1)
    assert (mixed["b_Q"].dtype, mixed["W_Q"].dtype) == (np.float32, np.float64)


# ---- The conformance kit: wrong blocks are caught, each a line or two away from this one -------

CASES = {case.name: case for case in gatedref.cases()}
DENSE = CASES["dense"]
ENDS = ("attn_out", "mse", "penalty", "loss", "grads")  # all that many ports can show

PORT = """
def clamp(s):
    return np.where(s < 0, 0.0, np.where(s > 1, 1.0, s))

def power(base, exponent):
    is_open = base > 0
    return np.where(is_open, np.where(is_open, base, 1.0) ** exponent, 0.0)

def port(x, target, alpha, p=0.6, *, W_Q, W_K, W_V, W_O, b_Q, b_K, b_V,
         W_gate_Q, W_gate_K, b_gate_Q, b_gate_K):
    (B, T, D), (H, _, K), G = x.shape, W_Q.shape, W_gate_Q.shape[2]
    mask = np.tri(T)
    V = W_V / np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24))
    O = W_O / np.sqrt(np.maximum((W_O**2).sum(2, keepdims=True), 1e-24))
    gate_q = np.einsum("btd,hdg->bthg", x, W_gate_Q) + b_gate_Q
    gate_k = np.einsum("btd,hdg->bthg", x, W_gate_K) + b_gate_K
    gate_scores = np.einsum("bqhg,bkhg->bhqk", gate_q, gate_k)
    q = np.einsum("btd,hdk->bthk", x, W_Q) + b_Q
    k = np.einsum("btd,hdk->bthk", x, W_K) + b_K
    v = np.einsum("btd,hdk->bthk", x, V) + b_V
    attn_scores = np.einsum("bqhk,bshk->bhqs", q, k) / K**0.5
    attn_scores = np.where(mask, attn_scores, -1e5)
    weights = np.exp(attn_scores - attn_scores.max(-1, keepdims=True))
    pattern = weights / weights.sum(-1, keepdims=True)
    gate = clamp(gate_scores)
    gated_pattern = gate * pattern
    z = np.einsum("bhqs,bshk->bqhk", gated_pattern, v)
    result = np.einsum("bqhk,hkd->bqhd", z, O)
    attn_out = result.sum(2)
    mse = ((attn_out - target) ** 2).mean()
    norm = power(power(gate, p).sum(1), 1 / p)
    penalty = norm.mean()
    loss = mse + alpha * penalty
    return locals()
"""

# The first stage that is caught, what the right block says, and what a wrong one says there.
SLIPS = [
    ("nan", "attn_scores - attn_scores.max(-1, keepdims=True)", "attn_scores"),
    ("pattern", "attn_scores, -1e5", "attn_scores, -100"),
    ("gate_q", "W_gate_Q) + b_gate_Q", "W_gate_Q)"),
    ("gate_scores", "gate_q, gate_k)", "gate_q, gate_k) / G**0.5"),
    ("gate_scores", "gate_q, gate_k)", "gate_q, gate_k) / G"),
    ("gate", "clamp(gate_scores)", "1 / (1 + np.exp(-gate_scores))"),
    ("gated_pattern", "gate * pattern", "gate_scores * pattern"),
    ("gated_pattern", "gate * pattern", "gate + pattern"),
    ("pattern", "weights / w", "gate_scores * 0 + clamp(gate_scores) * weights / w"),
    ("attn_scores", "q, k) / K**0.5", "q, k) / K**0.5 * clamp(gate_scores)"),
    ("attn_scores", "q, k) / K**0.5", "q, k) / K**0.5 + clamp(gate_scores)"),
    ("k", "x, W_K) + b_K", "x, W_K)"),
    ("pattern", "attn_scores, -1e5", "attn_scores, 0"),
    ("pattern", "attn_scores, -1e5", "attn_scores, -10"),
    ("attn_scores", "np.tri(T)", "np.tri(T) - np.tri(T, k=-32)"),
    ("v", "x, V) + b_V", "x, V)"),
    ("v", "x, V) + b_V", "x, W_V) + b_V"),
    ("v", "np.maximum((W_V**2).sum(1, keepdims=True), 1e-24)",
     "np.maximum((W_V**2).sum(1, keepdims=True), 1e-16)"),
    ("z", "gated_pattern, v)", "pattern, v)"),
    ("result", "z, O)", "z, W_O)"),
    ("result", "np.maximum((W_O**2).sum(2, keepdims=True), 1e-24)",
     "np.maximum((W_O**2).sum(2, keepdims=True), 1e-16)"),
    ("attn_out", "result.sum(2)", "result.sum(1) if H == T else result.sum(2)"),
    ("mse", "attn_out - target", "attn_out + target"),
    ("penalty", "power(gate, p)", "power(gate_scores, p)"),
    ("penalty", "power(gate, p)", "power(gated_pattern, p)"),
    ("penalty", "p=0.6", "p=0.60001"),
    ("loss", "mse + alpha * penalty", "mse"),
    ("grads/W_V", "np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24))",
     "stop(np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24)))"),
    ("grads/W_Q", "gate * pattern", "gate * stop(pattern)"),
    ("grads/W_gate_Q", "gate * pattern", "stop(gate) * pattern"),
    ("grads/W_gate_Q", "alpha * penalty", "alpha * stop(penalty)"),
    ("grads/x", "x, W_Q)", "stop(x), W_Q)"),
    ("nan", "power(gate, p)", "(gate**p)"),
    ("nan", "power(gate, p)", "(gate_scores**p)"),
]  # fmt: skip


def ported(case, old="", new=""):
    """All that PORT computes for a case, with `new` in place of the first `old`."""
    assert old in PORT
    names = {"np": anp, "stop": lambda a: getval(a)}
    exec(PORT.replace(old, new, 1), names)  # noqa: S102
    inputs = {**case.params, "x": case.x}
    with np.errstate(all="ignore"):
        stages = names["port"](target=case.target, alpha=case.alpha, **inputs)
        loss = lambda i: names["port"](target=case.target, alpha=case.alpha, **i)["loss"]
        got = {name: stages[name] for name in case.expected if name != "grads"}
        return {**got, "grads": grad(loss)(inputs)}


def first_caught(got_of, names=None):
    """The first stage that any case catches, or nan; None where the block passes them all."""
    for case in CASES.values():
        got = got_of(case.name)
        try:
            gatedref.assert_matches(case, {n: got[n] for n in names or got})
        except AssertionError as wrong:
            return str(wrong).split(": ")[1].split(" is ")[0].split("[")[0]
        except ValueError as wrong:
            return "nan" if "got nan" in str(wrong) else wrong
    return None


@pytest.mark.parametrize("stage, old, new", SLIPS)
def test_a_slip_is_caught_at_its_stage_and_in_the_outputs_alone(stage, old, new):
    got_of = cache(lambda name: ported(CASES[name], old, new))
    assert first_caught(got_of) == stage
    caught = first_caught(got_of, ENDS)
    assert caught is None if stage == "k" else caught is not None  # a softmax does not notice b_K


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_right_block_passes_with_all_stages_and_with_each_alone(case):
    got = ported(case)
    gatedref.assert_matches(case, got, strict=True)


def test_a_clamp_that_differs_in_the_derivative_at_0_and_1_alone_fails_only_when_strict():
    old, new = "np.where(s < 0, 0.0, np.where(s > 1, 1.0, s))", "np.clip(s, 0, 1)"
    assert first_caught(lambda name: ported(CASES[name], old, new)) is None
    got = ported(CASES["gate_edges"], old, new)
    with pytest.raises(AssertionError, match=r"gate_edges: grads/W_gate_Q\["):
        gatedref.assert_matches(CASES["gate_edges"], got, strict=True)


def test_with_value_scale_the_cases_are_those_of_the_repaired_block():
    plain, scale = "V = W_V / np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24))", 2.5
    norm = "np.sqrt(np.maximum((W_V**2).sum(1) + b_V**2, 1e-24)); "
    repaired = f"norm = {norm} V, b_V = {scale} * W_V / norm[:, None], {scale} * b_V / norm"
    for case in gatedref.cases(value_scale=scale):
        arguments = zip(case[1:4], CASES[case.name][1:4])
        assert all(np.array_equal(a, b) for a, b in arguments if not isinstance(a, dict))
        gatedref.assert_matches(case, ported(case, plain, repaired), strict=True)
        with pytest.raises(AssertionError, match=f"^{case.name}: v"):
            gatedref.assert_matches(case, ported(case))


def torch_block(torch, case, dtype):
    leaf = lambda a: torch.tensor(a, dtype=dtype, requires_grad=True)
    leaves = {name: leaf(a) for name, a in {**case.params, "x": case.x}.items()}
    unit, zero, one = torch.nn.functional.normalize, *torch.eye(2, dtype=dtype)[0].flip(0)

    def linear(name, W):
        return (leaves["x"][:, None] @ W).transpose(1, 2) + leaves["b_" + name]

    got = {n.lower(): linear(n, leaves["W_" + n]) for n in ("gate_Q", "gate_K", "Q", "K")}
    got["v"] = linear("V", unit(leaves["W_V"], dim=1))
    got["gate_scores"] = s = torch.einsum("bqhg,bkhg->bhqk", got["gate_q"], got["gate_k"])
    scores = torch.einsum("bqhc,bkhc->bhqk", got["q"], got["k"]) / got["q"].shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    got["attn_scores"] = scores.masked_fill(future, -torch.inf)
    got["pattern"] = got["attn_scores"].softmax(-1)
    got["gate"] = torch.where(s < 0, zero, torch.where(s > 1, one, s))
    got["gated_pattern"] = got["gate"] * got["pattern"]
    got["z"] = torch.einsum("bhqk,bkhc->bqhc", got["gated_pattern"], got["v"])
    got["result"] = torch.einsum("bqhc,hcd->bqhd", got["z"], unit(leaves["W_O"], dim=2))
    got["attn_out"] = got["result"].sum(2)
    got["mse"] = torch.nn.functional.mse_loss(got["attn_out"], torch.tensor(case.target).to(dtype))
    power = lambda base, p: torch.where(base > 0, torch.where(base > 0, base, one) ** p, zero)
    got["penalty"] = power(power(got["gate"], 0.6).sum(1), 1 / 0.6).mean()
    got["loss"] = got["mse"] + case.alpha * got["penalty"]
    got["loss"].backward()
    return {**got, "grads": {name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_block_in_pytorch_passes(dtype):
    torch = pytest.importorskip("torch")
    for case in CASES.values():
        got = torch_block(torch, case, getattr(torch, dtype))
        gatedref.assert_matches(case, got, strict=True)


def test_a_block_in_jax_passes():
    jax = pytest.importorskip("jax")
    names = {"np": jax.numpy}
    exec(PORT, names)  # noqa: S102

    def block(inputs, target, alpha):
        got = names["port"](target=target, alpha=alpha, **inputs)
        return got["loss"], {name: got[name] for name in DENSE.expected if name != "grads"}

    gradient = jax.jit(jax.grad(block, has_aux=True))
    for i, name in enumerate(("large_scores", "tiny_norms", "gate_edges", "all_closed")):
        case = CASES[name]
        with jax.enable_x64(i % 2 == 0):  # few and in turn, as XLA takes seconds for each
            grads, got = gradient({**case.params, "x": case.x}, case.target, case.alpha)
            gatedref.assert_matches(case, {**got, "grads": grads}, strict=True)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_tolerance_is_64_eps_of_the_type_given_or_rtol(dtype):
    want, eps = DENSE.expected["attn_out"], float(np.finfo(dtype).eps)
    right, wrong = (want + n * eps * abs(want).max() * np.eye(5, 4) for n in (62, 66))
    gatedref.assert_matches(DENSE, {"attn_out": right.astype(dtype)})
    gatedref.assert_matches(DENSE, {"attn_out": wrong.astype(dtype)}, rtol=70 * eps)
    with pytest.raises(AssertionError, match=r"dense: attn_out\[\d, \d, \d\] is"):
        gatedref.assert_matches(DENSE, {"attn_out": wrong.astype(dtype)})


def test_a_zero_column_whose_gradient_is_huge_hides_no_other_gradient():
    grads = CASES["tiny_norms"].expected["grads"]
    assert abs(grads["W_V"]).max() > 1e9
    for name, g in grads.items():
        with pytest.raises(AssertionError, match=f"grads/{name}"):
            gatedref.assert_matches(CASES["tiny_norms"], {"grads": {name: 1.001 * g + 0.01}})


def test_masked_scores_may_be_anything_and_a_row_without_a_key_is_told():
    for filler in (-1e5, 0.0, -np.inf, np.nan):
        scores = np.where(np.tri(5) == 0, filler, DENSE.expected["attn_scores"])
        gatedref.assert_matches(DENSE, {"attn_scores": scores})
    for name, value in (("attn_scores", -np.inf), ("pattern", np.nan)):
        one, row = DENSE.expected[name].copy(), DENSE.expected[name].copy()
        one[1, 2, 3, 0] = row[1, 2, 0] = value
        with pytest.raises(ValueError, match=rf"{name} must be .* at \(1, 2, 3, 0\)$"):
            gatedref.assert_matches(DENSE, {name: one})
        with pytest.raises(ValueError, match=r"\(1, 2, 0, 0\): does the mask leave .* no key"):
            gatedref.assert_matches(DENSE, {name: row})


def test_the_message_says_what_where_and_what_else():
    got, want = ported(DENSE, "+ b_V", ""), DENSE.expected
    at = np.unravel_index(abs(got["v"] - want["v"]).argmax(), want["v"].shape)
    numbers = f"{got['v'][at]:.17g}, should be {want['v'][at]:.17g}, off by "
    grads = ", ".join(f"grads/{name}" for name in want["grads"] if name != "b_K")
    with pytest.raises(AssertionError) as caught:
        gatedref.assert_matches(DENSE, got)
    assert str(caught.value).startswith(f"dense: v{[int(i) for i in at]} is {numbers}")
    others = "z, result, attn_out, mse, loss"
    assert str(caught.value).endswith(f". These differ too: {others}, {grads}")


@pytest.mark.parametrize(
    "got",
    [None, {}, "loss", {"grads": {}}, {"grads": None}, {"los": 1.0}, {1: 1.0},
     {"grads": {"W": 1.0}}, {"grads": {"x": None}}, {"q": np.zeros((2, 5, 3))},
     *({"loss": w} for w in (None, "1", True, 1, 1j, math.nan, math.inf, [0.5], np.float16(1)))],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(got):
    with pytest.raises(ValueError, match=" must "):
        gatedref.assert_matches(DENSE, got)
    for rtol in (-1e-9, 1, math.nan, "1e-3", True):
        with pytest.raises(ValueError, match="rtol must be None or in"):
            gatedref.assert_matches(DENSE, DENSE.expected, rtol=rtol)
    for case, strict in ((None, False), (tuple(DENSE), False), (DENSE, "no")):
        with pytest.raises(TypeError, match="case must be a Case, strict a bool"):
            gatedref.assert_matches(case, DENSE.expected, strict=strict)


def test_the_cases_are_the_same_for_ever_and_no_rounding_flips_a_clamp_in_them():
    told = hashlib.sha256()
    for case in CASES.values():
        for array in (*case.params.values(), case.x, case.target, np.array(case.alpha)):
            assert (np.frexp(array)[0] * 2**8 % 1 == 0).all()
            told.update(array.astype("<f8").tobytes())
        gates = case.expected["gate_scores"]
        edges = np.minimum(abs(gates), abs(gates - 1))
        assert edges.min() >= 1 / 16 or case.name == "gate_edges" and (edges == 0).mean() > 0.2
    assert told.hexdigest()[:16] == "56bbb7a68716e3ad"
    scores = CASES["large_scores"].expected["attn_scores"]
    assert scores.max() > 900 and scores[np.isfinite(scores)].min() < -800


def test_the_command_writes_the_cases_and_says_which_results_match(tmp_path):
    def command(*arguments):
        program = [sys.executable, gatedref.__file__, *map(str, arguments)]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines(), done.stderr

    file, results = tmp_path / "cases.npz", tmp_path / "results.npz"
    assert command(file) == (0, [], "")
    written = dict(np.load(file))
    assert set(written) >= {f"{name}/{key}" for name in CASES for key in (*GATED, "x", "target")}
    assert all(written[f"{name}/alpha"] == case.alpha for name, case in CASES.items())
    got = {n.replace("expected/", ""): a for n, a in written.items() if "/expected/" in n}
    np.savez(results, **{n: a.astype(np.float32) for n, a in got.items()})
    assert command("check", results) == (0, [f"{name}: 28 arrays match" for name in CASES], "")
    assert command("check")[0] == 1 and not list(tmp_path.glob("check*"))
    np.savez(results, **got, **{"desne/z": got["dense/z"]})
    assert command("check", results)[0] == 1
    got["dense/z"] = got["dense/z"] + 1e-9
    np.savez(results, **{n: a for n, a in got.items() if not n.startswith("one_head/")})
    code, lines, _ = command("check", results)
    assert code == 1 and len(lines) == len(CASES) and lines[0] == "one_hot: 28 arrays match"
    assert lines[1].startswith("dense: z[") and lines[4].startswith("one_head: got must be a dict")
    assert command()[0] == 1 and "python gatedref.py CASES.npz writes" in command()[2]


# ---- train.py ------------------------------------------------------------------------------------


def every_row(rows):  # a batch that has each real row of a table once
    real = np.arange(rows["n_rows"].max()) < rows["n_rows"][:, None]
    return rows["counts"], real / rows["n_rows"].sum()


V = 8  # tokens, of three trigrams
TOKENS = gatedref.sample_skip_trigrams(3, 40)[0]
TOKENS[TOKENS == 5] = 4  # there is no token 5
ROWS, ONE_HOT = train.tabulate(TOKENS, V), np.eye(V)[TOKENS]
EVERY_ROW = every_row(ROWS)
REAL = EVERY_ROW[1] > 0
TOY = {name: 3 * array for name, array in gatedref.init_params(2, V, 1, 1).items()}
# Gates closed, between and open, and a zero column of W_V.
GATED_8 = {n: a + 0.5 * ("b_gate" in n) for n, a in randoms(GATED, 0, 0.8, D=V, G=2).items()}
GATED_8["W_V"][0, :, 0] = 0
FAR = {"b_Q": 1 + 0 * TOY["b_Q"], "W_K": 1000 * np.arange(16.0).reshape(2, V, 1)}
SHORT = {**train.RECIPE, "steps": 12, "batch": 5}
ROW = {"key": "2H3T", "variant": "a", "seed": np.int64(0), "fvu": 0.0123456789, "share": 0.9}
ROW |= {"holders_toy": [[[0], [2]], [[0, 1]], []], "holders_gated": [[[0]], [[1]], [[2]]]}
ROW |= {"accuracy_toy": [1.0, 1.0, 1.0], "accuracy_gated": [1.0, 1.0, 0.9]}
ROW |= {"apart": np.bool_(True), "shares_toy": np.array([[1 / 3, 2]])}
BY_TOKEN = TOKENS.argsort(axis=None, kind="stable")  # positions in the order of counts[REAL]


def benchmark(quick, seed):
    """Prints, for `train.py benchmark`, the milliseconds of a loss and gradient of a block on 1,000
    sequences: plain form, table form, and PyTorch where there is one, in turn, medians."""
    (tokens, _), repeats = gatedref.sample_skip_trigrams(5, 1000), range(2 if quick else 30)
    params = gatedref.init_params(12, 12, 4, seed, d_gate=2)
    x, rows = np.eye(12)[tokens], train.tabulate(tokens, 12)
    given = every_row(rows), 0 * rows["counts"], rows["pairs"], 0.1
    forms = {"plain form": lambda: gatedref.loss_and_grad(params, x, 0 * x, 0.1)}
    forms["table form"] = partial(grad(lambda p: train.gated_loss(p, *given)["loss"]), params)
    with contextlib.suppress(ImportError):
        import torch

        case = gatedref.Case("", params, x, 0 * x, 0.1, None, None)
        forms["PyTorch"] = lambda: torch_block(torch, case, torch.float64)
    times = [[timeit.timeit(form, number=1) for form in forms.values()] for _ in repeats]
    print("\n".join(train.table(forms, [[f"{1000 * t:.3g} ms" for t in np.median(times, axis=0)]])))


def test_rows_and_pairs_count_what_the_sequences_hold_and_a_batch_weighs_as_they_do():
    rows, pairs = Counter(), Counter()
    for sequence in TOKENS.tolist():
        pairs.update(itertools.product(sequence, sequence))  # the gate has no mask
        for t, query in enumerate(sequence):
            rows[(query, *(sequence[: t + 1].count(token) for token in range(V)))] += 1
    tuples = lambda counts, of: [(q, *counts[q, i]) for q, i in np.argwhere(of)]
    assert Counter(tuples(ROWS["counts"], REAL)) == rows
    assert_close(ROWS["pairs"], table((V, V), lambda *pair: pairs[pair] / TOKENS.size / 11), 14)
    assert ROWS["n_rows"][5] == 0 and (ROWS["counts"].sum(axis=2) > 0).all()  # each sees a key
    counts, weight = train.draw(ROWS, 2000, np.random.default_rng(0))
    drawn = tuples(counts, np.arange(V)[:, None] + np.zeros(2000) != 5)
    assert len(drawn) == 7 * 2000 and set(drawn) == set(rows)
    assert_close(weight, np.outer(ROWS["n_rows"], np.ones(2000)) / TOKENS.size / 2000, 14)


@pytest.mark.parametrize("options", [*OPTIONS, {"p": 0.4}, {"p": 2.0, "activation": anp.square}])
def test_the_table_form_equals_the_reference_in_loss_and_gradient_to_10_digits(options):
    (out, gate), plain = train.table_attention(TOY, EVERY_ROW[0]), gatedref.attention(TOY, ONE_HOT)
    assert gate is None
    assert_close(out[REAL], plain["attn_out"].reshape(-1, V)[BY_TOKEN], 14)
    table_loss = lambda p: train.gated_loss(p, EVERY_ROW, out, ROWS["pairs"], 0.3, **options)
    scalars, gradient = gatedref.loss_and_grad(GATED_8, ONE_HOT, plain["attn_out"], 0.3, **options)
    assert table_loss(GATED_8) == pytest.approx(scalars, rel=1e-12)
    found = grad(lambda params: table_loss(params)["loss"])(GATED_8)
    for of in (found, gradient):
        of["W_V"][0, :, 0] /= 1e12  # else this column's gradient hides the others
    assert_close(found, gradient, 10)


def test_a_toy_learns_on_the_cross_entropy_of_the_next_token_the_last_position_left_out(
    monkeypatch,
):
    monkeypatch.setattr(train, "fit", lambda *given, note: (given, note))
    objective, layers, _ = train.train_toy(2, 3, 4, {"batch": 9}, n_layers=2)
    assert (layers[0]["W_Q"] != layers[1]["W_Q"]).any() and layers[0]["W_Q"].shape == (2, 8, 1)
    pool, _ = gatedref.sample_skip_trigrams(3, 5000, seed=4)
    batch = pool[np.random.default_rng([4, 2]).integers(5000, size=9)]
    odds = np.exp(gatedref.transformer(layers, batch)["logits"][:, :-1])
    right = np.take_along_axis(odds, batch[:, 1:, None], axis=2)[..., 0]
    expected = -np.log(right / odds.sum(axis=2)).mean()
    assert objective(layers)["loss"] == pytest.approx(expected, rel=1e-13)
    logits, answers = np.array([[1000.0, 1000, -1000], [800, 0, 0]]), np.eye(3)[[1, 2]]
    found = train.surprise(logits, answers)  # without overflow
    assert found == pytest.approx((np.log(2) + 800) / 2, rel=1e-14)


def test_scores_may_be_of_any_size_yet_not_more_than_700_apart():
    block = TOY | {n: 0 * TOY[n] for n in ("W_Q", "b_K")} | {"b_Q": np.ones((2, 1))}
    for lowest, highest in ((0, 690), (2000, 2690), (-2000, -2690), (800, 0)):
        block["W_K"] = 0 * TOY["W_K"] + np.linspace(lowest, highest, V)[:, None]
        if lowest != 800:  # where BOS, which each row sees, is 800 below the others
            plain = gatedref.attention(block, ONE_HOT)["attn_out"].reshape(-1, V)
            found = train.table_attention(block, EVERY_ROW[0])[0][REAL]
            assert_close(found, plain[BY_TOKEN], 11)
    with pytest.raises(FloatingPointError, match="attention scores are more than 700 apart"):
        train.table_attention(block, EVERY_ROW[0])


def test_a_stuck_gate_gets_a_gradient_only_where_a_step_downhill_leads_back():
    scores = np.array([-1.0, 0.0, 0.3, 1.0, 2.0])
    assert train.reopening(scores).tolist() == gatedref.ACTIVATIONS["clamp"](scores).tolist()
    slopes = [elementwise_grad(lambda s, c=c: c * train.reopening(s))(scores) for c in (0.2, -0.3)]
    assert (slopes == np.array([[0, 0.2, 0.2, 0.2, 0.2], [-0.3, -0.3, -0.3, -0.3, 0]])).all()


def test_training_goes_by_legs_each_with_its_rate_and_adam_anew_and_heads_take_over_between():
    def objective(params):  # of constant slope: a fresh Adam's steps are the rate
        return {"loss": (1 if len(seen) < 50 else -7) * params["x"], "step": seen.append(0) or 3.0}

    recipe, seen = {"steps": 200, "rate": 0.1, "legs": (1.0, 1.0, 0.3, 0.1)}, []
    places, told = [], []
    take_over = lambda params: places.append(params["x"]) or {"x": params["x"] + 100}
    found, curves = train.fit(objective, {"x": 1.0}, recipe, between=take_over, note=told.append)
    assert [*places, found["x"]] == pytest.approx([-4, 101, 202.5, 303])
    seen.clear()
    assert train.fit(objective, {"x": 1.0}, recipe)[0]["x"] == pytest.approx(3)
    assert len(curves) == 200 and curves[0] == {"loss": 1, "step": 3}
    assert told == [step / 200 for step in range(0, 200, 2)]


def heads(gates, W_O=None):
    """Four heads and tokens, gates {(head, query, key): gate}. With W_O they all attend alike."""
    params = randoms(GATED, 0, 1, H=4, D=4, K=2, G=4)
    if W_O is not None:
        params |= {"W_Q": 0 * params["W_Q"], "b_Q": 0 * params["b_Q"], "W_O": W_O}
    params["W_O"][:, 1] = params["W_O"][:, 0]
    params |= {n: 0 * params[n] for n in ("W_V", *gatedref.GATE)} | {"b_V": np.full((4, 2), 0.05)}
    for (head, query, key), gate in gates.items():
        params["W_gate_Q"][head, query, key], params["W_gate_K"][head, key, key] = gate, 1
    return params


def survey(params):  # as if each context had each token once
    weights, gate, v, W_O = train.tables(params, value_scale=2.0)
    pattern = np.moveaxis(weights / weights.sum(axis=1, keepdims=True), 2, 0)
    return gate, pattern, np.einsum("hqv,vhk,hkd->hqvd", gate * pattern, v, W_O)


def after_takeover(before, often=()):
    pairs, given = np.full((4, 4), 1 / 16), {name: array.copy() for name, array in before.items()}
    for pair, times in dict(often).items():
        pairs[pair] *= times
    after = train.take_over(given, survey, pairs, 0.6, 4.0)  # 2 columns of value_scale 2
    assert all((given[n] == before[n]).all() and np.isfinite(after[n]).all() for n in before)
    gate = survey(after)[0]
    return after, {tuple(map(int, at)): gate[tuple(at)] for at in np.argwhere(gate > 1e-9)}


OWN, SPARE = {(0, 1, 0): 0.8, (1, 3, 1): 0.7}, {(2, 0, 3): 0.9}  # each its head's alone
SHARED, TOO = {(0, 2, 0): 0.5, (1, 2, 0): 0.3}, {(0, 0, 2): 0.3, (1, 0, 2): 0.2}
USED, BOTH, WIDE = OWN | SPARE, SHARED | TOO, {(0, 2, 0): 0.6, (1, 2, 0): 0.41}
TAKEN, DOES, RARE = {(3, 2, 0): 0.8}, {(3, 3, 3): 0.4}, {(2, 0): 0.1}


def test_the_head_that_costs_least_takes_over_the_pair_whose_sharing_costs_most():
    for gates, often, then in [
        (USED | SHARED, {}, USED | TAKEN),
        (USED | BOTH, {}, USED | TOO | TAKEN),  # the pair that costs more
        (USED | {(0, 2, 0): 0.1, (1, 2, 0): 0.1}, {}, USED | {(3, 2, 0): 0.2}),  # however little
        (USED | BOTH, RARE, USED | SHARED | {(3, 0, 2): 0.5}),  # unless it is rare
        (USED | DOES | SHARED, {(0, 3): 0.01}, OWN | DOES | {(2, 2, 0): 0.8}),  # 2 costs less
        (OWN | BOTH, {}, OWN | {(2, 2, 0): 0.8, (3, 0, 2): 0.5}),  # two spare heads
        (USED | DOES | SHARED, RARE, USED | DOES | SHARED),  # less is saved than head 3 costs
        (USED | WIDE, {}, USED | WIDE),  # no gate of 1 writes so much
        (USED, {}, USED),
    ]:
        assert after_takeover(heads(gates, np.ones((4, 2, 4))), often)[1] == pytest.approx(then)


def test_a_head_that_takes_over_writes_what_all_wrote_there_and_nothing_else_changes():
    before = heads(OWN | SPARE | SHARED)
    after, gates = after_takeover(before)
    (_, pattern, each), (_, _, now) = survey(before), survey(after)
    written = each.sum(axis=0)
    leader, together = np.linalg.norm(each[:, 2, 0], axis=1).argmax(), np.linalg.norm(written[2, 0])
    width = together / pattern[leader, 2, 0] / 4
    assert gates == pytest.approx(OWN | SPARE | {(3, 2, 0): width})
    off = np.linalg.norm(now.sum(axis=0) - written, axis=-1)
    assert off[2, 0] < 0.01 * together and np.delete(off, 8).max() < 1e-12  # a trace of the old
    assert all((after[name][:3] == before[name][:3]).all() for name in UNGATED)
    assert all((after[n][3] == before[n][leader]).all() for n in ("W_Q", "W_K", "b_Q", "b_K"))
    np.testing.assert_allclose(after["W_V"][3], np.eye(4)[:, [0, 0]])
    np.testing.assert_allclose(after["b_V"][3], 0.005)
    np.testing.assert_allclose(np.linalg.norm(after["W_O"][3], axis=1), 1)
    opposite = np.repeat([1.0, -1, 1, 1], 8).reshape(4, 2, 4)  # two heads that cancel: no harm
    after_takeover(heads({**OWN, (0, 2, 0): 0.5, (1, 2, 0): 0.5}, opposite))


def test_gates_close_at_one_pair_by_the_least_change_and_open_at_one_alone():
    scores = lambda params: gatedref.gated_attention(params, np.eye(4)[None])["gate_scores"][0]
    before, after = randoms(GATED, 3, D=4), randoms(GATED, 3, D=4)
    train.close_gates(after, 1, 2)
    was, key = scores(before)[:, 1, 2], before["W_gate_K"][:, 2] + before["b_gate_K"]
    least = np.maximum(was, 0)[:, None] * key / (key * key).sum(axis=1, keepdims=True)
    assert (was > 0).any() and (was < 0).any()
    before["W_gate_Q"][:, 1] -= least
    assert_close(after, before, 14)
    for d_gate, elsewhere in ((1, 0), (2, -0.01), (3, -0.02)):
        before, after = randoms(GATED, H=2, D=4, G=d_gate), randoms(GATED, H=2, D=4, G=d_gate)
        train.open_gate(after, 1, 3, 2, 0.25)
        expected = np.where(np.arange(16).reshape(4, 4) == 14, 0.25, elsewhere)
        np.testing.assert_allclose(scores(after)[1], expected, atol=1e-15)
        assert all((after[name][0] == before[name][0]).all() for name in GATED)


@pytest.mark.parametrize("value_scale", [2.0, None])
def test_it_learns_on_the_loss_over_the_variance_of_the_target(value_scale, monkeypatch):
    """On one sequence of different tokens each batch is the whole, and so is what is surveyed."""
    tokens, seen = [[7, 0, 3, 2, 6, 1, 4, 5]], []
    monkeypatch.setattr(train, "take_over", lambda params, **had: seen.append(had) or params)
    recipe = {**SHORT, "alpha": 8.0, "d_head": 3, "value_scale": value_scale}
    _, options, curves = train.take_apart(TOY, tokens, seed=5, recipe=recipe)
    x, start = np.eye(V)[tokens], gatedref.init_params(6, V, 3, 5, d_gate=2)
    target = gatedref.attention(TOY, x)["attn_out"]
    variance, scale = target.var(axis=(0, 1)).mean(), options["value_scale"]
    assert scale == (value_scale and pytest.approx(2 * abs(target).max()))
    loss = gatedref.loss(start, x, target, 8 * variance, value_scale=scale)
    expected = {name: loss[name] / (1 if name == "penalty" else variance) for name in loss}
    assert curves[0] == pytest.approx(expected) and len(curves) == 12 and len(seen) == 4
    assert (seen[0]["p"], seen[0]["gain"]) == (0.6, pytest.approx(3 * (scale or 1)))
    np.testing.assert_allclose(seen[0]["pairs"], 1 / 64)
    block, order = gatedref.gated_attention(start, x, value_scale=scale), np.argsort(tokens[0])
    gate, pattern, written = seen[0]["survey"](start)
    assert_close(gate, block["gate"][0][:, order][:, :, order], 13)
    assert_close(pattern, block["pattern"][0][:, order][:, :, order], 13)
    assert_close(written.sum(axis=2), np.swapaxes(block["result"][0], 0, 1)[:, order], 13)


def test_a_seed_makes_the_same_block_again_and_the_options_run_it():
    toy = {name: array.astype(np.float32) for name, array in TOY.items()}
    odd = {**toy, "W_V": toy["W_V"] + 1e4 * (np.arange(V) == 5)[:, None]}  # it never occurs
    runs = {"seed": 0}, {"block": odd}, {"seed": 1}, {"recipe": {**SHORT, "reopen": False}}
    made = [train.take_apart(tokens=TOKENS, **{"block": toy, "recipe": SHORT} | r)[0] for r in runs]
    for name in GATED:
        assert (made[0][name] == made[1][name]).all() and made[0][name].dtype == float
        assert all((made[0][name] != other[name]).any() for other in made[2:])
    params, options, _ = train.take_apart(TOY, TOKENS, recipe={**SHORT, "value_scale": None})
    assert np.isfinite(gatedref.gated_attention(params, ONE_HOT, **options)["attn_out"]).all()


def test_what_cannot_be_taken_apart_is_refused():
    for error, message, changes in [
        (ValueError, "unknown .*W_gate_Q", {"block": GATED_8}),
        (ValueError, "must put out something", {"block": {**TOY, "W_V": 0 * TOY["W_V"]}}),
        (ValueError, r"tokens must be in \[0, 8\)", {"tokens": TOKENS + 1}),
        (ValueError, "negative", {"seed": -1}),
        (ValueError, "recipe must have the keys", {"recipe": {**SHORT, "rat": 3}}),
        (ValueError, "alpha must be >= 0", {"recipe": {**SHORT, "alpha": -1}}),
        (FloatingPointError, "more than 700 apart", {"block": {**TOY, **FAR}}),
        (FloatingPointError, "became nan at step 1$", {"recipe": {**SHORT, "rate": 1e300}}),
    ]:
        with pytest.raises(error, match=message):
            train.take_apart(**{"block": TOY, "tokens": TOKENS, "recipe": SHORT, **changes})


def test_a_toy_learns_its_trigrams_and_two_handmade_heads_come_apart():
    (toy,) = train.train_toy(2, 2, 0, {**train.TOY, "steps": 400})
    assert min(train.measure([toy], 2, 3, 1000)["accuracy"]) > 0.99
    block, (tokens, _) = gatedref.handmade_superposition(3), gatedref.sample_skip_trigrams(3, 1000)
    recipe = {**train.RECIPE, "steps": 350, "batch": 15, "rate": 0.03, "alpha": 1.0}
    params, options, _ = train.take_apart(block, tokens, seed=3, recipe=recipe)
    found = train.measure([params], 3, 1, 2000, **options)
    assert train.is_apart(found["accuracy"], found["holders"])
    assert np.max(found["shares"], axis=1).mean() > 0.9
    assert train.unexplained(block, params, 3, 2, 1000, **options)[0] < 0.02


def test_what_is_measured_is_what_each_trigram_does_where_it_is_completed():
    toy = train.published("2H3T", "toy")
    layers = [toy | {"W_O": toy["W_O"] / c} for c in (2, 50)]  # so that it is often wrong
    tokens, completes = gatedref.sample_skip_trigrams(3, 9000, seed=7)
    model, single = gatedref.transformer(layers, tokens), completes.sum(axis=1) == 1
    result = np.concatenate([block["result"] for block in model["blocks"]], axis=2)
    for i, accuracy, holders, shares in zip((1, 2, 3), *train.measure(layers, 3, 7, 9000).values()):
        mine = completes & single[:, None] & (tokens == i)
        norms = np.linalg.norm(result[mine], axis=2)
        assert_close(shares, (norms / norms.sum(axis=1)[:, None]).mean(axis=0), 13)
        assert holders == gatedref.holders(result[mine][:1000], np.full(len(norms[:1000]), i + 3))
        mine[:, 10] = False  # the last position
        right = model["logits"][mine].argmax(axis=1) == i + 3
        assert 0.3 < accuracy == right.mean() < 1


def test_apart_is_right_on_each_trigram_with_a_head_of_its_own_for_each():
    a, b, c, both = [(0,)], [(1,)], [(0,), (1,)], [(0, 1)]
    for holders in ([a, b], [c, a], [a, c], [c, c], [c, a, [(0,), (2,)]]):
        assert train.is_apart([1.0, 0.991, 1.0], holders)
        assert not train.is_apart([1.0, 0.99, 1.0], holders)
    for holders in ([a, a], [a, both], [a, []], [c, c, c]):
        assert not train.is_apart([1.0, 1.0], holders)


def test_a_run_judges_the_authors_block_as_they_did():
    variants, seen = {train.AUTHORS: None, "short": {"d_head": 2}}, []
    note = lambda phase, start, size, done: seen.append((phase, start + size * done))
    row, other = train.run_setting("2H3T", 0, {"steps": 20}, note, variants, theirs=True)
    assert row["apart"] and (row["n_gated_heads"], other["n_gated_heads"]) == (4, 6)
    assert row["holders_gated"] == [[(1,)], [(0,)], [(3,)]]
    assert row["holders_toy"] == [[(1,)], [(0, 1)], [(0,)]]
    assert [row["fvu"], row["penalty"]] == pytest.approx([0.328, 0.0155], rel=0.03)
    assert row["share"] == pytest.approx(np.mean([max(heads) for heads in row["shares_gated"]]))
    assert other["blocks"]["gated/W_Q"].shape == (6, 8, 2) and other["variant"] == "short"
    assert (seen[0], max(seen)[1]) == (("search", 2 / 3), pytest.approx(0.95 / 3 + 2 / 3))


def test_a_toy_is_drawn_again_until_it_is_right_and_a_trigram_is_distributed(monkeypatch):
    a, b, both, told = [(0,)], [(1,)], [(0, 1)], []
    found = [([1.0, 0.99], [a, both]), ([1.0, 1.0], [a, b]), ([1.0, 0.999], [both, a])]
    found = [{"accuracy": right, "holders": held, "shares": []} for right, held in found]
    monkeypatch.setattr(train, "measure", lambda *_, **__: found.pop(0))
    monkeypatch.setattr(train, "train_toy", lambda *_, note, **__: [note(0.5) or TOY])
    note = lambda phase, start, size, done: told.append((phase, start + size * done))
    assert train.run_setting("2H3T", 0, {}, note, {}) == [] and not found
    assert told == [("toy", 0.25), *(("redrawing the toy", done) for done in (0.625, 0.8125))]


# ---- What the method cannot do -----------------------------------------------------------------


def copying_block(*heads):  # of each head, for each column: the number it copies; for which queries
    params = gatedref.init_params(len(heads), 7, len(heads[0][0]), d_gate=1)
    params = {name: np.zeros_like(array) for name, array in params.items()}
    for head, (numbers, queries) in enumerate(heads):
        for column, number in enumerate(numbers):
            params["W_V"][head, 4 + number, column] = params["W_O"][head, column, 4 + number] = 1
        params["W_gate_Q"][head, queries] = params["W_gate_K"][head, 3] = 1
    return params


OVERLAP = copying_block(([0], [0, 2]), ([1], [0, 1]), ([2], [1, 2]))
DISJOINT = copying_block(([0], 0), ([1], 0), ([1], 1), ([2], 1), ([2], 2), ([0], 2))
SINGLE = copying_block(([0, 1], 0), ([1, 2], 1), ([2, 0], 2))


def test_three_heads_that_overlap_cost_what_six_that_do_not_cost():
    """A proof that the penalty prefers neither heads that serve two queries nor heads of one."""
    x, target = train.sample_copies(50, np.random.default_rng(0))
    narrow, disjoint, wide = (gatedref.loss(b, x, target, 0.1) for b in (OVERLAP, DISJOINT, SINGLE))
    assert max(each["mse"] for each in (narrow, disjoint, wide)) < 1e-30
    assert narrow == pytest.approx(disjoint, rel=0, abs=1e-15)
    assert narrow["penalty"] / 2 ** (1 / 0.6) == pytest.approx(3 / 16) == wide["penalty"]


def test_how_heads_share_tasks_is_read_off_their_gates():
    _, variants, judge = train.overlapping(0, {})
    (shared,), (several,), (one,) = (judge(block) for block in (OVERLAP, DISJOINT, SINGLE))
    assert (shared, several, one) == ("shared", "several a task", "one a task")
    assert judge({**SINGLE, "W_gate_K": 0.8 * SINGLE["W_gate_K"]}) == ["wrong"]
    for loss, start, alpha, _ in variants.values():
        fvu, penalty = loss(SINGLE, 2000)
        assert fvu < 1e-28 and penalty == pytest.approx(3 / 16) and alpha == 0.1
        assert not any(start[name].any() for name in ("W_Q", "W_K", "b_Q", "b_K"))


def test_a_wide_head_takes_over_what_two_wrote_together():
    _, start, _, take_over = train.overlapping(0, {})[1]["width 2, takeovers"]
    block = {name: 0 * array for name, array in start.items()}
    for head, number in ((0, 4), (1, 5)):  # which share all tasks; the others are closed
        block["W_V"][head, number, 0] = block["W_O"][head, 0, number] = 1
    block["W_gate_Q"][:2, :3] = block["W_gate_K"][:2, 3] = 0.9
    after, (x, _) = take_over(block), train.sample_copies(20, np.random.default_rng(0))
    was, now = (gatedref.gated_attention(params, x)["attn_out"] for params in (block, after))
    assert_close(now, was, 12)
    opened = gatedref.gated_attention(after, np.eye(7)[None])["gate"][0, :, :3, 3] > 1e-9
    assert (opened.sum(axis=0) == 1).all() and opened.sum(axis=1).max() == 1  # one head a task


def test_layers_are_charged_by_themselves_or_as_one_block(monkeypatch):
    a, b, both, right = [(0,)], [(1,)], [(0, 1)], [1.0, 1.0]
    found = [([1.0, 0.99], [a, both], 2), (right, [a, a], 2), (right, [a, b], 2)]
    found += [(right, [a, [*b, *both]], 2), (right, [a, both], 2)]  # and then of gated blocks:
    found += [(right, [a, [(0, 4), (1, 2)]], 6), (right, [[(0, 3), (4, 1)]], 6)]
    measured = iter([{"accuracy": r, "holders": h, "shares": [[1] * n]} for r, h, n in found])
    monkeypatch.setattr(train, "measure", lambda *_, **__: next(measured))
    monkeypatch.setattr(train, "train_toy", lambda *_, n_layers: n_layers * [TOY])
    monkeypatch.setattr(gatedref, "sample_skip_trigrams", lambda *_, **__: (TOKENS[:1], None))
    kinds, variants, judge = train.across_layers(0, {})  # drawn again until it is across
    assert kinds == ["wrong", "within one", "apart", "apart", "across"]
    assert judge([]) == ["within one"] and judge([]) == ["across"]
    theirs = gatedref.transformer([TOY, TOY], TOKENS[:1])["blocks"]
    both = theirs[0]["attn_out"] + theirs[1]["attn_out"]
    scale = 2 * max(abs(block["attn_out"]).max() for block in theirs)
    for name, (loss, layers, _, _) in variants.items():
        ours = gatedref.transformer(layers, TOKENS[:1], value_scale=scale)["blocks"]
        gates = [block["gate"] for block in ours]
        if name == "a penalty for each layer":
            mse = sum(((a["attn_out"] - b["attn_out"]) ** 2).mean() for a, b in zip(ours, theirs))
            penalty = sum(map(gatedref.lp_penalty, gates))
        else:
            mse = ((sum(block["attn_out"] for block in ours) - both) ** 2).mean()
            penalty = gatedref.lp_penalty(np.concatenate(gates, axis=1))
        assert loss(layers, 3) == pytest.approx((mse / both.var(axis=(0, 1)).mean(), penalty))


def test_two_signals_of_four_stand_among_noise():
    x, answers = train.sample_pairs(5000, np.random.default_rng(7))
    tokens = x.argmax(axis=2)
    assert (tokens[:, -1] == 0).all() and (tokens[:, :-1] > 0).all() and tokens.max() == 11
    signals = np.sort(np.where(tokens < 5, tokens, 0), axis=1)[:, -2:]
    np.testing.assert_array_equal(signals, train.PAIRS[answers])
    assert (np.bincount(answers, minlength=10) > 400).all() and (x.sum(axis=2) == 1).all()


def test_sources_are_charged_for_pairs_or_for_what_a_head_does_for_a_query(monkeypatch):
    trained = []
    monkeypatch.setattr(train, "fit", lambda *given: trained.append(given) or (given[1], None))
    kinds, variants, judge = train.different_sources(0, {"steps": 2})
    x, answers = train.sample_pairs(5000, np.random.default_rng([0, 6]))
    monkeypatch.setattr(train, "sample_pairs", lambda *_: (x, answers))
    (objective, toy, recipe), targets = trained[0], np.eye(10)[answers]
    target = gatedref.attention(toy, x)["attn_out"][:, -1]
    assert recipe["steps"] == 2 and set(kinds) <= {"wrong", "one head", "two", "three or more"}
    assert objective(toy)["loss"] == pytest.approx(train.surprise(target[:, 12:], targets))
    for name, (loss, start, _, _) in variants.items():
        block = gatedref.gated_attention(start, x, value_scale=2 * abs(target).max())
        fvu = ((block["attn_out"][:, -1] - target) ** 2).mean() / target.var(axis=0).mean()
        gate = block["gate"]
        if name == "penalty by query":
            gate = gate.mean(axis=3, keepdims=True) + 0 * gate
        assert loss(start, 3) == pytest.approx((fvu, gatedref.lp_penalty(gate)))
    result = np.zeros((5000, 6, 3, 22))
    result[np.arange(5000), -1, 0, 12 + answers] = 2
    monkeypatch.setattr(gatedref, "gated_attention", lambda *_, **__: {"result": result})
    assert judge({}) == ["one head"] * 10
    result[answers == 0, -1, 1, 12 + 9] = 3  # says 9 where 0 is right
    assert judge({}) == ["wrong"] + ["one head"] * 9
    result[answers == 0, -1, 2, 12] = 2  # with head 0 it outweighs head 1
    assert judge({}) == ["two"] + ["one head"] * 9


def test_a_limit_trains_each_variant_and_counts_what_comes_out():
    told, steps = [], {"steps": 10}
    rows = train.run_limit("overlap", 3, steps, lambda _, a, b, done: told.append(a + b * done))
    assert [row["variant"] for row in rows] == ["width 1", "width 2", "width 2, takeovers"]
    assert all(row["kinds"] == ["wrong"] and row["loss"] > row["unexplained"] for row in rows)
    assert told[:: len(told) // 3] == pytest.approx([0, 1 / 3, 2 / 3]) and max(told) < 1
    toy = {"key": "overlap", "seed": 0, "variant": "toy", "kinds": ["shared", "wrong"]}
    lines = train.table_limit([toy, *rows, {**rows[0], "kinds": ["shared"], "loss": 9.0}])
    assert lines[0] == "| variant | shared | several a task | one a task | unexplained | loss |"
    assert lines[2] == "| toy | 1 | 0 | 0 |  |  |" and len(lines) == 6
    assert lines[3].endswith(f"| {(rows[0]['loss'] + 9) / 2:.4f} |")


# ---- The command -------------------------------------------------------------------------------


def test_rows_are_kept_with_six_digits_and_files_are_written_whole_or_not_at_all(tmp_path):
    for name, rows in (("main", [{"key": "old"}]), ("sweep", [ROW]), ("main", [ROW, ROW])):
        train.save(tmp_path, {name: rows})
    train.save(tmp_path, {})
    kept, path = {**ROW, "fvu": 0.0123457, "shares_toy": [[0.333333, 2]]}, tmp_path / "results.json"
    assert list(train.load(tmp_path).items()) == [("main", [kept, kept]), ("sweep", [kept])]
    text = path.read_text()
    assert [line[:6] for line in text.splitlines()] == ['{"main', *3 * ['{"key"']]
    with pytest.raises(ZeroDivisionError):
        train.write(path, lambda file: file.write(b"half") / 0)
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_pages_have_the_tables_of_the_results_and_nothing_else_of_them_changes():
    rows = [ROW, {**ROW, "apart": False, "share": 0.5, "fvu": 0.5}, {**ROW, "variant": "b"}]
    (*_, one), (*_, a, b) = tables = train.table_main([ROW]), train.table_rates(rows)
    assert one == "| 2H3T | 0 or 2, 0+1, none | 0, 1, wrong | 1 of 1 | 0.90 | 0.0123 |"
    assert a == "| 2H3T | a | 1 of 2 | 0.70 | 0.2562 (most 0.5000) |"
    assert b == "| 2H3T | b | 1 of 1 | 0.90 | 0.0123 |"
    part = lambda name, lines: f"x\n<!-- table: {name} -->\n{lines}\n<!-- end -->\n"
    page = lambda main, sweep: part("sweep", sweep) + part("price", "y") + part("main", main)
    results, expected = {"main": [ROW], "sweep": rows}, page(*map("\n".join, tables))
    assert train.rewritten(page("old", ""), results) == expected
    assert train.rewritten(expected, results) == expected
    for path in (Path(train.__file__).parent / "README.md", train.FIGURES / "README.md"):
        if path.exists() and "<!-- table:" in path.read_text():  # the real ones
            text, results = path.read_text(), train.load(train.FIGURES)
            assert train.rewritten(text, results) == text


@pytest.mark.parametrize("results", ["{", "[1]", "3"])
def test_a_bad_command_ends_with_one_line_and_status_2(results, tmp_path, capsys):
    (tmp_path / "results.json").write_text(results)
    for command, message in [
        ("nonsense", "unknown experiment 'nonsense'"),
        ("--fast", "unrecognized arguments: --fast"),
        ("--seed -1", "--seed must be >= 0"),
        ("--out {}/results.json/below", "cannot use --out"),
        ("main", "cannot use --out"),
    ]:
        with pytest.raises(SystemExit) as stop:
            train.main(["--out", *f"{{}} {command}".format(tmp_path, tmp_path).split()])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert said.startswith("train.py: ") and message in said


def test_what_ends_a_run_is_told_and_what_was_finished_is_kept(tmp_path, monkeypatch, capsys):
    def run(key, seed, steps, note, error):
        raise error

    monkeypatch.setitem(train.EXPERIMENTS, "main", lambda _: [ROW])
    monkeypatch.setattr(train, "PICTURES", {})
    diverged = FloatingPointError("a"), 1, "4H5T, seed 3: a"
    for error, status, said in ((KeyboardInterrupt(), 130, "interrupted"), diverged):
        each = partial(train.run_each, run, ["4H5T"], 2, None, error=error)
        monkeypatch.setitem(train.EXPERIMENTS, "sweep", each)
        assert train.main(["sweep", "--seed", "3", "--out", str(tmp_path)]) == status
        assert capsys.readouterr().err == f"train.py: {said}\n" and not train.load(tmp_path)
    assert train.main(["main", "sweep", "--out", str(tmp_path)]) == 1
    assert list(train.load(tmp_path)) == ["main"]


def test_a_quick_run_says_so_and_writes_every_file(tmp_path):
    command = [sys.executable, train.__file__, "--quick", "--seed", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("A smoke run")
    names, rows = {path.name for path in tmp_path.iterdir()}, train.load(tmp_path)["main"]
    pictures = "before_after.png", "gates.png", "penalty.png"
    assert names == {"results.json", "blocks.npz", *pictures}
    assert [(row["key"], row["seed"]) for row in rows] == [(key, 3) for key in train.SETTINGS]
    assert "\n".join(train.table_main(rows)) in done.stdout
    arrays = np.load(tmp_path / "blocks.npz")
    gated = {name: arrays[f"3H4T/gated/{name}"] for name in GATED}
    scale = float(arrays["3H4T/gated/value_scale"])
    gate = gatedref.gated_attention(gated, np.eye(10)[None], value_scale=scale)["gate"][0]
    assert_close(rows[1]["gates"], gate[..., [0, 9]], 5)
