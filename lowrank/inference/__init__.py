"""Trained models in use: load one, generate text with it, export it for others."""

from lowrank.inference.export import Export, export
from lowrank.inference.model import Model, load

__all__ = ["Export", "Model", "export", "load"]
