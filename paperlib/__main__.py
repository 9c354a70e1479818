"""`python -m paperlib` is the command line."""

from paperlib.cli import main

if __name__ == "__main__":
    main()
