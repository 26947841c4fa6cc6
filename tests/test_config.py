"""ModelConfig: JSON both ways, what construction refuses, and which format rule an address gets."""

from __future__ import annotations

import json

import pytest

from flaxcompress.config import Classifier, FormatRule, ModelConfig, Sharing, closest, reject_unknown

SMALL = {"vocabulary": 50, "width": 12, "layers": 3, "heads": 3, "feed_forward_width": 20}
RANK = {"kind": "low_rank", "rank": 3, "left": {"kind": "quantized", "bits": 8}, "right": {"kind": "dense"}}
CONFIGS = {
    "defaults": {},
    "everything": {
        "positions": 9,
        "segments": 0,
        "activation": "silu",
        "norm_epsilon": 1e-5,
        "dropout": 0.0,
        "attention_dropout": 0.5,
        "initializer_range": 0.3,
        "pad_token": 7,
        "pooler": False,
        "head": "masked_lm",
    },
    "shared": {"sharing": Sharing(attention=(0, 0, 0), feed_forward=(0, 1, 0), norms=(0, 1, 2))},
    "classifier": {
        "head": "sequence_classification",
        "head_activation": "tanh",
        "classes": 3,
        "classifier": Classifier(pooling="mean", transform=True, norm=True, bias=False),
    },
    "formats": {
        "formats": (
            FormatRule(pattern=r"layers/\d+/.*/kernel", spec=RANK),
            FormatRule(pattern="embedding/token", spec={"kind": "bucketed", "tiers": [{"rows": 50, "format": RANK}]}),
        )
    },
}


def small(**changes) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_json_round_trip(changes):
    config = small(**changes)
    text = json.dumps(config.to_json())
    back = ModelConfig.from_json(json.loads(text))
    assert back == config
    assert hash(back) == hash(config)
    assert json.dumps(back.to_json()) == text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocabulary": 0}, "vocabulary must be a positive integer"),
        ({"layers": 2.0}, "layers must be a positive integer, got 2.0"),
        ({"width": "12"}, "width must be a positive integer"),
        ({"heads": 5}, "width 12 is not divisible by heads 5"),
        ({"segments": -1}, "segments must be 0 or more"),
        ({"activation": "gelo"}, "unknown activation 'gelo'.*did you mean 'gelu'"),
        ({"head": "mask_lm"}, "unknown head 'mask_lm'.*did you mean 'masked_lm'"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"attention_dropout": -0.1}, r"attention_dropout must lie in \[0, 1\)"),
        ({"pad_token": 50}, "pad_token 50 lies outside the vocabulary of 50"),
        ({"sharing": Sharing.own(2)}, "2 entries for 3 layers"),
        ({"head": "token_classification"}, "needs classes"),
        ({"head": "causal_lm", "causal": True, "embedding_width": 6}, "embedding_width 6 must be the width 12"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "maps, message",
    [
        (((0, 1), (0, 1), (0,)), "one entry per layer"),
        (((1, 0), (0, 1), (0, 1)), "sharing/attention.*in order of first use"),
        (((0, 1), (0, 2), (0, 1)), "sharing/feed_forward.*in order of first use"),
        (((0, 1), (0, 1), (-1, 0)), "sharing/norms.*in order of first use"),
    ],
)
def test_sharing_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        Sharing(**dict(zip(("attention", "feed_forward", "norms"), maps, strict=True)))


def test_sharing_counts_sets():
    sharing = Sharing(attention=(0, 0, 0, 0), feed_forward=(0, 1, 0, 1), norms=(0, 1, 2, 3))
    assert [sharing.sets(part) for part in ("attention", "feed_forward", "norms")] == [1, 2, 4]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"widht": 12}, "unknown key 'widht'.*did you mean 'width'"),
        (
            {"sharing": {"attention": [0, 0, 0], "feed_forwrd": [0, 0, 0]}},
            "did you mean 'feed_forward'",
        ),
        ({"sharing": {"attention": [0, 0, 0]}}, "sharing.*(feed_forward|norms)"),
        ({"classifier": {"pooling": "mena"}}, "unknown pooling 'mena'.*did you mean 'mean'"),
        ({"classifier": {"pool": "mean"}}, "config/classifier: unknown key 'pool'"),
        ({"classifier": {"bias": 1}}, "classifier: bias must be true or false"),
        ({"classifier": {"norm": True}}, "norm=True makes sense with transform=True only"),
        ({"formats": [["(", {"kind": "dense"}]]}, "is not a regular expression"),
        ({"formats": [["x", {"rank": 3}]]}, "needs an object with a 'kind'"),
        ({"formats": [["x", "dense"]]}, "needs an object with a 'kind'"),
        ({"formats": [["x", {"kind": "dense"}, 1]]}, "formats"),
    ],
)
def test_json_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json({**small().to_json(), **change})


def test_json_missing_key_is_named():
    data = small().to_json()
    del data["width"], data["heads"]
    with pytest.raises(ValueError, match="missing width, heads"):
        ModelConfig.from_json(data)


def test_first_rule_that_matches_in_full_wins():
    config = small().with_rule("embedding/.*", {"kind": "dense", "dtype": "float16"})
    config = config.with_format("embedding/token", {"kind": "quantized"})
    assert config.format_rule("embedding/token")["kind"] == "quantized"
    assert config.format_rule("embedding/position")["dtype"] == "float16"
    assert config.format_rule("embedding/token/more")["dtype"] == "float16"
    assert config.format_rule("an/embedding/token") is None


def test_with_format_replaces_the_exact_rule():
    config = small().with_format("layers/0/attention/query/kernel", {"kind": "quantized", "bits": 4})
    config = config.with_format("layers/0/attention/query/kernel", {"kind": "quantized", "bits": 3})
    assert [rule.spec["bits"] for rule in config.formats] == [3]


def test_rules_are_frozen_and_hashable():
    spec = {"kind": "bucketed", "tiers": [{"rows": 3}]}
    rule = FormatRule(pattern="x", spec=spec)
    spec["tiers"][0]["rows"] = 4
    assert rule.spec["tiers"][0]["rows"] == 3
    assert hash(rule) == hash(FormatRule(pattern="x", spec={"kind": "bucketed", "tiers": [{"rows": 3}]}))


def test_replace_validates_again():
    with pytest.raises(ValueError, match="not divisible"):
        small().replace(width=13)
    assert small().head_dim == 4


def test_closest():
    assert closest("querry", ["query", "key"]) == "known: key, query; did you mean 'query'?"
    assert closest("zzz", ["query"]) == "known: query"
    assert closest("x", []) == "known: nothing"
    reject_unknown("here", ["a"], ["a", "b"])


def test_a_name_stands_for_sharing():
    sizes = {"vocabulary": 8, "width": 4, "layers": 4, "heads": 1, "feed_forward_width": 4}
    config = ModelConfig(**sizes, sharing={"name": "cycle", "sets": 2})
    assert config.sharing == Sharing.named("cycle", layers=4, sets=2)
    assert ModelConfig(**sizes, sharing="all") == ModelConfig.from_json({**sizes, "sharing": "all"})
