"""What gatedref computes, in statements: what equals what, and to how many digits.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import hashlib
import importlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import elementwise_grad, grad, grad_and_aux
from autograd.tracer import getval

import gatedref
import train
from figures import before_after, common, layers, overlap, sources, wild
from gatedref import BLOCK, GATED_BLOCK

# Matplotlib 3.9 calls pyparsing by names that the newest pyparsing deprecates.
pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore::DeprecationWarning:matplotlib",
    "ignore::DeprecationWarning:pyparsing",
)

# ---- Helpers -------------------------------------------------------------------------

# No two sizes are alike, so that no axis passes for another.
SIZES = {"B": 2, "T": 3, "H": 4, "D": 5, "K": 6, "G": 7, "S": 8, "V": 9}
SMALL = {"B": 2, "T": 3, "H": 2, "D": 3, "K": 2, "G": 2}
NAN, INF = float("nan"), float("inf")


def normal(axes, seed=0, sizes=SIZES):
    """An array of normal numbers with these axes, such as "BTD"."""
    shape = [sizes[axis] for axis in axes]
    return np.random.default_rng(seed).normal(size=shape)


def normal_params(names=GATED_BLOCK, seed=0, sizes=SIZES, scale=0.3):
    """Parameters of a block: normal numbers times a scale."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, axes in names.items():
        params[name] = scale * normal(axes, rng, sizes)
    return params


def as_type(arrays, dtype):
    return {name: np.asarray(array, dtype) for name, array in arrays.items()}


def digest(arrays):
    """A fingerprint of the bits of some arrays."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(array.tobytes())
    return hashed.hexdigest()[:16]


def published(model):
    """The parameters of one of the authors' models, such as "4H5T/toy"."""
    file = Path(gatedref.__file__).parent / "figures" / "published.npz"
    names = GATED_BLOCK if "gated" in model else BLOCK
    with np.load(file) as arrays:
        return {name: arrays[f"{model}/{name}"] for name in names}


def assert_close(actual, expected, digits):
    """Equal to so many digits of the largest entry; infinite at the same places."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    finite = expected[np.isfinite(expected)]
    allowed = np.abs(finite).max() / 10**digits
    np.testing.assert_allclose(actual, expected, rtol=0, atol=allowed)


def assert_all_close(actual, expected, digits):
    """Equal to so many digits of the largest entry of all the arrays in two dicts."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert np.shape(actual[name]) == np.shape(expected[name])
    assert_close(in_one(actual), in_one(expected), digits)


def in_one(arrays):
    """All the numbers of a dict of arrays, one after another, sorted by name."""
    return np.concatenate([np.ravel(arrays[name]) for name in sorted(arrays)])


# ---- The oracle: each formula as the sum that it is ----------------------------------
#
# `for b, t in np.ndindex(B, T)` stands for a loop over b in a loop over t.


def naive_block(params, x, activation=None):
    """All stages of `attention`; of `gated_attention` where an activation is given."""
    if activation is not None:
        params = {**params, **naive_normalised(params)}
    q = naive_linear(x, params["W_Q"], params["b_Q"])
    k = naive_linear(x, params["W_K"], params["b_K"])
    v = naive_linear(x, params["W_V"], params["b_V"])
    attn_scores = naive_attn_scores(q, k)
    pattern = naive_softmax(attn_scores)
    stages = {"q": q, "k": k, "v": v, "attn_scores": attn_scores, "pattern": pattern}

    weights = pattern
    if activation is not None:
        gate_stages = naive_gate(params, x, activation)
        weights = gate_stages["gate"] * pattern
        stages = {**stages, **gate_stages, "gated_pattern": weights}

    stages["z"] = naive_z(weights, v)
    stages["result"] = naive_result(stages["z"], params["W_O"])
    stages["attn_out"] = naive_sum_of_heads(stages["result"])
    return stages


def naive_linear(x, W, bias):
    B, T, D = x.shape
    H, _, K = W.shape
    out = np.zeros((B, T, H, K))
    for b, t, h, k in np.ndindex(B, T, H, K):
        out[b, t, h, k] = bias[h, k]
        for d in range(D):
            out[b, t, h, k] += x[b, t, d] * W[h, d, k]
    return out


def naive_products(q, k):
    B, T, H, K = q.shape
    products = np.zeros((B, H, T, T))
    for b, h, query, key in np.ndindex(B, H, T, T):
        for i in range(K):
            products[b, h, query, key] += q[b, query, h, i] * k[b, key, h, i]
    return products


def naive_attn_scores(q, k):
    K = q.shape[3]
    scores = naive_products(q, k) / math.sqrt(K)
    for b, h, query, key in np.ndindex(scores.shape):
        if key > query:
            scores[b, h, query, key] = -math.inf
    return scores


def naive_softmax(scores):
    B, H, T, _ = scores.shape
    pattern = np.zeros((B, H, T, T))
    for b, h, query in np.ndindex(B, H, T):
        total = 0.0
        for key in range(T):
            total += math.exp(scores[b, h, query, key])
        for key in range(T):
            pattern[b, h, query, key] = math.exp(scores[b, h, query, key]) / total
    return pattern


def naive_gate(params, x, activation):
    gate_q = naive_linear(x, params["W_gate_Q"], params["b_gate_Q"])
    gate_k = naive_linear(x, params["W_gate_K"], params["b_gate_K"])
    scores = naive_products(gate_q, gate_k)
    gate = np.zeros(scores.shape)
    for index in np.ndindex(scores.shape):
        gate[index] = activation(scores[index])
    return {"gate_q": gate_q, "gate_k": gate_k, "gate_scores": scores, "gate": gate}


def naive_z(weights, v):
    B, T, H, K = v.shape
    z = np.zeros((B, T, H, K))
    for b, query, h, k in np.ndindex(B, T, H, K):
        for key in range(T):
            z[b, query, h, k] += weights[b, h, query, key] * v[b, key, h, k]
    return z


def naive_result(z, W_O):
    B, T, H, K = z.shape
    D = W_O.shape[2]
    result = np.zeros((B, T, H, D))
    for b, t, h, d in np.ndindex(B, T, H, D):
        for k in range(K):
            result[b, t, h, d] += z[b, t, h, k] * W_O[h, k, d]
    return result


def naive_sum_of_heads(result):
    B, T, H, D = result.shape
    attn_out = np.zeros((B, T, D))
    for b, t, h, d in np.ndindex(B, T, H, D):
        attn_out[b, t, d] += result[b, t, h, d]
    return attn_out


def naive_normalised(params):
    W_V = params["W_V"].copy()
    b_V = params["b_V"].copy()
    W_O = params["W_O"].copy()
    H, _, K = W_V.shape
    for h, k in np.ndindex(H, K):
        W_O[h, k, :] /= naive_norm(W_O[h, k, :])
        if "value_scale" in params:
            norm = naive_norm([*W_V[h, :, k], b_V[h, k]])
            W_V[h, :, k] *= params["value_scale"] / norm
            b_V[h, k] *= params["value_scale"] / norm
        else:
            W_V[h, :, k] /= naive_norm(W_V[h, :, k])
    return {"W_V": W_V, "b_V": b_V, "W_O": W_O}


def naive_norm(numbers):
    squares = 0.0
    for number in numbers:
        squares += number**2
    return max(math.sqrt(squares), 1e-12)


def naive_clamp(score):
    return min(max(score, 0.0), 1.0)


def naive_penalty(gate, p):
    B, H, T, _ = gate.shape
    total = 0.0
    for b, query, key in np.ndindex(B, T, T):
        powers = 0.0
        for h in range(H):
            powers += gate[b, h, query, key] ** p
        total += powers ** (1 / p)
    return total / (B * T * T)


def naive_loss(params, x, target, alpha, activation=naive_clamp, p=0.6):
    block = naive_block(params, x, activation)
    squares = 0.0
    for index in np.ndindex(target.shape):
        squares += (block["attn_out"][index] - target[index]) ** 2
    mse = squares / target.size
    penalty = naive_penalty(block["gate"], p)
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}


def slope(function, array, step=3e-6):
    """The derivative of a function of an array, entry by entry: central differences."""
    slopes = np.zeros(np.shape(array))
    for index in np.ndindex(slopes.shape):
        above = np.array(array, dtype=float)
        below = np.array(array, dtype=float)
        above[index] += step
        below[index] -= step
        slopes[index] = (function(above) - function(below)) / (2 * step)
    return slopes


def slopes_of_params(function, params):
    """The derivatives of a function of a dict of arrays."""
    slopes = {}
    for name, array in params.items():

        def function_of_one(changed, name=name):
            return function({**params, name: changed})

        slopes[name] = slope(function_of_one, array)
    return slopes


# ---- Attention and the gated block ---------------------------------------------------


def sigmoid(scores):
    """Another activation function, of one number or of an array."""
    return 1 / (1 + anp.exp(-scores))


def assert_same_stages(block, naive):
    assert block.keys() == naive.keys()
    for name in naive:
        assert_close(block[name], naive[name], digits=13)


def test_attention_equals_plain_loops_to_13_digits():
    params = normal_params(BLOCK)
    x = normal("BTD", 1)
    assert_same_stages(gatedref.attention(params, x), naive_block(params, x))


@pytest.mark.parametrize("d_gate", [1, 7])
@pytest.mark.parametrize("value_scale", [{}, {"value_scale": 0.7}, {"value_scale": 30}])
def test_a_gated_block_equals_plain_loops_to_13_digits(value_scale, d_gate):
    params = normal_params(sizes={**SIZES, "G": d_gate})
    params = {**params, **value_scale}
    x = normal("BTD", 1)
    naive = naive_block(params, x, naive_clamp)
    assert_same_stages(gatedref.gated_attention(params, x), naive)
    naive = naive_block(params, x, sigmoid)
    block = gatedref.gated_attention(params, x, activation=sigmoid)
    assert_same_stages(block, naive)
    assert_same_stages(gatedref.normalised(params), naive_normalised(params))


def test_the_clamp_has_the_derivative_1_from_0_to_1_ends_included():
    scores = np.array([-2, -1e-9, 0, 1e-9, 0.5, 1 - 1e-9, 1, 1 + 1e-9, 2])
    gates = [0, 0, 0, 1e-9, 0.5, 1 - 1e-9, 1, 1, 1]
    assert gatedref.clamp(scores).tolist() == gates
    slopes = elementwise_grad(gatedref.clamp)(scores)
    assert slopes.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("length", [0, 1e-300, 0.99e-12, 1.01e-12, 1])
@pytest.mark.parametrize("name, scale", [("W_V", None), ("W_V", 3), ("W_O", None)])
def test_a_norm_of_1e_minus_12_or_less_counts_as_a_constant(name, scale, length):
    params = normal_params(sizes={"H": 1, "D": 2, "K": 1, "G": 1})
    if scale is not None:
        params["b_V"] = np.zeros((1, 1))
        params["value_scale"] = scale
    direction = np.array([0.6, 0.8])
    weights = np.array([2.0, 1.0])

    def weighted(vector):
        changed = {**params, name: vector.reshape(params[name].shape)}
        unit = gatedref.normalised(changed)[name].reshape(2)
        return anp.sum(weights * unit) / (scale or 1)

    along = weights @ direction
    expected = weights / 1e-12
    if length > 1e-12:
        expected = (weights - along * direction) / length
    vector = length * direction
    assert weighted(vector) == pytest.approx(along * length / max(length, 1e-12), 1e-13)
    assert_close(grad(weighted)(vector), expected, digits=13)


# ---- The penalty and the loss --------------------------------------------------------


def test_sharing_a_pair_costs_more_than_the_sum_of_its_parts():
    alone = np.reshape([1, 0], (1, 2, 1, 1))
    halves = np.reshape([0.5, 0.5], (1, 2, 1, 1))
    both = np.reshape([1, 1], (1, 2, 1, 1))
    assert gatedref.lp_penalty(alone) == 1
    assert gatedref.lp_penalty(halves) == pytest.approx(1.5874, rel=1e-5)
    assert gatedref.lp_penalty(both) == pytest.approx(3.1748, rel=1e-5)
    assert gatedref.lp_penalty(alone, p=1) == 1
    assert gatedref.lp_penalty(halves, p=1) == 1
    assert gatedref.lp_penalty(both, p=1) == 2


@pytest.mark.parametrize("p", [0.3, 0.6, 1, 2])
def test_the_penalty_equals_plain_loops_to_14_digits(p):
    gate = np.maximum(normal("BHTT"), 0)
    assert_close(gatedref.lp_penalty(gate, p), naive_penalty(gate, p), digits=14)


def test_the_loss_equals_plain_loops_to_13_digits():
    params = normal_params()
    x = normal("BTD", 1)
    target = normal("BTD", 2)
    naive = naive_loss(params, x, target, 0.3)
    assert gatedref.loss(params, x, target, 0.3) == pytest.approx(naive, rel=1e-13)
    params["value_scale"] = 5
    naive = naive_loss(params, x, target, 0.3, sigmoid, 2)
    options = {"activation": sigmoid, "p": 2}
    loss = gatedref.loss(params, x, target, 0.3, **options)
    assert loss == pytest.approx(naive, rel=1e-13)


# ---- Gradients -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value_scale, options",
    [
        ({}, {}),
        ({"value_scale": 4}, {}),
        ({}, {"activation": sigmoid}),
        ({}, {"p": 0.5}),
        ({"value_scale": 0.5}, {"p": 2}),
    ],
)
def test_gradients_equal_central_differences_to_8_digits(value_scale, options):
    params = {**normal_params(seed=48, sizes=SMALL, scale=0.7), **value_scale}
    x = normal("BTD", 1, SMALL)
    target = normal("BTD", 2, SMALL)
    scores = gatedref.gated_attention(params, x)["gate_scores"]
    assert distance_from_ends(scores).min() > 0.01

    def loss_of_params(params):
        return gatedref.loss(params, x, target, 0.3, **options)["loss"]

    def loss_of_x(x):
        return gatedref.loss(params, x, target, 0.3, **options)["loss"]

    scalars, gradient = gatedref.loss_and_grad(params, x, target, 0.3, **options)
    assert scalars == gatedref.loss(params, x, target, 0.3, **options)
    assert_all_close(gradient, slopes_of_params(loss_of_params, params), digits=8)
    assert_close(grad(loss_of_x)(x), slope(loss_of_x, x), digits=8)


def distance_from_ends(gate_scores):
    """How far gate scores are from 0 and 1, the ends of the clamp."""
    return np.minimum(np.abs(gate_scores), np.abs(gate_scores - 1))


def test_gradients_of_a_transformer_equal_central_differences_to_8_digits():
    first = normal_params(BLOCK, 3, SMALL, 0.7)
    second = normal_params(GATED_BLOCK, 4, SMALL, 0.7)
    weights = normal("BTD", 2, SMALL)

    def score(first, second):
        model = gatedref.transformer([first, second], [[0, 2, 1], [1, 0, 0]])
        return anp.sum(model["logits"] * weights)

    def score_of_first(params):
        return score(params, second)

    def score_of_second(params):
        return score(first, params)

    slopes = slopes_of_params(score_of_first, first)
    assert_all_close(grad(score_of_first)(first), slopes, digits=8)
    slopes = slopes_of_params(score_of_second, second)
    assert_all_close(grad(score_of_second)(second), slopes, digits=8)


