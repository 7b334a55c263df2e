"""Data, order and time: from files on disk to a trained, evaluated and reported model."""
