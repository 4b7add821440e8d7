"""StickMotion: a synthetic open-vocabulary action benchmark in miniature, made by this project.

A stick figure performs two or three sub-motions; an action is an ordered combination of them and has invented names only,
so that a label means nothing without its explanation, and clutter makes the pose overlay worth asking for.
"""
