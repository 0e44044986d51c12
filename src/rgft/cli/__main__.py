"""`python -m rgft.cli`."""

from rgft.cli.app import main

main()
