"""The words of WEIGHT_MAPPING.md; its tables come from the code."""

from __future__ import annotations

HEADING = """# Weight mapping

What `mamba3-jepa export` (or `python -m utils.export_weights`) writes, tensor by tensor, for the `small` preset with
ANGN on and 32,000 tokens. This file is generated: `python -m mamba3_jepa.export.mapping_doc`, and a test compares it
with the code. Other presets have the same keys, with fewer layers and other sizes; `mamba3-jepa inspect FILE` lists
any file."""

GUIDE = """## Reading the files

| file | written |
|---|---|
| `predictor.safetensors`, `y_encoder.safetensors` | always |
| `angn.safetensors` | when the model was trained with `--angn-enabled` |
| `y_decoder.safetensors` | `--phase 2` and `3` |
| `recursion.safetensors` | `--phase 3`; `train_agent.py` also writes it beside its checkpoints |
| `x_encoder.safetensors` | with `--x-encoder`; otherwise the X-Encoder is V-JEPA 2's own file |
| `config.json` | sizes (`model`), token ids, image mean and std, constants, SHA-256 of weights and tokenizer |
| `tokenizer.json` | for the `tokenizers` library (Rust or Python) |
| `golden/*.safetensors` | with `--golden`: inputs and outputs to test an implementation with |

Every header has the metadata `format` (`mamba3-jepa`), `format_version`, `component`, `phase`, `dtype` and `config`
(JSON). Tensors are little-endian and row-major. A linear map `y = W x + b` has W of shape (outputs, inputs). With
`--dtype float16` or `bfloat16` the weights of linear maps, convolutions and embeddings have that type and everything
else stays F32, so `angn.safetensors` is always F32. Convert to F32 before computing.

### A backbone

`predictor`, `y_encoder` and `y_decoder` each hold a stack of Mamba-3 layers. For a residual stream h, layer by layer:

```
h = h * sigmoid(angn.gates.i.weight * h + angn.gates.i.bias)     only in the predictor, only with ANGN
h = h + layer_i(rmsnorm(h, norms.i.weight))
```

and at the end `rmsnorm(h, final_norm.weight)`, where rmsnorm(x, w) = x / sqrt(mean(x^2) + 1e-5) * w over the last
dimension.

### A layer

H heads of size P = headdim, N = d_state, G = ngroups, R ranks (1 unless `is_mimo`), S = floor(N * rope_fraction / 2)
rotated pairs. `in_proj` has no bias; its outputs, in this order (first row .. row after the last):

@SPLIT@

For every token, with softplus(v) = ln(1 + e^v):

```
dt     = softplus(dd_dt + dt_bias)                                       (H)
g(v)   = 1 + v for v >= 0, 1 / (1 - v) below                             a_activation "heavy_tail"; else softplus
alpha  = exp(-max(g(dd_A), 1e-4) * dt)                                   (H)
lambda = sigmoid(trap)                                                   (H)
theta  = theta + dt * pi * tanh(angle)                                   (H, S), cumulative, kept modulo 2 pi
K      = rotate(rmsnorm(B, B_norm.weight) + B_bias, theta)               (R, H, N); head h reads group h / (H / G)
Q      = rotate(rmsnorm(C, C_norm.weight) + C_bias, theta)               (R, H, N)
V      = x                                                               (H, P)
h      = alpha * (h + (1 - lambda) * dt * V_prev K_prev) + lambda * dt * V K    (H, P, N), outer products per head
y      = h Q + D * V                                                     (H, P)
out    = out_proj(y * silu(z))
```

rotate turns the pairs (2i, 2i + 1), i < S, by theta_i: (a, b) -> (a cos - b sin, a sin + b cos); the other dimensions
stay. theta, h, K_prev and V_prev start at zero and are all a layer remembers between tokens. (MIMO, which no preset
uses, rotates the pairs (i, i + N / 2) and adds `mimo_x`, `mimo_z`, `mimo_o`; `is_outproj_norm` adds `norm.weight`.)

### The components

- **x_encoder**: V-JEPA 2 (`transformers` names). An image is a clip of two equal frames; 256 visual tokens at 256 px.
- **predictor**: sequence = [vision_proj(visual tokens) ; query_proj(query tokens)], query tokens = rows of
  `y_encoder.embedding.weight` for bos, question, eos. Without an image: the query alone. Backbone, mean over the
  sequence = pooled state, `pred_head`, divided by its length = predicted embedding. An image without a question is
  asked `model.query_prompt`.
- **tokens**: bos, the text's ids, eos. The ids come without special tokens added, and a special token that somebody
  typed is ordinary text (`encode_special_tokens`, which `tokenizer.json` does not carry). Of a question at most
  `max_query_tokens` - 2 ids are kept, of any other text `max_answer_tokens` - 2; eos stays.
- **y_encoder**: embedding of bos, text, eos; backbone; mean; `projection`; divided by its length. Cosine with the
  predicted embedding ranks answers.
- **y_decoder**: `embed_to_prefix(predicted embedding)` reshaped to (prefix_tokens, width) goes through the backbone
  first, then bos, then each chosen token; `lm_head` of the final norm's output gives the next token's logits, until
  eos.
- **recursion**: logit = linear(silu(hidden(layernorm(pooled)))), P(confused) = sigmoid(logit / temperature), smoothed
  over turns as ema_decay * previous + (1 - ema_decay) * P; confused above `threshold`. Knowledge: pooled +
  projection(k), k a text's Y-Encoder embedding, then `pred_head` again.

### Where to look in the golden files

Inputs and outputs are computed in F32 from the exported weights, so a correct F32 implementation agrees to about 1e-5
of a tensor's largest value. Ids are I64, masks U8. The metadata entry `tensors` describes every tensor (`mamba3-jepa
inspect` shows it); `questions` and `texts` are what was encoded. From the inside out:

1. `layer0.*` in predictor, y_encoder, y_decoder: the first layer on four tokens, with the split of in_proj, dt,
   alpha, lambda, the state after each token, Q, y and out.
2. `layers.{i}.input`, `layers.{i}.mixer_output`, `hidden`: the stream between the layers of a whole pass;
   `step.layers.{i}`: the same token by token. `gates.{i}.*` in angn.
3. `pooled`, `embedding` (predictor, y_encoder); `prefix`, `prefill.{i}.*`, `logits`, `step.logits`, `greedy_ids.*`
   (y_decoder); `score`, `injected`, `embedding_injected` (recursion); `pixels`, `visual_tokens` (x_encoder, always
   written)."""

