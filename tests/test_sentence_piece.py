"""SentencePiece models beside the library itself and transformers' own tokenizers."""

from __future__ import annotations

import io
import json

import pytest

from flaxcompress.sentence_piece import read_pieces
from flaxcompress.text import Assets, read_assets
from flaxcompress.tokenizer import make_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

ENGLISH = [
    "A man in a blue shirt is standing on a ladder cleaning a window.",
    "Two young men are outside near many bushes.",
    "Several men in hard hats are operating a giant pulley system.",
    "A little girl climbs into a wooden playhouse, and her brother waits below.",
    "What is the weather like in November? It rains; nobody knows why!",
]
GERMAN = [
    "Ein Mann in einem blauen Hemd steht auf einer Leiter und putzt ein Fenster.",
    "Zwei junge Männer sind im Freien in der Nähe vieler Büsche.",
    "Mehrere Männer mit Schutzhelmen bedienen ein Antriebsradsystem.",
    "Ein kleines Mädchen klettert in ein Spielhaus aus Holz, größer als der Bruder.",
    "Wie ist das Wetter im November? Es regnet; niemand weiß, warum!",
]
TEXTS = [
    *ENGLISH,
    "",
    "  two   blanks  ",
    "tabs\tand\nlines",
    "unknown: ß 東 ☃",
    "ﬁne ligatures and ｆｕｌｌ width",
    "an é here",
]


def train(texts, size, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 4), model_writer=model, vocab_size=size, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """A folder with the files of an OPUS-MT tokenizer, and transformers' tokenizer of it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("marian")
    models = {"source.spm": train(ENGLISH, 70), "target.spm": train(GERMAN, 70)}
    pieces = dict.fromkeys(p for content in models.values() for p, _, _ in read_pieces(content, "").pieces)
    rest = [p for p in pieces if p not in ("<unk>", "<s>", "</s>")]
    tokens = ["</s>", "<unk>", ">>deu<<", *sorted(rest), "<pad>"]
    for name, content in models.items():
        (folder / name).write_bytes(content)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "marian"}))
    return folder, transformers.MarianTokenizer.from_pretrained(folder)


def test_marian_equals_transformers(marian):
    folder, theirs = marian
    assets = read_assets(folder, positions=512, source="x")
    for text in [*TEXTS, ">>deu<< Two men."]:
        assert assets.tokenize([text]).ids[0] == theirs(text)["input_ids"], text
    assert theirs.convert_ids_to_tokens(theirs("☃☃")["input_ids"]) == ["▁", "<unk>", "</s>"]
    assert theirs.convert_ids_to_tokens(assets.tokenize(["☃☃"]).ids[0]) == ["▁", "<unk>", "</s>"]
    for text in GERMAN:
        ids = theirs(text_target=text)["input_ids"]
        assert assets.detokenize([ids])[0] == theirs.decode(ids, skip_special_tokens=True)


def test_t5_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    (tmp_path / "spiece.model").write_bytes(train([*ENGLISH, *GERMAN], 110, **special))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=100)
    assets = read_assets(tmp_path, positions=512, source="x")
    for text in [*ENGLISH, *GERMAN, "  two   blanks  ", "fill <extra_id_0> and <extra_id_1>"]:
        ids = assets.tokenize([text]).ids[0]
        assert ids == theirs(text)["input_ids"], text
        assert assets.detokenize([ids])[0] == theirs.decode(ids, skip_special_tokens=True)


def test_a_model_gives_the_pieces_of_the_library():
    content = train(ENGLISH, 70)
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    model = read_pieces(content, "x")
    assert [p for p, _, _ in model.pieces] == [processor.id_to_piece(i) for i in range(len(processor))]
    assert [s for _, s, _ in model.pieces] == [processor.get_score(i) for i in range(len(processor))]
    assert model.kind == 1 and model.character_map and not model.extra_white_space
    bpe = read_pieces(train(ENGLISH, 70, model_type="bpe", remove_extra_whitespaces=False), "x")
    assert bpe.kind == 2 and bpe.extra_white_space


@pytest.mark.parametrize(
    "files, message",
    [
        ({"source.spm": b"\xff\xff\xff", "vocab.json": b"{}"}, "source.spm: damaged"),
        ({"source.spm": b"", "vocab.json": b"{}"}, "has no pieces"),
        ({"spiece.model": b"hello"}, "spiece.model: damaged"),
        ({"source.spm": None, "vocab.json": b"[1]"}, "vocab.json: not an object"),
        ({"source.spm": None, "vocab.json": b'{"</s>": 0, "<unk>": 2}'}, "are not 0 … 1"),
        ({"source.spm": None, "vocab.json": b'{"</s>": 0}'}, "has no '<unk>'"),
        ({"vocab.json": b"{}"}, "has no tokenizer"),
    ],
)
def test_damaged_files_are_named(files, message):
    model = train(ENGLISH, 70)
    content = tuple((name, model if value is None else value) for name, value in files.items())
    with pytest.raises(ValueError, match=message):
        make_tokenizer(Assets(files=content).files, 16)


def test_a_trimmed_vocabulary_gets_a_tokenizer_of_its_own(marian, tmp_path):
    transformers = pytest.importorskip("transformers")
    import jax

    import flaxcompress as fc
    from flaxcompress.compress import Calibration, TrimVocabulary
    from flaxcompress.compress.step import Context

    folder, theirs = marian
    assets = read_assets(folder, positions=64, source="x")
    assets = Assets(files=assets.files, max_length=64, end_tokens=(0,), start_token=len(theirs) - 1, never_tokens=(2,))
    sizes = {"width": 8, "layers": 1, "heads": 2, "feed_forward_width": 8, "positions": 64}
    config = fc.ModelConfig(vocabulary=len(theirs), pad_token=len(theirs) - 1, **sizes)
    model = fc.Model.init(config, key=jax.random.key(0), assets=assets)
    corpus = fc.CalibrationText("corpus", tuple(ENGLISH[:2]), ())
    context = Context(original=model, calibration=Calibration(corpus, assets, vocabulary=config.vocabulary))
    small = TrimVocabulary()(model, context, key=jax.random.key(0))
    assert small.config.vocabulary < config.vocabulary
    assert small.assets.start_token == small.config.pad_token == small.config.vocabulary - 1
    assert small.assets.end_tokens == (0,) and small.assets.never_tokens == (2,)
    fc.save(small, tmp_path / "small")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    for text in ENGLISH[:2]:
        ids = small.assets.tokenize([text]).ids[0]
        old = assets.tokenize([text]).ids[0]
        assert again(text)["input_ids"] == ids
        assert again.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(old)
