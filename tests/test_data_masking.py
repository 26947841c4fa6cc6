"""Masking, sentence order and span corruption: exact counts, and shares within bounds of the binomial law."""

import math

import numpy as np
import pytest

from flaxcompress.data.chunks import Chunks
from flaxcompress.data.masking import choose_words, mask_row, masked_count, ngram_shares, word_spans
from flaxcompress.data.sentence_order import IN_ORDER, SWAPPED, inner_borders, split_pair
from flaxcompress.data.span_corruption import SpanCounts, corrupt, longest_stretch, noise_mask, span_counts
from flaxcompress.data.tokens import Tokens

MASK, FIRST_ORDINARY, VOCABULARY = 4, 5, 1000


def bound(n, p):
    """5 standard deviations of a share of n draws of likelihood p: exceeded once in 1.7 million tests."""
    return 5 * math.sqrt(p * (1 - p) / n)


def mask(ids, starts, inside, seed, rate=0.15, longest=3):
    replacements = np.arange(FIRST_ORDINARY, VOCABULARY)
    rng = np.random.default_rng(seed)
    return mask_row(ids, starts, inside, mask=MASK, replacements=replacements, rate=rate, longest=longest, rng=rng)


def test_ngram_lengths_follow_one_over_n():
    np.testing.assert_allclose(ngram_shares(3), [6 / 11, 3 / 11, 2 / 11], rtol=1e-15)
    # The first run drawn is taken whole if three tokens fit, and is cut short only by the end of the row.
    words, n = 1000, 4000
    sizes, room = np.ones(words, np.int64), words - np.arange(words)
    counts = np.zeros(4)
    for seed in range(n):
        counts[choose_words(sizes, room, 3, longest=3, rng=np.random.default_rng(seed))[0][1]] += 1
    one, two, three = ngram_shares(3)
    want = [one + (two + three) / words, two * (1 - 1 / words) + three / words, three * (1 - 2 / words)]
    for length, share in enumerate(want, 1):
        assert abs(counts[length] / n - share) < bound(n, share)


@pytest.mark.parametrize(("length", "rate", "want"), [(1, 0.15, 1), (10, 0.15, 2), (100, 0.15, 15), (123, 0.15, 18)])
def test_masked_count(length, rate, want):
    assert masked_count(length, rate) == want


def test_single_tokens_are_hidden_in_exact_number_and_80_10_10():
    length, rows = 400, 100
    rng = np.random.default_rng(0)
    kinds = np.zeros(3)
    hits = np.zeros(length)
    for seed in range(rows):
        ids = rng.integers(FIRST_ORDINARY, VOCABULARY, length)
        got = mask(ids, np.ones(length, bool), np.ones(length, np.int64), seed, longest=1)
        assert len(got.positions) == 60  # 15 % of 400
        assert (np.diff(got.positions) > 0).all()
        np.testing.assert_array_equal(got.labels, ids[got.positions])
        untouched = np.delete(np.arange(length), got.positions)
        np.testing.assert_array_equal(got.ids[untouched], ids[untouched])
        now = got.ids[got.positions]
        assert ((now == MASK) | (now >= FIRST_ORDINARY)).all()
        kinds += [(now == MASK).sum(), ((now != MASK) & (now != got.labels)).sum(), (now == got.labels).sum()]
        hits[got.positions] += 1
    n, same = 60 * rows, 0.1 / (VOCABULARY - FIRST_ORDINARY)  # a random token may be the token itself
    for got, want in zip(kinds / n, (0.8, 0.1 - same, 0.1 + same), strict=True):
        assert abs(got - want) < bound(n, want)
    assert (abs(hits / rows - 0.15) < bound(rows, 0.15)).all()  # all places alike


def test_whole_words_are_hidden_whole_and_within_their_segment():
    rng = np.random.default_rng(1)
    total = hidden = 0
    for seed in range(200):
        # [CLS] words [SEP] words [SEP]
        sizes = [rng.integers(1, 4, 30), rng.integers(1, 4, 20)]
        starts, inside, ids = [True], [0], [2]
        for segment, words in enumerate(sizes, 1):
            for size in words:
                starts += [True] + [False] * (size - 1)
                inside += [segment] * size
                ids += rng.integers(FIRST_ORDINARY, VOCABULARY, size).tolist()
            starts, inside, ids = [*starts, True], [*inside, 0], [*ids, 3]
        starts, inside, ids = np.array(starts), np.array(inside), np.array(ids)
        got = mask(ids, starts, inside, seed)
        tokens = int((inside > 0).sum())
        assert (inside[got.positions] > 0).all()  # no special token
        word = np.cumsum(starts | (np.diff(inside, prepend=0) != 0))
        chosen = np.isin(word, word[got.positions]) & (inside > 0)
        np.testing.assert_array_equal(np.flatnonzero(chosen), got.positions)  # whole words
        # A run that is too long is shortened by words of at most 3 tokens, or another one fills the room.
        assert masked_count(tokens, 0.15) - 2 <= len(got.positions) <= masked_count(tokens, 0.15)
        total, hidden = total + tokens, hidden + len(got.positions)
    assert abs(hidden / total - 0.15) < 0.01


