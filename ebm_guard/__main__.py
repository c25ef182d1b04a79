"""``python -m ebm_guard`` is the ``ebm-guard`` command."""

from ebm_guard.cli import main

main()
