"""A fitted guard behind HTTP: one process, one model, one worker thread.

Needs the extra ``serve``: ``pip install 'ebm-guard[serve]'``. A replica is one such process; more
load is more replicas behind a balancer, whose counters in ``/metrics`` add up.
"""

from __future__ import annotations

from ebm_guard.deploy.serve.app import make_app
from ebm_guard.deploy.serve.server import run_server
from ebm_guard.deploy.serve.settings import ENERGY_EDGES, ServeSettings

__all__ = ["ENERGY_EDGES", "ServeSettings", "make_app", "run_server"]
