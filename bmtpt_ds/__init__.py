"""Bayesian multi-task prompt tuning (BMTPT) on a frozen, sharded T5."""

__version__ = "0.1.0"
