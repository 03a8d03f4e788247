"""transformers: encoders, decoders, encoder-decoders, vision, audio, multimodal, mixtures of experts and state space models."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as tr

from tests.zoo.entry import Entry, Inputs, image

VOCABULARY = 99
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_MOE = {
    **_GQA,
    "intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_VIT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
_SPEECH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": False,
}


def text(length: int = 9, batch: int = 2, **extra: Any) -> Callable[[], Inputs]:
    """Token numbers with a padding mask, int64 ``[batch, length]``."""

    def make() -> Inputs:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, -2:] = 0
        return (), {"input_ids": _tokens(length, batch), "attention_mask": mask, **extra}

    return make


def unmasked(length: int = 9, batch: int = 2) -> Callable[[], Inputs]:
    """Token numbers alone."""
    return lambda: ((), {"input_ids": _tokens(length, batch)})


def pairs() -> Inputs:
    """Tokens for the encoder and for the decoder."""
    return (), {"input_ids": _tokens(9, 2), "decoder_input_ids": _tokens(5, 2)}


def sound() -> Inputs:
    """A wave, float32 ``[2, 1024]``."""
    return (), {"input_values": torch.randn(2, 1024)}


def _tokens(length: int, batch: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


# name -> (kind, model class, configuration class, its arguments, inputs)
Spec = tuple[str, str, str, dict[str, Any], Callable[[], Inputs]]
MODELS: dict[str, Spec] = {
    # encoders
    "bert": ("encoder", "BertForSequenceClassification", "BertConfig", _TEXT, text()),
    "bert_decoder": ("encoder", "BertLMHeadModel", "BertConfig", {**_TEXT, "is_decoder": True}, text()),
    "roberta": ("encoder", "RobertaModel", "RobertaConfig", _TEXT, text()),
    "distilbert": (
        "encoder",
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 37,
            "max_position_embeddings": 64,
        },
        text(),
    ),
    "albert": ("encoder", "AlbertModel", "AlbertConfig", {**_TEXT, "embedding_size": 16}, text()),
    "electra": ("encoder", "ElectraModel", "ElectraConfig", {**_TEXT, "embedding_size": 16}, text()),
    "deberta": (
        "encoder",
        "DebertaModel",
        "DebertaConfig",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        text(),
    ),
    "deberta_v2": (
        "encoder",
        "DebertaV2Model",
        "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
        text(),
    ),
    "mpnet": ("encoder", "MPNetModel", "MPNetConfig", _TEXT, text()),
    "modernbert": ("encoder", "ModernBertModel", "ModernBertConfig", {**_TEXT, "intermediate_size": 36}, text()),
    "convbert": ("encoder", "ConvBertModel", "ConvBertConfig", {**_TEXT, "embedding_size": 32}, text(10)),
    "fnet": ("encoder", "FNetModel", "FNetConfig", _TEXT, unmasked()),
    "roformer": ("encoder", "RoFormerModel", "RoFormerConfig", {**_TEXT, "embedding_size": 32}, text()),
    "squeezebert": (
        "encoder",
        "SqueezeBertModel",
        "SqueezeBertConfig",
        {**_TEXT, "embedding_size": 32, "intermediate_size": 36},
        text(),
    ),
    "mobilebert": (
        "encoder",
        "MobileBertModel",
        "MobileBertConfig",
        {**_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        text(),
    ),
    "longformer": ("encoder", "LongformerModel", "LongformerConfig", {**_TEXT, "attention_window": 4}, text(8)),
    "bigbird": ("encoder", "BigBirdModel", "BigBirdConfig", {**_TEXT, "attention_type": "original_full"}, text()),
    "xlnet": (
        "encoder",
        "XLNetModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37},
        text(),
    ),
    "funnel": (
        "encoder",
        "FunnelModel",
        "FunnelConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 37,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
        text(8),
    ),
    # decoders
    "gpt2": ("decoder", "GPT2LMHeadModel", "GPT2Config", _GPT, text()),
    "gpt_neo": (
        "decoder",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**_TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        text(),
    ),
    "gpt_neox": ("decoder", "GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, text()),
    "gptj": ("decoder", "GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}, text()),
    "opt": (
        "decoder",
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, "ffn_dim": 37, "word_embed_proj_dim": 32},
        text(),
    ),
    "bloom": (
        "decoder",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        text(),
    ),
    "falcon": ("decoder", "FalconForCausalLM", "FalconConfig", _TEXT, text()),
    "llama": ("decoder", "LlamaForCausalLM", "LlamaConfig", _GQA, text()),
    "mistral": ("decoder", "MistralForCausalLM", "MistralConfig", {**_GQA, "sliding_window": 4}, text()),
    "qwen2": ("decoder", "Qwen2ForCausalLM", "Qwen2Config", _GQA, text()),
    "qwen3": ("decoder", "Qwen3ForCausalLM", "Qwen3Config", {**_GQA, "head_dim": 8}, text()),
    "gemma2": (
        "decoder",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GQA, "head_dim": 8, "query_pre_attn_scalar": 8},
        text(),
    ),
    "gemma3": (
        "decoder",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GQA, "head_dim": 8, "sliding_window": 4},
        text(),
    ),
    "phi": ("decoder", "PhiForCausalLM", "PhiConfig", _TEXT, text()),
    "phi3": ("decoder", "Phi3ForCausalLM", "Phi3Config", _GQA, text()),
    "stablelm": ("decoder", "StableLmForCausalLM", "StableLmConfig", _GQA, text()),
    "olmo2": ("decoder", "Olmo2ForCausalLM", "Olmo2Config", _GQA, text()),
    "cohere": ("decoder", "CohereForCausalLM", "CohereConfig", _GQA, text()),
    "starcoder2": ("decoder", "Starcoder2ForCausalLM", "Starcoder2Config", _GQA, text()),
    "mpt": (
        "decoder",
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        text(),
    ),
    "ctrl": ("decoder", "CTRLLMHeadModel", "CTRLConfig", {**_GPT, "dff": 37}, text()),
    # encoder and decoder
    "t5": (
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        pairs,
    ),
    "bart": ("encoder-decoder", "BartForConditionalGeneration", "BartConfig", _SEQ2SEQ, pairs),
    "marian": ("encoder-decoder", "MarianMTModel", "MarianConfig", _SEQ2SEQ, pairs),
    "pegasus": ("encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", _SEQ2SEQ, pairs),
    "blenderbot": ("encoder-decoder", "BlenderbotForConditionalGeneration", "BlenderbotConfig", _SEQ2SEQ, pairs),
    "m2m_100": ("encoder-decoder", "M2M100ForConditionalGeneration", "M2M100Config", _SEQ2SEQ, pairs),
    "led": ("encoder-decoder", "LEDForConditionalGeneration", "LEDConfig", {**_SEQ2SEQ, "attention_window": 4}, pairs),
    "switch_transformers": (
        "mixture of experts",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "num_experts": 4,
            "expert_capacity": 8,
            "decoder_start_token_id": 0,
        },
        pairs,
    ),
    # mixtures of experts
    "mixtral": ("mixture of experts", "MixtralForCausalLM", "MixtralConfig", _MOE, text()),
    "qwen2_moe": (
        "mixture of experts",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_MOE, "shared_expert_intermediate_size": 16},
        text(),
    ),
    "qwen3_moe": ("mixture of experts", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_MOE, "head_dim": 8}, text()),
    "olmoe": ("mixture of experts", "OlmoeForCausalLM", "OlmoeConfig", _MOE, text()),
    "granitemoe": ("mixture of experts", "GraniteMoeForCausalLM", "GraniteMoeConfig", _MOE, text()),
    "deepseek_v3": (
        "mixture of experts",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_TEXT,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        text(),
    ),
    "gpt_oss": (
        "mixture of experts",
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_MOE, "head_dim": 8, "sliding_window": 4},
        text(),
    ),
    # state space models and other recurrences
    "mamba": (
        "state space",
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        unmasked(),
    ),
    "mamba2": (
        "state space",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
        unmasked(),
    ),
    "falcon_mamba": (
        "state space",
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        unmasked(),
    ),
    "recurrent_gemma": (
        "state space",
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **_GQA,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "lru_width": 32,
            "attention_window_size": 8,
            "intermediate_size": 36,
        },
        text(),
    ),
    "rwkv": (
        "state space",
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        unmasked(),
    ),
    # vision
    "vit": ("vision", "ViTForImageClassification", "ViTConfig", _VIT, image(32, 2)),
    "deit": ("vision", "DeiTModel", "DeiTConfig", _VIT, image(32, 2)),
    "beit": ("vision", "BeitModel", "BeitConfig", {**_VIT, "use_relative_position_bias": True}, image(32, 2)),
    "dinov2": ("vision", "Dinov2Model", "Dinov2Config", _VIT, image(32, 2)),
    "vit_mae": (
        "vision",
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **_VIT,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 17,
        },
        image(32, 2),
    ),
    "swin": (
        "vision",
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2},
        image(32, 2),
    ),
    "swinv2": (
        "vision",
        "Swinv2Model",
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2},
        image(32, 2),
    ),
    "convnext": (
        "vision",
        "ConvNextModel",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
        image(64, 2),
    ),
    "convnextv2": (
        "vision",
        "ConvNextV2Model",
        "ConvNextV2Config",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
        image(64, 2),
    ),
    "resnet": (
        "vision",
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        image(64, 2),
    ),
    "regnet": (
        "vision",
        "RegNetModel",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
        image(64, 2),
    ),
    "segformer": (
        "vision",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
        image(64, 2),
    ),
    "poolformer": (
        "vision",
        "PoolFormerModel",
        "PoolFormerConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        image(64, 2),
    ),
    "mobilevit": (
        "vision",
        "MobileViTModel",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 16, 16]},
        image(64, 2),
    ),
    "dpt": (
        "vision",
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **_VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
        image(32, 2),
    ),
    # audio
    "wav2vec2": ("audio", "Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, sound),
    "hubert": ("audio", "HubertModel", "HubertConfig", _SPEECH, sound),
    "whisper": (
        "audio",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        lambda: ((), {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": _tokens(5, 2)}),
    ),
    "audio_spectrogram_transformer": (
        "audio",
        "ASTModel",
        "ASTConfig",
        {**_VIT, "max_length": 24, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
        lambda: ((torch.randn(2, 24, 16),), {}),
    ),
    # text and images
    "clip": (
        "multimodal",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_TEXT, "eos_token_id": 98}, "vision_config": _VIT, "projection_dim": 16},
        lambda: ((), {"input_ids": _tokens(7, 2), "pixel_values": torch.randn(2, 3, 32, 32)}),
    ),
    "siglip": (
        "multimodal",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_TEXT, "projection_size": 32}, "vision_config": _VIT},
        lambda: ((), {"input_ids": _tokens(7, 2), "pixel_values": torch.randn(2, 3, 32, 32)}),
    ),
    "vilt": (
        "multimodal",
        "ViltModel",
        "ViltConfig",
        {**_TEXT, **_VIT, "max_image_length": 4},
        lambda: ((), {"input_ids": _tokens(7, 2), "pixel_values": torch.randn(2, 3, 32, 32)}),
    ),
    # other
    "autoformer": (
        "time series",
        "TimeSeriesTransformerModel",
        "TimeSeriesTransformerConfig",
        {
            "prediction_length": 4,
            "context_length": 6,
            "lags_sequence": [1, 2],
            "num_time_features": 1,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 8,
            "decoder_ffn_dim": 8,
        },
        lambda: (
            (),
            {
                "past_values": torch.randn(2, 8),
                "past_time_features": torch.randn(2, 8, 1),
                "past_observed_mask": torch.ones(2, 8),
                "future_values": torch.randn(2, 4),
                "future_time_features": torch.randn(2, 4, 1),
            },
        ),
    ),
    "decision_transformer": (
        "reinforcement learning",
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "max_ep_len": 20, "n_layer": 2, "n_head": 4},
        lambda: (
            (),
            {
                "states": torch.randn(2, 4, 5),
                "actions": torch.randn(2, 4, 3),
                "rewards": torch.randn(2, 4, 1),
                "returns_to_go": torch.randn(2, 4, 1),
                "timesteps": torch.arange(4).expand(2, 4),
                "attention_mask": torch.ones(2, 4),
            },
        ),
    ),
}
IN_CI = {"bert", "deberta_v2", "llama", "t5", "mixtral", "mamba", "swin", "wav2vec2", "clip", "xlnet"}


def entries() -> Iterator[Entry]:
    """All transformers models of the zoo."""
    tr.logging.set_verbosity_error()
    for name, (kind, model, config, arguments, inputs) in MODELS.items():

        def build(model: str = model, config: str = config, arguments: dict[str, Any] = arguments) -> Any:
            return getattr(tr, model)(getattr(tr, config)(**arguments))

        yield Entry(f"transformers/{name}", kind, build, inputs, ci=name in IN_CI)
