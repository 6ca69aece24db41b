"""Stands in for what follows experts that have weighted and summed already."""


class TopKWeightAndReduceNoOP:
    pass
