"""What a person starts: the command line and each of its commands."""
