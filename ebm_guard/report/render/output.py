"""All files of a report, written as a whole or not at all."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from ebm_guard.errors import DataError
from ebm_guard.report.render.pages import (
    render_attack_html,
    render_attack_markdown,
    render_finetune_html,
    render_finetune_markdown,
    render_html,
    render_markdown,
    render_sample_html,
    render_sample_markdown,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ebm_guard.report.editing_images import EditPictures
    from ebm_guard.report.rows import ReportRows

FIGURES = (
    "reliability",
    "risk_coverage",
    "joint_map",
    "energy_histogram",
    "roc",
    "score_ranking",
    "robustness_curve",
    "robustness_energy",
    "robustness_corruptions",
    "robustness_ood",
)


def _drawn(names: Sequence[str]) -> tuple[Path, ...]:
    return tuple(
        Path("figures") / f"{name}.{ending}" for name in names for ending in ("png", "svg")
    )


# The figures that a report and the attack command both draw.
SHARED = _drawn([name for name in FIGURES if name.startswith("robustness_")])
# Every file that a report may hold: those of an older report are replaced or taken away,
# everything else in the folder belongs to the user.
OURS = (
    Path("report.json"),
    Path("report.html"),
    Path("report.md"),
    Path("rows.npz"),
    *_drawn(FIGURES),
)
# The same of the attack command.
ATTACK_OURS = (Path("robustness.json"), Path("robustness.html"), Path("robustness.md"), *SHARED)
# The same of the fine-tuning and of the sample command.
FINETUNE_OURS = (
    *(Path(f"finetune_report.{ending}") for ending in ("json", "html", "md")),
    *_drawn(("finetune_ood", "finetune_training", "finetune_robustness")),
)
SAMPLE_OURS = (
    *(Path(f"samples.{ending}") for ending in ("json", "html", "md", "npz")),
    *_drawn(("sample_sheet", "sample_traces", "sample_energies")),
)
# Of each edit that the sample command was asked for.
EDIT_OURS = tuple(
    path
    for name, figure in (("inpainting", "errors"), ("denoising", "errors"), ("morphing", "path"))
    for path in (
        Path(f"{name}.gif"),
        *_drawn((f"sample_{name}_sheet", f"sample_{name}_{figure}")),
    )
)


def write_outputs(
    report: Mapping[str, Any], folder: Path, rows: ReportRows | None = None
) -> list[Path]:
    """Write report.json, report.html, report.md, rows.npz and the figures; return their paths.

    Everything is drawn into a hidden temporary folder on the same disk first and moved at the end,
    so a failure leaves an older report as it was.

    Raises:
        DataError: The folder cannot be written, or the report holds a value that JSON lacks.
    """
    neighbour = Path(folder) / "robustness.json"
    return _write(folder, partial(_write_report, report, rows=rows), OURS, neighbour)


def write_attack_outputs(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write robustness.json, robustness.html, robustness.md and the figures; return their paths.

    As a whole or not at all, like :func:`write_outputs`; other files in the folder stay, among
    them what an interrupted attack keeps there.

    Args:
        report: what ``AttackReport.to_dict()`` returns.
        folder: made if it is missing.

    Raises:
        DataError: The folder cannot be written, or the report holds a value that JSON lacks.
    """
    neighbour = Path(folder) / "report.json"
    return _write(folder, partial(_write_attack, report), ATTACK_OURS, neighbour)


