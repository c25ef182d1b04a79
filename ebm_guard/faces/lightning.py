"""Calibration and OOD detection in the log of a Lightning training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.faces.passes import (
    Read,
    check_names,
    gather,
    interleave,
    no_trace,
    own_rows,
    read_batch,
    run_loader,
    warn_unshared,
    world,
)
from ebm_guard.faces.rows import Rows, Table, metrics_of
from ebm_guard.model import EnergyClassifier

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class Monitoring:
    """Log ECE, NLL and accuracy, and AUROC and FPR95 of the energy, after each validation.

    Add it to ``Trainer(callbacks=[...])``; the module needs no change. It works with ``lightning``
    and with ``pytorch_lightning``.

    The logits are those of ``validation_step`` where it returns them, as a tensor (B, C) or under
    "logits" of a mapping; otherwise the callback runs ``module(inputs)`` on each validation batch,
    at the cost of one more forward pass. Each OOD loader costs a pass as well. These passes run in
    eval mode, under the trainer's precision and without gradients; modes and the state of all
    random numbers are as before, and nothing is logged during the sanity check (its first batch is
    read once, so that a wrong setting is told before the training and not after an epoch of it).

    Names: ``ebm_guard/accuracy``, ``ece``, ``ece_null95``, ``ece_l2_debiased``, ``nll``, ``brier``,
    ``invalid``, and with OOD sets ``ebm_guard/auroc/<set>``, ``fpr95/<set>``, and ``auroc`` and
    ``fpr95`` of the worst set; see :func:`ebm_guard.faces.rows.metrics_of`. They serve as
    ``monitor=`` of ``ModelCheckpoint`` and ``EarlyStopping``.

    Under DDP the rows of all processes are put together, and those with which a
    ``DistributedSampler`` pads the shares are left out, so the values are those of one process. An
    OOD loader without such a sampler is read by every process, which runs its share of the batches.
    Where each forward pass needs all processes (FSDP, DeepSpeed stage 3), give OOD sets as
    validation loaders.

    Args:
        ood: OOD sets by name: a loader, whose labels are not looked at, or the number of one of the
            module's own validation loaders.
        logits: takes the output of ``module(inputs)`` and returns the logits, where they are not
            found alone.
        read: takes a batch and returns (inputs, labels); default: pairs, and mappings with
            "pixel_values" or "inputs" and "labels".
        dataloader_idx: number of the validation loader with the labelled ID rows.

    Raises:
        InvalidInputError: a number of a validation loader that is used twice.

    Example:
        >>> from ebm_guard.faces import LightningMonitor  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[LightningMonitor({"svhn": loader})])  # doctest: +SKIP
    """

    def __init__(
        self,
        ood: Mapping[str, Iterable[Any] | int] | None = None,
        *,
        logits: Callable[[Any], Tensor] | None = None,
        read: Read = read_batch,
        dataloader_idx: int = 0,
    ) -> None:
        super().__init__()
        self.ood = check_names(ood or {})
        self.logits = logits
        self.read = read
        self.dataloader_idx = dataloader_idx
        numbers = [dataloader_idx, *(item for item in self.ood.values() if isinstance(item, int))]
        if len(set(numbers)) < len(numbers):
            raise InvalidInputError(
                f"got the validation loaders {numbers} (the ID rows first); needed each once"
            )
        self._rows: dict[int, Rows] = {}
        self._classifier: EnergyClassifier | None = None
        self._warned = False

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with no rows."""
        self._classifier = EnergyClassifier(pl_module, logits=self.logits)
        names = {item: name for name, item in self.ood.items() if isinstance(item, int)}
        self._rows = {
            index: Rows(f"the OOD set {name}", labelled=False) for index, name in names.items()
        }
        self._rows[self.dataloader_idx] = Rows("the validation loader", labelled=True)

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch."""
        rows = self._rows.get(dataloader_idx)
        if rows is None or (trainer.sanity_checking and batch_idx):
            return
        inputs, labels = self.read(batch)
        logits = _given(outputs)
        if logits is None:
            with no_trace(pl_module.device):
                logits = self._run(trainer, inputs)
        rows.add(logits, labels if rows.labelled else None)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log."""
        kept, self._rows = self._rows, {}
        if trainer.sanity_checking:
            return
        loaders = _loaders(trainer)
        tables = {
            index: self._gathered(rows, loaders[index] if index < len(loaders) else None, pl_module)
            for index, rows in sorted(kept.items())
        }
        ood = {}
        for name, item in self.ood.items():
            if isinstance(item, int):
                ood[name] = tables[item]
            else:
                parts = run_loader(
                    name,
                    item,
                    lambda batch: self._run(trainer, self._prepared(trainer, batch)),
                    pl_module.device,
                )
                ood[name] = interleave(parts)
        values = metrics_of(tables[self.dataloader_idx], ood)
        # All processes have the same values; the largest of them is exact, a mean may round.
        pl_module.log_dict(
            values, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1
        )

    def _gathered(self, rows: Rows, loader: Any, pl_module: Any) -> Table:
        own = own_rows(loader)
        if world()[1] > 1 and own is None and not self._warned:
            self._warned = True
            warn_unshared(rows.source)
        table = interleave(gather(rows.table(own), pl_module.device))
        if not len(table):
            raise InvalidInputError(
                f"got no rows of {rows.source}; needed a validation loader with that number "
                "(dataloader_idx= for the ID rows, ood={name: number} for OOD sets)"
            )
        return table

    def _prepared(self, trainer: Any, batch: Any) -> Any:
        """Treat a batch of an OOD loader as the trainer treats validation batches."""
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        return self.read(batch)[0]

    def _run(self, trainer: Any, inputs: Any) -> Tensor:
        classifier = self._classifier or EnergyClassifier(trainer.lightning_module)
        with trainer.precision_plugin.forward_context():
            return classifier(inputs)


def _given(outputs: Any) -> Tensor | None:
    """Return the logits that ``validation_step`` returned, if it did."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def _loaders(trainer: Any) -> list[Any]:
    """Return the validation loaders in use, by number."""
    # trainer.val_dataloaders names those of fit even while trainer.validate runs over others.
    validating = trainer.state.fn == "validate"
    loop = trainer.validate_loop if validating else trainer.fit_loop.epoch_loop.val_loop
    return list(loop._combined_loader.flattened)


def _callbacks() -> tuple[type[Any], ...]:
    """Return the Callback classes of the package in use, or of both where both are."""
    found = [package for name in _PACKAGES if (package := sys.modules.get(name)) is not None]
    for name in () if found else _PACKAGES:
        try:
            found = [import_module(name)]
            break
        except ImportError:
            continue
    if found:
        return tuple(dict.fromkeys(package.Callback for package in found))
    raise InvalidInputError(
        "LightningMonitor needs Lightning, which is not installed: pip install lightning"
    )


def __getattr__(name: str) -> Any:
    """Make the class on first use, on top of the Lightning that is installed."""
    if name != "LightningMonitor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    facts = {"__doc__": Monitoring.__doc__, "__module__": __name__, "__qualname__": name}
    globals()[name] = type(name, (Monitoring, *_callbacks()), facts)
    return globals()[name]
