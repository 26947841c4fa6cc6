"""The structure of a model: what the network computes, apart from its weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flaxcompress.config.adapters import Adapters
from flaxcompress.config.attention import AttentionKind, Latent, read_attention
from flaxcompress.config.classifier import Classifier
from flaxcompress.config.deepnorm import DeepNorm, deepnorm, deepnorm_decoder, deepnorm_encoder
from flaxcompress.config.deltas import Deltas
from flaxcompress.config.format_rule import FormatRule, read_rules, thaw
from flaxcompress.config.lexicon import Lexicon
from flaxcompress.config.names import ACTIVATIONS, closest, reject_unknown
from flaxcompress.config.part import part_reader
from flaxcompress.config.patches import Patches
from flaxcompress.config.rotary import Rotary
from flaxcompress.config.sharing import SUBLAYERS, Sharing, read_sharing

NORMS = ("layer", "rms")
NORM_PLACES = ("post", "pre", "sandwich")
PARALLEL = ("none", "one_norm", "two_norms")
INITIALIZERS = ("normal", "truncated_normal", "xavier", "deepnorm")
POSITION_EMBEDDINGS = ("learned", "sinusoidal", "none")
CLASSIFIERS = ("sequence_classification", "token_classification", "span")
GENERATING = ("causal_lm", "seq2seq_lm")
HEADS = ("none", "masked_lm", "pretraining", "replaced_token", *GENERATING, *CLASSIFIERS)

_OWN_HEADS: list[str] = []  # that callers registered, see nn/heads.py


def own_heads() -> tuple[str, ...]:
    """The names of heads that were registered beside `HEADS`."""
    return tuple(_OWN_HEADS)


def add_head_name(name: str) -> None:
    """Makes a name a valid `head`. Raises ValueError for one of `HEADS`, and for one that is no plain name."""
    if name in HEADS or not re.fullmatch(r"[a-z]\w*", name):
        raise ValueError(f"register_head: {name!r} is {'taken' if name in HEADS else 'not a name in lower case'}")
    if name not in _OWN_HEADS:
        _OWN_HEADS.append(name)


_SIMPLE: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool}
# How fields that are objects in JSON are read: a function of the object and of where it stands.
_READERS: dict[str, Any] = {
    "attention": read_attention,
    "rotary": part_reader(Rotary),
    "patches": part_reader(Patches),
    "deltas": part_reader(Deltas),
    "adapters": part_reader(Adapters),
    "classifier": part_reader(Classifier),
    "lexicon": part_reader(Lexicon),
    "formats": read_rules,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer's structure; family-neutral names, dimension letters beside them.

    Attributes:
      embedding_width: E, when the embeddings are narrower (or wider) than the layers: they are normalised in E and then
        mapped to D (ALBERT, Lan et al. 2020). None: D, without a map.
      positions: the longest sequence.
      position_offset: the row of the first position in the position table. Above 0, positions count tokens other than
        `pad_token`, and padding reads the row before (RoBERTa).
      initializer: how kernels are drawn: "normal" or "truncated_normal" (at two deviations) of deviation
        `initializer_range`, as tables always are; "xavier" by their fans; or "deepnorm", Xavier's times
        `initializer_gain`, β, for all kernels in layers but those of queries and keys (see `with_deepnorm`).
      segments: rows of the segment table; 0 for none.
      relative_buckets: rows of a relative position bias that all layers share, [buckets, H] (T5, Raffel et al. 2020;
        MPNet); 0 for none.
      relative_distance: the distance from which all positions share the last bucket.
      head_activation: inside the head; None for `activation`.
      feed_forward_width: F; a tuple has one for each weight set of the feed-forward networks.
      key_value_heads: K, heads of keys and values, each read by H/K query heads; None: H.
      head_width: d; None: D/H.
      attention: the kind of self-attention: `Latent`, `Linformer` or `Nystrom`; None: full.
      query_key_width: r, the width of a head's query and key where it is not d, that of its value; None: d.
      projection_kernel: queries, keys and values are projected from depthwise convolutions over the sequence of this
        width, each with its own (CvT, Wu et al. 2021); centred, or, in causal models, ending at the token. 0: none.
      prefix_length: P, trained keys and values in front of those of a layer's tokens (prefix tuning, Li & Liang 2021),
        whose positions begin at P. 0: none.
      feed_forward_kernel: the same for what the feed-forward's up and gate maps read, one for both.
      attention_bias, output_bias, feed_forward_bias, norm_bias, head_bias: whether the projections of queries, keys and
        values, that of the attention's output, the feed-forward maps, the norms, and the head's transform have biases.
      query_key_norm: an RMS norm over each head's queries and keys (Qwen3).
      causal: tokens see earlier ones only.
      window: in local layers, the largest distance at which tokens see each other; 0: no layer is local.
      local: which layers are; None: all of them when there is a window.
      rotary: rotary positions; None: none.
      patches: images instead of token ids: `vocabulary` is then 0.
      deltas: what each layer adds to its linear maps, low-rank; None: nothing. Without a map in `sharing`, every layer
        owns its deltas.
      adapters: narrow networks behind sublayers; they belong to the weight sets of the norms. None: there are none.
      classes: C, of a classifier's head; 2 for answer spans, whose classes are the first and the last token. Beside a
        masked LM ("pretraining"), of two sentences: in order or not, or the second one following the first or not.
      classifier: what such a head does before its map to the classes.
      position_embedding: what is added to the embeddings: a "learned" table of positions, "sinusoidal" ones (Vaswani et
        al. 2017, §3.5; all sines before all cosines) or "none".
      embedding_scale: the token table's rows are multiplied by it.
      attention_scale: the scores are multiplied by it; None: 1/√d.
      embedding_norm: the embeddings are normalised.
      gated: the feed-forward is down(activation(gate(x)) * up(x)) (Shazeer 2020).
      norm: "layer" or "rms" (Zhang & Sennrich 2019).
      norm_place: "post", norm(x + f(x)); "pre", x + f(norm(x)); or "sandwich", x + norm(f(norm(x))) (CogView, Gemma 2).
      residual_scale: α, by which x is multiplied where f(x) is added to it (see `with_deepnorm`).
      parallel: "none"; or attention and feed-forward read the same x and are added together, after "one_norm" that they
        share (GPT-J, PaLM) or "two_norms" (GPT-NeoX). Norms then stand before sublayers.
      layer_dropout: while training, what the last layer's sublayers add is left out with this probability, example by
        example; that of earlier layers with one that grows linearly with depth (Huang et al. 2016).
      first_norm: whether the first layer's attention has a norm before it, where norms come before.
      final_norm: whether the last layer's output is normalised.
      tied: whether a language-modelling head reads the token table, or has a kernel of its own.
      logit_scale: what such a head multiplies its input by.
      logit_bias: whether it adds a bias to the logits.
      lexicon: embeddings from outside for tokens of a lexicon's terms; None: there are none.
      decoder: the structure of the decoder that attends to these layers' output; None: there is none. Its vocabulary is
        0, since it reads this token table, and its matrices stand below "decoder/".
      sharing: which weight set each layer uses, part by part; None: every layer owns its weights. A name may
        stand for it: "all", or {"name": "cycle", "sets": 3} (see `Sharing.named`).

    Raises ValueError on construction when fields contradict each other.
    """

    family: str = "bert"
    vocabulary: int  # V
    width: int  # D
    embedding_width: int | None = None  # E
    layers: int  # L
    heads: int  # H
    key_value_heads: int | None = None  # K
    head_width: int | None = None  # d
    attention: AttentionKind | None = None
    query_key_width: int | None = None  # r
    projection_kernel: int = 0
    prefix_length: int = 0  # P
    feed_forward_kernel: int = 0
    feed_forward_width: int | tuple[int, ...]  # F
    positions: int = 512
    position_offset: int = 0
    segments: int = 2
    relative_buckets: int = 0
    relative_distance: int = 128
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer: str = "normal"
    initializer_range: float = 0.02
    initializer_gain: float = 1.0
    pad_token: int = 0
    pooler: bool = True
    head: str = "none"
    head_activation: str | None = None
    attention_bias: bool = True
    output_bias: bool = True
    feed_forward_bias: bool = True
    norm_bias: bool = True
    head_bias: bool = True
    query_key_norm: bool = False
    causal: bool = False
    window: int = 0
    local: tuple[bool, ...] = None  # pyright: ignore[reportAssignmentType]  (None: all, where there is a window)
    rotary: Rotary | None = None
    patches: Patches | None = None
    deltas: Deltas | None = None
    adapters: Adapters | None = None
    classes: int = 0
    classifier: Classifier = Classifier()  # noqa: RUF009  (frozen)
    position_embedding: str = "learned"
    embedding_norm: bool = True
    gated: bool = False
    norm: str = "layer"
    norm_place: str = "post"
    residual_scale: float = 1.0
    parallel: str = "none"
    layer_dropout: float = 0.0
    first_norm: bool = True
    final_norm: bool = False
    tied: bool = True
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    logit_bias: bool = False
    lexicon: Lexicon | None = None
    decoder: ModelConfig | None = None
    sharing: Sharing = None  # pyright: ignore[reportAssignmentType]  (a name or None becomes one)
    formats: tuple[FormatRule, ...] = ()

    def __post_init__(self):
        if self.patches is not None and self.vocabulary != 0:
            raise ValueError(f"config: a model of images has no vocabulary, got {self.vocabulary}")
        if isinstance(self.sharing, (str, Mapping)):  # a name stands for maps of so many layers
            object.__setattr__(self, "sharing", read_sharing(self.sharing, "config/sharing", self.layers))
        decodes = self.sharing is not None and bool(self.sharing.cross_attention)
        sizes = ("width", "layers", "heads", "positions")
        for name in sizes if self.patches is not None or decodes else ("vocabulary", *sizes):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        for field in dataclasses.fields(self):
            kind, value = _SIMPLE.get(str(field.type)), getattr(self, field.name)
            if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise ValueError(f"config: {field.name} must be of type {field.type}, got {value!r}")
        counts = ("segments", "position_offset", "relative_buckets", "window", "classes", "vocabulary")
        for name in (*counts, "projection_kernel", "feed_forward_kernel", "prefix_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"config: {name} must be 0 or more, got {getattr(self, name)}")
        if self.embedding_width is not None and self.embedding_width < 1:
            raise ValueError(f"config: embedding_width must be a positive integer, got {self.embedding_width!r}")
        if self.table_width != self.width and self.tied and self.head in ("causal_lm", "seq2seq_lm"):
            raise ValueError(
                f"config: a tied {self.head} head multiplies by the token table, so embedding_width "
                f"{self.embedding_width} must be the width {self.width}; set tied to False for a head of its own"
            )
        near = 2 if self.causal else 4
        if self.relative_buckets and (
            self.relative_buckets % near or self.relative_distance <= self.relative_buckets // near
        ):
            raise ValueError(
                f"config: relative_buckets must be a multiple of {near}, relative_distance above 1/{near} of it, got "
                f"{self.relative_buckets} and {self.relative_distance}"
            )
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"config: width {self.width} is not divisible by heads {self.heads}")
        for name in ("key_value_heads", "head_width", "query_key_width"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        if self.heads % self.groups:
            raise ValueError(f"config: heads {self.heads} are not divisible by key_value_heads {self.groups}")
        if self.rotary is not None and self.rotary_dim % 2:
            raise ValueError(f"config: rotary positions turn pairs, but a head is {self.rotary_dim} wide")
        if self.rotary is not None and self.rotary.pairs is not None and 2 * len(self.rotary.pairs) != self.rotary_dim:
            raise ValueError(
                f"config: rotary has frequencies for {len(self.rotary.pairs)} pairs, but {self.rotary_dim // 2} turn"
            )
        for name in ("projection_kernel", "feed_forward_kernel"):
            if (width := getattr(self, name)) == 1 or (width and not self.causal and width % 2 == 0):
                raise ValueError(f"config: {name} must be 0, or above 1 and, unless causal, odd; got {width}")
        for name, known in (
            ("norm", NORMS),
            ("norm_place", NORM_PLACES),
            ("parallel", PARALLEL),
            ("initializer", INITIALIZERS),
            ("position_embedding", POSITION_EMBEDDINGS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"config: unknown {name} {getattr(self, name)!r}; {closest(getattr(self, name), known)}"
                )
        local = (self.window > 0,) * self.layers if self.local is None else tuple(bool(x) for x in self.local)
        object.__setattr__(self, "local", local)
        if len(local) != self.layers:
            raise ValueError(f"config: local needs one entry for each of {self.layers} layers, got {len(local)}")
        if any(local) != (self.window > 0):
            raise ValueError(f"config: window {self.window} with {sum(local)} local layers: give both or none")
        if not self.first_norm and (self.norm_place != "pre" or self.parallel == "one_norm"):
            raise ValueError(
                "config: first_norm=False makes sense with norm_place='pre' only, where norms are not shared"
            )
        if self.parallel != "none" and (decodes or self.norm_place == "post"):
            raise ValueError(
                f"config: parallel {self.parallel!r} needs norms before sublayers and no attention to an encoder, got "
                f"norm_place {self.norm_place!r}{' and a map of cross_attention' if decodes else ''}"
            )
        for name in ("residual_scale", "initializer_gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"config: {name} must be positive, got {getattr(self, name)}")
        for name in (self.activation, self.head_activation or self.activation):
            if name not in ACTIVATIONS:
                raise ValueError(f"config: unknown activation {name!r}; {closest(name, ACTIVATIONS)}")
        if self.head not in (*HEADS, *_OWN_HEADS):
            known = closest(self.head, (*HEADS, *_OWN_HEADS))
            raise ValueError(f"config: unknown head {self.head!r}; {known}; register_head makes one of your own known")
        if not self.norm_epsilon > 0:
            raise ValueError(f"config: norm_epsilon must be positive, got {self.norm_epsilon}")
        for name in ("dropout", "attention_dropout", "layer_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"config: {name} must lie in [0, 1), got {getattr(self, name)}")
        if self.lexicon is not None and not self.vocabulary:
            raise ValueError("config: a lexicon needs tokens: a model of images, and a decoder, cannot have one")
        if self.head == "pretraining" and not self.pooler:
            raise ValueError("config: the head 'pretraining' reads the pooler's output; it needs pooler=True")
        if self.classifier.pooling == "last_unpadded" and self.patches is not None:
            raise ValueError("config: classifier: a model of images has no padding; use pooling 'last'")
        if self.head in (*CLASSIFIERS, "pretraining") and not self.classes:
            raise ValueError(f"config: a head {self.head!r} needs classes, the number of classes")
        if self.vocabulary and not 0 <= self.pad_token < self.vocabulary:
            raise ValueError(f"config: pad_token {self.pad_token} lies outside the vocabulary of {self.vocabulary}")
        if self.sharing is None:
            object.__setattr__(self, "sharing", Sharing.own(self.layers))
        self._check_feed_forward_width()
        self._check_deltas()
        self._check_bases()
        if self.adapters is not None and self.adapters.within(self.sharing.parts) != self.adapters:
            raise ValueError(
                f"config: adapters stand behind {', '.join(self.adapters.after)}, not all of which is there"
            )
        if len(self.sharing.attention) != self.layers:
            raise ValueError(f"sharing: the maps have {len(self.sharing.attention)} entries for {self.layers} layers")
        object.__setattr__(self, "formats", tuple(self.formats))
        if self.attention is not None:
            self.attention.check(self)
        self._check_decoder()

    def _check_feed_forward_width(self) -> None:
        given, sets = self.feed_forward_width, self.sharing.sets("feed_forward")
        widths = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        if not all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in widths):
            raise ValueError(f"config: feed_forward_width must be a positive integer, or several, got {given!r}")
        if not isinstance(given, int) and len(widths) != sets:
            raise ValueError(f"config: feed_forward_width needs one entry for each of {sets} sets, got {len(widths)}")
        object.__setattr__(self, "feed_forward_width", widths[0] if len(set(widths)) == 1 else widths)

    def _check_deltas(self) -> None:
        if (self.deltas is None) != (not self.sharing.deltas):
            if self.deltas is None:
                raise ValueError("config: sharing has a map of deltas, but there are no deltas")
            own = dataclasses.replace(self.sharing, deltas=tuple(range(self.layers)))
            object.__setattr__(self, "sharing", own)
        widths: dict[int, int] = {}
        for number, inner in zip(self.sharing.deltas, self.sharing.feed_forward, strict=False):
            width = self.feed_forward_width_of(inner)
            if widths.setdefault(number, width) != width:
                raise ValueError(
                    f"sharing/deltas: set {number} is used by layers whose feed_forward_width differs: "
                    f"{widths[number]} and {width}"
                )

    def _check_bases(self) -> None:
        for part in SUBLAYERS:
            found: dict[int, int] = {}
            for number, basis in zip(getattr(self.sharing, part), self.sharing.bases, strict=False):
                if found.setdefault(number, basis) != basis:
                    raise ValueError(
                        f"sharing/bases: layers that share set {number} of {part} need the same bases, but have "
                        f"{found[number]} and {basis}"
                    )

    def _check_decoder(self) -> None:
        if (self.head == "seq2seq_lm") != (self.decoder is not None and self.head != "none"):
            raise ValueError(f"config: head {self.head!r} with{'' if self.decoder else 'out'} a decoder")
        if (decoder := self.decoder) is None:
            return
        wanted = {"vocabulary": 0, "width": self.width, "causal": True, "head": "none", "pooler": False, "formats": ()}
        for name, value in {**wanted, "decoder": None}.items():
            if getattr(decoder, name) != value:
                raise ValueError(f"config/decoder: {name} must be {value!r}, got {getattr(decoder, name)!r}")
        if not decoder.sharing.cross_attention:
            raise ValueError("config/decoder: its sharing needs a map of cross_attention")

    @property
    def head_dim(self) -> int:
        """d, the width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def query_key_dim(self) -> int:
        """r, the width of one head's query and key."""
        return self.query_key_width or self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How much of a head's query and key has rotary positions."""
        return self.attention.rotary_width if isinstance(self.attention, Latent) else self.query_key_dim

    @property
    def groups(self) -> int:
        """K, the number of key and value heads."""
        return self.key_value_heads or self.heads

    def feed_forward_width_of(self, number: int) -> int:
        """F of a weight set."""
        widths = self.feed_forward_width
        return widths if isinstance(widths, int) else widths[number]

    @property
    def table_width(self) -> int:
        """E, the width of the embedding tables."""
        return self.embedding_width or self.width

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        if len(set(self.local)) == 1 and "local" not in changes:  # all layers alike, whatever their number
            changes["local"] = None
        return dataclasses.replace(self, **changes)

    def unshared(self) -> ModelConfig:
        """Every layer with weights of its own."""
        crossing = bool(self.sharing.cross_attention)
        decoder = None if self.decoder is None else self.decoder.unshared()
        return self.replace(sharing=Sharing.own(self.layers, cross_attention=crossing), decoder=decoder)

    def with_deepnorm(self) -> ModelConfig:
        """A copy whose layers, and whose decoder's, have DeepNorm's residuals and initialiser (Wang et al. 2022)."""

        def changed(config: ModelConfig, constants: DeepNorm, **more: Any) -> ModelConfig:
            scales = {"residual_scale": constants.alpha, "initializer_gain": constants.beta}
            return config.replace(norm_place="post", first_norm=True, initializer="deepnorm", **scales, **more)

        if (decoder := self.decoder) is None:
            return changed(self, deepnorm(self.layers))
        decoder = changed(decoder, deepnorm_decoder(decoder.layers))
        return changed(self, deepnorm_encoder(self.layers, decoder.layers), decoder=decoder)

    def with_format(self, address: str, spec: Mapping[str, Any]) -> ModelConfig:
        """Puts a rule for exactly `address` first, in place of an earlier exact one."""
        return self.with_rule(re.escape(address).replace(r"\-", "-"), spec)

    def with_rule(self, pattern: str, spec: Mapping[str, Any]) -> ModelConfig:
        """Puts a format rule first, in place of an earlier one of the same pattern."""
        rule = FormatRule(pattern=pattern, spec=spec)
        rest = tuple(r for r in self.formats if r.pattern != rule.pattern)
        return self.replace(formats=(rule, *rest))

    def format_rule(self, address: str) -> Mapping[str, Any] | None:
        """The spec of the first rule that fully matches `address`, or None for a dense float32 matrix."""
        for rule in self.formats:
            if re.fullmatch(rule.pattern, address):
                return rule.spec
        return None

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` is its inverse."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["formats"] = [[rule.pattern, thaw(rule.spec)] for rule in self.formats]
        return {name: value.to_json() if hasattr(value, "to_json") else _plain(value) for name, value in out.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads `to_json`'s object; unknown or missing keys raise ValueError."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        reject_unknown("config", data, fields)
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in data]
        if missing:
            raise ValueError(f"config: missing {', '.join(missing)}")
        values = dict(data)
        if values.get("decoder") is not None:
            values["decoder"] = cls.from_json(values["decoder"])
        for name, read in _READERS.items():
            if values.get(name) is not None:
                values[name] = read(values[name], f"config/{name}")
        return cls(**values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
