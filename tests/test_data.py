import gzip
import json
import random
import subprocess
import sys
import time

import pytest

from flaxcompress.data import (
    CalibrationText,
    calibration,
    calibration_text,
    clean_sentences,
    docstring_sentences,
    parse_source,
    read_pairs,
    read_texts,
)
from flaxcompress.data.calibration import is_file_source
from flaxcompress.data.sentences import cut, split_sentences, undo_spacing

STS = "score\tsentence1\tsentence2\n5.0\tA man sings.\tA man is singing.\n0\tA dog runs.\tIt rains today.\n"


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "column", "want"),
    [
        ("a.txt", "one\n\n  \ntwo\u2028still two\r\nthree", None, ["one", "two\u2028still two", "three"]),
        ("a.en", "\ufeffone\ntwo\n", None, ["one", "two"]),
        ("a.tsv", "label\tsentence\n0\tone \n1\ttwo\n", None, ["one ", "two"]),
        ("a.tsv", "label\ttext\tid\nWorld\tsome text\t1\n", None, ["some text"]),
        ("a.tsv", STS, None, ["A man sings.", "A man is singing.", "A dog runs.", "It rains today."]),
        ("a.tsv", STS, "sentence2", ["A man is singing.", "It rains today."]),
        ("a.tsv", 'body\nsay "a\n', None, ['say "a']),
        ("a.tsv", "id\ttitle\tbody\nx1\ta b\tthe longest one\nx2\tc d\tanother long one\n", None, None),
        ("a.jsonl", '{"text": "one", "n": 1}\n\n{"n": 2, "text": "two"}\n', None, ["one", "two"]),
        ("a.ndjson", '{"sentence": "one", "text": "two"}\n', None, ["one"]),
        ("a.jsonl", '{"text": "one", "body": "two"}\n', "body", ["two"]),
    ],
)
def test_read_texts(tmp_path, gz, name, content, column, want):
    path = write(tmp_path / (name + gz), content)
    want = want or ["the longest one", "another long one"]
    assert list(read_texts(path, column=column)) == want
    if column is not None:
        assert list(read_texts(f"{path}:{column}")) == want


def test_read_texts_is_a_stream(tmp_path):
    path = write(tmp_path / "a.txt", b"fine\n" * 10_000 + b"\xff\n")
    texts = read_texts(path)
    assert [next(texts) for _ in range(10_000)] == ["fine"] * 10_000
    with pytest.raises(ValueError, match="line 10001: not valid UTF-8"):
        next(texts)


def test_parse_source(tmp_path):
    assert parse_source("a/b.tsv:sentence1") == (tmp_path.__class__("a/b.tsv"), "sentence1")
    assert parse_source("a/b.tsv") == (tmp_path.__class__("a/b.tsv"), None)
    assert parse_source("C:/x/b.tsv") == (tmp_path.__class__("C:/x/b.tsv"), None)
    assert parse_source(tmp_path / "a:b") == (tmp_path / "a:b", None)
    odd = write(tmp_path / "a.tsv:text", "x")
    assert parse_source(str(odd)) == (odd, None)
    with pytest.raises(ValueError, match="no column is named"):
        parse_source("a.tsv:")


TSV = "label\tsentence\n0\tone\n"
BAD_TEXTS = [
    ("empty.txt", b"", None, "the file is empty"),
    ("empty.txt.gz", b"", None, "holds no text"),
    ("blank.txt", b"\n \n\t\n", None, "only blank lines"),
    ("header.tsv", b"label\tsentence\n", None, "only blank lines or a header"),
    ("blank.jsonl", b"\n\n", None, "only blank lines"),
    ("a.tsv", TSV.encode(), "sentense", r"line 2: no column 'sentense'; known: .*did you mean 'sentence'\?"),
    ("a.jsonl", b'{"text": "one"}\n{"txet": "two"}\n', None, r"line 2: no column 'text'; .*did you mean 'txet'\?"),
    ("a.tsv", TSV.encode() + b"1\ttwo\tthree\n", None, "line 3: 3 columns, but the header has 2"),
    ("a.tsv", b"a\tb\n1\t2\n", None, "no column looks like text; name one, as in a.tsv:COLUMN; known: a, b"),
    ("a.txt", b"fine\ncaf\xe9\n", None, "line 2: not valid UTF-8 .byte 0xe9 at position 4"),
    ("a.tsv.gz", TSV.encode() + b"1\t\xff\n", None, "line 3: not valid UTF-8"),
    ("a.jsonl", b'{"text": "one"}\n{"text": "two"\n', None, "line 2: damaged JSON"),
    ("a.jsonl", b'["one"]\n', None, "line 1: a JSON object is expected"),
    ("a.jsonl", b'{"text": 3}\n', None, "line 1: 'text' is int, not text"),
    ("a.jsonl", b"[" * 200_000, None, "line 1: JSON nested too deeply"),
    ("a.txt", b"one\n", "text", "only .tsv, .jsonl and .parquet files have columns"),
    ("a.csv", b"text\none\n", None, ".csv files are not read; convert to"),
]


