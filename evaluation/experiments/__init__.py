"""Experiments on evaluations: each ends in a table, a JSON file and a picture."""
