"""`python -m ds4jax` is the command `ds4jax`."""

from ds4jax.cli import main

if __name__ == "__main__":
    main()
