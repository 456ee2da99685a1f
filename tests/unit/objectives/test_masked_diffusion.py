"""Masked diffusion: what is masked, what it weighs, and that both depend on seed and ids alone."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.batch_schedule import BatchSchedule
from megatron.config import ObjectiveConfig
from megatron.objectives import Batch, MaskedDiffusion, Objective, build_objective
from megatron.objectives.masked_diffusion import EPSILON, EVALUATION_SEED, move_to_end
from megatron.tokenizer.vocabulary import build_vocabulary

EOD, MASK, S = 9, 10, 32
MakeObjective = Callable[..., Objective]
MakeTokens = Callable[..., Tensor]
SAMPLERS = ["bernoulli", "exact"]


def batch_of(objective: Objective, make_tokens: MakeTokens, ids: list[int], mc: int = 0, s: int = S) -> Batch:
    return objective.make_batch(make_tokens(ids, s), torch.tensor(ids), torch.full((len(ids),), mc))


def masks_of(objective: Objective, ids: list[int], mc: int = 0) -> np.ndarray:
    """[b, s] bool, read off a batch of clean tokens that are all 0."""
    assert isinstance(objective, MaskedDiffusion)
    tokens = torch.zeros(len(ids), objective.seq_length + 1, dtype=torch.int64)
    batch = objective.make_batch(tokens, torch.tensor(ids), torch.full((len(ids),), mc))
    return (batch.inputs == MASK).numpy()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inputs_targets_and_weights(sampler: str, make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    objective = make_objective("mdm", mask_sampler=sampler)
    ids = list(range(16))
    tokens = make_tokens(ids)
    batch = objective.make_batch(tokens, torch.tensor(ids))
    masked = batch.inputs == MASK
    assert not objective.causal
    assert torch.equal(batch.targets, tokens[:, 1:]), "the autoregressive targets"
    assert torch.equal(batch.inputs[~masked], batch.targets[~masked])
    assert torch.equal(batch.weights != 0, masked)
    assert batch.counted.tolist() == [32.0] * 16
    assert batch.positions.tolist() == [list(range(32))] * 16 and batch.attention_mask is None
    for row in range(16):
        assert len(batch.weights[row][masked[row]].unique()) <= 1, "one weight a row"


def test_weight_is_one_over_p(make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    objective = make_objective("mdm", time_sampler="uniform")
    assert isinstance(objective, MaskedDiffusion)
    batch = batch_of(objective, make_tokens, list(range(40)))
    for row in range(40):
        p = 0.999 * objective.levels.level(row, 0) + 0.001
        weights = batch.weights[row][batch.weights[row] != 0] * 40 * S
        assert torch.allclose(weights, torch.tensor(1 / p, dtype=torch.float32), rtol=1e-6)


@settings(max_examples=25)
@given(s=st.integers(1, 70), seed=st.integers(0, 2**63))
def test_exact_sampler_masks_exactly_its_number(s: int, seed: int, make_objective: MakeObjective) -> None:
    objective = make_objective("mdm", mask_sampler="exact", seq_length=s, seed=seed)
    assert isinstance(objective, MaskedDiffusion)
    masked, weight = objective.draw_masks(torch.arange(16))
    for row in range(16):
        count = 1 + int(objective.levels.level(row, 0) * s)
        assert 1 <= count <= s and masked[row].sum() == count
        assert weight[row] == pytest.approx(s / count)


def test_exact_sampler_draws_every_number_equally_often_and_every_position(make_objective: MakeObjective) -> None:
    objective = make_objective("mdm", mask_sampler="exact", time_sampler="uniform", seq_length=5)
    masked = masks_of(objective, list(range(5000)))
    counts = np.bincount(masked.sum(axis=1), minlength=6)
    assert counts[0] == 0 and np.abs(counts[1:] - 1000).max() < 4.5 * 800**0.5
    share = masked.mean(axis=0)  # P(masked) = mean of l / 5 = 0.6
    assert np.abs(share - 0.6).max() < 4.5 * (0.24 / 5000) ** 0.5


def test_bernoulli_masks_each_position_with_its_probability(make_objective: MakeObjective) -> None:
    objective = make_objective("mdm", seq_length=1024, global_batch_size=64)
    assert isinstance(objective, MaskedDiffusion)
    masked, weight = objective.draw_masks(torch.arange(64))
    p = 1 / weight
    standard = (masked.sum(axis=1) - 1024 * p) / np.sqrt(1024 * p * (1 - p))
    assert np.abs(standard).max() < 4.5 and abs(standard.std() - 1) < 0.3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_uniform_weighting_weighs_all_masked_tokens_alike(
    sampler: str, make_objective: MakeObjective, make_tokens: MakeTokens
) -> None:
    """One weight, the same sum as the ELBO's on average: 1 / (mean masked share)."""
    objective = make_objective("mdm", mask_sampler=sampler, loss_weighting="uniform", time_sampler="uniform")
    batch = batch_of(objective, make_tokens, list(range(4000)))
    weights = batch.weights[batch.weights != 0].unique() * 4000 * S
    mean_share = (1 + EPSILON) / 2 if sampler == "bernoulli" else (S + 1) / (2 * S)
    assert weights.tolist() == pytest.approx([1 / mean_share], rel=1e-5)
    assert batch.weights.sum().item() == pytest.approx(1, abs=4 * (1 / 3 / 4000) ** 0.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_elbo_weights_sum_to_one_on_average(
    sampler: str, make_objective: MakeObjective, make_tokens: MakeTokens
) -> None:
    """The expected weight of every position is 1/(b*s): with a constant NLL the loss is that constant."""
    objective = make_objective("mdm", mask_sampler=sampler, time_sampler="uniform")
    sums = batch_of(objective, make_tokens, list(range(4000))).weights.sum(dim=1).double() * 4000  # [b], mean 1
    if sampler == "exact":
        assert sums.tolist() == pytest.approx([1.0] * 4000, rel=1e-5), "always, not only on average"
    else:
        assert abs(sums.mean().item() - 1) < 4 * sums.std().item() / 4000**0.5


def test_a_row_without_masks_contributes_nothing(make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    objective = make_objective("mdm", seq_length=2, time_sampler="uniform")
    batch = batch_of(objective, make_tokens, list(range(300)), s=2)
    empty = (batch.inputs != MASK).all(dim=1)
    assert 50 < empty.sum() < 150, "the test needs such rows (a third of them)"
    assert (batch.weights[empty] == 0).all() and torch.isfinite(batch.weights).all()
    alone = batch_of(objective, make_tokens, [int(empty.nonzero()[0])], s=2)
    assert alone.weights.sum() == 0 and alone.scored is not None and len(alone.scored) == 2


# --- PITFALLS 3: left-to-right masking ---


@pytest.mark.parametrize("count", range(6))
def test_pitfall_3_moving_masks_to_the_end_keeps_their_number(count: int) -> None:
    mask = np.zeros(5, dtype=bool)
    mask[:count] = True
    assert move_to_end(mask).tolist() == [False] * (5 - count) + [True] * count


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seq_length", [1, 2, 32])
def test_pitfall_3_ar_ratio_one_masks_only_ends(sampler: str, seq_length: int, make_objective: MakeObjective) -> None:
    """Same counts and weights as without the flag; no mask (n = 0) masks nothing, n = s masks all."""
    flags = {"mask_sampler": sampler, "seq_length": seq_length, "time_sampler": "uniform"}
    plain, moved = make_objective("mdm", **flags), make_objective("mdm", ar_ratio=1.0, **flags)
    assert isinstance(plain, MaskedDiffusion) and isinstance(moved, MaskedDiffusion)
    ids = torch.arange(400)
    (before, weight_before), (after, weight_after) = plain.draw_masks(ids), moved.draw_masks(ids)
    counts = before.sum(axis=1)
    assert np.array_equal(after.sum(axis=1), counts) and np.array_equal(weight_before, weight_after)
    assert (np.diff(after.astype(int), axis=1) >= 0).all(), "masks are a suffix"
    assert (counts == seq_length).any()
    if sampler == "bernoulli" and seq_length <= 2:
        assert (counts == 0).any()


def test_pitfall_3_weights_follow_the_moved_masks(make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    batch = batch_of(make_objective("mdm", ar_ratio=1.0), make_tokens, list(range(64)))
    assert torch.equal(batch.weights != 0, batch.inputs == MASK)


def test_ar_ratio_is_a_probability_per_sequence(make_objective: MakeObjective) -> None:
    ids = torch.arange(3000)
    plain, mixed = make_objective("mdm"), make_objective("mdm", ar_ratio=0.3)
    assert isinstance(plain, MaskedDiffusion) and isinstance(mixed, MaskedDiffusion)
    before, after = plain.draw_masks(ids)[0], mixed.draw_masks(ids)[0]
    is_suffix = (np.diff(before.astype(int), axis=1) >= 0).all(axis=1)  # moving would not show
    moved = (before != after).any(axis=1)[~is_suffix]
    assert abs(moved.mean() - 0.3) < 4 * (0.21 / len(moved)) ** 0.5
    assert (np.diff(after[(before != after).any(axis=1)].astype(int), axis=1) >= 0).all()


# --- PITFALLS 4: ends of documents ---


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pitfall_4_eod_mask_loss(sampler: str, make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    """Eod targets carry no loss but are masked like others; the weights of the others do not change."""
    ids = list(range(32))
    plain = batch_of(make_objective("mdm", mask_sampler=sampler), make_tokens, ids)
    batch = batch_of(make_objective("mdm", mask_sampler=sampler, eod_mask_loss=True), make_tokens, ids)
    is_eod = batch.targets == EOD
    assert torch.equal(batch.inputs, plain.inputs)
    assert (batch.inputs[is_eod] == MASK).any() and (plain.weights[is_eod] != 0).any()
    assert torch.equal(batch.weights, plain.weights * ~is_eod)
    assert batch.counted.tolist() == (~is_eod).sum(dim=1).tolist()


def test_pitfall_4_documents_are_found_on_the_clean_tokens(make_objective: MakeObjective) -> None:
    """Masked ends of documents still separate: confinement is the same for every noise draw."""
    flags = {"reset_position_ids": True, "reset_attention_mask": True, "seq_length": 5}
    objective = make_objective("mdm", **flags)
    tokens = torch.tensor([[7, 1, EOD, 3, EOD, 5]])
    seen_masked = False
    for sample_id in range(60):
        batch = objective.make_batch(tokens, torch.tensor([sample_id]))
        seen_masked |= batch.inputs[0, 1].item() == MASK
        assert batch.positions.tolist() == [[0, 1, 0, 1, 0]]
        assert batch.attention_mask is not None
        assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 2]]
    assert seen_masked


# --- PITFALLS 1, 2, 6: noise is a function of seed and ids ---


FLAGS = st.fixed_dictionaries(
    {
        "time_sampler": st.sampled_from(["stratified", "uniform"]),
        "mask_sampler": st.sampled_from(SAMPLERS),
        "ar_ratio": st.sampled_from([0.0, 0.5]),
        "eod_mask_loss": st.booleans(),
        "reset_position_ids": st.booleans(),
        "rampup": st.sampled_from([None, (4, 4, 20)]),
    }
)


@settings(max_examples=40)
@given(flags=FLAGS, mc=st.integers(0, 3), data=st.data())
def test_pitfall_2_a_row_is_the_same_in_any_split_order_and_process(
    flags: dict[str, Any], mc: int, data: st.DataObject, make_objective: MakeObjective, make_tokens: MakeTokens
) -> None:
    """Whatever micro-batch, rank, accumulation, worker or pipeline stage meets a sample, its noise is its own."""
    objective = make_objective("mdm", **flags)
    other_process = pickle.loads(pickle.dumps(objective))
    ids = data.draw(st.permutations(range(24)))
    size = data.draw(st.integers(1, 24))
    whole = batch_of(objective, make_tokens, list(range(24)), mc)
    for start in range(0, 24, size):
        part_ids = list(ids[start : start + size])
        part = batch_of(other_process, make_tokens, part_ids, mc)
        assert torch.equal(part.inputs, whole.inputs[part_ids])
        assert torch.equal(part.positions, whole.positions[part_ids])
        assert torch.equal(part.counted, whole.counted[part_ids])
        torch.testing.assert_close(part.weights * len(part_ids), whole.weights[part_ids] * 24, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pitfall_1_ranks_and_samples_have_independent_noise(sampler: str, make_objective: MakeObjective) -> None:
    """Of 64 samples (eight ranks, accumulation 2, micro-batch 4) no two share a mask, and masks do not correlate."""
    objective = make_objective("mdm", mask_sampler=sampler, seq_length=2048, global_batch_size=64)
    masked = masks_of(objective, list(range(64)))
    shares = masked.mean(axis=1)
    assert len({row.tobytes() for row in masked}) == 64
    inner = masked[(shares > 0.05) & (shares < 0.95)]
    correlation = np.corrcoef(inner.astype(float))[np.triu_indices(len(inner), 1)]
    assert np.abs(correlation).max() < 5 / 2048**0.5
    assert abs(correlation.std() * 2048**0.5 - 1) < 0.1


def test_pitfall_1_a_micro_batch_s_masked_share_is_near_one_half(make_objective: MakeObjective) -> None:
    """0.09 of spread of the levels (see test_masking_levels) and 4 standard errors of 8 x 2048 masks."""
    objective = make_objective("mdm", seq_length=2048, global_batch_size=64)
    shares = masks_of(objective, list(range(256))).reshape(-1, 8, 2048).mean(axis=(1, 2))
    assert np.abs(shares - 0.5).max() < 0.09 + 4 * (0.25 / (8 * 2048)) ** 0.5


def test_pitfall_1_global_generators_do_not_matter(make_objective: MakeObjective) -> None:
    objective = make_objective("mdm", ar_ratio=0.5)
    first = masks_of(objective, [0, 1])
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state = torch.get_rng_state()
    assert np.array_equal(masks_of(objective, [0, 1]), first)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_pitfall_6_a_resumed_run_goes_on_with_new_noise(make_objective: MakeObjective) -> None:
    """Nothing to save: a new process that starts at sample 16 draws what the first would have, not 0 .. 15 again."""
    uninterrupted = masks_of(make_objective("mdm"), list(range(32)))
    resumed = masks_of(make_objective("mdm"), list(range(16, 32)))
    assert np.array_equal(resumed, uninterrupted[16:])
    assert not np.array_equal(resumed, uninterrupted[:16])


def test_seed_and_monte_carlo_id_change_the_noise(make_objective: MakeObjective) -> None:
    first = masks_of(make_objective("mdm"), list(range(8)))
    assert not np.array_equal(masks_of(make_objective("mdm", seed=1235), list(range(8))), first)
    assert not np.array_equal(masks_of(make_objective("mdm"), list(range(8)), mc=1), first)


def test_monte_carlo_draws_of_a_window_have_independent_masks(make_objective: MakeObjective) -> None:
    """Not one set of uniforms cut at several levels: nested masks would not average out."""
    evaluation = make_objective("mdm", seq_length=2048).for_evaluation(num_windows=4, num_mc=4)
    masked = np.concatenate([masks_of(evaluation, [0, 1, 2, 3], mc) for mc in range(4)]).astype(float)
    shares = masked.mean(axis=1)
    correlation = np.corrcoef(masked[(shares > 0.02) & (shares < 0.98)])
    assert len(correlation) >= 14
    assert np.abs(correlation[np.triu_indices(len(correlation), 1)]).max() < 4.5 / 2048**0.5


def test_noise_is_the_committed_one(make_objective: MakeObjective) -> None:
    """A change here changes every run ever started: the same seed must keep meaning the same masks."""
    rows = masks_of(make_objective("mdm", seq_length=16), [0, 1, 1000])
    assert ["".join("#" if masked else "." for masked in row) for row in rows] == [
        ".......#..#.....",
        "##########.#####",
        ".#####.#.###.#.#",
    ]


# --- low-noise start ---


def test_low_noise_start_masks_less_until_its_iteration(make_objective: MakeObjective) -> None:
    flags = {"seq_length": 2048, "low_noise_start": True, "low_noise_iter": 2, "low_noise_ratio": 0.4}
    shares = masks_of(make_objective("mdm", **flags), list(range(64))).mean(axis=1)
    assert shares[:32].max() < 0.45 and shares[:32].mean() == pytest.approx(0.2, abs=0.03)
    assert shares[32:].max() > 0.9 and shares[32:].mean() == pytest.approx(0.5, abs=0.05)
    plain = make_objective("mdm", seq_length=2048)
    assert np.array_equal(masks_of(make_objective("mdm", **flags), [32, 40]), masks_of(plain, [32, 40]))


# --- PITFALLS 10: evaluation ---


ABLATIONS: list[dict[str, Any]] = [
    {"seed": 5},
    {"ar_ratio": 0.7},
    {"time_sampler": "uniform"},
    {"mask_sampler": "exact"},
    {"loss_weighting": "uniform"},
    {"low_noise_start": True, "low_noise_iter": 1000, "low_noise_ratio": 0.1},
    {"global_batch_size": 64, "rampup": (4, 4, 100)},
]


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda flags: "-".join(flags))
def test_pitfall_10_evaluation_is_the_same_for_every_run(
    ablation: dict[str, Any], make_objective: MakeObjective, make_tokens: MakeTokens
) -> None:
    reference = make_objective("mdm").for_evaluation(num_windows=12, num_mc=3)
    training = make_objective("mdm", **ablation)
    before = batch_of(training, make_tokens, list(range(12)))
    evaluation = training.for_evaluation(num_windows=12, num_mc=3)
    for mc in range(3):
        expected, batch = (batch_of(o, make_tokens, list(range(12)), mc) for o in (reference, evaluation))
        assert torch.equal(batch.inputs, expected.inputs) and torch.equal(batch.weights, expected.weights)
    after = batch_of(training, make_tokens, list(range(12)))
    assert torch.equal(before.inputs, after.inputs), "the training objective is untouched"


def test_pitfall_10_evaluation_noise_repeats_and_is_not_the_training_noise(make_objective: MakeObjective) -> None:
    evaluation = make_objective("mdm", mask_sampler="exact").for_evaluation(num_windows=16, num_mc=1)
    same_seed = make_objective("mdm", mask_sampler="exact", seed=EVALUATION_SEED)
    assert np.array_equal(masks_of(evaluation, [3, 4]), masks_of(evaluation, [3, 4]))
    assert not np.array_equal(masks_of(evaluation, list(range(16))), masks_of(same_seed, list(range(16))))


def test_evaluation_keeps_the_flags_that_define_the_measure(
    make_objective: MakeObjective, make_tokens: MakeTokens
) -> None:
    training = make_objective("mdm", eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
    batch = batch_of(training.for_evaluation(4, 1), make_tokens, [0, 1, 2, 3])
    assert (batch.counted < S).any() and batch.attention_mask is not None and (batch.positions[:, -1] < S - 1).all()


def test_evaluation_masks_one_to_s_tokens_evenly(make_objective: MakeObjective) -> None:
    evaluation = make_objective("mdm", seq_length=8).for_evaluation(num_windows=4, num_mc=4)
    counts = np.stack([masks_of(evaluation, [0, 1, 2, 3], mc).sum(axis=1) for mc in range(4)], axis=1)  # [W, M]
    assert sorted(counts.flatten().tolist()) == sorted(list(range(1, 9)) * 2)
    assert all(len(set(row)) == 4 for row in counts.tolist())


# --- scored positions, mask id, shapes ---


@settings(max_examples=20)
@given(first=st.integers(0, 1000), b=st.integers(1, 9), sampler=st.sampled_from(SAMPLERS), eod_mask_loss=st.booleans())
def test_scored_positions_hold_the_whole_loss(
    first: int, b: int, sampler: str, eod_mask_loss: bool, make_objective: MakeObjective, make_tokens: MakeTokens
) -> None:
    objective = make_objective("mdm", mask_sampler=sampler, eod_mask_loss=eod_mask_loss)
    batch = batch_of(objective, make_tokens, list(range(first, first + b)))
    nll = torch.rand(b, S, generator=torch.Generator().manual_seed(first)).double()
    whole = (nll * batch.weights).sum().item()
    flat, scored = batch.weights.flatten(), batch.scored
    assert scored is not None and len(scored.unique()) == len(scored)
    assert len(scored) % 16 == 0 or len(scored) == b * S
    assert (nll.flatten()[scored] * flat[scored]).sum().item() == pytest.approx(whole, rel=1e-12)
    assert set(flat.nonzero().flatten().tolist()) <= set(scored.tolist())


def test_pitfall_5_the_mask_id_is_a_row_of_the_embedding() -> None:
    """Also where the number of tokens is a multiple of the padding: no input id reaches the padded size."""
    vocabulary = build_vocabulary(128, 128)
    objective = build_objective(ObjectiveConfig(objective="mdm"), vocabulary, EOD, 1, S, BatchSchedule(4))
    batch = objective.make_batch(torch.full((4, S + 1), 127), torch.arange(4))
    assert batch.inputs.max() == 128 and vocabulary.padded_size == 256
    assert batch.targets.max() == 127


def test_pitfall_7_no_state_is_shared_between_objectives(make_objective: MakeObjective) -> None:
    first = make_objective("mdm")
    masks = masks_of(first, [0, 1])
    masks_of(make_objective("mdm", seed=9, ar_ratio=1.0, mask_sampler="exact"), [0, 1])
    assert np.array_equal(masks_of(first, [0, 1]), masks)
    with pytest.raises(AttributeError):
        first.ar_ratio = 0.5  # type: ignore[attr-defined]


def test_wrong_length_is_caught(make_objective: MakeObjective) -> None:
    with pytest.raises(AssertionError, match=r"32 \+ 1 tokens, not 32"):
        make_objective("mdm").make_batch(torch.zeros(1, 32, dtype=torch.int64), torch.tensor([0]))
