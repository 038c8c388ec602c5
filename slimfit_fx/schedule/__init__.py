"""Schedulers: which units train in the next step."""

from slimfit_fx.schedule.base import Scheduler, UnitInfo, make_scheduler, register_scheduler, scheduler_names
from slimfit_fx.schedule.distance import (
    DISTANCES,
    DistanceMetric,
    combine_parts,
    distance_parts,
    distance_parts_of_all,
    update_distance,
)
from slimfit_fx.schedule.ils import InterLayerScheduler, PaperScheduler
from slimfit_fx.schedule.none import OpenScheduler
from slimfit_fx.schedule.round_robin import RoundRobinScheduler
from slimfit_fx.schedule.sample import Sample
from slimfit_fx.schedule.uniform import RandomScheduler

register_scheduler("ils", InterLayerScheduler)
register_scheduler("ils_paper", PaperScheduler)
register_scheduler("random", RandomScheduler)
register_scheduler("round_robin", RoundRobinScheduler)
register_scheduler("none", OpenScheduler)

__all__ = [
    "DISTANCES",
    "DistanceMetric",
    "InterLayerScheduler",
    "OpenScheduler",
    "PaperScheduler",
    "RandomScheduler",
    "RoundRobinScheduler",
    "Sample",
    "Scheduler",
    "UnitInfo",
    "combine_parts",
    "distance_parts",
    "distance_parts_of_all",
    "make_scheduler",
    "register_scheduler",
    "scheduler_names",
    "update_distance",
]
