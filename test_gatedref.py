"""What gatedref computes, in statements: what equals what, and to how many digits.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import hashlib
import importlib.util
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
from figures import (
    ablations,
    before_after,
    common,
    layers,
    overlap,
    price,
    sources,
    wild,
)
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
    return {name: scale * normal(axes, rng, sizes) for name, axes in names.items()}


def table(text):
    """The lines of a text, cut at the bars; those that begin with # are left out."""
    lines = [line for line in text.strip().splitlines() if not line.startswith("#")]
    return [[part.strip() for part in line.split("|")] for line in lines]


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
    """Equal to so many digits of the largest entry; infinite at the same places.

    Two dicts of arrays: of the largest entry of all of them.
    """
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert np.shape(actual[name]) == np.shape(expected[name])
        actual, expected = in_one(actual), in_one(expected)
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    finite = expected[np.isfinite(expected)]
    allowed = np.abs(finite).max() / 10**digits
    np.testing.assert_allclose(actual, expected, rtol=0, atol=allowed)


def in_one(arrays):
    """All the numbers of a dict of arrays, one after another, sorted by name."""
    return np.concatenate([np.ravel(arrays[name]) for name in sorted(arrays)])


def slopes(function, arrays, step=3e-6):
    """The derivatives of a function of a dict of arrays, by central differences."""
    found = {}
    for name, array in arrays.items():
        found[name] = np.zeros(np.shape(array))
        for index in np.ndindex(np.shape(array)):
            change = np.zeros(np.shape(array))
            change[index] = step
            above = function({**arrays, name: array + change})
            below = function({**arrays, name: array - change})
            found[name][index] = (above - below) / (2 * step)
    return found


# ---- Another implementation, for autograd, PyTorch and JAX ---------------------------
#
# It is source text, so that slips can be planted. `np` is the framework, `stop` takes a
# number out of differentiation.

