"""Stein variational gradient descent over prompts: a pure direction, and a step of it by an optimizer."""

from .step import init_state, svgd_direction, svgd_step_

__all__ = ["init_state", "svgd_direction", "svgd_step_"]
