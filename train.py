import math
import numpy as np
from autograd import value_and_grad, grad
from autograd.misc.optimizers import adam
from autograd.tracer import getval
from autograd.extend import primitive, defvjp_argnums
import gatedref as G


def tabulate(tokens, n_tokens):
    """Rows of counts, grouped by query token and padded"""
    counts = np.cumsum(np.eye(n_tokens, dtype=np.int8)[tokens], axis=1, dtype=np.int8 if tokens.shape[1] < 128 else np.int64)
    n_s, T = tokens.shape
    pairs = np.einsum("sa,sv->av", counts[:, -1].astype(float), counts[:, -1].astype(float)) / (n_s * T * T)
    flat = np.concatenate([tokens.reshape(-1, 1), counts.reshape(-1, n_tokens)], axis=1)
    rows, n = np.unique(flat, axis=0, return_counts=True)
    size = np.bincount(rows[:, 0], minlength=n_tokens).max()
    C = np.repeat(np.eye(n_tokens)[:, None], size, axis=1)
    w = np.zeros((n_tokens, size))
    for a in range(n_tokens):
        mine = rows[:, 0] == a
        C[a, : mine.sum()] = rows[mine, 1:]
        w[a, : mine.sum()] = n[mine] / (n_s * T)
    return {"counts": C, "weight": w, "pairs": pairs}


def fast_attend(block, counts, gate=None):
    """`attention`'s output on rows of counts, for N blocks at once, and its derivative."""
    q, k, v = (block["W_" + n] + block["b_" + n][..., None, :] for n in "QKV")  # [N, H, V, K]
    N, H, V, K = v.shape
    scores = q @ np.swapaxes(k, 2, 3) / K**0.5
    E = np.exp(scores - scores.max(axis=3, keepdims=True))
    U = E if gate is None else E * gate
    Uv = U[..., None] * v[:, :, None]
    by_token = lambda A: np.moveaxis(A, (2, 3), (0, 1)).reshape(V, V, -1)
    inverse = 1 / (counts @ by_token(E)).reshape(V, -1, N, H, 1)
    z = (counts @ by_token(Uv)).reshape(V, -1, N, H, K) * inverse
    Z, W_O = np.swapaxes(z.reshape(-1, N, H * K), 0, 1), block["W_O"].reshape(N, H * K, -1)

    def backward(d_out):
        d_z = np.swapaxes(d_out @ np.swapaxes(W_O, 1, 2), 0, 1).reshape(z.shape)
        d_num = d_z * inverse
        d_den = -(d_num * z).sum(axis=-1)
        C = np.swapaxes(counts, 1, 2)
        by_head = lambda A, *K: np.moveaxis(A.reshape(V, V, N, H, *K), (0, 1), (2, 3))
        d_Uv = by_head(C @ d_num.reshape(V, -1, N * H * K), K)
        d_E = by_head(C @ d_den.reshape(V, -1, N * H))
        d_U = (d_Uv * v[:, :, None]).sum(axis=-1)
        d_v = (d_Uv * U[..., None]).sum(axis=2)
        d_gate = None if gate is None else E * d_U
        d_scores = E * (d_E + (d_U if gate is None else gate * d_U)) / K**0.5
        grads = {"W_Q": d_scores @ k, "W_K": np.swapaxes(d_scores, 2, 3) @ q, "W_V": d_v}
        grads |= {"b" + n[1:]: g.sum(axis=2) for n, g in grads.items()}
        grads["W_O"] = (np.swapaxes(Z, 1, 2) @ d_out).reshape(block["W_O"].shape)
        return grads, d_gate

    return Z @ W_O, backward


def fast_loss(params, rows, target, alpha, activation="clamp", value_scale=None, p=0.6, leak=0):
    gq, gk = (params["W_gate_" + n] + params["b_gate_" + n][..., None, :] for n in "QK")
    s = gq @ np.swapaxes(gk, 2, 3)
    gate = G.ACTIVATIONS[activation](s)  # N,H,a,v
    block = {**params, **G.normalised(params, value_scale)}
    out, backward = fast_attend(block, rows["counts"], gate)
    D = out.shape[-1]
    err = out - target.reshape(-1, D)
    d_out = err * (rows["weight"].reshape(-1, 1) * (2 / D))
    mse = (err * d_out).sum(axis=(1, 2)) / 2
    shut = gate == 0
    gp = (gate + shut) ** p * ~shut
    total = gp.sum(axis=1)
    norm = total ** (1 / p)
    penalty = (rows["pairs"] * norm).sum(axis=(1, 2))
    grads, d_gate = backward(d_out)
    void = total == 0
    d_norm = (norm / (total + void) * rows["pairs"] * alpha)[:, None]
    d_gate += d_norm * gp / (gate + shut)
    ds = d_gate * (slope(activation, s, gate) + leak * ((s < 0) & (d_gate < 0) | (s > 1) & (d_gate > 0)))
    grads["W_gate_Q"] = ds @ gk; grads["W_gate_K"] = np.swapaxes(ds, 2, 3) @ gq
    grads["b_gate_Q"] = grads["W_gate_Q"].sum(axis=2); grads["b_gate_K"] = grads["W_gate_K"].sum(axis=2)
    grads["W_O"] = d_unit(params["W_O"], grads["W_O"], -1)
    if value_scale is None:
        grads["W_V"] = d_unit(params["W_V"], grads["W_V"], -2)
    else:
        j = lambda d: np.concatenate([d["W_V"], d["b_V"][..., None, :]], axis=-2)
        d = d_unit(j(params), value_scale * j(grads), -2)
        grads["W_V"], grads["b_V"] = d[..., :-1, :], d[..., -1, :]
    return {"mse": mse, "penalty": penalty, "loss": mse + alpha * penalty}, grads

def slope(activation, s, gate):
    if activation in ("clamp", "binary"): return (s >= 0) & (s <= 1)
    if activation == "relu": return s > 0
    return (1 - gate * gate) * (s > 0)

def d_unit(W, d, axis):
    sq = (W * W).sum(axis=axis, keepdims=True)
    n = np.sqrt(np.maximum(sq, 1e-24))
    return (d - (sq > 1e-24) * W * ((W * d).sum(axis=axis, keepdims=True) / (n * n))) / n
