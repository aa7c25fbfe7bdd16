"""Tests of recipes, and of the tables and figures made from them."""
