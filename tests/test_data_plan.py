"""Packing, buckets, chunks and the plan of an epoch: every example once, whatever the order."""

import math

import numpy as np
import pytest

from flaxcompress.data.buckets import bucket_lengths, find_buckets, make_buckets
from flaxcompress.data.chunks import cut_documents, join_units
from flaxcompress.data.packing import Packing, pack_lengths
from flaxcompress.data.plan import FILLER, Plan
from flaxcompress.data.tokens import Tokens


def lengths(n=500, limit=64, seed=0):
    return np.random.default_rng(seed).integers(1, limit + 1, n)


def best_fit(given, limit):
    """Rows of best fit, one example after the other, from the longest."""
    rooms = []
    for size in sorted(given.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=limit) - size)
    return len(rooms)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [64, 200])
def test_packing_holds_every_example_once(seed, limit):
    given = lengths(seed=seed)
    packing = Packing(given, limit)
    seen = []
    for rng in (None, np.random.default_rng(0), np.random.default_rng(1)):
        examples, starts = packing.bins(rng)
        assert sorted(examples.tolist()) == list(range(500))
        sums = np.add.reduceat(given[examples], starts[:-1])
        assert sums.max() <= limit and len(sums) == packing.rows == len(starts) - 1
        seen.append((examples.tolist(), sums.tolist()))
    assert seen[0][1] == seen[1][1] == seen[2][1]  # the same lengths in every row of every epoch
    assert seen[1][0] != seen[2][0]
    assert packing.rows == best_fit(given, limit)


def test_best_fit_on_a_case_by_hand():
    # 7 | 5+3 | 5+3 | 2+2+2: each goes to the fullest row with room.
    rows = pack_lengths(np.array([3, 5, 2, 7, 5, 2, 3, 2]), 8)
    assert sorted((many, row) for many, row in rows) == [(1, (2, 2, 2)), (1, (7,)), (2, (5, 3))]


def test_a_million_examples_are_packed_by_their_lengths_alone():
    given = lengths(10**6, 128)
    rows = pack_lengths(given, 128)
    assert len(rows) < 2000
    assert sum(many * len(row) for many, row in rows) == 10**6
    assert sum(many * sum(row) for many, row in rows) == given.sum()


@pytest.mark.parametrize("bad", [[9], [0], [3, 12]])
def test_packing_refuses_what_does_not_fit(bad):
    with pytest.raises(ValueError, match="lengths must be 1 to 8"):
        pack_lengths(np.array(bad), 8)


def test_bucket_lengths():
    assert bucket_lengths(128) == (32, 64, 96, 128)
    assert bucket_lengths(100, 3) == (40, 72, 100)
    assert bucket_lengths(7) == (7,)
    assert make_buckets(64, [16, 64]) == (16, 64)
    assert find_buckets(np.array([1, 16, 17, 64]), (16, 64)).tolist() == [0, 0, 1, 1]
    for bad, message in (
        ([64, 16], "must be the length 64"),
        ([64, 64], "must be ascending"),
        ([], "must be the length"),
    ):
        with pytest.raises(ValueError, match=message):
            make_buckets(64, bad)
    with pytest.raises(ValueError, match="an example has 65 tokens, but the longest bucket has 64"):
        find_buckets(np.array([65]), (16, 64))


@pytest.mark.parametrize("batch_size", [1, 7, 32, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once_in_one_partial_batch_at_most(batch_size, shuffle):
    buckets = find_buckets(lengths(), (16, 32, 64))
    plan = Plan(buckets, batch_size=batch_size, seed=3, shuffle=shuffle)
    orders = []
    for number in (0, 1, 7):
        epoch = plan.epoch(number)
        assert epoch.rows.shape == (plan.batches, batch_size) == (math.ceil(500 / batch_size), batch_size)
        assert sorted(epoch.rows[epoch.rows != FILLER].tolist()) == list(range(500))
        assert ((epoch.rows == FILLER).any(1)).sum() <= 1
        filled = np.where(epoch.rows == FILLER, 0, buckets[epoch.rows])
        np.testing.assert_array_equal(filled.max(1), epoch.buckets)
        mixed = ((filled != epoch.buckets[:, None]) & (epoch.rows != FILLER)).any(1)
        assert mixed.sum() <= 3  # only what buckets leave over
        orders.append(epoch.rows.tolist())
    assert (orders[0] == orders[1]) == (not shuffle)
    again = Plan(buckets, batch_size=batch_size, seed=3, shuffle=shuffle)
    assert again.epoch(7).rows.tolist() == orders[2]  # random access, without the epochs before


def test_without_shuffling_and_buckets_rows_keep_their_order():
    plan = Plan(np.zeros(10, np.int64), batch_size=4, seed=0, shuffle=False)
    assert plan.epoch(0).rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]


def test_plan_refuses():
    with pytest.raises(ValueError, match="there are no examples"):
        Plan([], batch_size=4, seed=0, shuffle=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Plan([0], batch_size=0, seed=0, shuffle=False)


def test_cut_documents_has_every_target_once():
    places = np.array([0, 1, 3, 14, 20])  # documents of 1, 2, 11 and 6 tokens
    chunks = cut_documents(places, 6, overlap=1)
    assert [(a, b) for a, b in zip(*chunks, strict=True)] == [(1, 3), (3, 9), (8, 14), (14, 20)]
    for limit in range(2, 15):
        chunks = cut_documents(places, limit, overlap=1)
        targets = [t for a, b in zip(*chunks, strict=True) for t in range(a + 1, b)]
        inputs = [t for a, b in zip(*chunks, strict=True) for t in range(a, b - 1)]
        assert targets == [t for t in range(20) if t not in places]
        assert inputs == [t for t in range(20) if t + 1 not in places]
        assert chunks.lengths.max() <= limit
        whole = cut_documents(places, limit)
        assert [t for a, b in zip(*whole, strict=True) for t in range(a, b)] == list(range(20))
    assert cut_documents(places, 3, least=2).lengths.tolist() == [2, 3, 3, 3, 2, 3, 3]
    assert cut_documents(places, 5, least=2).lengths.tolist() == [2, 5, 4, 2, 4, 2]  # 5 5 1 and 5 1 would be too short


def test_join_units():
    # Units of 2, 3, 4 | 12, 1 | 1 tokens.
    tokens = Tokens(np.arange(23), np.zeros(0, bool), np.array([0, 2, 5, 9, 21, 22, 23]), np.array([0, 3, 5, 6]))
    for limit, want in (
        (5, [(0, 5), (5, 9), (9, 14), (14, 19), (19, 22), (22, 23)]),
        (9, [(0, 9), (9, 18), (18, 22), (22, 23)]),
        (100, [(0, 9), (9, 22), (22, 23)]),
    ):
        got = join_units(tokens, limit)
        assert [(a, b) for a, b in zip(*got, strict=True)] == want
