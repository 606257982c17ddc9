"""Small configs: a default config of any model type with depths, widths, vocabularies and image sizes made small.

Fields are recognised by what their names say (`RULES`); no model type is listed, but for a few repairs. Where a model
does not build, the fields that the failing lines name get their defaults back, and the next try is made (`attempts`).

    raw = shrink(default_config("llama"))
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WIDTH, HEADS, GROUPS, HEAD_DIM, FFN, VOCABULARY, POSITIONS, IMAGE, DEPTH = 64, 4, 2, 16, 128, 199, 64, 64, 2

Rule = tuple[str, int]

RULES: tuple[Rule, ...] = (
    (r"num_(local_)?experts|n_routed_experts|num_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|moe_top_k", 2),
    (r"index_n_heads", 32),  # scores of few heads are often zero in all of them, and the best of those are no one's
    (r"n_group|topk_group|n(um)?_shared_experts", 1),
    (r"(\w+_)?codebook_size", 64),  # some ask for a power of two
    (r"(\w+_)?(vocab_size|vocab_sizes|num_embeddings)(_per_layer_input)?", VOCABULARY),
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
    (r"(\w+_)?image_size|crop_size", IMAGE),
    (r"frames_per_clip|num_frames", 4),
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
    (r"position_buckets", 8),
)  # fmt: skip
"""A pattern for the whole name of a field, and the size it gets where its default is larger. The first one holds."""

_COMPILED = [(re.compile(pattern), size) for pattern, size in RULES]

STAGED = re.compile(r"(\w+_)?(hidden_sizes|embed_dims?|dims|channels|num_(attention_)?heads|encoder_hidden_sizes)")
"""Lists with an entry for each stage of a pyramid: their ratios are kept."""
STAGE_DEPTHS = re.compile(r"(\w+_)?(depths|num_block_repeats|layer_depths|num_blocks|num_layers|decoder_depths|depth)")
DEPTH_NAMES = re.compile(
    r"num_hidden_layers|num_layers|n_layers?|encoder_layers|depth|num_decoder_layers|decoder_layers"
)

DERIVED = ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices")
"""Fields that a config makes from others."""

REPAIRS: dict[str, dict[str, Any]] = {
    "esm": {"pad_token_id": 1, "mask_token_id": 4},  # of a tokenizer, which the default config does not know
    "funnel": {"block_sizes": [2, 2], "block_repeats": [1, 1]},  # its depth is a list whose name says sizes
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},  # its class reads what its config does not have
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "mobilevit": {"image_size": 128},  # its last stage would see a single patch, and attend to nothing else
    "seggpt": {"merge_index": 0},  # below the layers that are read
    "cvt": {"depth": [1, 2, 3]},  # a stage reads the rates of its layers by the number of the stage
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


@dataclass(frozen=True, slots=True)
class Kept:
    """How a config is made small: fields that stay as they are, whether widths are eight times those of the table,
    whether a field without a value gets that of the table."""

    names: frozenset[str] = frozenset()
    wide: bool = False
    filled: bool = False

    def size_of(self, name: str) -> int | None:
        size = _size_of(name)
        return 8 * size if self.wide and size in (WIDTH, HEAD_DIM, 2 * HEAD_DIM) and not _COUNTS.search(name) else size


_COUNTS = re.compile(r"positions|position_embeddings|_len(gth)?$|image_size|codebook|num_|lora")
"""Names of fields that are no widths, though the size that they get may be that of one."""


def shrink(raw: Mapping[str, Any], kept: Kept | frozenset[str] = frozenset()) -> dict[str, Any]:
    """The config with sizes made small, configs inside it too; fields in `kept` stay as they are."""
    how = kept if isinstance(kept, Kept) else Kept(kept)
    small: dict[str, Any] = {}
    depth = next((v for k, v in raw.items() if DEPTH_NAMES.fullmatch(k) and isinstance(v, int)), 0)
    layers = _layers_kept(raw, depth)
    for name, value in raw.items():
        if name in DERIVED and name not in how.names:
            continue
        small[name] = value if name in how.names else _shrunk(name, value, raw, layers, depth, how)
    repairs = {**_related(raw, layers, how), **REPAIRS.get(str(raw.get("model_type")), {})}
    for name, value in repairs.items():
        if name not in how.names:
            inner = isinstance(value, Mapping) and isinstance(small.get(name), Mapping)
            small[name] = {**small[name], **value} if inner else value
    return small


def _related(raw: Mapping[str, Any], layers: list[int], how: Kept) -> dict[str, Any]:
    """Fields that have to fit others: heads of a state-space mixer, parts of a head, layers that share keys."""
    found: dict[str, Any] = {}
    expand = raw.get("mamba_expand", raw.get("expand"))
    heads = next((n for n in ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads") if raw.get(n)), None)
    if isinstance(expand, int) and heads is not None and any("head_dim" in n or "d_head" in n for n in raw):
        found[heads] = expand * WIDTH // HEAD_DIM
    if raw.get("swa_head_dim") and raw.get("qk_nope_head_dim"):
        found["swa_head_dim"] = 2 * HEAD_DIM * (8 if how.wide else 1)
    if raw.get("num_kv_shared_layers") and isinstance(raw.get("layer_types"), (list, tuple)):
        found["num_kv_shared_layers"] = len(layers) // 2
    if "vocabulary_map" in raw and raw["vocabulary_map"] is None:
        found["vocabulary_map"] = {"<image>": 20}  # that of a tokenizer, which the default config does not know
    if isinstance(chosen := raw.get("vision_feature_layer"), (list, tuple)) and min(chosen) >= 0:
        found["vision_feature_layer"] = [max(0, DEPTH - 1 - i) for i, _ in enumerate(chosen)]
    if raw.get("coordinate_size") and raw.get("shape_size"):  # four and two of them side by side
        found.update(coordinate_size=WIDTH // 8, shape_size=WIDTH // 4)
    found.update({n: 20 for n in raw if re.fullmatch(r"(image|audio|video)_token_(id|index)", n) and raw[n] is None})
    if "width_coefficient" in raw:
        found.update(width_coefficient=1.0, depth_coefficient=1.0)
    return found


def _shrunk(name: str, value: Any, raw: Mapping[str, Any], layers: list[int], depth: int, how: Kept) -> Any:
    if name == "per_layer_config":  # what single layers have otherwise, by index
        return {str(i): v for i, old in enumerate(layers) if (v := _of_layer(value, old)) is not None}
    if isinstance(value, Mapping):
        if "mrope_section" in value and not {"head_dim", "hidden_size"} & how.names and not how.wide:
            return {**value, "mrope_section": _sections(value["mrope_section"], raw)}
        is_config = "model_type" in value or name.endswith("_config")
        return shrink(value, how) if is_config else value
    if name == "vocab_size" and value is None:  # that of a tokenizer, which the default config does not know
        return VOCABULARY
    if name == "head_dim" and value is None and "hidden_size" not in how.names:  # some classes take no quotient instead
        return (how.size_of("hidden_size") or WIDTH) // HEADS if raw.get("num_attention_heads") else None
    if name == "num_key_value_heads" and value is not None and value == raw.get("num_attention_heads"):
        return min(value, HEADS)  # one for each query head stays so: latent attention knows no groups
    if value is None and how.filled:
        return _size_of(name)
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, (list, tuple)):
        return _shrunk_list(name, list(value), layers, depth, how)
    if not isinstance(value, int):
        return value
    if re.search(r"token_id$|token_index$|_idx$|_token$", name):
        return _token(name, value, raw)
    if DEPTH_NAMES.fullmatch(name) and depth and value == depth:
        return len(layers)
    return min(value, size) if (size := how.size_of(name)) is not None else value


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
    if raw.get("num_kv_shared_layers") and typed:  # each of those has to find a layer of its type ahead of it
        chosen += [max(i for i in range(depth) if [v[i] for v in typed] == [v[j] for v in typed]) for j in chosen]
    chosen += [index for index in range(depth) if index not in chosen][: max(0, DEPTH - len(chosen))]
    return sorted(chosen)


def _shrunk_list(name: str, value: list[Any], layers: list[int], depth: int, how: Kept) -> list[Any]:
    if depth > 2 and len(value) == depth:
        return [value[index] for index in layers]
    whole = bool(value) and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    if not whole:
        return value
    if STAGE_DEPTHS.fullmatch(name):
        return [min(entry, 1) for entry in value]
    if re.search(r"_(layers|idxs|ids|indices|indexes|layer_ids)$|^layers_", name) and depth > 2 and max(value) <= depth:
        return sorted({min(entry, len(layers) - 1) for entry in value})
    if STAGED.fullmatch(name) and min(value) > 0:
        return _staged(name, value)
    if (size := how.size_of(name)) is not None:
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
    kept = Kept()
    for _ in range(4):
        attempt = Attempt(shrink(raw, kept))
        yield attempt
        if not kept.filled and (isinstance(attempt.error, TypeError) or "None" in str(attempt.error)):
            kept = Kept(kept.names, filled=True)
            continue
        named = fields_named(attempt.error, raw) - kept.names if attempt.error is not None else set()
        if not named:
            break
        kept = Kept(kept.names | named, filled=kept.filled)
    yield Attempt(shrink(raw, Kept(wide=True, filled=kept.filled)))
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
