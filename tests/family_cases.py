"""Randomly drawn configs of every family in transformers, perturbed and saved, for several test files."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from quick import quick

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DRAWS = 3
RELATIVE = 2e-4  # of the largest value; float32 through up to five layers


def encoder(rng, **more):
    heads = int(rng.integers(1, 5))
    return {
        "vocab_size": int(rng.integers(20, 90)),
        "hidden_size": heads * int(rng.integers(2, 9)),
        "num_hidden_layers": int(rng.integers(1, 6)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(5, 40)),
        "max_position_embeddings": int(rng.integers(20, 40)),
        "hidden_act": str(rng.choice(["gelu", "gelu_new", "relu", "silu"])),
        "layer_norm_eps": float(rng.choice([1e-12, 1e-5])),
        **more,
    }


def with_segments(rng, **more):
    return encoder(rng, type_vocab_size=int(rng.integers(1, 4)), **more)


def distilbert(rng):
    base = encoder(rng)
    return {
        "vocab_size": base["vocab_size"],
        "dim": base["hidden_size"],
        "n_layers": base["num_hidden_layers"],
        "n_heads": base["num_attention_heads"],
        "hidden_dim": base["intermediate_size"],
        "max_position_embeddings": base["max_position_embeddings"],
        "activation": base["hidden_act"] if base["hidden_act"] in ("gelu", "relu") else "gelu",
    }


def albert(rng):
    base = with_segments(rng, embedding_size=int(rng.integers(2, 9)))
    return {**base, "num_hidden_groups": int(rng.integers(1, base["num_hidden_layers"] + 1))}


def electra(rng):
    return with_segments(rng, embedding_size=int(rng.integers(2, 9)))


def modernbert(rng):
    base = encoder(rng)
    heads, width = base["num_attention_heads"], 2 * int(rng.integers(1, 5))
    layers = base["num_hidden_layers"]
    return {
        "vocab_size": base["vocab_size"],
        "hidden_size": heads * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": base["intermediate_size"],
        "max_position_embeddings": base["max_position_embeddings"],
        "hidden_activation": base["hidden_act"],
        "classifier_activation": str(rng.choice(["gelu", "silu"])),
        "classifier_bias": bool(rng.integers(2)),
        "classifier_pooling": str(rng.choice(["cls", "mean"])),
        "norm_bias": bool(rng.integers(2)),
        "attention_bias": bool(rng.integers(2)),
        "mlp_bias": bool(rng.integers(2)),
        "local_attention": 2 * int(rng.integers(1, 6)),
        "layer_types": [str(rng.choice(["full_attention", "sliding_attention"])) for _ in range(layers)],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 160.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    }


def gpt2(rng):
    base = encoder(rng)
    return {
        "vocab_size": base["vocab_size"],
        "n_embd": base["hidden_size"],
        "n_layer": base["num_hidden_layers"],
        "n_head": base["num_attention_heads"],
        "n_inner": [None, base["intermediate_size"]][int(rng.integers(2))],
        "n_positions": base["max_position_embeddings"],
        "activation_function": base["hidden_act"],
        "layer_norm_epsilon": base["layer_norm_eps"],
        "tie_word_embeddings": bool(rng.integers(2)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


_ROPES = (
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "beta_fast": 3.0,
        "original_max_position_embeddings": 16,
    },
)
_DEEPSEEK_ROPES = (
    *_ROPES,
    {**_ROPES[3], "mscale": 0.7, "mscale_all_dim": 1.2},
    {**_ROPES[3], "mscale": 1.0, "mscale_all_dim": 1.0, "beta_slow": 0.5, "truncate": False},
)


def llama(rng, **more):
    base, groups = encoder(rng), int(rng.integers(1, 4))
    return {
        "vocab_size": base["vocab_size"],
        "hidden_size": int(rng.integers(5, 30)),
        "num_hidden_layers": base["num_hidden_layers"],
        "num_attention_heads": groups * int(rng.integers(1, 4)),
        "num_key_value_heads": groups,
        "head_dim": 2 * int(rng.integers(1, 6)),
        "intermediate_size": base["intermediate_size"],
        "max_position_embeddings": base["max_position_embeddings"],
        "hidden_act": base["hidden_act"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": dict(_ROPES[int(rng.integers(len(_ROPES)))]),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def llama_biased(rng):  # transformers refuses a width that heads do not divide, whatever head_dim says
    base = llama(rng, attention_bias=bool(rng.integers(2)), mlp_bias=bool(rng.integers(2)))
    return {**base, "hidden_size": base["num_attention_heads"] * int(rng.integers(2, 6))}


def mistral(rng):
    return llama(rng, sliding_window=[None, int(rng.integers(2, 12))][int(rng.integers(2))])


def qwen(rng):
    base = llama(rng)
    types = [str(rng.choice(["full_attention", "sliding_attention"])) for _ in range(base["num_hidden_layers"])]
    local = {"use_sliding_window": True, "sliding_window": int(rng.integers(2, 12)), "layer_types": types}
    return {**base, **(local if rng.integers(2) else {})}


def qwen2(rng):  # whose heads are as wide as the width allows
    base = qwen(rng)
    return {**base, "hidden_size": base["num_attention_heads"] * base.pop("head_dim")}


def qwen3(rng):
    return {**qwen(rng), "attention_bias": bool(rng.integers(2))}


def t5(rng):
    base = llama(rng)
    buckets = 4 * int(rng.integers(1, 5))
    return {
        "vocab_size": base["vocab_size"],
        "d_model": base["hidden_size"],
        "d_kv": base["head_dim"],
        "d_ff": base["intermediate_size"],
        "num_layers": base["num_hidden_layers"],
        "num_decoder_layers": int(rng.integers(1, base["num_hidden_layers"] + 1)),  # more breaks transformers' cache
        "num_heads": base["num_attention_heads"],
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": buckets + int(rng.integers(0, 20)),
        "feed_forward_proj": str(rng.choice(["relu", "gated-gelu", "gated-silu"])),
        "tie_word_embeddings": bool(rng.integers(2)),  # which transformers reads as whether logits are scaled
        "decoder_start_token_id": 0,
    }


def marian(rng):
    heads, other = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    vocabulary = int(rng.integers(20, 90))
    return {
        "vocab_size": vocabulary,
        "d_model": heads * other * int(rng.integers(2, 6)),
        "encoder_layers": int(rng.integers(1, 4)),
        "decoder_layers": int(rng.integers(1, 4)),
        "encoder_attention_heads": heads,
        "decoder_attention_heads": other,
        "encoder_ffn_dim": int(rng.integers(5, 40)),
        "decoder_ffn_dim": int(rng.integers(5, 40)),
        "max_position_embeddings": int(rng.integers(20, 40)),
        "activation_function": str(rng.choice(["gelu", "swish", "relu"])),
        "scale_embedding": bool(rng.integers(2)),
        "pad_token_id": vocabulary - 1,
        "decoder_start_token_id": vocabulary - 1,
        "eos_token_id": 2,
        "forced_eos_token_id": None,
    }


def deepseek(rng, **more):
    base = encoder(rng)
    layers = base["num_hidden_layers"]
    return {
        "vocab_size": base["vocab_size"],
        "hidden_size": base["hidden_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": base["num_attention_heads"],
        "num_key_value_heads": base["num_attention_heads"],
        "intermediate_size": base["intermediate_size"],
        "max_position_embeddings": base["max_position_embeddings"],
        "hidden_act": base["hidden_act"],
        "rms_norm_eps": 1e-5,  # not that of the norms of latents
        "q_lora_rank": [None, int(rng.integers(2, 9))][int(rng.integers(2))],
        "kv_lora_rank": int(rng.integers(2, 9)),
        "qk_rope_head_dim": 2 * int(rng.integers(1, 4)),
        "qk_nope_head_dim": int(rng.integers(1, 7)),
        "v_head_dim": int(rng.integers(1, 7)),
        "first_k_dense_replace": layers,
        "attention_bias": bool(rng.integers(2)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": dict(_DEEPSEEK_ROPES[int(rng.integers(len(_DEEPSEEK_ROPES)))]),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def deepseek_v2(rng):
    base = deepseek(rng, mlp_bias=bool(rng.integers(2)))
    even = {
        name: 2 * base[name] for name in ("kv_lora_rank", "qk_nope_head_dim")
    }  # transformers views pairs as complex
    return {**base, **even}


def deepseek_v3(rng):
    return deepseek(rng, rope_interleave=bool(rng.integers(2)))


CLASSIFIERS = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}


def causal(classes, language_model="ForCausalLM", heads=3):
    more = {head: classes + suffix for head, suffix in list(CLASSIFIERS.items())[:heads]}
    return {"none": f"{classes}Model", "causal_lm": classes + language_model, **more}


def with_labels(draw):
    return lambda rng: {**draw(rng), "num_labels": int(rng.integers(2, 6))}


def with_padding(draw):  # by whose id transformers finds a sequence's last token
    return lambda rng: {**with_labels(draw)(rng), "pad_token_id": 2 * int(rng.integers(2))}


def heads(classes, *names):
    """{our head: transformers' class}; the plain model and the masked-LM head always."""
    known = {
        "sequence": ("sequence_classification", "ForSequenceClassification"),
        "token": ("token_classification", "ForTokenClassification"),
        "span": ("span", "ForQuestionAnswering"),
        "replaced": ("replaced_token", "ForPreTraining"),
        "order": ("pretraining", "ForPreTraining"),
    }
    return {
        "none": f"{classes}Model",
        "masked_lm": f"{classes}ForMaskedLM",
        **{known[name][0]: classes + known[name][1] for name in names},
    }


# family: (config class, how a config is drawn, {our head: transformers' class})
CASES = {
    "bert": ("BertConfig", with_labels(with_segments), heads("Bert", "order", "sequence", "token", "span")),
    "roberta": ("RobertaConfig", with_labels(with_segments), heads("Roberta", "sequence", "token", "span")),
    "xlm-roberta": ("XLMRobertaConfig", with_labels(with_segments), heads("XLMRoberta", "sequence", "token", "span")),
    "distilbert": ("DistilBertConfig", with_labels(distilbert), heads("DistilBert", "sequence", "token", "span")),
    "mpnet": ("MPNetConfig", with_labels(encoder), heads("MPNet", "sequence", "token", "span")),
    "electra": ("ElectraConfig", with_labels(electra), heads("Electra", "replaced", "sequence", "token", "span")),
    "albert": ("AlbertConfig", with_labels(albert), heads("Albert", "order", "sequence", "token", "span")),
    "modernbert": ("ModernBertConfig", with_labels(modernbert), heads("ModernBert", "sequence", "token", "span")),
    "gpt2": ("GPT2Config", with_padding(gpt2), causal("GPT2", "LMHeadModel")),
    "llama": ("LlamaConfig", with_padding(llama_biased), causal("Llama")),
    "mistral": ("MistralConfig", with_padding(mistral), causal("Mistral")),
    "qwen2": ("Qwen2Config", with_padding(qwen2), causal("Qwen2")),
    "qwen3": ("Qwen3Config", with_padding(qwen3), causal("Qwen3")),
    "t5": ("T5Config", t5, {"none": "T5Model", "seq2seq_lm": "T5ForConditionalGeneration"}),
    "marian": ("MarianConfig", marian, {"none": "MarianModel", "seq2seq_lm": "MarianMTModel"}),
    "deepseek_v2": ("DeepseekV2Config", with_padding(deepseek_v2), causal("DeepseekV2", heads=1)),
    "deepseek_v3": ("DeepseekV3Config", with_padding(deepseek_v3), causal("DeepseekV3", heads=2)),
}


def perturbed(network, seed):
    """Random values everywhere: default initialisation hides swapped tensors, since many are zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [p for p in network.parameters() if p.requires_grad]:  # the others are computed tables
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if (bias := getattr(network, "final_logits_bias", None)) is not None:
            bias.add_(torch.randn(bias.shape, generator=generator))
    return network.eval()


def drawn(family, head, number, folder):
    """(transformers' model, its folder in shards, seed)."""
    seed = zlib.crc32(f"{family} {head} {number}".encode())
    print(f"{family} {head}: seed {seed}")
    config_class, draw, classes = CASES[family]
    settings = draw(np.random.default_rng(seed))
    if head == "span":
        settings["num_labels"] = 2  # the first and the last token
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(seed)
    network = perturbed(getattr(transformers, classes[head])(config), seed)
    network.save_pretrained(folder, max_shard_size="8KB" if number % 2 else "1GB")
    return network, seed


def batch(network, seed, pad):
    """Ids [3, T] with padding at the end of the second row, and their mask."""
    rng = np.random.default_rng(seed)
    positions = getattr(network.config, "max_position_embeddings", 42) - 2
    length = int(rng.integers(3, positions + 1))
    lengths = np.array([length, max(1, length // 2), max(1, length - 1)])
    mask = np.arange(length) < lengths[:, None]
    ids = rng.integers(3, network.config.vocab_size, (3, length))
    return np.where(mask, ids, pad), mask


def weights(network):
    """{name: parameter} of what a checkpoint has to hold: no computed tables, but Marian's bias, which is a buffer."""
    found = {name: p for name, p in network.named_parameters() if p.requires_grad}
    return found | {n: b for n, b in network.named_buffers() if n == "final_logits_bias"}


def close(got, want, mask=None):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    if mask is not None:
        got, want = got[mask], want[mask]
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= RELATIVE * np.abs(want).max()


def logits_of(out, head):
    """What transformers' output (or that of a saved folder's class) holds where ours has `logits`, as a list."""
    if head == "span":
        return [torch.stack([out.start_logits, out.end_logits], -1)]
    if head == "pretraining":
        name = next(n for n in ("sop_logits", "seq_relationship_logits") if n in out)
        return [out.prediction_logits, out[name]]
    return [out.logits]


def close_logits(got, want, head, mask):
    """Compares our logits with `logits_of`; those of whole sequences, [B, C], have no tokens to mask."""
    for ours, theirs in zip(got if head == "pretraining" else [got], want, strict=True):
        close(ours, theirs, None if theirs.ndim == 2 and head != "replaced_token" else mask)


HEADED = [(family, head) for family, (_, _, classes) in CASES.items() for head in classes]
# Of every family one, of every head one.
QUICK = {
    *(("bert", "none"), ("bert", "pretraining"), ("roberta", "sequence_classification"), ("xlm-roberta", "masked_lm")),
    *(("distilbert", "masked_lm"), ("mpnet", "masked_lm"), ("electra", "replaced_token"), ("albert", "pretraining")),
    *(("modernbert", "masked_lm"), ("modernbert", "sequence_classification"), ("gpt2", "causal_lm")),
    *(("llama", "sequence_classification"), ("mistral", "span"), ("qwen2", "token_classification")),
    *(("qwen3", "causal_lm"), ("t5", "seq2seq_lm"), ("marian", "seq2seq_lm"), ("deepseek_v2", "causal_lm")),
    ("deepseek_v3", "token_classification"),
}
EVERY = pytest.mark.parametrize(("family", "head"), quick(HEADED, QUICK))
# What follows the names alone, which `EVERY` compares one by one, needs each family and each head only once.
SOME = pytest.mark.parametrize(("family", "head"), sorted(QUICK))
