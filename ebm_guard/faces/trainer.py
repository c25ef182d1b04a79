"""Calibration and OOD detection in the log of a training by Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_guard.errors import InvalidInputError, NotFittedError
from ebm_guard.faces.passes import (
    Read,
    check_names,
    interleave,
    no_trace,
    read_batch,
    run_loader,
    world,
)
from ebm_guard.faces.rows import Rows, Table, metrics_of
from ebm_guard.model import EnergyClassifier


def energy_metrics(eval_pred: Any) -> dict[str, float]:
    """Compute accuracy, ECE, NLL and Brier score for ``Trainer(compute_metrics=...)``.

    Names: ``ebm_guard/accuracy``, ``ece``, ``ece_null95``, ``ece_l2_debiased``, ``nll``, ``brier``
    and ``invalid``; see :func:`ebm_guard.faces.rows.metrics_of`. The Trainer puts ``eval_`` before
    each of them.

    Args:
        eval_pred: an ``EvalPrediction`` or a pair (predictions, label_ids): logits (N, C), or a
            tuple that begins with them, and labels (N,).

    Raises:
        InvalidInputError: no such pair.
        UnsupportedModelError: probabilities instead of logits.

    Example:
        >>> pair = (np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
        >>> energy_metrics(pair)["ebm_guard/accuracy"]
        0.5
    """
    return metrics_of(_evaluated(eval_pred), {})


class Monitoring:
    """Log ECE, NLL and accuracy, and AUROC and FPR95 of the energy, at each evaluation.

    Give the Trainer both halves::

        monitor = TrainerMonitor(ood={"svhn": loader})
        Trainer(..., compute_metrics=monitor.compute_metrics, callbacks=[monitor])

    ``compute_metrics`` reads the logits that the Trainer has gathered, so the ID rows cost no
    second pass, several processes are no matter, and every value goes where the Trainer's own
    metrics go: the log, the reporters, ``trainer_state.json``, and the choice of the best model.
    With a function of your own: ``lambda p: mine(p) | monitor.compute_metrics(p)``.

    As a callback alone (``callbacks=[monitor]``) it runs the model over the evaluation set again,
    in one process only. The values then stand in the metrics that ``evaluate`` returns, in
    ``state.log_history`` and so in ``trainer_state.json``, and ``metric_for_best_model`` finds
    them; but the Trainer has told its reporters (TensorBoard, W&B, the progress bar) before it
    asks its callbacks, so these do not show them.

    Names are those of :func:`ebm_guard.faces.rows.metrics_of`, with the Trainer's ``eval_`` (or
    ``eval_<set>_``) before them: ``metric_for_best_model="ebm_guard/ece"`` with
    ``greater_is_better=False``, which the Trainer assumes only for names that end in "loss", or
    ``"ebm_guard/auroc"``.

    The model runs in eval mode and without gradients; modes and the state of all random numbers
    are as before. An OOD loader is read by every process, which runs its share of the batches.

    Args:
        ood: loaders by the name of the set; of pairs, tensors, or mappings of the model's keyword
            arguments, whose labels are not looked at.
        logits: takes the model's output and returns the logits, where they are not found alone.
        read: takes a batch of an OOD loader (and of the evaluation set, as a callback alone) and
            returns (inputs, labels); inputs that are a mapping are given as keywords.

    Example:
        >>> from ebm_guard.faces import TrainerMonitor  # doctest: +SKIP
        >>> monitor = TrainerMonitor(ood={"svhn": loader})  # doctest: +SKIP
    """

    def __init__(
        self,
        ood: Mapping[str, Iterable[Any]] | None = None,
        *,
        logits: Callable[[Any], Tensor] | None = None,
        read: Read | None = None,
    ) -> None:
        super().__init__()
        self.ood = check_names(ood or {})
        self.logits = logits
        self.read = read or _read
        self._model: nn.Module | None = None
        self._computed = False

    def compute_metrics(self, eval_pred: Any) -> dict[str, float]:
        """Compute all metrics from gathered logits, and the OOD sets with the Trainer's model.

        Args:
            eval_pred: see :func:`energy_metrics`.

        Raises:
            NotFittedError: there are OOD sets, and the monitor is not among the callbacks.
        """
        found = metrics_of(_evaluated(eval_pred), self._separate())
        self._computed = True
        return found

    def on_prediction_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Take note of the model that is evaluated."""
        del args, state, control
        self._model = others.get("model")
        self._computed = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Add the metrics, where :meth:`compute_metrics` has not."""
        del args, control
        metrics, self._model = others.get("metrics"), others.get("model", self._model)
        computed, self._computed = self._computed, False
        if not computed and metrics is not None:
            if world()[1] > 1:
                raise InvalidInputError(
                    "with several processes the Trainer must gather the logits: give it "
                    "compute_metrics=monitor.compute_metrics beside callbacks=[monitor]"
                )
            values = metrics_of(self._evaluation(others["eval_dataloader"]), self._separate())
            values = {_prefix(metrics) + name: value for name, value in values.items()}
            metrics.update(values)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(values)
        # Held no longer than needed: the model is the Trainer's.
        self._model = None

    def _evaluation(self, loader: Iterable[Any]) -> Table:
        rows, device = Rows("the evaluation set", labelled=True), self._device()
        with no_trace(device, seed=0):
            for batch in loader:
                inputs, labels = self.read(batch)
                rows.add(self._run(inputs), labels)
        return rows.table()

    def _separate(self) -> dict[str, Table]:
        if not self.ood:
            return {}
        device = self._device()
        return {
            name: interleave(
                run_loader(name, loader, lambda batch: self._run(self.read(batch)[0]), device)
            )
            for name, loader in self.ood.items()
        }

    def _run(self, inputs: Any) -> Tensor:
        classifier = EnergyClassifier(_Keywords(self._required()), logits=self.logits)
        if isinstance(inputs, Mapping):
            inputs = {
                name: item.to(classifier.device) if isinstance(item, Tensor) else item
                for name, item in inputs.items()
            }
        return classifier(inputs)

    def _device(self) -> torch.device | None:
        return EnergyClassifier(self._required()).device

    def _required(self) -> nn.Module:
        if self._model is None:
            raise NotFittedError(
                "this monitor has OOD sets and knows no model to run on them; give the Trainer "
                "callbacks=[monitor] beside compute_metrics=monitor.compute_metrics"
            )
        return self._model


class _Keywords(nn.Module):
    """Call a model with a mapping as keywords, and with anything else as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Not its own: a wrapper in train mode would be taken for a model in train mode.
        self.training = model.training

    def forward(self, inputs: Any) -> Any:
        return self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)


