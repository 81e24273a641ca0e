"""Runs that survive: agents on the nodes, a driver that tells them what to do, and faults to try both with."""
