#!/usr/bin/env python3
"""Golden logits of small models of Hugging Face's Transformers, in float64; and a check of exported folders.

    python3 tests/golden/make_hf_golden.py            writes tests/golden/hf_<class>.json
    python3 tests/golden/make_hf_golden.py --check DIR ...   logits of exported folders against their probe.json
    python3 tests/golden/make_hf_golden.py --arguments       what modeling_annulus.py makes of masks and caches

Needs torch and transformers (made_by in the files says which versions). The logits are those of Transformers'
own classes. They compute parts in float32 whatever the weights are; here every such cast goes to float64, so
that the numbers are good to some epsilons of it.

Weights are formulas in integers, so that the C++ test builds the same doubles without files. With t = place in
`tensors` and i = index in row-major order, both from 0:
    u(t, i)     ((i + 1) * (37 * (i + 1) + 11) + 101 * t) % 1009, in [0, 1008]
    wave(t, i)  u(t, i) / 504.0 - 1.0
    matrix      (2.0 / sqrt(columns)) * wave, of a short convolution and the embedding 1.0 * wave
    A_log       1.0 + wave;  dt_bias: wave - 2.0;  other biases: 0.1 * wave;  every other vector: 1.0 + 0.1 * wave
    tokens      token[b][i] = (7 * i + 3 * i * i + 11 * b) % vocabulary
"""

import json
import math
import os
import platform
import sys

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

SEQUENCES, LENGTH, SAMPLES = 2, 40, 200
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 0.7, "mscale_all_dim": 0.9, "original_max_position_embeddings": 64}
TEXT = {"vocab_size": 97, "hidden_size": 32, "max_position_embeddings": 128, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager"}
MLA = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
       "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10,
       "first_k_dense_replace": 2, "num_nextn_predict_layers": 0}
def branch(kind, window=0, rope_theta=10000.0, latent_groups=1):
    more = {"attention": {"window": window, "rope_theta": rope_theta}, "mamba": {}, "mlp": {}}
    more["latent"] = dict(more["attention"], latent_groups=latent_groups)
    return dict(more[kind], kind=kind)


