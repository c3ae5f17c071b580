"""What results look like.

In: the dataclasses that the functions return. Out: tables for people, on stdout (`tables.py`), and
progress, on stderr (`progress.py`).

Others use `Display` and `show`, and a function per table.
"""
