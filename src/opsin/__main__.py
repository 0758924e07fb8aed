"""`python -m opsin`, and the `opsin` command."""

from opsin.cli.app import main

if __name__ == "__main__":
    main()
