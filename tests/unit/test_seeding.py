"""Noise: the published algorithm, pure in its arguments, independent between them, and blind to global generators."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.seeding import Stream, derive, integer, permutation, seed_torch, uniforms

words = st.integers(0, 2**64 - 1)
streams = st.sampled_from(Stream)


def philox4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """The round function of Salmon et al. (SC 2011), written from the paper in plain integers."""
    mask = 2**64 - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


def test_reference_implementation_meets_the_published_known_answer() -> None:
    assert philox4x64_10([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@settings(max_examples=30)
@given(words, streams, words, words)
def test_uniforms_are_philox_words_of_key_and_counter(seed: int, stream: Stream, sample: int, mc: int) -> None:
    # numpy increments the counter before the first block, hence blocks 1, 2, 3.
    blocks = [philox4x64_10([block, mc, sample, 0], [seed, int(stream)]) for block in (1, 2, 3)]
    expected = [(word >> 11) / 2**53 for block in blocks for word in block][:10]
    assert uniforms(seed, stream, sample, mc, 10).tolist() == expected


def test_no_entropy_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constructed with ``key=``, numpy's Philox would read some and throw it away: the largest cost of a short row."""
    monkeypatch.setattr("numpy.random.bit_generator.randbits", lambda bits: pytest.fail("entropy was read"))
    with pytest.raises(pytest.fail.Exception):
        np.random.Philox(key=3)  # the trap catches what it should
    uniforms(1234, Stream.MASK, 3, 0, 50)


@settings(max_examples=50)
@given(st.integers(-(2**63), 2**63), streams, st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 70))
def test_uniforms_are_pure_and_shorter_requests_are_prefixes(
    seed: int, stream: Stream, sample: int, mc: int, count: int
) -> None:
    longer = uniforms(seed, stream, sample, mc, 100)
    uniforms(seed + 1, stream, sample, mc, 3)  # a draw in between leaves nothing behind
    assert np.array_equal(uniforms(seed, stream, sample, mc, count), longer[:count])
    assert longer.dtype == np.float64 and (longer >= 0).all() and (longer < 1).all()


def test_global_generators_neither_matter_nor_move() -> None:
    before = uniforms(7, Stream.MASK, 3, 0, 50)
    np.random.seed(1)
    torch.manual_seed(1)
    torch_state = torch.get_rng_state()
    assert np.array_equal(uniforms(7, Stream.MASK, 3, 0, 50), before)
    permutation(7, Stream.ORDER, 3, 0, 50)
    integer(7, Stream.ORDER, 3, 0, 50)
    assert np.random.random() == np.random.RandomState(1).random_sample(), (
        "the first draw after seed(1) is still to come"
    )
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_every_argument_gives_independent_numbers() -> None:
    """Rows that differ in one argument (sample, Monte Carlo id, stream or seed) do not correlate."""
    count = 4096
    rows = [uniforms(1234, Stream.MASK, sample, 0, count) for sample in range(100)]
    rows += [uniforms(1234, Stream.MASK, 0, mc, count) for mc in range(1, 30)]
    rows += [uniforms(1234, stream, 0, 0, count) for stream in Stream if stream != Stream.MASK]
    rows += [uniforms(seed, Stream.MASK, 0, 0, count) for seed in range(1235, 1265)]
    correlation = np.corrcoef(np.stack(rows))
    off_diagonal = correlation[np.triu_indices(len(rows), 1)]
    # 13,000 pairs, each N(0, 1/count) if independent: the largest is near 4 standard deviations.
    assert np.abs(off_diagonal).max() < 5.5 / count**0.5
    assert abs(off_diagonal.std() * count**0.5 - 1) < 0.05


@pytest.mark.parametrize("along", ["within a sample", "across samples"])
def test_uniform_distribution(along: str) -> None:
    n = 20_000
    if along == "within a sample":
        u = uniforms(5, Stream.MASK, 0, 0, n)
    else:
        u = np.array([uniforms(5, Stream.TIME, sample, 0, 1)[0] for sample in range(n)])
    counts = np.bincount((u * 20).astype(int), minlength=20)
    assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 36.2  # 1 % level of chi-square with 19 degrees of freedom


def test_streams_are_never_renumbered() -> None:
    """A changed number changes every run ever started: add new streams, do not touch old ones."""
    numbers = {stream.name: int(stream) for stream in Stream}
    assert numbers == {
        "TIME": 1, "MASK": 2, "ORDER": 3, "AR_RATIO": 4, "RANDMASK": 5,
        "EVALUATION_TIME": 6, "EVALUATION_MASK": 7, "TORCH": 8, "ORDER_LIST": 9,
    }  # fmt: skip


@settings(max_examples=50)
@given(words, st.integers(0, 1000), st.integers(1, 200))
def test_integer_and_permutation_are_valid(seed: int, sample: int, bound: int) -> None:
    assert 0 <= integer(seed, Stream.ORDER, sample, 0, bound) < bound
    assert sorted(permutation(seed, Stream.ORDER, sample, 0, bound).tolist()) == list(range(bound))


def test_integer_and_permutation_are_uniform() -> None:
    n = 12_000
    integers = [integer(9, Stream.ORDER, sample, 0, 6) for sample in range(n)]
    assert np.abs(np.bincount(integers, minlength=6) - n / 6).max() < 4.5 * (n * 5 / 36) ** 0.5
    orders = [tuple(permutation(9, Stream.ORDER, sample, 1, 3).tolist()) for sample in range(n)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(abs(count - n / 6) for count in counts) < 4.5 * (n * 5 / 36) ** 0.5


def test_derive_tells_words_and_their_order_apart() -> None:
    seeds = {derive(1, 2, 3), derive(1, 3, 2), derive(1, 2), derive(1), derive(2, 1, 3), derive(1, 2, 3, 0)}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 2) == 5934340693050249675  # committed: runs depend on it


def test_dropout_differs_between_data_parallel_ranks_and_repeats_for_one() -> None:
    with torch.random.fork_rng():
        draws = []
        for rank, stage in ((0, 0), (0, 0), (1, 0), (0, 1), (1, 1)):
            seed_torch(1234, rank, stage)
            draws.append(torch.rand(8))
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 4, "every replica and every stage draws its own"
