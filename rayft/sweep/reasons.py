"""Why a process of Ray's ended, in one line for people; Ray's own text lists all processes of the machine."""

from __future__ import annotations

__all__ = ["NODE_LOST", "UNREACHABLE", "severity", "why_ended"]

NODE_LOST = "its node was lost"
"""The reason of a lane that ended with its node; neither the lane nor its trial is to blame."""
UNREACHABLE = "its process can't be reached"
"""The reason of a lane whose node may be lost; Ray needs some seconds to be sure of that."""


def why_ended(error: Exception) -> str:
    """Return the reason why a process of Ray's ended."""
    text = str(error)
    if "running low on memory" in text or "OutOfMemory" in type(error).__name__:
        return (
            "Ray ended it because the machine ran out of memory; lower sweep.lanes, data.max_length or "
            "optim.rows_per_step, set scale.activation_checkpointing, or take a machine with more (Ray acts "
            "at the share of memory in RAY_memory_usage_threshold, 0.95)"
        )
    if "node has died" in text or "NodeDied" in type(error).__name__ or "node is dead" in text:
        return NODE_LOST
    if "is unavailable" in text or "failed to connect" in text.lower():
        return UNREACHABLE
    if "ActorDied" in type(error).__name__ or "actor is dead" in text or "actor died" in text:
        return "its process was killed or crashed; the worker logs in Ray's session folder may say why"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason was given'}"


def severity(error: Exception) -> int:
    """Return the rank of an error among those of a worker group; the lowest one is the reason for the others.

    If the node of one worker is lost, the other workers fail as well.
    """
    order = {NODE_LOST: 0, UNREACHABLE: 1}
    return order.get(why_ended(error), len(order))
