#!/usr/bin/env python3
"""Golden numbers of a small Llama-shaped model, from PyTorch on the CPU in float64.

    python3 tests/golden/make_llama_golden.py > tests/golden/llama.json

Needs torch >= 1.13 and nothing else. The model is written out with plain tensor operations in the conventions
of Hugging Face's LlamaForCausalLM (RMSNorm, rotate_half rotary embedding, grouped-query attention, SwiGLU);
gradients come from autograd and steps from torch.optim.AdamW, so nothing here shares a derivation with the
C++ code.

Inputs are formulas in integers, so that the C++ test builds the same doubles without files. With t = place in
`parameters` and i = index in row-major order, both from 0:
    u(t, i)        ((i + 1) * (37 * (i + 1) + 11) + 101 * t) % 1009, in [0, 1008]
    wave(t, i)     u(t, i) / 504.0 - 1.0
    matrix         w[i] = (2.0 / sqrt(columns)) * wave(t, i);  the embedding: w[i] = wave(t, i)
    norm weight    w[i] = 1.0 + 0.1 * wave(t, i)
    tokens         token[b][i] = (7 * i + 3 * i * i + 11 * b) % 97 for i in [0, seq_len]

Targets are the next tokens, the first one of the next document included; the loss is the mean over all of
them. The document starts of the variant `window_documents` stand in the file, one list for each sequence;
positions for the rotary embedding count from the start of the sequence, not of the document.
"""

import json
import math
import platform

import torch

VOCAB, D, HEADS, KV_HEADS, HEAD_DIM, FF, BLOCKS = 97, 32, 4, 2, 8, 48, 2
SEQ, BATCH, THETA, EPS = 40, 2, 10000.0, 1e-5
STEPS, LR, BETAS, ADAM_EPS, DECAY, CLIP = 10, 1e-2, (0.9, 0.95), 1e-8, 0.1, 1.0
VARIANTS = {
    "causal": {"window": 0, "document_starts": [[0], [0]]},
    "window_documents": {"window": 16, "document_starts": [[0, 13, 14, 33], [0, 24]]},
}
LOGIT_SAMPLES, TENSOR_SAMPLES = 200, 20


def parameter_shapes():
    """Names and shapes in the order that numbers them. A block of Llama is two layers here: A, then -."""
    shapes = [("embed.weight", (VOCAB, D))]
    for block in range(BLOCKS):
        a, m = f"layers.{2 * block}", f"layers.{2 * block + 1}"
        shapes += [
            (f"{a}.norm.weight", (D,)),
            (f"{a}.attention.q.weight", (HEADS * HEAD_DIM, D)),
            (f"{a}.attention.k.weight", (KV_HEADS * HEAD_DIM, D)),
            (f"{a}.attention.v.weight", (KV_HEADS * HEAD_DIM, D)),
            (f"{a}.attention.o.weight", (D, HEADS * HEAD_DIM)),
            (f"{m}.norm.weight", (D,)),
            (f"{m}.mlp.gate.weight", (FF, D)),
            (f"{m}.mlp.up.weight", (FF, D)),
            (f"{m}.mlp.down.weight", (D, FF)),
        ]
    return shapes + [("final_norm.weight", (D,)), ("head.weight", (VOCAB, D))]


def make_parameters():
    parameters = {}
    for t, (name, shape) in enumerate(parameter_shapes()):
        places = range(1, math.prod(shape) + 1)  # i + 1
        wave = [(n * (37 * n + 11) + 101 * t) % 1009 / 504.0 - 1.0 for n in places]
        if len(shape) == 1:
            values = [1.0 + 0.1 * x for x in wave]
        else:
            scale = 1.0 if name == "embed.weight" else 2.0 / math.sqrt(shape[1])
            values = [scale * x for x in wave]
        tensor = torch.tensor(values, dtype=torch.float64).reshape(shape)
        parameters[name] = tensor.requires_grad_(True)
    return parameters


def make_tokens():
    rows = [[(7 * i + 3 * i * i + 11 * b) % VOCAB for i in range(SEQ + 1)] for b in range(BATCH)]
    tokens = torch.tensor(rows)
    return tokens[:, :-1], tokens[:, 1:]


def allowed_keys(variant):
    """[batch, query, key]: causal, at most `window` keys (the query's own included), same document."""
    query, key = torch.arange(SEQ)[:, None], torch.arange(SEQ)[None, :]
    allowed = key <= query
    if variant["window"] > 0:
        allowed = allowed & (query - key < variant["window"])
    rows = []
    for starts in variant["document_starts"]:
        document = torch.tensor([sum(start <= i for start in starts) for i in range(SEQ)])
        rows.append(allowed & (document[:, None] == document[None, :]))
    return torch.stack(rows)


