"""Image sources behind one small interface: files, arrays, the demo, and timm's readers."""

from __future__ import annotations

from ebm_guard.data.sources.arrays import (
    ArraySource,
    checked_groups,
    integer_labels,
    npz_names,
    open_demo,
    open_npz,
    read_npz,
)
from ebm_guard.data.sources.base import ImageSource, StreamSource
from ebm_guard.data.sources.files import EXTENSIONS, FileSource, open_folder, open_list
from ebm_guard.data.specs import IMAGE_KINDS, Spec, existing_path, parse_spec
from ebm_guard.errors import InvalidInputError

__all__ = [
    "EXTENSIONS",
    "ArraySource",
    "FileSource",
    "ImageSource",
    "Spec",
    "StreamSource",
    "checked_groups",
    "integer_labels",
    "npz_names",
    "open_source",
    "parse_spec",
    "read_npz",
]


def open_source(
    spec: Spec | str,
    role: str = "evaluation",
    *,
    data_dir: str | None = None,
    split: str | None = None,
    class_map: str | None = None,
) -> ImageSource:
    """Open an image source.

    Args:
        spec: a spec, or its text.
        role: data role of the option that names it; ``demo:`` serves that role's own rows.
        data_dir: root folder of timm's readers.
        split: split of timm's readers where the spec names none; default ``validation``.
        class_map: text file that numbers the classes of folders and of named classes of timm's
            readers, one class name a line; not used for the role ``ood``.

    Raises:
        InvalidInputError: the spec is malformed, or is of a kind without images.
        DataError: the data is missing, empty or malformed.

    Example:
        >>> len(open_source("demo:")) > 0
        True
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    class_map = None if role == "ood" else class_map
    if spec.kind not in IMAGE_KINDS:
        raise InvalidInputError(f"got spec {spec.text!r}, which holds no images; needed images")
    if spec.kind == "demo":
        return open_demo(spec, role)
    if spec.kind == "timm":
        from ebm_guard.data.sources.timm_readers import open_reader

        return open_reader(spec, data_dir, split or "", class_map)
    path = existing_path(spec)
    if spec.kind == "folder":
        return open_folder(spec, path, class_map)
    return open_npz(spec, path) if spec.kind == "npz" else open_list(spec, path)
