"""What the real programs of a run need on chips that are not there: compiled ahead of time, read, and tabled."""
