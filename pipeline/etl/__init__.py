"""Preparation of raw data into a prepared data set."""
