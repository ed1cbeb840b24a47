"""Where parameters, metrics and files of runs go.

`base` has the contract and the picklable spec; `mlflow` and `memory` implement it; `spool` is the
write-ahead log that makes a server's absence harmless. Importing this package imports no MLflow.
"""

from rayft.tracking.base import RunStatus, Tracker, TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.provenance import provenance

__all__ = ["RunStatus", "Tracker", "TrackerSpec", "TrackingConfig", "provenance", "tracker_spec"]