def write_finetune_outputs(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write finetune_report.json, .html, .md and the figures; return their paths.

    As a whole or not at all, like :func:`write_outputs`; other files in the folder stay, among
    them weights and guard.

    Args:
        report: what ``FinetuneReport.to_dict()`` returns.
        folder: made if it is missing.

    Raises:
        DataError: The folder cannot be written, or the report holds a value that JSON lacks.
    """
    return _write(folder, partial(_write_finetune, report), FINETUNE_OURS)


def write_sample_outputs(
    report: Mapping[str, Any],
    folder: Path,
    images: NDArray[np.uint8],
    *,
    keep: bool = False,
    edits: Mapping[str, EditPictures] | None = None,
) -> list[Path]:
    """Write samples.json, .html, .md, the sheet and the figures; return their paths.

    Args:
        report: what ``SampleReport.to_dict()`` returns.
        folder: made if it is missing.
        images: (N, H, W, C), in the order of the report's classes.
        keep: also write samples.npz: images, labels, energies and class names, a data set that
            ``npz:`` reads.
        edits: pictures of the sections ``inpainting``, ``denoising`` and ``morphing``: a sheet and
            a GIF of each are written.

    Raises:
        DataError: The folder cannot be written, or the report holds a value that JSON lacks.
    """
    draw = partial(_write_samples, report, images, keep, edits or {})
    return _write(folder, draw, (*SAMPLE_OURS, *EDIT_OURS))


def _write(
    folder: Path,
    draw: Callable[[Path], list[Path]],
    ours: Sequence[Path],
    neighbour: Path | None = None,
) -> list[Path]:
    """Let ``draw`` fill a new folder, and put what it wrote in place of what is ``ours``."""
    folder = Path(folder).absolute()
    try:
        blocked = next((path for path in _on_the_way(folder) if not path.is_dir()), None)
        if blocked is not None:
            raise NotADirectoryError(20, "is a file, not a folder", str(blocked))
        # An existing folder may be a mount of its own, so its files are prepared inside it.
        room = next(path for path in (folder, *folder.parents) if path.is_dir())
        staging = room / f".ebm-guard-{token_hex(6)}"
        try:
            staging.mkdir()
            written = draw(staging / "new")
            # Figures of robustness may belong to a report of the other kind beside this one.
            kept = SHARED if neighbour is not None and neighbour.exists() else ()
            if room == folder:
                _exchange(staging, folder, written, [path for path in ours if path not in kept])
            else:
                folder.parent.mkdir(parents=True, exist_ok=True)
                (staging / "new").rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"The report was not written to {folder}: {reason}"
            f"{f' ({error.filename})' if error.filename else ''}. "
            "It needs a folder that can be written and has a few free megabytes. "
            "Choose another --output, or free the disk. An older report there is unchanged."
        ) from error
    return [folder / path for path in written]


def canonical_json(report: Mapping[str, Any]) -> str:
    """Write the report as JSON at full precision, in its own order."""
    try:
        return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"The report cannot be written as JSON: {error}. It needs plain numbers, texts, lists "
            "and dicts, and null where a number is not known. This is a fault of ebm_guard or of "
            "the code that changed the report, not of your data."
        ) from error


def _on_the_way(folder: Path) -> Iterator[Path]:
    """List what exists where the report needs folders."""
    yield from (path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    if (folder / "figures").exists():
        yield folder / "figures"


def _write_report(report: Mapping[str, Any], folder: Path, rows: ReportRows | None) -> list[Path]:
    """Write every file of the report into a new folder; return their relative paths."""
    from ebm_guard.report.figures import inline_svgs

    pages = {
        "report.json": canonical_json(report),
        "report.html": render_html(report, inline_svgs(report)),
        "report.md": render_markdown(report),
    }
    paths = _write_pages(pages, folder)
    if rows is not None:
        rows.write(folder / "rows.npz")
        paths.append(Path("rows.npz"))
    return paths + _write_figures(report, folder)


def _write_attack(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what the attack command found into a new folder; return the relative paths."""
    from ebm_guard.report.figures import inline_svgs

    pages = {
        "robustness.json": canonical_json(report),
        "robustness.html": render_attack_html(report, inline_svgs(report)),
        "robustness.md": render_attack_markdown(report),
    }
    return _write_pages(pages, folder) + _write_figures(report, folder)


def _write_finetune(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a fine-tuning report into a new folder; return the relative paths."""
    from ebm_guard.report.figures import inline_svgs

    pages = {
        "finetune_report.json": canonical_json(report),
        "finetune_report.html": render_finetune_html(report, inline_svgs(report)),
        "finetune_report.md": render_finetune_markdown(report),
    }
    return _write_pages(pages, folder) + _write_figures(report, folder)


def _write_samples(
    report: Mapping[str, Any],
    images: NDArray[np.uint8],
    keep: bool,
    edits: Mapping[str, EditPictures],
    folder: Path,
) -> list[Path]:
    """Write samples into a new folder; return the relative paths."""
    from ebm_guard.report.figures import edit_sheet, inline_svgs, sample_sheet, save_figure
    from ebm_guard.report.sample_images import picture, save_samples

    pictures = [picture(image) for image in images]
    pages = {
        "samples.json": canonical_json(report),
        "samples.html": render_sample_html(report, inline_svgs(report), pictures, edits),
        "samples.md": render_sample_markdown(report),
    }
    paths = _write_pages(pages, folder) + _write_figures(report, folder)
    labels = [row["label"] for row in report["classes"] for _ in row["energies"]]
    names = {row["label"]: row["name"] for row in report["classes"]}
    sheet = sample_sheet(images, labels, names)
    pair = save_figure(sheet, "sample_sheet", folder / "figures")
    paths += [path.relative_to(folder) for path in pair]
    for name, found in edits.items():
        sheet = edit_sheet(found.sheet, found.heads, found.names)
        pair = save_figure(sheet, f"sample_{name}_sheet", folder / "figures")
        (folder / f"{name}.gif").write_bytes(found.gif())
        paths += [*(path.relative_to(folder) for path in pair), Path(f"{name}.gif")]
    if keep:
        save_samples(report, images, folder / "samples.npz")
        paths.append(Path("samples.npz"))
    return paths


def _write_pages(pages: Mapping[str, str], folder: Path) -> list[Path]:
    folder.mkdir()
    for name, text in pages.items():
        # A name read from a file system may hold bytes that are no text; they are shown escaped.
        data = text.encode("utf-8", "backslashreplace")
        (folder / name).write_bytes(data)
    return [Path(name) for name in pages]


def _write_figures(report: Mapping[str, Any], folder: Path) -> list[Path]:
    from ebm_guard.report.figures import save_figures

    paths: list[Path] = []
    for pair in save_figures(report, folder / "figures").values():
        paths += [path.relative_to(folder) for path in pair]
    with suppress(OSError):
        (folder / "figures").rmdir()  # no figure at all: no empty folder
    return paths


def _exchange(staging: Path, folder: Path, written: Sequence[Path], ours: Sequence[Path]) -> None:
    """Put the new files in place of the old ones; on any failure put the old ones back."""
    new, old = staging / "new", staging / "old"
    saved: list[Path] = []
    placed: list[Path] = []
    had_figures = (folder / "figures").exists()
    try:
        for path in dict.fromkeys((*ours, *written)):
            target = folder / path
            if target.is_dir() and not target.is_symlink():
                raise IsADirectoryError(
                    21, "is a folder, but the report writes a file", str(target)
                )
            if target.exists() or target.is_symlink():
                (old / path).parent.mkdir(parents=True, exist_ok=True)
                target.rename(old / path)
                saved.append(path)
        for path in written:
            (folder / path).parent.mkdir(exist_ok=True)
            (new / path).rename(folder / path)
            placed.append(path)
    except BaseException:
        for path in placed:
            (folder / path).unlink(missing_ok=True)
        for path in saved:
            (old / path).rename(folder / path)
        if not had_figures:
            with suppress(OSError):
                (folder / "figures").rmdir()
        raise
    if saved and not any(path.parent.name == "figures" for path in written):
        with suppress(OSError):
            (folder / "figures").rmdir()  # the older report had figures, this one has none
