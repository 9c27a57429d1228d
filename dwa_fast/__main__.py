"""`python -m dwa_fast` is the command `dwa-fast`."""

from dwa_fast.commands.cli import main

if __name__ == "__main__":
    main()
