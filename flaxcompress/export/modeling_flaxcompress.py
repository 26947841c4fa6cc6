"""The PyTorch side of a folder that flaxcompress saved; needs torch and transformers only.

    AutoModel.from_pretrained(FOLDER, trust_remote_code=True)

`config.flaxcompress` holds the structure, and the rules that give every matrix its storage format. Parameters are named
as in model.safetensors: "embedding/norm/scale" is a tensor of the model itself, "embedding/token.left.values" one of
the module "embedding/token". What this file imports lies beside it: formats, attention, and the network made of them.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    TokenClassifierOutput,
)
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .flaxcompress_attention import KINDS as _ATTENTION  # noqa: F401  (transformers copies what this file imports)
from .flaxcompress_formats import attend, matmul, take
from .flaxcompress_network import Network

# What outputs and `generate` call the keys and values kept: transformers renamed them in 5.24.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _FIELDS else "past_key_values"

logger = logging.get_logger(__name__)


class FlaxCompressConfig(PretrainedConfig):
    """Holds flaxcompress's own config, a JSON object, under the key `flaxcompress`."""

    model_type = "flaxcompress"

    def __init__(self, flaxcompress=None, **kwargs):
        self.flaxcompress = flaxcompress or {}
        super().__init__(**kwargs)


class FlaxCompressModel(PreTrainedModel):
    """A transformer whose matrices may be in any format and whose layers may share weight sets.

    Made from a config alone, its weights are zeros: they come from a saved folder.
    """

    config_class = FlaxCompressConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    heads: tuple = ()  # those that a class with a head can run; the plain model takes any
    compute: torch.Tensor

    def __init__(self, config):
        if self.heads and config.flaxcompress["head"] not in self.heads:
            wanted, found = " or ".join(self.heads), config.flaxcompress["head"]
            raise ValueError(f"{type(self).__name__} needs the head {wanted}, but this folder's head is {found!r}")
        super().__init__(config)
        c = self.structure = config.flaxcompress
        self.register_buffer("compute", torch.empty(0), persistent=False)  # empty: only its dtype matters
        self.network = Network(self, c, c["formats"])
        self.decoder_network = Network(self, c["decoder"], c["formats"], "decoder/") if c["decoder"] else None
        self._add_head()
        self.post_init()

    def _add_head(self):
        """The head's weights; the plain model keeps them too, so that saving it loses nothing."""
        c, net = self.structure, self.network
        if c["head"] in ("masked_lm", "pretraining"):
            net.add_linear("head/transform", c["width"], net.narrow, c["head_bias"])
            net.add_norm("head/norm", net.narrow)
            net.add_vector("head/bias", c["vocabulary"])
            if c["head"] == "pretraining":
                net.add_linear("head/order", c["width"], c["classes"])
        elif c["head"] == "replaced_token":
            net.add_linear("head/transform", c["width"], c["width"])
            net.add_linear("head/output", c["width"], 1)
        elif c["head"] in ("sequence_classification", "token_classification", "span"):
            if c["classifier"]["transform"]:
                net.add_linear("head/transform", c["width"], c["width"], c["head_bias"])
            if c["classifier"]["norm"]:
                net.add_norm("head/norm", c["width"])
            net.add_linear("head/output", c["width"], c["classes"], c["classifier"]["bias"])
        elif c["head"] in ("causal_lm", "seq2seq_lm"):
            if not c["tied"]:
                net.add_linear("head/output", c["width"], c["vocabulary"], bias=False)
            if c["logit_bias"]:
                net.add_vector("head/bias", c["vocabulary"])
        elif c["head"] != "none":
            logger.warning(f"The head {c['head']!r} was made in JAX by its author; here the model has none.")
            self._keys_to_ignore_on_load_unexpected = [r"^head/"]

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As in transformers, but a tensor that the folder lacks is an error: there is nothing to put in its place."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{args[0] if args else cls.__name__}: {len(missing)} tensors are missing: {missing[:4]}")
        return (model, info) if output_loading_info else model

    @property
    def dtype(self):
        """What activations are computed in, which some weights may be stored more narrowly than."""
        return self.compute.dtype

    def weight(self, address):
        """The parameter or module at an address."""
        return getattr(self, address)

    def encode(self, ids, mask, segments, need_states, need_attentions, positions=None, past=None, features=None):
        """All layers and the pooler; None for an output means what the config says."""
        need = {**self._needed(need_states, need_attentions), "features": features}
        return BaseModelOutputWithPooling(*self.network(ids, mask, segments, positions, past, **need)[:4])

    def _needed(self, states, attentions):
        return {
            "need_states": bool(self.config.output_hidden_states if states is None else states),
            "need_attentions": bool(self.config.output_attentions if attentions is None else attentions),
        }

    def translate(self, ids, mask, target, target_mask, encoder_outputs=None, past=None, **need):
        """Encoder, unless its outputs are given, and decoder: a Seq2SeqModelOutput."""
        if self.decoder_network is None:
            raise ValueError("decoder_input_ids: this model has no decoder")
        if encoder_outputs is None:
            encoder_outputs = self.encoder_outputs(ids, mask, **need)
        rows = take(self.weight("embedding/token"), target)
        seen = {"rows": rows, "memory": encoder_outputs[0], "memory_mask": mask}
        out = self.decoder_network(target, target_mask, past=past, **seen, **need)
        return Seq2SeqModelOutput(
            last_hidden_state=out.last_hidden_state,
            **{_CACHE: past},
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=out.attentions,
            cross_attentions=out.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
        )

    def encoder_outputs(self, ids, mask, **need):
        """What `translate` takes in place of source ids."""
        states = self.network(ids, mask, **need)
        return BaseModelOutput(states.last_hidden_state, states.hidden_states, states.attentions)

    def vocabulary_logits(self, x):
        """Logits of the next token, float32: by the token table, or a kernel of the head's own."""
        c, net = self.structure, self.network
        x = x * c["logit_scale"]
        tied = c["tied"]
        y = attend(x, net.weight("embedding/token")) if tied else matmul(x, net.weight("head/output/kernel"))
        return y.float() + net.weight("head/bias").float() if c["logit_bias"] else y.float()

    def masked_lm(self, x):
        """Logits of masked tokens, float32, from a transform and the token table."""
        y = self.network.norm(self.network.head_activation(self.network.linear(x, "head/transform")), "head/norm")
        return attend(y, self.weight("embedding/token")).float() + self.weight("head/bias").float()

    def pool(self, out, ids, mask):
        """One vector [B, D] for each sequence, as the classifier's pooling says."""
        how, x = self.structure["classifier"]["pooling"], out.last_hidden_state
        if how == "pooler" and out.pooler_output is not None:
            return out.pooler_output
        if how in ("pooler", "first"):
            return x[:, 0]
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.ne(0)
        if how == "mean":
            return ((x.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)
        counted = real if how == "last" else ids.ne(self.structure["pad_token"])
        last = (counted * torch.arange(x.shape[1], device=x.device)).amax(1)  # the first token where none counts
        return x[torch.arange(len(x), device=x.device), last]

    def classify(self, x):
        """Class logits, float32, after the classifier's transform and norm, where it has them."""
        net, classifier = self.network, self.structure["classifier"]
        x = net.head_activation(net.linear(x, "head/transform")) if classifier["transform"] else x
        x = net.norm(x, "head/norm") if classifier["norm"] else x
        return net.linear(x, "head/output").float()

    def _answer(self, out, return_dict):
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        feature_ids=None,
    ):
        """[B, T] token ids, or pixel_values, -> last_hidden_state [B, T, D], pooler_output [B, D] if there is one.

        With decoder_input_ids the states are the decoder's; without them, the encoder's.
        """
        if decoder_input_ids is not None:
            need = self._needed(output_hidden_states, output_attentions)
            target = (decoder_input_ids, decoder_attention_mask)
            return self._answer(self.translate(input_ids, attention_mask, *target, **need), return_dict)
        x = input_ids if pixel_values is None else pixel_values
        out = self.encode(
            x, attention_mask, token_type_ids, output_hidden_states, output_attentions, features=feature_ids
        )
        return self._answer(out, return_dict)


