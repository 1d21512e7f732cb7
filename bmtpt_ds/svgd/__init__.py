"""Stein variational gradient descent over prompts: a pure direction, and a step of it by an optimizer."""

from .backend import Backend, Diagnostics
from .step import choose_backend, init_state, svgd_direction, svgd_step_

__all__ = ["Backend", "Diagnostics", "choose_backend", "init_state", "svgd_direction", "svgd_step_"]