@pytest.mark.parametrize("p", [0.5, 0.6, 1, 2])
def test_a_closed_gate_has_no_gradient_and_an_open_one_has_its_own(p):
    gate = np.maximum(normal("BHTT"), 0)
    gate[0, :, 1, 2] = 0  # a pair on which every gate is closed
    expected = np.zeros(gate.shape)
    for b, h, query, key in np.ndindex(gate.shape):
        if gate[b, h, query, key] > 0:
            powers = np.sum(gate[b, :, query, key] ** p)
            inner = gate[b, h, query, key] ** (p - 1)
            expected[b, h, query, key] = powers ** (1 / p - 1) * inner / (2 * 3 * 3)
    assert_close(grad(gatedref.lp_penalty)(gate, p), expected, digits=13)


# ---- Types ---------------------------------------------------------------------------


def test_float32_in_gives_float32_out():
    params = as_type(normal_params(), np.float32)
    params["value_scale"] = np.float64(0.7)
    x = normal("BTD", 1).astype(np.float32)
    alpha = np.float64(0.1)
    stages = gatedref.gated_attention(params, x)
    scalars, gradient = gatedref.loss_and_grad(params, x, x, alpha, p=np.float64(0.6))
    penalty = gatedref.lp_penalty(stages["gate"], np.float64(0.6))
    for array in [*stages.values(), *scalars.values(), penalty]:
        assert array.dtype == np.float32
    for name, array in params.items():
        assert gradient[name].dtype == array.dtype

    exact = as_type(params, np.float64)
    right, right_gradient = gatedref.loss_and_grad(exact, x.astype(float), x, alpha)
    assert_all_close(scalars, right, digits=5)
    assert_all_close(gradient, right_gradient, digits=4)


def test_each_gradient_has_the_type_of_its_parameter():
    params = normal_params()
    params["b_Q"] = params["b_Q"].astype(np.float32)
    x = normal("BTD", 1)
    _, gradient = gatedref.loss_and_grad(params, x, x, 0.1)
    for name, array in params.items():
        assert gradient[name].dtype == array.dtype


def test_lists_and_integers_are_computed_with_as_float64():
    params = {name: np.ceil(array) for name, array in normal_params(scale=2).items()}
    x = np.round(normal("BTD", 1))
    as_lists = {name: array.tolist() for name, array in params.items()}
    right, gradient = gatedref.loss_and_grad(params, x, x, 2.0)
    for given in (as_type(params, int), as_type(params, np.int8), as_lists):
        scalars, found = gatedref.loss_and_grad(given, x.astype(int), x.tolist(), 2)
        assert scalars == right
        assert_all_close(found, gradient, digits=16)


# ---- Models and a task ---------------------------------------------------------------


def test_a_seed_makes_the_same_numbers_for_ever():
    block = gatedref.init_params(4, 5, 6, seed=3)
    gated = gatedref.init_params(4, 5, 6, seed=3, d_gate=2)
    assert list(gated) == list(GATED_BLOCK)
    assert digest(block.values()) == "83fa7ad28f4befd6"
    assert digest(gated[name] for name in BLOCK) == "83fa7ad28f4befd6"
    assert not gated["b_gate_Q"].any()
    assert not gated["b_gate_K"].any()
    sample = gatedref.sample_skip_trigrams(3, 50, seed=3)
    assert digest(sample) == "fddd98bc7b6bc4da"


def test_weights_and_biases_are_xavier_normal_within_5_sigma():
    params = gatedref.init_params(n_heads=40, d_model=30, d_head=20)
    fans = {"W_Q": 70 * 20, "W_K": 70 * 20, "W_V": 70 * 20, "W_O": 60 * 30}
    for name, array in params.items():
        fan = fans.get(name, 60)  # fan_in + fan_out
        standard = array / math.sqrt(2 / fan)
        assert abs(standard.mean()) < 5 * math.sqrt(1 / array.size)
        assert abs((standard**2).mean() - 1) < 5 * math.sqrt(2 / array.size)


@pytest.mark.parametrize("n_heads, d_gate", [(3, 1), (12, 2), (30, 2)])
def test_gate_weights_are_orthonormal_across_the_heads(n_heads, d_gate):
    params = gatedref.init_params(n_heads, 6, 2, d_gate=d_gate)
    for name in ("W_gate_Q", "W_gate_K"):
        rows = params[name].reshape(n_heads, 6 * d_gate)
        if n_heads > 6 * d_gate:
            rows = rows.T
        assert_close(rows @ rows.T, np.eye(len(rows)), digits=14)


def test_a_transformer_adds_each_layer_to_the_residual_stream():
    layers = [normal_params(), normal_params(BLOCK, 1), normal_params(GATED_BLOCK, 2)]
    layers[2]["value_scale"] = 2
    tokens = np.array([[0, 4, 2], [1, 1, 3]], dtype=np.uint64)
    model = gatedref.transformer(layers, tokens, activation=sigmoid)
    residual = np.eye(5)[tokens]
    for layer, block in zip(layers, model["blocks"], strict=True):
        activation = sigmoid if "W_gate_Q" in layer else None
        naive = naive_block(layer, residual, activation)
        assert_close(block["attn_out"], naive["attn_out"], digits=12)
        residual = residual + naive["attn_out"]
    assert_close(model["logits"], residual, digits=13)

    layers = [as_type(layer, np.float32) for layer in layers]
    logits = gatedref.transformer(layers, tokens, activation=sigmoid)["logits"]
    assert logits.dtype == np.float32


def free_draws(n, sequence):
    """Walks along a sequence by the law of skip trigrams, which must allow it.

    Returns (armed, token) for each token that was free, and where a trigram completes.
    """
    assert sequence[0] == 2 * n + 1
    draws, completes = [], [False]
    armed = False
    for before, token in itertools.pairwise(sequence):
        if completes[-1]:
            assert token == before + n
            completes.append(False)
            continue
        draws.append((armed, token))
        completes.append(armed and 1 <= token <= n)
        armed = (armed or token == 0) and not completes[-1]
    return draws, completes


@pytest.mark.parametrize("n, n_positions", [(1, 11), (3, 1), (3, 2), (10, 50)])
def test_every_sequence_obeys_the_law(n, n_positions):
    tokens, completes = gatedref.sample_skip_trigrams(n, 400, n_positions, seed=1)
    assert tokens.shape == completes.shape == (400, n_positions)
    for sequence, found in zip(tokens.tolist(), completes.tolist(), strict=True):
        assert free_draws(n, sequence)[1] == found
    if n_positions > 10:
        assert completes[:, -1].any()
        assert completes.sum(axis=1).max() > 1


def test_draws_are_uniform_and_without_A_once_it_is_there_within_5_sigma():
    tokens, _ = gatedref.sample_skip_trigrams(2, 20000)
    plain, armed = np.zeros(6), np.zeros(6)
    for sequence in tokens.tolist():
        for is_armed, token in free_draws(2, sequence)[0]:
            counts = armed if is_armed else plain
            counts[token] += 1
    assert armed[0] == 0
    for counts in (plain, armed[1:]):
        expected = counts.mean()
        sigma = math.sqrt(expected * (1 - 1 / len(counts)))
        assert np.abs(counts - expected).max() < 5 * sigma


@pytest.mark.parametrize("n", [2, 5, 12])
def test_two_handmade_heads_hold_the_first_and_last_trigram_and_share_the_others(n):
    tokens, completes = gatedref.sample_skip_trigrams(n, 2000)
    model = gatedref.transformer([gatedref.handmade_superposition(n)], tokens)
    trigram = tokens[completes]
    result = model["blocks"][0]["result"][completes]
    assert (model["logits"][completes].argmax(axis=1) == trigram + n).all()
    expected = [[(0, 1)]] * n
    expected[0] = [(0,)]
    expected[-1] = [(1,)]
    for i in range(1, n + 1):
        answers = np.full((trigram == i).sum(), i + n)
        assert gatedref.holders(result[trigram == i], answers) == expected[i - 1]


# ---- Which heads hold an answer ------------------------------------------------------


def test_the_fewest_heads_that_keep_the_answer_whatever_else_is_removed_hold_it():
    # The answer is token 1.
    assert gatedref.holders([[[0, 5], [0, 3], [1, 0]]], [1]) == [(0,), (1,)]
    # Head 1 outvotes head 0, but not heads 0 and 2 together.
    assert gatedref.holders([[[0, 5], [9, 0], [0, 5]]], [1]) == [(0, 2)]
    # Any two of three.
    sets = [(0, 1), (0, 2), (1, 2)]
    assert gatedref.holders([[[0, 2], [0, 2], [0, 2], [3, 0]]], [1]) == sets
    # In a tie the first token is said, 0.
    assert gatedref.holders([[[1, 1], [0, 0]]], [1]) == []
    assert gatedref.holders([[[1, 1], [0, 0]]], [0]) == [(0,), (1,)]
    # Together they write 4 4 6, though each of them is above a rival.
    assert gatedref.holders([[[4, 0, 3], [0, 4, 3]]], [1]) == []


def says(result, heads, factors):
    """The token that a sum of heads says, each head times a factor."""
    total = [0] * len(result[0])
    for head in heads:
        for token, number in enumerate(result[head]):
            total[token] += factors[head] * number
    return total.index(max(total))


def naive_holds(result, heads, answer):
    """Whether heads hold the answer of one sequence: every larger set is tried."""
    all_on = [1] * len(result)
    for size in range(len(heads), len(result) + 1):
        for larger in itertools.combinations(range(len(result)), size):
            is_larger = set(heads) <= set(larger)
            if is_larger and says(result, larger, all_on) != answer:
                return False
    return True


def naive_holders(results, answers, threshold):
    n_heads = len(results[0])
    for size in range(1, n_heads + 1):
        found = []
        for heads in itertools.combinations(range(n_heads), size):
            held = 0
            for result, answer in zip(results, answers, strict=True):
                held += naive_holds(result, heads, answer)
            if held / len(results) > threshold:
                found.append(heads)
        if found:
            return found
    return []


@pytest.mark.parametrize("threshold", [0, 0.25, 0.5, 0.99])
def test_holders_equal_every_set_tried_one_by_one(threshold):
    rng = np.random.default_rng(0)
    sizes = set()
    for n_heads in (1, 2, 3, 4):
        for n_favour in [*range(n_heads + 1)] * 4:
            result = rng.integers(-3, 4, size=(4, n_heads, 3))
            result[:, :n_favour, 1] += 3  # so many heads favour token 1
            answers = rng.choice([0, 1, 1, 1, 1, 2], size=4)
            found = gatedref.holders(result, answers, threshold)
            assert found == naive_holders(result.tolist(), answers.tolist(), threshold)
            sizes.add(len(found[0]) if found else 0)
    assert sizes >= {0, 1, 2}


def test_turning_the_other_heads_down_never_undoes_holding():
    rng = np.random.default_rng(0)
    for _ in range(40):
        result = rng.integers(-3, 5, size=(1, 4, 3))
        for heads in gatedref.holders(result, [1]):
            factors = rng.integers(0, 9, size=4) / 8  # eighths, which are exact
            factors[list(heads)] = 1
            assert says(result[0], range(4), factors) == 1


# ---- The authors' models, which nobody here trained: figures/published.npz -----------

# Of trigram 1, 2 and so on: the head that holds it, None where it is distributed.
HOLDERS = {
    "2H3T/toy": [1, None, 0],
    "3H4T/toy": [None, 0, None, 2],
    "4H5T/toy": [1, 2, 0, None, 3],
    "4H5T/conventional": [None, None, None, None, None],
    "2H3T/manual": [0, 1, None],
    "4H5T/manual": [0, 1, None, 2, 3],
    "2H3T/gated": [1, 0, 3],
    "3H4T/gated": [2, 1, 0, 4],
    "4H5T/gated": [5, 3, 7, 0, 1],
    "4H5T/gated_of_manual": [5, 4, 6, 3, 0],
}

# A gated block, the toy that it replaces, and how much of that it leaves unexplained.
UNEXPLAINED = [
    ("2H3T/gated", "2H3T/toy", 0.32),
    ("3H4T/gated", "3H4T/toy", 0.052),
    ("4H5T/gated", "4H5T/toy", 0.064),
    ("4H5T/gated_of_manual", "4H5T/manual", 0.0000095),
]


def published_block(model, tokens):
    return gatedref.transformer([published(model)], tokens)["blocks"][0]


@pytest.mark.parametrize("model", HOLDERS)
def test_the_heads_of_the_authors_models_hold_what_they_did(model):
    n = len(HOLDERS[model])
    tokens, completes = gatedref.sample_skip_trigrams(n, 5000)
    is_single = completes.sum(axis=1, keepdims=True) == 1
    block = published_block(model, tokens)
    found = []
    for i in range(1, n + 1):
        result = block["result"][completes & is_single & (tokens == i)]
        answers = np.full(len(result), i + n)
        first, *others = gatedref.holders(result, answers)
        is_held_alone = len(first) == 1 and not others
        found.append(first[0] if is_held_alone else None)
    assert found == HOLDERS[model]


@pytest.mark.parametrize("gated, toy, share", UNEXPLAINED)
def test_the_authors_gated_blocks_leave_unexplained_what_they_did(gated, toy, share):
    tokens, _ = gatedref.sample_skip_trigrams(len(HOLDERS[toy]), 5000)
    target = published_block(toy, tokens)["attn_out"]
    error = published_block(gated, tokens)["attn_out"] - target
    deviation = target - target.mean(axis=(0, 1))
    unexplained = (error**2).sum() / (deviation**2).sum()
    assert unexplained == pytest.approx(share, rel=0.04)


def test_a_head_escapes_the_published_penalty_by_its_value_bias_but_not_value_scale():
    params = published("2H3T/gated")
    escaped = {**params, "b_V": params["b_V"] * 1000}
    escaped["W_gate_Q"] = params["W_gate_Q"] / 1000
    escaped["b_gate_Q"] = params["b_gate_Q"] / 1000
    tokens, _ = gatedref.sample_skip_trigrams(3, 1000)
    x = np.eye(8)[tokens]
    target = published_block("2H3T/toy", tokens)["attn_out"]

    before = gatedref.loss(params, x, target, 1)
    after = gatedref.loss(escaped, x, target, 1)
    assert before["penalty"] == pytest.approx(0.0155, rel=0.02)
    assert after["penalty"] == pytest.approx(before["penalty"] / 1000)
    assert after["mse"] == pytest.approx(before["mse"], rel=0.01)

    before = gatedref.loss({**params, "value_scale": 20}, x, target, 1)
    after = gatedref.loss({**escaped, "value_scale": 20}, x, target, 1)
    assert after["mse"] > 2.5 * before["mse"]


# ---- The conformance kit: right blocks pass, wrong ones are caught where they err ----

CASES = {case.name: case for case in gatedref.cases()}
DENSE = CASES["dense"]
# All that many ports can show: outputs, losses and gradients.
ENDS = ("attn_out", "mse", "penalty", "loss", "grads")

