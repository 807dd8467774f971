"""Tests of the evaluation package."""

from tests.made import data_folder
from tests.made import tiny_folder as tiny_model_folder

__all__ = ["data_folder", "tiny_model_folder"]