PORT = """
def clamp(scores):
    return np.where(scores < 0, 0.0, np.where(scores > 1, 1.0, scores))

def power(base, exponent):
    is_open = base > 0
    return np.where(is_open, np.where(is_open, base, 1.0) ** exponent, 0.0)

def root(squares):
    floor = np.where(squares > 1e-24, squares, 1e-24)
    return np.sqrt(floor)

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
    query, key = np.arange(T)[:, None], np.arange(T)
    mask = query >= key
    gate_scores = np.einsum("bqhg,bshg->bhqs", gate_q, gate_k)
    gate = clamp(gate_scores)
    attn_scores = np.einsum("bqhk,bshk->bhqs", q, k) / K**0.5
    attn_scores = np.where(mask, attn_scores, -1e5)
    largest = np.amax(attn_scores, -1, keepdims=True)
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

ALL_CASES = list(gatedref.cases())
CASES = {case.name: case for case in ALL_CASES}
DENSE = CASES["dense"]
SMALL_CASES = [case for case in ALL_CASES if case.x.shape[1] < 100]  # of few positions
LONG_CASES = [case for case in ALL_CASES if case.x.shape[1] >= 100]


def rounded(array):
    """Rounded to the eight bits of bfloat16; the derivative is 1."""
    mantissa, exponent = np.frexp(getval(array))
    nearest = np.ldexp(np.round(256 * mantissa) / 256, exponent)
    return array + (nearest - getval(array))


def planted(source, right, wrong):
    """A source text with a slip: the wrong text in place of the first right one."""
    assert right in source
    return source.replace(right, wrong, 1)


def results_of(source, case, dtype=np.float64, **options):
    """All that the port in a source text makes of a case, gradients included."""
    names = {"np": anp, "stop": getval, "rounded": rounded}
    exec(source, names)  # noqa: S102
    inputs = as_type({**case.params, "x": case.x}, dtype)
    target, alpha = case.target.astype(dtype), dtype(case.alpha)

    def objective(inputs):
        stages = names["port"](target=target, alpha=alpha, **inputs, **options)
        shown = {name: stages[name] for name in case.expected if name in stages}
        return stages["loss"], shown

    with np.errstate(all="ignore"):
        grads, stages = grad_and_aux(objective)(inputs)
    stages = {name: getval(array) for name, array in stages.items()}
    return {**stages, "grads": grads}


def ends_of(got):
    """All that many ports can show: outputs, losses and gradients."""
    ends = ("attn_out", "mse", "penalty", "loss", "grads")
    return {name: got[name] for name in ends}


def first_wrong(case, got, **options):
    """The stage that is named as the first wrong one; None where all is right."""
    try:
        gatedref.assert_matches(case, got, **options)
    except AssertionError as wrong:
        return re.match(r"\w+: ([\w/]+)", str(wrong))[1]
    return None


# ---- Attention and the gated block ---------------------------------------------------


CLAMP = "np.where(scores < 0, 0.0, np.where(scores > 1, 1.0, scores))"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.longdouble])
@pytest.mark.parametrize("clamp", [CLAMP, "np.clip(scores, 0, 1)"])
def test_every_stage_loss_and_gradient_is_that_of_another_implementation(clamp, dtype):
    source = planted(PORT, CLAMP, clamp)
    cases = list(SMALL_CASES)
    if dtype != np.longdouble:  # which is slow
        cases += LONG_CASES
    for case in cases:
        got = results_of(source, case, dtype)
        assert got["attn_out"].dtype == dtype
        n_compared = len(gatedref.assert_matches(case, got))
        n_free = sum(np.isinf(unit).all() for unit in case.unit.values())
        n_given = len(got) - 1 + len(got["grads"])
        assert n_compared + n_free == n_given


def test_the_reference_passes_in_long_double():
    for case in SMALL_CASES:
        params = as_type(case.params, np.longdouble)
        x, target = case.x.astype(np.longdouble), case.target.astype(np.longdouble)
        stages = gatedref.gated_attention(params, x)
        scalars, gradient = gatedref.loss_and_grad(params, x, target, case.alpha)
        assert stages["z"].dtype == scalars["loss"].dtype == np.longdouble
        gatedref.assert_matches(case, {**stages, **scalars, "grads": gradient})


@pytest.mark.parametrize("value_scale", [{}, {"value_scale": 3}])
def test_attention_is_a_gated_block_whose_gates_are_1(value_scale):
    params, x = {**normal_params(), **value_scale}, normal("BTD", 1)
    for name in ("W_gate_Q", "W_gate_K"):
        params[name] = np.zeros_like(params[name])
    params["b_gate_Q"] = np.ones((4, 7))
    params["b_gate_K"] = np.full((4, 7), 1 / 7)
    gated = gatedref.gated_attention(params, x)
    ungated = {name: params[name] for name in BLOCK}
    ungated.update(gatedref.normalised(params))
    stages = gatedref.attention(ungated, x)
    assert stages.keys() < gated.keys()
    for name, array in stages.items():
        assert_close(array, gated[name], digits=14)


def sigmoid(scores):
    """Another activation function."""
    return 1 / (1 + anp.exp(-scores))


OPTIONS = [
    ("clamp(gate_scores)", "1 / (1 + np.exp(-gate_scores))", {"activation": sigmoid}),
    ("0.6", "2.0", {"p": 2}),
    ("0.6", "0.3", {"p": 0.3}),
]


@pytest.mark.parametrize("right, wrong, options", OPTIONS)
def test_the_loss_takes_another_activation_or_power(right, wrong, options):
    got = results_of(PORT.replace(right, wrong), DENSE)
    given = DENSE.params, DENSE.x, DENSE.target, DENSE.alpha
    scalars, gradient = gatedref.loss_and_grad(*given, **options)
    assert scalars == gatedref.loss(*given, **options)
    assert_close(scalars, {name: got[name] for name in scalars}, digits=14)
    del got["grads"]["x"]
    assert_close(gradient, got["grads"], digits=13)


def test_the_clamp_has_the_derivative_1_from_0_to_1_ends_included():
    scores = np.array([-2, -1e-9, 0, 1e-9, 0.5, 1 - 1e-9, 1, 1 + 1e-9, 2])
    gates = [0, 0, 0, 1e-9, 0.5, 1 - 1e-9, 1, 1, 1]
    assert gatedref.clamp(scores).tolist() == gates
    slopes = elementwise_grad(gatedref.clamp)(scores)
    assert slopes.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


# ---- The penalty and the gradients ---------------------------------------------------


def test_sharing_a_pair_costs_more_than_the_sum_of_its_parts():
    costs = []
    for gates in ([1, 0], [0.5, 0.5], [1, 1]):
        pair = np.reshape(gates, (1, 2, 1, 1))
        costs.append([gatedref.lp_penalty(pair), gatedref.lp_penalty(pair, p=1)])
    assert_close(costs, [[1, 1], [1.5874, 1], [3.1748, 2]], digits=5)


def distance_from_ends(gate_scores):
    """How far gate scores are from 0 and 1, the ends of the clamp."""
    return np.minimum(np.abs(gate_scores), np.abs(gate_scores - 1))


@pytest.mark.parametrize("value_scale", [{}, {"value_scale": 0.5}])
def test_gradients_equal_central_differences_to_8_digits(value_scale):
    params = {**normal_params(seed=48, sizes=SMALL, scale=0.7), **value_scale}
    x, target = normal("BTD", 1, SMALL), normal("BTD", 2, SMALL)
    scores = gatedref.gated_attention(params, x)["gate_scores"]
    assert distance_from_ends(scores).min() > 0.01
    case = gatedref.make_case("own", params, x, target, 0.3)
    gradient = {}
    for name in [*params, "x"]:
        gradient[name] = case.expected[f"grads/{name}"]

    def objective(inputs):
        block = {name: inputs[name] for name in params}
        return gatedref.loss(block, inputs["x"], target, 0.3)["loss"]

    assert_close(gradient, slopes(objective, {**params, "x": x}), digits=8)
    assert_close(grad(objective)({**params, "x": x}), gradient, digits=13)


def test_float32_in_gives_float32_out_and_a_gradient_of_each_parameters_type():
    params = {**as_type(normal_params(), np.float32), "value_scale": np.float64(0.7)}
    x, p = normal("BTD", 1).astype(np.float32), np.float64(0.6)
    stages = gatedref.gated_attention(params, x)
    scalars, gradient = gatedref.loss_and_grad(params, x, x, alpha=p, p=p)
    penalty = gatedref.lp_penalty(stages["gate"], p)
    logits = gatedref.transformer([params], [[0, 4]])["logits"]
    for array in [*stages.values(), *scalars.values(), penalty, logits]:
        assert array.dtype == np.float32
    for name, array in params.items():
        assert gradient[name].dtype == array.dtype


def test_lists_and_integers_are_computed_with_as_float64():
    params = {name: np.ceil(array) for name, array in normal_params(scale=2).items()}
    x = np.round(normal("BTD", 1))
    as_lists = {name: array.tolist() for name, array in params.items()}
    right, gradient = gatedref.loss_and_grad(params, x, x, 2.0)
    for given in (as_type(params, np.int8), as_lists):
        scalars, found = gatedref.loss_and_grad(given, x.astype(int), x.tolist(), 2)
        assert scalars == right
        assert_close(found, gradient, digits=16)


# ---- Models and a task ---------------------------------------------------------------


def test_a_gated_block_has_the_weights_of_an_ungated_one_from_the_same_seed():
    block = gatedref.init_params(4, 5, 6, seed=3)
    gated = gatedref.init_params(4, 5, 6, seed=3, d_gate=2)
    assert list(gated) == list(GATED_BLOCK)
    assert digest(gated[name] for name in BLOCK) == digest(block.values())
    default = gatedref.init_params(4, 5, 6)
    first = gatedref.init_params(4, 5, 6, seed=0)
    assert digest(default.values()) == digest(first.values())
    assert digest(default.values()) != digest(block.values())
    assert not gated["b_gate_Q"].any()
    assert not gated["b_gate_K"].any()


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
    first, second = {**normal_params(), "value_scale": 2}, normal_params(BLOCK, 1)
    tokens = np.array([[0, 4, 2], [1, 1, 3]], dtype=np.uint64)
    model = gatedref.transformer([first, second], tokens, activation=sigmoid)
    residual = np.eye(5)[tokens]
    block = gatedref.gated_attention(first, residual, activation=sigmoid)
    assert_close(model["blocks"][0]["result"], block["result"], digits=14)
    residual = residual + block["attn_out"]
    block = gatedref.attention(second, residual)
    assert_close(model["blocks"][1]["result"], block["result"], digits=14)
    assert_close(model["logits"], residual + block["attn_out"], digits=14)


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


@pytest.mark.parametrize(
    "n, S, T", [(1, 400, 11), (3, 5, 1), (3, 400, 2), (2, 20000, 11)]
)
def test_every_sequence_obeys_the_law_and_draws_are_uniform_within_5_sigma(n, S, T):
    tokens, completes = gatedref.sample_skip_trigrams(n, S, T)
    counts = np.zeros((2, 2 * n + 2))  # of draws by the law without an A, after an A
    for sequence, found in zip(tokens.tolist(), completes.tolist(), strict=True):
        draws, expected = free_draws(n, sequence)
        assert found == expected
        for is_armed, token in draws:
            counts[int(is_armed), token] += 1
    assert tokens.shape == completes.shape == (S, T)
    assert counts[1, 0] == 0
    for row in (counts[0], counts[1, 1:]):
        sigma = math.sqrt(row.mean() * (1 - 1 / len(row)))
        assert np.abs(row - row.mean()).max() <= 5 * sigma
    if T == 11:
        assert completes[:, -1].any()
        assert completes.sum(axis=1).max() > 1
        other, _ = gatedref.sample_skip_trigrams(n, S, seed=1)
        assert (other != tokens).any()


@pytest.mark.parametrize("n", [2, 5, 12])
def test_two_handmade_heads_hold_the_first_and_last_trigram_and_share_the_others(n):
    tokens, completes = gatedref.sample_skip_trigrams(n, 2000)
    model = gatedref.transformer([gatedref.handmade_superposition(n)], tokens)
    answers = tokens[completes] + n
    result = model["blocks"][0]["result"][completes]  # [trigrams, H, V]
    assert result.shape[2] == 2 * n + 2
    assert (model["logits"][completes].argmax(axis=1) == answers).all()
    found = []
    for answer in range(n + 1, 2 * n + 1):
        of_answer = result[answers == answer]
        found.append(gatedref.holders(of_answer, np.full(len(of_answer), answer)))
        angles = np.deg2rad(90 / n) * (np.arange(n + 1, 2 * n + 1) - answer)
        written = of_answer.sum(axis=1)
        shape = written[:, n + 1 : 2 * n + 1] / written[:, [answer]]
        assert_close(shape, np.tile(np.cos(angles), (len(shape), 1)), digits=4)
    assert found == [[(0,)], *[[(0, 1)]] * (n - 2), [(1,)]]


# ---- Which heads hold an answer ------------------------------------------------------


def test_the_fewest_heads_that_keep_the_answer_whatever_else_is_removed_hold_it():
    # The answer is token 1. Head 1 outvotes head 0, but not heads 0 and 2 together.
    assert gatedref.holders([[[0, 5], [9, 0], [0, 5]]], [1]) == [(0, 2)]
    # Together they write 4 4 6, though each of them is above a rival.
    assert gatedref.holders([[[4, 0, 3], [0, 4, 3]]], [1]) == []


def naive_holders(results, answers, threshold):
    """The smallest sets that hold: every set is tried, with every larger one."""
    heads = range(len(results[0]))
    sets = [s for n in heads for s in itertools.combinations(heads, n + 1)]
    for size in heads:
        found = []
        for group in itertools.combinations(heads, size + 1):
            larger = [list(s) for s in sets if {*group} <= {*s}]
            held = []
            for result, answer in zip(results, answers, strict=True):
                said = [result[heads].sum(axis=0).argmax() for heads in larger]
                held.append(all(token == answer for token in said))
            if np.mean(held) > threshold:
                found.append(group)
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
            assert found == naive_holders(result, answers, threshold)
            sizes.add(len(found[0]) if found else 0)
    assert sizes >= {0, 1, 2}


# ---- The authors' models, which nobody here trained: figures/published.npz -----------

# A model; of trigram 1, 2 and so on: the head that holds it alone, - where none does.
HOLDERS = """
2H3T/toy | 1 - 0
3H4T/toy | - 0 - 2
4H5T/toy | 1 2 0 - 3
4H5T/conventional | - - - - -
2H3T/manual | 0 1 -
4H5T/manual | 0 1 - 2 3
2H3T/gated | 1 0 3
3H4T/gated | 2 1 0 4
4H5T/gated | 5 3 7 0 1
4H5T/gated_of_manual | 5 4 6 3 0
"""

# A gated block, and the toy that it replaces: how much of that it leaves unexplained,
# and how many of its trigrams are held by heads that fire without A.
REPLACED = """
2H3T/gated | 2H3T/toy | 0.32 | 2
3H4T/gated | 3H4T/toy | 0.052 | 2
4H5T/gated | 4H5T/toy | 0.064 | 3
4H5T/gated_of_manual | 4H5T/manual | 0.0000095 | 0
"""


def task_of(model):
    return train.skip_trigram_task(int(model[2]), 5000, seed=0)  # 2H3T has 3 trigrams


@pytest.mark.parametrize("model, heads", table(HOLDERS))
def test_the_heads_of_the_authors_models_hold_what_they_did(model, heads):
    found = train.judge_on(train.writes([published(model)]), task_of(model))
    alone = [[] if head == "-" else [int(head)] for head in heads.split()]
    assert gatedref.singles(found["holders"]) == alone


@pytest.mark.parametrize("gated, toy, share, n_fires", table(REPLACED))
def test_the_authors_gated_blocks_are_apart_but_far_from_their_toys(
    gated, toy, share, n_fires
):
    write = train.writes([published(gated)])
    found = train.verdict(write, [published(toy)], task_of(toy))
    assert found["apart"]
    assert found["unexplained"] == pytest.approx(float(share), rel=0.04)
    assert found["fires_without_A"] == int(n_fires)


def test_a_head_escapes_the_published_penalty_by_its_value_bias_but_not_value_scale():
    params = published("2H3T/gated")
    escaped = {**params, "b_V": params["b_V"] * 1000}
    for name in ("W_gate_Q", "b_gate_Q"):
        escaped[name] = params[name] / 1000
    tokens, _ = gatedref.sample_skip_trigrams(3, 1000)
    data = np.eye(8)[tokens], train.written([published("2H3T/toy")], tokens), 1

    before = gatedref.loss(params, *data)
    after = gatedref.loss(escaped, *data)
    assert before["penalty"] == pytest.approx(0.0155, rel=0.02)
    assert after["penalty"] == pytest.approx(before["penalty"] / 1000)
    assert after["mse"] == pytest.approx(before["mse"], rel=0.01)

    before = gatedref.loss({**params, "value_scale": 20}, *data)
    after = gatedref.loss({**escaped, "value_scale": 20}, *data)
    assert after["mse"] > 2.5 * before["mse"]


# ---- The conformance kit: wrong blocks are caught where they err --------------------


# The stage that is named, what a right block says, and what a wrong one says there.
SLIPS = """
gate_q | W_gate_Q) + b_gate_Q | W_gate_Q)
gate_scores | gate = clamp( | gate_scores = gate_scores / K**0.5; gate = clamp(
gate_scores | bqhg,bshg->bhqs | bshg,bqhg->bhqs
v | x, W_V) + b_V | x, W_V)
v | W_V = W_V / norm[:, None] | W_V = W_V
v | squares, 1e-24 | squares, 1e-16
attn_scores | query >= key | query > key
attn_scores | query >= key | (query >= key) & (query < key + 32)
pattern | attn_scores, -1e5 | attn_scores, -100
pattern | attn_scores - largest | attn_scores
pattern | np.exp(attn_scores | gate * np.exp(attn_scores
gate | clamp(gate_scores) | 1 / (1 + np.exp(-gate_scores))
gated_pattern | gate * pattern | gate_scores * pattern
z | gated_pattern, v) | pattern, v)
result | (W_O**2).sum(2))[:, :, None] | (W_O**2).sum(1))[:, None]
attn_out | result.sum(2) | result.sum(1 if H == T else 2)
mse | ** 2).mean() | ** 2).sum(2).mean()
penalty | power(gate, 0.6) | power(gated_pattern, 0.6)
penalty | norms.mean() | (norms * mask).sum() / mask.sum() / B
penalty | norms.mean() | powers.mean()
loss | alpha * penalty | penalty
grads/W_V | W_V / norm[:, None] | W_V / stop(norm)[:, None]
grads/W_gate_Q | gate * pattern | stop(gate) * pattern
grads/W_gate_Q | power(gate, 0.6) | (gate**0.6)
grads/W_K | gate * pattern | gate * stop(pattern)
grads/x | x, W_Q) | stop(x), W_Q)
# value_scale: not at all, not used, on W_V alone, b_V not in the norm, constants
v | if value_scale is None | if True
v | + b_V**2) / value_scale | + b_V**2)
v | b_V = b_V / norm | b_V = b_V
v | (W_V**2).sum(1) + b_V**2 | (W_V**2).sum(1)
grads/W_V | b_V = b_V / norm | b_V = b_V / stop(norm)
grads/value_scale | / value_scale | / stop(value_scale)
# in bfloat16: the gate, the target
gate | clamp(gate_scores) | rounded(clamp(gate_scores))
mse | attn_out - target | attn_out - rounded(target)
"""

# Past the first tile: what a right kernel says, and a wrong one.
TILE_SLIPS = """
# the running sum is not rescaled, or z is not
total * rescale | total
z * rescale | z
# the mask goes by the index within the tile
rows[:, None] >= columns | rows[:, None] - start >= columns - key_start
# the last tile, which is not full, has no values, or its gates have no gradient
v[:, columns] | v[:, columns] * (not is_ragged)
clamp(gate) | stop(clamp(gate)) if is_ragged else clamp(gate)
# the penalty leaves out tiles whose keys are all masked
norms.sum() | norms.sum() * (key_start <= start)
# the heads are in another order
v[:, columns] | v[:, columns, :: 1 if key_start == 0 else -1]
# the first tile's values are read again
v[:, columns] | v[:, columns - key_start]
"""


@pytest.mark.parametrize("stage, right, wrong", table(SLIPS))
def test_a_slip_is_named_at_its_stage_and_fails_by_its_ends_alone(stage, right, wrong):
    source = planted(PORT, right, wrong)
    for case in [*SMALL_CASES, *LONG_CASES]:
        got = results_of(source, case)
        named = first_wrong(case, got)
        if named is not None:
            break
    assert named == stage
    assert first_wrong(case, ends_of(got)) is not None


@pytest.mark.parametrize("tile", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("right, wrong", table(TILE_SLIPS))
def test_a_slip_past_the_first_tile_fails_by_its_ends_alone(right, wrong, tile):
    source = planted(PORT + TILED, right, wrong)
    for case in LONG_CASES:
        if case.x.shape[1] > tile:
            got = ends_of(results_of(source, case, tile=tile))
            if first_wrong(case, got) is not None:
                return
    # Only `many_tiles` is that long, and it has one head.
    assert (wrong[-3:], tile) == ("-1]", 256)


# ---- The cases -----------------------------------------------------------------------

RANDOM_SIZES = [
    {"B": 2, "T": 9, "H": 3, "D": 4, "K": 2, "G": 2},
    {"B": 1, "T": 40, "H": 2, "D": 300, "K": 5, "G": 8},
    {"B": 1, "T": 1, "H": 1, "D": 1, "K": 1, "G": 1},
]


def inputs_of(case):
    inputs = {"x": case.x, "target": case.target, "alpha": np.array(case.alpha)}
    return {**case.params, **inputs}


def is_exact(array, bits):
    mantissa, _ = np.frexp(array)
    return (mantissa * 2**bits % 1 == 0).all()


def test_the_cases_are_the_same_for_ever_and_exact_in_bfloat16_or_float32():
    with np.errstate(all="raise"):
        again = list(gatedref.cases())
    inputs = [inputs_of(case).values() for case in again]
    assert digest(itertools.chain(*inputs)) == "18dd6bcd733a6a4c"
    for case, arrays in zip(again, inputs, strict=True):
        is_inexact = case.name.startswith("dense")
        assert any(is_exact(array, bits=8) for array in arrays) != is_inexact
        assert all(is_exact(array, bits=24) for array in arrays)


def test_every_gradient_that_should_not_be_0_is_not():
    for case in ALL_CASES:
        dead = ["b_K"]  # which adds the same to all scores of a query
        if case.name.startswith("one_position"):
            dead = ["W_Q", "W_K", "b_Q", "b_K"]
        for name in {*case.params, "x"} - {*dead}:
            largest = np.abs(case.expected[f"grads/{name}"]).max()
            assert largest > 1e-3 * case.unit["grads/b_Q"]


def test_no_rounding_flips_a_clamp_but_in_gate_edges_many_scores_are_0_or_1():
    for case in ALL_CASES:
        scores = case.expected["gate_scores"]
        assert ((scores > 0) & (scores < 1)).mean() > 0.1
        if case.name.startswith("gate_edges"):
            assert min((scores == 0).mean(), (scores == 1).mean()) > 0.1
        else:
            assert distance_from_ends(scores).min() >= 1 / 512


@pytest.mark.parametrize("sizes", RANDOM_SIZES)
@pytest.mark.parametrize("seed, value_scale", [(0, None), (1, 0.5)])
def test_a_right_block_passes_random_cases_in_float32_too(seed, value_scale, sizes):
    case = gatedref.random_case(seed, **sizes, value_scale=value_scale)
    inputs = inputs_of(case)
    assert inputs.get("value_scale") == value_scale
    assert all(is_exact(array, bits=8) for array in inputs.values())
    assert case.expected["gate"].shape == tuple(sizes[axis] for axis in "BHTT")
    assert distance_from_ends(case.expected["gate_scores"]).min() > 1e-5
    assert np.abs(case.expected["q"]).max() < 9
    for dtype in (np.float64, np.float32):
        gatedref.assert_matches(case, results_of(PORT, case, dtype))
    other = gatedref.random_case(seed + 2, **sizes, value_scale=value_scale)
    assert digest(inputs_of(other).values()) != digest(inputs.values())


def test_a_case_can_be_made_from_your_own_arrays_and_nothing_moves_it():
    params = as_type({**normal_params(), "value_scale": 1.5}, np.float32)
    x, target = normal("BTD", 1).astype(np.float32), normal("BTD", 2)
    case = gatedref.make_case("own", params, x, target, 0.3)
    expected = gatedref.gated_attention(as_type(params, float), x.astype(float))
    for mine in (x, target, *params.values()):
        mine += 1
    for name, array in expected.items():
        np.testing.assert_array_equal(case.expected[name], array)
    gatedref.assert_matches(case, results_of(PORT, case), rtol=1e-12)
    arrays = [*case.params.values(), case.x, case.target]
    for array in [*arrays, *case.expected.values(), *case.unit.values()]:
        assert not array.flags.writeable


def test_a_case_is_a_case_in_another_process_and_after_a_reload():
    case = pickle.loads(pickle.dumps(DENSE))
    place = importlib.util.spec_from_file_location("another", gatedref.__file__)
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    assert module.assert_matches(case, {"z": case.expected["z"]}) == ["z"]


# ---- What assert_matches says --------------------------------------------------------


def message_of(case, got, **options):
    with pytest.raises(AssertionError) as caught:
        gatedref.assert_matches(case, got, **options)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])
def test_the_tolerance_is_64_eps_of_the_type_but_no_less_than_of_float64_or_rtol(dtype):
    eps = max(float(np.finfo(dtype).eps), float(np.finfo(float).eps))
    expected = DENSE.expected["attn_out"].astype(dtype)
    unit = dtype(eps * np.abs(DENSE.expected["attn_out"]).max())
    right, wrong = expected + 62 * unit, expected - 66 * unit
    gatedref.assert_matches(DENSE, {"attn_out": right})
    gatedref.assert_matches(DENSE, {"attn_out": wrong}, rtol=70 * eps)
    assert first_wrong(DENSE, {"attn_out": wrong}) == "attn_out"
    assert first_wrong(DENSE, {"attn_out": right}, rtol=60 * eps) == "attn_out"


def test_the_message_says_what_where_by_how_much_and_what_else():
    got = results_of(planted(PORT, "W_V) + b_V", "W_V)"), DENSE)
    off = np.abs(got["v"] - DENSE.expected["v"])
    at = np.unravel_index(off.argmax(), off.shape)
    found, right = got["v"][at], DENSE.expected["v"][at]
    message = message_of(DENSE, got)
    assert message.startswith(f"dense: v{[int(i) for i in at]} is {found:.17g}")
    for told in (f"{right:.17g}", f"{off[at]:.3g}", "1.4e-14", "float64"):
        assert told in message
    others = message.split(": ")[-1].split(", ")
    assert others[:6] == ["z", "result", "attn_out", "mse", "loss", "grads/W_O"]
    assert "norm" not in message


def test_gradients_are_told_in_the_order_of_a_backward_pass():
    case = CASES["dense_scaled"]
    assert {*gatedref.BACKWARD} == {*case.params, "x"}
    order = [f"grads/{name}" for name in gatedref.BACKWARD]
    got = {name: case.expected[name] + 9 for name in sorted(order)}
    assert re.findall(r"grads/\w+", message_of(case, got)) == order


def test_all_gradients_share_a_unit_but_for_the_norms_that_they_are_divided_by():
    unit = DENSE.unit
    norm = np.linalg.norm(DENSE.params["W_O"], axis=2, keepdims=True)
    expected = np.full(norm.shape, unit["grads/b_Q"])
    assert_close(unit["grads/W_O"] * norm, expected, digits=14)


@pytest.mark.parametrize("name", ["grads/W_V", "grads/W_O", "grads/b_V"])
def test_a_zero_column_whose_gradient_is_huge_is_weighted_and_hides_no_other(name):
    case = CASES["tiny_norms_scaled"]
    gradient, unit = case.expected[name], case.unit[name]
    assert unit.max() > 1e9 * unit.min()
    assert np.abs(gradient / unit).max() <= 1
    assert "norm" in message_of(case, {name: gradient + 2e-14 * unit})
    gatedref.assert_matches(case, {name: gradient + 1e-14 * unit})
    for other in gatedref.BACKWARD:
        wrong = case.expected[f"grads/{other}"] + 1e-6
        assert first_wrong(case, {"grads": {other: wrong}}) == f"grads/{other}"


@pytest.mark.parametrize("filler", [-1e5, 0.0, -INF, NAN])
def test_masked_scores_may_be_anything(filler):
    expected = DENSE.expected["attn_scores"]
    scores = np.where(np.isinf(expected), filler, expected)
    gatedref.assert_matches(DENSE, {"attn_scores": scores})


# The case, what a right block says, what a wrong one says, the stage named, the hint.
HINTS = """
gate_edges | power(gate, 0.6) | (gate**0.6) | grads/W_gate_Q | penalty
tiny_norms | np.sqrt(floor) | np.sqrt(squares) | v | 0/0.*W_V
tiny_norms | np.sqrt(floor) | (1e-24 + squares - squares) ** 0.5 | v | should
tiny_norms | np.sqrt(floor) | np.maximum(squares**0.5, 1e-12) | grads/W_O | root
dense | attn_scores, -1e5 | attn_scores - np.inf + np.inf, -np.inf | attn_scores | -inf
dense | mask, attn_scores, -1e5 | query > key, attn_scores, -np.inf | attn_scores | -inf
dense | W_V) + b_V | W_V) + np.inf | v | finite.$
"""


@pytest.mark.parametrize("name, right, wrong, stage, hint", table(HINTS))
def test_not_a_number_hints_at_its_cause_if_that_is_known(
    name, right, wrong, stage, hint
):
    got = results_of(planted(PORT, right, wrong), CASES[name])
    message = message_of(CASES[name], got).split(" These")[0]
    assert re.match(rf"{name}: {stage}\[.*{hint}", message)


def test_comparing_nothing_is_an_error_and_what_is_free_must_still_be_finite():
    edges = CASES["gate_edges"]
    x = edges.expected["grads/x"]
    for got in ({"grads": {"x": 2 * x}}, {"grads": {}}, {}):
        with pytest.raises(ValueError, match="^gate_edges: got must "):
            gatedref.assert_matches(edges, got)
    got = {"grads": {"x": 2 * x}, "v": edges.expected["v"]}
    assert gatedref.assert_matches(edges, got) == ["v"]
    for wrong in (None, x[:1], x * NAN):
        assert first_wrong(edges, {"grads": {"x": wrong}}) == "grads/x"


def test_misuse_of_assert_matches_is_refused():
    for got in ({"los": 1.0}, {1: 1.0}, {"grads": {"W": 1.0}}, {"grads": None}):
        with pytest.raises(ValueError, match="^dense: got must .*(los|1|grads)"):
            gatedref.assert_matches(DENSE, {**got, "loss": DENSE.expected["loss"]})
    for rtol in (0, -1e-9, 1, NAN, "1e-3", True):
        with pytest.raises(ValueError, match="rtol must be"):
            gatedref.assert_matches(DENSE, DENSE.expected, rtol=rtol)
    for case, got in ((None, {}), (tuple(DENSE), {}), (DENSE, None)):
        with pytest.raises(TypeError, match="(case|got) must be a"):
            gatedref.assert_matches(case, got)


@pytest.mark.parametrize("wrong", [None, "1", True, 1, 1j, [[0.5]]])
def test_what_is_no_array_of_floats_of_the_right_shape_differs(wrong):
    assert first_wrong(DENSE, {"loss": wrong, "z": DENSE.expected["z"]}) == "loss"
    assert first_wrong(DENSE, {"grads": {"x": wrong}}) == "grads/x"


def test_a_loss_may_have_the_shape_1_and_float16_needs_a_tolerance_of_its_own():
    assert first_wrong(DENSE, {"z": np.ma.asarray(DENSE.expected["z"])}) == "z"
    case = CASES["dense_scaled"]
    loss, gradient = case.expected["loss"], case.expected["grads/value_scale"]
    gatedref.assert_matches(case, {"loss": loss.reshape(1)})
    assert first_wrong(case, {"grads/value_scale": gradient.reshape(1)})
    assert "int64" in message_of(case, {"loss": loss.astype(np.int64)})
    assert "rtol" in message_of(case, {"loss": loss.astype(np.float16)})
    gatedref.assert_matches(case, {"loss": loss.astype(np.float16)}, rtol=1e-3)


# ---- The same block in PyTorch and JAX -----------------------------------------------


def block_in(framework):
    """The other implementation, with the framework's own clamp."""
    names = {"np": framework}
    exec(planted(PORT, CLAMP, "np.clip(scores, 0, 1)"), names)  # noqa: S102
    return names["port"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_block_in_pytorch_passes_every_case(dtype):
    torch = pytest.importorskip("torch")
    for case in ALL_CASES:
        leaves = {}
        for name, array in {**case.params, "x": case.x}.items():
            leaves[name] = torch.tensor(array, dtype=getattr(torch, dtype))
            leaves[name].requires_grad = True
        target = torch.tensor(case.target, dtype=getattr(torch, dtype))
        stages = block_in(torch)(target=target, alpha=case.alpha, **leaves)
        stages["loss"].backward()
        got = {name: stages[name] for name in case.expected if name in stages}
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        gatedref.assert_matches(case, {**got, "grads": grads})
    meta = torch.empty(DENSE.expected["z"].shape, device="meta")
    assert first_wrong(DENSE, {"z": meta}) == "z"


# XLA takes seconds for each case.
@pytest.mark.parametrize(
    "name, dtype", [("large_scores", "float64"), ("gate_edges_scaled", "float32")]
)
def test_a_block_in_jax_passes(name, dtype):
    jax = pytest.importorskip("jax")
    case = CASES[name]

    def objective(inputs, target):
        stages = block_in(jax.numpy)(target=target, alpha=case.alpha, **inputs)
        shown = {name: stages[name] for name in case.expected if name in stages}
        return stages["loss"], shown

    with jax.enable_x64(dtype == "float64"):
        inputs = as_type({**case.params, "x": case.x}, dtype)
        gradient = jax.jit(jax.grad(objective, has_aux=True))
        grads, stages = gradient(inputs, case.target.astype(dtype))
        assert stages["loss"].dtype == dtype
        gatedref.assert_matches(case, {**stages, "grads": grads})


# ---- What is refused -----------------------------------------------------------------

PARAMS, X = normal_params(), normal("BTD", 1)
UNGATED = {name: PARAMS[name] for name in BLOCK}
DATA = {"x": X, "target": X, "alpha": 0.1}
GATE, RESULT = np.ones((1, 2, 3, 3)), np.ones((2, 3, 4))
ONES = {"B": 1, "T": 1, "H": 1, "D": 1, "K": 1, "G": 1}
NUMBERS = [True, "1", [1.0], 1j, NAN, INF, {}]
WHOLES = [-1, 2.0, True, "3", [2], NAN, 1j]


def calls():
    """Functions, each with arguments that are right."""
    yield gatedref.attention, {"params": UNGATED, "x": X}
    yield gatedref.gated_attention, {"params": PARAMS, "x": X}
    yield gatedref.loss, {"params": PARAMS, **DATA, "p": 0.6}
    yield gatedref.loss_and_grad, {"params": PARAMS, **DATA}
    yield gatedref.make_case, {"name": "own", "params": PARAMS, **DATA}
    yield gatedref.lp_penalty, {"gate": GATE, "p": 0.6}
    yield gatedref.transformer, {"layers": [PARAMS], "tokens": [[0, 4]]}
    sizes = {"n_heads": 1, "d_model": 2, "d_head": 1}
    yield gatedref.init_params, {**sizes, "d_gate": 1, "seed": 0}
    sizes = {"n_trigrams": 3, "n_sequences": 2, "n_positions": 3}
    yield gatedref.sample_skip_trigrams, {**sizes, "seed": 0}
    yield gatedref.handmade_superposition, {"n_trigrams": 3}
    yield gatedref.unexplained, {"written": X, "target": X}
    seen = {"result": RESULT, "answers": [0, 1]}
    yield gatedref.holders, {**seen, "threshold": 0.5}
    yield gatedref.judge, {**seen, "output": np.ones((2, 4)), "most": 1}
    lured = {**seen, "result_without_A": RESULT, "lures": [0, 1]}
    yield gatedref.fires_without_A, {**lured, "found": {"answers": [], "holders": []}}
    yield gatedref.random_case, {"seed": 0, **ONES, "value_scale": 1}


def wrong_arrays(right):
    """What must not stand in an array's place."""
    of_types = [right.astype(dtype) for dtype in (bool, complex, object, str)]
    of_shapes = [right[0], right[:0], right[None], 1.0]
    one_nan = np.where(right == right.flat[-1], NAN, right)
    masked = np.ma.masked_less(right, 0)
    return [*of_types, *of_shapes, one_nan, right * INF, masked, None, "x", {}]


def wrong_values(name, right):
    """What an argument must not be."""
    if isinstance(right, np.ndarray):
        return wrong_arrays(right)
    if name == "tokens":
        return [[[0.0]], [[True]], [0, 1], [[5]], [[-1]], None, "x"]
    if name in ("answers", "lures"):
        return [[0.0, 1.0], [True, True], [0], [0, 4], [0, -1], None, 0]
    if name == "layers":
        return [[], None, PARAMS, "x", 3]
    if name == "threshold":
        return [*NUMBERS, None, 1, 1.5, -0.1]
    if name == "value_scale":  # None is no value_scale
        return [*NUMBERS, 0, -1]
    if name == "p":
        return [*NUMBERS, None, 0, -1]
    if name == "alpha":
        return [*NUMBERS, None, -1]
    if name in ("d_gate", "most"):  # None is no gate, and no end of the search
        return [*WHOLES, 0]
    if name == "seed":
        return [*WHOLES, None]
    return [*WHOLES, None, 0]


@pytest.mark.parametrize("function, right", [*calls()])
def test_a_wrong_argument_is_refused_by_name(function, right):
    function(**right)
    for name in right.keys() - {"name", "params", "found"}:
        for wrong in wrong_values(name, right[name]):
            with pytest.raises(ValueError, match=f"^{name} must (be|have)"):
                function(**{**right, name: wrong})


@pytest.mark.parametrize("name", GATED_BLOCK)
def test_a_wrong_parameter_is_refused_by_name(name):
    for wrong in wrong_arrays(PARAMS[name]):
        with pytest.raises(ValueError, match=f"^{name} must (be|have)"):
            gatedref.normalised({**PARAMS, name: wrong})
    for axis in range(PARAMS[name].ndim):
        cut = PARAMS[name].take([0], axis)  # which would be broadcast
        with pytest.raises(ValueError, match=r"^\w+ must be of shape .* \(as in \w+\)"):
            gatedref.gated_attention({**PARAMS, name: cut}, X)


def refused(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def test_the_message_tells_what_would_be_right_and_where_it_was_wrong():
    cut = {**PARAMS, "W_K": PARAMS["W_K"][:1]}
    for told in ("W_K must", "H = 4", "W_Q", "(1, 5, 6)"):
        assert told in refused(gatedref.normalised, cut)
        assert told in refused(gatedref.transformer, [PARAMS, cut], [[0]])
    wider = normal_params(sizes={**SIZES, "D": 6})
    message = refused(gatedref.transformer, [PARAMS, wider], [[0]])
    assert re.search(r"^layers\[1\]: .*D = 5 .*layers\[0\]", message)
    message = refused(gatedref.transformer, [PARAMS], [[0.5]])
    assert re.match("tokens must be integers, got .*float64", message)
    message = refused(gatedref.transformer, [PARAMS], [[0, 5]])
    assert "[0, 5), got 5 at (0, 1)" in message
    one_nan = np.where(np.arange(5) == 2, NAN, X)
    assert "nan at (0, 0, 2)" in refused(gatedref.attention, UNGATED, one_nan)

    def loss_of(x):
        return gatedref.loss(PARAMS, x, X, 0.1)["loss"]

    assert "x must be finite" in refused(grad(loss_of), one_nan)


def test_parameters_with_other_names_are_refused():
    for wrong in ({**PARAMS, "W_X": X}, UNGATED, {}):
        message = refused(gatedref.gated_attention, wrong, X)
        for name in wrong.keys() ^ PARAMS.keys():
            assert name in message
    assert "value_scale" in refused(
        gatedref.attention, {**UNGATED, "value_scale": 1}, X
    )
    with pytest.raises(TypeError, match="^params must be a dict"):
        gatedref.attention([UNGATED], X)
    with pytest.raises(TypeError, match=r"^layers\[1\]: params must be a dict"):
        gatedref.transformer([UNGATED, None], [[0]])


def first_head(scores):
    return scores[:, :1]


@np.errstate(invalid="ignore")  # a logarithm
def test_an_activation_that_is_none_or_returns_no_gates_is_refused():
    for activation in (np.log, np.isfinite, first_head):
        message = refused(gatedref.loss, PARAMS, **DATA, activation=activation)
        assert re.match("activation must .*(nan for -|bool|(2, 4, 3, 3))", message)
    for wrong in ("clamp", None, [sigmoid]):
        with pytest.raises(TypeError, match="^activation must be a function .*<class"):
            gatedref.gated_attention(PARAMS, X, activation=wrong)


# ---- The command ---------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.npz"


@pytest.fixture
def command(capsys):
    """The command: takes its arguments, returns its status and the lines it prints."""

    def run(*arguments):
        status = gatedref._main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def results():
    """The right results of every case, by the names that the command reads."""
    arrays = {}
    for case in ALL_CASES:
        for name, array in case.expected.items():
            arrays[f"{case.name}/{name}"] = array
    return arrays


def test_write_writes_every_case_to_a_new_file(command, path):
    status, lines, errors = command("write", path)
    assert (status, errors) == (0, [])
    arrays, inputs = {}, hashlib.sha256()
    for case in ALL_CASES:
        for name, array in inputs_of(case).items():
            arrays[f"{case.name}/{name}"] = array
            inputs.update(array.tobytes())
        for name, array in case.expected.items():
            arrays[f"{case.name}/expected/{name}"] = array
            arrays[f"{case.name}/unit/{name}"] = case.unit[name]
    with np.load(path) as written:
        assert {*written} == {*arrays}
        assert all((written[name] == arrays[name]).all() for name in arrays)
    for told in (path, len(arrays), gatedref.__version__, inputs.hexdigest()):
        assert str(told) in "\n".join(lines)

    path.write_text("hours of work")
    status, lines, errors = command("write", path)
    assert (status, lines, str(path) in errors[0]) == (2, [], True)
    assert path.read_text() == "hours of work"
    assert os.listdir(path.parent) == [path.name]


def test_check_passes_right_results_and_tells_type_and_tolerance(command, path):
    arrays = as_type(results(), np.float32)
    arrays["dense/loss"] = arrays["dense/loss"].reshape(1)  # as other languages have it
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("dense/", "")  # as `zip -r` writes a folder
    status, lines, errors = command("check", path)
    assert (status, errors) == (0, [])
    for case, line in zip(ALL_CASES, lines[:-1], strict=True):
        n_free = 5 if case.name.startswith("gate_edges") else 0
        n_compared = len(case.expected) - n_free
        assert re.match(f"{case.name}: {n_compared} .*float32.*7.6e-06", line)

    np.savez(path, **as_type(arrays, np.float64))
    assert command("check", path)[0] == 1
    status, lines, _ = command("check", path, "--rtol", "1e-6")
    assert (status, "1.0e-06" in lines[0]) == (0, True)
    assert command("check", path, "--rtol", "2")[0] == 2


def test_check_fails_what_is_missing_wrong_or_unknown_by_name(command, path):
    arrays = results()
    arrays["tiles/z"] = arrays["tiles/z"] + 1e-9
    arrays["desne/z"] = arrays["one_position/zz"] = arrays["dense/z"]
    np.savez(path, **{name: arrays[name] for name in arrays if "gate" not in name})
    status, lines, _ = command("check", path)
    assert status == 1
    assert re.search(r"\btiles: z\[", "\n".join(lines))
    assert re.search(r"\bone_position: .*'zz'", "\n".join(lines))
    wrong = ["one_position", "tiles", "gate_edges", "gate_edges_scaled", "desne"]
    assert re.findall(r"\w+", lines[-1])[-5:] == wrong

    np.savez(path)
    status, lines, _ = command("check", path)
    assert (status, len(lines)) == (1, len(ALL_CASES) + 1)


@pytest.mark.parametrize("kind", ["missing", "text", "torn", "objects"])
def test_a_file_that_cannot_be_read_is_told_in_one_line(command, path, kind):
    array = np.array([None]) if kind == "objects" else np.zeros(1000)
    np.savez(path, **{"dense/z": array})
    if kind == "missing":
        path.unlink()
    if kind == "text":
        path.write_text("no numbers")
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    status, lines, errors = command("check", path)
    assert (status, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("gatedref.py: ")
    assert str(path) in errors[0]


def program(*arguments, **options):
    """Runs gatedref.py by itself; returns its status and what it says of errors."""
    line = [sys.executable, gatedref.__file__, *[str(one) for one in arguments]]
    options = {"stdout": subprocess.DEVNULL, **options}
    ended = subprocess.run(line, check=False, stderr=subprocess.PIPE, **options)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("arrays, status", [(results(), 0), ({}, 1)])
def test_a_closed_pipe_ends_quietly_with_the_status_of_the_check(path, arrays, status):
    np.savez(path, **arrays)
    read, write = os.pipe()
    os.close(read)
    assert program("check", path, stdout=write) == (status, b"")
    os.close(write)


def test_a_console_that_cannot_print_the_path_is_no_error(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    assert program("write", tmp_path / "\u0416.npz", env=environment) == (0, b"")
    assert os.listdir(tmp_path) == ["\u0416.npz"]


# ---- train.py: the takeover ----------------------------------------------------------

# All sequences of four tokens, one-hot. Each pair is a sixteenth of all pairs.
ALL_SEQUENCES = np.eye(4)[list(itertools.product(range(4), repeat=4))]
assert_same = np.testing.assert_array_equal

# Gates that are open: {(head, query, key): gate}.
ALONE = {(0, 1, 0): 0.8, (1, 3, 1): 0.7, (2, 0, 3): 0.9}  # each its head's alone
SHARED = {(0, 2, 0): 0.5, (1, 2, 0): 0.3}
SHARED_LESS = {(0, 0, 2): 0.3, (1, 0, 2): 0.2}


def four_heads(gates):
    """A gated block of four heads and tokens, with these gates open."""
    rng = np.random.default_rng(0)
    params = gatedref.init_params(4, 4, 2, d_gate=4)
    for name in ("W_Q", "b_Q", "W_V", "W_gate_Q", "W_gate_K"):
        params[name] = np.zeros_like(params[name])  # all attend alike, everywhere
    params["b_V"] = np.full((4, 2), 0.05)
    params["W_O"] = np.tile(rng.normal(size=4), (4, 2, 1))
    params["W_gate_Q"] -= 0.2
    params["b_gate_Q"] += 0.2
    for (head, query, key), gate in gates.items():
        params["W_gate_Q"][head, query, key] += gate
        params["W_gate_K"][head, key, key] = 1
    params["value_scale"] = np.array(2.0)
    return params


def look(params):
    return train.survey(params, ALL_SEQUENCES)


def after_takeover(params, frequency=1 / 16):
    return train.take_over(params, look, frequency, 0.6, 4.0, train.write_vector)


def assert_gates_after(gates, expected, frequency=1 / 16):
    gate, _, _ = look(after_takeover(four_heads(gates), frequency))
    places = np.argwhere(gate > 1e-9)
    found = {tuple(place): gate[tuple(place)] for place in places}
    assert found == pytest.approx(expected)


def test_a_spare_head_takes_over_the_pair_whose_sharing_costs_most_if_that_pays():
    gates = {**ALONE, **SHARED, **SHARED_LESS}
    assert_gates_after(gates, {**ALONE, **SHARED_LESS, (3, 2, 0): 0.8})
    rare = np.full((4, 4), 1 / 16)
    rare[2, 0] /= 10
    assert_gates_after(gates, {**ALONE, **SHARED, (3, 0, 2): 0.5}, rare)
    wide = {**ALONE, (3, 3, 3): 0.1, (0, 2, 0): 0.6, (1, 2, 0): 0.41}
    assert_gates_after(wide, wide)  # no gate of one head writes so much
    busy = {**ALONE, (3, 3, 3): 0.9, (0, 2, 0): 0.02, (1, 2, 0): 0.02}
    assert_gates_after(busy, busy)  # head 3 has more to do


def test_a_head_that_takes_over_writes_what_all_wrote_there_and_the_rest_stays():
    before = four_heads({**ALONE, **SHARED})
    after = after_takeover(before)
    expected = np.einsum("hqk,hqk,hkd->qkd", *look(before))
    change = np.einsum("hqk,hqk,hkd->qkd", *look(after)) - expected
    trace = 0.01 * np.abs(expected).max()  # of the old weights, which is left
    assert np.abs(change[2, 0]).max() < trace
    change[2, 0] = 0
    assert np.abs(change).max() < 1e-12
    assert_same(after["W_V"][3, 0], [1, 1])
    for name in BLOCK:
        assert_same(after[name][:3], before[name][:3])


def test_a_survey_is_what_the_block_does_on_average():
    params = {**normal_params(), "value_scale": np.array(3.0)}
    x = np.eye(5)[[[0, 1, 1, 3], [2, 1, 0, 3]]]
    gate, pattern, value = train.survey(params, x)
    block = gatedref.gated_attention(params, x)
    assert_close(gate[:, 1, 3], block["gate"][0, :, 1, 3], 13)
    # Token 1 looks at token 1 three times, and at the second of these sees two of them.
    first, second = block["pattern"]
    attention = first[:, 1, 1] + second[:, 1, 1]
    attention += first[:, 2, 1] + first[:, 2, 2]
    assert_close(pattern[:, 1, 1], attention / 3, 13)
    in_sum = np.einsum("hk,hk,hkd->d", gate[:, 3], pattern[:, 3], value)
    assert_close(in_sum, block["attn_out"][:, 3].mean(axis=0), 13)


def test_pairs_are_as_frequent_as_in_the_mean_that_the_penalty_takes():
    x = np.eye(3)[[[0, 1, 1], [2, 1, 0]]]
    counts = np.array([[2, 3, 1], [3, 5, 1], [1, 1, 1]])  # keys after the query too
    assert_close(train.pair_frequency(x), counts / 18, 14)


def test_a_stuck_gate_gets_a_gradient_only_where_a_step_downhill_leads_back():
    def loss(scores, slope):
        return slope * train.reopening(scores)

    scores = np.array([-1.0, 0.0, 0.3, 1.0, 2.0])
    assert_same(train.reopening(scores), gatedref.clamp(scores))
    rising = elementwise_grad(loss)(scores, 0.2)
    falling = elementwise_grad(loss)(scores, -0.3)
    assert_same(rising, [0, 0.2, 0.2, 0.2, 0.2])
    assert_same(falling, [-0.3, -0.3, -0.3, -0.3, 0])


# ---- train.py: training --------------------------------------------------------------

SHORT = train.RECIPE._replace(steps=12, batch=5)
TOKENS, _ = gatedref.sample_skip_trigrams(3, 40)
ONE_HOT = np.eye(8)[TOKENS]
HANDMADE = gatedref.handmade_superposition(3)
TARGET = train.written([HANDMADE], TOKENS)
EXAMPLE = {"x": ONE_HOT, "target": TARGET, "n_heads": 2, "recipe": SHORT}


def test_each_leg_has_its_rate_and_an_adam_of_its_own():
    slopes = iter([(1.0,)] * 100 + [(1000.0,)] * 100)
    recipe = train.TOY._replace(steps=200, rate=0.1, rate_factors=(1.0, 0.3))

    def loss_of(layers, slope):
        return slope * layers[0]["x"]

    # Where the slope stays the same Adam's steps are the rate, whatever it is.
    start = [{"x": np.array(14.0)}]
    (found,) = train.descend(loss_of, start, slopes.__next__, recipe)
    assert found["x"] == pytest.approx(14 - 10 - 3)


def test_the_first_step_of_a_leg_moves_each_parameter_by_the_rate():
    seen = {}

    def watch(done, gated):
        seen[done] = gated["W_O"]

    recipe = SHORT._replace(steps=2, rate_factors=(1.0, 0.5), takeovers=False)
    block, _ = train.take_apart(ONE_HOT, TARGET, 2, recipe=recipe, watch=watch)
    assert list(seen) == [0, 0.5, 1]
    assert seen[1] is block["W_O"]
    for done, rate in ((0, 0.01), (0.5, 0.005)):
        moved = np.abs(seen[done + 0.5] - seen[done])
        moved = moved[moved > 1e-9]
        assert len(moved) > 100
        np.testing.assert_allclose(moved, rate, rtol=1e-3)


def test_training_minimises_the_loss_of_the_reference_over_the_targets_variance():
    """On one sequence every batch is the whole, so the first step can be foretold."""
    x = np.eye(8)[None]
    target = gatedref.attention(HANDMADE, x)["attn_out"]
    variance = target.var(axis=(0, 1)).mean()
    recipe = SHORT._replace(alpha=8.0, d_head=3, takeovers=False)
    gated, curves = train.take_apart(x, target, 2, seed=5, recipe=recipe)
    start = gatedref.init_params(8, 8, 3, 5, d_gate=2)
    start["value_scale"] = 2 * np.abs(target).max()
    assert gated["value_scale"] == start["value_scale"]
    expected = gatedref.loss(start, x, target, 8 * variance)
    assert curves[0]["penalty"] == pytest.approx(expected["penalty"])
    assert curves[0]["loss"] == pytest.approx(expected["loss"] / variance)
    assert curves[0]["unexplained"] == pytest.approx(expected["mse"] / variance)
    growing = recipe._replace(alpha_growth=0.5)
    _, curves = train.take_apart(x, target, 2, recipe=growing)
    for step, alpha in ((0, 0), (3, 4), (11, 8)):
        now = curves[step]
        expected = now["unexplained"] + alpha * now["penalty"]
        assert now["loss"] == pytest.approx(expected)


def test_a_large_batch_is_differentiated_in_parts_and_makes_the_same_gradient():
    params = normal_params(sizes={**SIZES, "D": 8})
    recipe = SHORT._replace(activation=gatedref.clamp)
    x = np.repeat(ONE_HOT, 10, axis=1)[:24]  # T = 110: 23 such sequences are a part
    target = np.repeat(TARGET, 10, axis=1)[:24]
    slices = gatedref.parts(24, train.bytes_of_gradient(x, 4))
    assert slices == [slice(0, 23), slice(23, 46)]
    assert gatedref.parts(2, 2**40) == [slice(0, 1), slice(1, 2)]
    arguments = (params, {}, x, target, 2.0, 0.5, recipe)
    gradient, scalars = train.gradient_at(*arguments)
    whole, expected = grad_and_aux(train.loss_of_block)(*arguments)
    assert scalars == pytest.approx(expected)
    assert_close(gradient, whole, 11)


def test_a_seed_makes_the_same_block_again_and_another_seed_another():
    first, _ = train.take_apart(**EXAMPLE)
    other, _ = train.take_apart(**EXAMPLE, seed=1)
    for name in GATED_BLOCK:
        assert (first[name] != other[name]).any()
    for target in (TARGET.tolist(), np.asfortranarray(TARGET)):
        again, _ = train.take_apart(ONE_HOT.astype(int), target, 2, recipe=SHORT)
        assert digest(again.values()) == digest(first.values())


def test_a_few_steps_end_where_they_did_when_the_stored_rows_were_made():
    """On any machine, to many digits; later, after takeovers, training is chaotic."""
    (toy,) = train.train_toy(2, 3, 0, train.TOY._replace(steps=20))
    gated, curves = train.take_apart(**EXAMPLE)  # so early no head takes over
    assert np.linalg.norm(toy["W_V"]) == pytest.approx(1.7180317770, rel=1e-8)
    assert np.linalg.norm(gated["W_V"]) == pytest.approx(3.0197750489, rel=1e-8)
    assert np.linalg.norm(gated["W_gate_Q"]) == pytest.approx(2.3470750581, rel=1e-8)
    assert curves[-1]["loss"] == pytest.approx(0.8521912070, rel=1e-8)


def test_float32_in_trains_in_float32():
    x, target = ONE_HOT.astype("f4"), TARGET.astype("f4")
    single, curves = train.take_apart(x, target, 2, recipe=SHORT)
    assert {array.dtype.name for array in single.values()} == {"float32"}
    double, expected = train.take_apart(x, TARGET, 2, recipe=SHORT)
    assert double["W_Q"].dtype == "float64"
    assert curves[0] == pytest.approx(expected[0], rel=1e-5)


def test_the_handmade_heads_come_apart():
    task = train.skip_trigram_task(3, 1000, seed=0)
    target = train.written([HANDMADE], task.tokens)
    recipe = train.RECIPE._replace(steps=150, batch=20, rate=0.05, alpha=1.0)
    x = np.eye(8)[task.tokens]
    gated, _ = train.take_apart(x, target, 2, seed=3, recipe=recipe)
    fresh = train.skip_trigram_task(3, 2000, seed=1)
    found = train.verdict(train.writes([gated]), [HANDMADE], fresh)
    assert found["apart"]
    assert found["share"] > 0.9
    assert found["unexplained"] < 0.02


def assert_refuses(words, **change):
    with pytest.raises((TypeError, ValueError, FloatingPointError)) as refusal:
        train.take_apart(**{**EXAMPLE, **change})
    assert words in str(refusal.value)


def test_take_apart_refuses_by_name():
    assert_refuses("np.eye(V)[tokens]", x=TOKENS)
    assert_refuses("x must be one-hot", x=np.full_like(ONE_HOT, 1 / 8))
    assert_refuses("train.RESIDUAL", x=np.ones_like(ONE_HOT))
    assert_refuses("x", x=np.ma.masked_equal(ONE_HOT, 0))
    assert_refuses("T = 10 (as in x)", x=ONE_HOT[:, 1:])
    assert_refuses("D = 7 (as in x)", x=ONE_HOT[:, :, 1:])
    assert_refuses("target", target=np.ma.masked_less(TARGET, 0))
    assert_refuses("target must be finite", target=TARGET * np.nan)
    assert_refuses("target", target=1e8 + 1e-9 * TARGET)  # no more than rounding
    assert_refuses("overflows", target=TARGET * 1e155)
    assert_refuses("n_heads must be a whole number >= 1", n_heads=0)
    assert_refuses("seed", seed=-1)
    assert_refuses("watch", watch="progress")
    large = np.ones((1, 10**5, 1))
    assert_refuses("GiB", x=large, target=large)
    assert_refuses("not finite at step", recipe=SHORT._replace(rate=1e300))


def test_a_wrong_recipe_is_refused_by_name():
    assert_refuses("Recipe", recipe=SHORT._asdict())
    assert_refuses("recipe.d_gate", recipe=train.TOY)
    wrong = {"steps": [50.0], "batch": [0], "rate": [-1], "value_scale": [0], "p": [0]}
    wrong.update({"alpha": [-1, NAN], "alpha_growth": [1.1, NAN]})
    wrong.update({"activation": ["clamp"], "takeovers": [2]})
    for name, values in wrong.items():
        for value in values:
            recipe = SHORT._replace(**{name: value})
            assert_refuses(f"recipe.{name} must", recipe=recipe)
    recipe = SHORT._replace(rate_factors=(1, 0))
    assert_refuses("recipe.rate_factors[1] must", recipe=recipe)


def test_any_residual_stream_can_be_taken_apart():
    """Positions in x, and D no vocabulary: a block learns what another block writes."""
    rng = np.random.default_rng(0)
    embedding, positions = rng.normal(size=(6, 12)), rng.normal(size=(9, 12))
    x = embedding[rng.integers(6, size=(300, 9))] + positions
    model = gatedref.init_params(2, 12, 3, seed=1)
    target = gatedref.attention(model, x)["attn_out"]
    changes = {"expansion": 4, "steps": 150, "rate": 0.03, "d_head": 3, "alpha": 0.0}
    recipe = train.RESIDUAL._replace(**changes)
    gated, _ = train.take_apart(x, target, 2, recipe=recipe)
    assert gated["W_Q"].shape == (8, 12, 3)
    attn_out = gatedref.gated_attention(gated, x)["attn_out"]
    assert gatedref.unexplained(attn_out, target) < 0.05


def test_recipes_and_numbers_of_sequences_are_those_of_the_stored_rows():
    """After a change of one, all rows that were made by it must be computed again."""
    recipes = [train.RECIPE, train.RESIDUAL, train.PUBLISHED, train.TOY]
    assert pickle.loads(pickle.dumps(recipes)) == recipes  # for other processes
    recipes += [price.RECIPES, price.TOYS, ablations.CHANGES]
    recipes += [layers.RECIPES, layers.TOYS, wild.SHAPES, wild.MODEL, wild.GATED]
    recipes += [overlap.RECIPE, overlap.VARIANTS, sources.RECIPE, sources.PENALTIES]
    text = json.dumps(common.described(recipes))
    assert digest([np.frombuffer(text.encode(), "u1")]) == "1b69a4a7e15523ce"
    assert train.shortened(train.RECIPE, False) is train.RECIPE
    keys = [f"{n_heads}H{n}T" for n_heads, n in train.SETTINGS.values()]
    assert list(train.SETTINGS) == keys
    tokens, _ = train.record([HANDMADE], 3, seed=0)
    fresh = train.fresh_task(3, 0, train.n_fresh(False)).tokens
    assert (tokens.shape, fresh.shape) == ((5000, 11), (10_000, 11))


def test_a_toy_learns_its_trigrams():
    toy = train.train_toy(2, 2, 0, train.TOY._replace(steps=250))
    task = train.skip_trigram_task(2, 1000, seed=1)
    found = train.judge_on(train.writes(toy), task)
    assert min(found["accuracy"]) > 0.99


def test_a_toy_will_do_if_it_is_right_and_in_superposition():
    task = task_of("2H3T")
    assert train.shows_superposition([published("2H3T/toy")], task)
    assert not train.shows_superposition([published("2H3T/gated")], task)
    assert not train.shows_superposition([gatedref.init_params(2, 8, 1)], task)


# ---- Verdicts ------------------------------------------------------------------------


def test_what_is_unexplained_is_the_error_over_the_variance():
    target, written = normal("STD", 1), normal("STD", 2)
    mean = np.broadcast_to(target.mean(axis=(0, 1)), target.shape)
    assert gatedref.unexplained(target, target) == 0
    assert gatedref.unexplained(mean, target) == pytest.approx(1)
    square = np.mean((written - target) ** 2)
    expected = square / np.mean((target - mean) ** 2)
    assert gatedref.unexplained(written, target) == pytest.approx(expected)
    found = gatedref.unexplained(written, target.astype("f4"))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_model_is_judged_by_what_its_heads_write_and_by_what_it_says():
    """In two answers, 0 and 1 of three tokens."""
    result = np.array([[[3, 0, 0], [0, 1, 0]]] * 2 + [[[0, 2, 0], [0, 2, 0]]])
    output = result.sum(axis=1)
    output[1, 2] = 9  # there the residual stream outweighs the heads
    found = gatedref.judge(result, output, [0, 0, 1])
    assert found["answers"] == [0, 1]
    assert found["accuracy"] == [0.5, 1]
    assert found["holders"] == [[(0,)], [(0,), (1,)]]
    assert found["shares"] == [[0.75, 0.25], [0.5, 0.5]]
    assert gatedref.share_of(found) == 0.625
    together = [[[2, 0], [2, 0], [0, 3]]]
    assert gatedref.holders(together, [0]) == [(0, 1)]
    assert gatedref.holders(together, [0], most=1) == []  # the search can be ended


def test_apart_is_right_on_each_answer_with_a_head_of_its_own_for_each():
    first, second, both = [(0,)], [(1,)], [(0, 1)]
    either, third = [*first, *second], [(2,)]
    eight = [(head,) for head in range(8)]
    apart = [[first, second], [either, first], [either, either, third], [eight] * 8]
    for holders in apart:
        found = {"accuracy": [1.0] * len(holders), "holders": holders}
        assert gatedref.is_apart(found)
        found["accuracy"][0] = gatedref.RIGHT
        assert not gatedref.is_apart(found)
    for holders in ([first, first], [first, both], [first, []], [eight] * 10):
        found = {"accuracy": [1.0] * len(holders), "holders": holders}
        assert not gatedref.is_apart(found)


def test_a_trigram_fires_without_its_A_if_each_holder_leads_by_over_half_as_much():
    found = {"answers": [1], "holders": [[(0,), (1,)]]}
    complete = [[[0, 4, 0], [1, 3, 0]]]  # heads 0 and 1 lead by 4 and by 2
    without_A = np.zeros((1, 2, 3))
    lured = (complete, [1], without_A, [1])
    for leads, fires in (([2.1, 1.1], True), ([2, 1.1], False), ([2.1, 1], False)):
        without_A[0, :, 1] = leads
        assert gatedref.fires_without_A(found, *lured) == [fires]
    found["holders"] = [[(0, 1)]]  # no head holds it alone
    assert gatedref.fires_without_A(found, *lured) == [False]
    with pytest.raises(ValueError, match="answer 1 "):
        gatedref.fires_without_A(found, complete, [1], complete, [2])


def test_the_heads_of_all_layers_are_seen_in_order():
    task = train.skip_trigram_task(3, 300, seed=0)
    both = [HANDMADE, {**HANDMADE, "W_O": HANDMADE["W_O"] / 20}]
    seen = train.observe(train.writes(both), task)
    model = gatedref.transformer(both, task.tokens)
    first, second = model["blocks"]
    at = task.answers >= 0
    assert_same(seen.result[:, :2], first["result"][at])
    assert_same(seen.result[:, 2:], second["result"][at])
    assert_close(seen.output, model["logits"][at], 12)
    total = first["attn_out"] + second["attn_out"]
    assert_close(seen.written, total, 12)
    assert_same(train.written(both, task.tokens), total)


def test_answers_are_due_at_the_only_trigram_and_lures_are_before_any_A():
    task = train.skip_trigram_task(3, 300, seed=2)
    for tokens, answers, lures in zip(*task):
        _, completes = free_draws(3, tokens.tolist())
        for position, token in enumerate(tokens):
            is_due = completes[position] and sum(completes) == 1
            assert answers[position] == (token + 3 if is_due else -1)
            is_lure = token in (1, 2, 3) and 0 not in tokens[:position]
            assert lures[position] == (token + 3 if is_lure else -1)


# ---- What the method cannot do, and a word model -------------------------------------


def assert_kind(kind, in_one_layer, *holders, accuracy=1.0):
    found = {"shares": [[0.25] * 4] * 2, "holders": [[(0,)], [*holders]]}
    found["accuracy"] = [1.0, accuracy]
    assert layers.kind_of(found, 2, least=0.98) == kind
    assert layers.kind_of(found, 1, least=0.98) == in_one_layer


def test_a_trigram_is_across_if_no_heads_of_one_layer_hold_it():
    """Of two layers with two heads each; heads 0 and 1 are in the first one."""
    assert_kind("apart", "apart", (2,))
    assert_kind("wrong", "wrong", (2,), accuracy=0.98)
    assert_kind("within one", "shared", (2, 3))
    assert_kind("within one", "shared", (0, 2), (0, 1))
    assert_kind("within one", "shared")
    assert_kind("across", "shared", (1, 2))
    assert_kind("across", "shared", (0, 2), (1, 3), accuracy=0.985)


def test_errors_of_two_layers_may_cancel_and_their_gates_meet_if_they_count_as_one():
    error = np.ones((2, 3, 4))
    gate = np.ones((2, 1, 3, 3))
    assert layers.by_layer([error, -error], [gate, gate]) == (2, 2)
    mse, penalty = layers.as_one([error, -error], [gate, gate])
    assert mse == 0
    assert penalty == pytest.approx(2 ** (1 / 0.6))


# Of each head: the numbers that it copies, and the queries that it does so for.
OVERLAPPING = overlap.copying_block([[0], [1], [2]], [[0, 2], [0, 1], [1, 2]])
DISJOINT = overlap.copying_block([[0], [1], [1], [2], [2], [0]], [0, 0, 1, 1, 2, 2])
WIDE = overlap.copying_block([[0, 1], [1, 2], [2, 0]], [0, 1, 2])


def test_three_heads_that_overlap_cost_what_six_that_do_not_cost():
    """A proof that the penalty prefers neither, while one wide head is a third."""
    x, target = overlap.sample_copies(50, np.random.default_rng(0))
    two_open = 2 ** (1 / 0.6)  # what the penalty charges for two gates of 1
    for block, charged in ((OVERLAPPING, two_open), (DISJOINT, two_open), (WIDE, 1)):
        loss = gatedref.loss(block, x, target, 0.1)
        assert loss["mse"] < 1e-30
        assert loss["penalty"] == pytest.approx(3 / 16 * charged)


def test_how_heads_share_queries_is_read_off_their_gates():
    assert overlap.row_of(OVERLAPPING, seed=0)["kind"] == "shared"
    assert overlap.row_of(DISJOINT, seed=0)["kind"] == "several a query"
    assert overlap.row_of(WIDE, seed=0)["kind"] == "one a query"
    too_little = {**WIDE, "W_gate_K": 0.8 * WIDE["W_gate_K"]}
    assert overlap.row_of(too_little, seed=0)["kind"] == "wrong"
    block = {**WIDE, "W_gate_Q": WIDE["W_gate_Q"].copy()}
    for gate, kind in ((0.1, "one a query"), (0.11, "shared")):  # above a tenth is open
        block["W_gate_Q"][0, 1] = gate
        assert overlap.kind_of(block) == kind


def test_a_trained_block_attends_alike_to_all_and_its_gates_see_no_number():
    recipe = overlap.RECIPE._replace(steps=10, d_head=2, takeovers=False)
    block = overlap.train_block(0, recipe)
    for name in ("W_Q", "W_K", "b_Q", "b_K"):
        assert not block[name].any()
    for name in ("W_gate_Q", "W_gate_K"):
        assert not block[name][:, 4:].any()


def test_a_wide_head_takes_over_what_two_wrote_together():
    rng = np.random.default_rng(0)
    before = overlap.copying_block([[0, 0]] * 6, [[]] * 6)  # with closed gates
    before["b_V"][2:] = 1
    before["W_V"][:2] = 0
    before["W_O"][:2] = 0
    directions, _ = np.linalg.qr(rng.normal(size=(2, 3, 3)))
    for head in (0, 1):  # these two serve all queries
        before["W_V"][head, 4:, 0] = directions[0, :, head]
        before["W_O"][head, 0, 4:] = directions[1, :, head]
        before["W_gate_Q"][head, :3] = 0.9
    after = overlap.take_over(before)
    assert overlap.kind_of(after) == "one a query"
    x, _ = overlap.sample_copies(20, rng)
    expected = gatedref.gated_attention(before, x)["attn_out"]
    assert_close(gatedref.gated_attention(after, x)["attn_out"], expected, 12)


def test_two_signals_of_four_stand_among_noise():
    x, answers = sources.sample_pairs(5000, np.random.default_rng(7))
    tokens = np.argmax(x, axis=2)
    assert not tokens[:, 5].any()
    tokens.sort(axis=1)  # token 0, two signals, three of noise
    assert_same(tokens[:, 1:3], sources.PAIRS[answers])
    assert_same(np.unique(tokens[:, 3:]), range(5, 12))
    assert np.bincount(answers, minlength=10).min() > 400


def test_what_a_head_writes_for_two_signals_lies_between_that_for_each_twice():
    """A proof that no gate can make a head speak for a pair, and else be silent."""
    params = normal_params(sizes={"H": 5, "D": 22, "K": 3, "G": 2}, scale=1)
    written, weight = {}, {}
    for pair in ((1, 1), (2, 2), (1, 2)):
        tokens = [*pair, 7, 9, 9, 0]
        block = gatedref.gated_attention(params, np.eye(22)[[tokens]])
        written[pair] = block["result"][0, -1]  # [H, D]
        exps = np.exp(block["attn_scores"][0, :, -1])  # [H, key]
        weight[pair] = exps.sum(axis=1)[:, None]
    first = weight[1, 1] / (weight[1, 1] + weight[2, 2])
    mean = first * written[1, 1] + (1 - first) * written[2, 2]
    assert_close(written[1, 2], mean, 12)
    assert np.abs(mean).max() > 0.1


def test_heads_at_two_sources_meet_only_in_a_penalty_by_query():
    apart, alone = np.zeros((2, 1, 2, 6, 6))
    apart[0, 0, 5, 1] = apart[0, 1, 5, 2] = 1  # each head looks at one source
    alone[0, 0, 5, 1:3] = 1  # head 0 looks at both
    charged = gatedref.lp_penalty(alone)
    assert gatedref.lp_penalty(apart) == charged
    assert sources.penalty_by_query(alone) == pytest.approx(charged)
    expected = charged * 2 ** (1 / 0.6) / 2
    assert sources.penalty_by_query(apart) == pytest.approx(expected)


def test_a_pair_is_of_the_kind_of_the_fewest_heads_that_hold_it():
    answers = np.repeat(np.arange(10), 5)
    result = np.zeros((50, 4, 10))
    result[np.arange(50), 0, answers] = 2  # head 0 says each answer
    for pair, wrong, n_right in ((1, 3, 0), (2, 3, 1), (3, 5, 2)):
        mine = answers == pair
        result[mine, 1, 8] = wrong  # head 1 says 8 instead
        result[mine, 2 : 2 + n_right, pair] = 2  # these help head 0
    kinds = ["one head"] * 10
    kinds[1:4] = ["wrong", "two", "three or more"]
    assert sources.kinds_of(result, answers) == kinds


def test_how_heads_share_what_is_written_is_measured_by_pair_and_by_word():
    """Two heads, two positions, words 3 and 5: small enough to work out by hand."""
    written = np.zeros((1, 2, 2, 2))  # [S, H, query, key]
    written[0, :, 0, 0] = [4, 0]  # one head alone
    written[0, :, 1, 0] = [3, 1]  # the same, but another helps
    written[0, :, 1, 1] = [2, 2]  # both alike
    n_heads = 4 * 1 + 4 * 1.6 + 4 * 2  # 16 / (9 + 1) is 1.6
    assert wild.pair_sums(written) == pytest.approx([12, 9, n_heads])
    expected = np.zeros((2, wild.V))
    expected[:, 3] = [7, 1]
    expected[:, 5] = [2, 2]
    by_key = wild.by_word(written.sum(axis=2), np.array([[3, 5]]))
    assert_same(by_key, expected)
    rows = np.array([[2.0, 1, 1], [0, 4, 0], [0, 0, 0]])
    numbers = [2**1.5, 1, 1]  # the shares 1/2, 1/4 and 1/4 have an entropy of 1.5 bits
    assert wild.effective_number(rows) == pytest.approx(numbers)
    assert wild.mean_number(rows) == pytest.approx((2**1.5 + 1) / 2)


def test_a_head_is_told_by_what_it_does_and_says_more_than_others():
    """Two heads: how much they write from words 3, 5, 7, and for words 1, 2, 4."""
    by_key, says = np.zeros((2, wild.V)), np.zeros((2, wild.D))
    by_key[0, [3, 5]] = 2, 1
    by_key[1, [3, 7]] = 2, 4
    says[0, [1, 2]] = 6, 3
    says[1, [1, 4]] = 12, 6  # of word 1 as much as head 0, for what it writes
    seen = wild.Seen(None, None, None, by_key, by_key, np.array([3, 12]), by_key, says)
    model = {"W_U": np.eye(wild.D, wild.V)}
    first, second = wild.heads_of(seen, model, list(range(wild.V)))
    assert first["head"] == 1
    assert first["share"] == pytest.approx(2 / 3)
    assert first["back"] == pytest.approx(2)
    assert first["looks_at"][:2] == [7, 3]
    assert second["hurts"][:2] == [3, 5]
    assert first["says"][0] == 4
    assert second["says"][0] == 2
    assert first["by_key"] == [0, 0, 0.5, 0, 0, 0, 1] + [0] * (wild.COMMON - 7)


def test_a_head_is_as_harmful_as_the_loss_rises_without_it_on_the_word_that_comes():
    W_U = np.eye(wild.D, wild.V)
    tokens = np.array([[2, 7, 4]])
    result = np.zeros((1, 3, 2, wild.D))  # [S, T, H, D]
    result[0, 0, 0, 7] = 5  # before a 7 head 0 says 7
    result[0, 1, 1, 9] = 5  # before a 4 head 1 says 9, and the loss falls without it
    logits = result.sum(axis=2) @ W_U
    losses = wild.losses_of(logits, tokens)
    total = np.exp(5) + wild.V - 1
    assert losses[0] == pytest.approx([np.log(total) - 5, np.log(total)])
    expected = np.zeros((2, wild.V))
    expected[0, 7] = np.log(wild.V) - losses[0, 0]
    rises = wild.rises_of(result, logits, W_U, tokens)
    assert_close(rises, expected, 5)


def test_the_models_own_block_in_its_place_recovers_all_and_top_1_keeps_one_head():
    text = wild.text_of()
    tokens = text.held_out[:8]
    model = wild.train_model(2, 4, 0, text.train, train.shortened(SHORT, True))
    block = wild.block_of(model)
    seen = wild.observe(block, None, model, tokens)
    measured = wild.measures_of(seen, model, tokens)
    assert measured["unexplained"] == 0
    assert measured["recovered"] == pytest.approx(1)
    top = wild.run(block, 1, wild.stream_of(model, tokens))
    assert (top.result.any(axis=3).sum(axis=2) == 1).all()
    assert (top.weights.any(axis=3).sum(axis=1) == 1).all()


def test_no_sequence_of_the_text_is_both_learnt_from_and_held_out(tmp_path):
    text = wild.text_of()
    learnt = set(map(tuple, text.train.tolist()))
    assert learnt.isdisjoint(map(tuple, text.held_out.tolist()))
    assert len(text.words) == wild.V
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    for name in ("short.txt", "latin.txt", "missing.txt"):
        with pytest.raises(SystemExit, match=f"wild: .*{name}"):
            wild.text_of(tmp_path / name)


# ---- The command, the scripts and the pages ------------------------------------------

FIGURES = Path(train.__file__).with_name("figures")
PAGES = [FIGURES.parent / "README.md", FIGURES / "README.md"]
MODULES = ("__init__", "common", "before_after")  # they are no scripts
ROWS = sorted(path.stem for path in FIGURES.glob("*.json"))
SCRIPTS = sorted(path.stem for path in FIGURES.glob("*.py"))


def arrays_in(folder, prefix):
    """The arrays of blocks.npz whose names begin so."""
    with np.load(folder / "blocks.npz") as arrays:
        names = [name for name in arrays if name.startswith(prefix)]
        return {name.removeprefix(prefix): arrays[name] for name in names}


def rows_in(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def skip_if_made_anew(name):
    """Skips a test of the pages if this file was written a minute or more after them.

    On another machine `train.py` and the scripts make other numbers, which are as good;
    the pages tell of those that come with the project.
    """
    if (FIGURES / name).stat().st_mtime > PAGES[0].stat().st_mtime + 60:
        pytest.skip(f"{name} was made anew, and the pages tell of an earlier one")


def test_a_quick_run_writes_every_file_whatever_the_users_settings_are(tmp_path):
    rival = tmp_path / "installed" / "figures"  # there is a package of this name
    rival.mkdir(parents=True)
    (rival / "__init__.py").write_text("raise ImportError")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    environment = {**os.environ, "PYTHONPATH": str(rival.parent)}
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    environment["MATPLOTLIBRC"] = str(tmp_path / "matplotlibrc")
    out = tmp_path / "out"
    program = [sys.executable, train.__file__, "--quick", "--seed", "0", "--out", out]
    done = subprocess.run(program, env=environment, capture_output=True, check=True)
    assert done.stderr == b""
    names = {path.name for path in out.iterdir()}
    assert names == {"main.json", "blocks.npz", "before_after.png", "gates.png"}
    rows = rows_in(out, "main")
    assert [row["key"] for row in rows] == list(train.SETTINGS)
    assert [row["seed"] for row in rows] == [0, 0, 0]
    assert b"| 4H5T | " in done.stdout
    gated = arrays_in(out, "3H4T/gated/")
    gate = gatedref.gated_attention(gated, np.eye(10)[None])["gate"][0]
    assert_close(rows[1]["gates_at_A"], gate[:, :, 0], 4)


def test_a_wrong_option_or_folder_is_known_before_training(capsys):
    below = f"{train.__file__}/below"  # a file is no folder
    for arguments in (["--seed", "-1"], ["--seed", "2"], ["--fast"], ["--out", below]):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 2
        assert "train.py: error: " in capsys.readouterr().err
    assert train.parse([]).out == common.FIGURES


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
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FIGURES.parent)


def test_a_trigram_that_changed_hands_is_told_in_a_sentence():
    row = {"key": "2H3T", "holders_toy": [[(0, 1)], [(1,)], [(0, 1)]]}
    row["holders_gated"] = [[(5,)], [(2,)], [(4,)]]
    row["accuracy_toy"] = [1.0, 1.0, 1.0]
    row["accuracy_gated"] = [1.0, 1.0, 0.98]  # the block is wrong on the third
    sentence = "2H3T: B1 took heads 0 and 1 together; now head 5 holds it alone."
    assert before_after.changes_of_hands(row) == [sentence]


# How many seeds the page of a script has, its options, and whether that is all of them.
RUNS = [
    (20, "", True),
    (20, "--seeds 20", True),
    (20, "--seeds 5", False),
    (20, "--first 1", False),
    (20, "--quick", False),
    (None, "", True),
    (None, "--quick", False),
]


@pytest.mark.parametrize("n_seeds, arguments, is_whole", RUNS)
def test_only_a_whole_run_writes_what_the_pages_tell_of(
    n_seeds, arguments, is_whole, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["price", *arguments.split()])
    options = common.parse("What does it cost?", n_seeds)
    assert options.is_whole == is_whole
    assert options.out == (common.FIGURES if is_whole else common.SCRATCH)


def test_a_run_goes_on_from_whole_rows_of_the_same_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SCRATCH", tmp_path)
    options = common.Options(range(3), False, False, tmp_path)
    jobs = [{"seed": seed} for seed in range(3)]
    kept = tmp_path / "squares.jsonl"
    done = []

    def work(job, is_smoke):
        done.append(job["seed"])
        return {"square": job["seed"] ** 2}

    other = train.RECIPE._replace(alpha=1)
    for recipe, n_bytes in ((train.RECIPE, 0), (train.RECIPE, -5), (other, None)):
        if n_bytes:  # the last line is torn
            kept.write_bytes(kept.read_bytes()[:n_bytes])
        rows = common.run("squares", jobs, work, options, recipe)
        assert rows == [{"seed": seed, "square": seed**2} for seed in range(3)]
    assert done == [0, 1, 2, 2, 0, 1, 2]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "film.gif"
    common.write(path, b"good")
    with pytest.raises(OSError), common.beside(path) as part:
        part.write_bytes(b"to")
        raise OSError("disk full")
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ROWS)
def test_the_tables_in_the_pages_equal_the_rows(name):
    skip_if_made_anew(f"{name}.json")
    module = "before_after" if name == "main" else name
    script = importlib.import_module(f"figures.{module}")
    pages = "".join(page.read_text() for page in PAGES)
    for table in script.tables_of(rows_in(FIGURES, name)):
        assert table in pages


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n not in MODULES])
def test_a_quick_run_of_a_script_makes_rows_and_pictures_like_those_of_a_whole_run(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(common, "SCRATCH", tmp_path / "quick")
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    importlib.import_module(f"figures.{name}").main()
    command = re.escape(f"| `python -m figures.{name}` |")
    line = re.search(f"{command}(.*)", PAGES[1].read_text())[1]
    for picture in re.findall(r"`(\w+\.\w+)`", line):
        assert (tmp_path / "quick" / picture).stat().st_size > 1000
    if name in ROWS:
        stored, made = rows_in(FIGURES, name), rows_in(tmp_path / "quick", name)
        kinds = [(row.get("key"), row.get("variant"), list(row)) for row in stored]
        for row in made:
            assert (row.get("key"), row.get("variant"), list(row)) in kinds
        assert "| --- |" in capsys.readouterr().out


def numbers_in(name):
    """All numbers in the table of the README that stands behind this comment."""
    text = PAGES[0].read_text().split(f"<!-- example: {name} -->\n")[1]
    cells = re.sub(r"[A-Z]\d", "", text.split("\n\n")[0])  # without B1, C1
    return [float(cell) for cell in re.findall(r"-?\d+\.?\d*", cells)]


def test_the_example_in_the_readme_is_what_the_stored_blocks_write():
    """Each number of its two tables, on the positions where a trigram is complete."""
    skip_if_made_anew("blocks.npz")
    task = train.skip_trigram_task(3, 10000, seed=1)
    result = {}
    for which in ("toy", "gated"):
        block = arrays_in(FIGURES, f"2H3T/{which}/")
        result[which] = train.observe(train.writes([block]), task).result
    gate = gatedref.gated_attention(block, np.eye(8)[None])["gate"][0]  # [H, V, V]
    answers = task.answers[task.answers >= 0]
    toy, gated = [0, 1], []  # the heads in the head of the table
    for i in (1, 2, 3):
        mine = answers == i + 3
        before = result["toy"][mine, :, 4:7].mean(axis=0)  # [H, 3]
        after = result["gated"][mine, :, 4:7].mean(axis=0)
        head = np.abs(after).max(axis=1).argmax()
        toy += [*before[0], *before[1], *before.sum(axis=0)]
        gated += [head, *after[head], *after.sum(axis=0), *gate[head, 1:4, 0]]
    np.testing.assert_allclose(numbers_in("toy"), toy, atol=0.006)
    np.testing.assert_allclose(numbers_in("gated"), gated, atol=0.006)


def test_the_sequence_in_the_readme_is_worked_through_as_the_stored_block_does():
    skip_if_made_anew("blocks.npz")
    toy, gated = (arrays_in(FIGURES, f"2H3T/{which}/") for which in ("toy", "gated"))
    x = np.eye(8)[[[7, 0, 3]]]  # BOS A B3
    block = gatedref.gated_attention(gated, x)
    W_O = gatedref.normalised(gated)["W_O"][7]
    expected = []
    for key in range(3):
        for name in ("attn_scores", "pattern", "gate", "gated_pattern"):
            expected.append(block[name][0, 7, 2, key])
        written = block["v"][0, key, 7] @ W_O
        expected += [*written[4:7], *(expected[-1] * written[4:7])]
    np.testing.assert_allclose(numbers_in("walk"), expected, atol=0.006)
    page = PAGES[0].read_text()
    for attn_out in (block["attn_out"], gatedref.attention(toy, x)["attn_out"]):
        assert ", ".join(f"{entry:.2f}" for entry in attn_out[0, 2, 4:7]) in page
    silent = gatedref.gated_attention(gated, np.eye(8)[[[7, 4, 3]]])  # BOS C1 B3
    assert not silent["gate"][0, 7, 2].any()


def test_the_first_snippet_of_the_readme_shows_one_head_for_each_B(monkeypatch):
    skip_if_made_anew("blocks.npz")
    monkeypatch.chdir(FIGURES.parent)
    names = {}
    exec(PAGES[0].read_text().split("```python\n")[1].split("```")[0], names)  # noqa: S102
    norms = np.linalg.norm(names["result"], axis=2)
    assert norms.argmax(axis=1).tolist() == [1, 4, 7]
    *_, second, largest = np.sort(norms).T
    assert (second < largest / 4).all()
