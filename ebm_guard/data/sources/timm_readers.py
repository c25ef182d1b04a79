"""timm's readers: ``torch/``, ``hfds/``, ``hfids/`` and ``wds/``, in timm's words.

Nothing is downloaded by us: torchvision's sets must lie under ``--data-dir``, web datasets too.
Names of the Hugging Face Hub follow Hugging Face's own rules: they are read from its cache, and
fetched where its library may do so (``HF_HUB_OFFLINE=1`` forbids it).

torchvision keeps some sets (CIFAR-10, CIFAR-100) as pickles and unpickles them, after it compared
their checksums; use ``npz:`` where you do not want that. Nothing is unpickled by us.

Rows of ``torch/`` and ``hfds/`` are read in any order. ``hfids/`` and ``wds/`` are streams, read in
this process only (``--workers`` changes nothing), without thumbnails.
"""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from PIL import Image

from ebm_guard.data.images import describe_error, read_image, upright
from ebm_guard.data.sources.base import ImageSource, Labels, StreamSource
from ebm_guard.data.sources.class_map import mapped_labels
from ebm_guard.data.specs import Spec
from ebm_guard.errors import DataError, EbmGuardWarning, InvalidInputError, suggest
from ebm_guard.files import expanded
from ebm_guard.model.loading import import_timm

TORCH_SETS = (
    "cifar10",
    "cifar100",
    "mnist",
    "kmnist",
    "fashion_mnist",
    "qmnist",
    "imagenet",
    "places365",
    "inaturalist",
    "image_folder",
)
# timm reads every other split of these as the test part.
_TWO_PARTS = TORCH_SETS[:6]
_SPLITS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")
_NEEDS = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset"}
# Whatever the libraries behind the readers raise on missing and damaged data.
_READER_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    AssertionError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ImportError,
    UnpicklingError,
)


def open_reader(
    spec: Spec, data_dir: str | None, split: str, class_map: str | None = None
) -> ImageSource:
    """Open one of timm's readers.

    Args:
        spec: of kind ``timm``; its own split wins.
        data_dir: timm's root folder, or None.
        split: timm's split, or '' for ``validation``.
        class_map: text file that numbers the classes.

    Raises:
        InvalidInputError: timm or a library of the extra ``data`` is missing, ``--data-dir`` is,
            or the name or split is unknown.
        DataError: the data set is missing or damaged.
    """
    reader, _, name = spec.path.partition("/")
    library = _NEEDS.get(reader)
    import_timm()
    if library and importlib.util.find_spec(library) is None:
        raise InvalidInputError(
            f"got spec {spec.text!r}, which needs the library {library!r}: pip install "
            "'ebm-guard[data]'"
        )
    root = _root(spec, reader, data_dir)
    wanted = spec.split or split
    if reader == "torch":
        source: ImageSource = _open_torch(spec, name, root, wanted)
    elif reader == "hfds":
        source = _HubSource(spec, _created(spec, root, wanted))
    else:
        source = _Stream(spec, _created(spec, root, wanted, input_img_mode=""))
    if class_map is not None:
        _number(source, class_map)
    return source if spec.rows is None else _sliced(spec, source)


def _root(spec: Spec, reader: str, data_dir: str | None) -> str | None:
    if data_dir is None:
        if reader in ("torch", "wds"):
            raise InvalidInputError(
                f"got spec {spec.text!r} without --data-dir (data_dir=); needed the folder where "
                "the data set lies. For a folder of this name write folder:..."
            )
        return None
    root = expanded(data_dir)
    # Web datasets may also lie behind a URL, and Hugging Face makes its cache itself.
    if reader == "torch" and not root.is_dir():
        raise DataError(f"got --data-dir {data_dir}, which is not a folder; {spec.text} needs it")
    return data_dir if "://" in data_dir else str(root)


def _created(spec: Spec, root: str | None, split: str, **settings: Any) -> Any:
    """Let timm make the data set; its many errors become ours."""
    from timm.data.dataset_factory import create_dataset

    reader, _, name = spec.path.partition("/")
    if reader in ("hfds", "hfids"):
        name = str(expanded(name)) if name[0] in "~$" else name
    if reader == "hfids":
        # Only timm's __len__ asks for it; without, a stream of unknown length is refused.
        settings["num_samples"] = 1
    if reader != "torch":
        settings |= {"input_key": spec.input_key or None, "target_key": spec.target_key or None}
    try:
        return create_dataset(
            f"{reader}/{name}",
            root=root,
            split=split or "validation",
            is_training=False,
            download=False,
            **settings,
        )
    except _READER_ERRORS as error:
        raise DataError(
            f"got spec {spec.text!r}; timm's reader could not open split "
            f"{split or 'validation'!r}: {describe_error(error)}. {_ADVICE[reader]}"
        ) from error


