"""What the commands share: make the model once, turn specs into predictions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TextIO

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ebm_guard.cli.options import ModelOptions
from ebm_guard.cli.processes import usable_device
from ebm_guard.data import ImageSource, Spec, batches, match_classes, open_source, parse_spec
from ebm_guard.data.sources import StreamSource
from ebm_guard.data.specs import STORED_KINDS
from ebm_guard.distributed import World
from ebm_guard.errors import (
    ArtifactError,
    EbmGuardError,
    EbmGuardWarning,
    InvalidInputError,
    ModelOutputError,
    first_line,
)
from ebm_guard.gate import Guard
from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.model.loading import load_model
from ebm_guard.predictions import Predictions, stored_predictions
from ebm_guard.predictions.shared import predict_shared
from ebm_guard.report.checks import RESERVED

_PROBE_ROWS = 8
_NO_MODEL = (
    "no --model was given; images need one (a timm name, module:factory or file.py:factory). Only "
    "demo:, logits: and predictions: do without"
)


class Session:
    """The model and the data of one command.

    Args:
        options: the model options of the command line.
        specs: all data specs of the command, which tell whether a model is needed.
        guard_path: an artefact to load, or None.
        world: the processes that share the passes over the data.
    """

    def __init__(
        self,
        options: ModelOptions,
        specs: list[str],
        guard_path: str | None = None,
        world: World | None = None,
    ) -> None:
        self.options = options
        self.world = World() if world is None else world
        self.sources: dict[str, ImageSource] = {}
        self._limited: set[str] = set()
        self._rows: dict[str, dict[str, int]] = {}
        parsed = [parse_spec(text) for text in specs]
        self._check_data_options(parsed)
        needs_model = any(spec.kind not in STORED_KINDS for spec in parsed)
        model = self._model(parsed) if needs_model or options.model else None
        if model is None and (options.checkpoint or options.pretrained or options.num_classes):
            raise InvalidInputError(
                "got --checkpoint, --pretrained or --num-classes without --model, and no data that "
                "needs a model; leave them out, or give --model"
            )
        self.guard: Guard | None = None
        parameter = None if model is None else next(model.parameters(), None)
        self._device = "cpu" if parameter is None else parameter.device.type
        if guard_path is not None:
            # The canary is run as the rows will be, so that --amp is a part of what is verified.
            with self.autocast():
                self.guard = Guard.load(guard_path, model)
            self.classifier = self.guard.classifier
            self._check_overrides()
        elif model is not None:
            self.classifier = EnergyClassifier(model, preprocessing=self._preprocessing(model))
        else:
            self.classifier = None

    def go_on_alone(self) -> None:
        """Share nothing any more: the other processes have done their part."""
        self.world = World(device=self.world.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs: autocast with ``--amp``, else nothing."""
        return torch.autocast(self._device) if self.options.amp else nullcontext()

    def predictions(
        self, text: str, role: str, name: str, *, features: bool = False
    ) -> Predictions:
        """Return the predictions of a spec, from the model or as stored.

        Args:
            text: the data spec.
            role: data role, which decides the rows of ``demo:``.
            name: what the set is called.
            features: also keep features, where they come with the same pass.
        """
        spec = parse_spec(text)
        if spec.kind in STORED_KINDS:
            part = replace(stored_predictions(spec, labelled=role != "ood"), source=text)
            limit = self.options.limit
            if limit is None or limit >= len(part):
                return part
            kept = part.select(self.chosen(len(part), limit))
            return replace(kept, notes={**part.notes, "limit": limit})
        source = self.open(spec, role, name)
        part = self.run(source, text, features=features)
        return self._described(part, source, role, name)

    def labelled(self, source: ImageSource, name: str) -> Predictions:
        """Return the predictions on a source, its labels numbered as the model's classes."""
        part = self.run(source, source.spec, features=True)
        return self._described(part, source, "evaluation", name)

    def run(self, source: ImageSource, text: str, *, features: bool) -> Predictions:
        """Run the model over a source; features only where they come with the same pass."""
        classifier = self.require_classifier()
        with model_errors(text):
            return predict_shared(
                classifier,
                source,
                self.batches,
                self.world,
                batch_size=self.options.batch_size,
                features=features and not classifier.compiled,
                progress=not self.options.quiet,
                amp=self.options.amp,
                text=text,
            )

    def open(self, spec: Spec, role: str, name: str) -> ImageSource:
        """Open an image source, cut to ``--limit`` rows, and remember it for the gallery."""
        options = self.options
        source = open_source(
            spec,
            role,
            data_dir=options.data_dir,
            split=options.split,
            class_map=options.class_map,
        )
        if role == "ood":
            # Their labels are of other classes, and would be checked against the model's.
            source = source.without_labels()
        limit, total = options.limit, source.total
        if limit is not None and total is None:
            raise InvalidInputError(
                f"got --limit for {spec.text}, a stream that does not say how many images it "
                "has, so no random rows of it can be chosen. For wds/ give the number behind the "
                "shards: wds/#val-{000..003}.tar|4000"
            )
        if limit is not None and total is not None and limit < total:
            source = source.subset(self.chosen(total, limit))
            self._limited.add(name)
        self.sources[name] = source
        return source

    def chosen(self, total: int, limit: int) -> NDArray[np.int64]:
        """Choose random rows, in order."""
        generator = np.random.default_rng(self.options.seed)
        return np.sort(generator.choice(total, limit, replace=False))

    def batches(self, source: ImageSource) -> Iterator[Any]:
        """Yield the batches of a source; the first one also finds the head."""
        classifier = self.require_classifier()
        preprocessing = classifier.preprocessing
        if preprocessing is None:
            raise InvalidInputError(
                "this model has no pretrained_cfg, so its preprocessing is not known: give --mean "
                "and --std (--mean 0,0,0 --std 1,1,1 for a model that takes [0, 1] pixels)"
            )
        for batch in batches(
            source,
            preprocessing,
            batch_size=self.options.batch_size,
            workers=self.options.workers,
            strict=self.options.strict,
        ):
            if classifier.head is None and len(batch.inputs) > 1:
                classifier.probe_head(batch.inputs[:_PROBE_ROWS])
            yield batch

    def picture(self, name: str, row_id: str) -> Image.Image | None:
        """Return the image of a row, or None for stored predictions and streams."""
        source = self.sources.get(name)
        if source is None or isinstance(source, StreamSource):
            return None
        rows = self._rows.setdefault(name, {key: row for row, key in enumerate(source.ids)})
        return source.load(rows[row_id])

    def pixels(self, name: str, row_ids: Sequence[str]) -> torch.Tensor:
        """Return images of an open source as [0, 1] pixels (N, C, H, W), at the model's input size.

        Raises:
            InvalidInputError: the source is a stream, or was stored without images.
        """
        source, preprocessing = self.sources.get(name), self.require_classifier().preprocessing
        if source is None or isinstance(source, StreamSource) or preprocessing is None:
            what = "stored predictions" if source is None else "a stream, which is read only once"
            raise InvalidInputError(
                f"attacks need the images of {name} again, and they are {what}; give a folder, a "
                "list or an npz file"
            )
        rows = self._rows.setdefault(name, {key: row for row, key in enumerate(source.ids)})
        chosen = source.subset(np.array([rows[key] for key in row_ids], dtype=np.int64))
        channels = preprocessing.channels
        plain = replace(preprocessing, mean=(0.0,) * channels, std=(1.0,) * channels)
        read = batches(
            chosen, plain, batch_size=self.options.batch_size, workers=self.options.workers
        )
        # Bicubic resizing overshoots by design.
        return torch.cat([batch.inputs for batch in read]).clamp(0, 1)

    def require_classifier(self) -> EnergyClassifier:
        """Return the model.

        Raises:
            InvalidInputError: none was given.
        """
        if self.classifier is None:
            raise InvalidInputError(_NO_MODEL)
        return self.classifier

    def _model(self, specs: list[Spec]) -> nn.Module:
        options = self.options
        if options.model is not None:
            model = load_model(
                options.model,
                checkpoint=options.checkpoint,
                pretrained=options.pretrained,
                num_classes=options.num_classes,
            )
        elif all(spec.kind in ("demo", *STORED_KINDS) for spec in specs):
            model = self._demo_model()
        else:
            raise InvalidInputError(_NO_MODEL)
        if options.device is not None:
            model = model.to(usable_device(options.device))
        return model.to(memory_format=torch.channels_last) if options.channels_last else model

    def _demo_model(self) -> nn.Module:
        from ebm_guard.data.demo import demo_classifier

        options = self.options
        if options.checkpoint or options.pretrained or options.num_classes:
            raise InvalidInputError(
                "got --checkpoint, --pretrained or --num-classes without --model; demo: brings its "
                "own classifier"
            )
        return demo_classifier()

    def _preprocessing(self, model: nn.Module) -> Preprocessing | None:
        base, overrides = Preprocessing.from_model(model), self._overrides()
        if not overrides:
            return base
        if base is not None:
            return replace(base, **overrides, source="the command line and the pretrained_cfg")
        if "mean" not in overrides or "std" not in overrides:
            return None
        return Preprocessing(**overrides, source="the command line")

    def _overrides(self) -> dict[str, Any]:
        options = self.options
        overrides: dict[str, Any] = {}
        if options.mean is not None:
            overrides["mean"] = options.mean
        if options.std is not None:
            overrides["std"] = options.std
        if options.img_size is not None:
            overrides["image_size"] = (options.img_size, options.img_size)
        return overrides

    def _check_overrides(self) -> None:
        stored = None if self.classifier is None else self.classifier.preprocessing
        for name, value in self._overrides().items():
            if stored is not None and getattr(stored, name) != value:
                raise ArtifactError(
                    f"got {name} {value} for a guard that was fitted with {getattr(stored, name)}; "
                    "other preprocessing gives other energies. Leave the option out, or fit a new "
                    "guard"
                )

    def _check_data_options(self, specs: list[Spec]) -> None:
        options, kinds = self.options, {spec.kind for spec in specs}
        if "timm" not in kinds and (options.data_dir or options.split):
            raise InvalidInputError(
                "got --data-dir or --split without a timm reader (torch/, hfds/, hfids/, wds/); "
                "other specs carry their whole path, and npz:FILE#test its split"
            )
        if options.class_map and not kinds & {"folder", "timm"}:
            raise InvalidInputError(
                "got --class-map without a folder of classes; an npz file names its classes in "
                "the array `classes`, and npz:FILE?classes= numbers them"
            )

    def _described(
        self, part: Predictions, source: ImageSource, role: str, name: str
    ) -> Predictions:
        notes: dict[str, Any] = {}
        if name in self._limited:
            notes["limit"] = self.options.limit
        if role == "ood":
            notes["class_match"] = "labels of OOD sets are not used"
            return replace(part, notes=notes)
        model_classes = self.require_classifier().classes
        mapping = None
        if source.class_map:
            notes["class_match"] = source.class_map
        else:
            mapping, notes["class_match"] = match_classes(
                source.classes,
                model_classes,
                part.num_classes,
                sorted_names=source.sorted_classes,
            )
        labels = part.labels
        if labels is not None and mapping is not None and source.classes is not None:
            # A label without a name stays; the check of the range reports it.
            named = (labels >= 0) & (labels < len(mapping))
            labels = np.where(named, mapping[np.where(named, labels, 0)], labels)
        classes = model_classes
        if classes is None and mapping is None and len(source.classes or ()) == part.num_classes:
            classes = source.classes
        return replace(part, labels=labels, classes=classes, notes=notes)


