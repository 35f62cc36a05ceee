"""Timing of the network and its parts; the commands are the scripts at the top level."""
