"""`python -m lmworks`: the same as the command `lmworks`."""

from lmworks.cli import main

if __name__ == "__main__":
    main()
