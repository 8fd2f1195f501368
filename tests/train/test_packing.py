import torch

from longgrpo.rollout.protocol import Completion
from longgrpo.tasks.sample import Sample
from longgrpo.train.packing import micro_batches, pack


def sample(group, prompt, completion):
    return Sample(group, prompt, Completion(completion, [0.0] * len(completion), "stop"), "")


SAMPLES = [
    sample(0, [1, 2, 3], [4, 5]),
    sample(0, [1, 2, 3], [6]),
    sample(1, [7], [8, 9, 10]),
    sample(1, [7], [11, 12]),
]


def test_each_target_stands_after_the_row_that_predicts_it():
    batch = pack(SAMPLES)
    assert batch.target.tolist() == [4, 5, 6, 8, 9, 10, 11, 12]
    assert batch.packed.input_ids[batch.rows].tolist() == [3, 4, 3, 7, 8, 9, 7, 11]
    assert batch.packed.position_ids[batch.rows].tolist() == [2, 3, 2, 0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 6, 8]
    assert batch.cu_seqlens.dtype == torch.int32


def test_a_group_shares_its_prompt():
    packed = pack(SAMPLES).packed
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 7, 8, 9, 11]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 5, 7, 8]
    assert packed.prefix == [-1, 0, -1, 2, 2]


def test_a_completion_alone_goes_on_in_its_prompts_sequence():
    batch = pack([SAMPLES[0], SAMPLES[2]])
    assert batch.packed.input_ids.tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert batch.packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.packed.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.packed.prefix is None
    assert batch.packed.input_ids[batch.rows].tolist() == [3, 4, 7, 8, 9]


def test_prompts_need_not_be_shared():
    batches = micro_batches(SAMPLES, 100, share_prompts=False)
    assert [batch.packed.input_ids.tolist() for batch in batches] == [[1, 2, 3, 4, 1, 2, 3, 7, 8, 9, 7, 11]]
    assert batches[0].packed.prefix is None
    assert batches[0].packed.input_ids[batches[0].rows].tolist() == [3, 4, 3, 7, 8, 9, 7, 11]
    assert all(len(batch.packed.input_ids) <= 6 for batch in micro_batches(SAMPLES, 6, share_prompts=False))


def test_a_row_has_no_padding_and_no_token_that_predicts_nothing():
    packed = pack(SAMPLES).packed
    assert packed.cu_seqlens.tolist()[-1] == len(packed.input_ids)
    assert 5 not in packed.input_ids.tolist()
    assert 10 not in packed.input_ids.tolist()


def test_micro_batches_keep_to_the_budget_and_the_order():
    batches = micro_batches(SAMPLES, 9)
    assert [s for batch in batches for s in batch.samples] == SAMPLES
    assert len(batches) > 1
    assert all(len(batch.packed.input_ids) <= 9 for batch in batches)


def test_a_sample_longer_than_the_budget_stands_alone():
    assert [len(batch.samples) for batch in micro_batches(SAMPLES, 1)] == [1, 1, 1, 1]


def test_no_samples_no_micro_batches():
    assert micro_batches([], 8) == []
