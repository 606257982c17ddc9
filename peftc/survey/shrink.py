"""Small configs: a default config of any model type with depths, widths, vocabularies and image sizes made small.

Fields are recognised by what their names say (`RULES`); no model type is listed, but for a few repairs. Where a model
does not build, the fields that the failing lines name get their defaults back, and the next try is made (`attempts`).

    raw = shrink(default_config("llama"))
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

WIDTH, HEADS, GROUPS, HEAD_DIM, FFN, VOCABULARY, POSITIONS, IMAGE, DEPTH = 64, 4, 2, 16, 128, 199, 64, 64, 2

Rule = tuple[str, int]

RULES: tuple[Rule, ...] = (
    (r"num_(local_)?experts|n_routed_experts|num_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|moe_top_k", 2),
    (r"n_group|topk_group", 1),
    (r"(\w+_)?(vocab_size|vocab_sizes|codebook_size|num_embeddings)(_per_layer_input)?", VOCABULARY),
    (r"\w*(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num)", GROUPS),
    (r"\w*(attention_heads|num_heads|n_heads?|encoder_heads|linear_num_(key|value)_heads|mamba_(n|num)_heads)", HEADS),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|linear_(key|value)_head_dim|index_head_dim|swa_head_dim", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(\w+_)?(head_dim|d_kv|d_head|dim_head|mamba_d_head|mamba_head_dim)", HEAD_DIM),
    (r"(\w+_)?(kv_lora_rank|q_lora_rank|o_lora_rank)", 16),
    (r"query_pre_attn_scalar|rotary_dim", HEAD_DIM),
    (r"(\w+_)?(intermediate_size|ffn_dim|mlp_dim|d_ff|d_inner|n_inner|ffn_hidden_size)", FFN),
    (r"(\w+_)?(linear_units|dim_feedforward)", FFN),
    (r"(\w+_)?(hidden_size|d_model|embed_dim|hidden_dim|n_embd|projection_dim|embedding_size)", WIDTH),
    (r"(\w+_)?(emb_dim|output_dim|hidden_sizes?|out_hidden_size)", WIDTH),
    (r"(\w+_)?(proj_size|proj_dim|pooler_output_size|xvector_output_dim|lru_width)", WIDTH),
    (r"(\w+_)?(codevector_dim|conv_dim|dim|hidden_dims|embed_dims|encoder_hidden_sizes|channels_list)", WIDTH),
    (r"(\w+_)?(num_pos_feats)", WIDTH // 2),
    (r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|depth|num_encoder_layers|num_decoder_layers)", DEPTH),
    (r"(encoder|decoder|text_encoder|speech_encoder|t2u_encoder|t2u_decoder)_layers", DEPTH),
    (r"num_feat_extract_layers_", DEPTH),
    (r"(\w+_)?(max_position_embeddings|n_positions|max_seq_len|model_max_length|max_sequence_length)", POSITIONS),
    (r"max_source_positions|max_target_positions|original_max_position_embeddings|context_length", POSITIONS),
    (r"(\w+_)?image_size", IMAGE),
    (r"(\w+_)?(sliding_window(_size)?|local_attention|attention_chunk_size|index_topk)", 8),
    (r"window_size", 4),
    (r"num_queries|num_denoising|num_query_tokens", 8),
    (r"first_k_dense_replace|max_window_layers|num_dense_layers|num_kv_shared_layers", 1),
    (r"(full_attention_interval|no_rope_layer_interval|_?sliding_window_pattern|attn_layer_period)", 2),
    (r"(global_attn_every_n_layers|cross_attention_interval|expert_layer_period)", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"block_size|chunk_size|mamba_chunk_size", 8),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups|num_codevectors_per_group", 4),
    (r"(relative_attention_num|position)_buckets", 8),
)  # fmt: skip
"""A pattern for the whole name of a field, and the size it gets where its default is larger. The first one holds."""

_COMPILED = [(re.compile(pattern), size) for pattern, size in RULES]

STAGED = re.compile(r"(\w+_)?(hidden_sizes|embed_dims?|dims|channels|num_(attention_)?heads|encoder_hidden_sizes)")
"""Lists with an entry for each stage of a pyramid: their ratios are kept."""
STAGE_DEPTHS = re.compile(r"(\w+_)?(depths|layer_depths|num_blocks|num_layers|decoder_depths|depth)")
DEPTH_NAMES = re.compile(
    r"num_hidden_layers|num_layers|n_layers?|encoder_layers|depth|num_decoder_layers|decoder_layers"
)

DERIVED = ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices")
"""Fields that a config makes from others."""

REPAIRS: dict[str, dict[str, Any]] = {
    "esm": {"pad_token_id": 1, "mask_token_id": 4},  # of a tokenizer, which the default config does not know
    "funnel": {"block_sizes": [2, 2]},  # its depth is a list whose name says sizes
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},  # layer types in a form of its own
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},  # both must multiply up to other fields
    "autoformer": {"prediction_length": 8},  # has no default
    "time_series_transformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},  # two must share
}
"""What no name says, by model type."""


def default_config(model_type: str) -> dict[str, Any]:
    """The default config of a model type as the contents of its config.json; raises what its class raises."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return {**CONFIG_MAPPING[model_type]().to_dict(), "model_type": model_type}