# Another implementation of the block, as source text, so that slips can be planted.
PORT = """
def clamp(scores):
    return np.where(scores < 0, 0.0, np.where(scores > 1, 1.0, scores))

def power(base, exponent):
    is_open = base > 0
    return np.where(is_open, np.where(is_open, base, 1.0) ** exponent, 0.0)

def root(squares):
    return np.sqrt(np.maximum(squares, 1e-24))

def project(x, W_Q, W_K, W_V, W_O, b_Q, b_K, b_V,
            W_gate_Q, W_gate_K, b_gate_Q, b_gate_K, value_scale=None):
    if value_scale is None:
        norm = root((W_V**2).sum(1))
        W_V = W_V / norm[:, None]
    else:
        norm = root((W_V**2).sum(1) + b_V**2) / value_scale
        W_V = W_V / norm[:, None]
        b_V = b_V / norm
    W_O = W_O / root((W_O**2).sum(2))[:, :, None]
    q = np.einsum("btd,hdk->bthk", x, W_Q) + b_Q
    k = np.einsum("btd,hdk->bthk", x, W_K) + b_K
    v = np.einsum("btd,hdk->bthk", x, W_V) + b_V
    gate_q = np.einsum("btd,hdg->bthg", x, W_gate_Q) + b_gate_Q
    gate_k = np.einsum("btd,hdg->bthg", x, W_gate_K) + b_gate_K
    return q, k, v, W_O, gate_q, gate_k

def port(x, target, alpha, **params):
    q, k, v, W_O, gate_q, gate_k = project(x, **params)
    B, T, H, K = q.shape
    mask = np.tri(T)
    gate_scores = np.einsum("bqhg,bshg->bhqs", gate_q, gate_k)
    gate = clamp(gate_scores)
    attn_scores = np.einsum("bqhk,bshk->bhqs", q, k) / K**0.5
    attn_scores = np.where(mask, attn_scores, -1e5)
    largest = attn_scores.max(-1, keepdims=True)
    weights = np.exp(attn_scores - largest)
    pattern = weights / weights.sum(-1, keepdims=True)
    gated_pattern = gate * pattern
    z = np.einsum("bhqs,bshk->bqhk", gated_pattern, v)
    result = np.einsum("bqhk,hkd->bqhd", z, W_O)
    attn_out = result.sum(2)
    mse = ((attn_out - target) ** 2).mean()
    powers = power(gate, 0.6).sum(1)
    norms = power(powers, 1 / 0.6)
    penalty = norms.mean()
    loss = mse + alpha * penalty
    return locals()
"""

# A kernel that never holds a whole pattern: it goes over tiles of queries and of keys,
# and keeps for each query the largest score, the sum of the softmax's weights, and z.
TILED = """
def port(x, target, alpha, tile, **params):
    q, k, v, W_O, gate_q, gate_k = project(x, **params)
    B, T, H, K = q.shape
    outputs = []
    penalty = 0.0
    for start in range(0, T, tile):
        rows = np.arange(start, min(start + tile, T))
        largest, total, z = -1e5, 0.0, 0.0
        for key_start in range(0, T, tile):
            columns = np.arange(key_start, min(key_start + tile, T))
            is_ragged = key_start > 0 and len(columns) < tile  # for the slips
            gate = np.einsum("bqhg,bshg->bhqs", gate_q[:, rows], gate_k[:, columns])
            gate = clamp(gate)
            norms = power(power(gate, 0.6).sum(1), 1 / 0.6)
            penalty = penalty + norms.sum() / (B * T * T)
            if key_start > start:
                continue
            scores = np.einsum("bqhk,bshk->bhqs", q[:, rows], k[:, columns]) / K**0.5
            scores = np.where(rows[:, None] >= columns, scores, -1e5)
            before = largest
            largest = stop(np.maximum(before, scores.max(-1, keepdims=True)))
            rescale = np.exp(before - largest)
            weights = np.exp(scores - largest)
            total = total * rescale + weights.sum(-1, keepdims=True)
            values = v[:, columns]
            z = z * rescale + np.einsum("bhqs,bshk->bhqk", gate * weights, values)
        outputs.append(np.einsum("bhqk,hkd->bqd", z / total, W_O))
    attn_out = np.concatenate(outputs, axis=1)
    mse = ((attn_out - target) ** 2).mean()
    loss = mse + alpha * penalty
    return locals()
"""

# The stage that is named, what a right block says, and what a wrong one says there.
SLIPS = [
    ("gate_q", " + b_gate_Q", ""),
    ("gate_scores", "gate_q, gate_k)\n    gate", "gate_q, gate_k) / K**0.5\n    gate"),
    ("gate_scores", "bqhg,bshg->bhqs", "bshg,bqhg->bhqs"),
    ("v", "x, W_V) + b_V", "x, W_V)"),
    ("v", "W_V = W_V / norm[:, None]", "W_V = W_V"),
    ("v", "1e-24", "1e-16"),
    ("attn_scores", "np.tri(T)", "np.tri(T, k=-1)"),
    ("attn_scores", "np.tri(T)", "np.tri(T) - np.tri(T, k=-32)"),
    ("pattern", "attn_scores, -1e5", "attn_scores, -100"),
    ("pattern", "attn_scores - largest", "attn_scores"),
    ("pattern", "np.exp(attn_scores", "gate * np.exp(attn_scores"),
    ("gate", "clamp(gate_scores)", "1 / (1 + np.exp(-gate_scores))"),
    ("gated_pattern", "gate * pattern", "gate_scores * pattern"),
    ("z", "gated_pattern, v)", "pattern, v)"),
    ("result", "(W_O**2).sum(2))[:, :, None]", "(W_O**2).sum(1))[:, None]"),
    ("attn_out", "result.sum(2)", "result.sum(1 if H == T else 2)"),
    ("mse", "** 2).mean()", "** 2).sum(2).mean()"),
    ("penalty", "power(gate, 0.6)", "power(gated_pattern, 0.6)"),
    ("penalty", "norms.mean()", "(norms * mask).sum() / mask.sum() / B"),
    ("penalty", "norms.mean()", "powers.mean()"),
    ("loss", "alpha * penalty", "penalty"),
    ("grads/W_V", "W_V / norm[:, None]", "W_V / stop(norm)[:, None]"),
    ("grads/W_gate_Q", "gate * pattern", "stop(gate) * pattern"),
    ("grads/W_gate_Q", "power(gate, 0.6)", "(gate**0.6)"),
    ("grads/W_K", "gate * pattern", "gate * stop(pattern)"),
    ("grads/x", "x, W_Q)", "stop(x), W_Q)"),
]

TILE_SLIPS = [
    # The running sum is not rescaled, or z is not.
    ("total * rescale", "total"),
    ("z * rescale", "z"),
    # The mask goes by the index within the tile.
    ("rows[:, None] >= columns", "rows[:, None] - start >= columns - key_start"),
    # The last tile, which is not full, has no values, or its gates have no gradient.
    ("v[:, columns]", "v[:, columns] * (not is_ragged)"),
    ("clamp(gate)", "stop(clamp(gate)) if is_ragged else clamp(gate)"),
    # The penalty leaves out tiles whose keys are all masked.
    ("norms.sum()", "norms.sum() * (key_start <= start)"),
    # Past the first tile the heads are in another order.
    ("v[:, columns]", "v[:, columns, :: 1 if key_start == 0 else -1]"),
    # The first tile's values are read again.
    ("v[:, columns]", "v[:, columns - key_start]"),
]


def planted(source, right, wrong):
    """A source text with a slip: the wrong text in place of the first right one."""
    assert right in source
    return source.replace(right, wrong, 1)


def results_of(source, case, dtype=np.float64, **options):
    """All that the port in a source text makes of a case, gradients included."""
    names = {"np": anp, "stop": getval}
    exec(source, names)  # noqa: S102
    inputs = as_type({**case.params, "x": case.x}, dtype)
    target = case.target.astype(dtype)

    def objective(inputs):
        stages = names["port"](target=target, alpha=case.alpha, **inputs, **options)
        shown = {name: stages[name] for name in case.expected if name in stages}
        return stages["loss"], shown

    with np.errstate(all="ignore"):
        grads, stages = grad_and_aux(objective)(inputs)
    stages = {name: getval(array) for name, array in stages.items()}
    return {**stages, "grads": grads}


def ends_of(got):
    return {name: got[name] for name in ENDS}


def first_wrong(case, got, **options):
    """The stage that is named as the first wrong one; None where all is right."""
    try:
        gatedref.assert_matches(case, got, **options)
    except AssertionError as wrong:
        return re.match(r"\w+: ([\w/]+)", str(wrong))[1]
    return None


@pytest.mark.parametrize("value_scale", [None, 2.5])
def test_a_right_block_passes_every_case_strictly(value_scale):
    for case in gatedref.cases(value_scale):
        assert case.params.get("value_scale") == value_scale
        got = results_of(PORT, case)
        compared, left_out = gatedref.assert_matches(case, got, strict=True)
        assert len(compared) == 28 + (value_scale is not None)
        assert left_out == []


@pytest.mark.parametrize("stage, right, wrong", SLIPS)
def test_a_slip_is_named_at_its_stage_and_fails_by_its_ends_alone(stage, right, wrong):
    source = planted(PORT, right, wrong)
    named, named_by_ends = [], []
    for case in CASES.values():
        got = results_of(source, case)
        named.append(first_wrong(case, got, strict=True))
        named_by_ends.append(first_wrong(case, ends_of(got), strict=True))
    named = [name for name in named if name is not None]
    assert named[0] == stage
    assert any(named_by_ends)


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_a_right_kernel_with_tiles_passes_every_case_strictly(tile):
    for case in CASES.values():
        got = ends_of(results_of(PORT + TILED, case, tile=tile))
        gatedref.assert_matches(case, got, strict=True)


@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize("right, wrong", TILE_SLIPS)
def test_a_slip_past_the_first_tile_fails_by_its_ends_alone(right, wrong, tile):
    source = planted(PORT + TILED, right, wrong)
    named = []
    for case in CASES.values():
        if case.x.shape[1] > tile:
            got = ends_of(results_of(source, case, tile=tile))
            named.append(first_wrong(case, got))
    assert any(named)


def test_a_clamp_with_another_derivative_at_0_and_1_fails_only_when_strict():
    right = "np.where(scores < 0, 0.0, np.where(scores > 1, 1.0, scores))"
    source = planted(PORT, right, "np.clip(scores, 0, 1)")
    for case in CASES.values():
        assert first_wrong(case, results_of(source, case)) is None
    edges = CASES["gate_edges"]
    with pytest.raises(AssertionError, match="^gate_edges: grads/W_gate_Q"):
        gatedref.assert_matches(edges, results_of(source, edges), strict=True)


def test_a_block_without_value_scale_fails_the_cases_that_have_it():
    for case in gatedref.cases(value_scale=2.5):
        params = {name: case.params[name] for name in GATED_BLOCK}
        got = results_of(PORT, case._replace(params=params))
        assert first_wrong(case, got) == "v"


# ---- The cases -----------------------------------------------------------------------


def inputs_of(case):
    return [*case.params.values(), case.x, case.target, np.array(case.alpha)]


def is_exact_in_bfloat16(array):
    mantissa, _ = np.frexp(array)
    return (mantissa * 2**8 % 1 == 0).all()


def test_the_cases_are_the_same_for_ever_and_exact_in_bfloat16():
    arrays = []
    for case in CASES.values():
        arrays += inputs_of(case)
    assert digest(arrays) == "86f8c13f33052739"
    for array in arrays:
        assert is_exact_in_bfloat16(array)


def test_no_rounding_flips_a_clamp():
    for case in CASES.values():
        distance = distance_from_ends(case.expected["gate_scores"])
        if case.name == "gate_edges":
            assert (distance == 0).mean() > 0.2
        else:
            assert distance.min() >= 1 / 256


@pytest.mark.parametrize("name", ["tiles", "many_tiles"])
def test_in_cases_of_several_tiles_a_third_of_the_gates_or_so_are_between_0_and_1(name):
    gate = CASES[name].expected["gate"]
    is_inside = (gate > 0) & (gate < 1)
    assert 0.25 < is_inside.mean() < 0.45


def test_the_cases_raise_no_floating_point_error():
    with np.errstate(all="raise"):
        plain = list(gatedref.cases())
        scaled = list(gatedref.cases(2.5))
    assert len(plain) == len(scaled) == 12


RANDOM_SIZES = [
    {"B": 2, "T": 9, "H": 3, "D": 4, "K": 2, "G": 2},
    {"B": 1, "T": 40, "H": 2, "D": 12, "K": 5, "G": 8},
    {"B": 1, "T": 1, "H": 1, "D": 1, "K": 1, "G": 1},
]


