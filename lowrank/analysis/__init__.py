"""What an adapter does to its base."""

from lowrank.analysis.measure import Analysis, Module, analyze
from lowrank.analysis.page import write_analysis

__all__ = ["Analysis", "Module", "analyze", "write_analysis"]
