"""Tasks of a recipe's own, `data.tasks`: from a few lines of YAML to a Task."""

from bmtpt_ds.config import OwnTask
from bmtpt_ds.errors import UserError, nearest
from bmtpt_ds.tasks.fields import Text
from bmtpt_ds.tasks.metrics import METRICS, TWO_LABELS
from bmtpt_ds.tasks.targets import Kind, LabelTarget, NumberTarget, Target, TextTarget
from bmtpt_ds.tasks.task import Task


def own_task(name: str, own: OwnTask) -> Task:
    """The task that `data.tasks.<name>` describes.

    What the target column holds follows from the other keys: labels where label words are given, numbers where the
    headline metric is one of numbers, else free text.

    Raises:
        UserError: a metric that does not exist or does not fit what the target column holds.
    """
    shown = own.source.items() if isinstance(own.source, dict) else ((column, column) for column in own.source)
    fields = tuple(Text(*names) for names in shown)
    target: Target
    if own.labels:
        target, answer, metrics = LabelTarget(own.target, tuple(own.labels), by_text=True), own.labels[0], ["accuracy"]
    elif own.metrics and own.metrics[0] in METRICS["number"]:
        target, answer, metrics = NumberTarget(own.target), 2.5, []
    else:
        target, answer, metrics = TextTarget(own.target), f"<{own.target}>", ["exact_match", "f1"]
    metrics = own.metrics or metrics
    _check_metrics(name, metrics, target.kind, len(own.labels or ()))
    return Task(
        name=name,
        hub_repository=None,
        hub_configs=(None,),
        fields=fields,
        target=target,
        metrics=tuple(metrics),
        split_rule="small",  # of the hub, where it is never read
        sample={column: f"<{column}>" for part in fields for column in part.columns} | {own.target: answer},
        folder=own.folder,
    )


def _check_metrics(name: str, metrics: list[str], kind: Kind, labels: int) -> None:
    where, fitting = f"data.tasks.{name}.metrics", METRICS[kind]
    every = {metric: None for of_kind in METRICS.values() for metric in of_kind}
    for metric in metrics:
        if metric not in every:
            raise UserError(f"{where}: unknown metric {metric!r}{nearest(metric, every)} (known: {', '.join(every)})")
        if metric not in fitting:
            what = {"label": "labels", "number": "numbers", "text": "free text (no labels are given)"}[kind]
            raise UserError(f"{where}: {metric} does not fit {what}; take {' or '.join(fitting)}")
        if metric in TWO_LABELS and kind == "label" and labels != 2:
            raise UserError(f"{where}: {metric} is of two labels and there are {labels}; take accuracy or macro_f1")
