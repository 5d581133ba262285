"""`python -m secateur`."""

from secateur.cli import main

if __name__ == "__main__":
    main()
