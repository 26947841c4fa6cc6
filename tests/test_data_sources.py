"""What training reads from: text, tables, parallel text, labels, images; corrupt lines are skipped and located."""

import gzip
import json
import logging
import sys
import types

import numpy as np
import pytest

from flaxcompress.data import Corpus, read_images, read_labelled, read_parallel, read_texts
from flaxcompress.data.hub import HubData
from flaxcompress.data.images import read_idx
from flaxcompress.data.portion import Portion


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def documents(source, **options):
    return list(Corpus(source, **options).documents())


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("separator", "want"),
    [
        (None, ["one", "two", "three <eot> four", "five"]),
        ("", ["one\ntwo", "three <eot> four\nfive"]),
        ("<eot>", ["one\ntwo\n\nthree ", " four\nfive\n"]),
    ],
)
def test_documents_of_plain_lines(tmp_path, gz, separator, want):
    path = write(tmp_path / f"a.txt{gz}", "one\ntwo\n\nthree <eot> four\nfive\n\n")
    assert documents(path, separator=separator) == want
    assert documents([path, str(path)], separator=separator) == want * 2


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_the_last_examples_are_held_out(count):
    texts = ["one", " ", "two", "three", "four", " ", "five"]  # blank ones count for nothing
    all_of = documents(texts)
    kept, held_out = (documents(texts, portion=Portion(count, held_out=h)) for h in (False, True))
    if count:
        assert (kept, held_out) == (all_of[:-count], all_of[-count:])
    else:
        assert kept == held_out == all_of


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("count", [5, 9])
def test_something_must_be_left_to_train_on(count, held_out):
    with pytest.raises(ValueError, match=rf"data/hold_out: {count} examples are to be held out, but there are 5"):
        list(Portion(count, held_out=held_out).of(range(5)))


def test_documents_of_columns(tmp_path):
    table = write(tmp_path / "a.tsv", "label\ttext\tbody\n1\tone\ttwo\n0\tthree\tfour\n")
    rows = [{"text": "one", "body": "two"}, {"text": "three", "body": "four"}]
    lines = write(tmp_path / "a.jsonl.gz", "".join(json.dumps(row) + "\n" for row in rows))
    for path in (table, lines, parquet(tmp_path / "a.parquet", rows)):
        assert documents(path) == list(read_texts(path)) == ["one", "three"]
        assert documents(f"{path}:body") == documents(path, column="body") == ["two", "four"]
        with pytest.raises(ValueError, match=r"no column 'bodi'; known: .*did you mean 'body'\?"):
            documents(f"{path}:bodi")


def parquet(path, rows):
    pyarrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_texts_in_memory():
    assert documents(["one text", " ", "two"]) == ["one text", "two"]
    assert documents(iter(["one text"])) == ["one text"]
    for empty in ([], [" ", "\n"]):
        with pytest.raises(ValueError, match="no texts were given, or only blank ones"):
            documents(empty)
    with pytest.raises(TypeError, match="text 1 is int, not a string: 3"):
        documents(["a b", 3])


BAD = [
    ("a.txt", b"one\nb\xffd\ntwo\n", "line 2: not valid UTF-8"),
    ("a.tsv", b"text\tn\none\t1\nbad\ntwo\t2\n", "line 3: 1 columns, but the header has 2"),
    ("a.jsonl", b'{"text": "one"}\n{"text": \n{"text": "two"}\n', "line 2: damaged JSON"),
    ("a.jsonl", b'{"text": "one"}\n[1]\n{"text": "two"}\n', "line 2: a JSON object is expected"),
    ("a.jsonl", b'{"text": "one"}\n{"text": 7}\n{"text": "two"}\n', "line 2: 'text' is int, not text"),
    ("a.jsonl", b'{"text": "one"}\n{"txt": "x"}\n{"text": "two"}\n', "line 2: no column 'text'"),
]


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_corrupt_line_is_skipped_and_located(tmp_path, caplog, gz, name, content, message):
    path = write(tmp_path / (name + gz), content)
    with caplog.at_level(logging.WARNING, "flaxcompress"):
        assert documents(path) == ["one", "two"]
    (record,) = caplog.records
    assert f"1 lines cannot be read and were skipped; the first: {path}, {message}" in record.getMessage()
    with pytest.raises(ValueError, match=message):
        documents(path, max_bad_lines=0)


