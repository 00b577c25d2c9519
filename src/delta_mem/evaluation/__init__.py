"""Benchmarks of memory: tasks (what is asked), systems (how it is answered) and how answers are scored."""
