"""`python -m ksm_edge`: the command `ksm-edge`, where an environment's scripts are not on the path."""

from ksm_edge.cli.main import entry

if __name__ == "__main__":
    entry()