CASES = {
    "llama": ("Llama", {
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 12, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3}),
    "llama_tied": ("Llama", {
        "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True}),
    "deepseek_v3": ("DeepseekV3", dict(MLA, q_lora_rank=24, rope_parameters=YARN, rope_interleave=True)),
    "deepseek_v3_plain": ("DeepseekV3", dict(
        MLA, q_lora_rank=None, rope_interleave=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    "mamba2": ("Mamba2", {
        "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 12, "n_groups": 2, "expand": 2,
        "conv_kernel": 4, "chunk_size": 16, "time_step_limit": (0.0, float("inf"))}),
    "nemotron_h": ("NemotronH", {
        "hybrid_override_pattern": "M-M*-", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
        "intermediate_size": 48, "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 12, "n_groups": 3,
        "conv_kernel": 4, "chunk_size": 16, "time_step_min": 0.001}),
    "falcon_h1": ("FalconH1", {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 12,
        "mamba_d_conv": 4, "mamba_chunk_size": 16, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "time_step_limit": (0.01, 0.5)}),
    "annulus": ("Annulus", {
        "layers": [[branch("mamba"), branch("attention", window=7)], [branch("mlp")],
                   [branch("latent", latent_groups=2)], [branch("mlp")],
                   [branch("attention", rope_theta=None)], [branch("latent", window=9, rope_theta=500.0)]],
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rotary_dim": 6,
        "intermediate_size": 48, "hidden_act": "relu2", "latent_attention_heads": 3, "q_lora_rank": 14,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "mamba_n_heads": 6,
        "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 12, "mamba_d_conv": 4, "mamba_chunk_size": 16,
        "time_step_limit": (0.0, float("inf")), "long_rope": YARN}),
    "annulus_gated": ("Annulus", {
        "layers": [[branch("mamba")], [branch("mlp")], [branch("latent")], [branch("mlp"), branch("attention")]],
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "rotary_dim": 0,
        "intermediate_size": 40, "hidden_act": "silu", "latent_attention_heads": 2, "q_lora_rank": None,
        "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "mamba_n_heads": 4,
        "mamba_d_head": 6, "mamba_n_groups": 1, "mamba_d_state": 10, "mamba_d_conv": 3, "mamba_chunk_size": 9,
        "time_step_limit": (0.02, 0.4), "tie_word_embeddings": True}),
}


class InDoubles(TorchFunctionMode):
    """Casts to float32 go to float64."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        def widened(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        named = {name: widened(value) for name, value in (named or {}).items()}
        return function(*[widened(value) for value in arguments], **named)


def logits_of(model, tokens):
    model = model.double().eval()
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # computed in float32 when the model was made
            with InDoubles():
                fresh = type(module)(module.config)
            assert fresh.inv_freq.dtype == torch.float64
            module.inv_freq, module.attention_scaling = fresh.inv_freq, fresh.attention_scaling
    with torch.no_grad(), InDoubles():
        return model(input_ids=tokens, use_cache=False).logits


def wave(t, count):
    return [((n * (37 * n + 11) + 101 * t) % 1009) / 504.0 - 1.0 for n in range(1, count + 1)]


def weights(t, name, shape):
    values = wave(t, math.prod(shape))
    if len(shape) > 1:
        plain = len(shape) == 3 or "embed" in name
        scale = 1.0 if plain else 2.0 / math.sqrt(shape[-1])
        return [scale * x for x in values]
    if name.endswith("A_log"):
        return [1.0 + x for x in values]
    if name.endswith("dt_bias"):
        return [x - 2.0 for x in values]
    if name.endswith("bias"):
        return [0.1 * x for x in values]
    return [1.0 + 0.1 * x for x in values]


def tokens_of(vocabulary):
    return torch.tensor([[(7 * i + 3 * i * i + 11 * b) % vocabulary for i in range(LENGTH)]
                         for b in range(SEQUENCES)])


def on_disk(architecture, name):
    """NemotronH's files keep the names of its first release."""
    return name.replace("model.", "backbone.", 1) if architecture == "NemotronH" else name


def module_of(architecture):
    """Transformers, or the code that is exported with models for which it has no class."""
    if architecture != "Annulus":
        return transformers
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, os.path.join(here, "..", "..", "src", "hf"))
    return __import__("modeling_annulus")


def code_hash():
    """FNV-1a of the code that is exported: golden files of other code are out of date."""
    with open(module_of("Annulus").__file__, "rb") as file:
        value = 0xcbf29ce484222325
        for byte in file.read():
            value = (value ^ byte) * 0x100000001b3 % 2**64
        return f"{value:016x}"


def model_of(case):
    architecture, fields = CASES[case]
    module = module_of(architecture)
    config = getattr(module, architecture + "Config")(**dict(TEXT, **fields))
    torch.manual_seed(0)  # nothing that is drawn is left in golden files
    return architecture, config, getattr(module, architecture + "ForCausalLM")(config).double()


def make(case):
    architecture, config, model = model_of(case)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = sorted((name, list(p.shape)) for name, p in model.state_dict().items() if name not in tied)
    with torch.no_grad():
        for t, (name, shape) in enumerate(tensors):
            value = torch.tensor(weights(t, name, shape), dtype=torch.float64)
            model.state_dict()[name].copy_(value.reshape(shape))
    logits = logits_of(model, tokens_of(config.vocab_size)).reshape(-1)
    assert logits.dtype == torch.float64
    index = [n * logits.numel() // SAMPLES for n in range(SAMPLES)]
    made_by = {"script": "tests/golden/make_hf_golden.py", "seed": 0, "torch": torch.__version__,
               "transformers": transformers.__version__, "python": platform.python_version()}
    if architecture == "Annulus":
        made_by["code"] = code_hash()
    return {
        "made_by": made_by,
        "config": json.loads(config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]},
        "sequences": SEQUENCES, "length": LENGTH,
        "tensors": [{"name": on_disk(architecture, name), "shape": shape} for name, shape in tensors],
        "logits": {"norm": logits.norm().item(), "index": index, "value": [logits[i].item() for i in index]},
    }


def render(value, depth=0):
    flat = json.dumps(value)
    if not isinstance(value, (dict, list)) or len(flat) <= 110 or (
            isinstance(value, list) and not isinstance(value[0], dict)):
        return flat
    pad, end = " " * (depth + 1), " " * depth
    if isinstance(value, list):
        return "[\n" + ",\n".join(pad + render(item, depth + 1) for item in value) + "\n" + end + "]"
    items = [f"{pad}{json.dumps(key)}: {render(item, depth + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + "\n" + end + "}"


def check(folder):
    """Difference to the logits that the exporting program wrote, relative to the largest."""
    with open(os.path.join(folder, "probe.json")) as file:
        probe = json.load(file)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64, attn_implementation="eager",
        output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], f"{folder}: {kind}: {report[kind]}"
    want = torch.tensor(probe["logits"], dtype=torch.float64)
    got = logits_of(model, torch.tensor([probe["tokens"]]))[0]
    error = ((got - want).abs().max() / want.abs().max()).item()
    print(f"{folder}: {type(model).__name__}, {want.numel()} logits of {probe['dtype']}, "
          f"relative difference {error:.2e}")
    return error <= probe["tolerance"]


def check_arguments():
    """Padding behind a sequence changes nothing before it; all else that cannot be is refused by name."""
    _, config, model = model_of("annulus")
    tokens = tokens_of(config.vocab_size)
    length = LENGTH - 7
    padded = torch.arange(LENGTH).expand(SEQUENCES, -1) < torch.tensor([[LENGTH], [length]])
    with torch.no_grad():
        whole = model(tokens, attention_mask=torch.ones_like(tokens)).logits
        alone = model(tokens[1:, :length]).logits
        filled = model(tokens.where(padded, 0), attention_mask=padded.long()).logits
        assert torch.equal(filled[0], whole[0])
        assert torch.allclose(filled[1:, :length], alone, rtol=0, atol=1e-12 * alone.abs().max().item())
        written = model.generate(tokens, max_new_tokens=3, do_sample=False)
        assert written.shape == (SEQUENCES, LENGTH + 3)
        assert torch.equal(written[:, LENGTH], whole[:, -1].argmax(-1))

        def refused(part, call):
            try:
                call()
            except ValueError as error:
                assert part in str(error), error
                return print(f"refused: {error}")
            raise AssertionError(f"not refused: {part}")

        refused("padding_side", lambda: model(tokens, attention_mask=padded.flip(1).long()))
        refused("[sequences, tokens]", lambda: model(tokens, attention_mask=padded[:, None]))
        refused("use_cache", lambda: model(tokens, use_cache=True))
        refused("use_cache", lambda: model(tokens, past_key_values=[()]))
        refused("no padding", lambda: model.generate(tokens, attention_mask=padded.long(), max_new_tokens=1))


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    if sys.argv[1:2] == ["--check"]:
        sys.exit(0 if all([check(folder) for folder in sys.argv[2:]]) else 1)
    if sys.argv[1:2] == ["--arguments"]:
        return check_arguments()
    for case in sys.argv[1:] or CASES:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"hf_{case}.json")
        with open(path, "w") as file:
            file.write(render(make(case)) + "\n")
        print(path)


if __name__ == "__main__":
    main()
