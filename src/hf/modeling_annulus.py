"""Models of Annulus for Transformers: layers of softmax attention, latent attention (MLA, TPLA), Mamba-2 and
MLPs in any order, and sums of them, where no class of Transformers has the combination.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Every layer is y = x + sum of branch(RMSNorm(x)); config.layers lists the branches. There is no cache: each
generated token reads the whole sequence again. Sequences of a batch may end in padding.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

LATENT_EPS = 1e-6  # of the latents' norms, whatever the model's


class AnnulusConfig(PretrainedConfig):
    """Sizes of a kind of branch that no layer has are 0."""

    model_type = "annulus"

    def __init__(self, layers=(), vocab_size=0, hidden_size=0, intermediate_size=0, hidden_act="silu",
                 rms_norm_eps=1e-5, initializer_range=0.02, max_position_embeddings=2048, long_rope=None,
                 num_attention_heads=0, num_key_value_heads=0, head_dim=0, rotary_dim=0, latent_attention_heads=0,
                 q_lora_rank=None, kv_lora_rank=0, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0,
                 mamba_n_heads=0, mamba_d_head=0, mamba_d_state=0, mamba_n_groups=1, mamba_d_conv=4,
                 mamba_chunk_size=128, time_step_limit=(0.0, math.inf), tie_word_embeddings=False, **kwargs):
        self.layers = [list(layer) for layer in layers]
        self.num_hidden_layers = len(self.layers)
        kwargs.pop("num_hidden_layers", None)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.intermediate_size, self.hidden_act = intermediate_size, hidden_act
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.rotary_dim = head_dim, rotary_dim  # 0: all of a head turns
        self.latent_attention_heads = latent_attention_heads
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.mamba_n_heads, self.mamba_d_head = mamba_n_heads, mamba_d_head
        self.mamba_d_state, self.mamba_n_groups = mamba_d_state, mamba_n_groups
        self.mamba_d_conv, self.mamba_chunk_size = mamba_d_conv, mamba_chunk_size
        self.time_step_limit = list(time_step_limit)
        self.long_rope = long_rope  # bases of rotations are the layers'
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def wide(x):
    """At least float32: sums of norms, decays and states."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Over each of `groups` equal parts of the columns, of what a gate has let through."""

    def __init__(self, size, eps, groups=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, x, gate=None):
        y = wide(x) if gate is None else wide(x) * F.silu(wide(gate))
        y = y.unflatten(-1, (self.groups, -1))
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return self.weight * y.to(x.dtype)


def yarn_scale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def llama3_frequencies(frequency, law):
    """Long waves turn slower by the factor, short ones as before, those between as both in part."""
    turns = law["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = law["low_freq_factor"], law["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / law["factor"])


