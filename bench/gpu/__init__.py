"""Everything that is measured when a GPU is at hand, in one command: `python -m bench.gpu`; `README.md` says what to bring."""