def test_more_corrupt_lines_than_the_limit(tmp_path, caplog):
    path = write(tmp_path / "a.txt", b"fine\n" * 1000 + b"\xff\n" * 6)
    assert len(documents(path, max_bad_lines=6)) == 1000
    assert caplog.records[0].getMessage().count("not valid UTF-8") == 3  # the first few are named
    with pytest.raises(ValueError, match=r"more than 5 lines cannot be read \(max_bad_lines\); .*line 1001: not valid"):
        documents(path, max_bad_lines=5)
    with pytest.raises(ValueError, match="max_bad_lines: must be 0 or more, got -1"):
        documents(path, max_bad_lines=-1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.txt", b"\xff\n", "holds no text; .*line 1: not valid UTF-8"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.tsv", b"te\xffxt\none\ntwo\n", "line 1: not valid UTF-8"),  # a header is not skipped
        ("a.csv", b"a,b\n", "csv files are not read"),
        ("a.parquet", b"PAR1 but no more", "damaged or no parquet file"),
        ("a.txt.gz", None, "after line 1000: damaged gzip"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:  # the second half is missing
        content = gzip.compress(b"".join(b"%d %d\n" % (i, i * i) for i in range(1000)))[:-8]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        documents(path)
    assert str(path) in str(error.value)


def test_missing_files():
    for source in ("nowhere.txt", ["nowhere.jsonl:text"], "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match=r"nowhere.*: no such file"):
            documents(source)


def test_hub_data_sets(monkeypatch, caplog):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub or cannot be accessed.")
        return iter([{"text": "one", "body": "two"}, {"text": None, "body": "four"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert documents("hf:owner/name") == ["one"]
    assert "hf:owner/name, line 2: 'text' is NoneType" in caplog.records[0].getMessage()
    assert documents("hf:owner/name?config=small&split=validation&column=body") == ["two", "four"]
    assert asked == [("owner/name", None, "train", True), ("owner/name", "small", "validation", True)]
    with pytest.raises(ValueError, match=r"hf:no/such: cannot be read .Dataset 'no/such' doesn't exist"):
        documents("hf:no/such")
    with pytest.raises(ValueError, match=r"unknown option 'spilt'; .*did you mean 'split'\?"):
        HubData.parse("hf:a/b?spilt=x")
    with pytest.raises(ValueError, match="no data set is named"):
        documents("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="need the library: pip install datasets"):
        documents("hf:owner/name")


def test_parallel_text(tmp_path, caplog):
    one = write(tmp_path / "a.en.gz", b"one\n\xff\nthree\n\nfive\nsix\n")
    two = write(tmp_path / "a.de", b"eins\nzwei\ndrei\nvier\nf\xfcnf\nsechs\n")
    want = [("one", "eins"), ("three", "drei"), ("six", "sechs")]
    assert list(read_parallel(one, two)) == want
    assert list(read_parallel([one, one], [two, two])) == want * 2
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "2 lines cannot be read" in messages and f"{one}, line 2" in messages and f"{two}, line 5" in messages
    assert "1 of 4 pairs have a blank side" in messages
    with pytest.raises(ValueError, match="more than 1 lines cannot be read"):
        list(read_parallel(one, two, max_bad_lines=1))
    table = write(tmp_path / "a.tsv", "en\tde\none\teins\nbad\ntwo\tzwei\n")
    assert list(read_parallel(f"{table}:en", f"{table}:de")) == [("one", "eins"), ("two", "zwei")]
    assert list(read_parallel(["x y", "z"], ["u", "v"])) == [("x y", "u"), ("z", "v")]


def test_parallel_text_that_does_not_match(tmp_path):
    one, two = write(tmp_path / "a.en", "one\ntwo\n"), write(tmp_path / "a.de", "eins\nzwei\ndrei\n")
    for pair, message in (
        ((one, two), "a.en has 2 lines, but .*a.de has 3"),
        ((two, one), "has 3 lines, but .* has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_parallel(*pair))
    with pytest.raises(ValueError, match="2 texts, but 1 translations"):
        list(read_parallel(["a", "b"], ["c"]))
    with pytest.raises(ValueError, match="2 files, but 1 of translations"):
        list(read_parallel([one, one], [two]))
    with pytest.raises(ValueError, match="one side is files"):
        list(read_parallel([one], ["some text"]))
    with pytest.raises(ValueError, match="hold no pair of texts"):
        list(read_parallel(write(tmp_path / "b.en", "\n"), write(tmp_path / "b.de", "\n")))
    with pytest.raises(FileNotFoundError):
        list(read_parallel(one, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="name the column"):
        list(read_parallel(write(tmp_path / "a.tsv", "en\tde\none\teins\n"), two))


def test_labelled_texts(tmp_path):
    words = write(tmp_path / "a.tsv", "label\ttext\nSports\tone\nWorld\ttwo\nSports\tthree\n")
    got = read_labelled(words)
    assert (got.texts, got.labels.tolist(), got.names) == (["one", "two", "three"], [0, 1, 0], ("Sports", "World"))
    assert read_labelled(words, names=["World", "Sports"]).labels.tolist() == [1, 0, 1]
    rows = [{"a": "x", "b": "y", "n": 2}, {"a": "u", "b": "v", "n": 0}]
    for path in (write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), parquet(tmp_path / "a.parquet", rows)):
        got = read_labelled(path, text="a", pair="b", label="n")
        assert (list(got.texts), got.labels.tolist(), got.names) == ([("x", "y"), ("u", "v")], [2, 0], ("0", "1", "2"))
        got = read_labelled(path, text="a", label="n", regression=True)
        assert (list(got.texts), got.labels.tolist(), got.labels.dtype) == (["x", "u"], [2.0, 0.0], np.float32)


def test_labelled_texts_with_corrupt_lines(tmp_path, caplog):
    path = write(tmp_path / "a.tsv", b"label\ttext\n1\tone\n\xff\t\n0\ttwo\n7\tthree\nfour\n")
    got = read_labelled(path, names=["0", "1"])
    assert (got.texts, got.labels.tolist()) == (["one", "two"], [1, 0])
    message = caplog.records[0].getMessage()
    assert all(
        f"line {n}: {why}" in message for n, why in ((3, "not valid"), (5, "unknown label '7'"), (6, "1 columns"))
    )
    with pytest.raises(ValueError, match="line 3: not valid UTF-8"):
        read_labelled(path, max_bad_lines=0)
    with pytest.raises(ValueError, match=r"no column 'lable'; .*did you mean 'label'\?"):
        read_labelled(path, label="lable")
    with pytest.raises(ValueError, match=r"holds no labelled texts; .*label 'high' is not a number"):
        read_labelled(write(tmp_path / "b.tsv", "label\ttext\nhigh\tone\n"), regression=True)


def idx(values):
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return head + values.astype(np.uint8).tobytes()


def test_images(tmp_path):
    pixels, labels = np.arange(24).reshape(2, 3, 4), np.array([7, 1])
    one, two = write(tmp_path / "i.gz", idx(pixels)), write(tmp_path / "l", idx(labels))
    np.savez(tmp_path / "a.npz", images=pixels.astype(np.uint8), labels=labels)
    for got in (read_images(one, two), read_images(tmp_path / "a.npz")):
        np.testing.assert_array_equal(got.images, pixels)
        np.testing.assert_array_equal(got.labels, labels)
        assert got.images.dtype == np.uint8 and got.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((2, 3)))[:-1], r"5 bytes, but 6 for the stated shape \(2, 3\)"),
        (b"GIF89a", "no IDX file of bytes: it begins with 47 49 46 38"),
        (b"", "begins with nothing"),
        (idx(np.zeros((2, 3))), r"images must be bytes \[n, height, width\]"),
        (idx(np.zeros((3, 2, 2))), "3 images, but labels of shape"),
    ],
)
def test_bad_images(tmp_path, content, message):
    path = write(tmp_path / "i", content)
    with pytest.raises(ValueError, match=message):
        read_images(path, write(tmp_path / "l", idx(np.zeros(2))))


def test_bad_image_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_idx(tmp_path / "nowhere")
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (5, 9, 9))))
    (tmp_path / "i.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_idx(tmp_path / "i.gz")
    with pytest.raises(ValueError, match="damaged or no npz"):
        read_images(write(tmp_path / "a.npz", b"PK\3\4 no more"))
    np.savez(tmp_path / "b.npz", pictures=np.zeros(2))
    with pytest.raises(ValueError, match="need images and labels"):
        read_images(tmp_path / "b.npz")


def test_public_data_sets(data_dir):
    assert len(documents(data_dir / "wikitext2/valid.txt.gz")) == 2461
    stories = documents(data_dir / "tinystories/sample_2mib.txt.gz", separator="<|endoftext|>")
    assert len(stories) == 2317  # the last one is cut off
    got = read_labelled(data_dir / "sst2/dev.tsv.gz")
    assert (len(got.texts), got.labels.sum(), got.names) == (872, 444, ("0", "1"))
    got = read_labelled(data_dir / "ag_news/test.tsv.gz", names=["World", "Sports", "Business", "Sci/Tech"])
    assert np.bincount(got.labels).tolist() == [1900] * 4
    got = read_labelled(data_dir / "stsb/dev.tsv.gz", label="score", regression=True)
    assert len(got.texts) == 1500 and len(got.texts[0]) == 2 and abs(got.labels.mean() - 2.36) < 0.005
    pairs = list(read_parallel(data_dir / "multi30k/val.de.gz", data_dir / "multi30k/val.en.gz"))
    assert len(pairs) == 1014
    images = read_images(data_dir / "fashion_mnist/test_first5000.npz")
    assert images.images.shape == (5000, 28, 28) and images.labels.max() == 9


@pytest.mark.slow
def test_public_idx_files(data_dir):
    folder = data_dir / "fashion_mnist"
    got = read_images(folder / "train-images-idx3-ubyte.gz", folder / "train-labels-idx1-ubyte.gz")
    assert got.images.shape == (60000, 28, 28) and np.bincount(got.labels).tolist() == [6000] * 10