@contextmanager
def model_errors(text: str) -> Iterator[None]:
    """Turn an exception of the user's model into exit code 4 with its message."""
    try:
        yield
    except EbmGuardError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ModelOutputError(
            f"the model failed on {text}: {type(error).__name__}: {first_line(error)}. Check "
            "--img-size, the number of channels (--mean), and --device"
        ) from error


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print our warnings as single lines on stderr."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, EbmGuardWarning):
                click.echo(f"warning: {message}", err=True)
            else:
                shown(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def named_specs(pairs: tuple[str, ...]) -> dict[str, str]:
    """Parse ``--ood NAME=SPEC`` options.

    Raises:
        InvalidInputError: no ``=``, a name twice, or the name of another role.
    """
    specs: dict[str, str] = {}
    for pair in pairs:
        name, equals, spec = pair.partition("=")
        if not equals or not name or not spec:
            raise InvalidInputError(f"got --ood {pair!r}; needed NAME=SPEC")
        if name in (".", "..") or any(sign in name for sign in "/\\\0"):
            raise InvalidInputError(
                f"got --ood {pair!r}; the name {name!r} would be a path where files are named "
                "after sets, take a plain word"
            )
        if name in specs:
            raise InvalidInputError(f"got --ood {name!r} twice; names must differ")
        if name in RESERVED:
            raise InvalidInputError(
                f"got --ood {name!r}; {', '.join(RESERVED)} are names of other sets, take another"
            )
        specs[name] = spec
    return specs
