"""A fitted guard at work: exported, served, and run over large sets."""

from ebm_guard.deploy.exported import Exported, ExportedOutput, load_exported
from ebm_guard.deploy.exporting import export

__all__ = ["Exported", "ExportedOutput", "export", "load_exported"]
