"""An advantage estimator of one's own, with all that step 3 has: REINFORCE with the batch's mean as the baseline.

    deepspeed --num_gpus 2 docs/examples/reinforce.py --actor_model_name_or_path output/sft \
        --critic_model_name_or_path output/reward --output_dir output/reinforce

It needs no critic, so none is built, trained or saved. `--advantage gae` still chooses one of the product's.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository, where it is not installed

from torch import Tensor

from common.runtime.program import launch
from step3_ppo.advantages import estimator
from step3_ppo.config import PPOConfig
from step3_ppo.main import main


@estimator("reinforce", needs_critic=False)
def reinforce(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    """A = G - mean of G over the iteration's responses, G the sum of a response's token rewards."""
    totals = rewards.sum(1)
    advantages = (totals - totals.mean())[:, None].expand(rewards.shape)
    return advantages.masked_fill(~response_mask, 0), None


if __name__ == "__main__":
    launch(main, advantages=reinforce)