def yarn_frequencies(frequency, law, theta, dim):
    def pair(turns):  # that turns so often in the original length
        return dim * math.log(law["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (
            2 * math.log(theta))

    low, high = max(math.floor(pair(law["beta_fast"])), 0), min(math.ceil(pair(law["beta_slow"])), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64)
    slowed = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency * (1 - slowed + slowed / law["factor"])


def rotate(x, theta, law):
    """x: [batch, heads, tokens, dim]; element i turns with element i + dim / 2."""
    if theta is None:
        return x
    dim, scale = x.shape[-1], 1.0
    frequency = theta ** (-torch.arange(dim // 2, dtype=torch.float64) * 2.0 / dim)
    if law and law["rope_type"] == "llama3":
        frequency = llama3_frequencies(frequency, law)
    elif law:
        frequency = yarn_frequencies(frequency, law, theta, dim)
        scale = yarn_scale(law["factor"], law["mscale"]) / yarn_scale(law["factor"], law["mscale_all_dim"])
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
    cos, sin = (scale * angle.cos()).to(x.device), (scale * angle.sin()).to(x.device)
    first, second = wide(x).chunk(2, -1)
    cos, sin = cos.to(first.dtype), sin.to(first.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attend(q, k, v, scale, window):
    """Causal; a query sees at most `window` keys, its own included (0: all)."""
    query, key = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
    allowed = (key <= query) & ((query - key < window) | (window == 0))
    scores = (wide(q) @ wide(k).transpose(-1, -2) * scale).masked_fill(~allowed.to(q.device), -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config, branch):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.law = config.head_dim, config.long_rope
        self.kept = self.head_dim - config.rotary_dim if config.rotary_dim else 0  # elements of a head
        self.theta, self.window = branch["rope_theta"], branch["window"]
        d, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(d, self.heads * dim, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(self.heads * dim, d, bias=False)

    def turned(self, x):
        return torch.cat([x[..., : self.kept], rotate(x[..., self.kept:], self.theta, self.law)], -1)

    def forward(self, x):
        q = self.turned(heads(self.q_proj(x), self.heads))
        k = self.turned(heads(self.k_proj(x), self.kv_heads))
        v = heads(self.v_proj(x), self.kv_heads)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        out = attend(q, k, v, self.head_dim ** -0.5, self.window)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LatentAttention(nn.Module):
    """MLA; with several latent groups TPLA: the mean of branches, each with its part of the latent."""

    def __init__(self, config, branch):
        super().__init__()
        self.heads, self.groups = config.latent_attention_heads, branch["latent_groups"]
        self.nope, self.rope, self.v_dim = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
        self.rank, self.law = config.kv_lora_rank, config.long_rope
        self.theta, self.window = branch["rope_theta"], branch["window"]
        d, q_dim = config.hidden_size, self.heads * (self.nope + self.rope)
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(d, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_dim, bias=False)
        else:
            self.q_proj = nn.Linear(d, q_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_EPS, self.groups)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, d, bias=False)
        self.scale = (self.nope + self.rope) ** -0.5
        if self.law and self.law["rope_type"] == "yarn":
            self.scale *= yarn_scale(self.law["factor"], self.law["mscale_all_dim"]) ** 2

    def forward(self, x):
        compressed = hasattr(self, "q_a_proj")
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if compressed else self.q_proj(x)
        q_nope, q_rope = heads(q, self.heads).split([self.nope, self.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], -1)
        q = torch.cat([q_nope, rotate(q_rope, self.theta, self.law)], -1)
        k_rope = rotate(heads(k_rope, 1), self.theta, self.law).expand(-1, self.heads, -1, -1)
        parts = self.kv_a_layernorm(latent).chunk(self.groups, -1)
        out = 0
        for part, weight in zip(parts, self.kv_b_proj.weight.chunk(self.groups, 1)):
            k_nope, v = heads(F.linear(part, weight), self.heads).split([self.nope, self.v_dim], -1)
            out = out + attend(q, torch.cat([k_nope, k_rope], -1), v, self.scale, self.window)
        return self.o_proj((out / self.groups).transpose(1, 2).flatten(2))


class Mamba2(nn.Module):
    def __init__(self, config, branch):
        super().__init__()
        self.heads, self.head_dim = config.mamba_n_heads, config.mamba_d_head
        self.state, self.groups = config.mamba_d_state, config.mamba_n_groups
        self.inner, self.bc, self.chunk = (self.heads * self.head_dim, self.groups * self.state,
                                           config.mamba_chunk_size)
        low, high = config.time_step_limit
        self.limit = (float(low), float(high))
        conv, taps = self.inner + 2 * self.bc, config.mamba_d_conv
        self.in_proj = nn.Linear(config.hidden_size, self.inner + conv + self.heads, bias=False)
        self.conv1d = nn.Conv1d(conv, conv, taps, groups=conv, padding=taps - 1)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.inner, config.rms_norm_eps, self.groups)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)

    def forward(self, x):
        z, xbc, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.bc, self.heads], -1)
        xbc = F.silu(self.conv1d(xbc.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        u, b, c = wide(xbc).split([self.inner, self.bc, self.bc], -1)
        dt = F.softplus(wide(dt) + wide(self.dt_bias)).clamp(*self.limit)
        b, c = (y.unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, 2)
                for y in (b, c))
        u = u.unflatten(-1, (self.heads, -1))
        y = self.scan(u * dt[..., None], dt * -wide(self.A_log).exp(), b, c) + u * wide(self.D)[:, None]
        return self.out_proj(self.norm(y.flatten(2).to(x.dtype), z))

    def scan(self, u, log_decay, b, c):
        """state <- e^log_decay state + u b^T, y = state c, a chunk of tokens at a time."""
        state = u.new_zeros(u.shape[0], self.heads, self.head_dim, self.state)
        out = []
        for u, log_decay, b, c in zip(*(t.split(self.chunk, 1) for t in (u, log_decay, b, c))):
            since = log_decay.cumsum(1)  # [batch, tokens, heads], from the chunk's start
            between = since[:, :, None] - since[:, None]
            later = torch.ones(between.shape[1:3], dtype=torch.bool, device=u.device).tril()
            between = between.masked_fill(~later[None, :, :, None], -math.inf).exp()
            inside = torch.einsum("bihn,bjhn,bijh,bjhp->bihp", c, b, between, u)
            out.append(inside + torch.einsum("bihn,bhpn,bih->bihp", c, state, since.exp()))
            left = (since[:, -1:] - since).exp()
            state = state * since[:, -1].exp()[..., None, None] + torch.einsum("bjhp,bjhn,bjh->bhpn", u, b, left)
        return torch.cat(out, 1)


class MLP(nn.Module):
    def __init__(self, config, branch):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        if config.hidden_act == "silu":
            self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x):
        if hasattr(self, "gate_proj"):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.relu(self.up_proj(x)).square())


BRANCHES = {"attention": ("self_attn", Attention), "latent": ("latent_attn", LatentAttention),
            "mamba": ("mamba", Mamba2), "mlp": ("mlp", MLP)}


class Layer(nn.Module):
    def __init__(self, config, branches):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.names = [BRANCHES[branch["kind"]][0] for branch in branches]
        for name, branch in zip(self.names, branches):
            setattr(self, name, BRANCHES[branch["kind"]][1](config, branch))

    def forward(self, x):
        normed = self.norm(x)
        for name in self.names:
            x = x + getattr(self, name)(normed)
        return x


class AnnulusPreTrainedModel(PreTrainedModel):
    config_class = AnnulusConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _is_stateful = True  # no cache: nothing that generation could wind back

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class AnnulusModel(AnnulusPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, branches) for branches in config.layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, embeddings):
        self.embed_tokens = embeddings

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def check_padding(attention_mask):
    """Nothing before a token depends on it: padding behind a sequence changes none of its logits."""
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [sequences, tokens], got {list(attention_mask.shape)}")
    mask = attention_mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
        raise ValueError("attention_mask: expected padding behind sequences alone (padding_side='right')")


class AnnulusForCausalLM(AnnulusPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = AnnulusModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, embeddings):
        self.model.embed_tokens = embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask: expected no padding; generate from sequences of one length at a time")
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, use_cache=None,
                return_dict=None, **kwargs):
        if use_cache or kwargs.get("past_key_values") is not None:
            raise ValueError("use_cache: expected False; this model has no cache and takes whole sequences")
        if attention_mask is not None:
            check_padding(attention_mask)
        logits = self.lm_head(self.model(input_ids, inputs_embeds))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(wide(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)
