"""The settings: one typed class a poison, a defence and the monitor, checked where it is made."""
