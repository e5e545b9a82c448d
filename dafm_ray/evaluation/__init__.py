"""Ranks to numbers: integer hits, intervals, paired comparisons."""
