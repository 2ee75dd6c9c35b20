"""All endpoints, in the order in which documents show them."""

from __future__ import annotations

from head.planner.endpoints import (
    about,
    advising,
    calibrating,
    comparing,
    exporting,
    optimizing,
    recommending,
    scaling,
    serving,
    sharding,
    special,
    training_memory,
    training_time,
)

ENDPOINTS = (
    *about.ENDPOINTS,
    *recommending.ENDPOINTS,
    *comparing.ENDPOINTS,
    *training_memory.ENDPOINTS,
    *training_time.ENDPOINTS,
    *optimizing.ENDPOINTS,
    *scaling.ENDPOINTS,
    *special.ENDPOINTS,
    *serving.ENDPOINTS,
    *advising.ENDPOINTS,
    *sharding.ENDPOINTS,
    *exporting.ENDPOINTS,
    *calibrating.ENDPOINTS,
)
BY_PATH = {endpoint.path: endpoint for endpoint in ENDPOINTS}
BY_VERB = {endpoint.verb: endpoint for endpoint in ENDPOINTS if endpoint.verb}
