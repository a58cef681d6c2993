"""Regressors on plain float64 arrays that the learned predictors are built from."""
