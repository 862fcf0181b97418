"""What faults do to each kind of file: ``python -m tests.faults`` tries all, and writes ``data/results/faults.md``.

A file that is damaged, or of something else, must be refused in one sentence that names it, or read as it was written.
A write that fails must leave the older file as it was, and no other. ``tests/test_faults.py`` tries a few of each.
"""