_ADVICE = {
    "torch": (
        "Nothing is downloaded here: fetch the set once with timm.data.create_dataset(NAME, "
        "root=ROOT, download=True), and give --data-dir ROOT"
    ),
    "hfds": (
        "Needed a data set of the Hugging Face Hub or its cache, or a local folder that "
        "datasets.load_dataset reads, with a split of this name (#split, --split) and columns "
        "image and label (?input_key=...&target_key=...)"
    ),
    "hfids": (
        "Needed a data set of the Hugging Face Hub, or a local folder that "
        "datasets.load_dataset reads, with a split of this name (#split, --split) and columns "
        "image and label (?input_key=...&target_key=...)"
    ),
    "wds": (
        "Needed --data-dir FOLDER with the shards, and as the split a name from its _info.json, or "
        "the shards: wds/#val-{000..003}.tar|4000, where the number counts the images"
    ),
}


# --- torchvision


class _TorchSource(ImageSource):
    """A torchvision data set; one that lies in memory is an array, like ``npz:``."""

    def __init__(self, spec: Spec, dataset: Any) -> None:
        samples = getattr(dataset, "samples", None)
        root = str(getattr(dataset, "root", ""))
        ids = [str(row) for row in range(len(dataset))]
        if samples is not None:
            ids = [os.path.relpath(sample[0], root) for sample in samples]
        names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
        classes = tuple(map(str, names)) if names else None
        super().__init__(spec.text, ids, _torch_labels(spec, dataset), classes)
        # Not hasattr: Places365 and others keep only paths.
        self.is_array = not isinstance(getattr(dataset, "data", None), (type(None), list, tuple))
        self.sorted_classes = samples is not None
        self._dataset = dataset

    def load(self, index: int) -> Image.Image:
        try:
            image = self._dataset[index][0]
        except DataError:
            raise
        except _READER_ERRORS as error:
            raise DataError(
                f"cannot read row {index} of {self.spec}: {describe_error(error)}"
            ) from None
        if not isinstance(image, Image.Image):
            raise DataError(f"row {index} of {self.spec} is a {type(image).__name__}, no image")
        return image


def _open_torch(spec: Spec, name: str, root: str | None, split: str) -> ImageSource:
    known = name.lower()
    if known not in (*TORCH_SETS, "inat", "folder"):
        raise InvalidInputError(
            f"got spec {spec.text!r}; timm has no torchvision set {name!r}"
            f"{suggest(known, TORCH_SETS)}; it has {', '.join(TORCH_SETS)}"
        )
    if known in _TWO_PARTS and split and split not in _SPLITS:
        raise InvalidInputError(
            f"got split {split!r} for {spec.text}{suggest(split, _SPLITS)}; needed train or test"
        )
    if known in ("image_folder", "folder") and split:
        _check_sub_folder(spec, Path(str(root)), split)
    dataset = _created(spec, root, split)
    if hasattr(dataset, "loader"):
        # torchvision's own loader knows no EXIF orientation and no 16-bit grey.
        dataset.loader = read_image
    return _TorchSource(spec, dataset)


def _check_sub_folder(spec: Spec, root: Path, split: str) -> None:
    """Refuse a split that timm does not find, because it then takes the root's folders as classes.

    Raises:
        DataError: no sub-folder has this name, or another one for the same part.
    """
    same = next((names for names in (_SPLITS[:2], _SPLITS[2:7]) if split in names), (split,))
    if not any((root / name).is_dir() for name in same):
        held = sorted(item.name for item in root.iterdir() if item.is_dir())
        raise DataError(
            f"got split {split!r} for {spec.text}; {root} has no such sub-folder"
            f"{suggest(split, held)}, it holds {', '.join(held[:5])}"
        )


def _torch_labels(spec: Spec, dataset: Any) -> Labels | None:
    targets = getattr(dataset, "targets", None)
    if targets is None and hasattr(dataset, "index"):
        # iNaturalist keeps (category, file name).
        targets = [pair[0] for pair in dataset.index]
    if targets is None:
        return None
    values = np.asarray(targets)
    # QMNIST keeps eight numbers an image; the first is the digit.
    return _integers(spec, values[:, 0] if values.ndim == 2 else values)


def _integers(spec: Spec, values: Any) -> Labels | None:
    array = np.asarray(values)
    if array.dtype == object and any(value is None for value in array.tolist()):
        return None
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"got {spec.text} with labels of dtype {array.dtype}; needed integer class numbers. "
            "Choose another column with ?target_key=COLUMN"
        )
    # Hugging Face's sign for "no label", as in test sets whose labels are secret.
    return None if len(array) and (array == -1).all() else array.astype(np.int64)


# --- Hugging Face, random access


