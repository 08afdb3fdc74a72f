"""The inputs of a reward, and the use of its scores."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from common.data.tokenization import load_tokenizer, make_codec
from common.errors import Diverged, UserError
from common.models.builtin import materialise
from common.models.calibration import RAW
from common.models.loading import load_causal_lm
from step3_ppo.calibration import ScoreScale
from step3_ppo.config import PPOConfig
from step3_ppo.evaluation import sample_rows
from step3_ppo.generation.rollout import Rollout
from step3_ppo.limits import check_limits, warn_of_clipped
from step3_ppo.metrics import rollout_metrics
from step3_ppo.models import PPOModels
from step3_ppo.reward import RewardInputs
from step3_ppo.rewards import shape_scores
from step3_ppo.trainer import PPOTrainer

PROMPTS = [" up", " the contrary of up", " a frog"]
RESPONSES = [" down", " left and right", " jumps", " sleeps"]
ROWS = [2, 0, 0, 1]  # of the data, of each response


class UnshardedEngine(torch.nn.Module):
    """An engine as it is on one rank at ZeRO 0, without a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **inputs):
        return self.module(*arguments, **inputs)


@pytest.fixture(scope="module")
def model(builtin_cache):
    source = str(materialise("builtin:tiny-opt", builtin_cache))
    codec = make_codec(load_tokenizer(source), "human_assistant")
    return load_causal_lm(source, codec, dtype=torch.float32), codec


@pytest.fixture
def inputs(model) -> RewardInputs:
    codec = model[1]
    ids = lambda text: codec.tokenizer(text, add_special_tokens=False)["input_ids"]
    dataset = Dataset.from_dict(
        {"prompt_ids": list(map(ids, PROMPTS)), "length": [1, 2, 3], "answer": ["down", None, "water"]}
    )
    prompts = [ids(PROMPTS[row]) for row in ROWS]
    responses = [[*ids(text), codec.end_id] for text in RESPONSES]
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    rollout = Rollout(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=codec.pad_id),
        torch.tensor(list(map(len, prompts))),
        torch.tensor(list(map(len, responses))),
        torch.ones(4, dtype=torch.bool),
        torch.tensor(ROWS),
        torch.ones(4, dtype=torch.bool),
        torch.tensor([0, 1, 1, 0]),
    )
    return RewardInputs(rollout, codec, dataset)


def test_a_reward_sees_texts_ids_columns_and_ranks(inputs):
    assert inputs.prompts == [PROMPTS[row] for row in ROWS]
    assert inputs.responses == [text.strip() for text in RESPONSES] or inputs.responses == RESPONSES
    assert [ids[-1] for ids in inputs.response_ids] == [inputs.codec.end_id] * 4
    assert inputs.columns == {"answer": ["water", "down", "down", None]}
    part = inputs.select([3, 1])
    assert part.responses == [inputs.responses[3], inputs.responses[1]]
    assert part.columns == {"answer": [None, "down"]} and part.rollout.made_by.tolist() == [0, 1]


def trainer_with(reward, model, **options) -> PPOTrainer:
    actor = UnshardedEngine(model[0])
    models = PPOModels(actor, None, actor, None, None, 1.0)
    config = PPOConfig(advantage="rloo", answers_per_prompt=2, per_device_training_batch_size=2, **options)
    return PPOTrainer(models, reward, config, model[1], None, None, ScoreScale(RAW))


def test_a_function_is_a_reward_and_an_experience_without_critic_has_no_values(inputs, model):
    def length(inputs: RewardInputs) -> torch.Tensor:
        return torch.tensor([float(len(text)) for text in inputs.responses])

    trainer = trainer_with(length, model)
    outputs = trainer.responder.score(inputs.dataset, inputs.rollout, 0)
    assert outputs.scores.tolist() == [len(text) for text in inputs.responses]
    assert outputs.values is None
    rollout = inputs.rollout.select([1, 2])  # both of one prompt
    outputs = trainer.responder.score(inputs.dataset, rollout, 0)
    experience = trainer.advantages(rollout, outputs, trainer.rewards(rollout, outputs)[1])
    assert experience.values is None and experience.returns is None
    assert experience.to("cpu").select([1, 0]).values is None


def test_without_a_reference_there_is_no_kl_and_the_rewards_are_the_scores(inputs, model, monkeypatch):
    def one_each(inputs: RewardInputs) -> torch.Tensor:
        return torch.arange(4.0)

    trainer = trainer_with(one_each, model, kl_placement="none")
    monkeypatch.setattr(PPOModels, "reference_log_probs", None)  # is not called
    outputs = trainer.responder.score(inputs.dataset, inputs.rollout, 0)
    assert outputs.ref_log_probs is None and outputs.log_ratio() is None and outputs.response_kl() is None
    shaped, rewards = trainer.rewards(inputs.rollout, outputs)
    assert torch.equal(rewards.sum(1), shaped.scores)
    check_limits(trainer.config, outputs, "iteration 1")
    with pytest.raises(Diverged, match="beyond --max_reward 1: .* add --kl_placement reward"):
        check_limits(replace(trainer.config, max_reward=1.0), outputs, "iteration 1")
    metrics = rollout_metrics(inputs.rollout, shaped, outputs)
    assert "kl" not in metrics and metrics["reward"] == 1.5
    rows = sample_rows(inputs.rollout, outputs, inputs.codec, inputs.dataset, 2)
    assert [row["reward"] for row in rows] == [0.0, 1.0] and "kl" not in rows[0]


@pytest.mark.parametrize("here, there", [([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.5]), ([1.0] * 4, [1.0] * 3)])
def test_a_reward_that_differs_between_ranks_is_named_on_all_of_them(inputs, model, monkeypatch, here, there):
    monkeypatch.setattr("step3_ppo.scoring.compute_on_all_ranks", lambda rollout, compute, config: compute(rollout))
    said = []
    for own in (here, there):

        def length(inputs: RewardInputs) -> torch.Tensor:
            return torch.tensor(own)

        monkeypatch.setattr("step3_ppo.scoring.gather_objects", lambda item: [torch.tensor(here), torch.tensor(there)])
        with pytest.raises(UserError) as error:
            trainer_with(length, model).responder.score(inputs.dataset, inputs.rollout, 0)
        said.append(str(error.value))
    assert said[0] == said[1] and "length gave" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize(
    "scores, what", [(torch.zeros(3), r"a tensor of shape \(3,\)"), ([0.0] * 4, "a list"), (None, "a NoneType")]
)
def test_a_reward_that_gives_no_score_for_each_response_is_named(scores, what, inputs, model):
    def unfit(inputs: RewardInputs):
        return scores

    with pytest.raises(UserError, match=f"unfit gave {what} for 4 responses: it must give a torch tensor"):
        trainer_with(unfit, model).responder.score(inputs.dataset, inputs.rollout, 0)


@pytest.mark.parametrize("beyond, warned", [(1, False), (3, True)])
def test_scores_that_are_mostly_clipped_are_warned_of(capsys, beyond, warned):
    scores = torch.tensor([100.0] * beyond + [1.0] * (4 - beyond))
    shaped = shape_scores(scores, torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
    assert warn_of_clipped(PPOConfig(), shaped, "iteration 1") == warned
    assert ("75% of the scores of iteration 1 are beyond --score_clip 5" in capsys.readouterr().out) == warned
