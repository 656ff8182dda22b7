"""`python -m vmherd`: the command line."""

from vmherd.cli.main import main

if __name__ == "__main__":
    main()