def rms_norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def rotate(x):
    """x: [batch, heads, tokens, head_dim]; dimension j turns with dimension j + head_dim / 2."""
    half = HEAD_DIM // 2
    frequency = THETA ** (-torch.arange(half, dtype=torch.float64) * 2.0 / HEAD_DIM)
    angle = torch.arange(SEQ, dtype=torch.float64)[:, None] * frequency[None, :]
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    rotated_half = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + rotated_half * sin


def attention(x, p, prefix, allowed):
    def heads(name, count):
        return (x @ p[f"{prefix}.{name}.weight"].T).view(BATCH, SEQ, count, HEAD_DIM).transpose(1, 2)

    q, k, v = rotate(heads("q", HEADS)), rotate(heads("k", KV_HEADS)), heads("v", KV_HEADS)
    k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
    v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(HEAD_DIM)
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(BATCH, SEQ, HEADS * HEAD_DIM)
    return out @ p[f"{prefix}.o.weight"].T


def mlp(x, p, prefix):
    gate, up = x @ p[f"{prefix}.gate.weight"].T, x @ p[f"{prefix}.up.weight"].T
    return (torch.nn.functional.silu(gate) * up) @ p[f"{prefix}.down.weight"].T


def forward(p, tokens, allowed):
    x = p["embed.weight"][tokens]
    for block in range(BLOCKS):
        a, m = f"layers.{2 * block}", f"layers.{2 * block + 1}"
        x = x + attention(rms_norm(x, p[f"{a}.norm.weight"]), p, f"{a}.attention", allowed)
        x = x + mlp(rms_norm(x, p[f"{m}.norm.weight"]), p, f"{m}.mlp")
    return rms_norm(x, p["final_norm.weight"]) @ p["head.weight"].T


def mean_loss(logits, targets):
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))


def sample(tensor, count):
    """Norm, and `count` evenly spread entries (all if fewer): n has flat index n * size // count."""
    flat = tensor.detach().reshape(-1)
    count = min(count, flat.numel())
    index = [n * flat.numel() // count for n in range(count)]
    return {"norm": flat.norm().item(), "index": index, "value": [flat[i].item() for i in index]}


def run(variant):
    allowed = allowed_keys(variant)
    tokens, targets = make_tokens()
    p = make_parameters()
    matrices = [w for w in p.values() if w.dim() > 1]
    norms = [w for w in p.values() if w.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}],
        lr=LR, betas=BETAS, eps=ADAM_EPS)

    logits = forward(p, tokens, allowed)
    result = dict(variant, logits=sample(logits, LOGIT_SAMPLES), loss=mean_loss(logits, targets).item())
    result["steps"] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        mean_loss(forward(p, tokens, allowed), targets).backward()
        if step == 0:
            result["gradients"] = {name: sample(w.grad, TENSOR_SAMPLES) for name, w in p.items()}
        # Clipped by hand: clip_grad_norm_ adds 1e-6 to the norm, which our definition does not.
        norm = math.sqrt(sum(w.grad.pow(2).sum().item() for w in p.values()))
        for w in p.values():
            w.grad.mul_(min(1.0, CLIP / norm))
        optimizer.step()
        with torch.no_grad():
            after = mean_loss(forward(p, tokens, allowed), targets).item()
        result["steps"].append({"grad_norm": norm, "loss_after": after})
    result["final_weights"] = {name: sample(w, TENSOR_SAMPLES) for name, w in p.items()}
    return result


def main():
    torch.manual_seed(0)  # nothing is drawn; the inputs are formulas
    torch.set_num_threads(1)
    golden = {
        "made_by": {"script": "tests/golden/make_llama_golden.py", "seed": 0, "torch": torch.__version__,
                    "python": platform.python_version(), "dtype": "float64"},
        "model": {"vocab_size": VOCAB, "d_model": D, "heads": HEADS, "kv_heads": KV_HEADS,
                  "head_dim": HEAD_DIM, "d_ff": FF, "pattern": "(A -)^2", "rope_theta": THETA,
                  "norm_eps": EPS, "tied_head": False},
        "batch": {"sequences": BATCH, "seq_len": SEQ},
        "optim": {"steps": STEPS, "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": ADAM_EPS,
                  "weight_decay": DECAY, "clip_norm": CLIP},
        "parameters": [{"name": name, "shape": list(shape)} for name, shape in parameter_shapes()],
        "variants": {name: run(variant) for name, variant in VARIANTS.items()},
    }
    # One line for each sampled tensor; Python prints the shortest digits that read back to the same double.
    print(render(golden, 0))


def render(value, depth):
    flat = json.dumps(value)
    if not isinstance(value, dict) or "value" in value or len(flat) <= 110:
        return flat
    pad = " " * (depth + 1)
    items = [f"{pad}{json.dumps(key)}: {render(item, depth + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + "\n" + " " * depth + "}"


if __name__ == "__main__":
    main()
