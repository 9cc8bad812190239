"""The conformance kit, in statements.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the gatedref authors.
"""

import functools
import math
import subprocess
import sys

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad
from autograd.tracer import getval

import gatedref

CASES = {case.name: case for case in gatedref.cases()}
ENDS = ("attn_out", "mse", "penalty", "loss", "grads")  # all that many ports can show

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
