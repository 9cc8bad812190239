"""What gatedref computes, in statements: what equals what, and to how many digits.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import functools
import hashlib
import itertools
import json
import math
import queue
import subprocess
import sys
import tracemalloc
from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad, jacobian
from autograd.tracer import getval

import gatedref
import train

# Matplotlib 3.9 calls pyparsing by names that the newest pyparsing deprecates.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning:matplotlib", "ignore::DeprecationWarning:pyparsing"
)


# ------------------------------------------------------------------------------------------------
# Helpers

UNGATED = {"W_Q": "HDK", "W_K": "HDK", "W_V": "HDK", "W_O": "HKD"}
UNGATED.update({"b_Q": "HK", "b_K": "HK", "b_V": "HK"})
GATED = {**UNGATED, "W_gate_Q": "HDG", "W_gate_K": "HDG", "b_gate_Q": "HG", "b_gate_K": "HG"}
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


def leaves(value):
    """The arrays and numbers in whatever dicts, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for v in value for leaf in leaves(v)]


def assert_same(actual, expected):
    """The same numbers and the same types."""
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        assert isinstance(a, type(e))
        assert np.asarray(a).dtype == np.asarray(e).dtype
        np.testing.assert_array_equal(a, e)


def assert_close(actual, expected, digits):
    """Equal to so many digits of the largest entry, which in a dict is that of all its arrays."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        assert [np.shape(actual[n]) for n in expected] == [np.shape(a) for a in expected.values()]
        actual, expected = (
            np.concatenate([np.ravel(arrays[n]) for n in expected]) for arrays in (actual, expected)
        )
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


def dot(a, b):
    return sum(m * n for m, n in zip(a, b))


def naive_block(params, x, activation=None, value_scale=None):
    """`attention`, or given an activation `gated_attention`, in loops over single numbers."""
    (B, T, D), (H, _, K), P = x.shape, params["W_Q"].shape, dict(params)

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


# ------------------------------------------------------------------------------------------------
# The block and its gate


def test_attention_equals_plain_loops_to_13_digits():
    params, x = randoms(UNGATED), randoms("BTD", 1)
    out, naive = gatedref.attention(params, x), naive_block(params, x)
    for name in naive.keys() | out.keys():
        assert_close(out[name], naive[name], 13)


@pytest.mark.parametrize("d_gate", [1, 7])
@pytest.mark.parametrize(
    "options",
    [{}, {"value_scale": 0.7}, {"value_scale": 30}, *({"activation": a} for a in ACTIVATIONS)],
)
def test_gated_attention_equals_plain_loops_to_13_digits(options, d_gate):
    params, x = randoms(GATED, G=d_gate), randoms("BTD", 1)
    out = gatedref.gated_attention(params, x, **options)
    naive = naive_block(params, x, **{"activation": "clamp", **options})
    scores = naive["gate_scores"]
    assert (scores < 0).any() and (scores > 1).any() and ((scores > 0) & (scores < 1)).any()
    for name in naive.keys() | out.keys():
        assert_close(out[name], naive[name], 13)


@pytest.mark.parametrize("axes, block", [(UNGATED, "attention"), (GATED, "gated_attention")])
def test_permuting_heads_permutes_results(axes, block):
    params, x, order = randoms(axes), randoms("BTD", 1), [2, 0, 3, 1]
    out = getattr(gatedref, block)(params, x)
    permuted = getattr(gatedref, block)({n: a[order] for n, a in params.items()}, x)
    assert_close(permuted["result"], out["result"][:, :, order], 14)
    assert_close(permuted["pattern"], out["pattern"][:, order], 14)
    assert_close(permuted["attn_out"], out["attn_out"], 14)


@pytest.mark.parametrize("axes, block", [(UNGATED, "attention"), (GATED, "gated_attention")])
def test_later_positions_and_other_sequences_change_nothing(axes, block):
    params, x = randoms(axes), randoms("BTD", 1, T=6)
    out, later = getattr(gatedref, block)(params, x)["attn_out"], x.copy()
    later[0, 4:] = 9
    changed = getattr(gatedref, block)(params, later)["attn_out"]
    assert_close(changed[0, :4], out[0, :4], 14)
    assert_close(changed[1], out[1], 14)
    assert not np.isclose(changed[0, 4:], out[0, 4:]).any()
    assert_close(getattr(gatedref, block)(params, x[1:])["attn_out"], out[1:], 14)


def test_with_every_gate_1_and_unit_norms_a_gated_block_is_the_ungated_one():
    params, x = randoms(GATED), randoms("BTD", 1)
    params["W_V"] /= np.linalg.norm(params["W_V"], axis=1, keepdims=True)
    params["W_O"] /= np.linalg.norm(params["W_O"], axis=2, keepdims=True)
    for name in ("W_gate_Q", "W_gate_K"):
        params[name][:] = 0
    params["b_gate_Q"][:] = params["b_gate_K"][:] = 1  # a score of G = 7, clamped to 1
    out = gatedref.gated_attention(params, x)
    ungated = gatedref.attention({name: params[name] for name in UNGATED}, x)
    for name in ungated:
        assert_close(out[name], ungated[name], 14)


def test_the_length_of_value_columns_and_output_rows_does_not_matter():
    params, x = randoms(GATED), randoms("BTD", 1)
    out = gatedref.gated_attention(params, x)["attn_out"]
    longer = {**params, "W_V": params["W_V"] * np.arange(1, 7), "W_O": params["W_O"] * 1e5}
    assert_close(gatedref.gated_attention(longer, x)["attn_out"], out, 14)
    assert np.ptp(gatedref.gated_attention({**params, "b_V": 9 * params["b_V"]}, x)["v"]) > 9


def test_with_value_scale_the_length_of_value_columns_with_their_bias_does_not_matter():
    params, x = randoms(GATED), randoms("BTD", 1)
    out = gatedref.gated_attention(params, x, value_scale=3)
    longer = {**params, "W_V": params["W_V"] * 50, "b_V": params["b_V"] * 50}
    scaled = gatedref.gated_attention(longer, x, value_scale=6)
    assert_close(scaled["attn_out"], 2 * out["attn_out"], 14)


@pytest.mark.parametrize("total", [0, 0.25, 1, 1.25, -0.25])
def test_gate_scores_are_exact_where_their_sums_are(total):
    # x . W + b with x = (3/2, -1/4), W = (1/2, 1) and b = total - 1/2 is `total`, with no rounding.
    W = np.array([[[0.5], [1.0]]])
    params = one_head(W_gate_Q=W, b_gate_Q=np.array([[total - 0.5]]))
    out = gatedref.gated_attention(params, [[[1.5, -0.25]]])
    assert out["gate_scores"].item() == total
    assert out["gate"].item() == min(max(total, 0), 1)
    assert out["gated_pattern"].item() == min(max(total, 0), 1)


def test_a_norm_of_exactly_1e_minus_12_counts_as_a_constant():
    def written(w):
        return gatedref.gated_attention(one_head(1, W_V=w), [[[1, 0]]])["attn_out"].sum()

    slope = grad(written)(np.array([[[1e-12], [0.0]]]))
    assert slope.ravel() == pytest.approx([1e12, 0], rel=1e-13)


# ------------------------------------------------------------------------------------------------
# The penalty and the loss


@pytest.mark.parametrize(
    "gates, charge, charge_by_l1",
    [([1, 0], 1, 1), ([0.5, 0.5], 2 ** (2 / 3), 1), ([1, 1], 2 ** (5 / 3), 2), ([0, 0], 0, 0)],
)  # 2^(2/3) = 1.587, 2^(5/3) = 3.175
def test_sharing_a_pair_costs_more_than_the_sum_of_its_parts(gates, charge, charge_by_l1):
    gate = np.reshape(gates, (1, 2, 1, 1))
    assert gatedref.lp_penalty(gate) == pytest.approx(charge, 1e-14)
    assert gatedref.lp_penalty(gate, p=1) == pytest.approx(charge_by_l1, 1e-14)


@pytest.mark.parametrize("causal", [False, True, np.True_])
@pytest.mark.parametrize("p", [0.3, 0.6, 1, 1.7, 2])
def test_the_penalty_equals_plain_loops_to_14_digits(p, causal):
    gate = np.maximum(randoms("BHTT"), 0)
    assert (gate == 0).any()
    assert_close(gatedref.lp_penalty(gate, p, causal=causal), naive_penalty(gate, p, causal), 14)


def test_gates_above_the_diagonal_are_charged_for_unless_causal():
    gate = np.triu(np.ones((1, 2, 3, 3)), 1)  # two heads open on 3 of the 9 pairs
    assert gatedref.lp_penalty(gate) == pytest.approx(2 ** (5 / 3) / 3, 1e-14)
    assert gatedref.lp_penalty(gate, causal=True) == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "tanh", "p": 1}, {"value_scale": 5, "p": 2, "causal": True}],
)
def test_the_loss_equals_plain_loops_to_13_digits(options):
    params, x, target = randoms(GATED), randoms("BTD", 1), randoms("BTD", 2)
    block = naive_block(params, x, options.get("activation", "clamp"), options.get("value_scale"))
    mse = sum((block["attn_out"][i] - target[i]) ** 2 for i in np.ndindex(x.shape)) / x.size
    penalty = naive_penalty(block["gate"], options.get("p", 0.6), options.get("causal", False))
    scalars = gatedref.loss(params, x, target, 0.3, **options)
    assert list(scalars) == ["mse", "penalty", "loss"]
    assert_close(scalars["mse"], mse, 13)
    assert_close(scalars["penalty"], penalty, 13)
    assert_close(scalars["loss"], mse + 0.3 * penalty, 13)
    assert gatedref.loss(params, x, target, 0, **options)["loss"] == scalars["mse"]


def test_value_scale_closes_the_hole_in_the_objective():
    # W_V reads a component that x does not have: values come from b_V alone. With b_V = 3 and the
    # scale sqrt(10), the published and the repaired block start as one.
    params, x = randoms(GATED, D=3, G=1, K=1), randoms("BTD", 1, D=3)
    x[..., 2] = 0
    params["W_V"][:, :, 0], params["b_V"][:] = [0, 0, 1], 3
    params["W_gate_Q"] *= 0.3
    params["b_gate_Q"][:], params["b_gate_K"][:] = 0.5, 1
    start = gatedref.gated_attention(params, x)
    assert 0 < start["gate_scores"].min() and start["gate_scores"].max() < 1
    target = start["attn_out"] + 0.01
    published, repaired = [], []
    for c in (1, 10, 100, 1000):
        moved = dict(params, b_V=params["b_V"] * c)
        moved.update(W_gate_Q=params["W_gate_Q"] / c, b_gate_Q=params["b_gate_Q"] / c)
        published.append(gatedref.loss(moved, x, target, 0.1))
        repaired.append(gatedref.loss(moved, x, target, 0.1, value_scale=10**0.5)["loss"])
        assert_close(published[-1]["mse"], 1e-4, 12)
        assert_close(published[-1]["penalty"], published[0]["penalty"] / c, 13)
    assert_close(repaired[0], published[0]["loss"], 13)
    assert published[-1]["loss"] < 1e-4 + 1e-3 * published[0]["loss"]
    assert repaired[0] < repaired[1] < repaired[2] < repaired[3]
    readme = " ".join((Path(__file__).parent / "README.md").read_text().split())
    for losses in ([scalars["loss"] for scalars in published], repaired):
        assert ", ".join(f"{loss:.4f}" for loss in losses) in readme


# ------------------------------------------------------------------------------------------------
# Gradients


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
    assert_same(scalars, gatedref.loss(params, x, target, 0.3, **options))

    def loss(params, x):
        return gatedref.loss(params, x, target, 0.3, **options)["loss"]

    assert_close(gradient, slopes(lambda params: loss(params, x), params), 8)
    assert_close(grad(lambda x: loss(params, x))(x), slopes(lambda x: loss(params, x), x), 8)


def test_gradients_of_attention_and_of_a_model_equal_central_differences():
    layers = [randoms(UNGATED, 3, 0.7, **SMALL), randoms(GATED, 4, 0.7, **SMALL)]
    x, weights = randoms("BTD", 1, **SMALL), randoms("BTD", 2, **SMALL)

    def attn(params, x):
        return (gatedref.attention(params, x)["attn_out"] * weights).sum()

    def model(layers):
        return (gatedref.transformer(layers, [[0, 2, 1], [1, 0, 0]])["logits"] * weights).sum()

    for i in (0, 1):
        by_model = slopes(lambda p, i=i: model([*layers[:i], p, *layers[i + 1 :]]), layers[i])
        assert_close(grad(model)(layers)[i], by_model, 8)
    assert_close(grad(attn)(layers[0], x), slopes(lambda p: attn(p, x), layers[0]), 8)
    assert_close(grad(attn, 1)(layers[0], x), slopes(lambda x: attn(layers[0], x), x), 8)


@pytest.mark.parametrize("name", ["alpha", "p", "value_scale"])
def test_slopes_along_an_option_equal_central_differences(name):
    params, x = randoms(GATED, 48, 0.7, **SMALL), randoms("BTD", 1, **SMALL)

    def loss(value):
        return gatedref.loss(params, x, x, **{"alpha": 0.3, "p": 0.7, name: value})["loss"]

    assert_close(grad(loss)(0.9), slopes(lambda a: loss(a.item()), np.array(0.9)), 8)


def test_second_derivatives_equal_differences_of_first_ones():
    params, x = randoms(GATED, 48, 0.7, **SMALL), randoms("BTD", 1, **SMALL)

    def loss(W, values=params):
        return gatedref.loss({**values, "W_V": W}, x, x, 0.3)["loss"]

    def first(W):
        return gatedref.loss_and_grad({**params, "W_V": W}, x, x, 0.3)[1]["W_V"]

    W = params["W_V"]
    expected = slopes(lambda W: (first(W) ** 2).sum(), W)
    assert_close(grad(lambda W: (first(W) ** 2).sum())(W), expected, 7)
    assert_close(grad(lambda W: (grad(loss)(W) ** 2).sum())(W), expected, 7)
    assert_close(jacobian(first)(W), jacobian(grad(loss))(W), 12)


@pytest.mark.parametrize(
    "activation, cases",  # a score: the gate and its derivative
    [
        ("clamp", {-1e-9: (0, 0), 0: (0, 1), 0.4: (0.4, 1), 1: (1, 1), 1 + 1e-9: (1, 0)}),
        ("relu", {-1: (0, 0), 0: (0, 0), 1e-9: (1e-9, 1), 3: (3, 1)}),
        ("tanh", {-1: (0, 0), 0: (0, 0), 2: (math.tanh(2), 1 - math.tanh(2) ** 2)}),
        ("binary", {-1e-9: (0, 0), 0: (0, 1), 0.5: (0, 1), 0.5 + 1e-9: (1, 1)}),
        ("binary", {0.3: (0, 1), 1: (1, 1), 1 + 1e-9: (1, 0)}),
    ],
)
def test_each_activation_has_its_stated_derivative_also_at_its_kinks(activation, cases):
    def gate(b):
        block = gatedref.gated_attention(one_head(b_gate_Q=b), [[[1, 0]]], activation=activation)
        return block["gate"].sum()

    for score, (value, slope) in cases.items():
        b = np.array([[float(score)]])
        assert gate(b) == pytest.approx(value, 1e-15, 0)
        assert grad(gate)(b) == pytest.approx(slope, 1e-14, 0)


@pytest.mark.parametrize("p", [0.5, 0.6, 1, 2])
def test_a_closed_gate_has_no_gradient(p):
    gate = np.maximum(randoms("BHTT"), 0)
    gate[0, :, 1, 2] = 0  # a pair that every head leaves closed
    gradient = grad(gatedref.lp_penalty)(gate, p)
    sums = (gate**p).sum(axis=1, keepdims=True)
    for i in np.ndindex(gate.shape):
        b, _, q, k = i
        expected = gate[i] ** (p - 1) * sums[b, 0, q, k] ** (1 / p - 1) / 18 if gate[i] else 0
        assert gradient[i] == pytest.approx(expected, 1e-13, 0)
    assert not grad(gatedref.lp_penalty)(np.zeros((2, 4, 3, 3)), p).any()
    causal = grad(lambda g: gatedref.lp_penalty(g, p, causal=True))(gate)
    assert_close(causal, np.tril(gradient) * 18 / 12, 14)


def test_a_block_whose_gates_are_closed_has_no_gradient_and_no_nan():
    params, x = randoms(GATED), randoms("BTD", 1)
    params["W_gate_Q"][:], params["b_gate_Q"][:], params["b_gate_K"][:] = 0, -1, 1
    params["W_gate_K"][:] = 0
    for p in (0.5, 0.6, 1, 2):
        scalars, gradient = gatedref.loss_and_grad(params, x, x, 0.3, p=p)
        assert scalars["penalty"] == 0
        assert all((g == 0).all() for g in gradient.values())


@pytest.mark.parametrize("length", [0, 1e-300, 0.99e-12, 1.01e-12, 1e-6, 1])
@pytest.mark.parametrize("name", ["W_V", "W_O", "W_V and b_V"])
def test_a_norm_below_1e_minus_12_counts_as_a_constant(name, length):
    y, u = np.array([2.0, 1.0]), np.array([0.6, 0.8])

    def written(w):  # y . w / max(|w|, 1e-12), read off a block
        x, options, weights = [[y]], {}, [1, 0]
        if name == "W_V":
            params = one_head(1, W_V=w.reshape(1, 2, 1))
        elif name == "W_O":
            params, x, weights = one_head(1, W_O=w.reshape(1, 1, 2)), [[[1, 0]]], y
        else:  # the second component is the bias
            W_V, b_V = (w * [1, 0]).reshape(1, 2, 1), w[1].reshape(1, 1)
            params, options = one_head(1, W_V=W_V, b_V=b_V), {"value_scale": 1}
        return (gatedref.gated_attention(params, x, **options)["attn_out"] * weights).sum()

    w = length * u
    norm = max(length, 1e-12)
    slope = y / 1e-12 if length < 1e-12 else (y - (y @ u) * u) / length
    assert written(w) == pytest.approx(y @ w / norm, 1e-13)
    assert_close(grad(written)(w), slope, 13)


@pytest.mark.parametrize(
    "options",
    [{}, {"value_scale": 3}, {"p": 1, "causal": True}, {"activation": "relu", "value_scale": 0.5}],
)
def test_a_plain_pytorch_block_agrees_to_12_digits_and_in_gradients_to_10(options):
    torch = pytest.importorskip("torch")
    params, x = randoms(GATED), randoms("BTD", 1)
    params["W_gate_Q"][:2], params["W_gate_K"][:2] = 0, 0  # gate scores of 0 and of 1, exactly
    params["b_gate_Q"][:2], params["b_gate_K"][:2] = [[0] * 7, [1] + [0] * 6], 1
    params["W_V"][0, :, 0] = params["b_V"][0, 0] = params["W_O"][1, 0] = 0  # below the floor
    target = randoms("BTD", 2)
    P = {n: torch.tensor(a, requires_grad=True) for n, a in {**params, "x": x}.items()}

    def linear(name):
        return torch.einsum("btd,hdk->bhtk", P["x"], P["W_" + name]) + P["b_" + name][:, None]

    def unit(W, dim):
        return torch.nn.functional.normalize(W, dim=dim)

    q, k, gate_q, gate_k = (linear(name) for name in ("Q", "K", "gate_Q", "gate_K"))
    future = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
    scores = (q @ k.mT / 6**0.5).masked_fill(future, -1e5)
    gate_scores = gate_q @ gate_k.mT
    gate = gate_scores.relu() if "activation" in options else gate_scores.clamp(0, 1)
    if "value_scale" in options:
        joined = options["value_scale"] * unit(torch.cat([P["W_V"], P["b_V"][:, None]], 1), 1)
        W_V, b_V = joined[:, :-1], joined[:, -1:]
    else:
        W_V, b_V = unit(P["W_V"], 1), P["b_V"][:, None]
    v = torch.einsum("btd,hdk->bhtk", P["x"], W_V) + b_V
    attn_out = ((gate * scores.softmax(-1)) @ v @ unit(P["W_O"], 2)).sum(1)
    p, is_open = options.get("p", 0.6), gate > 0
    powers = (torch.where(is_open, gate, 1.0) ** p * is_open).sum(1)
    norm = torch.where(powers > 0, powers, 1.0) ** (1 / p) * (powers > 0)
    penalty = norm[:, ~future].mean() if options.get("causal") else norm.mean()
    mse = ((attn_out - torch.tensor(target)) ** 2).mean()
    (mse + 0.3 * penalty).backward()

    block = {n: options[n] for n in ("activation", "value_scale") if n in options}
    out = gatedref.gated_attention(params, x, **block)
    assert (out["gate_scores"][:, 0] == 0).all() and (out["gate_scores"][:, 1] == 1).all()
    assert_close(out["gate"], gate.detach().numpy(), 12)
    assert_close(out["attn_out"], attn_out.detach().numpy(), 12)
    scalars, gradient = gatedref.loss_and_grad(params, x, target, 0.3, **options)
    assert scalars["mse"] == pytest.approx(mse.item(), 1e-12)
    assert scalars["penalty"] == pytest.approx(penalty.item(), 1e-12)
    gradient["x"] = grad(lambda x: gatedref.loss(params, x, target, 0.3, **options)["loss"])(x)
    # A column below the floor has a gradient of 1e12: the two kinds are compared apart.
    for name, g in gradient.items():
        expected = P[name].grad.numpy()
        huge = np.abs(expected) > 1e6
        assert_close(np.where(huge, g, 0), np.where(huge, expected, 0), 10)
        np.testing.assert_allclose(g[~huge], expected[~huge], rtol=0, atol=1e-10)


def test_gradients_of_large_and_tiny_values_are_the_gradient_divided_by_their_size():
    params, x = randoms(GATED, scale=1), randoms("BTD", 1)
    out = gatedref.gated_attention(params, x)["attn_out"]
    _, gradient = gatedref.loss_and_grad(params, x, x, 0.1)
    for size in (1e-10, 1e10, 1e149):
        scaled = {**params, "W_V": params["W_V"] * size, "W_O": params["W_O"] * size}
        assert_close(gatedref.gated_attention(scaled, x)["attn_out"], out, 13)
        _, by_size = gatedref.loss_and_grad(scaled, x, x, 0.1)
        for name in params:
            unit = size if name in ("W_V", "W_O") else 1
            np.testing.assert_allclose(by_size[name] * unit, gradient[name], atol=1e-12)
    scaled = {**params, "W_V": params["W_V"] * 1e-200}
    out = gatedref.gated_attention(scaled, x)
    assert_close(out["v"], np.broadcast_to(params["b_V"], out["v"].shape), 15)


# Numbers at the edge


def test_the_softmax_of_scores_of_plus_and_minus_10000_has_12_digits():
    x = np.array([[[1e4, 1], [1e4 - 0.5, -1], [-1e4, 1], [1e4 + 1, 1], [9990, -1], [-1e4, -1]]])
    params = one_head()
    params["W_Q"][0, 1], params["W_K"][0, 0] = 1, 1  # score = x[query, 1] * x[key, 0]
    pattern = gatedref.attention({n: params[n] for n in UNGATED}, x)["pattern"][0, 0]
    with localcontext() as context:
        context.prec = 60
        weights = [[Decimal(sign * s).exp() for s in x[0, :, 0]] for sign in x[0, :, 1]]
        expected = [[float(w / sum(row[: i + 1])) for w in row] for i, row in enumerate(weights)]
    np.testing.assert_allclose(pattern, np.tril(expected), rtol=1e-12, atol=1e-300)
    gradient = grad(lambda p: gatedref.gated_attention(p, x)["attn_out"].sum())(params)
    assert all(np.isfinite(g).all() for g in gradient.values())


@pytest.mark.parametrize(
    "gates",
    [[1e-300], [1e-300, 3e-300], [5e-324, 0], [1e-310, 0.3, 0], [1e-320, 1], [1e-308, 1e-300]],
)
def test_the_penalty_of_the_smallest_gates_has_13_digits(gates):
    gate = np.reshape(gates, (1, -1, 1, 1))
    with localcontext() as context:
        context.prec = 60
        p = Decimal.from_float(0.6)
        powers = [Decimal(g) ** p if g else 0 for g in gates]
        penalty = sum(powers) ** (1 / p)
        slopes = [Decimal(g) ** (p - 1) * sum(powers) ** (1 / p - 1) if g else 0 for g in gates]
    assert float(gatedref.lp_penalty(gate)) == pytest.approx(float(penalty), 1e-13, 5e-324)
    gradient = grad(gatedref.lp_penalty)(gate).ravel()
    np.testing.assert_allclose(gradient, [float(s) for s in slopes], rtol=1e-13)


@pytest.mark.parametrize("p", [0.1, 0.6, 3, 10])
def test_the_penalty_has_13_digits_for_p_from_a_tenth_to_10(p):
    gates = [1e-30, 3e-30, 1e-3, 0.5, 1e30]
    for start in range(5):
        few = gates[: start + 1]
        with localcontext() as context:
            context.prec = 60
            exponent = Decimal.from_float(p)
            penalty = sum(Decimal(g) ** exponent for g in few) ** (1 / exponent)
        assert gatedref.lp_penalty(np.reshape(few, (1, -1, 1, 1)), p) == pytest.approx(
            float(penalty), rel=1e-13
        )


def test_a_seed_of_any_size_will_do():
    large, small = (gatedref.init_params(1, 2, 1, seed=seed) for seed in (2**70, 0))
    assert (large["W_Q"] != small["W_Q"]).all()


def test_a_wrong_layer_is_named_by_its_number():
    good = gatedref.handmade_superposition(2)
    with pytest.raises(ValueError, match=r"^layers\[1\]: W_K has 2 along H, where W_Q has 1"):
        gatedref.transformer([good, {**good, "W_Q": good["W_Q"][:1]}], [[0]])


def test_one_position_of_one_head_attends_to_itself_alone():
    out = gatedref.gated_attention(one_head(0.25), [[[3, 4]]])
    assert out["pattern"].item() == 1 and out["attn_out"].tolist() == [[[0.75, 0]]]
    assert gatedref.lp_penalty(out["gate"]) == pytest.approx(0.25, 1e-15)


def test_equal_scores_over_1000_positions_give_running_means():
    x = randoms("BTD", B=1, T=1000, D=2)
    out = gatedref.gated_attention(one_head(0.5), x)
    means = np.cumsum(x[0, :, 0]) / np.arange(1, 1001)
    assert_close(out["attn_out"][0, :, 0], means / 2, 13)
    for causal in (False, True):
        assert gatedref.lp_penalty(out["gate"], causal=causal) == pytest.approx(0.5, 1e-13)


# ------------------------------------------------------------------------------------------------
# Models


def test_parameters_have_their_shapes_and_zero_gate_biases():
    sizes = {"n_heads": 4, "d_model": 5, "d_head": 6}
    ungated, gated = gatedref.init_params(**sizes), gatedref.init_params(**sizes, d_gate=7)
    for params, axes in ((ungated, UNGATED), (gated, GATED)):
        shapes = {name: [SIZES[a] for a in letters] for name, letters in axes.items()}
        assert {name: list(a.shape) for name, a in params.items()} == shapes
        assert all(a.dtype == np.float64 for a in params.values())
    assert not gated["b_gate_Q"].any() and not gated["b_gate_K"].any()
    assert all((ungated[name] == gated[name]).all() for name in UNGATED)


def test_one_seed_gives_the_same_bits_and_another_gives_others():
    first, again = (gatedref.init_params(4, 5, 6, seed=3, d_gate=2) for _ in range(2))
    other, default = (gatedref.init_params(4, 5, 6, d_gate=2, **s) for s in ({"seed": 4}, {}))
    zero = gatedref.init_params(4, 5, 6, seed=0, d_gate=2)
    for name, a in first.items():
        assert a.tobytes() == again[name].tobytes()
        assert default[name].tobytes() == zero[name].tobytes()
        assert name.startswith("b_gate") or not np.isclose(a, other[name]).any()


@pytest.mark.parametrize(
    "names, fans",
    [("W_Q W_K W_V", (40 + 30) * 20), ("W_O", (40 + 20) * 30), ("b_Q b_K b_V", 40 + 20)],
)
def test_weights_and_biases_are_xavier_normal_within_5_sigma(names, fans):
    params = gatedref.init_params(n_heads=40, d_model=30, d_head=20)
    for a in (params[name] / math.sqrt(2 / fans) for name in names.split()):
        assert abs(a.mean()) < 5 / a.size**0.5
        assert abs(a.var() - 1) < 5 * (2 / a.size) ** 0.5
        assert abs((a**4).mean() - 3) < 5 * (96 / a.size) ** 0.5


@pytest.mark.parametrize("n_heads, d_gate", [(3, 1), (3, 2), (10, 2), (12, 2), (30, 2)])
def test_gate_weights_are_orthonormal_across_the_heads(n_heads, d_gate):
    params = gatedref.init_params(n_heads, 6, 2, d_gate=d_gate)
    for name in ("W_gate_Q", "W_gate_K"):
        rows = params[name].reshape(n_heads, 6 * d_gate)
        product = rows @ rows.T if n_heads <= 6 * d_gate else rows.T @ rows
        assert_close(product, np.eye(len(product)), 14)
    assert not np.isclose(params["W_gate_Q"], params["W_gate_K"]).any()


@pytest.mark.parametrize("kinds", [[UNGATED], [GATED], [UNGATED, GATED], [GATED, UNGATED, GATED]])
def test_a_transformer_adds_each_layer_to_the_residual_stream(kinds):
    options = {"activation": "tanh", "value_scale": 2}
    layers = [randoms(axes, seed, H=seed + 1) for seed, axes in enumerate(kinds)]
    tokens = [[0, 4, 2], [1, 1, 3]]
    out = gatedref.transformer(layers, tokens, **options)
    residual = table((2, 3, 5), lambda b, t, v: tokens[b][t] == v)
    assert len(out["blocks"]) == len(layers)
    for params, block in zip(layers, out["blocks"]):
        gated = "W_gate_Q" in params
        naive = naive_block(params, residual, *(("tanh", 2) if gated else ()))
        assert block.keys() == naive.keys()
        for name in naive:
            assert_close(block[name], naive[name], 12)
        residual = residual + naive["attn_out"]
    assert_close(out["logits"], residual, 13)
    published = gatedref.transformer(tuple(layers[:1]), tokens)["blocks"][0]["attn_out"]
    first = naive_block(layers[0], np.eye(5)[tokens], *["clamp"] * (kinds[0] is GATED))
    assert_close(published, first["attn_out"], 13)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_two_handmade_heads_hold_the_first_and_last_trigram_and_share_the_others(n):
    tokens, completes = gatedref.sample_skip_trigrams(n, 2000)
    out = gatedref.transformer([gatedref.handmade_superposition(n)], tokens)
    s, t = np.nonzero(completes)
    trigram = tokens[s, t]
    assert set(trigram) == set(range(1, n + 1))
    assert (out["logits"][s, t].argmax(axis=1) == trigram + n).all()
    for i in range(1, n + 1):
        result = out["blocks"][0]["result"][s, t][trigram == i]
        held = {1: [(0,)], n: [(1,)]}.get(i, [(0, 1)])
        assert gatedref.holders(result, np.full(len(result), i + n)) == held
    elsewhere = out["blocks"][0]["attn_out"][~completes & (tokens > n)]
    assert np.abs(elsewhere).max() < 1e-3  # other queries barely attend to token 0


def test_handmade_heads_write_at_the_stated_angles_with_the_stated_weights():
    params = gatedref.handmade_superposition(3)
    assert {name: a.shape for name, a in params.items()} == {
        name: tuple({"H": 2, "D": 8, "K": 1}[a] for a in axes) for name, axes in UNGATED.items()
    }
    # After BOS and 0, the weights of token 0 are 1e-6 (cos, sin) to 1 for BOS and 1 for B itself.
    directions = [(math.cos(math.radians(d)), math.sin(math.radians(d))) for d in (15, 45, 75)]
    for i, direction in enumerate(directions, start=1):
        block = gatedref.transformer([params], [[7, 0, i]])["blocks"][0]
        weights = [1e-6 * w / (2 + 1e-6 * w) for w in direction]
        assert block["pattern"][0, :, 2, 1] == pytest.approx(weights, 1e-12)
        expected = [1e8 * dot(weights, answer) for answer in directions]
        assert block["attn_out"][0, 2, 4:7] == pytest.approx(expected, 1e-12)
        assert not block["attn_out"][0, 2, [0, 1, 2, 3, 7]].any()


# ------------------------------------------------------------------------------------------------
# The task, and who holds what


def rewalk(n, sequence):
    """What the law makes of a sequence: a (state, token) for each token drawn, and where a trigram
    completes. Fails where the law forbids the sequence."""
    assert sequence[0] == 2 * n + 1
    armed, forced, draws, completes = False, None, [], [False]
    for token in sequence[1:]:
        assert 0 <= token <= 2 * n + 1
        if forced is not None:
            assert token == forced
            forced = None
            completes.append(False)
            continue
        draws.append(("armed" if armed else "plain", token))
        completes.append(armed and 1 <= token <= n)
        if armed:
            assert token != 0
        if completes[-1]:
            armed, forced = False, token + n
        elif token == 0:
            armed = True
    return draws, completes


@pytest.mark.parametrize("n, n_positions", [(1, 11), (2, 11), (3, 2), (3, 1), (4, 30), (10, 50)])
def test_every_sequence_obeys_the_law(n, n_positions):
    tokens, completes = gatedref.sample_skip_trigrams(n, 400, n_positions, seed=1)
    assert tokens.shape == completes.shape == (400, n_positions)
    assert tokens.dtype.kind == "i" and completes.dtype == bool
    for sequence, found in zip(tokens.tolist(), completes.tolist()):
        assert rewalk(n, sequence)[1] == found
    if n_positions > 10:
        assert completes[:, -1].any() and completes.sum(axis=1).max() > 1


def test_draws_are_uniform_over_all_tokens_and_when_armed_over_all_but_0_within_5_sigma():
    n, vocabulary, n_sequences = 2, 6, 20000
    tokens, completes = gatedref.sample_skip_trigrams(n, n_sequences)
    draws = Counter(d for sequence in tokens.tolist() for d in rewalk(n, sequence)[0])
    for state, allowed in (("plain", range(6)), ("armed", range(1, 6))):
        total, chance = sum(draws[state, t] for t in range(6)), 1 / len(allowed)
        for token in allowed:
            sigma = math.sqrt(total * chance * (1 - chance))
            assert abs(draws[state, token] - total * chance) < 5 * sigma
    plain, armed, forced = 1, 0, 0  # the exact chance of each state, position by position
    for t in range(1, 11):
        done = armed * n / (vocabulary - 1)
        sigma = math.sqrt(n_sequences * done * (1 - done))
        assert abs(completes[:, t].sum() - n_sequences * done) <= 5 * sigma
        to_armed = plain / vocabulary
        plain, armed, forced = plain - to_armed + forced, armed - done + to_armed, done


def test_one_draw_says_nothing_of_the_next_or_of_another_sequence():
    tokens, _ = gatedref.sample_skip_trigrams(1, 32000, 3)
    pairs = Counter((a, b) for _, a, b in tokens.tolist() if a)
    total = sum(pairs.values())
    assert len(pairs) == 12
    for count in pairs.values():
        assert abs(count - total / 12) < 5 * math.sqrt(total / 12)
    same = (tokens[:-1, 1] == tokens[1:, 1]).sum()
    assert abs(same - 32000 / 4) < 5 * math.sqrt(32000 * 3 / 16)


def test_one_seed_gives_the_same_sequences_and_another_gives_others():
    first, again, other, default = (
        gatedref.sample_skip_trigrams(3, 50, **seed)
        for seed in ({"seed": 0}, {"seed": 0}, {"seed": 1}, {})
    )
    assert (first[0] == again[0]).all() and (first[0] == default[0]).all()
    assert (first[1] == again[1]).all() and (first[0] != other[0]).any(axis=1).mean() > 0.9
    assert first[0].shape == (50, 11)
    eight_bits = gatedref.sample_skip_trigrams(np.int8(100), np.int8(5))[0]  # 2 n is past 127
    assert (eight_bits == gatedref.sample_skip_trigrams(100, 5)[0]).all()


def brute_holders(result, answers, threshold="0.99"):
    """The definition, set by set and sequence by sequence, in whole numbers."""
    n_heads, everyone = len(result[0]), tuple(range(len(result[0])))

    def right(heads, r, answer):
        sums = [sum(r[h][v] for h in heads) for v in range(len(r[0]))]
        return sums.index(max(sums)) == answer

    def holds(A, r, answer):
        if A == everyone:
            return right(everyone, r, answer)
        rest = [h for h in everyone if h not in A]
        removed = (set(c) for n in range(1, n_heads + 1) for c in itertools.combinations(rest, n))
        return all(right([h for h in everyone if h not in out], r, answer) for out in removed)

    for size in range(1, n_heads + 1):
        sets = list(itertools.combinations(everyone, size))
        counts = [sum(holds(A, r, a) for r, a in zip(result, answers)) for A in sets]
        found = [
            A for A, c in zip(sets, counts) if Fraction(c, len(result)) > Fraction(threshold)
        ]
        if found:
            return found
    return []


@pytest.mark.parametrize(
    "outputs, held",
    [
        ([[0, 5], [1, 0]], [(0,)]),  # the answer is token 1
        ([[0, 5], [0, 3], [1, 0]], [(0,), (1,)]),
        ([[0, 5], [9, 0], [0, 5]], [(0, 2)]),  # head 1 outvotes head 0, not heads 0 and 2
        ([[0, 2], [0, 2], [3, 0]], [(0, 1)]),
        ([[0, 2], [0, 2], [0, 2], [5, 0]], [(0, 1, 2)]),
        ([[0, 2], [0, 2], [0, 2], [3, 0]], [(0, 1), (0, 2), (1, 2)]),
        ([[0, 3], [4, 0], [0, 3], [1, 0]], [(0, 2)]),
        ([[1, 0], [1, 0]], []),
        ([[0, 1]], [(0,)]),
        ([[1, 0]], []),
        ([[1, 1], [0, 0]], []),  # a tie goes to the first token, 0
        ([[2, 2], [0, 1]], [(1,)]),
    ],
)
def test_the_fewest_heads_that_keep_the_answer_whatever_else_is_removed_hold_it(outputs, held):
    assert gatedref.holders([outputs], [1]) == held
    assert gatedref.holders(np.tile(outputs, (200, 1, 1)), np.ones(200, dtype=int)) == held
    mirrored = [row[::-1] for row in outputs]
    if all(a != b for a, b in outputs):
        assert gatedref.holders([mirrored], [0]) == held


def test_all_heads_hold_what_only_their_intact_sum_gets_right():
    result = [[[4, 0, 3], [0, 4, 3]]]  # 4 4 6 together, yet wrong with either head removed
    assert gatedref.holders(result, [2]) == [(0, 1)]
    assert gatedref.holders(result, [0]) == [(0,)]  # head 0 alone says 0, whatever the two say


def test_more_than_the_threshold_of_the_sequences_is_needed_not_just_as_many():
    result = np.zeros((100, 2, 2))
    result[:, 0, 1] = 1
    answers = np.array([1] * 99 + [0])
    assert gatedref.holders(result, answers) == []
    assert gatedref.holders(result, answers, threshold=0.98) == [(0,)]
    assert gatedref.holders(result[:99], answers[:99], threshold=0.999) == [(0,)]
    assert gatedref.holders(result, np.array([0] * 50 + [1] * 50), threshold=0.5) == []
    assert gatedref.holders(result, np.array([0] * 49 + [1] * 51), threshold=0.5) == [(0,)]
    assert gatedref.holders(-result, answers, threshold=0) == [(0,), (1,)]
    assert gatedref.holders(result, 0 * answers, threshold=0) == [(1,)]


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


def test_many_sequences_are_counted_to_the_last():
    rng = np.random.default_rng(0)
    result = rng.integers(-3, 4, size=(600, 10, 3))  # more than is tried at a time
    result[:, 4, 1] += 90
    answers = np.ones(600, dtype=int)
    answers[:6] = 0
    assert gatedref.holders(result, answers) == []
    answers[5] = 1
    assert gatedref.holders(result, answers) == [(4,)]


def test_16_heads_are_tried_and_17_are_refused():
    result = np.zeros((30, 16, 3))
    result[:, 3, 2] = result[:, 15, 2] = 2
    result[:, 0, 0] = 3
    assert gatedref.holders(result, [2] * 30) == [(3, 15)]
    assert gatedref.holders(result + [0, 0, 9], [2] * 30) == [(h,) for h in range(16)]
    with pytest.raises(ValueError, match="result must have at most 16 heads.*got 17"):
        gatedref.holders(np.zeros((1, 17, 3)), [0])


def test_holders_tell_outputs_apart_however_small():
    for size in (1e-300, 1e-20, 1, 1e300):
        assert gatedref.holders(size * np.array([[[0, 1], [0, 0]]]), [1]) == [(0,)]


def test_holders_need_no_more_memory_for_more_sequences():
    tracemalloc.start()
    gatedref.holders(np.zeros((100, 14, 3)), [0] * 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20  # all at a time would be 37.5 MiB of sums, and as much for copies


# ------------------------------------------------------------------------------------------------
# The door


# The axes of every array that a function takes, in the order of its arguments.
DOORS = {
    "attention": {**UNGATED, "x": "BTD"},
    "gated_attention": {**GATED, "x": "BTD"},
    "loss": {**GATED, "x": "BTD", "target": "BTD"},
    "loss_and_grad": {**GATED, "x": "BTD", "target": "BTD"},
    "transformer": {**GATED, "tokens": "BT"},
    "lp_penalty": {"gate": "BHTT"},
    "holders": {"result": "SHV", "answers": "S"},
}
INTEGERS = ("tokens", "answers")
ARGUMENTS = [(function, name) for function, axes in DOORS.items() for name in axes]


def call(function, args, **options):
    """Calls a function with the arrays of `args`, those of a block as one dict."""
    params = {name: a for name, a in args.items() if name.startswith(("W", "b"))}
    arrays = [[params] if function == "transformer" else params] * (len(params) > 0)
    arrays += [a for name, a in args.items() if name not in params]
    if function.startswith("loss"):
        options.setdefault("alpha", 0.1)
    return getattr(gatedref, function)(*arrays, **options)


def well_formed(function):
    args = randoms(DOORS.get(function, {}), 5)
    for name in args:
        if name in INTEGERS:
            args[name] = (np.abs(args[name]) * 10).astype(int) % 5
        if name == "gate":
            args[name] = np.abs(args[name])
    return args


def refused(function, args, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(function, args)


@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_no_wrong_shape_becomes_a_number(function, name):
    args, letters = well_formed(function), DOORS[function]
    right, everywhere = args[name], "".join(letters.values())
    call(function, args)
    wrong = [right[None], right[..., None], right.ravel()[0]]
    for axis, letter in enumerate(letters[name]):
        size = right.shape[axis]
        sizes = [0] if everywhere.count(letter) == 1 else [0, 1, size - 1, size + 1]
        wrong += [np.take(right, np.arange(n) % size, axis) for n in sizes]
        wrong.append(right.take(0, axis))
    for array in wrong:
        refused(function, {**args, name: array}, name)


@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_only_finite_numbers_are_taken(function, name):
    args = well_formed(function)
    right = args[name]
    wrong = [right.astype(t) for t in (bool, complex, object, str, np.float16, "m8[s]")]
    wrong += [right.astype("g")] * (np.dtype("g").itemsize > 8)  # wider than float64
    wrong += [None, "text", [], [[1, 2], [3]], {}]
    for number in (np.nan, np.inf, -np.inf):
        wrong.append(right.astype(float))
        wrong[-1].flat[-1] = number
    if name in INTEGERS:
        wrong += [right.astype(float), np.where(right == 0, -1, right), np.where(right == 0, 5, 9)]
    for array in wrong:
        refused(function, {**args, name: array}, name)


@pytest.mark.parametrize("function", [name for name in DOORS if "W_Q" in DOORS[name]])
def test_missing_and_unknown_parameters_are_named(function):
    args = well_formed(function)
    for name in UNGATED if function == "attention" else GATED:
        with pytest.raises(ValueError, match=f"params.*missing.*'{name}'.*unknown"):
            call(function, {n: a for n, a in args.items() if n != name})
    with pytest.raises(ValueError, match=r"params.*missing \[\].*unknown.*'W_X'"):
        call(function, {**args, "W_X": args["W_Q"]})


@pytest.mark.parametrize("function", DOORS)
def test_what_is_given_is_left_as_it_was(function):
    args, before = well_formed(function), well_formed(function)
    call(function, args)
    assert_same(args, before)


def test_an_ungated_block_takes_no_gate_and_a_dict_is_needed():
    gated, x = randoms(GATED), randoms("BTD")
    with pytest.raises(ValueError, match="params.*missing.*unknown.*'W_gate_Q'"):
        gatedref.attention(gated, x)
    for wrong in (None, list(gated.values()), gated["W_Q"]):
        for call in (gatedref.attention, gatedref.gated_attention):
            with pytest.raises(TypeError, match="params must be a dict"):
                call(wrong, x)


@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_lists_integers_and_float32_are_taken(function, name):
    args = well_formed(function)
    expected = call(function, args)
    assert_same(call(function, {**args, name: args[name].tolist()}), expected)
    rounded = {**args, name: np.ceil(args[name] * 2)}
    if name not in INTEGERS:
        whole = {**args, name: rounded[name].astype(int)}
        assert_same(call(function, whole), call(function, rounded))


@pytest.mark.parametrize(
    "function, options",
    [("attention", {}), ("gated_attention", {}), ("transformer", {}), ("loss", {})]
    + [("lp_penalty", {}), ("lp_penalty", {"causal": True}), ("lp_penalty", {"p": 1})]
    + [("loss_and_grad", {"activation": activation}) for activation in ACTIVATIONS]
    + [("loss_and_grad", {"value_scale": 2.5}), ("loss_and_grad", {"causal": True})],
)
def test_float32_in_gives_float32_out(function, options):
    args = well_formed(function)
    single = {n: a if n in INTEGERS else a.astype(np.float32) for n, a in args.items()}
    out, expected = call(function, single, **options), call(function, args, **options)
    for value, double in zip(leaves(out), leaves(expected), strict=True):
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, double, rtol=1e-4, atol=1e-5)


def test_of_mixed_types_the_wider_is_taken_and_a_gradient_has_that_of_its_parameter():
    params, x = randoms(GATED), randoms("BTD", 1)
    params["b_Q"] = params["b_Q"].astype(np.float32)
    single = {name: a.astype(np.float32) for name, a in params.items()}
    assert gatedref.gated_attention(single, x)["attn_out"].dtype == np.float64
    whole = np.ones(x.shape, dtype=int)
    assert gatedref.gated_attention(single, whole)["attn_out"].dtype == np.float32
    assert gatedref.loss(single, whole, whole, 0.1)["loss"].dtype == np.float32
    for given in (params, single):
        _, gradient = gatedref.loss_and_grad(given, x, x, 0.1)
        assert {n: g.dtype for n, g in gradient.items()} == {n: a.dtype for n, a in given.items()}


WHOLE = [0, -1, 2.0, 2.5, True, "3", [2], np.nan, None, 1j, np.ones(1, dtype=int)]
POSITIVE = [0, -1, -0.1, np.nan, np.inf, True, "1", [1.0], 1j, {}]
WRONG = {
    "alpha": [-1, -1e-9, np.nan, np.inf, True, "1", None, [1.0], [1, [2, 3]], 1j],
    "p": [*POSITIVE, None],
    "value_scale": POSITIVE,
    "activation": ["sigmoid", "", None, 1, ["clamp"], {}],
    "threshold": [1, 1.5, -0.1, np.nan, -np.inf, True, "0.9", None, [0.9]],
    "seed": [-1, 0.0, 0.5, True, "0", None, [0]],
    "d_gate": [w for w in WHOLE if w is not None],
}  # and WHOLE for every count
CALLS = {  # each function with options, and values that it takes, the least ones mostly
    "gated_attention": {"activation": "clamp", "value_scale": 1e-9},
    "lp_penalty": {"p": 0.1},
    "loss": {"activation": "relu", "value_scale": 1, "p": 3, "alpha": 0},
    "loss_and_grad": {"activation": "tanh", "value_scale": 0.1, "p": 2, "alpha": 0.0},
    "transformer": {"activation": "binary", "value_scale": 2.5},
    "holders": {"threshold": 0},
    "init_params": {"n_heads": 1, "d_model": 1, "d_head": 1, "d_gate": 1, "seed": 0},
    "handmade_superposition": {"n_trigrams": 2},
    "sample_skip_trigrams": {"n_trigrams": 1, "n_sequences": 1, "n_positions": 1, "seed": 0},
}


@pytest.mark.parametrize(
    "function, name", [(f, name) for f, options in CALLS.items() for name in options]
)
def test_every_number_and_option_is_checked(function, name):
    args = well_formed(function)
    call(function, args, **CALLS[function])
    for value in WRONG.get(name, WHOLE) + [1] * (function == "handmade_superposition"):
        with pytest.raises(ValueError, match=rf"\b{name} must be .*, got"):
            call(function, args, **{**CALLS[function], name: value})


def test_a_negative_gate_is_refused_and_causal_is_true_or_false():
    gate = np.ones((1, 2, 3, 3))
    for causal in (0, 1, None, "yes", [True]):
        with pytest.raises(TypeError, match="causal must be True or False, got"):
            gatedref.lp_penalty(gate, causal=causal)
    gate[0, 1, 2, 2] = -1e-300
    with pytest.raises(ValueError, match="gate must be >= 0, got -1e-300"):
        gatedref.lp_penalty(gate)


def test_layers_are_a_list_of_blocks_of_one_width():
    layer = gatedref.init_params(2, 3, 2)
    for layers in ([], (), None, layer, "x", 3):
        with pytest.raises(ValueError, match="layers"):
            gatedref.transformer(layers, [[0]])
    with pytest.raises(ValueError, match=r"layers must share one d_model, got \[3, 4\]"):
        gatedref.transformer([layer, gatedref.init_params(2, 4, 2)], [[0]])
    for wrong in ([None], [3], ["W_Q"], [layer, np.ones(3)]):
        with pytest.raises((ValueError, TypeError), match="layers"):
            gatedref.transformer(wrong, [[0]])
    with pytest.raises(ValueError, match="activation"):
        gatedref.transformer([layer], [[0]], activation="sigmoid")
    with pytest.raises(ValueError, match="value_scale"):
        gatedref.transformer([layer], [[0]], value_scale=-1)


def test_a_disagreement_names_both_arguments_and_both_sizes():
    params = randoms(UNGATED)
    with pytest.raises(ValueError, match=r"x has 6 along D, where W_Q has 5.*\(2, 3, 6\)"):
        gatedref.attention(params, randoms("BTD", D=6))
    with pytest.raises(ValueError, match=r"x has 0 along T, where at least 1 is needed"):
        gatedref.attention(params, randoms("BTD", T=0))
    x = randoms("BTD")
    x[1, 2, :2] = np.nan
    with pytest.raises(ValueError, match=r"x must be finite, got nan at \(1, 2, 0\)"):
        gatedref.attention(params, x)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 5\), got 7"):
        gatedref.transformer([params], [[0, 7, 1]])
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 5\), got -1"):
        gatedref.transformer([params], [[0, 7, -1]])


def test_the_door_is_there_while_autograd_differentiates():
    params, x = randoms(GATED), randoms("BTD", 1)

    def loss(params, x):
        return gatedref.loss(params, x, randoms("BTD", 2), 0.1)["loss"]

    def one(x):
        return (grad(loss, 1)(params, x) ** 2).sum()

    for wrong in (x[:, :, :4], x[:1], x[0], np.where(x == x.max(), np.nan, x)):
        for gradient in (grad(lambda x: loss(params, x)), jacobian(one), grad(one)):
            with pytest.raises(ValueError, match=r"\bx\b"):
                gradient(wrong)
    with pytest.raises(ValueError, match="b_gate_K"):
        grad(loss)({**params, "b_gate_K": params["b_gate_K"][:1]}, x)
    with pytest.raises(ValueError, match="missing.*W_O"):
        grad(loss)({name: a for name, a in params.items() if name != "W_O"}, x)
    with pytest.raises(ValueError, match="gate must be >= 0"):
        grad(gatedref.lp_penalty)(-np.ones((1, 2, 3, 3)))
    assert np.isfinite(grad(one)(x)).all()


CASES = {case.name: case for case in gatedref.cases()}
ENDS = ("attn_out", "mse", "penalty", "loss", "grads")  # all that many ports can show

def test_the_axes_of_a_gate_are_named_in_their_order():
    for axis, letter in enumerate("BHTT"):
        shape = [2, 3, 4, 4]
        shape[axis] = 0
        with pytest.raises(ValueError, match=f"gate has 0 along {letter}"):
            gatedref.lp_penalty(np.ones(shape))


def test_a_layer_of_the_wrong_python_type_is_a_type_error():
    for wrong in (None, 3, "W_Q", np.ones(3)):
        with pytest.raises(TypeError, match="layers must be a list of parameter dicts"):
            gatedref.transformer([wrong], [[0]])


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint64, np.int64])
def test_integers_of_any_kind_are_taken_down_to_the_least(kind):
    one, zero = kind(1), kind(0)
    sizes = {"n_heads": 1, "d_model": 1, "d_head": 1, "d_gate": 1, "seed": 0}
    given = {name: kind(size) for name, size in sizes.items()}
    assert_same(gatedref.init_params(**given), gatedref.init_params(**sizes))
    sampled = gatedref.sample_skip_trigrams(one, one, one, zero)
    assert_same(sampled, gatedref.sample_skip_trigrams(1, 1, 1, 0))
    gate, options = np.ones((1, 1, 2, 2)), {"p": one}
    assert gatedref.lp_penalty(gate.astype(kind), **options) == gatedref.lp_penalty(gate, p=1)
    args = well_formed("transformer")
    whole = {**args, "tokens": args["tokens"].astype(kind)}
    assert_same(call("transformer", whole), call("transformer", args))
    params, x = randoms(GATED), randoms("BTD")
    assert gatedref.loss(params, x, x, one)["loss"] == gatedref.loss(params, x, x, 1)["loss"]


@pytest.mark.parametrize("wrong", [1j, 2 + 0j, np.complex128(3 + 1j)])
def test_a_complex_number_is_no_count_and_no_option(wrong):
    with pytest.raises(ValueError, match="n_trigrams must be a whole number"):
        gatedref.handmade_superposition(wrong)
    with pytest.raises(ValueError, match="p must be a finite number"):
        gatedref.lp_penalty(np.ones((1, 1, 1, 1)), wrong)


# ------------------------------------------------------------------------------------------------
# The conformance kit: wrong blocks are caught, each a line or two away from this one

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
    # the gate's scores
    ("gate_q", "W_gate_Q) + b_gate_Q", "W_gate_Q)"),
    ("gate_k", "W_gate_K) + b_gate_K", "W_gate_K)"),
    ("gate_q", "x, W_gate_Q) + b_gate_Q", "x, W_gate_K) + b_gate_K"),
    ("gate_q", "x, W_gate_Q) + b_gate_Q", "x, W_gate_Q) - b_gate_Q"),
    ("gate_q", "x, W_gate_Q)", "x, W_gate_Q / np.sqrt((W_gate_Q**2).sum(1, keepdims=True) + 1))"),
    ("gate_scores", "gate_q, gate_k)", "gate_q, gate_k) / G**0.5"),
    ("gate_scores", "gate_q, gate_k)", "gate_q, gate_k) / G"),
    ("gate_scores", "gate_q, gate_k)", "gate_q, gate_k) / K**0.5"),
    ("gate_scores", "gate_q, gate_k)", "-gate_q, gate_k)"),
    ("gate_scores", "gate_q, gate_k)", "gate_k, gate_q)"),
    ("gate_scores", "gate_q, gate_k)", "gate_q, gate_k) * mask"),
    ("gate_scores", "bqhg,bkhg->bhqk", "bqhg,bkhg->bhkq"),
    ("gate_scores", "bqhg,bkhg->bhqk", "bqhg,bkhf->bhqk"),
    ("gate_scores", "bqhg,bkhg->bhqk", "bqhg,bkng->bhqk"),
    ("gate_scores", "bqhg,bkhg->bhqk", "bqhg,ckhg->bhqk"),
    # the gate
    ("gate", "clamp(gate_scores)", "1 / (1 + np.exp(-gate_scores))"),
    ("gate", "clamp(gate_scores)", "np.tanh(np.maximum(gate_scores, 0))"),
    ("gate", "clamp(gate_scores)", "np.maximum(gate_scores, 0)"),
    ("gate", "clamp(gate_scores)", "np.minimum(gate_scores, 1)"),
    ("gate", "clamp(gate_scores)", "clamp(gate_scores / 6 + 0.5)"),
    ("gate", "clamp(gate_scores)", "np.abs(clamp(gate_scores))[:, ::-1]"),
    ("gate", "clamp(gate_scores)", "clamp(np.abs(gate_scores))"),
    ("gate", "clamp(gate_scores)", "1.0 * (gate_scores > 0.5)"),
    ("gate", "clamp(gate_scores)", "1.0 * (gate_scores > 0)"),
    ("gate", "clamp(gate_scores)", "clamp(gate_scores) * mask"),
    ("gate", "clamp(gate_scores)", "clamp(gate_scores) + 1e-6"),
    ("gate", "clamp(gate_scores)", "np.maximum(clamp(gate_scores), 1e-6)"),
    ("gate", "clamp(gate_scores)", "1 - clamp(gate_scores)"),
    ("gate", "clamp(gate_scores)", "clamp(gate_scores).mean(1, keepdims=True) + 0 * gate_scores"),
    ("gated_pattern", "gate * pattern", "gate_scores * pattern"),
    ("gated_pattern", "gate * pattern", "gate + pattern"),
    ("gated_pattern", "gate * pattern", "pattern"),
    ("gated_pattern", "gate * pattern", "gate"),
    ("gated_pattern", "gate * pattern", "np.swapaxes(gate, 2, 3) * pattern"),
    ("gated_pattern", "gate * pattern",
     "gate * pattern / ((gate * pattern).sum(-1, keepdims=True) + 1e-9)"),
    ("gated_pattern", "gate * pattern", "clamp(gate_scores * pattern)"),
    ("pattern", "weights / w", "gate_scores * 0 + clamp(gate_scores) * weights / w"),
    ("attn_scores", "q, k) / K**0.5", "q, k) / K**0.5 * clamp(gate_scores)"),
    ("attn_scores", "q, k) / K**0.5", "q, k) / K**0.5 + clamp(gate_scores)"),
    # the scores and the pattern
    ("q", "x, W_Q) + b_Q", "x, W_Q)"),
    ("k", "x, W_K) + b_K", "x, W_K)"),  # which no output shows
    ("q", "x, W_Q) + b_Q", "x, W_K) + b_K"),
    ("q", "x, W_Q)", "x, W_Q / np.sqrt((W_Q**2).sum(1, keepdims=True)))"),
    ("attn_scores", " / K**0.5", ""),
    ("attn_scores", " / K**0.5", " * K**0.5"),
    ("attn_scores", " / K**0.5", " / K"),
    ("attn_scores", " / K**0.5", " / D**0.5"),
    ("attn_scores", " / K**0.5", " / (H * K) ** 0.5"),
    ("attn_scores", "bshk->bhqs\", q, k)", "bshk->bhqs\", k, q)"),
    ("attn_scores", "bqhk,bshk->bhqs", "bqhk,bshk->bhsq"),
    ("attn_scores", "bqhk,bshk->bhqs", "bqhk,bsnk->bhqs"),
    ("attn_scores", "bqhk,bshk->bhqs", "bqhk,cshk->bhqs"),
    ("pattern", "attn_scores, -1e5", "attn_scores, 0"),
    ("pattern", "attn_scores, -1e5", "attn_scores, -10"),
    ("pattern", "attn_scores, -1e5", "attn_scores, -50"),
    ("pattern", "np.where(mask, a", "np.where(mask > -1, a"),
    ("attn_scores", "np.where(mask, a", "np.where(mask.T, a"),
    ("attn_scores", "np.tri(T)", "np.tri(T, k=-1)"),
    ("pattern", "np.tri(T)", "np.tri(T, k=1)"),
    ("attn_scores", "np.tri(T)", "np.tri(T) - np.tri(T, k=-32)"),  # a window of 32
    ("pattern", "weights.sum(-1, keepdims=True)", "weights.sum(-2, keepdims=True)"),
    ("pattern", "weights.sum(-1, keepdims=True)", "(weights.sum(1, keepdims=True) + (1 - mask))"),
    ("pattern", "weights.sum(-1, keepdims=True)", "(1 + weights.sum(-1, keepdims=True))"),
    ("pattern", "weights.sum(-1, keepdims=True)", "(1e-9 + weights.sum(-1, keepdims=True))"),
    ("pattern", "weights / weights.sum(-1, keepdims=True)", "1 / (1 + np.exp(-attn_scores))"),
    ("pattern", "weights / weights.sum(-1, keepdims=True)", "weights * mask / weights.sum()"),
    ("pattern", "np.exp(attn_scores - a", "mask * 2 ** (attn_scores - a"),
    ("pattern", "np.exp(attn_scores - attn_scores.max(-1, keepdims=True))",
     "np.exp(attn_scores) + 1e-12 * mask"),
    # the values and the norms
    ("v", "x, V) + b_V", "x, V)"),
    ("v", "x, V) + b_V", "x, W_V) + b_V"),
    ("v", "x, V) + b_V", "x, V) + b_V / np.sqrt((W_V**2).sum(1) + 1e-24)"),
    ("v", "x, V) + b_V", "x, V) + b_V / np.sqrt((b_V**2).sum(-1, keepdims=True))"),
    ("v", "(W_V**2).sum(1, keepdims=True)", "((W_V**2).sum(1) + b_V**2)[:, None]"),
    ("v", "(W_V**2).sum(1, keepdims=True)", "(W_V**2).sum(2, keepdims=True)"),
    ("v", "(W_V**2).sum(1, keepdims=True)", "(W_V**2).sum(0, keepdims=True)"),
    ("v", "(W_V**2).sum(1, keepdims=True)", "(W_V**2).sum((1, 2), keepdims=True)"),
    ("v", "(W_V**2).sum(1, keepdims=True)", "(W_V**2).mean(1, keepdims=True)"),
    ("v", "W_V / np.sqrt(", "W_V / ("),
    ("v", "np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24))",
     "(1e-12 + np.abs(W_V).sum(1, keepdims=True))"),
    ("v", "np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24))",
     "np.maximum(np.abs(W_V).max(1, keepdims=True), 1e-12)"),
    ("v", "np.maximum((W_V**2).sum(1, keepdims=True), 1e-24)",
     "(W_V**2).sum(1, keepdims=True) + 1e-24"),
    ("v", "np.maximum((W_V**2).sum(1, keepdims=True), 1e-24)",
     "(W_V**2).sum(1, keepdims=True) + 1e-10"),
    ("v", "np.maximum((W_V**2).sum(1, keepdims=True), 1e-24)",
     "np.maximum((W_V**2).sum(1, keepdims=True), 1e-16)"),
    ("v", "np.maximum((W_V**2).sum(1, keepdims=True), 1e-24)",
     "np.maximum((W_V**2).sum(1, keepdims=True), 1e-300)"),
    ("v", "np.maximum((W_V**2).sum(1, keepdims=True), 1e-24)",
     "np.maximum((W_V**2).sum(1, keepdims=True), 1)"),
    # the outputs
    ("z", "gated_pattern, v)", "pattern, v)"),
    ("z", "gated_pattern, v)", "gated_pattern, v - b_V) + b_V"),
    ("z", "bhqs,bshk->bqhk", "bhsq,bshk->bqhk"),
    ("z", "bhqs,bshk->bqhk", "bhqs,bsnk->bqhk"),
    ("z", "bhqs,bshk->bqhk", "bhqs,cshk->bqhk"),
    ("result", "z, O)", "z, W_O)"),
    ("result", "(W_O**2).sum(2, keepdims=True)", "(W_O**2).sum(1, keepdims=True)"),
    ("result", "np.maximum((W_O**2).sum(2, keepdims=True), 1e-24)",
     "(W_O**2).sum(2, keepdims=True) + 1e-24"),
    ("result", "np.maximum((W_O**2).sum(2, keepdims=True), 1e-24)",
     "np.maximum((W_O**2).sum(2, keepdims=True), 1e-16)"),
    ("NaN", "np.sqrt(np.maximum((W_O**2).sum(2, keepdims=True), 1e-24))",
     "np.sqrt((W_O**2).sum(2, keepdims=True))"),
    ("result", "(W_O**2).sum(2, keepdims=True)", "(W_O**2).sum((1, 2), keepdims=True)"),
    ("result", "(W_O**2).sum(2, keepdims=True)", "(W_O**2).sum((0, 1, 2), keepdims=True)"),
    ("result", "z, O)", "z, O[::-1])"),
    ("result", "z, O)", "z[:, :, :, ::-1], O)"),
    ("result", "z, O)", "z, np.swapaxes(O, 1, 2) if K == D else O)"),
    ("result", "z, O)", "z, O.reshape(K, H, D).swapaxes(0, 1))"),
    ("attn_out", "result.sum(2)", "result.mean(2)"),
    ("attn_out", "result.sum(2)", "result.sum(1) if H == T else result.sum(2)"),
    ("attn_out", "result.sum(2)", "result.sum(2) + x"),
    ("attn_out", "result.sum(2)", "result.sum(2) / K**0.5"),
    # the losses
    ("mse", "attn_out - target", "attn_out + target"),
    ("mse", "attn_out - target", "attn_out + x - target"),
    ("mse", "attn_out - target", "attn_out - np.concatenate([target[:, 1:], target[:, :1]], 1)"),
    ("mse", "(attn_out - target)", "(attn_out - target)[:, -1]"),
    ("mse", "(attn_out - target)", "(attn_out - target)[:, min(1, T - 1) :]"),
    ("mse", "target) ** 2).mean()", "target) ** 2).sum()"),
    ("mse", "target) ** 2).mean()", "target) ** 2).sum(-1).mean()"),
    ("mse", "target) ** 2).mean()", "target) ** 2).sum(1).mean()"),
    ("mse", "target) ** 2).mean()", "target) ** 2).sum(0).mean()"),
    ("mse", "target) ** 2).mean()", "target) ** 2).mean() / 2"),
    ("mse", "target) ** 2).mean()", "target) ** 2).mean() ** 0.5"),
    ("mse", "target) ** 2).mean()", "target) ** 2).mean() / target.var()"),
    ("mse", "target) ** 2)", "target) ** 2 / (1 + (attn_out - target) ** 2))"),
    ("mse", "((attn_out - target) ** 2)", "np.abs(attn_out - target)"),
    ("penalty", "power(gate, p)", "power(gate_scores, p)"),
    ("penalty", "power(gate, p)", "power(gated_pattern, p)"),
    ("penalty", "power(gate, p)", "gate"),
    ("penalty", "power(gate, p)", "power(gate + 1e-8, p)"),
    ("penalty", "power(gate, p).sum(1)", "power(gate, p).mean(1)"),
    ("penalty", "power(gate, p).sum(1)", "power(gate, p).sum(2)"),
    ("penalty", "power(gate, p).sum(1)", "power(gate, p).sum((1, 2, 3)) / T**2"),
    ("penalty", "power(gate, p).sum(1)", "power(gate.sum(1), p)"),
    ("penalty", "power(power(gate, p).sum(1), 1 / p)", "power(gate, p).sum(1)"),
    ("penalty", "power(power(gate, p).sum(1), 1 / p)", "power(power(gate, p).sum(1), p)"),
    ("penalty", "power(power(gate, p).sum(1), 1 / p)", "gate.sum(1)"),
    ("penalty", "power(power(gate, p).sum(1), 1 / p)", "power((gate**2).sum(1), 0.5)"),
    ("penalty", "power(power(gate, p).sum(1), 1 / p)", "gate.max(1)"),
    ("penalty", "p=0.6", "p=0.5"),
    ("penalty", "p=0.6", "p=2 / 3"),
    ("penalty", "p=0.6", "p=0.60001"),
    ("penalty", "norm.mean()", "norm.sum()"),
    ("penalty", "norm.mean()", "norm.sum((1, 2)).mean()"),
    ("penalty", "norm.mean()", "norm.sum(2).mean()"),
    ("penalty", "norm.mean()", "norm.sum(0).mean()"),
    ("penalty", "norm.mean()", "norm.mean() / H"),
    ("penalty", "norm.mean()", "(norm * mask).mean()"),
    ("penalty", "norm.mean()", "(norm * mask).sum() / mask.sum() / B"),
    ("penalty", "norm.mean()", "norm.sum() / mask.sum() / B"),
    ("penalty", "norm.mean()", "norm[norm > 0].mean() if (norm > 0).any() else 0.0"),
    ("penalty", "norm.mean()", "power(power(gate, p).sum(1).mean(), 1 / p)"),
    ("loss", "mse + alpha * penalty", "mse"),
    ("loss", "mse + alpha * penalty", "mse + penalty"),
    ("loss", "mse + alpha * penalty", "mse - alpha * penalty"),
    ("loss", "mse + alpha * penalty", "alpha * mse + penalty"),
    ("loss", "mse + alpha * penalty", "mse + alpha**2 * penalty"),
    ("loss", "mse + alpha * penalty", "mse + alpha * (mse + penalty)"),
    ("loss", "mse + alpha * penalty", "(1 - alpha) * mse + alpha * penalty"),
    # the gradients, where every value is right
    ("grads/W_V", "np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24))",
     "stop(np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24)))"),
    ("grads/W_O", "np.sqrt(np.maximum((W_O**2).sum(2, keepdims=True), 1e-24))",
     "stop(np.sqrt(np.maximum((W_O**2).sum(2, keepdims=True), 1e-24)))"),
    ("grads/W_V", "V = W_V /", "V = stop(W_V) /"),
    ("grads/W_Q", "gate * pattern", "gate * stop(pattern)"),
    ("grads/W_Q", "weights.sum(-1, keepdims=True)", "stop(weights.sum(-1, keepdims=True))"),
    ("grads/W_gate_Q", "gate * pattern", "stop(gate) * pattern"),
    ("grads/W_gate_Q", "alpha * penalty", "alpha * stop(penalty)"),
    ("grads/W_gate_Q", "power(gate, p).sum(1)", "stop(power(gate, p).sum(1))"),
    ("grads/W_Q", "mse + alpha", "stop(mse) + alpha"),
    ("grads/W_gate_Q", "gate = clamp(gate_scores)",
     "gate = gate_scores + stop(clamp(gate_scores) - gate_scores)"),
    ("grads/W_gate_Q", "gate = clamp(gate_scores)",
     "gate = 0.01 * gate_scores + stop(clamp(gate_scores) - 0.01 * gate_scores)"),
    ("grads/W_gate_Q", "gate = clamp(gate_scores)",
     "gate = np.maximum(gate_scores, 0) + stop(clamp(gate_scores) - np.maximum(gate_scores, 0))"),
    ("grads/W_gate_Q", "gate = clamp(gate_scores)",
     "gate = np.minimum(gate_scores, 1) + stop(clamp(gate_scores) - np.minimum(gate_scores, 1))"),
    ("grads/W_gate_Q", "gate = clamp(gate_scores)", "gate = stop(clamp(gate_scores))"),
    ("grads/W_gate_Q", "gate_q, gate_k)", "stop(gate_q), gate_k)"),
    ("grads/W_gate_K", "gate_q, gate_k)", "gate_q, stop(gate_k))"),
    ("grads/W_Q", "bshk->bhqs\", q, k)", "bshk->bhqs\", stop(q), k)"),
    ("grads/W_K", "bshk->bhqs\", q, k)", "bshk->bhqs\", q, stop(k))"),
    ("grads/W_V", "gated_pattern, v)", "gated_pattern, stop(v))"),
    ("grads/W_O", "z, O)", "z, stop(O))"),
    ("grads/b_V", "+ b_V", "+ stop(b_V)"),
    ("grads/b_Q", "+ b_Q", "+ stop(b_Q)"),
    ("grads/b_gate_Q", "+ b_gate_Q", "+ stop(b_gate_Q)"),
    ("grads/b_gate_K", "+ b_gate_K", "+ stop(b_gate_K)"),
    ("grads/x", "x, W_Q)", "stop(x), W_Q)"),
    ("grads/x", "x, W_K)", "stop(x), W_K)"),
    ("grads/x", "x, V)", "stop(x), V)"),
    ("grads/x", "x, W_gate_Q)", "stop(x), W_gate_Q)"),
    ("grads/x", "x, W_gate_K)", "stop(x), W_gate_K)"),
    # NaN is refused, and not compared
    ("NaN", "power(gate, p)", "(gate**p)"),
    ("NaN", "power(gate, p)", "(gate_scores**p)"),
    ("NaN", "np.sqrt(np.maximum((W_V**2).sum(1, keepdims=True), 1e-24))",
     "np.maximum(np.sqrt((W_V**2).sum(1, keepdims=True)), 1e-12)"),
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
    """The first stage that any case catches, or NaN; None where the block passes them all."""
    for case in CASES.values():
        got = got_of(case.name)
        try:
            gatedref.assert_matches(case, {n: got[n] for n in names or got})
        except AssertionError as wrong:
            return str(wrong).split(": ")[1].split(" is ")[0].split("[")[0]
        except ValueError as wrong:
            return "NaN" if "NaN" in str(wrong) else wrong
    return None


@pytest.mark.parametrize("stage, old, new", SLIPS)
def test_a_slip_is_caught_at_its_stage_and_in_the_outputs_alone(stage, old, new):
    got_of = functools.cache(lambda name: ported(CASES[name], old, new))
    assert first_caught(got_of) == stage
    caught = first_caught(got_of, ENDS)
    assert caught is None if stage == "k" else caught is not None  # a softmax does not notice b_K


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_right_block_passes_with_all_stages_and_with_each_alone(case):
    got = ported(case)
    gatedref.assert_matches(case, got, strict=True)
    for name in got:
        gatedref.assert_matches(case, {name: got[name]}, strict=True)
    for name, gradient in got["grads"].items():
        gatedref.assert_matches(case, {"grads": {name: gradient}}, strict=True)


def test_a_clamp_that_differs_in_the_derivative_at_0_and_1_alone_fails_only_when_strict():
    old, new = "np.where(s < 0, 0.0, np.where(s > 1, 1.0, s))", "np.clip(s, 0, 1)"
    assert first_caught(lambda name: ported(CASES[name], old, new)) is None
    got = ported(CASES["gate_edges"], old, new)
    with pytest.raises(AssertionError, match=r"gate_edges: grads/W_gate_Q\["):
        gatedref.assert_matches(CASES["gate_edges"], got, strict=True)


def test_only_gradients_through_the_gate_wait_for_strict():
    case = CASES["gate_edges"]
    for name, gradient in case.expected["grads"].items():
        wrong = {"grads": {name: gradient + 0.01}}
        with pytest.raises(AssertionError, match=f"grads/{name}"):
            gatedref.assert_matches(case, wrong, strict=True)
        if name in (*gatedref.GATE, "x"):
            gatedref.assert_matches(case, wrong)
        else:
            with pytest.raises(AssertionError, match=f"grads/{name}"):
                gatedref.assert_matches(case, wrong)


def torch_block(torch, case, dtype):
    def tensor(a):
        return torch.tensor(a, dtype=dtype, requires_grad=True)

    leaves = {name: tensor(a) for name, a in {**case.params, "x": case.x}.items()}
    x, unit = leaves["x"], torch.nn.functional.normalize
    W_V, W_O = unit(leaves["W_V"], dim=1), unit(leaves["W_O"], dim=2)

    def project(W, b):
        return (x[:, None] @ W).transpose(1, 2) + leaves[b]

    got = {n: project(leaves["W_" + n], "b_" + n) for n in ("gate_Q", "gate_K", "Q", "K")}
    got = {n.lower(): a for n, a in got.items()} | {"v": project(W_V, "b_V")}
    got["gate_scores"] = torch.einsum("bqhg,bkhg->bhqk", got["gate_q"], got["gate_k"])
    scores = torch.einsum("bqhc,bkhc->bhqk", got["q"], got["k"]) / W_V.shape[2] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    got["attn_scores"] = scores.masked_fill(future, -torch.inf)
    got["pattern"] = got["attn_scores"].softmax(-1)
    got["gate"] = got["gate_scores"].clamp(0, 1)
    got["gated_pattern"] = got["gate"] * got["pattern"]
    z = got["gated_pattern"] @ got["v"].transpose(1, 2)
    got["z"], result = z.transpose(1, 2), z @ W_O
    got["result"], got["attn_out"] = result.transpose(1, 2), result.sum(1)
    got["mse"] = torch.nn.functional.mse_loss(got["attn_out"], tensor(case.target))

    def power(base, exponent):
        return torch.where(base > 0, base.masked_fill(base <= 0, 1) ** exponent, 0)

    got["penalty"] = power(power(got["gate"], 0.6).sum(1), 1 / 0.6).mean()
    got["loss"] = got["mse"] + case.alpha * got["penalty"]
    got["loss"].backward()
    return {**got, "grads": {name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_block_in_pytorch_passes(dtype):
    torch = pytest.importorskip("torch")
    for case in CASES.values():
        got = torch_block(torch, case, getattr(torch, dtype))
        gatedref.assert_matches(case, got, strict=True)
        gatedref.assert_matches(case, {"loss": got["loss"].item()}, rtol=0.01)


def test_a_block_in_jax_passes():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy

    def block(arrays, target, alpha):
        def unit(W, axis):
            return W / jnp.sqrt(jnp.maximum((W * W).sum(axis, keepdims=True), 1e-24))

        def project(name, W):
            return jnp.einsum("btd,hdk->bthk", arrays["x"], W) + arrays["b_" + name]

        got = {n.lower(): project(n, arrays["W_" + n]) for n in ("gate_Q", "gate_K", "Q", "K")}
        got["v"] = project("V", unit(arrays["W_V"], 1))
        got["gate_scores"] = jnp.einsum("bqhg,bkhg->bhqk", got["gate_q"], got["gate_k"])
        scores = jnp.einsum("bqhc,bkhc->bhqk", got["q"], got["k"]) / got["q"].shape[-1] ** 0.5
        got["attn_scores"] = jnp.where(jnp.tri(len(scores[0, 0])) > 0, scores, -1e9)
        got["pattern"] = jax.nn.softmax(got["attn_scores"])
        got["gate"] = jnp.clip(got["gate_scores"], 0, 1)
        got["gated_pattern"] = got["gate"] * got["pattern"]
        got["z"] = jnp.einsum("bhqk,bkhc->bqhc", got["gated_pattern"], got["v"])
        got["result"] = jnp.einsum("bqhc,hcd->bqhd", got["z"], unit(arrays["W_O"], 2))
        got["attn_out"] = got["result"].sum(2)
        got["mse"] = ((got["attn_out"] - target) ** 2).mean()

        def power(base, exponent):
            return jnp.where(base > 0, jnp.where(base > 0, base, 1) ** exponent, 0)

        got["penalty"] = power(power(got["gate"], 0.6).sum(1), 1 / 0.6).mean()
        got["loss"] = got["mse"] + alpha * got["penalty"]
        return got["loss"], got

    gradient = jax.jit(jax.grad(block, has_aux=True))
    for i, case in enumerate(CASES.values()):  # in turn, for XLA takes a second or more for each
        with jax.enable_x64(i % 2 == 0):
            grads, got = gradient({**case.params, "x": case.x}, case.target, case.alpha)
            assert got["loss"].dtype == ("float64" if i % 2 == 0 else "float32")
            gatedref.assert_matches(case, {**got, "grads": grads})


# ------------------------------------------------------------------------------------------------
# The conformance kit: what is compared, and how closely

DENSE = CASES["dense"]
EPS = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


def as_type(array, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return np.asarray(array, dtype=dtype)


@pytest.mark.parametrize("dtype", EPS)
def test_the_tolerance_is_16_eps_of_the_type_given(dtype):
    want = DENSE.expected["attn_out"]
    step = EPS[dtype] * abs(want).max() * np.eye(5, 4)
    gatedref.assert_matches(DENSE, {"attn_out": as_type(want + 14 * step, dtype)})
    with pytest.raises(AssertionError, match=r"dense: attn_out\[\d, \d, \d\] is"):
        gatedref.assert_matches(DENSE, {"attn_out": as_type(want + 18 * step, dtype)})


def test_the_tolerance_grows_with_the_error_of_the_plain_computation_in_float32():
    case = CASES["large_scores"]  # where that error is 8.6 eps, and 4 times as much is allowed
    largest = max(abs(g).max() for g in case.expected["grads"].values())
    off = case.expected["grads"]["x"] + 30 * 2**-52 * largest
    gatedref.assert_matches(case, {"grads": {"x": off}})
    with pytest.raises(AssertionError):
        gatedref.assert_matches(case, {"grads": {"x": off + 10 * 2**-52 * largest}})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_in_float64_nothing_passes_that_is_off_by_1e_10(case):
    def moved(array, largest, norm=1):
        return array + 1e-10 * (largest or 1) / norm

    for name, array in case.expected.items():
        if name not in ("attn_scores", "grads"):
            with pytest.raises(AssertionError):
                gatedref.assert_matches(case, {name: moved(array, abs(array).max())})
    grads = {n: g for n, g in case.expected["grads"].items() if n not in ("W_V", "W_O")}
    largest = max(abs(g).max() for g in grads.values())
    for name, array in grads.items():
        if case.name != "tiny_norms" or name in ("x", "b_gate_Q"):
            got = {"grads": {name: moved(array, max(largest, 1))}}
            with pytest.raises(AssertionError, match=f"grads/{name}"):
                gatedref.assert_matches(case, got, strict=True)


@pytest.mark.parametrize("dtype", EPS)
def test_what_is_right_but_for_rounding_passes(dtype):
    for case in CASES.values():
        with np.errstate(over="ignore"):  # a float16 holds no 1e12
            got = {n: as_type(a, dtype) for n, a in case.expected.items() if n != "grads"}
            grads = {n: as_type(g, dtype) for n, g in case.expected["grads"].items()}
        gatedref.assert_matches(case, {**got, "grads": grads}, strict=True)


def test_where_all_is_0_the_tolerance_is_relative_to_1():
    nothing = CASES["all_closed"].expected["attn_out"]
    gatedref.assert_matches(CASES["all_closed"], {"attn_out": nothing + 1e-15})
    with pytest.raises(AssertionError, match="attn_out"):
        gatedref.assert_matches(CASES["all_closed"], {"attn_out": nothing + 1e-14})


def test_masked_scores_may_be_anything_but_nan():
    masked = np.tri(5) == 0
    for filler in (-1e5, -1e9, 0.0, np.finfo(float).min, -np.inf, np.inf):
        scores = np.where(masked, filler, DENSE.expected["attn_scores"])
        gatedref.assert_matches(DENSE, {"attn_scores": scores})
    with pytest.raises(ValueError, match="attn_scores must be finite"):
        gatedref.assert_matches(DENSE, {"attn_scores": np.where(masked, np.nan, scores)})


def test_gradients_are_measured_against_the_largest_of_all_and_that_for_b_K_is_0():
    largest = max(abs(g).max() for g in DENSE.expected["grads"].values())
    nearly = {"b_K": np.full((3, 2), 1e-15 * largest)}
    gatedref.assert_matches(DENSE, {"grads": nearly})
    with pytest.raises(AssertionError, match="grads/b_K"):
        gatedref.assert_matches(DENSE, {"grads": {"b_K": nearly["b_K"] * 10}})


def test_a_zero_column_whose_gradient_is_huge_hides_no_other_gradient():
    case = CASES["tiny_norms"]
    grads = case.expected["grads"]
    assert abs(grads["W_V"]).max() > 1e9
    for name in grads:
        with pytest.raises(AssertionError, match=f"grads/{name}"):
            gatedref.assert_matches(case, {"grads": {name: 1.001 * grads[name] + 0.01}})


def test_rtol_takes_the_place_of_the_tolerance():
    got = {"loss": DENSE.expected["loss"] * (1 + 1e-4)}
    gatedref.assert_matches(DENSE, got, rtol=2e-4)
    for rtol in (5e-5, 0, None):
        with pytest.raises(AssertionError):
            gatedref.assert_matches(DENSE, got, rtol=rtol)


def test_the_message_says_what_where_and_what_else():
    with pytest.raises(AssertionError) as caught:
        gatedref.assert_matches(DENSE, ported(DENSE, "+ b_V", ""))
    grads = ", ".join(f"grads/{name}" for name in DENSE.expected["grads"] if name != "b_K")
    difference = ported(DENSE, "+ b_V", "")["v"] - DENSE.expected["v"]
    at = np.unravel_index(abs(difference).argmax(), difference.shape)
    message = str(caught.value)
    assert message.startswith(f"dense: v{[int(i) for i in at]} is ")
    assert f"should be {DENSE.expected['v'][at]:.17g}: off by {abs(difference[at]):.3g}" in message
    assert message.endswith(f". These differ too: z, result, attn_out, mse, loss, {grads}")


@pytest.mark.parametrize(
    "got",
    [
        None, {}, [], "loss", {"grads": {}}, {"grads": None}, {"grads": np.zeros(3)},
        {"los": 1.0}, {"loss": 1.0, "extra": 1.0}, {1: 1.0},
        {"grads/x": np.zeros((2, 5, 4))},
        {"grads": {"W": np.zeros(1)}}, {"grads": {"x": None}},
        *({"loss": bad} for bad in (
            None, "1", True, 1, 1 + 0j, math.nan, math.inf, -math.inf, [0.5], np.zeros(1), {},
            object(), np.array(1.0, dtype=object), np.array("1"), np.array(b"1"), np.float64("nan"),
            np.datetime64("2026"), [[1.0], [1.0, 2.0]],
        )),
        *({"q": bad} for bad in (
            np.zeros((2, 5, 3)), np.zeros((2, 5, 3, 1)), np.zeros((2, 3, 5, 2)), 0.0,
            np.zeros((1, 2, 5, 3, 2)), np.full((2, 5, 3, 2), np.nan), np.full((2, 5, 3, 2), np.inf),
            np.zeros((2, 5, 3, 2), complex), np.zeros((2, 5, 3, 2), int),
            np.zeros((2, 5, 3, 2), bool), np.zeros((2, 5, 3, 2), object),
        )),
        {"attn_scores": np.full((2, 3, 5, 5), -np.inf)},
    ],
    ids=lambda got: str(got)[:40],
)  # fmt: skip
def test_what_cannot_be_compared_is_a_value_error(got):
    with pytest.raises(ValueError):
        gatedref.assert_matches(DENSE, got)
    for name in got if isinstance(got, dict) and set(got) <= {"loss", "q"} else ():
        for part in ({**DENSE.expected, **got}, {**ported(DENSE, "+ b_V", ""), **got}):
            with pytest.raises(ValueError, match=f"{name} must"):
                gatedref.assert_matches(DENSE, part)


def test_the_other_arguments_are_checked():
    got = {"loss": DENSE.expected["loss"]}
    for rtol in (-1e-9, 1, math.nan, math.inf, "1e-3", True, [1e-3], 1j):
        with pytest.raises(ValueError, match="rtol must be"):
            gatedref.assert_matches(DENSE, got, rtol=rtol)
    for case in (None, "dense", tuple(DENSE), DENSE._asdict()):
        with pytest.raises(TypeError, match="case must be a Case"):
            gatedref.assert_matches(case, got)
    with pytest.raises(TypeError, match="strict a bool"):
        gatedref.assert_matches(DENSE, got, strict="no")


def test_with_an_rtol_of_0_the_very_same_numbers_pass():
    gatedref.assert_matches(DENSE, DENSE.expected, rtol=0)


def test_a_number_that_differs_alone_is_named_without_a_place_and_without_others():
    with pytest.raises(AssertionError, match=r"^dense: loss is 9, should be .* is allowed$"):
        gatedref.assert_matches(DENSE, {"loss": 9.0})


def test_what_was_got_is_named_where_it_is_no_dict_of_known_names():
    for wrong in (None, {}, [], ["loss"], "loss", {"los": 1.0}):
        with pytest.raises(ValueError, match=r"^got must be a dict of any of"):
            gatedref.assert_matches(DENSE, wrong)
    for wrong in (None, {}, ["x"], np.zeros(3), {"W": 1.0}):
        with pytest.raises(ValueError, match=r"^got\['grads'\] must be a dict of any of"):
            gatedref.assert_matches(DENSE, {"grads": wrong})


@pytest.mark.parametrize("problem", [TypeError, ValueError, RuntimeError])
def test_an_array_that_cannot_be_read_is_a_value_error(problem):
    class Elsewhere:  # such as one on a GPU
        def __array__(self, dtype=None, copy=None):
            raise problem("not here")

    class Attached(Elsewhere):
        def detach(self):
            raise problem("not detached")

    for array, told in ((Elsewhere(), "not here"), (Attached(), "not detached")):
        with pytest.raises(ValueError, match=f"^q must be an array.*: {told}"):
            gatedref.assert_matches(DENSE, {"q": array})
    with pytest.raises(ValueError, match="^x must be an array.*: not here"):
        gatedref.attention({n: DENSE.params[n] for n in UNGATED}, Elsewhere())
    with pytest.raises(ValueError, match="^alpha must be an array.*: not here"):
        gatedref.loss(DENSE.params, DENSE.x, DENSE.target, Elsewhere())


def test_a_masked_array_is_refused_and_not_read_without_its_mask():
    hidden = np.ma.masked_array(DENSE.x, mask=DENSE.x > 0)
    with pytest.raises(ValueError, match="^x must be an array without a mask"):
        gatedref.loss(DENSE.params, hidden, DENSE.target, 0.1)
    with pytest.raises(ValueError, match="^q must be an array without a mask"):
        gatedref.assert_matches(DENSE, {"q": np.ma.masked_array(DENSE.expected["q"])})
    for p in (np.ma.masked, np.ma.masked_array(1.0, mask=True)):
        with pytest.raises(ValueError, match="^p must be an array without a mask"):
            gatedref.lp_penalty(np.ones((1, 1, 1, 1)), p)


def test_the_place_of_a_nan_is_told_and_not_that_of_a_masked_score():
    scores = DENSE.expected["attn_scores"].copy()
    scores[1, 2, 4, 0] = np.nan
    with pytest.raises(ValueError, match=r"attn_scores must be finite.* \[1, 2, 4, 0\]$"):
        gatedref.assert_matches(DENSE, {"attn_scores": scores})


# ------------------------------------------------------------------------------------------------
# The conformance kit: the cases

# Obtained apart from this code: the arguments rebuilt from the docstring of `cases`, the method in
# loops over scalars with 80 digits (mpmath 1.3), gradients from central differences of step 1e-28.
PINS = {
    "one_hot": {
        "mse": 0.421907260296,
        "penalty": 1.869856055805,
        "attn_out[1, 6, 5]": -0.02967405804664,
        "grads/W_Q[3, 0, 0]": 0.0008053428082442,
        "grads/W_V[0, 1, 0]": -0.007559972967358,
        "grads/W_O[0, 0, 1]": 0.007778488740642,
        "grads/W_gate_K[0, 1, 0]": 0.01936684736317,
        "grads/x[0, 0, 1]": 0.00125055625965,
    },
    "dense": {
        "mse": 0.5753406578785,
        "penalty": 1.169927232159,
        "attn_out[1, 4, 3]": -0.499529240576,
        "grads/W_Q[2, 0, 0]": -0.008028894205128,
        "grads/W_V[0, 1, 0]": 0.00680266705122,
        "grads/W_O[0, 0, 1]": 0.006197040280013,
        "grads/W_gate_K[0, 1, 0]": 0.01586472376636,
        "grads/x[0, 0, 1]": -0.0429720965453,
    },
    "equal_sizes": {
        "mse": 0.6537292418295,
        "penalty": 1.694195552141,
        "attn_out[2, 2, 2]": 0.2293677746424,
        "grads/W_Q[2, 0, 0]": -0.0540952183166,
        "grads/W_V[0, 1, 0]": 0.01803483772182,
        "grads/W_O[0, 0, 1]": -0.1315610977449,
        "grads/W_gate_K[0, 1, 0]": 0.09755789106929,
        "grads/x[0, 0, 1]": -0.3190015631963,
    },
    "one_position": {
        "mse": 0.9369622261962,
        "penalty": 0.4583333333333,
        "attn_out[2, 0, 3]": 0.04941835177128,
        "grads/W_Q[1, 0, 0]": 0.0,
        "grads/W_V[0, 1, 0]": -0.3285109113948,
        "grads/W_O[0, 0, 1]": -0.03411401509366,
        "grads/W_gate_K[0, 1, 0]": 0.0,
        "grads/x[0, 0, 1]": 0.4447822671695,
    },
    "one_head": {
        "mse": 0.3370542698525,
        "penalty": 0.4563533057851,
        "attn_out[1, 32, 3]": -0.1187322814032,
        "grads/W_Q[0, 0, 0]": 0.004164035957516,
        "grads/W_V[0, 1, 0]": -4.104181473932e-5,
        "grads/W_O[0, 0, 1]": 0.005114505760055,
        "grads/W_gate_K[0, 1, 0]": 0.003402406254159,
        "grads/x[0, 0, 1]": 0.0067161322792,
    },
    "large_scores": {
        "mse": 0.3407347520309,
        "penalty": 1.548045390117,
        "attn_out[1, 5, 3]": 0.5316407961209,
        "grads/W_Q[2, 0, 0]": 2.43023943848e-8,
        "grads/W_V[0, 1, 0]": -0.003244869831543,
        "grads/W_O[0, 0, 1]": -0.003934536915442,
        "grads/W_gate_K[0, 1, 0]": -0.04174484181298,
        "grads/x[0, 0, 1]": -0.0624846692789,
    },
    "large_b_V": {
        "mse": 8.859786717903,
        "penalty": 0.9077889452435,
        "attn_out[1, 4, 5]": -0.3014461989081,
        "grads/W_Q[2, 0, 0]": -0.869987750091,
        "grads/W_V[0, 1, 0]": -0.02071133290709,
        "grads/W_O[0, 0, 1]": -0.5169249612016,
        "grads/W_gate_K[0, 1, 0]": 0.03330059772375,
        "grads/x[0, 0, 1]": 1.628383002372,
    },
    "tiny_norms": {
        "mse": 0.3207626827921,
        "penalty": 1.511083833608,
        "attn_out[1, 4, 3]": -0.1351471295188,
        "grads/W_Q[2, 0, 0]": 0.0004764920703143,
        "grads/W_V[0, 1, 0]": 38798905761.05,
        "grads/W_O[0, 0, 1]": 0.01564525734531,
        "grads/W_O[2, 0, 1]": 17348208279.2,
        "grads/W_O[1, 0, 2]": -5855265300.784,
        "grads/W_gate_K[0, 1, 0]": 0.03993942970426,
        "grads/x[0, 0, 1]": -0.05429392380386,
    },
    "all_closed": {
        "mse": 0.4034748077393,
        "penalty": 0.0,
        "attn_out[1, 3, 3]": 0.0,
        "grads/W_Q[1, 0, 0]": 0.0,
        "grads/W_V[0, 1, 0]": 0.0,
        "grads/W_O[0, 0, 1]": 0.0,
        "grads/W_gate_K[0, 1, 0]": 0.0,
        "grads/x[0, 0, 1]": 0.0,
    },
    "gate_edges": {
        "mse": 0.3877732843903,
        "penalty": 2.543125679259,
        "attn_out[1, 5, 5]": -0.08549856737859,
        "grads/W_Q[2, 0, 0]": 0.0,
        "grads/W_V[0, 1, 0]": 0.007578403104514,
        "grads/W_O[0, 0, 1]": 0.00426095139529,
        "grads/b_V[2, 1]": 0.01324372471483,
    },
}


@pytest.mark.parametrize("name", PINS)
def test_the_expected_numbers_are_those_of_an_independent_computation(name):
    assert list(PINS) == list(CASES)
    expected = CASES[name].expected
    for place, pinned in PINS[name].items():
        stage, _, at = place.rstrip("]").partition("[")
        array = expected["grads"][stage[6:]] if stage.startswith("grads/") else expected[stage]
        number = array[tuple(map(int, at.split(",")))] if at else array
        assert number == pytest.approx(pinned, rel=1e-12, abs=1e-12 * abs(array).max())


def test_together_the_cases_cover_the_method():
    sizes = {name: (*case.x.shape, *case.params["W_V"].shape[::2]) for name, case in CASES.items()}
    d_gate = {name: case.params["W_gate_Q"].shape[2] for name, case in CASES.items()}
    assert any(T == 1 for _, T, _, _, _ in sizes.values())
    assert any(T == 33 for _, T, _, _, _ in sizes.values())
    assert {1, 4} <= {H for _, _, _, H, _ in sizes.values()}
    assert {1, 2, 3} == {K for _, _, _, _, K in sizes.values()} and max(d_gate.values()) > 1
    assert {*sizes["equal_sizes"], d_gate["equal_sizes"]} == {3}
    scores = CASES["large_scores"].expected["attn_scores"]
    assert 55 < scores.max() <= 60 and -60 <= scores[np.isfinite(scores)].min() < -55
    closed = CASES["all_closed"].expected
    assert closed["gate"].max() == closed["penalty"] == 0 and closed["loss"] == closed["mse"] > 0.1
    assert all((gradient == 0).all() for gradient in closed["grads"].values())
    for name, axis in (("W_V", 1), ("W_O", 2)):
        norms = np.sort(np.linalg.norm(CASES["tiny_norms"].params[name], axis=axis).ravel())
        assert norms[0] == 0 and 3e-13 < norms[1] < 1e-12 < norms[2] < 3e-12 and norms[3] > 0.1
    assert abs(CASES["large_b_V"].params["b_V"]).max() > 25
    one_hot = [n for n, c in CASES.items() if (np.sort(c.x)[..., -2:] == (0, 1)).all()]
    assert one_hot == ["one_hot", "large_b_V", "gate_edges"]
    gates = DENSE.expected["gate_scores"]
    assert min((gates < 0).mean(), ((gates > 0) & (gates < 1)).mean(), (gates > 1).mean()) > 0.1
    largest = {}
    for case in CASES.values():
        if case.name != "tiny_norms":
            grads = {n: abs(g).max() for n, g in case.expected["grads"].items()}
            for name, size in grads.items():
                largest[name] = max(largest.get(name, 0), size / (max(grads.values()) or 1))
    assert largest.pop("b_K") < 1e-14 and min(largest.values()) > 0.1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_arguments_have_8_bits_and_no_rounding_flips_a_clamp(case):
    for array in (*case.params.values(), case.x, case.target):
        mantissas = np.frexp(array)[0] * 2**8
        assert array.dtype == float and (mantissas == np.round(mantissas)).all()
    scores = case.expected["gate_scores"]
    distance = np.minimum(abs(scores), abs(scores - 1))
    if case.name == "gate_edges":
        parts = (scores < 0, scores == 0, (scores > 0) & (scores < 1), scores == 1, scores > 1)
        assert min(part.mean() for part in parts) > 0.1
    else:
        assert distance.min() >= 1 / 16


def test_expected_is_what_the_reference_says_in_the_order_of_the_flow():
    for case in CASES.values():
        arguments = case.params, case.x, case.target, case.alpha
        scalars, grads = gatedref.loss_and_grad(*arguments)
        stages = gatedref.gated_attention(case.params, case.x)
        assert list(case.expected) == [*stages, "mse", "penalty", "loss", "grads"]
        assert list(case.expected["grads"]) == [*gatedref.GATED_BLOCK, "x"]
        for name, array in {**stages, **scalars}.items():
            assert np.array_equal(array, case.expected[name])
        for name, gradient in grads.items():
            assert np.array_equal(gradient, case.expected["grads"][name])


def test_the_command_writes_every_case_and_the_same_bytes_on_every_run(tmp_path):
    def command(*arguments):
        program = [sys.executable, gatedref.__file__, *map(str, arguments)]
        return subprocess.run(program, capture_output=True, text=True, check=False)

    paths = tmp_path / "cases.npz", tmp_path / "again"
    for path in paths:
        done = command(path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    written, keys = np.load(paths[0]), set()
    for case in CASES.values():
        inputs = {**case.params, "x": case.x, "target": case.target, "alpha": case.alpha}
        wanted = {f"{case.name}/{n}": a for n, a in inputs.items()}
        for name, array in case.expected.items():
            if name != "grads":
                wanted[f"{case.name}/expected/{name}"] = array
        for name, array in case.expected["grads"].items():
            wanted[f"{case.name}/expected/grads/{name}"] = array
        for key, array in wanted.items():
            assert written[key].dtype == float and np.array_equal(written[key], array)
        keys |= set(wanted)
    assert set(written) == keys
    alone = command()
    assert alone.returncode == 0 and alone.stderr == ""
    assert all(text in alone.stdout for text in (*CASES, "FILE.npz", "CASE/expected/grads/W_Q"))
    assert command("--help").stdout == alone.stdout
    for wrong in ([tmp_path], [tmp_path / "none" / "cases.npz"]):
        failed = command(*wrong)
        assert failed.returncode == 2 and failed.stderr.startswith(f"cannot write {wrong[0]}: ")
        assert failed.stderr.count("\n") == 1
    assert command("--what").returncode == command("a.npz", "b.npz").returncode == 2


ARGUMENTS_OF_THE_CASES = {
    "one_hot": "8305ed7b5bd15036",
    "dense": "7bde8d51f3374f6b",
    "equal_sizes": "26dbaea7d44d4eb2",
    "one_position": "315e0bd93f68d938",
    "one_head": "80d0b1da350326b1",
    "large_scores": "d751d9be4c436c28",
    "large_b_V": "d36d0a3e3a1901b0",
    "tiny_norms": "63d7484edfe83d08",
    "all_closed": "789ebeaae5bef987",
    "gate_edges": "dde0f092c5f3346a",
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_arguments_of_a_case_never_change_by_a_bit(case):
    arrays = *case.params.values(), case.x, case.target, np.array(case.alpha)
    told = hashlib.sha256(b"".join(a.astype("<f8").tobytes() for a in arrays)).hexdigest()
    assert told[:16] == ARGUMENTS_OF_THE_CASES[case.name]


def test_the_command_lists_the_sizes_of_the_cases():
    for flag in ([], ["-h"], ["--help"]):
        program = [sys.executable, gatedref.__file__, *flag]
        listed = subprocess.run(program, capture_output=True, text=True, check=True).stdout
        for case in CASES.values():
            (B, T, D), (H, _, K) = case.x.shape, case.params["W_Q"].shape
            sizes = {"B": B, "T": T, "H": H, "D": D, "K": K, "G": case.params["b_gate_Q"].shape[1]}
            line = [case.name, *(f"{axis}={size}" for axis, size in sizes.items())]
            assert line in [row.split() for row in listed.splitlines()]


# ------------------------------------------------------------------------------------------------
# train.py: the fast form is the reference, only faster


def toy_and_tokens(n_trigrams=3, n_sequences=60, seed=1):
    n_tokens = 2 * n_trigrams + 2
    toy = {name: 3 * w for name, w in gatedref.init_params(2, n_tokens, 1, seed).items()}
    return toy, gatedref.sample_skip_trigrams(n_trigrams, n_sequences, seed=seed)[0], n_tokens


def test_rows_and_pairs_count_what_the_sequences_hold():
    _, tokens, n_tokens = toy_and_tokens(n_sequences=7)
    for causal, options in ((False, {}), (True, {"causal": True})):
        table = train.tabulate(tokens, n_tokens, **options)
        rows, pairs = Counter(), Counter()
        for sequence in tokens.tolist():
            for q, query in enumerate(sequence):
                counts = Counter(sequence[: q + 1])
                rows[query, tuple(counts[token] for token in range(n_tokens))] += 1 / tokens.size
                for key in sequence[: q + 1] if causal else sequence:
                    pairs[query, key] += 1
        total = sum(pairs.values())
        for (query, key), times in pairs.items():
            assert table["pairs"][query, key] == pytest.approx(times / total, rel=1e-14)
        assert table["pairs"].sum() == pytest.approx(1, rel=1e-14)
        for query in range(n_tokens):
            for counts, weight in zip(table["counts"][query], table["weight"][query]):
                row = query, tuple(int(count) for count in counts)
                assert weight == pytest.approx(rows.pop(row) if weight else 0, rel=1e-14)
        assert not rows


FAST = [
    {},
    {"value_scale": 5.0},
    {"activation": "relu", "p": 1.0},
    {"activation": "tanh", "p": 2.0, "value_scale": 0.5},
    {"activation": "binary", "p": 0.4},
    {"causal": True},
]


@pytest.mark.parametrize("options", FAST, ids=str)
@pytest.mark.parametrize("largest_score", [1, 1000])
def test_the_fast_form_equals_the_plain_one(options, largest_score):
    toy, tokens, n_tokens = toy_and_tokens()
    blocks = [gatedref.init_params(5, n_tokens, 2, seed, d_gate=3) for seed in (1, 2)]
    x = np.eye(n_tokens)[tokens]
    for block in blocks:
        for name in ("b_gate_Q", "b_gate_K"):
            block[name] += 0.3  # gates closed, between and open
        scores = gatedref.attention({n: block[n] for n in UNGATED}, x)["attn_scores"]
        block["W_Q"] *= largest_score / abs(scores[np.isfinite(scores)]).max()
        block["b_Q"] *= largest_score / abs(scores[np.isfinite(scores)]).max()
    blocks[0]["W_V"][0, :, 0] = 0  # a norm at its floor
    target = gatedref.attention(toy, x)["attn_out"]
    rows = train.tabulate(tokens, n_tokens, options.get("causal", False))
    attn_out, _ = train.fast_attention(train.stacked([toy]), rows["counts"])
    inputs = train.stacked(blocks), rows, attn_out.reshape(rows["counts"].shape), 0.3
    given = {name: value for name, value in options.items() if name != "causal"}
    scalars, grads = train.fast_loss_and_grad(*inputs, **given)
    for i, block in enumerate(blocks):
        plain, plain_grads = gatedref.loss_and_grad(block, x, target, 0.3, **options)
        for name, scalar in plain.items():
            assert scalars[name][i] == pytest.approx(scalar, rel=1e-10)
        gain = np.maximum(np.sqrt((block["W_V"] ** 2).sum(axis=1, keepdims=True)), 1e-12)
        largest = max(abs(g * gain if n == "W_V" else g).max() for n, g in plain_grads.items())
        for name, gradient in plain_grads.items():
            error = (grads[name][i] - gradient) * (gain if name == "W_V" else 1)
            assert abs(error).max() <= 1e-10 * largest, name


@pytest.mark.parametrize(
    "lowest, highest", [(-700, 700), (900, 901), (-901, -900), (0, 599), (0, 601)]
)
def test_the_fast_form_serves_scores_of_any_size_and_spread(lowest, highest):
    _, tokens, n_tokens = toy_and_tokens()
    block = gatedref.init_params(1, n_tokens, 1, 0)
    block["W_Q"], block["b_Q"] = 0 * block["W_Q"], 0 * block["b_Q"] + 1
    block["W_K"][0, :, 0], block["b_K"] = np.linspace(highest, lowest, n_tokens), 0 * block["b_K"]
    rows = train.tabulate(tokens, n_tokens)
    assert rows["weight"].sum() == pytest.approx(1, rel=1e-14)
    out = train.fast_attention(train.stacked([block]), rows["counts"])[0][0]
    plain = gatedref.attention(block, np.eye(n_tokens)[tokens])["attn_out"].reshape(-1, n_tokens)
    seen = train._rows(tokens, n_tokens).reshape(-1, n_tokens)
    for query, row, expected in zip(tokens.ravel(), seen, plain):
        place = (rows["counts"][query] == row).all(axis=1).argmax()
        found = out.reshape(n_tokens, -1, n_tokens)[query, place]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", list(gatedref.ACTIVATIONS))
def test_the_fast_form_has_the_derivatives_of_gates_at_exactly_0_and_1(activation):
    toy, tokens, n_tokens = toy_and_tokens()
    params = gatedref.init_params(4, n_tokens, 1, 0, d_gate=1)
    params["W_gate_Q"], params["W_gate_K"] = 0 * params["W_gate_Q"], 0 * params["W_gate_K"]
    params["b_gate_Q"] += 1
    params["b_gate_K"][:, 0] = 0, 0.5, 1, 1.5  # the gate scores of the four heads
    rows, x = train.tabulate(tokens, n_tokens), np.eye(n_tokens)[tokens]
    target, _ = train.fast_attention(train.stacked([toy]), rows["counts"])
    inputs = train.stacked([params]), rows, target.reshape(rows["counts"].shape), 0.3
    _, grads = train.fast_loss_and_grad(*inputs, activation=activation)
    target = gatedref.attention(toy, x)["attn_out"]
    _, plain = gatedref.loss_and_grad(params, x, target, 0.3, activation=activation)
    _, freed = train.fast_loss_and_grad(*inputs, activation=activation, reopen=True)
    for name in gatedref.GATE:
        np.testing.assert_allclose(grads[name][0], plain[name], rtol=1e-10, atol=1e-14)
        # From 0 to 1 no gate is stuck.
        np.testing.assert_array_equal(freed[name][0, :3], grads[name][0, :3])


def test_a_stuck_gate_gets_a_gradient_back_inside_only_with_reopen():
    _, tokens, n_tokens = toy_and_tokens()
    rows = train.tabulate(tokens, n_tokens)
    params = gatedref.init_params(1, n_tokens, 1, 0, d_gate=1)
    target = np.ones_like(rows["counts"])
    params["W_gate_Q"], params["W_gate_K"] = 0 * params["W_gate_Q"], 0 * params["W_gate_K"]
    params["b_gate_K"] += 1
    for score, wanted in ((-0.5, -1), (1.5, 1)):
        params["b_gate_Q"][:] = score
        alpha = 0 if score < 0 else 1
        for sign in (1, -1):  # the head helps, or harms
            head = {"W_O": 0 * params["W_O"] + sign, "b_V": 0 * params["b_V"] + 1}
            inputs = train.stacked([{**params, **head}]), rows, target, alpha
            shut = train.fast_loss_and_grad(*inputs)[1]["b_gate_Q"][0, 0, 0]
            free = train.fast_loss_and_grad(*inputs, reopen=True)[1]["b_gate_Q"][0, 0, 0]
            assert shut == 0
            assert np.sign(free) in (0, wanted)
            assert (np.sign(free) == wanted) == (sign == 1 or score > 1)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_above_1_a_gate_that_is_not_clamped_has_its_gradient_with_or_without_reopen(activation):
    _, tokens, n_tokens = toy_and_tokens()
    rows = train.tabulate(tokens, n_tokens)
    params = gatedref.init_params(2, n_tokens, 1, 0, d_gate=1)
    params["b_gate_Q"] += 1.5
    params["b_gate_K"] += 1.5
    inputs = train.stacked([params]), rows, np.zeros_like(rows["counts"]), 0.1
    shut = train.fast_loss_and_grad(*inputs, activation=activation)[1]
    free = train.fast_loss_and_grad(*inputs, activation=activation, reopen=True)[1]
    for name in shut:
        np.testing.assert_array_equal(free[name], shut[name])


def test_a_batch_is_of_rows_with_their_next_tokens_and_weighs_as_the_sequences_do():
    tokens, _ = gatedref.sample_skip_trigrams(3, 40, seed=5)
    contexts = train.sample_contexts(3, 40, seed=5)
    expected = [[] for _ in range(8)]
    for sequence in tokens:
        for t, token in enumerate(sequence):
            row = np.bincount(sequence[: t + 1], minlength=8)
            expected[token].append((*row, sequence[t + 1] if t < 10 else -1))
    batch = train.draw(contexts, 7, np.random.default_rng(0))
    for token, rows in enumerate(expected):
        n = contexts["n_rows"][token]
        after = contexts["after"][token, :n, None]
        found = np.concatenate([contexts["counts"][token, :n], after], axis=1)
        assert found.tolist() == [list(row) for row in rows]
        drawn = np.concatenate([batch["counts"][token], batch["after"][token, :, None]], axis=1)
        assert {tuple(row) for row in drawn} <= set(rows) and len({*map(tuple, drawn)}) > 1
        np.testing.assert_allclose(batch["weight"][token], len(rows) / tokens.size / 7)


def test_the_toy_learns_on_the_cross_entropy_of_the_next_token():
    toy, _, n_tokens = toy_and_tokens()
    contexts = train.sample_contexts(3, 30, seed=5)
    batch = train.draw(contexts, 6, np.random.default_rng(0))
    counts, after, weight = batch["counts"], batch["after"], batch["weight"]

    def plainly(toy):
        total = used = 0.0
        for query in range(n_tokens):
            for row, following, share in zip(counts[query], after[query], weight[query]):
                if following >= 0:  # not the last position
                    rest = row - np.eye(n_tokens)[query]  # the query comes last, the order is free
                    tokens = np.append(np.repeat(np.arange(n_tokens), rest.astype(int)), query)
                    logits = gatedref.transformer([toy], tokens[None])["logits"][0, -1]
                    total = total - share * (logits[following] - anp.log(anp.sum(anp.exp(logits))))
                    used += share
        return total / used

    far = train.stacked([{**toy, "W_O": 1e5 * toy["W_O"]}])
    assert np.isfinite(train.cross_entropy(far, batch)[0]).all()
    losses, grads = train.cross_entropy(train.stacked([toy]), batch)
    assert losses[0] == pytest.approx(plainly(toy), rel=1e-12)
    expected = grad(plainly)(toy)
    for name in toy:
        np.testing.assert_allclose(grads[name][0], expected[name], rtol=0, atol=1e-12)


def test_alpha_is_0_then_falls_geometrically_to_its_last_value():
    recipe = {"alpha": (20.0, 5.0), "until": (0.2, 0.6)}
    alphas = [train.alpha_at(recipe, progress) for progress in (0, 0.19, 0.2, 0.4, 0.6, 0.9)]
    assert alphas == pytest.approx([0, 0, 20, 10, 5, 5])


@pytest.mark.parametrize("choose, best", [(3.0, [1]), (8.0, [0]), (None, [0, 1])])
def test_of_the_starts_the_one_is_finished_whose_loss_is_lowest_by_the_stated_weight(choose, best):
    def evaluate(params, size, alpha, reopen):
        first = params["W"][:, 0] < 0.5
        scalars = {"mse": np.where(first, 1.0, 0.5), "penalty": np.where(first, 0.1, 0.2)}
        scalars["loss"] = scalars["mse"] + alpha * scalars["penalty"]
        return scalars, {"W": 0 * params["W"]}

    starts = [{"W": np.array([float(i)])} for i in range(2)]
    recipe = {**train.RECIPE, "steps": 4, "finish_steps": 4, "choose": choose}
    params, curves = train.take_apart(starts, evaluate, recipe)
    assert params["W"][:, 0].tolist() == best
    assert curves.shape == (8, 4, len(best))
    np.testing.assert_array_equal(curves[:, 0], np.tile(np.array([1.0, 0.5])[best], (8, 1)))
    np.testing.assert_array_equal(curves[-4:, 3], recipe["finish_alpha"])


def test_training_twice_gives_the_same_bits_and_another_seed_others():
    job = train.make_job("2H3T", 0, quick=True)
    ((run, rest),), ((again, rest_again),) = train.run_setting(job), train.run_setting(job)
    assert {**run, "seconds": 0} == {**again, "seconds": 0}
    for block in ("toy", "gated"):
        for name, array in rest["params"][block].items():
            np.testing.assert_array_equal(array, rest_again["params"][block][name])
    ((_, other),) = train.run_setting({**job, "seed": 1})
    assert (other["params"]["toy"]["W_Q"] != rest["params"]["toy"]["W_Q"]).all()


# ------------------------------------------------------------------------------------------------
# train.py: the command


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    assert train.main([*train.EXPERIMENTS, "--quick", "--out", str(out)]) == 0
    return out


def test_a_quick_run_writes_every_file(quick):
    pictures = ["before_after", "gates", "training", "penalty", "sweep", "ablations"]
    pictures += ["layers", "overlap", "sources"]
    names = {"results.json", "blocks.npz", *(f"{name}.png" for name in pictures)}
    names |= {f"{name}.npz" for name in train.GROUPS["limits"]}
    assert {path.name for path in quick.iterdir()} == names
    results = json.loads((quick / "results.json").read_text())
    assert set(results) == {"environment", *train.EXPERIMENTS}
    assert set(results["environment"]) == {"python", "numpy", "autograd", "platform"}
    assert [run["key"] for run in results["main"]] == list(train.SETTINGS)


def test_the_blocks_on_disk_give_the_figures_in_the_results(quick):
    blocks = np.load(quick / "blocks.npz")
    for run in json.loads((quick / "results.json").read_text())["main"]:
        toy, gated = (
            {name.split("/")[2]: blocks[name] for name in blocks if name.startswith(start)}
            for start in (f"{run['key']}/toy/", f"{run['key']}/gated/")
        )
        scale, n = float(gated.pop("value_scale")), run["n_trigrams"]
        for block, which, number in ((toy, "toy", 7), (gated, "gated", 9)):
            seed = train.stream(run["seed"], number)
            model = functools.partial(train.forward, [block], value_scale=scale)
            accuracy, holding, _ = train.measure(model, n, seed, 2000)
            assert (accuracy, holding) == (run[f"accuracy_{which}"], run[f"holders_{which}"])
        tokens, _ = gatedref.sample_skip_trigrams(n, 1000, seed=train.stream(run["seed"], 10))
        target = gatedref.transformer([toy], tokens)["blocks"][0]["attn_out"]
        out = gatedref.transformer([gated], tokens, value_scale=scale)["blocks"][0]
        deviations = ((target - target.mean(axis=(0, 1))) ** 2).sum()
        fvu = ((out["attn_out"] - target) ** 2).sum() / deviations
        assert run["fvu"] == pytest.approx(fvu, rel=1e-10)
        assert run["penalty"] == pytest.approx(gatedref.lp_penalty(out["gate"]), rel=1e-10)
        assert run["n_gated_heads"] == len(gated["W_Q"])


def test_the_parameters_of_the_limits_on_disk_give_the_figures_in_the_results(quick):
    results = json.loads((quick / "results.json").read_text())

    def stored(experiment, variant):
        kept = np.load(quick / f"{experiment}.npz")
        rows = [row for row in results[experiment] if row["variant"] == variant]
        start = f"{rows[0]['key']}/{variant}/"
        params = {name[len(start) :]: kept[name] for name in kept if name.startswith(start)}
        assert all(len(array) == len(rows) for array in params.values())
        return [(row, train.part_of(params, i)) for i, row in enumerate(rows)]

    for variant in ("handmade", "trained"):
        for row, params in stored("premise", variant):
            tokens, _ = gatedref.sample_skip_trigrams(3, 2000, seed=train.stream(row["seed"], 11))
            assert train.next_token_loss([params], tokens) == pytest.approx(row["loss"], rel=1e-12)

    ((row, toy),) = stored("layers", "two layers")
    layers, seed = train.parted_layers(toy), train.stream(row["seed"], 17)
    accuracy, holding, _ = train.measure(functools.partial(train.forward, layers), 3, seed, 2000)
    assert (accuracy, holding) == (row["accuracy"], row["holders"])

    def gated(params, tokens):
        original = gatedref.transformer(layers, tokens)["blocks"]
        x = np.eye(8)[tokens]
        inputs = zip(train.parted_layers(params), (x, x + original[0]["attn_out"]), scales)
        made = [gatedref.gated_attention(block, x, value_scale=scale) for block, x, scale in inputs]
        logits = x + made[0]["attn_out"] + made[1]["attn_out"]
        return logits, np.concatenate([block["result"] for block in made], axis=2)

    for variant in ("each layer gated", "gated for the sum", "for the sum, alpha at once"):
        for row, params in stored("layers", variant):
            scales = params.pop("value_scales")
            accuracy, holding, _ = train.measure(functools.partial(gated, params), 3, seed, 2000)
            assert (accuracy, holding) == (row["accuracy"], row["holders"])

    x, target = train.sample_copies(4000, np.random.default_rng(1))
    for variant in ("three, written down", "six, trained", "six of twice the width, trained"):
        for row, params in stored("overlap", variant):
            out = gatedref.gated_attention(params, x)["attn_out"]
            fvu = ((out - target) ** 2).mean() / target.var(axis=(0, 1)).mean()
            assert fvu == pytest.approx(row["mse"], rel=0.2, abs=1e-12)

    each_source = np.eye(train.D_PAIRS)[None, [*range(1, 12), 0]]
    for variant in ("toy", "2 x the heads", "3 x, penalty by query"):
        for row, params in stored("sources", variant):
            scale = params.pop("value_scale", None)
            block = gatedref.attention if variant == "toy" else gatedref.gated_attention
            alone = block(params, each_source, **({"value_scale": scale} if scale else {}))
            np.testing.assert_allclose(alone["pattern"][0, :, -1], row["pattern"], rtol=1e-12)


def test_another_experiment_leaves_the_others_results_in_place(tmp_path):
    train.save(tmp_path, "main", [1])
    train.save(tmp_path, "sweep", [2])
    train.save(tmp_path, "main", [3])
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["main"], results["sweep"]) == ([3], [2])


def test_a_write_that_fails_leaves_the_file_before_it_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fill(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train.write(path, fill)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["--nonsense"], ["--seed", "-1"], ["--seed", "x"], ["--seeds", "3", "1"]],
    ids=str,
)
def test_bad_arguments_end_with_one_line_and_status_2(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_out_that_is_a_file_ends_with_one_line_and_status_2(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_results_that_cannot_be_read_are_refused_before_any_training(text, tmp_path, capsys):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_ends_with_status_130_and_keeps_what_was_finished(tmp_path, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(train.EXPERIMENTS, "main", lambda arguments: [1])
    monkeypatch.setitem(train.EXPERIMENTS, "sweep", interrupted)
    assert train.main(["main", "sweep", "--out", str(tmp_path)]) == 130
    assert json.loads((tmp_path / "results.json").read_text())["main"] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_run_that_diverges_says_where_and_writes_nothing(tmp_path, monkeypatch, capsys):
    def diverging(arguments):
        job = train.make_job("2H3T", 0, {"far": {"rate": 1e300}}, quick=True)
        train._run_job.notes = queue.SimpleQueue()
        return train._run_job(0, job)

    monkeypatch.setitem(train.EXPERIMENTS, "main", diverging)
    assert train.main(["--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert " of 40" in told and "2H3T" in told
    assert list(tmp_path.iterdir()) == []


def test_a_trigram_is_distributed_if_it_is_right_and_no_head_holds_it_alone():
    assert train.is_distributed(0.991, [[0, 1]]) and train.is_distributed(1.0, [])
    assert not train.is_distributed(0.99, [[0, 1]])
    assert not train.is_distributed(1.0, [[0], [1]])
    toy = {"accuracy_toy": [1.0, 0.991], "holders_toy": [[[0, 1]], [[0]]]}
    assert train.is_superposition(toy)
    assert not train.is_superposition({**toy, "accuracy_toy": [1.0, 0.99]})


def test_success_asks_for_all_of_accuracy_one_head_each_and_little_unexplained():
    run = {"accuracy_gated": [1.0, 0.995], "holders_gated": [[[0]], [[2]]], "n_trigrams": 2}
    run |= {"accuracy_toy": [1.0, 0.995], "holders_toy": [[[0]], [[0, 1]]], "fvu": 0.01}
    assert train.is_success(run)
    assert not train.is_success({**run, "accuracy_toy": [1.0, 0.99]})
    assert not train.is_success({**run, "holders_toy": [[[0]], [[1]]]})
    assert not train.is_success({**run, "fvu": 0.0101})
    assert train.is_taken_apart({**run, "fvu": 0.0101})
    assert not train.is_success({**run, "accuracy_gated": [1.0, 0.99]})
    for held in ([[[0]], [[0]]], [[[0]], [[1], [2]]], [[[0]], [[1, 2]]], [[[0]], []]):
        assert not train.is_success({**run, "holders_gated": held})


def test_how_many_trigrams_one_head_holds_several_in_turn_or_none():
    holding = [[[0]], [[1], [2]], [[1], [2], [3]], [[0, 1]], [], [[0]], [[4]]]
    run = {"accuracy_gated": [1.0] * 5 + [0.99, 0.991], "holders_gated": holding}
    assert train.count_holders(run) == [2, 2, 2, 1]


# ------------------------------------------------------------------------------------------------
# train.py: what the method cannot do


@pytest.mark.parametrize("arrangement", [train.SHARED, train.DISJOINT])
def test_three_heads_and_six_copy_to_the_last_digit(arrangement):
    x, target = train.sample_copies(50, np.random.default_rng(0))
    out = gatedref.gated_attention(train.copying_block(arrangement), x)["attn_out"]
    np.testing.assert_allclose(out, target, rtol=0, atol=1e-15)


def test_the_penalty_and_the_loss_do_not_see_that_heads_overlap():
    x, target = train.sample_copies(50, np.random.default_rng(0))
    shared, disjoint = (
        gatedref.loss(train.copying_block(arrangement), x, target, 0.1)
        for arrangement in (train.SHARED, train.DISJOINT)
    )
    for name in ("penalty", "loss"):
        assert shared[name] > 0.01
        assert abs(shared[name] - disjoint[name]) <= 1e-15


def test_the_copying_task_asks_for_two_of_three_numbers():
    x, target = train.sample_copies(200, np.random.default_rng(0))
    tokens, payload = x[..., :6].argmax(axis=2), x[:, 1, 6:]
    asked = {"BOS": [], "source": [], "N": [], "A": [0, 1], "B": [1, 2], "C": [0, 2]}
    for t in range(4):
        for name, numbers in asked.items():
            mine = tokens[:, t] == train.COPYING[name]
            assert mine.any() == (name in (["BOS"], ["source"], "ABCN", "ABCN")[t])
            wanted = np.zeros((mine.sum(), 3))
            wanted[:, numbers] = payload[mine][:, numbers] / (t + 1)
            np.testing.assert_array_equal(target[mine, t, 6:], wanted)
    assert (target[..., :6] == 0).all()


def test_what_is_trained_to_copy_attends_uniformly_and_has_a_gate_that_does_not_see_the_payload():
    params = gatedref.init_params(6, train.D_COPYING, 2, 0, d_gate=1)
    params = {name: array + 0.1 for name, array in params.items()}
    x, _ = train.sample_copies(20, np.random.default_rng(0))
    shaped = train.for_copying(params)
    block = gatedref.gated_attention(shaped, x)
    uniform = np.tri(4) / np.arange(1, 5)[:, None]
    np.testing.assert_allclose(block["pattern"] - uniform, 0, atol=1e-15)
    other = gatedref.gated_attention(shaped, np.where(x == 1, 1, 2 * x))
    np.testing.assert_array_equal(block["gate"], other["gate"])
    for W in (shaped["W_V"], np.swapaxes(shaped["W_O"], 1, 2)):
        np.testing.assert_allclose(np.swapaxes(W, 1, 2) @ W - np.eye(2), 0, atol=1e-14)


def test_who_shares_and_who_serves_one_task():
    one_each = {"gates": [[1, 0, 0.4], [0, 0.6, 0], [0, 0.5, 1]], "mse": 0.001}
    assert train.is_one_a_task(one_each) and not train.is_shared(one_each)
    assert not train.is_one_a_task({**one_each, "mse": 0.01})
    shared = {"gates": [[1, 0, 0], [0.6, 0.6, 0], [0, 0.5, 1]], "mse": 0.001}
    assert train.is_shared(shared) and not train.is_one_a_task(shared)
    two = {"gates": [[1, 0, 0, 1], [0, 0.6, 0, 0], [0, 0, 1, 0]], "mse": 0.001}
    assert not train.is_shared(two) and not train.is_one_a_task(two)


def test_a_pair_of_signals_is_among_the_tokens_and_nothing_else_but_noise():
    tokens, answers = train.sample_pairs(300, np.random.default_rng(0))
    assert len(train.PAIRS) == len(set(answers)) == 10
    assert tokens.shape == (300, 6) and set(tokens.ravel()) == set(range(12))
    for sequence, answer in zip(tokens, answers):
        assert tuple(sorted(t for t in sequence if 1 <= t <= 4)) == train.PAIRS[answer]
        assert sequence[-1] == 0 and (sequence[:-1] > 0).all()
    first = np.argmax((tokens >= 1) & (tokens <= 4), axis=1)
    assert set(first) == {0, 1, 2, 3}


def test_on_a_mixed_pair_a_head_lies_between_what_it_does_on_the_two_pairs_of_equals():
    """The query is always the read-off, so what a token adds to the head's weighted sum, and to the
    sum of its weights, depends on the token alone."""
    params = randoms(GATED, H=3, D=6, K=1, G=1, scale=1.0)
    x = np.eye(6)[[[1, 1, 4, 5, 0], [2, 2, 4, 5, 0], [1, 2, 4, 5, 0]]]
    first, second, mixed = gatedref.gated_attention(params, x)["z"][:, -1, :, 0]
    assert ((mixed - first) * (mixed - second) <= 0).all()
    assert (abs(first - second) > 1e-3).any()


def test_what_counts_as_between_the_two_pairs_of_equals():
    def attend(x):
        signals = x[..., 1:5].sum(axis=1)  # [B, signal]
        inside, outside = signals @ [-9, -8, 1, 9], (signals > 0).sum(axis=1)
        z = np.stack([inside, outside], axis=1)[:, None, :, None]
        return {"z": np.concatenate([0 * z, 0 * z, z], axis=1)}

    assert train.between(attend) == 0.5


def test_how_the_pairs_of_signals_are_told():
    holding = [[[0]], [[0, 1], [1, 2]], [[0], [1]], [], [[0, 1, 2, 3]], [[2]], [[1, 2]]]
    holding += [[[1]], [[3]], [[0]]]
    pattern = np.zeros((4, 12))
    pattern[:, :4] = [[4, 1, 2, 3], [2, 2, 4, 2], [0, 0, 0, 1], [1, 1, 1, 1]]
    pattern[:, 4:] = 7  # noise and the read-off, which do not count
    row = {"accuracy": [1.0] * 9 + [0.99], "holders": holding, "pattern": pattern.tolist()}
    assert train.count_sets(row) == [5, 2, 2, 1]
    # Heads 0 and 1 on (1, 2); 0 on (1, 3); 2 on (2, 3); 1 and 2 on (2, 4); 3 on (3, 4).
    assert [pair for pair in train.PAIRS if pair[0] != pair[1]] == [
        train.PAIRS[place] for place in (1, 2, 3, 5, 6, 8)
    ]
    assert train.own_attention(row) == pytest.approx(np.mean([0.5, 0.4, 0.6, 0.0, 0.4, 1.0, 0.5]))
    gate = np.ones((4, 12))
    gate[0, [0, 2]] = 0.5, 0  # of head 0 the signals count 2, 1, 0 and 3; head 3 sees none
    gate[3, :4] = 0
    shares = [0.5, 0.4, 2 / 6, 0.0, 0.4, 1.0]
    assert train.own_attention({**row, "gate": gate.tolist()}) == pytest.approx(np.mean(shares))
    gates = np.zeros((3, 12))
    gates[:2, :5] = 0.02
    gates[0, 5:] = 1
    gates[1, 6] = 0.01
    rows = [{"gate": gates.tolist()}, {"gate": np.ones((3, 12)).tolist()}, {}]
    assert train.several_open(rows) == "8.5" and train.several_open([{}]) == ""


def test_blocks_side_by_side_are_each_block_by_itself():
    toy, tokens, n_tokens = toy_and_tokens()
    x, several = np.eye(n_tokens)[tokens], []
    for seed in range(2):
        several.append(gatedref.init_params(3, n_tokens, 2, seed, d_gate=1))
    target = gatedref.attention(toy, x)["attn_out"]

    def objective(params, alpha):
        out, scores, gate = train.side_by_side(params, x, 2.0)
        return train.scalars_of([out - target[:, :, None]], [scores], [gate], alpha)

    evaluate = train.plainly(objective, lambda size: ())
    scalars, grads = evaluate(train.stacked(several), 40, 0.1, False)
    for i, params in enumerate(several):
        wanted, expected = gatedref.loss_and_grad(params, x, target, 0.1, value_scale=2.0)
        for name in wanted:
            assert scalars[name][i] == pytest.approx(wanted[name], rel=1e-13)
        for name in params:
            np.testing.assert_allclose(grads[name][i], expected[name], rtol=0, atol=1e-14)
        scores = gatedref.gated_attention(params, x)["gate_scores"]
        assert scalars["highest score"][i] == pytest.approx(scores.max(), rel=1e-13)


def test_the_scalars_of_several_targets_are_means_and_the_score_the_highest():
    rng = np.random.default_rng(0)
    errors = [rng.normal(size=(3, 4, 2, 5)) for _ in range(2)]  # of two blocks
    scores = [rng.normal(size=(3, 2, 6, 4, 4)) for _ in range(2)]
    gates = [abs(score) for score in scores]
    scalars = train.scalars_of(errors, scores, gates, 0.25)
    for i in range(2):
        mse = np.mean([np.mean(error[:, :, i] ** 2) for error in errors])
        penalty = np.mean([gatedref.lp_penalty(gate[:, i]) for gate in gates])
        assert scalars["mse"][i] == pytest.approx(mse, rel=1e-12)
        assert scalars["penalty"][i] == pytest.approx(penalty, rel=1e-12)
        assert scalars["loss"][i] == pytest.approx(mse + 0.25 * penalty, rel=1e-12)
        assert scalars["highest score"][i] == max(score[:, i].max() for score in scores)


def test_the_deviation_and_the_cross_entropy_of_the_limits():
    target = np.array([[[1.0, 0.0], [3.0, 0.0], [1.0, 4.0], [3.0, 4.0]]])  # [B, T, D]
    assert train.deviation_of(target) == pytest.approx(2.5**0.5)
    logits = np.log([[[2.0, 1.0, 1.0, 1e-200], [1.0, 6.0, 1.0, 1e200]]])
    logits[0, 1] -= [0, 0, 0, 2000]  # so that neither end of a row overflows, nor do large logits
    logits, answers = logits + 800, np.eye(4)[[[0, 2]]]
    assert train.surprise(logits, answers) == pytest.approx((np.log(2) + np.log(8)) / 2)


def test_reopening_is_the_clamp_with_a_gradient_that_points_back_inside():
    scores = np.array([-1.0, 0.0, 0.5, 1.0, 2.0])
    np.testing.assert_array_equal(train.reopening(scores), [0, 0, 0.5, 1, 1])
    down, up = (grad(lambda s, sign=sign: sign * anp.sum(train.reopening(s))) for sign in (1, -1))
    np.testing.assert_array_equal(down(scores), [0, 1, 1, 1, 1])
    np.testing.assert_array_equal(up(scores), [-1, -1, -1, -1, 0])


def test_two_heads_written_down_are_right_on_fifty_trigrams_of_which_one_head_holds_two():
    job = {"n_trigrams": 50, "seed": 0, "key": "2H50T", "steps": 1, "quick": False}
    (row,) = train.run_premise(job)
    assert min(row["accuracy"]) == 1
    assert sum(map(train.has_single, row["holders"])) == 2
    assert all(row["holders"])


def test_what_spans_two_layers():
    assert train.spans([[0, 1]], 1) and train.spans([[0, 3], [1, 2]], 2)
    assert not train.spans([], 1)
    assert not train.spans([[0, 1]], 2) and not train.spans([[0, 1], [0, 2]], 2)
    two = {"accuracy": [1.0, 1.0], "n_heads": 2}
    kinds = {"across layers": [[1, 2]], "within a layer": [[2, 3]], "apart": [[0], [1]]}
    twice = {**two, "holders": [[[1]], [[1]]]}  # one head for two trigrams
    assert train.is_within(twice) and not train.is_apart(twice)
    for kind, holding in kinds.items():
        row = {**two, "holders": [[[1]], holding]}
        assert [name for name, test in train.LAYERS.items() if test(row)] == [kind]
        wrong = {**row, "accuracy": [1.0, 0.99]}
        assert not any(test(wrong) for test in train.LAYERS.values())


def test_on_how_many_seeds_the_one_kind_of_start_is_lower_in_loss_than_the_other():
    starts = ((0, 2, "a"), (0, 1, "b"), (1, 1, "a"), (1, 2, "b"), (2, 1, "a"), (2, 0, "c"))
    rows = [{"seed": seed, "loss": loss, "kind": kind} for seed, loss, kind in starts]
    is_a, is_b, is_c = (lambda row, kind=kind: row["kind"] == kind for kind in "abc")
    assert train.below(is_a, is_b)(rows) == "1 of 2"
    assert train.below(is_a, is_c)(rows) == "0 of 1"
    assert train.below(is_c, is_b)(rows) == "0 of 0"


def test_what_is_apart_in_the_second_layer_alone():
    row = {"accuracy": [1.0, 1.0], "n_heads": 2}
    assert train.is_late({**row, "holders": [[[2], [3]], [[2]]]})
    assert not train.is_late({**row, "holders": [[[1], [3]], [[2]]]})
    assert not train.is_late({**row, "holders": [[[2, 3]], [[2]]]})
    assert not train.is_late({**row, "holders": [[[2]], [[2]]]})


def test_a_summary_has_a_line_for_each_variant_and_setting():
    rows = [{"variant": v, "key": k, "n": n} for v, k, n in (("a", "x", 1), ("a", "x", 4))]
    rows += [{"variant": "b", "key": "x"}]
    columns = {"large": train.count(lambda row: row.get("n", 0) > 2), "n": train.over("n")}
    columns |= train.counted(lambda row: [1, 2], "ones", "twos")
    lines = ["| variant | setting | runs | large | n | ones | twos |", "| " + "--- | " * 7]
    lines += ["| a | x | 2 | 1 | 2.5000 | 2 | 4 |", "| b | x | 1 | 0 |  | 1 | 2 |"]
    assert train.summary(rows, columns) == [line.strip() for line in lines]


# ------------------------------------------------------------------------------------------------
# The README


def test_the_readme_tells_what_the_results_hold():
    here = Path(__file__).parent
    readme = (here / "README.md").read_text()
    results = json.loads((here / "figures" / "results.json").read_text())
    for run in results["main"]:
        toy, gated = (
            ", ".join(train.told(holding) for holding in run[f"holders_{which}"])
            for which in ("toy", "gated")
        )
        unexplained, penalty = f"{run['fvu']:.4f}", f"{run['penalty']:.4f}"
        cells = run["key"], toy, run["n_gated_heads"], gated, unexplained, penalty
        assert "| " + " | ".join(map(str, cells)) + " |" in readme
        assert run["variant"] == "default"
        assert f"seed {run['seed']}" in readme
    tables = {"sweep": train.RATES, "ablations": train.RATES, "premise": train.PREMISE}
    tables |= {"layers": train.LAYERS_TABLE, "overlap": train.OVERLAP, "sources": train.SOURCES}
    for experiment, columns in tables.items():
        for row in train.summary(results[experiment], columns):
            assert row in readme
    ratios = [
        row["ratio"]
        for row in results["benchmark"]
        if (row["n_sequences"], row["n_positions"]) == (1000, 11)
    ]
    assert f"{min(ratios):.0f} to {max(ratios):.0f} times as fast" in " ".join(readme.split())