def _read(batch: Any) -> tuple[Any, Tensor | None]:
    """Split a batch as the Trainer does: a mapping's labels, and its rest as keywords."""
    if not isinstance(batch, Mapping):
        return read_batch(batch)
    names = ("labels", "label")
    labels = next((batch[name] for name in names if batch.get(name) is not None), None)
    return {name: item for name, item in batch.items() if name not in names}, labels


def _evaluated(eval_pred: Any) -> Table:
    predictions, labels = _pair(eval_pred)
    if isinstance(predictions, (tuple, list)) and len(predictions):
        # A model that also returns features gives a tuple; its logits come first.
        predictions = predictions[0]
    logits, classes = np.asarray(predictions), np.asarray(labels)
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating) or labels is None:
        raise InvalidInputError(
            f"got predictions of shape {logits.shape} and dtype {logits.dtype} and labels of shape "
            f"{classes.shape}; needed logits (N, C) and one class per row (N,)"
        )
    rows = Rows("the evaluation set", labelled=True)
    rows.add(torch.from_numpy(logits), torch.from_numpy(classes))
    return rows.table()


def _pair(eval_pred: Any) -> tuple[Any, Any]:
    if hasattr(eval_pred, "predictions") and hasattr(eval_pred, "label_ids"):
        return eval_pred.predictions, eval_pred.label_ids
    if isinstance(eval_pred, (tuple, list)) and len(eval_pred) == 2:
        return eval_pred[0], eval_pred[1]
    raise InvalidInputError(
        f"got {type(eval_pred).__name__}; needed an EvalPrediction or (logits, labels)"
    )


def _prefix(metrics: Mapping[str, Any]) -> str:
    """Return what the Trainer put before the names, which stands before its own ``runtime``."""
    ends = [name.removesuffix("runtime") for name in metrics if name.endswith("_runtime")]
    return ends[0] if ends else "eval_"


def __getattr__(name: str) -> Any:
    """Make the class on first use, on top of the installed transformers."""
    if name != "TrainerMonitor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise InvalidInputError(
            "TrainerMonitor needs transformers, which is not installed: pip install transformers"
        ) from None
    facts = {"__doc__": Monitoring.__doc__, "__module__": __name__, "__qualname__": name}
    globals()[name] = type(name, (Monitoring, TrainerCallback), facts)
    return globals()[name]
