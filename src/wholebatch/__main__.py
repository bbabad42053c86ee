"""``python -m wholebatch`` is the command."""

from wholebatch.cli import main

if __name__ == "__main__":
    main()
