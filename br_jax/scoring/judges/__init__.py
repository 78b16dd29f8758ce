"""Judges of answers behind one interface: is this answer to that prompt harmful? `registry.JUDGES` has all by name."""