class FlaxCompressForMaskedLM(FlaxCompressModel):
    """Vocabulary logits [B, T, V], float32, from a transform and the token table (tied)."""

    heads = ("masked_lm",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        feature_ids=None,
    ):
        """[B, T] token ids -> logits [B, T, V]; with labels, also the mean loss over those that are not -100."""
        out = self.encode(
            input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions, features=feature_ids
        )
        logits = self.masked_lm(out.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        out = MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions)
        return self._answer(out, return_dict)


@dataclasses.dataclass
class SentencePretrainingOutput(ModelOutput):
    """prediction_logits [B, T, V] of masked tokens, sop_logits [B, C] of the two sentences' order."""

    loss: Any = None
    prediction_logits: Any = None
    sop_logits: Any = None
    hidden_states: Any = None
    attentions: Any = None


class FlaxCompressForSentencePretraining(FlaxCompressModel):
    """Vocabulary logits [B, T, V], and logits [B, C] of the two sentences' order, float32 (BERT and ALBERT)."""

    heads = ("pretraining",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        sentence_order_label=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        feature_ids=None,
    ):
        """[B, T] token ids -> both logits; with both labels, also the sum of their mean losses."""
        out = self.encode(
            input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions, features=feature_ids
        )
        words = self.masked_lm(out.last_hidden_state)
        order = self.network.linear(out.pooler_output, "head/order").float()
        loss = None
        if labels is not None and sentence_order_label is not None:
            loss = F.cross_entropy(words.flatten(0, 1), labels.flatten()) + F.cross_entropy(order, sentence_order_label)
        kept = {"hidden_states": out.hidden_states, "attentions": out.attentions}
        return self._answer(SentencePretrainingOutput(loss, words, order, **kept), return_dict)


