"""What each kind of site, tap and dimension is, in a line for the reference; the names are those of `peftc.lang.sites`.

Shapes: B is the batch, S the sequence; weights are [out, in], whatever the checkpoint's layout.
"""

from __future__ import annotations

SITE_DOCS: dict[str, str] = {
    "attention": "an attention with its projections, found from the attention op",
    "ffn": "two linear layers with an activation between them, whose result joins a residual",
    "experts": "the weights of a mixture of experts that are stored as one stack of matrices, one for each expert",
    "linear": "a linear layer",
    "conv": "a convolution",
    "embedding": "a table of embeddings",
    "norm": "a LayerNorm, RMS norm, group norm or batch norm",
    "block": "a layer of the model: the part that repeats",
    "model": "the whole model",
}

TAP_DOCS: dict[str, dict[str, str]] = {
    "attention": {
        "x": "input of the query projection, [B, S, d_model]",
        "ctx": "input of the key and value projections; x itself in self-attention",
        "q": "queries as projected, [B, S, heads * key_dim]",
        "k": "keys as projected, [B, S, kv_heads * key_dim]; in latent attention the part that is projected",
        "v": "values as projected, [B, S, kv_heads * head_dim]",
        "heads": "each head's output, [B, heads, S, head_dim]",
        "concat": "the heads merged, the input of the output projection, [B, S, heads * head_dim]",
        "out": "result of the output projection, [B, S, d_model]",
    },
    "ffn": {
        "x": "input, [B, S, d_model]",
        "gate": "what the activation is of in a gated FFN, [B, S, d_ff]",
        "up": "result of the up projection, [B, S, d_ff]",
        "mid": "input of the down projection, [B, S, d_ff]",
        "out": "result of the down projection, [B, S, d_model]",
        "residual": "the sum of `out` and the residual stream",
    },
    "experts": {
        "gate_up": "the weights of gate and up in one, [experts, 2 d_ff, d_model], in the order of the checkpoint",
        "gate": "the gates' weights, [experts, d_ff, d_model]",
        "up": "the up projections' weights, [experts, d_ff, d_model]",
        "down": "the down projections' weights, [experts, d_model, d_ff]",
        "gate_up_bias": "the biases of gate and up, [experts, 2 d_ff]",
        "gate_bias": "the gates' biases, [experts, d_ff]",
        "up_bias": "the up projections' biases, [experts, d_ff]",
        "down_bias": "the down projections' biases, [experts, d_model]",
    },
    "linear": {"x": "input", "out": "output", "weight": "the weight, [d_out, d_in]", "bias": "the bias, [d_out]"},
    "conv": {"x": "input", "out": "output", "weight": "the kernel", "bias": "the bias, [d_out]"},
    "embedding": {"out": "the rows that were looked up", "weight": "the table"},
    "norm": {"x": "input", "out": "output", "weight": "the scale, [d_out]", "bias": "the offset, [d_out]"},
    "block": {"x": "the hidden states that enter", "out": "the hidden states that leave"},
    "model": {
        "ids": "the tokens that the model is called with, [B, S]",
        "mask": "the mask over them, [B, S]",
        "types": "their token types, [B, S]",
        "positions": "their positions, where the model is called with them, [B, S]",
        "labels": "labels of tokens, where the model is called with them, [B, S]",
        "embeddings": "the embedded tokens, [B, S, d_model]",
        "pooled": "what the token at a fixed place is taken from, as a pooler takes the first, [B, S, d_model]",
        "logits": "the first output",
        "outputs": "each result with the sequence as its second axis, as the caller gets it: scores, hidden states",
        "attentions": "each result that is weights of an attention, [B, heads, S, S]",
        "cross_attentions": "each result that is weights of a cross attention over the sequence, [B, heads, T, S]",
    },
}

DIM_DOCS: dict[str, str] = {
    "d_in": "last axis of x; of a weight its own second axis, of an expert's its own",
    "d_out": "last axis of h; of a weight its own first axis, of an expert's its own",
    "d_model": "width of the hidden states; attention, ffn, experts, block and model have it",
    "d_ff": "inner width of an ffn, or of one expert",
    "heads": "number of query heads of an attention",
    "kv_heads": "number of key and value heads of an attention",
    "head_dim": "width of a head: of its values and its output",
    "key_dim": "width of a head's queries and keys; head_dim, unless it is latent attention",
    "experts": "number of experts of a mixture",
    "layer": "number of the layer within its stack, from 0; -1 outside of any",
    "layers": "number of layers of the stack",
    "has_bias": "whether the layer has a bias",
}

INSERTION_DOCS: dict[str, str] = {
    "parallel": "x is the site's own input (for the taps k and v of an attention that is ctx)",
    "sequential": "x is h itself",
}

COMPOSITION_DOCS: dict[str, str] = {
    "add": "h + dh",
    "gate": "(1 - λ) h + λ dh for a form with `attend`, where λ is the share of the softmax that the rows take",
    "prepend": "dh as rows in front of the embeddings; the mask and the positions grow with them",
}
