"""How to read an export: the text of WEIGHT_MAPPING.md before its tables."""

from __future__ import annotations

GUIDE = r"""## Reading the files

This document and an exported folder are enough to write a reader in another language; the golden files tell whether
it is right.

| file | written |
|---|---|
| `predictor.safetensors`, `y_encoder.safetensors` | always |
| `angn.safetensors` | when the model was trained with `--angn-enabled` |
| `y_decoder.safetensors` | `--phase 2` and `3` |
| `recursion.safetensors` | `--phase 3`; `train_agent.py` also writes it beside its checkpoints |
| `x_encoder.safetensors` | with `--x-encoder`; otherwise the X-Encoder is V-JEPA 2's or 2.1's own file |
| `config.json` | what the tensors do not say, see below |
| `tokenizer.json` | for the `tokenizers` library (Rust or Python) |
| `golden/*.safetensors` | with `--golden`: inputs and outputs to test an implementation with |

Every header has the metadata `format` (`mamba3-jepa`), `format_version`, `component`, `phase`, `dtype` and `config`
(JSON, equal to `model` in `config.json`). Tensors are little-endian and row-major. A linear map `y = W x + b` has W
of shape (outputs, inputs). With `--dtype float16` or `bfloat16` the weights of linear maps, convolutions and
embeddings have that type and everything else stays F32, so `angn.safetensors` is always F32. Convert to F32 before
computing.

`config.json`:

| key | what |
|---|---|
| `format`, `format_version`, `phase`, `dtype` | as in the headers; the version is a number, 2 |
| `files`, `tokenizer` | `bytes` and `sha256` (hex) of every file of weights, and of `tokenizer.json` |
| `model` | all sizes |
| `knowledge_dim` | length of a knowledge vector |
| `tokens` | ids of `pad`, `bos`, `eos` |
| `image` | side S (`size`) of what the X-Encoder sees, `mean` and `std` of the three channels |
| `constants` | used in the formulas below; `confusion_probe_layer_norm_eps` only with recursion |
| `generation` | with a Y-Decoder: `max_tokens`, the most tokens of an answer, eos included |
| `classify` | `temperature` and `template` of `classify` where nothing else is asked for |
| `memory` | `format` and `format_version` of memory files, as the exporter writes them; 2 and 3 are alike to a reader |
| `answers` | known answers: the frequent answers of the training data, which may be none |
| `data`, `metrics` | where the training data came from, and how the model did on validation data (`null`: undefined) |

A key that you do not know beside these can be left aside: say so. Under `model`, `tokens`, `image`, `constants`,
`generation` and `classify` one changes what is computed: refuse it. A key that changes the meaning of others comes with
another version.

Version 1 had no `recursion.memory_floor` (it acts as -1), no `generation`, `classify`, `memory` and `answers`, and of
`constants` only `norm_eps`, `A_floor` and, for the confusion probe, `layer_norm_eps`.

Below, rmsnorm(x, w) = x / sqrt(mean(x^2) + norm_eps) * w and layernorm(x, w, b) = (x - mean(x)) / sqrt(mean((x -
mean(x))^2) + eps) * w + b, over the last dimension; silu(v) = v * sigmoid(v); softplus(v) = ln(1 + e^v); unit(x) = x
/ max(|x|, normalize_eps) with |x| the Euclidean length.

### A backbone

`predictor`, `y_encoder` and `y_decoder` each hold a stack of Mamba-3 layers. For a residual stream h, layer by layer:

```
h = h * sigmoid(angn.gates.i.weight * h + angn.gates.i.bias)     only in the predictor, only with ANGN
h = h + layer_i(rmsnorm(h, norms.i.weight))
h = h + mlp_i(rmsnorm(h, mlp_norms.i.weight))                    only with `mlp_dim`
```

and at the end `rmsnorm(h, final_norm.weight)`.

`mlp_dim` is the hidden width of a gated MLP behind every layer, which a backbone has that started from an official
Mamba-3 language model. Where there is none, as in every preset, it is left out. With M = `mlp_dim` rounded up to a
multiple of 128, there are three more tensors for each layer: `mlp_norms.i.weight` (D), `mlps.i.fc1.weight` (2 M, D)
and `mlps.i.fc2.weight` (D, M). No biases.

```
a, g   = fc1(x)                                                          its first M and its last M outputs
mlp(x) = fc2(a * silu(g))
```

### A layer

H heads of size P = headdim, N = d_state, G = ngroups, R ranks (`mimo_rank` where `is_mimo`, else 1), S = floor(N *
rope_fraction / 2) rotated pairs. `in_proj` has no bias; its outputs, in this order (first row .. row after the last):

@SPLIT@

For every token:

```
dt     = softplus(dd_dt + dt_bias)                                       (H)
g(v)   = 1 + v for v >= 0, 1 / (1 - v) below                             a_activation "heavy_tail"; else softplus
alpha  = exp(-max(g(dd_A), A_floor) * dt)                                (H)
lambda = sigmoid(trap)                                                   (H)
theta  = theta + dt * pi * tanh(angle)                                   (H, S), cumulative, kept modulo 2 pi
K      = rotate(rmsnorm(B, B_norm.weight) + B_bias, theta)               (R, H, N); heads in order share the G groups
Q      = rotate(rmsnorm(C, C_norm.weight) + C_bias, theta)               (R, H, N)
V      = x                                                               (H, P)
h      = alpha * (h + (1 - lambda) * dt * V_prev K_prev) + lambda * dt * V K    (H, P, N), outer products per head
y      = h Q + D * V                                                     (H, P)
out    = out_proj(y * silu(z))
```

rotate turns the pairs (2i, 2i + 1), i < S, by theta_i: (a, b) -> (a cos - b sin, a sin + b cos); the other dimensions
stay. Of B and C, head j reads group floor(j / (H / G)). theta, h, K_prev and V_prev start at zero and are all a layer
remembers between tokens.

With `is_mimo` (no preset has it) the pairs are (i, i + N / 2), and every token has R ranks r. They share one state:

```
V_r    = V * mimo_x[:, r]                                                (H, P) for each r; V_prev is kept unspread
h      = alpha * (h + (1 - lambda) * dt * sum_r V_prev_r K_prev_r) + lambda * dt * sum_r V_r K_r
y_r    = h Q_r + D * V_r                                                 (H, P) for each r
out    = out_proj(sum_r y_r * silu(z * mimo_z[:, r]) * mimo_o[:, r])
```

With `is_outproj_norm` every y (every y_r) is normed first, each head for itself: y_h = rmsnorm(y_h, norm.weight[h P
.. (h + 1) P]). So the order is: norm, gate, gather the ranks, `out_proj`.

### Text to tokens

bos, the text's ids, eos. The ids come from `tokenizer.json` without special tokens added, and a special token that
somebody typed is ordinary text: set `encode_special_tokens`, which `tokenizer.json` does not carry. Of a question at
most `max_query_tokens` - 2 ids are kept, of any other text `max_answer_tokens` - 2; eos stays. A text is taken as it
is, surrounding spaces included; one that is empty but for spaces is refused.

Back to text: the ids decoded without special tokens, and, of a generated answer, without surrounding white space.

A list of texts in a file (answers, a memory, labels) has one on each line, in UTF-8, with or without a byte order
mark; lines are stripped, empty ones and repetitions left out. Lines end as for Python's `splitlines`: at \n, \r,
\r\n, and also at \v, \f, \x1c, \x1d, \x1e, \x85, U+2028 and U+2029.

### A picture to pixels

A file is JPEG, PNG, WebP, GIF or BMP. From it to 8-bit RGB:

- Of an animation, the first frame.
- A picture that is cut short or damaged is refused, not filled up. A PNG or GIF is whole when every pixel of the frame
  that counts can be decoded: what lies behind the last one may be missing or damaged, further frames, chunks and the
  end included. Of a PNG's pixels the checksum at their end may be missing, but not be wrong; more rows than its height
  are accepted; the checksum of an `IDAT` chunk is not looked at. JPEG (to its end marker), BMP (to its last row) and
  WebP (as long as its header says) must be there to the end. Where a cut falls within a byte or two of these ends,
  decoders may differ.
- Samples of 16 bits keep their upper 8; grey of 1, 2 or 4 bits is scaled to 0 .. 255 (times 255, 85, 17).
- An index beyond the palette of a PNG or GIF is black; in a GIF without palette, or with one whose colours are the
  greys 0, 1, 2 and so on, it is the grey of that number.
- Transparency is laid over white: an alpha channel, the alphas of a palette, the one transparent colour of PNG's
  `tRNS` or of GIF. Of a colour c and an alpha a it makes (c a + 255 (255 - a)) / 255, rounded to the nearest. The
  colour of a `tRNS` is compared with the samples as they are in the file, except in 16-bit RGB, where only the upper
  8 bits are compared.
- CMYK JPEG: with inks from 0 (none) to 255, red is (255 - C) (255 - K) / 255, rounded; green and blue likewise from M
  and Y. Colour profiles and gamma are not looked at.
- Orientation, last: EXIF tag 0x0112 of the first directory (JPEG: APP1; PNG: `eXIf`, else the text `Raw profile type
  exif`; WebP: `EXIF`), else `tiff:Orientation` in XMP. 2 mirrors left and right, 3 turns by 180 degrees, 4 mirrors
  top and bottom, 5 transposes, 6 turns by 90 degrees clockwise, 7 transposes along the other diagonal, 8 turns by 90
  degrees counterclockwise. What cannot be read, or is another number, turns nothing.

From W x H to S x S, in the manner of Pillow: with s = min(W, H), the centre square starts at ((W - s) / 2, (H - s) /
2), perhaps between two pixels. First every row is resampled from the s columns of the square to S, then every column.
Each pass rounds to 8 bits. An axis is left alone when it has exactly S pixels and s = S. Output i of a pass over n
pixels whose square starts at b:

```
scale   = s / S;  stretch = max(scale, 1);  centre = b + (i + 0.5) * scale         64-bit floats
first   = max(0, trunc(centre - 2 * stretch + 0.5))
end     = min(n, trunc(centre + 2 * stretch + 0.5))                               pixels outside the square count too
w_x     = bicubic((x - centre + 0.5) * (1 / stretch))   for first <= x < end
k_x     = w_x / sum(w) * 2^22, rounded to nearest, halves away from zero           integers
output  = clamp((2^21 + sum(k_x * pixel_x)) >> 22, 0, 255)                         the shift rounds down

bicubic(v) = 1.5 |v|^3 - 2.5 |v|^2 + 1 for |v| < 1;  -0.5 (|v|^3 - 5 |v|^2 + 8 |v| - 4) for |v| < 2;  else 0
```

The model sees (pixel / 255 - mean) / std, channels first.

### X-Encoder

V-JEPA 2 or 2.1, as `model.vision.kind` says, `vjepa2` or `vjepa2.1`; where it says nothing, in exports from before
there was a choice, it is V-JEPA 2. That has the names of `transformers` behind `x_encoder.`; a `transformers` folder
of V-JEPA 2 holds the same tensors.

**V-JEPA 2.** Its input is a clip of T frames of H x W pixels; an image is a clip of `tubelet_size` equal frames. With
t = tubelet_size and p = patch_size there are (T / t) (H / p) (W / p) tokens, time first, then rows, then columns: 256
for an image of 256 x 256. Token (a, b, c) is

```
x = proj.weight (as a matrix, D x (3 t p p)) times the t frames' p x p pixels, + proj.bias
```

with the pixels in the order of the weight's axes: channel, frame, row, column; the first is frame a t, row b p,
column c p. There is no position table. Then for each layer (layernorm with `x_encoder_layer_norm_eps`), and
`layernorm` at the end:

```
x = x + attention(layernorm(x, norm1))
x = x + fc2(gelu(fc1(layernorm(x, norm2))))            gelu(v) = v (1 + erf(v / sqrt(2))) / 2, not the tanh form
```

Attention has `heads` heads of d = D / heads dimensions, head k at k d .. (k + 1) d of query, key and value, softmax
of q . k / sqrt(d) over all tokens, then `attention.proj`. Before the product, q and k are turned: the first third of
the d dimensions by the token's time a, the next by its row b, the next by its column c (numbers of tubelets and
patches, from 0), each m = 2 floor(floor(d / 3) / 2) wide; what is left over stays. In a part u of m dimensions at
position n, with j = 0 .. m - 1:

```
angle_j  = n * 10000^(-(j mod (m / 2)) / (m / 2))
u'_j     = u_j cos(angle_j) + v_j sin(angle_j)          v = (-u_1, u_0, -u_3, u_2, ...)
```

Mind that the pairs are neighbours (2i, 2i + 1), but the angles repeat in halves, so the two of a pair turn by
different angles: that is how V-JEPA 2 was trained.

**V-JEPA 2.1** is the same but for three things. What has one frame, an image or a clip with T = 1, is cut by
`patch_embeddings_img.proj` with t = 1, into (H / p) (W / p) tokens. To every token of an image `img_mod_embed` is
added, to every token of a clip `video_mod_embed`, before the first layer. And the two of a pair turn by the same
angle, with rows and columns stretched to the grid of a picture of 256 pixels, g = max(1, floor(256 / p)):

```
angle_j  = n * 10000^(-floor(j / 2) / (m / 2))
n        = a;   b * (g - 1) / max(1, H / p - 1);   c * (g - 1) / max(1, W / p - 1)       time, row, column
```

| tensor, behind `x_encoder.encoder.embeddings.` | shape | meaning |
|---|---|---|
| `patch_embeddings_img.proj.weight` | D x 3 x 1 x p x p | convolution over the patches of an image |
| `patch_embeddings_img.proj.bias` | D | its bias |
| `img_mod_embed` | 1 x 1 x D | added to the tokens of an image; F32, as every tensor that is no `weight` |
| `video_mod_embed` | 1 x 1 x D | added to the tokens of a clip |

### Predictor and ANGN

With `model.predictor.visual_pool` = k (1 where there is no such key) the visual tokens are first pooled: those of a
picture, a grid of image_size / patch_size rows and columns, become the means of k x k neighbours, row by row. What
follows, and what an episode's picture is known by, starts from these.

The visual part is vision_proj(visual tokens), the question part query_proj(query tokens), with query tokens the rows of
`y_encoder.embedding.weight` for bos, question, eos. `model.predictor.order` says which parts the sequence has, first to
last: `visual_question` (also where there is no such key), `question_visual`, `question_visual_question`. Without an
image the visual part is not there. Through the backbone; then the pooled state, by `model.predictor.pooling`: the mean
over the sequence (`all`, also where there is no such key), the mean over the sequence weighted by the softmax of the
final states' products with `pool_score.weight` (`attention`), the mean over the last question part (`question`), or the
last state (`last`). Predicted embedding = unit(pred_head(pooled)). An image without a question is asked
`model.query_prompt`; so are the images of `search`, and those of `classify` and `embed` unless a question is given.

With `model.predictor.bidirectional` (no preset has it) each layer of the predictor has a second one beside it,
`predictor.reverse_layers.i.*`, with the tensors of a layer. It reads the same normed sequence from the last token to
the first, and what it gives for a token is added there: h = h + layer_i(x) + reverse_layer_i(x).

ANGN keeps a record: the activity of layer i in a pass is the mean of its gate (the sigmoid above) over the width and
over all valid positions of all samples of the pass. Its moving average starts as the first activity and goes on as
ema_decay * average + (1 - ema_decay) * activity (`model.angn.ema_decay`). After each pass: when the mean of the
averages over the layers is under `context_reset_threshold`, a reset of the context is due. That is a signal for the
caller, nothing more; a reset forgets the averages.

### Y-Encoder

Rows of `y_encoder.embedding.weight` for bos, text, eos; backbone; mean; unit(projection(mean)). Its cosine with a
predicted embedding ranks answers.

### Y-Decoder

`embed_to_prefix(predicted embedding)` reshaped to (prefix_tokens, width) goes through the backbone first, then bos,
then each chosen token; `lm_head` of the final norm's output gives the next token's logits, until eos or
`generation.max_tokens` tokens, eos included.

- greedy: the largest logit, the first of equal ones.
- sample: logits / temperature; of those the `top_k` largest; of those, from the largest on, as few as reach a share
  of `top_p`; one is drawn. Temperature 0 is greedy.
- beam: with K beams, the K best continuations over all beams and tokens, by the sum of log-probabilities. One that
  ends in eos is finished and takes one of the K places for good; only so many continuations as there are places are
  looked at. An answer's score is its sum / (number of tokens, eos included)^length_penalty. The search ends when no
  place is left, at the limit, or when the best unfinished sum, divided by the next length or the limit to that power,
  is not above the best score. The best finished answer wins; without one, the best unfinished.

The confidence of an answer is the geometric mean of the probabilities of its tokens, eos included where it was said:
exp(mean(log softmax(logits)[token])), with the logits as they are, whatever the temperature.

Without a Y-Decoder the answer is the nearest known answer to the embedding, and its confidence that answer's share in
a softmax over all known answers of cosine / `classify.temperature`.

### Recursion and memory

```
normed   = layernorm(pooled, confusion_probe.norm)            eps: confusion_probe_layer_norm_eps
logit    = linear(silu(hidden(normed)))                       with `hears_answer` hidden([normed; doubt])
doubt    = log(1e-5 - mean(log p)), log(1e-5 - min(log p))    over the tokens of the greedy answer, eos included where
                                                              it was said; log p as for the confidence, at most 0
P        = sigmoid(logit / temperature)
smoothed = ema_decay * smoothed + (1 - ema_decay) * P         model.recursion.ema_decay; of each question for itself,
                                                              in its first turn P
confused = P > threshold                                      smoothed > threshold with `ask --smooth`
injected = pooled + injector.projection(k)                    with `injector_sees_state`
           + output(silu(hidden([layernorm(pooled, injector.norm); rms(k)])))
rms(x)   = x / sqrt(mean(x^2) + 1e-12)
answers  = sigmoid(linear(silu(hidden([layernorm(pooled, knowledge_probe.norm); rms(k)]))))
after    = P * (1 - answers)                                  with `weighs_knowledge`: P(confused) after k was injected
tools    = softmax(linear(silu(hidden(layernorm(pooled, tool_selector.norm)))))       with `tools`, in their order
```

k is a knowledge vector of length `knowledge_dim`, or, where that is `embed_dim`, a text's Y-Encoder embedding. Where
the model is confused, what the caller gives is injected (with `ask --inject always` wherever it is given); if nothing
is given and there is a memory, the Y-Encoder embedding of its nearest text is injected, if its cosine is at least
`recursion.memory_floor`. Cosines are those of

- with a retriever (`retriever_dim`): unit(question.output(silu(question.hidden(rms(q))))) of the question's Y-Encoder
  embedding q, and unit(text.output(silu(text.hidden(rms(t))))) of the texts' embeddings t; without a question nothing
  is looked up;
- otherwise: the predicted embedding and the texts' embeddings.

With `model.recursion.episodes` a memory may hold episodes too: pictures and questions seen before, with their answers.
The score of one is

```
score = episode_blend * cos(seen - mean, s - mean) + (1 - episode_blend) * cos(q, e)
```

of what is seen and the question's Y-Encoder embedding q, with what was seen in the episode, s, and its question's
embedding e; where nothing was asked, q or e is that of `model.query_prompt`. With `model.recursion.episode_key`
"picture", seen (4 V) is what the picture looks like and mean `picture_mean`: the mean visual token of each quarter of
the square grid (rows floor(i n / 2) to ceil((i + 1) n / 2) of n for half i, and columns alike), less the mean of the
four, quarter after quarter, row by row; zeros without image. Without that key seen (D) is the pooled state and mean
`state_mean`. The episode with the largest score is recalled if
the score is at least `recursion.episode_floor`, and what is injected is the embedding of its answer. An
`episode_floor` of 2 or more: the model has learned to recall none, and none is to be remembered for it. Of a text and
an episode that reach their floors the one is injected that is further above its own, of equals the text. All of this
is computed in F32.

pred_head of the injected state, as a unit vector, takes the place of the predicted embedding: the answer is spoken from
it, and the nearest known answers are found with it. P, smoothed and confused are those from before. An answer is sure
if the model is not confused, or if something was injected and, with `weighs_knowledge`, after is at most threshold. The
signal of confusion is "answer" if P with the surest doubt there is, log(1e-5) twice, in the place of the answer's own
would not be over the threshold; otherwise "state". With `ask --smooth` it is "before" where smoothed is over the
threshold and P is not.

A memory file is a safetensors file with the tensor `embeddings` (M, E) F32, the unit Y-Encoder embeddings of M
different texts (M may be 0), and the metadata `format`, `format_version` (3), `texts` (a JSON list of the M texts) and
`encoder`, see below. One with P > 0 episodes also has the tensors `episode_states` (P, 4 V or D), `episode_questions`
and `episode_answers` (P, E), all F32 (what was seen as it is, the embeddings of unit length), and the metadata
`observer`, see below, and `episodes`: a JSON list of P objects with `question` (null: the prompt), `answer` and `image`
(the image file's name, or null). Version 2 had no episodes, and at least one text; the rest is the same.

The order of the metadata is `format`, `format_version`, `encoder`, `texts`, `observer`, `episodes`, that of the tensors
the alphabet's; JSON has a space behind its commas and colons, and what is not ASCII as it is. Equal texts are kept
once. An episode with the question of another, and what was seen differing from its by at most 1e-4 of its length, takes
its place. Who changes a file holds an exclusive lock (`flock`) on `.NAME.lock` beside it from reading to writing.

`encoder` is SHA-256, as 64 lower-case hexadecimal digits, over

1. the ASCII line `mamba3-jepa y_encoder` and a line feed;
2. `{"max_answer_tokens":...,"y_encoder":{...}}` with the values of `model` as JSON with sorted keys and without
   spaces (numbers as in `config.json`: 0.5, 1.0), and a line feed;
3. the SHA-256 of the bytes of `tokenizer.json` as 64 lower-case hexadecimal digits, and a line feed;
4. for every tensor of `y_encoder.safetensors`, in the order of the bytes of their keys: the line `<key> <dtype>
   <shape>`, such as `y_encoder.embedding.weight F32 512x64`, a line feed, and the tensor's bytes as they are stored.

A memory with another digest was made by another encoder; its embeddings mean nothing here.

`observer`, of what the episodes' states depend on, is SHA-256 in the same manner over

1. the ASCII line `mamba3-jepa observer` and a line feed;
2. the digest `encoder`, and a line feed;
3. `{"angn":...,"max_query_tokens":...,"predictor":{...},"query_prompt":"...","vision":{...}}` with the values of
   `model` as JSON with sorted keys and without spaces, what is not ASCII as it is, `angn` being `model.angn.enabled`
   (true or false), and `vision` with `"kind":"vjepa2"` where there is no such key; and a line feed;
4. for every tensor of `predictor.safetensors`, and then, with ANGN, of `angn.safetensors`, in the order of the bytes
   of their keys: line and bytes as above.

The weights of the X-Encoder are not in it: it is frozen, and a published file or the export's own. A memory whose
episodes have another observer is refused: what was seen means nothing here.

### The commands

- `ask`: embedding and confusion of image and question, memory, answer, as above; `nearest`: the `--top` (5) known
  answers (`answers`, or a file's) nearest to the embedding that is spoken, with their cosines.
- `search`: the images nearest to a text, by the cosine of its Y-Encoder embedding with their predicted embeddings.
- `classify`: softmax over the labels of cosine(predicted embedding, Y-Encoder embedding of `template` with the label
  in place of `{}`) / `temperature`. Labels are stripped, repetitions left out.
- `embed`: predicted embeddings of images, Y-Encoder embeddings of texts, F32. `.safetensors`: tensors `images` and
  `texts` (N, E), and metadata of the same names with the JSON list of the file names or texts. `.npy`: one array, with
  `{"images": [...]}` or `{"texts": [...]}` in the `.json` file beside it.

`search` and `classify` judge the confusion of each image that they show by what it is asked, as `ask` does. It changes
neither order nor probabilities.

Whatever is ranked, of equal values the one given first comes first; the images of a folder come in the order of their
paths' bytes, part by part. A file name is printed and written as UTF-8; each byte of it that is not UTF-8 is `\xNN`,
with lower-case digits.

### Where to look in the golden files

Inputs and outputs are computed in F32 from the exported weights, so rounding to 16 bits is in them already, and a
correct F32 implementation agrees to about 1e-5 of a tensor's largest value. Ids are I64, masks, pixels and files U8.
The metadata entry `tensors` describes every tensor (`mamba3-jepa inspect` shows it); `questions` and `texts` are what
was encoded. From the inside out:

1. `layer0.*` in predictor, y_encoder, y_decoder: the first layer on four tokens, with the split of in_proj, dt,
   alpha, lambda, the state after each token, Q, y and out.
2. `layers.{i}.input`, `layers.{i}.mixer_output`, `hidden`: the stream between the layers of a whole pass, and with
   MLPs `layers.{i}.mlp_output`;
   `step.layers.{i}`: the same token by token. `gates.{i}.*`, `activity`, `activity_ema`, `context_reset_due` in angn.
3. `pooled`, `embedding` (predictor, y_encoder); `prefix`, `prefill.{i}.*`, `logits`, `step.logits`, `greedy_ids.*`,
   `beam_ids.*` and their log-probabilities (y_decoder); `score`, `injected`, `embedding_injected`, `episode_scores`
   (recursion);
   `pixels`, `visual_tokens`, and `clip`, `clip_visual_tokens` for a clip that is not square (x_encoder, always
   written).
4. images (always written): for every picture `image.<name>.file`, the bytes of a file, and `image.<name>.pixels` (3,
   S, S), what the model sees of it, before mean and std. The metadata entry `images` gives format, what it is, and
   whether it is `lossy`: decoders of lossy formats differ a little; everything else has exactly these pixels.
5. tokens (always written): for the i-th of the metadata's `texts`, `ids.<i>` as an answer, `query_ids.<i>` as a
   question, `all_ids.<i>` not cut."""
