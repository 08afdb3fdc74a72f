"""The learning rates of PPO end where the run ends, though an iteration with the last prompts of an epoch is short; its
evaluations see all sources."""

import pytest
from datasets import Dataset

from common.batching.sampler import StepSampler
from common.errors import UserError
from step3_ppo.config import PPOConfig
from step3_ppo.evaluation import evaluation_prompts
from step3_ppo.schedule import optimizer_steps, prompt_sampler, scheduled_iterations


@pytest.mark.parametrize("prompts", [3, 16, 17, 40, 41])
@pytest.mark.parametrize("iterations", [1, 2, 4, 7])
def test_the_schedule_has_as_many_steps_as_the_run(monkeypatch, prompts, iterations):
    """Steps as the updates take them: by the real answers of all ranks."""
    config = PPOConfig(
        per_device_generation_batch_size=4,
        generation_batches=2,
        ppo_epochs=2,
        answers_per_prompt=2,
        per_device_training_batch_size=2,
    )
    data = Dataset.from_dict({"length": list(range(1, prompts + 1))})
    monkeypatch.setenv("WORLD_SIZE", "2")
    answers = [0] * iterations
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        sampler = prompt_sampler(config, data)
        epochs = -(-iterations // sampler.steps_per_epoch)
        batches = [batches for epoch in range(epochs) for batches in sampler.epoch(epoch)][:iterations]
        for index, micro_batches in enumerate(batches):
            answers[index] += 2 * sum(sum(batch.real) for batch in micro_batches)
    taken = [
        2
        * StepSampler(
            [1] * count, rows_per_micro_batch=2, micro_batches_per_step=1, world_size=2, rank=0, seed=0
        ).steps_per_epoch
        for count in answers
    ]
    assert optimizer_steps(config, len(data), iterations) == sum(taken)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_warm_up_of_the_critic_leaves_something_to_the_actor(monkeypatch, iterations):
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = lambda warmup: PPOConfig(
        per_device_generation_batch_size=4, max_iterations=iterations, critic_warmup_iterations=warmup
    )
    assert scheduled_iterations(config(iterations - 1), 40) == iterations
    with pytest.raises(UserError, match=f"--critic_warmup_iterations {iterations} leaves the actor none"):
        scheduled_iterations(config(iterations), 40)


@pytest.mark.parametrize("asked, rows", [(0, []), (1, [0]), (3, [0, 3, 6]), (10, [*range(10)]), (99, [*range(10)])])
def test_the_prompts_of_an_evaluation_are_from_all_over(asked, rows):
    held_out = Dataset.from_dict({"row": list(range(10))})
    assert list(evaluation_prompts(PPOConfig(eval_prompts=asked), held_out)["row"]) == rows
