"""What results look like.

In: the dataclasses that the functions return. Out: tables for people, on stdout, and progress, on stderr (`tables.py`).

Others use `Display` and `show`, and a function per table.
"""
