import pathlib
import sys

# `experiments` is not installed with the package: it is imported from the checkout
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
