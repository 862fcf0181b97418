"""Effects of faults on each kind of file: ``python -m tests.faults`` tries all, and writes ``data/results/faults.md``.

A damaged file, or one of something else, must be refused in one sentence that names it, or be read unchanged.
A write that fails must leave the older file unchanged, and no other file. ``tests/test_faults.py`` tries a few.
"""
