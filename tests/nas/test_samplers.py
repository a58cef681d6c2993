from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState

from nas.pareto import hypervolume
from nas.samplers import (
    SAMPLERS,
    CallableCodec,
    GeneCodec,
    PredictorGuidedSampler,
    make_sampler,
)
from nas.samplers._codec import gene_of
from nas.samplers._design import corner_levels, feasible_pool, initial_design, tilted_levels
from predictors.encodings import Gene, GeneEncoding
from searchspace.errors import UserError

optuna.logging.set_verbosity(optuna.logging.ERROR)

NUM_LAYERS = 6


class TestOptunaSuite(
    BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase
):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: PredictorGuidedSampler(
            seed=0, num_initial=4, batch_size=4, num_candidates=300
        )
