"""`python -m rgft` is the command `rgft`."""

from rgft.cli.app import main

main()
