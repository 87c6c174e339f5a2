"""The words of WEIGHT_MAPPING.md's tables, which come from the code; `mapping_guide.py` has the text before them."""

from __future__ import annotations

HEADING = """# Weight mapping

What `mamba3-jepa export` (or `python -m utils.export_weights`) writes, tensor by tensor, for the `small` preset with
ANGN on, three tools and 32,000 tokens. This file is generated: `python -m mamba3_jepa.export.mapping_doc`, and a test
compares it with the code. Other presets have the same keys, with fewer layers and other sizes; `mamba3-jepa inspect
FILE` lists any file."""

TITLES = {
    "predictor": "The Mamba-3 predictor: backbone and projections.",
    "y_encoder": "The text encoder, and the token embedding that questions share with it.",
    "angn": "The gates on the predictor's residual stream.",
    "y_decoder": "The language model that speaks an embedding.",
    "recursion": "Confusion probe, state injector, what judges and finds knowledge, and the selector of tools.",
    "x_encoder": "The frozen vision transformer, here V-JEPA 2's, on request.",
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
    "recursion:injector.norm": "LayerNorm of the pooled state",
    "recursion:injector.hidden": "hidden layer, before silu, of the normed state and then k / rms(k)",
    "recursion:knowledge_probe.norm": "LayerNorm of the pooled state",
    "recursion:knowledge_probe.hidden": "hidden layer, before silu, of the normed state and then k / rms(k)",
    "recursion:knowledge_probe.linear": "logit of whether k answers what was asked",
    "recursion:tool_selector.norm": "LayerNorm of the pooled state",
    "recursion:tool_selector.hidden": "hidden layer, before silu",
    "recursion:tool_selector.linear": "logits of the tools, in the order of `tools`",
    "recursion:retriever.question.hidden": "hidden layer, before silu, of a question's embedding over its rms",
    "recursion:retriever.question.output": "what looks up, before it is divided by its length",
    "recursion:retriever.text.hidden": "hidden layer, before silu, of a text's embedding over its rms",
    "recursion:retriever.text.output": "what is looked up, before it is divided by its length",
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
    "mlp_norms.{i}.weight": "RMSNorm before the MLP behind layer i",
    "mlps.{i}.fc1.weight": "values a, then gates g, from the normed stream",
    "mlps.{i}.fc2.weight": "a * silu(g) to model width",
    "final_norm.weight": "RMSNorm after the last layer",
    "predictor:pool_score.weight": "score of each position's weight in the pooled state",
    "y_encoder:embedding.weight": "token embedding, also of the predictor's questions",
    "y_decoder:embedding.weight": "token embedding of the decoder",
    "lm_head.weight": "final state to logits",
    "gates.{i}.weight": "elementwise factor inside the gate of layer i",
    "gates.{i}.bias": "elementwise offset inside the gate of layer i",
    "confusion_probe.threshold": "confused above this P(confused), chosen on validation data",
    "confusion_probe.temperature": "divides the logit, fitted on validation data",
    "injector.projection.weight": "knowledge vector to what is added to the pooled state",
    "injector.output.weight": "hidden layer to what is added to the pooled state beside the projection",
    "memory_floor": "cosine below which the memory's nearest text is not injected; -1 is no floor",
    "episode_blend": "how much what is seen counts, beside the questions, when an episode is looked up",
    "episode_floor": "score below which the memory's nearest episode is not injected; 2 stops all",
    "state_mean": "(D) taken from pooled states before they are compared",
    "picture_mean": "(4 V) taken from what pictures look like before it is compared",
}
