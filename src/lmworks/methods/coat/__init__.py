"""Optimizer moments and saved activations in eight-bit floats.

Haocheng Xi, Han Cai, Ligeng Zhu, Yao Lu, Kurt Keutzer, Jianfei Chen, Song Han. "COAT: Compressing Optimizer states and
Activation for Memory-Efficient FP8 Training". ICLR 2025, arXiv 2410.19313.

## What it does

Two parts, each usable alone. One holds the moments of any optimizer in eight bits between steps. The other computes the
products of a decoder's blocks on eight-bit floats, and keeps nothing wider than those for the backward pass.

| part | setting |
| --- | --- |
| moments | `optimizer = { use = "coat", around = { use = "adamw", lr = 1e-3 } }` |
| activations | `saved = { use = "coat" }` |

## How it works

**Moments.** An eight-bit float with three bits of mantissa (E4M3) has positive numbers from 2^-9 to 448: a range of
2e5. A group of 128 neighbouring values of Adam's first moment spans about 1e3, of the second about 1e1, so most of the
range would lie idle. Each group is stretched before it is cast, and shrunk again when it is read:

    R = max|x| / min|x|,  zeros left out            c = sqrt(max|x|) sqrt(min|x|)
    k = floor(16 log2(448^2 / 2) / log2 R) / 16     y = sign(x) (|x| / c)^k
    s = (max|x| / c)^k / 448                        code = cast(y / s),    x is about sign(code) |code s|^(1/k) c

k < 1 compresses a group whose R is above 1e5. k is 16 at most; `floor = 1` forbids compression. Groups whose values are
all alike get k = 1, groups of zeros decode to zeros, and what is above 448 is clamped. A value costs one byte, a group
three float32 numbers: for two moments 2.19 bytes a value, against 8. In a step moments are decoded a bucket of
parameters at a time; the update uses them in float32, before they are coded again. Master weights stay float32.

**Activations.** What a product reads has one scale for the whole tensor, max|x| / 448; what a norm or an elementwise
function reads has one bf16 scale for each 16 values of a row. Gradients of products' outputs are E5M2 with one scale.
The residual stream, rotation and attention stay in bf16. Of a block are kept, in bytes per token (D hidden, F
feed-forward width, and as many key/value heads as query heads):

| | in bf16 | here |
| --- | --- | --- |
| inputs of the two norms | 2 D + 2 D | 1.125 D + 1.125 D, E4M3 by groups |
| outputs of the norms, read by q, k, v and by gate, up | 2 D + 2 D | D + D, E4M3, one scale |
| q, k, v and the attention's output | 8 D | 8 D, as they are |
| gate, up, silu(gate) | 6 F | 3.375 F, E4M3 by groups |
| silu(gate) up | 2 F | F, E4M3, one scale |
| together | 16 D + 8 F | 12.25 D + 4.375 F |

Weights are rounded when a product needs them, forward and again backward, so that no copy waits in between; in plain
bf16 training on one rank a bf16 copy of each matrix does. Where values are rounded, gradients pass as if they were not.
Passes without gradient (validation, samples, export) use the weights as they are.

On a GPU with products of eight-bit floats these are `torch._scaled_mm`'s, and codes are made by Triton's kernels where
Triton is installed. Elsewhere the same codes are made in plain PyTorch and multiplied in float32: the same numbers but
for the order of additions, and slower than bf16.

Columns of metrics.jsonl with `shadow = true`: `codec/first_error`, `codec/second_error`, `codec/direction_error`: how
far the coded moments, and Adam's direction m / (sqrt(v) + 1e-8), are from those that were never coded, given the same
gradients; relative to their size.

## When to use it

- *Moments*: when optimizer state is what does not fit. Rates and betas are those of the optimizer inside. Not where a
  run is dominated by small tensors: their groups are short.
- *Activations*: when saved tensors are what does not fit, on a GPU of Hopper's kind or later. They hold their own
  against recomputation: no block is run twice.
- *Both with a disk*: `saved = { use = "offload", around = "coat" }`, or `ssdtrain` in its place: what goes out is in
  eight bits.
- `first` and `second` name the formats. E4M3 for both is the default; E4M3 and E5M2 is the paper's other choice.
- `expand = false` leaves the scale alone: for comparison.
- With FSDP codes are made of each rank's part. A checkpoint is gone on from by any layout; bit by bit where each tensor
  is cut as before.

## Differences

- The published optimizer is AdamW in CUDA; this codec stands around any optimizer. One whose update looks over all
  parameters at once (Sophia, LAMB) has all its moments decoded while it steps.
- There the formula alone decides k: groups of equal values give NaN or zeros. Zeros of a lane's own count as minimum.
  Ours are the rules above.
- An unknown format or flag is refused. In the published OLMo configurations the flag for expansion has a value that
  the code does not know, so those runs used a scale alone, in silence.
- Scales, exponents and centres are float32 whatever the parameters are; bf16 parameters are refused.
- Autograd wants gradients of one type; there E5M2 bytes travel as E4M3. Here a block's half is one function with bf16
  at its borders, so the eight-bit copy of the residual stream is made where a norm reads it, and not where it is added.
- Weights' scales are taken in every pass; there once in a step. Stochastic rounding is left out: it is off there.
- Attention's output is kept as it is and rounded again in the backward pass, as there.

## Limits

- Blocks of the family `decoder`, with widths and tokens of a micro-batch in multiples of 16. A mixture of experts stays
  in bf16 while its block's attention is coded. tp and `precision = "float8"` are refused with activations; moments go
  with any layout and precision.
- Tables, final norm, head and loss are not rounded.
- Nothing of it has run on a GPU yet: kernels were held by Triton's interpreter and compiled, no more.
- Speed: no claim without a GPU of that kind. On a CPU the rounding costs more than it saves.
- The paper's 1.54x end-to-end memory is of several GPUs and may hold larger micro-batches; not known here.
- The effect of k < 1 in long runs is not known.
"""
