"""From measured figures of served models to profiles, and from profiles to the figures of a design: learning and prediction.

experiment.py   one design under one load, and what is said of it
figures.py      TTFT and time per token as a function of the coefficients: the physics
mix.py          the steps a closed loop consists of
field.py        what measured rows say of others: deviations by group, and along a curve
learning.py      learn, predict, profile
ratios.py       other figures from these two
saturation.py   the highest rate within limits, of experiments without a load
tables/         tables of published measurements;  readers/ results of other tools
score.py, regret.py, holdout.py   how good predictions are
"""

from __future__ import annotations

from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.predict.learning import Knowledge, Prior, as_found, assumed, learn, predict, profile, shipped

__all__ = ["Experiment", "Knowledge", "Prediction", "Prior", "as_found", "assumed", "learn", "predict", "profile", "shipped"]
