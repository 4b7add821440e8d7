"""Measures how fast this project is: the SFT step, the rollout, the GRPO step and the tools, alone or in turns with rivals.

`common` holds what all measurements share; a measurement is a function that returns a dictionary, which goes to JSON as it is,
and a `report` of it in Markdown. Rivals are passed in by `scripts/benchmark.py`: nothing here imports them.
"""
