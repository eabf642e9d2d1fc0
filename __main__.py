"""`python -m kvshard`, the same as the `kvshard` command."""

from kvshard.launch.cli import main

if __name__ == "__main__":
    main()
