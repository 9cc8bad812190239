"""What gatedref computes, in statements: what equals what, and to how many digits.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import itertools
import math
from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from autograd import grad, jacobian

import gatedref

pytestmark = pytest.mark.filterwarnings("error")


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
