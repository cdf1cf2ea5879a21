"""`python -m flexeval`."""

from flexeval.cli import main

main()
