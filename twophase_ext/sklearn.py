"""Estimators of scikit-learn over the Trainer. Needs the extra `sklearn`; imported on demand."""

from .integrations.scikit import TwoPhaseClassifier, TwoPhaseRegressor

__all__ = ["TwoPhaseClassifier", "TwoPhaseRegressor"]
