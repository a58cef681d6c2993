"""The schedule: which stage a step is in, its learning rate, and the blend of annealed norms.

All of it follows from the state alone, so training that was interrupted goes on as it would have.
"""

from __future__ import annotations

from nas.config import TrainConfig
from nas.training.state import FIRST_STAGE, TrainState

SMALLEST_SCALE = 0.01


class Schedule:
    """The stages of a training and what changes over them.

    Args:
        config: the recipe.
        budget_s: seconds of training, for states that name none.
    """

    def __init__(self, config: TrainConfig, budget_s: float) -> None:
        self.config, self.budget_s = config, budget_s

    def progress(self, state: TrainState) -> float:
        """Return the share of the whole training that is done; 1 or more at the end."""
        if self.config.num_steps is not None:
            return state.step / self.config.num_steps
        return state.elapsed_s / (state.budget_s or self.budget_s)

    def stage_progress(self, state: TrainState) -> float:
        """Return the share of the stage that is done."""
        share = self.config.first_stage_share
        if state.stage == FIRST_STAGE:
            return self.progress(state) / share
        return (self.progress(state) - share) / (1.0 - share)

    def learning_rate_scale(self, state: TrainState) -> float:
        """Return the factor on the peak learning rates: linear warm-up, constant, linear decay.

        Each stage has all three, so the network that becomes the teacher has settled.

        Source: Hu et al. 2024, "MiniCPM", section 4.2 (warm-up, stable, decay).
        """
        warmup = min(1.0, (state.step - state.stage_start + 1) / max(1, self.config.warmup_steps))
        left = 1.0 - self.stage_progress(state)
        decay = min(1.0, left / self.config.decay_share) if self.config.decay_share else 1.0
        return max(warmup * decay, SMALLEST_SCALE)

    def norm_blend(self, state: TrainState) -> float:
        """Return how much of their exact form annealed norms keep: from 1 linearly to 0.

        Source: Guo et al. 2024, "SLAB", section 3.1 (progressive re-parameterized BatchNorm).
        """
        share = self.config.norm_anneal_share
        return max(0.0, 1.0 - self.progress(state) / share) if share else 0.0
