"""Tracking: where the parameters, metrics and files of runs go.

`base` has the contract of a tracker and the picklable spec that a worker builds its tracker from. `mlflow`
implements the contract. `spool` is the write-ahead log that keeps data while the server is away, and `sender`
delivers its records. `connection` opens MLflow, and `runs` finds runs in it and reads them back.

Importing this package does not import MLflow.
"""

from rayft.tracking.base import RunStatus, Tracker, TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.provenance import provenance

__all__ = ["RunStatus", "Tracker", "TrackerSpec", "TrackingConfig", "provenance", "tracker_spec"]
