"""Ask a served guard about image files, with Python's own library alone.

    ebm-guard serve guard.safetensors --model resnet50.tv_in1k --port 8000
    python examples/serving/client.py http://127.0.0.1:8000 cat.jpg dog.jpg

A server that is full answers 503 and says in Retry-After when to ask again; so does this client. A
connection that breaks is the same: a server that ends, or that does not read on, resets it.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(
    url: str, body: bytes, content_type: str = "application/octet-stream", tries: int = 5
) -> list[dict[str, Any]]:
    """Return the decisions on an image file, or raise urllib's HTTPError or URLError."""
    request = urllib.request.Request(
        f"{url}/predict", data=body, headers={"Content-Type": content_type}
    )
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["decisions"]
        except urllib.error.HTTPError as error:
            if error.code != 503 or attempt == tries - 1:
                raise
            time.sleep(float(error.headers.get("Retry-After", 1)))
        except (urllib.error.URLError, ConnectionError) as error:
            # urlopen wraps what happens while it sends, and not what happens while it reads.
            broken = isinstance(getattr(error, "reason", error), ConnectionError)
            if not broken or attempt == tries - 1:
                raise
            time.sleep(1)
    raise ValueError(f"got tries={tries}; needed at least 1")


def main() -> None:
    url, *paths = sys.argv[1:]
    for path in paths:
        (row,) = ask(url, Path(path).read_bytes())
        if row["accept"]:
            print(f"{path}: {row['class'] or row['label']} ({row['confidence']:.1%})")
        else:
            print(f"{path}: {row['status']}, ask a human: {row['reason']}")


if __name__ == "__main__":
    main()
