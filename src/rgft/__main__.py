"""`python -m rgft` is the command `rgft`."""

from rgft.cli.app import main

if __name__ == "__main__":  # worker processes import it, too
    main()