@pytest.mark.parametrize("sizes", RANDOM_SIZES)
@pytest.mark.parametrize("value_scale", [None, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_right_block_passes_random_cases_in_float32_too(seed, value_scale, sizes):
    case = gatedref.random_case(seed, **sizes, value_scale=value_scale)
    again = gatedref.random_case(seed, **sizes, value_scale=value_scale)
    other = gatedref.random_case(seed + 2, **sizes, value_scale=value_scale)
    assert digest(inputs_of(case)) == digest(inputs_of(again))
    assert digest(inputs_of(case)) != digest(inputs_of(other))
    assert case.expected["gate"].shape == tuple(sizes[axis] for axis in "BHTT")
    assert case.params.get("value_scale") == value_scale
    assert all(is_exact_in_bfloat16(array) for array in inputs_of(case))
    assert distance_from_ends(case.expected["gate_scores"]).min() > 1e-4
    gatedref.assert_matches(case, results_of(PORT, case), strict=True)
    single = results_of(PORT, case, np.float32)
    assert single["attn_out"].dtype == np.float32
    gatedref.assert_matches(case, single, strict=True)


def test_a_case_can_be_made_of_arrays_of_ones_own():
    params = {**normal_params(), "value_scale": 1.5}
    x = normal("BTD", 1)
    target = normal("BTD", 2)
    case = gatedref.make_case("own", params, x, target, 0.3)
    assert case.name == "own"
    loss = gatedref.loss(params, x, target, 0.3)["loss"]
    assert case.expected["loss"] == loss
    gatedref.assert_matches(case, results_of(PORT, case), rtol=1e-12)


# ---- What assert_matches says --------------------------------------------------------


def message_of(case, got, **options):
    with pytest.raises(AssertionError) as caught:
        gatedref.assert_matches(case, got, **options)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_tolerance_is_64_eps_of_the_type_given_or_rtol(dtype):
    expected = DENSE.expected["attn_out"]
    eps = float(np.finfo(dtype).eps)
    unit = eps * np.abs(expected).max()
    right = (expected + 62 * unit).astype(dtype)
    wrong = (expected + 66 * unit).astype(dtype)
    gatedref.assert_matches(DENSE, {"attn_out": right})
    assert first_wrong(DENSE, {"attn_out": wrong}) == "attn_out"
    gatedref.assert_matches(DENSE, {"attn_out": wrong}, rtol=70 * eps)
    message_of(DENSE, {"attn_out": right}, rtol=60 * eps)


def test_the_message_says_what_where_by_how_much_and_what_else():
    got = results_of(planted(PORT, "x, W_V) + b_V", "x, W_V)"), DENSE)
    expected = DENSE.expected["v"]
    off = np.abs(got["v"] - expected)
    at = np.unravel_index(off.argmax(), off.shape)
    index = [int(i) for i in at]
    wrong, right = got["v"][at], expected[at]
    numbers = f"{wrong:.17g}, should be {right:.17g}, off by {off[at]:.3g}"
    message = message_of(DENSE, got)
    assert message.startswith(f"dense: v{index} is {numbers}, ")
    others = "z, result, attn_out, mse, loss, grads/W_O, grads/W_V, grads/b_V"
    assert f". These differ too: {others}, grads/W_gate_Q" in message


@pytest.mark.parametrize("wrong", ["value", "NaN", "shape", "None"])
def test_the_first_wrong_stage_is_named_in_whatever_way_it_is_wrong(wrong):
    v = DENSE.expected["v"]
    wrong_v = {"value": 2 * v, "NaN": NAN * v, "shape": v[:, :1], "None": None}[wrong]
    grads = {"W_O": DENSE.expected["grads"]["W_O"] * NAN}
    message = message_of(DENSE, {"loss": INF, "grads": grads, "v": wrong_v})
    assert re.match(r"dense: v\b", message)
    assert message.endswith(". These differ too: loss, grads/W_O")


def test_gradients_are_told_in_the_order_of_a_backward_pass():
    case = next(gatedref.cases(value_scale=1))
    grads = {name: array + 9 for name, array in case.expected["grads"].items()}
    in_another_order = {name: grads[name] for name in sorted(grads)}
    message = message_of(case, {"grads": in_another_order})
    found = re.findall(r"grads/(\w+)", message)
    assert found[:4] == ["W_O", "W_V", "b_V", "value_scale"]
    assert found[4:8] == ["W_gate_Q", "b_gate_Q", "W_gate_K", "b_gate_K"]
    assert found[8:] == ["W_K", "b_K", "W_Q", "b_Q", "x"]


def test_a_zero_column_whose_gradient_is_huge_hides_no_other_gradient():
    case = CASES["tiny_norms"]
    grads = case.expected["grads"]
    assert np.abs(grads["W_V"]).max() > 1e9
    for name, gradient in grads.items():
        wrong = {"grads": {name: gradient + 1e-6}}
        assert first_wrong(case, wrong) == f"grads/{name}"


@pytest.mark.parametrize("filler", [-1e5, 0.0, -INF, NAN])
def test_masked_scores_may_be_anything(filler):
    scores = np.where(np.tri(5), DENSE.expected["attn_scores"], filler)
    gatedref.assert_matches(DENSE, {"attn_scores": scores})


def test_not_a_number_hints_at_its_cause():
    for name in ("attn_scores", "pattern"):
        array = DENSE.expected[name].copy()
        array[1, 2, 3, 0] = NAN
        message = message_of(DENSE, {name: array})
        assert message == f"dense: {name}[1, 2, 3, 0] is nan, should be finite"
        array[1, 2, 3] = NAN
        message = message_of(DENSE, {name: array})
        assert message.endswith("does the mask leave this query no key at all?")

    edges = CASES["gate_edges"]
    got = results_of(planted(PORT, "power(gate, 0.6)", "(gate**0.6)"), edges)
    message = message_of(edges, got)
    assert message.startswith("gate_edges: grads/W_gate_Q[")
    assert "is it the power in the penalty" in message


def test_comparing_nothing_is_an_error():
    edges = CASES["gate_edges"]
    for got in ({"grads": {"x": np.zeros(3)}}, {"grads": {}}, {}, None, "loss"):
        with pytest.raises(ValueError, match="^gate_edges: got must "):
            gatedref.assert_matches(edges, got)


def test_what_was_compared_and_what_was_left_out_is_returned():
    edges = CASES["gate_edges"]
    grads = edges.expected["grads"]
    got = {"grads": {"x": grads["x"], "W_O": grads["W_O"]}, "v": edges.expected["v"]}
    assert gatedref.assert_matches(edges, got) == (["v", "grads/W_O"], ["grads/x"])
    compared = ["v", "grads/W_O", "grads/x"]
    assert gatedref.assert_matches(edges, got, strict=True) == (compared, [])
    _, left_out = gatedref.assert_matches(edges, edges.expected)
    of_gate = ["W_gate_Q", "W_gate_K", "b_gate_Q", "b_gate_K"]
    assert set(left_out) == {f"grads/{name}" for name in ["x", *of_gate]}


def test_misuse_of_assert_matches_is_refused():
    for got in ({"los": 1.0}, {1: 1.0}, {"grads": {"W": 1.0}}, {"grads": None}):
        with pytest.raises(ValueError, match="^dense: got must .*(los|1|grads)"):
            gatedref.assert_matches(DENSE, {**got, "loss": DENSE.expected["loss"]})
    for rtol in (-1e-9, 1, NAN, "1e-3", True):
        with pytest.raises(ValueError, match="rtol must be"):
            gatedref.assert_matches(DENSE, DENSE.expected, rtol=rtol)
    for case in (None, tuple(DENSE)):
        with pytest.raises(TypeError, match="case must be a Case"):
            gatedref.assert_matches(case, DENSE.expected)
    with pytest.raises(TypeError, match="strict must be True or False, got 'no'"):
        gatedref.assert_matches(DENSE, DENSE.expected, strict="no")


def test_float16_needs_a_tolerance_of_ones_own():
    z = DENSE.expected["z"].astype(np.float16)
    assert "z is of float16: give an rtol" in message_of(DENSE, {"z": z})
    gatedref.assert_matches(DENSE, {"z": z}, rtol=1e-3)


def test_a_case_of_float32_arrays_is_computed_in_float64():
    params = as_type(DENSE.params, np.float32)
    x, target = DENSE.x.astype(np.float32), DENSE.target.astype(np.float32)
    case = gatedref.make_case("mine", params, x, target, DENSE.alpha)
    for name, array in DENSE.expected.items():
        if name != "grads":
            np.testing.assert_array_equal(case.expected[name], array)


def test_sizes_of_a_random_case_are_refused_by_name():
    sizes = {"B": 1, "T": 2, "H": 1, "D": 1, "K": 1, "G": 1}
    for wrong in (0, -2, 2.0):
        assert_refused("T must be", gatedref.random_case, 0, **{**sizes, "T": wrong})


def test_what_is_left_out_must_still_be_floats_of_the_right_shape():
    edges = CASES["gate_edges"]
    right = edges.expected["grads"]
    for wrong in (None, right["x"][:1], right["x"] * NAN):
        message = message_of(edges, {"grads": {"x": wrong, "W_O": right["W_O"]}})
        assert message.startswith("gate_edges: grads/x")


@pytest.mark.parametrize("wrong", [None, "1", True, 1, 1j, [[0.5]]])
def test_what_is_no_array_of_floats_of_the_right_shape_differs(wrong):
    assert first_wrong(DENSE, {"loss": wrong}) == "loss"
    assert first_wrong(DENSE, {"grads": {"x": wrong}}) == "grads/x"


# ---- Ports to PyTorch and JAX --------------------------------------------------------


def torch_power(torch, base, exponent):
    is_open = base > 0
    return torch.where(is_open, torch.where(is_open, base, 1) ** exponent, 0)


def torch_results(torch, case, dtype):
    """What a block in PyTorch's own functions makes of a case."""
    leaf = {}
    for name, array in {**case.params, "x": case.x}.items():
        leaf[name] = torch.tensor(array, dtype=dtype, requires_grad=True)
    x = leaf["x"][:, None]  # [B, 1, T, D]
    W_V = torch.nn.functional.normalize(leaf["W_V"], dim=1)
    W_O = torch.nn.functional.normalize(leaf["W_O"], dim=2)
    q = x @ leaf["W_Q"] + leaf["b_Q"][:, None]
    k = x @ leaf["W_K"] + leaf["b_K"][:, None]
    v = x @ W_V + leaf["b_V"][:, None]
    gate_q = x @ leaf["W_gate_Q"] + leaf["b_gate_Q"][:, None]
    gate_k = x @ leaf["W_gate_K"] + leaf["b_gate_K"][:, None]
    future = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(future, -torch.inf)
    gate = (gate_q @ gate_k.mT).clamp(0, 1)
    attn_out = (gate * scores.softmax(3) @ v @ W_O).sum(1)
    mse = torch.nn.functional.mse_loss(attn_out, torch.tensor(case.target, dtype=dtype))
    norms = torch_power(torch, torch_power(torch, gate, 0.6).sum(1), 1 / 0.6)
    loss = mse + case.alpha * norms.mean()
    loss.backward()
    got = {"attn_scores": scores, "gate": gate, "attn_out": attn_out, "loss": loss}
    return {**got, "grads": {name: tensor.grad for name, tensor in leaf.items()}}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_block_in_pytorch_passes_every_case_strictly(dtype):
    torch = pytest.importorskip("torch")
    for case in CASES.values():
        got = torch_results(torch, case, getattr(torch, dtype))
        gatedref.assert_matches(case, got, strict=True)


# XLA takes seconds for each case.
@pytest.mark.parametrize(
    "name, dtype", [("large_scores", "float64"), ("gate_edges", "float32")]
)
def test_a_block_in_jax_passes_strictly(name, dtype):
    jax = pytest.importorskip("jax")
    case = CASES[name]
    names = {"np": jax.numpy}
    exec(PORT, names)  # noqa: S102

    def objective(inputs, target):
        stages = names["port"](target=target, alpha=case.alpha, **inputs)
        shown = {name: stages[name] for name in case.expected if name in stages}
        return stages["loss"], shown

    with jax.enable_x64(dtype == "float64"):
        inputs = as_type({**case.params, "x": case.x}, dtype)
        gradient = jax.jit(jax.grad(objective, has_aux=True))
        grads, stages = gradient(inputs, case.target.astype(dtype))
        assert stages["loss"].dtype == dtype
        gatedref.assert_matches(case, {**stages, "grads": grads}, strict=True)


# ---- What is refused -----------------------------------------------------------------

PARAMS = normal_params()
X = normal("BTD", 1)
RESULT = np.ones((2, 3, 4))
GATE = np.ones((1, 2, 3, 3))


def assert_refused(message, function, *arguments, **options):
    """A call must end in a ValueError that begins with this message."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    assert str(caught.value).startswith(message)


def with_last(array, value):
    """A copy whose last entry has this value."""
    changed = np.array(array, dtype=float)
    changed.flat[-1] = value
    return changed


def test_an_array_of_another_shape_is_refused():
    for wrong in (X[0], X[None], X[:0], X[..., 1:], 1.0):
        message = f"x must be of shape [B, T, D = 5], got shape {np.shape(wrong)}"
        assert_refused(message, gatedref.gated_attention, PARAMS, wrong)
    message = "target must be of shape [B = 2, T = 3, D = 5], got shape "
    for wrong in (X[0], X[:1], X[:, :1], X[..., :1], 0.0):
        assert_refused(message, gatedref.loss, PARAMS, X, wrong, 0.1)
        assert_refused(message, gatedref.loss_and_grad, PARAMS, X, wrong, 0.1)
        assert_refused(message, gatedref.make_case, "own", PARAMS, X, wrong, 0.1)
    message = "gate must be of shape [B, H, T, T], got shape "
    for wrong in (GATE[0], GATE[..., :1], GATE[:, :, :1]):
        assert_refused(message, gatedref.lp_penalty, wrong)
    message = "result must be of shape [S, H, V], got shape (3, 4)"
    assert_refused(message, gatedref.holders, RESULT[0], [0, 1])
    for wrong in ([0], [0, 1, 2], [[0, 1]], 0):
        message = f"answers must be of shape [S = 2], got shape {np.shape(wrong)}"
        assert_refused(message, gatedref.holders, RESULT, wrong)


def test_a_parameter_that_would_be_broadcast_is_refused():
    for name, axes in GATED_BLOCK.items():
        for axis in range(len(axes)):
            cut = PARAMS[name].take([0], axis)
            with pytest.raises(ValueError, match=r"^\w+ must be of shape .* got shape"):
                gatedref.gated_attention({**PARAMS, name: cut}, X)
        message = f"{name} must be of shape"
        params = {**PARAMS, name: PARAMS[name][0]}
        assert_refused(message, gatedref.gated_attention, params, X)
    message = "W_K must be of shape [H = 4, D = 5, K = 6], got shape (1, 5, 6)"
    params = {**PARAMS, "W_K": PARAMS["W_K"][:1]}
    assert_refused(message, gatedref.gated_attention, params, X)


@pytest.mark.parametrize("dtype", [bool, complex, object, str])
def test_an_array_of_another_type_is_refused(dtype):
    of_type = " must be floats or integers, got "
    wrong = X.astype(dtype)
    assert_refused("x" + of_type, gatedref.gated_attention, PARAMS, wrong)
    assert_refused("target" + of_type, gatedref.loss, PARAMS, X, wrong, 0.1)
    assert_refused("gate" + of_type, gatedref.lp_penalty, GATE.astype(dtype))
    assert_refused("result" + of_type, gatedref.holders, RESULT.astype(dtype), [0, 1])
    for name in GATED_BLOCK:
        params = {**PARAMS, name: PARAMS[name].astype(dtype)}
        assert_refused(name + of_type, gatedref.normalised, params)


@pytest.mark.parametrize("wrong", [None, "x", {}])
def test_what_is_no_array_is_refused(wrong):
    of_type = " must be floats or integers, got <class "
    assert_refused("x" + of_type, gatedref.gated_attention, PARAMS, wrong)
    assert_refused("W_O" + of_type, gatedref.normalised, {**PARAMS, "W_O": wrong})
    assert_refused("tokens must be integers", gatedref.transformer, [PARAMS], wrong)
    assert_refused("answers must be integers", gatedref.holders, RESULT, wrong)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_what_is_not_finite_is_refused(wrong):
    message = f"x must be finite, got {wrong} at (1, 2, 4)"
    assert_refused(message, gatedref.gated_attention, PARAMS, with_last(X, wrong))
    message = f"target must be finite, got {wrong} at (1, 2, 4)"
    assert_refused(message, gatedref.loss, PARAMS, X, with_last(X, wrong), 0.1)
    message = f"gate must be finite, got {wrong} at (0, 1, 2, 2)"
    assert_refused(message, gatedref.lp_penalty, with_last(GATE, wrong))
    message = f"result must be finite, got {wrong} at (1, 2, 3)"
    assert_refused(message, gatedref.holders, with_last(RESULT, wrong), [0, 1])
    for name in GATED_BLOCK:
        params = {**PARAMS, name: with_last(PARAMS[name], wrong)}
        assert_refused(f"{name} must be finite", gatedref.gated_attention, params, X)


def test_the_checks_are_there_while_autograd_differentiates():
    def loss_of_x(x):
        return gatedref.loss(PARAMS, x, X, 0.1)["loss"]

    assert np.isfinite(grad(loss_of_x)(X)).all()
    for wrong in (X[:1], X[0], with_last(X, NAN)):
        with pytest.raises(ValueError, match="must be"):
            grad(loss_of_x)(wrong)


def test_parameters_with_other_names_are_refused():
    unknown = {**PARAMS, "W_X": X}
    ungated = {name: PARAMS[name] for name in BLOCK}
    missing = [name for name in GATED_BLOCK if name not in BLOCK]
    names = f"params must have the names {list(GATED_BLOCK)}: missing "
    assert_refused(names + "[], unknown ['W_X']", gatedref.normalised, unknown)
    assert_refused(names + "[], unknown ['W_X']", gatedref.loss, unknown, X, X, 0.1)
    assert_refused(names + f"{missing}, unknown []", gatedref.normalised, ungated)
    names = f"params must have the names {list(BLOCK)}: missing "
    assert_refused(names + f"[], unknown {missing}", gatedref.attention, PARAMS, X)
    scaled = {**ungated, "value_scale": 1.0}
    assert_refused(names + "[], unknown ['value_scale']", gatedref.attention, scaled, X)


@pytest.mark.parametrize("wrong", [None, [PARAMS], X, "W_Q"])
def test_parameters_that_are_no_dict_are_a_type_error(wrong):
    with pytest.raises(TypeError, match="^params must be a dict of arrays, got <class"):
        gatedref.gated_attention(wrong, X)
    with pytest.raises(TypeError, match=r"^layers\[1\]: params must be a dict"):
        gatedref.transformer([PARAMS, wrong], [[0]])


@pytest.mark.parametrize("wrong", [NAN, INF, True, "1", None, [1.0], 1j])
def test_what_is_no_finite_number_is_refused(wrong):
    assert_refused("alpha must be", gatedref.loss, PARAMS, X, X, wrong)
    assert_refused("p must be", gatedref.loss, PARAMS, X, X, 0.1, p=wrong)
    assert_refused("p must be", gatedref.lp_penalty, GATE, wrong)
    assert_refused("threshold must be", gatedref.holders, RESULT, [0, 1], wrong)
    params = {**PARAMS, "value_scale": wrong}
    assert_refused("value_scale must be", gatedref.gated_attention, params, X)


def test_a_number_out_of_range_is_refused():
    assert_refused("alpha must be >= 0, got -1.0", gatedref.loss, PARAMS, X, X, -1)
    for wrong in (0, -1):
        assert_refused("p must be > 0, got", gatedref.loss, PARAMS, X, X, 0.1, p=wrong)
        assert_refused("p must be > 0, got", gatedref.lp_penalty, GATE, wrong)
        params = {**PARAMS, "value_scale": wrong}
        message = f"value_scale must be > 0, got {wrong}"
        assert_refused(message, gatedref.gated_attention, params, X)
        assert_refused(message, list, gatedref.cases(value_scale=wrong))
    for wrong in (1, 1.5, -0.1):
        message = f"threshold must be in [0, 1), got {wrong}"
        assert_refused(message, gatedref.holders, RESULT, [0, 1], wrong)
    message = "gate must be >= 0, got -1e-300"
    assert_refused(message, gatedref.lp_penalty, with_last(GATE, -1e-300))
    message = "n_trigrams must be a whole number >= 2, got 1"
    assert_refused(message, gatedref.handmade_superposition, 1)
    for wrong in (4, -1):
        message = f"answers must be in [0, 4), got {wrong} at (1,)"
        assert_refused(message, gatedref.holders, RESULT, [0, wrong])


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "3", [2], None, NAN, 1j])
def test_a_size_that_is_no_whole_number_of_1_or_more_is_refused(wrong):
    init, sample = gatedref.init_params, gatedref.sample_skip_trigrams
    assert_refused("n_heads must be", init, wrong, 2, 1)
    assert_refused("d_model must be", init, 1, wrong, 1)
    assert_refused("d_head must be", init, 1, 2, wrong)
    if wrong is not None:
        assert_refused("d_gate must be", init, 1, 2, 1, d_gate=wrong)
    assert_refused("n_trigrams must be", sample, wrong, 3)
    assert_refused("n_sequences must be", sample, 3, wrong)
    assert_refused("n_positions must be", sample, 3, 3, wrong)
    assert_refused("n_trigrams must be", gatedref.handmade_superposition, wrong)


@pytest.mark.parametrize("wrong", [-1, 0.0, True, "0", None])
def test_a_seed_that_is_no_whole_number_of_0_or_more_is_refused(wrong):
    assert_refused("seed must be", gatedref.init_params, 1, 2, 1, wrong)
    assert_refused("seed must be", gatedref.sample_skip_trigrams, 3, 3, seed=wrong)
    sizes = {"B": 1, "T": 1, "H": 1, "D": 1, "K": 1, "G": 1}
    assert_refused("seed must be", gatedref.random_case, wrong, **sizes)


@pytest.mark.parametrize("wrong", ["clamp", None, 1, ["clamp"]])
def test_an_activation_that_is_no_function_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="^activation must be a function .* got <class"):
        gatedref.gated_attention(PARAMS, X, activation=wrong)


def test_an_activation_that_changes_the_shape_is_refused():
    def first_head(scores):
        return scores[:, :1]

    message = (
        "activation must return floats of shape (2, 4, 3, 3), got float64 of shape"
    )
    options = {"activation": first_head}
    assert_refused(message, gatedref.gated_attention, PARAMS, X, **options)
    assert_refused(message, gatedref.loss, PARAMS, X, X, 0.1, **options)


def test_an_activation_that_returns_what_is_no_number_is_refused():
    def logarithm(scores):
        with np.errstate(invalid="ignore"):
            return anp.log(scores)

    def is_open(scores):
        return scores > 0

    message = "activation must return finite numbers, got nan for -"
    assert_refused(message, gatedref.loss, PARAMS, X, X, 0.1, activation=logarithm)
    message = "activation must return floats of shape (2, 4, 3, 3), got bool"
    assert_refused(message, gatedref.gated_attention, PARAMS, X, activation=is_open)


def test_wrong_tokens_and_layers_are_refused():
    transformer = gatedref.transformer
    for wrong in ([[0.0]], [[True]], [["a"]]):
        assert_refused("tokens must be integers, got", transformer, [PARAMS], wrong)
    assert_refused("tokens must be of shape [B, T]", transformer, [PARAMS], [0, 1])
    for wrong in (5, -1):
        message = f"tokens must be in [0, 5), got {wrong} at (0, 1)"
        assert_refused(message, transformer, [PARAMS], [[0, wrong]])
    for wrong in ([], None, PARAMS, "x", 3):
        assert_refused("layers must be a list", transformer, wrong, [[0]])
    cut = {**PARAMS, "W_K": PARAMS["W_K"][:1]}
    message = "layers[1]: W_K must be of shape [H = 4, D = 5, K = 6], got shape (1,"
    assert_refused(message, transformer, [PARAMS, cut], [[0]])
    wider = normal_params(sizes={**SIZES, "D": 6})
    with pytest.raises(ValueError, match="must be of shape"):
        transformer([PARAMS, wider], [[0]])


# ---- The command ---------------------------------------------------------------------


@pytest.fixture
def command(capsys):
    """The command: takes its arguments, returns its status and the lines it prints."""

    def run(*arguments):
        status = gatedref._main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def results_in_a_file(value_scale=None):
    """The right results of every case, by the names that the command reads."""
    arrays = {}
    for case in gatedref.cases(value_scale):
        for name, array in case.expected.items():
            if name != "grads":
                arrays[f"{case.name}/{name}"] = array
        for name, array in case.expected["grads"].items():
            arrays[f"{case.name}/grads/{name}"] = array
    return arrays


def test_write_writes_every_case_to_a_new_file(command, tmp_path):
    path = tmp_path / "cases.npz"
    status, lines, errors = command("write", path)
    written = dict(np.load(path))
    assert (status, errors) == (0, [])
    assert lines == [f"{path}: {len(written)} arrays written"]
    for case in CASES.values():
        assert written[f"{case.name}/alpha"] == case.alpha
        for name, array in {**case.params, "x": case.x, "target": case.target}.items():
            assert (written[f"{case.name}/{name}"] == array).all()
    for name, array in results_in_a_file().items():
        case_name, stage = name.split("/", 1)
        assert (written[f"{case_name}/expected/{stage}"] == array).all()
    assert len(written) == len(CASES) * (len(GATED_BLOCK) + 3 + 28)


def test_write_leaves_a_file_that_exists_alone(command, tmp_path):
    path = tmp_path / "results.npz"
    path.write_text("hours of work")
    status, lines, errors = command("write", path)
    assert (status, lines, len(errors)) == (2, [], 1)
    assert str(path) in errors[0]
    assert path.read_text() == "hours of work"


def test_check_passes_right_results_in_float32(command, tmp_path):
    path = tmp_path / "results.npz"
    np.savez(path, **as_type(results_in_a_file(), np.float32))
    status, lines, errors = command("check", path)
    assert (status, errors) == (0, [])
    expected = [f"{name}: 28 arrays match" for name in CASES]
    expected[-1] = "gate_edges: 23 arrays match"
    assert lines[:12] == expected
    left_out = "grads/W_gate_Q, grads/b_gate_Q, grads/W_gate_K, grads/b_gate_K, grads/x"
    assert left_out in lines[12]
    assert lines[13:] == [f"{11 * 28 + 23} arrays match; 0 cases differ"]

    status, lines, _ = command("check", path, "--strict")
    assert (status, lines[-1]) == (0, f"{12 * 28} arrays match; 0 cases differ")


def test_check_tells_what_is_missing_or_wrong(command, tmp_path):
    path = tmp_path / "results.npz"
    z = DENSE.expected["z"]
    np.savez(path, **{"dense/z": z, "tiles/loss": CASES["tiles"].expected["loss"]})
    status, lines, _ = command("check", path)
    assert status == 0
    assert "dense: 1 arrays match" in lines
    assert "one_hot: not in the file" in lines
    assert lines[-1] == "2 arrays match; 0 cases differ"

    np.savez(path, **{"dense/z": z + 1e-9, "tiles/z": z})
    status, lines, _ = command("check", path)
    assert (status, lines[-1]) == (1, "0 arrays match; 2 cases differ")
    assert lines[1].startswith("dense: z[")
    assert lines[5].startswith("tiles: z has shape ")


def test_check_does_not_pass_what_no_case_expects_nor_an_empty_file(command, tmp_path):
    path = tmp_path / "results.npz"
    z = DENSE.expected["z"]
    np.savez(path, **{"dense/z": z, "desne/z": z, "z": z})
    status, lines, _ = command("check", path)
    assert status == 1
    assert "desne: there is no case of this name" in lines
    assert "z: there is no case of this name" in lines

    np.savez(path, **{"dense/z": z, "dense/zz": z})
    status, lines, _ = command("check", path)
    assert status == 1
    assert re.match("dense: got must .*'zz'", lines[1])

    np.savez(path)
    status, lines, _ = command("check", path)
    assert (status, lines[-1]) == (1, "0 arrays match; 0 cases differ")


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "torn", "npy", "objects"])
def test_a_file_that_cannot_be_read_is_told_in_one_line(command, tmp_path, kind):
    path = tmp_path / "results.npz"
    np.savez(path, **{"dense/z": DENSE.expected["z"]})
    whole = path.read_bytes()
    path.unlink()
    if kind == "npy":
        with open(path, "wb") as file:
            np.save(file, DENSE.expected["z"])
    if kind == "objects":
        np.savez(path, **{"dense/z": np.array([None])})
    contents = {"empty": b"", "text": b"no numbers", "torn": whole[: len(whole) // 2]}
    if kind in contents:
        path.write_bytes(contents[kind])
    status, lines, errors = command("check", path)
    assert (status, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("gatedref.py: ")
    assert str(path) in errors[0]


def test_files_of_other_programs_are_read(command, tmp_path):
    path = tmp_path / "results.npz"
    loss = DENSE.expected["loss"]
    np.savez(path, **{"dense/loss": np.reshape(loss, 1)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("dense/", "")  # as `zip -r` writes a folder
    status, lines, _ = command("check", path)
    assert (status, lines[-1]) == (0, "1 arrays match; 0 cases differ")


def test_results_of_float32_kept_as_float64_pass_with_rtol(command, tmp_path):
    path = tmp_path / "results.npz"
    z = DENSE.expected["z"].astype(np.float32).astype(np.float64)
    np.savez(path, **{"dense/z": z})
    assert command("check", path)[0] == 1
    assert command("check", path, "--rtol", "1e-6")[0] == 0
    assert command("check", path, "--rtol", "1e-12")[0] == 1
    status, lines, errors = command("check", path, "--rtol", "2")
    assert (status, lines, len(errors)) == (2, [], 1)


def test_check_compares_derivatives_at_the_ends_when_strict(command, tmp_path):
    path = tmp_path / "results.npz"
    expected = CASES["gate_edges"].expected
    wrong = 2 * expected["grads"]["x"]
    np.savez(path, **{"gate_edges/z": expected["z"], "gate_edges/grads/x": wrong})
    assert command("check", path)[0] == 0
    assert command("check", path, "--strict")[0] == 1


def test_blocks_with_value_scale_have_cases_of_their_own(command, tmp_path):
    path = tmp_path / "cases.npz"
    assert command("write", path, "--value-scale", "2.5")[0] == 0
    with np.load(path) as written:
        assert written["dense/value_scale"] == 2.5
        assert "dense/expected/grads/value_scale" in written
    path = tmp_path / "results.npz"
    np.savez(path, **results_in_a_file(value_scale=2.5))
    assert command("check", path, "--value-scale", "2.5")[0] == 0
    assert command("check", path)[0] == 1
    assert command("check", path, "--value-scale", "-1")[0] == 2


@pytest.mark.parametrize(
    "arguments", [[], ["results.npz"], ["check"], ["write", "a", "b"]]
)
def test_other_arguments_write_nothing(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        gatedref._main(arguments)
    assert ended.value.code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command_name", [[], ["write"], ["check"]])
def test_help_writes_nothing(command_name, tmp_path):
    program = [sys.executable, gatedref.__file__, *command_name, "--help"]
    help_text = subprocess.check_output(program, cwd=tmp_path, text=True)
    assert help_text.startswith("usage: gatedref.py")
    assert list(tmp_path.iterdir()) == []


# ---- train.py: the takeover ----------------------------------------------------------


def four_heads(gates):
    """A gated block of four heads and tokens; gates: {(head, query, key): gate}."""
    rng = np.random.default_rng(0)
    params = gatedref.init_params(4, 4, 2, d_gate=4)
    for name in ("W_Q", "b_Q", "W_V", "W_gate_Q", "W_gate_K"):
        params[name] = np.zeros_like(params[name])  # all attend alike, everywhere
    params["b_V"] = np.full((4, 2), 0.05)
    params["W_O"] = np.repeat(rng.normal(size=(1, 1, 4)), 8, axis=1).reshape(4, 2, 4)
    for (head, query, key), gate in gates.items():
        params["W_gate_Q"][head, query, key] = gate
        params["W_gate_K"][head, key, key] = 1
    params["value_scale"] = np.array(2.0)
    return params


# All sequences of four tokens, one-hot.
ALL_PAIRS = np.eye(4)[list(itertools.product(range(4), repeat=4))]
EVEN = np.full((4, 4), 1 / 16)


def open_gates(params):
    """{(head, query, key): gate} of all gates that are open."""
    gate, _, _ = train.survey(params, ALL_PAIRS)
    found = {}
    for head, query, key in np.argwhere(gate > 1e-9).tolist():
        found[head, query, key] = float(gate[head, query, key])
    return found


def after_takeover(params, frequency=EVEN):
    fixed = {"value_scale": params["value_scale"]}

    def look(trained):
        return train.survey({**trained, **fixed}, ALL_PAIRS)

    trained = {name: params[name] for name in GATED_BLOCK}
    after = train.take_over(trained, look, frequency, 0.6, 4.0, train.write_vector)
    return {**after, **fixed}


ALONE = {(0, 1, 0): 0.8, (1, 3, 1): 0.7, (2, 0, 3): 0.9}  # each its head's alone
SHARED = {(0, 2, 0): 0.5, (1, 2, 0): 0.3}


def test_a_spare_head_takes_over_the_pair_whose_sharing_costs_most():
    after = open_gates(after_takeover(four_heads({**ALONE, **SHARED})))
    assert after == pytest.approx({**ALONE, (3, 2, 0): 0.8})

    less = {(0, 0, 2): 0.3, (1, 0, 2): 0.2}
    after = open_gates(after_takeover(four_heads({**ALONE, **SHARED, **less})))
    assert after == pytest.approx({**ALONE, **less, (3, 2, 0): 0.8})

    rare = EVEN.copy()
    rare[2, 0] /= 10
    after = open_gates(after_takeover(four_heads({**ALONE, **SHARED, **less}), rare))
    assert after == pytest.approx({**ALONE, **SHARED, (3, 0, 2): 0.5})


def test_nothing_is_taken_over_where_it_would_not_pay_or_cannot_be_done():
    wide = {(3, 3, 3): 0.1, (0, 2, 0): 0.6, (1, 2, 0): 0.41}  # no gate writes so much
    busy = {(3, 3, 3): 0.9, (0, 2, 0): 0.02, (1, 2, 0): 0.02}  # head 3 has more to do
    alone = {(3, 3, 3): 0.1}
    for more in (wide, busy, alone):
        gates = {**ALONE, **more}
        assert open_gates(after_takeover(four_heads(gates))) == pytest.approx(gates)


def test_a_head_that_takes_over_writes_what_all_wrote_there_and_the_rest_stays():
    before = four_heads({**ALONE, **SHARED})
    after = after_takeover(before)
    together = []
    for params in (before, after):
        gate, pattern, value = train.survey(params, ALL_PAIRS)
        together.append(np.einsum("hqk,hqk,hkd->qkd", gate, pattern, value))

    change = np.abs(together[1] - together[0])
    # A trace of the old weights is left.
    assert change[2, 0].max() < 0.01 * np.abs(together[0]).max()
    change[2, 0] = 0
    assert change.max() < 1e-12
    for name in BLOCK:
        np.testing.assert_array_equal(after[name][:3], before[name][:3])


def test_a_survey_is_what_the_block_does_on_average():
    params = {**normal_params(sizes={**SIZES, "D": 5}), "value_scale": np.array(3.0)}
    x = np.eye(5)[[[0, 1, 1, 3], [2, 1, 0, 3]]]
    gate, pattern, value = train.survey(params, x)
    block = gatedref.gated_attention(params, x)
    # Token 1 looks at token 1 from positions 1 and 2 of the first sequence and from
    # position 1 of the second; at the second of these it sees two of them.
    attention = block["pattern"][0, :, 1, 1] + block["pattern"][1, :, 1, 1]
    attention += block["pattern"][0, :, 2, 1] + block["pattern"][0, :, 2, 2]
    assert_close(pattern[:, 1, 1], attention / 3, 13)
    assert_close(gate[:, 1, 3], block["gate"][0, :, 1, 3], 13)

    # All that token 3 writes on average.
    in_sum = np.einsum("hk,hk,hkd->d", gate[:, 3], pattern[:, 3], value)
    result = block["attn_out"][0, 3] + block["attn_out"][1, 3]
    assert_close(in_sum, result / 2, 13)


def test_pairs_are_as_frequent_as_in_the_mean_that_the_penalty_takes():
    tokens = np.array([[0, 1, 1], [2, 1, 0]])
    expected = np.zeros((4, 4))
    for sequence in tokens:
        for query, key in itertools.product(sequence, sequence):
            expected[query, key] += 1 / 18  # keys after the query too
    assert_close(train.pair_frequency(np.eye(4)[tokens]), expected, 14)


def test_a_stuck_gate_gets_a_gradient_only_where_a_step_downhill_leads_back():
    scores = np.array([-1.0, 0.0, 0.3, 1.0, 2.0])
    np.testing.assert_array_equal(train.reopening(scores), gatedref.clamp(scores))

    def rising(scores):
        return 0.2 * train.reopening(scores)

    def falling(scores):
        return -0.3 * train.reopening(scores)

    slopes = elementwise_grad(rising)(scores)
    np.testing.assert_array_equal(slopes, [0, 0.2, 0.2, 0.2, 0.2])
    slopes = elementwise_grad(falling)(scores)
    np.testing.assert_array_equal(slopes, [-0.3, -0.3, -0.3, -0.3, 0])


# ---- train.py: training --------------------------------------------------------------

SHORT = train.RECIPE._replace(steps=12, batch=5)
TOKENS, _ = gatedref.sample_skip_trigrams(3, 40)
ONE_HOT = np.eye(8)[TOKENS]
HANDMADE = gatedref.handmade_superposition(3)
TARGET = train.written([HANDMADE], TOKENS)


def attn_out_of(gated, x):
    return gatedref.gated_attention(gated, x)["attn_out"]


def assert_same_block(actual, expected):
    for name in GATED_BLOCK:
        np.testing.assert_array_equal(actual[name], expected[name])


def test_each_leg_has_its_rate_and_an_adam_of_its_own():
    slopes = iter([1.0] * 100 + [1000.0] * 100)
    recipe = train.TOY._replace(steps=200, rate=0.1, rate_factors=(1.0, 0.3))

    def draw():
        return (next(slopes),)

    def loss_of(layers, slope):
        return slope * layers[0]["x"]

    # Where the slope stays the same Adam's steps are the rate, whatever it is.
    (found,) = train.descend(loss_of, [{"x": np.array(1.0)}], draw, recipe)
    assert found["x"] == pytest.approx(1 - 100 * 0.1 - 100 * 0.03)


def test_the_first_step_of_a_leg_moves_each_parameter_by_the_rate():
    seen = []

    def watch(_, gated):
        seen.append(gated["W_O"])

    recipe = SHORT._replace(steps=2, rate_factors=(1.0, 0.5), takeovers=False)
    train.take_apart(ONE_HOT, TARGET, 2, recipe=recipe, watch=watch)
    for before, after, rate in zip(seen, seen[1:], (0.01, 0.005)):
        moved = np.abs(after - before)
        np.testing.assert_allclose(moved[moved > 1e-9], rate, rtol=1e-3)
        assert (moved > 1e-9).mean() > 0.5


def test_training_minimises_the_loss_of_the_reference_over_the_targets_variance():
    """On one sequence every batch is the whole, so the first step can be foretold."""
    x = np.eye(8)[[[7, 0, 3, 2, 6, 1, 4, 5]]]
    target = gatedref.attention(HANDMADE, x)["attn_out"]
    recipe = SHORT._replace(alpha=8.0, d_head=3)
    gated, curves = train.take_apart(x, target, 2, seed=5, recipe=recipe)

    variance = target.var(axis=(0, 1)).mean()
    start = gatedref.init_params(8, 8, 3, 5, d_gate=2)
    start["value_scale"] = 2 * np.abs(target).max()
    loss = gatedref.loss(start, x, target, 8 * variance)
    assert gated["value_scale"] == start["value_scale"]
    assert curves[0]["loss"] == pytest.approx(loss["loss"] / variance)
    assert curves[0]["unexplained"] == pytest.approx(loss["mse"] / variance)
    assert curves[0]["penalty"] == pytest.approx(loss["penalty"])
    assert len(curves) == 12

    growing = recipe._replace(alpha_growth=0.5, takeovers=False)
    _, curves = train.take_apart(x, target, 2, recipe=growing)
    for step, alpha in ((0, 0), (3, 4), (6, 8), (11, 8)):
        now = curves[step]
        assert now["loss"] == pytest.approx(now["unexplained"] + alpha * now["penalty"])


def test_a_large_batch_is_differentiated_in_parts_and_makes_the_same_gradient():
    params = normal_params(sizes={**SIZES, "D": 8})
    recipe = SHORT._replace(activation=gatedref.clamp)
    x = np.repeat(ONE_HOT, 10, axis=1)[:24]  # T = 110: 23 such sequences are a part
    target = np.repeat(TARGET, 10, axis=1)[:24]
    slices = gatedref.parts(24, train.bytes_of_gradient(x, 4))
    assert slices == [slice(0, 23), slice(23, 46)]
    arguments = (x, target, 2.0, 0.5, recipe)
    gradient, scalars = train.gradient_at(params, {}, *arguments)
    whole, expected = grad_and_aux(train.loss_of_block)(params, {}, *arguments)
    assert scalars == pytest.approx(expected)
    assert_all_close(gradient, whole, 12)


def test_a_seed_makes_the_same_block_again_and_another_seed_another(tmp_path):
    first, _ = train.take_apart(ONE_HOT, TARGET, 2, recipe=SHORT)
    other, _ = train.take_apart(ONE_HOT, TARGET, 2, seed=1, recipe=SHORT)
    for name in GATED_BLOCK:
        assert (first[name] != other[name]).any()

    np.save(tmp_path / "target.npy", TARGET)
    mapped = np.load(tmp_path / "target.npy", mmap_mode="r")
    permuted = np.transpose(np.transpose(TARGET, (2, 0, 1)).copy(), (1, 2, 0))
    for target in (TARGET.tolist(), np.asfortranarray(TARGET), mapped, permuted):
        again, _ = train.take_apart(ONE_HOT.astype(int), target, 2, recipe=SHORT)
        assert_same_block(again, first)

    published_recipe = train.PUBLISHED._replace(steps=3, batch=5)
    block, _ = train.take_apart(ONE_HOT, TARGET, 2, recipe=published_recipe)
    assert block["W_Q"].shape == (4, 8, 1) and "value_scale" not in block


def test_float32_in_trains_in_float32():
    x, target = ONE_HOT.astype(np.float32), TARGET.astype(np.float32)
    single, curves = train.take_apart(x, target, 2, recipe=SHORT)
    assert {array.dtype for array in single.values()} == {np.dtype(np.float32)}
    double, expected = train.take_apart(x, target.astype(float), 2, recipe=SHORT)
    assert double["W_Q"].dtype == np.float64
    assert curves[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


def test_a_watcher_sees_the_block_as_it_stands():
    seen = []

    def watch(done, gated):
        seen.append((done, gated))

    gated, _ = train.take_apart(ONE_HOT, TARGET, 2, recipe=SHORT, watch=watch)
    assert [done for done, _ in seen] == pytest.approx(np.arange(13) / 12)
    assert_same_block(seen[-1][1], gated)


def test_the_handmade_heads_come_apart():
    tokens, _ = gatedref.sample_skip_trigrams(3, 1000)
    target = train.written([HANDMADE], tokens)
    recipe = train.RECIPE._replace(steps=300, rate=0.03, alpha=1.0)
    gated, _ = train.take_apart(np.eye(8)[tokens], target, 2, seed=3, recipe=recipe)

    task = train.skip_trigram_task(3, 2000, seed=1)
    found = train.verdict(train.writes([gated]), [HANDMADE], task)
    assert found["apart"]
    assert found["share"] > 0.9
    assert found["unexplained"] < 0.02


def test_any_residual_stream_can_be_taken_apart():
    """Positions in x, and D no vocabulary: a block learns what another block writes."""
    rng = np.random.default_rng(0)
    embedding, positions = rng.normal(size=(6, 12)), rng.normal(size=(9, 12))
    x = embedding[rng.integers(6, size=(300, 9))] + positions
    model = gatedref.init_params(2, 12, 3, seed=1)
    target = gatedref.attention(model, x)["attn_out"]
    recipe = train.RESIDUAL._replace(steps=200, rate=0.02, d_head=3, alpha=0.0)
    gated, _ = train.take_apart(x, target, 2, recipe=recipe)
    assert gated["W_Q"].shape == (2 * recipe.expansion, 12, 3)
    assert gatedref.unexplained(attn_out_of(gated, x), target) < 0.05


REFUSED_BY_TAKE_APART = [
    ("x", {"x": TOKENS}),
    ("np.eye(V)[tokens]", {"x": TOKENS}),
    ("x must be one-hot", {"x": ONE_HOT / 2}),
    ("train.RESIDUAL", {"x": ONE_HOT + 1}),
    ("x", {"x": np.ma.masked_equal(ONE_HOT, 0)}),
    ("target", {"target": np.ma.masked_less(TARGET, 0)}),
    ("target", {"target": TARGET[0]}),
    ("T = 10 (as in x)", {"x": ONE_HOT[:, 1:]}),
    ("D = 7 (as in x)", {"x": ONE_HOT[:, :, 1:]}),
    ("target must be finite", {"target": TARGET * np.nan}),
    ("target", {"target": np.ones_like(TARGET)}),
    ("overflows", {"target": TARGET * 1e155}),
    ("n_heads must be a whole number >= 1", {"n_heads": 0}),
    ("'2'", {"n_heads": "2"}),
    ("seed", {"seed": -1}),
    ("watch", {"watch": "progress"}),
    ("GiB", {"x": np.ones((1, 10**5, 1)), "target": np.ones((1, 10**5, 1))}),
    ("Recipe", {"recipe": None}),
    ("Recipe", {"recipe": SHORT._asdict()}),
    ("recipe.d_gate", {"recipe": train.TOY._replace(expansion=1, d_head=1)}),
    ("recipe.steps", {"recipe": SHORT._replace(steps=50.0)}),
    ("recipe.steps", {"recipe": SHORT._replace(steps=0)}),
    ("recipe.batch", {"recipe": SHORT._replace(batch=0)}),
    ("recipe.rate must be > 0", {"recipe": SHORT._replace(rate=-1)}),
    ("recipe.rate must be finite", {"recipe": SHORT._replace(rate=np.inf)}),
    ("recipe.p", {"recipe": SHORT._replace(p=0)}),
    ("recipe.alpha", {"recipe": SHORT._replace(alpha=-1)}),
    ("recipe.alpha_growth", {"recipe": SHORT._replace(alpha_growth=1.1)}),
    ("recipe.value_scale", {"recipe": SHORT._replace(value_scale=0)}),
    ("recipe.rate_factors", {"recipe": SHORT._replace(rate_factors=())}),
    ("recipe.rate_factors[1]", {"recipe": SHORT._replace(rate_factors=(1, 0))}),
    ("recipe.activation", {"recipe": SHORT._replace(activation="clamp")}),
    ("recipe.takeovers", {"recipe": SHORT._replace(takeovers=2)}),
]


@pytest.mark.parametrize("words, change", REFUSED_BY_TAKE_APART)
def test_take_apart_refuses_by_name(words, change):
    arguments = {"x": ONE_HOT, "target": TARGET, "n_heads": 2, "recipe": SHORT}
    with pytest.raises((TypeError, ValueError)) as refusal:
        train.take_apart(**{**arguments, **change})
    assert words in str(refusal.value)


def test_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train.take_apart(ONE_HOT, TARGET, 2, recipe=SHORT._replace(rate=1e300))


def test_recipes_can_be_sent_to_another_process():
    for recipe in (train.RECIPE, train.RESIDUAL, train.PUBLISHED, train.TOY):
        assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_a_toy_learns_its_trigrams():
    toy = train.train_toy(2, 2, 0, train.TOY._replace(steps=400))
    found = train.judge_on(train.writes(toy), train.skip_trigram_task(2, 1000, seed=1))
    assert found["answers"] == [3, 4]
    assert min(found["accuracy"]) > 0.99


def test_cross_entropy_is_the_mean_of_minus_log_p_without_overflow():
    logits = np.array([[1000.0, 1000, -1000], [800, 0, 0]])
    answers = np.eye(3)[[1, 2]]
    assert train.cross_entropy(logits, answers) == pytest.approx((np.log(2) + 800) / 2)


# ---- Verdicts ------------------------------------------------------------------------


def test_what_is_unexplained_is_the_error_over_the_variance():
    target = normal("STD", 1)
    deviation = target - target.mean(axis=(0, 1))
    assert gatedref.unexplained(target, target) == 0
    mean = np.broadcast_to(target.mean(axis=(0, 1)), target.shape)
    assert gatedref.unexplained(mean, target) == pytest.approx(1)
    written = normal("STD", 2)
    expected = ((written - target) ** 2).sum() / (deviation**2).sum()
    assert gatedref.unexplained(written, target) == pytest.approx(expected)
    single = target.astype(np.float32)
    assert gatedref.unexplained(written, single) == pytest.approx(expected, rel=1e-5)


def test_work_over_many_sequences_is_cut_into_parts_of_256_mib():
    assert gatedref.parts(5, 2**27) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert gatedref.parts(2, 2**40) == [slice(0, 1), slice(1, 2)]
    assert gatedref.parts(3, 1) == [slice(0, 2**28)]


def test_a_model_is_judged_by_what_its_heads_write_and_by_what_it_says():
    """A model that has an unembedding, in two answers."""
    W_U = np.array([[1.0, 0, 0], [0, 1, 0]])  # [D, V]
    heads = np.array([[[3.0, 0], [0, 1]], [[3, 0], [0, 1]], [[0, 2], [0, 2]]])
    answers = np.array([0, 0, 1])
    output = heads.sum(axis=1) @ W_U
    output[1, 2] = 9  # there the residual stream outweighs the heads
    found = gatedref.judge(heads @ W_U, output, answers)
    assert found["answers"] == [0, 1]
    assert found["accuracy"] == [0.5, 1]
    assert found["holders"] == [[(0,)], [(0,), (1,)]]
    assert found["shares"] == [[0.75, 0.25], [0.5, 0.5]]
    assert gatedref.share_of(found) == 0.625
    assert not gatedref.is_apart(found)
    assert gatedref.is_apart({**found, "accuracy": [1, 1]})


def test_the_search_for_holders_can_be_ended():
    result = np.array([[[2.0, 0, 0], [2, 0, 0], [0, 3, 0]]])
    assert gatedref.holders(result, [0]) == [(0, 1)]
    assert gatedref.holders(result, [0], most=1) == []


def test_apart_is_right_on_each_answer_with_a_head_of_its_own_for_each():
    first, second, third = [(0,)], [(1,)], [(2,)]
    either, both = [(0,), (1,)], [(0, 1)]
    many = [[(head,) for head in range(8)]]
    for holders in (
        [first, second],
        [either, first],
        [either, either, third],
        many * 8,
    ):
        right = [1.0] * len(holders)
        assert gatedref.is_apart({"accuracy": right, "holders": holders})
        wrong = [gatedref.RIGHT, *right[1:]]
        assert not gatedref.is_apart({"accuracy": wrong, "holders": holders})
    for holders in (
        [first, first],
        [first, both],
        [first, []],
        [either] * 3,
        many * 10,
    ):
        right = [1.0] * len(holders)
        assert not gatedref.is_apart({"accuracy": right, "holders": holders})


def copy_and_cancel():
    """A block for one trigram, A ... B -> C (tokens 0, 1, 2; BOS is 3).

    Head 0 writes C at every B, wherever it looks. Head 1 looks at A where there is one,
    else at BOS, and there it takes back what head 0 wrote.
    """
    block = {}
    for name, array in gatedref.init_params(2, 4, 1, d_gate=1).items():
        block[name] = np.zeros_like(array)
    block["W_O"][:, 0] = [[0, 0, 1, 0], [0, 0, -1, 0]]  # on C, and against it
    block["b_V"][0] = 5
    block["W_V"][1, 3] = 1
    block["W_Q"][1, 1] = 1
    block["W_K"][1, 0] = 60
    block["W_K"][1, 3] = 30
    block["W_gate_Q"][:, 1] = 1  # both are open at B alone
    block["b_gate_K"][:] = 1
    block["value_scale"] = np.array(1.0)
    return block


def fires_of(block, task):
    """What `judge` finds of a block on a task, and which answers fire without A."""
    seen = train.observe(train.writes([block]), task)
    found = gatedref.judge(seen.result, seen.output, seen.answers)
    complete = (seen.result, seen.answers)
    lured = (seen.result_without_A, seen.lures)
    return found, gatedref.fires_without_A(found, *complete, *lured)


def test_a_head_that_copies_while_another_cancels_fires_without_its_A():
    task = train.skip_trigram_task(1, 2000, seed=0)
    block = copy_and_cancel()
    found, fires = fires_of(block, task)
    assert found["holders"] == [[(0,)]]
    assert fires == [True]

    block["W_V"][0, 0] = 5  # now head 0 writes where it looks at A, and only there
    block["b_V"][0] = 0
    block["W_Q"][0] = block["W_Q"][1]
    block["W_K"][0] = block["W_K"][1]
    _, fires = fires_of(block, task)
    assert fires == [False]

    with pytest.raises(ValueError, match="answer 2 "):
        result = np.ones((1, 2, 4))
        gatedref.fires_without_A(found, result, [2], result, [1])


def test_the_authors_gated_heads_fire_without_A_in_seven_trigrams_of_twelve():
    n_fires = 0
    for setting, (_, n) in train.SETTINGS.items():
        task = train.skip_trigram_task(n, 2000, seed=0)
        _, fires = fires_of(published(f"{setting}/gated"), task)
        n_fires += sum(fires)
    assert n_fires == 7


def test_a_block_that_holds_everything_but_answers_wrongly_is_not_apart():
    task = train.skip_trigram_task(3, 2000, seed=0)
    block = published("2H3T/gated")
    assert gatedref.is_apart(train.judge_on(train.writes([block]), task))

    quiet = {**block, "value_scale": np.array(0.5)}  # the residual outweighs it
    found = train.judge_on(train.writes([quiet]), task)
    assert found["holders"] == [[(1,)], [(0,)], [(3,)]]
    assert max(found["accuracy"]) == 0
    assert not gatedref.is_apart(found)


def test_the_heads_of_all_layers_are_seen_in_order():
    task = train.skip_trigram_task(3, 300, seed=0)
    quiet = {**HANDMADE, "W_O": HANDMADE["W_O"] / 20}
    seen = train.observe(train.writes([HANDMADE, quiet]), task)
    model = gatedref.transformer([HANDMADE, quiet], task.tokens)
    first, second = model["blocks"]
    at = task.answers >= 0
    np.testing.assert_array_equal(seen.result[:, :2], first["result"][at])
    np.testing.assert_array_equal(seen.result[:, 2:], second["result"][at])
    np.testing.assert_allclose(seen.output, model["logits"][at], atol=1e-12)
    np.testing.assert_array_equal(seen.lures, task.lures[task.lures >= 0])
    total = first["attn_out"] + second["attn_out"]
    np.testing.assert_allclose(seen.written, total, atol=1e-12)
    np.testing.assert_array_equal(train.written([HANDMADE, quiet], task.tokens), total)


def test_answers_are_due_at_the_only_trigram_and_lures_are_before_any_A():
    task = train.skip_trigram_task(3, 300, seed=2)
    for tokens, answers, lures in zip(*task):
        _, completes = free_draws(3, tokens.tolist())
        for position, token in enumerate(tokens):
            is_due = completes[position] and sum(completes) == 1
            assert answers[position] == (token + 3 if is_due else -1)
            is_lure = token in (1, 2, 3) and 0 not in tokens[:position]
            assert lures[position] == (token + 3 if is_lure else -1)


# ---- train.py: the command -----------------------------------------------------------

ROOT = Path(train.__file__).parent


def test_a_quick_run_writes_every_file_whatever_the_users_settings_are(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    rival = tmp_path / "installed" / "figures"  # there is a package of this name
    rival.mkdir(parents=True)
    (rival / "__init__.py").write_text("raise ImportError")
    out = tmp_path / "out"
    program = [sys.executable, train.__file__, "--quick", "--seed", "3", "--out", out]
    settings = {
        "PYTHONPATH": str(rival.parent),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
    }
    environment = {**os.environ, **settings}
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.name for path in out.iterdir()}
    assert names == {"main.json", "blocks.npz", "before_after.png", "gates.png"}
    rows = json.loads((out / "main.json").read_text())
    assert [(row["key"], row["seed"]) for row in rows] == [
        (key, 3) for key in train.SETTINGS
    ]
    for row in rows:
        assert f"| {row['key']} | " in done.stdout

    arrays = np.load(out / "blocks.npz")
    gated = {n: arrays[f"3H4T/gated/{n}"] for n in [*GATED_BLOCK, "value_scale"]}
    gate = gatedref.gated_attention(gated, np.eye(10)[None])["gate"][0]
    np.testing.assert_allclose(rows[1]["gates_at_A"], gate[:, :, 0], atol=1e-5)


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", "2"], ["--fast"]])
def test_a_wrong_option_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    assert "train.py: error: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_known_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "file" / "below")])
    assert "cannot write to" in capsys.readouterr().err


def test_a_file_copied_alone_says_what_it_misses(tmp_path):
    shutil.copy(train.__file__, tmp_path)
    program = [sys.executable, tmp_path / "train.py"]
    for needed in ("gatedref.py", "figures"):
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.stderr == f"train.py: {needed} must lie beside it\n"
        shutil.copy(gatedref.__file__, tmp_path)


def test_importing_train_changes_nothing_in_the_process():
    code = "import os; before = dict(os.environ); import train; "
    code += "import sys; assert dict(os.environ) == before; "
    code += "assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_trigram_that_changed_hands_is_told_in_a_sentence():
    row = {"key": "2H3T", "holders_toy": [[(0, 1)], [(1,)], []]}
    row["holders_gated"] = [[(5,)], [(2,)], [(3,), (4,)]]
    row["accuracy_toy"] = row["accuracy_gated"] = [1.0, 1.0, 1.0]
    sentence = "2H3T: B1 took heads 0 and 1 together; now head 5 holds it alone."
    assert before_after.changes_of_hands(row) == [sentence]

    row["accuracy_gated"] = [0.98, 1.0, 1.0]  # the block is wrong on it
    assert before_after.changes_of_hands(row) == []
    held_by = before_after.held_by(row["holders_toy"], [1.0, 0.5, 1.0])
    assert held_by == "0+1, wrong, none"


# ---- What the method cannot do: heads of two layers ----------------------------------

# Of two layers with two heads each; heads 0 and 1 are in the first one.
HELD = [
    ("apart", 1.0, [[(0,)], [(2,)], [(1,)]]),
    ("apart", 1.0, [[(0,)], [(0,), (3,)]]),
    ("within one", 1.0, [[(0,)], [(2, 3)]]),
    ("within one", 1.0, [[(0,)], [(0, 2), (0, 1)]]),
    ("within one", 1.0, [[(0,)], []]),
    ("across", 1.0, [[(0,)], [(1, 2)]]),
    ("across", 1.0, [[(0, 1)], [(0, 2), (1, 3)]]),
    ("across", 0.985, [[(0,)], [(1, 2)]]),
    ("wrong", 0.98, [[(0,)], [(2,)]]),
]


@pytest.mark.parametrize("kind, accuracy, holders", HELD)
def test_a_trigram_is_across_if_no_heads_of_one_layer_hold_it(kind, accuracy, holders):
    shares = [[0.25, 0.25, 0.25, 0.25]] * len(holders)
    right = [1.0] * (len(holders) - 1)
    found = {"accuracy": [*right, accuracy], "holders": holders, "shares": shares}
    assert layers.kind_of(found, 2, least=0.98) == kind
    in_one = kind if kind in ("apart", "wrong") else "shared"
    assert layers.kind_of(found, 1, least=0.98) == in_one


def test_handmade_superposition_is_shared_within_a_layer_or_across_two():
    block = gatedref.handmade_superposition(3)
    block["W_Q"][:, 4:7] = 0  # what a first layer writes is no query to a second one
    silent = {name: np.zeros_like(array) for name, array in block.items()}
    first = {name: array[:1] for name, array in block.items()}  # head 0 alone
    second = {name: array[1:] for name, array in block.items()}
    models = [
        ("shared", [block]),
        ("within one", [silent, block]),
        ("across", [first, second]),
    ]
    task = train.fresh_task(3, 0)
    for kind, model in models:
        row = layers.row_of(model, [block, silent], task, least=0.99)
        assert row["kind"] == kind
        assert row["unexplained"] < 1e-20
        assert [len(sets[0]) for sets in row["holders"]] == [1, 2, 1]


def test_errors_of_two_layers_may_cancel_and_their_gates_meet_if_they_count_as_one():
    error = np.random.default_rng(0).normal(size=(2, 3, 4))
    gate = np.ones((2, 1, 3, 3))
    mse, penalty = layers.by_layer([error, -error], [gate, gate])
    assert mse == pytest.approx(2 * np.mean(error**2))
    assert penalty == pytest.approx(2)
    mse, penalty = layers.as_one([error, -error], [gate, gate])
    assert mse == 0
    assert penalty == pytest.approx(2 ** (1 / 0.6))


def test_two_layers_are_gated_each_by_itself_or_as_one_block():
    toy = [gatedref.init_params(2, 8, 1, seed) for seed in (0, 1)]
    tokens, _ = gatedref.sample_skip_trigrams(3, 600)
    blocks = gatedref.transformer(toy, tokens)["blocks"]
    first, second = (block["attn_out"] for block in blocks)

    recipe = layers.RECIPES["two layers"]._replace(steps=2)
    gated = layers.gate_layers(toy, tokens, layers.by_layer, 0, recipe)
    assert [layer["W_V"].shape for layer in gated] == [(6, 8, 2), (6, 8, 2)]
    largest = max(np.max(np.abs(first)), np.max(np.abs(second)))
    assert [layer["value_scale"] for layer in gated] == [2 * largest, 2 * largest]

    target = train.written(toy, tokens)
    recipe = train.RECIPE._replace(steps=2)
    (block,) = layers.gate_as_block(toy, tokens, target, 0, recipe)
    assert block["W_V"].shape == (16, 8, 4)
    largest = np.max(np.abs(first + second))
    assert block["value_scale"] == pytest.approx(2 * largest)


# ---- What the method cannot do: heads that overlap -----------------------------------

# Of each head: the numbers that it copies, and the queries that it does so for.
OVERLAPPING = overlap.copying_block([[0], [1], [2]], [[0, 2], [0, 1], [1, 2]])
DISJOINT = overlap.copying_block([[0], [1], [1], [2], [2], [0]], [0, 0, 1, 1, 2, 2])
WIDE = overlap.copying_block([[0, 1], [1, 2], [2, 0]], [0, 1, 2])


def loss_of_copies(block):
    x, target = overlap.sample_copies(50, np.random.default_rng(0))
    return gatedref.loss(block, x, target, 0.1)


def test_three_heads_that_overlap_cost_what_six_that_do_not_cost():
    """A proof that the penalty prefers neither, while one wide head is a third."""
    three = loss_of_copies(OVERLAPPING)
    six = loss_of_copies(DISJOINT)
    for name in ("mse", "penalty", "loss"):
        assert three[name] == pytest.approx(six[name], rel=0, abs=1e-15)
    assert three["mse"] < 1e-30
    assert three["penalty"] == pytest.approx(3 / 16 * 2 ** (1 / 0.6))
    assert three["loss"] == pytest.approx(0.0595, abs=5e-5)

    wide = loss_of_copies(WIDE)
    assert wide["mse"] < 1e-30
    assert wide["penalty"] == pytest.approx(3 / 16)
    assert wide["loss"] == pytest.approx(0.0187, abs=1e-4)


def test_how_heads_share_queries_is_read_off_their_gates():
    assert overlap.row_of(OVERLAPPING, seed=0)["kind"] == "shared"
    assert overlap.row_of(DISJOINT, seed=0)["kind"] == "several a query"
    assert overlap.row_of(WIDE, seed=0)["kind"] == "one a query"
    too_little = {**WIDE, "W_gate_K": 0.8 * WIDE["W_gate_K"]}
    assert overlap.row_of(too_little, seed=0)["kind"] == "wrong"
    for gate, kind in ((0.1, "one a query"), (0.11, "shared")):  # above a tenth is open
        block = {**WIDE, "W_gate_Q": WIDE["W_gate_Q"].copy()}
        block["W_gate_Q"][0, 1] = gate
        assert overlap.kind_of(block) == kind


def test_a_query_copies_two_numbers_as_far_as_uniform_attention_gives_them():
    x, target = overlap.sample_copies(200, np.random.default_rng(0))
    wanted = {0: (0, 1), 1: (1, 2), 2: (2, 0), 3: ()}
    for sequence, written in zip(x, target):
        tokens = np.argmax(sequence[:, :4], axis=1).tolist()
        assert sorted(tokens) == [0, 1, 2, 3]
        source = tokens.index(3)
        for t, token in enumerate(tokens):
            expected = np.zeros(7)
            if source <= t:
                for number in wanted[token]:
                    expected[4 + number] = sequence[source, 4 + number] / (t + 1)
            np.testing.assert_allclose(written[t], expected, rtol=0, atol=1e-15)
            assert t == source or not sequence[t, 4:].any()


def test_a_trained_block_attends_alike_to_all_and_its_gates_see_no_number():
    recipe = overlap.RECIPE._replace(d_head=2, steps=10)
    block = overlap.train_block(0, recipe)
    x, _ = overlap.sample_copies(5, np.random.default_rng(0))
    stages = gatedref.gated_attention(block, x)
    np.testing.assert_allclose(stages["pattern"][:, :, 3], 0.25)
    x[:, :, 4:] = 0
    without = gatedref.gated_attention(block, x)
    np.testing.assert_array_equal(stages["gate_scores"], without["gate_scores"])


def test_a_wide_head_takes_over_what_two_wrote_together():
    rng = np.random.default_rng(0)
    read, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # its columns are orthonormal
    write, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    before = overlap.copying_block([[0, 0]] * 6, [[]] * 6)  # with closed gates
    before["W_V"][2:] = 1
    before["b_V"][2:] = 1
    before["W_V"][:2] = 0
    before["W_O"][:2] = 0
    for head in (0, 1):  # these two serve all queries
        before["W_V"][head, 4:, 0] = read[:, head]
        before["W_O"][head, 0, 4:] = write[:, head]
        before["W_gate_Q"][head, :3] = 0.9
    after = overlap.take_over(before)

    x, _ = overlap.sample_copies(20, rng)
    change = attn_out_of(after, x) - attn_out_of(before, x)
    np.testing.assert_allclose(change, 0, atol=1e-12)
    is_open = overlap.gates_of(after)[:, :3, 3] > 1e-9  # [H, query]
    np.testing.assert_array_equal(is_open.sum(axis=0), [1, 1, 1])
    assert is_open.sum(axis=1).max() == 1


# ---- What the method cannot do: different sources ------------------------------------


def test_two_signals_of_four_stand_among_noise():
    x, answers = sources.sample_pairs(5000, np.random.default_rng(7))
    np.testing.assert_array_equal(x.sum(axis=2), 1)
    tokens = np.argmax(x, axis=2)
    assert set(tokens[:, 5]) == {0}
    assert set(tokens[:, :5].ravel()) == set(range(1, 12))
    is_signal = (tokens >= 1) & (tokens <= 4)
    np.testing.assert_array_equal(is_signal.sum(axis=1), 2)
    signals = np.sort(tokens[is_signal].reshape(-1, 2), axis=1)
    np.testing.assert_array_equal(signals, sources.PAIRS[answers])
    assert np.bincount(answers, minlength=10).min() > 400


def test_what_a_head_writes_for_two_signals_lies_between_that_for_each_twice():
    """A proof that no gate can make a head speak for a pair, and else be silent."""
    params = normal_params(sizes={"H": 5, "D": 22, "K": 3, "G": 2}, scale=1)
    written, weight = {}, {}
    for pair in ((1, 1), (2, 2), (1, 2), (2, 1)):
        block = gatedref.gated_attention(params, np.eye(22)[[[*pair, 7, 9, 9, 0]]])
        written[pair] = block["result"][0, -1]  # [H, D]
        scores = block["attn_scores"][0, :, -1]  # [H, key]
        weight[pair] = np.exp(scores).sum(axis=1)[:, None]

    total = weight[1, 1] + weight[2, 2]
    mean = (weight[1, 1] * written[1, 1] + weight[2, 2] * written[2, 2]) / total
    np.testing.assert_allclose(written[1, 2], mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(written[2, 1], mean, rtol=0, atol=1e-12)
    assert np.abs(mean).max() > 0.1


def test_heads_at_two_sources_meet_only_in_a_penalty_by_query():
    apart = np.zeros((1, 2, 6, 6))
    apart[0, 0, 5, 1] = 1  # head 0 looks at one source,
    apart[0, 1, 5, 2] = 1  # head 1 at the other
    alone = np.zeros((1, 2, 6, 6))
    alone[0, 0, 5, 1:3] = 1  # head 0 looks at both
    assert gatedref.lp_penalty(apart) == gatedref.lp_penalty(alone)
    by_query = sources.penalty_by_query
    assert by_query(alone) == pytest.approx(gatedref.lp_penalty(alone))
    assert by_query(apart) == pytest.approx(by_query(alone) * 2 ** (1 / 0.6) / 2)


def test_a_pair_is_of_the_kind_of_the_fewest_heads_that_hold_it():
    answers = np.repeat(np.arange(10), 5)
    result = np.zeros((50, 4, 10))
    result[np.arange(50), 0, answers] = 2  # head 0 says each answer
    assert sources.kinds_of(result, answers) == ["one head"] * 10
    mine = answers == 3
    result[mine, 1, 8] = 3  # head 1 says 8 where 3 is right
    assert sources.kinds_of(result, answers)[3] == "wrong"
    result[mine, 2, 3] = 2  # head 2 outweighs it, together with head 0
    assert sources.kinds_of(result, answers)[3] == "two"
    result[mine, 1, 8] = 5
    result[mine, 3, 3] = 2
    kinds = sources.kinds_of(result, answers)
    assert kinds.pop(3) == "three or more"
    assert kinds == ["one head"] * 9


def test_a_toy_that_stands_in_for_itself_leaves_nothing_unexplained():
    toy = gatedref.init_params(4, 22, 1)
    row = sources.row_of(gatedref.attention, toy, toy, seed=0)
    assert row["unexplained"] == 0
    assert len(row["kinds"]) == 10


# ---- In the wild: a word model -------------------------------------------------------


def test_how_heads_share_what_is_written_is_measured_by_pair_and_by_word():
    """Two heads, two positions, words 3 and 5: small enough to work out by hand."""
    written = np.zeros((1, 2, 2, 2))  # [S, H, query, key]
    written[0, :, 0, 0] = [4, 0]  # one head alone
    written[0, :, 1, 0] = [3, 1]  # the same, but another helps
    written[0, :, 1, 1] = [2, 2]  # both alike
    total, largest, n_heads = wild.pair_sums(written)
    assert (total, largest) == (12, 9)
    assert n_heads == pytest.approx(4 * 1 + 4 * 16 / 10 + 4 * 2)

    by_key = wild.by_word(written.sum(axis=2), np.array([[3, 5]]))
    assert by_key.shape == (2, wild.V)
    assert by_key[:, [3, 5]].tolist() == [[7, 2], [1, 2]]
    assert by_key.sum() == 12
    assert wild.effective_number(np.array([[1, 1, 0], [5, 0, 0]])) == pytest.approx(
        [2, 1]
    )
    entropy = np.log(2) * 3 / 4  # of the shares 1/2, 1/4, 1/4, halved
    rows = np.array([[2.0, 1, 1], [0, 4, 0], [0, 0, 0]])
    assert wild.mean_number(rows) == pytest.approx((np.exp(2 * entropy) + 1) / 2)


def test_a_head_is_as_harmful_as_the_loss_rises_without_it_on_the_word_that_comes():
    W_U = np.eye(wild.D, wild.V)
    tokens = np.array([[2, 7, 4]])
    result = np.zeros((1, 3, 2, wild.D))  # [S, T, H, D]
    result[0, 0, 0, 7] = 5  # before a 7 head 0 says 7
    result[0, 1, 1, 9] = 5  # before a 4 head 1 says 9, and the loss falls without it
    logits = result.sum(axis=2) @ W_U
    losses = wild.losses_of(logits, tokens)
    others = wild.V - 1
    assert losses[0, 0] == pytest.approx(np.log(np.exp(5) + others) - 5)
    rises = wild.rises_of(result, logits, W_U, tokens)
    assert rises.shape == (2, wild.V)
    assert rises[0, 7] == pytest.approx(np.log(wild.V) - losses[0, 0])
    assert rises.sum() == pytest.approx(rises[0, 7])


def test_a_block_in_the_place_of_the_models_own_recovers_all_and_silence_nothing():
    model = wild.train_model(
        2, 4, 0, wild.text_of().train, train.shortened(SHORT, True)
    )
    tokens = wild.text_of().held_out[:8]
    block = wild.block_of(model)
    seen = wild.observe(block, None, model, tokens)
    measured = wild.measures_of(seen, model, tokens)
    assert measured["unexplained"] == 0
    assert measured["recovered"] == pytest.approx(1)

    top = wild.run(block, 1, wild.stream_of(model, tokens))
    assert ((top.result != 0).any(axis=3).sum(axis=2) == 1).all()
    np.testing.assert_array_equal((top.weights.sum(axis=3) > 0).sum(axis=1), 1)


def test_no_sequence_of_the_text_is_both_learnt_from_and_held_out(tmp_path):
    text = wild.text_of()
    learnt = set(map(tuple, text.train.tolist()))
    assert not learnt & set(map(tuple, text.held_out.tolist()))
    assert len(text.words) == wild.V
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    for name in ("short.txt", "latin.txt", "missing.txt"):
        with pytest.raises(SystemExit, match=f"wild: .*{name}"):
            wild.text_of(tmp_path / name)


# ---- The scripts ---------------------------------------------------------------------


def test_a_run_goes_on_from_whole_rows_of_the_same_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SCRATCH", tmp_path)
    options = common.Options(range(3), False, False, tmp_path)
    jobs = [{"seed": seed} for seed in options.seeds]
    done = []

    def work(job, is_smoke):
        done.append(job["seed"])
        return {"square": job["seed"] ** 2}

    kept = tmp_path / "squares.jsonl"
    expected = [{"seed": seed, "square": seed**2} for seed in range(3)]
    for n_bytes in (None, -5):  # the second time the last line is torn
        text = kept.read_bytes()[:n_bytes] if kept.exists() else b""
        kept.write_bytes(text)
        rows = common.run("squares", jobs, work, options, train.RECIPE)
        assert rows == expected
    assert done == [0, 1, 2, 2]

    other = train.RECIPE._replace(alpha=1)
    assert common.run("squares", jobs, work, options, other) == expected
    assert done == [0, 1, 2, 2, 0, 1, 2]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "film.gif"
    common.write(path, b"good")
    with pytest.raises(OSError), common.beside(path) as part:
        part.write_bytes(b"to")
        raise OSError("disk full")
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


# ---- The pages -----------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "figures" / "README.md"]
MODULES = ("__init__", "common", "before_after")  # they are no scripts
ROWS = sorted(path.stem for path in (ROOT / "figures").glob("*.json"))
SCRIPTS = sorted(path.stem for path in (ROOT / "figures").glob("*.py"))


@pytest.mark.parametrize("name", ROWS)
def test_the_tables_in_the_pages_equal_the_rows(name):
    rows = json.loads((ROOT / "figures" / f"{name}.json").read_text())
    module = "before_after" if name == "main" else name
    script = importlib.import_module(f"figures.{module}")
    pages = "".join(page.read_text() for page in PAGES)
    for table in script.tables_of(rows):
        assert table in pages


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n not in MODULES])
def test_a_quick_run_of_a_script_makes_rows_and_pictures_like_those_of_a_whole_run(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(common, "SCRATCH", tmp_path / "quick")
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    importlib.import_module(f"figures.{name}").main()
    for picture in pictures_of(name):
        assert (tmp_path / "quick" / picture).stat().st_size > 1000
    if name in ROWS:
        stored = json.loads((ROOT / "figures" / f"{name}.json").read_text())
        made = json.loads((tmp_path / "quick" / f"{name}.json").read_text())
        jobs = jobs_in(stored)
        assert all(job in jobs for job in jobs_in(made))
        assert capsys.readouterr().out.count("| --- |") >= 1


def pictures_of(name):
    """The pictures that the results page says a script makes."""
    command = re.escape(f"| `python -m figures.{name}` |")
    line = re.search(f"{command}(.*)", PAGES[1].read_text())[1]
    return re.findall(r"`(\w+\.\w+)`", line)


def jobs_in(rows):
    """What was run, and the names of what each row tells."""
    return [(row.get("key"), row.get("variant"), list(row)) for row in rows]


def stored_block(which):
    """The 2H3T `toy` of figures/blocks.npz, or its `gated` block."""
    prefix = f"2H3T/{which}/"
    block = {}
    with np.load(ROOT / "figures" / "blocks.npz") as arrays:
        for name in arrays:
            if name.startswith(prefix):
                block[name.removeprefix(prefix)] = arrays[name]
    return block


def test_the_example_in_the_readme_is_what_the_stored_blocks_write():
    """Each number of its two tables, on the positions where a trigram is complete."""
    task = train.skip_trigram_task(3, 10000, seed=1)
    toy = train.observe(train.writes([stored_block("toy")]), task)
    gated = train.observe(train.writes([stored_block("gated")]), task)
    stages = gatedref.gated_attention(stored_block("gated"), np.eye(8)[None])
    gate = stages["gate"][0]  # [H, V, V]

    text = PAGES[0].read_text()
    for i in (1, 2, 3):
        mine = toy.answers == i + 3
        before = toy.result[mine][:, :, 4:7].mean(axis=0)  # [H, 3]
        after = gated.result[mine][:, :, 4:7].mean(axis=0)
        head = np.abs(after).max(axis=1).argmax()
        in_toy, in_gated = re.findall(rf"^\| B{i} \| (.*) \|$", text, re.MULTILINE)
        expected = [*before[0], *before[1], *before.sum(axis=0)]
        np.testing.assert_allclose(numbers_in(in_toy), expected, atol=0.006)
        expected = [head, *after[head], *after.sum(axis=0), *gate[head, 1:4, 0]]
        np.testing.assert_allclose(numbers_in(in_gated), expected, atol=0.006)


def numbers_in(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]
