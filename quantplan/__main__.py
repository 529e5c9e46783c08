"""`python -m quantplan`: the command line."""

from quantplan.cli import main

main()
