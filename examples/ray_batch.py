"""Decide on a folder of images with Ray Data: a saved guard in each of several processes.

Ray divides the files among its workers, retries what a lost worker had, and writes Parquet; the
guard decides. Each worker makes the model once, and loading the guard proves that it belongs to it.
An image that cannot be read is a row with the status INVALID, as in `ebm-guard predict`; a number
that is not known is NaN.

    pip install "ray[data]" ebm-guard
    ebm-guard fit --model resnet50.tv_in1k --pretrained --data val/ -o guard.safetensors
    python examples/ray_batch.py guard.safetensors --model resnet50.tv_in1k --pretrained \
        --data new/ --output decisions --concurrency 4

On one machine `ebm-guard predict --resume` is simpler, and gives one file, in the data's order.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ebm_guard import Guard
from ebm_guard.data import open_source
from ebm_guard.data.images import plain, read_image
from ebm_guard.errors import DataError
from ebm_guard.model.loading import load_model

UNREADABLE = {
    "status": "INVALID",
    "accept": False,
    "label": -1,
    "confidence": 0.0,
    "energy": float("nan"),
    "score": float("nan"),
    "p_value": 0.0,
}


class Decide:
    """Hold one model and one guard; called by Ray with batches of paths."""

    def __init__(self, guard: str, model: str, checkpoint: str | None, pretrained: bool) -> None:
        loaded = load_model(model, checkpoint=checkpoint, pretrained=pretrained)
        self.guard = Guard.load(guard, loaded)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a column for each field of a row."""
        rows: list[dict[str, Any]] = [{} for _ in batch["path"]]
        images, places = [], []
        for place, path in enumerate(batch["path"]):
            try:
                images.append(read(path))
                places.append(place)
            except DataError as error:
                rows[place] = UNREADABLE | {"reason": f"unreadable: {error}"}
        if images:
            decided = self.guard.predict(images, batch_size=len(images)).rows()
            for place, row in zip(places, decided, strict=True):
                rows[place] = {name: unknown(value) for name, value in row.items()}
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        return {"path": np.asarray(batch["path"]), **columns}


def read(path: str) -> Image.Image:
    return plain(read_image(path))


def unknown(value: Any) -> Any:
    return float("nan") if value is None else value


def main(args: list[str] | None = None) -> None:
    import ray
    from pyarrow.dataset import dataset, field

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("guard")
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--output", required=True, help="folder of Parquet files")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=2, help="processes that decide")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each of them")
    given = parser.parse_args(args)
    # Workers run in folders of their own.
    guard, folder = (str(Path(name).resolve()) for name in (given.guard, given.data))
    paths = [str(Path(folder) / name) for name in open_source(f"folder:{folder}").ids]
    data = ray.data.from_items([{"path": path} for path in paths])
    decided = data.map_batches(
        Decide,
        fn_constructor_args=(guard, given.model, given.checkpoint, given.pretrained),
        batch_size=given.batch_size,
        concurrency=given.concurrency,
        num_gpus=given.gpus,
    )
    decided.write_parquet(str(Path(given.output).resolve()))
    rows = dataset(given.output)
    accepted = rows.count_rows(filter=field("accept"))
    print(f"{rows.count_rows():,} images, {accepted:,} accepted: {given.output}")


if __name__ == "__main__":
    main()
