"""`python -m delta_mem` is `delta-mem`."""

from .cli import main

main()
