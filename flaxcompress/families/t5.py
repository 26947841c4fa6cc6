"""T5 (Raffel et al. 2020) and T5 1.1 (Shazeer 2020): an encoder and a decoder, or the encoder alone.

Pre-norm with RMS norms, a relative position bias in each stack, no biases, scores that are not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig, Sharing
from flaxcompress.families.base import Family, Names, activation, head_of, required

_POSITIONS = 2048  # positions are relative, so that no table ends here: a bound for callers
_HEADS = {"seq2seq_lm": ("T5ForConditionalGeneration",)}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """transformers' T5Config -> ModelConfig; without a decoder for the architecture T5EncoderModel."""
    required(hf, "t5", ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff"))
    kind = hf.get("feed_forward_proj", "relu")
    gated = kind.startswith("gated-")
    name = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    layers = hf["num_layers"]
    same: dict[str, Any] = {
        "family": "t5",
        "width": hf["d_model"],
        "heads": hf["num_heads"],
        "head_width": hf.get("d_kv", 64),
        "feed_forward_width": hf["d_ff"],
        "positions": max(_POSITIONS, hf.get("n_positions") or 0),
        "segments": 0,
        "relative_buckets": hf.get("relative_attention_num_buckets", 32),
        "relative_distance": hf.get("relative_attention_max_distance", 128),
        "activation": activation({"feed_forward_proj": name}, "feed_forward_proj"),
        "gated": gated,
        "norm": "rms",
        "norm_place": "pre",
        "norm_epsilon": hf.get("layer_norm_epsilon", 1e-6),
        "final_norm": True,
        "dropout": hf.get("dropout_rate", 0.1),
        "attention_dropout": hf.get("dropout_rate", 0.1),
        "initializer_range": 0.02 * hf.get("initializer_factor", 1.0),
        "pad_token": hf.get("pad_token_id") or 0,
        "pooler": False,
        "position_embedding": "none",
        "embedding_norm": False,
        "attention_scale": 1.0,
        **dict.fromkeys(("attention_bias", "output_bias", "feed_forward_bias"), False),
    }
    decoder = None
    if "T5EncoderModel" not in (hf.get("architectures") or []) and hf.get("is_encoder_decoder", True):
        count = hf.get("num_decoder_layers") or layers
        sharing = Sharing.own(count, cross_attention=True)
        decoder = ModelConfig(**{**same, "vocabulary": 0, "layers": count, "causal": True, "sharing": sharing})
    tied = hf.get("tie_word_embeddings", True) is not False
    scaled = hf.get("scale_decoder_outputs", tied)
    return ModelConfig(
        **same,
        vocabulary=hf["vocab_size"],
        layers=layers,
        decoder=decoder,
        head=head_of(hf, _HEADS) if decoder else "none",
        tied=tied,
        logit_scale=hf["d_model"] ** -0.5 if scaled else 1.0,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`. Raises ValueError for a feed-forward that T5's config cannot say."""
    kinds = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}
    kind = kinds[config.activation]
    if config.gated:
        if kind == "gelu":
            raise ValueError("export: T5's config has no gated exact GELU, only its tanh approximation")
        kind = "gated-gelu" if kind == "gelu_new" else f"gated-{kind}"
    plain = "T5EncoderModel" if config.decoder is None else "T5Model"
    return {
        "model_type": "t5",
        "architectures": [_HEADS[config.head][0] if config.head in _HEADS else plain],
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.feed_forward_width,
        "num_layers": config.layers,
        "num_decoder_layers": (config.decoder or config).layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "n_positions": config.positions,
        "feed_forward_proj": kind,
        "layer_norm_epsilon": config.norm_epsilon,
        "dropout_rate": config.dropout,
        "initializer_factor": config.initializer_range / 0.02,
        "pad_token_id": config.pad_token,
        "decoder_start_token_id": config.pad_token,
        "is_encoder_decoder": config.decoder is not None,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.logit_scale != 1.0,
    }


def _stack_names(out: Names, config: ModelConfig, ours: str, theirs: str) -> None:
    for layer in range(config.layers):
        at, block = f"{ours}layers/{layer}", f"{theirs}.block.{layer}.layer"
        parts = [("attention", "0.SelfAttention")]
        parts += [("cross_attention", "1.EncDecAttention")] if config.sharing.cross_attention else []
        for part, name in parts:
            for projection in ("query", "key", "value", "output"):
                out.linear(f"{at}/{part}/{projection}", f"{block}.{name}.{projection[0]}", bias=False)
            out.norm(f"{at}/norms/{part}", f"{block}.{name[0]}.layer_norm", bias=False)
        last = f"{block}.{len(parts)}"
        up, gate = ("wi_1", "wi_0") if config.gated else ("wi", "")
        for name, short in (("gate", gate), ("up", up), ("down", "wo")):
            if short:
                out.linear(f"{at}/feed_forward/{name}", f"{last}.DenseReluDense.{short}", bias=False)
        out.norm(f"{at}/norms/feed_forward", f"{last}.layer_norm", bias=False)
    out.table(f"{ours}relative_bias/table", f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias")
    out.norm(f"{ours}final_norm", f"{theirs}.final_layer_norm", bias=False)


def names(config: ModelConfig) -> Names:
    """Where a checkpoint holds every weight."""
    out = Names()
    out.table("embedding/token", "shared")
    _stack_names(out, config, "", "encoder")
    if config.decoder is not None:
        _stack_names(out, config.decoder, "decoder/", "decoder")
    if config.head == "seq2seq_lm" and not config.tied:
        out.linear("head/output", "lm_head", bias=False)
    return out


FAMILY = Family(
    model_type="t5",
    read_config=read_config,
    write_config=write_config,
    names=names,
    heads=_HEADS,
    base="",
    own_head="lm_head.weight",
    ignored=(
        r"(en|de)coder\.embed_tokens\.weight",  # copies of the token table
        r"lm_head\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # never read
    ),
    head_prefixes=("lm_head.", "classification_head.", "classifier.", "qa_outputs.", "decoder."),
)
