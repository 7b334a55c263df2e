"""What Chrome's trace format asks of a file; ranks and threads as this project uses them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest


def check_trace_events(trace):
    """The Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU."""
    events = json.loads(json.dumps(trace, allow_nan=False))["traceEvents"]
    slices, flows, names = {}, {}, set()
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        place = event["pid"], event["tid"]
        match event["ph"]:
            case "M":
                assert event["name"] in {"process_name", "thread_name"}
                assert event["args"]["name"]
                names.add((event["name"], place))
            case "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                assert event["name"]
                slices.setdefault(place, []).append((event["ts"], event["ts"] + event["dur"]))
            case "s" | "f":
                assert event["ph"] == "s" or event["bp"] == "e"
                flows.setdefault((event["cat"], event["name"], event["id"]), {})[event["ph"]] = event
            case other:
                pytest.fail(f"phase {other}")
    for place, spans in slices.items():
        assert ("thread_name", place) in names
        assert all(left[1] <= right[0] + 1e-6 for left, right in pairwise(sorted(spans)))  # a thread does one thing
    for ends in flows.values():
        assert set(ends) == {"s", "f"}
        assert ends["s"]["ts"] <= ends["f"]["ts"] + 1e-6
        for event in ends.values():  # each end lies on a slice, which is what it is drawn to
            spans = slices[event["pid"], event["tid"]]
            assert any(start - 1e-6 <= event["ts"] <= stop + 1e-6 for start, stop in spans)
    return len(flows)
