"""Tokenizers trained from text, and what transformers makes of them."""

import json

import pytest

from flaxcompress.data import train_tokenizer, vocabulary_size
from flaxcompress.data.frame import find_frame, sentinel_ids, special_id, special_ids

TEXTS = ["The cat sat on the mat.", "The dog sat on the log, naïvely.", "A cat and a dog sat there."] * 5
KINDS = ("wordpiece", "bpe", "unigram")
SPECIAL = {
    "encoder": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "decoder": ["<pad>", "<s>", "</s>", "<unk>"],
    "seq2seq": ["<pad>", "</s>", "<unk>"],
}


@pytest.mark.parametrize("model", SPECIAL)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it_and_agrees(tmp_path, kind, model):
    transformers = pytest.importorskip("transformers")
    assets = train_tokenizer(TEXTS, kind, vocabulary=300, model=model, max_length=20)
    for name, content in assets.files:
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The cat sat on the dog."
    assert theirs(text)["input_ids"] == assets.tokenize([text]).ids[0]
    assert theirs.model_max_length == 20 and theirs.vocab_size <= 300
    for i, token in enumerate(SPECIAL[model]):
        assert theirs.convert_tokens_to_ids(token) == i
    roles = {
        "pad_token",
        "unk_token",
        *{"encoder": ("cls_token", "mask_token"), "decoder": ("bos_token",)}.get(model, ()),
    }
    assert all(getattr(theirs, role) for role in roles)
    assert theirs.decode(assets.tokenize([text]).ids[0], skip_special_tokens=True) == text
    assert assets.detokenize(assets.tokenize([text]).ids) == [text]
    if model == "encoder":
        pair = theirs("A cat", "a dog")
        assert pair["token_type_ids"] == [0] * (pair["input_ids"].index(3) + 1) + [1] * (
            len(pair["input_ids"]) - pair["input_ids"].index(3) - 1
        )
    else:
        assert "token_type_ids" not in theirs("A cat")


def test_what_stands_around_texts():
    frames = {m: find_frame(train_tokenizer(TEXTS, vocabulary=60, model=m)) for m in SPECIAL}
    assert frames["encoder"] == ((2,), (3,), (2,), (3,), (3,), 1)
    assert frames["decoder"] == ((1,), (), (1,), (), (), 0)
    assert frames["seq2seq"] == ((), (1,), (), (), (1,), 0)
    assert (frames["encoder"].single_size, frames["encoder"].pair_size) == (2, 3)


def test_ids_that_a_model_needs():
    encoder, decoder, seq2seq = (train_tokenizer(TEXTS, "unigram", vocabulary=60, model=m) for m in SPECIAL)
    assert (encoder.end_tokens, decoder.end_tokens, seq2seq.end_tokens) == ((), (2,), (1,))
    assert seq2seq.start_token == special_id(seq2seq, "pad") == 0
    assert special_ids(encoder) == {0, 1, 2, 3, 4} and special_id(encoder, "mask") == 4
    with_sentinels = train_tokenizer(TEXTS, "unigram", vocabulary=60, model="seq2seq", sentinels=10)
    assert sentinel_ids(with_sentinels) == tuple(range(3, 13))


@pytest.mark.parametrize("kind", KINDS)
def test_lower_case_and_size(kind):
    texts = [text.upper() for text in TEXTS]
    small = train_tokenizer(texts, kind, vocabulary=280, lowercase=True)
    assert small.tokenize(["THE CAT"]) == small.tokenize(["the cat"])
    learned = json.loads(dict(small.files)["tokenizer.json"])["model"]["vocab"]
    names = set(learned) if isinstance(learned, dict) else {piece for piece, _ in learned}
    assert not any(
        c.isascii() and c.isupper() for name in names - set(SPECIAL["encoder"]) for c in name if kind != "bpe"
    )
    assert vocabulary_size(small) <= 280


def test_bytes_leave_nothing_unknown():
    assets = train_tokenizer(TEXTS, "bpe", vocabulary=300, model="decoder")
    text = "naïve 猫 \u2028"
    assert assets.detokenize(assets.tokenize([text]).ids) == [text]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wordpeace"}, r"unknown kind 'wordpeace'; .*did you mean 'wordpiece'\?"),
        ({"model": "encodr"}, r"unknown model 'encodr'; .*did you mean 'encoder'\?"),
        ({"kind": "bpe", "vocabulary": 200}, "a bpe vocabulary needs at least 261 entries, got 200"),
        ({"vocabulary": 5}, "a wordpiece vocabulary needs at least 6 entries, got 5"),
        ({"texts": []}, "there are no texts"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(options.pop("texts", TEXTS), **{"vocabulary": 300, **options})


def test_what_reading_raises_is_not_hidden():
    def texts():
        yield "one text"
        raise ValueError("a.txt, line 2: not valid UTF-8")

    with pytest.raises(ValueError, match=r"a\.txt, line 2: not valid UTF-8"):
        train_tokenizer(texts(), vocabulary=50)
    with pytest.raises(TypeError, match="text 1 is int, not a string"):
        train_tokenizer(["a", 3], vocabulary=50)
