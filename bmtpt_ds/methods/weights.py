"""What the methods have in common that tune weights of the backbone in place of a prompt: LoRA, adapters, BitFit and
fine-tuning. For models that fit whole on a device; prompts have length 0.

The trained values are kept in float32, whatever the backbone computes in, and are written into it before it is used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn import Parameter

from bmtpt_ds.adaptation.tuned import Tuned
from bmtpt_ds.checkpoint import Stored
from bmtpt_ds.config.methods import WeightsConfig
from bmtpt_ds.data.tokens import Batch
from bmtpt_ds.losses import Through
from bmtpt_ds.methods.job import AdaptJob, Begun, without_prior
from bmtpt_ds.model.backbone import Backbone, checkpoint_activations
from bmtpt_ds.session import Session

Parameters = Mapping[str, Parameter]  # of the backbone, by name
Tune = Callable[[Session], Parameters]  # changes the session's backbone in place; those that are to be trained


class TunedWeights(Tuned):
    """Weights of the backbone that all tasks of a single run share."""

    length = 0
    runs = 1

    def __init__(self, places: Parameters, values: Mapping[str, torch.Tensor], tasks: int, hidden: int, lr: float):
        """
        Args:
            places: where the backbone has the weights.
            values: [1, ...] float32, of each.
            tasks: N.
            hidden: H.
        """
        self.places, self.values, self.tasks, self.hidden = places, dict(values), tasks, hidden
        self.own_rates = {"lr_weights": lr}

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        return self.values

    def rate_of(self, name: str) -> str:
        return "lr_weights"

    @torch.no_grad()
    def put(self) -> None:
        """Writes the values into the backbone."""
        for name, place in self.places.items():
            place.copy_(self.values[name][0])

    def through(self) -> "_Weights":
        self.put()
        return _Weights(list(self.places.values()), self.tasks)

    def pull_back(self, gradients: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: gradient[None] for name, gradient in zip(self.values, gradients, strict=True)}

    def answering(self, run: int, task: int) -> torch.Tensor:
        self.put()
        return next(iter(self.values.values())).new_zeros(0, self.hidden)

    def clone(self) -> "TunedWeights":
        copies = {name: value.clone() for name, value in self.values.items()}
        return TunedWeights(self.places, copies, self.tasks, self.hidden, self.own_rates["lr_weights"])

    def stored(self, run: int, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.values.items()}

    def describe(self) -> str:
        shared = f" for {self.tasks} tasks" if self.tasks > 1 else ""
        return f"{self.parameters():,} weights of the model{shared}"


class _Weights(Through):
    """Every row without a prompt."""

    def __init__(self, parameters: list[Parameter], tasks: int):
        self._parameters, self._tasks = parameters, tasks

    def __len__(self) -> int:
        return self._tasks

    @property
    def leaves(self) -> list[torch.Tensor]:
        return self._parameters

    def row_losses(
        self, backbone: Backbone, leaves: Sequence[torch.Tensor], numbers: Sequence[int], batches: Sequence[Batch]
    ) -> torch.Tensor:
        return backbone.row_losses(leaves[0].new_zeros(len(numbers), 0, backbone.config.d_model), batches)


def tuning(tune: Tune) -> tuple[Callable[[AdaptJob], Begun], Callable[[Stored, Session], Callable]]:
    """A method's `begin` and `reader`."""

    def begin(job: AdaptJob) -> Begun:
        (run,) = job.runs
        session = replace(job.session, recipe=run.recipe)
        places = _ready(tune, session)
        values = {name: place.detach().float().clone()[None] for name, place in places.items()}
        lr = run.recipe.weights.lr
        return without_prior(TunedWeights(places, values, job.tasks, session.model.hidden_size, lr))

    def reader(stored: Stored, session: Session) -> Callable[[str], torch.Tensor]:
        # a rank, a reduction or alpha of now would not be those that the run's weights were trained with
        weights = WeightsConfig(**stored.state["recipe"]["weights"])
        places = _ready(tune, replace(session, recipe=session.recipe.model_copy(update={"weights": weights})))
        values = {name: stored.tensors[name].to(place.device)[None] for name, place in places.items()}
        tuned = TunedWeights(places, values, 1, session.model.hidden_size, weights.lr)
        return lambda task: tuned.answering(0, 0)

    return begin, reader


def _ready(tune: Tune, session: Session) -> Parameters:
    parameters, backbone = tune(session), session.model.backbone
    if backbone.checkpoints_activations:  # by torch: DeepSpeed's own loses gradients of weights without a prompt's
        checkpoint_activations(backbone)
    return parameters
