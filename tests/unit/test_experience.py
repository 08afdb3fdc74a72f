"""Rollouts and experience: masks, selection, concatenation."""

from dataclasses import fields, replace

import pytest
import torch

from common.models.token_sets import TokenSets
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout

PROMPTS = [[5, 6, 7], [8], [5, 6]]
ANSWERS = [[9, 2], [3, 4, 3, 2], [9]]
PAD = 2  # also the end token


def rollout(rows=(0, 1, 2), real=None, width=0):
    joined = [PROMPTS[row] + ANSWERS[row] for row in rows]
    width = max(width, *(len(row) for row in joined))
    lengths = torch.tensor([len(ANSWERS[row]) for row in rows])
    answers = [token for row in rows for token in ANSWERS[row]]
    return Rollout(
        tokens=torch.tensor([row + [PAD] * (width - len(row)) for row in joined]),
        prompt_lengths=torch.tensor([len(PROMPTS[row]) for row in rows]),
        response_lengths=lengths,
        finished=torch.tensor([ANSWERS[row][-1] == PAD for row in rows]),
        prompt_index=torch.tensor([10 + row for row in rows]),
        real=torch.tensor(real if real is not None else [True] * len(rows)),
        made_by=torch.tensor([row % 2 for row in rows]),
        sampling_log_probs=-torch.arange(int(lengths.max())).float() - 10 * torch.tensor(rows)[:, None],
        kept=TokenSets.pack(torch.arange(40) == torch.tensor(answers)[:, None]),  # each token alone
    )


def experience(rows=(0, 1, 2), **options):
    """Every (B, R) tensor names its row and column: field * 100 + row * 10 + column."""
    made = rollout(rows, **options)
    columns = torch.arange(made.response_mask.shape[1])
    places = (10 * torch.tensor(rows)[:, None] + columns).float()
    names = ("old_log_probs", "values", "advantages", "returns", "ref_log_probs")
    return Experience(made, **{name: 100 * (number + 1) + places for number, name in enumerate(names)})


def counted(batch, field):
    """The values of a (B, R) field that count, row by row."""
    mask = batch.response_mask
    return [getattr(batch, field)[row][mask[row]].tolist() for row in range(len(mask))]


def test_masks_come_from_lengths_even_where_the_end_token_pads():
    made = rollout(width=7)
    assert made.lengths.tolist() == [5, 5, 3]
    assert made.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0]] * 2 + [[1, 1, 1, 0, 0, 0, 0]]
    assert made.response_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_fillers_are_attended_to_but_count_nowhere():
    made = rollout(real=[True, False, True])
    assert made.attention_mask[1].all()
    assert not made.response_mask[1].any() and made.response_mask[0].any()


def test_select_trims_to_the_longest_chosen_row():
    part = experience(width=9).select([2, 0])
    assert part.rollout.tokens.tolist() == [[5, 6, 9, PAD, PAD], [5, 6, 7, 9, 2]]
    assert part.response_mask.tolist() == [[True, False], [True, True]]
    assert part.rollout.prompt_index.tolist() == [12, 10]
    assert counted(part, "values") == [[220.0], [200.0, 201.0]]


def test_select_can_mark_fillers_and_never_revives_one():
    part = experience(real=[True, False, True]).select((0, 1, 2, 2), real=(True, True, True, False))
    assert part.rollout.real.tolist() == [True, False, True, False]
    assert part.response_mask.sum(1).tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize("parts", [[(0,), (1,), (2,)], [(0, 2), (1,)], [(0, 1, 2)]])
def test_concat_of_selections_keeps_every_row_as_it_was(parts):
    whole = rollout(real=[True, True, False])
    joined = Rollout.concat([whole.select(rows) for rows in parts])
    expected = whole.select([row for rows in parts for row in rows])
    for name in ("attention_mask", "response_mask", "finished", "prompt_index", "real", "made_by"):
        assert torch.equal(getattr(joined, name), getattr(expected, name))
    attended = joined.attention_mask.bool()
    assert torch.equal(joined.tokens[attended], expected.tokens[attended])
    of_responses = joined.response_mask
    assert torch.equal(joined.sampling_log_probs[of_responses], expected.sampling_log_probs[of_responses])
    assert torch.equal(joined.kept.members(), expected.kept.members())


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_a_selection_has_all_fields_on_its_device_with_the_same_values(device):
    moved = experience().to(device).select([1, 0], real=[True, False])
    here = experience().select([1, 0], real=[True, False])
    for found, expected in ((moved, here), (moved.rollout, here.rollout)):
        for field in fields(expected):
            if field.name not in ("rollout", "kept"):
                tensor = getattr(found, field.name)
                assert tensor.device.type == device
                assert torch.equal(tensor.cpu(), getattr(expected, field.name))
    assert moved.rollout.kept.words.device.type == device
    assert torch.equal(moved.rollout.kept.to("cpu").members(), here.rollout.kept.members())


def test_without_a_critic_there_are_neither_values_nor_returns():
    free = replace(experience(width=9), values=None, returns=None)
    part = free.to("cpu").select([2, 0])
    assert part.values is None and part.returns is None
    assert counted(part, "advantages") == counted(experience(width=9).select([2, 0]), "advantages")
    without_reference = replace(free, ref_log_probs=None)
    assert without_reference.to("cpu").select([2, 0]).ref_log_probs is None
    with pytest.raises(ValueError, match="values and returns"):
        replace(free, values=free.advantages)


def test_shapes_that_do_not_fit_are_refused_by_name():
    made = experience()
    with pytest.raises(ValueError, match=r"Experience.values has shape \(3, 3\)"):
        replace(made, values=made.values[:, :3])
    with pytest.raises(ValueError, match=r"Experience.returns has shape \(2, 4\)"):
        replace(made, returns=made.returns[:2])
    with pytest.raises(ValueError, match="Rollout.finished"):
        replace(made.rollout, finished=made.rollout.finished[:2])
    with pytest.raises(ValueError, match=r"Rollout.sampling_log_probs has shape \(3, 3\)"):
        replace(made.rollout, sampling_log_probs=made.rollout.sampling_log_probs[:, :3])
    with pytest.raises(ValueError, match="Rollout.kept has 6 sets for 7 tokens"):
        replace(made.rollout, kept=made.rollout.kept.select(torch.arange(6)))
    with pytest.raises(ValueError, match="empty prompt"):
        replace(made.rollout, prompt_lengths=made.rollout.prompt_lengths - 1)
    with pytest.raises(ValueError, match="longest row 6"):
        replace(made.rollout, response_lengths=made.rollout.response_lengths + 1)