def test_runs_stay_in_their_segment():
    sizes, room = np.ones(10, np.int64), np.array([5, 4, 3, 2, 1] * 2)
    for seed in range(300):
        for word, n in choose_words(sizes, room, 4, longest=3, rng=np.random.default_rng(seed)):
            assert word // 5 == (word + n - 1) // 5


def test_word_spans():
    starts = np.array([1, 1, 0, 1, 1, 0, 1, 0, 1], bool)
    inside = np.array([0, 1, 1, 1, 0, 2, 2, 2, 0])  # the second segment begins within a word
    begins, sizes, room = word_spans(starts, inside)
    assert (begins.tolist(), sizes.tolist(), room.tolist()) == ([1, 3, 5, 6], [2, 1, 1, 2], [2, 1, 2, 1])


def test_a_row_whose_words_are_all_too_long_hides_nothing():
    starts = np.array([True, False, False, False])
    got = mask(np.array([7, 8, 9, 10]), starts, np.ones(4, np.int64), 0)
    assert not len(got.positions) and got.ids.tolist() == [7, 8, 9, 10]


def test_masking_is_a_function_of_the_seed():
    ids = np.arange(FIRST_ORDINARY, 105)
    ones = np.ones(100, np.int64)
    rows = [mask(ids, ones > 0, ones, seed).ids.tolist() for seed in (3, 3, 4)]
    assert rows[0] == rows[1] != rows[2]


def test_sentence_order_cuts_at_every_border_and_swaps_half():
    tokens = Tokens(np.arange(12), np.zeros(0, bool), np.array([0, 3, 5, 9, 12]), np.array([0, 3, 4]))
    first, last = inner_borders(tokens, Chunks(np.array([0, 3, 9]), np.array([9, 9, 12])))
    assert [tokens.units[a:b].tolist() for a, b in zip(first, last, strict=True)] == [[3, 5], [5], []]
    n = 4000
    counts = {}
    for seed in range(n):
        got = split_pair(0, 9, np.array([3, 5]), np.random.default_rng(seed))
        counts[got] = counts.get(got, 0) + 1
    want = {((0, c), (c, 9), IN_ORDER) for c in (3, 5)} | {((c, 9), (0, c), SWAPPED) for c in (3, 5)}
    assert set(counts) == want
    assert all(abs(count / n - 0.25) < bound(n, 0.25) for count in counts.values())
    with pytest.raises(ValueError, match="one unit has no two segments"):
        split_pair(0, 9, np.zeros(0, np.int64), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("length", "want"),
    # 568 tokens for inputs of 512 and targets of 114 are T5's own published figures.
    [(568, (85, 28, 512, 114)), (100, (15, 5, 91, 21)), (2, (1, 1, 3, 3)), (10, (2, 1, 10, 4))],
)
def test_span_counts(length, want):
    assert tuple(span_counts(length)) == want


def test_longest_stretch():
    assert longest_stretch(512) == 568
    for inputs in range(3, 200):
        length = longest_stretch(inputs)
        assert span_counts(length).inputs <= inputs < span_counts(length + 1).inputs
    with pytest.raises(ValueError, match="a length of 2 is too short"):
        longest_stretch(2)


def restore(inputs, targets, sentinels, end):
    """The text before corruption, from input and target."""
    runs, place = {}, None
    for token in targets[:-1].tolist():
        if token in sentinels:
            runs[place := token] = []
        else:
            runs[place].append(token)
    whole = [t for token in inputs[:-1].tolist() for t in runs.get(token, [token])]
    assert inputs[-1] == targets[-1] == end
    return whole


def test_span_corruption_can_be_undone_and_has_the_stated_lengths():
    sentinels, end = list(range(2000, 2100)), 1
    for seed in range(300):
        rng = np.random.default_rng(seed)
        ids = rng.integers(5, 1000, int(rng.integers(2, 300))).astype(np.uint16)
        counts = span_counts(len(ids))
        noise = noise_mask(len(ids), counts, rng)
        assert noise.sum() == counts.noise and not noise[0]
        inputs, targets = corrupt(ids, noise, sentinels, end)
        assert (len(inputs), len(targets)) == (counts.inputs, counts.targets)
        assert [t for t in inputs.tolist() if t >= 2000] == sentinels[: counts.spans]
        assert restore(inputs, targets, sentinels, end) == ids.tolist()


def test_all_ways_to_cut_runs_are_equally_likely():
    # 5 tokens, 3 taken out in 2 runs, each after one that stays: lengths (1, 2) or (2, 1).
    counts, n = SpanCounts(noise=3, spans=2, inputs=5, targets=6), 2000
    masks = [tuple(noise_mask(5, counts, np.random.default_rng(seed)).astype(int).tolist()) for seed in range(n)]
    assert set(masks) == {(0, 1, 0, 1, 1), (0, 1, 1, 0, 1)}
    assert abs(masks.count((0, 1, 0, 1, 1)) / n - 0.5) < bound(n, 0.5)


def test_too_few_sentinels():
    with pytest.raises(ValueError, match="2 spans, but the tokenizer has 1 sentinels"):
        corrupt(np.arange(4), np.array([False, True, False, True]), [9], 1)
