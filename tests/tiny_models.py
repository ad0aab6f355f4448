"""Tiny random models: some made by hand, and one of every type, a config class's own defaults made small."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel
from transformers.models.auto import modeling_auto as auto

from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.hooks import tap

SMALL: dict[str, Any] = {
    # width
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "dim": 32,
    "emb_dim": 32,
    "word_embed_proj_dim": 32,
    "attention_hidden_size": 32,
    "lru_width": 32,
    "projection_dim": 32,
    "out_hidden_size": 32,
    "hidden_dim": 32,
    "mamba_d_ssm": 32,
    "width": 32,
    "text_hidden_size": 32,
    # inner width
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "dim_ff": 48,
    "feed_forward_size": 48,
    "d_inner": 48,
    "ffn_hidden_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "mlp_dim": 48,
    "inner_dim": 48,
    "dff": 48,
    "intermediate_size_mlp": 48,
    "shared_intermediate_size": 48,
    "moe_intermediate_size": 16,
    "expert_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "dense_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 16,
    "block_ff_dim": 48,
    # depth
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_decoder_layers": 4,
    "num_encoder_layers": 2,
    "depth": 2,
    # heads
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "kv_channels": 8,
    # latent attention and experts
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    # states
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_headdim": 8,
    "n_mamba_heads": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    # text
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "context_length": 64,
    "sliding_window": 8,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 8,
    # pictures
    "image_size": 16,
    "patch_size": 8,
    "base_channels": 32,
    "num_res_blocks": 1,
    "output_channels": 32,
    "vision_output_dim": 32,
    "projector_hidden_size": 32,
    "projector_dim": 32,
    "pixel_shuffle_ratio": 0.5,
    "shape_embed_dim": 8,
    "pronunciation_embed_dim": 8,
    "shape_vocab_size": 10,
    "pronunciation_vocab_size": 10,
    "ext_pw_out_channel": 32,
    "nemo_conv_channels": 32,
    "downsample_hidden_size": 32,
    "adapter_out_dim": 32,
}
PLACES = {
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "image_token_index",
    "audio_token_id",
}


def shrink(cls: type, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a small config of this class; `changes` may hold dicts for its parts."""
    default: Any = cls()
    parts = {name for name in cls.sub_configs if getattr(default, name, None) is not None}  # type: ignore[attr-defined]
    names = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    small: dict[str, Any] = {}
    for name, declared in names.items():
        try:
            value = getattr(default, name, None)
        except RuntimeError:  # it differs from block to block
            value = declared
        if name in SMALL and name not in parts:
            if isinstance(value, (int, float)) or name in ("head_dim", "num_key_value_heads"):
                small[name] = SMALL[name]
    if "kv_lora_rank" in names:
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= {name: 150 + number for number, name in enumerate(sorted(PLACES & set(names)))}
    for name in parts:
        part = type(getattr(default, name))
        small[name] = shrink(part, changes.get(name, {})) | {"model_type": part.model_type}
    return small | {k: v for k, v in changes.items() if k not in parts}


MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
BOTH = {"rope_type": "default", "rope_theta": 10_000.0}
KINDS = ["sliding_attention", "full_attention"]
CHANGES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "cohere_compass": {"text_config": {"rope_parameters": dict.fromkeys(KINDS, BOTH)}},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(KINDS, BOTH)},
    "cosmos3_edge": {"text_config": {"rope_parameters": MROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32},
    },
    "deepseek_ocr2": {"text_config": MOE | {"mlp_layer_types": ["dense", "sparse"] * 2}},
    "deepseek_v2": MOE | {"topk_method": "greedy"},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots1": MOE,
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense"] * 4, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "emu3": {
        "vocabulary_map": {"<image>": 150, "<|extra_200|>": 151},
        "vq_config": {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1]},
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 150},
        "vq_config": {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1]},
    },
    "ernie4_5_moe": {"moe_k": 2},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_k": 2,
            "moe_intermediate_size": [16, 16],
            "rope_parameters": MROPE | {"mrope_section": [1, 1, 2]},
        }
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": KINDS * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 160,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "glm46v": {"text_config": {"rope_parameters": MROPE}},
    "glm4v": {"text_config": {"rope_parameters": MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 0]}}},
    "glm_ocr": {"text_config": {"rope_parameters": MROPE}},
    "glmga": {"text_config": {"rope_parameters": MROPE}},
    "glm5_next": {
        "text_config": {
            "index_kpool": 4,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        }
    },
    "inkling2": {"text_config": {"initializer_range": 0.05}},
    "inkling_mm_model": {"text_config": {"initializer_range": 0.05}},
    "inkling_text": {"initializer_range": 0.05},
    "inkling2_text": {"initializer_range": 0.05},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granite4_vision": {
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": MROPE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config": {"cross_attention_layers": [2]}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "muse_spark": {"text_config": {"initializer_range": 0.05}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen3_5_moe": {"text_config": {"initializer_range": 0.05}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": MROPE}, "vision_start_token_id": 155},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 155},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local"] * 4,
        "local_attn_chunk_length": 8,
        "is_decoder": True,
        "attention_head_size": 8,
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


CAUSAL = list(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEEING = [name for name in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL]
TYPES = CAUSAL + SEEING


def tiny_config(name: str, **changes: Any) -> Any:
    """A small config of this model type; `changes` are put on top of those above."""
    cls = CONFIG_MAPPING[name]
    return cls(**shrink(cls, CHANGES.get(name, {}) | changes))


def save_tiny(name: str, folder: str, **changes: Any) -> Any:
    """Saves a tiny random model of this type, as `AutoModel` builds it; returns it, in eval mode."""
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config(name, **changes)).float().eval()
    model.save_pretrained(folder)
    return model


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


WINDOW = 4  # tokens; the text is longer


LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"] * 2


def build(kind: str, folder: str | Path, **changes: Any) -> str:
    """Saves a tiny random model with an LM head; returns its folder."""
    extra = {"layer_types": LAYER_TYPES, "sliding_window": WINDOW} if kind == "Gemma3" else {}
    config_class = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, config_class)(**SIZES | extra | changes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).float().save_pretrained(folder)
    return str(folder)


def full_model(folder: str, **options: Any) -> nn.Module:
    """All its blocks, as transformers loads them."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()


def cut_model(folder: str | Path, layers: list[int], **options: Any) -> nn.Module:
    """On the CPU, where the full one is, too."""
    return load_backbone(str(folder), layers, "float32", device_map="cpu", **options)


def token_ids(seed: int = 0) -> Tensor:
    """Random text [B, T]."""
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: nn.Module, layers: list[int], ids: Tensor | None = None) -> dict[int, Tensor]:
    """What `tap` reads in one forward pass."""
    blocks = decoder_layers(model)
    with tap({layer: blocks[layer] for layer in layers}) as taken:
        model(input_ids=token_ids() if ids is None else ids, use_cache=False)
        return {layer: acts.clone() for layer, acts in taken.items()}


@torch.no_grad()
def hidden_states(model: nn.Module) -> tuple[Tensor, ...]:
    """Transformers' own [B, T, D] for `token_ids()`, the embedding first."""
    return model(input_ids=token_ids(), use_cache=False, output_hidden_states=True).hidden_states


@torch.no_grad()
def states(model: Any, ids: Tensor) -> list[Tensor]:
    """Transformers' hidden states [T, D] of one chain, the embedding first."""
    return [h[0] for h in model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states]
