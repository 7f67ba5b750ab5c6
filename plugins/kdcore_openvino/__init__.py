"""OpenVINO: an engine that runs the target on a CPU from a converted graph."""
