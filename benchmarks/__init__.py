"""Measurements of bigmerge beside its peers and the machine's own limits, and the demo on real data."""