TITLES = {
    "predictor": "The Mamba-3 predictor: backbone and projections.",
    "y_encoder": "The text encoder, and the token embedding that questions share with it.",
    "angn": "The gates on the predictor's residual stream.",
    "y_decoder": "The language model that speaks an embedding.",
    "recursion": "Confusion probe and state injector.",
    "x_encoder": "The frozen V-JEPA 2 vision transformer, on request.",
}

_LINEAR = {
    "predictor:vision_proj": "visual token to model width",
    "predictor:query_proj": "query token to model width",
    "predictor:pred_head": "pooled state to embedding, before it is divided by its length",
    "y_encoder:projection": "mean of the final states to embedding, before it is divided by its length",
    "y_decoder:embed_to_prefix": "embedding to all prefix tokens at once, prefix-major",
    "recursion:confusion_probe.norm": "LayerNorm of the pooled state",
    "recursion:confusion_probe.hidden": "hidden layer, before silu",
    "recursion:confusion_probe.linear": "logit of confusion",
    "x_encoder:encoder.embeddings.patch_embeddings.proj": "convolution over tubelets and patches",
    "x_encoder:encoder.layer.{i}.norm1": "LayerNorm before attention",
    "x_encoder:encoder.layer.{i}.attention.query": "queries",
    "x_encoder:encoder.layer.{i}.attention.key": "keys",
    "x_encoder:encoder.layer.{i}.attention.value": "values",
    "x_encoder:encoder.layer.{i}.attention.proj": "attention output",
    "x_encoder:encoder.layer.{i}.norm2": "LayerNorm before the perceptron",
    "x_encoder:encoder.layer.{i}.mlp.fc1": "perceptron, in",
    "x_encoder:encoder.layer.{i}.mlp.fc2": "perceptron, out",
    "x_encoder:encoder.layernorm": "final LayerNorm",
}

# What a tensor is, by its key without the component; "component:key" where it differs between components.
MEANINGS = {
    **{f"{name}.weight": meaning for name, meaning in _LINEAR.items()},
    **{f"{name}.bias": f"its bias: {meaning}" for name, meaning in _LINEAR.items()},
    "norms.{i}.weight": "RMSNorm before layer i",
    "layers.{i}.in_proj.weight": "z, x, B, C, dd_dt, dd_A, trap, angle from the normed stream",
    "layers.{i}.dt_bias": "(H) added to dd_dt before softplus",
    "layers.{i}.B_bias": "(H, R, N) added to normed B",
    "layers.{i}.C_bias": "(H, R, N) added to normed C",
    "layers.{i}.B_norm.weight": "(N) RMSNorm of B",
    "layers.{i}.C_norm.weight": "(N) RMSNorm of C",
    "layers.{i}.D": "(H) skip from V to y",
    "layers.{i}.out_proj.weight": "gated y to model width",
    "final_norm.weight": "RMSNorm after the last layer",
    "y_encoder:embedding.weight": "token embedding, also of the predictor's questions",
    "y_decoder:embedding.weight": "token embedding of the decoder",
    "lm_head.weight": "final state to logits",
    "gates.{i}.weight": "elementwise factor inside the gate of layer i",
    "gates.{i}.bias": "elementwise offset inside the gate of layer i",
    "confusion_probe.threshold": "confused above this P(confused), chosen on validation data",
    "confusion_probe.temperature": "divides the logit, fitted on validation data",
    "injector.projection.weight": "knowledge vector to what is added to the pooled state",
    "memory_floor": "cosine below which the memory's nearest text is not injected; -1 is no floor",
}
