"""Measuring models: tasks, metrics, cost by part, and the report of a compression."""

from flaxcompress.evaluate.metrics import cosines, mean_cosine, neighbour_overlap, rank_correlation, spearman
from flaxcompress.evaluate.profile import PartCost, Profile, profile
from flaxcompress.evaluate.report import Report, versions
from flaxcompress.evaluate.tasks import TASKS, compare_vectors, evaluate, options_of

__all__ = [
    "TASKS",
    "PartCost",
    "Profile",
    "Report",
    "compare_vectors",
    "cosines",
    "evaluate",
    "mean_cosine",
    "neighbour_overlap",
    "options_of",
    "profile",
    "rank_correlation",
    "spearman",
    "versions",
]
