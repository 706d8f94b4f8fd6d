"""Recipes: how to train the networks of `unrolled.sparse` to recover codes, in seconds to a minute on one CPU core."""

from .recovery import train as train
from .search import Problem as Problem
from .search import greedy as greedy
