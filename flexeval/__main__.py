"""`python -m flexeval`."""

from flexeval.cli import main

if __name__ == "__main__":  # not where a child of `bench` imports this again
    main()