class FlaxCompressForPreTraining(FlaxCompressModel):
    """A logit [B, T], float32, for each token: whether a generator put it there (ELECTRA's discriminator)."""

    heads = ("replaced_token",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        feature_ids=None,
    ):
        """[B, T] token ids -> logits [B, T]; with labels (1: replaced), also the mean loss over real tokens."""
        out = self.encode(
            input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions, features=feature_ids
        )
        y = self.network.head_activation(self.network.linear(out.last_hidden_state, "head/transform"))
        logits = self.network.linear(y, "head/output")[..., 0].float()
        loss = None
        if labels is not None:
            real = torch.ones_like(labels) if attention_mask is None else attention_mask
            loss = F.binary_cross_entropy_with_logits(logits[real != 0], labels[real != 0].float())
        out = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )
        return self._answer(out, return_dict)


class FlaxCompressForCausalLM(FlaxCompressModel, GenerationMixin):
    """Logits [B, T, V], float32, of the next token, from the token table (tied) or a kernel of the head's own."""

    heads = ("causal_lm",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        cache=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        feature_ids=None,
        logits_to_keep=0,
        **unused,
    ):
        """[B, T] token ids -> logits [B, T, V]; with labels, also the mean loss of predicting each token."""
        past = past_key_values if cache is None else cache
        if use_cache and past is None:
            past = DynamicCache()
        need = (output_hidden_states, output_attentions, position_ids, past)
        out = self.encode(input_ids, attention_mask, None, *need, features=feature_ids)
        x: torch.Tensor = out.last_hidden_state  # type: ignore
        x = x[:, -logits_to_keep:] if logits_to_keep else x
        logits = self.vocabulary_logits(x)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{_CACHE: past},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return self._answer(out, return_dict)


class FlaxCompressForClassification(FlaxCompressModel):
    """Class logits, float32: [B, C] of a text or an image, [B, T, C] of every token."""

    heads = ("sequence_classification", "token_classification")

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        feature_ids=None,
    ):
        """Token ids [B, T], or pixel_values, -> logits; with labels, also the mean loss where they are not -100."""
        x = input_ids if pixel_values is None else pixel_values
        out = self.encode(
            x, attention_mask, token_type_ids, output_hidden_states, output_attentions, features=feature_ids
        )
        y: torch.Tensor = out.last_hidden_state  # type: ignore
        if self.structure["head"] == "sequence_classification":
            y = self.pool(out, input_ids, attention_mask)
        logits = self.classify(y)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        kept = {"hidden_states": out.hidden_states, "attentions": out.attentions}
        return self._answer(TokenClassifierOutput(loss=loss, logits=logits, **kept), return_dict)


class FlaxCompressForQuestionAnswering(FlaxCompressModel):
    """Logits [B, T], float32, of an answer's first and last token."""

    heads = ("span",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        start_positions=None,
        end_positions=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        feature_ids=None,
    ):
        """[B, T] token ids -> start_logits and end_logits; with positions, also their mean loss."""
        out = self.encode(
            input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions, features=feature_ids
        )
        start, end = self.classify(out.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (F.cross_entropy(start, start_positions) + F.cross_entropy(end, end_positions)) / 2
        kept = {"hidden_states": out.hidden_states, "attentions": out.attentions}
        out = QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **kept)
        return self._answer(out, return_dict)


class FlaxCompressForConditionalGeneration(FlaxCompressModel, GenerationMixin):
    """An encoder and a decoder that attends to it: logits [B, T, V], float32, of the next target token."""

    heads = ("seq2seq_lm",)

    def get_encoder(self, modality=None):
        """What `generate` calls once per source."""
        return _Encoder(self)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        cache=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        **unused,
    ):
        """Source ids [B, S] and target ids [B, T] -> logits [B, T, V]; with labels, also the mean loss.

        With labels alone, the target ids are the labels moved by one, after the config's decoder_start_token_id.
        """
        need = self._needed(output_hidden_states, output_attentions)
        if decoder_input_ids is None and labels is not None:
            pad = self.structure["pad_token"]
            first = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad)], 1)
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids: the decoder needs target ids [B, T], or labels")
        past = past_key_values if cache is None else cache
        if use_cache and past is None:
            past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        source, target = (input_ids, attention_mask), (decoder_input_ids, decoder_attention_mask)
        out = self.translate(*source, *target, encoder_outputs, past, **need)
        logits = self.vocabulary_logits(out.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        rest = {name: value for name, value in out.items() if name != "last_hidden_state"}
        return self._answer(Seq2SeqLMOutput(loss=loss, logits=logits, **rest), return_dict)


class _Encoder:
    """The encoder of a model with a decoder, as `generate` wants to call it."""

    main_input_name = "input_ids"

    def __init__(self, model):
        self._model = model

    def __call__(self, input_ids, attention_mask=None, output_hidden_states=None, output_attentions=None, **unused):
        need = self._model._needed(output_hidden_states, output_attentions)
        return self._model.encoder_outputs(input_ids, attention_mask, **need)

    def forward(self, input_ids, attention_mask=None, output_hidden_states=None, output_attentions=None):
        """As calling it; `generate` reads the names of these arguments."""
        return self(input_ids, attention_mask, output_hidden_states, output_attentions)