@pytest.mark.parametrize(("name", "content", "column", "message"), BAD_TEXTS)
def test_bad_file_is_one_clear_line(tmp_path, name, content, column, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_texts(path, column=column))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_gzip(tmp_path):
    lines = "".join(f"{random.Random(i).random()}\n" for i in range(20_000)).encode()
    whole = gzip.compress(lines)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], bytes(flipped), b"not gzip at all\n"):
        path = tmp_path / "a.txt.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.txt.gz, (after )?line \d+: (damaged gzip|not valid UTF-8)"):
            list(read_texts(path))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"after line \d{4,}: damaged gzip"):
        list(read_texts(path))


def test_missing_file_and_folder_are_reported_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt: no such file"):
        read_texts(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere.tsv: no such file"):
        read_texts(f"{tmp_path}/nowhere.tsv:text")
    with pytest.raises(ValueError, match="is a folder; give a file"):
        read_texts(tmp_path)


def test_read_pairs(tmp_path):
    want = [("A man sings.", "A man is singing.", 5.0), ("A dog runs.", "It rains today.", 0.0)]
    assert read_pairs(write(tmp_path / "a.tsv.gz", STS)) == want
    rows = [json.dumps({"sentence1": a, "sentence2": b, "score": s}) for a, b, s in want]
    assert read_pairs(write(tmp_path / "a.jsonl", "\n".join(rows))) == want


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", STS + "high\ta\tb\n", "line 4: score 'high' is not a number"),
        ("a.tsv", STS + "nan\ta\tb\n", "line 4: score 'nan' is not a number"),
        ("a.tsv", "score\tsentence1\tsentence_2\n1\ta\tb\n", "no column 'sentence2'; known: .*did you mean"),
        ("a.tsv", "score\tsentence1\tsentence2\n", "holds no sentence pairs"),
        ("a.txt", "one\n", "sentence pairs are read from .tsv or .jsonl"),
    ],
)
def test_bad_pairs(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("the 1 @,@ 500 @-@ ton ship made 19 @.@ 5 knots .", "the 1,500-ton ship made 19.5 knots."),
        ("It is 60 cm ( 24 in ) long , or so ; 5 % of all .", "It is 60 cm (24 in) long, or so; 5% of all."),
        ('He said , " it \'s fine " , and left .', 'He said, "it\'s fine", and left.'),
        ("it 's not what we 've seen , and i do n't care .", "it's not what we've seen, and i don't care."),
        ("-lrb- really -rrb- `` good '' films .", '(really) "good" films.'),
        ("the lobsters ' claws cost $ 10 , they say .", "the lobsters' claws cost $10, they say."),
        ("Wait ... is that so ?", "Wait... is that so?"),
        ("Costs US $ 1 @.@ 5 million .", "Costs US $1.5 million."),
    ],
)
def test_word_level_spacing_is_undone(given, want):
    assert undo_spacing(given) == want


@pytest.mark.parametrize(
    "plain",
    [
        "A man with a hard hat is dancing.",
        "The U.S. Army met Dr. J. R. Smith and Mr. A. Jones at 3.5 m, e.g. In a hall.",
        "Use the -b option, see No. 5 and Fig. 3 for x = 1.5!",
        '"Is that so?" he asked (quietly).',
        "Die Katze, die schläft, ist müde.",
        "no capital and no full stop at all",
        "Version 3.11 of .NET and node.js runs on example.com today",
    ],
)
def test_a_plain_sentence_stays_as_it_is(plain):
    assert list(clean_sentences([plain])) == [plain]


def test_split_sentences():
    text = (
        'It rained. "Really?" Dr. Who asked. J. S. Bach lived at 5 a.m. in 1700. Vol. 3 cost $2.50! And so on... Next.'
    )
    assert split_sentences(text) == [
        "It rained.",
        '"Really?"',
        "Dr. Who asked.",
        "J. S. Bach lived at 5 a.m. in 1700.",
        "Vol. 3 cost $2.50!",
        "And so on...",
        "Next.",
    ]
    assert split_sentences("これは文です。次の文です！") == ["これは文です。", "次の文です！"]


