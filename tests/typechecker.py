"""What checks the annotations of the package while tests run; conftest.py installs it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484
