import torch

from longgrpo.rollout import Completion
from longgrpo.train.packing import micro_batches, pack
from testing.steps import rollout_of, sample

SAMPLES = [
    sample(0, [1, 2, 3], [4, 5]),
    sample(0, [1, 2, 3], [6]),
    sample(1, [7], [8, 9, 10]),
    sample(1, [7], [11, 12]),
]


def packed_of(samples):
    return pack(rollout_of(samples), range(len(samples)))


def batches_of(samples, budget, **options):
    return micro_batches(rollout_of(samples), range(len(samples)), budget, **options)


def test_each_target_stands_after_the_row_that_predicts_it():
    batch = packed_of(SAMPLES)
    assert batch.target.tolist() == [4, 5, 6, 8, 9, 10, 11, 12]
    assert batch.packed.input_ids[batch.rows].tolist() == [3, 4, 3, 7, 8, 9, 7, 11]
    assert batch.packed.position_ids[batch.rows].tolist() == [2, 3, 2, 0, 1, 2, 0, 1]
    assert batch.tokens.cu_seqlens.tolist() == [0, 2, 3, 6, 8]
    assert batch.tokens.cu_seqlens.dtype == torch.int32


def test_a_group_shares_its_prompt():
    packed = packed_of(SAMPLES).packed
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 7, 8, 9, 11]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 1]
    assert packed.lengths == [3, 4, 1, 3, 2]  # in attention a completion has its prompt before it
    assert packed.cu_seqlens.tolist() == [0, 3, 7, 8, 11, 13]
    assert packed.input_ids[packed.shared_rows].tolist() == [1, 2, 3, 1, 2, 3, 4, 7, 7, 8, 9, 7, 11]
    assert packed.shared_rows[packed.own_rows].tolist() == list(range(8))


def test_a_completion_alone_goes_on_in_its_prompts_sequence():
    batch = packed_of([SAMPLES[0], SAMPLES[2]])
    assert batch.packed.input_ids.tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert batch.packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.packed.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.packed.shared_rows is None
    assert batch.packed.input_ids[batch.rows].tolist() == [3, 4, 7, 8, 9]


def test_prompts_need_not_be_shared():
    batches = batches_of(SAMPLES, 100, share_prompts=False)
    assert [batch.packed.input_ids.tolist() for batch in batches] == [[1, 2, 3, 4, 1, 2, 3, 7, 8, 9, 7, 11]]
    assert batches[0].packed.shared_rows is None
    assert batches[0].packed.input_ids[batches[0].rows].tolist() == [3, 4, 3, 7, 8, 9, 7, 11]
    assert all(len(batch.packed.input_ids) <= 6 for batch in batches_of(SAMPLES, 6, share_prompts=False))


def test_a_row_has_no_padding_and_no_token_that_predicts_nothing():
    packed = packed_of(SAMPLES).packed
    assert sorted(set(packed.shared_rows.tolist())) == list(range(len(packed.input_ids)))
    assert 5 not in packed.input_ids.tolist()
    assert 10 not in packed.input_ids.tolist()


def test_micro_batches_keep_to_the_budget_and_the_order():
    batches = batches_of(SAMPLES, 9)
    assert [s for batch in batches for s in batch.samples] == SAMPLES
    assert len(batches) > 1
    assert all(len(batch.packed.input_ids) <= 9 for batch in batches)


def test_a_sample_longer_than_the_budget_stands_alone():
    assert [len(batch.samples) for batch in batches_of(SAMPLES, 1)] == [1, 1, 1, 1]


def test_no_samples_no_micro_batches():
    assert batches_of([], 8) == []


def test_a_tokens_logprobs_and_advantages_stand_by_it():
    samples = [sample(0, [1], [2, 3], [-0.5, -1.5]), sample(0, [1], [4], [-2.5]), sample(1, [5], [6], [-3.5])]
    batch = pack(rollout_of(samples, [1.0, -1.0, 2.0]), [2, 0])
    assert batch.target.tolist() == [6, 2, 3]
    assert batch.tokens.sampling_logp.tolist() == [-3.5, -0.5, -1.5]
    assert batch.tokens.advantages.tolist() == [2.0, 1.0]


def test_the_engines_support_follows_its_tokens():
    samples = [sample(0, [1], [2, 3]), sample(1, [1], [4])]
    samples[0].completion = Completion([2, 3], [-1.0, -1.0], "stop", [[2, 9], [3]])
    samples[1].completion = Completion([4], [-1.0], "stop", [[4, 5]])
    assert packed_of(samples).support == [[2, 9], [3], [4, 5]]
    samples[1].completion = Completion([4], [-1.0], "stop")
    assert packed_of(samples).support is None
