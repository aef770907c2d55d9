"""Python imports this by itself when the folder is on PYTHONPATH: so the real commands of a trial have its kill point too."""

from tests.faults.kill_point import install

install()