def shrink(raw: Mapping[str, Any], kept: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The config with sizes made small, configs inside it too; fields in `kept` stay as they are."""
    small: dict[str, Any] = {}
    depth = next((v for k, v in raw.items() if DEPTH_NAMES.fullmatch(k) and isinstance(v, int)), 0)
    layers = _layers_kept(raw, depth)
    for name, value in raw.items():
        if name in DERIVED and name not in kept:
            continue
        small[name] = value if name in kept else _shrunk(name, value, raw, layers, depth, kept)
    return {**small, **{k: v for k, v in REPAIRS.get(str(raw.get("model_type")), {}).items() if k not in kept}}


def _shrunk(name: str, value: Any, raw: Mapping[str, Any], layers: list[int], depth: int, kept: frozenset[str]) -> Any:
    if name == "per_layer_config":  # what single layers have otherwise, by index
        return {str(i): v for i, old in enumerate(layers) if (v := _of_layer(value, old)) is not None}
    if isinstance(value, Mapping):
        if "mrope_section" in value and not {"head_dim", "hidden_size"} & kept:
            return {**value, "mrope_section": _sections(value["mrope_section"], raw)}
        is_config = "model_type" in value or name.endswith("_config")
        return shrink(value, kept) if is_config else value
    if name == "vocab_size" and value is None:  # that of a tokenizer, which the default config does not know
        return VOCABULARY
    if name == "head_dim" and value is None and "hidden_size" not in kept:  # some classes take no quotient instead
        return WIDTH // HEADS if raw.get("num_attention_heads") else None
    if name == "num_key_value_heads" and value is not None and value == raw.get("num_attention_heads"):
        return min(value, HEADS)  # one for each query head stays so: latent attention knows no groups
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, (list, tuple)):
        return _shrunk_list(name, list(value), layers, depth)
    if not isinstance(value, int):
        return value
    if re.search(r"token_id$|token_index$|_idx$|_token$", name):
        return _token(name, value, raw)
    if DEPTH_NAMES.fullmatch(name) and depth and value == depth:
        return len(layers)
    return min(value, size) if (size := _size_of(name)) is not None else value


def _of_layer(overrides: Mapping[Any, Any], layer: int) -> dict[str, Any] | None:
    found = overrides.get(layer, overrides.get(str(layer)))
    return None if found is None else shrink(found)


def _sections(sections: list[int], raw: Mapping[str, Any]) -> list[int]:
    """Parts of a rotary embedding, scaled with the width of a head; the last one takes what rounding leaves."""
    old = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    total = sum(sections) * HEAD_DIM // old
    parts = [total * section // sum(sections) for section in sections[:-1]]
    return [*parts, total - sum(parts)]


def _size_of(name: str) -> int | None:
    return next((size for pattern, size in _COMPILED if pattern.fullmatch(name)), None)


def _token(name: str, value: int, raw: Mapping[str, Any]) -> int:
    """A token id below the small vocabulary; ids that differ stay different."""
    if value < 20:
        return value
    others = sorted(
        {v for k, v in raw.items() if k != name and isinstance(v, int) and re.search(r"token_id$|token_index$", k)}
        | {value}
    )
    return 20 + others.index(value)


def _layers_kept(raw: Mapping[str, Any], depth: int) -> list[int]:
    """The layers that stay: the first of each combination of types, at least two."""
    typed = [list(v) for k, v in raw.items() if isinstance(v, (list, tuple)) and len(v) == depth and depth > 2]
    typed = [v for v in typed if all(isinstance(entry, (str, bool)) for entry in v)]
    first: dict[tuple[Any, ...], int] = {}
    for index in range(depth if typed else 0):
        first.setdefault(tuple(v[index] for v in typed), index)
    chosen = sorted(first.values())[:4]
    chosen += [index for index in range(depth) if index not in chosen][: max(0, DEPTH - len(chosen))]
    return sorted(chosen)


def _shrunk_list(name: str, value: list[Any], layers: list[int], depth: int) -> list[Any]:
    if depth > 2 and len(value) == depth:
        return [value[index] for index in layers]
    whole = bool(value) and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    if not whole:
        return value
    if STAGE_DEPTHS.fullmatch(name):
        return [min(entry, 1) for entry in value]
    if re.search(r"_(layers|idxs|ids|indices|indexes)$|^layers_", name) and depth > 2 and max(value) <= depth:
        return sorted({min(entry, len(layers) - 1) for entry in value})
    if STAGED.fullmatch(name) and min(value) > 0:
        return _staged(name, value)
    if (size := _size_of(name)) is not None:
        return [min(entry, size) for entry in value]
    return value


def _staged(name: str, value: list[int]) -> list[int]:
    """Heads over the first stage's, widths in its ratios with the first one at `WIDTH`, all multiples of 8."""
    if name.endswith("heads"):
        return [max(1, entry // value[0]) for entry in value]
    if value[0] <= WIDTH:
        return value
    return [max(8, round(entry * WIDTH / value[0] / 8) * 8) for entry in value]


def attempts(raw: Mapping[str, Any]) -> Iterator[Attempt]:
    """Small configs to try in turn. After each the caller tells the error by `failed`; then fields named in it stay."""
    kept: frozenset[str] = frozenset()
    for _ in range(4):
        attempt = Attempt(shrink(raw, kept))
        yield attempt
        named = fields_named(attempt.error, raw) - kept if attempt.error is not None else set()
        if not named:
            break
        kept |= named
    yield Attempt(shrink(raw, HEAD_WIDTHS))
    yield Attempt(_shallow(raw))


class Attempt:
    """A config to try, and what came of it."""

    __slots__ = ("config", "error")

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.error: BaseException | None = None


def fields_named(error: BaseException, raw: Mapping[str, Any]) -> set[str]:
    """Fields of the config that the message or the last lines of the traceback name."""
    error = error.__context__ or error  # a `PeftcError` is raised while the model's own error is handled
    lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__)[-3:]]
    words = set(re.findall(r"[A-Za-z_]\w*", " ".join([str(error), *lines])))
    return {name for name in _all_fields(raw) if name in words and (_size_of(name) or STAGED.fullmatch(name))}


HEAD_WIDTHS = frozenset({"head_dim", "rope_parameters"})
"""Some models hold the sections of their rotary embedding in code: they need the default width of a head."""


def _all_fields(raw: Mapping[str, Any]) -> set[str]:
    """Names of fields in the config and in those inside it."""
    found: set[str] = set()
    for name, value in raw.items():
        if isinstance(value, Mapping) and ("model_type" in value or str(name).endswith("_config")):
            found |= _all_fields(value)
        elif isinstance(name, str):
            found.add(name)
    return found


def _shallow(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Only the depth and the vocabulary made small: what nearly every model bears."""
    wide = {name for name in _all_fields(raw) if not DEPTH_NAMES.fullmatch(name) and "layer" not in name} - {*DERIVED}
    return shrink(raw, frozenset(wide))
