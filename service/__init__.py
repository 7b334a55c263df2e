"""The control plane: jobs over REST, and the command line."""
