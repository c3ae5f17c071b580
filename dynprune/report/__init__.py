"""What results look like: tables for people, from the dataclasses that the functions return."""