class _HubSource(ImageSource):
    """A Hugging Face data set with random access; a missing label column means no labels."""

    def __init__(self, spec: Spec, dataset: Any) -> None:
        reader = dataset.reader
        table, column = reader.dataset, spec.target_key or "label"
        image, held = spec.input_key or "image", list(table.column_names)
        # timm casts the image column, and datasets then adds a missing one, empty.
        if image in held and len(table) and table[0][image] is None:
            held.remove(image)
        for key in filter(None, (image, spec.target_key)):
            if key not in held:
                raise DataError(
                    f"got spec {spec.text!r}; no column {key!r}{suggest(key, held)}, the set has "
                    f"{', '.join(held)}. Choose with ?input_key=COLUMN&target_key=COLUMN"
                )
        labels = None
        if column in table.column_names:
            labels = _integers(spec, table.with_format(None)[column][:])
        ids = [str(row) for row in range(len(table))]
        super().__init__(spec.text, ids, labels, _ordered(reader.class_to_idx))
        self._table, self._column = table, image

    def load(self, index: int) -> Image.Image:
        name = f"row {index} of {self.spec}"
        try:
            cell = self._table[index][self._column]
        except _READER_ERRORS as error:
            raise DataError(f"cannot read {name}: {describe_error(error)}") from None
        if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
            raise DataError(f"{name} holds no image; choose a column with ?input_key=COLUMN")
        return read_image(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"], name)


def _ordered(class_to_idx: Any) -> tuple[str, ...] | None:
    names = {number: str(name) for name, number in (class_to_idx or {}).items()}
    complete = bool(names) and set(names) == set(range(len(names)))
    return tuple(names[number] for number in range(len(names))) if complete else None


# --- streams


class _Stream(StreamSource):
    """``hfids/`` and ``wds/``: read from front to end, as often as asked for."""

    def __init__(self, spec: Spec, dataset: Any) -> None:
        self._reader = dataset.reader
        self._is_hub = spec.path.startswith("hfids/")
        total = _declared(self._reader) if self._is_hub else self._reader.num_samples
        classes = _ordered(self._reader.class_to_idx)
        if self._is_hub and classes is None:
            classes = _streamed_names(spec, self._reader)
        super().__init__(spec.text, classes, int(total) if total else None)
        self._advice = _ADVICE[spec.path.partition("/")[0]]
        self.numbers: Sequence[int] | None = None

    def read(self) -> Iterator[tuple[Image.Image, int | None]]:
        """Yield (image, label); warn where fewer images came than the data set declares."""
        count = 0
        rows: Iterable[Any] = self._reader
        rows = iter(rows)
        while True:
            try:
                image, target = next(rows)
            except StopIteration:
                break
            except _READER_ERRORS as error:
                raise DataError(
                    f"cannot read image {count} of {self.spec}: {describe_error(error)}. "
                    f"{self._advice}"
                ) from error
            # datasets has turned it already, and taken the orientation away.
            yield upright(image), self._label(target)
            count += 1
        if not count:
            raise DataError(
                f"got no images from {self.spec!r}; timm's reader leaves out what it cannot "
                "decode. "
                + ("" if self._is_hub else "Each image (jpg, png, webp) needs a .cls file. ")
                + self._advice
            )
        if self._total is not None and count < self._total:
            warnings.warn(
                f"{self.spec} gave {count} of {self._total} declared images; timm's reader leaves "
                "out what it cannot decode",
                EbmGuardWarning,
                stacklevel=2,
            )

    def _label(self, target: Any) -> int | None:
        if target is None:
            return None
        if isinstance(target, bool) or not isinstance(target, (int, np.integer)):
            raise DataError(
                f"got a label {target!r} from {self.spec}; needed an integer class number. Choose "
                "another column with ?target_key=COLUMN"
            )
        label = int(target)
        if self.numbers is None or not 0 <= label < len(self.numbers):
            return label
        return self.numbers[label]


def _streamed_names(spec: Spec, reader: Any) -> tuple[str, ...] | None:
    """Return the class names of a local set, which are known after its first file was opened."""
    try:
        features = reader.builder.as_streaming_dataset(split=reader.split).features or {}
    except _READER_ERRORS as error:
        raise DataError(
            f"got spec {spec.text!r}; timm's reader could not open split {reader.split!r}: "
            f"{describe_error(error)}. {_ADVICE['hfids']}"
        ) from error
    names = getattr(features.get(reader.target_key), "names", None)
    return tuple(map(str, names)) if names else None


def _declared(reader: Any) -> int | None:
    splits = reader.builder.info.splits or {}
    return getattr(splits.get(reader.split), "num_examples", None)


# --- what all of them take


def _number(source: ImageSource, class_map: str) -> None:
    if source.classes is None:
        raise DataError(
            f"got a class map for {source.spec}, whose classes have no names; leave it out"
        )
    numbers, source.classes, source.class_map = mapped_labels(class_map, source.classes)
    if isinstance(source, _Stream):
        source.numbers = numbers.tolist()
    elif source.labels is not None:
        source.labels = numbers[source.labels]


def _sliced(spec: Spec, source: ImageSource) -> ImageSource:
    rows = np.arange(len(source), dtype=np.int64)[spec.rows]
    if not len(rows):
        raise DataError(f"got spec {spec.text!r}, which selects none of {len(source)} rows")
    return source.subset(rows)
