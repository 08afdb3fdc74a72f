"""Generates responses on all ranks and scores them, in an iteration and in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from datasets import Dataset
from torch import Tensor

from common.batching.collate import collate_prompts
from common.batching.sampler import MicroBatch
from common.config.option import Phase
from common.data.tokenization import Codec
from common.errors import DIVERGED, Diverged
from common.runtime.distributed import on_gpu, say
from common.training.loop import check_finite
from common.training.timing import PhaseClock
from step3_ppo.combined import CombinedReward
from step3_ppo.config import PPOConfig
from step3_ppo.generation.actor_rollouts import ActorRollouts
from step3_ppo.generation.optimizer_offload import OptimizerOffload
from step3_ppo.generation.rollout import Rollout
from step3_ppo.generation.sampling import NO_TOKEN
from step3_ppo.groups import Responses
from step3_ppo.models import PPOModels
from step3_ppo.reward import Reward, RewardInputs
from step3_ppo.scoring import ModelOutputs, score_rollout
from step3_ppo.sharing import share_rollout

EVALUATION = 2**31  # replaces the iteration in the key of the random numbers: every evaluation draws the same ones


class Responder:
    """The rollout and its scores.

    Args:
        models: the actor responds; all of them score.
        reward: scores the responses.
        config: the resolved configuration.
        codec: end and padding tokens.
        clock: measures the phases generate, log_probs and score.
    """

    def __init__(
        self,
        models: PPOModels,
        reward: Reward | CombinedReward,
        config: PPOConfig,
        codec: Codec,
        clock: PhaseClock,
    ):
        self.models, self.reward, self.config, self.codec, self.clock = models, reward, config, codec, clock
        self.sampling = config.sampling
        self.rollouts = ActorRollouts(
            models.actor,
            slots=config.per_device_generation_batch_size,
            seed=config.seed,
            end_ids=codec.end_ids,
            pad_id=codec.pad_id,
            gather=not config.unpin_actor_parameters,
            keep_cache=not (config.release_inference_cache or config.offload_in_rollouts),
        )
        self.optimizer_offload = OptimizerOffload(
            list(models.trained().values()) if config.offload_in_rollouts and on_gpu() else []
        )
        if config.offload_in_rollouts and not on_gpu():
            say("note: --offload_in_rollouts moves nothing where there is no GPU")

    def respond(self, dataset: Dataset, micro_batches: Sequence[MicroBatch], stream: int) -> Responses:
        """Responses of all ranks to the prompts of `micro_batches`, and what the models and the reward say of them.

        Args:
            dataset: has the prompts.
            micro_batches: this rank's.
            stream: the iteration: key of the random numbers.

        Raises:
            RolloutAbandoned: as of `roll_out`.
            Diverged: as of `roll_out` and `score`.
        """
        with self.clock.phase(Phase.GENERATE):
            rollout = self.roll_out(dataset, micro_batches, stream)
        return Responses(rollout, self.score(dataset, rollout, stream))

    def roll_out(self, dataset: Dataset, micro_batches: Sequence[MicroBatch], stream: int) -> Rollout:
        """Responses of all ranks to the prompts of `micro_batches`, on every rank.

        Args:
            stream: the iteration, or `EVALUATION`: key of the random numbers.

        Raises:
            RolloutAbandoned: on all ranks alike, if one of them was asked to stop.
            Diverged: on all ranks alike, if on one of them the actor's logits are not numbers.
        """
        rows = MicroBatch(
            tuple(index for batch in micro_batches for index in batch.indices),
            tuple(real for batch in micro_batches for real in batch.real),
        )
        prompts = collate_prompts(dataset, rows, self.codec.pad_id)
        with self.optimizer_offload.offloaded():
            own = self.rollouts.roll_out(prompts, self.sampling, stream)
        rollout = share_rollout(own)
        if (rollout.tokens == NO_TOKEN).any():
            raise Diverged(f"the actor's logits in the rollout of {name_of(stream)} are not numbers: {DIVERGED}")
        return rollout

    def score(self, dataset: Dataset, rollout: Rollout, stream: int) -> ModelOutputs:
        """The models' outputs and the reward for a rollout. Raises Diverged on all ranks alike if one is not finite."""
        inputs = RewardInputs(rollout, self.codec, dataset)
        outputs = score_rollout(self.models, self.reward, inputs, self.clock, self.config)
        for field in fields(outputs):
            numbers = getattr(outputs, field.name)
            if isinstance(numbers, Tensor):
                check_finite(float(numbers.sum()), f"sum of all {field.name.replace('_', ' ')}", name_of(stream))
        return outputs


def name_of(stream: int) -> str:
    """An iteration, or the evaluation, in the words of messages."""
    return "the evaluation" if stream == EVALUATION else f"iteration {stream + 1}"