def test_clean_sentences_drops_and_cuts():
    texts = [
        " = Homarus gammarus = ",
        " = = Description = = \n",
        "A lobster is a crustacean . It has <unk> claws . It lives in the sea .",
        "A lobster is a crustacean.",
        "Too short.",
        "12 34 56 78",
        "word " * 100 + "end",
        "One line\nthat goes on.\n\nAnother paragraph begins<|endoftext|>And a third text",
    ]
    got = list(clean_sentences(texts))
    assert got == [
        "A lobster is a crustacean.",
        "It lives in the sea.",
        ("word " * 80).strip(),
        "One line that goes on.",
        "Another paragraph begins",
        "And a third text",
    ]
    assert list(clean_sentences(got)) == got
    with pytest.raises(TypeError, match="text 1 is int, not a string"):
        list(clean_sentences(["a", 3]))


def test_cut():
    assert cut("abc def", 7) == "abc def"
    assert cut("abc def", 6) == "abc"
    assert cut("abc def g", 7) == "abc def"
    assert cut("x" * 100_000, 400) == "x" * 400


@pytest.mark.parametrize(
    "piece", [".", " .", "a. ", "U.S. ", '. "', "( ", " , ", '" ', "= ", "\n ", "x", "'' ", "句。", "\n"]
)
def test_a_line_of_100_000_characters_takes_linear_time(piece):
    start = time.perf_counter()
    got = list(clean_sentences([piece * (100_000 // len(piece)) + " ..........x"]))
    assert time.perf_counter() - start < 5  # a quadratic pattern takes minutes
    assert all(len(sentence) <= 400 for sentence in got)


def test_docstring_sentences_of_a_folder(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "sub").mkdir()
    write(tmp_path / "tests" / "b.py", '"""Text that belongs to a test."""')
    write(tmp_path / "broken.py", '"""A docstring that is fine."""\ndef f(:\n')
    write(tmp_path / "nul.py", b'"""A docstring that is fine."""\0')
    write(tmp_path / "bytes.py", b'"""Not valid \xff here at all."""')
    code = '''"""Module that does :class:`things <x>` with ``care``.

    >>> print("not this one")
    not this one

    Example::

        result = compute(this, and_that)

    - An item of a list.
    """
    class A:
        """A class with words, e.g. these ones. It has two sentences."""
        if True:
            def f(self):
                "Nested inside an if statement."
    '''.replace("\n    ", "\n")
    write(tmp_path / "sub" / "a.py", code)
    assert docstring_sentences(tmp_path) == (
        "Module that does things with care.",
        "An item of a list.",
        "A class with words, e.g. these ones.",
        "It has two sentences.",
        "Nested inside an if statement.",
    )


def test_default_calibration_text():
    text = calibration_text()
    assert len(text.train) > 12_000 and len(text.held_out) == 600
    assert not set(text.train) & set(text.held_out)
    assert "standard library" in text.name
    sentences = text.train + text.held_out
    assert sum(len(s) for s in sentences) / len(sentences) > 50
    assert sum(s.endswith((".", "!", "?", ")", ":", '"')) for s in sentences) > 0.85 * len(sentences)
    assert not any("\n" in s or s.startswith((">>>", "def ", "@")) for s in sentences)


@pytest.mark.slow
def test_docstrings_import_none_of_the_files():
    code = (
        "import sys; from flaxcompress.data.docstrings import docstring_sentences; assert docstring_sentences();"
        "print({'turtle', 'antigravity', 'this', 'tkinter', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("set()\n", "", 0)


def sentences(count):
    return [f"Sentence number {i} talks about the topic {i * 7}." for i in range(count)]


def test_split_does_not_depend_on_order():
    texts = sentences(500)
    want = calibration_text(texts)
    shuffled = texts[:]
    random.Random(1).shuffle(shuffled)
    got = calibration_text(shuffled + texts[:50])
    assert (got.train, got.held_out, got.digest) == (want.train, want.held_out, want.digest)
    assert len(want.held_out) == 50 and set(want.train) | set(want.held_out) == set(texts)
    assert list(want.train) != [t for t in texts if t in set(want.train)]  # shuffled by the hash
    other = calibration_text(texts, seed=1)
    assert other.digest != want.digest and set(other.held_out) != set(want.held_out)
    # A sentence's place does not change when others are added: those held out then are held out of more text too.
    more = calibration_text(sentences(600), held_out=50)
    assert len(set(more.held_out) & set(want.held_out)) >= 30


def test_held_out_is_at_most_a_tenth_and_at_most_what_is_asked_for():
    assert len(calibration_text(sentences(200)).held_out) == 20
    assert len(calibration_text(sentences(40)).held_out) == 11  # enough for ten neighbours each
    assert len(calibration_text(sentences(100), held_out=4).held_out) == 4
    assert len(calibration_text(sentences(100), held_out=0).held_out) == 0
    assert len(calibration_text(sentences(9000)).held_out) == 600
    with pytest.raises(ValueError, match="held_out must be 0 or more, got -1"):
        calibration_text(sentences(100), held_out=-1)


def test_digest_depends_on_text_and_split_only():
    a = CalibrationText("a", ("x", "y"), ("z",))
    assert a.digest == CalibrationText("b", ("x", "y"), ("z",)).digest
    assert (
        len({a.digest, CalibrationText("a", ("x",), ("y", "z")).digest, CalibrationText("a", ("x", "y"), ()).digest})
        == 3
    )
    assert calibration_text(a) is a


def test_calibration_from_files(tmp_path):
    texts = sentences(80)
    txt = write(tmp_path / "a.txt.gz", "\n".join(texts[:40]))
    tsv = write(tmp_path / "b.tsv", "id\tbody\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(texts[40:])))
    want = calibration_text(texts)
    for source in ([txt, f"{tsv}:body"], [str(txt), str(tsv)]):
        got = calibration_text(source)
        assert got.digest == want.digest and got.name.startswith("a.txt.gz, b.tsv")
    assert calibration_text(txt).digest == calibration_text(texts[:40]).digest
    assert calibration_text(str(txt)).digest == calibration_text(t for t in texts[:40]).digest
    for missing in ("nowhere.txt", ["nowhere.jsonl.gz:text"], [tmp_path / "nowhere"], "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"nowhere.*: no such file"):
            calibration_text(missing)


def test_too_little_text_says_how_much_was_found(tmp_path):
    for source in (sentences(31), write(tmp_path / "a.txt", "\n".join([*sentences(31), "", "short"]))):
        with pytest.raises(ValueError, match=r"found 31 usable sentences .*at least 32 are needed"):
            calibration_text(source)
    with pytest.raises(ValueError, match="found 0 usable"):
        calibration_text([])
    with pytest.raises(ValueError, match="found 0 usable"):
        calibration_text(["  ", "\n"])
    assert len(calibration_text(sentences(32)).train) == 21


def test_reading_stops_at_the_most_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "MOST_SENTENCES", 300)
    path = write(tmp_path / "a.txt", "\n".join(sentences(400)).encode() + b"\nnever reached \xff\n")
    text = calibration_text(path)
    assert set(text.train + text.held_out) == set(sentences(300))
    assert text.name == "a.txt (the first 300 sentences)"
    assert calibration_text(sentences(300)).name == "300 texts"


def test_public_data_sets(data_dir):
    counts = {}
    for name in ("stsb/dev.tsv.gz", "sst2/dev.tsv.gz", "ag_news/test.tsv.gz", "multi30k/val.en.gz"):
        counts[name] = len(list(read_texts(data_dir / name)))
    assert counts == {
        "stsb/dev.tsv.gz": 3000,
        "sst2/dev.tsv.gz": 872,
        "ag_news/test.tsv.gz": 7600,
        "multi30k/val.en.gz": 1014,
    }
    pairs = read_pairs(data_dir / "stsb/dev.tsv.gz")
    assert len(pairs) == 1500 and abs(sum(p[2] for p in pairs) / 1500 - 2.36) < 0.005


def test_plain_public_sentences_pass_unchanged(data_dir):
    texts = {" ".join(text.split()) for text in read_texts(data_dir / "multi30k/val.en.gz")}
    assert len(texts & set(clean_sentences(texts))) >= 0.99 * len(texts)


def test_word_level_corpus_becomes_plain_sentences(data_dir):
    got = list(clean_sentences(read_texts(data_dir / "wikitext2/valid.txt.gz")))
    assert len(got) > 2000
    assert not any(mark in s for s in got for mark in ("<unk>", " @-@ ", " @,@ ", " , ", " 's "))
    assert not any(s.startswith("=") for s in got)
    assert sum(s.endswith(" .") for s in got) == 0


def test_a_text_with_a_colon_at_its_end_is_a_text(tmp_path):
    texts = [f"{first}. All that follows is said by this:" for first in sentences(60)]
    assert calibration_text(texts).name == calibration_text(sentences(60)).name
    (tmp_path / "x.bin").write_text("a")
    assert is_file_source(f"{tmp_path}/x.bin:") and not is_file_source(texts[0])
